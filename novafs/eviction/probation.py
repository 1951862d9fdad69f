"""Prefetched and never asked for: such keys may take a share of a tier, and no more, whatever the policy.

A policy sees a prefetched key like any other, more or less; an LRU puts it at the young end. So a burst of wrong guesses could push out
what demand reads have just brought. Probation bounds that: beyond `SHARE` of the capacity a prefetched key that nobody has used makes room
for the next, the oldest first, before the policy is asked. What demand brought leaves only by the policy's choice, and
the policy chooses only while guesses hold less than their share.

The tier tells it what the policy is told, too; all that is held here is names. Every operation is O(1) for each key it names.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from typing import Final

SHARE: Final = 0.25


class Probation:
    """The keys on probation of one tier, oldest first."""

    __slots__ = ("_sizes", "used_bytes")

    def __init__(self) -> None:
        self._sizes: OrderedDict[bytes, int] = OrderedDict()
        self.used_bytes = 0

    def enter(self, key: bytes, size: int) -> None:
        """`key` has come in and nobody has asked for it."""
        self.leave(key)
        self._sizes[key] = size
        self.used_bytes += size

    def leave(self, key: bytes) -> None:
        """`key` was asked for, or has left the tier. One that is not on probation is skipped."""
        size = self._sizes.pop(key, None)
        if size is not None:
            self.used_bytes -= size

    def leave_many(self, keys: Iterable[bytes]) -> None:
        """These were asked for."""
        if self._sizes:
            for key in keys:
                self.leave(key)

    def victim(self, capacity_bytes: int) -> bytes | None:
        """The key that has to make room before others do, where those on probation hold more than their share of the capacity.

        It stays here until the tier says that it left.
        """
        if self.used_bytes <= SHARE * capacity_bytes or not self._sizes:
            return None
        return next(iter(self._sizes))

    def __len__(self) -> int:
        return len(self._sizes)

    def __contains__(self, key: object) -> bool:
        return key in self._sizes
