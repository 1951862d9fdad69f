"""W-TinyLFU (G. Einziger, R. Friedman, B. Manes, ACM ToS 2017) with a window of a tenth of the capacity.

New keys pass through an LRU window. What leaves it is let into the main part (a segmented LRU, four fifths of it protected) only if
it was asked for more often lately than who would have to leave for it. Counts are approximate: a count-min sketch of four rows,
halved after ten accesses for each key the cache holds. On disks an access to a chunk is most often one of a burst, so the window is
ten times what the paper takes for its default.

The main part enters the contest with its oldest key; the sketch is a byte for each counter, aged with one `bytes.translate`.
"""

from __future__ import annotations

from typing import ClassVar, Final

from novafs.eviction.queues import Queue, QueuedPolicy

WINDOW_SHARE: Final = 0.1
PROTECTED_SHARE: Final = 0.8
AGING: Final = 10
COUNT_MAX: Final = 15
ROWS: Final = 4
WIDTH_MIN: Final = 256
_HALVED: Final = bytes(value >> 1 for value in range(256))
_MIX: Final = (0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0xD6E8FEB86659FD93)
_MASK: Final = (1 << 64) - 1


class Sketch:
    """How often keys were seen lately, too high by collisions, never too low for what was added since the last halving."""

    def __init__(self, keys: int) -> None:
        """keys: how many the cache holds."""
        self.keys = keys
        bits = max(WIDTH_MIN, 4 * keys).bit_length()
        self._shift = 64 - bits
        self._rows = [bytearray(1 << bits) for _ in range(ROWS)]
        self._added = 0

    def add(self, key: bytes) -> None:
        """Count one access."""
        value = int.from_bytes(key[:8], "little")
        shift = self._shift
        for row, mix in zip(self._rows, _MIX, strict=True):
            at = ((value * mix) & _MASK) >> shift
            if row[at] < COUNT_MAX:
                row[at] += 1
        self._added += 1
        if self._added >= AGING * self.keys:
            self._added //= 2
            for row in self._rows:
                row[:] = row.translate(_HALVED)

    def estimate(self, key: bytes) -> int:
        """Accesses counted, 0 to 15."""
        value = int.from_bytes(key[:8], "little")
        shift = self._shift
        return min(row[((value * mix) & _MASK) >> shift] for row, mix in zip(self._rows, _MIX, strict=True))


class TinyLfuPolicy(QueuedPolicy):
    """W-TinyLFU. A prefetched key is not counted until somebody asks for it."""

    name: ClassVar[str] = "wtinylfu"

    def __init__(self) -> None:
        self._window = Queue()
        self._probation = Queue()
        self._protected = Queue()
        self._sketch = Sketch(WIDTH_MIN)
        super().__init__(self._window, self._probation, self._protected)

    def insert(self, key: bytes, size: int, *, prefetched: bool = False, place: int = -1) -> None:  # noqa: ARG002 - knows no places
        if not prefetched:
            self._sketch.add(key)
        self._window.push(key, size)
        # While there is room, nobody has to win a contest to stay.
        window_max = self.capacity_bytes * WINDOW_SHARE
        main_max = self.capacity_bytes - window_max
        while self._told_bytes and self._window.used_bytes > window_max and len(self._window) > 1:
            oldest = next(iter(self._window.sizes.values()))
            if self._probation.used_bytes + self._protected.used_bytes + oldest > main_max:
                break
            self._probation.push(*self._window.pop())

    def touch(self, key: bytes) -> None:
        if key in self._window.sizes:
            self._sketch.add(key)
            self._window.renew(key)
        elif key in self._protected.sizes:
            self._sketch.add(key)
            self._protected.renew(key)
        elif (size := self._probation.take(key)) is not None:
            self._sketch.add(key)
            self._protected.push(key, size)
            protected_max = self.capacity_bytes * (1 - WINDOW_SHARE) * PROTECTED_SHARE
            while protected_max and self._protected.used_bytes > protected_max and len(self._protected) > 1:
                self._probation.push(*self._protected.pop())

    def adopt(self, key: bytes, size: int, accesses: int) -> None:
        for _ in range(min(accesses, COUNT_MAX)):
            self._sketch.add(key)
        if accesses:
            self._probation.push(key, size)
        else:
            self._window.push(key, size)

    def victims(self, bytes_needed: int) -> list[bytes]:
        if len(self) > 2 * self._sketch.keys:
            self._sketch = Sketch(len(self))
        return super().victims(bytes_needed)

    def _evict_one(self) -> tuple[bytes, int]:
        main = self._probation if self._probation.sizes else self._protected
        if self._window.sizes and self._window.used_bytes > self.capacity_bytes * WINDOW_SHARE:
            candidate, size = self._window.pop()
            if not main.sizes:
                return candidate, size
            oldest = next(iter(main.sizes))
            if self._sketch.estimate(candidate) <= self._sketch.estimate(oldest):
                return candidate, size
            victim = main.pop()
            self._probation.push(candidate, size)
            return victim
        return main.pop() if main.sizes else self._window.pop()
