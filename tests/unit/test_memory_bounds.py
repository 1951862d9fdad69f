"""What is held beside L1 does not grow with the size of an image or of the volume (design 5.9)."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio

from novafs import dedup, packwriter
from novafs.bulk import import_stream
from novafs.catalogtree import ROOT_ID
from novafs.chunk import ChunkId, PackId, Reference
from novafs.dedup import DedupIndex, Deduplicator
from novafs.packwriter import PackWriter
from novafs.snapshots import take_snapshot
from novafs.volume import Volume
from tests.support.engine import fresh_volume

CHUNK = 4096


@pytest.mark.parametrize("dedup_on", ["true", "false"])
def test_an_import_remembers_only_the_latest_places_and_stores_every_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dedup_on: str
) -> None:
    monkeypatch.setattr(packwriter, "PLACED_MAX", 50)
    monkeypatch.setattr("novafs.bulk.BATCH_BYTES", 8 * CHUNK)
    monkeypatch.setattr("novafs.pack.FRAMES_MAX", 10)
    most = 0
    append = PackWriter.append

    async def watched(self: PackWriter, prepared: list[packwriter.Prepared]) -> list[bytes]:
        nonlocal most
        found = await append(self, prepared)
        most = max(most, len(self._placed))
        return found

    monkeypatch.setattr(PackWriter, "append", watched)
    once = os.urandom(300 * CHUNK)
    content = once + once[: 200 * CHUNK] + once[: 10 * CHUNK] * 20

    async def source() -> AsyncIterator[tuple[int, bytes]]:
        for at in range(0, len(content), 64 * CHUNK):
            yield at, content[at : at + 64 * CHUNK]

    async def main() -> None:
        async with fresh_volume(tmp_path, chunk_size=CHUNK, dedup=dedup_on) as volume:
            result = await import_stream(volume, ROOT_ID, "disk.raw", source(), size=len(content))
            image = await volume.open_image((await volume.catalog.resolve("disk.raw")).node_id)
            assert await image.read(0, len(content)) == content
            await volume.close_image(image)
            if dedup_on == "true":
                assert result.new_chunks == 300
            assert most <= 50

    trio.run(main)


def test_footers_that_are_remembered_are_bounded_in_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dedup, "VERIFIED_ROWS_MAX", 100)

    async def main() -> None:
        async with fresh_volume(tmp_path) as volume:
            index = DedupIndex(tmp_path / "d.sqlite")
            one = Deduplicator(index, volume.client)
            for number in range(40):
                pack_id = PackId((number % 30).to_bytes(16, "big"))
                one.note_verified(pack_id, [Reference(ChunkId(os.urandom(32)), pack_id, 0, 1, 0) for _ in range(17)], 1.0)
                assert one._verified_rows == sum(len(rows) for _, rows in one._verified.values()) <= 100
            assert len(one._verified) == 5
            index.close()

    trio.run(main)


def test_the_maps_of_open_snapshots_are_counted_and_trimmed(tmp_path: Path) -> None:
    """semantics: S18."""

    async def main() -> None:
        async with fresh_volume(tmp_path, chunk_size=CHUNK, l1__capacity="32MiB") as volume:
            await _read_a_snapshot(volume)

    trio.run(main)


async def _read_a_snapshot(volume: Volume) -> None:
    entry = await volume.create(ROOT_ID, "disk.raw")
    image = await volume.open_image(entry.node_id)
    leaf = 256 * CHUNK
    for number in range(400):
        await image.write(number * leaf, b"x")
    await image.commit()
    taken = await take_snapshot(volume, entry, "one")
    await volume.close_image(image)
    view = await volume.open_snapshot(entry.node_id, taken.counter, name="one")
    for number in range(400):
        assert await view.read(number * leaf, 1) == b"x"
    assert view.map_bytes > 6 << 20
    volume._trim_maps()
    assert view.map_bytes < 4 << 20
    assert volume.statistics()["map_bytes"] >= view.map_bytes
    await volume.close_image(view)
