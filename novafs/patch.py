"""Patches: a generation that carries small writes itself, so that an fsync that must reach the store costs one round trip.

A commit is otherwise two requests that follow each other, packs and then the generation that names them. Where writes are small
and a caller waits (durability "store", or another host asks for the lease), the next generation has the map of the one before it
and, beside it, the bytes that lie over that map: all of them since the map was made, so a generation never needs its predecessor.

Always holds: a patch is inside the image's size, extents are sorted and disjoint, at most `BYTES_MAX` bytes in at most
`EXTENTS_MAX` extents that touch chunks of at most `MEMORY_MAX` bytes. It never voids anything (a truncate is a commit of its own).
Where the image has grown the map has holes at its end for that (`MapState.grown`), and no other node than before. The next commit
that stores packs writes the patch into the map, as if it had been dirty.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

from novafs.dirty import NO_FLOOR, DirtyChunk, Layer

BYTES_MAX: Final = 256 << 10
"""What an fsync uploads at most beside the record: 2 ms at 1 Gbit/s, where a round trip is 1 to 20."""
EXTENTS_MAX: Final = 512
MEMORY_MAX: Final = 32 << 20

Extent = tuple[int, bytes]
"""Offset in the image, and the bytes there."""


def fits(extents: Sequence[Extent], size: int) -> bool:
    """Whether a decoded patch keeps what always holds, for an image of `size` bytes. The memory of its chunks is not checked."""
    end = total = 0
    for offset, data in extents:
        if offset < end or not data:
            return False
        end = offset + len(data)
        total += len(data)
    return end <= size and total <= BYTES_MAX and len(extents) <= EXTENTS_MAX


def layer_of(extents: Iterable[Extent], chunk_size: int) -> Layer:
    """The layer that a patch is: it lies between the map and what is dirty, and is not dirty itself."""
    layer = Layer()
    for offset, data in extents:
        layer.write(chunk_size, offset, data)
    layer.touched = False
    return layer


def extended(base: Layer | None, frozen: Sequence[Layer], chunk_size: int) -> Layer | None:
    """`base` and what the frozen layers wrote over it as one new layer, or None where that is no patch. Neither is changed."""
    if any(layer.floor != NO_FLOOR for layer in frozen):
        return None
    indexes = {index for layer in frozen for index in layer.chunks}
    joined = Layer()
    if base is not None:
        joined.chunks.update(base.chunks)
    if len(indexes | joined.chunks.keys()) * chunk_size > MEMORY_MAX:
        return None
    for index in indexes:
        below = joined.chunks.get(index)
        joined.chunks[index] = (
            DirtyChunk(bytearray(chunk_size), []) if below is None else DirtyChunk(bytearray(below.data), list(below.spans))
        )
    for layer in frozen:
        for index, chunk in layer.chunks.items():
            view = memoryview(chunk.data)
            for start, end in chunk.spans:
                joined.chunks[index].write(start, view[start:end])
    spans = [span for chunk in joined.chunks.values() for span in chunk.spans]
    if len(spans) > EXTENTS_MAX or sum(end - start for start, end in spans) > BYTES_MAX:
        return None
    return joined


def extents_of(layer: Layer, chunk_size: int) -> tuple[Extent, ...]:
    """A patch's bytes as a generation has them."""
    return tuple(
        (index * chunk_size + start, bytes(memoryview(chunk.data)[start:end]))
        for index, chunk in sorted(layer.chunks.items())
        for start, end in chunk.spans
    )
