"""Reads of an image whose map is not what this volume's writers make, and long reads beside truncations."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
import pytest
import trio

from novafs.catalogtree import ROOT_ID
from novafs.errors import FrameCorruptError, ObjectCorruptError
from novafs.imagemap import MapState
from novafs.imagereader import READ_BATCH_MAX
from tests.support.engine import fresh_volume

CHUNK = 64 << 10


def test_a_chunk_of_another_length_is_an_error_each_time_it_is_read(tmp_path: Path) -> None:
    """As where the superblock of a volume of another chunk size was put in its place: the second read, from L1, was answered."""
    trio.run(_other_length, tmp_path)


async def _other_length(tmp_path: Path) -> None:
    async with fresh_volume(tmp_path) as volume:
        async with volume.pack_writer(cache=False) as writer:
            (short,) = await writer.put([os.urandom(4096)])
            await writer.finish()
        made = await volume.create(ROOT_ID, "odd.raw")
        image = await volume.open_image(made.node_id)
        record = msgspec.structs.replace(image.head, size=CHUNK, top=short, allocated_chunks=1)
        await volume.close_image(image)
        entry = await volume.create(ROOT_ID, "other.raw", generation=msgspec.structs.replace(record, image_id=os.urandom(16)))
        image = await volume.open_image(entry.node_id)
        for _ in range(3):
            assert image.read_nowait(0, 8192) is None
            with pytest.raises(FrameCorruptError, match="4096 bytes, expected 65536"):
                await image.read(0, 8192)
        await volume.close_image(image)


def test_a_long_read_beside_truncation_and_growth_never_shifts_bytes(tmp_path: Path) -> None:
    trio.run(_cut_between_batches, tmp_path)


async def _cut_between_batches(tmp_path: Path) -> None:
    async with fresh_volume(tmp_path, l1__capacity="16MiB") as volume:
        entry = await volume.create(ROOT_ID, "disk.raw")
        image = await volume.open_image(entry.node_id)
        content = os.urandom(4 * READ_BATCH_MAX)
        await image.write(0, content)
        batch, reads = type(image).read, 0

        async def read(offset: int, length: int) -> bytes:
            nonlocal reads
            reads += 1
            if reads == 2:
                await image.resize(READ_BATCH_MAX + 10)
            found = await batch(image, offset, length)
            if reads == 2:
                await image.write(0, content)
            return found

        image.read = read  # type: ignore[method-assign]
        found = await batch(image, 0, len(content))
        assert found == content[: len(found)]
        await volume.close_image(image)


@pytest.mark.parametrize(("chunks", "levels", "top"), [(1, -1, bytes(64)), (5000 << 24, 3, bytes(5000 * 64)), (1, 4, bytes(64))])
def test_a_map_that_no_writer_makes_is_refused(chunks: int, levels: int, top: bytes) -> None:
    with pytest.raises(ObjectCorruptError):
        MapState(chunks, levels, top)
