"""The async client on a real directory store with scripted failures, and behind a fault proxy on the real Ceph."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import trio
import trio.testing

from novafs.errors import (
    NovaError,
    ObjectExistsError,
    ObjectNotFoundError,
    StoreDeniedError,
    StoreFullError,
    StoreUnavailableError,
)
from novafs.objectstore.client import StoreClient
from novafs.objectstore.file import create_root
from novafs.objectstore.url import StoreOptions, open_store
from tests.support.ceph import Ceph
from tests.support.fault_proxy import Answer, HttpFaultProxy, LoseAnswer
from tests.support.fixtures import BUCKET, run
from tests.support.flaky_store import FlakyStore, Gate


@pytest.fixture
def store(tmp_path: Path) -> FlakyStore:
    create_root(tmp_path / "store")
    return FlakyStore(tmp_path / "store")


def client(store: FlakyStore, *, io_timeout_s: float = 30, requests_max: int = 4) -> StoreClient:
    return StoreClient(store, io_timeout_s=io_timeout_s, requests_max=requests_max, backoff_first_s=0.001, backoff_max_s=0.002)


def unavailable(text: str = "503") -> StoreUnavailableError:
    return StoreUnavailableError(text)


def test_every_call_means_what_the_stores_does(store: FlakyStore) -> None:
    async def main() -> None:
        one = client(store)
        assert one.url == store.url
        assert one.store is store
        await one.create("a/1", b"0123456789")
        await one.put("a/2", b"x")
        assert await one.get("a/1") == b"0123456789"
        assert await one.get("a/1", 3, 4) == b"3456"
        assert [row.name for row in await one.list("a/", after="a/1", limit=5)] == ["a/2"]
        assert (await one.head("a/1")).size == 10
        assert await one.clock_s() > 0
        assert (await one.usage()).capacity_bytes
        assert await one.probe_create_only()
        await one.delete("a/1")
        await one.delete_many(["a/1", "a/2"])
        assert await one.list("") == []
        counted = one.statistics()
        assert (counted.running, counted.waiting) == (0, 0)
        get = counted.by_operation["get"]
        assert (get.calls, get.requests, get.retries, get.read_bytes, get.errors) == (2, 2, 0, 14, {})
        assert counted.by_operation["create"].written_bytes == 10
        assert counted.by_operation["put"].written_bytes == 1
        assert get.seconds > 0
        await one.aclose()

    run(main)


def test_what_is_retryable_is_tried_again_and_counted(store: FlakyStore) -> None:
    async def main() -> None:
        one = client(store)
        store.before = {"create": [unavailable()] * 3, "get": [unavailable()] * 2}
        await one.create("a", b"x")
        assert await one.get("a") == b"x"
        counts = one.statistics().by_operation
        assert (counts["create"].calls, counts["create"].requests, counts["create"].retries, counts["create"].errors) == (1, 4, 3, {})
        assert (counts["get"].requests, counts["get"].retries, store.calls["get"]) == (3, 2, 3)

    run(main)


@pytest.mark.parametrize("error", [StoreFullError, StoreDeniedError, ObjectNotFoundError, ObjectExistsError])
def test_what_is_permanent_is_raised_at_once(store: FlakyStore, error: type[NovaError]) -> None:
    async def main() -> None:
        one = client(store)
        store.before = {"create": [error("no")]}
        with pytest.raises(error):
            await one.create("a", b"x")
        assert store.calls["create"] == 1
        assert one.statistics().by_operation["create"].errors == {error.__name__: 1}

    run(main)


def test_a_create_whose_answer_was_lost_finds_its_own_object(store: FlakyStore) -> None:
    async def main() -> None:
        one = client(store)
        store.after = {"create": [unavailable("the answer was lost")]}
        with pytest.raises(ObjectExistsError):
            await one.create("a", b"mine")
        assert await one.get("a") == b"mine"

    run(main)


def test_the_last_error_is_raised_when_the_time_is_over(store: FlakyStore) -> None:
    async def main() -> None:
        one = client(store, io_timeout_s=0.05)
        failures = (unavailable(f"failure {number}") for number in itertools.count())
        store.before = {"get": Endless(failures)}  # type: ignore[dict-item]
        with pytest.raises(StoreUnavailableError, match=r"failure \d+"):
            await one.get("a")
        counts = one.statistics().by_operation["get"]
        assert counts.requests == store.calls["get"] > 1
        assert counts.retries == counts.requests - 1
        assert counts.errors == {"StoreUnavailableError": 1}

    run(main)


class Endless(list[Exception]):
    """A plan that never ends."""

    def __init__(self, steps: object) -> None:
        super().__init__([unavailable()])
        self._steps = steps

    def pop(self, index: object = -1) -> Exception:
        return next(self._steps)  # type: ignore[call-overload, no-any-return]


def test_a_read_that_hangs_is_left_behind_when_the_time_is_over_and_keeps_its_place(store: FlakyStore) -> None:
    async def main() -> None:
        gate = Gate()
        one = client(store, io_timeout_s=0.05, requests_max=1)
        store.put("a", b"x")
        store.before = {"get": [gate]}
        with pytest.raises(StoreUnavailableError, match=r"get a: no answer within io_timeout_s = 0\.05 s"):
            await one.get("a")
        assert one.statistics().running == 1
        with pytest.raises(StoreUnavailableError, match="list a: 1 earlier requests still wait for their answers, so it was not begun"):
            await one.list("a")
        assert "list" not in store.calls
        assert one.statistics().by_operation["list"].requests == 0
        gate.open()
        one.io_timeout_s = 60
        assert await one.get("a") == b"x"

    run(main)


def test_a_cancelled_read_ends_at_once(store: FlakyStore) -> None:
    async def main() -> None:
        gate = Gate()
        one = client(store)
        store.put("a", b"x")
        store.before = {"get": [gate]}
        async with trio.open_nursery() as nursery:
            nursery.start_soon(one.get, "a")
            await trio.to_thread.run_sync(gate.wait_reached)
            nursery.cancel_scope.cancel()
        assert one.statistics().running == 1
        gate.open()

    run(main)


@pytest.mark.parametrize("how", ["cancelled", "late"])
def test_a_write_is_waited_for(store: FlakyStore, how: str) -> None:
    async def main() -> None:
        gate = Gate()
        one = client(store, io_timeout_s=30 if how == "cancelled" else 0.01)
        store.before = {"create": [gate]}
        ended = trio.Event()

        async def create() -> None:
            await one.create("a", b"x")
            ended.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(create)
            await trio.to_thread.run_sync(gate.wait_reached)
            if how == "cancelled":
                nursery.cancel_scope.cancel()
            with trio.CancelScope(shield=True):
                await trio.sleep(0.02)  # past the deadline of the second case; nothing is concluded from its length
                assert not ended.is_set()
                assert one.statistics().running == 1
                gate.open()
        assert ended.is_set()
        assert store.get("a") == b"x"

    run(main)


def test_a_write_that_fails_late_is_not_tried_again(store: FlakyStore) -> None:
    async def main() -> None:
        gate = Gate()
        one = client(store, io_timeout_s=0.01)

        def fail() -> None:
            gate()
            raise unavailable("late")

        store.before = {"create": [fail]}
        async with trio.open_nursery() as nursery:

            async def create() -> None:
                with pytest.raises(StoreUnavailableError, match="late"):
                    await one.create("a", b"x")

            nursery.start_soon(create)
            await trio.to_thread.run_sync(gate.wait_reached)
            await trio.sleep(0.02)
            gate.open()
        assert store.calls["create"] == 1

    run(main)


def test_cancellation_ends_the_pause_between_two_attempts(store: FlakyStore) -> None:
    async def main() -> None:
        one = StoreClient(store, io_timeout_s=600, backoff_first_s=300, backoff_max_s=300)
        failed = threading.Event()

        def fail() -> None:
            failed.set()
            raise unavailable()

        store.before = {"create": [fail]}
        async with trio.open_nursery() as nursery:
            nursery.start_soon(one.create, "a", b"x")
            await trio.to_thread.run_sync(failed.wait)
            await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        assert store.calls["create"] == 1

    run(main)


def test_no_more_requests_run_at_once_than_allowed(store: FlakyStore) -> None:
    async def main() -> None:
        gates = [Gate() for _ in range(6)]
        one = client(store, requests_max=2)
        store.put("a", b"x")
        store.before = {"get": list(gates)}
        async with trio.open_nursery() as nursery:
            for _ in gates:
                nursery.start_soon(one.get, "a")
            await trio.to_thread.run_sync(gates[0].wait_reached)
            await trio.to_thread.run_sync(gates[1].wait_reached)
            await trio.testing.wait_all_tasks_blocked()
            counted = one.statistics()
            assert (counted.running, counted.waiting, store.calls["get"]) == (2, 4, 2)
            for gate in gates:
                gate.open()
        assert store.calls["get"] == 6

    run(main)


def test_two_clients_do_not_take_each_others_places(store: FlakyStore) -> None:
    async def main() -> None:
        gate = Gate()
        one, other = client(store, requests_max=1), client(store, requests_max=1)
        store.put("a", b"x")
        store.before = {"get": [gate]}
        async with trio.open_nursery() as nursery:
            nursery.start_soon(one.get, "a")
            await trio.to_thread.run_sync(gate.wait_reached)
            assert await other.get("a") == b"x"
            gate.open()

    run(main)


# ---- with the real gateway


def behind(
    ceph: Ceph, prefix: str, proxy: HttpFaultProxy, work: Callable[[StoreClient], Awaitable[None]], *, io_timeout_s: float = 30
) -> None:
    """Run `work` with a client whose way to the gateway leads through the proxy."""

    async def main() -> None:
        store = open_store(ceph.volume_url(BUCKET, prefix, endpoint=proxy.endpoint), options=StoreOptions(read_timeout_s=10))
        one = StoreClient(store, io_timeout_s=io_timeout_s, backoff_first_s=0.001, backoff_max_s=0.01)
        try:
            await work(one)
        finally:
            store.close()

    run(main)


@pytest.mark.s3
def test_a_gateway_that_fails_for_a_while_is_not_noticed(ceph_rgw: Ceph, s3_prefix: str) -> None:
    async def work(one: StoreClient) -> None:
        await one.create("a", b"x")
        assert await one.get("a") == b"x"
        await one.delete_many(["a"])
        assert await one.list("") == []
        assert one.statistics().by_operation["get"].retries == 2

    with HttpFaultProxy(ceph_rgw.port) as proxy:
        proxy.script(Answer(method="PUT", status=503, times=3), Answer(method="GET", path="/a", status=500, times=2))
        proxy.script(Answer(method="POST", status=502))
        behind(ceph_rgw, s3_prefix, proxy, work)
        proxy.assert_all_fired()


@pytest.mark.s3
def test_a_create_whose_answer_the_network_lost_finds_its_own_object(ceph_rgw: Ceph, s3_prefix: str) -> None:
    async def work(one: StoreClient) -> None:
        with pytest.raises(ObjectExistsError):
            await one.create("a", b"mine")
        assert await one.get("a") == b"mine"

    with HttpFaultProxy(ceph_rgw.port) as proxy:
        proxy.script(LoseAnswer(method="PUT"))
        behind(ceph_rgw, s3_prefix, proxy, work)
        proxy.assert_all_fired()


@pytest.mark.s3
def test_a_gateway_that_is_away_and_comes_back_delays_and_fails_nothing(ceph_rgw: Ceph, s3_prefix: str) -> None:
    async def work(one: StoreClient) -> None:
        await one.create("a", b"x")
        proxy.refuse()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(one.create, "b", b"y")
            while one.statistics().by_operation["create"].requests < 3:
                await trio.sleep(0.001)
            proxy.accept()
        assert await one.get("b") == b"y"

    with HttpFaultProxy(ceph_rgw.port) as proxy:
        behind(ceph_rgw, s3_prefix, proxy, work)


@pytest.mark.s3
def test_a_gateway_that_stays_away_is_an_error_in_time(ceph_rgw: Ceph, s3_prefix: str) -> None:
    async def work(one: StoreClient) -> None:
        assert await one.list("") == []
        proxy.refuse()
        for call in (lambda: one.get("a"), lambda: one.create("a", b"x"), lambda: one.list("")):
            with pytest.raises(StoreUnavailableError, match="Could not connect"):
                await call()

    with HttpFaultProxy(ceph_rgw.port) as proxy:
        behind(ceph_rgw, s3_prefix, proxy, work, io_timeout_s=1)
