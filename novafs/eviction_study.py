"""Eviction policies compared on a trace: hit rate against cache size, with LRU below and Belady's optimum above.

A trace becomes a stream of places (chunk for chunk, reads and writes alike, in order), a cache holds so many chunks of equal size, and
there is no prefetch and no latency: what is compared is who leaves, and nothing else. `novafs.simulate` is for the rest. A policy is
driven as a tier drives it (touches late and in batches, victims before the insert), with `work` called as often as it asks for it, and a
clock that is the trace's own where it has one.

Belady's optimum (L. Belady, IBM Systems Journal 1966, "MIN"; here it may not bypass): who is asked for again last leaves. Share of the
gap closed: (misses of LRU - misses) / (misses of LRU - misses of Belady); it is what a policy can be judged by, since what Belady misses
nobody can hit.

Always holds: hits + misses = accesses; the same trace, policy and size give the same figures.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from novafs.errors import ConfigError
from novafs.eviction.base import EvictionPolicy, Quality, make_policy
from novafs.traces import Trace, chunk_runs

PLACE_BITS: Final = 40
BELADY: Final = "belady"
LRU: Final = "lru"
WORK_EVERY: Final = 256
"""Accesses between the moments at which a policy may learn."""
INTERVAL_S: Final = 0.005
_NEVER: Final = 1 << 62

Places = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Stream:
    """The accesses of a trace: the place of each (disk << 40 | chunk), and its second."""

    name: str
    places: Places
    seconds: npt.NDArray[np.float64]
    chunk_size: int

    @property
    def unique(self) -> int:
        """Different chunks."""
        return len(np.unique(self.places))

    def capacity(self, size: float) -> int:
        """Chunks: a share of the different ones up to 1, else a number. Raises ConfigError where that is less than one chunk."""
        chunks = round(self.unique * size) if size <= 1 else int(size)
        if chunks < 1:
            raise ConfigError(f"{self.name}: a cache of {size:.2%} of {self.unique} chunks holds none; expected one chunk or more")
        return chunks


@dataclass(frozen=True, slots=True)
class Outcome:
    """One policy on one trace at one size."""

    trace: str
    policy: str
    size: float
    capacity_chunks: int
    accesses: int
    misses: int
    lru_misses: int
    belady_misses: int
    cpu_s: float
    quality: Quality | None = None

    @property
    def hit_rate(self) -> float:
        return 1.0 - self.misses / self.accesses if self.accesses else 0.0

    @property
    def gap_closed(self) -> float | None:
        """Of the misses that LRU has and Belady has not, the share that this policy has not either; None where there are none."""
        gap = self.lru_misses - self.belady_misses
        return (self.lru_misses - self.misses) / gap if gap else None

    @property
    def against_lru(self) -> float:
        """Misses beyond LRU's, as a share of LRU's; negative where there are fewer."""
        return self.misses / self.lru_misses - 1.0 if self.lru_misses else 0.0


def stream_of(trace: Trace, chunk_size: int = 65536) -> Stream:
    """Every chunk that the trace touches, in order. Raises SourceError."""
    places: list[Places] = []
    ticks: list[Places] = []
    for block in trace.blocks():
        first, last = chunk_runs(block, chunk_size)
        count = last - first + 1
        row = np.repeat(np.arange(len(first)), count)
        within = np.arange(int(count.sum())) - (np.cumsum(count) - count)[row]
        places.append((block.device[row] << PLACE_BITS) | (first[row] + within))
        ticks.append(block.time_us[row])
    joined = np.concatenate(places)
    clock = np.asarray(np.concatenate(ticks) * 1e-6 if trace.timed else np.arange(len(joined)) * INTERVAL_S, dtype=np.float64)
    return Stream(trace.name, joined, clock, chunk_size)


def belady_misses(places: Places, capacity: int) -> int:
    """Misses of Belady's optimum."""
    count = len(places)
    following = np.full(count, _NEVER, dtype=np.int64)
    order = np.argsort(places, kind="stable")
    same = places[order[1:]] == places[order[:-1]]
    following[order[:-1][same]] = order[1:][same]
    held: dict[int, int] = {}
    """Place to when it is asked for next."""
    latest: list[tuple[int, int]] = []
    misses = 0
    for place, after in zip(places.tolist(), following.tolist(), strict=True):
        if place not in held:
            misses += 1
            if len(held) >= capacity:
                while True:
                    when, victim = heapq.heappop(latest)
                    if held.get(victim) == -when:
                        break
                del held[victim]
        held[place] = after
        heapq.heappush(latest, (-after, place))
    return misses


def misses_of(stream: Stream, policy: EvictionPolicy, capacity: int) -> int:
    """Misses of a policy, which has seen nothing yet, in a cache of `capacity` chunks."""
    size = stream.chunk_size
    now = 0.0

    def seconds() -> float:
        return now

    policy.set_clock(seconds)
    policy.set_capacity(capacity * size)
    held: set[bytes] = set()
    names: dict[int, bytes] = {}
    touched: list[bytes] = []
    misses = 0
    left = WORK_EVERY
    for place, now in zip(stream.places.tolist(), stream.seconds.tolist(), strict=True):  # noqa: B007 - `seconds` reads it
        name = names.get(place)
        if name is None:
            name = names[place] = place.to_bytes(8, "little")
        if name in held:
            touched.append(name)
        else:
            misses += 1
            if touched:
                policy.touch_many(touched)
                touched = []
            if len(held) >= capacity:
                held.difference_update(policy.victims((len(held) - capacity + 1) * size))
            held.add(name)
            policy.insert(name, size, place=place)
        left -= 1
        if not left:
            left = WORK_EVERY
            while policy.work():
                pass
    return misses


def compare(stream: Stream, policies: Sequence[str], sizes: Sequence[float]) -> list[Outcome]:
    """Each policy at each size, size by size; `belady` is one of the names it knows. Raises ConfigError for those it does not know."""
    for name in policies:
        if name != BELADY:
            make_policy(name)
    outcomes = []
    for size in sizes:
        capacity = stream.capacity(size)
        known = {BELADY: belady_misses(stream.places, capacity), LRU: misses_of(stream, make_policy(LRU), capacity)}
        for name in policies:
            began = time.process_time()
            policy = None if name in known else make_policy(name)
            misses = known[name] if policy is None else misses_of(stream, policy, capacity)
            outcomes.append(
                Outcome(
                    trace=stream.name,
                    policy=name,
                    size=size,
                    capacity_chunks=capacity,
                    accesses=len(stream.places),
                    misses=misses,
                    lru_misses=known[LRU],
                    belady_misses=known[BELADY],
                    cpu_s=time.process_time() - began,
                    quality=policy.quality() if policy is not None else None,
                )
            )
    return outcomes
