"""Dirty data: what was written to an image and is in no generation yet.

A `Layer` holds the writes of one period. The newest layer takes writes; a commit freezes it by putting a new one on
top, and drops the frozen ones once their generation exists. What a reader sees at a byte is the newest layer that has
it, else the committed map.

    floor   the smallest size that the image had during the layer: what lies below the layer, at or beyond its floor,
            is void and reads as zeros (a truncate that was followed by growth must not bring old bytes back)

Always holds: while a commit works on a frozen layer, neither it nor its chunks change; a chunk that a reader may hold is only ever
added to, with what lies above it. After a commit that failed the frozen layers become one (`Layer.absorb`), so that there are never
more than three: tries that go on failing cost neither memory nor the time of readers.
A write waits for nothing: a chunk that is partly written keeps the spans that are valid, the rest is merged at commit.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple

NO_FLOOR: Final = 1 << 63


class DirtyChunk:
    """A chunk's written bytes, and which of them are valid: sorted, disjoint, non-adjacent spans (start, end)."""

    __slots__ = ("data", "spans")

    def __init__(self, data: bytearray, spans: list[tuple[int, int]]) -> None:
        self.data = data
        self.spans = spans

    def write(self, start: int, data: bytes | memoryview) -> None:
        """Store `data` at `start` and mark it valid."""
        end = start + len(data)
        self.data[start:end] = data
        spans = self.spans
        if spans and spans[-1][0] <= start <= spans[-1][1]:  # the common case: appending to, or inside, the last span
            spans[-1] = (spans[-1][0], max(end, spans[-1][1]))
            return
        self.spans = _union(spans, start, end)

    def cut(self, end: int) -> DirtyChunk:
        """A copy whose spans end at `end`. The original stays as it is for whoever reads it."""
        return DirtyChunk(bytearray(self.data), [(a, min(b, end)) for a, b in self.spans if a < end])

    @property
    def whole(self) -> bool:
        """Whether every byte is valid."""
        return len(self.spans) == 1 and self.spans[0] == (0, len(self.data))


def _union(spans: list[tuple[int, int]], start: int, end: int) -> list[tuple[int, int]]:
    first = bisect_left(spans, (start, start))
    if first and spans[first - 1][1] >= start:
        first -= 1
    last = first
    while last < len(spans) and spans[last][0] <= end:
        start, end = min(start, spans[last][0]), max(end, spans[last][1])
        last += 1
    return [*spans[:first], (start, end), *spans[last:]]


class Layer:
    """The writes of one period, by chunk index."""

    __slots__ = ("chunks", "floor", "touched")

    def __init__(self) -> None:
        self.chunks: dict[int, DirtyChunk] = {}
        self.floor = NO_FLOOR
        self.touched = False
        """Whether anything, sizes and times included, differs from the layer below."""

    def write(self, chunk_size: int, offset: int, data: bytes | memoryview) -> int:
        """Store bytes; how many bytes of memory that took."""
        self.touched = True
        taken = 0
        view = memoryview(data)
        at = 0
        while at < len(view):
            index, start = divmod(offset + at, chunk_size)
            part = view[at : at + chunk_size - start]
            at += len(part)
            chunk = self.chunks.get(index)
            if chunk is not None:
                chunk.write(start, part)
                continue
            taken += chunk_size
            if len(part) == chunk_size:
                self.chunks[index] = DirtyChunk(bytearray(part), [(0, chunk_size)])
            else:
                buffer = bytearray(chunk_size)
                buffer[start : start + len(part)] = part
                self.chunks[index] = DirtyChunk(buffer, [(start, start + len(part))])
        return taken

    def truncate(self, chunk_size: int, size: int) -> int:
        """Void everything at or beyond `size`; how many bytes of memory that gave back."""
        self.touched = True
        self.floor = min(self.floor, size)
        boundary, start = divmod(size, chunk_size)
        gone = [index for index in self.chunks if index > boundary or (index == boundary and not start)]
        for index in gone:
            del self.chunks[index]
        if start and boundary in self.chunks:
            self.chunks[boundary] = self.chunks[boundary].cut(start)
        return len(gone) * chunk_size

    def absorb(self, chunk_size: int, newer: Layer) -> int:
        """Take over all that the layer above this one says, which is of no use afterwards; how many bytes of memory that gave back."""
        freed = self.truncate(chunk_size, newer.floor) if newer.floor != NO_FLOOR else 0
        for index, chunk in newer.chunks.items():
            below = self.chunks.get(index)
            if below is None:
                self.chunks[index] = chunk
                continue
            view = memoryview(chunk.data)
            for start, end in chunk.spans:
                below.write(start, view[start:end])
            freed += chunk_size
        self.touched |= newer.touched
        return freed


class Patch(NamedTuple):
    """Bytes that lie over what is below: `spans` of `data`, both relative to the chunk."""

    data: bytearray
    spans: list[tuple[int, int]]


class Overlay(NamedTuple):
    """What layers say about one chunk: patches, newest first, and the end (in the chunk) of what still counts below them."""

    patches: list[Patch]
    base_end: int


def overlay(layers: Sequence[Layer], chunk_size: int, index: int) -> Overlay | None:
    """What `layers` (oldest first) say about a chunk, as of now, or None where they say nothing."""
    patches: list[Patch] = []
    end = chunk_size
    start_of_chunk = index * chunk_size
    for layer in reversed(layers):
        chunk = layer.chunks.get(index)
        if chunk is not None and end > 0:
            spans = chunk.spans if end == chunk_size else [(a, min(b, end)) for a, b in chunk.spans if a < end]
            if spans:
                patches.append(Patch(chunk.data, list(spans)))
        if layer.floor < start_of_chunk + end:
            end = max(0, layer.floor - start_of_chunk)
    if not patches and end == chunk_size:
        return None
    return Overlay(patches, end)


def covers(found: Overlay, start: int, end: int) -> bool:
    """Whether the patches alone answer for bytes `start` to `end` of the chunk, or what is left is void."""
    if found.base_end <= start:
        return True
    spans: list[tuple[int, int]] = []
    for patch in found.patches:
        for a, b in patch.spans:
            spans = _union(spans, a, b)
    wanted = min(end, found.base_end)
    return any(a <= start and wanted <= b for a, b in spans)


def compose(found: Overlay, base: bytes | None, start: int, end: int) -> bytearray:
    """Bytes `start` to `end` of the chunk: `base` (None: zeros, or not needed) up to `base_end`, zeros beyond, patches over it."""
    out = bytearray(end - start)
    kept = min(found.base_end, end)
    if base is not None and kept > start:
        out[: kept - start] = memoryview(base)[start:kept]
    for patch in reversed(found.patches):
        view = memoryview(patch.data)
        for a, b in patch.spans:
            a, b = max(a, start), min(b, end)
            if a < b:
                out[a - start : b - start] = view[a:b]
    return out


def dirty_indexes(layers: Iterable[Layer], chunk_size: int) -> set[int]:
    """Chunks that a commit of these layers must rewrite: the written ones, and those that a floor cuts through."""
    found: set[int] = set()
    for layer in layers:
        found.update(layer.chunks)
        if layer.floor != NO_FLOOR and layer.floor % chunk_size:
            found.add(layer.floor // chunk_size)
    return found
