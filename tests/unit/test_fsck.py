"""`fsck`: each kind of damage is found, named with what it touches, and mended where that needs no guess."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import pytest

from novafs import durable
from novafs.aside import apply_aside, list_aside, read_aside
from novafs.catalogtree import ROOT_ID
from novafs.chunk import Reference, chunk_id
from novafs.condemned import read_condemned
from novafs.errors import FrameCorruptError, NotFoundError, NoVolumeError, ObjectCorruptError
from novafs.fsck import FsckReport, check
from novafs.fsckstart import check_start, infer_chunk_size
from novafs.gc import collect
from novafs.generation import generation_chain
from novafs.journalfile import Record, RecordKind
from novafs.lease import break_lease
from novafs.mapwalk import Touched
from novafs.objectstore.client import StoreClient
from novafs.objectstore.file import FileStore, create_root
from novafs.pack import PackRow, read_footer
from novafs.snapshots import take_snapshot
from novafs.volume import Volume
from tests.support.fixtures import run
from tests.support.hosts import CHUNK, AgedStore, World, pattern, read_image, write_image

HOUR = 3600.0
CONTENT = {i: pattern(i) for i in range(20)}
PLAIN = b"".join(CONTENT.values())


async def rows_of(volume: Volume, name: str) -> list[PackRow]:
    info = await volume.client.head(name)
    return await read_footer(bytes.fromhex(name[-32:]), info.size, volume.client.get)  # type: ignore[arg-type]


async def place_of(volume: Volume, world: World, plain: bytes) -> Reference:
    """Where a chunk is."""
    for name in world.names("packs/"):
        for row in await rows_of(volume, name):
            if row.reference.chunk_id == chunk_id(plain):
                return row.reference
    raise AssertionError("it is nowhere")


def damage(world: World, place: Reference) -> None:
    """Flip a bit in a frame."""
    path = world.root / "packs" / place.pack_id.hex()[:2] / place.pack_id.hex()
    data = bytearray(path.read_bytes())
    data[place.offset + place.length // 2] ^= 4
    path.write_bytes(data)


def messages(report: FsckReport, *, problems: bool = True) -> str:
    return "\n".join(finding.message for finding in report.findings if finding.problem == problems)


def test_a_volume_in_use_has_no_problems(tmp_path: Path) -> None:
    async def main() -> None:
        world = World(tmp_path)
        with world.running():
            async with world.host("a") as a, world.host("b") as b:
                node_id = await write_image(a, "disk", {i: pattern(i) for i in range(600)})
                await take_snapshot(a, await a.catalog.resolve("disk"), "s")
                await a.mkdir(ROOT_ID, "d")
                image = await a.open_image(node_id)
                await image.write(0, pattern(99))
                await image.commit()
                report = await check(b, scrub_packs=True)
                assert not report.findings
                assert (report.images, report.snapshots, report.directories) == (1, 1, 1)
                assert report.scrubbed_frames > 600
                assert report.map_nodes >= 3
                assert not report.repaired
                await a.close_image(image)
                world.sleep(2 * HOUR)
                await collect(a)
                assert not (await check(b, scrub_packs=True)).findings

    run(main)


def test_a_scrub_names_every_image_that_a_damaged_frame_touches(tmp_path: Path) -> None:
    async def main() -> None:
        world = World(tmp_path)
        with world.running():
            async with world.host("a") as volume:
                await write_image(volume, "one", {i: pattern(i % 7) for i in range(300)})
                await take_snapshot(volume, await volume.catalog.resolve("one"), "before")
                await write_image(volume, "one", {3: pattern(1000)})
                directory = await volume.mkdir(ROOT_ID, "d")
                entry = await volume.create(directory.node_id, "two")
                image = await volume.open_image(entry.node_id)
                await image.write(100 * CHUNK, pattern(3) * 2)
                await image.write(103 * CHUNK, pattern(3)[: CHUNK // 2] + bytes(CHUNK // 2) + pattern(3))
                await volume.close_image(image)
                damage(world, await place_of(volume, world, pattern(3)))
                assert not (await check(volume)).problems  # nobody has read it
                report = await check(volume, scrub_packs=True)
                touched = [t for t in report.touched if t.path == "d/two"]
                assert touched == [
                    Touched("d/two", "", 100 * CHUNK, 2 * CHUNK, "its frame is missing or damaged"),
                    Touched("d/two", "", 104 * CHUNK, CHUNK, "its frame is missing or damaged"),
                ]
                places = [i for i in range(300) if i % 7 == 3]
                assert [t.offset // CHUNK for t in report.touched if t.path == "one" and not t.snapshot] == places[1:]
                assert [t.offset // CHUNK for t in report.touched if t.snapshot == "before"] == places
                assert report.damaged_frames == 1
                assert f"d/two: {2 * CHUNK} bytes from byte {100 * CHUNK}" in messages(report)
                # It is known from now on, to a check that reads no pack as well.
                assert len((await check(volume)).touched) == len(report.touched)

    run(main)


def test_a_damaged_frame_is_never_hit_again_and_what_is_written_again_heals_the_others(tmp_path: Path) -> None:
    async def main() -> None:
        world = World(tmp_path)
        with world.running():
            async with world.host("a") as a, world.host("b") as b:
                await write_image(a, "disk", CONTENT)
                place = await place_of(a, world, pattern(5))
                damage(world, place)
                report = await check(b, scrub_packs=True)
                assert report.problems
                with pytest.raises(FrameCorruptError):
                    await read_image(a, "disk")
                # Another host, whose index knows the frame, writes the same bytes.
                world.sleep(60)
                await write_image(a, "other", {0: pattern(5)})
                assert await read_image(b, "other") == pattern(5)
                report = await check(b, repair=True)
                assert report.repaired == [f"pack {place.pack_id.hex()}: 1 of 1 damaged or missing frames are read from other copies"]
                assert not report.problems
                assert await read_image(b, "disk") == PLAIN
                # The forward counts as a reference for collections, too.
                await a.unlink(ROOT_ID, "other")
                for _ in range(4):
                    world.sleep(2 * HOUR)
                    assert (await collect(b, everything=True)).complete
                assert await read_image(b, "disk") == PLAIN
                assert not (await check(b, scrub_packs=True)).problems

    run(main)


def test_the_same_bytes_written_again_replace_a_damaged_frame(tmp_path: Path) -> None:
    async def main() -> None:
        world = World(tmp_path)
        with world.running():
            async with world.host("a") as volume:
                await write_image(volume, "disk", CONTENT)
                damage(world, await place_of(volume, world, pattern(5)))
                assert (await check(volume, scrub_packs=True)).problems
                await write_image(volume, "disk", {5: pattern(5)})
                assert await read_image(volume, "disk") == PLAIN
                world.sleep(2 * HOUR)
                await collect(volume)
                assert not (await check(volume, scrub_packs=True)).problems

    run(main)


def test_a_pack_that_is_gone_is_named_with_what_it_held(tmp_path: Path) -> None:
    async def main() -> None:
        world = World(tmp_path)
        with world.running():
            async with world.host("a") as volume:
                await write_image(volume, "disk", CONTENT)
                await write_image(volume, "disk", {i: pattern(100 + i) for i in range(5, 10)})
                lost = await place_of(volume, world, pattern(107))
                (world.root / "packs" / lost.pack_id.hex()[:2] / lost.pack_id.hex()).unlink()
                report = await check(volume)
                assert report.touched == [Touched("disk", "", 5 * CHUNK, 5 * CHUNK, "its frame is missing or damaged")]
                assert "no such pack" in messages(report)
                report = await check(volume, repair=True)
                assert report.problems
                world.sleep(2 * HOUR)
                gc = await collect(volume, everything=True)
                assert gc.complete
                assert any("fsck" in problem for problem in gc.problems)

    run(main)


def test_a_pack_whose_footer_is_lost_is_rescued(tmp_path: Path) -> None:
    async def main() -> None:
        world = World(tmp_path)
        with world.running():
            async with world.host("a") as volume:
                await write_image(volume, "disk", CONTENT)
                (name,) = world.names("packs/")
                path = world.root / name
                data = bytearray(path.read_bytes())
                data[-100:] = bytes(100)
                path.write_bytes(data)
                assert await read_image(volume, "disk") == PLAIN  # readers need no footer
                report = await check(volume)
                assert "does not end in a pack's footer" in messages(report)
                assert not report.touched
                report = await check(volume, repair=True)
                assert report.repaired == [f"pack {name[-32:]}: what is referred to in it was moved"]
                assert [problem.kind for problem in report.problems] == ["pack"]  # still there, and of no use to anybody
                for _ in range(2):
                    world.sleep(2 * HOUR)
                    await collect(volume, everything=True)
                assert name not in world.names("packs/")
                assert not (await check(volume, scrub_packs=True)).problems
                assert await read_image(volume, "disk") == PLAIN

    run(main)


def test_collection_leaves_a_pack_alone_whose_footer_is_lost(tmp_path: Path) -> None:
    async def main() -> None:
        world = World(tmp_path)
        with world.running():
            async with world.host("a") as volume:
                await write_image(volume, "disk", CONTENT)
                (name,) = world.names("packs/")
                path = world.root / name
                path.write_bytes(path.read_bytes()[:-50])
                for _ in range(3):
                    world.sleep(2 * HOUR)
                    report = await collect(volume, everything=True)
                    assert (report.packs_condemned, report.packs_compacted) == (0, 0)
                assert await read_image(volume, "disk") == PLAIN

    run(main)


def test_an_unreadable_map_node_is_said_with_the_range_below_it(tmp_path: Path) -> None:
    async def main() -> None:
        world = World(tmp_path)
        with world.running():
            async with world.host("a") as volume:
                node_id = await write_image(volume, "disk", {i: pattern(i) for i in range(700)})
                head = await generation_chain(volume.client, node_id).head()
                assert head is not None
                damage(world, head.record.map_state(CHUNK).node_references()[1])
                volume.cache.l1.clear()
                report = await check(volume)
                (touched,) = report.touched
                assert touched[:4] == ("disk", "", 256 * CHUNK, 256 * CHUNK)
                assert "map" in touched.reason
                world.sleep(2 * HOUR)
                assert not (await collect(volume)).complete

    run(main)


def test_an_image_whose_newest_generation_is_damaged_goes_back_when_it_is_told_to(tmp_path: Path) -> None:
    async def main() -> None:
        world = World(tmp_path)
        with world.running():
            async with world.host("a") as volume:
                await write_image(volume, "disk", CONTENT)
                node_id = await write_image(volume, "disk", {0: pattern(99)})
                newest = world.names(f"images/{node_id.hex()}")[0]
                (world.root / newest).write_bytes(b"rubbish")
                volume._heads.clear()
                report = await check(volume, repair=True)
                assert any(problem.kind == "generation" for problem in report.problems)
                report = await check(volume, step_back=True)
                assert report.repaired == ["disk: is what it was at generation 3, 1 before its newest"]
                # The damaged object stays a problem until it is superseded for a grace.
                assert [problem.kind for problem in report.problems] == ["generation"]
                assert await read_image(volume, "disk") == PLAIN
                (world.root / newest).unlink()
                assert not (await check(volume)).problems

    run(main)


def test_images_without_a_name_are_told_of_and_get_one_on_request(tmp_path: Path) -> None:
    async def main() -> None:
        world = World(tmp_path)
        with world.running():
            async with world.host("a") as a, world.host("b") as b:
                lost = await write_image(a, "lost", CONTENT)
                written = await write_image(a, "written", {0: pattern(200)})
                image = await a.open_image(written)
                await image.write(0, pattern(201))
                await image.commit()
                for name in ("lost", "written"):
                    await b.catalog.refresh()
                    await b.unlink(ROOT_ID, name)
                fresh = await write_image(b, "fresh", {0: pattern(202)})
                await b.unlink(ROOT_ID, "fresh")
                world.sleep(2 * HOUR)
                for name in world.names("catalog/")[1:]:  # as a collection will
                    (world.root / name).unlink()
                later = world.names(f"images/{fresh.hex()}")[0]
                now = time.time() + world.ahead_s
                os.utime(world.root / later, (now, now))
                report = await check(b)
                notes = messages(report, problems=False)
                assert f"image {lost.hex()}" in notes
                assert "a host writes it" in notes
                assert "an import may be under way" in notes
                report = await check(b, relink=True)
                assert report.repaired == [f"lost+found/{lost.hex()}: an image without a name has one again"]
                assert await read_image(b, f"lost+found/{lost.hex()}") == PLAIN
                await collect(b, everything=True)
                assert await read_image(b, f"lost+found/{lost.hex()}") == PLAIN
                image.handles = 0

    run(main)


def test_a_damaged_list_of_condemned_packs_stops_no_writer_and_is_mended(tmp_path: Path) -> None:
    async def main() -> None:
        world = World(tmp_path)
        with world.running():
            async with world.host("a") as volume:
                await write_image(volume, "disk", CONTENT)
                for _ in range(2):
                    world.sleep(2 * HOUR)
                    await collect(volume)
                before = (await read_condemned(volume.client)).summary
                (world.root / world.names("condemned/")[0]).write_bytes(b"rubbish")
                packs = len(world.names("packs/"))
                world.sleep(60)
                await write_image(volume, "again", CONTENT)
                assert len(world.names("packs/")) == packs + 1  # nothing is deduplicated, for nothing is known to be safe
                with pytest.raises(ObjectCorruptError):
                    await collect(volume)
                report = await check(volume)
                assert "nothing is deduplicated" in messages(report)
                report = await check(volume, repair=True)
                assert "holds again" in report.repaired[0]
                assert not report.problems
                assert set((await read_condemned(volume.client)).summary) == set(before)
                world.sleep(60)
                await write_image(volume, "third", CONTENT)
                assert len(world.names("packs/")) == packs + 1
                world.sleep(2 * HOUR)
                assert (await collect(volume)).complete

    run(main)


def test_what_lies_about_is_told_of_and_is_no_problem(tmp_path: Path) -> None:
    async def main() -> None:
        world = World(tmp_path)
        with world.running():
            async with world.host("a") as volume:
                strays = ["README", "packs/aa/readme.txt", "images/notes", "zz/other", "catalog/x"]
                for name in strays:
                    volume.client.store.put(name, b"x")
                old = world.root / ".novafs-tmp" / f"{durable.TEMP_PREFIX}dead"
                old.write_bytes(b"x")
                os.utime(old, (1, 1))
                volume.client.store.put("pins/" + "2" * 32, b"x")
                world.sleep(2 * HOUR)
                report = await check(volume)
                assert not report.problems
                assert {f.name for f in report.findings if f.kind == "stray"} == set(strays)
                assert {f.kind for f in report.findings} == {"stray", "temporary", "notes"}
                report = await check(volume, repair=True)
                assert not old.exists()
                assert world.names("pins/") == []
                assert {f.kind for f in report.findings} == {"stray"}  # not ours to delete

    run(main)


def test_a_damaged_forward_goes_where_its_pack_is_there(tmp_path: Path) -> None:
    async def main() -> None:
        world = World(tmp_path)
        with world.running():
            async with world.host("a") as volume:
                await write_image(volume, "disk", {i: pattern(i) for i in range(40)})
                await write_image(volume, "disk", {i: pattern(100 + i) for i in range(30)})
                world.sleep(2 * HOUR)
                assert (await collect(volume)).packs_compacted == 1
                (name,) = world.names("forward/")
                (world.root / name).write_bytes(b"rubbish")
                report = await check(volume)
                assert [p.kind for p in report.problems] == ["forward"]
                world.sleep(2 * HOUR)
                assert not (await collect(volume)).complete  # the pack that it moved out of stays
                report = await check(volume, repair=True)
                assert not report.problems
                assert len(await read_image(volume, "disk")) == 40 * CHUNK
                for _ in range(4):
                    world.sleep(2 * HOUR)
                    report2 = await collect(volume, everything=True)
                assert (report2.packs, report2.packs_live) == (2, 2)
                assert len(await read_image(volume, "disk")) == 40 * CHUNK

    run(main)


# --- before a volume can be opened --------------------------------------------------------------------------------


def store_of(world: World) -> StoreClient:
    return StoreClient(AgedStore(world.root, world))


def test_a_missing_superblock_is_made_anew(tmp_path: Path) -> None:
    async def main() -> None:
        world = World(tmp_path)
        with world.running():
            async with world.host("a") as volume:
                await write_image(volume, "disk", {i: pattern(i) for i in range(300)})
            for content in (None, b"{rubbish"):
                path = world.root / "novafs.json"
                path.unlink()
                if content is not None:
                    path.write_bytes(content)
                findings, repaired = await check_start(store_of(world), repair=False)
                assert [f.kind for f in findings] == ["superblock"]
                findings, repaired = await check_start(store_of(world), repair=True)
                assert not findings
                assert "chunk size of the images (4096)" in repaired[0]
                async with world.host("a") as volume:
                    assert len(await read_image(volume, "disk")) == 300 * CHUNK

    run(main)


def test_without_a_chunk_nobody_guesses_the_chunk_size(tmp_path: Path) -> None:
    async def main() -> None:
        world = World(tmp_path)
        with world.running():
            async with world.host("a") as volume:
                await volume.create(ROOT_ID, "empty")
            (world.root / "novafs.json").unlink()
            assert await infer_chunk_size(store_of(world)) is None
            findings, repaired = await check_start(store_of(world), repair=True)
            assert "can only be restored" in findings[0].message
            assert not repaired

    run(main)


def test_an_empty_place_is_no_volume(tmp_path: Path) -> None:
    async def main() -> None:
        create_root(tmp_path / "nothing")
        with pytest.raises(NoVolumeError):
            await check_start(StoreClient(FileStore(tmp_path / "nothing")), repair=True)

    run(main)


def test_a_damaged_catalog_is_followed_by_the_newest_that_can_be_read(tmp_path: Path) -> None:
    async def main() -> None:
        world = World(tmp_path)
        with world.running():
            async with world.host("a") as volume:
                await write_image(volume, "old", CONTENT)
                node_id = await write_image(volume, "new", {0: pattern(50)})
                await volume._flush_hints()
            with_new = [n for n in world.names("catalog/") if b"new" in _plain(world, n)]
            for name in with_new:
                (world.root / name).write_bytes(b"rubbish")
            findings, _ = await check_start(store_of(world), repair=False)
            assert [f.kind for f in findings] == ["catalog"]
            _, repaired = await check_start(store_of(world), repair=True)
            assert "--relink" in repaired[0]
            async with world.host("a") as volume:
                assert await read_image(volume, "old") == PLAIN
                world.sleep(2 * HOUR)
                await check(volume, relink=True)
                assert await read_image(volume, f"lost+found/{node_id.hex()}") == pattern(50)

    run(main)


def _plain(world: World, name: str) -> bytes:
    import zstandard

    return zstandard.ZstdDecompressor().decompress((world.root / name).read_bytes()[24:])


def test_without_any_catalog_all_images_are_found_again(tmp_path: Path) -> None:
    async def main() -> None:
        world = World(tmp_path)
        with world.running():
            async with world.host("a") as volume:
                node_id = await write_image(volume, "disk", CONTENT)
            shutil.rmtree(world.root / "catalog")
            _, repaired = await check_start(store_of(world), repair=True)
            assert "an empty one" in repaired[0]
            world.sleep(2 * HOUR)
            async with world.host("a") as volume:
                report = await check(volume, relink=True)
                assert len(report.repaired) == 1
                assert await read_image(volume, f"lost+found/{node_id.hex()}") == PLAIN

    run(main)


# --- journals that were kept aside --------------------------------------------------------------------------------


async def set_aside(world: World, volume: Volume) -> bytes:
    """A lease that is lost with an fsynced write under it; the image's id."""
    node_id = await write_image(volume, "disk", CONTENT)
    image = await volume.open_image(node_id)
    await image.write(2 * CHUNK, pattern(70))
    await image.write(30 * CHUNK, pattern(71))
    await image.resize(40 * CHUNK)
    await image.fsync()
    await break_lease(volume.client, node_id)
    await volume.writeback.beat(volume.writeback.leases)  # type: ignore[arg-type]
    image.handles = 0
    return node_id


def test_writes_that_were_kept_aside_become_an_image_of_their_own(tmp_path: Path) -> None:
    async def main() -> None:
        world = World(tmp_path)
        with world.running():
            async with world.host("a") as a, world.host("b") as b:
                node_id = await set_aside(world, a)
                await write_image(b, "disk", {2: pattern(80)})
                report = await check(a)
                (kept,) = report.aside
                assert (kept.image_id, kept.writes, kept.bytes) == (node_id, 3, 2 * CHUNK)
                assert "--apply-aside" in messages(report, problems=False)
                assert not (await check(b)).aside  # it lies on the other host
                path = Path(kept.path)
                await apply_aside(a, path, read_aside(path), "rescued")
                expected = PLAIN.ljust(40 * CHUNK, b"\0")
                expected = expected[: 2 * CHUNK] + pattern(70) + expected[3 * CHUNK :]
                expected = expected[: 30 * CHUNK] + pattern(71) + expected[31 * CHUNK :]
                assert await read_image(b, "rescued") == expected
                assert (await read_image(b, "disk"))[2 * CHUNK : 3 * CHUNK] == pattern(80)  # untouched
                assert path.exists()
                path.unlink()
                assert not (await check(a)).findings

    run(main)


def test_the_generation_they_belong_on_may_be_gone_and_another_be_chosen(tmp_path: Path) -> None:
    async def main() -> None:
        world = World(tmp_path)
        with world.running():
            async with world.host("a") as a, world.host("b") as b:
                await set_aside(world, a)
                await write_image(b, "disk", {2: pattern(80), 3: pattern(81)})
                world.sleep(2 * HOUR)
                await collect(b)
                (kept,) = list_aside(tmp_path / "a")
                path = Path(kept.path)
                with pytest.raises(NotFoundError, match="--onto"):
                    await apply_aside(a, path, read_aside(path), "rescued")
                newest = await generation_chain(a.client, kept.image_id).head()
                assert newest is not None
                await apply_aside(a, path, read_aside(path), "rescued", onto=newest.record.counter)
                found = await read_image(b, "rescued")
                assert found[2 * CHUNK : 3 * CHUNK] == pattern(70)
                assert found[3 * CHUNK : 4 * CHUNK] == pattern(81)

    run(main)


def test_a_file_with_writes_of_several_images_asks_for_which(tmp_path: Path) -> None:
    async def main() -> None:
        world = World(tmp_path)
        with world.running():
            async with world.host("a") as a:
                ids = [await write_image(a, name, CONTENT) for name in ("one", "two")]
                journal = a.writeback.journal
                assert journal is not None
                await journal.append([Record(RecordKind.DATA, i, 9, 10**6 + n, 0, pattern(90 + n), 1) for n, i in enumerate(ids)])
                (segment,) = (tmp_path / "a" / "journal").glob("*.seg")
                (tmp_path / "a" / "aside").mkdir(exist_ok=True)
                path = tmp_path / "a" / "aside" / f"damaged-{segment.name}"
                shutil.copy(segment, path)
                assert {kept.image_id for kept in list_aside(tmp_path / "a")} >= set(ids)
                with pytest.raises(NotFoundError, match="--image"):
                    await apply_aside(a, path, read_aside(path), "rescued")
                await apply_aside(a, path, read_aside(path), "rescued", image_id=ids[1])
                assert (await read_image(a, "rescued"))[:CHUNK] == pattern(91)
                with pytest.raises(NotFoundError, match="no such file"):
                    read_aside(path.with_name("missing.seg"))

    run(main)


def test_a_scrub_reads_no_faster_than_it_is_told(tmp_path: Path) -> None:
    """By trio's clock, which a MockClock makes jump: no time passes here."""
    import trio.testing

    async def main() -> None:
        world = World(tmp_path)
        with world.running():
            async with world.host("a") as volume:
                for number in range(4):
                    await write_image(volume, f"i{number}", {i: pattern(100 * number + i) for i in range(10)})
                began_s = trio.current_time()
                report = await check(volume, scrub_packs=True, rate_bytes_s=2000.0)
                last = max((world.root / name).stat().st_size for name in world.names("packs/"))
                assert trio.current_time() - began_s >= (report.scrubbed_bytes - last) / 2000

    run(main, clock=trio.testing.MockClock(autojump_threshold=0.05))
