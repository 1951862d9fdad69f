"""Several O_DIRECT reads of one file under way at a time, on one thread: Linux native AIO, as `fio --ioengine=libaio` has it.

Threads would not do: sixteen that wait for the interpreter's lock measure the lock. The calls are those of io_submit(2) and its siblings,
which glibc does not wrap (`novafs.directio` says more; it writes).

Always holds: memory that the kernel may still write into is not given back, so `close` waits for what is under way.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from time import perf_counter
from typing import Final, NamedTuple

from novafs.directio import Iocb, IoEvent, aio_calls, native_call
from novafs.errors import UnsupportedError

_PREAD: Final = 0


class Read(NamedTuple):
    """A read that has ended. slot: its memory until the next `submit`; seconds: since it was submitted."""

    offset: int
    slot: int
    seconds: float


class ReadQueue:
    """Up to `depth` reads of `length` bytes each. Use as a context manager."""

    def __init__(self, fd: int, depth: int, length: int) -> None:
        """fd: opened with O_DIRECT; length: a multiple of the block size. Raises UnsupportedError where the kernel has no such calls."""
        try:
            self._setup, self._destroy, self._submit, self._getevents = aio_calls()
            self._context = ctypes.c_ulong(0)
            native_call(self._setup, ctypes.c_uint(depth), ctypes.byref(self._context))
        except OSError as error:
            raise UnsupportedError(
                f"reads at depth {depth} need Linux native AIO, and io_setup(2) says: {error.strerror}; "
                f"see /proc/sys/fs/aio-max-nr, or leave them out"
            ) from error
        self._length = length
        self._memory = mmap.mmap(-1, depth * length)  # begins at a page
        base = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        self._iocbs = [Iocb(data=slot, opcode=_PREAD, fd=fd, buffer=base + slot * length, length=length) for slot in range(depth)]
        self._pointers = [(ctypes.c_void_p * 1)(ctypes.addressof(iocb)) for iocb in self._iocbs]
        self._events = (IoEvent * depth)()
        self._began_s = [0.0] * depth
        self._free = list(range(depth))
        self._one = ctypes.c_long(1)
        self._depth = ctypes.c_long(depth)

    def __enter__(self) -> ReadQueue:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def under_way(self) -> int:
        """Reads that were submitted and have not been returned by `wait`."""
        return len(self._iocbs) - len(self._free)

    @property
    def full(self) -> bool:
        """Whether no other read can be submitted."""
        return not self._free

    def submit(self, offset: int) -> None:
        """Begin one. Raises OSError."""
        slot = self._free[-1]
        self._iocbs[slot].offset = offset
        self._began_s[slot] = perf_counter()
        native_call(self._submit, self._context, self._one, self._pointers[slot])
        self._free.pop()

    def wait(self) -> list[Read]:
        """Those that have ended, at least one. Raises OSError of the first that failed."""
        try:
            count = native_call(self._getevents, self._context, self._one, self._depth, self._events, None)
        except InterruptedError:  # by a signal; Python's handlers run now
            return []
        now_s = perf_counter()
        ended: list[Read] = []
        failed: OSError | None = None
        for event in self._events[:count]:
            slot = event.data
            self._free.append(slot)
            offset = self._iocbs[slot].offset
            if event.result < 0:
                failed = failed or OSError(-event.result, f"{os.strerror(-event.result)}, reading at byte {offset:,}")
            elif event.result != self._length:
                failed = failed or OSError(5, f"{event.result} of {self._length} bytes were read at byte {offset:,}")
            ended.append(Read(offset, slot, now_s - self._began_s[slot]))
        if failed is not None:
            raise failed
        return ended

    def content(self, read: Read) -> bytes:
        """What was read, before the next `submit`."""
        return self._memory[read.slot * self._length : (read.slot + 1) * self._length]

    def close(self) -> None:
        """io_destroy(2) waits for what is under way."""
        native_call(self._destroy, self._context)
