"""A policy around a scorer that a program has registered (`novafs.registry`): the least valued of a sample leaves.

The oldest `OLDEST` chunks and up to `DRAWN` drawn at random are scored together, and one scoring serves up to `SERVED` evictions.
Where the scorer is switched off, because it raised or answered what is no answer, the policy is LRU.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from novafs.eviction.base import EvictionPolicy

if TYPE_CHECKING:
    from novafs.registry import Guard, ModelFigures, Scorer

OLDEST: Final = 16
DRAWN: Final = 48
SERVED: Final = 8
_INDEX_BITS: Final = 40


class _Chunk:
    __slots__ = ("accesses", "came", "last", "place", "size", "slot")

    def __init__(self, size: int, place: int, now: int, accesses: int, slot: int) -> None:
        self.size = size
        self.place = place
        self.came = self.last = now
        self.accesses = accesses
        self.slot = slot


class ScorerPolicy(EvictionPolicy):
    """See the module."""

    name = "scorer"

    def __init__(self, name: str, scorer: Scorer, *, seed: int = 1) -> None:
        """name: as registered. seed: of the draw of candidates."""
        from novafs.registry import ChunkFeatures, Guard, checked_scores

        self.name = name  # type: ignore[misc]  # each is called what its scorer is
        self._scorer = scorer
        self._guard = Guard(name, "scorer")
        self._features = ChunkFeatures
        self._checked = checked_scores
        self._chunks: OrderedDict[bytes, _Chunk] = OrderedDict()
        """Read longest ago first."""
        self._keys: list[bytes] = []
        """By slot, without gaps: to draw from."""
        self._now = 0
        self._random = np.random.default_rng(seed)
        self._pattern_of: Callable[[int], str] = lambda _: "idle"
        learn = getattr(scorer, "learn", None)
        self._learn: Callable[[Any, bool], object] | None = learn if callable(learn) else None

    @property
    def scorer(self) -> Scorer:
        """The program's own."""
        return self._scorer

    @property
    def guard(self) -> Guard:
        """Of the calls into it."""
        return self._guard

    def set_patterns(self, pattern_of: Callable[[int], str]) -> None:
        self._pattern_of = pattern_of

    def set_learning_rate(self, factor: float) -> None:
        if not factor:
            self._learn = None

    def insert(self, key: bytes, size: int, *, prefetched: bool = False, place: int = -1) -> None:
        self._now += 1
        self._chunks[key] = _Chunk(size, place, self._now, 0 if prefetched else 1, len(self._keys))
        self._keys.append(key)

    def resize(self, key: bytes, size: int) -> None:
        chunk = self._chunks.get(key)
        if chunk is not None:
            chunk.size = size

    def touch(self, key: bytes) -> None:
        chunk = self._chunks.get(key)
        if chunk is None:
            return
        self._now += 1
        self._teach(key, chunk, reused=True)
        chunk.last = self._now
        chunk.accesses += 1
        self._chunks.move_to_end(key)

    def remove(self, key: bytes) -> None:
        chunk = self._chunks.pop(key, None)
        if chunk is None:
            return
        last = self._keys.pop()
        if last != key:
            self._keys[chunk.slot] = last
            self._chunks[last].slot = chunk.slot

    def victims(self, bytes_needed: int) -> list[bytes]:
        gone: list[bytes] = []
        while bytes_needed > 0 and self._chunks:
            for key in self._worst():
                chunk = self._chunks[key]
                bytes_needed -= chunk.size
                self._teach(key, chunk, reused=False)
                self.remove(key)
                gone.append(key)
                if bytes_needed <= 0:
                    break
        return gone

    def _worst(self) -> list[bytes]:
        """Whom to evict next, worst first; at least one."""
        oldest = list(itertools.islice(self._chunks, OLDEST))
        if self._guard.disabled:
            return oldest[:1]
        drawn = {self._keys[int(at)] for at in self._random.integers(0, len(self._keys), DRAWN)}
        keys = list(dict.fromkeys([*oldest, *sorted(drawn)]))
        described = [self._describe(key, self._chunks[key]) for key in keys]
        scores = self._guard.call(self._scorer.score, described, check=lambda answer: self._checked(answer, len(keys)))
        if scores is None:
            return oldest[:1]
        order = sorted(range(len(keys)), key=scores.__getitem__)
        return [keys[at] for at in order[: max(1, min(SERVED, len(keys) // 8))]]

    def _describe(self, key: bytes, chunk: _Chunk) -> Any:
        image, index = (chunk.place >> _INDEX_BITS, chunk.place & ((1 << _INDEX_BITS) - 1)) if chunk.place >= 0 else (-1, -1)
        return self._features(
            key,
            chunk.size,
            chunk.accesses,
            self._now - chunk.last,
            self._now - chunk.came,
            chunk.accesses == 0,
            image,
            index,
            self._pattern_of(image) if image >= 0 else "idle",
        )

    def _teach(self, key: bytes, chunk: _Chunk, *, reused: bool) -> None:
        if self._learn is not None and not self._guard.disabled:
            self._guard.call(self._learn, self._describe(key, chunk), reused, check=lambda _: None)

    def figures(self) -> ModelFigures:
        """How the scorer does, for `stats`."""
        return self._guard.figures()

    def __len__(self) -> int:
        return len(self._chunks)

    def __contains__(self, key: object) -> bool:
        return key in self._chunks
