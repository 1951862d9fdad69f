"""A trio thread that plain test code (Hypothesis rules, above all) can call into."""

from __future__ import annotations

import threading
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from typing import Any, TypeVar

import trio

T = TypeVar("T")


class Portal:
    """Runs async functions, one after the other, in one trio run; context managers entered stay open until `close`."""

    def __init__(self) -> None:
        self._ready = threading.Event()
        self._closing: trio.Event
        self._token: trio.lowlevel.TrioToken
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._main, daemon=True)
        self._thread.start()
        self._ready.wait()

    def _main(self) -> None:
        try:
            trio.run(self._serve)
        except BaseException as error:  # shown by close()
            self._error = error

    async def _serve(self) -> None:
        self._token = trio.lowlevel.current_trio_token()
        self._closing = trio.Event()
        async with trio.open_nursery() as self._nursery:
            self._ready.set()
            await self._closing.wait()

    def run(self, function: Callable[..., Awaitable[T]], *arguments: Any) -> T:
        """`await function(*arguments)` on the trio thread."""
        return trio.from_thread.run(function, *arguments, trio_token=self._token)

    def run_sync(self, function: Callable[..., T], *arguments: Any) -> T:
        """`function(*arguments)` on the trio thread."""
        return trio.from_thread.run_sync(function, *arguments, trio_token=self._token)

    def enter(self, make: Callable[[], AbstractAsyncContextManager[T]]) -> T:
        """Enter a context manager, in a task of its own that leaves it at `close`; what it gave."""

        async def hold(task_status: trio.TaskStatus[T]) -> None:
            async with make() as value:
                task_status.started(value)
                await self._closing.wait()

        async def start() -> T:
            value: T = await self._nursery.start(hold)
            return value

        return self.run(start)

    def close(self) -> None:
        """Leave all context managers and end the thread. Raises what they raised."""
        self.run_sync(self._closing.set)
        self._thread.join()
        if self._error is not None:
            raise self._error
