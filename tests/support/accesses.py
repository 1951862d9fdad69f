"""Accesses made up for tests of prefetch, and a cache to replay them on."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator

from novafs.eviction.base import make_policy
from novafs.prefetch.base import Access, place_of
from novafs.prefetch.engine import PrefetchEngine
from novafs.simulate import Replay, Scenario, Step


def access(index: int, *, image: int = 0, time_s: float = 0.0, hit: bool = False, key: int | None = None) -> Access:
    """One read of a chunk; its content is named by its index unless `key` says otherwise."""
    return Access(place_of(image, index), index if key is None else key, time_s, False, hit)


def requests(indexes: Iterable[int], *, image: int = 0, gap_s: float = 0.005) -> Iterator[Step]:
    """Reads of one chunk each."""
    for index in indexes:
        yield gap_s, False, place_of(image, index), 1


def replayed(steps: Iterable[Step], capacity: int, scenario: Scenario, engine: PrefetchEngine | None = None) -> Replay:
    """A replay on an LRU cache that has ended."""
    if engine is None and scenario.prefetch != "off":
        engine = PrefetchEngine(capacity_chunks=capacity, settings=scenario.engine_settings())
    replay = Replay(capacity, make_policy("lru"), engine, scenario)
    replay.run(iter(steps))
    return replay


def uniform(count: int, chunks: int, seed: int) -> list[int]:
    """Random reads."""
    numbers = random.Random(seed)
    return [numbers.randrange(chunks) for _ in range(count)]


def scans(count: int, chunks: int, streams: int) -> list[int]:
    """Sequential readers that take turns, each in a part of its own, from the beginning again and again."""
    part = chunks // streams
    return [(turn % streams) * part + (turn // streams) % part for turn in range(count)]
