"""A disk whose power can be cut: what every call did, and what may be left of it.

`DiskLog` does the calls for real (without waiting for a device) and tells each to `record`. `DiskModel` takes the same
calls and knows what is durable: content of a file up to its last sync, names of a directory up to its last sync.
`DiskModel.crash` gives what a machine may find after the power cut: of what was not synced, each sector of each file is
as before, as after any of the writes since, or garbage (then in whole blocks); each change of a name is there or not.
"""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from novafs.durable import FileOps

SECTOR = 512
BLOCK = 4096

Call = tuple[Any, ...]


class DiskLog(FileOps):
    """The calls on files below `root`. `fault(operation)` may raise OSError before one is done."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.record: Callable[[Call], None] = lambda call: None
        self.fault: Callable[[str], None] = lambda operation: None
        self._inodes = 0
        self._open: dict[int, int] = {}
        self._positions: dict[int, int] = {}
        self._names: dict[str, int] = {}

    def _relative(self, path: Path) -> str:
        return str(path.relative_to(self.root))

    def adopt(self, names: dict[str, int]) -> None:
        """Files that are there already: name -> inode, as a model has them."""
        self._names = dict(names)
        self._inodes = max(names.values(), default=0)

    def create(self, path: Path, mode: int) -> int:
        self.fault("create")
        fd = super().create(path, mode)
        self._inodes += 1
        self._open[fd], self._positions[fd] = self._inodes, 0
        self._names[self._relative(path)] = self._inodes
        self.record(("names", ((self._relative(path), self._inodes),)))
        return fd

    def open_rw(self, path: Path) -> int:
        fd = super().open_rw(path)
        self._open[fd], self._positions[fd] = self._names[self._relative(path)], 0
        return fd

    def write(self, fd: int, data: memoryview) -> int:
        self.fault("write")
        taken = super().write(fd, data)
        self.record(("write", self._open[fd], self._positions[fd], bytes(data[:taken])))
        self._positions[fd] += taken
        return taken

    def pwritev(self, fd: int, views: list[memoryview], offset: int) -> int:
        self.fault("write")
        taken = super().pwritev(fd, views, offset)
        self.record(("write", self._open[fd], offset, b"".join(views)[:taken]))
        return taken

    def fdatasync(self, fd: int) -> None:
        self.fsync(fd)

    def fsync(self, fd: int) -> None:
        try:
            self.fault("sync")
        except OSError:
            # The kernel marks the pages clean: a later sync says yes, and the content is lost all the same.
            self.record(("sync_failed", self._open[fd]))
            raise
        self.record(("sync", self._open[fd]))

    def fsync_dir(self, path: Path) -> None:
        self.fault("sync_dir")
        if not path.is_dir():
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
        if path == self.root or self.root in path.parents:
            self.record(("sync_dir", self._relative(path)))

    def link(self, source: Path, target: Path) -> None:
        self.fault("link")
        super().link(source, target)
        inode = self._names[self._relative(target)] = self._names[self._relative(source)]
        self.record(("names", ((self._relative(target), inode),)))

    def rename(self, source: Path, target: Path) -> None:
        self.fault("rename")
        super().rename(source, target)
        inode = self._names[self._relative(target)] = self._names.pop(self._relative(source))
        self.record(("names", ((self._relative(source), None), (self._relative(target), inode))))

    def unlink(self, path: Path) -> None:
        self.fault("unlink")
        super().unlink(path)
        del self._names[self._relative(path)]
        self.record(("names", ((self._relative(path), None),)))

    def mkdir(self, path: Path, mode: int) -> None:
        self.fault("mkdir")
        super().mkdir(path, mode)
        self.record(("names", ((self._relative(path), -1),)))

    def close(self, fd: int) -> None:
        super().close(fd)
        del self._open[fd], self._positions[fd]


class _File:
    """Content as synced, and the writes since, oldest first. lost: of those, how many a failed sync has given up."""

    __slots__ = ("lost", "pending", "synced")

    def __init__(self, content: bytes = b"") -> None:
        self.synced = bytearray(content)
        self.pending: list[tuple[int, bytes]] = []
        self.lost: list[tuple[int, bytes]] = []


class DiskState(dict[str, bytes | None]):
    """What a machine finds: content of each file by relative name, None for a directory."""

    def write_to(self, root: Path) -> dict[str, int]:
        """Make the files below `root`; name -> inode for `DiskLog.adopt` and `DiskModel`."""
        inodes: dict[str, int] = {}
        for name in sorted(self):
            content = self[name]
            if content is None:
                (root / name).mkdir(parents=True, exist_ok=True)
            else:
                (root / name).parent.mkdir(parents=True, exist_ok=True)
                (root / name).write_bytes(content)
                inodes[name] = len(inodes) + 1
        return inodes


class DiskModel:
    """What is durable after the calls that it was told."""

    def __init__(self, state: DiskState | None = None) -> None:
        self._files: dict[int, _File] = {}
        self._names: dict[str, int] = {}
        self._changes: list[tuple[tuple[str, int | None], ...]] = []
        number = 0
        for name in sorted(state or {}):
            assert state is not None
            content = state[name]
            if content is None:
                self._names[name] = -1
            else:
                number += 1
                self._files[number] = _File(content)
                self._names[name] = number

    def tell(self, call: Call) -> None:
        """The next call."""
        kind = call[0]
        if kind == "write":
            self._files.setdefault(call[1], _File()).pending.append((call[2], call[3]))
        elif kind == "sync":
            file = self._files.setdefault(call[1], _File())
            for offset, data in file.pending:
                _put(file.synced, offset, data)
                file.lost = [entry for entry in file.lost if not _inside(entry, offset, len(data))]
            file.pending.clear()
        elif kind == "sync_failed":
            file = self._files.setdefault(call[1], _File())
            file.lost += file.pending
            file.pending = []
        elif kind == "names":
            self._changes.append(call[1])
        elif kind == "sync_dir":
            left: list[tuple[tuple[str, int | None], ...]] = []
            for change in self._changes:
                if all(str(Path(name).parent) == call[1] for name, _ in change):
                    _rename(self._names, change)
                else:
                    left.append(change)
            self._changes = left
        else:
            raise ValueError(f"unknown call {kind}")

    def whole(self) -> DiskState:
        """Everything, synced or not: a process died, the machine goes on."""
        return self._state(dict(self._names), self._changes, lambda file: _after(file, len(file.pending) + len(file.lost)))

    def crash(self, rng: random.Random) -> DiskState:
        """One of the states that a power cut may leave."""
        manner = rng.choice(["drop", "keep", "sectors", "sectors", "garbage"])
        if manner == "drop":
            names: list[tuple[tuple[str, int | None], ...]] = []
        elif manner == "keep":
            names = self._changes
        elif rng.random() < 0.5:  # a journaling file system: in order
            names = self._changes[: rng.randint(0, len(self._changes))]
        else:
            names = [change for change in self._changes if rng.random() < 0.5]

        def content(file: _File) -> bytes:
            count = len(file.pending) + len(file.lost)
            if manner == "drop" or not count:
                return bytes(file.synced)
            if manner == "keep":
                return _after(file, count)
            return _torn(file, rng, garbage=manner == "garbage")

        return self._state(dict(self._names), names, content)

    def _state(
        self, names: dict[str, int], changes: list[tuple[tuple[str, int | None], ...]], content: Callable[[_File], bytes]
    ) -> DiskState:
        for change in changes:
            _rename(names, change)
        state = DiskState()
        for name in sorted(names):
            if all(str(parent) == "." or names.get(str(parent)) == -1 for parent in Path(name).parents):
                inode = names[name]
                state[name] = None if inode < 0 else content(self._files.setdefault(inode, _File()))
        return state


def _rename(names: dict[str, int], change: tuple[tuple[str, int | None], ...]) -> None:
    for name, inode in change:
        if inode is None:
            names.pop(name, None)
        else:
            names[name] = inode


def _put(content: bytearray, offset: int, data: bytes) -> None:
    if len(content) < offset:
        content.extend(bytes(offset - len(content)))
    content[offset : offset + len(data)] = data


def _inside(entry: tuple[int, bytes], offset: int, length: int) -> bool:
    return offset <= entry[0] and entry[0] + len(entry[1]) <= offset + length


def _after(file: _File, count: int) -> bytes:
    content = bytearray(file.synced)
    for offset, data in [*file.lost, *file.pending][:count]:
        _put(content, offset, data)
    return bytes(content)


def _torn(file: _File, rng: random.Random, *, garbage: bool) -> bytes:
    """Each sector that was written since the last sync is as it was after one of the writes; or each block is garbage, or not."""
    writes = [*file.lost, *file.pending]
    content = bytearray(file.synced)
    size = rng.choice([len(content), max(len(content), *(offset + len(data) for offset, data in writes))])
    content.extend(bytes(size - len(content)))
    unit = BLOCK if garbage else SECTOR
    touched = sorted(
        {at // unit for offset, data in writes for at in range(offset, offset + len(data), unit)}
        | {(offset + len(data) - 1) // unit for offset, data in writes if data}
    )
    if len(touched) > 64:  # the zeros of a new segment: a run of them shares its fate
        cut = rng.choice(touched)
        keep = rng.choice([True, False])
        plain = _after(file, len(writes))
        for number in touched:
            if (number < cut) == keep:
                part = plain[number * unit : (number + 1) * unit]
                content[number * unit : number * unit + len(part)] = part
        return bytes(content[:size])
    for number in touched:
        start, end = number * unit, (number + 1) * unit
        if garbage and rng.random() < 0.3:
            content[start:end] = rng.randbytes(max(0, min(end, size) - start))
            continue
        version = rng.randint(0, len(writes))
        for offset, data in writes[:version]:
            low, high = max(start, offset), min(end, offset + len(data))
            if low < high:
                content[low:high] = data[low - offset : high - offset]
    return bytes(content[:size])
