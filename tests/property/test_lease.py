"""Leases: hosts with clocks of their own take, keep, lose and release one; requests are slow, fail, and lose answers (Hypothesis).

`tests.crash.test_hosts` is the same with whole volumes; here the rules of takeover are held against a clock.
"""

from __future__ import annotations

import contextlib
from typing import Any, Literal

import hypothesis.strategies as st
import msgspec
import pytest
import trio
from hypothesis import given, settings

from novafs.errors import LeaseHeldError, LeaseLostError, NovaError, StoreUnavailableError
from novafs.lease import (
    MARGIN,
    WANT_TTL_S,
    WANTS_PREFIX,
    Lease,
    LeaseManager,
    LeaseRecord,
    LeaseRules,
    break_lease,
    lease_chain,
    lease_prefix,
    read_lease,
    want_name,
)
from novafs.objectstore.client import StoreClient
from tests.support.memory_store import Change, MemoryStore
from tests.support.simulation import EPOCH_S, Host, Simulation, current_host

IMAGE = bytes(range(16))
TTL_S = 3.0
POLL_S = 0.1
RATES = st.sampled_from([0.95, 1.0, 1.05])
STEP = st.one_of(
    st.tuples(st.sampled_from(["hold", "abandon"]), st.sampled_from([0.0, 0.5, 2.0, 5.0])),
    st.tuples(st.just("idle"), st.sampled_from([0.1, 1.0, TTL_S * 1.5])),
)
TROUBLE = st.tuples(
    st.sampled_from(["pause", "cut off", "break"]), st.integers(0, 2), st.floats(0, 12), st.sampled_from([0.5, 1.0, 2.0, 3.5, 8.0])
)
Rules = Literal["journal", "auto", "store"]


class World:
    """Up to three hosts and one image. Every epoch and every acknowledgement is held against what the rules allow as it happens."""

    def __init__(self, rules: Rules, seed: int, *, pause_s: float = 0.03, error_share: float = 0.03) -> None:
        self.simulation = Simulation(seed, pause_s=pause_s)
        self.rules = rules
        self.error_share = error_share
        self.store = MemoryStore(clock_s=self.simulation.now_s)
        self.store.record = self._stored
        self.store.fault = self._fault
        self.epochs: list[tuple[float, LeaseRecord]] = []
        self.beat_s: dict[int, float] = {}
        self.broken: set[int] = set()
        self.acknowledged = 0

    def manager(self, number: int, *, wait_s: float = 0.3, io_timeout_s: float = 1) -> LeaseManager:
        durability = "store" if self.rules == "store" else "journal"
        rules = LeaseRules(durability, "auto" if self.rules == "auto" else "manual", TTL_S, wait_s)
        client = StoreClient(self.store, io_timeout_s=io_timeout_s)
        return LeaseManager(client, bytes([number]) * 16, rules, clock_s=self.simulation.boot_time_s, poll_s=POLL_S)

    def _fault(self, moment: str, operation: str, name: str) -> None:
        host = current_host()
        if (host is not None and host.cut_off) or self.simulation.rng.random() < self.error_share:
            raise StoreUnavailableError(f"scripted: {operation} {name} failed {moment} it took effect")

    def _stored(self, change: Change) -> None:
        operation, name, data = change
        if not name.startswith(lease_prefix(IMAGE)):
            return
        record = lease_chain(StoreClient(self.store), IMAGE)._decode(data, name)
        now_s = self.simulation.now_s()
        self.beat_s[record.epoch] = now_s
        if operation != "create":
            return
        if self.epochs:
            _, before = self.epochs[-1]
            assert record.epoch == before.epoch + 1, "epochs count up, one by one"
            assert record.predecessor == before.nonce
            if not before.released and not record.released and record.journal_id != before.journal_id:
                assert self.rules != "journal", "only an operator takes a lease that was not released"
                silent_s = now_s - self.beat_s[before.epoch]
                assert silent_s >= TTL_S / 1.05, f"taken over {silent_s:.2f} s after a heartbeat that counts for {TTL_S} s"
        else:
            assert record.epoch == 1
        self.epochs.append((now_s, record))

    def acknowledge(self, lease: Lease) -> None:
        """A holder is about to say that a write is done: it may do so only if nobody else may."""
        host = current_host()
        assert host is not None
        if not host.awake:
            return  # it would answer later, but by what it decided before
        lease.check()
        self.acknowledged += 1
        if self.rules == "auto":
            later = [
                r.epoch for _, r in self.epochs if r.epoch > lease.epoch and not r.released and r.journal_id != lease.record.journal_id
            ]
            assert not later, f"epoch {lease.epoch} acknowledges although epoch {later[0]} is another host's"

    # -- what hosts do ------------------------------------------------------------------------------------------

    async def live(self, number: int, host: Host, script: list[tuple[str, float]]) -> None:
        with host.running():
            manager = self.manager(number)
            for action, seconds in script:
                if action == "idle":
                    await trio.sleep(seconds)
                    continue
                try:
                    lease = await manager.acquire(IMAGE, "disk.raw")
                except LeaseHeldError as error:
                    assert "novafs lease break" in str(error)
                    continue
                except StoreUnavailableError:
                    await self._settle(manager.take_unsure(IMAGE))
                    continue
                with trio.move_on_after(seconds):
                    await self._hold(manager, lease)
                if action == "hold":
                    await self._settle(lease)

    async def _hold(self, manager: LeaseManager, lease: Lease) -> None:
        async with trio.open_nursery() as nursery:

            async def beat() -> None:
                while not lease.lost:
                    await trio.sleep(TTL_S / 3)
                    try:
                        wanted = (await manager.wants()).get(IMAGE, [])
                        await lease.heartbeat(acknowledge=wanted)
                        assert lease.wanted == bool(wanted)
                    except (LeaseLostError, StoreUnavailableError):
                        continue

            nursery.start_soon(beat)
            while not lease.lost:
                with contextlib.suppress(LeaseLostError):
                    self.acknowledge(lease)
                await trio.sleep(self.simulation.rng.choice([0.01, 0.1, 0.3]))
            nursery.cancel_scope.cancel()

    @staticmethod
    async def _settle(lease: Lease | None) -> None:
        """Release it, until the store has answered."""
        for _ in range(50):
            if lease is None:
                return
            try:
                await lease.release()
            except StoreUnavailableError:
                await trio.sleep(0.5)
            else:
                assert lease.released or lease.lost
                if lease.released:
                    await lease.heartbeat()  # nothing is sent any more
                return

    async def trouble(self, hosts: list[Host], what: list[tuple[str, int, float, float]]) -> None:
        async def one(kind: str, number: int, at_s: float, seconds: float) -> None:
            await trio.sleep(at_s)
            host = hosts[number % len(hosts)]
            if kind == "pause":
                host.pause()
                await trio.sleep(seconds)
                host.resume()
            elif kind == "cut off":
                host.cut_off = True
                await trio.sleep(seconds)
                host.cut_off = False
            elif self.rules != "auto":
                try:
                    await break_lease(StoreClient(self.store, io_timeout_s=1), IMAGE)
                except NovaError:
                    return

        async with trio.open_nursery() as nursery:
            for item in what:
                nursery.start_soon(one, *item)


@settings(max_examples=300, deadline=None)
@given(
    rules=st.sampled_from(["journal", "auto", "store"]),
    seed=st.integers(0, 1 << 16),
    scripts=st.lists(st.tuples(RATES, st.lists(STEP, min_size=1, max_size=4)), min_size=2, max_size=3),
    trouble=st.lists(TROUBLE, max_size=5),
    error_share=st.sampled_from([0.0, 0.05, 0.2]),
)
def test_one_host_at_a_time_may_acknowledge(
    rules: Rules, seed: int, scripts: list[Any], trouble: list[tuple[str, int, float, float]], error_share: float
) -> None:
    """semantics: S12."""
    world = World(rules, seed, error_share=error_share)

    async def main() -> None:
        hosts = [Host(str(number), rate) for number, (rate, _) in enumerate(scripts)]
        async with trio.open_nursery() as nursery:
            for number, (_, script) in enumerate(scripts):
                nursery.start_soon(world.live, number, hosts[number], script)
            nursery.start_soon(world.trouble, hosts, trouble)

    with world.simulation:
        world.simulation.run(main)


def scripted(rules: Rules, main: Any, *, pause_s: float = 0) -> World:
    world = World(rules, 1, pause_s=pause_s, error_share=0)
    with world.simulation:
        world.simulation.run(main, world)
    return world


@pytest.mark.parametrize("rules", ["auto", "store"])
def test_a_lease_whose_holder_is_silent_is_taken_after_its_ttl(rules: Rules) -> None:
    """semantics: S12."""

    async def main(world: World) -> None:
        await world.manager(1).acquire(IMAGE, "disk.raw")
        start_s = trio.current_time()
        lease = await world.manager(2).acquire(IMAGE, "disk.raw")
        assert lease.epoch == 2
        assert TTL_S < trio.current_time() - start_s < TTL_S + 5 * POLL_S
        assert not [name for name in world.store.objects if name.startswith(WANTS_PREFIX)]

    scripted(rules, main)


@pytest.mark.parametrize("rules", ["auto", "store"])
def test_the_time_of_a_heartbeat_is_that_before_it_was_sent(rules: Rules) -> None:
    """The store may have had it at once, and the answer may have taken long: who counts from the answer counts too late."""

    async def main(world: World) -> None:
        lease = await world.manager(1).acquire(IMAGE, "disk.raw")
        for _ in range(20):
            await lease.heartbeat()
            assert lease.sent_s <= EPOCH_S + world.beat_s[lease.epoch]

    scripted(rules, main, pause_s=0.1)


@pytest.mark.parametrize("rules", ["auto", "store"])
def test_an_observer_that_slept_does_not_take_its_own_sleep_for_the_holders_silence(rules: Rules) -> None:
    """semantics: S12. Between two of its looks more than a ttl has passed, and the heartbeat has moved on."""

    async def main(world: World) -> None:
        lease = await world.manager(1).acquire(IMAGE, "disk.raw")
        observer = Host("observer")

        async def look() -> None:
            with observer.running(), pytest.raises(LeaseHeldError):
                await world.manager(2, io_timeout_s=100).acquire(IMAGE, "disk.raw")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(look)
            await trio.sleep(POLL_S / 2)
            observer.pause()
            for _ in range(10):
                await trio.sleep(1)
                await lease.heartbeat()
            observer.resume()
        assert not lease.lost

    scripted(rules, main)


def test_a_lease_under_manual_takeover_is_never_taken_by_itself() -> None:
    """semantics: S12."""

    async def main(world: World) -> None:
        await world.manager(1).acquire(IMAGE, "disk.raw")
        with pytest.raises(LeaseHeldError, match=r"holds the lease, epoch 1, .* 'novafs lease break'"):
            await world.manager(2, wait_s=10 * TTL_S).acquire(IMAGE, "disk.raw")
        ended = await break_lease(StoreClient(world.store), IMAGE)
        assert ended is not None and ended.epoch == 1
        assert (await world.manager(2).acquire(IMAGE, "disk.raw")).epoch == 3
        assert await break_lease(StoreClient(world.store), bytes(16)) is None

    scripted("journal", main)


@pytest.mark.parametrize("rules", ["journal", "auto", "store"])
def test_the_journal_that_holds_a_lease_takes_it_again_at_once(rules: Rules) -> None:
    """semantics: S12."""

    async def main(world: World) -> None:
        old = await world.manager(1).acquire(IMAGE, "disk.raw")
        start_s = trio.current_time()
        assert (await world.manager(1).acquire(IMAGE, "disk.raw")).epoch == 2
        assert trio.current_time() == start_s
        before = dict(world.store.objects)
        with pytest.raises(LeaseLostError, match=r"epoch 1 of the lease was followed by 2"):
            await old.heartbeat()
        assert world.store.objects == before, "it looks before it writes: an epoch that was collected would be there again"
        with pytest.raises(LeaseLostError, match="went to another host"):
            old.check()

    scripted(rules, main)


def test_a_holder_stops_acknowledging_before_anybody_may_take_over() -> None:
    """semantics: S12."""

    async def main(world: World) -> None:
        lease = await world.manager(1).acquire(IMAGE, "disk.raw")
        await trio.sleep(TTL_S * (1 - MARGIN) - 0.01)
        lease.check()
        await trio.sleep(0.02)
        with pytest.raises(LeaseLostError, match=r"no heartbeat was answered for 2 s, .* may have taken the lease over"):
            lease.check()
        await lease.heartbeat()
        lease.check()

    scripted("auto", main)


def test_a_heartbeat_that_arrives_after_the_release_changes_nothing() -> None:
    """It was sent before, and was long on its way: an object of an epoch that no longer matters is rewritten."""

    async def main(world: World) -> None:
        lease = await world.manager(1).acquire(IMAGE, "disk.raw")
        await lease.heartbeat()
        name = next(name for name in world.store.objects if name.startswith(lease_prefix(IMAGE)))
        late: Change = ("put", name, world.store.objects[name])
        await lease.release()
        world.store.apply(late)
        record = await read_lease(StoreClient(world.store), IMAGE)
        assert record is not None and record.released and record.epoch == 2
        taken = await world.manager(2).acquire(IMAGE, "disk.raw")
        world.store.apply(late)
        await taken.heartbeat()
        taken.check()
        assert taken.epoch == 3

    scripted("auto", main)


def test_a_release_whose_answer_was_lost_is_sent_again_as_it_was() -> None:
    async def main(world: World) -> None:
        lease = await world.manager(1).acquire(IMAGE, "disk.raw")

        def lose(moment: str, operation: str, name: str) -> None:
            if moment == "after" or operation == "get":
                raise StoreUnavailableError("scripted")

        world.store.fault = lose
        with pytest.raises(StoreUnavailableError):
            await lease.release()
        assert not lease.released
        world.store.fault = lambda *_: None
        await lease.release()
        assert lease.released and not lease.lost
        assert [record.released for _, record in world.epochs] == [False, True]

    scripted("journal", main)


def test_a_lease_that_may_have_been_taken_can_be_released() -> None:
    """The answer to the creation of the epoch was lost for good: it is held, and nobody would heartbeat it."""

    async def main(world: World) -> None:
        manager = world.manager(1)

        def lose(moment: str, operation: str, name: str) -> None:
            if moment == "after" or operation == "get":
                raise StoreUnavailableError("scripted")

        world.store.fault = lose
        with pytest.raises(StoreUnavailableError):
            await manager.acquire(IMAGE, "disk.raw")
        world.store.fault = lambda *_: None
        lease = manager.take_unsure(IMAGE)
        assert lease is not None and manager.take_unsure(IMAGE) is None
        await lease.release()
        assert (await world.manager(2).acquire(IMAGE, "disk.raw")).epoch == 3

    scripted("journal", main)


def test_who_asks_is_answered_and_the_holder_knows() -> None:
    async def main(world: World) -> None:
        first, second = world.manager(1), world.manager(2, wait_s=1)
        lease = await first.acquire(IMAGE, "disk.raw")
        async with trio.open_nursery() as nursery:

            async def ask() -> None:
                with pytest.raises(LeaseHeldError):
                    await second.acquire(IMAGE, "disk.raw")

            nursery.start_soon(ask)
            await trio.sleep(0.5)
            assert await first.wants() == {IMAGE: [bytes([2]) * 16]}
            assert await second.wants() == {}, "one's own request is none"
            world.store.apply(("put", "wants/nothing", b""))
            await lease.heartbeat(acknowledge=[bytes([2]) * 16])
            assert lease.wanted
            record = await read_lease(StoreClient(world.store), IMAGE)
            assert record is not None and record.acknowledged == [bytes([2]) * 16]
            await lease.heartbeat()
            assert lease.wanted, "who asks was not looked up: what was acknowledged stays so"
        await lease.heartbeat(acknowledge=[])
        assert not lease.wanted
        assert want_name(IMAGE, bytes([2]) * 16) not in world.store.objects

    scripted("journal", main)


def test_a_request_that_nobody_renews_does_not_count_for_long() -> None:
    """Its host died while it waited, and would have every fsync of the holder go to the store for ever."""

    async def main(world: World) -> None:
        manager = world.manager(1)
        world.store.apply(("put", want_name(IMAGE, bytes([2]) * 16), b"of a host that died"))
        assert await manager.wants() == {IMAGE: [bytes([2]) * 16]}
        await trio.sleep(WANT_TTL_S + 1)
        assert await manager.wants() == {}
        world.store.apply(("put", want_name(IMAGE, bytes([2]) * 16), b"it is back"))
        assert await manager.wants() == {IMAGE: [bytes([2]) * 16]}

    scripted("journal", main)


def test_a_lease_of_another_image_is_refused() -> None:
    async def main(world: World) -> None:
        await world.manager(1).acquire(IMAGE, "disk.raw")
        (name,) = [name for name in world.store.objects if name.startswith(lease_prefix(IMAGE))]
        other = bytes(16)
        world.store.apply(("put", name.replace(IMAGE.hex(), other.hex()), world.store.objects[name]))
        with pytest.raises(NovaError, match=f"is a lease of image {IMAGE.hex()}; run 'novafs fsck'"):
            await read_lease(StoreClient(world.store), other)
        assert msgspec.structs.asdict(world.epochs[0][1])["host"]

    scripted("journal", main)
