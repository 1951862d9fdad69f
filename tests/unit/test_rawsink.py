"""Where exports go: whole and durable under their name, or not at all."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from typing import Any

import pytest

from novafs import durable
from novafs.errors import (
    AccessDeniedError,
    BusyError,
    ExistsError,
    FrameCorruptError,
    NotFoundError,
    StoreFullError,
    TooLargeError,
    UserError,
)
from novafs.rawsink import BLOCK_BYTES, DeviceSink, FileSink, StreamSink, Workspace, copy_image, is_stream, write_error

Run = Callable[..., Any]


@pytest.mark.parametrize(
    ("number", "kind"),
    [
        (errno.ENOSPC, StoreFullError),
        (errno.EDQUOT, StoreFullError),
        (errno.EFBIG, StoreFullError),
        (errno.EACCES, AccessDeniedError),
        (errno.EROFS, AccessDeniedError),
        (errno.ENOENT, NotFoundError),
        (errno.EBUSY, BusyError),
        (errno.EIO, UserError),
    ],
)
def test_what_the_system_says_gets_a_class_of_ours(number: int, kind: type[Exception]) -> None:
    error = write_error("/x/out.raw", OSError(number, os.strerror(number)))
    assert type(error) is kind
    assert "/x/out.raw" in str(error)


# --- workspace --------------------------------------------------------------------------------------------------


def test_a_file_has_its_own_base_name_while_it_grows_and_its_place_when_it_is_whole(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path / "out.vmdk", force=False)
    assert workspace.path.name == "out.vmdk"
    assert workspace.path.parent.parent == tmp_path
    workspace.path.write_text("whole")
    assert not (tmp_path / "out.vmdk").exists()
    workspace.publish()
    workspace.close()
    assert [path.name for path in tmp_path.iterdir()] == ["out.vmdk"]


def test_what_was_not_published_is_removed(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path / "raw", force=False)
    assert workspace.raw_path != workspace.path
    workspace.raw_path.write_text("half")
    workspace.path.write_text("half")
    workspace.close()
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_appears_meanwhile_is_kept(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path / "out", force=False)
    workspace.path.write_text("ours")
    (tmp_path / "out").write_text("theirs")
    with pytest.raises(ExistsError, match="was made by somebody else meanwhile: nothing was replaced"):
        workspace.publish()
    workspace.close()
    assert (tmp_path / "out").read_text() == "theirs"


class NoLinks(durable.FileOps):
    """A file system without hard links: FAT, FUSE."""

    def link(self, source: Path, target: Path) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")


def test_without_links_a_file_is_published_all_the_same_and_replaces_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(durable, "SYSTEM", NoLinks())
    workspace = Workspace(tmp_path / "out", force=False)
    workspace.path.write_text("ours")
    workspace.publish()
    assert (tmp_path / "out").read_text() == "ours"
    workspace.close()
    second = Workspace(tmp_path / "second", force=False)
    second.path.write_text("ours")
    (tmp_path / "second").write_text("theirs")
    with pytest.raises(AccessDeniedError):
        second.publish()
    second.close()
    assert (tmp_path / "second").read_text() == "theirs"


# --- sinks --------------------------------------------------------------------------------------------------------


def test_a_file_that_is_there_is_not_opened(tmp_path: Path) -> None:
    (tmp_path / "x").touch()
    with pytest.raises(UserError, match="cannot write out: File exists"):
        FileSink(tmp_path / "x", "out")


def test_a_file_is_sparse_and_has_its_size(tmp_path: Path) -> None:
    sink = FileSink(tmp_path / "x", "out")
    sink.write(1 << 20, b"data")
    sink.finish(8 << 20)
    sink.close()
    status = (tmp_path / "x").stat()
    assert status.st_size == 8 << 20
    assert status.st_blocks * 512 < 1 << 20


def test_a_stream_has_its_zeros(tmp_path: Path) -> None:
    with (tmp_path / "x").open("wb") as file:
        sink = StreamSink(file.fileno(), "out")
        sink.write(3, b"abc")
        sink.write(10, b"d")
        sink.finish(3 << 20)
        sink.close()
    content = (tmp_path / "x").read_bytes()
    assert content == b"\0\0\0abc\0\0\0\0d".ljust(3 << 20, b"\0")


def test_a_stream_whose_reader_has_gone_says_so() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with pytest.raises(BrokenPipeError):
        StreamSink(writer, "out").write(0, b"x")
    os.close(writer)


def test_zeros_are_written_to_a_device_that_cannot_zero_by_itself(tmp_path: Path) -> None:
    path = tmp_path / "device"
    path.write_bytes(b"old!" * 4096)
    sink = DeviceSink(path, 16384)  # a file knows no BLKZEROOUT, as some devices do not
    sink.write(1000, b"new")
    sink.write(8192, b"x" * 512)
    sink.finish(16384)
    sink.close()
    assert path.read_bytes() == (bytes(1000) + b"new").ljust(8192, b"\0") + b"x" * 512 + bytes(16384 - 8704)
    with pytest.raises(TooLargeError, match="has 16384 bytes, the image needs 16385: nothing was written"):
        DeviceSink(path, 16385)
    with pytest.raises(NotFoundError):
        DeviceSink(tmp_path / "missing", 1)


@pytest.mark.parametrize("method", ["pwrite", "ftruncate", "fsync"])
def test_errors_of_the_system_are_told_with_the_destinations_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    def fail(*_args: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    sink = FileSink(tmp_path / "x", "/mnt/out.raw")
    device = DeviceSink(tmp_path / "x", 0)
    monkeypatch.setattr(os, method, fail)
    with pytest.raises(StoreFullError, match=r"no space for /mnt/out.raw"):
        sink.write(0, b"x")
        sink.finish(10)
    if method != "ftruncate":
        with pytest.raises(StoreFullError, match="no space for"):
            device.write(0, b"x")
            device.finish(10)
    sink.close()
    device.close()


def test_streams_are_told_from_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "file").touch()
    assert is_stream(tmp_path / "fifo")
    assert is_stream(Path("/dev/null"))
    assert not is_stream(tmp_path / "file")
    assert not is_stream(tmp_path / "missing")


# --- the loop -----------------------------------------------------------------------------------------------------


class FakeImage:
    """What `copy_image` uses of an image: extents, and reads that come in any order."""

    def __init__(self, size: int, extents: list[tuple[int, int]], bad_at: int = -1) -> None:
        self.size = size
        self.content = bytearray(size)
        draw = random.Random(1)
        for offset, length in extents:
            self.content[offset : offset + length] = draw.randbytes(length)
        self._extents = extents
        self._bad_at = bad_at
        self.most_at_once = self._now = 0
        self._draw = draw

    async def extents(self) -> AsyncGenerator[tuple[int, int], None]:
        import trio

        for extent in self._extents:
            await trio.lowlevel.checkpoint()
            yield extent

    async def read(self, offset: int, length: int) -> bytes:
        import trio

        self._now += 1
        self.most_at_once = max(self.most_at_once, self._now)
        for _ in range(self._draw.randrange(20)):
            await trio.lowlevel.checkpoint()
        self._now -= 1
        if offset <= self._bad_at < offset + length:
            raise FrameCorruptError(b"\1" * 32, "pack 00", 7, "bad")
        return bytes(self.content[offset : offset + length])


EXTENTS = [(0, 65536), (BLOCK_BYTES - 65536, 3 * BLOCK_BYTES), (5 * BLOCK_BYTES, 100)]


@pytest.mark.parametrize("workers", [1, 2, 8])
def test_blocks_are_read_at_once_and_written_in_order(run: Run, tmp_path: Path, workers: int) -> None:
    image: Any = FakeImage(6 * BLOCK_BYTES + 5, EXTENTS)
    done: list[int] = []
    with (tmp_path / "x").open("wb") as file:
        copied = run(lambda: copy_image(image, StreamSink(file.fileno(), "out"), workers=workers, progress=done.append))
    assert (tmp_path / "x").read_bytes() == image.content
    assert copied == sum(length for _, length in EXTENTS)
    assert done == sorted(done)
    assert done[-1] == image.size
    assert image.most_at_once <= workers + 1
    assert workers == 1 or image.most_at_once > 1


def test_an_empty_image_is_an_empty_file(run: Run, tmp_path: Path) -> None:
    image: Any = FakeImage(0, [])
    sink = FileSink(tmp_path / "x", "out")
    assert run(lambda: copy_image(image, sink, workers=4, progress=lambda _: None)) == 0
    sink.close()
    assert (tmp_path / "x").read_bytes() == b""


def test_a_damaged_chunk_ends_the_copy_with_its_own_error(run: Run, tmp_path: Path) -> None:
    image: Any = FakeImage(6 * BLOCK_BYTES, EXTENTS, bad_at=2 * BLOCK_BYTES)
    sink = FileSink(tmp_path / "x", "out")
    with pytest.raises(FrameCorruptError, match="pack 00"):
        run(lambda: copy_image(image, sink, workers=4, progress=lambda _: None))
    sink.close()


def test_a_full_destination_ends_the_copy_with_its_own_error(run: Run) -> None:
    image: Any = FakeImage(6 * BLOCK_BYTES, EXTENTS)
    fd = os.open("/dev/full", os.O_WRONLY)
    with pytest.raises(StoreFullError, match="no space for /dev/full"):
        run(lambda: copy_image(image, StreamSink(fd, "/dev/full"), workers=4, progress=lambda _: None))
    os.close(fd)
