"""Latency histograms that are cheap enough for the hot path: a list of counts, found by bisection, and a sum.

    reads = book.of("l1", "get")
    began_s = perf_counter()
    …
    reads.note(perf_counter() - began_s)

What always holds: `note` allocates nothing that stays, takes no lock and calls nothing of Python's but itself. It belongs to the trio
thread; who reads from another thread sees counts that are at most a note behind each other. Within, a decade has ten buckets (the
R10 series of preferred numbers), so that a quantile is right within an eighth; Prometheus is shown every third of them
(1, 2.5, 5), which is what it costs to store.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

_R10: Final = (1.0, 1.25, 1.6, 2.0, 2.5, 3.15, 4.0, 5.0, 6.3, 8.0)
EDGES: Final = (*(float(f"{step}e{decade}") for decade in range(-6, 2) for step in _R10), 100.0)
"""Upper ends of the buckets in seconds, inclusive, 1 µs to 100 s; one more bucket is above them."""
SHOWN: Final = tuple(at for at, edge in enumerate(EDGES) if f"{edge:e}"[:3] in ("1.0", "2.5", "5.0") and f"{edge:e}"[3:7] == "0000")
"""Which of them Prometheus is shown."""
WINDOW_S: Final = 60.0
TICK_S: Final = 10.0


class Latency:
    """One histogram. counts: one more than `EDGES`."""

    __slots__ = ("counts", "sum_s")

    def __init__(self) -> None:
        self.counts: list[int] = [0] * (len(EDGES) + 1)
        self.sum_s = 0.0

    def note(self, seconds: float) -> None:
        """Something took so long."""
        self.counts[bisect_left(EDGES, seconds)] += 1
        self.sum_s += seconds

    def add(self, other: Latency) -> None:
        """Count what `other` has counted as well."""
        self.counts = [one + more for one, more in zip(self.counts, other.counts, strict=True)]
        self.sum_s += other.sum_s

    @property
    def count(self) -> int:
        """How often `note` was called."""
        return sum(self.counts)

    def buckets(self) -> list[tuple[str, float]]:
        """Cumulative, as Prometheus takes them: upper end in seconds, count."""
        found: list[tuple[str, float]] = []
        total = done = 0
        for at in SHOWN:
            total += sum(self.counts[done : at + 1])
            done = at + 1
            found.append((repr(EDGES[at]), float(total)))
        return [*found, ("+Inf", float(total + sum(self.counts[done:])))]


def quantile(counts: Sequence[int], share: float) -> float | None:
    """The latency in seconds that `share` of them did not exceed, interpolated within its bucket; None where there are none."""
    total = sum(counts)
    if not total:
        return None
    wanted, below = share * total, 0
    for at, count in enumerate(counts):
        if count and below + count >= wanted:
            if at == len(EDGES):
                return EDGES[-1]
            low = EDGES[at - 1] if at else 0.0
            return low + (EDGES[at] - low) * max(0.0, wanted - below) / count
        below += count
    return EDGES[-1]


@dataclass(frozen=True, slots=True)
class LatencyFigures:
    """count, mean_s: since the start. p50_s, p95_s, p99_s: of the last minute, or since the start where that had none."""

    count: int
    mean_s: float
    p50_s: float
    p95_s: float
    p99_s: float


class LatencyBook:
    """Every histogram of one volume, by subject (`l1`, `l2`, `l3`, `store`, `journal`, `commit`, `fuse`) and operation."""

    def __init__(self) -> None:
        self._found: dict[tuple[str, str], Latency] = {}
        self._past: deque[tuple[float, dict[tuple[str, str], list[int]]]] = deque()

    def of(self, subject: str, operation: str) -> Latency:
        """The histogram, made where there was none. To be kept by whoever notes often."""
        found = self._found.get((subject, operation))
        if found is None:
            found = self._found[subject, operation] = Latency()
        return found

    def __iter__(self) -> Iterator[tuple[str, str, Latency]]:
        for (subject, operation), latency in list(self._found.items()):
            yield subject, operation, latency

    def tick(self, now_s: float) -> None:
        """Remember how it stands, for the figures of the last minute: about every `TICK_S`. now_s: of any clock that only grows."""
        if self._past and now_s - self._past[-1][0] < TICK_S:
            return
        self._past.append((now_s, {key: list(latency.counts) for key, latency in self._found.items() if latency.sum_s}))
        while len(self._past) > 1 and now_s - self._past[1][0] >= WINDOW_S:
            self._past.popleft()

    def figures(self) -> dict[str, dict[str, LatencyFigures]]:
        """What was measured at all, by subject and operation."""
        before = self._past[0][1] if self._past else {}
        found: dict[str, dict[str, LatencyFigures]] = {}
        for subject, operation, latency in self:
            counts = list(latency.counts)
            if count := sum(counts):
                old = before.get((subject, operation))
                recent = [now - then for now, then in zip(counts, old, strict=True)] if old is not None else counts
                if not any(recent):
                    recent = counts
                quantiles = [quantile(recent, share) or 0.0 for share in (0.5, 0.95, 0.99)]
                found.setdefault(subject, {})[operation] = LatencyFigures(count, latency.sum_s / count, *quantiles)
        return found
