"""The works of `novafs bench`, in an order in which none is helped by the one before: first all cold ones, then all warm ones.

Cold: nothing but the store holds what is read, because `cool` was called just before, prefetch takes the image for one that nobody has
read, and random reads come to no chunk twice. Warm: all of it was read before, past the page cache, so L1 has it where it is large
enough. "again": once more through the page cache, which then has it. What each row really took from memory and from the store is
counted, not believed.

This knows a directory in which it may make files, and two callables; that they are of a mount, and whose, is `novafs.cli.bench`'s.
"""

from __future__ import annotations

import math
import os
import random
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

from novafs.measure import (
    Content,
    Figures,
    Tick,
    figures,
    one_of_each,
    random_blocks,
    read_deep,
    read_random,
    read_sequential,
    small_files,
    write_all,
    write_synced,
)

WORKS: Final = {
    "write": "write a new image, 1 MiB each",
    "read": "read it in order, 1 MiB each",
    "buffered": "the same through the page cache",
    "random": "4 KiB random reads",
    "deep": "4 KiB random reads, several at a time",
    "fsync": "4 KiB random writes, each fsynced",
    "images": "small images",
}
"""Every work, in the order of the table."""
IMAGE: Final = "bench.raw"
SMALL_MAX: Final = 1000
REREAD_MAX: Final = 512
"""So many blocks that were rewritten are read again, cold, at the end."""


class Counters(NamedTuple):
    """Of the mount, since its start: reads that its memory answered, and that waited; what was fetched from the store."""

    memory_reads: int
    waited_reads: int
    store_requests: int
    store_bytes: int


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the result. work, title: what; state: "cold", "warm", "again" or "". counted: what the mount did meanwhile, for all."""

    work: str
    title: str
    state: str
    figures: Figures
    counted: Counters


@dataclass(frozen=True, slots=True)
class Plan:
    """What is asked for. seconds: of each work at most; depth: of "deep"; chunk_bytes: what the mount fetches at a time."""

    works: frozenset[str]
    size_bytes: int
    seconds: float
    depth: int
    chunk_bytes: int


class Bench:
    """One run, in a directory of its own."""

    def __init__(
        self,
        directory: Path,
        plan: Plan,
        *,
        cool: Callable[[str], int],
        count: Callable[[], Counters],
        show: Callable[[str, float], None],
    ) -> None:
        """cool: has nothing but the store hold a file of that name, and says how many chunks would not leave. show: what is being done,
        and which share of it is."""
        self._directory = directory
        self._path = directory / IMAGE
        self._plan = plan
        self._cool = cool
        self._count = count
        self._show = show
        self._content = Content(plan.size_bytes)
        self._chooser = random.Random()  # noqa: S311  # no secret
        self.rows: list[Row] = []
        self.notes: list[str] = []
        """What a reader of the figures must know."""

    def run(self) -> None:
        """All that is planned. Raises OSError, CorruptionError, UnsupportedError."""
        wanted = self._plan.works
        if wanted - {"images"}:
            self._write()
            for state in ("cold", "warm"):
                if state == "warm" and wanted & {"read", "random", "deep"}:
                    self._warm_up()
                self._reads(state)
            if "fsync" in wanted:
                self._fsync()
        if "images" in wanted:
            self._images()
        self.rows.sort(key=lambda row: list(WORKS).index(row.work))  # stable: states stay in order

    def _write(self) -> None:
        before = self._count()
        written, close_s = write_all(self._path, self._content, self._ticker("writing the image"))
        if "write" in self._plan.works:
            self._note("write", WORKS["write"] + ", until fsync", "", written, before)
            stored = figures(array("d", [written.seconds + close_s]), written.bytes)
            self._note("write", "the same, until it is in the store", "", stored, before)

    def _reads(self, state: str) -> None:
        plan, content = self._plan, self._content
        cold = state == "cold"

        def blocks() -> Iterator[int]:
            return one_of_each(content, plan.chunk_bytes, self._chooser) if cold else random_blocks(content, self._chooser)

        works: dict[str, Callable[[int, Tick], Figures]] = {
            "read": lambda fd, tick: read_sequential(fd, content, plan.seconds, tick, once=cold),
            "random": lambda fd, tick: read_random(fd, content, plan.seconds, tick, blocks()),
            "deep": lambda fd, tick: read_deep(fd, content, plan.seconds, tick, blocks(), plan.depth),
        }
        for name, work in works.items():
            if name in plan.works:
                self._measure(name, state, os.O_DIRECT, work)
        if "buffered" in plan.works:
            first = self._measure("buffered", state, 0, lambda fd, tick: read_sequential(fd, content, plan.seconds, tick, once=True))
            if not cold:
                read = first.figures.operations
                self._measure(
                    "buffered",
                    "again",
                    0,
                    lambda fd, tick: read_sequential(fd, content, plan.seconds, tick, once=False, mebibytes=read),
                )

    def _warm_up(self) -> None:
        with _opened(self._path, os.O_DIRECT) as fd:
            read_sequential(fd, self._content, math.inf, self._ticker("reading it all, for what is warm"), once=True)

    def _fsync(self) -> None:
        plan, content = self._plan, self._content
        self._measure("fsync", "", os.O_WRONLY, lambda fd, tick: write_synced(fd, content, plan.seconds, tick, self._any_block()))
        # What was written last is read like all the rest; that costs no row.
        self._make_cold("what was rewritten")
        again = self._chooser.sample(sorted(content.rewritten), min(REREAD_MAX, len(content.rewritten)))
        with _opened(self._path, os.O_DIRECT) as fd:
            read_deep(fd, content, math.inf, self._ticker("reading what was rewritten"), again, plan.depth)

    def _any_block(self) -> Iterator[int]:
        return random_blocks(self._content, self._chooser)

    def _images(self) -> None:
        before = self._count()
        tick = self._ticker(WORKS["images"])
        for name, found in small_files(self._directory, self._plan.seconds, tick, most=SMALL_MAX).items():
            self._note("images", f"{WORKS['images']}: {name}", "", found, before)

    def _measure(self, work: str, state: str, flags: int, do: Callable[[int, Tick], Figures]) -> Row:
        title = WORKS[work].replace("several", str(self._plan.depth))
        if state == "cold":
            self._make_cold(title)
        with _opened(self._path, flags) as fd:
            if state != "again":
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            before = self._count()
            return self._note(work, title, state, do(fd, self._ticker(f"{title}, {state}" if state else title)), before)

    def _make_cold(self, title: str) -> None:
        self._show(f"making the image cold for: {title}", 0.0)
        left = self._cool(IMAGE)
        if left:
            self.notes.append(f"{title}: {left} chunks did not leave the caches before, so not all of it was cold")

    def _note(self, work: str, title: str, state: str, found: Figures, before: Counters) -> Row:
        now = self._count()
        counted = Counters(*(new - old for new, old in zip(now, before, strict=True)))
        row = Row(work, title, state, found, counted)
        self.rows.append(row)
        return row

    def _ticker(self, title: str) -> Tick:
        return lambda share: self._show(title, share)


@contextmanager
def _opened(path: Path, flags: int) -> Iterator[int]:
    fd = os.open(path, flags | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)
