"""2Q (T. Johnson, D. Shasha, VLDB 1994, the full version): a second access counts only when it comes late enough.

What comes in for the first time goes through a queue of a quarter of the capacity, whose order accesses do not change: the burst of
accesses that follows a first one is one event. What leaves it is remembered as a ghost (half the capacity's worth); who comes back
while he is, goes to the main queue, which is LRU. Parameters are those of the paper.
"""

from __future__ import annotations

from typing import ClassVar, Final

from novafs.eviction.queues import Queue, QueuedPolicy

IN_SHARE: Final = 0.25
OUT_SHARE: Final = 0.5


class TwoQueuePolicy(QueuedPolicy):
    """2Q. A prefetched key that nobody has used leaves its queue without a ghost."""

    name: ClassVar[str] = "2q"

    def __init__(self) -> None:
        self._in = Queue()
        self._main = Queue()
        self._out = Queue()
        self._unused: set[bytes] = set()
        super().__init__(self._in, self._main)

    def insert(self, key: bytes, size: int, *, prefetched: bool = False, place: int = -1) -> None:  # noqa: ARG002 - knows no places
        if prefetched:
            self._unused.add(key)
            self._in.push(key, size)
        elif self._out.take(key) is not None:
            self._main.push(key, size)
        else:
            self._in.push(key, size)

    def touch(self, key: bytes) -> None:
        if key in self._main.sizes:
            self._main.renew(key)
        elif self._unused:
            self._unused.discard(key)

    def adopt(self, key: bytes, size: int, accesses: int) -> None:
        if accesses > 1:
            self._main.push(key, size)
        else:
            self.insert(key, size, prefetched=accesses == 0)

    def remove(self, key: bytes) -> None:
        self._unused.discard(key)
        super().remove(key)

    def _evict_one(self) -> tuple[bytes, int]:
        if self._in.sizes and (self._in.used_bytes > self.capacity_bytes * IN_SHARE or not self._main.sizes):
            key, size = self._in.pop()
            if key in self._unused:
                self._unused.discard(key)
            else:
                self._out.push_ghost(key, size, self.capacity_bytes * OUT_SHARE)
            return key, size
        return self._main.pop()
