"""Collection: what is freed, what is not, and when."""

from __future__ import annotations

import shutil
from pathlib import Path

import msgspec
import pytest

from novafs.catalog import Changes
from novafs.catalogtree import ROOT_ID
from novafs.condemned import read_condemned
from novafs.errors import ConfigError, StoreDeniedError
from novafs.gc import GcReport, collect
from novafs.generation import generation_chain
from novafs.pack import read_footer
from novafs.revisions import counter_of
from novafs.snapshots import clone, delete_snapshot, take_snapshot
from novafs.volume import Volume
from tests.support.fixtures import run
from tests.support.hosts import CHUNK, Kill, World, pattern, read_image, write_image

HOUR = 3600.0
CONTENT = {i: pattern(i) for i in range(10)}
PLAIN = b"".join(CONTENT.values())


def packs(world: World) -> list[str]:
    return world.names("packs/")


async def collected(world: World, volume: Volume, times: int = 3, *, everything: bool = True) -> GcReport:
    """Collections more than a grace apart, as many as it takes."""
    for _ in range(times):
        world.sleep(2 * HOUR)
        report = await collect(volume, everything=everything)
        assert report.complete, report.problems
    return report


def test_a_removed_image_is_freed_in_two_passes_a_grace_apart(tmp_path: Path) -> None:
    """semantics: S17."""

    async def main() -> None:
        world = World(tmp_path)
        with world.running():
            async with world.host("a") as volume:
                await write_image(volume, "kept", CONTENT)
                await write_image(volume, "gone", {i: pattern(100 + i) for i in range(10)})
                await volume.unlink(ROOT_ID, "gone")
                before = packs(world)
                report = await collect(volume, everything=True)
                assert (report.packs_condemned, report.packs_deleted) == (0, 0)  # all of it is younger than the grace
                world.sleep(1.1 * HOUR)
                report = await collect(volume, everything=True)
                assert (report.packs_newly_condemned, report.packs_condemned, report.packs_deleted) == (1, 1, 0)
                assert packs(world) == before
                world.sleep(0.9 * HOUR)
                report = await collect(volume, everything=True)
                assert (report.packs_newly_condemned, report.packs_condemned, report.packs_deleted) == (0, 1, 0)
                world.sleep(0.2 * HOUR)
                report = await collect(volume, everything=True)
                assert (report.packs_condemned, report.packs_deleted) == (0, 1)
                assert report.freed_bytes > 0
                assert len(packs(world)) == 1
                assert await read_image(volume, "kept") == PLAIN

    run(main)


def test_dead_packs_are_kept_while_there_is_room_and_go_oldest_first(tmp_path: Path) -> None:
    async def main() -> None:
        world = World(tmp_path)
        with world.running():
            async with world.host("a") as volume:
                sizes = []
                for number in range(4):
                    await write_image(volume, f"i{number}", {i: pattern(100 * number + i) for i in range(10)})
                    sizes.append(max((p for p in packs(world)), key=lambda n: (world.root / n).stat().st_mtime))
                    world.sleep(60)
                for number in range(3):
                    await volume.unlink(ROOT_ID, f"i{number}")
                report = await collected(world, volume, everything=False)
                assert (report.packs, report.packs_live, report.packs_kept, report.packs_condemned) == (4, 1, 3, 0)
                # Room for two packs and a bit: the two oldest go.
                one = (world.root / sizes[0]).stat().st_size
                config = volume.config
                volume.config = msgspec_replace(config, 2 * one + 100)
                report = await collected(world, volume, 2, everything=False)
                assert report.packs_deleted == 2
                assert packs(world) == sorted(sizes[2:])

    run(main)


def msgspec_replace(config: object, capacity_bytes: int) -> object:
    from dataclasses import replace

    return replace(config, l3=replace(config.l3, capacity_bytes=capacity_bytes))  # type: ignore[attr-defined, type-var]


def test_a_kept_pack_serves_what_is_written_again_and_lives_on(tmp_path: Path) -> None:
    async def main() -> None:
        world = World(tmp_path)
        with world.running():
            async with world.host("a") as volume:
                await write_image(volume, "first", CONTENT)
                await volume.unlink(ROOT_ID, "first")
                await collected(world, volume, everything=False)
                await write_image(volume, "second", CONTENT)
                assert len(packs(world)) == 1
                report = await collected(world, volume)
                assert (report.packs, report.packs_live) == (1, 1)
                assert await read_image(volume, "second") == PLAIN

    run(main)


def test_nothing_is_deduplicated_against_a_condemned_pack(tmp_path: Path) -> None:
    async def main() -> None:
        world = World(tmp_path)
        with world.running():
            async with world.host("a") as a, world.host("c") as c:
                await write_image(a, "first", CONTENT)
                await a.unlink(ROOT_ID, "first")
                world.sleep(2 * HOUR)
                assert (await collect(c, everything=True)).packs_condemned == 1
                await write_image(a, "second", CONTENT)
                assert len(packs(world)) == 2
                world.sleep(2 * HOUR)
                assert (await collect(c, everything=True)).packs_deleted == 1
                assert await read_image(a, "second") == PLAIN

    run(main)


def test_a_pack_that_was_referred_to_before_it_was_condemned_comes_back_to_life(tmp_path: Path) -> None:
    async def main() -> None:
        world = World(tmp_path)
        with world.running():
            async with world.host("a") as a, world.host("c") as c:
                await write_image(a, "first", CONTENT)
                await a.unlink(ROOT_ID, "first")
                world.sleep(2 * HOUR)
                await collect(c)
                entry = await a.create(ROOT_ID, "second")
                image = await a.open_image(entry.node_id)
                await image.write(0, PLAIN)
                async with world.asleep("a", "create", "images/", image.commit):
                    assert (await collect(c, everything=True)).packs_condemned == 1
                await a.close_image(image)  # in time: nothing is stored again
                assert len(packs(world)) == 1
                world.sleep(2 * HOUR)
                report = await collect(c, everything=True)
                assert (report.packs_condemned, report.packs_deleted, report.packs_live) == (0, 0, 1)
                assert not (await read_condemned(c.client)).packs

    run(main)


def test_a_dry_run_tells_what_would_be_done_and_does_nothing(tmp_path: Path) -> None:
    async def main() -> None:
        world = World(tmp_path)
        with world.running():
            async with world.host("a") as volume:
                await write_image(volume, "gone", CONTENT)
                await write_image(volume, "half", {i: pattern(500 + i) for i in range(20)})
                await write_image(volume, "half", {i: pattern(600 + i) for i in range(15)})
                await volume.unlink(ROOT_ID, "gone")
                world.sleep(2 * HOUR)
                before = world.names()
                dry = await collect(volume, dry_run=True, everything=True)
                assert world.names() == before
                real = await collect(volume, everything=True)
                for name in ("packs_compacted", "generations_deleted", "catalogs_deleted", "notes_deleted", "references", "histogram"):
                    assert getattr(dry, name) == getattr(real, name) != 0, name
                assert dry.packs_newly_condemned + dry.packs_compacted == real.packs_newly_condemned
                world.sleep(2 * HOUR)
                before = world.names()
                dry = await collect(volume, dry_run=True, everything=True)
                assert world.names() == before
                real = await collect(volume, everything=True)
                assert (dry.packs_deleted, dry.freed_bytes) == (real.packs_deleted, real.freed_bytes)
                assert real.packs_deleted == 2

    run(main)


def test_references_are_counted_for_each_image_and_snapshot(tmp_path: Path) -> None:
    async def main() -> None:
        world = World(tmp_path)
        with world.running():
            async with world.host("a") as volume:
                await write_image(volume, "one", {i: pattern(i) for i in range(400)})
                entry = await volume.catalog.resolve("one")
                for number in range(2):
                    await clone(volume, entry, ROOT_ID, f"clone{number}")
                await take_snapshot(volume, entry, "s")
                await write_image(volume, "one", {i: pattern(1000 + i) for i in range(100)})
                report = await collect(volume)
                # 300 chunks are in all four, 100 old ones in the clones and the snapshot, 100 new ones in the image alone.
                assert report.references == 4 * 400
                assert report.unique_chunks == 500
                assert report.histogram == {"1": 100, "3-4": 400}
                assert report.dedup_ratio == 1600 / 500
                assert report.saved_bytes > report.unique_bytes
                assert (report.images, report.snapshots) == (3, 1)

    run(main)


def test_snapshots_are_retained_until_they_are_removed(tmp_path: Path) -> None:
    async def main() -> None:
        world = World(tmp_path)
        with world.running():
            async with world.host("a") as volume:
                await write_image(volume, "disk", CONTENT)
                entry = await volume.catalog.resolve("disk")
                taken = await take_snapshot(volume, entry, "s")
                for seed in range(5):
                    await write_image(volume, "disk", {i: pattern(1000 * seed + i) for i in range(10)})
                report = await collected(world, volume)
                assert report.generations == 2
                view = await volume.open_snapshot(entry.node_id, taken.counter, name="s")
                volume.cache.l1.clear()
                assert await view.read(0, len(PLAIN)) == PLAIN
                await volume.close_image(view)
                await delete_snapshot(volume, await volume.catalog.resolve("disk"), "s")
                report = await collected(world, volume)
                assert (report.generations, report.packs) == (1, 1)

    run(main)


def test_an_image_whose_time_is_over_loses_its_name(tmp_path: Path) -> None:
    async def main() -> None:
        world = World(tmp_path)
        with world.running():
            async with world.host("a") as volume:
                now_s = await volume.client.clock_s()
                await volume.create(ROOT_ID, "short", expires_s=now_s + HOUR)
                directory = await volume.mkdir(ROOT_ID, "d")
                await volume.create(directory.node_id, "longer", expires_s=now_s + 3 * HOUR)
                await volume.create(ROOT_ID, "forever")
                assert (await collect(volume)).expired == []
                world.sleep(2 * HOUR)
                assert (await collect(volume, dry_run=True)).expired == ["short"]
                assert (await collect(volume)).expired == ["short"]
                world.sleep(2 * HOUR)
                assert (await collect(volume)).expired == ["d/longer"]
                assert {e.name async for e in volume.catalog.walk()} == {"d", "forever"}

    run(main)


def test_an_image_that_is_found_under_two_names_loses_one_of_them_and_ends_no_collection(tmp_path: Path) -> None:
    """By a mistake, or since another host moved it while the names were walked."""

    async def main() -> None:
        world = World(tmp_path)
        with world.running():
            async with world.host("a") as volume:
                now_s = await volume.client.clock_s()
                entry = await volume.create(ROOT_ID, "one", expires_s=now_s + HOUR)

                async def name_twice(changes: Changes) -> None:
                    await changes.entries(ROOT_ID)
                    changes.set(msgspec.structs.replace(entry, name="two"))

                await volume.catalog.change(name_twice)
                world.sleep(2 * HOUR)
                gone = [await collect(volume) for _ in range(2)]
                assert sorted(len(report.expired) for report in gone) == [1, 1]
                assert [e async for e in volume.catalog.walk()] == []

    run(main)


def test_packs_less_than_half_live_are_compacted(tmp_path: Path) -> None:
    async def main() -> None:
        world = World(tmp_path)
        with world.running():
            async with world.host("a") as volume:
                content = {i: pattern(i) for i in range(600)}
                await write_image(volume, "disk", content)
                changed = {i: pattern(1000 + i) for i in range(400)}
                await write_image(volume, "disk", changed)
                expected = b"".join({**content, **changed}.values())
                world.sleep(2 * HOUR)
                report = await collect(volume)
                assert (report.packs_compacted, report.packs_newly_condemned) == (1, 1)
                assert await read_image(volume, "disk") == expected
                world.sleep(2 * HOUR)
                report = await collect(volume)
                assert (report.packs_deleted, report.packs_compacted, report.forwards) == (1, 0, 1)
                assert await read_image(volume, "disk") == expected
                report = await collected(world, volume)
                assert (report.packs, report.packs_live, report.forwards) == (2, 2, 1)

    run(main)


def test_a_damaged_frame_is_not_copied_and_keeps_its_pack(tmp_path: Path) -> None:
    async def main() -> None:
        world = World(tmp_path)
        with world.running():
            async with world.host("a") as volume:
                content = {i: pattern(i) for i in range(40)}
                await write_image(volume, "disk", content)
                (name,) = packs(world)
                await write_image(volume, "disk", {i: pattern(1000 + i) for i in range(30)})
                path = world.root / name
                rows = await read_footer(bytes.fromhex(name[-32:]), path.stat().st_size, volume.client.get)  # type: ignore[arg-type]
                victim = next(r.reference for r in rows if r.plain_length == CHUNK and r.reference.chunk_id == _id(pattern(35)))
                data = bytearray(path.read_bytes())
                data[victim.offset + 5] ^= 1
                path.write_bytes(data)
                world.sleep(2 * HOUR)
                report = await collect(volume)
                assert (report.packs_compacted, report.damaged_frames) == (1, 1)
                assert any("damaged" in problem for problem in report.problems)
                report = await collected(world, volume)
                assert (report.packs_compacted, report.packs_condemned, report.packs_deleted) == (0, 0, 0)  # nor is it tried again
                assert path.exists()
                condemned = await read_condemned(volume.client)
                assert condemned.damaged == {victim.pack_id: frozenset([victim.chunk_id])}
                # What is written again is stored again.
                await write_image(volume, "disk", {35: pattern(35)})
                expected = {**content, **{i: pattern(1000 + i) for i in range(30)}}
                assert await read_image(volume, "disk") == b"".join(expected.values())

    run(main)


def _id(plain: bytes) -> bytes:
    from novafs.chunk import chunk_id

    return chunk_id(plain)


def test_nothing_is_freed_while_something_retained_can_not_be_read(tmp_path: Path) -> None:
    async def main() -> None:
        world = World(tmp_path)
        with world.running():
            async with world.host("a") as volume:
                await write_image(volume, "gone", CONTENT)
                await volume.unlink(ROOT_ID, "gone")
                node_id = await write_image(volume, "disk", {i: pattern(100 + i) for i in range(300)})
                head = await generation_chain(volume.client, node_id).head()
                assert head is not None
                node = head.record.map_state(CHUNK).node_references()[0]
                path = world.root / "packs" / node.pack_id.hex()[:2] / node.pack_id.hex()
                good = path.read_bytes()
                path.write_bytes(good[: node.offset] + b"?" * node.length + good[node.offset + node.length :])
                volume.cache.l1.clear()
                before = [name for name in world.names() if not name.startswith("pins/")]
                for _ in range(3):
                    world.sleep(2 * HOUR)
                    report = await collect(volume, everything=True)
                    assert not report.complete
                    assert "map node" in report.problems[0]
                assert world.names() == before
                path.write_bytes(good)
                await collected(world, volume)
                assert len(packs(world)) == 1

    run(main)


@pytest.mark.parametrize("reason", ["leased", "pinned", "in flight"])
def test_an_image_without_a_name_is_kept_while_somebody_needs_it(tmp_path: Path, reason: str) -> None:
    async def main() -> None:
        world = World(tmp_path)
        with world.running():
            async with world.host("a") as a, world.host("b") as b:
                node_id = await write_image(a, "disk", CONTENT)
                if reason != "in flight":
                    image = await a.open_image(node_id)
                    if reason == "leased":
                        await image.write(0, pattern(77))
                        await image.commit()
                await b.catalog.refresh()
                await b.unlink(ROOT_ID, "disk")
                if reason == "in flight":
                    # As after an import that was cut off before its name: no catalog ever named it.
                    for name in world.names("catalog/")[:-1]:
                        (world.root / name).unlink()
                    for name in world.names("leases/"):
                        (world.root / name).unlink()
                    world.sleep(HOUR / 2)
                    await collect(b, everything=True)
                    assert world.names("images/")
                    return
                for _ in range(3):
                    for _ in range(3):
                        world.sleep(0.7 * HOUR)
                        if reason == "pinned":
                            await a.pins.beat()
                    await collect(b, everything=True)
                a.cache.l1.clear()
                assert await image.read(CHUNK, CHUNK) == pattern(1)
                await a.close_image(image)
                await a.pins.beat()
                await collected(world, b, 4)
                assert not world.names("images/")
                assert not packs(world)

    run(main)


def test_the_highest_epoch_of_a_lease_is_never_deleted(tmp_path: Path) -> None:
    async def main() -> None:
        world = World(tmp_path)
        with world.running():
            async with world.host("a") as volume:
                for seed in range(3):
                    await write_image(volume, "disk", {0: pattern(seed)})
                highest = world.names("leases/")[0]
                await volume.unlink(ROOT_ID, "disk")
                await collected(world, volume)
                assert world.names("leases/") == [highest]
                assert counter_of(highest) == 6

    run(main)


def test_what_nobody_came_back_for_goes(tmp_path: Path) -> None:
    async def main() -> None:
        world = World(tmp_path)
        with world.running():
            async with world.host("a") as volume:
                for name in ("probe/left", f"wants/{'0' * 32}/{'1' * 32}", "pins/" + "2" * 32):
                    volume.client.store.put(name, b"x")
                await collect(volume)
                assert world.names("wants/")
                assert world.names("pins/")
                await collected(world, volume, 1)
                assert not world.names("probe/") + world.names("wants/") + world.names("pins/")

    run(main)


def test_old_lists_of_what_is_condemned_go_and_the_newest_stays(tmp_path: Path) -> None:
    async def main() -> None:
        world = World(tmp_path)
        with world.running():
            async with world.host("a") as volume:
                await write_image(volume, "disk", CONTENT)
                for _ in range(5):
                    world.sleep(2 * HOUR)
                    report = await collect(volume)
                assert len(world.names("condemned/")) <= 2
                summary = (await read_condemned(volume.client)).summary
                assert summary["references"] == report.references == 10
                assert summary["chunks_with_references_1"] == 10
                await volume.dedup.condemned.refresh(0)
                assert volume.statistics()["collection"]["dedup_ratio"] == 1.0

    run(main)


def test_a_grace_shorter_than_writers_count_with_is_refused(tmp_path: Path) -> None:
    async def main() -> None:
        world = World(tmp_path)
        with world.running():
            async with world.host("a") as volume:
                with pytest.raises(ConfigError, match=r"gc\.grace"):
                    await collect(volume, grace_s=60)
                await collect(volume, grace_s=600)
                await collect(volume, grace_s=100 * HOUR)

    run(main)


@pytest.mark.slow
def test_a_collection_killed_before_any_of_its_calls_can_be_run_again(tmp_path: Path) -> None:
    """semantics: S17.

    Each call of the store in turn is the first that does not come through; nothing live is lost, and in the end all garbage is gone."""

    async def scene(world: World, volume: Volume) -> None:
        await write_image(volume, "disk", {i: pattern(i) for i in range(300)})
        await write_image(volume, "disk", {i: pattern(1000 + i) for i in range(200)})
        await write_image(volume, "gone", CONTENT)
        await take_snapshot(volume, await volume.catalog.resolve("disk"), "s")
        await write_image(volume, "disk", {i: pattern(2000 + i) for i in range(100)})
        await volume.unlink(ROOT_ID, "gone")
        world.sleep(2 * HOUR)

    expected = b"".join(pattern(2000 + i if i < 100 else 1000 + i if i < 200 else i) for i in range(300))

    async def main() -> None:
        world = World(tmp_path / "start")
        (tmp_path / "start").mkdir()
        with world.running():
            async with world.host("a") as volume:
                await scene(world, volume)
            calls = 0
            killed = True
            while killed:
                shutil.copytree(tmp_path / "start", tmp_path / "now")
                for path in (tmp_path / "start" / "store").rglob("*"):
                    if path.is_file():
                        shutil.copystat(path, tmp_path / "now" / "store" / path.relative_to(tmp_path / "start" / "store"))
                again = World(tmp_path / "now")
                again._made, again.ahead_s = True, world.ahead_s
                async with again.host("a") as volume:
                    killed = await _killed(again, volume, calls)
                    assert await read_image(volume, "disk") == expected
                    for _ in range(4):
                        again.sleep(2 * HOUR)
                        report = await collect(volume, everything=True)
                        assert report.complete, report.problems
                    assert not report.problems
                    assert report.packs == report.packs_live
                    assert await read_image(volume, "disk") == expected
                shutil.rmtree(tmp_path / "now")
                calls += 1
            assert calls > 30

    run(main)


async def _killed(world: World, volume: Volume, calls: int) -> bool:
    store = world.stores["a"]
    store.hook = Kill(calls)
    try:
        await collect(volume, everything=True)
    except StoreDeniedError:
        return True
    finally:
        store.hook = lambda operation, name: None
    return False


def test_a_generation_with_figures_of_its_own_is_not_touched_by_collection(tmp_path: Path) -> None:
    """Compaction and what follows it change no generation: what an image says of itself stays as it is."""

    async def main() -> None:
        world = World(tmp_path)
        with world.running():
            async with world.host("a") as volume:
                node_id = await write_image(volume, "disk", {i: pattern(i) for i in range(40)})
                await write_image(volume, "disk", {i: pattern(1000 + i) for i in range(30)})
                before = await generation_chain(volume.client, node_id).head()
                await collected(world, volume)
                after = await generation_chain(volume.client, node_id).head()
                assert before is not None
                assert after is not None
                assert msgspec.structs.asdict(before.record) == msgspec.structs.asdict(after.record)

    run(main)
