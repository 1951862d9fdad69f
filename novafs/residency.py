"""Where the chunks of an open image are: dirty, in L1 (read, or only prefetched), in L2, a hole, or in the store alone.

The image is cut into at most `CELLS_MAX` cells of equal length; each cell says which share of its chunks is where. Bounded in every
way, since it runs on the trio thread beside guests' reads: at most `LOOKS_MAX` chunks are looked at, `SLICE` between two
checkpoints, and L2 is asked for at most `L2_LOOKS_MAX` of them, in one batch and in a thread of its own. An image of no more chunks
than that is told exactly. Of a larger one, chunks are sampled where its map is loaded, which is where somebody has read: what was
never read here can not be in L1 by this image, and counts as "in the store alone" although L2 may have it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

import trio

from novafs.cache.tiered import ChunkCache
from novafs.chunk import HOLE_BYTES
from novafs.imagereader import ImageReader

CELLS_MAX: Final = 240
LOOKS_MAX: Final = 4080
"""17 a cell."""
SLICE: Final = 256
"""About 0.3 ms."""
LEAVES_MAX: Final = 8192
DIRTY_MAX: Final = 16384
L2_LOOKS_MAX: Final = 1024
L2_TIMEOUT_S: Final = 0.5
STATES: Final = ("dirty", "l1", "prefetched", "l2", "hole")


@dataclass(slots=True)
class Residency:
    """Shares of each cell, 0 to 1, by state; what is missing to 1 is in the store alone. Where a chunk is dirty, only that is told.

    exact: every chunk was looked at. l2_known: L2 was asked and has answered.
    """

    chunks: int
    chunk_size: int
    exact: bool
    l2_known: bool
    dirty: list[float]
    l1: list[float]
    prefetched: list[float]
    l2: list[float]
    hole: list[float]

    def document(self) -> dict[str, Any]:
        """As JSON takes it, rounded to what can be seen."""
        return {k: [round(v, 3) for v in found] if isinstance(found, list) else found for k, found in asdict(self).items()}

    def totals(self) -> dict[str, float]:
        """Shares of the whole image."""
        cells = max(1, len(self.l1))
        return {state: sum(getattr(self, state)) / cells for state in STATES}


async def residency(cache: ChunkCache, image: ImageReader, *, ask: trio.CapacityLimiter) -> Residency:
    """Look. ask: the thread in which L2 is asked. Takes checkpoints: what is told is of some moments, not of one."""
    chunks = -(-image.size // image.chunk_size)
    cells = min(CELLS_MAX, chunks)
    edges = [cell * chunks // cells for cell in range(cells)] + [chunks] if cells else [0]
    exact = chunks <= LOOKS_MAX
    if exact:
        looks = [(list(range(edges[cell], edges[cell + 1])), 1.0) for cell in range(cells)]
    else:
        looks = await _sampled(image, edges)
    dirty = [0] * cells
    dirty_now: set[int] = set()
    for number, index in enumerate(image.dirty_chunks(DIRTY_MAX)):
        if number % SLICE == SLICE - 1:
            await trio.lowlevel.checkpoint()
        if index < chunks and index not in dirty_now:
            dirty_now.add(index)
            dirty[_cell_of(index, chunks, cells)] += 1
    counts = {state: [0.0] * cells for state in STATES}
    outside: list[tuple[int, float, bytes]] = []
    since = 0
    for cell, (indexes, reach) in enumerate(looks):
        counts["dirty"][cell] = dirty[cell] / max(1, edges[cell + 1] - edges[cell])
        share = reach / max(1, len(indexes))
        for index in indexes:
            since += 1
            if since % SLICE == 0:
                await trio.lowlevel.checkpoint()
            if index in dirty_now:
                continue
            entry = image.entry_nowait(index)
            if entry is None:
                continue
            if entry == HOLE_BYTES:
                counts["hole"][cell] += share
            elif cache.l1.contains(chunk_id := entry[:32]):
                counts["prefetched" if cache.l1.unread(chunk_id) else "l1"][cell] += share
            else:
                outside.append((cell, share, chunk_id))
    known = await _ask_l2(cache, outside, counts["l2"], ask)
    return Residency(chunks, image.chunk_size, exact, known, **counts)


def _cell_of(index: int, chunks: int, cells: int) -> int:
    """The cell whose edges, as `residency` draws them, enclose the index."""
    cell = min(cells - 1, index * cells // chunks)
    while index >= (cell + 1) * chunks // cells:
        cell += 1
    return cell


async def _sampled(image: ImageReader, edges: Sequence[int]) -> list[tuple[list[int], float]]:
    """For each cell: chunks to look at, spread over the part of it whose map is loaded, and which share of the cell that part is."""
    cells, chunks = len(edges) - 1, edges[-1]
    leaves = image.loaded_leaves()
    step = -(-len(leaves) // LEAVES_MAX) if leaves else 1
    found: list[list[int]] = [[] for _ in range(cells)]
    for number, leaf in enumerate(leaves[::step]):
        if number % SLICE == SLICE - 1:
            await trio.lowlevel.checkpoint()
        first, last = leaf << 8, min(chunks, (leaf + 1) << 8) - 1
        for cell in range(_cell_of(first, chunks, cells), _cell_of(last, chunks, cells) + 1) if first < chunks else ():
            found[cell].append(leaf)
    most = LOOKS_MAX // cells
    looks: list[tuple[list[int], float]] = []
    for cell, inside in enumerate(found):
        if cell % 16 == 15:
            await trio.lowlevel.checkpoint()
        low, high = edges[cell], edges[cell + 1]
        parts = [(max(low, leaf << 8), min(high, (leaf + 1) << 8)) for leaf in sorted(inside)]
        loaded = sum(end - start for start, end in parts)
        wanted = [at * loaded // min(most, loaded) for at in range(min(most, loaded))]
        indexes: list[int] = []
        passed = 0
        remaining = iter(parts)
        start, end = next(remaining, (0, 0))
        for at in wanted:
            while at - passed >= end - start:
                passed += end - start
                start, end = next(remaining)
            indexes.append(start + at - passed)
        looks.append((indexes, min(1.0, step * loaded / max(1, high - low))))
    return looks


async def _ask_l2(cache: ChunkCache, outside: list[tuple[int, float, bytes]], counts: list[float], ask: trio.CapacityLimiter) -> bool:
    """Add what L2 has to the counts of the cells; whether it has answered."""
    l2 = cache.l2
    if l2 is None or not l2.up:
        return False
    step = -(-len(outside) // L2_LOOKS_MAX) if outside else 1
    asked = outside[::step]
    held: set[bytes] | None = None
    with trio.move_on_after(L2_TIMEOUT_S):
        held = await trio.to_thread.run_sync(l2.contains_many, [chunk_id for _, _, chunk_id in asked], limiter=ask, abandon_on_cancel=True)
    if held is None:
        return False
    for cell, share, chunk_id in asked:
        if chunk_id in held:
            counts[cell] = min(1.0, counts[cell] + share * step)
    return l2.up
