"""Gradient-boosted trees over small whole-number features, in numpy: grown a level at a time, asked for many rows at once.

The trees are symmetric (each level asks one question of every row, as in L. Prokhorenkova and others, "CatBoost", NeurIPS 2018), so a
forest is three arrays, and the leaf of every row in every tree is one comparison and one product of matrices. The target is a number,
the loss its squared error; features are `BINS` steps, chosen by whoever makes them, so that a level's question is found in one
histogram (J. Friedman, Annals of Statistics 2001; G. Ke and others, "LightGBM", NeurIPS 2017).

Each tree is grown on a random half of the rows, which is quicker and generalises better (J. Friedman, "Stochastic gradient boosting",
2002). `Training.step` grows one level and takes a few milliseconds with the rows used here. Nothing here reads a clock, and what is
drawn is drawn from a generator with a fixed seed: the same rows give the same forest.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

Bins = npt.NDArray[np.uint8]
"""rows × features, each 0 to BINS - 1."""
Numbers = npt.NDArray[np.float64]

BINS: Final = 64
TREES: Final = 40
DEPTH: Final = 4
RATE: Final = 0.15
DEPTH_MAX: Final = 8
RIDGE: Final = 5.0
DRAW: Final = 0.5
"""Share of the rows that a tree is grown on."""
_SEED: Final = 20260822
_COUNT: Final = float(1 << 32)
_HALF: Final = float(1 << 30)
"""Sums of quantised residuals stay below half of `_COUNT`, so both can be told apart; up to 2**20 rows all is exact in 53 bits."""


class Forest:
    """A trained model. Never changes."""

    __slots__ = ("base", "features", "leaves", "thresholds")

    def __init__(self, base: float, features: npt.NDArray[np.int64], thresholds: Bins, leaves: Numbers) -> None:
        """features, thresholds: trees × depth; leaves: trees × 2**depth. A row goes right where its feature is above the threshold."""
        self.base = base
        self.features = features
        self.thresholds = thresholds
        self.leaves = leaves

    @property
    def trees(self) -> int:
        """How many trees it has."""
        return len(self.features)

    def predict(self, rows: Bins) -> Numbers:
        """A number for each row."""
        trees, depth = self.features.shape
        right = np.ascontiguousarray(rows.T)[self.features.ravel()] > self.thresholds.reshape(-1, 1)
        answers = right.reshape(trees, depth, len(rows)).view(np.uint8)
        leaf = answers[:, 0].astype(np.intp)
        for level in range(1, depth):
            leaf += leaf
            leaf += answers[:, level]
        leaf += (np.arange(trees, dtype=np.intp) << depth)[:, None]
        return np.asarray(self.base + self.leaves.ravel().take(leaf).sum(axis=0))


class Training:
    """A forest that is being grown."""

    def __init__(self, rows: Bins, targets: Numbers, *, trees: int = TREES, depth: int = DEPTH, rate: float = RATE) -> None:
        """rows: at least one; targets: finite, one for each. rate: how much of what is left each tree takes."""
        self._rate = rate
        self._rows = np.ascontiguousarray(rows)
        self._targets = targets
        self._width = rows.shape[1]
        self._depth = depth
        self._base = float(targets.mean())
        self._answer = np.full(len(rows), self._base)
        self._features = np.zeros((trees, depth), dtype=np.int64)
        self._thresholds = np.zeros((trees, depth), dtype=np.uint8)
        self._leaves = np.zeros((trees, 1 << depth))
        self._tree = 0
        self._level = 0
        self._random = np.random.default_rng(_SEED)
        self._offsets = np.arange(self._width, dtype=np.int64) * BINS
        self._draw()

    def _draw(self) -> None:
        drawn = self._random.random(len(self._rows)) < DRAW if len(self._rows) > 64 else np.ones(len(self._rows), dtype=np.bool_)
        self._drawn = self._rows[drawn]
        self._cells = self._drawn + self._offsets
        self._residual = (self._targets - self._answer)[drawn]
        # One histogram holds both, count in the high bits and residual in the low: half the work, and no bit of a count is lost.
        largest = float(np.abs(self._residual).max(initial=0.0)) * max(1, len(self._residual))
        self._unit = largest / _HALF if largest > 0.0 else 1.0
        self._weights = np.repeat(_COUNT + np.rint(self._residual / self._unit), self._width)
        self._leaf = np.zeros(len(self._drawn), dtype=np.int64)

    @property
    def done(self) -> bool:
        """Whether every tree is grown."""
        return self._tree == len(self._features)

    @property
    def answers(self) -> Numbers:
        """What the trees that are grown say of each row."""
        return self._answer

    def step(self) -> None:
        """Grow one level of one tree; the last of a tree fills its leaves."""
        feature, threshold = self._best_question()
        self._features[self._tree, self._level] = feature
        self._thresholds[self._tree, self._level] = threshold
        self._leaf = 2 * self._leaf + (self._drawn[:, feature] > threshold)
        self._level += 1
        if self._level == self._depth:
            size = 1 << self._depth
            total = np.bincount(self._leaf, self._residual, size)
            count = np.bincount(self._leaf, minlength=size)
            values = self._rate * total / (count + RIDGE)
            self._leaves[self._tree] = values
            right = self._rows[:, self._features[self._tree]] > self._thresholds[self._tree]
            self._answer += values[right @ (1 << np.arange(self._depth - 1, -1, -1))]
            self._level = 0
            self._tree += 1
            if not self.done:
                self._draw()

    def _best_question(self) -> tuple[int, int]:
        leaves = 1 << self._level
        cells = leaves * self._width * BINS
        where = (self._cells + (self._leaf * (self._width * BINS))[:, None]).ravel()
        both = np.bincount(where, self._weights, cells).reshape(leaves, self._width, BINS).cumsum(axis=2)
        count = np.rint(both / _COUNT)
        total = (both - count * _COUNT) * self._unit
        others = total[:, :, -1:] - total
        other_count = count[:, :, -1:] - count
        gain = (total**2 / (count + RIDGE) + others**2 / (other_count + RIDGE)).sum(axis=0)
        feature, threshold = divmod(int(gain.argmax()), BINS)
        return feature, threshold

    def forest(self) -> Forest:
        """What was grown so far; the trees that are not complete are left out."""
        grown = self._tree
        return Forest(self._base, self._features[:grown].copy(), self._thresholds[:grown].copy(), self._leaves[:grown].copy())
