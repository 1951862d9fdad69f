"""Least recently used: who was read longest ago leaves first. Every operation is O(1) for each key it names.

A prefetched key counts from when it came in: with LRU there is no probation, only a place in the one queue.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from typing import ClassVar

from novafs.eviction.base import EvictionPolicy


class LruPolicy(EvictionPolicy):
    """LRU over an OrderedDict of key to size, oldest access first."""

    name: ClassVar[str] = "lru"

    def __init__(self) -> None:
        self._sizes: OrderedDict[bytes, int] = OrderedDict()

    def insert(self, key: bytes, size: int, *, prefetched: bool = False, place: int = -1) -> None:  # noqa: ARG002 - no probation here
        self._sizes[key] = size
        self._sizes.move_to_end(key)

    def resize(self, key: bytes, size: int) -> None:
        if key in self._sizes:
            self._sizes[key] = size

    def touch(self, key: bytes) -> None:
        if key in self._sizes:
            self._sizes.move_to_end(key)

    def touch_many(self, keys: Iterable[bytes]) -> None:
        sizes = self._sizes
        move_to_end = sizes.move_to_end
        for key in keys:
            if key in sizes:
                move_to_end(key)

    def remove(self, key: bytes) -> None:
        self._sizes.pop(key, None)

    def victims(self, bytes_needed: int) -> list[bytes]:
        chosen = []
        while bytes_needed > 0 and self._sizes:
            key, size = self._sizes.popitem(last=False)
            bytes_needed -= size
            chosen.append(key)
        return chosen

    def __len__(self) -> int:
        return len(self._sizes)

    def __contains__(self, key: object) -> bool:
        return key in self._sizes
