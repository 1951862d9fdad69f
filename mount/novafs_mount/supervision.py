"""What is said about a mount while it runs: a status line, a sign of life, and at the end how much is still to be stored.

All of it for systemd (`sdnotify`), the last for the log as well. Two tasks beside the request loop:

- `watch` proves that the mount answers. It opens the root directory in a thread: an OPENDIR that the kernel hands to the request
  loop each time, and that is answered from memory. It does not list it, since a listing asks the store: a store that is away must
  not have the daemon killed that holds what is not stored yet. An answer that is an error is one, too; none, or the kernel's own
  (a connection that is gone), is not, and after `WatchdogSec=` systemd kills and restarts the daemon.
- `report` renews the status line, and while the mount ends asks systemd for more time for as long as there is something to store:
  a stop takes as long as the upload does, and no longer.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Final

import trio

from novafs import logs
from novafs.units import format_duration, format_size
from novafs_mount.sdnotify import Notifier

if TYPE_CHECKING:
    from novafs.volume import Volume

log = logging.getLogger(__name__)

REPORT_S: Final = 5.0
END_REPORT_S: Final = 1.0
END_LOG_S: Final = 10.0
EXTEND_S: Final = 90.0
"""What opening and the end may take from each report on: longer than `Volume` waits for a store that does not answer."""
_GONE: Final = (errno.ENOTCONN, errno.ECONNABORTED)


def answers(path: Path) -> bool:
    """Whether the mount at `path` answers through the kernel, be it with an error. Blocks until it does."""
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
    except OSError as error:
        return error.errno not in _GONE
    return True


async def watch(path: Path, notifier: Notifier) -> None:
    """Feed the watchdog for as long as the mount answers, three times in its period. Until cancelled."""
    if notifier.watchdog_s is None:
        return
    told = False
    # Its own: calls of others that hang must not pass for a mount that does not answer.
    asking = trio.CapacityLimiter(1)
    while True:
        # One thread at a time: a mount that does not answer must not collect them.
        if await trio.to_thread.run_sync(answers, path, limiter=asking, abandon_on_cancel=True):
            notifier.watchdog()
            told = False
        elif not told:
            told = True
            log.error("%s: the mount does not answer any more: systemd restarts it within %s", path, format_duration(notifier.watchdog_s))
        await trio.sleep(notifier.watchdog_s / 3)


async def keep_opening(notifier: Notifier) -> None:
    """Have systemd wait while the volume is opened, until cancelled: a long journal that is replayed must not be cut off, to begin anew.

    Each request to a store that is away fails in its time, so opening ends by itself; what hangs all the same keeps the event loop from
    turning, and this from going on.
    """
    while True:
        notifier.extend(EXTEND_S)
        await trio.sleep(EXTEND_S / 3)


class Reporter:
    """The status line of one mount."""

    def __init__(self, path: Path, notifier: Notifier, *, open_files: Callable[[], int]) -> None:
        self._path = path
        self._notifier = notifier
        self._open_files = open_files
        self._ending = trio.Event()
        self._leaving = False
        self._note = ""

    @property
    def is_leaving(self) -> bool:
        """Whether it was asked to end."""
        return self._leaving

    def leaving(self, note: str = "", wait_s: float = 0.0) -> None:
        """It was asked to end; `note` says what it waits for, at most `wait_s`."""
        self._leaving, self._note = True, note
        self._notifier.stopping()
        if wait_s:
            # It may be an hour: systemd must not kill what it was told to wait for.
            self._notifier.extend(wait_s + EXTEND_S)
        self._notifier.status(f"unmounting {self._path}{note}")

    def ending(self) -> None:
        """The mount has ended; what is dirty is being stored."""
        self._ending.set()

    async def run(self, volume: Volume) -> None:
        """Report until cancelled."""
        while not self._ending.is_set():
            logs.flush_repeated()
            self._notifier.status(f"unmounting {self._path}{self._note}" if self._leaving else self._serving(volume))
            with trio.move_on_after(REPORT_S):
                await self._ending.wait()
        self._notifier.stopping()
        logged_s = -END_LOG_S
        before: tuple[int, int] | None = None
        while True:
            at_risk = volume.writeback.at_risk
            text = f"{format_size(at_risk.bytes)} of {_counted(at_risk.images, 'image')} left to store" if at_risk.images else "closing"
            self._notifier.status(f"{self._path} is unmounted; {text}")
            if (now := volume.stored_so_far) != before:
                before = now
                self._notifier.extend(EXTEND_S)
            if at_risk.images and trio.current_time() - logged_s >= END_LOG_S:
                logged_s = trio.current_time()
                log.info("%s: %s", self._path, text)
            await trio.sleep(END_REPORT_S)

    def _serving(self, volume: Volume) -> str:
        at_risk = volume.writeback.at_risk
        unsaved = "everything stored"
        if at_risk.images:
            of = _counted(at_risk.images, "image")
            unsaved = f"{format_size(at_risk.bytes)} of {of} to store, the oldest {format_duration(at_risk.age_s)} old"
        return f"serving {self._path}: {_counted(self._open_files(), 'file')} open; {unsaved}"


def _counted(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"
