"""A store and hosts by name, each with a disk of its own, in virtual time: what schedules are played on."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from novafs.aside import list_aside
from novafs.catalogtree import ROOT_ID
from novafs.errors import StoreUnavailableError
from novafs.image import Image
from novafs.objectstore.client import StoreClient
from novafs.volume import Volume, init_volume, open_volume
from tests.crash.harness import CHUNK, config_for, small_segments
from tests.support.crash_disk import DiskLog, DiskModel
from tests.support.memory_store import MemoryStore
from tests.support.simulation import Host, HostDied, Simulation, current_host

FLAGS = {"writeback.interval": "1h", "store.io_timeout": "3s", "lease.wait": "0s", "lease.ttl": "30s"}


class Place:
    """A store, and hosts by name, each with a disk of its own."""

    def __init__(self, directory: Path, simulation: Simulation) -> None:
        self.directory = directory
        self.simulation = simulation
        self.store = MemoryStore(clock_s=simulation.now_s)
        self.node_id = b""
        self.disks: dict[str, tuple[DiskLog, DiskModel]] = {}

    async def prepare(self) -> None:
        await init_volume(StoreClient(self.store), chunk_size=CHUNK)
        async with self.host("setup") as volume:
            self.node_id = (await volume.create(ROOT_ID, "disk.raw")).node_id

    @asynccontextmanager
    async def host(self, name: str, *, read_only: bool = False, **flags: str) -> AsyncIterator[Volume]:
        root = self.directory / name
        if name not in self.disks:
            root.mkdir()
            disk, model = DiskLog(root), DiskModel()
            disk.record = model.tell
            self.disks[name] = disk, model
        given = {**FLAGS, **{key.replace("__", "."): value for key, value in flags.items()}}
        config = config_for(root / "state", **given)
        disk = self.disks[name][0]
        async with open_volume(config, owns_state=True, read_only=read_only, store=self.store, ops=disk) as volume:
            await volume.catalog.lookup(ROOT_ID, "disk.raw") if self.node_id else None
            yield volume

    async def until_killed(self, name: str, main: Callable[[Volume], Awaitable[None]], **flags: str) -> None:
        """`main` on a process that is killed when it calls `kill`, or at its end."""
        host = Host(name)
        try:
            with host.running():
                async with self.host(name, **flags) as volume:
                    self.disks[name][0].fault = lambda operation: kill() if host.dead else None
                    await main(volume)
                    kill()
        except* HostDied:
            pass

    def lose_power(self, name: str, *, keep: bool = False) -> str:
        """A new host that finds what is left on the disk of `name`: only what was synced, or (`keep`) everything."""
        _, model = self.disks[name]
        state = model.whole()
        if not keep:
            while (state := model.crash(self.simulation.rng)) != model.crash(self.simulation.rng):
                pass
        left = f"{name}-after"
        root = self.directory / left
        root.mkdir()
        disk, after = DiskLog(root), DiskModel(state)
        disk.adopt(state.write_to(root))
        disk.record = after.tell
        self.disks[left] = disk, after
        return left

    def aside(self, name: str) -> list[Any]:
        return list_aside(self.directory / name / "state")

    def on(self, operation: str, part: str, action: Callable[[], None], *, moment: str = "before") -> None:
        """`action`, once, when the next such request for a name with that part comes (or has taken effect)."""

        def fault(when: str, what: str, name: str) -> None:
            if (when, what) == (moment, operation) and part in name:
                self.store.fault = lambda *_: None
                action()

        self.store.fault = fault

    def away(self) -> None:
        """The store does not answer from now on."""
        self.store.fault = fail

    def back(self) -> None:
        self.store.fault = lambda *_: None


def fail(*_: str) -> None:
    raise StoreUnavailableError("scripted: no answer")


@pytest.fixture
def place(memory_dir: Path) -> Iterator[Place]:
    with Simulation(1, pause_s=0) as simulation, small_segments():
        made = Place(memory_dir, simulation)
        simulation.run(made.prepare)
        yield made


def kill() -> None:
    """SIGKILL for the process that runs this."""
    host = current_host()
    assert host is not None
    host.die()
    raise HostDied


async def content(image: Image) -> bytes:
    return await image.read(0, image.size)
