"""Long runs: who reads an image from end to end is served by counting, not by judgement.

A copy of an image touches every chunk once. To weigh each of them costs more than to fetch it, and says the same each time: the
next. So a run that has come far, that left out little and that had to wait goes over to here (`LongRuns`): what lies
ahead of it is fetched in large pieces, holes left out, while the engine (`novafs.prefetch.engine`) only notes that it went by.

What always holds:

- What is under way or unread ahead of a run is at most a third of the way that the run has come so far, so that one that stops here and
  now has cost at most a third more than what it read; and at most `most_chunks`. Of several that go on each has its part of what the
  cache keeps of chunks that nobody has read (`novafs.eviction.probation`): with more they would drive out each other's.
- A run that begins to leave out much is served no longer, until what it has left out is little beside the rest.
- A run that finds everything there looks no further until it has to wait again: what is in memory costs nothing here.
- A chunk that was asked for here has one end: it was read (`used`), or it left the cache or did not come (`gone`). Asked for twice it
  would have none, so what is `expected` is not asked for.
- No I/O, no clock. Memory is bounded: `RUNS_MAX` runs, and of chunks those that are in the cache unread.

The rule of the window is that of Linux's readahead (W. Fengguang et al., "On the design of a new Linux readahead framework", ACM SIGOPS
OSR 2008), with the past of the run in the place of its last window.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence
from typing import Final

from novafs.prefetch.base import Key

FAR: Final = 48
"""Chunks after which a run is a long one."""
SLACK: Final = 64
"""Readers that ask for several pieces at once are answered, and go on, out of order by so many chunks."""
TRAIL: Final = (1 << SLACK) - 1
STRAY: Final = 4
"""At most one chunk in so many was left out or read again: random reads in a small image do not make a run."""
SAME: Final = 4
"""Readers of small pieces, many at a time, are in the same few chunks with all of them."""
AHEAD: Final = 3
"""The window is one part in so many of what lies behind."""
CACHE_SHARE: Final = 8
"""Ahead of one run is at most one part in so many of the cache,"""
UNREAD_SHARE: Final = 4
"""and ahead of all that go on one part in so many, each the same: as much as unread chunks may hold there."""
GOING: Final = 256
"""A run of which none of so many reads was has stopped, or is slow beside the others."""
RUNS_MAX: Final = 64
PIECE: Final = 64
"""Chunks of one request, where the window allows: of 64 KiB each about 3 MB, for which one request costs little beside its bytes."""
PIECES: Final = 4
"""So many make the window, so that several are on their way at once;"""
PIECE_MIN: Final = 16
"""but no piece is smaller than this, unless the window is, or the store can take no more."""


class Run:
    """One reader's way through an image: forward, from `start` to `end`."""

    __slots__ = ("again", "ahead", "asked", "asleep", "end", "image", "loading", "moved", "read", "seen", "start", "trail")

    def __init__(self, image: int, first: int, last: int) -> None:
        self.image = image
        self.start = first
        self.end = last
        self.seen = last - first + 1
        """How many chunks of it were read, each counted once."""
        self.again = 0
        """Reads of what it had read before: a run has next to none."""
        self.trail = (1 << self.seen) - 1 & TRAIL
        """Which of the last `SLACK` were: bit i is chunk `end` - i."""
        self.ahead = last + 1
        """Up to here the image has been looked through."""
        self.asked: deque[int] = deque()
        """Indexes between `end` and `ahead` that were asked for."""
        self.read = 0
        """Which read of all was the latest of it."""
        self.asleep = True
        """It has not had to wait of late."""
        self.moved = True
        """It went on since the last `LongRuns.rest`."""
        self.loading = False
        """The map where it would look next is on its way."""

    @property
    def far(self) -> bool:
        """Whether it is a long one."""
        span = self.end - self.start + 1
        return span >= FAR and (span - self.seen + self.again) * STRAY <= span

    def went(self, first: int, last: int) -> None:
        """Chunks were read that belong to it."""
        end = self.end
        if first <= end:  # out of order, or again: a reader of less than a chunk
            low, high = max(first, end - SLACK + 1, self.start), min(last, end)
            if low <= high:
                new = ((1 << high - low + 1) - 1 << end - high) & ~self.trail
                self.again += not new and last < end - SAME
                self.trail |= new
                self.seen += new.bit_count()
        if last > end:
            fresh = last - max(first, end + 1) + 1
            self.trail = (self.trail << last - end | (1 << fresh) - 1) & TRAIL
            self.seen += fresh
            self.end = last


class LongRuns:
    """Of all images; images are numbers, chunks are what the engine calls keys."""

    def __init__(self, *, most_chunks: int, capacity_chunks: int) -> None:
        """most_chunks: ahead of one run; 0: none. capacity_chunks: of the cache."""
        self._capacity = capacity_chunks
        self._most = 0
        self.retune(most_chunks=most_chunks)
        self._runs: OrderedDict[tuple[int, int], Run] = OrderedDict()
        """By image and the part of it, of `SLACK` chunks, in which they end; latest read last."""
        self._reads = 0
        self._unread: dict[Key, int] = {}
        """What was asked for and not read since → its image."""

    def retune(self, *, most_chunks: int) -> None:
        """Another bound from now on."""
        self._most = min(most_chunks, self._capacity // CACHE_SHARE)

    # --- the reader -------------------------------------------------------------------------------------------

    def read(self, image: int, first: int, last: int, *, waited: bool) -> Run | None:
        """Chunks were read: the run that they belong to, where it is a long one. waited: they were not all there."""
        if not self._most:
            return None
        part = first // SLACK
        for where in ((image, part), (image, part - 1), (image, part + 1)):
            run = self._runs.get(where)
            if run is not None and run.end - SLACK < first <= run.end + SLACK:
                break
        else:
            if waited:  # what is there needs no help
                self._enter(Run(image, first, last))
            return None
        self._reads += 1
        run.read = self._reads
        run.moved |= last > run.end
        run.went(first, last)
        del self._runs[where]
        self._enter(run)
        asked = run.asked
        while asked and asked[0] <= run.end:
            asked.popleft()
        if not run.far:
            return None
        if run.ahead <= run.end:
            run.ahead = run.end + 1
        if waited:
            run.asleep = False
        return None if run.asleep else run

    def _enter(self, run: Run) -> None:
        where = run.image, run.end // SLACK
        self._runs[where] = run
        self._runs.move_to_end(where)
        if len(self._runs) > RUNS_MAX:
            self._runs.popitem(last=False)

    def rest(self) -> None:
        """Put to sleep what has stood still since the last call: it wakes up when it has to wait again."""
        for run in self._runs.values():
            run.asleep |= not run.moved
            run.moved = False

    def awake(self) -> list[Run]:
        """Those for which something is to be fetched, the one that was read last first."""
        return [run for run in reversed(self._runs.values()) if not run.asleep and run.far and not run.loading and self.room(run)]

    def served(self, image: int) -> bool:
        """Whether something was asked for ahead of a run of this image, or may be."""
        return any(run.image == image and not run.asleep and run.far for run in self._runs.values())

    def room(self, run: Run) -> int:
        """Chunks that may be asked for now: a whole piece, or none while the window is nearly full."""
        # Of those that are going on: what others have left behind leaves the cache first.
        going = sum(not other.asleep and self._reads - other.read < GOING for other in self._runs.values())
        window = min(self._most, (run.end - run.start + 1) // AHEAD, self._capacity // UNREAD_SHARE // max(1, going))
        piece = min(PIECE, window, max(PIECE_MIN, window // PIECES))
        return piece if piece and window - len(run.asked) >= piece else 0

    def forget(self, image: int) -> None:
        """An image was closed, or is to be taken for one that was never read."""
        for where in [where for where in self._runs if where[0] == image]:
            del self._runs[where]

    # --- what was asked for -----------------------------------------------------------------------------------

    def asked(self, run: Run, indexes: Iterable[int], keys: Sequence[Key]) -> None:
        """These are being fetched."""
        run.asked.extend(indexes)
        for key in keys:
            self._unread[key] = run.image

    def expected(self, key: Key) -> bool:
        """Whether it was asked for here, and had no end yet."""
        return key in self._unread

    def used(self, key: Key) -> int | None:
        """A chunk was read: for which image it had been asked for here; None where it had not been."""
        return self._unread.pop(key, None)

    def gone(self, keys: Iterable[Key]) -> dict[int, int]:
        """These left the cache, or did not come: how many of them had been asked for here and not read, by image."""
        lost: dict[int, int] = {}
        for key in keys:
            image = self._unread.pop(key, None)
            if image is not None:
                lost[image] = lost.get(image, 0) + 1
        return lost

    @property
    def pending(self) -> int:
        """How many were asked for that had no end yet."""
        return len(self._unread)

    @property
    def holding(self) -> bool:
        """Whether anything was asked for that was not read yet."""
        return bool(self._unread)
