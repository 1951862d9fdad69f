"""One seed, one history: trio's scheduler, clock, threads and random numbers made to follow a seed.

    with Simulation(seed) as simulation:
        simulation.run(main)                # as often as wanted; time goes on from run to run

Inside, `trio.to_thread.run_sync` runs its function on the trio thread, after and before a pause of virtual time that
the seed chooses, with the limiter and the cancellation of the real one; so requests and disk writes overtake each other
as they do in threads, and do so again with the same seed. Time is virtual and starts to move when every task waits.
CLOCK_BOOTTIME, as `novafs.revisions` reads it, is the same virtual time.

Tasks may belong to a `Host` (`host.running()`): one that is paused starts no call and gets no answer until it is
resumed, like a process that got SIGSTOP, and its boot clock may run faster or slower than the others'.
"""

from __future__ import annotations

import contextlib
import functools
import random
import secrets
import time
from collections.abc import Awaitable, Callable, Iterator
from contextvars import ContextVar
from types import SimpleNamespace
from typing import Any, TypeVar

import trio
import trio.testing
from trio._core import _run as scheduler

import novafs.revisions
from novafs.asynctools import open_nursery
from novafs.promptly import Promptly

T = TypeVar("T")

EPOCH_S = 1_000_000.0
"""Boot time at which a simulation starts."""
RUN_S_MAX = 3600.0
"""Virtual seconds after which a run is taken to hang."""


class HostDied(BaseException):
    """The host of the current task was killed."""


class Host:
    """A machine: what runs in `running()` is on it. rate: seconds of its boot clock in one second of virtual time."""

    def __init__(self, name: str, rate: float = 1.0) -> None:
        self.name = name
        self.rate = rate
        self.dead = False
        self.cut_off = False
        """For scripts of faults: whether its requests get through."""
        self._awake = trio.Event()
        self._awake.set()

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Tasks started inside belong to this host."""
        token = _host.set(self)
        try:
            yield
        finally:
            _host.reset(token)

    def pause(self) -> None:
        """SIGSTOP."""
        if self._awake.is_set():
            self._awake = trio.Event()

    def resume(self) -> None:
        """SIGCONT."""
        self._awake.set()

    @property
    def awake(self) -> bool:
        """Whether it runs now."""
        return self._awake.is_set() and not self.dead

    def die(self) -> None:
        """SIGKILL: no call is made any more, and no answer comes; tasks that ask for one get HostDied."""
        self.dead = True
        self._awake.set()

    async def wait_awake(self) -> None:
        """Return at once unless it is paused. Raises HostDied."""
        while not self._awake.is_set():
            await self._awake.wait()
        if self.dead:
            raise HostDied


_host: ContextVar[Host | None] = ContextVar("host", default=None)


def current_host() -> Host | None:
    """The host that the current task belongs to."""
    return _host.get()


class Simulation:
    """See the module. `rng` is the seed's; whatever a test decides at random comes from it.

    pause_s: the longest usual pause of a thread; 0: they are done one after the other, which is faster.
    """

    def __init__(self, seed: int, *, pause_s: float = 0.02) -> None:
        self.seed = seed
        self.rng = random.Random(seed)
        self.pause_s = pause_s
        self._elapsed_s = 0.0
        self._restore: list[Callable[[], None]] = []
        self.on_call: Callable[[Any], None] = lambda call: None
        """Told of every call of a worker thread as it is made, before its pause."""

    def __enter__(self) -> Simulation:
        rng = self.rng
        self._set(scheduler, "_ALLOW_DETERMINISTIC_SCHEDULING", True)
        state = scheduler._r.getstate()
        self._restore.append(lambda: scheduler._r.setstate(state))
        scheduler._r.seed(rng.getrandbits(64))
        global_state = random.getstate()
        self._restore.append(lambda: random.setstate(global_state))
        random.seed(rng.getrandbits(64))
        self._set(secrets, "token_bytes", lambda n=32: rng.randbytes(n))
        self._set(secrets, "token_hex", lambda n=32: rng.randbytes(n).hex())
        self._set(secrets, "randbits", rng.getrandbits)
        self._set(novafs.revisions, "time", SimpleNamespace(CLOCK_BOOTTIME=time.CLOCK_BOOTTIME, clock_gettime=lambda _: self.boot_time_s()))
        self._set(trio.to_thread, "run_sync", self._run_sync)
        self._set(Promptly, "quick", property(lambda _: False))  # that one measures real time, and starts real threads
        return self

    def __exit__(self, *exc: object) -> None:
        while self._restore:
            self._restore.pop()()

    def _set(self, owner: Any, name: str, value: Any) -> None:
        before = getattr(owner, name)
        self._restore.append(lambda: setattr(owner, name, before))
        setattr(owner, name, value)

    def now_s(self) -> float:
        """Virtual seconds since the start, over all runs."""
        try:
            return self._elapsed_s + trio.current_time()
        except RuntimeError:
            return self._elapsed_s

    def boot_time_s(self) -> float:
        """What the boot clock of the current host says."""
        host = _host.get()
        return EPOCH_S + self.now_s() * (host.rate if host is not None else 1.0)

    def run(self, main: Callable[..., Awaitable[T]], *arguments: Any) -> T:
        """`trio.run` in virtual time, which starts at 0 each time for trio, and goes on for boot clocks."""
        clock = trio.testing.MockClock(autojump_threshold=0)

        async def timed() -> T:
            start = trio.current_time()
            try:
                with trio.move_on_after(RUN_S_MAX):
                    return await main(*arguments)
                raise trio.TooSlowError(f"not done after {RUN_S_MAX:.0f} s of virtual time; where its tasks waited:\n{''.join(stuck)}")
            finally:
                self._elapsed_s += trio.current_time() - start + 1

        stuck: list[str] = []

        async def watched() -> T:
            async with open_nursery() as nursery:

                async def watch() -> None:
                    await trio.sleep(RUN_S_MAX - 1)
                    stuck.extend(_waiting_tasks())

                nursery.start_soon(watch)
                result = await timed()
                nursery.cancel_scope.cancel()
            return result

        return trio.run(watched, clock=clock)

    async def _pause(self) -> None:
        host = _host.get()
        if host is not None:
            await host.wait_awake()
        if not self.pause_s:
            await trio.lowlevel.checkpoint()
            return
        chosen = self.rng.random()
        if chosen < 0.4:
            await trio.lowlevel.checkpoint()
            return
        await trio.sleep(self.pause_s * self.rng.random() * (1 if chosen < 0.95 else 10))
        if host is not None:
            await host.wait_awake()

    async def _run_sync(
        self,
        function: Callable[..., T],
        *arguments: Any,
        abandon_on_cancel: bool = False,
        limiter: trio.CapacityLimiter | None = None,
        **_: Any,
    ) -> T:
        await trio.lowlevel.checkpoint_if_cancelled()
        token = object()
        if limiter is not None:
            await limiter.acquire_on_behalf_of(token)
        self.on_call(function)
        try:
            with trio.CancelScope(shield=not abandon_on_cancel):
                await self._pause()
                if not self.pause_s:
                    return function(*arguments)
                try:
                    result = function(*arguments)
                except Exception:
                    await self._pause()
                    raise
                await self._pause()
            return result
        finally:
            if limiter is not None:
                limiter.release_on_behalf_of(token)


def _waiting_tasks() -> list[str]:
    """Where each task of this run waits, outermost call first."""
    found: list[str] = []
    tasks = [trio.lowlevel.current_root_task()]
    while tasks:
        task = tasks.pop()
        if task is None:
            continue
        for nursery in task.child_nurseries:
            tasks.extend(nursery.child_tasks)
        frames = [f"{frame.f_code.co_qualname}:{line}" for frame, line in task.iter_await_frames()]
        found.append(f"{task.name}: {' > '.join(frames)}\n")
    return found


def named(function: Any) -> tuple[str, tuple[Any, ...]] | None:
    """Method and arguments of a store request that `StoreClient` is about to make, None for any other call of a thread."""
    work = getattr(function, "_work", None)
    if isinstance(work, functools.partial):
        return work.func.__name__, work.args
    return None
