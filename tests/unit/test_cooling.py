"""Cooling: nothing but the store holds the image afterwards, and other images keep what they have."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import trio

from novafs.catalogtree import ROOT_ID
from novafs.cooling import cool
from novafs.image import Image
from novafs.operations import OPERATIONS
from novafs.volume import Volume
from tests.support.engine import fresh_volume
from tests.support.redis_servers import RedisServer

CHUNK = 64 << 10
CHUNKS = 40


async def made(volume: Volume, name: str, content: bytes) -> Image:
    entry = await volume.create(ROOT_ID, name)
    image = await volume.open_image(entry.node_id)
    await image.write(0, content)
    await image.commit()
    return image


def ids(image: Image) -> list[bytes]:
    found = [image.entry_nowait(index) for index in range(CHUNKS)]
    return [entry[:32] for entry in found if entry is not None]


async def warm(image: Image, content: bytes) -> list[bytes]:
    assert await image.read(0, len(content)) == content
    return ids(image)


def test_a_cooled_image_is_read_from_the_store_and_others_are_as_before(tmp_path: Path) -> None:
    async def main() -> None:
        async with fresh_volume(tmp_path, prefetch=True) as volume:
            one_content, other_content = os.urandom(CHUNKS * CHUNK), os.urandom(CHUNKS * CHUNK)
            one, other = await made(volume, "one", one_content), await made(volume, "other", other_content)
            first, second = await warm(one, one_content), await warm(other, other_content)
            assert len(first) == len(second) == CHUNKS
            await other.write(0, b"not stored yet")
            assert await OPERATIONS["cool"](volume, {"image": "one"}) == {"chunks": CHUNKS, "left": 0}
            assert not any(map(volume.cache.present, first))
            assert one.entry_nowait(0) is None or one.loaded_leaves() == []
            assert all(map(volume.cache.present, second))
            assert other.dirty
            before = volume.cache.statistics().l3_traffic.hits
            assert await one.read(0, len(one_content)) == one_content
            assert volume.cache.statistics().l3_traffic.hits >= before + CHUNKS
            assert await other.read(0, CHUNK) == b"not stored yet" + other_content[14:CHUNK]
            await volume.close_image(one)
            await volume.close_image(other)

    trio.run(main)


def test_what_was_written_is_committed_first_unless_that_is_not_wanted(tmp_path: Path) -> None:
    async def main() -> None:
        async with fresh_volume(tmp_path) as volume:
            image = await made(volume, "one", os.urandom(CHUNKS * CHUNK))
            await image.write(5, b"new")
            assert await cool(volume, image, commit=False) == {"chunks": CHUNKS, "left": 0}
            assert image.dirty
            assert await cool(volume, image) == {"chunks": CHUNKS, "left": 0}
            assert not image.dirty
            assert await image.read(5, 3) == b"new"
            await volume.close_image(image)

    trio.run(main)


def test_an_image_of_holes_and_a_map_of_several_levels_are_cooled(tmp_path: Path) -> None:
    async def main() -> None:
        async with fresh_volume(tmp_path, chunk_size=4096) as volume:
            image = await made(volume, "one", b"")
            assert await cool(volume, image) == {"chunks": 0, "left": 0}
            await image.resize(8 << 30)  # two levels of nodes above the chunks
            content = os.urandom(600 * 4096)
            await image.write(3 << 30, content)
            await image.commit()
            assert await image.read(3 << 30, len(content)) == content
            held = volume.cache.l1.statistics().entries
            assert held >= 600
            assert await cool(volume, image) == {"chunks": 600, "left": 0}
            assert volume.cache.l1.statistics().entries <= held - 600 - 3  # and its nodes
            assert await image.read(3 << 30, len(content)) == content
            await volume.close_image(image)

    trio.run(main)


@pytest.mark.redis
def test_l2_forgets_it_too_and_nothing_else(tmp_path: Path, redis_server: RedisServer) -> None:
    async def main() -> None:
        async with fresh_volume(tmp_path, **{"l2.url": redis_server.url}) as volume:
            l2 = volume.cache.l2
            assert l2 is not None
            contents = [os.urandom(CHUNKS * CHUNK) for _ in range(2)]
            images = [await made(volume, name, content) for name, content in zip(("one", "other"), contents, strict=True)]
            first, second = [await warm(image, content) for image, content in zip(images, contents, strict=True)]
            await volume.cache.wait_idle()
            assert await trio.to_thread.run_sync(l2.contains_many, [*first, *second]) == {*first, *second}
            assert await cool(volume, images[0]) == {"chunks": CHUNKS, "left": 0}
            assert await trio.to_thread.run_sync(l2.contains_many, [*first, *second]) == set(second)
            for image in images:
                await volume.close_image(image)

    trio.run(main)


def test_an_image_that_is_unlearned_is_new_to_prefetch_and_teaches_it_nothing(tmp_path: Path) -> None:
    async def main() -> None:
        async with fresh_volume(tmp_path, prefetch=True) as volume:
            assert volume.prefetcher is not None
            engine = volume.prefetcher.engine
            content = os.urandom(CHUNKS * CHUNK)
            await volume.close_image(await made(volume, "one", content))
            for unlearn in (True, False):
                entry = await volume.catalog.resolve("one")
                image = await volume.open_image(entry.node_id)
                assert await OPERATIONS["cool"](volume, {"image": "one", "unlearn": unlearn}) == {"chunks": CHUNKS, "left": 0}
                for index in (5, 30, 2, 17, 9):
                    assert await image.read(index * CHUNK, 100) == content[index * CHUNK :][:100]
                await volume.close_image(image)
                assert (len(engine.table), len(engine.book)) == (0, 0)  # unlearned once is unlearned until the volume is opened again

    trio.run(main)


def test_an_image_that_was_only_cooled_goes_on_teaching(tmp_path: Path) -> None:
    async def main() -> None:
        async with fresh_volume(tmp_path, prefetch=True) as volume:
            assert volume.prefetcher is not None
            image = await made(volume, "one", os.urandom(CHUNKS * CHUNK))
            await OPERATIONS["cool"](volume, {"image": "one"})
            for index in (5, 30, 2, 17, 9):
                await image.read(index * CHUNK, 100)
            await volume.close_image(image)
            assert len(volume.prefetcher.engine.table) > 0
            assert len(volume.prefetcher.engine.book) == 1

    trio.run(main)
