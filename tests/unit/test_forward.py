"""Forwards: readers find what compactions have moved, commits put maps right, chains name final places."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest

from novafs.catalogtree import ROOT_ID
from novafs.chunk import ChunkId, PackId, Reference
from novafs.condemned import read_condemned
from novafs.errors import ObjectNotFoundError, StoreDeniedError
from novafs.forward import Forwards, ForwardTable, forward_chain, rows_from, write_forward
from novafs.gc import collect
from novafs.objectstore.client import StoreClient
from novafs.objectstore.file import FileStore, create_root
from novafs.revisions import ConflictError, Head
from tests.support.fixtures import run
from tests.support.hosts import CHUNK, World, pattern, read_image, write_image

HOUR = 3600.0


def reference(chunk: int, pack: int) -> Reference:
    """A made-up place."""
    return Reference(ChunkId(chunk.to_bytes(32, "big")), PackId(pack.to_bytes(16, "big")), 100 * chunk + pack, 10, 0)


def pack(number: int) -> PackId:
    return PackId(number.to_bytes(16, "big"))


def client(tmp_path: Path) -> StoreClient:
    create_root(tmp_path / "store")
    return StoreClient(FileStore(tmp_path / "store"))


async def forward(client: StoreClient, number: int, *places: Reference, base: Head | None = None) -> Head:  # type: ignore[type-arg]
    return await write_forward(client, pack(number), base, rows_from(places))


async def table(client: StoreClient, existing: Iterable[int]) -> ForwardTable:
    found = await ForwardTable.load(client)
    found.collapse({pack(number) for number in existing})
    return found


# --- readers ------------------------------------------------------------------------------------------------------


def test_a_place_is_followed_until_it_is_in_a_pack_that_is_there(tmp_path: Path) -> None:
    async def main() -> None:
        store = client(tmp_path)
        await forward(store, 1, reference(7, 2))
        await forward(store, 2, reference(7, 3))
        forwards = Forwards(store)
        assert await forwards.relocate([reference(7, 1)], {pack(1)}) == {reference(7, 0).chunk_id: reference(7, 2)}
        assert await forwards.relocate([reference(7, 1)], {pack(1), pack(2)}) == {reference(7, 0).chunk_id: reference(7, 3)}
        assert await forwards.relocate([reference(7, 1)], {pack(1), pack(2), pack(3)}) == {}
        assert await forwards.relocate([reference(8, 1)], {pack(1)}) == {}

    run(main)


def test_that_a_pack_has_no_forward_is_remembered_for_a_moment(tmp_path: Path) -> None:
    async def main() -> None:
        world = World(tmp_path)
        store = client(tmp_path)
        with world.running():
            forwards = Forwards(store)
            for _ in range(5):
                assert await forwards.relocate([reference(1, 1), reference(2, 1)], {pack(1)}) == {}
            assert forwards.lookups == 1
            await forward(store, 1, reference(1, 2))
            world.sleep(10)
            assert len(await forwards.relocate([reference(1, 1)], {pack(1)})) == 1

    run(main)


def test_a_remembered_place_that_is_gone_as_well_is_looked_up_anew(tmp_path: Path) -> None:
    async def main() -> None:
        world = World(tmp_path)
        store = client(tmp_path)
        with world.running():
            head = await forward(store, 1, reference(7, 2))
            forwards = Forwards(store)
            assert await forwards.relocate([reference(7, 1)], {pack(1)})
            world.sleep(20)
            await forward(store, 1, reference(7, 3), base=head)  # 2 was compacted, and its forward is not needed any more
            assert await forwards.relocate([reference(7, 1)], {pack(1)}) == {reference(7, 0).chunk_id: reference(7, 2)}
            assert await forwards.relocate([reference(7, 1)], {pack(1), pack(2)}) == {reference(7, 0).chunk_id: reference(7, 3)}

    run(main)


def test_a_circle_of_forwards_ends(tmp_path: Path) -> None:
    async def main() -> None:
        store = client(tmp_path)
        await forward(store, 1, reference(7, 2))
        await forward(store, 2, reference(7, 1))
        assert await Forwards(store).relocate([reference(7, 1)], {pack(1), pack(2)}) == {}
        found = await table(store, [1, 2])
        assert len(found.resolve(rows_from([reference(7, 1)]))) == 1

    run(main)


def test_the_second_of_two_forwards_at_one_moment_is_refused(tmp_path: Path) -> None:
    async def main() -> None:
        store = client(tmp_path)
        await forward(store, 1, reference(7, 2))
        with pytest.raises(ConflictError):
            await forward(store, 1, reference(7, 3))
        head = await forward_chain(store, pack(1)).head()
        assert head is not None
        assert head.record.references == reference(7, 2).pack()

    run(main)


# --- the collector ------------------------------------------------------------------------------------------------


def test_chains_are_collapsed_and_rows_that_lead_nowhere_do_not_count(tmp_path: Path) -> None:
    async def main() -> None:
        store = client(tmp_path)
        await forward(store, 1, reference(7, 2), reference(8, 2), reference(9, 5))
        await forward(store, 2, reference(7, 3))
        found = await table(store, [2, 3])
        assert found.stale == {pack(1)}
        assert found.dangling == {pack(1): 1}
        rows = rows_from([reference(7, 1), reference(8, 1), reference(9, 1), reference(7, 2), reference(7, 4)])
        resolved = found.resolve(rows)
        wanted = [reference(7, 3), reference(8, 2), reference(9, 1), reference(7, 3), reference(7, 4)]
        assert resolved.tobytes() == rows_from(wanted).tobytes()
        assert rows.tobytes() != resolved.tobytes()  # a copy: maps are shared
        assert found.named == {pack(1), pack(2)}

    run(main)


def test_rows_that_were_just_written_count_and_make_others_stale(tmp_path: Path) -> None:
    async def main() -> None:
        store = client(tmp_path)
        await forward(store, 1, reference(7, 2))
        found = await table(store, [1, 2, 3])
        found.extend({pack(2): rows_from([reference(7, 3)])})
        assert found.stale == {pack(1)}
        assert found.resolve(rows_from([reference(7, 1)])).tobytes() == reference(7, 3).pack()
        assert found.rows_of(pack(1)).tobytes() == reference(7, 3).pack()
        assert not len(found.rows_of(pack(9)))

    run(main)


def test_ids_that_end_in_zeros_are_told_apart(tmp_path: Path) -> None:
    """numpy leaves out trailing zeros of a text; ids are numbers of full length."""

    async def main() -> None:
        store = client(tmp_path)
        short = Reference(ChunkId(b"a" + bytes(31)), PackId(b"p" + bytes(15)), 1, 1, 0)
        moved = short._replace(pack_id=PackId(b"q" + bytes(15)))
        await write_forward(store, short.pack_id, None, rows_from([moved]))
        found = await ForwardTable.load(store)
        found.collapse({moved.pack_id})
        assert found.resolve(rows_from([short])).tobytes() == moved.pack()
        assert found.named == {short.pack_id}

    run(main)


def test_a_damaged_forward_is_a_problem_and_not_the_end(tmp_path: Path) -> None:
    async def main() -> None:
        store = client(tmp_path)
        await forward(store, 1, reference(7, 2))
        await forward(store, 3, reference(8, 2))
        name = next(info.name for info in await store.list(f"forward/{pack(1).hex()}"))
        (tmp_path / "store" / name).write_bytes(b"rubbish")
        found = await table(store, [2])
        assert [problem[0] for problem in found.problems] == [name]
        assert len(found.rows_of(pack(3))) == 1

    run(main)


# --- all together -------------------------------------------------------------------------------------------------


async def compacted(world: World, name: str = "a") -> tuple[bytes, str]:
    """An image whose first pack was compacted and deleted: its content, and the pack's object."""
    async with world.host(name) as volume:
        content = {i: pattern(i) for i in range(600)}
        await write_image(volume, "disk", content)
        (old,) = world.names("packs/")
        content.update({i: pattern(1000 + i) for i in range(400)})
        await write_image(volume, "disk", {i: content[i] for i in range(400)})
        for _ in range(2):
            world.sleep(2 * HOUR)
            await collect(volume)
        assert old not in world.names("packs/")
    return b"".join(content.values()), old


def test_a_reader_that_meets_a_pack_that_is_gone_goes_on_where_the_frames_are(tmp_path: Path) -> None:
    async def main() -> None:
        world = World(tmp_path)
        with world.running():
            plain, old = await compacted(world)
            async with world.host("b") as b:
                asked: list[str] = []
                world.stores["b"].hook = lambda operation, name: asked.append(name) if operation == "get" else None
                assert await read_image(b, "disk") == plain
                assert asked.count(old) <= 2  # nodes, and chunks that were under way beside them
                asked.clear()
                assert await read_image(b, "disk") == plain
                assert old not in asked
                assert b.dedup.forwards.lookups == 1

    run(main)


def test_a_handle_that_was_opened_before_a_compaction_goes_on_reading(tmp_path: Path) -> None:
    async def main() -> None:
        world = World(tmp_path)
        with world.running():
            async with world.host("a") as a, world.host("b") as b:
                content = {i: pattern(i) for i in range(600)}
                await write_image(a, "disk", content)
                content.update({i: pattern(1000 + i) for i in range(400)})
                await write_image(a, "disk", {i: content[i] for i in range(400)})
                entry = await b.catalog.resolve("disk", max_age_s=0)
                image = await b.open_image(entry.node_id)
                assert await image.read(0, CHUNK) == content[0]  # the map is loaded, the rest is not
                for _ in range(2):
                    world.sleep(2 * HOUR)
                    await b.pins.beat()
                    await collect(a)
                assert await image.read(0, image.size) == b"".join(content.values())
                await b.close_image(image)

    run(main)


def test_without_its_forward_the_frames_of_a_pack_that_is_gone_are_an_error(tmp_path: Path) -> None:
    """The guard of the two tests before."""

    async def main() -> None:
        world = World(tmp_path)
        with world.running():
            await compacted(world)
            for name in world.names("forward/"):
                (world.root / name).unlink()
            async with world.host("b") as b:
                with pytest.raises(ObjectNotFoundError, match="is gone from the store"):
                    await read_image(b, "disk")

    run(main)


def test_a_store_that_does_not_tell_of_forwards_is_the_readers_error(tmp_path: Path) -> None:
    async def main() -> None:
        world = World(tmp_path)
        with world.running():
            await compacted(world)
            async with world.host("b") as b:

                def deny(operation: str, name: str) -> None:
                    if name.startswith("forward/"):
                        raise StoreDeniedError("no forwards today")

                world.stores["b"].hook = deny
                with pytest.raises(StoreDeniedError, match="today"):
                    await read_image(b, "disk")

    run(main)


def test_a_commit_puts_the_nodes_right_that_it_writes_and_then_the_forward_goes(tmp_path: Path) -> None:
    async def main() -> None:
        world = World(tmp_path)
        with world.running():
            plain, _ = await compacted(world)
            async with world.host("a") as volume:
                chunk = pattern(5000)
                await write_image(volume, "disk", dict.fromkeys((0, 300, 599), chunk))  # every leaf
                expected = np.frombuffer(plain, dtype=np.uint8).reshape(600, CHUNK).copy()
                expected[[0, 300, 599]] = np.frombuffer(chunk, dtype=np.uint8)
                asked: list[str] = []
                world.stores["a"].hook = lambda operation, name: asked.append(name)
                assert await read_image(volume, "disk") == expected.tobytes()
                assert not [name for name in asked if name.startswith("forward/")]
                for _ in range(2):
                    world.sleep(2 * HOUR)
                    report = await collect(volume)
                assert (report.forwards, world.names("forward/")) == (0, [])
                assert not (await read_condemned(volume.client)).moved
                assert await read_image(volume, "disk") == expected.tobytes()

    run(main)


def test_a_pack_that_was_compacted_twice_is_named_at_its_final_place(tmp_path: Path) -> None:
    async def main() -> None:
        world = World(tmp_path)
        with world.running():
            plain, _ = await compacted(world)
            async with world.host("a") as volume, world.host("b") as b:
                # A clone keeps the old map; then the image goes on, and most of what was moved is dead again.
                first = set(world.names("forward/"))
                rest = {i: pattern(9000 + i) for i in range(400, 595)}
                await write_image(volume, "disk", rest)
                for _ in range(3):
                    world.sleep(2 * HOUR)
                    report = await collect(volume)
                expected = np.frombuffer(plain, dtype=np.uint8).reshape(600, CHUNK).copy()
                for i, data in rest.items():
                    expected[i] = np.frombuffer(data, dtype=np.uint8)
                assert report.packs == report.packs_live
                assert await read_image(b, "disk") == expected.tobytes()
                assert first - set(world.names("forward/"))

    run(main)


def test_a_snapshot_of_before_keeps_the_forward_and_its_frames(tmp_path: Path) -> None:
    async def main() -> None:
        from novafs.snapshots import take_snapshot

        world = World(tmp_path)
        with world.running():
            plain, _ = await compacted(world)
            async with world.host("a") as volume:
                entry = await volume.catalog.resolve("disk")
                taken = await take_snapshot(volume, entry, "s")
                await write_image(volume, "disk", {i: pattern(7000 + i) for i in range(600)})
                for _ in range(3):
                    world.sleep(2 * HOUR)
                    report = await collect(volume, everything=True)
                assert report.forwards == 1
                view = await volume.open_snapshot(entry.node_id, taken.counter, name="s")
                volume.cache.l1.clear()
                assert await view.read(0, len(plain)) == plain
                await volume.close_image(view)
                await volume.unlink(ROOT_ID, "disk")
                for _ in range(3):
                    world.sleep(2 * HOUR)
                    report = await collect(volume, everything=True)
                assert world.names("forward/") + world.names("packs/") == []

    run(main)


def test_a_forward_of_a_pack_that_is_still_there_is_what_counts(tmp_path: Path) -> None:
    """Killed between the forward and the deletion: readers use the pack, the collector counts the copy."""

    async def main() -> None:
        world = World(tmp_path)
        with world.running():
            async with world.host("a") as volume:
                content = {i: pattern(i) for i in range(40)}
                await write_image(volume, "disk", content)
                content.update({i: pattern(1000 + i) for i in range(30)})
                await write_image(volume, "disk", {i: content[i] for i in range(30)})
                world.sleep(2 * HOUR)

                def kill(operation: str, name: str) -> None:
                    if operation == "create" and name.startswith("condemned/"):
                        raise StoreDeniedError("killed")

                world.stores["a"].hook = kill
                with pytest.raises(StoreDeniedError):
                    await collect(volume)
                world.stores["a"].hook = lambda operation, name: None
                assert len(world.names("forward/")) == 1
                assert await read_image(volume, "disk") == b"".join(content.values())
                world.sleep(2 * HOUR)
                report = await collect(volume)
                assert (report.packs_compacted, report.packs_newly_condemned) == (0, 1)  # it has a forward: it is not kept for dedup
                world.sleep(2 * HOUR)
                assert (await collect(volume)).packs_deleted == 1
                assert await read_image(volume, "disk") == b"".join(content.values())

    run(main)
