"""Local files made durable: the only module that writes, syncs, links and renames for keeps.

What is promised: when `write_new`, `replace`, `remove` and `make_dirs` return, their effect survives power loss; when
they raise or the machine dies within them, there is the old state or the new one under the name, never a part of
a file. Errors are the operating system's own (`OSError` and its subclasses): callers know what the file stands for
and say it in their own words.

How: the content goes to a temporary file, which is fsynced before it gets its name by link(2) (refuses to replace) or rename(2)
(replaces); then the directory is fsynced. **The link or the rename is the commit point.** A failed fsync is never repeated on the same
file (the kernel may have dropped the pages and would say yes the second time): the temporary file is given up.
O_TMPFILE would leave no temporary files behind, but NFS, FUSE and older overlay file systems lack it, and two ways would have to be proved.

A temporary file is recognised by its name (`TEMP_PREFIX`) and is locked (flock) while its writer lives. `clean_temps` deletes one only
when it gets that lock and the file is older than an hour: the lock protects the writers of this host, the age those of other
hosts on a shared file system that does not carry locks.

Every call that changes the file system goes through a `FileOps`: crash tests put one in that stops at each call and keeps,
drops or garbles what was not synced.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
import stat
import time
from pathlib import Path
from typing import Final

TEMP_PREFIX: Final = ".novafs-tmp-"
TEMP_AGE_S: Final = 3600.0
FILE_MODE: Final = 0o600
"""Images hold other people's secrets: nobody but the owner reads them unless the directory's administrator says so."""
DIR_MODE: Final = 0o700

_NO_LOCKS: Final = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}
_NO_DIR_FSYNC: Final = {errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS}


class FileOps:
    """The system calls that change files, one method each; what a crash test replaces. Raises OSError. Thread-safe."""

    def create(self, path: Path, mode: int) -> int:
        """A new, empty file, open for writing; its descriptor. FileExistsError where the name is taken."""
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, mode)

    def write(self, fd: int, data: memoryview) -> int:
        """Write at the descriptor's position; how many bytes were taken."""
        return os.write(fd, data)

    def open_rw(self, path: Path) -> int:
        """An existing file, open for reading and writing; its descriptor. FileNotFoundError where there is none."""
        return os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)

    def pwritev(self, fd: int, views: list[memoryview], offset: int) -> int:
        """Write the views, one after the other, at `offset`; how many bytes were taken."""
        return os.pwritev(fd, views, offset)

    def fdatasync(self, fd: int) -> None:
        """Content of a file, and its size where that grew, are on the device when it returns."""
        os.fdatasync(fd)

    def fsync(self, fd: int) -> None:
        """Content and size of a file are on the device when it returns."""
        os.fsync(fd)

    def fsync_dir(self, path: Path) -> None:
        """The names in a directory are on the device when it returns."""
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        except OSError as error:
            # Some network file systems have no such call: there a name is durable when the call that made it returns.
            if error.errno not in _NO_DIR_FSYNC:
                raise
        finally:
            os.close(fd)

    def link(self, source: Path, target: Path) -> None:
        """A second name for a file. FileExistsError where the name is taken."""
        os.link(source, target)

    def rename(self, source: Path, target: Path) -> None:
        """Give a file another name, replacing the file that had it, in one step."""
        os.rename(source, target)  # noqa: PTH104 - beside its siblings of os

    def unlink(self, path: Path) -> None:
        """Take a name away. FileNotFoundError where there is none."""
        os.unlink(path)  # noqa: PTH108

    def mkdir(self, path: Path, mode: int) -> None:
        """A new directory. FileExistsError where the name is taken."""
        os.mkdir(path, mode)  # noqa: PTH102

    def close(self, fd: int) -> None:
        """Give the descriptor back; says nothing about durability."""
        os.close(fd)


SYSTEM: Final = FileOps()
"""The real file system."""


def write_new(path: Path, data: bytes | memoryview, *, temp_dir: Path | None = None, mode: int = FILE_MODE, ops: FileOps = SYSTEM) -> None:
    """Make the file `path` with that content, whole and durable, and never replace one.

    temp_dir: where the temporary file is made, on the same file system; the directory of `path` by default.
    Raises FileExistsError where the name is taken (the file that has it is durable by then, too), FileNotFoundError
    where a directory is missing, and any other OSError with nothing under the name, except where the last step, the
    fsync of the directory, failed: then the file may be there, and may be lost again.
    """
    with _Temp(path, data, temp_dir, mode, ops) as temp:
        try:
            ops.link(temp.path, path)
        except FileExistsError:
            # An NFS server may have made the link and lost the answer: then our file has two names.
            # Otherwise somebody else's link may not be synced yet, and the caller will build on what it is told here.
            if os.fstat(temp.fd).st_nlink < 2:
                ops.fsync_dir(path.parent)
                raise
        temp.remove()
        ops.fsync_dir(path.parent)


def replace(path: Path, data: bytes | memoryview, *, temp_dir: Path | None = None, mode: int = FILE_MODE, ops: FileOps = SYSTEM) -> None:
    """Make the file `path` with that content, or replace it in one step; durable on return.

    Raises OSError with the old state kept, except where the fsync of the directory failed: then the new one may be lost again.
    """
    with _Temp(path, data, temp_dir, mode, ops) as temp:
        ops.rename(temp.path, path)
        temp.named = False
        ops.fsync_dir(path.parent)


def remove(*paths: Path, ops: FileOps = SYSTEM) -> int:
    """Delete the files; durable on return, with one fsync for each directory. How many there were; no error for those that are no files.

    The directory is synced even where there was nothing to delete: an earlier call may have failed between the two.
    Raises OSError; some of the files may be gone then.
    """
    removed = 0
    for path in paths:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError, IsADirectoryError):
            ops.unlink(path)
            removed += 1
    for directory in dict.fromkeys(path.parent for path in paths):
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            ops.fsync_dir(directory)
    return removed


def make_dirs(path: Path, *, below: Path | None = None, mode: int = DIR_MODE, ops: FileOps = SYSTEM) -> None:
    """Make the directory `path` with those above it; durable on return. Those that exist are left as they are.

    below: nothing is made at or above it, and it must contain `path`; what is between is synced even where it exists,
    because whoever made it may be about to sync it only now. Without it, the first directory that exists counts as durable.
    Raises FileNotFoundError where `below` is missing, NotADirectoryError where a file is in the way, and other OSErrors.
    """
    missing = [path]
    for parent in path.parents:
        if parent == below or (below is None and parent.is_dir()):
            break
        missing.append(parent)
    for directory in reversed(missing):
        try:
            ops.mkdir(directory, mode)
        except FileExistsError:
            if not directory.is_dir():
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(directory)) from None
        ops.fsync_dir(directory.parent)


def fsync_dir(path: Path, *, ops: FileOps = SYSTEM) -> None:
    """Make the names in a directory durable. Raises OSError."""
    ops.fsync_dir(path)


def clean_temps(directory: Path, *, older_than_s: float = TEMP_AGE_S, ops: FileOps = SYSTEM) -> int:
    """Delete temporary files that a crash has left in `directory`; how many. Never one that a live process of this host writes.

    A directory that is missing has none. A file that can not be opened or locked stays. Raises OSError where the directory can not be read.
    """
    try:
        names = [entry.name for entry in os.scandir(directory) if entry.name.startswith(TEMP_PREFIX)]
    except FileNotFoundError:
        return 0
    removed = 0
    for name in names:
        with contextlib.suppress(OSError):
            removed += _remove_dead_temp(directory / name, time.time() - older_than_s, ops)
    return removed


def _remove_dead_temp(path: Path, made_before_s: float, ops: FileOps) -> bool:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode) or status.st_mtime > made_before_s:
            return False
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # With the lock held nobody writes it: a writer that locks after us sees that its file has lost its name.
        ops.unlink(path)
        return True
    finally:
        os.close(fd)


class _Temp:
    """A synced temporary file, open and locked as long as the block lasts; on leaving, its name is gone."""

    def __init__(self, target: Path, data: bytes | memoryview, directory: Path | None, mode: int, ops: FileOps) -> None:
        self._ops = ops
        self._data = memoryview(data).cast("B")
        self._directory = directory or target.parent
        self._mode = mode
        self.fd = -1
        self.named = False

    def __enter__(self) -> _Temp:
        try:
            self._open()
            rest = self._data
            while rest:
                rest = rest[self._ops.write(self.fd, rest) :]
            self._ops.fsync(self.fd)
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self._close()

    def _open(self) -> None:
        while True:
            self.path = self._directory / (TEMP_PREFIX + secrets.token_hex(8))
            try:
                self.fd = self._ops.create(self.path, self._mode)
            except FileExistsError:
                continue
            self.named = True
            try:
                fcntl.flock(self.fd, fcntl.LOCK_EX)
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise
            # `clean_temps` may have had the lock first, and taken the file for a dead one.
            if os.fstat(self.fd).st_nlink:
                return
            self._close()

    def remove(self) -> None:
        """Take the temporary name away. One that can not be taken away is a leftover, and no failure of what was done."""
        if self.named:
            self.named = False
            with contextlib.suppress(OSError):
                self._ops.unlink(self.path)

    def _close(self) -> None:
        try:
            self.remove()
        finally:
            # Closed whatever the removal says: the descriptor holds the lock.
            if self.fd >= 0:
                fd, self.fd = self.fd, -1
                # Errors of close are nothing new: the fsync before it would have had them.
                with contextlib.suppress(OSError):
                    self._ops.close(fd)
