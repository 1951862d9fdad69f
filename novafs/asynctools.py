"""Small things that trio leaves to its users: a nursery that raises one error, work on many items, and group commit."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from typing import Generic, TypeVar

import trio

from novafs.errors import NovaError

T = TypeVar("T")


def _leaves(error: BaseException) -> list[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        return [leaf for child in error.exceptions for leaf in _leaves(child)]
    return [error]


@asynccontextmanager
async def open_nursery() -> AsyncIterator[trio.Nursery]:
    """A nursery whose failure is one plain exception: a NovaError where there is one, else the first that is no Cancelled.

    Callers of the engine catch classes of `novafs.errors`; a group around them would pass every `except` by.
    """
    try:
        async with trio.open_nursery() as nursery:
            yield nursery
    except BaseExceptionGroup as group:
        leaves = _leaves(group)
        for leaf in leaves:
            if isinstance(leaf, NovaError):
                raise leaf from group
        for leaf in leaves:
            if not isinstance(leaf, trio.Cancelled):
                raise leaf from group
        raise


async def for_each(items: Iterable[T], work: Callable[[T], Awaitable[None]], *, at_once: int) -> None:
    """`work` of each item, `at_once` of them at a time: so many tasks, however many items there are. Raises the first error."""
    left = iter(items)

    async def worker() -> None:
        for item in left:  # one iterator for all: whoever is free takes the next
            await work(item)

    async with open_nursery() as nursery:
        for _ in range(at_once):
            nursery.start_soon(worker)


class GroupCommit(Generic[T]):
    """Runs `work(items)` for all callers that wait at that moment: one run at a time, the next takes what has come since.

    `work` gets the items in the order they came; when it returns, each caller gets its result, when it raises, each
    caller of that run gets the error. A caller that is cancelled while its item waits takes the item back. One that is cancelled
    while it runs for others as well ends its run first: what was done halfway for them could not be done again.
    """

    def __init__(self, work: Callable[[list[T]], Awaitable[None]]) -> None:
        self._work = work
        self._waiting: list[tuple[T, _Ticket]] = []
        self._running = trio.Lock()

    @property
    def running(self) -> bool:
        """Whether a run is under way."""
        return self._running.locked()

    async def submit(self, item: T) -> None:
        """Wait until a run that includes `item` has ended. Raises what that run raised."""
        ticket = _Ticket()
        entry = (item, ticket)
        self._waiting.append(entry)
        try:
            try:
                self._running.acquire_nowait()  # a checkpoint costs as much as all the rest
            except trio.WouldBlock:
                await self._running.acquire()
        except BaseException:
            if entry in self._waiting:
                self._waiting.remove(entry)
            raise
        try:
            if not ticket.done:
                batch, self._waiting = self._waiting, []
                try:
                    # Bounded by the time-outs of what `work` waits for.
                    with trio.CancelScope(shield=len(batch) > 1):
                        await self._work([waiting for waiting, _ in batch])
                except BaseException as error:
                    for _, other in batch:
                        other.done, other.error = True, error
                    raise
                for _, other in batch:
                    other.done = True
        finally:
            self._running.release()
        if ticket.error is not None:
            raise ticket.error


class _Ticket:
    __slots__ = ("done", "error")

    def __init__(self) -> None:
        self.done = False
        self.error: BaseException | None = None
