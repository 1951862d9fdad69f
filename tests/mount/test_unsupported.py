"""The table of `docs/semantics.md`: what the caller of each call sees that FUSE through pyfuse3 does not carry."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import select
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.fuse

FALLOC = {"allocate": 0, "keep size": 1, "punch hole": 3, "collapse": 8, "zero range": 0x10, "insert": 0x20}
FICLONE, FICLONERANGE, FS_IOC_GETFLAGS, FS_IOC_FIEMAP, BLKGETSIZE64 = 0x40049409, 0x4020940D, 0x80086601, 0xC020660B, 0x80081272
F_OFD_SETLK = 37


@pytest.fixture
def fd(place: Path) -> Iterator[int]:
    (place / "a.raw").write_bytes(bytes(range(256)) * 1024)
    number = os.open(place / "a.raw", os.O_RDWR)
    yield number
    os.close(number)


def fails(number: int) -> pytest.RaisesExc[OSError]:
    return pytest.raises(OSError, check=lambda error: error.errno == number)


@pytest.mark.parametrize("mode", FALLOC.values(), ids=FALLOC)
def test_fallocate_is_eopnotsupp(fd: int, mode: int) -> None:
    """semantics: S21."""
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.fallocate(fd, mode, ctypes.c_long(0), ctypes.c_long(65536)) == -1
    assert ctypes.get_errno() == errno.EOPNOTSUPP


def test_posix_fallocate_falls_back_to_writing(fd: int) -> None:
    os.posix_fallocate(fd, 200_000, 200_000)
    assert os.fstat(fd).st_size == 400_000
    assert os.pread(fd, 256, 256 * 1000) == bytes(range(256))
    assert os.pread(fd, 10, 399_990) == bytes(10)


def test_seek_hole_shows_data_to_the_end(fd: int) -> None:
    """semantics: S21."""
    os.ftruncate(fd, 10 << 20)
    assert os.lseek(fd, 5 << 20, os.SEEK_DATA) == 5 << 20
    assert os.lseek(fd, 0, os.SEEK_HOLE) == 10 << 20
    with fails(errno.ENXIO):
        os.lseek(fd, 10 << 20, os.SEEK_DATA)


def test_copy_file_range_within_the_mount_copies(fd: int, place: Path) -> None:
    """semantics: S21."""
    target = os.open(place / "b.raw", os.O_RDWR | os.O_CREAT)
    done = 0
    while done < 100_000:
        moved = os.copy_file_range(fd, target, 100_000 - done, done, done)
        assert moved > 0
        done += moved
    os.close(target)
    assert (place / "b.raw").read_bytes() == (place / "a.raw").read_bytes()[:100_000]


def test_copy_file_range_to_another_file_system_is_exdev(fd: int, tmp_path: Path) -> None:
    with (tmp_path / "out").open("wb") as out, fails(errno.EXDEV):
        os.copy_file_range(fd, out.fileno(), 4096, 0, 0)


def test_reflinks_are_refused(fd: int, place: Path) -> None:
    """semantics: S21."""
    target = os.open(place / "b.raw", os.O_RDWR | os.O_CREAT)
    with pytest.raises(OSError) as found:
        fcntl.ioctl(target, FICLONE, fd)
    os.close(target)
    assert found.value.errno in (errno.EOPNOTSUPP, errno.ENOTTY)


@pytest.mark.parametrize(("request_", "size"), [(FS_IOC_GETFLAGS, 8), (BLKGETSIZE64, 8)])
def test_ioctls_are_enotty(fd: int, request_: int, size: int) -> None:
    """semantics: S21."""
    with fails(errno.ENOTTY):
        fcntl.ioctl(fd, request_, bytes(size))


def test_fiemap_is_eopnotsupp(fd: int) -> None:
    """semantics: S21."""
    with fails(errno.EOPNOTSUPP):
        fcntl.ioctl(fd, FS_IOC_FIEMAP, bytes(32))


def test_an_unnamed_file_is_eopnotsupp(place: Path) -> None:
    """semantics: S21."""
    with fails(errno.EOPNOTSUPP):
        os.open(place, os.O_TMPFILE | os.O_RDWR)


def test_locks_are_kept_by_this_kernel(fd: int, place: Path) -> None:
    """semantics: S21."""
    other = os.open(place / "a.raw", os.O_RDWR)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with fails(errno.EAGAIN):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        fcntl.flock(fd, fcntl.LOCK_UN)
        # Open file description locks: what QEMU takes on an image.
        lock = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 100, 1, 0)
        fcntl.fcntl(fd, F_OFD_SETLK, lock)
        with fails(errno.EAGAIN):
            fcntl.fcntl(other, F_OFD_SETLK, lock)
    finally:
        os.close(other)


def test_poll_is_always_ready(fd: int) -> None:
    """semantics: S21."""
    poll = select.poll()
    poll.register(fd, select.POLLIN | select.POLLOUT)
    assert poll.poll(0) == [(fd, select.POLLIN | select.POLLOUT)]


def test_non_waiting_reads_are_eopnotsupp(fd: int) -> None:
    """semantics: S21."""
    with fails(errno.EOPNOTSUPP):
        os.preadv(fd, [bytearray(4096)], 0, os.RWF_NOWAIT)


def test_syncfs_and_sync_file_range_succeed_and_promise_nothing(fd: int) -> None:
    """semantics: S21. FUSE has no request for them (SYNCFS is virtiofs's): fsync is what makes data durable."""
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.syncfs(fd) == 0
    assert libc.sync_file_range(fd, ctypes.c_long(0), ctypes.c_long(4096), 7) == 0


def test_an_advice_is_taken(fd: int) -> None:
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)


def test_a_directory_can_be_synced(place: Path) -> None:
    directory = os.open(place, os.O_RDONLY | os.O_DIRECTORY)
    os.fsync(directory)
    os.close(directory)
