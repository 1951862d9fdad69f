"""`HierarchicalCache`: a volume as a cache of values under keys, for programs that know nothing of trio or FUSE. Blocking and thread-safe.

    with HierarchicalCache("/var/cache/vms") as cache:
        cache.set("vm-001-disk", data, ttl=3600)
        data = cache.get("vm-001-disk")

It is `novafs.asynchierarchical` run on a thread of its own (`novafs.portal`); what that promises holds here, and:

- Any number of threads may use one cache at once. Reads and writes of several threads run beside each other.
- Ctrl-C while a call waits cancels what it waits for: then the value is the old one or the new one.
- A program that ends without `close` has lost no value: what `set` has stored is in the store. It is closed then as well as
  can be, and a temporary one is removed.
- After a fork the child has no cache: every call there raises ClosedError, and the parent goes on.

A file that `open` gives belongs to one thread at a time.
"""

from __future__ import annotations

import contextlib
import io
import os
import threading
import warnings
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import asynccontextmanager
from functools import partial
from types import TracebackType
from typing import Any, Final, Literal, Self, overload

from novafs.asynchierarchical import (
    AsyncHierarchicalCache,
    AsyncPrefetchTicket,
    AsyncValueReader,
    AsyncValueWriter,
    PrefetchRequest,
    PrefetchResult,
    flat,
    listed,
    mapped,
)
from novafs.cacheconfig import CacheConfig
from novafs.cachestats import CacheStats, PatternFigures
from novafs.errors import ClosedError, ConfigError, NovaError, RetryableError
from novafs.portal import Portal

EXIT_S: Final = 30.0
"""How long the end of a program waits for caches that it has not closed."""
BUFFER_BYTES: Final = 1 << 20

_Portal = Portal[AsyncHierarchicalCache]
_open_portals: Final[weakref.WeakSet[_Portal]] = weakref.WeakSet()


def _forget_in_child() -> None:
    """The lock of a state directory belongs to the parent: a copy that a child keeps open would outlast the parent's own."""
    for portal in list(_open_portals):
        lock = getattr(portal.value, "lock", None)
        if lock is not None:
            with contextlib.suppress(OSError):
                lock.release()


os.register_at_fork(after_in_child=_forget_in_child)


def _abandon(portal: _Portal) -> None:
    """At the end of the program, or of the object, without `close`."""
    if portal.open:
        with contextlib.suppress(Exception):  # nobody is there to be told
            portal.close(EXIT_S)


class PrefetchTicket:
    """A request that was taken."""

    def __init__(self, portal: _Portal, ticket: AsyncPrefetchTicket) -> None:
        self._portal = portal
        self._ticket = ticket

    @property
    def done(self) -> bool:
        """Whether all that will be fetched was."""
        return self._ticket.done

    def wait(self, timeout_s: float | None = None) -> PrefetchResult:
        """What became of it, once it is over. Raises RetryableError where that takes longer than `timeout_s`."""

        if timeout_s is not None and not timeout_s >= 0:
            raise ConfigError(f"timeout_s: found {timeout_s!r}; expected seconds, 0 or more, or None to wait as long as it takes")

        async def wait() -> PrefetchResult | None:
            import trio

            with trio.move_on_after(float("inf") if timeout_s is None else timeout_s):
                return await self._ticket.wait()
            return None

        found = self._portal.call(wait)
        if found is None:
            raise RetryableError(f"prefetch: {len(self._ticket.request.keys)} keys were not there within {timeout_s:g} s; they still come")
        return found

    def cancel(self) -> None:
        """Fetch no more of it."""
        self._ticket.cancel()


class HierarchicalCache:
    """See the module; methods are those of `AsyncHierarchicalCache`, and raise the same."""

    def __init__(self, volume: str | os.PathLike[str] | None = None, config: CacheConfig | None = None) -> None:
        """Open, or make, the volume: a directory, a URL, or the NAME of a configured volume; None: a temporary directory.

        Raises ConfigError, BusyError (the volume is open in this process or another, or mounted), NoVolumeError (`create` is off),
        VolumeError, StoreDeniedError, StoreUnavailableError, ….
        """
        cache = AsyncHierarchicalCache(volume, config)

        @asynccontextmanager
        async def opened() -> Any:
            async with cache:
                yield cache

        self.config = cache.config
        self._portal: _Portal = Portal(opened, name="the cache" if volume is None else f"the cache of {os.fspath(volume)}")
        _open_portals.add(self._portal)
        self._finalizer = weakref.finalize(self, _abandon, self._portal)

    # --- values -------------------------------------------------------------------------------------------------

    @overload
    def get(self, key: str) -> bytes | None: ...
    @overload
    def get(self, key: str, default: bytes) -> bytes: ...
    def get(self, key: str, default: bytes | None = None) -> bytes | None:
        """The value, `default` where there is none."""
        return self._portal.call(partial(self._portal.value.get, key, default, stream=threading.get_ident()))

    def set(self, key: str, data: bytes | bytearray | memoryview, ttl: float | None = None) -> None:
        """Make `data` the value of `key`, for `ttl` seconds or for good. It is in the store when this returns."""
        self._portal.call(self._portal.value.set, key, data, ttl)

    def delete(self, key: str) -> bool:
        """Take the value away; whether there was one."""
        return self._portal.call(self._portal.value.delete, key)

    def contains(self, key: str) -> bool:
        """Whether there is a value."""
        return self._portal.call(self._portal.value.contains, key)

    def get_multi(self, keys: Iterable[str]) -> dict[str, bytes]:
        """The values of those keys that have one, read beside each other."""
        return self._portal.call(partial(self._portal.value.get_multi, listed(keys), stream=threading.get_ident()))

    def set_multi(self, values: Mapping[str, bytes | bytearray | memoryview], ttl: float | None = None) -> None:
        """`set` of all of them at once: a reader finds all the old or all the new values."""
        self._portal.call(self._portal.value.set_multi, mapped(values), ttl)

    def delete_multi(self, keys: Iterable[str]) -> int:
        """Take values away, all at once; how many there were."""
        return self._portal.call(self._portal.value.delete_multi, listed(keys))

    def touch(self, key: str, ttl: float | None = None) -> bool:
        """Let the value last `ttl` seconds from now, None for good; whether there was one."""
        return self._portal.call(self._portal.value.touch, key, ttl)

    def size(self, key: str) -> int | None:
        """Bytes of the value, None where there is none."""
        return self._portal.call(self._portal.value.size, key)

    def keys(self, prefix: str = "") -> list[str]:
        """The keys that begin with `prefix`, sorted."""
        return self._portal.call(self._portal.value.keys, prefix)

    def clear(self) -> int:
        """Take every value away, and every directory of the volume; how many values there were."""
        return self._portal.call(self._portal.value.clear)

    def drop_cached(self) -> None:
        """Empty L1 and L2; no value is lost."""
        self._portal.call(self._portal.value.drop_cached)

    def collect(self, *, grace_s: float | None = None) -> Any:
        """Delete what nothing names any more: `novafs gc`, with its report."""
        return self._portal.call(partial(self._portal.value.collect, grace_s=grace_s))

    def __contains__(self, key: object) -> bool:
        return isinstance(key, str) and self.contains(key)

    def __len__(self) -> int:
        return self._portal.call(self._portal.value.count)

    def __bool__(self) -> bool:
        """A cache is one, empty or not."""
        return True

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    # --- streams ------------------------------------------------------------------------------------------------

    @overload
    def open(self, key: str, mode: Literal["rb"] = "rb") -> io.BufferedReader: ...
    @overload
    def open(self, key: str, mode: Literal["wb"], ttl: float | None = None) -> ValueWriter: ...
    @overload
    def open(self, key: str, mode: str, ttl: float | None = None) -> io.BufferedIOBase: ...
    def open(self, key: str, mode: str = "rb", ttl: float | None = None) -> io.BufferedIOBase:
        """The value as a binary file: "rb" (seekable), or "wb", which makes a new one.

        What was written is the value once the file is closed without an error; leaving a `with` block by an exception keeps the old one.
        """
        found = self._portal.call(self._open, key, mode, ttl, threading.get_ident())
        if isinstance(found, AsyncValueWriter):
            return ValueWriter(self._portal, found)
        return io.BufferedReader(_RawValue(self._portal, found), BUFFER_BYTES)

    async def _open(self, key: str, mode: str, ttl: float | None, stream: int) -> AsyncValueReader | AsyncValueWriter:
        cache = self._portal.value
        return await cache.open_reader(key, stream=stream) if mode == "rb" and ttl is None else await cache.open(key, mode, ttl)

    # --- ahead of need ------------------------------------------------------------------------------------------

    def prefetch(self, request: PrefetchRequest) -> PrefetchTicket:
        """Bring the values of keys into L1 in the background. Returns at once."""
        return PrefetchTicket(self._portal, self._now(self._portal.value.prefetch, request))

    def predict_next(self, key: str, n: int = 5) -> list[tuple[str, float]]:
        """At most `n` keys that are likely to be read after `key`, with the chance of each, likeliest first."""
        found: list[tuple[str, float]] = self._now(self._portal.value.predict_next, key, n)
        return found

    # --- figures ------------------------------------------------------------------------------------------------

    def stats(self) -> CacheStats:
        """What this cache has done since it was opened."""
        found: CacheStats = self._now(self._portal.value.stats)
        return found

    def patterns(self, key: str) -> PatternFigures | None:
        """How a key is read: sequential, random, periodic or bursty; None where it was not read here."""
        found: PatternFigures | None = self._now(self._portal.value.patterns, key)
        return found

    @property
    def volume_url(self) -> str:
        """Where the volume is: what `novafs mount` takes."""
        found: str = self._now(lambda: self._portal.value.volume_url)
        return found

    def _now(self, function: Any, *arguments: Any) -> Any:
        """A function that waits for nothing, on the cache's thread."""

        async def call() -> Any:
            import trio

            await trio.lowlevel.checkpoint()
            return function(*arguments)

        return self._portal.call(call)

    # --- the end ------------------------------------------------------------------------------------------------

    @property
    def closed(self) -> bool:
        """Whether it takes no calls, here."""
        return not self._portal.open

    def close(self) -> None:
        """Let calls that run end, keep what was learned, give everything back; a temporary volume is removed. Again does nothing."""
        self._finalizer.detach()
        self._portal.close()

    def __enter__(self) -> Self:
        if self.closed:
            raise ClosedError(f"{self._portal.name} is closed")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<HierarchicalCache: {self._portal.name}{', closed' if self.closed else ''}>"


class _RawValue(io.RawIOBase):
    """Under the buffered reader: one generation of a value."""

    def __init__(self, portal: _Portal, reader: AsyncValueReader) -> None:
        self._portal = portal
        self._reader = reader
        self.name = reader.key
        self.mode = "rb"

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._portal.call(self._reader.read, memoryview(buffer).nbytes)
        memoryview(buffer).cast("B")[: len(data)] = data
        return len(data)

    def readall(self) -> bytes:
        """All that is left, in one call: the default would make one for every 8 KiB."""
        if self.closed:
            raise ValueError("read of a closed file")
        return self._portal.call(self._reader.read)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        if self.closed:
            raise ValueError("seek of a closed file")
        return self._reader.seek(offset, whence)

    def tell(self) -> int:
        return self._reader.tell()

    def close(self) -> None:
        # Never waits: a file that is forgotten is closed by the collector of garbage, on whatever thread that runs.
        if not self.closed:
            super().close()
            self._portal.spawn(self._reader.aclose)


class ValueWriter(io.BufferedIOBase):
    """A value that is being written; nothing of it is seen before `close` has returned. `abort` keeps the old one."""

    def __init__(self, portal: _Portal, writer: AsyncValueWriter) -> None:
        self._portal = portal
        self._writer = writer
        self._gathered = bytearray()
        self._at = 0
        self.name = writer.key
        self.mode = "wb"

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        if self.closed:
            raise ValueError("write to a closed file")
        view = flat(data)
        self._gathered += view
        self._at += len(view)
        if len(self._gathered) >= BUFFER_BYTES:
            self._hand_on()
        return len(view)

    def _hand_on(self) -> None:
        if self._gathered:
            data, self._gathered = self._gathered, bytearray()
            self._portal.call(self._writer.write, data)

    def tell(self) -> int:
        return self._at

    def flush(self) -> None:
        """Does nothing: a part of a value is never seen."""

    def close(self) -> None:
        """Make what was written the value. Raises what `set` raises; then the old value is there."""
        if self.closed:
            return
        try:
            self._hand_on()
            self._portal.call(self._writer.aclose)
        except BaseException:
            self.abort()
            raise
        super().close()

    def abort(self) -> None:
        """Forget what was written; the old value stays."""
        self._gathered = bytearray()
        if not self.closed:
            super().close()
            with contextlib.suppress(NovaError):
                self._portal.call(self._abort)

    async def _abort(self) -> None:
        import trio

        await trio.lowlevel.checkpoint()
        self._writer.abort()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if kind is not None:
            self.abort()
        else:
            self.close()

    def __del__(self) -> None:
        if not self.closed:
            warnings.warn(f"{self.name}: a value that was not closed is given up", ResourceWarning, stacklevel=2, source=self)
            self._gathered = bytearray()
            super().close()
            self._portal.spawn(self._abort)  # see `_RawValue.close`


__all__ = ["CacheConfig", "HierarchicalCache", "PrefetchRequest", "PrefetchResult", "PrefetchTicket", "ValueWriter"]
