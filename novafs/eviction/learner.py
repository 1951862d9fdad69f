"""The learned model: how many accesses until a chunk's next, from examples of what became of chunks like it.

Examples are drawn from what the tier holds, at all times alike, and each waits for its chunk's next access, whether the tier still
holds the chunk by then or not. After the horizon (as long as a chunk stays that nobody asks for, or half of the time that was watched
if that is less) no answer is an answer: "not in time". The target is minus the logarithm of the distance, so that to evict whom the
model values least is Belady's rule with guessed distances (Z. Song and others, "LRB", NSDI 2020). Distances were better than the chance
of an access within the horizon: they keep apart what is merely near and what is next.

The last `EXAMPLES` examples make a forest (`novafs.eviction.trees`), anew when a tenth of them is new. What the forest said of an
example when it was drawn is compared with what became of it: that is the accuracy and the calibration that are shown.

`step` does a few milliseconds of it. All else is cheap.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from novafs.eviction.features import FEATURES, Book, Slots
from novafs.eviction.trees import RATE, Forest, Training

EXAMPLES: Final = 10_000
GROUP: Final = 32
"""Examples drawn at once."""
GROUPS_MAX: Final = 16
SHARE_MAX: Final = 0.4
"""Examples for each access at most."""
USABLE_MIN: Final = 300
FRESH_SHARE: Final = 0.1
STEPS: Final = 20
"""Of the map from the forest's value to a chance."""
CALIBRATION: Final = 10
_WAITING: Final = -1
_VOID: Final = -2


class Learner:
    """Learns from one book."""

    def __init__(self, book: Book, random: np.random.Generator) -> None:
        self.forest: Forest | None = None
        self.trainings = 0
        self.predictions = 0
        self.judged = 0
        self.right = 0
        self.rate = RATE
        """Of the trees; 0: none are grown."""
        self.lifetime = 0.0
        """Accesses that a chunk stays which nobody asks for; 0 until something had to leave."""
        self._calibration = np.zeros((CALIBRATION, 3))
        self._book = book
        self._random = random
        self._rows = np.zeros((EXAMPLES, FEATURES), dtype=np.uint8)
        self._time = np.zeros(EXAMPLES, dtype=np.int64)
        self._slot = np.full(EXAMPLES, -1, dtype=np.int64)
        self._answer = np.full(EXAMPLES, _VOID, dtype=np.int64)
        self._chance = np.full(EXAMPLES, np.nan)
        self._count = 0
        self._began = 0
        self._draw_at = 0
        self._trained_at = 0
        self._training: Training | None = None
        self._training_reused: npt.NDArray[np.bool_] = np.zeros(0, dtype=np.bool_)
        self._map_values = np.zeros(0)
        self._map_chances = np.zeros(0)

    # --- examples --------------------------------------------------------------------------------------------

    @property
    def horizon(self) -> float:
        """Accesses within which a next access counts."""
        watched = 0.5 * (self._book.now - self._began)
        return max(1.0, min(self.lifetime or watched, watched))

    def draw(self) -> None:
        """Take a group of examples if it is time for one. Call it after accesses, as often as convenient."""
        book = self._book
        if book.now < self._draw_at or len(book.held) < 4:
            return
        if not self._count:
            self._began = book.now
        share = min(SHARE_MAX, 0.5 * EXAMPLES / max(1.0, self.lifetime or 8 * book.scale))
        interval = max(1, int(GROUP / share))
        # Accesses come in batches: as many groups as were due in this one.
        groups = min(GROUPS_MAX, 1 + (book.now - self._draw_at) // interval) if self._draw_at else 1
        self._draw_at = book.now + interval
        slots = np.unique(book.draw(self._random, GROUP * groups))
        slots = slots[book.pending[slots] < 0]
        rows = book.rows(slots)
        at = np.arange(self._count, self._count + len(slots)) % EXAMPLES
        self._void(at[self._answer[at] == _WAITING])
        self._count += len(slots)
        self._rows[at] = rows
        self._time[at] = book.now
        self._slot[at] = slots
        self._answer[at] = _WAITING
        self._chance[at] = np.nan
        book.pending[slots] = at
        if self.forest is not None:
            self._chance[at] = self._chances(self.forest.predict(rows))
            self.predictions += len(slots)

    def _void(self, examples: Slots) -> None:
        slots = self._slot[examples]
        mine = self._book.pending[slots] == examples
        self._book.pending[slots[mine]] = -1
        self._answer[examples] = _VOID

    def answered(self, example: int, at: int) -> None:
        """The chunk of `example` was accessed at that time."""
        self._answer[example] = at - self._time[example]

    def answered_many(self, examples: Slots, at: Slots) -> None:
        """Those chunks were accessed at those times."""
        self._answer[examples] = at - self._time[examples]

    def lose_sight(self) -> None:
        """Accesses pass that nobody tells of: what waits for one is no example any more."""
        self._void(np.flatnonzero(self._answer == _WAITING))

    # --- learning --------------------------------------------------------------------------------------------

    def step(self) -> bool:
        """A few milliseconds of learning. Whether there is more to do now."""
        book = self._book
        if book.dropped:
            self._answer[np.array(book.dropped, dtype=np.int64)] = _VOID
            book.dropped.clear()
        if not self.rate:
            return False
        if self._training is not None:
            self._training.step()
            if self._training.done:
                self._finish(self._training)
            return self._training is not None
        filled = min(self._count, EXAMPLES)
        if filled < USABLE_MIN or self._count - self._trained_at < FRESH_SHARE * filled or len(book.held) < 0.3 * book.scale:
            return False
        self._begin(filled)
        return self._training is not None

    def _begin(self, filled: int) -> None:
        horizon = self.horizon
        answer = self._answer[:filled]
        ripe = (self._book.now - self._time[:filled] >= horizon) & (answer != _VOID)
        self._judge(np.flatnonzero(ripe), horizon)
        # What was asked for again is known at once, what was not only after the horizon. Waiting for both alike would be fair and a
        # horizon late: the bias costs less.
        usable = np.flatnonzero(ripe | (answer >= 0))
        if len(usable) < USABLE_MIN:
            # Asked again when a few more are there.
            self._trained_at = self._count - int((FRESH_SHARE - 0.03) * filled)
            return
        self._trained_at = self._count
        answer = answer[usable]
        reused = (answer >= 0) & (answer < horizon)
        targets = -np.where(reused, np.log2(1.0 + np.maximum(answer, 0)), np.log2(1.0 + horizon) + 1.0)
        self._training = Training(self._rows[usable], targets, rate=self.rate)
        self._training_reused = reused

    def _finish(self, training: Training) -> None:
        self.forest = training.forest()
        values = training.answers
        order = np.argsort(values, kind="stable")
        parts = np.array_split(order, min(STEPS, len(order)))
        chances = np.array([float(self._training_reused[part].mean()) for part in parts])
        self._map_values = np.array([float(values[part].mean()) for part in parts])
        self._map_chances = np.maximum.accumulate(chances)
        self._training = None
        self._training_reused = np.zeros(0, dtype=np.bool_)
        self.trainings += 1

    def _judge(self, examples: Slots, horizon: float) -> None:
        """Compare what was said of these with what became of them, once."""
        examples = examples[~np.isnan(self._chance[examples])]
        if not len(examples):
            return
        chance = self._chance[examples]
        answer = self._answer[examples]
        reused = (answer >= 0) & (answer < horizon)
        self.judged += len(examples)
        self.right += int(((chance > 0.5) == reused).sum())
        step = np.minimum((chance * CALIBRATION).astype(np.int64), CALIBRATION - 1)
        for column, weights in enumerate((chance, reused.astype(np.float64), np.ones(len(step)))):
            self._calibration[:, column] += np.bincount(step, weights, CALIBRATION)
        self._chance[examples] = np.nan

    # --- asking ----------------------------------------------------------------------------------------------

    def _chances(self, values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        return np.interp(values, self._map_values, self._map_chances)

    def chances(self, slots: Slots) -> npt.NDArray[np.float64] | None:
        """Of each, that it is accessed within the horizon; None before the first forest."""
        if self.forest is None:
            return None
        return self._chances(self.forest.predict(self._book.rows(slots)))

    def worst_first(self, slots: Slots) -> Slots:
        """The slots, each once, whom to evict first first: by guessed distance times bytes. There is a forest."""
        assert self.forest is not None
        slots = np.unique(slots)
        value = self.forest.predict(self._book.rows(slots)) - np.log2(self._book.sizes_of(slots) + 1.0)
        self.predictions += len(slots)
        return slots[np.argsort(value, kind="stable")]

    def calibration(self) -> tuple[tuple[float, float, int], ...]:
        """See `Quality`."""
        return tuple((float(said / count), float(was / count), int(count)) for said, was, count in self._calibration if count)

    # --- saved and loaded ------------------------------------------------------------------------------------

    def restore(self, forest: Forest, values: npt.NDArray[np.float64], chances: npt.NDArray[np.float64]) -> None:
        """Begin with a forest that was learned in an earlier life."""
        self.forest = forest
        self._map_values = values
        self._map_chances = chances

    @property
    def chance_map(self) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """Values of the forest, rising, and the chance at each."""
        return self._map_values, self._map_chances

    @property
    def memory_bytes(self) -> int:
        """Of the examples."""
        return EXAMPLES * (FEATURES + 32)
