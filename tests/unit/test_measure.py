"""What `novafs bench` times: what it writes, that it finds what is wrong, and what it makes of latencies."""

from __future__ import annotations

import os
import random
import zlib
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import pytest

from novafs.benching import Bench, Counters, Plan
from novafs.errors import CorruptionError
from novafs.measure import (
    BLOCK_BYTES,
    MIB,
    Content,
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
from novafs.readqueue import ReadQueue

LONG_S = 600.0
"""No work is ended by it."""


@pytest.fixture
def directory() -> Iterator[Path]:
    """Of a file system with O_DIRECT: the temporary directory may have none."""
    here = Path(__file__).resolve().parents[2] / ".cache"
    here.mkdir(exist_ok=True)
    path = here / f"measure-{os.getpid()}-{random.randrange(1 << 32):x}"
    path.mkdir()
    yield path
    for found in path.iterdir():
        found.unlink()
    path.rmdir()


@contextmanager
def opened(path: Path, flags: int) -> Iterator[int]:
    fd = os.open(path, flags)
    try:
        yield fd
    finally:
        os.close(fd)


def silent(_share: float) -> None:
    pass


def test_content_does_not_compress_and_no_part_of_it_occurs_twice() -> None:
    content, other = Content(8 * MIB), Content(MIB)
    mebibytes = [content.mebibyte(number) for number in range(8)] + [other.mebibyte(0)]
    for piece in mebibytes:
        assert len(piece) == MIB
        assert len(zlib.compress(piece, 1)) > MIB * 0.99
    blocks = {piece[at : at + BLOCK_BYTES] for piece in mebibytes for at in range(0, MIB, BLOCK_BYTES)}
    assert len(blocks) == 9 * MIB // BLOCK_BYTES
    before = content.block(300)
    assert content.rewrite(300) != before
    assert content.rewrite(300) not in (before, other.block(0))


def test_a_block_is_the_same_whether_it_is_asked_for_alone_or_with_its_mebibyte() -> None:
    content = Content(2 * MIB)
    content.rewrite(257)
    whole = content.mebibyte(1)
    for number in (256, 257, 258, 511):
        at = (number - 256) * BLOCK_BYTES
        assert whole[at : at + BLOCK_BYTES] == content.block(number)
        content.check_block(number, content.block(number))
    content.check_mebibyte(1, whole)


def test_one_wrong_byte_is_found_and_named() -> None:
    content = Content(2 * MIB)
    block = bytearray(content.block(5))
    block[77] ^= 1
    with pytest.raises(CorruptionError, match=r"WRONG DATA .* 1 of 4096 bytes at byte 20,480 .* the first is byte 20,557, where "):
        content.check_block(5, bytes(block))
    whole = bytearray(content.mebibyte(1))
    whole[MIB - 1] ^= 255
    with pytest.raises(CorruptionError, match=r"the first is byte 2,097,151"):
        content.check_mebibyte(1, bytes(whole))
    with pytest.raises(CorruptionError, match=r"100 bytes at byte 0, expected 4096"):
        content.check_block(0, bytes(100))
    content.rewrite(5)
    with pytest.raises(CorruptionError, match="WRONG DATA"):  # what was there before it was written again
        content.check_block(5, Content(MIB).block(5))


def test_what_is_written_is_read_by_every_work(directory: Path) -> None:
    path, content, chooser = directory / "a", Content(2 * MIB), random.Random(1)
    written, close_s = write_all(path, content, silent)
    assert (written.operations, written.bytes, written.seconds > 0, close_s > 0) == (2, 2 * MIB, True, True)
    with pytest.raises(FileExistsError):
        write_all(path, content, silent)
    with opened(path, os.O_WRONLY) as fd:
        synced = write_synced(fd, content, LONG_S, silent, islice(random_blocks(content, chooser), 20))
    assert (synced.operations, synced.bytes) == (20, 20 * BLOCK_BYTES)
    assert 0 < len(content.rewritten) <= 20
    with opened(path, os.O_RDONLY | os.O_DIRECT) as fd:
        assert read_sequential(fd, content, LONG_S, silent, once=True).bytes == 2 * MIB
        assert read_sequential(fd, content, LONG_S, silent, once=True, mebibytes=1).bytes == MIB
        assert read_random(fd, content, LONG_S, silent, islice(random_blocks(content, chooser), 50)).operations == 50
        deep = read_deep(fd, content, LONG_S, silent, islice(random_blocks(content, chooser), 300), 16)
    assert (deep.operations, deep.bytes) == (300, 300 * BLOCK_BYTES)
    assert 0 < deep.p50_s <= deep.p90_s <= deep.p99_s <= deep.p999_s <= deep.max_s


def test_every_work_finds_a_wrong_byte(directory: Path) -> None:
    path, content = directory / "a", Content(MIB)
    write_all(path, content, silent)
    with opened(path, os.O_RDWR) as fd:
        os.pwrite(fd, b"wrong", 9 * BLOCK_BYTES)
    with opened(path, os.O_RDONLY | os.O_DIRECT) as fd:
        for work in (
            lambda: read_sequential(fd, content, LONG_S, silent, once=True),
            lambda: read_random(fd, content, LONG_S, silent, range(256)),
            lambda: read_deep(fd, content, LONG_S, silent, range(256), 16),
        ):
            with pytest.raises(CorruptionError, match=r"WRONG DATA .* at byte (0|36,864) "):
                work()


def test_a_read_past_the_end_is_an_error_and_leaves_the_queue_whole(directory: Path) -> None:
    path, content = directory / "a", Content(MIB)
    write_all(path, content, silent)
    with opened(path, os.O_RDONLY | os.O_DIRECT) as fd, ReadQueue(fd, 4, BLOCK_BYTES) as queue:
        queue.submit(MIB)
        with pytest.raises(OSError, match=r"0 of 4096 bytes were read at byte 1,048,576"):
            queue.wait()
        assert queue.under_way == 0
        for number in range(4):
            queue.submit(number * BLOCK_BYTES)
        assert queue.full
        seen = set()
        while queue.under_way:
            for read in queue.wait():
                content.check_block(read.offset // BLOCK_BYTES, queue.content(read))
                seen.add(read.offset // BLOCK_BYTES)
        assert seen == {0, 1, 2, 3}


def test_closing_a_queue_waits_for_what_is_under_way(directory: Path) -> None:
    path = directory / "a"
    write_all(path, Content(MIB), silent)
    with opened(path, os.O_RDONLY | os.O_DIRECT) as fd, ReadQueue(fd, 16, BLOCK_BYTES) as queue:
        for number in range(16):
            queue.submit(number * BLOCK_BYTES)


def test_the_time_that_is_given_ends_a_work(directory: Path) -> None:
    path, content, shares = directory / "a", Content(MIB), []
    write_all(path, content, shares.append)
    assert shares == [0.0]
    with opened(path, os.O_RDONLY | os.O_DIRECT) as fd:
        assert read_sequential(fd, content, 0.0, silent, once=False).operations == 0
        assert read_deep(fd, content, 0.0, silent, random_blocks(content, random.Random(1)), 4) == figures(array("d"), BLOCK_BYTES)
        assert read_random(fd, content, 0.05, shares.append, random_blocks(content, random.Random(1))).operations > 0
    assert all(0 <= share <= 1 for share in shares)


def test_small_files_are_gone_afterwards_also_after_an_interruption(directory: Path) -> None:
    found = small_files(directory, LONG_S, silent, most=5)
    assert {name: one.operations for name, one in found.items()} == {"create": 5, "open": 5, "remove": 5}
    assert list(directory.iterdir()) == []
    calls = []

    def interrupted(share: float) -> None:
        calls.append(share)
        if len(calls) == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        small_files(directory, LONG_S, interrupted, most=5)
    assert list(directory.iterdir()) == []


def test_latencies_become_quantiles_and_rates() -> None:
    found = figures(array("d", [0.001 * number for number in range(1, 1001)]), 4096)
    assert found.operations == 1000
    assert found.seconds == pytest.approx(500.5)
    assert found.mean_s == pytest.approx(0.5005)
    assert (found.p50_s, found.p90_s, found.p99_s) == pytest.approx((0.5005, 0.9001, 0.99001))
    assert found.max_s == 1.0
    assert found.iops == pytest.approx(1000 / 500.5)
    assert found.bytes_per_s == pytest.approx(4096 * 1000 / 500.5)
    assert figures(array("d", [0.5]), 10, 2.0).bytes_per_s == 5
    nothing = figures(array("d"), 4096)
    assert (nothing.iops, nothing.bytes_per_s) == (0, 0)


def test_a_cold_random_read_comes_to_no_chunk_twice() -> None:
    content = Content(4 * MIB)
    blocks = list(one_of_each(content, 65536, random.Random(1)))
    assert sorted(block // 16 for block in blocks) == list(range(64))
    assert len(list(one_of_each(content, 4096, random.Random(1)))) == 1024
    assert len(list(one_of_each(content, MIB, random.Random(1)))) == 4


def test_cooling_comes_before_every_cold_row_and_before_no_other(directory: Path) -> None:
    log: list[str] = []

    def cool(name: str) -> int:
        assert (directory / name).stat().st_size == MIB
        log.append("C")
        return 3 if log.count("C") == 1 else 0

    def count() -> Counters:
        log.append(".")
        return Counters(*[len(log)] * 4)

    works = frozenset({"read", "buffered", "random", "deep", "fsync"})
    bench = Bench(directory, Plan(works, MIB, 0.05, 4, 65536), cool=cool, count=count, show=lambda _title, _share: None)
    bench.run()
    states = [(row.work, row.state) for row in bench.rows]
    assert states == [
        *[("read", "cold"), ("read", "warm"), ("buffered", "cold"), ("buffered", "warm"), ("buffered", "again")],
        *[("random", "cold"), ("random", "warm"), ("deep", "cold"), ("deep", "warm"), ("fsync", "")],
    ]
    assert "".join(log) == "." + "C.." * 4 + ".." * 5 + ".." + "C"
    assert len(bench.notes) == 1
    assert bench.notes[0].startswith("read it in order, 1 MiB each: 3 chunks did not leave")
    assert all(row.counted == Counters(1, 1, 1, 1) for row in bench.rows)
