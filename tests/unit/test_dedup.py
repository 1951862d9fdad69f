"""The dedup index may be stale, damaged, lost or full; its answers are checked against the packs all the same."""

from __future__ import annotations

import os
import sqlite3
from pathlib import Path

import pytest
import trio

from novafs.catalogtree import ROOT_ID
from novafs.chunk import ChunkId, PackId, Reference, chunk_id
from novafs.dedup import DedupIndex
from novafs.pack import pack_name
from novafs.volume import Volume
from tests.support.engine import fresh_volume, make_volume, opened

CHUNK = 4096


def reference(number: int) -> Reference:
    return Reference(ChunkId(number.to_bytes(32, "big")), PackId(os.urandom(16)), 80, 100, 4)


def test_what_was_recorded_is_found_and_what_was_forgotten_is_not(tmp_path: Path) -> None:
    index = DedupIndex(tmp_path / "d.sqlite")
    references = [reference(n) for n in range(1200)]
    index.record(references, [references[0].pack_id])
    found = index.lookup([r.chunk_id for r in references])
    assert found == {r.chunk_id: r for r in references}
    index.forget([references[5].chunk_id], references[0].pack_id)
    assert references[5].chunk_id not in index.lookup([references[5].chunk_id])
    assert index.unknown_packs([references[0].pack_id]) == [references[0].pack_id]
    assert len(index) == 1199
    index.close()


def test_a_full_index_forgets_a_part_of_the_key_space(tmp_path: Path) -> None:
    index = DedupIndex(tmp_path / "d.sqlite", chunks_max=1000)
    for _ in range(10):
        index.record([Reference(ChunkId(os.urandom(32)), PackId(bytes(16)), 0, 1, 0) for _ in range(300)])
    assert 0 < len(index) <= 1000
    index.close()


@pytest.mark.parametrize("damage", [b"", b"garbage" * 1000, None])
def test_a_damaged_file_is_replaced_by_an_empty_index(tmp_path: Path, damage: bytes | None) -> None:
    path = tmp_path / "d.sqlite"
    index = DedupIndex(path)
    index.record([reference(n) for n in range(5000)])
    index.close()
    if damage is None:
        raw = bytearray(path.read_bytes())
        raw[4096:12288] = os.urandom(8192)
        path.write_bytes(raw)
    else:
        path.write_bytes(damage)
    index = DedupIndex(path)
    index.lookup([reference(n).chunk_id for n in range(5000)])
    index.record([reference(1)])
    assert reference(1).chunk_id in index.lookup([reference(1).chunk_id])
    index.close()


def test_a_row_that_was_altered_is_not_believed(tmp_path: Path) -> None:
    index = DedupIndex(tmp_path / "d.sqlite")
    one = reference(1)
    index.record([one])
    index.close()
    with sqlite3.connect(tmp_path / "d.sqlite") as connection:
        (place,) = connection.execute("SELECT place FROM chunk").fetchone()
        connection.execute("UPDATE chunk SET place = ?", (bytes([place[0] ^ 1]) + place[1:],))
    connection.close()
    index = DedupIndex(tmp_path / "d.sqlite")
    assert index.lookup([one.chunk_id]) == {}
    index.close()


async def _write(volume: Volume, name: str, data: bytes) -> bytes:
    entry = await volume.create(ROOT_ID, name)
    image = await volume.open_image(entry.node_id)
    await image.write(0, data)
    await image.commit()
    await volume.close_image(image)
    return entry.node_id


async def _read(volume: Volume, name: str) -> bytes:
    image = await volume.open_image((await volume.catalog.resolve(name)).node_id)
    try:
        return await image.read(0, 1 << 20)
    finally:
        await volume.close_image(image)


def test_the_same_content_is_stored_once_across_images(tmp_path: Path) -> None:
    data = os.urandom(20 * CHUNK)

    async def main() -> None:
        async with fresh_volume(tmp_path, chunk_size=CHUNK) as volume:
            await _write(volume, "one", data)
            before = sum(i.size for i in await volume.client.list("packs/"))
            await _write(volume, "two", data)
            after = sum(i.size for i in await volume.client.list("packs/"))
            assert after == before

    trio.run(main)


def test_an_index_that_was_lost_fills_again_from_footers(tmp_path: Path) -> None:
    data = os.urandom(20 * CHUNK)

    async def main() -> None:
        async with fresh_volume(tmp_path, chunk_size=CHUNK) as volume:
            await _write(volume, "one", data)
        async with opened(f"file://{tmp_path / 'store'}", tmp_path / "other-state") as volume:
            assert await volume.dedup.fill() > 0
            assert await volume.dedup.fill() == 0
            assert len(await volume.dedup.find([chunk_id(data[:CHUNK])])) == 1

    trio.run(main)


def test_a_stale_answer_never_makes_a_reference_to_a_pack_that_is_gone(tmp_path: Path) -> None:
    """design 5.8: the index says where a chunk was; the pack has gone since. The chunk is stored again."""
    data = os.urandom(5 * CHUNK)

    async def main() -> None:
        async with fresh_volume(tmp_path, chunk_size=CHUNK) as volume:
            await _write(volume, "one", data)
        url = f"file://{tmp_path / 'store'}"
        async with opened(url, tmp_path / "state") as volume:
            lost = (await volume.dedup.find([chunk_id(data[:CHUNK])]))[chunk_id(data[:CHUNK])]
            await volume.client.delete(pack_name(lost.pack_id))
        async with opened(url, tmp_path / "state") as volume:
            await _write(volume, "two", data)
        async with opened(url, tmp_path / "third") as volume:
            assert await _read(volume, "two") == data

    trio.run(main)


def test_a_pack_that_lists_another_place_is_not_believed(tmp_path: Path) -> None:
    data = os.urandom(5 * CHUNK)

    async def main() -> None:
        async with fresh_volume(tmp_path, chunk_size=CHUNK) as volume:
            await _write(volume, "one", data)
            wanted = chunk_id(data[:CHUNK])
            right = (await volume.dedup.find([wanted]))[wanted]
            volume.dedup.index.record([right._replace(offset=right.offset + 1)])
            assert await volume.dedup.find([wanted]) == {}
            await _write(volume, "two", data)
        async with opened(f"file://{tmp_path / 'store'}", tmp_path / "second") as volume:
            assert await _read(volume, "two") == data

    trio.run(main)


def test_dedup_can_be_switched_off(tmp_path: Path) -> None:
    async def main() -> None:
        url = await make_volume(f"file://{tmp_path / 'store'}", chunk_size=CHUNK)
        async with opened(url, tmp_path / "state", dedup="false") as volume:
            await _write(volume, "one", b"x" * CHUNK)
            await _write(volume, "two", b"x" * CHUNK)
            assert len(await volume.client.list("packs/")) == 2

    trio.run(main)
