"""Raw sources of an import: runs of bytes in ascending order, holes left out, and no source that changes unnoticed.

What is promised: `runs()` yields every byte that is not in a hole exactly once, in order, and ends without an error
only if the source was whole: a file must end as long as it began and must not have been written to meanwhile.
Nothing here looks into the bytes for zeros: whoever stores them has to hash them anyway.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import AsyncGenerator, Iterator
from typing import Final

import trio

from novafs.errors import SourceError
from novafs.rawprobe import HEAD_BYTES

BLOCK_BYTES: Final = 4 << 20
"""Blocks end at multiples of this, which is one of every chunk size: only the ends of a hole cut a chunk in two."""


class FileSource:
    """A regular file or block device, open as `fd`. name: for messages. scratch: ours, so nobody else can change it."""

    def __init__(self, fd: int, name: str, *, scratch: bool = False) -> None:
        self._fd = fd
        self._name = name
        found = os.fstat(fd)
        self._regular = stat.S_ISREG(found.st_mode)
        self._watched = self._regular and not scratch
        self._mtime_ns = found.st_mtime_ns
        self.size = found.st_size if self._regular else os.lseek(fd, 0, os.SEEK_END)

    async def runs(self) -> AsyncGenerator[tuple[int, bytes], None]:
        """(offset, data) in order. Raises SourceError where the source changes or cannot be read."""
        for start, end in self._extents():
            at = start
            while at < end:
                length = min(end - at, BLOCK_BYTES - at % BLOCK_BYTES)
                yield at, await trio.to_thread.run_sync(self._read, at, length)
                at += length
        self._check_unchanged()

    def _extents(self) -> Iterator[tuple[int, int]]:
        """(start, end) of what is not a hole; all of it where the file system cannot say."""
        at = 0
        while at < self.size:
            try:
                start = os.lseek(self._fd, at, os.SEEK_DATA)
                end = os.lseek(self._fd, start, os.SEEK_HOLE)
            except OSError as error:
                if error.errno == errno.ENXIO:  # only a hole is left
                    return
                start, end = at, self.size
            if start >= self.size:
                return
            yield start, min(end, self.size)
            at = end

    def _read(self, at: int, length: int) -> bytes:
        parts = []
        while length:
            try:
                part = os.pread(self._fd, length, at)
            except OSError as error:
                raise SourceError(f"cannot read {self._name} at byte {at}: {error.strerror}") from error
            if not part:
                raise SourceError(f"{self._name} became shorter while it was read: it ends at byte {at}, expected {self.size}")
            parts.append(part)
            at += len(part)
            length -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _check_unchanged(self) -> None:
        if not self._watched:
            return
        found = os.fstat(self._fd)
        if found.st_size != self.size:
            raise SourceError(f"{self._name} changed its size from {self.size} to {found.st_size} bytes while it was read")
        if found.st_mtime_ns != self._mtime_ns:
            raise SourceError(f"{self._name} was written to while it was read: stop what writes to it, and import it again")


class StreamSource:
    """Standard input or a named pipe: bytes until its end, whose number is known only then.

    head: the first bytes, read at once, for a look at what it is. A stream is read in threads that are left behind when
    the import is cancelled, since a pipe may be silent for ever.
    """

    def __init__(self, fd: int, name: str) -> None:
        self._fd = fd
        self._name = name
        self.head = self._read(HEAD_BYTES)
        self.size = len(self.head)
        """Bytes seen so far; of the whole stream when `runs` has ended."""
        if not self.head:
            raise SourceError(f"{name} is empty: expected a disk image")

    async def runs(self) -> AsyncGenerator[tuple[int, bytes], None]:
        """(offset, data) in order. Raises SourceError where the stream cannot be read."""
        yield 0, self.head
        while True:
            block = await trio.to_thread.run_sync(self._read, BLOCK_BYTES - self.size % BLOCK_BYTES, abandon_on_cancel=True)
            if not block:
                return
            at, self.size = self.size, self.size + len(block)
            yield at, block

    def _read(self, length: int) -> bytes:
        """`length` bytes, less only at the end."""
        parts = []
        while length:
            try:
                part = os.read(self._fd, length)
            except OSError as error:
                raise SourceError(f"cannot read {self._name}: {error.strerror}") from error
            if not part:
                break
            parts.append(part)
            length -= len(part)
        return b"".join(parts)
