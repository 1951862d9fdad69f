"""What kind of access an image, or a key of the library, sees: sequential, random, periodic or bursty; and at which hours it is used.

For people, for warming and for scorers, not for the gate: `novafs info`, `HierarchicalCache.patterns`, the metrics; `DailyProfile.due`
and `SpellMemory.due`, which tell the mount what to fetch before the hour at which an image is usually read, or before the next spell of
one that is read periodically; and `EvictionPolicy.set_patterns`.

An image's accesses are summed over windows of `WINDOW_S`. *Sequential*: at least half of the accesses continue a run.
*Periodic*: the busy windows recur at a distance that the autocorrelation of the activity shows (at least `PERIOD_MIN`, with
three periods seen). *Bursty*: the index of dispersion of the counts (variance over mean) is above `BURSTY_MIN`, a Poisson
process having one. *Random*: none of these. *Idle*: too few accesses to tell. Times are seconds since the epoch, passed in.
"""

from __future__ import annotations

from collections import deque
from enum import Enum
from typing import Final

import numpy as np

from novafs.prefetch.base import Key

WINDOW_S: Final = 10.0
WINDOWS_MAX: Final = 2048
SEQUENTIAL_MIN: Final = 0.5
PERIOD_MIN: Final = 0.5
BURSTY_MIN: Final = 10.0
ACCESSES_MIN: Final = 64
FADE: Final = 0.98

SPELL_PAUSE_S: Final = 3 * WINDOW_S
"""A pause after which reading counts as a new spell."""
PERIOD_S_MIN: Final = 12 * WINDOW_S
"""Below it what a spell reads is hardly gone before the next, and the one in use would be taken for it."""
SPELL_AHEAD_S: Final = 120.0

SLOTS: Final = 96
"""Quarters of an hour in a day."""
SLOT_S: Final = 900.0
DAY_S: Final = 86400.0
CHUNKS_MAX: Final = 2048
"""Chunks that are remembered for a slot."""
DAYS_MIN: Final = 2
SHARE_MIN: Final = 0.6
"""Of the days seen, on how many the image has to have been read in the slot."""


class Pattern(Enum):
    """What an image's accesses look like."""

    IDLE = "idle"
    SEQUENTIAL = "sequential"
    PERIODIC = "periodic"
    BURSTY = "bursty"
    RANDOM = "random"


class PatternWatch:
    """The activity of one image: accesses per window, at most `WINDOWS_MAX` of them, and the share that continued a run."""

    __slots__ = ("_accesses", "_counts", "_runs", "_window")

    def __init__(self) -> None:
        self._counts: deque[int] = deque(maxlen=WINDOWS_MAX)
        self._window: int | None = None
        self._accesses = 0.0
        self._runs = 0.0

    def observe(self, time_s: float, *, in_run: bool) -> None:
        """An access; `in_run` says that it continued a sequential stream."""
        window = int(time_s // WINDOW_S)
        if self._window is None or not self._counts:
            self._window = window
            self._counts.append(0)
        elif window > self._window:
            self._counts.extend([0] * min(window - self._window, WINDOWS_MAX))
            self._window = window
            self._accesses *= FADE
            self._runs *= FADE
        self._counts[-1] += 1
        self._accesses += 1.0
        self._runs += in_run

    def pattern(self) -> Pattern:
        """What it looks like now."""
        if self._accesses < ACCESSES_MIN:
            return Pattern.IDLE
        if self._runs >= SEQUENTIAL_MIN * self._accesses:
            return Pattern.SEQUENTIAL
        if self.period_s() is not None:
            return Pattern.PERIODIC
        counts = np.fromiter(self._counts, dtype=np.float64)
        mean = float(counts.mean())
        return Pattern.BURSTY if mean > 0.0 and float(counts.var()) / mean > BURSTY_MIN else Pattern.RANDOM

    def period_s(self) -> float | None:
        """The distance in seconds at which activity recurs, where it does."""
        counts = np.fromiter(self._counts, dtype=np.float64)
        if len(counts) < 9:
            return None
        counts -= counts.mean()
        power = float(counts @ counts)
        if power == 0.0:
            return None
        # Zero-padded, so that the correlation is not circular; longer distances have fewer terms and are scaled up to compare.
        spectrum = np.fft.rfft(counts, 2 * len(counts))
        longest = len(counts) // 3
        found = np.fft.irfft(spectrum * np.conj(spectrum))[: longest + 1] / power
        found *= len(counts) / (len(counts) - np.arange(longest + 1))
        below = np.flatnonzero(found < 0.0)
        if not len(below):
            return None
        first = int(below[0])
        if first >= longest:
            return None
        top = float(found[first:].max())
        if top < PERIOD_MIN:
            return None
        # What recurs after one period recurs after two: the shortest that is about as good is it.
        best = first + int(np.flatnonzero(found[first:] >= 0.9 * top)[0])
        return best * WINDOW_S


class SpellMemory:
    """What an image read in its last two spells of activity, in order: what it reads again after a period, where it has one.

    A chunk's chance is the share of the spell before that was read again, for those that were read in both; half of it for the others.
    """

    __slots__ = ("_before", "_began_s", "_last_s", "_now")

    def __init__(self) -> None:
        self._now: dict[int, None] = {}
        """Indexes, in the order of their first read in the spell."""
        self._before: dict[int, None] = {}
        self._began_s = 0.0
        self._last_s = float("-inf")

    def observe(self, time_s: float, index: int) -> None:
        """An access."""
        if time_s - self._last_s > SPELL_PAUSE_S:
            self._before, self._now = self._now, {}
            self._began_s = time_s
        self._last_s = time_s
        if len(self._now) < CHUNKS_MAX:
            self._now.setdefault(index)

    def due(self, time_s: float, period_s: float | None) -> list[tuple[int, float]]:
        """Indexes to warm now, with their chance: the last spell's, where the next begins within `SPELL_AHEAD_S`."""
        if period_s is None or period_s < PERIOD_S_MIN or time_s - self._last_s <= SPELL_PAUSE_S or not self._before:
            return []
        wait_s = (self._began_s - time_s) % period_s
        if wait_s > SPELL_AHEAD_S or time_s - self._began_s > 1.5 * period_s:  # it has missed one: it may be over
            return []
        again = len(self._now.keys() & self._before.keys()) / len(self._before)
        return [(index, again if index in self._before else 0.5 * again) for index in self._now]


class DailyProfile:
    """At which quarter of an hour an image is read, and what it reads first then.

    Only what was read after a pause counts: an image in steady use has no hour. The chunks of the last such day are kept, in order.
    """

    __slots__ = ("_days", "_first_day", "_last_s", "_open", "_slots")

    def __init__(self) -> None:
        self._slots: dict[int, dict[int, Key]] = {}
        """Slot → index → key, in the order of the last day."""
        self._days: dict[int, set[int]] = {}
        """Slot → days (since the epoch) on which reading began in it, the newest 64."""
        self._first_day: int | None = None
        self._last_s = float("-inf")
        self._open: int | None = None

    def observe(self, time_s: float, index: int, key: Key) -> None:
        """An access."""
        if self._first_day is None:
            self._first_day = int(time_s // DAY_S)
        if time_s - self._last_s > SLOT_S:
            slot = int(time_s % DAY_S // SLOT_S)
            self._open = slot
            self._slots[slot] = {}
            days = self._days.setdefault(slot, set())
            days.add(int(time_s // DAY_S))
            if len(days) > 64:
                days.discard(min(days))
        self._last_s = time_s
        if self._open is not None:
            chunks = self._slots[self._open]
            if len(chunks) >= CHUNKS_MAX:
                self._open = None
            elif index not in chunks:
                chunks[index] = key

    def usual_slots(self, time_s: float) -> list[tuple[int, float]]:
        """Slots in which the image is usually read, and on which share of the days."""
        if self._first_day is None:
            return []
        seen = min(64, max(1, int(time_s // DAY_S) - self._first_day + 1))
        if seen < DAYS_MIN:
            return []
        shares = ((slot, min(1.0, len(days) / seen)) for slot, days in self._days.items() if len(days) >= DAYS_MIN)
        return sorted((slot, share) for slot, share in shares if share >= SHARE_MIN)

    def due(self, time_s: float, ahead_s: float) -> list[tuple[int, float]]:
        """Indexes to warm now, with their chance: those of a usual slot that begins within `ahead_s` seconds.

        Empty while the image is in use.
        """
        if time_s - self._last_s < SLOT_S:
            return []
        for slot, share in self.usual_slots(time_s):
            wait_s = (slot * SLOT_S - time_s % DAY_S) % DAY_S
            if wait_s <= ahead_s:
                return [(index, share) for index in self._slots[slot]]
        return []
