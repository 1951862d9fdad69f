"""Models that a program brings along: `register_model(name, model)`, and what becomes of them.

A model is one of two things, told by its methods:

    Predictor   which key is asked for next: `CacheConfig(predictor=name)`
    Scorer      which chunk is worth keeping in L1: `CacheConfig(eviction_policy=name)`

What is registered is an object that all caches share, or a class (or a function without arguments) of which each cache makes its own.
Every answer is checked. A model that raises, or answers what is no answer, is switched off for the rest of that cache's life, with
one warning and a count in `stats().models`; what it stood for is done by the built-in then (transitions, LRU). What a model with `save` and
`load` has learned is kept with the volume (`novafs.pluginmodels`). Models run on
the cache's own thread: one that is slow makes the cache slow, and one that calls the cache is refused (UnsupportedError).
"""

from __future__ import annotations

import inspect
import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, Protocol, TypeVar, runtime_checkable

from novafs.errors import ConfigError, ExistsError

log = logging.getLogger(__name__)

T = TypeVar("T")

BUILT_IN: Final = frozenset({"markov", "lru", "learned", "2q", "wtinylfu", "s3fifo", "linear8"})
PREDICTIONS_MAX: Final = 1024
NAME_MAX: Final = 40


@runtime_checkable
class Predictor(Protocol):
    """Which key comes next."""

    def observe(self, key: str, stream: int) -> None:
        """`key` was read. stream: a number for who reads (a thread of the program): what follows what is told apart by it."""
        ...

    def predict(self, key: str, n: int) -> Sequence[tuple[str, float]]:
        """At most `n` keys that may follow `key`, likeliest first, each with its probability (0 to 1)."""
        ...


class ChunkFeatures(NamedTuple):
    """What a scorer is told of a chunk in L1.

    chunk_id: 32 bytes, the SHA-256 of its content. size: bytes that it takes in L1. accesses: how often it was asked for. idle: accesses to
    L1 since it was asked for last; age: since it came. prefetched: nobody has asked for it yet. image, chunk: where it was read, a number
    of the image in this process and the chunk's; -1 where nobody knows. pattern: how that image is read (`novafs.prefetch.patterns`):
    "sequential", "random", "periodic", "bursty" or "idle".
    """

    chunk_id: bytes
    size: int
    accesses: int
    idle: int
    age: int
    prefetched: bool
    image: int
    chunk: int
    pattern: str


@runtime_checkable
class Scorer(Protocol):
    """How much chunks are worth. It may also have `learn(features, reused)`: told of each chunk that was asked for again, or left."""

    def score(self, chunks: Sequence[ChunkFeatures]) -> Sequence[float]:
        """One number for each, higher for what should stay."""
        ...


Model = Predictor | Scorer

_registered: Final[dict[str, Any]] = {}
_lock: Final = threading.Lock()


def register_model(name: str, model: object, *, replace: bool = False) -> None:
    """Make a model known under a name, for caches that are opened from now on.

    Raises ConfigError for what is neither a Predictor nor a Scorer, and for a name that is built in; ExistsError for one that is taken,
    unless `replace`.
    """
    if not isinstance(name, str) or not name.isidentifier() or len(name) > NAME_MAX:
        raise ConfigError(f"model name {name!r:.100}: expected letters, digits and '_', a letter first, at most {NAME_MAX}")
    if name.lower() in BUILT_IN:
        raise ConfigError(f"model name {name!r}: is built in; choose another")
    made = callable(model) and not isinstance(model, (Predictor, Scorer))
    shown = model if inspect.isclass(model) or not made else None
    if shown is not None and kind_of(shown) is None:
        raise ConfigError(f"model {name!r}: {model!r} has neither observe and predict (a predictor) nor score (a scorer)")
    with _lock:
        if name in _registered and not replace:
            raise ExistsError(f"model {name!r}: is registered already; say replace=True")
        _registered[name] = model
    if shown is None or kind_of(shown) == "scorer":
        from novafs.eviction.base import register_policy
        from novafs.eviction.scorer import ScorerPolicy

        register_policy(name, lambda: ScorerPolicy(name, _checked_scorer(name, make_model(name))))


def unregister_model(name: str) -> None:
    """Forget it; caches that have it go on. No error where there is none."""
    with _lock:
        _registered.pop(name, None)


def kind_of(model: object) -> str | None:
    """ "predictor", "scorer", or None."""
    if all(callable(getattr(model, method, None)) for method in ("observe", "predict")):
        return "predictor"
    return "scorer" if callable(getattr(model, "score", None)) else None


def make_model(name: str) -> Any:
    """The model of that name, or one of its own where a class is registered. Raises ConfigError that names those there are."""
    with _lock:
        model, known = _registered.get(name), sorted(_registered)
    if model is None:
        raise ConfigError(f"{name!r} is no model: expected one that register_model knows ({', '.join(known) or 'none'}), or a built-in one")
    if inspect.isclass(model) or kind_of(model) is None:
        try:
            model = model()
        except Exception as error:
            raise ConfigError(f"model {name!r} could not be made: {type(error).__name__}: {error}") from error
    if kind_of(model) is None:
        raise ConfigError(f"model {name!r}: {model!r} has neither observe and predict (a predictor) nor score (a scorer)")
    return model


def make_predictor(name: str) -> Predictor:
    """A registered predictor. Raises ConfigError."""
    model = make_model(name)
    if kind_of(model) != "predictor":
        raise ConfigError(f"model {name!r} is a scorer; as predictor expected one with observe and predict")
    predictor: Predictor = model
    return predictor


def _checked_scorer(name: str, model: Any) -> Scorer:
    if kind_of(model) != "scorer":
        raise ConfigError(f"model {name!r} is a predictor; as eviction_policy expected one with score")
    scorer: Scorer = model
    return scorer


@dataclass(frozen=True, slots=True)
class ModelFigures:
    """calls and errors of one model; seconds: spent in it; disabled: why it was switched off, or nothing."""

    name: str
    kind: str
    calls: int
    errors: int
    seconds: float
    disabled: str


class Guard:
    """Calls into one model: what it raises stays here."""

    def __init__(self, name: str, kind: str) -> None:
        self.name = name
        self.kind = kind
        self.disabled = ""
        self._calls = 0
        self._errors = 0
        self._seconds = 0.0

    def call(self, function: Callable[..., Any], *arguments: Any, check: Callable[[Any], T]) -> T | None:
        """`check(function(*arguments))`; None where the model is off, or is switched off by this. `check` raises ValueError, TypeError."""
        if self.disabled:
            return None
        self._calls += 1
        began_s = time.perf_counter()
        try:
            return check(function(*arguments))
        except Exception as error:
            self._errors += 1
            self.disabled = f"{type(error).__name__}: {error}"[:300]
            log.warning("%s model %r is switched off, the built-in takes over: %s", self.kind, self.name, self.disabled)
            log.debug("what model %r raised", self.name, exc_info=error)
            return None
        finally:
            self._seconds += time.perf_counter() - began_s

    def figures(self) -> ModelFigures:
        """A snapshot."""
        return ModelFigures(self.name, self.kind, self._calls, self._errors, self._seconds, self.disabled)


def checked_predictions(answer: Any, n: int) -> list[tuple[str, float]]:
    """What a predictor said, where it is what `Predictor.predict` promises. Raises ValueError, TypeError."""
    found: list[tuple[str, float]] = []
    for key, chance in list(answer)[: min(n, PREDICTIONS_MAX)]:
        if not isinstance(key, str):
            raise TypeError(f"predicted {key!r}, expected a key")
        number = float(chance)
        if not 0.0 <= number <= 1.0:  # NaN is not
            raise ValueError(f"predicted {key!r} with probability {chance!r}, expected 0 to 1")
        found.append((key, number))
    return found


def checked_scores(answer: Any, count: int) -> list[float]:
    """What a scorer said, where it is one finite number for each. Raises ValueError, TypeError."""
    scores = [float(score) for score in answer]
    if len(scores) != count:
        raise ValueError(f"{len(scores)} scores for {count} chunks")
    if not all(map(math.isfinite, scores)):
        raise ValueError("a score that is no finite number")
    return scores
