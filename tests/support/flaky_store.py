"""A real directory store whose calls a test can make fail, or wait."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from novafs.objectstore.base import ObjectInfo
from novafs.objectstore.file import FileStore

WAIT_TIMEOUT_S = 60
"""Bounds a hang where a test forgot to release."""


class FlakyStore(FileStore):
    """`before[operation]` is a list of what happens before the next calls of it: an error to raise, or a function to run.

    `calls` counts the calls that came, by operation.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.before: dict[str, list[Exception | Callable[[], None]]] = {}
        self.after: dict[str, list[Exception]] = {}
        self.calls: dict[str, int] = {}
        self._lock = threading.Lock()

    def _enter(self, operation: str) -> None:
        with self._lock:
            self.calls[operation] = self.calls.get(operation, 0) + 1
            planned = self.before.get(operation)
            step = planned.pop(0) if planned else None
        if isinstance(step, Exception):
            raise step
        if step is not None:
            step()

    def _leave(self, operation: str) -> None:
        with self._lock:
            planned = self.after.get(operation)
            error = planned.pop(0) if planned else None
        if error is not None:
            raise error

    def get(self, name: str, start: int = 0, length: int | None = None) -> bytes:
        self._enter("get")
        return super().get(name, start, length)

    def create(self, name: str, data: bytes) -> None:
        self._enter("create")
        super().create(name, data)
        self._leave("create")

    def list(self, prefix: str, *, after: str = "", limit: int | None = None) -> list[ObjectInfo]:
        self._enter("list")
        return super().list(prefix, after=after, limit=limit)


class Gate:
    """A step for `before`: the call waits in its thread until `open`."""

    def __init__(self) -> None:
        self.reached = threading.Semaphore(0)
        self._opened = threading.Event()

    def __call__(self) -> None:
        self.reached.release()
        self._opened.wait(WAIT_TIMEOUT_S)

    def open(self) -> None:
        self._opened.set()

    def wait_reached(self) -> None:
        """Wait, in a worker thread, until one more call is at the gate."""
        if not self.reached.acquire(timeout=WAIT_TIMEOUT_S):
            raise TimeoutError("no call came to the gate")
