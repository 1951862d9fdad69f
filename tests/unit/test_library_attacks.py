"""The library as programs misuse it: wrong arguments, closing from anywhere, files that are forgotten, changes that meet."""

from __future__ import annotations

import gc
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

import novafs.asynchierarchical
import novafs.volume
from novafs import AsyncHierarchicalCache, CacheConfig, HierarchicalCache, PrefetchRequest
from novafs.catalogtree import ROOT_ID
from novafs.errors import BugError, ClosedError, ConfigError, NotFoundError
from novafs.snapshots import take_snapshot
from novafs.values import remove_all
from tests.support.fixtures import run
from tests.support.hosts import World

MIB = 1 << 20
WAIT_S = 60.0


def config(directory: Path, name: str = "state", **fields: Any) -> CacheConfig:
    return CacheConfig.default(state_dir=directory / name, l1_capacity="32MiB", **fields)


@asynccontextmanager
async def opened(directory: Path, name: str = "state", **fields: Any) -> AsyncIterator[AsyncHierarchicalCache]:
    async with AsyncHierarchicalCache(directory / "volume", config(directory, name, **fields)) as cache:
        yield cache


# --- arguments ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ttl", [10**400, -(10**400), 1e300, float("-inf")])
def test_a_time_out_beyond_all_bounds_is_refused_by_name(tmp_path: Path, ttl: float) -> None:
    with HierarchicalCache(tmp_path / "volume", config(tmp_path)) as cache, pytest.raises(ConfigError, match="ttl"):
        cache.set("a", b"x", ttl=ttl)


def test_a_time_out_of_next_to_nothing_is_over_at_once(tmp_path: Path) -> None:
    with HierarchicalCache(tmp_path / "volume", config(tmp_path)) as cache:
        cache.set("a", b"x", ttl=1e-12)
        assert cache.get("a") is None
        assert cache.clear() == 0  # it counts as gone


def test_what_is_no_list_of_keys_and_no_dict_is_refused(tmp_path: Path) -> None:
    with HierarchicalCache(tmp_path / "volume", config(tmp_path)) as cache:
        cache.set_multi({"a": b"1", "b": b"2"})
        wrong: Any
        for wrong in ("ab", b"ab", 5):
            with pytest.raises(ConfigError, match="expected a list of keys"):
                cache.get_multi(wrong)
            with pytest.raises(ConfigError, match="expected a list of keys"):
                cache.delete_multi(wrong)
        for wrong in ([("a", b"3")], "ab", None):
            with pytest.raises(ConfigError, match="expected a dict"):
                cache.set_multi(wrong)
        with pytest.raises(ConfigError, match="prefix"):
            cache.keys(wrong)
        ticket = cache.prefetch(PrefetchRequest(["a"]))
        for wrong in (-1, float("nan")):
            with pytest.raises(ConfigError, match="timeout_s"):
                ticket.wait(wrong)
        assert cache.get_multi(key for key in ("a", "b")) == {"a": b"1", "b": b"2"}


def test_a_stream_takes_bytes_wherever_they_lie(tmp_path: Path) -> None:
    with HierarchicalCache(tmp_path / "volume", config(tmp_path)) as cache:
        with cache.open("a", "wb") as file:
            assert file.write(memoryview(b"a-b-c-")[::2]) == 3
        assert cache.get("a") == b"abc"


# --- closing ------------------------------------------------------------------------------------------------------


def test_closing_in_the_middle_of_anything_is_orderly(tmp_path: Path) -> None:
    """From a task beside those that use it, and inside of a nursery: calls that run end, everything else is told."""
    content = bytes(range(256)) * 4096 * 8

    async def main() -> None:
        cache = AsyncHierarchicalCache(tmp_path / "volume", config(tmp_path))
        found: list[object] = []

        async def note(work: Callable[[], Awaitable[object]]) -> None:
            try:
                found.append(await work())
            except ClosedError:
                found.append("closed")

        async with cache:
            await cache.set("big", content)
            await cache.drop_cached()
            writer = await cache.open_writer("w")
            reader = await cache.open_reader("big")
            ticket = cache.prefetch(PrefetchRequest(["big"] * 50))
            async with trio.open_nursery() as nursery:
                for _ in range(3):
                    nursery.start_soon(note, lambda: cache.get("big"))
                nursery.start_soon(note, lambda: cache.set("new", content))
                await trio.testing.wait_all_tasks_blocked()
                nursery.start_soon(cache.aclose)
                await cache.aclose()
            assert sorted(map(str, found), key=len) == sorted(map(str, [content, content, content, None]), key=len)
            assert cache.closed
            for work in (lambda: writer.write(b"x" * 2 * MIB), lambda: writer.aclose(), lambda: reader.read(1), lambda: cache.get("big")):
                with pytest.raises(ClosedError):
                    await work()
            await reader.aclose()
            writer.abort()
            await ticket.wait()  # over, whatever became of it
        async with cache:
            assert await cache.keys() == ["big", "new"]

    trio.run(main)


def test_opening_that_is_given_up_leaves_nothing_open(tmp_path: Path) -> None:
    async def main() -> None:
        cache = AsyncHierarchicalCache(tmp_path / "volume", config(tmp_path))
        with trio.CancelScope() as scope:
            scope.cancel()
            await cache.__aenter__()
        assert scope.cancelled_caught
        async with cache, trio.open_nursery() as nursery:  # the state directory is free again
            await cache.set("a", b"x")
            with trio.move_on_after(WAIT_S):
                await cache.aclose()
            nursery.cancel_scope.cancel()
        async with cache:
            assert await cache.get("a") == b"x"

    trio.run(main)


def test_an_engine_that_fails_says_so_and_takes_no_more_calls(tmp_path: Path) -> None:
    async def main() -> None:
        cache = AsyncHierarchicalCache(tmp_path / "volume", config(tmp_path))
        await cache.__aenter__()

        async def fail() -> None:
            raise RuntimeError("scripted")

        cache._nursery.start_soon(fail)
        running = cache._running
        assert running is not None
        with trio.fail_after(WAIT_S):
            await running.over.wait()
        with pytest.raises(ClosedError) as told:
            await cache.get("a")
        assert isinstance(told.value.__cause__, RuntimeError)
        with pytest.raises(RuntimeError, match="scripted"):
            await cache.aclose()
        async with cache:
            assert await cache.get("a") is None

    trio.run(main)


# --- files that are forgotten -------------------------------------------------------------------------------------


def views_in_use(cache: HierarchicalCache) -> int:
    return sum(view.users for view in cache._portal.value._views.values())


@pytest.mark.filterwarnings("ignore:.*given up:ResourceWarning")
def test_files_that_are_forgotten_are_given_back_whatever_thread_finds_out(tmp_path: Path) -> None:
    """The collector of garbage runs anywhere, on the cache's own thread as well: it must wait for nothing there."""

    class Ring:
        pass

    with HierarchicalCache(tmp_path / "volume", config(tmp_path)) as cache:
        cache.set("a", b"x" * 100_000)

        def forget() -> None:
            ring: Any = Ring()
            ring.self = ring
            ring.reader, ring.writer = cache.open("a"), cache.open("w", "wb")
            ring.reader.read(10)
            ring.writer.write(b"half of it")

        async def collect() -> None:
            gc.collect()

        gc.disable()
        try:
            forget()
            assert views_in_use(cache) == 1
            cache._portal.call(collect)
        finally:
            gc.enable()
        deadline_s = time.monotonic() + WAIT_S
        while views_in_use(cache) and time.monotonic() < deadline_s:
            time.sleep(0.01)
        assert views_in_use(cache) == 0
        assert cache.keys() == ["a"]


def test_a_mistake_while_one_value_is_stored_is_that_values_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def broken(*_: object, **__: object) -> None:
        raise RuntimeError("scripted")

    with HierarchicalCache(tmp_path / "volume", config(tmp_path)) as cache:
        cache.set("a", b"old")
        with monkeypatch.context() as patch:
            patch.setattr(novafs.asynchierarchical, "store_content", broken)
            with pytest.raises(BugError, match="scripted"), cache.open("a", "wb") as file:
                file.write(b"new")
        assert cache.get("a") == b"old"
        with cache.open("a", "wb") as file:
            file.write(b"new")
        assert cache.get("a") == b"new"


# --- changes that meet --------------------------------------------------------------------------------------------


def test_clear_takes_what_was_made_a_moment_before_its_commit(tmp_path: Path) -> None:
    """And tells so: a host that has it open must know that its name is gone."""

    async def main() -> None:
        world = World(tmp_path)
        with world.running():
            async with world.host("a") as a, world.host("b") as b:
                await a.create(ROOT_ID, "early")
                await a.mkdir(ROOT_ID, "d")
                async with world.asleep("a", "create", "catalog/", lambda: remove_all(a)) as sleeper:
                    await b.catalog.refresh()
                    await b.create((await b.catalog.resolve("d")).node_id, "late")
                assert sleeper.error is None
                assert sorted(entry.name for entry in sleeper.result) == ["early", "late"]
                await b.catalog.refresh()
                assert await b.catalog.list(ROOT_ID) == []

    run(main)


def test_a_value_with_snapshots_that_is_set_anew_needs_no_commit_of_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(novafs.volume, "HINT_INTERVAL_S", 3600.0)  # hints are commits as well

    async def main() -> None:
        async with opened(tmp_path) as cache:
            await cache.set("a", b"old")
            catalog = cache._volume.catalog
            await take_snapshot(cache._volume, await catalog.resolve("a"), "s")
            with catalog_commits(cache) as commits:
                await cache.set("a", b"new")
                assert commits() == 0
                await cache.set("a", b"new", ttl=100)
                assert commits() == 1
            assert await cache.get("a") == b"new"

    trio.run(main)


class catalog_commits:
    """How many commits of the catalog a block makes, those of hints left out: `with catalog_commits(cache) as commits: …; commits()`."""

    def __init__(self, cache: AsyncHierarchicalCache) -> None:
        self._catalog = cache._volume.catalog
        self._change = self._catalog.change
        self._count = 0

    def __enter__(self) -> Callable[[], int]:
        async def counted(operation: Any) -> Any:
            before = self._catalog.revision
            result = await self._change(operation)
            self._count += self._catalog.revision > before
            return result

        self._catalog.change = counted  # type: ignore[method-assign]
        return lambda: self._count

    def __exit__(self, *_: object) -> None:
        self._catalog.change = self._change  # type: ignore[method-assign]


def test_touch_finds_a_value_that_was_set_anew_while_it_looked(tmp_path: Path) -> None:
    async def main() -> None:
        async with opened(tmp_path) as one, opened(tmp_path, "two", fresh_s=0.0) as two:
            await one.set("a", b"old", ttl=50)
            catalog = one._volume.catalog
            update, left = catalog.update, [None]

            async def overtaken(*arguments: Any) -> Any:
                if left:
                    left.pop()
                    await two.set("a", b"new", ttl=50)
                    await catalog.refresh()
                return await update(*arguments)

            catalog.update = overtaken  # type: ignore[method-assign]
            assert await one.touch("a")
            assert (await two._volume.catalog.resolve("a", max_age_s=0)).expires_s is None
            assert await two.get("a") == b"new"

    trio.run(main)


def test_a_size_is_looked_up_again_where_the_value_was_collected_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with opened(tmp_path) as cache:
            await cache.set("a", b"12345")
            view, left = cache._view, [None]

            async def gone(*arguments: Any) -> Any:
                if left:
                    left.pop()
                    raise NotFoundError("scripted: collected")
                return await view(*arguments)

            monkeypatch.setattr(cache, "_view", gone)
            assert await cache.size("a") == 5

    trio.run(main)
