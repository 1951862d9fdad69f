"""Two writers, a collector, an auditor: any interleaving, any time between, any step killed (Hypothesis).

Nothing that an image, a snapshot or an open handle of a living host shows is ever lost; and in the end, when all have
stopped and time has passed, nothing is left that nobody needs.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from contextlib import ExitStack
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from novafs.catalogtree import ROOT_ID
from novafs.errors import StaleError, StoreDeniedError
from novafs.gc import GcReport, collect
from novafs.image import Image
from novafs.snapshots import clone, delete_snapshot, take_snapshot
from novafs.volume import Volume
from tests.support.hosts import CHUNK, Kill, Pause, Sleeper, World, alike, pattern
from tests.support.portal import Portal

pytestmark = pytest.mark.slow

TORTURE = float(os.environ.get("NOVAFS_TEST_TORTURE", "1"))
GRACE_S = 3600.0
CHUNKS = 300
"""More than a leaf of the map holds, so that maps have two levels."""
SEEDS = st.integers(0, 12)
"""Few different contents, so that dedup finds dead chunks all the time."""
PLACES = st.one_of(st.integers(0, 8), st.integers(254, 258), st.just(CHUNKS - 1))
WRITES = st.lists(st.tuples(PLACES, st.integers(1, 4), SEEDS), min_size=1, max_size=4)
WRITERS = st.sampled_from(["a", "b"])
NAMES = st.sampled_from(["x", "y", "z"])
SLEEPS = st.sampled_from([60.0, 400.0, GRACE_S / 2, GRACE_S + 60, 3 * GRACE_S])

Content = dict[int, int]
"""Chunk index -> seed of its content."""


class Commit(Sleeper):
    """A commit that is asleep somewhere in its middle."""

    def __init__(self, pause: Pause, name: str, content: Content) -> None:
        super().__init__(pause)
        self.name, self.content = name, content


class PauseAtCall(Pause):
    """Holds a host's calls from the `calls`-th on."""

    def __init__(self, calls: int) -> None:
        super().__init__("", "")
        self._left = calls

    def __call__(self, operation: str, name: str) -> None:
        self._left -= 1
        super().__call__("" if self._left <= 0 else operation, name)


class Handle:
    """An image that the reader has open, what it must show, and the longest time that the reader did not pin it."""

    def __init__(self, image: Image, seen: bytes, now_s: float) -> None:
        self.image, self.seen = image, seen
        self.pinned_s = now_s
        self.lapse_s = 0.0

    def pinned(self, now_s: float) -> None:
        self.lapse_s = max(self.lapse_s, now_s - self.pinned_s)
        self.pinned_s = now_s


class CollectionMachine(RuleBasedStateMachine):
    """semantics: S17."""

    delta = False
    made = staticmethod(pattern)
    """The content of a chunk, from its seed."""

    def plain(self, content: Content) -> bytes:
        size = max(content, default=-1) + 1
        return b"".join(self.made(content[i]) if i in content else bytes(CHUNK) for i in range(size))

    def __init__(self) -> None:
        super().__init__()
        self.directory = Path(tempfile.mkdtemp())
        self.stack = ExitStack()
        self.portal = Portal()
        self.hosts: dict[str, Volume] = {}
        self.images: dict[str, Content] = {}
        self.snapshots: dict[tuple[str, str], Content] = {}
        self.sleepers: dict[str, Commit] = {}
        self.handles: list[Handle] = []
        self.collector: Sleeper | None = None
        self.contents = 1000
        self.overtaken_s = float("-inf")
        """When a commit ended last that had slept with its generation on the way. A collection may have overtaken it: then there is a
        superseded generation, followed by one that has everything, whose packs are gone, and for a grace collections say so."""

    @initialize()
    def open(self) -> None:
        self.world = World(self.directory, delta=self.delta, lease__wait="0s")
        self.stack.enter_context(self.world.running())
        for name in ("a", "b", "c", "auditor", "reader"):
            dedup = "false" if self.delta and name == "b" else "true"
            flags = {"writeback__interval": "1h", "dedup": dedup}
            self.hosts[name] = self.portal.enter(lambda name=name, flags=flags: self.world.host(name, **flags))

    # -- writers ------------------------------------------------------------------------------------------------

    def awake(self, host: str) -> bool:
        return host not in self.sleepers

    def free(self, name: str) -> bool:
        return all(sleeper.name != name for sleeper in self.sleepers.values())

    async def _opened(self, volume: Volume, name: str) -> Image:
        await volume.catalog.refresh()
        if name not in self.images:
            entry = await volume.create(ROOT_ID, name)
        else:
            entry = await volume.catalog.resolve(name, max_age_s=0)
        return await volume.open_image(entry.node_id)

    def _written(self, name: str, writes: list[tuple[int, int, int]]) -> Content:
        content = dict(self.images.get(name, {}))
        for index, count, seed in writes:
            content.update(dict.fromkeys(range(index, min(index + count, CHUNKS)), seed))
        return content

    async def _write(self, image: Image, writes: list[tuple[int, int, int]]) -> None:
        for index, count, seed in writes:
            for at in range(index, min(index + count, CHUNKS)):
                if self.delta:
                    await image.read(at * CHUNK, CHUNK)  # what it was is at hand then
                await image.write(at * CHUNK, self.made(seed))

    @rule(host=WRITERS, name=NAMES, writes=WRITES)
    def write(self, host: str, name: str, writes: list[tuple[int, int, int]]) -> None:
        if not self.awake(host) or not self.free(name):
            return

        async def work() -> None:
            volume = self.hosts[host]
            image = await self._opened(volume, name)
            await self._write(image, writes)
            await volume.close_image(image)

        self.portal.run(work)
        self.images[name] = self._written(name, writes)

    @rule(
        host=WRITERS,
        name=NAMES,
        writes=WRITES,
        where=st.sampled_from([("create", "packs/"), ("create", "images/"), ("get", "packs/"), ("list", "condemned/")]),
    )
    def fall_asleep_in_a_commit(self, host: str, name: str, writes: list[tuple[int, int, int]], where: tuple[str, str]) -> None:
        if not self.awake(host) or not self.free(name):
            return
        pause = Pause(*where)

        async def work() -> Commit:
            volume = self.hosts[host]
            image = await self._opened(volume, name)
            await self._write(image, writes)
            sleeper = Commit(pause, name, self._written(name, writes))
            self.world.stores[host].hook = pause
            self.portal._nursery.start_soon(sleeper.run, lambda: volume.close_image(image))
            await sleeper.wait_asleep()
            return sleeper

        sleeper = self.portal.run(work)
        self.images.setdefault(name, {})
        self.sleepers[host] = sleeper
        if not pause.reached.is_set():
            self.wake(host)

    @rule(host=WRITERS)
    def wake(self, host: str) -> None:
        sleeper = self.sleepers.pop(host, None)
        if sleeper is None:
            return
        self.world.stores[host].hook = lambda operation, name: None
        sleeper.pause.wake()
        self.portal.run(sleeper.done.wait)
        assert sleeper.error is None, sleeper.error
        self.images[sleeper.name] = sleeper.content
        self.overtaken_s = self.world.ahead_s

    def unlink(self, host: str, name: str) -> None:
        if not self.awake(host) or not self.free(name) or name not in self.images:
            return
        self.portal.run(self.hosts[host].catalog.refresh)
        self.portal.run(self.hosts[host].unlink, ROOT_ID, name)
        del self.images[name]
        for key in [key for key in self.snapshots if key[0] == name]:
            del self.snapshots[key]

    @rule(host=WRITERS, name=NAMES, tag=st.sampled_from(["s", "t"]))
    def snapshot(self, host: str, name: str, tag: str) -> None:
        if not self.awake(host) or not self.free(name) or name not in self.images:
            return

        async def work() -> None:
            volume = self.hosts[host]
            entry = await volume.catalog.resolve(name, max_age_s=0)
            if (name, tag) in self.snapshots:
                await delete_snapshot(volume, entry, tag)
            else:
                await take_snapshot(volume, entry, tag)

        self.portal.run(work)
        if self.snapshots.pop((name, tag), None) is None:
            self.snapshots[(name, tag)] = dict(self.images[name])

    @rule(host=WRITERS, name=NAMES, other=NAMES)
    def clone(self, host: str, name: str, other: str) -> None:
        if not self.awake(host) or not self.free(name) or name not in self.images or other in self.images or not self.free(other):
            self.unlink(host, other)
            return

        async def work() -> None:
            volume = self.hosts[host]
            await clone(volume, await volume.catalog.resolve(name, max_age_s=0), ROOT_ID, other)

        self.portal.run(work)
        self.images[other] = dict(self.images[name])

    # -- readers ------------------------------------------------------------------------------------------------

    @rule(name=NAMES)
    def open_handle(self, name: str) -> None:
        if name not in self.images:
            return
        volume = self.hosts["reader"]

        async def work() -> Image | None:
            entry = await volume.catalog.resolve(name, max_age_s=0)
            if volume.image(entry.node_id) is not None:
                return None  # another open would make the first handle follow
            return await volume.open_image(entry.node_id)

        image = self.portal.run(work)
        if image is not None:
            self.handles.append(Handle(image, self.plain(self.images[name]), self.world.ahead_s))

    @precondition(lambda self: bool(self.handles))
    @rule(keep=st.booleans())
    def read_handle(self, keep: bool) -> None:
        volume, handle = self.hosts["reader"], self.handles[0]
        image = handle.image

        async def work() -> None:
            volume.cache.l1.clear()
            image.trim_map(0)
            handle.pinned(self.world.ahead_s)
            try:
                assert await image.read(0, image.size) == handle.seen
            except StaleError:
                assert handle.lapse_s > GRACE_S
            if not keep:
                await volume.close_image(image)

        self.portal.run(work)
        if not keep:
            self.handles.pop(0)

    @rule(host=WRITERS, name=NAMES, keeper=st.sampled_from(["handle", "snapshot", "both"]))
    def overwrite_what_is_kept(self, host: str, name: str, keeper: str) -> None:
        """What only a handle or a snapshot shows is replaced wholly, and collected if it may be: rarely come by step by step."""
        if not self.awake(host) or not self.free(name):
            return
        self.contents += 2  # that nothing else has
        self.write(host, name, [(0, 3, self.contents)])
        if keeper != "snapshot":
            self.open_handle(name)
        if keeper != "handle" and (name, "s") not in self.snapshots:
            self.snapshot(host, name, "s")
        self.write(host, name, [(index, 1, self.contents + 1) for index in self.images[name]])
        self.sleep(2 * GRACE_S, reader_too=False)
        self.collect(3, GRACE_S + 60)
        if self.handles:
            self.read_handle(keep=True)

    @rule(host=WRITERS, name=NAMES, where=st.sampled_from([("create", "packs/"), ("create", "images/")]), pause_s=SLEEPS)
    def collect_under_a_sleeping_commit(self, host: str, name: str, where: tuple[str, str], pause_s: float) -> None:
        """The commit refers to a pack that was dead, and is being collected meanwhile: rarely come by step by step."""
        if not self.awake("a") or not self.awake("b") or not self.free(name):
            return
        self.contents += 2
        self.leave_garbage(host, [(0, 3, self.contents)])
        self.fall_asleep_in_a_commit(host, name, [(0, 3, self.contents), (4, 1, self.contents + 1)], where)
        self.collect(3, pause_s)
        self.wake(host)

    # -- time and collection ------------------------------------------------------------------------------------

    @rule(seconds=SLEEPS, reader_too=st.booleans())
    def sleep(self, seconds: float, reader_too: bool) -> None:
        """Time passes; whoever is awake renews its pin in between."""
        while seconds > 0:
            step = min(seconds, GRACE_S / 5)
            self.world.sleep(step)
            seconds -= step
            if not reader_too:
                self._pin()

    def _pin(self) -> None:
        self.portal.run(self.hosts["reader"].pins.beat)
        for handle in self.handles:
            handle.pinned(self.world.ahead_s)

    @rule(times=st.integers(1, 3), pause_s=SLEEPS)
    def collect(self, times: int, pause_s: float) -> None:
        """Several times, with so much time between."""
        for number in range(times):
            if number:
                self.sleep(pause_s, reader_too=False)
            self._collect("c", True)

    @rule(calls=st.integers(1, 80))
    def collect_and_be_killed(self, calls: int) -> None:
        if self.collector is not None:
            return
        self.world.stores["c"].hook = Kill(calls)
        try:
            self._collect("c", True)
        except StoreDeniedError:
            pass
        finally:
            self.world.stores["c"].hook = lambda operation, name: None

    @rule(where=st.one_of(st.sampled_from([("create", "condemned/"), ("delete", "packs/"), ("list", "images/")]), st.integers(1, 60)))
    def collector_falls_asleep(self, where: tuple[str, str] | int) -> None:
        """In the middle of a collection; meanwhile the auditor collects where it is asked to."""
        if self.collector is not None:
            return
        sleeper = Sleeper(PauseAtCall(where) if isinstance(where, int) else Pause(*where))

        async def work() -> None:
            self.world.stores["c"].hook = sleeper.pause
            self.portal._nursery.start_soon(sleeper.run, lambda: collect(self.hosts["c"], everything=True))
            await sleeper.wait_asleep()

        self.portal.run(work)
        self.collector = sleeper
        if sleeper.done.is_set():
            self.collector_wakes()

    @precondition(lambda self: self.collector is not None)
    @rule()
    def collector_wakes(self) -> None:
        sleeper, self.collector = self.collector, None
        assert sleeper is not None
        self.world.stores["c"].hook = lambda operation, name: None
        sleeper.pause.wake()
        self.portal.run(sleeper.done.wait)
        assert sleeper.error is None, sleeper.error

    @rule(host=WRITERS, writes=WRITES)
    def leave_garbage(self, host: str, writes: list[tuple[int, int, int]]) -> None:
        """A dead pack that is not condemned, for dedup to find."""
        if not self.awake(host):
            return

        async def work() -> None:
            volume = self.hosts[host]
            image = await volume.open_image((await volume.create(ROOT_ID, "garbage")).node_id)
            await self._write(image, writes)
            await volume.close_image(image)
            await volume.unlink(ROOT_ID, "garbage")

        self.portal.run(work)
        self.sleep(2 * GRACE_S, reader_too=False)
        self._collect("c", False)

    def _collect(self, host: str, everything: bool) -> GcReport:
        if host == "c" and self.collector is not None:
            host = "auditor"
        report = self.portal.run(lambda: collect(self.hosts[host], everything=everything))
        if self.world.ahead_s - self.overtaken_s > GRACE_S:
            assert report.complete, report.problems
            assert not report.problems
        else:  # of the generation that was overtaken: chunks, or a node of its map, and then nothing is freed meanwhile
            told = ("references lead to packs", "is gone from the store")
            assert all(any(words in problem for words in told) for problem in report.problems), report.problems
        return report

    # -- what must hold -----------------------------------------------------------------------------------------

    @invariant()
    def everything_is_there(self) -> None:
        if not self.hosts:
            return
        self.portal.run(self._audit)

    async def _audit(self) -> None:
        volume = self.hosts["auditor"]
        volume.cache.l1.clear()
        await volume.catalog.refresh()
        assert {e.name for e in await volume.catalog.list(ROOT_ID)} == set(self.images)
        for name, content in self.images.items():
            entry = await volume.catalog.resolve(name, max_age_s=0)
            image = await volume.open_image(entry.node_id)
            assert await image.read(0, CHUNKS * CHUNK) == self.plain(content), name
            await volume.close_image(image)
            for tag, snapshot in entry.snapshots.items():
                view = await volume.open_snapshot(entry.node_id, snapshot.counter, name=tag)
                assert await view.read(0, CHUNKS * CHUNK) == self.plain(self.snapshots[(name, tag)]), (name, tag)
                await volume.close_image(view)

    def teardown(self) -> None:
        try:
            if self.hosts:
                for host in ("a", "b"):
                    self.wake(host)
                if self.collector is not None:
                    self.collector_wakes()
                while self.handles:
                    self.read_handle(keep=False)
                self._pin()
                self.nothing_is_left_over()
        finally:
            for sleeper in (*self.sleepers.values(), self.collector):
                if sleeper is not None:
                    sleeper.pause.wake()
            for store in self.world.stores.values():
                store.hook = lambda operation, name: None
            self.portal.close()
            self.stack.close()
            shutil.rmtree(self.directory)

    def nothing_is_left_over(self) -> None:
        for _ in range(6):
            self.world.sleep(2 * GRACE_S)
            report = self._collect("c", everything=True)
        assert report.packs == report.packs_live
        assert report.forwards_deleted == 0
        images = {name.split("/")[1] for name in self.world.names("images/")}
        assert len(images) == len(self.images)
        assert not self.world.names("pins/")
        self.everything_is_there()


class DeltaMachine(CollectionMachine):
    """The same where what is written again is stored as a delta, in chains that collections must keep whole. One of the writers knows no
    dedup, so that content which comes back is there twice, and once as a delta upon itself."""

    delta = True
    made = staticmethod(alike)


TestCollectionMachine = CollectionMachine.TestCase
TestCollectionMachine.settings = settings(max_examples=25, stateful_step_count=30, deadline=None)

TestDeltaMachine = DeltaMachine.TestCase
TestDeltaMachine.settings = settings(max_examples=max(1, round(5 * TORTURE)), stateful_step_count=30, deadline=None)
