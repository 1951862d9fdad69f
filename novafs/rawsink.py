"""Where an export goes: a sparse file, a block device, or a stream; and the loop that fills one.

What is promised: a file appears under its name only when it is whole and durable, and never replaces another unless
told to; on a device or in a stream every byte is written, the zeros of holes too. All methods of a sink block and are called from
one worker thread at a time.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
import shutil
import stat
import struct
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from pathlib import Path
from typing import Final

import trio

from novafs import durable
from novafs.asynctools import open_nursery
from novafs.errors import AccessDeniedError, BusyError, ExistsError, NotFoundError, NovaError, StoreFullError, TooLargeError, UserError
from novafs.image import Image

BLOCK_BYTES: Final = 4 << 20
_ZEROS: Final = bytes(1 << 20)
_BLKZEROOUT: Final = 0x127F


class Sink(ABC):
    """Takes runs in ascending order; what is skipped between them is zeros."""

    @abstractmethod
    def write(self, offset: int, data: bytes) -> None:
        """Bytes at `offset`, behind all that was written before. Raises StoreFullError, UserError."""

    @abstractmethod
    def finish(self, size: int) -> None:
        """The disk has `size` bytes and all of it was given: make it durable (and, of a file, visible)."""

    @abstractmethod
    def close(self) -> None:
        """Give up what `finish` did not make visible."""


def write_error(name: str, error: OSError) -> NovaError:
    """The error of writing to `name` under a class of ours."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return StoreFullError(f"no space for {name}: {error.strerror}")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return AccessDeniedError(f"cannot write {name}: {error.strerror}")
    if error.errno == errno.ENOENT:
        return NotFoundError(f"cannot write {name}: its directory does not exist")
    if error.errno == errno.EBUSY:
        return BusyError(f"{name} is in use (mounted?): nothing was written")
    return UserError(f"cannot write {name}: {error.strerror}")


def check_free(destination: Path, *, force: bool) -> None:
    """Raise ExistsError where a file of this name may not be made; `force`: another file may be replaced."""
    if destination.is_dir():
        raise ExistsError(f"{destination} is a directory: write the name of a file")
    if not force and os.path.lexists(destination):
        raise ExistsError(f"{destination} exists: choose another name, or add --force to replace it")


class Workspace:
    """A new directory beside the destination, in which a file grows under its final base name.

    VMDK files hold their own name, so the temporary file must have the right one. Whatever is left in it goes with it.
    """

    def __init__(self, destination: Path, *, force: bool) -> None:
        self.destination = destination
        self._force = force
        check_free(destination, force=force)
        self._directory = destination.parent / f"{durable.TEMP_PREFIX}{secrets.token_hex(8)}"
        self.path = self._directory / destination.name
        self.raw_path = self._directory / ("raw" if destination.name != "raw" else "raw.1")
        """Where the raw disk lies from which `path` is converted."""
        try:
            self._directory.mkdir(mode=0o700)
        except OSError as error:
            raise write_error(str(destination), error) from error

    def publish(self) -> None:
        """Make the file durable and give it its place: the commit point. Raises ExistsError, StoreFullError, UserError."""
        try:
            with self.path.open("rb") as file:
                durable.SYSTEM.fsync(file.fileno())
            if not self._force:
                self._link()
            else:
                durable.SYSTEM.rename(self.path, self.destination)
            durable.fsync_dir(self.destination.parent)
        except FileExistsError as error:
            raise ExistsError(f"{self.destination} was made by somebody else meanwhile: nothing was replaced") from error
        except OSError as error:
            raise write_error(str(self.destination), error) from error

    def _link(self) -> None:
        """Give the file its name, or raise FileExistsError where it is taken."""
        try:
            durable.SYSTEM.link(self.path, self.destination)
        except OSError as error:
            # FAT and FUSE file systems (a NovaFS mount too) have no links: there, look and rename.
            if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS) or os.path.lexists(self.destination):
                raise
            durable.SYSTEM.rename(self.path, self.destination)

    def close(self) -> None:
        """Remove the directory and what is left in it."""
        shutil.rmtree(self._directory, ignore_errors=True)


class FileSink(Sink):
    """A sparse file at `path`, which is new; whoever made the path gives the file its place."""

    def __init__(self, path: Path, name: str) -> None:
        self._name = name
        try:
            # 0666 less the umask, as every program that makes a file for its user does.
            self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise write_error(name, error) from error

    def write(self, offset: int, data: bytes) -> None:
        try:
            _write_all(self._fd, offset, data)
        except OSError as error:
            raise write_error(self._name, error) from error

    def finish(self, size: int) -> None:
        try:
            os.ftruncate(self._fd, size)
            durable.SYSTEM.fsync(self._fd)
        except OSError as error:
            raise write_error(self._name, error) from error

    def close(self) -> None:
        os.close(self._fd)


class DeviceSink(Sink):
    """A block device of at least the disk's size; its content is lost from the first write on."""

    def __init__(self, path: Path, size: int) -> None:
        self._name = str(path)
        self._done = 0
        try:
            # O_EXCL on a block device: EBUSY while it is mounted or part of something.
            self._fd = os.open(path, os.O_WRONLY | os.O_EXCL | os.O_CLOEXEC)
            have = os.lseek(self._fd, 0, os.SEEK_END)
        except OSError as error:
            raise write_error(self._name, error) from error
        if have < size:
            os.close(self._fd)
            raise TooLargeError(f"{path} has {have} bytes, the image needs {size}: nothing was written")

    def write(self, offset: int, data: bytes) -> None:
        try:
            self._zero(offset)
            _write_all(self._fd, offset, data)
        except OSError as error:
            raise write_error(self._name, error) from error
        self._done = offset + len(data)

    def _zero(self, end: int) -> None:
        start, self._done = self._done, end
        if start % 512 == 0 and end % 512 == 0 and end > start:
            with contextlib.suppress(OSError):
                fcntl.ioctl(self._fd, _BLKZEROOUT, struct.pack("=QQ", start, end - start))
                return
        while start < end:
            part = _ZEROS[: min(len(_ZEROS), end - start)]
            _write_all(self._fd, start, part)
            start += len(part)

    def finish(self, size: int) -> None:
        try:
            self._zero(size)
            durable.SYSTEM.fsync(self._fd)
        except OSError as error:
            raise write_error(self._name, error) from error

    def close(self) -> None:
        os.close(self._fd)


class StreamSink(Sink):
    """A pipe, a terminal-less standard output: bytes in order, zeros included. Raises BrokenPipeError as it comes."""

    def __init__(self, fd: int, name: str) -> None:
        self._fd = fd
        self._name = name
        self._done = 0

    def write(self, offset: int, data: bytes) -> None:
        try:
            while self._done < offset:
                self._put(_ZEROS[: min(len(_ZEROS), offset - self._done)])
            self._put(data)
        except BrokenPipeError:
            raise
        except OSError as error:
            raise write_error(self._name, error) from error

    def _put(self, data: bytes) -> None:
        rest = memoryview(data)
        while rest:
            written = os.write(self._fd, rest)
            self._done += written
            rest = rest[written:]

    def finish(self, size: int) -> None:
        self.write(size, b"")

    def close(self) -> None:
        """Nothing to give up: a stream is the caller's."""


def is_stream(path: Path) -> bool:
    """Whether the path is there and is written in order: a named pipe, a terminal, /dev/null."""
    try:
        mode = path.stat().st_mode
    except OSError:
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISCHR(mode) or stat.S_ISSOCK(mode)


def _write_all(fd: int, offset: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        written = os.pwrite(fd, rest, offset)
        offset += written
        rest = rest[written:]


async def copy_image(image: Image, sink: Sink, *, workers: int, progress: Callable[[int], None]) -> int:
    """Write the committed generation of `image` to `sink`, and finish it; how many bytes were no hole.

    `workers` blocks of 4 MiB are read at once and written in order. progress: bytes of the disk done, holes included.
    Raises what `Image.read` and the sink raise.
    """
    size, copied = image.size, 0
    # One slot per block, in order: reads overlap, writes do not. Its bound is what bounds the memory.
    slots_in, slots_out = trio.open_memory_channel[tuple[int, trio.MemoryReceiveChannel[bytes]]](max(1, workers - 1))

    async def read(offset: int, length: int, slot: trio.MemorySendChannel[bytes]) -> None:
        with slot:
            await slot.send(await image.read(offset, length))

    async def plan(nursery: trio.Nursery) -> None:
        async with slots_in, aclosing(_blocks(image)) as blocks:
            async for offset, length in blocks:
                slot_in, slot_out = trio.open_memory_channel[bytes](1)
                await slots_in.send((offset, slot_out))
                nursery.start_soon(read, offset, length, slot_in)

    async with open_nursery() as nursery:
        nursery.start_soon(plan, nursery)
        async for offset, slot in slots_out:
            try:
                data = await slot.receive()
            except trio.EndOfChannel:  # its reader failed: the nursery is about to raise that
                await trio.sleep_forever()
            await trio.to_thread.run_sync(sink.write, offset, data)
            copied += len(data)
            progress(offset + len(data))
    await trio.to_thread.run_sync(sink.finish, size)
    progress(size)
    return copied


async def _blocks(image: Image) -> AsyncGenerator[tuple[int, int], None]:
    async with aclosing(image.extents()) as extents:
        async for start, length in extents:
            at, end = start, start + length
            while at < end:
                part = min(end - at, BLOCK_BYTES - at % BLOCK_BYTES)
                yield at, part
                at += part
