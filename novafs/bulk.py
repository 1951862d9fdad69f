"""Whole images in and out: the path of `novafs import` and `export`, past the dirty layers and L1.

An import stores chunks in order with several batches in preparation at once, builds the map bottom-up in constant
memory, commits one generation, and only then gives it a name: an interrupted import leaves packs that nothing names.
"""

from __future__ import annotations

import secrets
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Final

import trio

from novafs.asynctools import open_nursery
from novafs.chunk import HOLE_BYTES, Reference
from novafs.errors import SourceError
from novafs.generation import Generation
from novafs.image import Image
from novafs.imagemap import MapBuilder
from novafs.packwriter import PacksLostError, PackWriter, Prepared
from novafs.revisions import new_nonce
from novafs.volume import Volume

BATCH_BYTES: Final = 1 << 20
READ_BYTES: Final = 4 << 20


@dataclass(frozen=True, slots=True)
class ImportResult:
    """What an import did. Bytes but for the counts of chunks; allocated: of chunks that are no hole."""

    size: int
    allocated_bytes: int
    new_chunks: int
    dedup_chunks: int
    stored_bytes: int
    seconds: float


class _Batch:
    """Chunks on their way through `PackWriter.prepare`."""

    __slots__ = ("indexes", "plains", "prepared", "ready")

    def __init__(self, indexes: list[int], plains: list[bytes]) -> None:
        self.indexes = indexes
        self.plains = plains
        self.prepared: list[Prepared] = []
        self.ready = trio.Event()

    async def prepare(self, writer: PackWriter) -> None:
        self.prepared = await writer.prepare(self.plains)
        self.ready.set()


async def import_stream(
    volume: Volume,
    parent_id: bytes,
    name: str,
    source: AsyncIterator[tuple[int, bytes]],
    *,
    size: int | None,
    workers: int = 4,
    progress: Callable[[int], None] = lambda _: None,
    mode: int = 0o644,
    uid: int = 0,
    gid: int = 0,
    replace: bool = False,
) -> ImportResult:
    """Make image `name` from `source`, which yields ascending, disjoint runs (offset, data); what lies between is zero.

    size: bytes, or None where the end of the last run is the end of the image. progress: called with the bytes of
    the image that are behind. Raises SourceError (runs out of order, or beyond `size`), and what the store raises.
    """
    started = time.monotonic()
    chunk_size = volume.chunk_size
    await volume.dedup.fill()
    per_batch = max(1, BATCH_BYTES // chunk_size)
    waiting: deque[_Batch] = deque()
    stored = allocated = 0

    async with volume.pack_writer(cache=False) as writer, open_nursery() as nursery:
        builder = MapBuilder(None if size is None else (size + chunk_size - 1) // chunk_size, writer.put_blob)

        async def settle(keep: int) -> None:
            nonlocal stored, allocated
            while len(waiting) > keep:
                batch = waiting.popleft()
                await batch.ready.wait()
                for index, entry in zip(batch.indexes, await writer.append(batch.prepared), strict=True):
                    if entry != HOLE_BYTES:
                        stored += Reference.unpack(entry).length
                        allocated += 1
                        await builder.add(index, entry)
                progress(min((batch.indexes[-1] + 1) * chunk_size, size if size is not None else 1 << 62))

        batch = _Batch([], [])
        end = 0
        async with aclosing(_chunks(source, chunk_size, size)) as chunks:
            async for index, plain, end in chunks:  # noqa: B007  # `end` is wanted after the loop
                batch.indexes.append(index)
                batch.plains.append(plain)
                if len(batch.plains) >= per_batch:
                    waiting.append(batch)
                    nursery.start_soon(batch.prepare, writer)
                    batch = _Batch([], [])
                    await settle(workers)
        if batch.plains:
            waiting.append(batch)
            nursery.start_soon(batch.prepare, writer)
        await settle(0)
        length = end if size is None else size
        state = await builder.finish((length + chunk_size - 1) // chunk_size)
        await writer.finish()
        counts, used = writer.counts, writer.used

    async def confirm() -> None:
        if gone := await used.lost():
            raise PacksLostError(gone, committed=True)

    now = time.time_ns()
    generation = Generation(
        image_id=secrets.token_bytes(16),
        counter=0,
        nonce=new_nonce(),
        size=length,
        mtime_ns=now,
        ctime_ns=now,
        committed_ns=now,
        levels=state.levels,
        top=state.top,
        stored_bytes=stored,
        allocated_chunks=allocated,
    )
    await volume.create(parent_id, name, mode=mode, uid=uid, gid=gid, generation=generation, replace=replace, confirm=confirm)
    progress(length)
    return ImportResult(
        size=length,
        allocated_bytes=allocated * chunk_size,
        new_chunks=counts.new_chunks,
        dedup_chunks=counts.dedup_chunks,
        stored_bytes=counts.stored_bytes,
        seconds=time.monotonic() - started,
    )


async def _chunks(
    source: AsyncIterator[tuple[int, bytes]], chunk_size: int, size: int | None
) -> AsyncGenerator[tuple[int, bytes, int], None]:
    """Whole chunks (index, plain, end of the source so far) from runs; chunks that no run touches are left out."""
    index, buffer, filled_to = -1, bytearray(), 0
    end = 0
    async for offset, data in source:
        if offset < end:
            raise SourceError(f"the source went back from byte {end} to {offset}")
        if size is not None and offset + len(data) > size:
            raise SourceError(f"the source has data at byte {offset + len(data)}, beyond its size of {size} bytes")
        view = memoryview(data)
        at = 0
        while at < len(view):
            wanted, start = divmod(offset + at, chunk_size)
            if wanted != index:
                if filled_to:
                    yield index, bytes(buffer), end
                    filled_to = 0
                index = wanted
            part = view[at : at + chunk_size - start]
            at += len(part)
            end = offset + at
            if len(part) == chunk_size:
                yield index, bytes(part), end
                continue
            if not filled_to:
                buffer = bytearray(chunk_size)
            buffer[start : start + len(part)] = part
            filled_to = start + len(part)
    if filled_to:
        yield index, bytes(buffer), end


async def export_runs(image: Image, *, run_bytes: int = READ_BYTES) -> AsyncGenerator[tuple[int, bytes], None]:
    """The committed content of an image as ascending runs (offset, data) of at most `run_bytes`, holes left out."""
    async with aclosing(image.extents()) as extents:
        async for offset, length in extents:
            for at in range(offset, offset + length, run_bytes):
                yield at, await image.read(at, min(run_bytes, offset + length - at))
