"""The lock and the wait that pyfuse3 is given: no turn of the event loop for a request that is there, and nobody is forgotten."""

from __future__ import annotations

import os
import random

import pyfuse3
import pytest
import trio
import trio.testing

from novafs_mount.requestloop import BATCH, ReadLock, RequestWait, install


def test_who_gives_the_lock_back_has_it_again_at_once_and_the_other_goes_on_when_he_waits_for_something() -> None:
    async def main() -> None:
        lock, order = ReadLock(), []

        async def other() -> None:
            async with lock:
                order.append("other")

        async with trio.open_nursery() as nursery:
            async with lock:
                nursery.start_soon(other)
                await trio.testing.wait_all_tasks_blocked()
            with trio.testing.assert_no_checkpoints():
                for number in range(3):
                    async with lock:
                        order.append(str(number))
            await trio.testing.wait_all_tasks_blocked()
            assert order == ["0", "1", "2", "other"]

    trio.run(main)


def test_a_task_that_was_woken_in_vain_is_woken_again() -> None:
    async def main() -> None:
        lock = ReadLock()
        got = trio.Event()

        async def other() -> None:
            async with lock:
                got.set()

        async with trio.open_nursery() as nursery:
            for _ in range(3):
                async with lock:
                    if not nursery.child_tasks:
                        nursery.start_soon(other)
                    await trio.testing.wait_all_tasks_blocked()
                    assert not got.is_set()
            await got.wait()

    trio.run(main)


def test_tasks_that_are_cancelled_while_they_wait_keep_nobody_else_from_the_lock() -> None:
    async def main() -> None:
        draw = random.Random(5)
        lock = ReadLock()
        done = holders = 0

        async def reader(scope: trio.CancelScope) -> None:
            nonlocal done, holders
            with scope:
                for _ in range(draw.randrange(1, 9)):
                    async with lock:
                        holders += 1
                        assert holders == 1
                        try:
                            for _ in range(draw.randrange(3)):
                                await trio.lowlevel.checkpoint()
                        finally:
                            holders -= 1
                    for _ in range(draw.randrange(3)):
                        await trio.lowlevel.checkpoint()
            done += 1

        for _ in range(60):
            done = 0
            scopes = [trio.CancelScope() for _ in range(6)]
            with trio.fail_after(60):
                async with trio.open_nursery() as nursery:
                    for scope in scopes:
                        nursery.start_soon(reader, scope)
                    for scope in draw.sample(scopes, 2):
                        for _ in range(draw.randrange(12)):
                            await trio.lowlevel.checkpoint()
                        scope.cancel()
            assert done == len(scopes)

    trio.run(main)


def test_what_is_there_is_read_without_a_checkpoint_but_others_have_their_turn_after_each_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("novafs_mount.requestloop.BATCH_S", 1e9)

    async def main() -> None:
        reading, writing = os.pipe()
        try:
            os.write(writing, b"x")
            wait = RequestWait()
            for _ in range(3):
                await wait.wait_readable(reading)  # the turn of the others
                with trio.testing.assert_no_checkpoints():
                    for _ in range(BATCH):
                        await wait.wait_readable(reading)
                with trio.testing.assert_checkpoints():
                    await wait.wait_readable(reading)
                with trio.testing.assert_no_checkpoints():
                    for _ in range(BATCH):
                        await wait.wait_readable(reading)
        finally:
            os.close(reading)
            os.close(writing)

    trio.run(main)


def test_a_wait_for_nothing_sleeps_and_can_be_cancelled() -> None:
    async def main() -> None:
        reading, writing = os.pipe()
        try:
            wait = RequestWait()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(wait.wait_readable, reading)
                await trio.testing.wait_all_tasks_blocked()
                assert len(nursery.child_tasks) == 1
                nursery.cancel_scope.cancel()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(wait.wait_readable, reading)
                await trio.testing.wait_all_tasks_blocked()
                os.write(writing, b"x")
        finally:
            os.close(reading)
            os.close(writing)

    trio.run(main)


def test_pyfuse3_takes_both_from_its_trio_and_everything_else_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pyfuse3, "trio", pyfuse3.trio)  # put back afterwards
    install()
    assert isinstance(pyfuse3.trio.Lock(), ReadLock)
    assert isinstance(pyfuse3.trio.lowlevel.wait_readable.__self__, RequestWait)
    assert pyfuse3.trio.open_nursery is trio.open_nursery
    assert pyfuse3.trio.lowlevel.notify_closing is trio.lowlevel.notify_closing
    assert pyfuse3.trio.ClosedResourceError is trio.ClosedResourceError
