"""From candidates to decisions, and from what became of them to the gate: the hot part of prefetch.

The judge asks an image's sources what may come next, leaves out what is there, describes the rest to the gate as eight numbers and keeps
what passes the image's threshold. What does not pass is remembered as an *example*: read after all, it was a chance that was missed; not
read within `patience`, it was rightly turned down. So the gate learns from everything and not only from its own choices.

Always holds: one example for each chunk that is not held, the one with the highest score; an example is answered at most twice
(*unused* when the patience ends, *used* should it be read later); everything remembered here is bounded by the places and by what lives as
long as a cache's content.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Final

from novafs.prefetch.base import INDEX_BITS, Evidence, Origin, Place
from novafs.prefetch.gate import MASK, PHI, SHIFT, Features, Gate
from novafs.prefetch.spatial import AFTER, BEFORE, EVIDENCE, beside
from novafs.prefetch.state import ImageState, Issue

PATIENCE_FIRST: Final = 64.0
PATIENCE_MIN: Final = 16.0
MUTED_TICKS: Final = 64
MUTED_BELOW: Final = 1.5
"""A candidate that falls short by so much in log odds is not judged again for a while, unless another source names it, too.
Those of a stream are: its case grows stronger with every access."""
LSTM_EVIDENCE: Final = 400
"""Evidence of the LSTM is this plus its probability in eighths; it shares a slot with echoes, whose evidence is below."""
QUIET_AFTER: Final = 2048
QUIET_MASK: Final = 3
"""Neighbours that nobody else names are half of all candidates, and on most images none of them ever passes. After so many that did not
they are looked at on every fourth access only, which is enough to notice when that changes."""
SEEN_BYTES: Final = 210
PENDING_BYTES: Final = 460
MUTED_BYTES: Final = 150
WATCHED_BYTES: Final = 110
"""What an entry takes."""
ALL_SOURCES: Final = 15
_UNMUTE_MASK: Final = (1 << 12) - 1
_NEVER: Final = 24
"""Age bucket of a chunk that was never seen: older than any bucket of one that was."""
_UNRELATED: Final = 31

Wanted = tuple[float, Place, Origin, Features, float, int]
"""What passed: calibrated log odds, place, who named it, and what the gate has to be told when it ends."""


SURE: Final = 3.0
"""Log odds (0.95) from which one candidate is as likely as another."""


class Judge:
    """One for an engine. `issued` is the engine's: prefetches that have not ended."""

    __slots__ = (
        "_doubted",
        "_issued",
        "_muted",
        "_pending",
        "_places_max",
        "_seen",
        "_watched",
        "gate",
        "judged",
        "life",
        "lstm_asked",
        "patience",
    )

    def __init__(self, gate: Gate, issued: Mapping[Place, Issue], *, places_max: int, life: float) -> None:
        self.gate = gate
        self.judged = 0
        """Candidates that the gate was asked about."""
        self.lstm_asked = 0
        self.patience = PATIENCE_FIRST
        """Accesses within which nine of ten that are used have been."""
        self.life = life
        """Accesses for which an unused prefetch stays in the cache."""
        self._issued = issued
        self._places_max = places_max
        self._seen: dict[Place, list[int]] = {}
        """Place → tick of its last access, and its number in the image's echo."""
        self._pending: dict[Place, tuple[int, Features, float, int, bool]] = {}
        """Candidates that were turned down: tick, features, score, class, and whether they have been counted as unused."""
        self._muted: dict[Place, int] = {}
        """Place → tick until which it is not judged << 4 | the sources that named it. Emptied now and then."""
        self._watched: deque[tuple[int, Place]] = deque()
        self._doubted: deque[tuple[int, Place]] = deque()

    # --- what goes by -----------------------------------------------------------------------------------------

    def touched(self, place: Place, tick: int, number: int) -> tuple[int, int]:
        """A place was read, as access `number` of its image: the bucket of its age, and its number when it was read before."""
        seen = self._seen.get(place)
        if seen is None:
            if len(self._seen) >= self._places_max:
                self._forget_places(tick)
            self._seen[place] = [tick, number]
            return _NEVER, 0
        age, before = (tick - seen[0]).bit_length(), seen[1]
        seen[0] = tick
        seen[1] = number
        return age, before

    def skimmed(self, place: Place, tick: int) -> None:
        """A place was read, and no more is to be noted of it."""
        seen = self._seen.get(place)
        if seen is not None:
            seen[0] = tick

    def answered(self, place: Place, tick: int) -> None:
        """A place was read that had not been prefetched: if it was a candidate, it was a good one."""
        example = self._pending.pop(place, None)
        if example is None:
            return
        since, features, score, kind, doubted = example
        patience = self.patience * (1.045 if tick - since > self.patience else 0.995)
        self.patience = min(max(patience, PATIENCE_MIN), self.life)
        self.gate.learn(features, score, kind, 1.0)
        if doubted:
            self.gate.learn(features, score, kind, 1.0)

    def used(self, issue: Issue) -> None:
        """A prefetch was asked for."""
        if issue.features is not None:
            self.gate.learn(issue.features, issue.score, issue.kind, 1.0)
            if issue.overdue:
                self.gate.learn(issue.features, issue.score, issue.kind, 1.0)

    def wasted(self, issue: Issue, tick: int) -> None:
        """A prefetch was evicted unasked."""
        if issue.features is not None and not issue.overdue:
            self.gate.learn(issue.features, issue.score, issue.kind, 0.0)
        self.life += 0.02 * (tick - issue.tick - self.life)

    def decided(self, place: Place, tick: int, *, deadline: bool) -> None:
        """A prefetch of it was decided. deadline: whether it is expected to be used within the patience."""
        self._pending.pop(place, None)
        if deadline:
            self._watched.append((tick, place))

    def mute(self, place: Place, tick: int) -> None:
        """Do not judge it for a while, whoever names it."""
        self._muted[place] = tick + MUTED_TICKS << 4 | ALL_SOURCES

    def expire(self, tick: int) -> None:
        """Count what has not been used within the patience as unused, and forget what was turned down a cache's lifetime ago."""
        watched, pending = self._watched, self._pending
        limit = tick - self.patience
        while watched and watched[0][0] < limit:
            since, place = watched.popleft()
            example = pending.get(place)
            if example is not None:
                if example[0] == since and not example[4]:
                    self.gate.learn(example[1], example[2], example[3], 0.0)
                    pending[place] = (since, example[1], example[2], example[3], True)
                    self._doubted.append((since, place))
                continue
            issue = self._issued.get(place)
            if issue is not None and issue.due == since and not issue.overdue:
                if issue.grace > self.patience:
                    issue.grace -= tick - since
                    issue.due = tick
                    watched.append((tick, place))
                    continue
                if issue.features is not None:
                    self.gate.learn(issue.features, issue.score, issue.kind, 0.0)
                issue.overdue = True
                issue.image.governor.on_overdue(issue.chance)
        doubted = self._doubted
        limit = tick - self.life
        while doubted and doubted[0][0] < limit:
            since, place = doubted.popleft()
            example = pending.get(place)
            if example is not None and example[0] == since:
                del pending[place]

    # --- what to do -------------------------------------------------------------------------------------------

    def consider(
        self, image: ImageState, place: Place, tick: int, age: int, echoed: int, held: Mapping[Place, int], *, missed: bool
    ) -> list[Wanted]:
        """What the sources name after this access, is not held, and passes the image's threshold; the likeliest first.

        age, echoed: as `touched` told of the access.
        """
        found: dict[Place, list[Evidence]] = {}
        there = 0
        for candidate, evidence in image.streams.candidates():
            if candidate not in held:
                found[candidate] = [evidence, 0, 0, 0]
            elif not found:
                there += 1
        if there:
            image.streams.there(there)
        sequential = len(found)
        if image.quiet < QUIET_AFTER or not tick & QUIET_MASK:
            for candidate, evidence in image.spatial.candidates():
                if candidate not in held and candidate not in found:
                    found[candidate] = [evidence, 0, 0, 0]
        successors = image.markov.candidates()
        image.sure = -1
        if successors and (successors[0][1] - 1) >> 3 >= 4 and successors[0][1] - 1 & 7 >= 2:
            image.sure = successors[0][0]
        if missed and image.deltas.useful:
            self.lstm_asked += 1
            for delta, chance in image.deltas.predict():
                if place + delta not in held and (place + delta) >> INDEX_BITS == place >> INDEX_BITS:
                    found.setdefault(place + delta, [0, 0, 0, 0])[3] = LSTM_EVIDENCE + int(chance * 8)
        for slot, candidates in ((1, successors), (2, image.markov.second), (3, image.echo.candidates())):
            for candidate, evidence in candidates:
                if candidate not in held:
                    slots = found.get(candidate)
                    if slots is None:
                        near = candidate - place
                        slots = found[candidate] = [EVIDENCE + near if BEFORE <= near <= AFTER else 0, 0, 0, 0]
                    if not slots[slot]:
                        slots[slot] = evidence
        return self._passed(image, found, sequential, place, tick, age, echoed) if found else []

    def _passed(
        self, image: ImageState, found: dict[Place, list[Evidence]], sequential: int, place: Place, tick: int, age: int, echoed: int
    ) -> list[Wanted]:
        gate, pending, muted = self.gate, self._pending, self._muted
        if not tick & _UNMUTE_MASK:
            muted.clear()
        threshold = image.governor.threshold
        bias = image.governor.bias
        wanted: list[Wanted] = []
        number = 0
        for candidate, slots in found.items():
            number += 1
            position, one, two, echo = slots
            named = (number <= sequential) | (one > 0) << 1 | (two > 0) << 2 | (echo > 0) << 3
            until = muted.get(candidate)
            if until is not None and until >> 4 >= tick and named | until & ALL_SOURCES == until & ALL_SOURCES:
                continue
            self.judged += 1
            kind = (position > 0) | named & 14 | (echo >= LSTM_EVIDENCE) << 4
            features = self._features(candidate, slots, place, tick, age, echoed)
            score = gate.score(features)
            odds = gate.odds(score, kind)
            if number <= sequential:
                origin = Origin.SEQUENTIAL
            elif echo >= LSTM_EVIDENCE and not (one or two):
                origin = Origin.LSTM
            else:
                origin = Origin.MARKOV2 if two else Origin.MARKOV1 if one else Origin.ECHO if echo else Origin.SPATIAL
            bar = threshold + bias[origin]
            if origin is Origin.SPATIAL:
                image.quiet = 0 if odds >= bar else image.quiet + 1
            if odds >= bar:
                wanted.append((odds, candidate, origin, features, score, kind))
                continue
            if odds < bar - MUTED_BELOW and number > sequential:
                muted[candidate] = tick + MUTED_TICKS << 4 | named
            example = pending.get(candidate)
            if example is None or score > example[2]:
                pending[candidate] = (tick, features, score, kind, False)
                self._watched.append((tick, candidate))
        if len(wanted) > 1:
            wanted.sort(key=_by_odds)
        return wanted

    def _features(self, candidate: Place, slots: list[Evidence], place: Place, tick: int, age: int, echoed: int) -> Features:
        """What the gate is told of a candidate; place, age and echoed are of the access that led to it."""
        seen = self._seen
        record = seen.get(candidate)
        if record is None:
            its_age, relation = _NEVER, _UNRELATED
        else:
            its_age = (tick - record[0]).bit_length()
            relation = _UNRELATED
            if echoed:
                apart = record[1] - echoed
                relation = apart.bit_length() if apart >= 0 else 16 + apart.bit_length()
                if relation > 30:
                    relation = 30
        before, after = seen.get(candidate - 1), seen.get(candidate + 1)
        age_before = _NEVER if before is None else (tick - before[0]).bit_length()
        age_after = _NEVER if after is None else (tick - after[0]).bit_length()
        distance = candidate - place
        near = 9 if distance > 8 else -9 if distance < -8 else distance
        position, one, two, echo = slots
        # Written out, with the first and last cross's common part taken once: this is most of what prefetch costs.
        position = position * 128 + one
        return (
            (position * PHI + 0x243F6A88 >> SHIFT) & MASK,
            ((two * 512 + echo) * PHI + 0x85A308D3 >> SHIFT) & MASK,
            ((echo * 32 + age) * PHI + 0x13198A2E >> SHIFT) & MASK,
            (((age_before * 32 + age_after) * 32 + near + 9) * PHI + 0x03707344 >> SHIFT) & MASK,
            ((relation * 32 + its_age) * PHI + 0xA4093822 >> SHIFT) & MASK,
            ((candidate ^ candidate >> 23) * PHI + 0x299F31D0 >> SHIFT) & MASK,
            ((place * 31 + distance * 1000003) * PHI + 0x082EFA98 >> SHIFT) & MASK,
            ((position * 128 + two) * PHI + 0xEC4E6C89 >> SHIFT) & MASK,
        )

    def worth(self, image: ImageState, candidate: Place, tick: int) -> Wanted:
        """What the gate says of a neighbour that costs no request of its own, as it stands after the image's last access."""
        example = self._pending.get(candidate)
        if example is not None and tick - example[0] <= 1:
            _, features, score, kind, _ = example
        else:
            self.judged += 1
            kind = 1
            features = self._features(candidate, [beside(candidate - image.last), 0, 0, 0], image.last, tick, 0, 0)
            score = self.gate.score(features)
        return self.gate.odds(score, kind), candidate, Origin.SPATIAL, features, score, kind

    @property
    def memory_bytes(self) -> int:
        """About what it takes, the gate apart."""
        return (
            SEEN_BYTES * len(self._seen)
            + PENDING_BYTES * len(self._pending)
            + MUTED_BYTES * len(self._muted)
            + WATCHED_BYTES * (len(self._watched) + len(self._doubted))
        )

    # --- bounds -----------------------------------------------------------------------------------------------

    def _forget_places(self, tick: int) -> None:
        """Give up the places that were entered first, except those read in the last half of what is remembered."""
        recent = tick - self._places_max // 2
        for place in [place for place, _ in zip(self._seen, range(self._places_max // 8), strict=False)]:
            record = self._seen.pop(place)
            if record[0] > recent:
                self._seen[place] = record
        while len(self._seen) >= self._places_max:
            self._seen.pop(next(iter(self._seen)))


def _by_odds(item: Wanted) -> float:
    # What is sure is wanted in the order in which the sources name it, the nearest of a stream first: chunks side by side are one request.
    return -min(item[0], SURE)
