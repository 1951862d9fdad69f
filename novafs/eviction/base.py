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
"""

from __future__ import annotations

import difflib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import ClassVar, Final

from novafs.errors import ConfigError


class EvictionPolicy(ABC):
    """Who leaves. Sizes are bytes as the tier counts them, its overhead included."""

    name: ClassVar[str]

    @abstractmethod
    def insert(self, key: bytes, size: int, *, prefetched: bool = False) -> None:
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
    from novafs.eviction.lru import LruPolicy

    _POLICIES.setdefault(LruPolicy.name, LruPolicy)
