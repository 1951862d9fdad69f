"""When a blocking call is waited for on the spot, and that it has ended whichever way it was waited for."""

from __future__ import annotations

import threading

import outcome
import pytest
import trio

from novafs.promptly import PATIENCE_S, SLOW_S, Promptly, _Wait
from tests.support.fixtures import trio_test


def quick() -> Promptly:
    disk = Promptly()
    disk.took(PATIENCE_S / 4)
    assert disk.quick
    return disk


@trio_test
async def test_calls_are_not_waited_for_on_the_spot_before_one_was_measured() -> None:
    disk = Promptly()
    assert not disk.quick
    await disk.run(lambda: None, alone=True)
    assert disk.on_the_spot == 0
    assert disk.quick


@trio_test
async def test_the_event_loop_goes_on_while_a_call_hangs() -> None:
    disk, hang, turns = quick(), threading.Event(), 0

    async def others() -> None:
        nonlocal turns
        for _ in range(10):
            turns += 1
            await trio.lowlevel.checkpoint()
        hang.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(others)
        await disk.run(lambda: hang.wait() and None, alone=True)
    assert turns == 10
    assert disk.on_the_spot == 0


@trio_test
async def test_where_several_may_share_the_next_call_nobody_is_held_up() -> None:
    disk = quick()
    for _ in range(20):
        await disk.run(lambda: None, alone=False)
    assert disk.on_the_spot == 0


@trio_test
async def test_calls_run_in_a_worker_thread() -> None:
    disk, seen = quick(), []
    for _ in range(3):
        await disk.run(lambda: seen.append(threading.current_thread()), alone=True)
    assert threading.main_thread() not in seen


@pytest.mark.parametrize("alone", [True, False])
@trio_test
async def test_a_call_that_fails_raises_in_the_caller(alone: bool) -> None:
    def fail() -> None:
        raise OSError(5, "Input/output error")

    disk = quick()
    with pytest.raises(OSError, match="Input/output"):
        await disk.run(fail, alone=alone)


@trio_test
async def test_a_cancelled_caller_waits_for_the_call_that_has_begun() -> None:
    disk, begun, go, ended = Promptly(), trio.Event(), threading.Event(), []
    token = trio.lowlevel.current_trio_token()

    def call() -> None:
        token.run_sync_soon(begun.set)
        go.wait()
        ended.append(True)

    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(lambda: disk.run(call, alone=True))
            await begun.wait()
            scope.cancel()
            go.set()
    assert ended


@trio_test
async def test_a_cancelled_caller_does_not_begin() -> None:
    disk, ran = Promptly(), []
    with trio.CancelScope() as scope:
        scope.cancel()
        await disk.run(lambda: ran.append(1), alone=True)
    assert not ran


def test_one_slow_call_counts_for_many() -> None:
    disk = quick()
    for _ in range(100):
        disk.took(PATIENCE_S / 4)
    disk.took(SLOW_S * 2)
    for _ in range(30):
        assert not disk.quick
        disk.took(PATIENCE_S / 4)
    for _ in range(100):
        disk.took(PATIENCE_S / 4)
    assert disk.quick


def test_a_thread_that_is_late_with_its_news_disturbs_nobody() -> None:
    """The caller found the lock released, and its event loop has ended since."""

    async def main() -> _Wait:
        wait = _Wait()
        wait._event = trio.Event()
        return wait

    trio.run(main).deliver(outcome.Value(None))
