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
CANDIDATES_MAX: Final = 2048
"""As many candidates are drawn as there are chunks, up to this: about a millisecond's work."""
EACH: Final = 12
"""Candidates for each eviction."""
STALE_SHARE: Final = 0.25
"""A valuation is old after so many accesses, as a share of what is held."""


def drawn(held: int) -> int:
    """How many candidates are drawn in a tier of that many chunks, beside the oldest."""
    return max(OLDEST, min(CANDIDATES_MAX, held))


def served(candidates: int) -> int:
    """How many evictions one valuation of so many candidates serves."""
    return max(1, candidates // EACH)


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
        self._chosen: list[bytes] = []
        """Whom to evict next, worst last."""
        self._unread: set[bytes] = set()
        """Those of them that nobody has asked for since they were valued."""
        self._stale_at = 0

    def insert(self, key: bytes, size: int, *, prefetched: bool = False, place: int = -1) -> None:  # noqa: ARG002 - the book knows
        self._unread.discard(key)
        self._sizes[key] = size
        self._seat[key] = len(self._seats)
        self._seats.append(key)

    def resize(self, key: bytes, size: int) -> None:
        if key in self._sizes:
            self._sizes[key] = size

    def touch(self, key: bytes) -> None:
        if key in self._sizes:
            self._sizes.move_to_end(key)
            self._unread.discard(key)

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
        book, sizes = self._book, self._sizes
        if self._learner.forest is None:
            return next(iter(sizes))
        chosen, unread = self._chosen, self._unread
        if book.now >= self._stale_at:
            chosen.clear()
        while chosen:
            key = chosen.pop()
            if key in unread and key in sizes:
                return key
        held = len(sizes)
        keys = list(itertools.islice(sizes, OLDEST))
        keys.extend(self._seats[at] for at in self._random.integers(0, held, drawn(held)).tolist())
        by_slot = {}
        for key in keys:
            slot = book.slot(key)
            if slot < 0:
                return key
            by_slot[slot] = key
        order = self._learner.worst_first(np.fromiter(by_slot, dtype=np.int64, count=len(by_slot)))[: served(len(by_slot))]
        self._stale_at = book.now + int(STALE_SHARE * book.scale) + 1
        self._chosen = chosen = [by_slot[slot] for slot in reversed(order.tolist())]
        self._unread = set(chosen)
        return chosen.pop()

    def __len__(self) -> int:
        return len(self._sizes)

    def __contains__(self, key: object) -> bool:
        return key in self._sizes
