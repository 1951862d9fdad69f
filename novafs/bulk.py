"""Whole images in and out: the path of `novafs import` and `export`, past the dirty layers and L1.

An import stores chunks in order with several batches in preparation at once, builds the map bottom-up in constant
memory, commits one generation, and only then gives it a name: an interrupted import leaves packs that nothing names.
"""

from __future__ import annotations

import secrets
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Final

import trio

from novafs.asynctools import open_nursery
from novafs.chunk import HOLE_BYTES, Reference
from novafs.errors import SourceError
from novafs.generation import Generation
from novafs.image import Image
from novafs.imagemap import MapBuilder, MapState
from novafs.packwriter import PacksLostError, PackWriter, Prepared, UsedPacks, WriteCounts
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


@dataclass(frozen=True, slots=True)
class StoredContent:
    """Content that is stored and has no name yet.

    generation: the first of a new image, not created. counts, used: of all that was stored together with it.
    """

    generation: Generation
    counts: WriteCounts
    used: UsedPacks

    async def confirm(self) -> None:
        """Raises PacksLostError where a collection has taken a pack meanwhile."""
        if gone := await self.used.lost():
            raise PacksLostError(gone, committed=True)


async def store_content(
    volume: Volume,
    source: AsyncIterator[tuple[int, bytes]],
    *,
    size: int | None,
    workers: int = 4,
    progress: Callable[[int], None] = lambda _: None,
    cache: bool = False,
) -> StoredContent:
    """Store what `source` yields: ascending, disjoint runs (offset, data); what lies between is zero.

    size: bytes, or None where the end of the last run is the end of the content. progress: called with the bytes of
    it that are behind. cache: what is stored goes into L1 and L2 as well. Raises SourceError (runs out of order, or beyond `size`),
    and what the store raises.
    """
    chunk_size = volume.chunk_size
    await volume.dedup.fill()
    per_batch = max(1, BATCH_BYTES // chunk_size)
    waiting: deque[_Batch] = deque()
    stored = allocated = 0

    async with volume.pack_writer(cache=cache) as writer, open_nursery() as nursery:
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

    return StoredContent(_first(length, state, stored, allocated), counts, used)


def _first(size: int, state: MapState, stored_bytes: int, allocated_chunks: int) -> Generation:
    """The first generation of a new image with this content."""
    now = time.time_ns()
    return Generation(
        image_id=secrets.token_bytes(16),
        counter=0,
        nonce=new_nonce(),
        size=size,
        mtime_ns=now,
        ctime_ns=now,
        committed_ns=now,
        levels=state.levels,
        top=state.top,
        stored_bytes=stored_bytes,
        allocated_chunks=allocated_chunks,
    )


async def store_values(volume: Volume, values: Sequence[bytes], *, cache: bool = False) -> list[StoredContent]:
    """Store several contents in as few packs as they take; for those that are in memory anyway. Raises what the store raises."""
    chunk_size = volume.chunk_size
    per_batch = max(1, BATCH_BYTES // chunk_size)
    await volume.dedup.fill()
    made: list[Generation] = []
    async with volume.pack_writer(cache=cache) as writer:
        for data in values:
            chunks = (len(data) + chunk_size - 1) // chunk_size
            builder, stored, allocated = MapBuilder(chunks, writer.put_blob), 0, 0
            for first in range(0, chunks, per_batch):
                starts = range(first * chunk_size, min(first + per_batch, chunks) * chunk_size, chunk_size)
                plains = [data[start : start + chunk_size].ljust(chunk_size, b"\0") for start in starts]
                for index, entry in enumerate(await writer.put(plains), first):
                    if entry != HOLE_BYTES:
                        stored += Reference.unpack(entry).length
                        allocated += 1
                        await builder.add(index, entry)
            made.append(_first(len(data), await builder.finish(chunks), stored, allocated))
        await writer.finish()
        counts, used = writer.counts, writer.used
    return [StoredContent(generation, counts, used) for generation in made]


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
    """Make image `name` from `source`; arguments and errors of `store_content`, and of `Volume.create`."""
    started = time.monotonic()
    content = await store_content(volume, source, size=size, workers=workers, progress=progress)
    first, counts = content.generation, content.counts
    await volume.create(parent_id, name, mode=mode, uid=uid, gid=gid, generation=first, replace=replace, confirm=content.confirm)
    progress(first.size)
    return ImportResult(
        size=first.size,
        allocated_bytes=first.allocated_chunks * volume.chunk_size,
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
