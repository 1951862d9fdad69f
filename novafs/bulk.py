"""Whole images in and out: the path of `novafs import` and `export`, past the dirty layers and L1.

An import stores chunks in order with several batches in preparation at once, builds the map bottom-up in constant
memory, commits one generation, and only then gives it a name: an interrupted import leaves packs that nothing names.
"""

from __future__ import annotations

import os
import secrets
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Final

import trio

from novafs.asynctools import open_nursery
from novafs.chunk import HOLE_BYTES, Reference, stored_bytes
from novafs.errors import SourceError
from novafs.generation import Generation
from novafs.image import Image
from novafs.imagemap import MapBuilder, MapState
from novafs.packwriter import Content, PacksLostError, PackWriter, Prepared, UsedPacks, WriteCounts
from novafs.revisions import new_nonce
from novafs.volume import Volume

BATCH_BYTES: Final = 4 << 20
"""Of content; a batch wakes three threads one after the other, which takes as long whatever there is to do."""
BATCH_CHUNKS: Final = 256
"""Chunks in one at most: they are placed in one go, and nothing else runs meanwhile."""
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

    def __init__(self, indexes: list[int], plains: list[Content]) -> None:
        self.indexes = indexes
        self.plains = plains
        self.prepared: list[Prepared] = []
        self.ready = trio.Event()

    async def prepare(self, writer: PackWriter) -> None:
        self.prepared = await writer.prepare(self.plains)
        self.plains = []
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
    ending: Callable[[], Awaitable[object]] = trio.lowlevel.checkpoint,
) -> StoredContent:
    """Store what `source` yields: ascending, disjoint runs (offset, data); what lies between is zero.

    size: bytes, or None where the end of the last run is the end of the content. progress: called with the bytes of
    it that are behind. cache: what is stored goes into L1 and L2 as well. ending: what the caller asks of the store next, which may
    as well be asked while the last packs are on their way. Raises SourceError (runs out of order, or beyond `size`), and what the
    store raises.
    """
    chunk_size = volume.chunk_size
    per_batch = max(1, min(BATCH_CHUNKS, BATCH_BYTES // chunk_size))
    waiting: deque[_Batch] = deque()
    stored = allocated = 0
    # Their own threads, no more than there are processors, which others want as well; and one for the map's nodes, which all wait for.
    threads_max = min(workers, len(os.sched_getaffinity(0))) + 1
    threads = trio.CapacityLimiter(threads_max)
    # More batches than twice what is worked on would only wait, and each takes twice its bytes.
    ahead = min(workers, 2 * threads_max)

    async with volume.pack_writer(cache=cache, workers=threads) as writer, open_nursery() as nursery:
        builder = MapBuilder(None if size is None else (size + chunk_size - 1) // chunk_size, writer.put_blob)

        async def settle(keep: int) -> None:
            nonlocal stored, allocated
            while len(waiting) > keep:
                batch = waiting.popleft()
                await batch.ready.wait()
                placed = await writer.append(batch.prepared)
                entries = [(index, entry) for index, entry in zip(batch.indexes, placed, strict=True) if entry != HOLE_BYTES]
                stored += sum(stored_bytes(entry) for _, entry in entries)
                allocated += len(entries)
                await builder.add_many(entries)
                progress(min((batch.indexes[-1] + 1) * chunk_size, size if size is not None else 1 << 62))

        # What is stored already, and what of it may not be referred to, while the first content is read and hashed.
        writer.known = trio.Event()
        nursery.start_soon(_look, volume, writer.known)
        slicer = _Slicer(chunk_size, size)
        async with aclosing(_batches(source, slicer, per_batch)) as batches:
            async for batch in batches:
                waiting.append(batch)
                nursery.start_soon(batch.prepare, writer)
                await settle(ahead)
        await settle(0)
        length = slicer.end if size is None else size
        state = await builder.finish((length + chunk_size - 1) // chunk_size)
        nursery.start_soon(ending)
        await writer.finish()
        counts, used = writer.counts, writer.used

    return StoredContent(_first(length, state, stored, allocated), counts, used)


async def _look(volume: Volume, done: trio.Event) -> None:
    async with open_nursery() as nursery:
        nursery.start_soon(volume.dedup.fill)
        nursery.start_soon(volume.dedup.condemned.refresh)
    done.set()


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
    per_batch = max(1, min(BATCH_CHUNKS, BATCH_BYTES // chunk_size))
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
    content = await store_content(volume, source, size=size, workers=workers, progress=progress, ending=volume.catalog.refresh)
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


async def _batches(source: AsyncIterator[tuple[int, bytes]], slicer: _Slicer, per_batch: int) -> AsyncGenerator[_Batch, None]:
    """What the source has, in batches of so many chunks."""
    batch = _Batch([], [])
    async for offset, data in source:
        for index, plain in slicer.feed(offset, data):
            batch.indexes.append(index)
            batch.plains.append(plain)
            if len(batch.plains) == per_batch:
                yield batch
                batch = _Batch([], [])
    for index, plain in slicer.rest():
        batch.indexes.append(index)
        batch.plains.append(plain)
    if batch.plains:
        yield batch


class _Slicer:
    """Whole chunks (index, plain) from runs; chunks that no run touches are left out. A chunk that is whole in a run is a view of it."""

    def __init__(self, chunk_size: int, size: int | None) -> None:
        """size: of the content, bytes; None where nobody knows."""
        self._chunk_size = chunk_size
        self._size = size
        self._index = -1
        self._buffer = bytearray()
        self._filled_to = 0
        self.end = 0
        """Of the source, so far."""

    def feed(self, offset: int, data: bytes) -> Iterator[tuple[int, Content]]:
        """The chunks that are complete with this run. Raises SourceError where it lies before the last one, or beyond `size`."""
        if offset < self.end:
            raise SourceError(f"the source went back from byte {self.end} to {offset}")
        if self._size is not None and offset + len(data) > self._size:
            raise SourceError(f"the source has data at byte {offset + len(data)}, beyond its size of {self._size} bytes")
        chunk_size = self._chunk_size
        view = memoryview(data)
        at = 0
        while at < len(view):
            wanted, start = divmod(offset + at, chunk_size)
            if wanted != self._index:
                yield from self.rest()
                self._index = wanted
            part = view[at : at + chunk_size - start]
            at += len(part)
            self.end = offset + at
            if len(part) == chunk_size:
                yield wanted, part
                continue
            if not self._filled_to:
                self._buffer = bytearray(chunk_size)
            self._buffer[start : start + len(part)] = part
            self._filled_to = start + len(part)

    def rest(self) -> Iterator[tuple[int, Content]]:
        """The last chunk, zeros at its end, where it is not complete."""
        if self._filled_to:
            self._filled_to = 0
            yield self._index, bytes(self._buffer)


async def export_runs(image: Image, *, run_bytes: int = READ_BYTES) -> AsyncGenerator[tuple[int, bytes], None]:
    """The committed content of an image as ascending runs (offset, data) of at most `run_bytes`, holes left out."""
    async with aclosing(image.extents()) as extents:
        async for offset, length in extents:
            for at in range(offset, offset + length, run_bytes):
                yield at, await image.read(at, min(run_bytes, offset + length - at))
