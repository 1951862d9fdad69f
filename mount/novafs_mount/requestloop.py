"""How pyfuse3 waits for the kernel's next request: several in a row while there are any, and no turn of the event loop for each.

pyfuse3 keeps several tasks that read requests, and one lock: who holds it waits for the session's descriptor to become readable. With
trio's own lock and its own wait each request takes two turns of the event loop and a change of tasks, which is more than a read from
memory takes. pyfuse3 takes both from its global `trio`, which is there to be replaced (`pyfuse3.asyncio` does so). Here

- the lock is taken without a checkpoint where it is free, and who gives it back wakes one task that waits for it, and does not hand it
  over: as long as its own request takes no checkpoint it has the lock again before that task runs; once it waits for something, the other
  task goes on with the next request;
- the wait returns at once where the descriptor is readable, at most `BATCH` times and for `BATCH_S` in a row; then all other tasks have
  their turn.

What always holds: a task that waits for the lock is woken before the lock stays free; nobody keeps the event loop for longer than one
request and `BATCH_S`; a cancelled task leaves at its next wait, or one batch later.
"""

from __future__ import annotations

import select
from time import perf_counter
from types import TracebackType
from typing import Any, Final

import pyfuse3
import trio

BATCH: Final = 32
BATCH_S: Final = 500e-6


class ReadLock:
    """Who reads the next request. The trio thread's alone."""

    def __init__(self) -> None:
        self._held = False
        self._waiting = trio.lowlevel.ParkingLot()
        self._woken = False
        """Invariant: set while a task that was woken has not run yet. More than one at a time would find nothing to do."""

    async def __aenter__(self) -> None:
        while self._held:
            try:
                await self._waiting.park()
            finally:
                # Also where it was cancelled: whoever comes next must not wait for it.
                self._woken = False
        self._held = True

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._held = False
        if self._waiting and not self._woken:
            self._woken = True
            self._waiting.unpark()


class RequestWait:
    """`wait_readable` for the session's descriptor."""

    def __init__(self) -> None:
        self._poll: select.poll | None = None
        self._left = 0
        self._until_s = 0.0

    async def wait_readable(self, fd: int) -> None:
        """See the module."""
        if self._poll is None:
            self._poll = select.poll()
            self._poll.register(fd, select.POLLIN)
        if self._left and self._poll.poll(0) and perf_counter() < self._until_s:
            self._left -= 1
            return
        await trio.lowlevel.wait_readable(fd)
        self._left = BATCH
        self._until_s = perf_counter() + BATCH_S


class _LowLevel:
    """`trio.lowlevel`, but for that wait."""

    def __init__(self) -> None:
        self.wait_readable = RequestWait().wait_readable

    def __getattr__(self, name: str) -> Any:
        return getattr(trio.lowlevel, name)


class _Trio:
    """`trio`, but for the lock and that wait. What pyfuse3 makes with it is for one session."""

    Lock = ReadLock

    def __init__(self) -> None:
        self.lowlevel = _LowLevel()

    def __getattr__(self, name: str) -> Any:
        return getattr(trio, name)


def install() -> None:
    """For the session that `pyfuse3.init` has made, before `pyfuse3.main`."""
    vars(pyfuse3)["trio"] = _Trio()
