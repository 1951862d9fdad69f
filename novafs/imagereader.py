"""Reading an open image: the newest of what dirty layers and the committed map say, byte by byte.

What a reader sees at a byte is the newest dirty layer that has it (`novafs.dirty`), else the generation's patch (`novafs.patch`), else
its map. Always holds: `_state`, the map, and `_patch` equal the generation `_head`. All of it is touched on the trio thread alone,
and what a read needs of it is taken in one step between two checkpoints; `novafs.image` adds the writing side.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from itertools import islice
from time import perf_counter
from typing import Final, Protocol

import numpy as np
import numpy.typing as npt

from novafs import dirty
from novafs.cache.tiered import ChunkCache
from novafs.chunk import HOLE_BYTES, Reference
from novafs.dirty import Layer, Overlay
from novafs.errors import FrameCorruptError
from novafs.follow import Follower
from novafs.generation import Generation
from novafs.imagemap import Fetch, MapState
from novafs.patch import layer_of
from novafs.prefetch.base import place_of
from novafs.revisions import Head

log = logging.getLogger(__name__)

READ_BATCH_MAX: Final = 1 << 20
_ZEROS: Final = bytes(READ_BATCH_MAX)
"""Of holes: a copy of an image reads more of them than of anything else."""


@dataclass(frozen=True, slots=True)
class ImageStatistics:
    """Figures of one generation. Bytes but for the counts; ratios are plain / stored, 1.0 where nothing is stored."""

    size: int
    generation: int
    stored_bytes: int
    allocated_chunks: int
    hole_chunks: int
    unique_chunks: int
    unique_stored_bytes: int
    dedup_ratio: float
    compression_ratio: float


@dataclass(slots=True)
class ImageTraffic:
    """What was read and written through an open image. memory_*: what dirty data and L1 answered at once; waited_*: the other reads."""

    memory_reads: int = 0
    memory_bytes: int = 0
    waited_reads: int = 0
    waited_bytes: int = 0
    writes: int = 0
    written_bytes: int = 0

    def add(self, other: ImageTraffic) -> None:
        """Count what `other` has counted as well."""
        self.memory_reads += other.memory_reads
        self.memory_bytes += other.memory_bytes
        self.waited_reads += other.waited_reads
        self.waited_bytes += other.waited_bytes
        self.writes += other.writes
        self.written_bytes += other.written_bytes


class Watcher(Protocol):
    """Who is told of what is read: `novafs.prefetcher`. Neither call takes a checkpoint or raises."""

    def touched(self, image: ImageReader, first: int, last: int) -> None:
        """Chunks were read, and all were there."""
        ...

    def missed(self, image: ImageReader, first: int, last: int, missing: Sequence[int]) -> None:
        """Chunks are being read; those in `missing` are on their way."""
        ...


class ImageReader:
    """The reading half of `Image`; not used on its own."""

    def __init__(
        self, *, node_id: bytes, name: str, chunk_size: int, head: Head[Generation], cache: ChunkCache, watcher: Watcher | None = None
    ) -> None:
        self.node_id = node_id
        self.name = name
        """Path at open, for messages."""
        self.chunk_size = chunk_size
        self._shift = chunk_size.bit_length() - 1
        self._cache = cache
        self._watcher = watcher
        self.watch_number = 0
        """The watcher's."""
        self.watch_reads = 0
        """The watcher's, too."""
        self.watch_from = 1 << 62
        """The watcher wants to know at once of a read of this chunk or one beyond."""
        self._told = -1
        """The chunk that the watcher was told of last."""
        self.follower: Follower | None = None
        """Set while this is open for writing here without the right to write it: who has that is looked for before a read."""
        self.traffic = ImageTraffic()
        self._memory_reads = cache.latencies.of("l1", "get")
        self._layers: list[Layer] = [Layer()]
        self._patch: Layer | None = None
        self._statistics: ImageStatistics | None = None
        self._adopt(head)

    def _adopt(self, head: Head[Generation], state: MapState | None = None) -> None:
        generation = head.record
        self._head = head
        self._state = state if state is not None else generation.map_state(self.chunk_size)
        self._patch = layer_of(generation.patch, self.chunk_size) if generation.patch else None
        self._statistics = None
        if not self.dirty:
            self.size = generation.size
            self.mtime_ns = generation.mtime_ns
            self.ctime_ns = generation.ctime_ns

    # -- what it is ---------------------------------------------------------------------------------------------

    @property
    def generation(self) -> int:
        """Counter of the committed generation that the map is of."""
        return self._head.record.counter

    @property
    def head(self) -> Generation:
        """The committed generation."""
        return self._head.record

    @property
    def dirty(self) -> bool:
        """Whether something is in no generation yet."""
        return any(layer.touched for layer in self._layers)

    @property
    def map_bytes(self) -> int:
        """Memory that the loaded part of the map takes, and the patch over it."""
        return self._state.loaded_bytes + (len(self._patch.chunks) * self.chunk_size if self._patch is not None else 0)

    def trim_map(self, keep_leaves: int) -> None:
        """Give back memory of the map; it is fetched again when needed."""
        self._state.trim(keep_leaves)

    @property
    def stored_bytes(self) -> int:
        """Payload bytes that the committed generation references, or carries."""
        return self._head.record.held_bytes

    # -- reading ------------------------------------------------------------------------------------------------

    def read_nowait(self, offset: int, length: int) -> bytes | None:
        """The bytes where dirty data and L1 hold them all, without a checkpoint; None where `read` is needed."""
        began_s = perf_counter()
        if self.follower is not None and not self.follower.settled:
            return None
        length = min(length, self.size - offset)
        if length <= 0:
            return b""
        first = offset >> self._shift
        last = (offset + length - 1) >> self._shift
        parts: list[bytes | bytearray] = []
        if last > first and self.hole_nowait(first, last):
            parts.append(_ZEROS[:length] if length <= READ_BATCH_MAX else bytes(length))
        else:
            for index in range(first, last + 1):
                start = offset - (index << self._shift) if index == first else 0
                end = offset + length - (index << self._shift) if index == last else self.chunk_size
                part = self._chunk_nowait(index, start, end)
                if part is None:
                    return None
                parts.append(part)
        if self._watcher is not None and (last != self._told or first != last):
            self._told = last
            self._watcher.touched(self, first, last)
        # All that a hot read costs to be counted (`tests/bench/instrumentation.py`).
        traffic = self.traffic
        traffic.memory_reads += 1
        traffic.memory_bytes += length
        self._memory_reads.note(perf_counter() - began_s)
        # `bytes` gives back a `bytes` object itself, so the common single whole chunk is not copied.
        return bytes(parts[0]) if len(parts) == 1 else b"".join(parts)

    def _overlay(self, index: int) -> Overlay | None:
        if self._patch is not None:
            return dirty.overlay([self._patch, *self._layers], self.chunk_size, index)
        return dirty.overlay(self._layers, self.chunk_size, index) if self.dirty else None

    def _chunk_nowait(self, index: int, start: int, end: int) -> bytes | bytearray | None:
        found = self._overlay(index)
        if found is not None and dirty.covers(found, start, end):
            return dirty.compose(found, None, start, end)
        entry = self._state.entry_nowait(index)
        if entry is None:
            return None
        if entry == HOLE_BYTES:
            plain: bytes | None = None
        else:
            plain = self._cache.peek(entry[:32])
            if plain is None or len(plain) != self.chunk_size:  # of another length: `read` says what is wrong with it
                return None
        if found is not None:
            return dirty.compose(found, plain, start, end)
        if plain is None:
            return bytes(end - start)
        return plain if end - start == len(plain) else plain[start:end]

    async def read(self, offset: int, length: int) -> bytes:
        """The bytes; short only at the end of the image.

        Raises FrameCorruptError (a damaged chunk: never zeros), StoreUnavailableError.
        """
        length = min(length, self.size - offset)
        if length <= 0:
            return b""
        if length > READ_BATCH_MAX:
            parts = []
            for at in range(offset, offset + length, READ_BATCH_MAX):
                wanted = min(READ_BATCH_MAX, offset + length - at)
                parts.append(await ImageReader.read(self, at, wanted))
                if len(parts[-1]) < wanted:
                    break  # cut meanwhile: what it may have grown to since does not follow on this
            return b"".join(parts)
        self.traffic.waited_reads += 1
        self.traffic.waited_bytes += length
        first = offset >> self._shift
        last = (offset + length - 1) >> self._shift
        while True:
            state = self._state
            entries = await state.entries(first, last - first + 1, self._cache.fetch)
            if state is self._state:
                break
        # From here to the fetch there is no checkpoint: overlays and entries are of one moment.
        plans: list[tuple[int, int, Overlay | None, int]] = []
        references: list[Reference] = []
        offsets: list[int] = []
        for number, entry in enumerate(entries):
            index = first + number
            start = offset - (index << self._shift) if index == first else 0
            end = offset + length - (index << self._shift) if index == last else self.chunk_size
            found = self._overlay(index)
            wanted = -1
            if entry != HOLE_BYTES and not (found is not None and dirty.covers(found, start, end)):
                wanted = len(references)
                references.append(Reference.unpack(entry))
                offsets.append(index << self._shift)
            plans.append((start, end, found, wanted))
        if self._watcher is not None:
            self._told = last
            present = self._cache.l1.contains
            missing = [
                offset >> self._shift for offset, reference in zip(offsets, references, strict=True) if not present(reference.chunk_id)
            ]
            self._watcher.missed(self, first, last, missing)
        plains = await self._fetch(references, offsets)
        parts = []
        for start, end, found, wanted in plans:
            plain = plains[wanted] if wanted >= 0 else None
            if found is not None:
                parts.append(bytes(dirty.compose(found, plain, start, end)))
            elif plain is None:
                parts.append(bytes(end - start))
            else:
                parts.append(plain if end - start == len(plain) else plain[start:end])
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def entry_nowait(self, index: int) -> bytes | None:
        """The committed map's 64-byte entry of a chunk, None where that part of the map is not loaded."""
        return self._state.entry_nowait(index)

    def hole_nowait(self, first: int, last: int) -> bool:
        """Whether these chunks are known to be zeros, with nothing ever stored there; False where that takes more than a look."""
        return self._patch is None and self._state.hole_nowait(first, last) and not self.dirty

    def map_leaves(self, fetch: Fetch) -> AsyncGenerator[tuple[int, npt.NDArray[np.void]], None]:
        """The committed map's leaves that are no holes, in order: first chunk, and references. Nodes come by `fetch`, and are not kept."""
        return self._state.leaves(fetch)

    def loaded_leaves(self) -> list[int]:
        """Which leaves of the map are loaded: each is the entries of 256 chunks. Empty where the map has none of its own."""
        return self._state.loaded_leaves()

    def map_ahead(self, first: int, end: int) -> list[tuple[int, Reference]]:
        """The leaves of the map for chunks `first` to `end`, excluded, that are not loaded and can be: the first chunk of each, and where
        it is stored. Leaves of holes need not be fetched and are not named."""
        return self._state.leaves_ahead(first, end)

    def dirty_chunks(self, most: int) -> list[int]:
        """Chunks that dirty layers hold, at most so many of a layer; one may be named more than once."""
        return [index for layer in self._layers for index in islice(layer.chunks, most)]

    async def load_entries(self, indexes: Sequence[int]) -> None:
        """Load the map where these chunks are. Raises what a read raises."""
        await self._state.load_many(indexes, self._cache.fetch)

    async def _fetch(self, references: Sequence[Reference], offsets: Sequence[int]) -> list[bytes]:
        if not references:
            return []
        try:
            places = [place_of(self.watch_number, offset >> self._shift) for offset in offsets] if self._watcher is not None else ()
            plains = await self._cache.fetch(references, places)
        except FrameCorruptError as error:
            at = next((o for r, o in zip(references, offsets, strict=True) if r.chunk_id == error.chunk_id), -1)
            log.error(
                "image %(image)s (%(image_id)s): corrupt data at byte %(offset)d: %(error)s",
                {"image": self.name, "image_id": self.node_id.hex(), "offset": at, "error": error},
            )
            raise
        for reference, offset, plain in zip(references, offsets, plains, strict=True):
            if len(plain) != self.chunk_size:
                log.error("image %s: chunk at byte %d has %d bytes, expected %d", self.name, offset, len(plain), self.chunk_size)
                raise FrameCorruptError(
                    reference.chunk_id,
                    f"pack {reference.pack_id.hex()}",
                    reference.offset,
                    f"{len(plain)} bytes, expected {self.chunk_size}",
                )
        return plains

    async def statistics(self) -> ImageStatistics:
        """Figures of the committed generation. The first call for a generation walks the whole map."""
        if self._statistics is not None:
            return self._statistics
        state, head = self._state, self._head.record
        ids = [np.empty(0, dtype="S32")]
        lengths = [np.empty(0, dtype=np.uint32)]
        async for _, entries in state.leaves(self._cache.fetch):
            part = entries[entries["length"] > 0]
            ids.append(np.ascontiguousarray(part["id"]).view("S32"))  # numpy sorts S32, not V32
            lengths.append(part["length"])
        all_lengths = np.concatenate(lengths)
        all_ids = np.concatenate(ids)
        _, first = np.unique(all_ids, return_index=True)
        unique_stored = int(all_lengths[first].sum(dtype=np.int64))
        allocated, unique = len(all_ids), len(first)
        found = ImageStatistics(
            size=head.size,
            generation=head.counter,
            stored_bytes=int(all_lengths.sum(dtype=np.int64)),
            allocated_chunks=allocated,
            hole_chunks=state.chunks - allocated,
            unique_chunks=unique,
            unique_stored_bytes=unique_stored,
            dedup_ratio=allocated / unique if unique else 1.0,
            compression_ratio=unique * self.chunk_size / unique_stored if unique_stored else 1.0,
        )
        if self._head.record is head:
            self._statistics = found
        return found

    async def extents(self) -> AsyncGenerator[tuple[int, int], None]:
        """Ranges (offset, length) of the committed generation that are no hole, in order, neighbours joined."""
        start = end = -1
        size = self._head.record.size
        async with aclosing(self._used_chunks()) as parts:
            async for numbers in parts:
                for number in numbers:
                    at = number << self._shift
                    if at != end:
                        if end > start:
                            yield start, min(end, size) - start
                        start = at
                    end = at + self.chunk_size
        if end > start:
            yield start, min(end, size) - start

    async def _used_chunks(self) -> AsyncGenerator[list[int], None]:
        """Chunks that the map or the patch has, in order."""
        patched = np.array(sorted(self._patch.chunks) if self._patch is not None else [], dtype=np.int64)
        done = 0
        async with aclosing(self._state.leaves(self._cache.fetch)) as leaves:
            async for first, entries in leaves:
                # A leaf that is a hole is not among these, but a patch may lie over it: it comes along with the next one, or at the end.
                upto = int(np.searchsorted(patched, first + len(entries)))
                yield np.union1d(np.flatnonzero(entries["length"]) + first, patched[done:upto]).tolist()
                done = upto
        yield patched[done:].tolist()
