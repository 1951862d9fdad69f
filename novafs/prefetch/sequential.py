"""Sequential streams: several at once per image, forward, backward and strided.

A stream is known by its last index. An access at last+1 continues it forward, at last-1 backward; a stream of one access
has no direction yet. Its window starts at one chunk, doubles with every access that continues it and ends at
`window_max`; a jump starts a new stream whose window is half of the one before, so that a reader that hops between long
runs need not begin from nothing. Strides are told from three accesses with the same distance, within a region of the
image, so that two strided readers do not hide each other.

Linux's readahead doubles and halves likewise (W. Fengguang et al., "On the design of a new Linux readahead framework",
ACM SIGOPS OSR 2008); several streams kept by their heads is how disk arrays do it (B. Gill, D. Modha, "SARC", USENIX ATC 2005).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Final

from novafs.prefetch.base import INDEX_MASK, Access, Candidate

STREAMS_MAX: Final = 64
REGION_BITS: Final = 12
REGIONS_MAX: Final = 32
STRIDE_MAX: Final = 1 << 12
STRIDED: Final = 256
"""Added to the evidence of a strided stream."""


def run_bucket(run: int) -> int:
    """The length of a run as 1, 2, 3, 4, then 5 to 8 for up to 8, 16, 32 and more."""
    return run if run < 5 else 5 + (run > 8) + (run > 16) + (run > 32)


class SequentialSource:
    """The streams of one image. Evidence: run bucket * 16 + distance in chunks (at most 15)."""

    __slots__ = ("_ahead", "_candidates", "_head", "_heads", "_regions", "_start", "direction", "run", "window_max")

    def __init__(self, window_max: int) -> None:
        self.window_max = window_max
        self.run = 0
        """Accesses in a row of the stream that the last access belongs to."""
        self.direction = 1
        self._heads: OrderedDict[int, tuple[int, int, int]] = OrderedDict()
        """Last index of each stream → signed run (its sign is the direction), window, and how many places ahead are there already."""
        self._head = -1
        self._regions: OrderedDict[int, tuple[int, int, int]] = OrderedDict()
        """Region → last index in it, last distance, how often that distance came in a row."""
        self._start = 1
        self._candidates: list[Candidate] | None = []
        """None: not drawn up yet. Most accesses are not asked for them."""
        self._ahead = (0, 0, 0, 0, 0)
        """For drawing them up: place, direction, evidence of the run, first and last distance."""

    def observe(self, access: Access) -> None:
        place = access.place
        index = place & INDEX_MASK
        heads = self._heads
        direction = 1
        head = heads.get(index - 1)
        if head is not None and head[0] > 0:
            del heads[index - 1]
        else:
            head = heads.get(index + 1)
            if head is not None and head[0] <= 1:
                del heads[index + 1]
                direction = -1
            else:
                head = None
        if head is None:
            run, window, there = 1, self._start, 0
            self._start = 1
        else:
            run, window = abs(head[0]) + 1, min(head[1] * 2, self.window_max)
            there = head[2] - 1 if head[2] else 0
            self._start = max(1, window >> 1)
        heads[index] = (run * direction if run > 1 else 1, window, there)
        self._head = index if run > 1 else -1
        heads.move_to_end(index)
        if len(heads) > STREAMS_MAX:
            heads.popitem(last=False)
        self.run = run
        self.direction = direction
        base = run_bucket(run) * 16
        if run > 1:
            reach = min(window, index) if direction < 0 else window
            self._candidates = None
            self._ahead = (place, direction, base, there + 1, reach)
        else:
            self._candidates = self._strided(place, index)

    def there(self, count: int) -> None:
        """The first `count` of the candidates are there or on their way: the stream does not name them again. For long windows: it
        would name a hundred that are known for each that is new.
        """
        head = self._heads.get(self._head)
        if head is not None:
            self._heads[self._head] = (head[0], head[1], head[2] + count)

    def _strided(self, place: int, index: int) -> list[Candidate]:
        regions = self._regions
        region = index >> REGION_BITS
        last, distance, times = regions.get(region, (index, 0, 0))
        step = index - last
        times = times + 1 if step and step == distance else 0
        regions[region] = (index, step, times)
        regions.move_to_end(region)
        if len(regions) > REGIONS_MAX:
            regions.popitem(last=False)
        if not times or abs(step) > STRIDE_MAX:
            return []
        self.run = times + 2
        base = STRIDED + run_bucket(times + 2) * 16
        reach = min(self.window_max, 1 << times)
        return [(place + step * ahead, base + min(ahead, 15)) for ahead in range(1, reach + 1) if 0 <= index + step * ahead <= INDEX_MASK]

    def candidates(self) -> Sequence[Candidate]:
        if self._candidates is None:
            place, direction, base, first, last = self._ahead
            self._candidates = [(place + direction * ahead, base + (ahead if ahead < 15 else 15)) for ahead in range(first, last + 1)]
        return self._candidates
