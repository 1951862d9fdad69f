"""Raw sources: every byte that is no hole, once, in order, and no change unnoticed."""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest

from novafs.errors import SourceError
from novafs.rawsource import BLOCK_BYTES, FileSource, StreamSource

Run = Callable[..., Any]


async def collect(source: FileSource | StreamSource) -> list[tuple[int, bytes]]:
    async with aclosing(source.runs()) as runs:
        return [item async for item in runs]


def sparse_file(path: Path, size: int, pieces: dict[int, bytes]) -> int:
    with path.open("wb") as file:
        for offset, data in pieces.items():
            file.seek(offset)
            file.write(data)
        file.truncate(size)
    return os.open(path, os.O_RDONLY)


@pytest.fixture
def opened() -> Any:
    """Closes what it was given."""
    fds: list[int] = []
    yield fds.append
    for fd in fds:
        os.close(fd)


def check_runs(runs: list[tuple[int, bytes]], size: int) -> bytes:
    """The disk that the runs make, having looked at their order and their cuts."""
    disk = bytearray(size)
    end = 0
    for offset, data in runs:
        assert offset >= end
        assert data
        assert offset // BLOCK_BYTES == (offset + len(data) - 1) // BLOCK_BYTES, "a run crosses no block's end"
        end = offset + len(data)
        disk[offset:end] = data
    assert end <= size
    return bytes(disk)


def test_holes_are_left_out_and_the_rest_comes_in_order(tmp_path: Path, run: Run, opened: Any) -> None:
    draw = random.Random(1)
    size = 3 * BLOCK_BYTES + 12345
    pieces = {0: draw.randbytes(5000), BLOCK_BYTES - 4096: draw.randbytes(10_000), 2 * BLOCK_BYTES + 65536: draw.randbytes(70_000)}
    fd = sparse_file(tmp_path / "a", size, pieces)
    opened(fd)
    source = FileSource(fd, "a")
    runs = run(collect, source)
    assert source.size == size
    assert check_runs(runs, size) == (tmp_path / "a").read_bytes()
    assert sum(len(data) for _, data in runs) < 200_000, "holes were read"


@pytest.mark.parametrize("size", [1, 4096, BLOCK_BYTES + 1])
def test_a_file_that_is_one_hole_has_no_runs(tmp_path: Path, run: Run, opened: Any, size: int) -> None:
    fd = sparse_file(tmp_path / "a", size, {})
    opened(fd)
    assert run(collect, FileSource(fd, "a")) == []


def test_a_file_system_that_knows_no_holes_gives_all(tmp_path: Path, run: Run, opened: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    fd = sparse_file(tmp_path / "a", 100_000, {})
    opened(fd)
    real = os.lseek

    def lseek(fd: int, offset: int, how: int) -> int:
        if how in (os.SEEK_DATA, os.SEEK_HOLE):
            raise OSError(22, "Invalid argument")
        return real(fd, offset, how)

    monkeypatch.setattr(os, "lseek", lseek)
    assert run(collect, FileSource(fd, "a")) == [(0, bytes(100_000))]


def changing(source: FileSource, change: Callable[[], object]) -> Callable[[], Awaitable[None]]:
    async def main() -> None:
        async with aclosing(source.runs()) as runs:
            async for _ in runs:
                change()

    return main


def test_a_file_that_shrinks_while_it_is_read_is_refused(tmp_path: Path, run: Run, opened: Any) -> None:
    path = tmp_path / "a"
    fd = sparse_file(path, 3 * BLOCK_BYTES, {0: b"x" * 3 * BLOCK_BYTES})
    opened(fd)
    with pytest.raises(
        SourceError, match=rf"a became shorter while it was read: it ends at byte {BLOCK_BYTES + 7}, expected {3 * BLOCK_BYTES}"
    ):
        run(changing(FileSource(fd, "a"), lambda: os.truncate(path, BLOCK_BYTES + 7)))


def test_a_file_that_grows_while_it_is_read_is_refused(tmp_path: Path, run: Run, opened: Any) -> None:
    path = tmp_path / "a"
    fd = sparse_file(path, 5000, {0: b"x" * 5000})
    opened(fd)
    with pytest.raises(SourceError, match="changed its size from 5000 to 6000 bytes"):
        run(changing(FileSource(fd, "a"), lambda: os.truncate(path, 6000)))


def test_a_file_that_is_written_to_while_it_is_read_is_refused(tmp_path: Path, run: Run, opened: Any) -> None:
    path = tmp_path / "a"
    fd = sparse_file(path, 5000, {0: b"x" * 5000})
    opened(fd)

    def write() -> None:
        os.utime(path, ns=(1, 1))

    with pytest.raises(SourceError, match="was written to while it was read: stop what writes to it"):
        run(changing(FileSource(fd, "a"), write))
    run(changing(FileSource(fd, "a", scratch=True), write))


def test_a_file_that_cannot_be_read_is_named_with_the_byte(tmp_path: Path, run: Run, opened: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    fd = sparse_file(tmp_path / "a", 5000, {0: b"x" * 5000})
    opened(fd)
    source = FileSource(fd, "a")

    def fail(_fd: int, _length: int, _at: int) -> bytes:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "pread", fail)
    with pytest.raises(SourceError, match="cannot read a at byte 0: Input/output error"):
        run(collect, source)


@pytest.mark.parametrize("size", [1, 65536, 65537, BLOCK_BYTES, 2 * BLOCK_BYTES + 77])
def test_a_stream_gives_all_its_bytes_however_they_come(run: Run, opened: Any, size: int) -> None:
    content = random.Random(size).randbytes(size)
    reader, writer = os.pipe()
    opened(reader)

    def feed() -> None:
        with open(writer, "wb", buffering=0) as pipe:
            rest = memoryview(content)
            while rest:
                rest = rest[pipe.write(rest[:1000_003]) or 0 :]

    thread = threading.Thread(target=feed)
    thread.start()
    source = StreamSource(reader, "stdin")
    runs = run(collect, source)
    thread.join()
    assert source.head == content[:65536]
    assert check_runs(runs, size) == content
    assert source.size == size


def test_an_empty_stream_is_refused(opened: Any) -> None:
    reader, writer = os.pipe()
    opened(reader)
    os.close(writer)
    with pytest.raises(SourceError, match="stdin is empty"):
        StreamSource(reader, "stdin")


def test_a_stream_that_cannot_be_read_is_a_clear_error(tmp_path: Path, opened: Any) -> None:
    fd = os.open(tmp_path, os.O_RDONLY)
    opened(fd)
    with pytest.raises(SourceError, match="cannot read stdin: Is a directory"):
        StreamSource(fd, "stdin")
