"""Who leaves by the learned model's word: a few candidates are drawn, the forest values them, the worst leave.

Candidates are the oldest few and as many drawn at random (a full order of all that is held would cost a pass over it). One valuation
serves several evictions: who was read in between is passed over. Before there is a forest it is LRU.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from typing import ClassVar, Final

import numpy as np

from novafs.eviction.base import EvictionPolicy
from novafs.eviction.features import Book
from novafs.eviction.learner import Learner

OLDEST: Final = 32
DRAWN_EACH: Final = 32
DRAWN_MAX: Final = 320
"""The bound on what one valuation costs: the larger the tier the fewer candidates there are for each eviction."""
SERVED: Final = 8
SERVED_MAX: Final = 128
SERVED_SHARE: Final = 32
SERVED_SHARE_LARGE: Final = 2048
"""At most an eviction for so many keys held: beyond that a valuation would be old before it is used up."""


def served(held: int) -> int:
    """How many evictions one valuation serves in a tier of that many chunks."""
    return max(1, min(SERVED, held // SERVED_SHARE), min(SERVED_MAX, held // SERVED_SHARE_LARGE))


def candidates(held: int) -> int:
    """How many are drawn at random for it."""
    return min(DRAWN_MAX, DRAWN_EACH * served(held))


class RankedPolicy(EvictionPolicy):
    """The model's shadow: keys, sizes and recency are its own, features are the book's. Keys the book has forgotten leave first."""

    name: ClassVar[str] = "model"

    def __init__(self, book: Book, learner: Learner, random: np.random.Generator) -> None:
        self._book = book
        self._learner = learner
        self._random = random
        self._sizes: OrderedDict[bytes, int] = OrderedDict()
        self._seats: list[bytes] = []
        self._seat: dict[bytes, int] = {}
        self._chosen: list[tuple[bytes, float]] = []

    def insert(self, key: bytes, size: int, *, prefetched: bool = False, place: int = -1) -> None:  # noqa: ARG002 - the book knows
        self._sizes[key] = size
        self._seat[key] = len(self._seats)
        self._seats.append(key)

    def resize(self, key: bytes, size: int) -> None:
        if key in self._sizes:
            self._sizes[key] = size

    def touch(self, key: bytes) -> None:
        if key in self._sizes:
            self._sizes.move_to_end(key)

    def remove(self, key: bytes) -> None:
        if self._sizes.pop(key, None) is not None:
            self._unseat(key)

    def _unseat(self, key: bytes) -> None:
        seat = self._seat.pop(key)
        last = self._seats.pop()
        if last != key:
            self._seats[seat] = last
            self._seat[last] = seat

    def victims(self, bytes_needed: int) -> list[bytes]:
        gone = []
        while bytes_needed > 0 and self._sizes:
            key = self._worst()
            bytes_needed -= self._sizes.pop(key)
            self._unseat(key)
            gone.append(key)
        return gone

    def _worst(self) -> bytes:
        book = self._book
        if self._learner.forest is None:
            return next(iter(self._sizes))
        chosen = self._chosen
        while chosen:
            key, last = chosen.pop()
            slot = book.slot(key) if key in self._sizes else -1
            if slot >= 0 and book.last_of(slot) == last:
                return key
        sizes = self._sizes
        keys = list(itertools.islice(sizes, OLDEST))
        held = len(sizes)
        keys.extend(self._seats[at] for at in self._random.integers(0, held, candidates(held)).tolist())
        by_slot = {}
        for key in keys:
            slot = book.slot(key)
            if slot < 0:
                return key
            by_slot[slot] = key
        order = self._learner.worst_first(np.fromiter(by_slot, dtype=np.int64, count=len(by_slot)))[: served(held)]
        self._chosen = [(by_slot[slot], book.last_of(slot)) for slot in reversed(order.tolist())]
        return self._chosen.pop()[0]

    def __len__(self) -> int:
        return len(self._sizes)

    def __contains__(self, key: object) -> bool:
        return key in self._sizes
