"""An image against a plain byte array: writes, reads, resizes, commits and reopens in any order (Hypothesis)."""

from __future__ import annotations

import shutil
import tempfile
from contextlib import aclosing
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import trio
import trio.testing
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from novafs.catalogtree import ROOT_ID
from novafs.errors import StoreUnavailableError
from novafs.image import Image
from novafs.volume import Volume
from tests.support.engine import fresh_volume
from tests.support.portal import Portal

CHUNK = 4096
SPAN = 40 * CHUNK
EDGES = st.sampled_from([0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 17 * CHUNK - 5, 20 * CHUNK, SPAN - 1, SPAN])
OFFSETS = st.one_of(st.integers(0, SPAN), EDGES)
LENGTHS = st.one_of(st.integers(1, 3 * CHUNK), st.sampled_from([1, 511, CHUNK, 2 * CHUNK, 8 * CHUNK]))


class ImageMachine(RuleBasedStateMachine):
    """Model: a bytearray. The volume lives on a trio thread of its own, so that rules can be plain functions."""

    def __init__(self) -> None:
        super().__init__()
        self.directory = Path(tempfile.mkdtemp())
        self.portal = Portal()
        self.manager: Any = None
        self.model = bytearray()
        self.committed = bytearray()

    @initialize()
    def open(self) -> None:
        self.volume: Volume = self.portal.enter(lambda: fresh_volume(self.directory, chunk_size=CHUNK, writeback__interval="1h"))

        async def make() -> Image:
            entry = await self.volume.create(ROOT_ID, "disk.raw")
            self.node_id = entry.node_id
            return await self.volume.open_image(entry.node_id)

        self.image: Image = self.portal.run(make)

    @rule(offset=OFFSETS, length=LENGTHS, seed=st.integers(0, 255), kind=st.sampled_from(["data", "zeros", "same"]))
    def write(self, offset: int, length: int, seed: int, kind: str) -> None:
        data = {"data": bytes((seed + i) & 255 for i in range(length)), "zeros": bytes(length), "same": b"\xaa" * length}[kind]
        assert self.portal.run(self.image.write, offset, data) == length
        if offset > len(self.model):
            self.model.extend(bytes(offset - len(self.model)))
        self.model[offset : offset + length] = data

    @rule(size=OFFSETS)
    def resize(self, size: int) -> None:
        self.portal.run(self.image.resize, size)
        del self.model[size:]
        self.model.extend(bytes(size - len(self.model)))

    @rule(offset=OFFSETS, length=LENGTHS)
    def read(self, offset: int, length: int) -> None:
        expected = bytes(self.model[offset : offset + length])
        quick = self.portal.run_sync(self.image.read_nowait, offset, length)
        assert quick is None or quick == expected
        assert self.portal.run(self.image.read, offset, length) == expected

    @rule(brief=st.booleans())
    def commit(self, brief: bool) -> None:
        self.portal.run(lambda: self.image.commit(brief=brief))
        self.committed = bytearray(self.model)
        assert not self.image.dirty

    @precondition(lambda self: self.image.dirty)
    @rule(writes=st.lists(st.tuples(OFFSETS, LENGTHS, st.one_of(st.none(), OFFSETS)), min_size=1, max_size=4))
    def commits_that_fail(self, writes: list[tuple[int, int, int | None]]) -> None:
        """The store is away; more is written meanwhile. Nothing is lost, and nothing piles up."""

        def away() -> Any:
            raise StoreUnavailableError("scripted")

        writeback, works = self.volume.writeback, self.volume.writeback.pack_writer
        writeback.pack_writer = away  # type: ignore[method-assign]
        try:
            for number, (offset, length, size) in enumerate(writes):
                with pytest.raises(StoreUnavailableError):
                    self.portal.run(self.image.commit)
                self.write(offset, length, number, "data")
                if size is not None:
                    self.resize(size)
                self.all_bytes_are_there()
                assert len(self.image._layers) <= 2
                pending = sum(len(record.data) for record in self.image._pending)
                held = sum(len(layer.chunks) for layer in self.image._layers) * CHUNK
                assert self.image.dirty_bytes == self.volume.writeback._dirty_bytes == held + pending
        finally:
            writeback.pack_writer = works  # type: ignore[method-assign]

    @rule(offset=OFFSETS, length=LENGTHS, size=OFFSETS, brief=st.booleans())
    def write_while_committing(self, offset: int, length: int, size: int, brief: bool) -> None:
        """A commit holds all writes before it and none after; readers see every write at once."""
        before = bytes(self.model)
        data = b"\x55" * length

        async def both() -> None:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(lambda: self.image.commit(brief=brief))
                await trio.testing.wait_all_tasks_blocked(0.001)
                await self.image.write(offset, data)
                await self.image.resize(max(size, 1))
                assert await self.image.read(0, SPAN * 2) == bytes(after)

        after = bytearray(self.model)
        if offset > len(after):
            after.extend(bytes(offset - len(after)))
        after[offset : offset + length] = data
        del after[max(size, 1) :]
        after.extend(bytes(max(size, 1) - len(after)))
        was_dirty = self.image.dirty
        generation = self.image.generation
        self.portal.run(both)
        self.model = after
        if was_dirty and self.image.generation > generation:
            self.committed = bytearray(before)

    @precondition(lambda self: not self.image.dirty)
    @rule()
    def reopen(self) -> None:
        async def again() -> Image:
            await self.volume.close_image(self.image)
            return await self.volume.open_image(self.node_id)

        self.image = self.portal.run(again)

    @rule()
    def drop_caches(self) -> None:
        self.portal.run_sync(self.volume.cache.l1.clear)
        self.portal.run_sync(self.image.trim_map, 0)

    @invariant()
    def all_bytes_are_there(self) -> None:
        if not hasattr(self, "image"):
            return
        assert self.image.size == len(self.model)
        assert self.portal.run(self.image.read, 0, SPAN * 2) == bytes(self.model)

    @invariant()
    def a_clean_image_counts_what_it_stores(self) -> None:
        if not hasattr(self, "image") or self.image.dirty or self.image.head.patch:
            return
        found = self.portal.run(self.image.statistics)
        chunks = [bytes(self.model[at : at + CHUNK]).ljust(CHUNK, b"\0") for at in range(0, len(self.model), CHUNK)]
        full = [c for c in chunks if c.count(0) != CHUNK]
        assert found.allocated_chunks == len(full) == self.image.head.allocated_chunks
        assert found.unique_chunks == len(set(full))
        assert found.stored_bytes == self.image.head.stored_bytes
        assert found.hole_chunks == len(chunks) - len(full)

    @invariant()
    def what_is_in_no_extent_is_zero(self) -> None:
        if not hasattr(self, "image") or self.image.dirty:
            return

        async def extents() -> list[tuple[int, int]]:
            async with aclosing(self.image.extents()) as found:
                return [extent async for extent in found]

        rest = bytearray(self.model)
        for offset, length in self.portal.run(extents):
            rest[offset : offset + length] = bytes(length)
        assert rest.count(0) == len(rest) == len(self.model)

    def teardown(self) -> None:
        async def last() -> None:
            await self.volume.close_image(self.image)

        try:
            if hasattr(self, "image"):
                self.portal.run(last)
        finally:
            self.portal.close()
            shutil.rmtree(self.directory)


TestImageMachine = ImageMachine.TestCase
TestImageMachine.settings = settings(max_examples=40, stateful_step_count=20, deadline=None)
