"""Holds what was promised: accuracy at its target, traffic under its cap, whatever the gate believes.

The gate's probabilities are right on average at best, and wrong where the workload has just changed. The governor turns them
into a threshold by keeping account of what happened:

- **Accuracy.** Each prefetch that is used earns `1 - target`, each that is wasted, or overdue, costs `target`. The balance
  over the recent past moves the threshold: a debt quickly up, a credit slowly down. The mean over many prefetches is what
  the target speaks of, so the threshold lies a little below it (`BELOW_TARGET`). A tight loop was tried: it swings, and
  costs a fifth of the coverage at the same accuracy.
- **Slow start.** Only so many prefetches may be in the balance (neither used nor overdue) as a share of what was used so far. A new
  image, or a random one, gets a handful of chances, not a window.
- **Traffic.** `prefetch_traffic_max` times the demand traffic that the shadow cache says there would have been without prefetch.
- **Worth.** Nothing that wins less than its place would (`displaced`). The place is lost only where the prefetch is not used, so its
  odds are compared with that, not its chance.
- **Sources** that stay below the target get a threshold of their own, higher the longer they do.

- **Claims.** Without a target nothing else would notice that the gate promises more than it keeps, as it does where reads are random: the
  mean by which it does raises the threshold.

`aggression` 0 holds the accuracy target. Up to 1 the target falls to zero, and traffic, worth and claims alone decide.
One governor per image.
"""

from __future__ import annotations

import math
from typing import Final

from novafs.prefetch.base import Origin
from novafs.prefetch.gate import logistic, logit

BELOW_TARGET: Final = 0.22
"""How far the threshold lies below the target while the account is even. The mean is far above the least that passes."""
ABOVE_TARGET: Final = 0.01
"""The account aims so much higher, so that its swings stay above the target."""
CREDIT_STEP: Final = 400.0
"""Prefetches' worth of credit that lower the threshold by one unit of log odds, and of debt that raise it."""
DEBT_STEP: Final = 25.0
THRESHOLD_MIN: Final = -1.5
THRESHOLD_MAX: Final = 2.9
EAGER_MIN: Final = -1.75
"""Less than one in seven is no prediction, whatever the traffic that is left."""
DISPLACED_MARGIN: Final = 1.5
"""How much likelier than what it displaces a chunk has to be: both are estimates, and a fetch costs something, too."""
FIRST_DEBT: Final = 4.0
FIRST_CHANCES: Final = 6.0
CHANCES_PER_USE: Final = 0.35
EAGER_CHANCES: Final = 16.0
EAGER_PER_USE: Final = 0.7
CLAIM_RATE: Final = 0.01
CLAIM_FREE: Final = 0.04
CLAIM_STEP: Final = 8.0
"""By how much too high the chances of prefetches may have been, as a mean over about a hundred, and what each unit above that adds to
the threshold without an accuracy target. A target takes care of it by itself."""
FADE: Final = 0.9998
BIAS_STEP: Final = 0.01
BIAS_FADE: Final = 0.999
BIAS_MAX: Final = 2.0
_ORIGINS: Final = len(Origin)


class Governor:
    """The account of one image. `threshold` is in log odds; a candidate is fetched if its own are at least that, plus its
    source's `bias`."""

    __slots__ = (
        "_aggression",
        "_base",
        "_claimed",
        "_credit",
        "_expected",
        "_pending",
        "_target",
        "_traffic_max",
        "bias",
        "fetched",
        "threshold",
        "trusted",
        "used",
        "worthy",
    )

    def __init__(self, *, accuracy_target: float, aggression: float, traffic_max: float) -> None:
        self.retune(accuracy_target=accuracy_target, aggression=aggression, traffic_max=traffic_max)
        self._credit = -FIRST_DEBT
        self._pending = 0
        self._expected = 0.0
        self._claimed = 0.0
        """Mean of chance minus outcome."""
        self.fetched = 0
        self.used = 0
        self.threshold = 0.0
        self.trusted = 0.0
        """The threshold as accuracy alone would have it: for a profile, whose traffic comes before the misses that it avoids."""
        self.worthy = 0.0
        """The threshold as accuracy and what is displaced would have it: for what costs no traffic."""
        self.bias = [0.0] * _ORIGINS
        """Log odds by source, added to the threshold."""
        self.update(0.0, 0.0, 0.0)

    def retune(self, *, accuracy_target: float, aggression: float, traffic_max: float) -> None:
        """Other targets; the next `update` goes by them, with the account as it stands."""
        self._aggression = aggression
        self._target = min(0.995, accuracy_target + ABOVE_TARGET) * (1.0 - aggression)
        self._traffic_max = traffic_max
        self._base = logit(max(0.02, self._target - BELOW_TARGET)) if aggression < 1.0 else EAGER_MIN

    def update(self, base_misses: float, misses: float, displaced: float) -> None:
        """Set the threshold.

        base_misses: what there would have been without prefetch; misses: what there were; displaced: the probability that the chunk
        which a prefetch pushes out would have been used.
        """
        credit = self._credit
        if self._aggression >= 1.0:
            threshold = EAGER_MIN + CLAIM_STEP * max(0.0, self._claimed - CLAIM_FREE)
        else:
            lowest = THRESHOLD_MIN + self._aggression * (EAGER_MIN - THRESHOLD_MIN)
            threshold = max(lowest, min(THRESHOLD_MAX, self._base - credit / (CREDIT_STEP if credit > 0.0 else DEBT_STEP)))
        self.trusted = threshold
        room = self._traffic_max * base_misses - misses - self.fetched + self._expected
        # At no room the threshold is 2.5, at a tenth of the demand traffic (or 30 chunks, if more) -2.
        threshold = max(threshold, min(3.5, 2.5 - 4.5 * room / (0.1 * base_misses + 30.0)))
        # Odds, not a probability: only a prefetch that is not used keeps its place for as long as `displaced` supposes.
        worth = max(THRESHOLD_MIN, math.log(DISPLACED_MARGIN * displaced)) if displaced > 0.0 else THRESHOLD_MIN
        self.worthy = max(self.trusted, worth)
        self.threshold = max(threshold, worth) if displaced > 0.0 else threshold

    def chances(self) -> int:
        """How many prefetches may be made now."""
        first = FIRST_CHANCES + self._aggression * (EAGER_CHANCES - FIRST_CHANCES)
        per_use = CHANCES_PER_USE + self._aggression * (EAGER_PER_USE - CHANCES_PER_USE)
        return int(first + per_use * self.used - self._pending)

    def on_fetch(self, chance: float) -> None:
        """A prefetch was decided."""
        self.fetched += 1
        self._pending += 1
        self._expected += chance
        if chance < self._target:
            self._credit += chance - self._target

    def on_overdue(self, chance: float) -> None:
        """It has not been used within the gate's patience: it counts as wasted until it is."""
        self._pending -= 1
        self._expected -= chance
        self._credit -= min(chance, self._target)
        self._claimed += CLAIM_RATE * (chance - self._claimed)

    def on_used(self, chance: float, origin: Origin, *, overdue: bool) -> None:
        """It was used."""
        self.used += 1
        if overdue:
            self._credit += 1.0
            self._claimed -= CLAIM_RATE
        else:
            self._claimed += CLAIM_RATE * (chance - 1.0 - self._claimed)
            self._pending -= 1
            self._expected -= chance
            self._credit += 1.0 - min(chance, self._target)
        self._credit *= FADE
        self._shift(origin, self._target - 1.0)

    def on_wasted(self, chance: float, origin: Origin, *, overdue: bool) -> None:
        """It was evicted, or overwritten, without having been used."""
        if not overdue:
            self.on_overdue(chance)
        self._credit *= FADE
        self._shift(origin, self._target)

    def on_dropped(self, chance: float, *, overdue: bool) -> None:
        """It was not fetched after all, or failed: as if it had never been decided."""
        self.fetched -= 1
        if overdue:
            self._credit += self._target
            return
        self._pending -= 1
        self._expected -= chance
        if chance < self._target:
            self._credit += self._target - chance

    def _shift(self, origin: Origin, surplus: float) -> None:
        moved = self.bias[origin] * BIAS_FADE + BIAS_STEP * surplus
        self.bias[origin] = max(0.0, min(BIAS_MAX, moved))

    def describe(self) -> dict[str, float]:
        """The account in figures, for `stats`."""
        return {"threshold": round(logistic(self.threshold), 4), "balance": round(self._credit, 2), "pending": self._pending}
