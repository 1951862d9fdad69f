"""S3-FIFO (J. Yang and others, SOSP 2023): three FIFO queues, a counter of two bits for each key.

A tenth of the capacity is a small queue that everybody enters by; who was accessed twice on the way through goes on to the main
queue, the others leave and are remembered as ghosts, and who comes back while he is enters the main queue at once. The main queue
gives those with a count another round.
"""

from __future__ import annotations

from typing import ClassVar, Final

from novafs.eviction.queues import Queue, QueuedPolicy

SMALL_SHARE: Final = 0.1
GHOST_SHARE: Final = 0.9
COUNT_MAX: Final = 3
PROMOTED_AT: Final = 2


class S3FifoPolicy(QueuedPolicy):
    """S3-FIFO. The first use of a prefetched key is its entry, no repeated access."""

    name: ClassVar[str] = "s3fifo"

    def __init__(self) -> None:
        self._small = Queue()
        self._main = Queue()
        self._ghosts = Queue()
        self._counts: dict[bytes, int] = {}
        super().__init__(self._small, self._main)

    def insert(self, key: bytes, size: int, *, prefetched: bool = False, place: int = -1) -> None:  # noqa: ARG002 - knows no places
        self._counts[key] = -1 if prefetched else 0
        if not prefetched and self._ghosts.take(key) is not None:
            self._main.push(key, size)
        else:
            self._small.push(key, size)

    def touch(self, key: bytes) -> None:
        count = self._counts.get(key)
        if count is not None and count < COUNT_MAX:
            self._counts[key] = count + 1

    def adopt(self, key: bytes, size: int, accesses: int) -> None:
        if accesses > 1:
            self._counts[key] = 0
            self._main.push(key, size)
        else:
            self.insert(key, size, prefetched=accesses == 0)

    def remove(self, key: bytes) -> None:
        self._counts.pop(key, None)
        super().remove(key)

    def _evict_one(self) -> tuple[bytes, int]:
        counts = self._counts
        if self._small.used_bytes > self.capacity_bytes * SMALL_SHARE or not self._main.sizes:
            while self._small.sizes:
                key, size = self._small.pop()
                if counts[key] >= PROMOTED_AT:
                    counts[key] = 0
                    self._main.push(key, size)
                    continue
                if counts.pop(key) >= 0:
                    self._ghosts.push_ghost(key, size, self.capacity_bytes * GHOST_SHARE)
                return key, size
        while True:
            key, size = self._main.pop()
            if counts[key] <= 0:
                del counts[key]
                return key, size
            counts[key] -= 1
            self._main.push(key, size)
