"""Several simulated hosts that write one image, are paused, killed and robbed of their leases; and what must hold all the same.

Each host runs a guest that opens the image, reads it whole, writes, fsyncs, reads back and closes, and starts anew after an
error. A guest that its host lets write must never see bytes other than those it has read and written itself. Afterwards
the chain of generations in the store is read and held against what the guests did:

    chain        counters without gaps, each names its predecessor, epochs never fall, one journal to an epoch
    fencing      every generation of an epoch is what the epoch began with and a prefix of the writes acknowledged under it;
                 an epoch begins with what the one before ended with, and with what its writer had read
    durability   what was fsynced under an epoch is in its last generation, or (durability "journal", and the lease was
                 taken from a host before it committed) in a file under `aside/` of that host
    takeover     under durability "journal" only a lease that was released (or broken) is another host's next
    one at a time   under takeover "auto" nothing is acknowledged under an epoch once another host's has begun
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import trio

from novafs.aside import read_aside
from novafs.catalogtree import ROOT_ID
from novafs.config import Config
from novafs.errors import NovaError, StoreUnavailableError
from novafs.generation import Generation, generation_chain
from novafs.image import Image
from novafs.journalfile import RecordKind
from novafs.lease import break_lease, lease_chain
from novafs.objectstore.client import StoreClient
from novafs.volume import Volume, init_volume, open_volume
from tests.crash.harness import CHUNK, Op, applied, config_for, small_segments
from tests.support.crash_disk import DiskLog
from tests.support.memory_store import Change, MemoryStore
from tests.support.simulation import Host, HostDied, Simulation, current_host

SPAN = 4 * CHUNK
TTL_S = 2.0


@dataclasses.dataclass
class Tenure:
    """What was done under one epoch. base: what its writer had read before its first write; synced: so many operations were fsynced."""

    machine: int
    base: bytes
    ops: list[Op] = dataclasses.field(default_factory=list)
    sequences: list[int] = dataclasses.field(default_factory=list)
    synced: int = 0
    acknowledged_s: float = 0.0


class Machine:
    """A host with its disk, through all its processes."""

    def __init__(self, number: int, root: Path, rate: float) -> None:
        self.number = number
        self.disk = DiskLog(root)
        self.rate = rate
        self.host: Host | None = None
        self.scope: trio.CancelScope | None = None
        self.down_s = 0.0


class World:
    """One simulation. rules: "journal" (an operator breaks leases), "auto" (takeover = "auto"), "store" (durability = "store")."""

    def __init__(self, seed: int, directory: Path, rules: str, *, machines: int = 2, duration_s: float = 30.0) -> None:
        self.rules = rules
        self.duration_s = duration_s
        self.seed = seed
        self.simulation = Simulation(seed, pause_s=0.05)
        self.rng = self.simulation.rng
        self.store = MemoryStore(clock_s=self.simulation.now_s)
        self.machines = []
        for number in range(machines):
            root = directory / str(number)
            root.mkdir(parents=True)
            self.machines.append(Machine(number, root, self.rng.uniform(0.96, 1.04)))
        self.tenures: dict[int, Tenure] = {}
        self.epochs: dict[int, tuple[float, str, bool]] = {}
        """When it began, whose journal, whether it is a release."""
        self.broken = 0
        self.acknowledged = 0
        self.taken_over = 0

    def run(self) -> None:
        """Simulate, and check."""
        with self.simulation, small_segments():
            self.simulation.run(self._prepare)
            self.store.record = self._stored
            self.store.fault = self._fault
            self.simulation.run(self._main)
            self.store.fault = lambda moment, operation, name: None
            self.simulation.run(self._recover_all)
            self.simulation.run(self._check)

    def _config(self, root: Path) -> Config:
        takeover = "auto" if self.rules == "auto" else "manual"
        flags = {"durability": "store" if self.rules == "store" else "journal", "lease.takeover": takeover}
        flags |= {"lease.ttl": f"{TTL_S}s", "lease.wait": "0.5s", "store.io_timeout": "2s", "writeback.interval": "0.7s"}
        return config_for(root / "state", **flags)

    async def _prepare(self) -> None:
        await init_volume(StoreClient(self.store), chunk_size=CHUNK, delta=self.seed % 2 == 1)
        root = self.machines[0].disk.root.parent / "setup"
        async with open_volume(self._config(root), owns_state=True, store=self.store) as volume:
            self.node_id = (await volume.create(ROOT_ID, "disk.raw")).node_id
        shutil.rmtree(root)

    def _stored(self, change: Change) -> None:
        operation, name, data = change
        if operation == "create" and name.startswith(f"leases/{self.node_id.hex()}/"):
            record = lease_chain(StoreClient(self.store), self.node_id)._decode(data, name)
            self.epochs[record.counter] = (self.simulation.now_s(), record.journal_id.hex(), record.released)

    def _fault(self, moment: str, operation: str, name: str) -> None:
        host = current_host()
        if (host is not None and host.cut_off) or self.rng.random() < 0.02:
            raise StoreUnavailableError(f"scripted: {operation} {name} failed {moment} it took effect")

    # -- what happens -------------------------------------------------------------------------------------------

    async def _main(self) -> None:
        async with trio.open_nursery() as nursery:
            for machine in self.machines:
                nursery.start_soon(self._live, machine)
            await self._trouble()
            for machine in self.machines:
                assert machine.host is not None and machine.scope is not None
                machine.host.resume()
                machine.host.cut_off = False
                machine.scope.cancel()
            nursery.cancel_scope.cancel()

    async def _trouble(self) -> None:
        """Pauses, kills and broken leases."""
        rng = self.rng
        end_s = trio.current_time() + self.duration_s
        while trio.current_time() < end_s:
            await trio.sleep(rng.uniform(0.1, 3))
            machine = rng.choice(self.machines)
            kind = rng.choice(["pause", "pause", "cut off", "cut off", "kill", "break", "lose"])
            if machine.host is None or machine.scope is None:
                continue
            if kind == "pause":
                machine.host.pause()
                await trio.sleep(rng.choice([0.1, TTL_S / 2, TTL_S * 1.2, TTL_S * 3]))
                machine.host.resume()
            elif kind == "cut off":
                machine.host.cut_off = True
                await trio.sleep(rng.choice([TTL_S / 2, TTL_S * 1.2, TTL_S * 3]))
                machine.host.cut_off = False
            elif kind in ("kill", "lose"):
                machine.host.die()
                machine.scope.cancel()
                if kind == "lose":  # it stays away for a while, and an operator gives its lease to the others
                    machine.down_s = 2 * TTL_S
                    await self._break()
            else:
                await self._break()

    async def _break(self) -> None:
        if self.rules != "auto":
            with contextlib.suppress(NovaError):
                ended = await break_lease(StoreClient(self.store, io_timeout_s=1), self.node_id)
                self.broken += ended is not None

    async def _live(self, machine: Machine) -> None:
        """One process after the other."""
        while True:
            machine.host = host = Host(f"{machine.number}", machine.rate)
            machine.disk.fault = lambda operation, host=host: _require_alive(host)
            machine.scope = scope = trio.CancelScope()
            with scope, host.running():
                try:
                    await self._process(machine, host)
                except* HostDied:
                    pass
                except* NovaError:
                    pass  # the store did not answer at mount, or at the end
            if not host.dead and scope.cancelled_caught:
                return
            down_s, machine.down_s = machine.down_s, 0.0
            await trio.sleep(down_s + self.rng.uniform(0.1, 2))

    async def _process(self, machine: Machine, host: Host) -> None:
        async with self._opened(machine) as volume, trio.open_nursery() as nursery:
            nursery.start_soon(self._onlooker, host, volume)
            while True:
                try:
                    await self._guest(machine, host, volume)
                except NovaError:
                    await trio.sleep(self.rng.uniform(0.05, 1))

    async def _onlooker(self, host: Host, volume: Volume) -> None:
        """Another program on the host, which opens the image now and then: that must not let an old handle write."""
        while True:
            await trio.sleep(self.rng.uniform(0.1, 4))
            await host.wait_awake()
            try:
                image = await volume.open_image((await volume.catalog.resolve("disk.raw")).node_id)
                try:
                    await self._read(image)
                finally:
                    if not host.dead:
                        with trio.move_on_after(10):
                            await volume.close_image(image)
            except NovaError:
                continue

    @asynccontextmanager
    async def _opened(self, machine: Machine) -> AsyncIterator[Volume]:
        config = self._config(machine.disk.root)
        async with open_volume(config, owns_state=True, store=self.store, ops=machine.disk) as volume:
            yield volume

    async def _guest(self, machine: Machine, host: Host, volume: Volume) -> None:
        rng = self.rng
        image = await volume.open_image((await volume.catalog.resolve("disk.raw")).node_id)
        incarnation = image.incarnation
        try:
            known = bytearray(await self._read(image))
            writing = False
            for _ in range(rng.randint(1, 8)):
                await host.wait_awake()
                kind = rng.choices(["write", "resize", "fsync", "read", "wait"], [40, 5, 25, 15, 25])[0]
                if kind == "wait":
                    await trio.sleep(rng.choice([0.01, 0.3, 1.5]))
                elif kind == "read":
                    if writing and image.incarnation == incarnation:
                        assert await self._read(image) == known or image.incarnation != incarnation, "the image changed under its writer"
                elif kind == "fsync":
                    if writing:
                        await self._sync(image, host, incarnation)
                else:
                    op = Op(RecordKind.RESIZE, rng.randrange(0, SPAN, 512), b"")
                    if kind == "write":
                        op = Op(RecordKind.DATA, rng.randrange(0, SPAN, 512), rng.randbytes(rng.choice([100, 512, CHUNK])))
                    await self._write(machine, host, image, incarnation, op, known)
                    writing = True
            await host.wait_awake()
            await image.flush(incarnation=incarnation)
            await trio.sleep(rng.uniform(0, 1))
        finally:
            if not host.dead:
                with trio.move_on_after(10):
                    await volume.close_image(image)

    @staticmethod
    async def _read(image: Image) -> bytes:
        return await image.read(0, image.size)

    async def _write(self, machine: Machine, host: Host, image: Image, incarnation: int, op: Op, known: bytearray) -> None:
        if op.kind is RecordKind.RESIZE:
            if op.offset == image.size:
                return
            await image.resize(op.offset, incarnation=incarnation)
        else:
            await image.write(op.offset, op.data, incarnation=incarnation)
        # No checkpoint since it took effect.
        assert image.lease is not None
        tenure = self.tenures.setdefault(image.lease.epoch, Tenure(machine.number, bytes(known)))
        assert tenure.machine == machine.number, "two hosts write under one epoch"
        if not tenure.ops:
            tenure.base = bytes(known)
        tenure.ops.append(op)
        tenure.sequences.append(image._last_sequence)
        applied(known, op)
        self._acknowledge(host, tenure)

    async def _sync(self, image: Image, host: Host, incarnation: int) -> None:
        lease = image.lease
        tenure = self.tenures.get(lease.epoch) if lease is not None else None
        count = len(tenure.ops) if tenure is not None else 0
        await image.fsync(incarnation=incarnation)
        if tenure is not None and not host.dead:
            tenure.synced = max(tenure.synced, count)
            self._acknowledge(host, tenure)

    def _acknowledge(self, host: Host, tenure: Tenure) -> None:
        # A real process that is stopped now answers later, but decided before.
        if host.awake:
            tenure.acknowledged_s = max(tenure.acknowledged_s, self.simulation.now_s())
            self.acknowledged += 1

    async def _recover_all(self) -> None:
        """Every machine is started once more, so that nothing waits for a replay any longer."""
        for machine in self.machines:
            host = Host(f"{machine.number}", machine.rate)
            machine.disk.fault = lambda operation: None
            with host.running():
                async with self._opened(machine):
                    pass

    # -- what must hold -----------------------------------------------------------------------------------------

    async def _check(self) -> None:
        client = StoreClient(self.store)
        chain = generation_chain(client, self.node_id)
        newest = await chain.head()
        assert newest is not None
        generations = [await chain.read(counter) for counter in range(newest.record.counter + 1)]
        self._check_chain(generations)
        async with self._opened(self.machines[0]) as volume:
            contents = [await self._content(volume, generation) for generation in generations]
        self._check_tenures(generations, contents)
        self._check_takeovers()
        if self.rules == "auto":
            self._check_one_at_a_time()

    @staticmethod
    def _check_chain(generations: list[Generation]) -> None:
        journals: dict[int, bytes] = {}
        for older, newer in itertools.pairwise(generations):
            assert newer.predecessor == older.nonce, f"generation {newer.counter} does not follow the one before it"
            assert newer.epoch >= older.epoch, f"generation {newer.counter} of epoch {newer.epoch} follows one of epoch {older.epoch}"
            assert journals.setdefault(newer.epoch, newer.journal_id) == newer.journal_id

    async def _content(self, volume: Volume, generation: Generation) -> bytes:
        view = await volume.open_snapshot(self.node_id, generation.counter, name="view")
        try:
            return await view.read(0, view.size)
        finally:
            await volume.close_image(view)

    def _check_tenures(self, generations: list[Generation], contents: list[bytes]) -> None:
        state = b""
        for epoch in sorted({generation.epoch for generation in generations} | set(self.tenures)):
            tenure = self.tenures.get(epoch)
            own = [content for generation, content in zip(generations, contents, strict=True) if generation.epoch == epoch]
            if tenure is None:
                # Only fenced, or replayed what an earlier epoch of the same host had journaled.
                state = own[-1] if own else state
                continue
            assert own, f"epoch {epoch} was written under, and never fenced"
            assert own[0] == tenure.base, f"epoch {epoch}: its writer had read other bytes than it began with"
            reached = self._follow(epoch, tenure, own)
            self._check_synced(epoch, tenure, reached, generations, contents)
            self.taken_over += reached < len(tenure.ops)

    def _follow(self, epoch: int, tenure: Tenure, own: list[bytes]) -> int:
        """How many operations the last generation of the epoch has; each has a prefix of them."""
        state, count = bytearray(tenure.base), 0
        for content in own:
            while bytes(state) != content:
                assert count < len(tenure.ops), f"epoch {epoch}: a generation that is no prefix of what was written"
                applied(state, tenure.ops[count])
                count += 1
        return count

    def _check_synced(self, epoch: int, tenure: Tenure, reached: int, generations: list[Generation], contents: list[bytes]) -> None:
        if reached >= tenure.synced:
            return
        # `reached` is the lowest count that explains the bytes: writes of bytes that were there already change nothing.
        state = bytearray(tenure.base)
        for op in tenure.ops[:reached]:
            applied(state, op)
        before = bytes(state)
        for op in tenure.ops[reached : tenure.synced]:
            applied(state, op)
        if bytes(state) == before:
            return
        assert self.rules != "store", f"epoch {epoch}: {tenure.synced} operations were fsynced to the store, {reached} are there"
        # Replayed by the same host under a later epoch that nobody came in between with, or kept aside.
        later = [c for g, c in zip(generations, contents, strict=True) if g.epoch > epoch]
        full = bytearray(tenure.base)
        for count, op in enumerate(tenure.ops, 1):
            applied(full, op)
            if count >= tenure.synced and bytes(full) in later:
                return
        kept = self._kept_aside(tenure.machine)
        missing = [s for s in tenure.sequences[reached : tenure.synced] if s not in kept]
        assert not missing, f"epoch {epoch}: {len(missing)} fsynced operations are neither in a generation nor kept aside"

    def _kept_aside(self, machine: int) -> set[int]:
        directory = self.machines[machine].disk.root / "state" / "aside"
        found: set[int] = set()
        for path in directory.glob("*") if directory.is_dir() else ():
            found.update(record.sequence for record in read_aside(path).records)
        return found

    def _check_takeovers(self) -> None:
        """An operator's lease is not taken from a host that has not released it."""
        for epoch, (_, journal, released) in self.epochs.items():
            if self.rules == "journal" and epoch > 1 and not released:
                _, before, free = self.epochs[epoch - 1]
                assert free or before == journal, f"epoch {epoch} was taken over although nobody had released the one before"

    def _check_one_at_a_time(self) -> None:
        for epoch, tenure in self.tenures.items():
            journal = self.epochs[epoch][1]
            for later, (began_s, other, released) in self.epochs.items():
                if later > epoch and other != journal and not released:
                    assert tenure.acknowledged_s <= began_s, f"epoch {epoch} acknowledged after epoch {later} of another host had begun"


def _require_alive(host: Host) -> None:
    if host.dead:
        raise HostDied
