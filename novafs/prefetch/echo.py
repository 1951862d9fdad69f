"""Echoes: what followed a chunk the last time it was read is named again, in the order it came.

The source keeps an image's accesses in one ring and remembers where in it each chunk was seen last; that memory is the
engine's own record of the chunk, so an echo costs one look-up. It is temporal streaming (T. Wenisch et al., "Temporal streaming of
shared memory", ISCA 2005; M. Ferdman, B. Falsafi, "Last-touch correlated data streaming", ISPASS 2007) with one
history per image. Against a table of transitions it looks further ahead without walking a chain, and interleaved readers do not tear it;
against counts it knows one past only. The gate weighs the two.

`strength` counts how many of the latest accesses came in the order of the past; a break halves it.
"""

from __future__ import annotations

from array import array
from typing import Final

from novafs.prefetch.base import Candidate, Place

HISTORY_BITS: Final = 16
RING_MAX: Final = 1 << HISTORY_BITS
STRENGTH_MAX: Final = 12
GAP_MAX: Final = 6
"""Accesses that may lie between two echoes in the past: what others read in between."""


class EchoSource:
    """The history of one image. Evidence: 1 + strength * 16 + distance (at most 15)."""

    __slots__ = ("_mask", "_ring", "_was", "reach", "strength", "tick")

    def __init__(self, reach: int, *, history_bits: int = HISTORY_BITS) -> None:
        self.reach = reach
        self.tick = 0
        """Accesses observed so far: the one observed last is number `tick`, the first is 1."""
        self.strength = 0
        self._mask = (1 << history_bits) - 1
        self._ring: array[Place] = array("Q")
        self._was = 0

    def observe(self, place: Place, last_tick: int) -> None:
        """An access to a chunk that was number `last_tick` before, 0 where it is new or forgotten."""
        if last_tick and self._was and 0 < last_tick - self._was <= GAP_MAX:
            if self.strength < STRENGTH_MAX:
                self.strength += 1
        else:
            self.strength >>= 1
        self._was = last_tick
        if self.tick > self._mask:
            self._ring[self.tick & self._mask] = place
        else:
            self._ring.append(place)
        self.tick += 1

    def candidates(self) -> list[Candidate]:
        was = self._was
        # The oldest numbers are being overwritten by the newest: past the ring there is no past.
        if not was or self.tick - was > self._mask - self.reach:
            return []
        base = 1 + self.strength * 16
        start = was & self._mask
        end = start + min(self.reach, self.tick - was - 1)
        ring = self._ring
        places = ring[start:] + ring[: end & self._mask] if end > self._mask else ring[start:end]
        return (
            [(place, base + ahead) for ahead, place in enumerate(places, start=1)]
            if len(places) < 16
            else [(place, base + min(ahead, 15)) for ahead, place in enumerate(places, start=1)]
        )
