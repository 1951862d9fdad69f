"""Programs that use images on a mount: random writes, buffered and direct, fsyncs, truncates, closes, each noted in a history.

A `Writer` is one program with one image. `step` does one random thing; what it may rely on after it is in `history`. It checks
its own reads. `Crowd` runs several of them in threads until they are told to stop or their mount is gone.
"""

from __future__ import annotations

import mmap
import os
import random
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.support.history import BLOCK, ImageHistory

WRITE_BLOCKS_MAX = 64
JOIN_TIMEOUT_S = 60
"""Bounds a hang: a program whose mount is gone ends at once."""


class Writer:
    """One program, one image of at most `blocks_max` blocks below `directory`. stored: what is closed or fsynced is in the store."""

    def __init__(
        self,
        directory: Path,
        history: ImageHistory,
        rng: random.Random,
        *,
        blocks_max: int = 512,
        durability: str = "journal",
        told: Callable[[str], None] = lambda event: None,
    ) -> None:
        """told: called with "write", "fsync", "truncate", "close" or "read" just before such a call is made."""
        self.path = directory / history.name
        self.history = history
        self.counts: Counter[str] = Counter()
        self._rng = rng
        self._blocks_max = blocks_max
        self._store = durability == "store"
        self._told = told
        self._memory = mmap.mmap(-1, WRITE_BLOCKS_MAX * BLOCK)
        self._fds: list[int] = []
        """One buffered, one with O_DIRECT."""

    def open(self) -> None:
        """Open the image, making it where it is missing."""
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
        for more in (0, os.O_DIRECT):
            self._fds.append(os.open(self.path, flags | more, 0o644))

    def close(self) -> None:
        """Close both descriptors; the first error is raised, and both are closed all the same."""
        first: OSError | None = None
        while self._fds:
            try:
                os.close(self._fds.pop())
            except OSError as error:
                first = first or error
        if first is not None:
            raise first

    def step(self) -> None:
        """One random thing. Raises OSError where the file system does."""
        if not self._fds:
            self.open()
        kind = self._rng.choices(("write", "fsync", "truncate", "close", "read"), (55, 24, 4, 5, 12))[0]
        self._told(kind)
        self.counts[kind] += 1
        getattr(self, kind if kind != "close" else "reopen")()

    def write(self) -> None:
        """4 to 256 KiB, mostly small."""
        count = min(self._rng.choice((1, 1, 1, 2, 4, 8, 16, WRITE_BLOCKS_MAX)), self._blocks_max)
        block = self._rng.randrange(self._blocks_max - count + 1)
        fd = self._rng.choice(self._fds)
        self._memory[: count * BLOCK] = self.history.write(block, count)
        with memoryview(self._memory)[: count * BLOCK] as data:
            written = os.pwrite(fd, data, block * BLOCK)
        assert written == count * BLOCK, f"{self.path}: {written} of {count * BLOCK} bytes were written, without an error"

    def fsync(self) -> None:
        """By either call, on either descriptor."""
        mark = self.history.steps
        self._rng.choice((os.fsync, os.fdatasync))(self._rng.choice(self._fds))
        self.history.promise(mark, stored=self._store)

    def truncate(self) -> None:
        """To any size."""
        blocks = self._rng.randrange(self._blocks_max)
        self.history.resize(blocks)
        os.ftruncate(self._fds[0], blocks * BLOCK)

    def reopen(self) -> None:
        """Close, and open again. A close commits."""
        mark = self.history.steps
        self.close()
        self.history.promise(mark, stored=True)
        self.open()

    def read(self) -> None:
        """What it reads is what it wrote."""
        count = self._rng.choice((1, 4, WRITE_BLOCKS_MAX))
        block = self._rng.randrange(self._blocks_max)
        with memoryview(self._memory)[: count * BLOCK] as room:
            got = os.preadv(self._rng.choice(self._fds), [room], block * BLOCK)
            found = bytes(room[:got])
        expected = self.history.expected(block, count)
        assert found == expected, f"{self.path}: {count} blocks from {block} on are not what was written"


class ColdReader:
    """A program that reads a large image at random, past the page cache, and compares. With an L1 that is smaller than the image, the
    tiers below it are really asked. It tells "cold" before each read."""

    CHUNK = 64 << 10

    def __init__(self, path: Path, rng: random.Random, *, size: int = 12 << 20, told: Callable[[str], None] = lambda event: None) -> None:
        self.path = path
        self.content = random.Random(path.name).randbytes(size)
        self._rng = rng
        self._told = told
        self._memory = mmap.mmap(-1, 4 * self.CHUNK)
        self._fd = -1

    def make(self) -> None:
        """Write the image."""
        self.path.write_bytes(self.content)

    def step(self) -> None:
        """One read, of one to four chunks. Raises OSError where the file system does."""
        if self._fd < 0:
            self.open()
        self._told("cold")
        self.read(self._rng.randrange(len(self.content) // self.CHUNK), self._rng.choice((1, 1, 4)))

    def read(self, chunk: int, count: int = 1) -> None:
        """Read these chunks and compare."""
        with memoryview(self._memory)[: count * self.CHUNK] as room:
            got = os.preadv(self._fd, [room], chunk * self.CHUNK)
            found = bytes(room[:got])
        at = chunk * self.CHUNK
        assert found == self.content[at : at + count * self.CHUNK], f"{self.path}: {count} chunks from {chunk} on are not what was written"

    def open(self) -> None:
        """Open it; `step` does so by itself."""
        self._fd = os.open(self.path, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)

    def close(self) -> None:
        """Close it, if it is open."""
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            os.close(fd)


class Crowd:
    """Programs in threads, from `with` to its end. `gone`: set it just before the mount is killed; errors after it are no failure.

    `wait(event, number)` returns once the writers have begun that many calls of a kind in all; it raises what a writer met.
    """

    def __init__(self) -> None:
        self.gone = False
        self._stop = False
        self._told = threading.Condition()
        self._begun: Counter[str] = Counter()
        self._errors: list[BaseException] = []
        self._threads: list[threading.Thread] = []

    def tell(self, event: str) -> None:
        """For `Writer(told=…)`."""
        with self._told:
            self._begun[event] += 1
            self._begun["any"] += 1
            self._told.notify_all()

    def start(self, writers: Sequence[Writer | ColdReader]) -> None:
        """Let them run."""
        for writer in writers:
            thread = threading.Thread(target=self._run, args=(writer,), name=writer.path.name)
            self._threads.append(thread)
            thread.start()

    def _run(self, writer: Writer | ColdReader) -> None:
        try:
            while not self._stop and not self.gone:
                writer.step()
        except BaseException as error:  # an assertion, too: it is raised to whoever waits
            if not (self.gone and isinstance(error, OSError)):
                with self._told:
                    self._errors.append(error)
                    self._told.notify_all()
        finally:
            try:
                writer.close()
            except OSError as error:
                if not self.gone:
                    with self._told:
                        self._errors.append(error)

    def wait(self, event: str = "any", number: int = 1, timeout_s: float = JOIN_TIMEOUT_S) -> None:
        """Until `number` more such calls have begun. Raises what a writer met, TimeoutError."""
        with self._told:
            wanted = self._begun[event] + number
            there = self._told.wait_for(lambda: self._begun[event] >= wanted or bool(self._errors), timeout_s)
        self._raise()
        if not there:
            raise TimeoutError(f"the writers began {self._begun} within {timeout_s} s; waited for {number} more of {event!r}")

    def stop(self) -> None:
        """Let each finish its call, close, and end. Raises what a writer met."""
        self._stop = True
        for thread in self._threads:
            thread.join(JOIN_TIMEOUT_S)
            if thread.is_alive():
                raise TimeoutError(f"the writer of {thread.name} hangs in a call")
        self._raise()

    def _raise(self) -> None:
        if self._errors:
            raise self._errors[0]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stop = True
        if error is None:
            self.stop()
