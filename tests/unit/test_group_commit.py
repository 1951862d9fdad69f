"""Group commit: one run for all who wait, and nobody pays for the cancellation of another."""

from __future__ import annotations

import trio
import trio.testing

from novafs.asynctools import GroupCommit
from tests.support.fixtures import run


class Work:
    """Runs that are held until `gate` is set, and what each was given."""

    def __init__(self) -> None:
        self.runs: list[list[int]] = []
        self.ended: list[list[int]] = []
        self.gate = trio.Event()
        self.error: BaseException | None = None

    async def __call__(self, items: list[int]) -> None:
        self.runs.append(items)
        await self.gate.wait()
        if self.error is not None:
            raise self.error
        self.ended.append(items)


async def settle() -> None:
    await trio.testing.wait_all_tasks_blocked()


def test_those_who_come_while_one_runs_share_the_next_run() -> None:
    async def main() -> None:
        work = Work()
        group = GroupCommit(work)
        async with trio.open_nursery() as nursery:
            for number in range(5):
                nursery.start_soon(group.submit, number)
                await settle()
            assert work.runs == [[0]]
            work.gate.set()
        assert work.ended == [[0], [1, 2, 3, 4]]

    run(main)


def test_a_caller_that_is_cancelled_while_it_runs_for_others_has_them_wait_for_one_run_only() -> None:
    """What its run has done already (a name created, say) would fail the second time."""

    async def main() -> None:
        work = Work()
        group = GroupCommit(work)
        leader = trio.CancelScope()

        async def lead() -> None:
            with leader:
                await group.submit(1)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(group.submit, 0)
            await settle()
            nursery.start_soon(lead)
            await settle()
            for number in (2, 3):
                nursery.start_soon(group.submit, number)
                await settle()
            held, work.gate = work.gate, trio.Event()
            held.set()
            await settle()
            assert work.runs == [[0], [1, 2, 3]]
            leader.cancel()
            await settle()
            work.gate.set()
        assert work.runs == [[0], [1, 2, 3]], "run once"
        assert work.ended == work.runs

    run(main)


def test_a_caller_that_waits_takes_its_item_back_and_one_that_runs_for_itself_just_ends() -> None:
    async def main() -> None:
        work = Work()
        group = GroupCommit(work)
        scopes = [trio.CancelScope(), trio.CancelScope()]

        async def cancellable(number: int) -> None:
            with scopes[number]:
                await group.submit(number)

        async with trio.open_nursery() as nursery:
            for number in range(2):
                nursery.start_soon(cancellable, number)
                await settle()
            nursery.start_soon(group.submit, 2)
            await settle()
            scopes[1].cancel()
            await settle()
            scopes[0].cancel()
            await settle()
            assert work.runs == [[0], [2]]
            work.gate.set()
        assert work.ended == [[2]]

    run(main)


def test_an_error_reaches_everybody_of_its_run_and_nobody_else() -> None:
    async def main() -> None:
        work = Work()
        group = GroupCommit(work)
        failed: list[int] = []

        async def submit(number: int) -> None:
            try:
                await group.submit(number)
            except MemoryError:
                failed.append(number)

        async with trio.open_nursery() as nursery:
            for number in range(3):
                nursery.start_soon(submit, number)
                await settle()
            held, work.gate = work.gate, trio.Event()
            held.set()
            await settle()
            work.error = MemoryError()
            nursery.start_soon(submit, 3)
            await settle()
            work.gate.set()
            await settle()
        assert work.ended == [[0]]
        assert sorted(failed) == [1, 2, 3]
        work.error = None
        await group.submit(4)
        assert work.ended == [[0], [4]]

    run(main)
