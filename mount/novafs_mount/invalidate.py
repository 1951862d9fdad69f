"""Telling the kernel to forget: in a thread of its own, never on the trio thread.

Why a thread: `invalidate_inode` with pages waits for pages that are locked by a READ under way, and that READ is
answered by the trio thread. Called there it never returns, and the daemon stays in D state (design 6, "Kernel and
trio"). So one thread makes all such calls, and this always holds: **no READ or WRITE handler waits for it**. Only
`attributes` waits, perhaps behind an invalidation of pages, which ends when the READs before it have been answered;
`open` uses it.

The queue is bounded and merges: one entry per inode and per name however often it is asked for. Where it is full,
`inode` and `entry` say False and count it; staleness then ends with the attribute time-out (a second at most) or, for
pages, at the next open, which compares generations in any case.
"""

from __future__ import annotations

import errno
import logging
import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import Final

import pyfuse3
import trio

log = logging.getLogger(__name__)

PENDING_MAX: Final = 4096

_PAGES: Final = 2
_ATTRIBUTES: Final = 1

_NOT_THERE: Final = frozenset({errno.ENOENT, errno.ENOTCONN, errno.ENODEV, errno.EBADF, errno.EINVAL, errno.ECONNABORTED, errno.ENOTDIR})
"""The kernel does not know the inode or name (any more), or the mount is gone: nothing is left to invalidate."""


@dataclass(frozen=True, slots=True)
class InvalidatorStatistics:
    """Counts since the start; `dropped` are requests that met a full queue."""

    pending: int
    done: int
    failed: int
    dropped: int


class _Waiter:
    """An `attributes` caller: woken on the trio thread when its request has been carried out."""

    __slots__ = ("_event", "_token")

    def __init__(self) -> None:
        self._event = trio.Event()
        self._token = trio.lowlevel.current_trio_token()

    async def wait(self) -> None:
        await self._event.wait()

    def wake(self) -> None:
        try:
            self._token.run_sync_soon(self._event.set, idempotent=True)
        except trio.RunFinishedError:
            return


class Invalidator:
    """The queue and its thread. All methods but the thread's own are called on the trio thread."""

    def __init__(self, *, pending_max: int = PENDING_MAX) -> None:
        self._pending_max = pending_max
        self._changed = threading.Condition()
        # Guarded by _changed. Keys are inode numbers or (parent inode, name); oldest first.
        self._inodes: OrderedDict[int, int] = OrderedDict()
        self._entries: OrderedDict[tuple[int, bytes], None] = OrderedDict()
        self._waiters: dict[int, list[_Waiter]] = {}
        self._stopping = False
        self._done = self._failed = self._dropped = 0
        self._thread = threading.Thread(target=self._run, name="novafs-invalidate", daemon=True)
        self._thread.start()

    def inode(self, inode: int) -> bool:
        """Have the kernel drop pages and attributes of `inode`, soon. False: the queue is full, nothing was queued."""
        return self._post_inode(inode, _PAGES, None)

    def entry(self, parent: int, name: bytes) -> bool:
        """Have the kernel drop what it knows of `name` in directory `parent`, soon. False: the queue is full."""
        with self._changed:
            if (parent, name) not in self._entries:
                if self._full():
                    return False
                self._entries[(parent, name)] = None
                self._changed.notify()
        return True

    async def attributes(self, inode: int) -> bool:
        """Have the kernel drop the attributes of `inode`; returns when it has. Never from a READ or WRITE handler.

        False: the queue is full or stopped, nothing was done.
        """
        waiter = _Waiter()
        if not self._post_inode(inode, _ATTRIBUTES, waiter):
            return False
        await waiter.wait()
        return True

    def statistics(self) -> InvalidatorStatistics:
        """What has been asked for and done."""
        with self._changed:
            return InvalidatorStatistics(len(self._inodes) + len(self._entries), self._done, self._failed, self._dropped)

    def stop(self, timeout_s: float) -> bool:
        """Take no more, carry out what is queued, and wait for the thread. Blocks: call it in a worker thread.

        False: after `timeout_s` it is still inside a call; the FUSE session must then not be destroyed under it.
        """
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _full(self) -> bool:
        full = self._stopping or len(self._inodes) + len(self._entries) >= self._pending_max
        self._dropped += full
        return full

    def _post_inode(self, inode: int, what: int, waiter: _Waiter | None) -> bool:
        with self._changed:
            before = self._inodes.get(inode, 0)
            if not before and self._full():
                return False
            self._inodes[inode] = max(before, what)
            if waiter is not None:
                self._waiters.setdefault(inode, []).append(waiter)
            self._changed.notify()
        return True

    def _run(self) -> None:
        while True:
            with self._changed:
                while not (self._inodes or self._entries or self._stopping):
                    self._changed.wait()
                if self._inodes:
                    inode, what = self._inodes.popitem(last=False)
                    name = None
                elif self._entries:
                    (inode, name), _ = self._entries.popitem(last=False)
                    what = 0
                else:
                    return
                waiters = self._waiters.pop(inode, []) if name is None else []
            failed = self._invalidate(inode, name, what)
            with self._changed:
                self._done += 1
                self._failed += failed
            for waiter in waiters:
                waiter.wake()

    @staticmethod
    def _invalidate(inode: int, name: bytes | None, what: int) -> bool:
        try:
            if name is not None:
                pyfuse3.invalidate_entry(inode, name)
            else:
                pyfuse3.invalidate_inode(inode, attr_only=what == _ATTRIBUTES)
        except OSError as error:
            if error.errno in _NOT_THERE:
                return False
            log.warning("the kernel did not invalidate inode %d%s: %s", inode, f" name {name!r}" if name is not None else "", error)
            return True
        return False
