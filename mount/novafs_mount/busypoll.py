"""The event loop looks for the next request for a moment before it sleeps, while requests follow each other closely.

A guest that waits for each of its requests sends the next one some ten microseconds after an answer. An event loop that has gone to sleep
by then must be woken, on a processor that must be woken, too: that takes as long as serving a read from memory. So while the waits of
the recent past were short, the loop asks the kernel's queue over and over, at most `SPIN_S`; an average over the waits decides, so that a
mount that is idle, or that waits for disks and networks, sleeps at once and costs nothing.

Always holds: nothing waits longer than `SPIN_S` for it (a worker thread's news does not end the spin), and a machine with one processor
never spins: there it would keep the guest from running.
"""

from __future__ import annotations

import os
import select
from pathlib import Path
from time import perf_counter
from typing import Final

import trio

SPIN_S: Final = 100e-6
USUAL_S: Final = 150e-6
"""It spins while the average wait is shorter: a little more than the spin, since a wait without it has the waking in it."""
_WAIT_S_MAX: Final = 1e-3
"""As what a longer wait counts: one pause ends the spinning, and a few dozen short waits begin it."""
_SHARE: Final = 0.1
"""Of each wait in the average."""


class BusyPoll(trio.abc.Instrument):
    """Spins on one descriptor before trio sleeps. Add it with `trio.lowlevel.add_instrument`."""

    def __init__(self, fd: int) -> None:
        self._poll = select.poll()
        self._poll.register(fd, select.POLLIN)
        self._usual_s = _WAIT_S_MAX
        self._began_s = 0.0
        self.spins = 0
        self.caught = 0
        """Spins that ended with a request."""

    @property
    def spinning(self) -> bool:
        """Whether the next wait begins with a spin."""
        return self._usual_s < USUAL_S

    def before_io_wait(self, timeout: float) -> None:
        """See `trio.abc.Instrument`."""
        if timeout <= 0:
            return
        self._began_s = now_s = perf_counter()
        if self._usual_s < USUAL_S:
            self.spins += 1
            until_s = now_s + min(SPIN_S, timeout)
            while now_s < until_s:
                if self._poll.poll(0):
                    self.caught += 1
                    break
                now_s = perf_counter()

    def after_io_wait(self, timeout: float) -> None:
        """See `trio.abc.Instrument`."""
        if timeout > 0:
            self._usual_s += _SHARE * (min(perf_counter() - self._began_s, _WAIT_S_MAX) - self._usual_s)


def fuse_descriptor() -> int | None:
    """The descriptor of this process's FUSE session, which pyfuse3 keeps to itself; None where it is not found, or there are several."""
    found = []
    for entry in Path("/proc/self/fd").iterdir():
        try:
            if os.readlink(entry) == "/dev/fuse":  # noqa: PTH115
                found.append(int(entry.name))
        except OSError:  # closed meanwhile
            continue
    return found[0] if len(found) == 1 else None


def busy_poll(fd: int | None) -> BusyPoll | None:
    """For the session of this process, after it was mounted, by its descriptor; None where it can not help."""
    return BusyPoll(fd) if fd is not None and len(os.sched_getaffinity(0)) > 1 else None
