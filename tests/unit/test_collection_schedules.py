"""Schedules in which a writer, a reader or a namespace change is overtaken by a collection; each with its guard, and without.

Without the guard the test sees the loss, so it is the guard that prevents it. `docs/concurrency.md` tells the stories.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio

from novafs.bulk import import_stream
from novafs.catalog import Changes
from novafs.catalogtree import ROOT_ID, Entry, Kind
from novafs.errors import LeaseLostError, NotFoundError, NovaError, ObjectNotFoundError, StaleError
from novafs.fold import FOLD_BYTES
from novafs.gc import collect
from novafs.lease import break_lease
from novafs.packwriter import PacksLostError, UsedPacks
from novafs.revisions import Chain
from novafs.snapshots import clone, delete_snapshot, take_snapshot
from novafs.volume import Volume
from tests.support.fixtures import run
from tests.support.hosts import CHUNK, World, pattern, read_image, write_image

HOUR = 3600.0
CONTENT = {i: pattern(i) for i in range(20)}
PLAIN = b"".join(CONTENT.values())

with_and_without_guard = pytest.mark.parametrize("guarded", [True, False], ids=["guarded", "unguarded"])


async def dead_pack(world: World, volume: Volume) -> None:
    """A pack that holds CONTENT, that nothing refers to, and that is not condemned."""
    await write_image(volume, "before", CONTENT)
    await volume.unlink(ROOT_ID, "before")
    world.sleep(2 * HOUR)
    report = await collect(volume)
    assert (report.packs, report.packs_live, report.packs_condemned) == (1, 0, 0)


async def delete_dead_packs(world: World, volume: Volume) -> None:
    """Both passes of a collection, and the time between."""
    await collect(volume, everything=True)
    world.sleep(2 * HOUR)
    assert (await collect(volume, everything=True)).packs_deleted == 1


@with_and_without_guard
def test_a_store_away_longer_than_the_grace_between_a_dedup_hit_and_the_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, guarded: bool
) -> None:
    """semantics: S17."""

    async def nothing_lost(self: UsedPacks) -> list[bytes]:
        return []

    if not guarded:
        monkeypatch.setattr(UsedPacks, "lost", nothing_lost)

    async def main() -> None:
        world = World(tmp_path)
        with world.running():
            async with world.host("a") as a, world.host("c") as c:
                await dead_pack(world, a)
                entry = await a.create(ROOT_ID, "disk")
                image = await a.open_image(entry.node_id)
                await image.write(0, PLAIN)
                async with world.asleep("a", "create", "images/", image.commit):
                    assert len(world.names("packs/")) == 1  # nothing but the hit
                    await delete_dead_packs(world, c)
                assert image.generation == (3 if guarded else 2)
                await a.close_image(image)
                if guarded:
                    assert await read_image(c, "disk") == PLAIN
                else:
                    with pytest.raises(ObjectNotFoundError):
                        await read_image(c, "disk")

    run(main)


@with_and_without_guard
def test_a_writer_asleep_between_upload_and_commit_while_its_packs_are_collected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, guarded: bool
) -> None:
    """semantics: S17."""

    async def nothing_lost(self: UsedPacks) -> list[bytes]:
        return []

    if not guarded:
        monkeypatch.setattr(UsedPacks, "lost", nothing_lost)

    async def main() -> None:
        world = World(tmp_path)
        with world.running():
            async with world.host("a") as a, world.host("c") as c:
                entry = await a.create(ROOT_ID, "disk")
                image = await a.open_image(entry.node_id)
                await image.write(0, PLAIN)
                async with world.asleep("a", "create", "images/", image.commit):
                    assert len(world.names("packs/")) == 1
                    world.sleep(2 * HOUR)  # a young pack is no garbage yet
                    await delete_dead_packs(world, c)
                await a.close_image(image)
                if guarded:
                    assert await read_image(c, "disk") == PLAIN
                else:
                    with pytest.raises(ObjectNotFoundError):
                        await read_image(c, "disk")

    run(main)


def test_the_journal_is_not_trimmed_before_what_was_collected_is_stored_again(tmp_path: Path) -> None:
    """The generation that names the lost packs is there, and the host dies before it can make the next one."""

    async def main() -> None:
        world = World(tmp_path)
        with world.running():
            async with world.host("c") as c:
                async with world.host("a") as a:
                    await dead_pack(world, a)
                    entry = await a.create(ROOT_ID, "disk")
                    image = await a.open_image(entry.node_id)
                    await image.write(0, PLAIN)
                    await image.fsync()
                    assert a.writeback.journal is not None
                    kept = a.writeback.journal.statistics().segments
                    async with world.asleep("a", "create", "images/", image.commit):
                        await delete_dead_packs(world, c)
                        assert a.writeback.journal.statistics().segments == kept
                    await a.close_image(image)
                assert await read_image(c, "disk") == PLAIN

    run(main)


@with_and_without_guard
def test_a_writer_asleep_while_its_number_is_taken_passed_and_collected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, guarded: bool
) -> None:
    if not guarded:

        async def always(self: object, record: object) -> bool:
            return True

        monkeypatch.setattr(Chain, "_is_ancestor", always)

    async def main() -> None:
        world = World(tmp_path)
        with world.running():
            async with world.host("b") as b:
                async with world.host("a") as a:
                    await write_image(a, "disk", CONTENT)
                    entry = await a.catalog.resolve("disk")
                    image = await a.open_image(entry.node_id)
                    await image.write(0, pattern(99))
                    await image.fsync()
                    async with world.asleep("a", "create", f"images/{entry.node_id.hex()}", image.commit) as sleeper:
                        taken = image.generation + 1
                        await break_lease(b.client, entry.node_id)
                        for seed in (50, 51):
                            await write_image(b, "disk", {1: pattern(seed)})
                        world.sleep(2 * HOUR)
                        await collect(b)
                        head = (await b.open_image(entry.node_id)).generation
                        assert head > taken
                        # The number is free again: a create-only write will not stop him.
                        assert not any(name.endswith(f"{2**64 - 1 - taken:016x}") for name in world.names("images/"))
                    if guarded:
                        assert isinstance(sleeper.error, LeaseLostError)
                        assert len(list((tmp_path / "a" / "aside").iterdir())) == 1
                    else:
                        assert sleeper.error is None  # he believes it, and nobody will ever see his write
                    image.handles = 0
                assert await read_image(b, "disk") == b"".join({**CONTENT, 1: pattern(51)}.values())

    run(main)


@pytest.mark.parametrize("pinned", [True, False], ids=["pinned", "not pinned"])
@pytest.mark.parametrize("what", ["unlinked", "written", "snapshot removed"])
def test_a_stale_open_handle_while_the_image_is_collected_on_another_host(tmp_path: Path, what: str, pinned: bool) -> None:
    """semantics: S10.

    It reads what it was opened on, for as long as its host pins it; then it says that it is stale. Never anything else."""

    async def main() -> None:
        world = World(tmp_path)
        with world.running():
            async with world.host("a") as a, world.host("b") as b:
                await write_image(a, "disk", CONTENT)
                entry = await a.catalog.resolve("disk")
                if what == "snapshot removed":
                    taken = await take_snapshot(a, entry, "s")
                    await write_image(a, "disk", {i: pattern(100 + i) for i in range(20)})
                    handle = await b.open_snapshot(entry.node_id, taken.counter, name="s")
                    await delete_snapshot(a, await a.catalog.resolve("disk", max_age_s=0), "s")
                else:
                    await b.catalog.resolve("disk", max_age_s=0)
                    handle = await b.open_image(entry.node_id)
                if what == "unlinked":
                    await a.unlink(ROOT_ID, "disk")
                elif what == "written":
                    await write_image(a, "disk", {i: pattern(100 + i) for i in range(20)})
                for _ in range(4):
                    for _ in range(6):
                        world.sleep(HOUR / 4)
                        if pinned:
                            await b.pins.beat()
                    await collect(a, everything=True)
                b.cache.l1.clear()
                handle.trim_map(0)
                if pinned:
                    assert await handle.read(0, len(PLAIN)) == PLAIN
                else:
                    with pytest.raises(StaleError, match="collected"):
                        await handle.read(0, len(PLAIN))
                await b.close_image(handle)
                for _ in range(3):
                    world.sleep(2 * HOUR)
                    await b.pins.beat()
                    report = await collect(a, everything=True)
                assert report.packs == report.packs_live

    run(main)


@with_and_without_guard
def test_a_clone_of_what_is_collected_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, guarded: bool) -> None:
    if not guarded:
        monkeypatch.setattr(Volume, "overdue", lambda self, since_s: False)

    async def main() -> None:
        world = World(tmp_path)
        with world.running():
            async with world.host("a") as a, world.host("b") as b:
                await write_image(a, "disk", CONTENT)
                entry = await a.catalog.resolve("disk")
                async with world.asleep("a", "create", "images/", lambda: clone(a, entry, ROOT_ID, "copy")) as sleeper:
                    await b.catalog.refresh()
                    await b.unlink(ROOT_ID, "disk")
                    world.sleep(2 * HOUR)
                    await collect(b, everything=True)
                    world.sleep(2 * HOUR)
                    assert (await collect(b, everything=True)).packs_deleted == 1
                if guarded:
                    assert isinstance(sleeper.error, StaleError)
                    with pytest.raises(NotFoundError):
                        await b.catalog.resolve("copy", max_age_s=0)
                else:
                    with pytest.raises(ObjectNotFoundError):
                        await read_image(b, "copy")

    run(main)


@with_and_without_guard
def test_a_snapshot_of_a_generation_that_is_collected_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, guarded: bool
) -> None:
    if not guarded:
        monkeypatch.setattr(Volume, "overdue", lambda self, since_s: False)

    async def main() -> None:
        world = World(tmp_path)
        with world.running():
            async with world.host("a") as a, world.host("b") as b:
                await write_image(a, "disk", CONTENT)
                entry = await a.catalog.resolve("disk")
                async with world.asleep("a", "create", "catalog/", lambda: take_snapshot(a, entry, "s")) as sleeper:
                    await b.catalog.refresh()
                    await write_image(b, "disk", {0: pattern(99)})
                    world.sleep(2 * HOUR)
                    await collect(b)
                assert sleeper.error is None
                found = (await b.catalog.resolve("disk", max_age_s=0)).snapshots["s"]
                if guarded:
                    view = await b.open_snapshot(entry.node_id, found.counter, name="s")
                    assert await view.read(0, CHUNK) == pattern(99)
                    await b.close_image(view)
                else:
                    with pytest.raises(ObjectNotFoundError):
                        await b.open_snapshot(entry.node_id, found.counter, name="s")

    run(main)


@with_and_without_guard
def test_a_new_image_whose_generation_is_collected_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, guarded: bool
) -> None:
    if not guarded:
        monkeypatch.setattr(Volume, "overdue", lambda self, since_s: False)

    async def main() -> None:
        world = World(tmp_path)
        with world.running():
            async with world.host("a") as a, world.host("b") as b:
                async with world.asleep("a", "create", "catalog/", lambda: a.create(ROOT_ID, "disk")) as sleeper:
                    world.sleep(2 * HOUR)
                    assert (await collect(b)).generations_deleted == 1
                assert sleeper.error is None
                if guarded:
                    assert await read_image(b, "disk") == b""
                else:
                    with pytest.raises(NotFoundError, match="no generation"):
                        await read_image(b, "disk")

    run(main)


@with_and_without_guard
def test_an_import_whose_chunks_are_collected_before_it_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, guarded: bool) -> None:
    """semantics: S17."""

    async def nothing_lost(self: UsedPacks) -> list[bytes]:
        return []

    if not guarded:
        monkeypatch.setattr(UsedPacks, "lost", nothing_lost)

    async def source() -> AsyncIterator[tuple[int, bytes]]:
        yield 0, PLAIN

    async def main() -> None:
        world = World(tmp_path)
        with world.running():
            async with world.host("a") as a, world.host("c") as c:
                await dead_pack(world, a)

                async def work() -> None:
                    await import_stream(a, ROOT_ID, "disk", source(), size=len(PLAIN))

                async with world.asleep("a", "create", "images/", work) as sleeper:
                    await delete_dead_packs(world, c)
                if guarded:
                    assert isinstance(sleeper.error, PacksLostError)
                    with pytest.raises(NotFoundError):
                        await read_image(c, "disk")
                    await work()  # what the message says helps
                    assert await read_image(c, "disk") == PLAIN
                else:
                    with pytest.raises(NovaError, match="gone"):
                        await read_image(c, "disk")

    run(main)


@with_and_without_guard
def test_a_catalog_whose_pages_are_collected_before_it_is_committed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, guarded: bool) -> None:
    async def nothing_lost(self: UsedPacks) -> list[bytes]:
        return []

    if not guarded:
        monkeypatch.setattr(UsedPacks, "lost", nothing_lost)

    async def main() -> None:
        world = World(tmp_path)
        with world.running():
            async with world.host("a") as a, world.host("c") as c:
                directory = await a.mkdir(ROOT_ID, "many")

                async def work() -> None:
                    async def operation(changes: Changes) -> None:
                        await changes.entries(directory.node_id)
                        for number in range(100):  # too many for an inline directory
                            name, node_id = f"sub-{number:04}", (number + 1).to_bytes(16, "big")
                            changes.set(Entry(name, node_id, Kind.DIRECTORY, 0o755, 0, 0, 1, 1, 1, parent_id=directory.node_id))

                    await a.catalog.change(operation)

                async with world.asleep("a", "create", "catalog/", work) as sleeper:
                    world.sleep(2 * HOUR)
                    await delete_dead_packs(world, c)
                assert sleeper.error is None
                await c.catalog.refresh()
                c.cache.l1.clear()
                if guarded:
                    assert len(await c.catalog.list((await c.catalog.resolve("many")).node_id)) == 100
                else:
                    with pytest.raises(ObjectNotFoundError):
                        await c.catalog.list((await c.catalog.resolve("many")).node_id)

    run(main)


@with_and_without_guard
def test_a_fold_whose_pack_is_collected_before_a_generation_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, guarded: bool
) -> None:
    """semantics: S17."""

    async def nothing_lost(self: UsedPacks) -> list[bytes]:
        return []

    if not guarded:
        monkeypatch.setattr(UsedPacks, "lost", nothing_lost)

    async def main() -> None:
        world = World(tmp_path)
        with world.running():
            async with world.host("a", durability="store", writeback__interval="1h") as a, world.host("c") as c:
                content = dict(CONTENT)
                await write_image(a, "disk", content)
                entry = await a.catalog.resolve("disk")
                image = await a.open_image(entry.node_id)
                before = len(world.names("packs/"))
                for number in range(FOLD_BYTES // CHUNK + 1):
                    index = number % len(CONTENT)
                    content[index] = pattern(1000 + number)
                    await image.write(index * CHUNK, content[index])
                    await image.fsync()
                while image._fold is None or image._fold.stored is None:
                    await trio.sleep(0.001)
                assert len(world.names("packs/")) > before
                world.sleep(2 * HOUR)  # nobody writes; the pack is young no more, and nothing names it
                await collect(c, everything=True)
                world.sleep(2 * HOUR)
                assert (await collect(c, everything=True)).packs_deleted >= 1
                content[0] = pattern(2000)
                await image.write(0, content[0])
                await image.fsync()
                await a.close_image(image)
                if guarded:
                    assert await read_image(c, "disk") == b"".join(content.values())
                else:
                    with pytest.raises(ObjectNotFoundError):
                        await read_image(c, "disk")

    run(main)
