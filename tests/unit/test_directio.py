"""Writes that the kernel carries out by itself: what is on the disk when they have ended, and how they fail."""

from __future__ import annotations

import errno
import os
import resource
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from novafs import directio
from novafs.directio import BLOCK_BYTES, DirectWriter
from tests.support.fixtures import trio_test

SIZE = 16 * BLOCK_BYTES
MEMORY = Path("/dev/shm")


@pytest.fixture
def writer() -> Iterator[DirectWriter]:
    writer = DirectWriter(4 * BLOCK_BYTES)
    yield writer
    writer.close()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file full of ones."""
    path = tmp_path / "file"
    path.write_bytes(b"\x01" * SIZE)
    return path


@pytest.fixture
def anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """The file system of the test's directory counts as one that syncs; a test has no power cuts."""
    monkeypatch.setattr(DirectWriter, "_file_system", lambda *_: min(directio._FILE_SYSTEMS))


@pytest.fixture
def fd(writer: DirectWriter, path: Path, anywhere: None) -> Iterator[int]:
    fd = writer.open(path)
    yield fd
    os.close(fd)


def write(writer: DirectWriter, fd: int, position: int, *parts: bytes) -> None:
    writer.begin(fd, position, parts)
    assert writer.ended_within(10)
    writer.result()


def test_the_parts_follow_each_other_and_zeros_fill_the_last_block(writer: DirectWriter, fd: int, path: Path) -> None:
    write(writer, fd, BLOCK_BYTES, b"abc", b"", b"d" * 5000)
    content = path.read_bytes()
    written = b"abc" + b"d" * 5000
    assert content == b"\x01" * BLOCK_BYTES + written.ljust(2 * BLOCK_BYTES, b"\0") + b"\x01" * (SIZE - 3 * BLOCK_BYTES)


def test_a_short_write_leaves_nothing_of_a_longer_one_before(writer: DirectWriter, fd: int, path: Path) -> None:
    write(writer, fd, 0, b"x" * 4 * BLOCK_BYTES)
    write(writer, fd, 8 * BLOCK_BYTES, b"y")
    assert path.read_bytes()[8 * BLOCK_BYTES : 9 * BLOCK_BYTES] == b"y".ljust(BLOCK_BYTES, b"\0")


@trio_test
async def test_other_tasks_may_run_while_it_is_waited_for(tmp_path: Path, anywhere: None) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(SIZE))
    writer = DirectWriter(BLOCK_BYTES)
    fd = writer.open(path)
    for number in range(20):
        writer.begin(fd, 0, [bytes([number]) * BLOCK_BYTES])
        await writer.wait()
        writer.result()
        assert not writer.busy
        assert writer.seconds > 0
        assert path.read_bytes()[:1] == bytes([number])
    os.close(fd)
    writer.close()


def test_a_write_that_can_not_begin_raises_and_the_next_one_can(writer: DirectWriter, fd: int, path: Path) -> None:
    with path.open("rb") as read_only, pytest.raises(OSError, match="Bad file descriptor"):
        writer.begin(read_only.fileno(), 0, [b"x"])
    assert not writer.busy
    write(writer, fd, 0, b"x")
    assert path.read_bytes()[:1] == b"x"


def test_a_write_that_fails_says_so_at_its_end(writer: DirectWriter, fd: int, path: Path) -> None:
    """Or at its beginning: that depends on the file system."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (SIZE, hard))
    try:
        with pytest.raises(OSError, match="large") as caught:
            write(writer, fd, SIZE, b"x")
        assert caught.value.errno == errno.EFBIG
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.stat().st_size == SIZE
    write(writer, fd, 0, b"x")


def test_a_closed_writer_leaves_a_write_that_nobody_waited_for_to_the_kernel(path: Path, anywhere: None) -> None:
    writer = DirectWriter(BLOCK_BYTES)
    fd = writer.open(path)
    writer.begin(fd, 0, [b"z" * BLOCK_BYTES])
    os.close(fd)
    writer.close()
    assert path.read_bytes()[:1] == b"z"


def test_a_file_system_that_is_not_known_to_sync_them_has_none(writer: DirectWriter) -> None:
    with tempfile.NamedTemporaryFile(dir=MEMORY) as file:
        file.write(b"\0" * SIZE)
        file.flush()
        before = set(os.listdir("/proc/self/fd"))
        with pytest.raises(OSError, match="not known") as caught:
            os.close(writer.open(Path(file.name)))
        assert caught.value.errno == errno.EOPNOTSUPP
        assert set(os.listdir("/proc/self/fd")) == before
