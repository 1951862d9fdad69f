"""When the event loop looks for the next request before it sleeps, and that it never does for long."""

from __future__ import annotations

import os
from collections.abc import Iterator
from time import perf_counter

import pytest

from novafs_mount import busypoll
from novafs_mount.busypoll import SPIN_S, BusyPoll


class Clock:
    """`perf_counter` of the module under test: each look at it takes ten microseconds."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        self.now_s += 10e-6
        return self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(busypoll, "perf_counter", clock)
    assert perf_counter is not clock
    return clock


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    yield ends
    for end in ends:
        os.close(end)


def wait(spin: BusyPoll, clock: Clock, seconds: float) -> None:
    """trio waits so long for descriptors."""
    spin.before_io_wait(60)
    clock.now_s += seconds
    spin.after_io_wait(60)


def test_an_idle_mount_sleeps_at_once(pipe: tuple[int, int], clock: Clock) -> None:
    spin = BusyPoll(pipe[0])
    for _ in range(100):
        wait(spin, clock, 0.01)
    assert spin.spins == 0


def test_requests_that_follow_each_other_closely_are_waited_for_awake(pipe: tuple[int, int], clock: Clock) -> None:
    spin = BusyPoll(pipe[0])
    for _ in range(100):
        wait(spin, clock, 50e-6)
    assert spin.spinning
    os.write(pipe[1], b"x")
    caught = spin.caught
    wait(spin, clock, 0)
    assert spin.caught == caught + 1


def test_a_spin_ends_though_nothing_comes(pipe: tuple[int, int], clock: Clock) -> None:
    spin = BusyPoll(pipe[0])
    for _ in range(100):
        wait(spin, clock, 20e-6)
    began_s = clock.now_s
    spin.before_io_wait(60)
    assert clock.now_s - began_s < 2 * SPIN_S
    assert spin.caught == 0


def test_a_pause_ends_the_spinning(pipe: tuple[int, int], clock: Clock) -> None:
    spin = BusyPoll(pipe[0])
    for _ in range(100):
        wait(spin, clock, 20e-6)
    for _ in range(2):
        wait(spin, clock, 0.5)
    spins = spin.spins
    wait(spin, clock, 0.5)
    assert spin.spins == spins


def test_where_trio_does_not_wait_nothing_is_done(pipe: tuple[int, int], clock: Clock) -> None:
    spin = BusyPoll(pipe[0])
    for _ in range(100):
        wait(spin, clock, 20e-6)
    spins = spin.spins
    spin.before_io_wait(0)
    spin.after_io_wait(0)
    assert spin.spins == spins


def test_a_machine_with_one_processor_never_spins(monkeypatch: pytest.MonkeyPatch, pipe: tuple[int, int]) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    assert busypoll.busy_poll(pipe[0]) is None
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    assert busypoll.busy_poll(pipe[0]) is not None
    assert busypoll.busy_poll(None) is None
