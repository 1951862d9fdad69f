"""A tiny file system that uses the real `Invalidator` on the real kernel; run as a program by `test_invalidate`.

Two files: `slow`, whose READ waits until it is let go, and `fast`. Prints one line per fact that it has seen.
"""

from __future__ import annotations

import errno
import os
import stat
import sys
from collections import Counter
from pathlib import Path

import pyfuse3
import trio

from novafs_mount.invalidate import Invalidator

FILES = {b"slow": 2, b"fast": 3}
SIZE = 4096


class Probe(pyfuse3.Operations):
    supports_dot_lookup = False

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.reading = trio.Event()
        self.let_go = trio.Event()

    def _attributes(self, inode: int) -> pyfuse3.EntryAttributes:
        out = pyfuse3.EntryAttributes()
        out.st_ino = inode
        out.entry_timeout = out.attr_timeout = 3600
        out.st_mode = stat.S_IFDIR | 0o755 if inode == pyfuse3.ROOT_INODE else stat.S_IFREG | 0o644
        out.st_size = SIZE
        return out

    async def lookup(self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        self.calls[f"lookup {name.decode()}"] += 1
        if name not in FILES:
            raise pyfuse3.FUSEError(errno.ENOENT)
        return self._attributes(FILES[name])

    async def getattr(self, inode: int, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        self.calls[f"getattr {inode}"] += 1
        return self._attributes(inode)

    async def open(self, inode: int, flags: int, ctx: pyfuse3.RequestContext) -> pyfuse3.FileInfo:
        return pyfuse3.FileInfo(fh=inode, keep_cache=True)

    async def read(self, fh: int, off: int, size: int) -> bytes:
        self.calls[f"read {fh}"] += 1
        if fh == FILES[b"slow"]:
            self.reading.set()
            await self.let_go.wait()
        return bytes([self.calls[f"read {fh}"]]) * SIZE

    async def flush(self, fh: int) -> None:
        """Nothing to do."""


def read(path: Path) -> bytes:
    fd = os.open(path, os.O_RDONLY)
    try:
        return os.pread(fd, SIZE, 0)
    finally:
        os.close(fd)


async def main(directory: Path) -> None:
    probe = Probe()
    pyfuse3.init(probe, str(directory), {"fsname=probe", "default_permissions"})
    invalidator = Invalidator(pending_max=2)
    try:
        await check(probe, invalidator, directory)
    finally:
        # Whatever failed: a thread that waits for a page could not even be killed.
        probe.let_go.set()
    pyfuse3.close(unmount=True)


async def check(probe: Probe, invalidator: Invalidator, directory: Path) -> None:
    in_thread = trio.to_thread.run_sync
    async with trio.open_nursery() as nursery:
        nursery.start_soon(pyfuse3.main)

        # Pages: dropped, so the next read asks again.
        assert await in_thread(read, directory / "fast") == b"\x01" * SIZE
        assert await in_thread(read, directory / "fast") == b"\x01" * SIZE
        assert invalidator.inode(FILES[b"fast"])
        while invalidator.statistics().done < 1:
            await trio.sleep(0.001)
        assert await in_thread(read, directory / "fast") == b"\x02" * SIZE
        print("pages dropped", flush=True)

        # Attributes: dropped when the call returns; pages stay.
        await in_thread(os.stat, directory / "fast")
        before = probe.calls["getattr 3"]
        await in_thread(os.stat, directory / "fast")
        assert probe.calls["getattr 3"] == before
        assert await invalidator.attributes(FILES[b"fast"])
        await in_thread(os.stat, directory / "fast")
        assert probe.calls["getattr 3"] == before + 1
        assert await in_thread(read, directory / "fast") == b"\x02" * SIZE
        print("attributes dropped", flush=True)

        # Names. The file is held open: with the name the kernel would drop the inode, and its pages.
        held = await in_thread(os.open, directory / "fast", os.O_RDONLY)
        assert probe.calls["lookup fast"] == 1
        assert invalidator.entry(pyfuse3.ROOT_INODE, b"fast")
        while invalidator.statistics().done < 3:
            await trio.sleep(0.001)
        await in_thread(os.stat, directory / "fast")
        assert probe.calls["lookup fast"] == 2
        print("name dropped", flush=True)

        # What the kernel does not know is no failure.
        assert await invalidator.attributes(12345)
        assert invalidator.statistics().failed == 0
        print("unknown inode ignored", flush=True)

        # A page that a READ under way has locked: the invalidation waits, the loop does not.
        slow_read = trio.Event()

        async def read_slow() -> None:
            await in_thread(read, directory / "slow")
            slow_read.set()

        nursery.start_soon(read_slow)
        await probe.reading.wait()
        done = invalidator.statistics().done
        assert invalidator.inode(FILES[b"slow"])
        while invalidator.statistics().pending:
            await trio.sleep(0.001)
        for _ in range(20):
            await in_thread(os.stat, directory)
            assert await in_thread(read, directory / "fast") == b"\x02" * SIZE
        await in_thread(os.close, held)
        assert invalidator.statistics().done == done, "the invalidation was expected to wait for the page"
        print("requests answered while an invalidation waits", flush=True)

        # Meanwhile the queue is bounded, and merges what is asked for twice.
        assert invalidator.inode(100)
        assert invalidator.inode(101)
        assert invalidator.inode(100)
        assert not invalidator.inode(102)
        assert not invalidator.entry(1, b"x")
        assert not await invalidator.attributes(103)
        assert invalidator.statistics().dropped == 3
        print("queue bounded", flush=True)
        assert not await in_thread(invalidator.stop, 0.01)

        probe.let_go.set()
        assert await in_thread(invalidator.stop, 30)
        assert invalidator.statistics().done == done + 3
        assert not invalidator.inode(FILES[b"fast"])
        print("stopped", flush=True)
        await slow_read.wait()
        pyfuse3.terminate()


if __name__ == "__main__":
    trio.run(main, Path(sys.argv[1]))
