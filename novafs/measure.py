"""How fast a file is: works that read and write it, timed one operation at a time, with every byte that is read compared.

This knows a file and nothing of what is under it: `novafs.cli.bench` says what is cold, and where the file lies.

What always holds:

- **What is read is checked**: a byte that is not the one written last is a CorruptionError that says where. Checking is outside of an
  operation's latency; the throughput of one reader counts the time in its calls alone.
- **Content flatters nobody**: a chunk of it does not compress and occurs once in the world. Each MiB is another piece of a few random MiB,
  made anew for each file, with a stamp at the head of every block: who it is for, which block, how often it was written.
- O_DIRECT reads and writes use memory that begins at a page, and whole blocks.
"""

from __future__ import annotations

import mmap
import os
import random
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, repeat
from pathlib import Path
from time import perf_counter
from typing import Final

import numpy as np

from novafs.errors import CorruptionError
from novafs.readqueue import ReadQueue

BLOCK_BYTES: Final = 4096
MIB: Final = 1 << 20
QUANTILES: Final = (0.5, 0.9, 0.99, 0.999)
_POOL_BYTES: Final = 8 * MIB
_BLOCKS: Final = MIB // BLOCK_BYTES
_STAMP_BYTES: Final = 16
_SPREAD: Final = 2_654_435_761
"""Knuth's multiplicative hash: neighbours lie far from each other in the pool."""
_LOOK_S: Final = 0.1

Tick = Callable[[float], None]
"""Told now and then, between two operations, which share of a work is done; may raise to end it."""


@dataclass(frozen=True, slots=True)
class Figures:
    """What a work took. seconds: what rates are of; latencies in seconds, of single operations; all 0 where none was done."""

    operations: int
    bytes: int
    seconds: float
    mean_s: float
    p50_s: float
    p90_s: float
    p99_s: float
    p999_s: float
    max_s: float

    @property
    def iops(self) -> float:
        """Operations a second."""
        return self.operations / self.seconds if self.seconds else 0.0

    @property
    def bytes_per_s(self) -> float:
        """Bytes a second."""
        return self.bytes / self.seconds if self.seconds else 0.0


def figures(latencies_s: array[float], length: int, seconds: float | None = None) -> Figures:
    """Of operations of `length` bytes each; seconds: what they took in all, None for the sum of them."""
    count = len(latencies_s)
    if not count:
        return Figures(0, 0, 0, 0, 0, 0, 0, 0, 0)
    known = np.frombuffer(latencies_s, dtype=np.float64)
    total_s = float(known.sum())
    p50_s, p90_s, p99_s, p999_s = (float(found) for found in np.quantile(known, QUANTILES))
    return Figures(
        operations=count,
        bytes=count * length,
        seconds=total_s if seconds is None else seconds,
        mean_s=total_s / count,
        p50_s=p50_s,
        p90_s=p90_s,
        p99_s=p99_s,
        p999_s=p999_s,
        max_s=float(known.max()),
    )


class Content:
    """What a file of so many MiB holds, and how often each block was written."""

    def __init__(self, size_bytes: int) -> None:
        """size_bytes: a multiple of a MiB."""
        self.size_bytes = size_bytes
        self._pool = np.frombuffer(os.urandom(_POOL_BYTES), dtype=np.uint8)
        self._serial = os.urandom(8)
        self._versions = np.zeros(size_bytes // BLOCK_BYTES, dtype=np.uint32)
        self.rewritten: set[int] = set()
        """Blocks that were written more than once."""

    def mebibyte(self, number: int) -> bytes:
        """What the file's MiB of that number holds."""
        first = number * _BLOCKS
        start = number * _SPREAD % (_POOL_BYTES - MIB)
        whole = self._pool[start : start + MIB].copy()
        blocks = whole.reshape(_BLOCKS, BLOCK_BYTES)
        blocks[:, :8] = np.frombuffer(self._serial, dtype=np.uint8)
        blocks[:, 8:_STAMP_BYTES] = np.arange(first, first + _BLOCKS, dtype="<u8").view(np.uint8).reshape(_BLOCKS, 8)
        for at in np.flatnonzero(self._versions[first : first + _BLOCKS]).tolist():
            blocks[at] = np.frombuffer(self.block(first + at), dtype=np.uint8)
        return whole.tobytes()

    def block(self, number: int) -> bytes:
        """What the file's block of that number holds."""
        version = int(self._versions[number])
        stamp = self._serial + (number | version << 40).to_bytes(8, "little")
        start = (number // _BLOCKS + version * 40_503) * _SPREAD % (_POOL_BYTES - MIB) + number % _BLOCKS * BLOCK_BYTES
        return stamp + self._pool[start + _STAMP_BYTES : start + BLOCK_BYTES].tobytes()

    def rewrite(self, number: int) -> bytes:
        """The next content of that block: it counts from now on."""
        self._versions[number] += 1
        self.rewritten.add(number)
        return self.block(number)

    def check_block(self, number: int, found: bytes) -> None:
        """Raises CorruptionError where the block is not what was written."""
        if found != (expected := self.block(number)):
            self._tell(number * BLOCK_BYTES, found, expected)

    def check_mebibyte(self, number: int, found: bytes) -> None:
        """Raises CorruptionError where the MiB is not what was written."""
        if found != (expected := self.mebibyte(number)):
            self._tell(number * MIB, found, expected)

    def _tell(self, offset: int, found: bytes, expected: bytes) -> None:
        if len(found) != len(expected):
            raise CorruptionError(f"WRONG DATA was read: {len(found)} bytes at byte {offset:,}, expected {len(expected)}")
        one, other = np.frombuffer(found, dtype=np.uint8), np.frombuffer(expected, dtype=np.uint8)
        wrong = np.flatnonzero(one != other)
        at = int(wrong[0])
        raise CorruptionError(
            f"WRONG DATA was read: {len(wrong)} of {len(found)} bytes at byte {offset:,} are not what was written; the first is byte "
            f"{offset + at:,}, where {found[at : at + 16].hex()} was found and {expected[at : at + 16].hex()} was written"
        )


class _Clock:
    """When a work ends, and telling how far it is."""

    def __init__(self, limit_s: float, tick: Tick, operations: int | None = None) -> None:
        self._limit_s = limit_s
        self._operations = operations
        self._tick = tick
        self._began_s = self._next_s = perf_counter()
        self._done = 0

    def over(self) -> bool:
        """Whether the time is up; to be asked before each operation."""
        now_s = perf_counter()
        if now_s >= self._next_s:
            self._next_s = now_s + _LOOK_S
            by_time = (now_s - self._began_s) / self._limit_s if self._limit_s else 0.0
            by_count = self._done / self._operations if self._operations else 0.0
            self._tick(min(1.0, max(by_time, by_count)))
        self._done += 1
        return now_s - self._began_s >= self._limit_s


def write_all(path: Path, content: Content, tick: Tick) -> tuple[Figures, float]:
    """Make the file: O_DIRECT writes of 1 MiB, one after the other, then fsync and close.

    The figures' seconds end with the fsync; the second value is what the close took after it. Raises OSError, FileExistsError among it.
    """
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_DIRECT | os.O_CLOEXEC, 0o600)
    latencies = array("d")
    try:
        buffer = mmap.mmap(-1, MIB)
        count = content.size_bytes // MIB
        for number in range(count):
            tick(number / count)
            buffer[:] = content.mebibyte(number)
            began_s = perf_counter()
            _write(fd, buffer, number * MIB)
            latencies.append(perf_counter() - began_s)
        began_s = perf_counter()
        os.fsync(fd)
        synced_s = perf_counter() - began_s
    except BaseException:
        os.close(fd)
        raise
    began_s = perf_counter()
    os.close(fd)
    return figures(latencies, MIB, sum(latencies) + synced_s), perf_counter() - began_s


def _write(fd: int, buffer: mmap.mmap, offset: int) -> None:
    view, done = memoryview(buffer), 0
    while done < len(view):
        done += os.pwrite(fd, view[done:], offset + done)


def read_sequential(fd: int, content: Content, limit_s: float, tick: Tick, *, once: bool, mebibytes: int | None = None) -> Figures:
    """Reads of 1 MiB, from the begin to the end (or so many), until the time is up; once: or all was read."""
    count = content.size_bytes // MIB if mebibytes is None else mebibytes
    buffer = mmap.mmap(-1, MIB)
    latencies = array("d")
    clock = _Clock(limit_s, tick, count if once else None)
    for number in chain.from_iterable(repeat(range(count), 1) if once else repeat(range(count))):
        if clock.over():
            break
        began_s = perf_counter()
        length = os.preadv(fd, [buffer], number * MIB)
        latencies.append(perf_counter() - began_s)
        content.check_mebibyte(number, buffer[:length])
    return figures(latencies, MIB)


def read_random(fd: int, content: Content, limit_s: float, tick: Tick, blocks: Iterable[int]) -> Figures:
    """Reads of one block, one at a time, until the time is up or the blocks are at their end."""
    buffer = mmap.mmap(-1, BLOCK_BYTES)
    latencies = array("d")
    clock = _Clock(limit_s, tick)
    for number in blocks:
        if clock.over():
            break
        began_s = perf_counter()
        length = os.preadv(fd, [buffer], number * BLOCK_BYTES)
        latencies.append(perf_counter() - began_s)
        content.check_block(number, buffer[:length])
    return figures(latencies, BLOCK_BYTES)


def read_deep(fd: int, content: Content, limit_s: float, tick: Tick, blocks: Iterable[int], depth: int) -> Figures:
    """The same with up to `depth` reads under way at a time; fd: opened with O_DIRECT. Raises UnsupportedError."""
    latencies = array("d")
    clock = _Clock(limit_s, tick)
    left: Iterator[int] = iter(blocks)
    with ReadQueue(fd, depth, BLOCK_BYTES) as queue:
        began_s = perf_counter()
        ending = False
        while True:
            while not ending and not queue.full:
                number = next(left, None)
                ending = number is None or clock.over()
                if number is not None and not ending:
                    queue.submit(number * BLOCK_BYTES)
            if not queue.under_way:
                break
            for read in queue.wait():
                latencies.append(read.seconds)
                content.check_block(read.offset // BLOCK_BYTES, queue.content(read))
        seconds = perf_counter() - began_s
    return figures(latencies, BLOCK_BYTES, seconds)


def write_synced(fd: int, content: Content, limit_s: float, tick: Tick, blocks: Iterable[int]) -> Figures:
    """Writes of one block, each with an fsync before the next; a latency is of both."""
    latencies = array("d")
    clock = _Clock(limit_s, tick)
    for number in blocks:
        if clock.over():
            break
        data = content.rewrite(number)
        began_s = perf_counter()
        os.pwrite(fd, data, number * BLOCK_BYTES)
        os.fsync(fd)
        latencies.append(perf_counter() - began_s)
    return figures(latencies, BLOCK_BYTES)


def small_files(directory: Path, limit_s: float, tick: Tick, *, most: int) -> dict[str, Figures]:
    """Files of one block: "create" (with the content, and closed), "open" (and read, and closed), "remove", each of as many files.

    Nothing is left of them, whatever happens on the way, but where removing fails.
    """
    times = {name: array("d") for name in ("create", "open", "remove")}
    made: list[Path] = []
    try:
        clock = _Clock(limit_s, tick, most)
        for number in range(most):
            if clock.over() and made:
                break
            data = os.urandom(BLOCK_BYTES)
            path = directory / f"{number}.raw"
            made.append(path)
            began_s = perf_counter()
            path.write_bytes(data)
            times["create"].append(perf_counter() - began_s)
            began_s = perf_counter()
            found = path.read_bytes()
            times["open"].append(perf_counter() - began_s)
            if found != data:
                raise CorruptionError(f"WRONG DATA was read: the {len(found)} bytes of {path.name} are not what was written")
    finally:
        for number, path in enumerate(made):
            tick(number / len(made))
            began_s = perf_counter()
            path.unlink(missing_ok=True)
            times["remove"].append(perf_counter() - began_s)
    return {name: figures(found, BLOCK_BYTES if name != "remove" else 0) for name, found in times.items()}


def random_blocks(content: Content, chooser: random.Random) -> Iterator[int]:
    """Any block, without end."""
    count = content.size_bytes // BLOCK_BYTES
    while True:
        yield chooser.randrange(count)


def one_of_each(content: Content, chunk_bytes: int, chooser: random.Random) -> Iterator[int]:
    """One block of each piece of `chunk_bytes`, the pieces in any order: no read finds what another one has brought."""
    per_chunk = max(1, chunk_bytes // BLOCK_BYTES)
    chunks = list(range(content.size_bytes // BLOCK_BYTES // per_chunk))
    chooser.shuffle(chunks)
    for chunk in chunks:
        yield chunk * per_chunk + chooser.randrange(per_chunk)
