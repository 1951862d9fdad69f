"""A blocking call in a worker thread that is waited for on the spot while such calls are quick.

`trio.to_thread.run_sync` costs about 0.2 ms on the way there and back, most of it in waking the event loop through its pipe: twice what
a fast disk needs to write and sync one record. So while the calls of the recent past were quick, the event loop waits for the next one
by holding still, at most `PATIENCE_S`: that is as long as a small read takes, and a bound that holds however long the disk hangs. After it,
and where calls are usually slower, the wait is an ordinary one and other tasks run.

A write that the kernel carries out by itself (`directio`) is waited for in the same two ways, with no thread.

Always holds: the call runs in a worker thread, one at a time, and has ended when `run` returns or raises; so has the write when `end` does.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from typing import Final

import outcome
import trio

from novafs.directio import DirectWriter

PATIENCE_S: Final = 0.0004
"""The longest that the event loop holds still for a call."""
SLOW_S: Final = 0.005
"""A call that takes longer counts as what is usual from then on; shorter ones bring that down slowly."""
_SHARE: Final = 0.05
"""Of each call in the moving average."""


class Promptly:
    """Runs calls of one kind. On the trio thread alone; the caller sees to it that there is one at a time."""

    def __init__(self) -> None:
        self._limiter = trio.CapacityLimiter(1)  # its own, for hung calls of others must not starve these
        self._usual_s = PATIENCE_S  # unknown: an ordinary wait, until measured
        self.on_the_spot = 0
        """Calls that had ended before the event loop went on."""

    @property
    def quick(self) -> bool:
        """Whether such calls are usually over within the bound."""
        return self._usual_s < PATIENCE_S

    def took(self, seconds: float) -> None:
        """A call took so long in its thread."""
        self._usual_s = max(self._usual_s, seconds) if seconds > SLOW_S else self._usual_s + _SHARE * (seconds - self._usual_s)

    # A KeyboardInterrupt amid the wait would leave the call running behind its caller's back; it comes at the next checkpoint.
    @trio.lowlevel.enable_ki_protection
    async def run(self, call: Callable[[], None], *, alone: bool) -> None:
        """Run `call`; returns or raises what it does. alone: nobody is likely to want a part in what follows it, so holding still keeps
        nobody from it. Cancelled only before it begins."""
        timed = _Timed(call)
        try:
            if not (alone and self.quick):
                await trio.to_thread.run_sync(timed, limiter=self._limiter)
                return
            await trio.lowlevel.checkpoint_if_cancelled()
            wait = _Wait()
            trio.lowlevel.start_thread_soon(timed, wait.deliver)
            if wait.ended.acquire(timeout=PATIENCE_S):
                self.on_the_spot += 1
            else:
                with trio.CancelScope(shield=True):
                    await wait.ordinary()
            assert wait.result is not None
            wait.result.unwrap()
        finally:
            if timed.seconds:
                self.took(timed.seconds)

    @trio.lowlevel.enable_ki_protection
    async def end(self, writer: DirectWriter, *, alone: bool) -> None:
        """Wait until the write that was begun has ended; raises OSError where it failed. Never cancelled."""
        if alone and self.quick and writer.ended_within(PATIENCE_S):
            self.on_the_spot += 1
        else:
            with trio.CancelScope(shield=True):
                await writer.wait()
        self.took(writer.seconds)
        writer.result()


class _Timed:
    """A call, and how long it took."""

    __slots__ = ("_call", "seconds")

    def __init__(self, call: Callable[[], None]) -> None:
        self._call = call
        self.seconds = 0.0

    def __call__(self) -> None:
        began_s = time.perf_counter()
        try:
            self._call()
        finally:
            self.seconds = time.perf_counter() - began_s


class _Wait:
    """Where the thread leaves the result, and how the event loop hears of it."""

    __slots__ = ("_event", "_token", "ended", "result")

    def __init__(self) -> None:
        self._event: trio.Event | None = None
        self._token = trio.lowlevel.current_trio_token()
        self.ended = threading.Lock()
        self.ended.acquire()  # released once, by the thread
        self.result: outcome.Outcome[None] | None = None

    def deliver(self, result: outcome.Outcome[None]) -> None:
        """In the thread. The lock first: whoever waits in the ordinary way sets the event's place before it tries the lock again."""
        self.result = result
        self.ended.release()
        if self._event is not None:
            # Whoever found the lock released goes on without the event, and may have ended the loop before this line.
            with contextlib.suppress(trio.RunFinishedError):
                self._token.run_sync_soon(self._event.set)

    async def ordinary(self) -> None:
        self._event = trio.Event()
        if not self.ended.acquire(blocking=False):
            await self._event.wait()
