"""How much may be in flight: demand first, and prefetch as wide as the store shows it can take.

The window (chunks of prefetch in flight) grows by one chunk per window's worth that arrived in time and is halved, at most
once per round trip, when a fetch times out or demand reads become slower than `SLOWER` times what they were: additive
increase, multiplicative decrease (D. Chiu, R. Jain, 1989). While no sign of a limit was seen it doubles instead, as TCP's
slow start does, up to what latency and bandwidth can hold. It never exceeds a share of the cache: what is in flight will
need room when it lands.

No clock of its own: times come with the calls.
"""

from __future__ import annotations

from typing import Final

WINDOW_FIRST: Final = 16
WINDOW_MIN: Final = 2
WINDOW_MAX: Final = 2048
CACHE_SHARE: Final = 4
"""A quarter of the cache may be in flight."""
SLOWER: Final = 3.0
SMOOTHING: Final = 0.1


class Pacer:
    """Latency and width of the way to the store."""

    __slots__ = ("_best_s", "_cap", "_growing", "_halved_s", "_window", "demand_s", "in_flight", "latency_s")

    def __init__(self, capacity_chunks: int, *, first: int = WINDOW_FIRST) -> None:
        """first: the window to begin with."""
        self._cap = max(WINDOW_MIN, min(WINDOW_MAX, capacity_chunks // CACHE_SHARE))
        self._window = float(min(first, self._cap))
        self._growing = True
        self._halved_s = float("-inf")
        self._best_s = 0.0
        self.in_flight = 0
        self.latency_s = 0.0
        """Smoothed time from sending a prefetch to its arrival."""
        self.demand_s = 0.0
        """The same of demand fetches."""

    @property
    def room(self) -> int:
        """Chunks that may be sent now."""
        return max(0, int(self._window) - self.in_flight)

    def sent(self, chunks: int) -> None:
        """Prefetches went out."""
        self.in_flight += chunks

    def arrived(self, chunks: int, took_s: float) -> None:
        """They came back."""
        self.in_flight -= chunks
        self.latency_s += SMOOTHING * (took_s - self.latency_s) if self.latency_s else took_s
        self._window = min(self._cap, self._window + (chunks if self._growing else chunks / max(1.0, self._window)))

    def failed(self, chunks: int, now_s: float, *, timed_out: bool) -> None:
        """They did not come back."""
        self.in_flight -= chunks
        if timed_out:
            self._halve(now_s)

    def demand(self, took_s: float, now_s: float) -> None:
        """A demand fetch was answered: slower than it should be, prefetch is in its way."""
        self.demand_s += SMOOTHING * (took_s - self.demand_s) if self.demand_s else took_s
        # The best fades upwards, so that a store that became slower for good is not blamed on prefetch for ever.
        self._best_s = min(took_s, self._best_s * 1.001) if self._best_s else took_s
        if self.demand_s > SLOWER * self._best_s and self.in_flight:
            self._halve(now_s)

    def _halve(self, now_s: float) -> None:
        self._growing = False
        if now_s - self._halved_s > max(self.latency_s, self.demand_s):
            self._halved_s = now_s
            self._window = max(WINDOW_MIN, self._window / 2)
