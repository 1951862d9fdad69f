"""A waiting host that sleeps with the store's answer in hand must not take what it read before it slept for news: the holder lives,
and acknowledges fsyncs from its journal."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from novafs.errors import LeaseHeldError
from novafs.lease import PREFIX, WANTS_PREFIX, Lease, LeaseManager, LeaseRules
from novafs.objectstore.client import StoreClient
from novafs.objectstore.url import create_root, open_store
from novafs.writeback import WritebackController, WritebackRules


class Sleeper(StoreClient):
    nap = None

    async def get(self, name, start=0, length=None):
        data = await super().get(name, start, length)
        if self.nap is not None and name.startswith(PREFIX):
            await self.nap()
        return data


def test_a_host_that_slept_over_an_answer_does_not_take_a_live_lease(tmp_path: Path) -> None:
    async def main() -> None:
        url = f"file://{tmp_path / 's'}"
        create_root(url)
        now = [1000.0]

        def clock() -> float:
            return now[0]

        rules = LeaseRules(takeover="auto", ttl_s=30.0, wait_s=5.0)
        image = b"i" * 16
        a = await LeaseManager(StoreClient(open_store(url)), b"a" * 16, rules, clock_s=clock).acquire(image, "x")
        client = Sleeper(open_store(url))
        b = LeaseManager(client, b"b" * 16, rules, clock_s=clock, poll_s=0)
        reads = 0

        async def nap() -> None:
            nonlocal reads
            reads += 1
            if reads == 2:  # the host sleeps for a minute; the holder goes on
                for _ in range(6):
                    now[0] += 10
                    await a.heartbeat()
            elif reads > 2:
                now[0] += 1

        client.nap = nap
        with pytest.raises(LeaseHeldError):
            await b.acquire(image, "x")
        a.check()

    trio.run(main)


class Gate(StoreClient):
    """Stops before the next put of a heartbeat, or delete of a request."""

    reached: trio.Event | None = None
    opened: trio.Event | None = None

    async def put(self, name, data):
        if self.reached is not None and self.opened is not None and name.startswith(PREFIX):
            reached, opened, self.reached, self.opened = self.reached, self.opened, None, None
            reached.set()
            await opened.wait()
        await super().put(name, data)

    async def delete(self, name):
        if self.reached is not None and self.opened is not None and name.startswith(WANTS_PREFIX):
            self.reached.set()
            await self.opened.wait()
        await super().delete(name)


B = b"b" * 16


async def two_managers(directory: Path) -> tuple[Gate, LeaseManager, LeaseManager]:
    url = f"file://{directory / 's'}"
    create_root(url)
    gate = Gate(open_store(url))
    return (
        gate,
        LeaseManager(gate, b"a" * 16, LeaseRules()),
        LeaseManager(StoreClient(open_store(url)), B, LeaseRules(wait_s=0.2), poll_s=0.05),
    )


class Clean:
    """An image of which nothing is dirty."""

    node_id, name = b"i" * 16, "x"

    def __init__(self, lease: Lease) -> None:
        self.lease = lease

    async def commit(self) -> None:
        await trio.lowlevel.checkpoint()


def controller(directory: Path, leases: LeaseManager, image: Clean, nursery: trio.Nursery) -> WritebackController:
    found = WritebackController(
        WritebackRules(),
        journal=None,
        leases=leases,
        state_dir=directory,
        images=lambda: [image],  # type: ignore[list-item,return-value]
        pack_writer=None,  # type: ignore[arg-type]
    )
    found._nursery = nursery
    return found


def test_a_heartbeat_of_before_the_request_takes_no_acknowledgement_back(tmp_path: Path) -> None:
    """semantics: S22. Else fsyncs go to the journal for a while although the reader was told that they reach the store."""

    async def main() -> None:
        gate, mine, theirs = await two_managers(tmp_path)
        image = Clean(await mine.acquire(b"i" * 16, "x"))
        async with trio.open_nursery() as nursery:
            writeback = controller(tmp_path, mine, image, nursery)
            reached, opened = gate.reached, gate.opened = trio.Event(), trio.Event()
            nursery.start_soon(writeback.beat, mine)
            await reached.wait()  # it has seen no request
            await theirs.ask(image.node_id)
            writeback._start_answer(image, image.lease, (await mine.wants())[image.node_id])  # type: ignore[arg-type]
            assert not image.lease.wanted
            await wait_all_tasks_blocked()
            assert image.lease.wanted
            opened.set()
            while not image.lease.record.acknowledged:
                assert image.lease.wanted, "an fsync now would go to the journal, and is acknowledged as one that is in the store"
                await trio.sleep(0)
            assert image.lease.wanted

    trio.run(main)


def test_who_asks_again_and_finds_the_acknowledgement_of_before_can_rely_on_it(tmp_path: Path) -> None:
    """semantics: S22. A target opens the disk, closes it and opens it again, while a heartbeat takes its first request's answer back."""

    async def main() -> None:
        gate, mine, theirs = await two_managers(tmp_path)
        image = Clean(await mine.acquire(b"i" * 16, "x"))
        async with trio.open_nursery() as nursery:
            writeback = controller(tmp_path, mine, image, nursery)
            await theirs.ask(image.node_id)
            await writeback.beat(mine)
            while not image.lease.record.acknowledged:
                await trio.sleep(0)
            await wait_all_tasks_blocked(0.05)
            await theirs.withdraw(image.node_id)
            reached, opened = gate.reached, gate.opened = trio.Event(), trio.Event()
            nursery.start_soon(writeback.beat, mine)
            await reached.wait()  # it has seen no request
            await theirs.ask(image.node_id)
            holder = await theirs.holder(image.node_id)
            assert holder is not None
            assert holder.acknowledged == [B], "so the follower takes it that fsyncs reach the store"
            opened.set()
            while image.lease.record.acknowledged:
                await trio.sleep(0)
            await wait_all_tasks_blocked(0.05)
            assert image.lease.wanted
            await theirs.withdraw(image.node_id)
            await writeback.beat(mine)
            assert not image.lease.wanted, "nobody asks, and nobody can take it that he was answered"

    trio.run(main)


def test_a_write_that_gives_up_waiting_does_not_take_a_followers_request_back(tmp_path: Path) -> None:
    """semantics: S22. Else the holder forgets the follower, which reads what is older than what was fsynced."""

    async def main() -> None:
        _, mine, theirs = await two_managers(tmp_path)
        image = b"i" * 16
        await mine.acquire(image, "x")
        theirs.join(image)
        await theirs.ask(image)
        with pytest.raises(LeaseHeldError):
            await theirs.acquire(image, "x")
        assert await mine.wants() == {image: [B]}
        await theirs.withdraw(image)
        assert await mine.wants() == {}

    trio.run(main)


def test_who_asks_while_a_request_is_being_taken_back_asks_after_that(tmp_path: Path) -> None:
    """semantics: S22. Else it would look at the lease while its request is about to go, and who takes that would not know of it."""

    async def main() -> None:
        gate, theirs, mine = await two_managers(tmp_path)
        image = b"i" * 16
        theirs.join(image)
        await theirs.ask(image)
        gate.reached, gate.opened = trio.Event(), trio.Event()
        asked = trio.Event()

        async def ask() -> None:
            theirs.join(image)
            await theirs.ask(image)
            asked.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(theirs.withdraw, image)
            await gate.reached.wait()
            nursery.start_soon(ask)
            await wait_all_tasks_blocked(0.05)
            assert not asked.is_set()
            gate.opened.set()
        assert await mine.wants() == {image: [theirs.journal_id]}
        await theirs.withdraw(image)
        assert await mine.wants() == {}

    trio.run(main)
