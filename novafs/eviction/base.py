"""The interface behind which a bounded tier asks who leaves, and the registry of policies.

A policy knows keys, sizes and accesses, never content. The tier tells it what happens and asks for victims; the
policy owns no bytes and does no I/O. One policy object belongs to one tier and is called from one thread.

How a tier uses it, so that a policy may rely on it:

- `insert` once for each key that comes in, `resize` when its bytes change, and exactly one of `remove` (dropped for a
  reason that teaches nothing) or being named by `victims` (evicted) when it leaves.
- Accesses come through `touch_many`, in order, in batches of up to a few thousand, late: a tier notes hits in a list
  and hands it over when it is full and before it asks for victims. So a policy may update features and learn there, off
  the read path. Keys in a batch may have left in the meantime and are skipped.
- `victims` may name more than was asked for: evicting in batches makes a sampled choice cheap. What it names has left
  when it returns, and may go on as a ghost inside the policy.
- `prefetched` says that nobody has asked for the key yet; its first touch is the first use. A policy may hold such
  keys on probation.
- `place` is where the content was last seen, `image << 40 | chunk index` as prefetch counts (`novafs.prefetch.base`), -1 where
  nobody knows. What one place was asked for says something about its neighbours; a policy without a place for a key does without.
- `set_capacity` is called once before the first `insert` and again when the capacity changes. A policy that was not told takes
  what it holds when it is first asked for victims for its capacity.
- `work` is called when there is time: learning is done there, a few milliseconds for each call, never inside the others.
"""

from __future__ import annotations

import difflib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Final

from novafs.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Quality:
    """How well a learning policy does, as `novafs stats` and the metrics show it.

    accuracy: share of judged predictions that were right about "is read again while it could be held"; None before any was judged.
    calibration: (predicted, observed, predictions) of the chance to be read again, in ten steps of the prediction.
    shadow_hit_rates: of each expert's shadow cache over the last while, by name.
    cpu_s: processor seconds spent on learning and on shadow caches.
    """

    in_charge: str
    predictions: int
    judged: int
    accuracy: float | None
    calibration: tuple[tuple[float, float, int], ...]
    shadow_hit_rates: dict[str, float]
    switches: int
    trainings: int
    cpu_s: float
    memory_bytes: int

    def in_words(self) -> str:
        """One sentence for a person."""
        rates = ", ".join(f"{name} {rate:.3f}" for name, rate in sorted(self.shadow_hit_rates.items(), key=lambda item: -item[1]))
        right = "none judged yet" if self.accuracy is None else f"{self.accuracy:.0%} of {self.judged:,} right"
        judged = sum(count for _, _, count in self.calibration)
        off = sum(abs(said - was) * count for said, was, count in self.calibration)
        chances = f", chances off by {off / judged:.2f} on average" if judged else ""
        return (
            f"{self.in_charge} decides (changed {self.switches} times); {self.predictions:,} predictions: {right}{chances}; "
            f"hit rates of the shadows: {rates or 'none yet'}; learned {self.trainings} times, {self.cpu_s:.1f} s of processor time"
        )


class EvictionPolicy(ABC):
    """Who leaves. Sizes are bytes as the tier counts them, its overhead included."""

    name: ClassVar[str]
    rates: ClassVar[bool] = False
    """Whether `chances` may ever know anything."""

    @abstractmethod
    def insert(self, key: bytes, size: int, *, prefetched: bool = False, place: int = -1) -> None:
        """`key` has come in; the caller has made sure that it was not there. Counts as an access unless prefetched."""

    @abstractmethod
    def resize(self, key: bytes, size: int) -> None:
        """The bytes of `key` have changed; no access. An unknown key is skipped."""

    @abstractmethod
    def touch(self, key: bytes) -> None:
        """`key` was read. An unknown key is skipped."""

    def touch_many(self, keys: Iterable[bytes]) -> None:
        """These were read, oldest access first. Unknown keys are skipped."""
        for key in keys:
            self.touch(key)

    @abstractmethod
    def remove(self, key: bytes) -> None:
        """`key` was dropped, not evicted. An unknown key is skipped."""

    @abstractmethod
    def victims(self, bytes_needed: int) -> list[bytes]:
        """Keys to evict, worst first: at least `bytes_needed` bytes in all, or every key where there is less.

        The policy has forgotten them on return; the caller drops them.
        """

    def adopt(self, key: bytes, size: int, accesses: int) -> None:
        """`key`, which another policy held, is this one's now; `accesses` is how often it was asked for, 0 for never."""
        self.insert(key, size, prefetched=accesses == 0)
        for _ in range(min(accesses, 4) - 1):
            self.touch(key)

    def chances(self, keys: Sequence[bytes]) -> list[float | None]:
        """Of each key the guessed chance that it is asked for again while the tier could hold it; None where nothing is known.

        Of keys that are in, or have left as victims not long ago. In batches: by this the tiers below decide what they take.
        """
        return [None] * len(keys)

    def set_capacity(self, capacity_bytes: int) -> None:  # noqa: B027 - most need none
        """The tier's capacity. A policy that needs none takes no notice. Raises ConfigError for less than one byte."""

    def set_clock(self, seconds: Callable[[], float]) -> None:  # noqa: B027 - most need none
        """Where seconds are read from: a simulation's own, or the epoch's. Policies that count accesses take no notice."""

    def set_patterns(self, pattern_of: Callable[[int], str]) -> None:  # noqa: B027 - most need none
        """Whom to ask how an image is read, by the number in a place: a word of `novafs.prefetch.patterns.Pattern`."""

    def set_learning_rate(self, factor: float) -> None:  # noqa: B027 - most learn nothing
        """Learn so many times as fast as usual; 0: not at all, but what was loaded is used."""

    def work(self) -> bool:
        """A few milliseconds of learning, for a moment in which nobody waits. Whether there is more to do at once."""
        return False

    def quality(self) -> Quality | None:
        """How well it does; None for a policy that does not learn."""
        return None

    def save(self) -> bytes | None:
        """What it has learned, for `load` in a later life; None where there is nothing. Knows no key."""
        return None

    def load(self, data: bytes, name: str) -> None:  # noqa: B027 - most learn nothing
        """Begin with what `save` gave. Raises ObjectCorruptError or NewerFormatError, which name it, and goes on as it was."""

    @abstractmethod
    def __len__(self) -> int:
        """Keys that are in."""

    @abstractmethod
    def __contains__(self, key: object) -> bool:
        """Whether `key` is in."""


_POLICIES: Final[dict[str, Callable[[], EvictionPolicy]]] = {}


def register_policy(name: str, make: Callable[[], EvictionPolicy]) -> None:
    """Make `make_policy(name)` answer with `make()`; a later registration of the name replaces an earlier one."""
    _POLICIES[name] = make


def policy_names() -> list[str]:
    """The known names, sorted."""
    _load_builtin()
    return sorted(_POLICIES)


def make_policy(name: str) -> EvictionPolicy:
    """A new policy of that name. Raises ConfigError that names the known ones, the nearest first."""
    _load_builtin()
    make = _POLICIES.get(name.strip().lower())
    if make is None:
        known = policy_names()
        near = difflib.get_close_matches(name.strip().lower(), known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"{name!r} is no eviction policy: expected one of {', '.join(known)}{hint}")
    return make()


def _load_builtin() -> None:
    # Here, not above: each policy's module imports this one.
    from novafs.eviction.learned import LearnedPolicy
    from novafs.eviction.linear8 import Linear8Policy
    from novafs.eviction.lru import LruPolicy
    from novafs.eviction.s3fifo import S3FifoPolicy
    from novafs.eviction.tinylfu import TinyLfuPolicy
    from novafs.eviction.twoq import TwoQueuePolicy

    for policy in (LruPolicy, TwoQueuePolicy, TinyLfuPolicy, S3FifoPolicy, Linear8Policy, LearnedPolicy):
        _POLICIES.setdefault(policy.name, policy)
