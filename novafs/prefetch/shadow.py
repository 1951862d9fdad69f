"""What the cache would have done without prefetch: an LRU of names beside the real one, fed with demand only.

Coverage is misses avoided over misses *without* prefetch, and the traffic cap is a multiple of demand traffic *without* it;
neither can be seen from the cache that prefetch has changed. The shadow holds places, no content. Above `ENTRIES_MAX` it
keeps every n-th place, chosen by hash, in an n-th of the capacity (C. Waldspurger et al., "Efficient MRC construction with
SHARDS", FAST 2015).
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Final

from novafs.prefetch.base import Place

ENTRIES_MAX: Final = 8192
_PHI: Final = 0x9E3779B97F4A7C15
_WORD: Final = (1 << 64) - 1


class ShadowLru:
    """Counts demand accesses and the misses that an LRU of `capacity_chunks` would have had."""

    __slots__ = ("_entries", "_limit", "accesses", "misses", "weight")

    def __init__(self, capacity_chunks: int) -> None:
        self.weight = max(1, -(-capacity_chunks // ENTRIES_MAX))
        self._limit = max(1, capacity_chunks // self.weight)
        self._entries: OrderedDict[Place, None] = OrderedDict()
        self.accesses = 0
        self.misses = 0

    def observe(self, place: Place) -> bool:
        """An access; whether it would have been a miss. Where the shadow samples, most are not looked at and answer False."""
        self.accesses += 1
        if self.weight > 1 and ((place * _PHI & _WORD) >> 32) % self.weight:
            return False
        entries = self._entries
        if place in entries:
            entries.move_to_end(place)
            return False
        entries[place] = None
        if len(entries) > self._limit:
            entries.popitem(last=False)
        self.misses += self.weight
        return True
