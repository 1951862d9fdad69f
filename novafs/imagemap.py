"""The map of an image: chunk index -> reference, as a radix tree of fan-out 256.

A node is 256 references (16 KiB) and is stored like a chunk: content-addressed, compressed, in a pack. The topmost
level, the *top*, is an array of any length that lies inline in the generation. `levels` counts the node levels below
the top; each entry of the top then spans `256 ** levels` chunks:

    levels  entries of the top   image, at 64 KiB chunks   at 4 KiB
         0             ≤   256   up to  16 MiB             1 MiB
         1             ≤   256            4 GiB            256 MiB
         2             ≤ 4,096           16 TiB            1 TiB
         3             ≤ 4,096            4 PiB            256 TiB

so that the first byte of an image up to 1 TiB is five round trips away: list head, generation, two nodes, data.

Always holds: a `MapState` is a committed state and never changes in place. A commit computes a new one with
`rewrite`, which touches copies of the nodes that change and nothing else, stores them through the caller's writer,
and is adopted only after the generation that names it exists. An entry of zeros is a hole, at any level.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Final

import numpy as np
import numpy.typing as npt
import trio

from novafs.chunk import HOLE_BYTES, REFERENCE_DTYPE, REFERENCE_SIZE, ChunkIndex, Reference
from novafs.delta import Base
from novafs.errors import ObjectCorruptError, TooLargeError

FANOUT: Final = 256
NODE_BYTES: Final = FANOUT * REFERENCE_SIZE
TOP_MAX: Final = 4096
LEVELS_MAX: Final = 3
EMPTY_NODE: Final = bytes(NODE_BYTES)

Fetch = Callable[[Sequence[Reference]], Awaitable[list[bytes]]]
"""Plain content of references, in order: `ChunkCache.fetch`."""
PutNode = Callable[[bytes], Awaitable[Reference]]
"""Stores one node, gives its reference: `PackWriter.put_blob`."""
PutOver = Callable[[bytes, Base], Awaitable[Reference]]
"""The same, of a node that takes the place of another: `PackWriter.put_blob` again."""
PutRight = Callable[[bytes, int], Awaitable[bytes]]
"""A node, or a top, and its level, as it should be stored: `PackWriter.put_right` names what compactions have moved at its new places.
At level 0 the entries are those of chunks."""


def levels_for(chunks: int) -> int:
    """The fewest node levels for an image of that many chunks. Raises TooLargeError beyond the format."""
    for levels, top in ((0, FANOUT), (1, FANOUT), (2, TOP_MAX), (3, TOP_MAX)):
        if chunks <= top * FANOUT**levels:
            return levels
    raise TooLargeError(f"{chunks} chunks are more than a map holds ({TOP_MAX * FANOUT**LEVELS_MAX}); use a larger chunk size")


def top_entries(chunks: int, levels: int) -> int:
    """How many entries the top of an image with that many chunks has."""
    span: int = FANOUT**levels
    return (chunks + span - 1) // span


class MapState:
    """One committed map: `chunks` chunk indexes, `levels`, and the top's bytes, with the nodes loaded so far."""

    __slots__ = ("_nodes", "chunks", "levels", "top")

    def __init__(self, chunks: int, levels: int, top: bytes) -> None:
        if not 0 <= levels <= LEVELS_MAX or len(top) > TOP_MAX * REFERENCE_SIZE or len(top) != top_entries(chunks, levels) * REFERENCE_SIZE:
            raise ObjectCorruptError(f"map: {len(top)} bytes of top for {chunks} chunks at {levels} levels; run 'novafs fsck'")
        self.chunks = chunks
        self.levels = levels
        self.top = top
        # Invariant: every value is the plain content of the node that the level above (or the top) references.
        self._nodes: list[dict[int, bytes]] = [{} for _ in range(levels)]

    @classmethod
    def empty(cls, chunks: int = 0) -> MapState:
        """A map of holes."""
        levels = levels_for(chunks)
        return cls(chunks, levels, bytes(top_entries(chunks, levels) * REFERENCE_SIZE))

    def grown(self, chunks: int) -> MapState | None:
        """This map with holes at its end, `chunks` long, itself where it is as long; None where it would be shorter, or need a node that
        is not stored. Nodes reach beyond the end, and are zeros there, so none of them changes."""
        if chunks == self.chunks:
            return self
        if chunks < self.chunks:
            return None
        if levels_for(chunks) > self.levels:
            return MapState.empty(chunks) if not self.top.strip(b"\0") else None
        longer = MapState(chunks, self.levels, self.top.ljust(top_entries(chunks, self.levels) * REFERENCE_SIZE, b"\0"))
        longer._nodes = [dict(nodes) for nodes in self._nodes]
        return longer

    @property
    def loaded_bytes(self) -> int:
        """What the loaded nodes occupy, for the L1 cap."""
        return len(self.top) + sum(len(nodes) for nodes in self._nodes) * NODE_BYTES

    def trim(self, keep_leaves: int = 0) -> None:
        """Forget all but the `keep_leaves` latest loaded leaves; they can be fetched again.

        Nodes above the leaves stay: there are 256 times fewer, and a load that waits for leaves relies on them.
        """
        if self.levels:
            leaves = self._nodes[0]
            for index in list(leaves)[: max(0, len(leaves) - keep_leaves)]:
                del leaves[index]

    def entry_nowait(self, index: int) -> bytes | None:
        """The 64 bytes of a chunk's reference (`HOLE_BYTES` for a hole), or None where its leaf is not loaded."""
        if index >= self.chunks:
            return HOLE_BYTES
        if not self.levels:
            at = index * REFERENCE_SIZE
            return self.top[at : at + REFERENCE_SIZE]
        leaf = self._nodes[0].get(index >> 8)
        if leaf is None:
            return None
        at = (index & 255) << 6
        return leaf[at : at + 64]

    def hole_nowait(self, first: int, last: int) -> bool:
        """Whether chunks `first` to `last` are known to be holes, all of them; looked at as one only where one leaf has them."""
        if not self.levels or first >> 8 != last >> 8:
            return False
        leaf = self._nodes[0].get(first >> 8)
        at = (first & 255) << 6
        length = (last - first + 1) << 6
        return leaf is not None and leaf[at : at + length] == EMPTY_NODE[:length]

    def loaded_leaves(self) -> list[int]:
        """Numbers of the leaves that are loaded."""
        return list(self._nodes[0]) if self.levels else []

    def leaves_ahead(self, first: int, end: int) -> list[tuple[int, Reference]]:
        """Leaves of chunks `first` to `end`, excluded, that are neither loaded nor holes, as far as the node above them is loaded."""
        if not self.levels:
            return []
        found: list[tuple[int, Reference]] = []
        leaves = self._nodes[0]
        for index in range(first // FANOUT, -(-min(end, self.chunks) // FANOUT)):
            if index in leaves or (self.levels > 1 and index >> 8 not in self._nodes[1]):
                continue
            raw = self._parent_entry(0, index)
            if raw != HOLE_BYTES:
                found.append((index * FANOUT, Reference.unpack(raw)))
        return found

    async def load(self, first: int, last: int, fetch: Fetch) -> None:
        """Load what is missing of the leaves of chunks `first` to `last` inclusive; one batch a level.

        A checkpoint may pass between levels, so callers look entries up again afterwards.
        """
        last = min(last, self.chunks - 1)
        for level in range(self.levels - 1, -1, -1):
            await self._load_level(level, range(first >> (8 * (level + 1)), (last >> (8 * (level + 1))) + 1), fetch)

    async def load_many(self, chunks: Sequence[int], fetch: Fetch) -> None:
        """`load` for chunks anywhere: one batch a level."""
        inside = [chunk for chunk in chunks if chunk < self.chunks]
        for level in range(self.levels - 1, -1, -1):
            await self._load_level(level, sorted({chunk >> (8 * (level + 1)) for chunk in inside}), fetch)

    async def _load_level(self, level: int, indexes: Iterable[int], fetch: Fetch) -> None:
        nodes = self._nodes[level]
        wanted: list[int] = []
        references: list[Reference] = []
        for index in indexes:
            if index in nodes:
                continue
            raw = self._parent_entry(level, index)
            if raw == HOLE_BYTES:
                nodes[index] = EMPTY_NODE
            else:
                wanted.append(index)
                references.append(Reference.unpack(raw))
        for index, plain in zip(wanted, await fetch(references) if references else (), strict=True):
            if len(plain) != NODE_BYTES:
                raise ObjectCorruptError(f"map node {index} of level {level}: {len(plain)} bytes, expected {NODE_BYTES}; run 'novafs fsck'")
            nodes[index] = plain

    def _parent_entry(self, level: int, index: int) -> bytes:
        if level == self.levels - 1:
            at = index * REFERENCE_SIZE
            return self.top[at : at + REFERENCE_SIZE]
        node = self._nodes[level + 1][index >> 8]
        at = (index & 255) << 6
        return node[at : at + 64]

    async def entries(self, first: int, count: int, fetch: Fetch) -> list[bytes]:
        """The 64-byte entries of `count` chunks from `first`, loading what is missing."""
        found = [self.entry_nowait(index) for index in range(first, first + count)]
        while None in found:  # again where `trim` ran while leaves were fetched
            await self.load(first, first + count - 1, fetch)
            found = [self.entry_nowait(index) for index in range(first, first + count)]
        return [entry if entry is not None else HOLE_BYTES for entry in found]

    async def leaves(self, fetch: Fetch, *, from_chunk: int = 0, ahead: int = 64) -> AsyncGenerator[tuple[int, npt.NDArray[np.void]], None]:
        """Every leaf that is no hole, in order, from the one of `from_chunk`: (first chunk index, structured array of references).

        Loads `ahead` leaves at a time and forgets them again, so that a walk over a large image stays small. Chunk
        references beyond `chunks` never occur: a shrunk map has zeros there.
        """
        if not self.levels:
            if self.top:
                yield 0, np.frombuffer(self.top, dtype=REFERENCE_DTYPE)
            return
        walk = MapState(self.chunks, self.levels, self.top)  # its own node table: this state's stays as it is
        leaves = (self.chunks + FANOUT - 1) // FANOUT
        start = from_chunk // FANOUT
        while start < leaves:
            for nodes in walk._nodes[1:]:
                if len(nodes) > 64:
                    nodes.clear()
            # An image may be all but empty and have a thousand million leaves: what is a hole at a higher level is passed over
            # whole, and the others that this thread serves have their turn.
            if (hole := await walk._hole_at(start, fetch)) > 1:
                await trio.lowlevel.checkpoint()
                start += hole
                continue
            stop = min(start + ahead, leaves, (start // FANOUT + 1) * FANOUT)
            await trio.lowlevel.checkpoint()
            await walk.load(start * FANOUT, stop * FANOUT - 1, fetch)
            for index in range(start, stop):
                node = walk._nodes[0][index]
                if node != EMPTY_NODE:
                    yield index * FANOUT, np.frombuffer(node, dtype=REFERENCE_DTYPE)
            walk._nodes[0].clear()
            start = stop

    async def _hole_at(self, leaf: int, fetch: Fetch) -> int:
        """How many leaves from `leaf` on lie in the largest node that is a hole; 0 where that is the leaf at most."""
        for level in range(self.levels - 1, 0, -1):
            await self._load_level(level, ((leaf >> (8 * level)),), fetch)
            if self._nodes[level][leaf >> (8 * level)] == EMPTY_NODE:
                span = 1 << (8 * level)
                return span - leaf % span
        return 0

    def node_references(self) -> list[Reference]:
        """References of the nodes directly below the top (none at level 0), holes left out."""
        if not self.levels:
            return []
        entries = (self.top[at : at + REFERENCE_SIZE] for at in range(0, len(self.top), REFERENCE_SIZE))
        return [Reference.unpack(raw) for raw in entries if raw != HOLE_BYTES]

    async def rewrite(
        self,
        changes: Mapping[ChunkIndex, bytes],
        chunks: int,
        clear_from: int,
        fetch: Fetch,
        put_node: PutNode,
        put_right: PutRight | None = None,
        put_over: PutOver | None = None,
    ) -> MapState:
        """The map after a commit: entries from chunk `clear_from` on become holes, then `changes` are set; `chunks` long.

        `changes` are 64-byte entries. Nodes that change are stored through `put_node`, from the leaves up, each put right
        before: a map follows compactions where it is written anyway. put_over: for nodes of which this state has an older one.
        This state is not touched, but for nodes loaded on the way.
        """
        levels = max(self.levels, levels_for(max(chunks, self.chunks)))
        edit = _Edit(self, levels, fetch)
        if clear_from < self.chunks:
            await edit.clear(clear_from)
        await edit.apply(changes)
        return await edit.finish(chunks, put_node, put_right, put_over)


class _Edit:
    """Copies of the nodes that a commit changes. Levels count from the leaves (0); the top is level `levels`."""

    def __init__(self, base: MapState, levels: int, fetch: Fetch) -> None:
        self._base = base
        self._levels = levels
        self._fetch = fetch
        # What the base holds from this chunk on does not count any more; lowered by `clear`.
        self._base_end = base.chunks
        self._dirty: list[dict[int, bytearray]] = [{} for _ in range(levels)]
        self._top = bytearray(base.top)
        # A deeper tree: the old top is cut into nodes of the level above the old ones, until the depth is right.
        for level in range(base.levels, levels):
            raw, self._top = self._top, bytearray()
            for index, at in enumerate(range(0, len(raw), NODE_BYTES)):
                self._dirty[level][index] = raw[at : at + NODE_BYTES].ljust(NODE_BYTES, b"\0")
                self._top += HOLE_BYTES  # set by finish()

    async def _node(self, level: int, index: int) -> bytearray:
        node = self._dirty[level].get(index)
        if node is not None:
            return node
        base = self._base
        if level < base.levels:
            # Beyond what counts of the base there is nothing to load; inside it, the parents come first.
            span = FANOUT ** (level + 1)
            if index * span < self._base_end:
                await _load_path(base, level, index, self._fetch)
                node = bytearray(base._nodes[level][index])
        if node is None:
            node = bytearray(NODE_BYTES)
        self._dirty[level][index] = node
        return node

    def _grow_top(self, entries: int) -> None:
        if entries * REFERENCE_SIZE > len(self._top):
            self._top.extend(bytes(entries * REFERENCE_SIZE - len(self._top)))

    async def clear(self, first: int) -> None:
        """Zero every entry from chunk `first` on."""
        # At each level the node on the boundary is cut; what lies right of it goes with its parent's entry.
        for level in range(self._levels):
            for index in [i for i in self._dirty[level] if i * FANOUT ** (level + 1) >= first]:
                del self._dirty[level][index]
            at = (first >> (8 * level)) if first % FANOUT**level == 0 else (first >> (8 * level)) + 1
            # `at`: the first entry of this level's nodes that lies wholly in the cleared part.
            if at % FANOUT and at * FANOUT**level < self._base.chunks:
                node = await self._node(level, at // FANOUT)
                node[(at % FANOUT) * REFERENCE_SIZE :] = bytes((FANOUT - at % FANOUT) * REFERENCE_SIZE)
        span = FANOUT**self._levels
        keep = (first + span - 1) // span
        del self._top[keep * REFERENCE_SIZE :]
        self._base_end = first  # nodes on the boundary are copies by now; those right of it are holes

    async def apply(self, changes: Mapping[ChunkIndex, bytes]) -> None:
        """Set entries."""
        for index in sorted(changes):
            raw = changes[index]
            if not self._levels:
                self._grow_top(index + 1)
                self._top[index * REFERENCE_SIZE : (index + 1) * REFERENCE_SIZE] = raw
                continue
            node = self._dirty[0].get(index >> 8) or await self._node(0, index >> 8)
            at = (index & 255) << 6
            node[at : at + REFERENCE_SIZE] = raw

    def _base_of(self, level: int, index: int) -> Base | None:
        """What a node was in the base, where it is loaded there."""
        base = self._base
        plain = base._nodes[level].get(index) if level < base.levels else None
        if plain is None or plain == EMPTY_NODE or index * FANOUT ** (level + 1) >= base.chunks:
            return None
        raw = base._parent_entry(level, index)
        return Base(Reference.unpack(raw), plain) if raw != HOLE_BYTES else None

    async def finish(self, chunks: int, put_node: PutNode, put_right: PutRight | None, put_over: PutOver | None) -> MapState:
        """Store the changed nodes from the leaves up; the new state, with them loaded."""
        for level in range(self._levels):
            for index in sorted(self._dirty[level]):
                node = bytes(self._dirty[level][index])
                if put_right is not None and (righted := await put_right(node, level)) is not node:
                    node = righted
                    self._dirty[level][index] = bytearray(node)
                before = self._base_of(level, index) if put_over is not None else None
                if node == EMPTY_NODE:
                    raw = HOLE_BYTES
                elif put_over is not None and before is not None:
                    raw = (await put_over(node, before)).pack()
                else:
                    raw = (await put_node(node)).pack()
                if level == self._levels - 1:
                    self._grow_top(index + 1)
                    self._top[index * REFERENCE_SIZE : (index + 1) * REFERENCE_SIZE] = raw
                else:
                    parent = await self._node(level + 1, index >> 8)
                    at = (index & 255) << 6
                    parent[at : at + REFERENCE_SIZE] = raw
        entries = top_entries(chunks, self._levels)
        self._grow_top(entries)
        top = bytes(self._top[: entries * REFERENCE_SIZE])
        state = MapState(chunks, self._levels, top if put_right is None else await put_right(top, self._levels))
        base = self._base
        for level in range(self._levels):
            span = FANOUT ** (level + 1)
            carried = base._nodes[level] if level < base.levels else {}
            # Nodes beyond the cut would be found again if the image grew; they must be the holes they now are.
            nodes = {i: n for i, n in carried.items() if i * span < self._base_end}
            nodes.update((i, bytes(n)) for i, n in self._dirty[level].items() if i * span < chunks)
            state._nodes[level] = nodes
        return state


async def _load_path(base: MapState, level: int, index: int, fetch: Fetch) -> None:
    first = index * FANOUT ** (level + 1)
    for above in range(base.levels - 1, level - 1, -1):
        node = first >> (8 * (above + 1))
        if node not in base._nodes[above]:
            await base._load_level(above, (node,), fetch)


class MapBuilder:
    """A map from references in ascending order, for imports: holds one node a level, stores each when it is full.

    chunks: the image's length in chunks, or None where only the end of the source will tell (then two levels).
    """

    def __init__(self, chunks: int | None, put_node: PutNode) -> None:
        self._levels = levels_for(chunks) if chunks is not None else 2
        self._put_node = put_node
        self._top = bytearray()
        self._open: list[tuple[int, bytearray] | None] = [None] * self._levels

    async def add(self, index: int, raw: bytes) -> None:
        """Set the 64-byte entry of chunk `index`, which is higher than all before it. Raises TooLargeError."""
        await self._set(0, index, raw)

    async def add_many(self, entries: Iterable[tuple[int, bytes]]) -> None:
        """`add` for each (index, entry), in order."""
        for index, raw in entries:
            leaf = self._open[0] if self._levels else None
            if leaf is not None and leaf[0] == index >> 8:
                at = (index & 255) << 6
                leaf[1][at : at + REFERENCE_SIZE] = raw
            else:
                await self._set(0, index, raw)

    async def _set(self, level: int, index: int, raw: bytes) -> None:
        if level == self._levels:
            if index >= TOP_MAX:
                raise TooLargeError(
                    f"chunk {index * FANOUT**level} is beyond what a map of {level} levels holds; give the size of the source"
                )
            at = index * REFERENCE_SIZE
            self._top.extend(bytes(max(0, at + REFERENCE_SIZE - len(self._top))))
            self._top[at : at + REFERENCE_SIZE] = raw
            return
        current = self._open[level]
        if current is None or current[0] != index >> 8:
            if current is not None:
                await self._close(level, *current)
            current = (index >> 8, bytearray(NODE_BYTES))
            self._open[level] = current
        at = (index & 255) << 6
        current[1][at : at + REFERENCE_SIZE] = raw

    async def _close(self, level: int, index: int, node: bytearray) -> None:
        self._open[level] = None
        await self._set(level + 1, index, (await self._put_node(bytes(node))).pack())

    async def finish(self, chunks: int) -> MapState:
        """Store what is still open; the map of an image of `chunks` chunks, none of which was set beyond that."""
        for level in range(self._levels):
            current = self._open[level]
            if current is not None:
                await self._close(level, *current)
        entries = top_entries(chunks, self._levels)
        return MapState(chunks, self._levels, bytes(self._top.ljust(entries * REFERENCE_SIZE, b"\0")))
