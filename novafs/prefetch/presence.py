"""What is in the cache or on its way, as far as the engine has seen it come, and what the cache gives up for prefetch.

The engine's caller tells what came and what left by content; what is proposed is places. This is the link between both. A place that is
forgotten wrongly is proposed again and found present; nothing worse. The last contents to leave are kept as ghosts: how often they are
missed says what the chunk is worth that a prefetch pushes out (as ARC's ghost lists do, N. Megiddo, D. Modha, FAST 2003).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from typing import Final

from novafs.prefetch.base import Key, Place

COMING: Final = -1
"""Stands for the content of what is on its way."""
GHOST_TICKS_MIN: Final = 500.0
DISPLACED_MAX: Final = 0.9


class Presence:
    """Places and contents, each bounded by `most`."""

    __slots__ = ("_at", "_fade", "_ghosts", "_ghosts_max", "_most", "_returned", "_ticks", "places")

    def __init__(self, capacity_chunks: int, most: int) -> None:
        self.places: dict[Place, Key] = {}
        """What is held, and `COMING` for what is on its way. To be read by others, not changed."""
        self._at: dict[Key, Place] = {}
        self._most = most
        self._ghosts: OrderedDict[Place, None] = OrderedDict()
        self._ghosts_max = max(16, capacity_chunks // 4)
        self._returned = 0.0
        self._ticks = 1.0
        self._fade = 1.0 - 1.0 / max(2000.0, 4.0 * capacity_chunks)

    def expect(self, place: Place) -> None:
        """A fetch of it was decided."""
        self.places[place] = COMING

    def give_up(self, place: Place) -> None:
        """It will not come after all."""
        if self.places.get(place) == COMING:
            del self.places[place]

    def hold(self, place: Place, key: Key, expected: Iterable[Place]) -> None:
        """It is in the cache. expected: places on their way, in case memory has to be made."""
        self.places[place] = key
        self._at[key] = place
        if len(self.places) > self._most:
            # Contents that stand at several places, or were written over, leave names behind. Begin anew with what counts: one place
            # for each content, the latest, and what is on its way.
            latest = [(place, key) for key, place in self._at.items()][-self._most // 2 :]
            self._at = {key: place for place, key in latest}
            self.places = dict(latest) | {place: self.places.get(place, COMING) for place in expected}

    def holds(self, key: Key) -> bool:
        """Whether a content is in the cache, at whatever place."""
        place = self._at.get(key)
        return place is not None and self.places.get(place) == key

    def left(self, key: Key) -> Place | None:
        """A content left the cache; the place at which it was, unless that holds something newer since."""
        place = self._at.pop(key, None)
        if place is None or self.places.get(place) != key:
            return None
        del self.places[place]
        self._ghosts[place] = None
        if len(self._ghosts) > self._ghosts_max:
            self._ghosts.popitem(last=False)
        return place

    def tick(self, place: Place, *, missed: bool) -> None:
        """An access went by; a miss of what has just left counts against prefetch."""
        self._returned *= self._fade
        self._ticks = self._ticks * self._fade + 1.0
        if missed and place in self._ghosts:
            del self._ghosts[place]
            self._returned += 1.0

    def displaced(self, life: float) -> float:
        """The probability that the chunk which a prefetch pushes out would have been used: misses that a slightly larger cache
        would have had as hits, per chunk of it, times the accesses for which an unused prefetch stays.
        """
        if self._ticks < GHOST_TICKS_MIN:
            return 0.0
        return min(DISPLACED_MAX, life * self._returned / (self._ticks * self._ghosts_max))
