"""Several hosts on one directory, in one process, and a clock that a test can turn: what tests of collection run on.

    world = World(tmp_path)
    with world.running():                       # the clock
        async with world.host("a") as volume:   # own state directory, own L1, own store object (`world.stores["a"]`)
            world.sleep(3600)                   # an hour passes on every clock: boot time, and the store's

Time passes only where a test says so, next to the little that the test itself takes. What a store's `hook` raises or waits
for happens to that host alone, before the call named.
"""

from __future__ import annotations

import contextlib
import os
import random
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import trio

import novafs.revisions
from novafs.config import load_config
from novafs.errors import StoreDeniedError
from novafs.objectstore.base import ObjectInfo
from novafs.objectstore.client import StoreClient
from novafs.objectstore.file import FileStore
from novafs.objectstore.url import create_root
from novafs.statedir import StateLock
from novafs.volume import Volume, init_volume, open_volume

FLAGS = {"l2.url": "none", "l1.capacity": "64MiB", "gc.grace": "1h", "l3.capacity": "64MiB", "writeback.interval": "1h"}
CHUNK = 4096
WAIT_S = 60
"""Bounds a hang where a test forgot to wake somebody."""


class AgedStore(FileStore):
    """A directory whose clock is the world's. hook: called with operation and name before each call; may raise, or wait."""

    def __init__(self, root: Path, world: World) -> None:
        super().__init__(root)
        self._world = world
        self.hook: Callable[[str, str], None] = lambda operation, name: None
        self.after: Callable[[str, str], None] = lambda operation, name: None

    def _aged(self, name: str) -> None:
        now = time.time() + self._world.ahead_s
        with contextlib.suppress(FileNotFoundError):
            os.utime(self.root / name, (now, now))

    def get(self, name: str, start: int = 0, length: int | None = None) -> bytes:
        self.hook("get", name)
        return super().get(name, start, length)

    def create(self, name: str, data: bytes) -> None:
        self.hook("create", name)
        super().create(name, data)
        self._aged(name)
        self.after("create", name)

    def put(self, name: str, data: bytes) -> None:
        self.hook("put", name)
        super().put(name, data)
        self._aged(name)

    def list(self, prefix: str, *, after: str = "", limit: int | None = None) -> list[ObjectInfo]:
        self.hook("list", prefix)
        return super().list(prefix, after=after, limit=limit)

    def head(self, name: str) -> ObjectInfo:
        self.hook("head", name)
        return super().head(name)

    def delete_many(self, names: Sequence[str]) -> None:
        for name in names:
            self.hook("delete", name)
            super().delete_many([name])

    def clock_s(self) -> float:
        self.hook("clock_s", "")
        return super().clock_s() + self._world.ahead_s


class Kill:
    """A hook that ends a host's work: from its `after`-th call on, nothing gets through any more."""

    def __init__(self, after: int) -> None:
        self.left = after
        self.calls = 0
        self._lock = threading.Lock()

    def __call__(self, operation: str, name: str) -> None:
        with self._lock:
            self.calls += 1
            self.left -= 1
            if self.left < 0:
                raise StoreDeniedError(f"killed before {operation} {name}")


class Pause:
    """A hook that holds a host's calls from the first `operation` on a name that starts with `prefix`, until `wake`."""

    def __init__(self, operation: str, prefix: str) -> None:
        self._operation, self._prefix = operation, prefix
        self._open = threading.Event()
        self.reached = threading.Event()

    def __call__(self, operation: str, name: str) -> None:
        if self.reached.is_set() or (operation == self._operation and name.startswith(self._prefix)):
            self.reached.set()
            assert self._open.wait(WAIT_S), "nobody woke it"

    def wake(self) -> None:
        """Let it go on."""
        self._open.set()


class Sleeper:
    """Work of a host that falls asleep at a store call:

    async with world.asleep("a", "create", "images/", work) as sleeper:
        …                       # `work` is under way, and stopped
    sleeper.error               # what it raised, once the block was left
    """

    def __init__(self, pause: Pause) -> None:
        self.pause = pause
        self.done = trio.Event()
        self.error: BaseException | None = None
        self.result: Any = None

    async def run(self, work: Callable[[], Awaitable[Any]]) -> None:
        """The work itself."""
        try:
            self.result = await work()
        except Exception as error:
            self.error = error
        finally:
            self.done.set()

    async def wait_asleep(self) -> bool:
        """Whether it stopped; False where it was done without coming by."""
        while not self.pause.reached.is_set() and not self.done.is_set():
            await trio.sleep(0.002)
        return self.pause.reached.is_set()


class World:
    """The store, the clock, and the hosts."""

    def __init__(self, directory: Path, *, chunk_size: int = CHUNK, delta: bool = False, **flags: str) -> None:
        self.directory = directory
        self.delta = delta
        self.root = directory / "store"
        self.url = f"file://{self.root}"
        self.chunk_size = chunk_size
        self.flags = {**FLAGS, **{key.replace("__", "."): value for key, value in flags.items()}}
        self.ahead_s = 0.0
        self.stores: dict[str, AgedStore] = {}
        self._made = False

    def sleep(self, seconds: float) -> None:
        """Time passes for everybody."""
        self.ahead_s += seconds

    @contextlib.contextmanager
    def running(self) -> Iterator[World]:
        """While this is open, the boot clock is the world's."""
        real = novafs.revisions.time
        fake: Any = SimpleNamespace(
            CLOCK_BOOTTIME=time.CLOCK_BOOTTIME, clock_gettime=lambda which: time.clock_gettime(which) + self.ahead_s
        )
        novafs.revisions.time = fake
        try:
            yield self
        finally:
            novafs.revisions.time = real

    @asynccontextmanager
    async def host(self, name: str, *, read_only: bool = False, **flags: str) -> AsyncIterator[Volume]:
        """The volume as a host of this name opens it; made where it is not there yet."""
        if not self._made:
            self._made = True
            create_root(self.url)
            await init_volume(StoreClient(AgedStore(self.root, self)), chunk_size=self.chunk_size, delta=self.delta)
        state_dir = self.directory / name
        state_dir.mkdir(exist_ok=True)
        given = {**self.flags, "state_dir": str(state_dir), **{key.replace("__", "."): value for key, value in flags.items()}}
        config = load_config(self.url, flags=given, environ={})
        store = self.stores[name] = AgedStore(self.root, self)
        lock = StateLock.take(state_dir, mountpoint="tests")
        try:
            async with open_volume(config, read_only=read_only, owns_state=True, store=store) as volume:
                yield volume
        finally:
            lock.release()

    @asynccontextmanager
    async def asleep(self, host: str, operation: str, prefix: str, work: Callable[[], Awaitable[Any]]) -> AsyncIterator[Sleeper]:
        """Start `work`, stop it at a call of that host's store, and wake it at the end of the block, where it is waited for."""
        sleeper = Sleeper(Pause(operation, prefix))
        store = self.stores[host]
        async with trio.open_nursery() as nursery:
            store.hook = sleeper.pause
            nursery.start_soon(sleeper.run, work)
            try:
                assert await sleeper.wait_asleep(), f"it was done ({sleeper.error!r}) without a {operation} of {prefix}"
                yield sleeper
            finally:
                store.hook = lambda operation, name: None
                sleeper.pause.wake()
                await sleeper.done.wait()

    def names(self, prefix: str = "") -> list[str]:
        """Objects in the store."""
        return [info.name for info in AgedStore(self.root, self).list(prefix)]


def pattern(seed: int, length: int = CHUNK) -> bytes:
    """Bytes that do not compress to nothing and are the same for the same seed."""
    return b"".join(seed.to_bytes(4, "little") + at.to_bytes(4, "little") for at in range(0, length, 8))[:length]


_COMMON = random.Random(11).randbytes(1 << 20)


def alike(seed: int, length: int = CHUNK) -> bytes:
    """Bytes that do not compress at all, and differ in a few from those of another seed."""
    mark = seed.to_bytes(4, "little") * 8
    return (_COMMON[: length // 2] + mark + _COMMON[length // 2 :])[:length]


async def write_image(volume: Volume, name: str, chunks: dict[int, bytes]) -> bytes:
    """Write whole chunks of an image, made where it is not there; its id. Committed."""
    from novafs.catalogtree import ROOT_ID
    from novafs.errors import NotFoundError

    try:
        entry = await volume.catalog.resolve(name, max_age_s=0)
    except NotFoundError:
        entry = await volume.create(ROOT_ID, name)
    image = await volume.open_image(entry.node_id)
    for index, data in sorted(chunks.items()):
        await image.write(index * volume.chunk_size, data)
    await volume.close_image(image)
    return entry.node_id


async def read_image(volume: Volume, name: str) -> bytes:
    """The whole content, from the store."""
    volume.cache.l1.clear()
    entry = await volume.catalog.resolve(name, max_age_s=0)
    image = await volume.open_image(entry.node_id)
    try:
        return await image.read(0, image.size)
    finally:
        await volume.close_image(image)
