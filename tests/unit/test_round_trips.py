"""How many requests the store sees before the first byte (design 4), counted on a 1 TiB image."""

from __future__ import annotations

import random
import tracemalloc
from pathlib import Path

import pytest
import trio
import trio.testing

from novafs.catalogtree import ROOT_ID
from novafs.volume import Volume
from tests.support.engine import make_volume, opened

TIB = 1 << 40


def requests(volume: Volume) -> int:
    return sum(operation.requests for operation in volume.client.statistics().by_operation.values())


@pytest.mark.parametrize("chunk_size", [4 << 10, 64 << 10, 1 << 20])
def test_the_first_byte_of_a_tebibyte_takes_five_requests_and_from_a_cold_start_eight(tmp_path: Path, chunk_size: int) -> None:
    """Design 4: five sequential round trips on a mounted volume, seven from a cold mount; there superblock and catalog
    listing go out at the same time, so eight requests are seven round trips."""

    async def main() -> None:
        url = await make_volume(f"file://{tmp_path / 'store'}", chunk_size=chunk_size)
        async with opened(url, tmp_path / "writer") as volume:
            entry = await volume.create(ROOT_ID, "huge.raw")
            image = await volume.open_image(entry.node_id)
            await image.resize(TIB)
            for offset in (0, TIB // 3, TIB - 10):
                await image.write(offset, b"0123456789")
            await volume.close_image(image)
        async with opened(url, tmp_path / "reader", read_only=True) as volume:
            cold = requests(volume)
            assert cold == 3  # superblock, list catalog, catalog
            entry = await volume.catalog.resolve("huge.raw")
            image = await volume.open_image(entry.node_id)
            assert await image.read(TIB // 3, 10) == b"0123456789"
            # List the head, generation, at most two map nodes, data.
            assert requests(volume) - cold <= 5
            await volume.close_image(image)

    trio.run(main)


def test_a_read_that_l1_holds_asks_the_store_nothing_and_takes_no_checkpoint(tmp_path: Path) -> None:
    async def main() -> None:
        url = await make_volume(f"file://{tmp_path / 'store'}")
        async with opened(url, tmp_path / "state") as volume:
            entry = await volume.create(ROOT_ID, "a.raw")
            image = await volume.open_image(entry.node_id)
            await image.write(0, bytes(range(256)) * 4096)
            await image.commit()
            await image.read(0, 1 << 20)
            before = requests(volume)
            with trio.testing.assert_no_checkpoints():
                assert image.read_nowait(70_000, 4096) == (bytes(range(256)) * 4096)[70_000:74_096]
                assert len(await image.read(0, 1 << 20)) == 1 << 20
            assert requests(volume) == before
            await volume.close_image(image)

    trio.run(main)


def test_a_read_that_l1_holds_copies_its_bytes_once_and_a_whole_chunk_not_at_all(tmp_path: Path) -> None:
    """And goes through no thread: it is one call that returns."""

    async def main() -> None:
        url = await make_volume(f"file://{tmp_path / 'store'}")
        async with opened(url, tmp_path / "state") as volume:
            size = volume.chunk_size
            entry = await volume.create(ROOT_ID, "a.raw")
            image = await volume.open_image(entry.node_id)
            await image.write(0, random.Random(1).randbytes(16 * size))
            await image.commit()
            await image.read(0, 16 * size)
            raw = image.entry_nowait(3)
            assert raw is not None
            assert image.read_nowait(3 * size, size) is volume.cache.peek(raw[:32])
            for length in (4096, size // 2, 16 * size):
                image.read_nowait(100, length - 100)  # what is made once is no part of it
                tracemalloc.start()
                try:
                    data = image.read_nowait(100, length - 100)
                    _, peak = tracemalloc.get_traced_memory()
                finally:
                    tracemalloc.stop()
                assert data is not None and len(data) == length - 100
                # A read over several chunks may hold the first one's part and the last one's beside the answer.
                assert peak <= len(data) + (2 * size if length > size else 0) + 4096
            await volume.close_image(image)

    trio.run(main)


def test_a_cold_read_of_neighbours_is_one_range_request_and_no_byte_is_asked_for_twice(tmp_path: Path) -> None:
    async def main() -> None:
        url = await make_volume(f"file://{tmp_path / 'store'}")
        async with opened(url, tmp_path / "writer") as volume:
            size = volume.chunk_size
            entry = await volume.create(ROOT_ID, "a.raw")
            image = await volume.open_image(entry.node_id)
            await image.write(0, random.Random(1).randbytes(16 * size))
            await volume.close_image(image)
        async with opened(url, tmp_path / "reader", read_only=True) as volume:
            entry = await volume.catalog.resolve("a.raw")
            image = await volume.open_image(entry.node_id)
            await image.read(0, 1)  # the map, and one chunk
            before = volume.client.statistics().by_operation["get"]
            assert len(await image.read(0, 16 * size)) == 16 * size
            after = volume.client.statistics().by_operation["get"]
            assert after.requests - before.requests == 1
            assert after.read_bytes - before.read_bytes <= 15 * size + 4096
            await volume.close_image(image)

    trio.run(main)
