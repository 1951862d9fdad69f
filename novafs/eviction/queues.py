"""What the classic experts share: queues of keys with their bytes, ghosts, and what is known of the capacity.

`Queue` is an ordered set of keys that knows how many bytes it holds; `QueuedPolicy` keeps who is in which queue. Both are O(1) for
each key. Ghosts are keys that have left and are remembered up to so many bytes of what they had.
"""

from __future__ import annotations

from abc import abstractmethod
from collections import OrderedDict
from typing import Final

from novafs.errors import ConfigError
from novafs.eviction.base import EvictionPolicy


class Queue:
    """Keys in order, oldest first, with their sizes. `used_bytes` is the sum of those."""

    __slots__ = ("sizes", "used_bytes")

    def __init__(self) -> None:
        self.sizes: Final[OrderedDict[bytes, int]] = OrderedDict()
        self.used_bytes = 0

    def push(self, key: bytes, size: int) -> None:
        """Put `key`, which is not here, at the young end."""
        self.sizes[key] = size
        self.used_bytes += size

    def pop(self) -> tuple[bytes, int]:
        """Take the oldest. KeyError where there is none."""
        key, size = self.sizes.popitem(last=False)
        self.used_bytes -= size
        return key, size

    def take(self, key: bytes) -> int | None:
        """Take `key`, wherever it stands; its size, or None where it is not here."""
        size = self.sizes.pop(key, None)
        if size is not None:
            self.used_bytes -= size
        return size

    def renew(self, key: bytes) -> None:
        """Move `key` to the young end."""
        self.sizes.move_to_end(key)

    def push_ghost(self, key: bytes, size: int, limit_bytes: float) -> None:
        """Remember `key` as the youngest; the oldest are forgotten beyond `limit_bytes`."""
        self.take(key)
        self.push(key, size)
        while self.used_bytes > limit_bytes and self.sizes:
            self.pop()

    def __len__(self) -> int:
        return len(self.sizes)

    def __contains__(self, key: object) -> bool:
        return key in self.sizes


class QueuedPolicy(EvictionPolicy):
    """A policy whose keys each stand in one of some queues."""

    def __init__(self, *queues: Queue) -> None:
        self._queues: Final = queues
        self._told_bytes = 0
        self._seen_bytes = 0

    @property
    def capacity_bytes(self) -> int:
        """What it was told, or else the most that it has held when victims were asked for."""
        return self._told_bytes or self._seen_bytes

    def set_capacity(self, capacity_bytes: int) -> None:
        if capacity_bytes < 1:
            raise ConfigError(f"policy {self.name}: a capacity of {capacity_bytes} bytes holds nothing; expected 1 or more")
        self._told_bytes = capacity_bytes

    def resize(self, key: bytes, size: int) -> None:
        for queue in self._queues:
            before = queue.sizes.get(key)
            if before is not None:
                queue.sizes[key] = size
                queue.used_bytes += size - before
                return

    def remove(self, key: bytes) -> None:
        for queue in self._queues:
            if queue.take(key) is not None:
                return

    def victims(self, bytes_needed: int) -> list[bytes]:
        self._seen_bytes = max(self._seen_bytes, sum(queue.used_bytes for queue in self._queues))
        chosen = []
        while bytes_needed > 0 and any(queue.sizes for queue in self._queues):
            key, size = self._evict_one()
            bytes_needed -= size
            chosen.append(key)
        return chosen

    @abstractmethod
    def _evict_one(self) -> tuple[bytes, int]:
        """Choose, forget and return one key and its size; there is at least one."""

    def __len__(self) -> int:
        return sum(len(queue) for queue in self._queues)

    def __contains__(self, key: object) -> bool:
        return any(key in queue.sizes for queue in self._queues)
