"""Replays traces through the very classes that the mount uses: an eviction policy, the prefetch engine, its pacer.

What is simulated is the cache's content and the clock, nothing else: a set of contents, `latency_s` for a round trip to the
store, and a link of `bandwidth` bytes a second on which demand goes first. Requests follow each other as a guest's do: the
next is issued its recorded gap after the last was answered (traces without a clock: `interval_s`), so time lost to a miss
is lost for good, and prefetch wins what it hides.

Always holds, and is counted: hits + late + misses = accesses; bytes fetched = (misses + prefetched) * chunk size; what the policy
holds is what the cache holds and never more than the capacity; the same inputs give the same result.

With latency 0 a prefetch is there before the next access. `instant_prefetch` gives prefetches that while misses still cost
the latency: the most stall time that these predictions could remove.

Images: each disk of each trace is an image of its own. Chunks at the same offset of the same disk number have the same
content across the traces of one run, as clones do; a training trace teaches what its clones share (transitions, profiles,
the gate), nothing about places.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from novafs.errors import ConfigError
from novafs.eviction.base import EvictionPolicy, make_policy
from novafs.eviction.probation import Probation
from novafs.prefetch.account import Counts, EngineStatistics, Settings
from novafs.prefetch.base import INDEX_BITS, INDEX_MASK, Access, Key, Place
from novafs.prefetch.engine import PrefetchEngine
from novafs.prefetch.pacer import Pacer
from novafs.traces import WRITE, Trace, chunk_runs

MODES: Final = ("off", "default", "eager")
DISKS_MAX: Final = 256
INTERVAL_S: Final = 0.005
"""Between requests of a trace without a clock: what a disk of the time of most such traces took for one."""
AT_ONCE: Final = 1 << 20
LEARN_EVERY: Final = 256
"""Accesses between the moments at which an eviction policy may learn."""
WORK_EVERY: Final = 4096
"""Accesses between the slices of learning that a mount does when it is idle."""

Step = tuple[float, bool, Place, int]
"""One request: seconds since the last, is a write, first place, number of chunks."""


@dataclass(frozen=True, slots=True)
class Scenario:
    """What to replay with. `size` is chunks, or where below 1 a share of the trace's different chunks."""

    size: float = 0.1
    policy: str = "lru"
    prefetch: str = "default"
    latency_s: float = 0.0
    bandwidth: float = 0.0
    """Bytes a second; 0 for no limit."""
    interval_s: float = INTERVAL_S
    chunk_size: int = 65536
    instant_prefetch: bool = False
    settings: Settings = field(default_factory=Settings)

    def __post_init__(self) -> None:
        if self.prefetch not in MODES:
            raise ConfigError(f"prefetch = {self.prefetch!r}: expected one of {', '.join(MODES)}")
        if self.size <= 0:
            raise ConfigError(f"a cache of size {self.size} holds no chunk: expected a share such as 10% or a number of bytes")

    def engine_settings(self) -> Settings:
        """The engine's settings in this mode."""
        aggression = 1.0 if self.prefetch == "eager" else self.settings.prefetch_aggression
        return replace(self.settings, prefetch_aggression=aggression, chunk_size=self.chunk_size)


@dataclass(frozen=True, slots=True)
class Result:
    """What a replay gave. Rates are of accesses (a chunk touched by a request); `base_*` is the same replay without prefetch."""

    trace: str
    policy: str
    prefetch: str
    capacity_chunks: int
    unique_chunks: int
    accesses: int
    hits: int
    late: int
    misses: int
    evictions: int
    prefetched: int
    counts: Counts
    sources: dict[str, Counts]
    stall_s: float
    time_s: float
    base_misses: int
    base_stall_s: float
    engine: EngineStatistics | None

    @property
    def hit_rate(self) -> float:
        return self.hits / self.accesses if self.accesses else 0.0

    @property
    def base_hit_rate(self) -> float:
        return 1.0 - self.base_misses / self.accesses if self.accesses else 0.0

    @property
    def accuracy(self) -> float | None:
        """Prefetched chunks used (or waited for) / prefetched; what nobody had used when the trace ended counts as wasted."""
        return (self.counts.used + self.counts.late) / self.prefetched if self.prefetched else None

    @property
    def coverage(self) -> float | None:
        """Misses avoided / misses without prefetch; a late prefetch avoids none, since somebody waited."""
        return 1.0 - (self.misses + self.late) / self.base_misses if self.base_misses else None

    @property
    def traffic(self) -> float | None:
        """Chunks from the store as a multiple of what there would have been without prefetch."""
        return (self.misses + self.prefetched) / self.base_misses if self.base_misses else None


def unique_chunks(trace: Trace, chunk_size: int) -> int:
    """Different chunks that a trace touches."""
    seen: set[Place] = set()
    for _, _, place, count in steps(trace, 0, chunk_size, 0.0):
        seen.update(range(place, place + count))
    return len(seen)


def steps(trace: Trace, number: int, chunk_size: int, interval_s: float) -> Iterator[Step]:
    """The requests of a trace as places of the images `number * 256 + disk`."""
    before_us: int | None = None
    for block in trace.blocks():
        firsts, lasts = chunk_runs(block, chunk_size)
        rows = zip(block.time_us.tolist(), block.op.tolist(), firsts.tolist(), lasts.tolist(), block.device.tolist(), strict=True)
        for time_us, op, first, last, device in rows:
            gap_s = interval_s
            if trace.timed:
                gap_s = 0.0 if before_us is None else max(0, time_us - before_us) * 1e-6
                before_us = time_us
            image = number * DISKS_MAX + device % DISKS_MAX
            yield gap_s, op == WRITE, (image << INDEX_BITS) + (first & INDEX_MASK), last - first + 1


def _content(place: Place) -> Key:
    return ((place >> INDEX_BITS) % DISKS_MAX) << INDEX_BITS | place & INDEX_MASK


def simulate(trace: Trace, scenario: Scenario, *, train: Sequence[Trace] = (), base: Result | None = None) -> Result:
    """Replay `trace`, after the engine has watched the traces of `train` with a cache of its own.

    base: the result of the same trace and scenario without prefetch, where it is known already. Raises SourceError, ConfigError.
    """
    unique = unique_chunks(trace, scenario.chunk_size)
    capacity = max(1, round(unique * scenario.size) if scenario.size <= 1 else int(scenario.size))
    if scenario.prefetch == "off":
        return _result(trace, scenario, unique, _replayed(trace, scenario, capacity, None, 0), None)
    if base is None:
        base = simulate(trace, replace(scenario, prefetch="off"))
    engine = PrefetchEngine(capacity_chunks=capacity, settings=scenario.engine_settings(), content=_content)
    if train:
        teacher = PrefetchEngine(capacity_chunks=capacity, settings=scenario.engine_settings(), content=_content)
        for number, lesson in enumerate(train, start=1):
            _replayed(lesson, scenario, capacity, teacher, number)
        engine = PrefetchEngine(
            capacity_chunks=capacity,
            settings=scenario.engine_settings(),
            content=_content,
            table=teacher.table,
            gate=teacher.gate,
            book=teacher.book,
        )
    return _result(trace, scenario, unique, _replayed(trace, scenario, capacity, engine, 0), base)


def _replayed(trace: Trace, scenario: Scenario, capacity: int, engine: PrefetchEngine | None, number: int) -> Replay:
    replay = Replay(capacity, make_policy(scenario.policy), engine, scenario)
    replay.run(steps(trace, number, scenario.chunk_size, scenario.interval_s))
    return replay


def _result(trace: Trace, scenario: Scenario, unique: int, replay: Replay, base: Result | None) -> Result:
    statistics = replay.engine.statistics() if replay.engine is not None else None
    return Result(
        trace=trace.name,
        policy=scenario.policy,
        prefetch=scenario.prefetch,
        capacity_chunks=replay.capacity,
        unique_chunks=unique,
        accesses=replay.hits + replay.late + replay.misses,
        hits=replay.hits,
        late=replay.late,
        misses=replay.misses,
        evictions=replay.evictions,
        prefetched=replay.prefetched,
        counts=statistics.total if statistics else Counts(),
        sources=statistics.sources if statistics else {},
        stall_s=replay.stall_s,
        time_s=replay.now_s,
        base_misses=base.misses if base else replay.misses,
        base_stall_s=base.stall_s if base else replay.stall_s,
        engine=statistics,
    )


class Replay:
    """One cache, one clock. Use once."""

    def __init__(self, capacity: int, policy: EvictionPolicy, engine: PrefetchEngine | None, scenario: Scenario) -> None:
        self.capacity = capacity
        self.policy = policy
        self.engine = engine
        self.hits = 0
        self.late = 0
        self.misses = 0
        self.evictions = 0
        self.prefetched = 0
        self.stall_s = 0.0
        self.now_s = 0.0
        self._chunk_size = scenario.chunk_size
        self._latency_s = scenario.latency_s
        self._instant = scenario.instant_prefetch or scenario.latency_s <= 0.0
        self._transfer_s = scenario.chunk_size / scenario.bandwidth if scenario.bandwidth > 0.0 else 0.0
        self._cached: dict[Key, bytes] = {}
        self._touched: list[bytes] = []
        self._probation = Probation()
        self._pacer = Pacer(capacity)
        self._landing: list[tuple[float, Place, float]] = []
        """A heap of arrival, place, and when it was sent."""
        self._arrival_s: dict[Key, float] = {}
        self._link_free_s = 0.0

    def run(self, requests: Iterator[Step]) -> None:
        """Replay the requests."""
        engine = self.engine
        known: set[int] = set()
        work_at = WORK_EVERY
        learn_at = LEARN_EVERY
        self.policy.set_capacity(self.capacity * self._chunk_size)
        self.policy.set_clock(lambda: self.now_s)
        for gap_s, is_write, place, count in requests:
            self.now_s += gap_s
            if self._landing:
                self._land()
            image = place >> INDEX_BITS
            if engine is not None and image not in known:
                known.add(image)
                engine.opened(image)
            self._request(place, count, is_write)
            if self.hits + self.misses >= learn_at:
                learn_at += LEARN_EVERY
                while self.policy.work():
                    pass
            if engine is not None and self.hits + self.misses >= work_at:
                work_at += WORK_EVERY
                engine.work()
            if engine is not None and not self._instant:
                self._send()
        if engine is not None:
            for image in sorted(known):
                engine.closed(image)

    def _request(self, place: Place, count: int, is_write: bool) -> None:
        """One request: all its missing chunks are asked for at once, and the guest waits for the last."""
        waited_s = 0.0
        missing = 0
        engine = self.engine
        cached = self._cached
        # Without a store's latency the trace is a stream of chunks, as in the literature; with it the chunks of a request are
        # asked for together, and to have guessed the second from the first is no gain.
        last = place + count - 1 if self._latency_s else place
        for at in range(place, place + count):
            key = _content(at)
            name = cached.get(key)
            if name is not None:
                self.hits += 1
                self._touched.append(name)
                hit = True
            else:
                hit = False
                arrival_s = self._arrival_s.pop(key, None)
                if arrival_s is None:
                    self.misses += 1
                    missing += 1
                else:
                    self.late += 1
                    waited_s = max(waited_s, arrival_s - self.now_s)
                    self._pacer.arrived(1, self._pacer.latency_s or self._latency_s)
                self._insert(key, prefetched=False)
            if engine is not None:
                engine.observe(Access(at, key, self.now_s, is_write, hit, more=at < last))
                if self._instant and engine.waiting:
                    self._fetch_at_once()
        if missing:
            took_s = self._latency_s + missing * self._transfer_s
            self._link_free_s = max(self._link_free_s, self.now_s + self._latency_s) + missing * self._transfer_s
            self._pacer.demand(self._latency_s + self._transfer_s, self.now_s)
            if engine is not None:
                engine.set_latency(took_s if not self._instant else 0.0)
            waited_s = max(waited_s, took_s)
        self.stall_s += waited_s
        self.now_s += waited_s

    def _fetch_at_once(self) -> None:
        engine = self.engine
        assert engine is not None
        for fetch in engine.take(AT_ONCE):
            key = _content(fetch.place)
            if key in self._cached:
                engine.failed(fetch.place)
                continue
            self.prefetched += 1
            self._insert(key, prefetched=True)
            engine.arrived(fetch.place, key)

    def _send(self) -> None:
        engine = self.engine
        assert engine is not None
        if not engine.waiting:
            return
        starts_s = self.now_s + self._latency_s
        for fetch in engine.take(self._pacer.room):
            key = _content(fetch.place)
            if key in self._cached or key in self._arrival_s:
                engine.failed(fetch.place)
                continue
            self.prefetched += 1
            self._pacer.sent(1)
            self._link_free_s = max(self._link_free_s, starts_s) + self._transfer_s
            self._arrival_s[key] = self._link_free_s
            heapq.heappush(self._landing, (self._link_free_s, fetch.place, self.now_s))

    def _land(self) -> None:
        landing = self._landing
        while landing and landing[0][0] <= self.now_s:
            arrival_s, place, sent_s = heapq.heappop(landing)
            key = _content(place)
            if self._arrival_s.get(key) != arrival_s:
                continue  # the guest was there first
            del self._arrival_s[key]
            self._pacer.arrived(1, arrival_s - sent_s)
            self._insert(key, prefetched=True)
            if self.engine is not None:
                self.engine.arrived(place, key)
        if self.engine is not None:
            # What arrived made room for more: a store answers while the guest thinks.
            self._send()

    def _insert(self, key: Key, *, prefetched: bool) -> None:
        policy = self.policy
        if self._touched:
            policy.touch_many(self._touched)
            self._probation.leave_many(self._touched)
            self._touched = []
        cached = self._cached
        if len(cached) >= self.capacity:
            guess = self._probation.victim(self.capacity * self._chunk_size)
            if guess is not None:
                policy.remove(guess)
                victims = [int.from_bytes(guess, "little")]
            else:
                victims = [int.from_bytes(name, "little") for name in policy.victims((len(cached) - self.capacity + 1) * self._chunk_size)]
            for victim in victims:
                self._probation.leave(cached.pop(victim))
            self.evictions += len(victims)
            if self.engine is not None:
                self.engine.evicted(victims)
        name = key.to_bytes(8, "little")
        cached[key] = name
        policy.insert(name, self._chunk_size, prefetched=prefetched, place=key)
        if prefetched:
            self._probation.enter(name, self._chunk_size)
