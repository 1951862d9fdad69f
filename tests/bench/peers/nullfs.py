"""A file system of one file whose every read is answered from constant buffers: what pyfuse3 and the kernel cost by themselves.

    python -m tests.bench.peers.nullfs DIRECTORY [--size BYTES]

It mounts as NovaFS does, with the same settings of the kernel (`novafs_mount.host.tune_mount`), says "ready", and serves until it is
unmounted.
"""

from __future__ import annotations

import argparse
import errno
import os
import stat
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pyfuse3
import trio
from pyfuse3 import FUSEError

from novafs.mounttable import mount_at
from novafs_mount import mountpoint
from novafs_mount.host import tune_mount

ROOT = Path(__file__).resolve().parents[3]
NAME = "null.raw"
SIZE = 256 << 20
READ_MAX = 1 << 20
FILE_INODE = pyfuse3.ROOT_INODE + 1
END_TIMEOUT_S = 30


class NullOperations(pyfuse3.Operations):
    """A root directory that cannot be listed, and in it one file."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self._size = size
        # Each of these is answered as it is: not even a slice is copied for a common length.
        self._buffers = {length: bytes(length) for length in (4 << 10, 64 << 10, 128 << 10, READ_MAX)}

    def _attributes(self, inode: int) -> pyfuse3.EntryAttributes:
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = inode
        entry.st_mode = stat.S_IFDIR | 0o755 if inode == pyfuse3.ROOT_INODE else stat.S_IFREG | 0o444
        entry.st_size = self._size if inode == FILE_INODE else 0
        entry.entry_timeout = entry.attr_timeout = 300
        return entry

    async def getattr(self, inode: int, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        """stat(2)."""
        return self._attributes(inode)

    async def lookup(self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        """Find the file."""
        if parent_inode != pyfuse3.ROOT_INODE or name != NAME.encode():
            raise FUSEError(errno.ENOENT)
        return self._attributes(FILE_INODE)

    async def open(self, inode: int, flags: int, ctx: pyfuse3.RequestContext) -> pyfuse3.FileInfo:
        """Its pages do not stay in the kernel: the next reader asks again."""
        return pyfuse3.FileInfo(fh=inode, keep_cache=False)

    async def read(self, fh: int, off: int, size: int) -> bytes:
        """Zeros."""
        size = max(0, min(size, self._size - off))
        found = self._buffers.get(size)
        return found if found is not None else bytes(size)


async def serve(directory: Path, size: int) -> None:
    """Mount, say so, and answer until it is unmounted."""
    pyfuse3.init(NullOperations(size), str(directory), {*pyfuse3.default_options, "fsname=null"})
    try:
        device = mountpoint.device_of(directory)
        if device is not None:
            tune_mount(*device)
        print("ready", flush=True)
        await pyfuse3.main()
    finally:
        pyfuse3.close(unmount=False)


@contextmanager
def null_file(directory: Path, *, size: int = SIZE) -> Iterator[Path]:
    """The file of a null file system that is mounted at `directory`, served by a process of its own."""
    directory.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", __spec__.name, os.path.abspath(directory), "--size", str(size)]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        assert process.stdout is not None
        if process.stdout.readline() != "ready\n":
            raise RuntimeError(f"the null file system did not mount at {directory}: it ended with status {process.wait(END_TIMEOUT_S)}")
        yield directory / NAME
    finally:
        if mount_at(directory) is not None:
            subprocess.run(["fusermount3", "-uz", str(directory)], capture_output=True)
        try:
            process.wait(END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if process.stdout is not None:
            process.stdout.close()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--size", type=int, default=SIZE)
    options = parser.parse_args(arguments)
    trio.run(serve, options.directory, options.size)


if __name__ == "__main__":
    main()
