"""One online model for all candidates: the probability that a chunk, fetched now, is used before it is evicted.

Two layers. The first is logistic regression over one-hot crosses of what is known about a candidate (evidence of each source,
ages and counts of the chunk, its neighbours and the chunk that led to it), hashed into one table of weights and learned by
AdaGrad (J. Duchi et al., JMLR 2011; hashing: K. Weinberger et al., ICML 2009). The second maps the first's score to what really became of
candidates with that score, in bins, apart for each combination of sources that named them: as a logistic model is trained on few examples
its outer scores are worth little, and different sources are wrong in different ways.

What examples are decides whether the probability means anything:

- One example per chunk and life: of all moments at which it was a candidate the one with the highest score, since that is the
  moment at which it would have been fetched. Learning from every moment counts chunks in demand many times over.
- A chunk that was not used within `patience` (where nine of ten of those that are used have been) counts as unused
  *at once*, and is put right if it is used later. Waiting for its eviction instead, the model would know its successes thousands of
  accesses before its failures: in a cold cache everything looks useful.

Both were measured; docs/prefetch.md has the figures. The alternative, gradient-boosted trees, would need batches and a cold start.
"""

from __future__ import annotations

import math
from typing import Final

import msgspec
import numpy as np

from novafs.errors import ObjectCorruptError
from novafs.prefetch.blob import seal_model, unseal_model

KIND: Final = b"GATE"
VERSION: Final = 1
"""Changes with every change of the features: weights of other features are noise."""
WEIGHT_BITS: Final = 17
BINS: Final = 41
BIN_MIDDLE: Final = 20
BINS_PER_UNIT: Final = 2
CLASSES: Final = 32
RATE: Final = 0.25
BIN_MEMORY: Final = 3000.0
"""Examples that a bin remembers: older ones fade."""
BIN_PRIOR: Final = 5.0
MASK: Final = (1 << WEIGHT_BITS) - 1
PHI: Final = 0x9E3779B1
SHIFT: Final = 32 - WEIGHT_BITS
_ODDS_MIN: Final = 1e-4
_SCORE_MAX: Final = 30.0

CROSSES: Final = 8
Features = tuple[int, int, int, int, int, int, int, int]
"""Indexes into the table of weights, one for each cross."""


def logistic(score: float) -> float:
    """The probability with these log odds."""
    if score < -_SCORE_MAX:
        return 0.0
    return 1.0 / (1.0 + math.exp(-score))


def logit(probability: float) -> float:
    """The log odds of a probability, bounded where it is 0 or 1."""
    return math.log((probability + _ODDS_MIN) / (1.0 - probability + _ODDS_MIN))


def hashed(a: int, b: int, c: int, d: int, e: int, f: int, g: int, h: int) -> Features:
    """Where the weights of these crosses stand: Fibonacci hashing of the low 32 bits, each cross with a salt of its own.

    The judge has this written out in place, for speed; a test compares the two.
    """
    return (
        (a * PHI + 0x243F6A88 >> SHIFT) & MASK,
        (b * PHI + 0x85A308D3 >> SHIFT) & MASK,
        (c * PHI + 0x13198A2E >> SHIFT) & MASK,
        (d * PHI + 0x03707344 >> SHIFT) & MASK,
        (e * PHI + 0xA4093822 >> SHIFT) & MASK,
        (f * PHI + 0x299F31D0 >> SHIFT) & MASK,
        (g * PHI + 0x082EFA98 >> SHIFT) & MASK,
        (h * PHI + 0xEC4E6C89 >> SHIFT) & MASK,
    )


class GateRecord(msgspec.Struct, array_like=True):
    """What a sealed gate holds: float32 columns."""

    weights: bytes
    squares: bytes
    used: bytes
    seen: bytes


class Gate:
    """The model. Scores are log odds before calibration."""

    __slots__ = ("_odds", "_rate", "_seen", "_squares", "_used", "_weights", "examples", "log_loss", "right")

    def __init__(self) -> None:
        self._rate = RATE
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self._weights = [0.0] * (MASK + 1)
        self._squares = [1.0] * (MASK + 1)
        prior = [logistic((number - BIN_MIDDLE) / BINS_PER_UNIT - 1.0) for number in range(BINS)]
        self._used = prior * CLASSES
        self._seen = [BIN_PRIOR] * (BINS * CLASSES)
        self._odds = [logit(used) for used in self._used]
        self.examples = 0
        self.log_loss = 0.0
        """Mean cost of the calibrated predictions, in nats, over about the last thousand examples."""
        self.right = 0
        """Examples of which the calibrated prediction was on the right side of a half."""

    def set_learning_rate(self, factor: float) -> None:
        """Learn so many times as fast as usual; 0: not at all."""
        self._rate = RATE * factor

    def score(self, features: Features) -> float:
        """Log odds by the first layer."""
        weights = self._weights
        a, b, c, d, e, f, g, h = features
        return weights[a] + weights[b] + weights[c] + weights[d] + weights[e] + weights[f] + weights[g] + weights[h]

    def odds(self, score: float, kind: int) -> float:
        """Calibrated log odds of a score, for a candidate whose sources are the class `kind`."""
        at = score * BINS_PER_UNIT + BIN_MIDDLE
        first = kind * BINS
        if at <= 0.0:
            return self._odds[first]
        if at >= BINS - 1:
            return self._odds[first + BINS - 1]
        low = int(at)
        odds = self._odds
        below = odds[first + low]
        return below + (odds[first + low + 1] - below) * (at - low)

    def learn(self, features: Features, score: float, kind: int, used: float) -> None:
        """What became of a candidate that had this score: 1.0 used, 0.0 not."""
        if not self._rate:
            return
        weights, squares = self._weights, self._squares
        now = self.score(features)
        gradient = (1.0 / (1.0 + math.exp(-now)) if now > -_SCORE_MAX else 0.0) - used
        square = gradient * gradient
        step = self._rate * gradient
        for at in features:
            total = squares[at] + square
            squares[at] = total
            weights[at] -= step / math.sqrt(total)
        number = int(score * BINS_PER_UNIT + BIN_MIDDLE + 0.5)
        number = kind * BINS + (0 if number < 0 else BINS - 1 if number >= BINS else number)
        seen = self._seen[number] + 1.0
        if seen > BIN_MEMORY:
            seen = BIN_MEMORY
        self._seen[number] = seen
        share = self._used[number]
        self.log_loss += 0.001 * (-math.log((share if used else 1.0 - share) + _ODDS_MIN) - self.log_loss)
        self.right += (share > 0.5) == (used > 0.5)
        share += (used - share) / seen
        self._used[number] = share
        self._odds[number] = math.log((share + _ODDS_MIN) / (1.0 - share + _ODDS_MIN))
        self.examples += 1

    def merge(self, other: Gate) -> None:
        """Take over what another gate has learned: weights averaged by how much each was moved, bins by their examples.

        Merging with oneself changes nothing, so that what goes round through the store does not gain weight on the way.
        """
        mine, theirs = (np.array((gate._weights, gate._squares)) for gate in (self, other))
        confidence = np.array((mine[1], theirs[1])) - 1.0
        total = confidence.sum(axis=0)
        joined = np.array((mine[0], theirs[0])) * confidence
        self._weights = np.divide(joined.sum(axis=0), total, out=mine[0].copy(), where=total > 0.0).tolist()
        self._squares = np.maximum(mine[1], theirs[1]).tolist()
        used = np.array((self._used, other._used))
        seen = np.array((self._seen, other._seen))
        # The prior's examples are the same in both.
        own = np.maximum(seen - BIN_PRIOR, 0.0)
        total = own.sum(axis=0)
        self._used = np.divide((used * own).sum(axis=0), total, out=used[0].copy(), where=total > 0.0).tolist()
        self._seen = seen.max(axis=0).tolist()
        self._odds = [logit(share) for share in self._used]

    def to_bytes(self) -> bytes:
        """The model as a sealed record. May run in another thread while the gate goes on learning."""
        columns = (np.array(column, dtype="<f4").tobytes() for column in (self._weights, self._squares, self._used, self._seen))
        return seal_model(KIND, VERSION, GateRecord(*columns))

    @classmethod
    def from_bytes(cls, data: bytes, name: str) -> Gate:
        """The model in an object called `name`. Raises ObjectCorruptError where it is damaged, holds what is no number, or is of
        another version; NewerFormatError for a later one.
        """
        record = unseal_model(KIND, VERSION, data, GateRecord, name)
        gate = cls()
        sizes = (MASK + 1, MASK + 1, BINS * CLASSES, BINS * CLASSES)
        columns = []
        for raw, size in zip((record.weights, record.squares, record.used, record.seen), sizes, strict=True):
            if len(raw) != size * 4:
                raise ObjectCorruptError(f"{name}: a column of {len(raw)} bytes, expected {size * 4}; the model starts anew")
            column = np.frombuffer(raw, dtype="<f4").astype(np.float64)
            if not np.isfinite(column).all():
                raise ObjectCorruptError(f"{name}: holds values that are no numbers; the model starts anew")
            columns.append(column)
        gate._weights = np.clip(columns[0], -_SCORE_MAX, _SCORE_MAX).tolist()
        gate._squares = np.maximum(columns[1], 1.0).tolist()
        gate._used = np.clip(columns[2], 0.0, 1.0).tolist()
        gate._seen = np.clip(columns[3], 1.0, BIN_MEMORY).tolist()
        gate._odds = [logit(used) for used in gate._used]
        return gate
