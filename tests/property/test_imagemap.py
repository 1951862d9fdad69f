"""The map against a dict: rewrite (grow, shrink, clear, set), lookups, leaves, and the streaming builder."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import hypothesis.strategies as st
import trio
from hypothesis import given, settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from novafs.chunk import HOLE_BYTES, REFERENCE_SIZE, ChunkId, ChunkIndex, PackId, Reference
from novafs.imagemap import FANOUT, MapBuilder, MapState, levels_for, top_entries

# Positions around every boundary of the tree, and far away: what random numbers would rarely hit.
POSITIONS = st.one_of(
    st.integers(0, 3 * FANOUT),
    st.sampled_from([FANOUT**2 - 1, FANOUT**2, FANOUT**2 + 1, 2 * FANOUT**2 - 1, 5 * FANOUT**2 + 17, 300 * FANOUT**2 + 3]),
    st.integers(0, 4100 * FANOUT**2),
)


class NodeStore:
    """Content-addressed blobs in a dict; counts what was stored and fetched."""

    def __init__(self) -> None:
        self.blobs: dict[bytes, bytes] = {}
        self.fetched = 0

    async def put(self, plain: bytes) -> Reference:
        digest = ChunkId(hashlib.sha256(plain).digest())
        self.blobs[digest] = plain
        return Reference(digest, PackId(digest[:16]), 32, len(plain), 0)

    async def fetch(self, references: Sequence[Reference]) -> list[bytes]:
        await trio.lowlevel.checkpoint()
        self.fetched += len(references)
        return [self.blobs[r.chunk_id] for r in references]


def entry(number: int) -> bytes:
    """A map entry that tells its number."""
    return Reference(ChunkId(number.to_bytes(32, "little")), PackId(b"p" * 16), 1, number, 4).pack()


class MapMachine(RuleBasedStateMachine):
    """Model: a dict of index -> entry, and a length."""

    def __init__(self) -> None:
        super().__init__()
        self.store = NodeStore()
        self.state = MapState.empty()
        self.model: dict[int, bytes] = {}
        self.count = 0

    @rule(
        changes=st.dictionaries(POSITIONS, st.integers(0, 5), max_size=12),
        length=st.one_of(st.none(), POSITIONS),
        clear=st.one_of(st.none(), POSITIONS),
    )
    def commit(self, changes: dict[int, int], length: int | None, clear: int | None) -> None:
        chunks = length if length is not None else self.state.chunks
        if length is None and changes:
            chunks = max(chunks, max(changes) + 1)
        clear_from = min(chunks, self.state.chunks if clear is None else clear)
        wanted: dict[ChunkIndex, bytes] = {}
        for index, value in changes.items():
            if index < chunks:
                self.count += 1
                wanted[ChunkIndex(index)] = entry(self.count) if value else HOLE_BYTES
        before = (self.state.top, self.state.chunks)
        new = trio.run(self.state.rewrite, wanted, chunks, clear_from, self.store.fetch, self.store.put)
        assert (self.state.top, self.state.chunks) == before  # a state never changes
        self.model = {i: e for i, e in self.model.items() if i < clear_from}
        self.model.update(wanted)
        self.model = {i: e for i, e in self.model.items() if e != HOLE_BYTES}
        self.state = new

    @rule(length=POSITIONS)
    def grow(self, length: int) -> None:
        before = (self.state.top, self.state.chunks, self.state.levels)
        grown = self.state.grown(length)
        assert (self.state.top, self.state.chunks, self.state.levels) == before
        if grown is None:
            assert length < self.state.chunks or (self.model and levels_for(length) > self.state.levels)
        else:
            assert grown.chunks == length
            self.state = grown

    @rule()
    def reopen(self) -> None:
        self.state = MapState(self.state.chunks, self.state.levels, self.state.top)

    @rule(keep=st.integers(0, 3))
    def trim(self, keep: int) -> None:
        self.state.trim(keep)

    @rule(index=POSITIONS)
    def look(self, index: int) -> None:
        (found,) = trio.run(self.state.entries, index, 1, self.store.fetch)
        assert found == self.model.get(index, HOLE_BYTES)

    @invariant()
    def every_entry_is_found(self) -> None:
        async def main() -> None:
            for index, raw in self.model.items():
                assert (await self.state.entries(index, 1, self.store.fetch)) == [raw]

        trio.run(main)

    @invariant()
    def leaves_hold_the_model_and_nothing_else(self) -> None:
        if self.state.chunks > 40 * FANOUT**2:
            return  # a walk over the whole of a huge map belongs into a benchmark

        async def main() -> dict[int, bytes]:
            found: dict[int, bytes] = {}
            async for first, entries in self.state.leaves(self.store.fetch):
                raw = entries.tobytes()
                for number in range(len(entries)):
                    part = raw[number * REFERENCE_SIZE : (number + 1) * REFERENCE_SIZE]
                    if part != HOLE_BYTES:
                        found[first + number] = part
            return found

        assert trio.run(main) == self.model


TestMapMachine = MapMachine.TestCase
TestMapMachine.settings = settings(max_examples=60, stateful_step_count=12, deadline=None)


@settings(max_examples=40, deadline=None)
@given(indexes=st.sets(st.integers(0, 70_000), max_size=60), extra=st.integers(1, 70_000), known=st.booleans())
def test_the_builder_makes_the_same_map_as_a_rewrite(indexes: set[int], extra: int, known: bool) -> None:
    chunks = max(indexes, default=0) + extra

    async def main() -> None:
        store = NodeStore()
        builder = MapBuilder(chunks if known else None, store.put)
        for index in sorted(indexes):
            await builder.add(index, entry(index + 1))
        built = await builder.finish(chunks)
        for index in [*sorted(indexes)[:20], chunks - 1]:
            expected = entry(index + 1) if index in indexes else HOLE_BYTES
            assert await built.entries(index, 1, store.fetch) == [expected]
        if known:
            rewritten = await MapState.empty(chunks).rewrite(
                {ChunkIndex(i): entry(i + 1) for i in indexes}, chunks, chunks, store.fetch, store.put
            )
            assert (rewritten.levels, rewritten.top) == (built.levels, built.top)

    trio.run(main)


def test_the_first_byte_of_a_tebibyte_is_two_map_fetches_away() -> None:
    for chunk_size in (4 << 10, 64 << 10, 1 << 20):
        chunks = (1 << 40) // chunk_size
        assert levels_for(chunks) <= 2
        assert top_entries(chunks, levels_for(chunks)) <= 4096


def test_a_small_change_to_a_large_map_stores_one_node_a_level() -> None:
    async def main() -> None:
        store = NodeStore()
        chunks = (1 << 40) // (64 << 10)
        state = await MapState.empty(chunks).rewrite(
            {ChunkIndex(i): entry(i + 1) for i in range(0, chunks, chunks // 100)}, chunks, chunks, store.fetch, store.put
        )
        before = len(store.blobs)
        await state.rewrite({ChunkIndex(chunks // 2): entry(7)}, chunks, chunks, store.fetch, store.put)
        assert len(store.blobs) - before == 2

    trio.run(main)
