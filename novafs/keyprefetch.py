"""Prefetch between keys: learns in which order a program reads keys, and says which to bring into L1 before it asks.

The engine under `novafs.prefetch` works within a value; this works between values. What is likely enough is fetched: a chance of at
least the accuracy target, lowered by `prefetch_aggression` as the governor lowers it, and raised again by as much as what was fetched
turned out worse than that. At most `prefetch_window` guesses are open at a time for each key read; a guess that is not read before
`PENDING_MAX` others were made counts as wasted.

The predictor is the built-in `novafs.keymodel`, or one that the program has registered; then the built-in learns beside it, and takes
over where the other fails.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from dataclasses import dataclass
from typing import Final

import trio

from novafs.cacheconfig import CacheConfig
from novafs.errors import NewerFormatError, NovaError, ObjectCorruptError
from novafs.eviction.scorer import ScorerPolicy
from novafs.keymodel import KeyModel
from novafs.modelstore import load_saved, save_merged
from novafs.pluginmodels import KeptModel, is_kept
from novafs.registry import Guard, ModelFigures, Predictor, checked_predictions, make_predictor
from novafs.volume import Volume
from novafs.warming import WarmCounts

log = logging.getLogger(__name__)

NAME: Final = "keys"
"""Of the model in the volume."""
BYTES_MAX: Final = 8 << 20
"""Of one value that a guess is worth."""
PENDING_MAX: Final = 256
CHANCE_MIN: Final = 0.1
RECENT: Final = 0.02
"""Weight of the last guess in the accuracy that the threshold goes by."""
STREAMS_MAX: Final = 64
SAVE_S: Final = 600.0
LEARNED_MIN: Final = 20
"""Keys read that are worth a save."""
TIMEOUT_S: Final = 10.0


@dataclass(slots=True)
class GuessCounts:
    """issued: keys fetched on a guess; used, wasted: what became of them. judged, right: keys read, and read as predicted."""

    issued: int = 0
    used: int = 0
    wasted: int = 0
    judged: int = 0
    right: int = 0


class KeyPrefetcher:
    """One for each cache. On the trio thread."""

    bytes_max = BYTES_MAX

    def __init__(self, config: CacheConfig, volume: Volume) -> None:
        """Raises ConfigError for a predictor that nobody has registered."""
        self.counts = GuessCounts()
        self.model = KeyModel()
        self._volume = volume
        self._enabled = config.enable_prefetch
        self._window = config.prefetch_window
        self._learns = bool(config.learning_rate)
        self.model.table.frozen = not self._learns
        self._wanted = volume.config.prefetch.accuracy_target * (1.0 - volume.config.prefetch.aggression)
        self._recent = max(self._wanted, CHANCE_MIN)
        """Accuracy of late; at first as good as wanted."""
        self._guard: Guard | None = None
        self._plugged: Predictor | None = None
        if config.predictor != "markov":
            self._plugged = make_predictor(config.predictor)
            self._guard = Guard(config.predictor, "predictor")
        self._kept = [KeptModel(name, kind, model, guard) for name, kind, model, guard in self._plugged_models(config) if is_kept(model)]
        """Models of the program that are kept with the volume."""
        self._pending: OrderedDict[str, None] = OrderedDict()
        self._last: OrderedDict[int, frozenset[str]] = OrderedDict()
        """What was predicted after the last key of each stream."""
        self._seen = 0

    def _plugged_models(self, config: CacheConfig) -> list[tuple[str, str, object, Guard]]:
        found: list[tuple[str, str, object, Guard]] = []
        if self._plugged is not None and self._guard is not None:
            found.append((config.predictor, "predictor", self._plugged, self._guard))
        policy = self._volume.cache.l1.policy
        if isinstance(policy, ScorerPolicy):
            found.append((policy.name, "scorer", policy.scorer, policy.guard))
        return found

    # --- predicting -------------------------------------------------------------------------------------------

    def predict(self, key: str, n: int) -> list[tuple[str, float]]:
        """At most `n` keys that may follow, likeliest first."""
        if self._plugged is not None and self._guard is not None:
            plugged = self._plugged
            found = self._guard.call(plugged.predict, key, n, check=lambda answer: checked_predictions(answer, n))
            if found is not None:
                return found
        return self.model.predict(key, n)

    def observe(self, key: str, stream: int) -> list[str]:
        """A key was read: what to fetch now."""
        counts = self.counts
        self._seen += 1
        said = self._last.pop(stream, None)
        if said:
            counts.judged += 1
            counts.right += key in said
        if key in self._pending:
            del self._pending[key]
            counts.used += 1
            self._recent += RECENT * (1.0 - self._recent)
        self.model.observe(key, stream)
        if self._plugged is not None and self._guard is not None and self._learns:
            self._guard.call(self._plugged.observe, key, stream, check=lambda _: None)
        found = self.predict(key, max(1, self._window))
        self._last[stream] = frozenset(name for name, _ in found)
        if len(self._last) > STREAMS_MAX:
            self._last.popitem(last=False)
        if not self._enabled or not self._window:
            return []
        least = self.threshold
        return [name for name, chance in found[: self._window] if chance >= least and name not in self._pending]

    @property
    def threshold(self) -> float:
        """The least chance that a key is fetched for."""
        return min(0.99, max(CHANCE_MIN, self._wanted) + max(0.0, self._wanted - self._recent))

    def fetched(self, key: str, counts: WarmCounts) -> None:
        """A guess was fetched; one whose chunks were all there costs nothing and counts for nothing."""
        if not counts.fetched or key in self._pending:
            return
        self.counts.issued += 1
        self._pending[key] = None
        if len(self._pending) > PENDING_MAX:
            self._pending.popitem(last=False)
            self.counts.wasted += 1
            self._recent -= RECENT * self._recent

    def forget(self, key: str) -> None:
        """The key is gone."""
        self._pending.pop(key, None)
        self.model.forget(key)

    def figures(self) -> ModelFigures | None:
        """Of the predictor that the program brought along."""
        return self._guard.figures() if self._guard is not None else None

    # --- kept with the volume -----------------------------------------------------------------------------------

    async def load(self) -> None:
        """Learn what other processes and hosts know. Raises nothing that the store raises."""
        with trio.move_on_after(TIMEOUT_S):
            try:
                data = await load_saved(self._volume.client, NAME)
                if data is not None:
                    self.model.load(data, f"models/{NAME}")
            except (ObjectCorruptError, NewerFormatError) as error:
                log.warning("prefetch between keys starts without a saved model: %s", error)
            except NovaError as error:
                log.warning("prefetch between keys starts without what was learned before: %s", error)
            for kept in self._kept:
                await kept.load(self._volume.client)

    async def run(self) -> None:
        """Save now and then, until cancelled."""
        while True:
            await trio.sleep(SAVE_S)
            await self.save()

    async def save(self) -> None:
        """Keep what was learned, where it is worth it. Raises nothing that the store raises."""
        if not self._learns or self._volume.read_only:
            return
        with trio.move_on_after(TIMEOUT_S, shield=True):
            for kept in self._kept:
                await kept.save(self._volume.client)
            if self._seen < LEARNED_MIN:
                return
            try:
                await save_merged(self._volume.client, NAME, self.model.save(), merge_keys)
                self._seen = 0
            except NovaError as error:
                log.warning("what was learned of the order of keys is not saved: %s", error)


def merge_keys(mine: bytes, theirs: bytes) -> bytes:
    """What both know. Raises ObjectCorruptError where `theirs` is no good, NewerFormatError where it must stay."""
    joined = KeyModel.from_bytes(theirs, f"models/{NAME}")
    joined.merge(KeyModel.from_bytes(mine, f"models/{NAME}"))
    return joined.save()
