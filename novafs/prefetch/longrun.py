"""Long runs: who reads an image from end to end is served by counting, not by judgement.

A copy of an image touches every chunk once. To weigh each of them costs more than to fetch it, and says the same each time: the
next. So a run that has come far, that left out little and that had to wait goes over to here (`LongRuns`): what lies
ahead of it is fetched in large pieces, holes left out, while the engine (`novafs.prefetch.engine`) only notes that it went by.

What always holds:

- What is under way or unread ahead of a run is at most a third of what the run has come so far, so that one that stops here and now
  has been right three times in four; and at most `most_chunks`.
- A run that finds everything there looks no further until it has to wait again: what is in memory costs nothing here.
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
STRAY: Final = 4
"""At most one chunk in so many was left out or read again: random reads in a small image do not make a run."""
SAME: Final = 4
"""Readers of small pieces, many at a time, are in the same few chunks with all of them."""
AHEAD: Final = 3
"""The window is one part in so many of what lies behind."""
CACHE_SHARE: Final = 8
RUNS_MAX: Final = 64
PIECE: Final = 64
"""Chunks of one request, where the window allows: of 64 KiB each about 3 MB, for which one request costs little beside its bytes."""
PIECES: Final = 4
"""So many make the window, so that several are on their way at once;"""
PIECE_MIN: Final = 16
"""but for less than this nothing is sent."""


class Run:
    """One reader's way through an image: forward, from `start` to `end`."""

    __slots__ = ("again", "ahead", "asked", "asleep", "end", "image", "left_out", "loading", "moved", "skipped", "start")

    def __init__(self, image: int, first: int, last: int) -> None:
        self.image = image
        self.start = first
        self.end = last
        self.again = 0
        """Reads of what it had read before: a run has next to none."""
        self.left_out = 0
        """Chunks that it jumped over, and did not come back for;"""
        self.skipped: set[int] = set()
        """those for which it may still come back."""
        self.ahead = last + 1
        """Up to here the image has been looked through."""
        self.asked: deque[int] = deque()
        """Indexes between `end` and `ahead` that were asked for."""
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
        return span >= FAR and (self.left_out + self.again) * STRAY <= span


class LongRuns:
    """Of all images; images are numbers, chunks are what the engine calls keys."""

    def __init__(self, *, most_chunks: int, capacity_chunks: int) -> None:
        """most_chunks: ahead of one run; 0: none. capacity_chunks: of the cache."""
        self._capacity = capacity_chunks
        self._most = 0
        self.retune(most_chunks=most_chunks)
        self._runs: OrderedDict[tuple[int, int], Run] = OrderedDict()
        """By image and the part of it, of `SLACK` chunks, in which they end; latest read last."""
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
        if last > run.end:
            if first > run.end + 1:
                run.left_out += first - run.end - 1
                run.skipped = {index for index in run.skipped if index > first - SLACK}.union(range(run.end + 1, first))
            run.end, run.moved = last, True
            del self._runs[where]
            self._enter(run)
        elif run.skipped:
            before = len(run.skipped)
            run.skipped.difference_update(range(first, last + 1))
            run.left_out -= before - len(run.skipped)
            run.again += before == len(run.skipped) and last < run.end - SAME
        elif last < run.end - SAME:
            run.again += 1
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

    def awake(self) -> list[Run]:
        """Those for which something is to be fetched, the one that was read last first."""
        return [run for run in reversed(self._runs.values()) if not run.asleep and not run.loading and self.room(run)]

    def running(self, image: int) -> bool:
        """Whether an image has a run that is not asleep."""
        return any(run.image == image and not run.asleep for run in self._runs.values())

    def rest(self) -> None:
        """Put to sleep what has stood still since the last call: it wakes up when it has to wait again."""
        for run in self._runs.values():
            run.asleep |= not run.moved
            run.moved = False

    def room(self, run: Run) -> int:
        """Chunks that may be asked for now: a whole piece, or none while the window is nearly full."""
        window = min(self._most, (run.end - run.start + 1) // AHEAD)
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

    def used(self, key: Key) -> bool:
        """A chunk was read; whether it had been asked for here."""
        return self._unread.pop(key, None) is not None

    def gone(self, keys: Iterable[Key]) -> dict[int, int]:
        """These left the cache, or did not come: how many of them had been asked for here and not read, by image."""
        lost: dict[int, int] = {}
        for key in keys:
            image = self._unread.pop(key, None)
            if image is not None:
                lost[image] = lost.get(image, 0) + 1
        return lost

    @property
    def holding(self) -> bool:
        """Whether anything was asked for that was not read yet."""
        return bool(self._unread)
