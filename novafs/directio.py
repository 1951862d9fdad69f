"""Durable writes that the kernel carries out by itself: Linux native AIO on files opened with O_DIRECT and O_DSYNC.

Where a thread must be woken to write and to sync, and must get the interpreter's lock twice, that takes as long as a fast disk needs for
both. Here `begin` hands the bytes to the kernel (about 15 µs) and the disk works while the event loop does something else; `ended_within`
holds still until it has ended, `wait` lets other tasks run (the kernel writes to an eventfd).

Always holds: the content of a write lies in memory of the writer's own until it has ended, so nothing can change it under the kernel;
there is one write at a time. A write has ended only when its data would survive a power cut (O_DSYNC: io_submit(2), open(2)).

For want of a library that does this without a thread: the calls are those of io_submit(2) and its siblings, which glibc does not wrap.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import Any, Final

import trio

BLOCK_BYTES: Final = 4096
"""Places and lengths of O_DIRECT writes are multiples of this: enough for any disk that Linux knows."""

CLOSE_PATIENCE_S: Final = 1.0

_CALLS: Final = {"x86_64": (206, 207, 209, 208), "aarch64": (0, 1, 2, 4)}
"""Numbers of io_setup, io_destroy, io_submit, io_getevents; the structures below are those of little-endian machines."""
_FILE_SYSTEMS: Final = frozenset((0xEF53, 0x58465342))
"""statfs(2) types of those that sync before they tell of the end of such a write: ext4 and its elders, XFS. Others are not trusted with
it: FUSE and SMB leave O_DSYNC to a server, Btrfs has lost such a sync before, overlays are as good as what is below."""
_PWRITE: Final = 1
_FLAG_RESFD: Final = 1


class Iocb(ctypes.Structure):
    """struct iocb, linux/aio_abi.h."""

    _fields_ = (
        ("data", ctypes.c_uint64),
        ("key", ctypes.c_uint32),
        ("rw_flags", ctypes.c_uint32),
        ("opcode", ctypes.c_uint16),
        ("priority", ctypes.c_int16),
        ("fd", ctypes.c_uint32),
        ("buffer", ctypes.c_uint64),
        ("length", ctypes.c_uint64),
        ("offset", ctypes.c_int64),
        ("reserved", ctypes.c_uint64),
        ("flags", ctypes.c_uint32),
        ("result_fd", ctypes.c_uint32),
    )


class IoEvent(ctypes.Structure):
    """struct io_event."""

    _fields_ = (("data", ctypes.c_uint64), ("iocb", ctypes.c_uint64), ("result", ctypes.c_int64), ("result2", ctypes.c_int64))


class _Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


_LIBC: Final[Any] = ctypes.CDLL(None, use_errno=True)
_LIBC.syscall.restype = ctypes.c_long
_syscall: Final[Any] = _LIBC.syscall


def aio_calls() -> tuple[int, int, int, int]:
    """Numbers of io_setup, io_destroy, io_submit, io_getevents, for `native_call`. Raises OSError for a machine whose are not known."""
    numbers = _CALLS.get(platform.machine())
    if numbers is None:
        raise OSError(errno.ENOSYS, f"no native AIO known for {platform.machine()}")
    return numbers


def native_call(number: int, *arguments: Any) -> int:
    """syscall(2). Raises OSError."""
    result: int = _syscall(ctypes.c_long(number), *arguments)
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


class DirectWriter:
    """Writes of up to `bytes_max` bytes, one at a time, to files that `open` gave. On one thread alone."""

    def __init__(self, bytes_max: int) -> None:
        """Raises OSError where the kernel or the machine has no such calls, or gives no more of them (/proc/sys/fs/aio-max-nr)."""
        self._setup, self._destroy, self._submit, self._getevents = aio_calls()
        context = ctypes.c_ulong(0)
        native_call(self._setup, ctypes.c_uint(1), ctypes.byref(context))
        self._context = context
        self.bytes_max = -(-bytes_max // BLOCK_BYTES) * BLOCK_BYTES
        self._memory = mmap.mmap(-1, self.bytes_max)  # begins at a page
        self._eventfd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._iocb = Iocb(
            opcode=_PWRITE,
            buffer=ctypes.addressof(ctypes.c_char.from_buffer(self._memory)),
            flags=_FLAG_RESFD,
            result_fd=self._eventfd,
        )
        self._iocbs = (ctypes.c_void_p * 1)(ctypes.addressof(self._iocb))
        self._events = (IoEvent * 1)()
        self._one = ctypes.c_long(1)
        self._began_s = 0.0
        self.busy = False
        """A write was begun and `result` has not told how it ended."""
        self.seconds = 0.0
        """From the beginning of the last write until it was seen to have ended; less where nobody was waiting for it."""

    def open(self, path: Path) -> int:
        """A descriptor for `begin`; the caller closes it. Raises OSError where the file system has no direct writes (EINVAL), or is not
        known to sync them (EOPNOTSUPP)."""
        fd = os.open(path, os.O_WRONLY | os.O_DIRECT | os.O_DSYNC | os.O_CLOEXEC | os.O_NOFOLLOW)
        if (kind := self._file_system(fd)) in _FILE_SYSTEMS:
            return fd
        os.close(fd)
        raise OSError(errno.EOPNOTSUPP, f"a file system of type {kind:#x} is not known to sync direct writes")

    def _file_system(self, fd: int) -> int:
        """Its type, as of fstatfs(2): the first word of the structure, of which 32 bits count. 0 where it does not tell."""
        found = (ctypes.c_long * 64)()
        return int(found[0]) & 0xFFFFFFFF if _LIBC.fstatfs(fd, found) == 0 else 0

    # A KeyboardInterrupt between the call and the note of it would leave a write behind that nobody waits for.
    @trio.lowlevel.enable_ki_protection
    def begin(self, fd: int, position: int, parts: Sequence[bytes]) -> None:
        """Hand the parts, one after the other and padded with zeros to whole blocks, to the kernel, for `position` (a multiple of a block).

        Raises OSError; nothing was begun then.
        """
        at = 0
        for part in parts:
            self._memory[at : at + len(part)] = part
            at += len(part)
        length = -(-at // BLOCK_BYTES) * BLOCK_BYTES
        self._memory[at:length] = bytes(length - at)
        self._iocb.fd, self._iocb.offset, self._iocb.length = fd, position, length
        self._began_s = perf_counter()
        native_call(self._submit, self._context, self._one, self._iocbs)
        self.seconds = perf_counter() - self._began_s
        self.busy = True

    def ended_within(self, timeout_s: float) -> bool:
        """Hold still until the write has ended, at most so long; whether it has. 0: only look."""
        asked_s = perf_counter()
        timeout = _Timespec(int(timeout_s), int(timeout_s % 1 * 1e9))
        try:
            ended = native_call(self._getevents, self._context, self._one, self._one, self._events, ctypes.byref(timeout)) == 1
        except InterruptedError:  # by a signal; Python's handlers run once this returns
            ended = False
        self.seconds += perf_counter() - asked_s
        return ended

    async def wait(self) -> None:
        """Wait until the write has ended while other tasks run. Cancelled before it has, it may be called again."""
        while not self.ended_within(0):
            await trio.lowlevel.wait_readable(self._eventfd)
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(self._eventfd)
        self.seconds = perf_counter() - self._began_s

    def result(self) -> None:
        """Of a write that has ended, once: raises OSError where not all of it is on the device."""
        self.busy = False
        written = self._events[0].result
        if written < 0:
            raise OSError(-written, os.strerror(-written))
        if written != self._iocb.length:
            raise OSError(errno.EIO, f"{written} of {self._iocb.length} bytes were written")

    def close(self) -> bool:
        """Give everything back; whether the last write has ended. One that has not keeps what it needs: then nothing is given back."""
        if self.busy and not self.ended_within(CLOSE_PATIENCE_S):
            return False
        native_call(self._destroy, self._context)
        os.close(self._eventfd)
        return True
