"""The async side of an object store: the same calls, repeated where that can help, never for longer than asked for.

Each call runs in a worker thread under this client's own limiter, so that a store that hangs takes its own threads and
nobody else's. A `RetryableError` is tried again after a jittered, exponentially growing pause, until `io_timeout_s` after
the call was made; then it is raised.

Cancellation, and the deadline, differ by kind. A read is left behind: its thread goes on until the store's own time-outs
end it, its place in the limiter stays taken so long, and its answer is thrown away. A write is waited for, because its
outcome matters: it ends at most one attempt's time-outs late. Between two attempts both end at once.

Used from the trio thread alone; the statistics are therefore exact without a lock.
"""

from __future__ import annotations

import builtins
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from time import monotonic, perf_counter
from typing import Final, Generic, TypeVar

import trio

from novafs.errors import BucketMissingError, NovaError, RetryableError, StoreDeniedError, StoreUnavailableError
from novafs.latency import LatencyBook
from novafs.objectstore.base import ObjectInfo, ObjectStore, StoreUsage

T = TypeVar("T")

BACKOFF_FIRST_S: Final = 0.05
BACKOFF_MAX_S: Final = 2.0
LIST_PART: Final = 4000
"""Four requests of S3."""


@dataclass(frozen=True, slots=True)
class OperationStatistics:
    """Since the client was made. calls: of a method. requests: attempts that a thread has begun. retries: those that repeated one.

    read_bytes, written_bytes: object content, of calls that succeeded. seconds: from call to end, waiting and pauses included.
    errors: calls that raised, by class name; "no such object" and "the name is taken" are among them, though the store answered.
    """

    calls: int
    requests: int
    retries: int
    read_bytes: int
    written_bytes: int
    seconds: float
    errors: dict[str, int]


class StoreHealth:
    """Whether a store answers, by what the last attempts met. "No such object" is an answer, a refusal of the credentials is none."""

    def __init__(self) -> None:
        self.answered_s = -math.inf
        """`time.monotonic` of the last answer."""
        self.failing_since_s: float | None = None
        """The same of the first attempt without an answer since; None while it answers."""
        self.reason = ""

    @property
    def up(self) -> bool:
        """Whether the last attempt was answered."""
        return self.failing_since_s is None

    def note(self, error: Exception | None) -> None:
        """An attempt has ended. error: what it raised, if anything."""
        if isinstance(error, (RetryableError, StoreDeniedError, BucketMissingError)):
            self.reason = str(error)
            if self.failing_since_s is None:
                self.failing_since_s = monotonic()
        else:
            self.failing_since_s = None
            self.answered_s = monotonic()


@dataclass(frozen=True, slots=True)
class StoreStatistics:
    """by_operation: "get", "create", "put", "list", "head", "delete", … waiting: calls that wait for a thread. running: threads at work.

    up: whether the last attempt of any was answered; failing_s: since when none was, 0 while it is up.
    """

    by_operation: dict[str, OperationStatistics]
    waiting: int
    running: int
    up: bool
    failing_s: float


class StoreClient:
    """`store` is the blocking store; the methods mean what `ObjectStore`'s do and raise the same errors."""

    def __init__(
        self,
        store: ObjectStore,
        *,
        io_timeout_s: float = 30,
        requests_max: int = 32,
        backoff_first_s: float = BACKOFF_FIRST_S,
        backoff_max_s: float = BACKOFF_MAX_S,
        latencies: LatencyBook | None = None,
        health: StoreHealth | None = None,
    ) -> None:
        """latencies, health: shared with others of the same store; its own where none are given."""
        self.store = store
        self.latencies = latencies if latencies is not None else LatencyBook()
        self.health = health if health is not None else StoreHealth()
        self.io_timeout_s = io_timeout_s
        self._limiter = trio.CapacityLimiter(requests_max)
        self._backoff_first_s = backoff_first_s
        self._backoff_max_s = backoff_max_s
        self._counters: dict[str, _Counters] = {}

    @property
    def url(self) -> str:
        """Where the store is, without credentials."""
        return self.store.url

    async def get(self, name: str, start: int = 0, length: int | None = None) -> bytes:
        """See `ObjectStore.get`."""
        data = await self._call("get", name, partial(self.store.get, name, start, length))
        self._counters["get"].read_bytes += len(data)
        return data

    async def create(self, name: str, data: bytes) -> None:
        """See `ObjectStore.create`. It is repeated, so ObjectExistsError may be about the caller's own object: compare content."""
        await self._call("create", name, partial(self.store.create, name, data), wait=True)
        self._counters["create"].written_bytes += len(data)

    async def put(self, name: str, data: bytes) -> None:
        """See `ObjectStore.put`."""
        await self._call("put", name, partial(self.store.put, name, data), wait=True)
        self._counters["put"].written_bytes += len(data)

    async def list(self, prefix: str, *, after: str = "", limit: int | None = None) -> builtins.list[ObjectInfo]:
        """See `ObjectStore.list`. A long listing is read in parts, each of which may take `io_timeout_s`: a volume of a million
        packs can be listed, however slow its store is."""
        found: builtins.list[ObjectInfo] = []
        while True:
            wanted = LIST_PART if limit is None else min(LIST_PART, limit - len(found))
            part = await self._call("list", prefix, partial(self.store.list, prefix, after=after, limit=wanted))
            found += part
            if len(part) < wanted or len(found) == limit:
                return found
            after = part[-1].name

    async def head(self, name: str) -> ObjectInfo:
        """See `ObjectStore.head`."""
        return await self._call("head", name, partial(self.store.head, name))

    async def delete(self, name: str) -> None:
        """See `ObjectStore.delete`."""
        await self._call("delete", name, partial(self.store.delete, name), wait=True)

    async def delete_many(self, names: Sequence[str]) -> None:
        """See `ObjectStore.delete_many`."""
        await self._call("delete_many", f"{len(names)} objects", partial(self.store.delete_many, builtins.list(names)), wait=True)

    async def clock_s(self) -> float:
        """See `ObjectStore.clock_s`."""
        return await self._call("clock_s", "", self.store.clock_s)

    async def usage(self) -> StoreUsage:
        """See `ObjectStore.usage`."""
        return await self._call("usage", "", self.store.usage)

    async def probe_create_only(self) -> bool:
        """See `ObjectStore.probe_create_only`."""
        return await self._call("probe_create_only", "", self.store.probe_create_only, wait=True)

    def statistics(self) -> StoreStatistics:
        """A snapshot."""
        limiter = self._limiter.statistics()
        by_operation = {
            operation: OperationStatistics(**{**asdict(counters), "errors": dict(counters.errors)})
            for operation, counters in self._counters.items()
        }
        since_s = self.health.failing_since_s
        failing_s = monotonic() - since_s if since_s is not None else 0.0
        return StoreStatistics(by_operation, limiter.tasks_waiting, limiter.borrowed_tokens, self.health.up, failing_s)

    async def aclose(self) -> None:
        """Give back the store's connections. No call may be made after, and none may be running."""
        with trio.CancelScope(shield=True):  # quick, and nobody else will do it
            await trio.to_thread.run_sync(self.store.close)

    async def _call(self, operation: str, name: str, work: Callable[[], T], *, wait: bool = False) -> T:
        """wait: it is a write, whose thread is never left behind."""
        began = trio.current_time()
        deadline = began + self.io_timeout_s
        counters = self._counters.setdefault(operation, _Counters())
        latency = self.latencies.of("store", operation)
        counters.calls += 1
        pause_s = self._backoff_first_s
        last: RetryableError | None = None
        repeated = False
        try:
            while True:
                # Made anew for each attempt: a thread that was left behind keeps its own.
                attempt = _Attempt(work)
                with trio.move_on_at(deadline) as scope:
                    try:
                        return self._answered(await trio.to_thread.run_sync(attempt, limiter=self._limiter, abandon_on_cancel=not wait))
                    except RetryableError as error:
                        self.health.note(error)
                        last = error
                    except NovaError as error:
                        self.health.note(error)
                        raise
                    finally:
                        counters.requests += attempt.started
                        counters.retries += attempt.started and repeated
                        if attempt.started:
                            latency.note(perf_counter() - attempt.began_s)
                if last is None or scope.cancelled_caught:
                    late = self._too_late(operation, name, last, started=attempt.started)
                    if attempt.started:
                        self.health.note(late)
                    raise late from last
                # Jitter: hosts that failed together shall not come back together.
                rest_s = pause_s * random.uniform(0.5, 1)  # noqa: S311 - no secret
                if trio.current_time() + rest_s >= deadline:
                    raise last
                await trio.sleep(rest_s)
                pause_s = min(2 * pause_s, self._backoff_max_s)
                repeated = True
        except NovaError as error:
            kind = type(error).__name__
            counters.errors[kind] = counters.errors.get(kind, 0) + 1
            raise
        finally:
            counters.seconds += trio.current_time() - began

    def _answered(self, result: T) -> T:
        self.health.note(None)
        return result

    def _too_late(self, operation: str, name: str, last: RetryableError | None, *, started: bool) -> StoreUnavailableError:
        if started:
            what = "no answer"
        else:
            what = f"{self._limiter.borrowed_tokens} earlier requests still wait for their answers, so it was not begun"
        before = f"; before that: {last}" if last is not None else ""
        return StoreUnavailableError(f"{self.url}: {operation} {name}: {what} within io_timeout_s = {self.io_timeout_s:g} s{before}")


class _Attempt(Generic[T]):
    """The work, and whether a thread has begun it."""

    def __init__(self, work: Callable[[], T]) -> None:
        self._work = work
        self.started = False
        self.began_s = 0.0

    def __call__(self) -> T:
        self.began_s = perf_counter()
        self.started = True
        return self._work()


@dataclass(slots=True)
class _Counters:
    """What `OperationStatistics` is a snapshot of."""

    calls: int = 0
    requests: int = 0
    retries: int = 0
    read_bytes: int = 0
    written_bytes: int = 0
    seconds: float = 0.0
    errors: dict[str, int] = field(default_factory=dict)
