"""Patches that are folded into the map beside the fsyncs: what waits for a pack, what a generation names, what drops a fold."""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from novafs.catalogtree import ROOT_ID
from novafs.chunk import HOLE_BYTES, Reference
from novafs.dirty import Layer
from novafs.errors import StoreUnavailableError
from novafs.fold import FOLD_BYTES, Fold
from novafs.image import Image
from novafs.pack import pack_name
from novafs.patch import extended, extents_of
from novafs.snapshots import roll_back, take_snapshot
from novafs.volume import Volume
from tests.support.engine import fresh_volume, opened
from tests.support.fixtures import trio_test

CHUNK = 64 << 10
SIZE = 64 * CHUNK
PIECE = 4096


class Scene:
    """A volume with an image whose patches are folded, and what the image must hold."""

    def __init__(self, directory: Path, volume: Volume, image: Image, content: bytes) -> None:
        self.directory = directory
        self.volume = volume
        self.image = image
        self.content = bytearray(content)
        self.created: list[str] = []
        """The kinds of objects that were created, as they were asked for."""
        self.hold: dict[str, Callable[[], Awaitable[None]]] = {}
        """By kind: what a creation waits for, or raises."""
        self._create = volume.client.create
        volume.client.create = self._watched  # type: ignore[method-assign]
        self._random = random.Random(1)

    async def _watched(self, name: str, *args: Any, **kwargs: Any) -> None:
        kind = name.partition("/")[0]
        self.created.append(kind)
        if kind in self.hold:
            await self.hold[kind]()
        await self._create(name, *args, **kwargs)

    async def fsync_pieces(self, count: int) -> list[str]:
        """So many small writes, each fsynced; what was created meanwhile."""
        del self.created[:]
        for _ in range(count):
            at = self._random.randrange(SIZE // PIECE) * PIECE
            piece = os.urandom(PIECE)
            self.content[at : at + PIECE] = piece
            await self.image.write(at, piece)
            await self.image.fsync()
        return self.created

    async def check(self) -> None:
        """Here and on another host everything is as it must be."""
        assert await self.image.read(0, len(self.content) + 1) == self.content
        async with opened(f"file://{self.directory / 'store'}", self.directory / "other", read_only=True) as other:
            image = await other.open_image((await other.catalog.resolve("disk.raw")).node_id)
            assert await image.read(0, len(self.content) + 1) == self.content
            assert (image.head.stored_bytes, image.head.allocated_chunks) == await counted(image)
            await other.close_image(image)


async def counted(image: Image) -> tuple[int, int]:
    """Payload bytes and chunks of the map, by walking it."""
    stored = count = 0
    async for _, entries in image._state.leaves(image._cache.fetch):
        stored += int(entries["length"].sum())
        count += int((entries["length"] != 0).sum())
    return stored, count


@asynccontextmanager
async def scene(directory: Path) -> AsyncIterator[Scene]:
    async with fresh_volume(directory, durability="store", writeback__interval="1h") as volume:
        entry = await volume.create(ROOT_ID, "disk.raw")
        image = await volume.open_image(entry.node_id)
        content = os.urandom(SIZE)
        await image.write(0, content)
        await image.commit()
        yield Scene(directory, volume, image, content)
        await volume.close_image(image)


ENOUGH = FOLD_BYTES // PIECE
"""Pieces that start a fold."""


async def settled(image: Image) -> None:
    """Until the fold that is under way has stored what it gives."""
    assert image._fold is not None
    while image._fold is not None and image._fold.stored is None:
        await trio.sleep(0.001)


@trio_test
async def test_no_fsync_waits_for_a_pack(tmp_path: Path) -> None:
    async with scene(tmp_path) as here:
        never = trio.Event()
        here.hold["packs"] = never.wait
        created = await here.fsync_pieces(ENOUGH + 8)
        assert created.count("images") == ENOUGH + 8
        assert created.count("packs") == 1
        await here.check()
        never.set()
        await settled(here.image)
        assert await here.fsync_pieces(1) == ["images"]
        await here.check()
        assert len(here.image.head.patch) <= 9, "the new map holds what was folded; the patch what came after"


@trio_test
async def test_patches_stay_small_however_long_it_goes_on(tmp_path: Path) -> None:
    async with scene(tmp_path) as here:
        before = here.image._state
        for _ in range(6):
            await here.fsync_pieces(ENOUGH)
            if here.image._fold is not None:
                await settled(here.image)
        await here.check()
        assert here.image._state is not before
        assert sum(len(data) for _, data in here.image.head.patch) <= 2 * FOLD_BYTES


@trio_test
async def test_a_fold_that_fails_costs_nobody_an_fsync(tmp_path: Path) -> None:
    async with scene(tmp_path) as here:

        async def fail() -> None:
            raise StoreUnavailableError("the store is away")

        here.hold["packs"] = fail
        await here.fsync_pieces(ENOUGH + 3)
        await here.check()
        del here.hold["packs"]
        here.image._folds_after_s = 0
        await here.fsync_pieces(2)
        await settled(here.image)
        await here.fsync_pieces(1)
        await here.check()
        assert len(here.image.head.patch) < ENOUGH


@trio_test
async def test_a_commit_of_another_map_drops_the_fold(tmp_path: Path) -> None:
    async with scene(tmp_path) as here:
        gate = trio.Event()
        here.hold["packs"] = gate.wait
        await here.fsync_pieces(ENOUGH)
        assert here.image._fold is not None
        del here.hold["packs"]
        await here.image.resize(SIZE - 3 * CHUNK)  # no patch
        await here.image.resize(SIZE)
        here.content[SIZE - 3 * CHUNK :] = bytes(3 * CHUNK)
        await here.image.fsync()
        gate.set()
        await trio.testing.wait_all_tasks_blocked(0.05)
        await here.fsync_pieces(3)
        await here.check()


@trio_test
@pytest.mark.parametrize("grown", [SIZE + 5 * CHUNK, 300 * CHUNK], ids=["of the same depth", "deeper"])
async def test_an_image_grows_while_it_is_folded(tmp_path: Path, grown: int) -> None:
    async with scene(tmp_path) as here:
        gate = trio.Event()
        here.hold["packs"] = gate.wait
        await here.fsync_pieces(ENOUGH)
        fold = here.image._fold
        assert fold is not None
        if grown == 300 * CHUNK:  # this is no patch
            del here.hold["packs"]
        here.content += bytes(grown - SIZE)
        here.content[-PIECE:] = os.urandom(PIECE)
        await here.image.write(grown - PIECE, bytes(here.content[-PIECE:]))
        await here.image.fsync()
        await here.fsync_pieces(2)
        assert (here.image._fold is fold) == (grown != 300 * CHUNK)
        gate.set()
        if here.image._fold is fold:
            await settled(here.image)
        await trio.testing.wait_all_tasks_blocked(0.05)
        assert "packs" not in await here.fsync_pieces(1)
        await here.check()  # the very generation that names the new map is read elsewhere
        assert "packs" not in await here.fsync_pieces(2)
        if grown != 300 * CHUNK:
            assert len(here.image.head.patch) == 6, "the new map holds what was folded, and is as long as the image"
        await here.check()


@trio_test
async def test_an_fsync_that_fails_leaves_nothing_out(tmp_path: Path) -> None:
    """The generation that would have named the fold was, or was not, created."""
    async with scene(tmp_path) as here:
        await here.fsync_pieces(ENOUGH)
        await settled(here.image)
        failures = 0

        async def fail() -> None:
            nonlocal failures
            failures += 1
            raise StoreUnavailableError("the store is away")

        here.hold["images"] = fail
        piece = os.urandom(PIECE)
        here.content[:PIECE] = piece
        await here.image.write(0, piece)
        with pytest.raises(StoreUnavailableError):
            await here.image.fsync()
        assert failures == 1
        assert await here.image.read(0, SIZE) == here.content
        del here.hold["images"]
        await here.image.fsync()
        await here.check()


@trio_test
async def test_dropped_folds_do_not_pile_up(tmp_path: Path) -> None:
    """However often the store takes generations, or not, while its packs hang."""
    async with scene(tmp_path) as here:
        never, hanging = trio.Event(), 0

        async def hang() -> None:
            nonlocal hanging
            hanging += 1
            try:
                with trio.CancelScope(shield=True):  # a write that is on its way is waited for
                    await never.wait()
            finally:
                hanging -= 1

        async def fail() -> None:
            raise StoreUnavailableError("the store is away")

        here.hold["packs"] = hang
        await here.fsync_pieces(ENOUGH)
        while not hanging:
            await trio.sleep(0.001)
        for _ in range(3):
            here.hold["images"] = fail
            with pytest.raises(StoreUnavailableError):
                await here.fsync_pieces(1)
            del here.hold["images"]
            await here.fsync_pieces(1)
            await trio.testing.wait_all_tasks_blocked(0.05)
            assert hanging == 1
        assert here.image._fold is None
        never.set()
        while here.image._folding:
            await trio.sleep(0.001)
        await here.fsync_pieces(1)
        await settled(here.image)
        await here.fsync_pieces(1)
        await here.check()


@trio_test
async def test_a_fold_that_fails_is_not_tried_at_each_fsync(tmp_path: Path) -> None:
    """Each may leave a pack that nobody needs."""
    async with scene(tmp_path) as here:

        async def fail() -> None:
            raise StoreUnavailableError("the answer was lost")

        here.hold["packs"] = fail
        created = await here.fsync_pieces(ENOUGH)
        while here.image._fold is not None:
            await trio.sleep(0.001)
        assert created.count("packs") == 1
        assert here.image._folds_after_s > 0
        here.image._folds_after_s += 3600  # on a slow machine a second is not long
        assert "packs" not in await here.fsync_pieces(10)
        await here.check()


@trio_test
async def test_a_fold_ends_with_the_lease(tmp_path: Path) -> None:
    async with scene(tmp_path) as here:
        here.hold["packs"] = trio.sleep_forever
        await here.fsync_pieces(ENOUGH)
        while "packs" not in here.created:
            await trio.sleep(0.001)
        await here.image.release_lease()
        while here.image._folding:
            await trio.sleep(0.001)
        assert here.image._fold is None
        del here.hold["packs"]
        await here.fsync_pieces(1)
        await settled(here.image)
        await here.fsync_pieces(1)
        await here.check()


class History:
    """One image under random calls, creations that fail or hang, and collections, beside what it must hold.

    `states` says of every content that the image has had (by hash) when it had it last; what is durable must not be older than `safe`.
    """

    def __init__(self, directory: Path, volume: Volume, image: Image, seed: int, chunk_size: int) -> None:
        self.directory = directory
        self.volume = volume
        self.image = image
        self.chunk_size = chunk_size
        self.rng = random.Random(seed)
        self.model = bytearray()
        self.states: dict[bytes, int] = {}
        self.now = self.safe = 0
        self.note()
        self.packs: dict[str, Fold | None] = {}
        """And what fold was going when they were created."""
        self.fail: dict[str, float] = {"packs": 0.0, "images": 0.0}
        self.gate = trio.Event()
        self.gate.set()
        self.named = self.overtaken = self.taken = 0
        self._create = volume.client.create
        volume.client.create = self._faulty  # type: ignore[method-assign]

    def note(self) -> None:
        self.now += 1
        self.states[hashlib.sha256(self.model).digest()] = self.now

    async def _faulty(self, name: str, data: bytes) -> None:
        kind = name.partition("/")[0]
        if kind == "packs":
            with trio.move_on_after(0.02):  # whoever needs a pack at once gets it
                await self.gate.wait()
            self.packs[name] = self.image._fold
        chance = self.rng.random() / max(self.fail.get(kind, 0.0), 1e-9)
        if chance < 0.5:
            raise StoreUnavailableError("the request was lost")
        await self._create(name, data)
        if chance < 1:
            raise StoreUnavailableError("the answer was lost")

    async def write(self) -> None:
        at = self.rng.randrange(len(self.model) + 1)
        if self.rng.random() < 0.5:
            at -= at % self.chunk_size
        data = self.rng.randbytes(self.rng.choice((1, 512, 4096, 4096, 9000)))
        if self.rng.random() < 0.9:
            data = data[: len(self.model) - at] or b"x"  # few writes make it longer
        if self.rng.random() < 0.1:
            data = bytes(len(data))
        try:
            await self.image.write(at, data)
        except StoreUnavailableError:
            return  # it needed the lease
        self.model.extend(bytes(max(0, at + len(data) - len(self.model))))
        self.model[at : at + len(data)] = data
        self.note()

    async def resize(self) -> None:
        size = len(self.model)
        part = size % self.chunk_size
        match self.rng.randrange(4):
            case 0:
                size -= self.rng.randrange(part + 1)
            case 1:
                size += self.rng.randrange(self.chunk_size - part)
            case 2:
                size = max(1, size - self.rng.randrange(6 * self.chunk_size))
            case _:
                size += self.rng.randrange(6 * self.chunk_size)
        try:
            await self.image.resize(size)
        except StoreUnavailableError:
            return
        self.model = self.model[:size].ljust(size, b"\0")
        self.note()

    async def sync(self) -> None:
        """Some of them at once; whatever succeeds counts."""

        async def one(call: Callable[[], Awaitable[object]]) -> None:
            since = self.now
            fold, lease = self.image._fold, self.image.lease
            try:
                await call()
            except StoreUnavailableError:
                return
            if self.volume.writeback.durability == "store" or (lease is not None and lease.wanted):
                self.safe = max(self.safe, since)
            self.named += fold is not None and fold.stored is not None and self.image._state is fold.stored.state

        async with trio.open_nursery() as nursery:
            for _ in range(self.rng.choice((1, 1, 1, 2))):
                nursery.start_soon(one, self.image.fsync)
            if self.rng.random() < 0.06:
                self.gate.set()
                nursery.start_soon(one, self.image.commit)
            else:
                for _ in range(self.rng.randrange(3)):
                    await trio.sleep(0)
                    await self.write()

    async def collect(self) -> None:
        """Long after the fold was stored a collection has taken its packs, which no generation names."""
        fold = self.image._fold
        dedup = self.volume.dedup
        if self.image._unanswered is not None:
            self.image._unanswered.since_s -= 2 * dedup.guard_s
        if fold is None or fold.stored is None or fold.base is not self.image._state or self.image._unanswered is not None:
            return
        fold.stored.used.since_s -= 2 * dedup.guard_s
        if self.rng.random() < 0.5:
            self.overtaken += 1
            needed = await packs_of(self.image)
            for name, at in self.packs.items():
                if at is fold and name not in needed and bytes.fromhex(name.rpartition("/")[2]) in fold.stored.used.packs:
                    await self.volume.client.delete(name)
                    dedup._forget_verified(bytes.fromhex(name.rpartition("/")[2]))

    async def reopen(self) -> None:
        await self.calm()
        await self.volume.close_image(self.image)
        self.safe = self.now
        if self.rng.random() < 0.4:
            await self.write_elsewhere()
        self.image = await self.volume.open_image_by_id(self.image.node_id)

    async def release(self) -> None:
        """The lease goes to another host and comes back, with the image open here."""
        await self.calm()
        await self.image.commit()
        self.safe = self.now
        await self.image.release_lease()
        if self.rng.random() < 0.5:
            await self.write_elsewhere()
            await self.image.refresh()

    async def write_elsewhere(self) -> None:
        async with opened(f"file://{self.directory / 'store'}", self.directory / "other", durability="store") as other:
            there = await other.open_image_by_id(self.image.node_id)
            assert await there.read(0, len(self.model) + 1) == self.model
            await there.write(0, b"elsewhere")
            self.model[:9] = b"elsewhere"
            self.note()
            await other.close_image(there)
            self.safe = self.now

    async def snapshots(self) -> None:
        await self.calm()
        entry = await self.volume.catalog.resolve("disk.raw")
        self.taken += 1
        name = f"s{self.taken}"
        await self.image.commit()
        self.safe = self.now
        await take_snapshot(self.volume, entry, name)
        kept = bytes(self.model)
        for _ in range(self.rng.randrange(3)):
            await self.write()
            await self.image.fsync()
        if self.rng.random() < 0.5:
            await self.volume.close_image(self.image)
            await roll_back(self.volume, await self.volume.catalog.get(entry.node_id), name)
            self.image = await self.volume.open_image_by_id(entry.node_id)
            self.model = bytearray(kept)
            self.note()
            self.safe = self.now

    async def calm(self) -> None:
        self.gate.set()
        self.fail = {"packs": 0.0, "images": 0.0}

    async def step(self) -> None:
        match self.rng.randrange(40):
            case 0:
                await self.resize()
            case 1:
                await self.reopen()
            case 2:
                await self.release()
            case 3:
                await self.snapshots()
            case 4 | 5:
                self.gate = trio.Event()
            case 6 | 7 | 8:
                self.gate.set()
            case 9:
                self.fail = {"packs": self.rng.choice((0, 0.3)), "images": self.rng.choice((0, 0.2))}
            case 10:
                await self.calm()
            case 11 | 12 | 20 | 21:
                await self.collect()
            case 13:
                self.image.trim_map(0)
            case 14:
                await self.check()
            case 15 | 16 | 17:
                await trio.sleep(0.002)
            case _:
                for _ in range(self.rng.randrange(4)):
                    await self.write()
                await self.sync()

    async def check(self) -> None:
        """What this host reads is the model, what another would find is no older than what was promised, and all of it is there."""
        assert await self.image.read(0, len(self.model) + 1) == self.model
        head = await self.image._chain.head()
        assert head is not None
        view = self.volume.open_view(head, name="there", watched_as=b"")
        content = await view.read(0, head.record.size + 1)
        assert self.states.get(hashlib.sha256(content).digest(), 0) >= self.safe
        assert (head.record.stored_bytes, head.record.allocated_chunks) == await counted(view)
        assert all((self.directory / "store" / name).exists() for name in await packs_of(view))
        await self.volume.close_image(view)
        fold = self.image._fold
        if fold is not None and fold.base is self.image._state:
            assert self.image._patch is not None
            layers = [fold.layer] if fold.since is None else [fold.layer, fold.since]
            assert extents_of(extended(None, layers, self.chunk_size) or Layer(), self.chunk_size) == self.image.head.patch


async def packs_of(image: Image) -> set[str]:
    """The objects that a map needs."""
    state, found = image._state, set()
    await state.load(0, state.chunks - 1, image._cache.fetch)
    for table in (state.top, *(node for level in state._nodes for node in level.values())):
        for at in range(0, len(table), 64):
            if table[at : at + 64] != HOLE_BYTES:
                found.add(pack_name(Reference.unpack(table[at : at + 64]).pack_id))
    return found


async def live(directory: Path, seed: int, steps: int, *, durability: str = "store") -> History:
    """A history from its seed."""
    rng = random.Random(-seed)
    chunk_size = 4096
    async with fresh_volume(directory, chunk_size=chunk_size, durability=durability, writeback__interval="1h") as volume:
        entry = await volume.create(ROOT_ID, "disk.raw")
        history = History(directory, volume, await volume.open_image(entry.node_id), seed, chunk_size)
        history.model = bytearray(rng.randbytes(rng.choice((40, 300)) * chunk_size - 1000))
        await history.image.write(0, bytes(history.model))
        history.note()
        await history.image.commit()
        history.safe = history.now
        for _ in range(steps):
            await history.step()
            if durability == "journal" and history.image.lease is not None:
                history.image.lease.asked = rng.random() < 0.9
            if rng.random() < 0.1:
                await history.check()
        await history.calm()
        await history.image.commit()
        history.safe = history.now
        await history.check()
        await volume.close_image(history.image)
    async with opened(f"file://{directory / 'store'}", directory / "another", read_only=True) as other:
        image = await other.open_image_by_id(entry.node_id)
        assert await image.read(0, len(history.model) + 1) == history.model
        await other.close_image(image)
    return history


@pytest.mark.parametrize(("seed", "durability"), [(1, "store"), (2, "store"), (3, "journal")])
@trio_test
async def test_whatever_happens_no_byte_is_lost_to_a_fold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int, durability: str
) -> None:
    monkeypatch.setattr("novafs.fold.FOLD_BYTES", 3 * PIECE)
    monkeypatch.setattr("novafs.image.FOLD_RETRY_S", 0.0)
    history = await live(tmp_path, seed, 140, durability=durability)
    assert history.named > 1
