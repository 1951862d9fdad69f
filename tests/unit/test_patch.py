"""Small commits that carry their bytes in the generation: what they cost, and that everything that reads a generation sees them."""

from __future__ import annotations

import os
from contextlib import aclosing
from pathlib import Path

import msgspec
import pytest
import trio

from novafs.bulk import export_runs
from novafs.catalogtree import ROOT_ID
from novafs.errors import NewerFormatError, ObjectCorruptError
from novafs.generation import KIND, Generation, generation_chain, generation_prefix
from novafs.image import Image
from novafs.patch import BYTES_MAX, EXTENTS_MAX, MEMORY_MAX, fits
from novafs.record import seal, unseal
from novafs.revisions import revision_name
from novafs.snapshots import clone, roll_back, take_snapshot
from novafs.volume import Volume
from tests.support.engine import fresh_volume, opened

CHUNK = 64 << 10
SIZE = 40 * CHUNK


async def disk(volume: Volume, content: bytes) -> Image:
    """An image with content, committed."""
    entry = await volume.create(ROOT_ID, "disk.raw")
    image = await volume.open_image(entry.node_id)
    await image.write(0, content)
    await image.commit()
    return image


def requests(volume: Volume) -> int:
    return sum(one.requests for one in volume.client.statistics().by_operation.values())


def test_a_small_fsync_to_the_store_is_one_request(tmp_path: Path) -> None:
    async def main() -> None:
        async with fresh_volume(tmp_path, durability="store", writeback__interval="1h") as volume:
            image = await disk(volume, os.urandom(SIZE))
            before = requests(volume)
            for number in range(8):
                await image.write(number * 5 * CHUNK + 512, os.urandom(4096))
                await image.fsync()
            assert requests(volume) - before == 8
            assert len(image.head.patch) == 8
            assert volume.writeback.at_risk.bytes == 0
            await volume.close_image(image)

    trio.run(main)


def test_every_reader_of_a_generation_sees_its_patch(tmp_path: Path) -> None:
    """Another host, clones, snapshots, rollbacks, exports (in what was a hole, too), and the next full commit."""

    async def main() -> None:
        content = bytearray(SIZE)
        content[: 4 * CHUNK] = os.urandom(4 * CHUNK)
        async with fresh_volume(tmp_path, durability="store", writeback__interval="1h") as volume:
            image = await disk(volume, bytes(content))
            for at in (100, 2 * CHUNK - 50, 20 * CHUNK + 7, SIZE - 300):  # the third and fourth lie in holes
                content[at : at + 300] = os.urandom(300)
                await image.write(at, bytes(content[at : at + 300]))
                await image.fsync()
            assert image.head.patch
            entry = await volume.catalog.lookup(ROOT_ID, "disk.raw")
            async with opened(f"file://{tmp_path / 'store'}", tmp_path / "other") as other:
                there = await other.open_image((await other.catalog.lookup(ROOT_ID, "disk.raw")).node_id)
                assert await there.read(0, SIZE) == content
                exported = bytearray(SIZE)
                async with aclosing(export_runs(there)) as runs:
                    async for at, data in runs:
                        exported[at : at + len(data)] = data
                assert exported == content
                await other.close_image(there)
            await take_snapshot(volume, entry, "patched")
            copy = await volume.open_image((await clone(volume, entry, ROOT_ID, "copy.raw")).node_id)
            assert await copy.read(0, SIZE) == content
            assert copy.head.patch
            await copy.write(0, b"mine")
            await copy.commit()
            assert await copy.read(0, SIZE) == b"mine" + content[4:]
            assert not copy.head.patch
            await volume.close_image(copy)
            await image.write(0, bytes(SIZE))
            await volume.close_image(image)
            await roll_back(volume, await volume.catalog.get(entry.node_id), "patched")
            image = await volume.open_image(entry.node_id)
            assert image.head.patch
            assert await image.read(0, SIZE) == content
            await image.resize(20 * CHUNK + 100)
            await image.fsync()
            assert not image.head.patch
            await image.resize(SIZE)
            await image.fsync()
            assert await image.read(0, SIZE) == bytes(content[: 20 * CHUNK + 100]).ljust(SIZE, b"\0")
            await volume.close_image(image)

    trio.run(main)


def test_an_image_grows_by_patches(tmp_path: Path) -> None:
    """One request an fsync from the first write on, wherever it lies; readers elsewhere, and commits in full, have it all."""

    async def main() -> None:
        size = 300 * CHUNK
        content = bytearray(size)
        async with fresh_volume(tmp_path, durability="store", writeback__interval="1h") as volume:
            entry = await volume.create(ROOT_ID, "disk.raw")
            image = await volume.open_image(entry.node_id)
            await image.take_lease()
            before = requests(volume)
            for number, at in enumerate((3 * CHUNK, 2 * CHUNK + 100, 280 * CHUNK, 290 * CHUNK - 50, 7 * CHUNK)):
                content[at : at + 300] = os.urandom(300)
                await image.write(at, bytes(content[at : at + 300]))
                await image.fsync()
                assert requests(volume) - before == number + 1
            await image.resize(size)
            await image.fsync()
            assert requests(volume) - before == 6
            assert len(image.head.patch) == 6  # one lies in two chunks

            async def check() -> None:
                assert await image.read(0, 2 * size) == content
                async with opened(f"file://{tmp_path / 'store'}", tmp_path / "other", read_only=True) as other:
                    there = await other.open_image((await other.catalog.resolve("disk.raw")).node_id)
                    assert await there.read(0, 2 * size) == content
                    await other.close_image(there)

            await check()
            await image.write(0, b"in full")
            content[:7] = b"in full"
            await image.commit()
            assert not image.head.patch
            await check()
            await image.resize(size + 10 * CHUNK)
            await image.write(size + 4 * CHUNK, b"end")
            content += bytes(4 * CHUNK) + b"end" + bytes(6 * CHUNK - 3)
            before = requests(volume)
            await image.fsync()
            assert requests(volume) - before == 1
            await check()
            await volume.close_image(image)

    trio.run(main)


def test_what_is_no_patch_is_committed_in_full(tmp_path: Path) -> None:
    async def main() -> None:
        async with fresh_volume(tmp_path, durability="store", writeback__interval="1h") as volume:
            image = await disk(volume, os.urandom(SIZE))
            await image.write(0, os.urandom(BYTES_MAX + 1))
            await image.fsync()
            assert not image.head.patch
            await image.write(300 * CHUNK, b"more chunks than a map of this depth has")
            await image.fsync()
            assert not image.head.patch
            for number in range(EXTENTS_MAX + 1):
                await image.write(number * 1024, b"x")
            await image.fsync()
            assert not image.head.patch
            await volume.close_image(image)

    trio.run(main)


def test_a_patch_takes_bounded_memory(tmp_path: Path) -> None:
    async def main() -> None:
        async with fresh_volume(tmp_path, chunk_size=1 << 20, durability="store", writeback__interval="1h") as volume:
            entry = await volume.create(ROOT_ID, "disk.raw")
            image = await volume.open_image(entry.node_id)
            await image.resize(100 << 20)
            await image.commit()
            held = []
            for number in range(100):
                await image.write(number << 20, b"x")
                await image.fsync()
                held.append(len(image.head.patch))
            assert max(held) == MEMORY_MAX >> 20
            assert await image.read(99 << 20, 2) == b"x\0"
            await volume.close_image(image)

    trio.run(main)


@pytest.mark.parametrize(
    "patch",
    [
        ((SIZE - 1, b"ab"),),
        ((10, b"ab"), (11, b"cd")),
        ((10, b"ab"), (0, b"cd")),
        ((0, b""),),
        ((-1, b"ab"),),
        tuple((number * 2, b"x") for number in range(EXTENTS_MAX + 1)),
        ((0, bytes(BYTES_MAX + 1)),),
    ],
)
def test_a_patch_that_can_not_be_is_refused(tmp_path: Path, patch: tuple[tuple[int, bytes], ...]) -> None:
    assert not fits(patch, SIZE)

    async def main() -> None:
        async with fresh_volume(tmp_path) as volume:
            image = await disk(volume, bytes(SIZE))
            bad = image.head.successor(patch=patch)
            await volume.client.create(revision_name(generation_prefix(image.node_id), bad.counter), seal(KIND, 2, bad))
            with pytest.raises(ObjectCorruptError, match="patch"):
                await generation_chain(volume.client, image.node_id).head()
            await volume.close_image(image)

    trio.run(main)


def test_a_novafs_that_knows_no_patches_refuses_a_generation_that_has_one(tmp_path: Path) -> None:
    """And reads all others."""

    async def main() -> None:
        async with fresh_volume(tmp_path, durability="store", writeback__interval="1h") as volume:
            image = await disk(volume, os.urandom(SIZE))

            async def as_before() -> Generation:
                name = revision_name(generation_prefix(image.node_id), image.generation)
                return unseal(KIND, 1, await volume.client.get(name), Generation, name)

            assert await as_before() == image.head
            await image.write(0, b"x")
            await image.fsync()
            with pytest.raises(NewerFormatError, match="upgrade"):
                await as_before()
            await image.write(0, b"y")
            await image.commit()
            assert await as_before() == msgspec.structs.replace(image.head, patch=())
            await volume.close_image(image)

    trio.run(main)


def test_bytes_of_a_patch_over_a_hole_are_exported(tmp_path: Path) -> None:
    """Where whole leaves of the map are holes as well."""

    async def main() -> None:
        async with fresh_volume(tmp_path, durability="store") as volume:
            entry = await volume.create(ROOT_ID, "a", mode=0o644, uid=0, gid=0)
            image = await volume.open_image(entry.node_id)
            await image.resize(64 << 20)  # 1024 chunks: one level
            await image.commit()
            at = 40 << 20
            await image.write(at, b"x" * 4096)
            await image.fsync()
            assert image.head.patch
            assert await image.read(at, 4096) == b"x" * 4096
            found = bytearray(64 << 20)
            async with aclosing(export_runs(image)) as runs:
                async for offset, data in runs:
                    found[offset : offset + len(data)] = data
            await volume.close_image(image)
            assert bytes(found[at : at + 4096]) == b"x" * 4096

    trio.run(main)


def test_content_always_has_blocks(tmp_path: Path) -> None:
    """Dirty, in a patch, or in a closed image: GNU tar --sparse takes a file without blocks for one of zeros, unread."""

    async def main() -> None:
        async with fresh_volume(tmp_path, durability="store", writeback__interval="1h") as volume:
            entry = await volume.create(ROOT_ID, "a")
            image = await volume.open_image(entry.node_id)
            await image.resize(1 << 20)
            await image.commit()
            await image.write(4096, b"x" * 4096)
            dirty = (await volume.attributes(entry)).stored_bytes
            await image.fsync()
            assert image.head.patch
            patched = (await volume.attributes(entry)).stored_bytes
            await volume.close_image(image)
            closed = (await volume.attributes(entry)).stored_bytes
            assert (dirty > 0, patched > 0, closed > 0) == (True, True, True)

    trio.run(main)


def test_remembered_heads_take_bounded_memory(tmp_path: Path) -> None:
    """Heads of closed images are kept for stat, and each may carry a patch."""

    async def main() -> None:
        async with fresh_volume(tmp_path, durability="store", writeback__interval="1h") as volume:
            for number in range(100):
                entry = await volume.create(ROOT_ID, f"i{number}")
                image = await volume.open_image(entry.node_id)
                await image.resize(1 << 20)
                await image.commit()
                await image.write(0, os.urandom(256 << 10))
                await image.fsync()
                assert image.head.patch
                assert image.map_bytes >= 256 << 10
                await volume.close_image(image)
            held = sum(len(d) for h in volume._heads.values() for _, d in h.record.patch)
            assert held <= 16 << 20

    trio.run(main)
