"""The first specification's score, as it asked for it; kept as a baseline, and in charge of nothing (docs/eviction.md has the figures).

    score = sigmoid(sum of w[i] * f[i] + b)        who scores lowest among the candidates leaves

| i | feature | unit here |
|---|---|---|
| 0 | seconds since the last access | hours |
| 1 | access count | hundreds |
| 2 | size | 64 KiB |
| 3 | access pattern | 1 where the chunk before it was the last one read, 0 elsewhere |
| 4 | hour of the day | days, UTC |
| 5 | tier | thirds |
| 6 | compression ratio | as it is |
| 7 | reference count | tens |

The specification names no units; these keep each feature about 1, without which gradient descent does not stand at all. It is learned
online by gradient descent on the cross entropy, as it says no more than that: each access is an example of 1 with the features of just
before it, each eviction one of 0.
"""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import ClassVar, Final

import numpy as np
import numpy.typing as npt

from novafs.eviction.base import EvictionPolicy

FEATURES: Final = 8
RATE: Final = 0.05
CANDIDATES: Final = 64
_UNITS: Final = np.array([3600.0, 100.0, 65536.0, 1.0, 24.0, 3.0, 1.0, 10.0])
LAST, COUNT, SIZE, SEQUENTIAL, HOUR, TIER, RATIO, REFERENCES = range(FEATURES)


class Linear8Policy(EvictionPolicy):
    """The eight-feature score. Starts as the least accessed longest ago, and learns."""

    name: ClassVar[str] = "linear8"

    def __init__(self, *, tier: int = 1, seed: int = 1) -> None:
        """tier: 1 to 3. seed: of the draw of candidates."""
        self.weights: npt.NDArray[np.float64] = np.array([-0.1, 0.1, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0])
        self.bias = 0.0
        self._tier = tier
        self._random = np.random.default_rng(seed)
        self._seconds: Callable[[], float] = time.time
        self._slots: OrderedDict[bytes, int] = OrderedDict()
        self._keys: list[bytes] = []
        self._table = np.zeros((FEATURES, 1024))
        """By feature and slot: the last access in seconds, the rest in the features' own units. Slots are without gaps."""
        self._before = -2
        self._rate = RATE

    def set_learning_rate(self, factor: float) -> None:
        self._rate = RATE * factor

    def set_clock(self, seconds: Callable[[], float]) -> None:
        self._seconds = seconds

    def annotate(self, key: bytes, *, ratio: float, references: int) -> None:
        """What the tier knows of `key`: its compression ratio and how many places refer to it; 1 and 1 until it says so."""
        slot = self._slots.get(key)
        if slot is not None:
            self._table[RATIO, slot] = ratio
            self._table[REFERENCES, slot] = references

    def insert(self, key: bytes, size: int, *, prefetched: bool = False, place: int = -1) -> None:
        slot = len(self._keys)
        if slot == self._table.shape[1]:
            self._table = np.concatenate([self._table, np.zeros_like(self._table)], axis=1)
        self._slots[key] = slot
        self._keys.append(key)
        sequential = place >= 0 and place == self._before + 1
        self._before = place
        self._table[:, slot] = (self._seconds(), 0.0 if prefetched else 1.0, size, sequential, 0.0, self._tier, 1.0, 1.0)

    def resize(self, key: bytes, size: int) -> None:
        slot = self._slots.get(key)
        if slot is not None:
            self._table[SIZE, slot] = size

    def touch(self, key: bytes) -> None:
        slot = self._slots.get(key)
        if slot is None:
            return
        self._learn(slot, 1.0)
        self._table[LAST, slot] = self._seconds()
        self._table[COUNT, slot] += 1.0

    def remove(self, key: bytes) -> None:
        slot = self._slots.pop(key, None)
        if slot is None:
            return
        last = self._keys.pop()
        if last != key:
            self._keys[slot] = last
            self._slots[last] = slot
            self._table[:, slot] = self._table[:, len(self._keys)]

    def victims(self, bytes_needed: int) -> list[bytes]:
        gone = []
        while bytes_needed > 0 and self._keys:
            drawn = self._random.integers(0, len(self._keys), CANDIDATES)
            slot = int(drawn[int(self.scores(drawn).argmin())])
            key = self._keys[slot]
            bytes_needed -= int(self._table[SIZE, slot])
            self._learn(slot, 0.0)
            self.remove(key)
            gone.append(key)
        return gone

    def scores(self, slots: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        """The score of each slot, 0 to 1."""
        return np.asarray(1.0 / (1.0 + np.exp(-np.clip(self.weights @ self._features(slots) + self.bias, -60.0, 60.0))))

    def _features(self, slots: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        now = self._seconds()
        values = self._table[:, slots]
        values[LAST] = np.maximum(0.0, now - values[LAST])
        values[HOUR] = now / 3600.0 % 24.0
        return np.asarray(values / _UNITS[:, None])

    def _learn(self, slot: int, outcome: float) -> None:
        features = self._features(np.array([slot]))[:, 0]
        score = 1.0 / (1.0 + math.exp(-max(-60.0, min(60.0, float(self.weights @ features) + self.bias))))
        step = self._rate * (outcome - score)
        self.weights = self.weights + step * features
        self.bias += step

    def __len__(self) -> int:
        return len(self._keys)

    def __contains__(self, key: object) -> bool:
        return key in self._slots
