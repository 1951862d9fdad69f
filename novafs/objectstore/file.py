"""Objects as files of a local directory: the embedded default.

An object is one file under the root, its name the path; `novafs.durable` makes it. Creating refuses to replace because
link(2) does, also between processes and between hosts on a shared POSIX file system. What always holds:

- A name appears with its whole content, durable. Temporary files lie in a hidden directory of the root, where no listing looks.
- The root is never made here (`create_root` is for ``init``): one that is missing, because its file system is not mounted, is
  BucketMissingError and not an empty volume.
- Directories below the root are made when a name needs them and are never removed. An empty one costs an inode;
  removing it could take the ground from under another process that has just synced its way to it.
- A symbolic link is no object, and no listing follows one.
"""

from __future__ import annotations

import builtins
import contextlib
import errno
import heapq
import os
import stat
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Final, TypeVar
from urllib.parse import quote

from novafs import durable
from novafs.errors import (
    BucketMissingError,
    NovaError,
    ObjectExistsError,
    ObjectNotFoundError,
    StoreDeniedError,
    StoreFullError,
    StoreUnavailableError,
)
from novafs.objectstore.base import ObjectInfo, ObjectStore, StoreUsage
from novafs.objectstore.names import check_name, check_prefix, check_range, is_component, is_name
from novafs.objectstore.probe import probe_create_only

T = TypeVar("T")

TEMP_DIR: Final = ".novafs-tmp"
KNOWN_DIRS_MAX: Final = 1 << 16

_FULL: Final = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_DENIED: Final = {errno.EACCES, errno.EPERM, errno.EROFS}
_NO_LINKS: Final = {errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK, errno.EXDEV}


class FileStore(ObjectStore):
    """The contract on a directory. Thread-safe; several processes may use one directory at the same time."""

    def __init__(self, root: Path, *, ops: durable.FileOps = durable.SYSTEM) -> None:
        """root: an absolute path; nothing is read or made yet. ops: the seam for crash tests."""
        self.url = "file://" + quote(str(root))
        self.root = root
        self._ops = ops
        self._temp_dir = root / TEMP_DIR
        # Directories (relative) that this process has synced all the way from the root. Right for as long as it lives, because
        # none is ever removed; where an administrator did, making a file in it fails and the directory is forgotten.
        self._known_dirs: set[str] = set()

    # ---- reading

    def get(self, name: str, start: int = 0, length: int | None = None) -> bytes:
        check_name(name)
        check_range(start, length)
        return self._guard(lambda: self._read(name, start, length), f"reading {name}", name)

    def _read(self, name: str, start: int, length: int | None) -> bytes:
        fd = os.open(self.root / name, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode):
                raise FileNotFoundError
            end = status.st_size if length is None else min(status.st_size, start + length)
            if end <= start:
                return b""
            data = os.pread(fd, end - start, start)
            if len(data) < end - start:
                data = self._read_rest(fd, name, start, end, data)
            return data
        finally:
            os.close(fd)

    def _read_rest(self, fd: int, name: str, start: int, end: int, first: bytes) -> bytes:
        # The kernel gives at most 2 GiB a call, and less after a signal.
        parts, have = [first], len(first)
        while have < end - start:
            part = os.pread(fd, end - start - have, start + have)
            if not part:
                raise StoreUnavailableError(
                    f"object {name} in {self.url} ends at {start + have} where its size said {end}; reading again may help"
                )
            parts.append(part)
            have += len(part)
        return b"".join(parts)

    def uncache(self, name: str) -> None:
        """Have this host's page cache drop the object, so that it is read from the disk next time; for measurements. Never raises."""
        check_name(name)
        with contextlib.suppress(OSError):
            fd = os.open(self.root / name, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
            try:
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(fd)

    def head(self, name: str) -> ObjectInfo:
        check_name(name)
        return self._guard(lambda: self._info(name), f"looking at {name}", name)

    def _info(self, name: str) -> ObjectInfo:
        status = os.lstat(self.root / name)
        if not stat.S_ISREG(status.st_mode):
            raise FileNotFoundError
        return ObjectInfo(name, status.st_size, status.st_mtime)

    def list(self, prefix: str, *, after: str = "", limit: int | None = None) -> builtins.list[ObjectInfo]:
        check_prefix(prefix)
        directory, slash, beginning = prefix.rpartition("/")
        return self._guard(lambda: list(islice(self._walk(directory + slash, beginning, after), limit)), f"listing {prefix!r}")

    def _walk(self, base: str, beginning: str, after: str) -> Iterator[ObjectInfo]:
        """Objects under `base` ("" or "a/b/") whose next component starts with `beginning`, in name order.

        A directory is read when its turn has come, so that a listing with a limit reads few of them. Its turn is that of its name
        with the slash: "a-b" < "a/x" although "a" < "a-b". Never recursive: whoever can write there may nest as deep as he likes.
        """
        open_heaps = [self._read_dir(base, beginning, after)]
        while open_heaps:
            if not open_heaps[-1]:
                open_heaps.pop()
                continue
            name, is_directory = heapq.heappop(open_heaps[-1])
            if is_directory:
                open_heaps.append(self._read_dir(name, "", after))
            else:
                try:
                    yield self._info(name)
                except FileNotFoundError:
                    continue  # deleted since the directory was read

    def _read_dir(self, base: str, beginning: str, after: str) -> builtins.list[tuple[str, bool]]:
        """A heap of what a directory holds of a walk: name, with the slash where it is a directory, and whether it is one."""
        waiting: list[tuple[str, bool]] = []
        try:
            with os.scandir(self.root / base) as entries:
                for entry in entries:
                    if not entry.name.startswith(beginning) or not is_component(entry.name):
                        continue
                    name = base + entry.name
                    if entry.is_dir(follow_symlinks=False):
                        # What is so deep that nothing in it can have an object's name is passed over.
                        if is_name(name + "/x") and (after < name + "/" or after.startswith(name + "/")):
                            waiting.append((name + "/", True))
                    elif name > after and is_name(name) and entry.is_file(follow_symlinks=False):
                        waiting.append((name, False))
        except (FileNotFoundError, NotADirectoryError):
            self._check_root()
            return []
        # A heap, not a sort: the common call wants the first of a thousand.
        heapq.heapify(waiting)
        return waiting

    # ---- writing

    def create(self, name: str, data: bytes) -> None:
        check_name(name)
        path = self.root / name
        try:
            self._write(name, lambda: durable.write_new(path, data, temp_dir=self._temp_dir, ops=self._ops))
        except FileExistsError as error:
            raise ObjectExistsError(f"object {name} in {self.url}: the name is taken") from error

    def put(self, name: str, data: bytes) -> None:
        check_name(name)
        path = self.root / name
        self._write(name, lambda: durable.replace(path, data, temp_dir=self._temp_dir, ops=self._ops))

    def _write(self, name: str, write: Callable[[], None]) -> None:
        def attempt() -> None:
            parent = name.rpartition("/")[0]
            self._prepare_dir(parent)
            try:
                write()
            except FileNotFoundError:
                # Somebody has removed a directory by hand. Made anew once; the second failure is the caller's to hear of.
                self._known_dirs.clear()
                self._prepare_dir(parent)
                write()

        self._guard(attempt, f"writing {name}")

    def _prepare_dir(self, directory: str) -> None:
        """Sees that `directory` (relative) and the one for temporary files are there, and that the former is durable."""
        if TEMP_DIR not in self._known_dirs:
            durable.make_dirs(self._temp_dir, below=self.root, ops=self._ops)
            self._known_dirs.add(TEMP_DIR)
            self.clean_temps()
        if directory and directory not in self._known_dirs:
            durable.make_dirs(self.root / directory, below=self.root, ops=self._ops)
            if len(self._known_dirs) >= KNOWN_DIRS_MAX:
                self._known_dirs = {TEMP_DIR}
            self._known_dirs.add(directory)

    def clean_temps(self, *, older_than_s: float = durable.TEMP_AGE_S) -> int:
        """Delete what writers have left that died in the middle; how many. The first write of a process does it as well."""
        return self._guard(
            lambda: durable.clean_temps(self._temp_dir, older_than_s=older_than_s, ops=self._ops), "cleaning temporary files"
        )

    def delete(self, name: str) -> None:
        self.delete_many([name])

    def delete_many(self, names: Sequence[str]) -> None:
        for name in names:
            check_name(name)
        what = f"deleting {names[0]}" if len(names) == 1 else f"deleting {len(names)} objects"

        def work() -> None:
            if durable.remove(*(self.root / name for name in names), ops=self._ops) < len(names):
                self._check_root()

        self._guard(work, what)

    # ---- the rest

    def clock_s(self) -> float:
        """The file system's own clock (an NFS server's, where it is one), from the time that it gives a new file."""

        def work() -> float:
            self._check_root()
            try:
                with tempfile.TemporaryFile(dir=self.root, prefix=durable.TEMP_PREFIX) as file:
                    return os.fstat(file.fileno()).st_mtime
            except OSError as error:
                # Whoever can not write here deletes nothing either, which is what the clock is for.
                if error.errno in _DENIED | _FULL:
                    return time.time()
                raise

        return self._guard(work, "asking for the time")

    def usage(self) -> StoreUsage:
        found = self._guard(lambda: os.statvfs(self.root), "asking for free space")
        return StoreUsage(found.f_blocks * found.f_frsize, found.f_bavail * found.f_frsize)

    def probe_create_only(self) -> bool:
        return probe_create_only(self)

    # ---- errors

    def _check_root(self) -> None:
        if not self.root.is_dir():
            kind = "is no directory" if self.root.exists() else "does not exist"
            raise BucketMissingError(
                f"the directory {self.root} {kind}; mount its file system, or make a volume there with 'novafs init {self.url}'"
            )

    def _guard(self, work: Callable[[], T], doing: str, name: str | None = None) -> T:
        """Run `work` and say its OSErrors in the store's words. name: the object whose absence is ObjectNotFoundError."""
        try:
            return work()
        except FileExistsError:
            raise
        except OSError as error:
            raise self._store_error(error, doing, name) from error

    def _store_error(self, error: OSError, doing: str, name: str | None) -> NovaError:
        says = f"{self.url}: {doing}: {error.strerror or type(error).__name__}"
        if isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError):
            try:
                self._check_root()
            except BucketMissingError as missing:
                return missing
            if name is not None:
                return ObjectNotFoundError(f"no object {name} in {self.url}")
            return StoreDeniedError(
                f"{says}; a file is in the way of a directory or the other way round, or directories are removed while they are used"
            )
        if error.errno == errno.ELOOP and name is not None:
            return ObjectNotFoundError(f"no object {name} in {self.url}: there is a symbolic link of that name")
        if error.errno in _FULL:
            return StoreFullError(f"{says}; free space there, raise the quota, or run 'novafs gc {self.url}'")
        if error.errno in _NO_LINKS and error.filename2 is not None:
            return StoreDeniedError(
                f"{says}: its file system has no hard links, or the directory spans several; use one that has them (ext4, XFS, Btrfs, NFS)"
            )
        if error.errno in _DENIED:
            return StoreDeniedError(f"{says}; check owner, mode and mount options of {error.filename or self.root}")
        return StoreUnavailableError(f"{says} (errno {error.errno}); the kernel's log may tell more")


def create_root(root: Path, *, ops: durable.FileOps = durable.SYSTEM) -> None:
    """Make the directory of a new store, durably; one that exists is left as it is.

    Raises BucketMissingError where a file is in the way, StoreDeniedError, StoreFullError, StoreUnavailableError.
    """
    store = FileStore(root, ops=ops)
    try:
        durable.make_dirs(root, ops=ops)
    except NotADirectoryError as error:
        raise BucketMissingError(f"{root} can not be a directory for a volume: a file is in the way at {error.filename}") from error
    except OSError as error:
        raise store._store_error(error, "making the directory", None) from error
