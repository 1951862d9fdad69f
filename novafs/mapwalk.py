"""Which bytes of which images a fault touches: a walk over maps that goes round what can not be read.

    async for touched in find_touched(volume, retention, {pack id: {payload offsets}}): …

One image after the other, the newest generation and the snapshots; a batch of leaves in memory at a time.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Collection, Iterator, Mapping
from contextlib import aclosing
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from novafs.chunk import PACK_ID_SIZE, REFERENCE_DTYPE, Reference
from novafs.errors import CorruptionError, ObjectNotFoundError
from novafs.forward import ForwardTable, Rows, among, chunk_ids, pack_ids
from novafs.generation import generation_chain
from novafs.imagemap import FANOUT, NODE_BYTES, MapState
from novafs.retention import ImageRoots, Retention

if TYPE_CHECKING:
    from novafs.volume import Volume

NODES_AT_ONCE: Final = 64

BadFrames = Mapping[bytes, Collection[int]]
"""Pack id -> offsets of payloads, at their final places."""


class Touched(NamedTuple):
    """A range of an image that can not be read. snapshot: "" for the image as it is now; offset, length: bytes."""

    path: str
    snapshot: str
    offset: int
    length: int
    reason: str


class _Part(NamedTuple):
    """Chunks from index `first`: their entries, or, where the node that held them can not be read, how many there are."""

    first: int
    rows: Rows | None
    chunks: int


async def find_touched(volume: Volume, retention: Retention, bad: BadFrames, reason: str) -> AsyncIterator[Touched]:
    """Every range of a visible image or a snapshot whose chunks are among the bad frames, or below an unreadable map node."""
    for root in sorted(retention.images.values(), key=lambda root: root.path):
        if not root.visible or not root.generations:
            continue
        for snapshot, counter in _counters(root):
            try:
                generation = await generation_chain(volume.client, root.image_id).read(counter)
                state = generation.map_state(volume.chunk_size)
            except (CorruptionError, ObjectNotFoundError) as error:
                yield Touched(root.path, snapshot, 0, root.size, str(error))
                continue
            async with aclosing(_ranges(volume, retention, state, bad)) as ranges:
                async for first, count, node in ranges:
                    offset = first * volume.chunk_size
                    length = min(count * volume.chunk_size, generation.size - offset)
                    yield Touched(root.path, snapshot, offset, length, node or reason)


def _counters(root: ImageRoots) -> Iterator[tuple[str, int]]:
    yield "", root.generations[0]
    yield from sorted(root.snapshots.items())


async def _ranges(volume: Volume, retention: Retention, state: MapState, bad: BadFrames) -> AsyncGenerator[tuple[int, int, str], None]:
    """Bad chunks of one map, neighbours joined: (first index, how many, what is wrong with the node above them or "")."""
    start = end = -1
    why = ""
    async with aclosing(_parts(volume, retention, state)) as parts:
        async for part in parts:
            if part.rows is None:
                found = [(part.first, min(part.chunks, state.chunks - part.first), "its part of the map can not be read")]
            else:
                rows = retention.forwards.resolve(part.rows)
                found = [(part.first + int(at), 1, "") for at in np.flatnonzero(is_bad(rows, bad))]
            for first, count, node in found:
                if first == end and node == why:
                    end += count
                    continue
                if end > start:
                    yield start, end - start, why
                start, end, why = first, first + count, node
    if end > start:
        yield start, end - start, why


def is_bad(rows: Rows, bad: BadFrames) -> npt.NDArray[np.bool_]:
    """Which of the references lead to one of the bad frames."""
    packs = pack_ids(rows)
    used = rows["length"] > 0
    if not used.any():
        return used
    # One look-up for each pack that they name, however many packs are bad.
    named = [name for name in np.unique(packs[used]) if bytes(name).ljust(PACK_ID_SIZE, b"\0") in bad]
    wanted = among(packs, np.array(named, dtype="S16")) & used
    for at in np.flatnonzero(wanted):
        wanted[at] = int(rows["offset"][at]) in bad[bytes(packs[at]).ljust(PACK_ID_SIZE, b"\0")]
    return wanted


async def _parts(volume: Volume, retention: Retention, state: MapState) -> AsyncGenerator[_Part, None]:
    """The leaves of a map that are no holes, in order."""
    async with aclosing(_below(volume, retention, state.levels, 0, np.frombuffer(state.top, dtype=REFERENCE_DTYPE))) as parts:
        async for part in parts:
            yield part


async def _below(volume: Volume, retention: Retention, level: int, first: int, rows: Rows) -> AsyncGenerator[_Part, None]:
    """What lies below the entries of a node: `level` node levels are left, and its first entry is number `first` of its level."""
    if not level:
        yield _Part(first, rows, len(rows))
        return
    span = FANOUT**level
    used = np.flatnonzero(rows["length"] > 0)
    for at in range(0, len(used), NODES_AT_ONCE):
        numbers = used[at : at + NODES_AT_ONCE]
        plains = await _read(volume, retention.forwards, rows[numbers], retention.bad_nodes)
        for number, plain in zip(numbers.tolist(), plains, strict=True):
            if plain is None:
                yield _Part((first + number) * span, None, span)
                continue
            below = _below(volume, retention, level - 1, (first + number) * FANOUT, np.frombuffer(plain, dtype=REFERENCE_DTYPE))
            async with aclosing(below) as parts:
                async for part in parts:
                    yield part


async def _read(volume: Volume, forwards: ForwardTable, rows: Rows, bad: Collection[bytes]) -> list[bytes | None]:
    rows = forwards.resolve(rows)
    ids = [bytes(chunk).ljust(32, b"\0") for chunk in chunk_ids(rows)]
    good = [number for number, chunk_id in enumerate(ids) if chunk_id not in bad]
    found: list[bytes | None] = [None] * len(rows)
    for number, plain in zip(good, await volume.cache.fetch([Reference.unpack(rows[n : n + 1].tobytes()) for n in good]), strict=True):
        found[number] = plain if len(plain) == NODE_BYTES else None
    return found
