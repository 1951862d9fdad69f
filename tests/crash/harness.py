"""A random workload on a simulated host, cut off at every sync and every store request, and what must be there afterwards.

A `Trace` is one run of the workload: everything that reached the disk or the store, in order, with the moments between
them at which the engine promised something. `Trace.cases` cuts it at every point that can make a difference. Of each
cut a `Case` makes one state that the machine may be found in, opens a fresh `Volume` on it, and checks:

    with the state directory    each image is a prefix of its own history that holds every fsynced write; the last write
                                may be there in part; nothing is set aside, nothing raises, and nothing is left over
    without it (the host died)  each image is exactly a prefix of its history that holds everything that was committed
                                (under durability "store": fsynced)

and, for some, cuts the replay itself off in the same way, and checks that a second one leads to the same bytes.
"""

from __future__ import annotations

import dataclasses
import logging
import random
import shutil
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import trio

from novafs import journalfile
from novafs.catalogtree import ROOT_ID
from novafs.config import Config, load_config
from novafs.durable import FileOps
from novafs.errors import NovaError, StoreUnavailableError
from novafs.image import Image
from novafs.journalfile import RecordKind
from novafs.objectstore.client import StoreClient
from novafs.volume import Volume, init_volume, open_volume
from tests.support.crash_disk import DiskLog, DiskModel, DiskState
from tests.support.memory_store import Change, MemoryStore, change_of
from tests.support.simulation import Simulation, named

CHUNK = 4096
SPAN = 24 * CHUNK
SEGMENT_BYTES = 64 << 10
PAYLOAD_MAX = 8 << 10
STATE = "state"


class Op(NamedTuple):
    """One write (kind DATA) or resize (offset: the new size)."""

    kind: RecordKind
    offset: int
    data: bytes


def applied(content: bytearray, op: Op) -> None:
    """What an operation does to the content."""
    if op.kind is RecordKind.RESIZE:
        del content[op.offset :]
        content.extend(bytes(op.offset - len(content)))
    else:
        content.extend(bytes(max(0, op.offset - len(content))))
        content[op.offset : op.offset + len(op.data)] = op.data


@dataclasses.dataclass
class ImageModel:
    """What was done to one image, in the order in which it took effect."""

    name: str
    node_id: bytes
    ops: list[Op] = dataclasses.field(default_factory=list)


class Event(NamedTuple):
    """One entry of a trace. kind: "disk" or "store" (what took effect), "begin" (what was sent to the store), "issued" (image: one more
    operation), "durable" or "committed" (image: so many operations were promised)."""

    kind: str
    image: int = -1
    count: int = 0
    what: Any = None


def config_for(state_dir: Path, **flags: str) -> Config:
    """A configuration for simulated hosts."""
    given = {"l2.url": "none", "l1.capacity": "16MiB", "state_dir": str(state_dir), "l3.codec": "none", **flags}
    return load_config("file:///nowhere", flags=given, environ={})


@contextmanager
def small_segments() -> Iterator[None]:
    """Journal segments small enough that a short workload goes through many."""
    before = journalfile.SEGMENT_BYTES, journalfile.PAYLOAD_MAX
    vars(journalfile).update(SEGMENT_BYTES=SEGMENT_BYTES, PAYLOAD_MAX=PAYLOAD_MAX)
    try:
        yield
    finally:
        vars(journalfile).update(SEGMENT_BYTES=before[0], PAYLOAD_MAX=before[1])


class Complaints(logging.Handler):
    """Collects what the engine logs as an error."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@contextmanager
def complaints() -> Iterator[list[str]]:
    """What the engine logs as an error while the block runs."""
    handler = Complaints()
    logger = logging.getLogger("novafs")
    logger.addHandler(handler)
    try:
        yield handler.lines
    finally:
        logger.removeHandler(handler)


@asynccontextmanager
async def open_host(config: Config, store: MemoryStore, ops: FileOps) -> AsyncIterator[Volume]:
    """A volume on a simulated host."""
    async with open_volume(config, owns_state=True, store=store, ops=ops) as volume:
        yield volume


class Trace:
    """One workload. `faults`: requests fail and lose their answers, syncs and writes on the disk fail."""

    def __init__(self, seed: int, directory: Path, *, durability: str, faults: bool, images: int = 3, steps: int = 40) -> None:
        self.seed = seed
        self.directory = directory
        self.durability = durability
        self.faults = faults
        self.delta = seed % 2 == 1
        """Half of all workloads store deltas (`novafs.delta`)."""
        self.steps = steps
        self.events: list[Event] = []
        self.models: list[ImageModel] = []
        self.start_objects: dict[str, bytes] = {}
        self._count = images
        self._away_until_s = 0.0
        self.log: list[str] = []

    def run(self) -> None:
        """Record it."""
        root = self.directory / "live"
        root.mkdir(parents=True)
        self.disk = DiskLog(root)
        self.store = MemoryStore()
        with Simulation(self.seed) as simulation, small_segments(), complaints() as self.log:
            self._rng = simulation.rng
            simulation.run(self._prepare)
            self.start_objects = dict(self.store.objects)
            self.disk.record = lambda call: self._note(Event("disk", what=call))
            self.store.record = lambda change: self._note(Event("store", what=change))
            simulation.on_call = self._begin
            if self.faults:
                self.disk.fault, self.store.fault = self._disk_fault, self._store_fault
            for _ in range(self._rng.choice([1, 1, 2, 3])):  # mounts of the same host, one after the other
                self._away_until_s = 0.0
                simulation.run(self._mount)
            assert not [line for line in self.log if not self.faults or "kept in" in line], self.log
        shutil.rmtree(root)

    def _note(self, event: Event) -> None:
        self.events.append(event)

    def _begin(self, call: Any) -> None:
        change = change_of(named(call))
        if change is not None:
            self._note(Event("begin", what=change))

    def _disk_fault(self, operation: str) -> None:
        chance = {"sync": 0.02, "write": 0.01, "create": 0.02}.get(operation, 0)
        if self._rng.random() < chance:
            raise OSError(28 if operation != "sync" else 5, f"scripted failure of {operation}")

    def _store_fault(self, moment: str, operation: str, name: str) -> None:
        changes, now = operation in ("create", "put", "delete"), trio.current_time()
        if moment == "after" and self._rng.random() < 0.01:  # longer than any request is tried again: nobody knows whether it counts
            self._away_until_s = now + self._rng.uniform(10, 100)
        if now < self._away_until_s or self._rng.random() < (0.04 if changes else 0.02):
            raise StoreUnavailableError(f"scripted: {operation} {name} failed {moment} it took effect")

    async def _prepare(self) -> None:
        client = StoreClient(self.store)
        await init_volume(client, chunk_size=CHUNK, delta=self.delta)
        async with open_volume(config_for(self.directory / "setup"), owns_state=True, store=self.store) as volume:
            for number in range(self._count):
                entry = await volume.create(ROOT_ID, f"{number}.raw")
                self.models.append(ImageModel(entry.name, entry.node_id))

    @property
    def flags(self) -> dict[str, str]:
        """Configuration of the mount."""
        return {"durability": self.durability, "writeback.interval": "0.3s"}

    async def _mount(self) -> None:
        config = config_for(self.disk.root / STATE, **self.flags)
        try:
            async with open_host(config, self.store, self.disk) as volume:
                rules = volume.writeback.rules
                volume.writeback.rules = dataclasses.replace(rules, dirty_max_bytes=self._rng.choice([64, 256]) << 10)
                async with trio.open_nursery() as nursery:
                    for number in range(len(self.models)):
                        nursery.start_soon(self._guest, volume, number)
        except NovaError:
            if not self.faults:
                raise

    async def _guest(self, volume: Volume, number: int) -> None:
        """One program that works on an image; sometimes a second one helps."""
        model, rng = self.models[number], self._rng
        image: Image | None = None
        for _ in range(rng.randint(self.steps // 3, self.steps)):
            try:
                if image is None:
                    image = await volume.open_image((await volume.catalog.resolve(model.name)).node_id)
                image = await self._step(volume, image, number)
            except NovaError:
                if not self.faults:
                    raise
        if image is not None and rng.random() < 0.7:
            try:
                await volume.close_image(image)
            except NovaError:
                if not self.faults:
                    raise

    async def _step(self, volume: Volume, image: Image, number: int) -> Image | None:
        model, rng = self.models[number], self._rng
        kind = rng.choices(
            ["write", "small", "resize", "fsync", "pair", "commit", "close", "flush", "wait"], [30, 20, 8, 25, 5, 3, 3, 3, 8]
        )[0]
        if kind in ("write", "small"):
            size = rng.randint(1, 3 * SEGMENT_BYTES // 4) if rng.random() < 0.1 else rng.choice([512, 4096, 8192, rng.randint(1, 20000)])
            if kind == "small":
                size = rng.choice([512, 1024, 4096])
            offset = rng.choice([rng.randrange(0, SPAN, 512), rng.randint(0, SPAN)])
            # Few different contents, so that chunks are found again, and each write is known by its own mark.
            data = bytes(size) if rng.random() < 0.1 else (rng.randbytes(32) * (size // 32 + 1))[:size]
            await self._write(image, number, Op(RecordKind.DATA, offset, data))
        elif kind == "resize":
            await self._write(
                image, number, Op(RecordKind.RESIZE, rng.choice([0, rng.randint(0, SPAN), rng.randrange(0, SPAN, CHUNK)]), b"")
            )
        elif kind == "fsync":
            await self._sync(image, number)
        elif kind == "pair":
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._sync, image, number)
                nursery.start_soon(self._sync, image, number)
                await self._write(image, number, Op(RecordKind.DATA, rng.randrange(0, SPAN, 512), rng.randbytes(512)))
        elif kind == "commit":
            count = len(model.ops)
            await image.commit()
            self._note(Event("committed", number, count))
        elif kind == "flush":
            count = len(model.ops)
            await image.flush()
            self._note(Event("durable", number, count))
        elif kind == "close":
            count = len(model.ops)
            try:
                await volume.close_image(image)
            except NovaError:
                if not self.faults:
                    raise
            else:
                self._note(Event("committed", number, count))
            return None  # the handle is gone, whatever close said
        else:
            await trio.sleep(rng.choice([0.01, 0.1, 0.5]))
        return image

    async def _write(self, image: Image, number: int, op: Op) -> None:
        if op.kind is RecordKind.RESIZE:
            if op.offset == image.size:
                return
            await image.resize(op.offset)
        else:
            await image.write(op.offset, op.data)
        # No checkpoint since it took effect.
        self.models[number].ops.append(op)
        self._note(Event("issued", number))

    async def _sync(self, image: Image, number: int) -> None:
        count = len(self.models[number].ops)
        try:
            await image.fsync()
        except NovaError:
            if not self.faults:
                raise
            return
        self._note(Event("durable", number, count))

    # -- cutting it off -----------------------------------------------------------------------------------------

    def cases(self) -> Iterator[Case]:
        """Every cut that can make a difference, with one state for each, and the death of the host where a generation was made."""
        disk, store = DiskModel(), MemoryStore(self.start_objects)
        on_way: list[Change] = []
        issued, durable, committed = [0] * self._count, [0] * self._count, [0] * self._count
        rng = random.Random(self.seed)
        for position, event in enumerate(self.events):
            if event.kind == "disk":
                cut = event.what[0] != "write"
                if cut:
                    yield self._case(position, rng, disk, store, on_way, issued, durable, committed)
                disk.tell(event.what)
                if cut:
                    yield self._case(position + 1, rng, disk, store, on_way, issued, durable, committed)
            elif event.kind == "begin":
                on_way.append(event.what)
            elif event.kind == "store":
                store.apply(event.what)
                if event.what in on_way:
                    on_way.remove(event.what)
                yield self._case(position + 1, rng, disk, store, on_way, issued, durable, committed)
                if event.what[1].startswith("images/"):
                    yield dataclasses.replace(
                        self._case(position + 1, rng, disk, store, on_way, issued, durable, committed), disk=None, late=[]
                    )
            elif event.kind == "issued":
                issued[event.image] += 1
            elif event.kind == "durable":
                durable[event.image] = max(durable[event.image], event.count)
                if self.durability == "store":
                    committed[event.image] = max(committed[event.image], event.count)
            elif event.kind == "committed":
                durable[event.image] = max(durable[event.image], event.count)
                committed[event.image] = max(committed[event.image], event.count)

    def _case(
        self,
        position: int,
        rng: random.Random,
        disk: DiskModel,
        store: MemoryStore,
        on_way: list[Change],
        issued: list[int],
        durable: list[int],
        committed: list[int],
    ) -> Case:
        state = disk.whole() if rng.random() < 0.15 else disk.crash(rng)
        # Requests of the dead host that the store gets only now. One whose answer came is no longer on its way, but a repeated
        # request may be: those of the last few are taken.
        late = [(rng.choice([0, rng.randint(1, 25)]), change) for change in on_way[-6:] if rng.random() < 0.4]
        return Case(self, position, rng.getrandbits(64), state, dict(store.objects), late, list(issued), list(durable), list(committed))


@dataclasses.dataclass
class Case:
    """One cut. disk: None where the host is lost."""

    trace: Trace
    position: int
    seed: int
    disk: DiskState | None
    objects: dict[str, bytes]
    late: list[tuple[int, Change]]
    issued: list[int]
    durable: list[int]
    committed: list[int]

    def check(self, directory: Path, *, again: bool) -> None:
        """Reopen what is left, and check it. again: cut the replay off, too."""
        root = directory / "case"
        root.mkdir()
        try:
            with Simulation(self.seed, pause_s=0.005 if self.late or again else 0) as simulation, small_segments(), complaints() as log:
                disk = DiskLog(root)
                store = MemoryStore(self.objects)
                store.late = list(self.late)
                if self.disk is None:
                    simulation.run(self._check_lost, root, store, disk)
                    return
                disk.adopt(self.disk.write_to(root))
                if again:
                    self._check_cut_replay(simulation, directory, disk, store)
                else:
                    simulation.run(self._check_kept, root, store, disk)
                assert not log, log
        finally:
            shutil.rmtree(root)

    def _config(self, root: Path) -> Config:
        return config_for(root / STATE, **self.trace.flags)

    async def _read_all(self, volume: Volume) -> list[bytes]:
        contents: list[bytes] = []
        for model in self.trace.models:
            image = await volume.open_image((await volume.catalog.resolve(model.name)).node_id)
            contents.append(await image.read(0, image.size))
            assert len(contents[-1]) == image.size
            await volume.close_image(image)
        return contents

    async def _check_kept(self, root: Path, store: MemoryStore, disk: FileOps) -> None:
        async with open_host(self._config(root), store, disk) as volume:
            found = await self._read_all(volume)
            for number, content in enumerate(found):
                self._match(number, content, self.durable[number], partial=True)
            self._check_leftovers(root / STATE)
            if self.seed % 3 == 0:
                await self._write_on(volume, found)
        if self.late or self.seed % 3 == 0:
            async with open_host(self._config(root), store, disk) as volume:
                assert await self._read_all(volume) == found, "a second mount changed what the first one found"

    async def _write_on(self, volume: Volume, found: list[bytes]) -> None:
        """Life goes on after a crash."""
        for number, model in enumerate(self.trace.models):
            image = await volume.open_image(model.node_id)
            state = bytearray(found[number])
            op = Op(RecordKind.DATA, self.seed % SPAN, self.seed.to_bytes(8, "little") * 200)
            applied(state, op)
            await image.write(op.offset, op.data)
            await image.fsync()
            assert await image.read(0, image.size) == bytes(state)
            await volume.close_image(image)
            found[number] = bytes(state)

    async def _check_lost(self, root: Path, store: MemoryStore, disk: FileOps) -> None:
        async with open_volume(self._config(root), read_only=True, store=store, ops=disk) as volume:
            for number, content in enumerate(await self._read_all(volume)):
                self._match(number, content, self.committed[number], partial=False)

    def _check_cut_replay(self, simulation: Simulation, directory: Path, disk: DiskLog, store: MemoryStore) -> None:
        """Record the replay like a trace, cut it at one point, and replay what is left of that."""
        assert self.disk is not None
        events: list[Event] = []
        found: list[list[bytes]] = []
        start = dict(store.objects)
        disk.record = lambda call: events.append(Event("disk", what=call))
        store.record = lambda change: events.append(Event("store", what=change))

        async def replay(root: Path, store: MemoryStore, disk: FileOps) -> None:
            async with open_host(self._config(root), store, disk) as volume:
                found.append(await self._read_all(volume))

        simulation.run(replay, disk.root, store, disk)
        cut = simulation.rng.randint(0, len(events))
        model, left = DiskModel(self.disk), MemoryStore(start)
        for event in events[:cut]:
            if event.kind == "disk":
                model.tell(event.what)
            else:
                left.apply(event.what)
        root = directory / "again"
        root.mkdir()
        try:
            second = DiskLog(root)
            second.adopt(model.crash(simulation.rng).write_to(root))
            simulation.run(replay, root, left, second)
            self._check_leftovers(root / STATE)
        finally:
            shutil.rmtree(root)
        for number, content in enumerate(found[0]):
            self._match(number, content, self.durable[number], partial=True)
        if not self.late:
            assert found[1] == found[0], "a replay that was cut off and done again gives other bytes"
        for number, content in enumerate(found[1]):
            self._match(number, content, self.durable[number], partial=True)

    def _match(self, number: int, content: bytes, at_least: int, *, partial: bool) -> None:
        """The content is what a prefix of the image's history makes, with `at_least` so many operations."""
        ops = self.trace.models[number].ops[: self.issued[number]]
        state = bytearray()
        for op in ops[:at_least]:
            applied(state, op)
        for count in range(at_least, len(ops) + 1):
            if bytes(state) == content:
                return
            if count < len(ops):
                if partial and self._partly(state, ops[count], content):
                    return
                applied(state, ops[count])
        raise AssertionError(
            f"image {number}: {len(content)} bytes that are no prefix of its {len(ops)} operations with at least {at_least} of them"
        )

    @staticmethod
    def _partly(state: bytearray, op: Op, content: bytes) -> bool:
        """Whether a first part of one write makes the difference; a write is journaled in parts of PAYLOAD_MAX."""
        for length in range(PAYLOAD_MAX, len(op.data), PAYLOAD_MAX):
            tried = bytearray(state)
            applied(tried, Op(op.kind, op.offset, op.data[:length]))
            if bytes(tried) == content:
                return True
        return False

    @staticmethod
    def _check_leftovers(state_dir: Path) -> None:
        aside = state_dir / "aside"
        assert not aside.exists() or not list(aside.iterdir()), "data was set aside without a reason"
