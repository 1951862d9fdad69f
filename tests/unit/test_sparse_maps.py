"""Images that are all but empty and very large: walks pass over holes whole, and never hold up the thread they run on."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Sequence

import numpy as np
import trio

from novafs.chunk import ChunkId, ChunkIndex, PackId, Reference, chunk_id
from novafs.imagemap import FANOUT, MapState

CHUNKS_MAX = 4096 * FANOUT**3


class Nodes:
    """Where nodes are stored, for tests."""

    def __init__(self) -> None:
        self.blobs: dict[bytes, bytes] = {}

    async def put(self, plain: bytes) -> Reference:
        found = chunk_id(plain)
        self.blobs[found] = plain
        return Reference(found, PackId(bytes(16)), 0, len(plain), 0)

    async def fetch(self, references: Sequence[Reference]) -> list[bytes]:
        await trio.lowlevel.checkpoint()
        return [self.blobs[r.chunk_id] for r in references]


def reference(index: int) -> bytes:
    return Reference(ChunkId(os.urandom(32)), PackId(bytes(16)), index % 1000, 1 + index % 1000, 0).pack()


async def found_in(state: MapState, nodes: Nodes, first: int = 0) -> dict[int, bytes]:
    found = {}
    async for start, entries in state.leaves(nodes.fetch, from_chunk=first):
        for number in np.flatnonzero(entries["length"]):
            found[start + int(number)] = entries[number].tobytes()
    return found


async def walked(first: int, last: int, wanted: Sequence[int]) -> None:
    nodes = Nodes()
    expected = {index: reference(index) for index in wanted}
    changes = {ChunkIndex(index): raw for index, raw in expected.items()}
    state = await MapState.empty(0).rewrite(changes, last, last, nodes.fetch, nodes.put)
    began_s = time.process_time()
    assert await found_in(state, nodes, first) == {i: r for i, r in expected.items() if i >= first // FANOUT * FANOUT}
    assert time.process_time() - began_s < 5


def test_a_walk_finds_every_chunk_and_passes_over_holes_of_any_size() -> None:
    dice = random.Random(4)
    for chunks in (1, 300, 70_000, FANOUT**2 * 300, FANOUT**3 * 2 + 5, CHUNKS_MAX):
        near = [0, chunks - 1, *(min(chunks - 1, dice.choice((255, 256, 65_535, 65_536, 2**24 - 1, 2**24))) for _ in range(4))]
        for wanted in ([], near, [dice.randrange(chunks) for _ in range(20)]):
            for first in (0, chunks // 2, chunks - 1):
                trio.run(walked, first, chunks, sorted(set(wanted)))


def test_a_walk_lets_others_run() -> None:
    async def main() -> None:
        nodes = Nodes()
        wanted = {ChunkIndex(index << 24): reference(index) for index in range(0, 4096, 8)}
        state = await MapState.empty(0).rewrite(wanted, CHUNKS_MAX, CHUNKS_MAX, nodes.fetch, nodes.put)
        longest_s, done = 0.0, False

        async def watch() -> None:
            nonlocal longest_s
            while not done:
                began_s = time.monotonic()
                await trio.sleep(0)
                longest_s = max(longest_s, time.monotonic() - began_s)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(watch)
            assert len(await found_in(state, nodes)) == len(wanted)
            done = True
        assert longest_s < 1

    trio.run(main)
