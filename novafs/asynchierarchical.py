"""`AsyncHierarchicalCache`: a volume as a cache of values under keys, for programs on trio; `novafs.hierarchical` is its blocking twin.

    async with AsyncHierarchicalCache("/var/cache/vms") as cache:
        await cache.set("vm-001-disk", data, ttl=3600)
        data = await cache.get("vm-001-disk")

What is promised:

- **A key is a file.** `set("web/a", …)` is the file `web/a` in a mount of the volume, and the other way round.
- **A value is old or new**, never a mixture, for every reader, on any host, however a writer dies (`novafs.values`); what `get` and `open`
  read is one generation, from the first byte to the last. `set` returns when the value is in the store.
- **Changes of this process are seen at once**; those of others within `fresh_s`.
- **A time-out is exact**: a value whose time is over is gone for every call here, although only a collection takes it away.
- Everything here runs on one trio thread, and what stands between two awaits is atomic.
- **Closing is orderly from anywhere**: `aclose`, in whatever task or nursery, takes no more calls, lets those that run end, and then
  closes. (The engine runs in a system task of its own: trio does not survive nurseries that are left in another order than entered.)

Views of what was read last are kept open, so a value that is in L1 and was looked up within `fresh_s` is given without a request.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import heapq
import itertools
import logging
import os
import shutil
import time
import weakref
from collections import OrderedDict
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any, Concatenate, Final, ParamSpec, Self, TypeVar

import trio

from novafs import statedir
from novafs.asynctools import open_nursery
from novafs.bulk import StoredContent, store_content, store_values
from novafs.cacheconfig import CacheConfig, Place, find_place
from novafs.cachestats import CacheStats, KeyCounts, PatternFigures, describe_stats
from novafs.catalogtree import Entry, Kind
from novafs.config import Config
from novafs.control import ControlServer
from novafs.errors import (
    BucketMissingError,
    BugError,
    BusyError,
    ClosedError,
    ConfigError,
    IsDirectoryError,
    NotDirectoryError,
    NotFoundError,
    NovaError,
    NoVolumeError,
    ObjectNotFoundError,
    StaleError,
    TooLargeError,
    UnsupportedError,
)
from novafs.generation import generation_chain
from novafs.image import Image
from novafs.keyprefetch import KeyPrefetcher
from novafs.operations import OPERATIONS
from novafs.packwriter import PacksLostError
from novafs.revisions import Head, boot_time_s
from novafs.statedir import CONTROL_SOCKET, StateLock
from novafs.values import NewValue, Parts, check_key, is_expired, publish, remove, remove_all
from novafs.volume import Volume, init_volume, open_volume
from novafs.warming import WarmCounts, chunks_of, cut, warm_chunks

log = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R")

VIEWS_MAX: Final = 128
"""Values that stay open after they were read."""
END_S: Final = 60.0
"""How long `aclose` lets calls run on."""
TTL_S_MAX: Final = 1e15
"""Thirty million years: sums of times stay exact to the second."""
AT_ONCE: Final = 16
"""Values that one call reads at the same time, and groups of them that it stores."""
GROUP_BYTES: Final = 8 << 20
TRIES_MAX: Final = 5
WRITE_BYTES: Final = 1 << 20
"""What a writer gathers before it hands it on."""
PREFETCHERS: Final = 2
GUESS: Final = -(1 << 62)
"""The priority of what nobody has asked for."""
WARM_CHUNKS: Final = 256
"""Chunks between two looks whether a request was given up, or a more urgent one has come."""


@dataclass(frozen=True, slots=True)
class PrefetchRequest:
    """Keys to bring into L1 ahead of need. priority: a request with a higher one goes first; readers go before all."""

    keys: Sequence[str]
    priority: int = 0


@dataclass(frozen=True, slots=True)
class PrefetchResult:
    """keys: that were there; missing: keys without a value; chunks, held, fetched, failed, read_bytes, error: see `WarmCounts`."""

    keys: int
    missing: tuple[str, ...]
    chunks: int
    held: int
    fetched: int
    failed: int
    read_bytes: int
    error: str


class AsyncPrefetchTicket:
    """A request that was taken. `done` says whether it is over; `wait` waits for that; `cancel` gives up what has not begun."""

    def __init__(self, request: PrefetchRequest, keys: Sequence[Parts]) -> None:
        self.request = request
        self.cancelled = False
        self.counts = WarmCounts()
        self._missing: list[str] = []
        self._found = 0
        self._left = len(keys)
        self._over = trio.Event()
        if not keys:
            self._over.set()

    @property
    def done(self) -> bool:
        """Whether all that will be fetched was."""
        return self._over.is_set()

    async def wait(self) -> PrefetchResult:
        """What became of it, once it is over. Where it was given up, of what was done until then."""
        await self._over.wait()
        return self.result()

    def result(self) -> PrefetchResult:
        """What became of it so far."""
        c = self.counts
        return PrefetchResult(self._found, tuple(self._missing), c.chunks, c.held, c.fetched, c.failed, c.read_bytes, c.error)

    def cancel(self) -> None:
        """Fetch no more of it."""
        self.cancelled = True

    def give_up(self) -> None:
        """The cache was closed: nothing more comes."""
        self.cancelled = True
        self._over.set()

    def key_done(self, key: str, *, found: bool) -> None:
        """One key is over, for whoever works on it."""
        if found:
            self._found += 1
        elif not self.cancelled:
            self._missing.append(key)
        self._left -= 1
        if not self._left:
            self._over.set()


class _Job:
    """One key that is to be brought into L1. ticket: None for a guess. at: bytes that are behind."""

    __slots__ = ("at", "parts", "priority", "ticket", "total")

    def __init__(self, parts: Parts, priority: int, ticket: AsyncPrefetchTicket | None) -> None:
        self.parts = parts
        self.priority = priority
        self.ticket = ticket
        self.at = 0
        self.total = WarmCounts()


def _counted(
    method: Callable[Concatenate[AsyncHierarchicalCache, P], Awaitable[R]],
) -> Callable[Concatenate[AsyncHierarchicalCache, P], Coroutine[Any, Any, R]]:
    """A method that is a call of its own (`AsyncHierarchicalCache.call`)."""

    @functools.wraps(method)
    async def counted(self: AsyncHierarchicalCache, /, *arguments: P.args, **keywords: P.kwargs) -> R:
        with self.call():
            return await method(self, *arguments, **keywords)

    return counted


class _Running:
    """The engine of an open cache: the task that it runs in, seen from outside. error: what that ended by."""

    def __init__(self) -> None:
        self.opened = trio.Event()
        """It is open, or failed to be."""
        self.close = trio.Event()
        self.over = trio.Event()
        self.scope = trio.CancelScope()
        self.error: Exception | None = None
        self.closing = False
        self.calls = 0
        self.quiet = trio.Event()
        """Set by the last call that ends, once somebody closes."""


class _View:
    """One generation of a value, open. users: who reads it at this moment."""

    __slots__ = ("checked_s", "gone", "image", "users")

    def __init__(self, image: Image, checked_s: float) -> None:
        self.image = image
        self.checked_s = checked_s
        self.users = 0
        self.gone = False
        """No longer kept: whoever leaves it last closes it."""


class AsyncHierarchicalCache:
    """The cache. Use as an async context manager; every method is called inside, on its trio thread."""

    def __init__(self, volume: str | os.PathLike[str] | None = None, config: CacheConfig | None = None) -> None:
        """volume: a directory, a URL, or the NAME of a configured volume; None: a temporary directory that is removed at the end."""
        self.config = config if config is not None else CacheConfig.default()
        self._place: Place | None = None
        self._given = volume
        self._running: _Running | None = None
        self._volume: Volume
        self._nursery: trio.Nursery
        self._keys: KeyPrefetcher
        self._views: OrderedDict[bytes, _View] = OrderedDict()
        self._counts = KeyCounts()
        self._queue: list[tuple[int, int, _Job]] = []
        self._tickets: weakref.WeakSet[AsyncPrefetchTicket] = weakref.WeakSet()
        self._order = itertools.count()
        self._wake = trio.Event()
        self.lock: StateLock | None = None
        """Of the state directory, while open."""

    # --- opening and closing ------------------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        if self._running is not None:
            raise BusyError("this cache is open already: make another object for another use")
        running = self._running = _Running()
        trio.lowlevel.spawn_system_task(self._run, running)
        try:
            await running.opened.wait()
        except BaseException:
            running.scope.cancel()
            with trio.CancelScope(shield=True):  # ends when opening does, which has time-outs of its own
                await running.over.wait()
            self._running = None
            raise
        if running.error is not None:
            self._running = None
            raise running.error
        return self

    async def _run(self, running: _Running) -> None:
        """The engine, from its beginning to its end."""
        try:
            with running.scope:
                async with AsyncExitStack() as stack:
                    await self._start(stack)
                    running.opened.set()
                    await running.close.wait()
        except Exception as error:
            running.error = error
        finally:
            self._queue.clear()
            for ticket in list(self._tickets):
                ticket.give_up()
            running.over.set()
            running.opened.set()

    async def _start(self, stack: AsyncExitStack) -> None:
        place = self._place = find_place(self._given)
        if place.temporary is not None:
            stack.callback(shutil.rmtree, place.temporary, ignore_errors=True)
        config = await trio.to_thread.run_sync(self.config.load, place)
        self.config.chunk_size_bytes  # noqa: B018 - before anything is made
        if not self.config.read_only:
            self.lock = await trio.to_thread.run_sync(_take_lock, config)
            stack.callback(self._give_lock_back, self.lock)
        self._volume = await stack.enter_async_context(self._opened(config))
        self._check_chunk_size()
        self._nursery = await stack.enter_async_context(open_nursery())
        stack.callback(self._nursery.cancel_scope.cancel)
        self._keys = KeyPrefetcher(self.config, self._volume)
        await self._keys.load()
        stack.push_async_callback(self._end)
        self._nursery.start_soon(self._keys.run)
        for _ in range(PREFETCHERS):
            self._nursery.start_soon(self._prefetch_forever)
        if self.lock is not None:
            await self._serve(config)

    def _give_lock_back(self, lock: StateLock) -> None:
        self.lock = None
        lock.release()

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Let calls that run end, commit what is left to be committed, keep what was learned, and give everything back. Again does nothing.

        From any task. Raises what the engine ended by.
        """
        running = self._running
        if running is None:
            return
        running.closing = True
        try:
            with trio.move_on_after(END_S):
                if running.calls:
                    await running.quiet.wait()
        finally:
            running.close.set()
            with trio.CancelScope(shield=True):  # the volume's own end has a deadline
                await running.over.wait()
            if self._running is running:
                self._running = None
        if running.error is not None:
            raise running.error

    async def _end(self) -> None:
        for view in list(self._views.values()):
            await self._drop_view(view)
        await self._keys.save()

    @asynccontextmanager
    async def _opened(self, config: Config) -> AsyncIterator[Volume]:
        made = False
        while True:
            opening = open_volume(config, read_only=self.config.read_only, owns_state=self.lock is not None, prefetch=True)
            try:
                volume = await opening.__aenter__()
            except (NoVolumeError, BucketMissingError):
                if made or not self.config.create or self.config.read_only:
                    raise
                await _make_volume(config, self.config.chunk_size_bytes)
                made = True
                continue
            break
        try:
            yield volume
        except BaseException as error:
            if not await opening.__aexit__(type(error), error, error.__traceback__):
                raise
        else:
            await opening.__aexit__(None, None, None)

    def _check_chunk_size(self) -> None:
        wanted = self.config.chunk_size_bytes
        if wanted is not None and wanted != self._volume.chunk_size:
            raise ConfigError(
                f"CacheConfig: chunk_size: found {wanted}, but {self._volume.client.url} was made with chunks of {self._volume.chunk_size} "
                f"bytes, for good; leave the field out, or choose another volume"
            )

    async def _serve(self, config: Config) -> None:
        """Answer `novafs stats`, `info`, `snapshot`, … as a mount does: who has the state directory alone can."""
        control = ControlServer(config.state_dir / CONTROL_SOCKET)

        async def stats(_request: Mapping[str, Any]) -> dict[str, Any]:
            await trio.lowlevel.checkpoint()
            return {**self._volume.statistics(), "library": {"pid": os.getpid(), **dataclasses.asdict(self.stats())}}

        control.register("stats", stats)
        for op, operation in OPERATIONS.items():
            control.register(op, partial(operation, self._volume))
        await self._nursery.start(control.run)

    @property
    def closed(self) -> bool:
        """Whether it takes no calls."""
        return self._running is None or self._running.closing or self._running.over.is_set()

    @property
    def ended(self) -> bool:
        """Whether there is nothing left to give anything back to."""
        return self._running is None or self._running.close.is_set()

    def _check_open(self) -> Volume:
        if self.closed:
            error = self._running.error if self._running is not None else None
            raise ClosedError(f"the cache of {self._given if self._given is not None else 'a temporary volume'} is closed") from error
        return self._volume

    @contextlib.contextmanager
    def call(self) -> Iterator[Volume]:
        """A call that is under way: `aclose` waits for its end. Raises ClosedError."""
        volume, running = self._check_open(), self._running
        assert running is not None  # else it is closed
        running.calls += 1
        try:
            yield volume
        finally:
            running.calls -= 1
            if running.closing and not running.calls:
                running.quiet.set()

    @property
    def volume_url(self) -> str:
        """Where the volume is: what `novafs mount` takes."""
        return self._check_open().config.volume_url

    # --- reading ----------------------------------------------------------------------------------------------

    @_counted
    async def get(self, key: str, default: bytes | None = None, *, stream: int = 0) -> bytes | None:
        """The value, `default` where there is none. Raises TooLargeError beyond `value_max` (`open` reads such), IsDirectoryError.

        stream: tells one sequence of reads from another, for the predictor.
        """
        began_s = time.perf_counter()
        self._check_open()
        parts = check_key(key)
        found = await self._read(parts)
        self._note("get", began_s)
        if found is None:
            self._counts.misses += 1
            return default
        self._counts.hits += 1
        self._observe(key, stream)
        return found

    async def _read(self, parts: Parts) -> bytes | None:
        for tried in itertools.count():
            entry = await self._find(parts, max_age_s=0.0 if tried else None)
            if entry is None:
                return None
            try:
                view = await self._view(entry, parts)
                try:
                    size = view.image.size
                    if size > self.config.value_max:
                        raise TooLargeError(
                            f"{'/'.join(parts)}: has {size:,} bytes, value_max is {self.config.value_max:,}; read it with open(key, 'rb')"
                        )
                    data = view.image.read_nowait(0, size)
                    return data if data is not None else await view.image.read(0, size)
                finally:
                    await self._leave_view(view)
            except (StaleError, NotFoundError, ObjectNotFoundError):
                # Replaced or removed elsewhere, and collected, since the catalog was looked at: look again.
                self._forget_view(entry.node_id)
                if tried + 1 >= TRIES_MAX:
                    raise
        raise AssertionError  # count() has no end

    @_counted
    async def contains(self, key: str) -> bool:
        """Whether there is a value."""
        parts = check_key(key)
        self._check_open()
        return await self._find(parts, directories=True) is not None

    @_counted
    async def get_multi(self, keys: Iterable[str], *, stream: int = 0) -> dict[str, bytes]:
        """The values of those keys that have one."""
        began_s = time.perf_counter()
        self._check_open()
        wanted = {key: check_key(key) for key in listed(keys)}
        found: dict[str, bytes | None] = {}
        slots = trio.CapacityLimiter(AT_ONCE)

        async def read(key: str, parts: Parts) -> None:
            async with slots:
                found[key] = await self._read(parts)

        async with open_nursery() as nursery:
            for key, parts in wanted.items():
                nursery.start_soon(read, key, parts)
        values: dict[str, bytes] = {}
        for key in wanted:
            value = found[key]
            if value is None:
                self._counts.misses += 1
            else:
                self._counts.hits += 1
                self._observe(key, stream)
                values[key] = value
        self._note("get_multi", began_s)
        return values

    @_counted
    async def size(self, key: str) -> int | None:
        """Bytes of the value, None where there is none."""
        parts = check_key(key)
        self._check_open()
        for tried in itertools.count():
            entry = await self._find(parts, max_age_s=0.0 if tried else None)
            if entry is None:
                return None
            try:
                view = await self._view(entry, parts)
            except NotFoundError:  # replaced or removed elsewhere, and collected, since the catalog was looked at
                if tried + 1 >= TRIES_MAX:
                    raise
                continue
            try:
                return view.image.size
            finally:
                await self._leave_view(view)
        raise AssertionError  # count() has no end

    @_counted
    async def keys(self, prefix: str = "") -> list[str]:
        """The keys that begin with `prefix`, sorted."""
        volume = self._check_open()
        if not isinstance(prefix, str):
            raise ConfigError(f"prefix: found {prefix!r:.80}; expected a text that keys begin with")
        await volume.catalog.refresh(self.config.fresh_s)
        found = [volume.catalog.path_of(entry) async for entry in self._values(volume)]
        return sorted(key for key in found if key.startswith(prefix))

    @_counted
    async def count(self) -> int:
        """How many keys there are."""
        volume = self._check_open()
        await volume.catalog.refresh(self.config.fresh_s)
        return len([entry async for entry in self._values(volume)])

    async def _values(self, volume: Volume) -> AsyncGenerator[Entry, None]:
        now_s = time.time()
        async for entry in volume.catalog.walk():
            if entry.kind is not Kind.DIRECTORY and not is_expired(entry, now_s):
                yield entry

    async def _find(self, parts: Parts, *, max_age_s: float | None = None, directories: bool = False) -> Entry | None:
        """The entry of a key whose time is not over. Raises IsDirectoryError, unless with `directories` one counts as nothing."""
        volume = self._check_open()
        try:
            entry = await volume.catalog.resolve("/".join(parts), max_age_s=self.config.fresh_s if max_age_s is None else max_age_s)
        except (NotFoundError, NotDirectoryError):
            return None
        if entry.kind is Kind.DIRECTORY:
            if directories:
                return None
            raise IsDirectoryError(f"{'/'.join(parts)}: is a directory of keys, no value; keys({'/'.join(parts) + '/'!r}) lists it")
        return None if is_expired(entry, time.time()) else entry

    # --- views ------------------------------------------------------------------------------------------------

    async def _view(self, entry: Entry, parts: Parts) -> _View:
        """The newest generation of a value, as far as `fresh_s` says; `_leave_view` when done."""
        volume, node_id = self._volume, entry.node_id
        view = self._views.get(node_id)
        if view is None or boot_time_s() - view.checked_s > self.config.fresh_s:
            head = volume.known_head(node_id)
            if head is None or boot_time_s() - head.read_s > self.config.fresh_s:
                known = Head(view.image.head, view.checked_s) if view is not None else head
                newest = await generation_chain(volume.client, node_id).head(known)
                if newest is None:
                    raise NotFoundError(f"{'/'.join(parts)}: has no generation in the store")
                head = newest
                volume.remember_head(head)
            view = self._views.get(node_id)  # others may have looked meanwhile
            if view is not None and view.image.generation >= head.record.counter:
                view.checked_s = max(view.checked_s, head.read_s)
            else:
                self._forget_view(node_id)
                name = "/".join(parts)
                view = _View(volume.open_view(head, name=name, watched_as=watched_as(parts)), head.read_s)
                self._views[node_id] = view
        self._views.move_to_end(node_id)
        view.users += 1
        while len(self._views) > VIEWS_MAX:
            self._forget_view(next(iter(self._views)))
        return view

    async def _leave_view(self, view: _View) -> None:
        view.users -= 1
        if view.gone and not view.users:
            await self._drop_view(view)

    def _forget_view(self, node_id: bytes) -> None:
        view = self._views.pop(node_id, None)
        if view is not None:
            view.gone = True
            if not view.users:
                # Closing a view takes no checkpoint, but is not to be done in the middle of somebody's step.
                self._nursery.start_soon(self._drop_view, view)

    async def _drop_view(self, view: _View) -> None:
        await self._volume.close_image(view.image)

    # --- writing ----------------------------------------------------------------------------------------------

    @_counted
    async def set(self, key: str, data: bytes | bytearray | memoryview, ttl: float | None = None) -> None:
        """Make `data` the value of `key`, in place of what it was. ttl: seconds that it lasts, None for good.

        Raises InvalidNameError, ConfigError (a ttl that is none), TooLargeError, IsDirectoryError, NotDirectoryError, ReadOnlyError,
        LeaseHeldError (the file has snapshots, and another host writes it), and what the store raises: then the old value is there.
        """
        await self._store({key: data}, ttl, "set")

    @_counted
    async def set_multi(self, values: Mapping[str, bytes | bytearray | memoryview], ttl: float | None = None) -> None:
        """`set` of all of them, at once: a reader finds all the old or all the new names. (Files with snapshots follow one by one.)"""
        await self._store(values, ttl, "set_multi")

    async def _store(self, values: Mapping[str, bytes | bytearray | memoryview], ttl: float | None, op: str) -> None:
        began_s = time.perf_counter()
        volume = self._check_open()
        volume.check_writable()
        expires_s = _expiry(ttl)
        wanted = {check_key(key): _checked_value(key, data, self.config.value_max) for key, data in mapped(values).items()}
        _check_together(wanted)
        for tried in itertools.count():
            try:
                stored = await self._store_contents(volume, wanted)
                self._published(await publish(volume, [NewValue(parts, stored[parts], expires_s) for parts in wanted]))
            except PacksLostError:
                # It took so long that a collection overtook it: once more.
                if tried + 1 >= TRIES_MAX:
                    raise
            else:
                break
        self._counts.sets += len(wanted)
        self._counts.set_bytes += sum(map(len, wanted.values()))
        self._note(op, began_s)

    def _published(self, entries: Iterable[Entry]) -> None:
        for entry in entries:
            self._forget_view(entry.node_id)  # one that has snapshots goes on under its old id

    async def _store_contents(self, volume: Volume, wanted: Mapping[Parts, bytes]) -> dict[Parts, StoredContent]:
        stored: dict[Parts, StoredContent] = {}
        slots = trio.CapacityLimiter(AT_ONCE)

        async def store(group: Sequence[tuple[Parts, bytes]]) -> None:
            async with slots:
                contents = await store_values(volume, [data for _, data in group], cache=True)
                stored.update(zip([parts for parts, _ in group], contents, strict=True))

        async with open_nursery() as nursery:
            for group in _grouped(wanted):
                nursery.start_soon(store, group)
        return stored

    async def delete(self, key: str) -> bool:
        """Take the value away; whether there was one."""
        return (await self.delete_multi([key])) == 1

    @_counted
    async def delete_multi(self, keys: Iterable[str]) -> int:
        """Take values away, all at once; how many there were."""
        began_s = time.perf_counter()
        volume = self._check_open()
        wanted = list(dict.fromkeys(check_key(key) for key in listed(keys)))
        removed = await remove(volume, wanted)
        now_s = time.time()
        for parts, entry in zip(wanted, removed, strict=True):
            if entry is not None:
                self._forget_view(entry.node_id)
                self._keys.forget("/".join(parts))
        self._note("delete", began_s)
        return sum(entry is not None and not is_expired(entry, now_s) for entry in removed)

    @_counted
    async def clear(self) -> int:
        """Take everything away, directories as well; how many values there were. Their bytes go with the next collection."""
        removed = await remove_all(self._check_open())
        for entry in removed:
            self._forget_view(entry.node_id)
        now_s = time.time()
        return sum(not is_expired(entry, now_s) for entry in removed)

    @_counted
    async def drop_cached(self) -> None:
        """Empty L1 and L2; no value is lost. For measurements, and where memory is wanted back at once."""
        cache = self._check_open().cache
        cache.l1.clear()
        if cache.l2 is not None:
            await trio.to_thread.run_sync(cache.l2.clear)

    @_counted
    async def touch(self, key: str, ttl: float | None = None) -> bool:
        """Let the value last `ttl` seconds from now, None for good; whether there was one."""
        volume, parts, expires_s = self._check_open(), check_key(key), _expiry(ttl)
        volume.check_writable()
        for tried in range(TRIES_MAX):
            entry = await self._find(parts, max_age_s=0.0 if tried else None)
            if entry is None:
                return False
            try:
                await volume.catalog.update(entry.node_id, lambda e: _with_expiry(e, expires_s))
            except NotFoundError:
                continue  # set anew at this moment: look again
            return True
        return False

    @_counted
    async def collect(self, *, grace_s: float | None = None) -> Any:
        """Delete what nothing names any more: `novafs gc`, with its report (`novafs.gc.GcReport`)."""
        from novafs.gc import collect

        return await collect(self._check_open(), grace_s=grace_s)

    # --- streams ----------------------------------------------------------------------------------------------

    async def open(self, key: str, mode: str = "rb", ttl: float | None = None) -> AsyncValueReader | AsyncValueWriter:
        """The value as a stream: "rb" to read, "wb" to write anew. Async context managers, both.

        A writer's value is there when it is closed, whole, and not at all where the block is left by an exception. Raises NotFoundError
        ("rb"), UnsupportedError for any other mode, and what `get` and `set` raise.
        """
        if mode == "rb":
            if ttl is not None:
                raise ConfigError("ttl: says how long a value lasts that is written; touch(key, ttl) changes it")
            return await self.open_reader(key)
        if mode == "wb":
            return await self.open_writer(key, ttl)
        raise UnsupportedError(f"mode {mode!r}: expected 'rb' or 'wb'; to change a part of a value, mount the volume")

    @_counted
    async def open_reader(self, key: str, *, stream: int = 0) -> AsyncValueReader:
        """`open(key, "rb")`."""
        parts = check_key(key)
        self._check_open()
        for tried in itertools.count():
            entry = await self._find(parts, max_age_s=0.0 if tried else None)
            if entry is None:
                self._counts.misses += 1
                raise NotFoundError(f"{key}: there is no value")
            try:
                view = await self._view(entry, parts)
            except NotFoundError:
                if tried + 1 >= TRIES_MAX:
                    raise
                continue
            self._counts.hits += 1
            self._observe(key, stream)
            return AsyncValueReader(self, key, view)
        raise AssertionError  # count() has no end

    @_counted
    async def open_writer(self, key: str, ttl: float | None = None) -> AsyncValueWriter:
        """`open(key, "wb")`."""
        volume, parts = self._check_open(), check_key(key)
        volume.check_writable()
        await self._check_no_directory(parts)
        _expiry(ttl)
        writer = AsyncValueWriter(self, volume, parts, ttl)
        self._nursery.start_soon(writer.run)
        return writer

    async def _check_no_directory(self, parts: Parts) -> None:
        await self._find(parts)

    # --- ahead of need ----------------------------------------------------------------------------------------

    def prefetch(self, request: PrefetchRequest) -> AsyncPrefetchTicket:
        """Bring the values of these keys into L1 in the background. Returns at once; the ticket tells when they are there."""
        self._check_open()
        if isinstance(request.keys, str):
            raise ConfigError(f"PrefetchRequest: keys: found the text {request.keys!r}; expected a list of keys")
        if isinstance(request.priority, bool) or not isinstance(request.priority, int):
            raise ConfigError(
                f"PrefetchRequest: priority: found {request.priority!r}; expected a whole number, higher for what is to go first"
            )
        wanted = [check_key(key) for key in request.keys]
        ticket = AsyncPrefetchTicket(request, wanted)
        self._tickets.add(ticket)
        for parts in wanted:
            self._enqueue(_Job(parts, request.priority, ticket))
        return ticket

    def _enqueue(self, job: _Job) -> None:
        heapq.heappush(self._queue, (-job.priority, next(self._order), job))
        self._wake.set()

    def predict_next(self, key: str, n: int = 5) -> list[tuple[str, float]]:
        """At most `n` keys that are likely to be read after `key`, with the chance of each, likeliest first."""
        self._check_open()
        check_key(key)
        if isinstance(n, bool) or not isinstance(n, int) or n < 1:
            raise ConfigError(f"n: found {n!r}; expected how many keys, at least 1")
        return self._keys.predict(key, n)

    def _observe(self, key: str, stream: int) -> None:
        """A key was read: learn, and fetch what is likely to be read next."""
        for following in self._keys.observe(key, stream):
            self._enqueue(_Job(tuple(following.split("/")), GUESS, None))

    async def _prefetch_forever(self) -> None:
        while True:
            while not self._queue:
                self._wake = trio.Event()
                await self._wake.wait()
            _, _, job = heapq.heappop(self._queue)
            try:
                over = await self._warm(job)
            except NovaError as error:
                log.debug("%s: was not prefetched: %s", "/".join(job.parts), error)
                job.total.failed += 1
                job.total.error = job.total.error or str(error)
                over = True
            except Exception:
                log.exception("prefetch: a mistake in NovaFS; please report it. Reads go on without")
                over = True
            if not over:
                self._enqueue(job)
            elif job.ticket is not None:
                job.ticket.counts.add(job.total)
                job.ticket.key_done("/".join(job.parts), found=job.at >= 0)
            await trio.lowlevel.checkpoint()

    async def _warm(self, job: _Job) -> bool:
        """Bring one value, or as much of it as a guess is worth, into L1; False where it made way for somebody more urgent."""
        entry = None
        if job.ticket is None or not job.ticket.cancelled:
            entry = await self._find(job.parts, directories=True)
        if entry is None:
            job.at = -1  # there is none
            return True
        view = await self._view(entry, job.parts)
        try:
            image = view.image
            end = None if job.ticket is not None else self._keys.bytes_max
            for part in cut(chunks_of(image.size, image.chunk_size, job.at, end), WARM_CHUNKS):
                if job.ticket is not None and job.ticket.cancelled:
                    break
                if self._queue and self._queue[0][0] < -job.priority:
                    return False
                job.total.add(await warm_chunks(self._volume, image, part))
                job.at = (part[-1][0] + part[-1][1]) * image.chunk_size
            if job.ticket is None:
                self._keys.fetched("/".join(job.parts), job.total)
        finally:
            await self._leave_view(view)
        return True

    # --- figures ----------------------------------------------------------------------------------------------

    def _note(self, op: str, began_s: float) -> None:
        self._volume.latencies.of("library", op).note(time.perf_counter() - began_s)

    def stats(self) -> CacheStats:
        """What this cache has done since it was opened."""
        volume = self._check_open()
        return describe_stats(volume, self._counts, self._keys)

    def patterns(self, key: str) -> PatternFigures | None:
        """How a key is read (`novafs.prefetch.patterns`); None where it was not read here, or nothing is watched."""
        volume, parts = self._check_open(), check_key(key)
        found = volume.prefetcher.describe(watched_as(parts)) if volume.prefetcher is not None else {}
        return PatternFigures.of(found) if found else None


class AsyncValueReader:
    """One generation of a value, open for reading: `read`, `seek`, `tell`, `size`. Not for several tasks at once."""

    def __init__(self, cache: AsyncHierarchicalCache, key: str, view: _View) -> None:
        self.key = key
        self._cache = cache
        self._view: _View | None = view
        self._image = view.image
        self._at = 0

    @property
    def size(self) -> int:
        """Bytes of the value."""
        return self._image.size

    def _check_open(self) -> None:
        self._cache._check_open()
        if self._view is None:
            raise ClosedError(f"{self.key}: this reader is closed")

    async def read(self, size: int = -1) -> bytes:
        """The next `size` bytes, all that is left where negative; nothing at the end."""
        self._check_open()
        data = await self.read_at(self._at, self.size - self._at if size < 0 else size)
        self._at += len(data)
        return data

    async def read_at(self, offset: int, length: int) -> bytes:
        """Bytes from anywhere; short only at the end."""
        self._check_open()
        with self._cache.call():
            found = self._image.read_nowait(offset, length)
            return found if found is not None else await self._image.read(offset, length)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """As for files; the new place."""
        self._check_open()
        at = offset + (0 if whence == os.SEEK_SET else self._at if whence == os.SEEK_CUR else self.size)
        if at < 0:
            raise ConfigError(f"{self.key}: seek to {at}, before the beginning")
        self._at = at
        return at

    def tell(self) -> int:
        """Where the next `read` begins."""
        return self._at

    async def aclose(self) -> None:
        """Let it go. Again does nothing."""
        view, self._view = self._view, None
        if view is not None and not self._cache.ended:
            await self._cache._leave_view(view)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()


class AsyncValueWriter:
    """A value that is being written. Nothing of it is seen before `aclose` has returned; `abort`, or an exception, leaves the old one."""

    def __init__(self, cache: AsyncHierarchicalCache, volume: Volume, parts: Parts, ttl: float | None) -> None:
        self.key = "/".join(parts)
        self.written = 0
        """Bytes so far."""
        self._cache = cache
        self._volume = volume
        self._parts = parts
        self._ttl = ttl
        self._send, self._receive = trio.open_memory_channel[bytes](1)
        self._scope = trio.CancelScope()
        self._over = trio.Event()
        self._stored: StoredContent | None = None
        self._error: NovaError | None = None
        self._closed = False
        self._gathered = bytearray()

    async def run(self) -> None:
        """Store what is written; in the cache's background."""
        try:
            with self._scope:
                self._stored = await store_content(self._volume, self._runs(), size=None, cache=False)
        except NovaError as error:
            self._error = error
        except Exception as error:  # of this value alone: the cache goes on
            log.exception("%s: storing it failed by a mistake in NovaFS; please report it", self.key)
            self._error = BugError(f"{self.key}: storing it failed with {type(error).__name__}: {error}; please report it, with the log")
        finally:
            self._receive.close()
            self._over.set()

    async def _runs(self) -> AsyncGenerator[tuple[int, bytes], None]:
        at = 0
        async for data in self._receive:
            yield at, data
            at += len(data)

    def _check_open(self) -> None:
        self._cache._check_open()
        if self._closed:
            raise ClosedError(f"{self.key}: this writer is closed")
        if self._error is not None:
            raise self._error

    async def write(self, data: bytes | bytearray | memoryview) -> int:
        """Append bytes; how many (always all). Raises what storing raises."""
        self._check_open()
        view = flat(data)
        self.written += len(view)
        self._gathered += view
        if len(self._gathered) >= WRITE_BYTES:
            with self._cache.call():
                await self._hand_on()
        return len(view)

    async def _hand_on(self) -> None:
        data, self._gathered = bytes(self._gathered), bytearray()
        if data:
            try:
                await self._send.send(data)
            except trio.BrokenResourceError:
                await self._over.wait()
                raise (self._error or ClosedError(f"{self.key}: the cache was closed while this was written")) from None

    async def aclose(self) -> None:
        """Make it the value. Again does nothing. Raises what `set` raises; then the old value is there."""
        if self._closed:
            return
        self._check_open()
        with self._cache.call():
            await self._finish()

    async def _finish(self) -> None:
        began_s = time.perf_counter()
        try:
            await self._hand_on()
            self._closed = True
            self._send.close()
            await self._over.wait()
            if self._stored is None:
                raise self._error or ClosedError(f"{self.key}: the cache was closed while this was written")
            try:
                value = NewValue(self._parts, self._stored, _expiry(self._ttl))
                self._cache._published(await publish(self._volume, [value]))
            except PacksLostError as error:
                raise StaleError(f"{self.key}: writing took so long that a collection has taken parts of it; write it again") from error
        finally:
            self.abort()
        self._cache._counts.sets += 1
        self._cache._counts.set_bytes += self.written
        self._cache._note("write", began_s)

    def abort(self) -> None:
        """Forget what was written; the old value stays."""
        self._closed = True
        self._gathered = bytearray()
        self._send.close()
        self._scope.cancel()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if kind is not None:
            self.abort()
        else:
            await self.aclose()


# --- parts ------------------------------------------------------------------------------------------------------


def watched_as(parts: Parts) -> bytes:
    """What the prefetcher knows a key by: the same for all the values that it has in turn."""
    return b"key:" + "/".join(parts).encode()


def _take_lock(config: Config) -> StateLock:
    statedir.prepare(config.state_dir)
    try:
        return StateLock.take(config.state_dir, mountpoint="a program that uses the library")
    except BusyError as error:
        if statedir.holder(config.state_dir) == os.getpid():
            raise BusyError(
                f"{config.volume}: this process has the volume open already, with the state directory {config.state_dir}: use that cache, "
                f"from any thread, or close it first"
            ) from error
        raise


async def _make_volume(config: Config, chunk_size: int | None) -> None:
    from novafs.chunk import CHUNK_SIZE_DEFAULT
    from novafs.errors import VolumeExistsError
    from novafs.objectstore.client import StoreClient
    from novafs.objectstore.url import StoreOptions, create_root, open_store

    options = StoreOptions(pool_size=config.store.requests_max)
    await trio.to_thread.run_sync(lambda: create_root(config.volume_url, options=options))
    store = await trio.to_thread.run_sync(lambda: open_store(config.volume_url, options=options))
    try:
        client = StoreClient(store, io_timeout_s=config.store.io_timeout_s, requests_max=config.store.requests_max)
        await init_volume(client, chunk_size=chunk_size or CHUNK_SIZE_DEFAULT)
    except VolumeExistsError:
        return  # somebody else was faster
    finally:
        store.close()


def listed(keys: Iterable[str]) -> list[str]:
    """Several keys; a single text, of which each letter would be one, is refused. Raises ConfigError."""
    if isinstance(keys, (str, bytes)) or not isinstance(keys, Iterable):
        raise ConfigError(f"keys: found {keys!r:.80}; expected a list of keys")
    return list(keys)


def mapped(values: Mapping[str, bytes | bytearray | memoryview]) -> dict[str, bytes | bytearray | memoryview]:
    """Several values under their keys. Raises ConfigError."""
    if not isinstance(values, Mapping):
        raise ConfigError(f"values: found a {type(values).__name__}; expected a dict of keys and their values")
    return dict(values)


def flat(data: bytes | bytearray | memoryview) -> memoryview:
    """The bytes of anything that has some, wherever they lie. Raises TypeError."""
    view = memoryview(data)
    return (view if view.c_contiguous else memoryview(view.tobytes())).cast("B")


def _expiry(ttl: float | None) -> float | None:
    """When a value ends, seconds since the epoch. Raises ConfigError."""
    if ttl is None:
        return None
    if isinstance(ttl, bool) or not isinstance(ttl, (int, float)) or not 0 < ttl <= TTL_S_MAX:
        shown = repr(ttl) if not isinstance(ttl, int) or -TTL_S_MAX < ttl < TTL_S_MAX else "a number beyond all bounds"
        raise ConfigError(f"ttl: found {shown}; expected seconds, more than 0 and at most {TTL_S_MAX:g}, or None for a value that stays")
    return time.time() + ttl


def _with_expiry(entry: Entry, expires_s: float | None) -> Entry:
    import msgspec

    changed: Entry = msgspec.structs.replace(entry, expires_s=expires_s)
    return changed


def _checked_value(key: str, data: bytes | bytearray | memoryview, value_max: int) -> bytes:
    if not isinstance(data, (bytes, bytearray, memoryview)):
        raise ConfigError(f"{key}: the value is a {type(data).__name__}; expected bytes")
    size = memoryview(data).nbytes
    if size > value_max:
        raise TooLargeError(f"{key}: the value has {size:,} bytes, value_max is {value_max:,}; write it with open(key, 'wb')")
    return bytes(data)


def _check_together(wanted: Mapping[Parts, bytes]) -> None:
    """No key is the directory of another."""
    for parts in wanted:
        for length in range(1, len(parts)):
            if parts[:length] in wanted:
                raise NotDirectoryError(f"{'/'.join(parts)}: {'/'.join(parts[:length])} is to be a value, so it can not be a directory")


def _grouped(wanted: Mapping[Parts, bytes]) -> Iterator[list[tuple[Parts, bytes]]]:
    """Values that are stored together: neighbours, about a pack's worth."""
    group: list[tuple[Parts, bytes]] = []
    size = 0
    for parts, data in wanted.items():
        if group and size + len(data) > GROUP_BYTES:
            yield group
            group, size = [], 0
        group.append((parts, data))
        size += len(data)
    if group:
        yield group


__all__ = [
    "AsyncHierarchicalCache",
    "AsyncPrefetchTicket",
    "AsyncValueReader",
    "AsyncValueWriter",
    "PrefetchRequest",
    "PrefetchResult",
]
