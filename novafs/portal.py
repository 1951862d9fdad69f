"""A trio run in a thread of its own, for programs that know nothing of trio: `Portal.call` runs an async function there and waits.

What is promised:

- `call` may be used from any number of threads at once, each call a task of its own.
- A caller that is interrupted while it waits (Ctrl-C) cancels its task, and sees KeyboardInterrupt once that has ended; interrupted again,
  or after `LET_GO_S`, it sees it at once.
- `close` takes no more calls, lets those that run end, leaves the context manager that the portal was opened with, and raises what that
  raised.
- The thread is a daemon, so a program that never closes ends all the same; who wants an orderly end there calls `close` from `atexit`.
- In a child made by fork there is no such thread: `call` raises ClosedError there, and nothing of the parent's is touched.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import threading
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from contextlib import AbstractAsyncContextManager
from typing import Any, Final, Generic, TypeVar

import trio

from novafs.asynctools import open_nursery
from novafs.errors import BugError, ClosedError, UnsupportedError

log = logging.getLogger(__name__)

T = TypeVar("T")
R = TypeVar("R")

END_S: Final = 60.0
"""How long `close` lets calls run on before it cancels them."""
SLICE_S: Final = 0.25
"""How late Ctrl-C may be seen at worst."""
LET_GO_S: Final = 10.0
"""How long an interrupted caller waits for what it has cancelled."""


class _Answer(Generic[R]):
    """What a call gave, handed from the portal's thread to the one that waits. Not a `Future`: an interrupt in the middle of a condition
    variable's own Python code can leave its lock held, and the portal's thread would wait for it; a lock alone has no such middle.
    """

    __slots__ = ("_error", "_lock", "_value", "given")

    def __init__(self) -> None:
        self.given = False
        self._value: R
        self._error: BaseException | None = None
        self._lock = threading.Lock()
        self._lock.acquire()

    def give(self, value: R) -> None:
        """The call is over; the first of `give` and `fail` counts."""
        if not self.given:
            self._value = value
            self.given = True
            self._lock.release()

    def fail(self, error: BaseException) -> None:
        """The call is over, with an error."""
        if not self.given:
            self._error = error
            self.given = True
            self._lock.release()

    def wait(self, timeout_s: float = math.inf) -> None:
        """Until it is given, or so long. By one thread, once, or again where the first wait was interrupted."""
        deadline_s = time.monotonic() + timeout_s
        # In slices: a signal that arrives just before a thread begins to wait does not wake it, and is seen between two waits.
        while not self._lock.acquire(timeout=max(0.0, min(SLICE_S, deadline_s - time.monotonic()))):
            if time.monotonic() >= deadline_s:
                return

    def result(self) -> R:
        """The value, or raises the error. After `wait`."""
        if self._error is not None:
            raise self._error
        return self._value


class Portal(Generic[T]):
    """One thread with one trio run, inside of one async context manager. `value` is what that gave."""

    value: T

    def __init__(self, make: Callable[[], AbstractAsyncContextManager[T]], *, name: str) -> None:
        """Start, and wait until `make()` is entered. name: of what is open, for messages. Raises what entering raises."""
        self.name = name
        self._pid = os.getpid()
        self._token: trio.lowlevel.TrioToken | None = None
        self._nursery: trio.Nursery
        self._lock = threading.Lock()
        self._closing = False
        self._close: trio.Event
        self._ended: Future[None] = Future()
        entered: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, args=(make, entered), name=f"novafs {name}", daemon=True)
        self._thread.start()
        try:
            entered.result()
        except Exception:
            self._thread.join()
            raise
        except BaseException:  # interrupted while it was being opened
            entered.add_done_callback(lambda _: self._request_close())
            raise

    def _run(self, make: Callable[[], AbstractAsyncContextManager[T]], entered: Future[None]) -> None:
        try:
            trio.run(self._main, make, entered)
        except BaseException as error:
            if not entered.done():
                entered.set_exception(error)
            self._ended.set_exception(error)
        else:
            self._ended.set_result(None)

    async def _main(self, make: Callable[[], AbstractAsyncContextManager[T]], entered: Future[None]) -> None:
        self._close = trio.Event()
        async with make() as self.value:
            self._token = trio.lowlevel.current_trio_token()
            async with open_nursery() as self._nursery:
                entered.set_result(None)
                await self._close.wait()
                # Calls that have been taken end on their own; there are no new ones.
                self._nursery.cancel_scope.deadline = trio.current_time() + END_S

    @property
    def open(self) -> bool:
        """Whether calls are taken, here."""
        return not self._closing and self._pid == os.getpid() and not self._ended.done()

    def call(self, function: Callable[..., Awaitable[R]], *arguments: Any) -> R:
        """`await function(*arguments)` on the portal's thread. Raises what it raises, ClosedError, UnsupportedError."""
        if self._pid != os.getpid():
            raise ClosedError(f"{self.name}: was opened by process {self._pid}, before this one was forked; open it here anew")
        if threading.get_ident() == self._thread.ident:
            raise UnsupportedError(f"{self.name}: was called from inside of itself (by a model?), and would wait for itself for ever")
        answer: _Answer[R] = _Answer()
        scope = trio.CancelScope()

        async def task() -> None:
            try:
                with scope:
                    answer.give(await function(*arguments))
                if scope.cancelled_caught:
                    answer.fail(ClosedError(f"{self.name}: the call was cancelled"))
            except trio.Cancelled:  # the run itself ends
                answer.fail(ClosedError(f"{self.name}: was closed meanwhile"))
                raise
            except BaseException as error:
                answer.fail(error)

        started: list[bool] = []

        def start() -> None:
            started.append(True)
            self._nursery.start_soon(task)

        def stop() -> None:
            scope.cancel()
            if not started:  # interrupted before it was posted
                answer.fail(ClosedError(f"{self.name}: the call was cancelled"))

        # An interrupt may come between any two steps here, after the task has begun as well.
        try:
            self._begin(start)
            answer.wait()
        except ClosedError:
            raise
        except BaseException:
            if not answer.given and self._token is not None:
                with contextlib.suppress(BaseException):  # too late; or interrupted again
                    self._post(self._token, stop)
                    answer.wait(LET_GO_S)
            raise
        return answer.result()

    def spawn(self, function: Callable[[], Awaitable[object]]) -> None:
        """Run `await function()` on the portal's thread and do not wait; nothing where it is closed, or in a child. Errors are logged.

        For destructors: those run wherever the collector of garbage does, on the portal's own thread and in the middle of `call` as
        well, so this waits for no lock and for no answer.
        """
        token = self._token
        if token is None or self._pid != os.getpid():
            return

        async def task() -> None:
            try:
                await function()
            except Exception as error:
                log.warning("%s: giving something back failed: %s", self.name, error)

        def start() -> None:
            if not self._ended.done() and not self._close.is_set():
                self._nursery.start_soon(task)

        with contextlib.suppress(trio.RunFinishedError):
            token.run_sync_soon(start)

    def _begin(self, start: Callable[[], object]) -> None:
        with self._lock:
            if self._closing or self._token is None or self._ended.done():
                raise ClosedError(f"{self.name}: is closed")
            self._post(self._token, start)

    def _post(self, token: trio.lowlevel.TrioToken, work: Callable[[], object]) -> None:
        try:
            token.run_sync_soon(work)
        except trio.RunFinishedError:
            raise ClosedError(f"{self.name}: is closed") from None

    def _request_close(self) -> bool:
        """Take no more calls, and have the thread leave; whether there is a thread that will."""
        if self._pid != os.getpid():
            return False
        with self._lock:
            if not self._closing and self._token is not None:
                self._closing = True
                if not self._ended.done():
                    self._token.run_sync_soon(self._close.set)
        return True

    def close(self, timeout_s: float | None = None) -> None:
        """See the module; again does nothing. timeout_s: wait no longer. Raises what the context manager raised at its end."""
        if not self._request_close() or threading.get_ident() == self._thread.ident:
            return
        try:
            self._ended.result(timeout_s)
        except TimeoutError:
            raise BugError(f"{self.name}: is still closing after {timeout_s:g} s") from None
