"""What things cost as volumes grow, counted: requests, bytes, names and rows; `tests/bench/scale.py` measures the same as time."""

from __future__ import annotations

import os
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trio

from novafs import catalogtree, dedup, retention
from novafs import volume as volume_module
from novafs.asynctools import for_each
from novafs.catalogtree import ROOT_ID, Entry
from novafs.chunk import REFERENCE_DTYPE, ChunkId, PackId, Reference
from novafs.config import load_config
from novafs.dedup import DedupIndex
from novafs.errors import BugError
from novafs.forward import among
from novafs.fsck import check
from novafs.gc import collect
from novafs.snapshots import clone, roll_back, take_snapshot
from novafs.statedir import StateLock
from novafs.volume import Volume, open_volume
from tests.support.engine import FLAGS, make_volume, opened
from tests.support.fixtures import run
from tests.support.made_volumes import CountingStore, content, make_directory, mapped, name_image, store_chunks

CHUNK = 65536
GIB = 1 << 30
TIB = 1 << 40
DAY_S = 86_400.0


@asynccontextmanager
async def counted(directory: Path, name: str, *, ahead_s: float = 0.0) -> AsyncIterator[tuple[Volume, CountingStore]]:
    """A host with nothing in memory, that may write."""
    store = CountingStore(directory / "store")
    store.ahead_s = ahead_s
    state_dir = directory / name
    state_dir.mkdir(exist_ok=True)
    config = load_config(store.url, flags={**FLAGS, "state_dir": str(state_dir)}, environ={})
    lock = StateLock.take(state_dir, mountpoint="tests")
    try:
        async with open_volume(config, owns_state=True, store=store) as volume:
            yield volume, store
    finally:
        lock.release()


async def cost(store: CountingStore, work: Callable[[], Awaitable[Any]]) -> tuple[int, int]:
    """Requests, and bytes read and written."""
    store.reset()
    await work()
    return store.count, store.read_bytes + store.written_bytes


# -- images -------------------------------------------------------------------------------------------------------


async def image_costs(directory: Path, name: str) -> dict[str, tuple[int, int]]:
    costs: dict[str, tuple[int, int]] = {}

    async def opening(volume: Volume) -> None:
        await volume.close_image(await volume.open_image((await volume.catalog.resolve(name)).node_id))

    async def reading(volume: Volume) -> None:
        image = await volume.open_image((await volume.catalog.resolve(name)).node_id)
        assert await image.read(0, CHUNK) == content(0, CHUNK)
        await volume.close_image(image)

    async def cloning(volume: Volume) -> None:
        await clone(volume, await volume.catalog.resolve(name), ROOT_ID, f"{name}-clone")

    async def snapshotting(volume: Volume) -> None:
        await take_snapshot(volume, await volume.catalog.resolve(name), "s")

    async def rolling_back(volume: Volume) -> None:
        await roll_back(volume, await volume.catalog.resolve(name), "s")

    for work in (opening, reading, cloning, snapshotting, rolling_back):
        async with counted(directory, f"{name}-{work.__name__}") as (volume, store):
            costs[work.__name__] = await cost(store, partial(work, volume))
    return costs


def test_a_tebibyte_is_opened_read_cloned_and_snapshotted_like_a_gibibyte(tmp_path: Path) -> None:
    """The same requests, but for one map level in the first read; a clone of a tebibyte sends its top, and no more."""

    async def main() -> None:
        url = await make_volume(f"file://{tmp_path / 'store'}")
        async with opened(url, tmp_path / "maker") as volume:
            rows = await store_chunks(volume, 0, 1024)
            await name_image(volume, ROOT_ID, "small", await mapped(volume, rows, size=GIB))
            await name_image(volume, ROOT_ID, "full", await mapped(volume, rows, size=16 * GIB))
            await name_image(volume, ROOT_ID, "huge", await mapped(volume, rows, every=TIB // CHUNK // len(rows)))
            assert (await volume.catalog.resolve("huge")).size == TIB
        small, full, huge = [await image_costs(tmp_path, name) for name in ("small", "full", "huge")]
        top_bytes = 256 * 64
        for others in (full, huge):
            for what, (requests, moved) in others.items():
                assert requests <= small[what][0] + (what == "reading"), (what, others, small)
                assert moved <= small[what][1] + 3 * top_bytes, (what, others, small)

    run(main)


# -- directories --------------------------------------------------------------------------------------------------


def test_a_change_in_a_directory_costs_its_page_however_many_names_there_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests stay the same, on this host and on one that looks at another's change; so do the names that are written and read,
    within the sizes that pages have (256 on average, 2,048 at most)."""
    names = {"written": 0, "read": 0}
    encode, decode = catalogtree.encode_entries, catalogtree.decode_entries

    def encoding(entries: list[Entry]) -> bytes:
        names["written"] += len(entries)
        return encode(entries)

    def decoding(data: bytes, where: str) -> list[Entry]:
        found = decode(data, where)
        names["read"] += len(found)
        return found

    monkeypatch.setattr(catalogtree, "encode_entries", encoding)
    monkeypatch.setattr(catalogtree, "decode_entries", decoding)

    async def costs(entries: int) -> dict[str, tuple[int, int]]:
        directory = tmp_path / str(entries)
        directory.mkdir()
        url = await make_volume(f"file://{directory / 'store'}")
        found: dict[str, tuple[int, int]] = {}
        async with opened(url, directory / "maker") as volume:
            many = (await make_directory(volume, "many", entries, empty=False)).node_id
        async with counted(directory, "here") as (here, store), counted(directory, "there") as (there, there_store):
            assert len(await here.catalog.list((await here.catalog.resolve("many")).node_id)) == entries
            assert len(await there.catalog.list((await there.catalog.resolve("many")).node_id)) == entries
            await here.create(many, "the-first")  # loads what a host loads once
            await there.catalog.lookup(many, "the-first", max_age_s=0)
            names.update(written=0, read=0)
            for number in range(3):
                found[f"create {number}"] = await cost(store, partial(here.create, many, f"vm-{number}new"))
                seen = partial(there.catalog.lookup, many, f"vm-{number}new", max_age_s=0)
                found[f"look {number}"] = await cost(there_store, seen)
            found["rename"] = await cost(store, partial(here.rename, many, "vm-0new", many, "zz"))
            found["unlink"] = await cost(store, partial(here.unlink, many, "zz"))
            assert names["written"] < 6 * 2048
            assert names["read"] < 4 * 2048
            assert len(await there.catalog.list(many, max_age_s=0)) == entries + 3
        return found

    async def main() -> None:
        few, many = await costs(1_000), await costs(16_000)
        for what, (requests, moved) in many.items():
            assert requests <= few[what][0] + 1, (what, few, many)
            # 60 pages more to name, and a page may be 8 times the average.
            assert moved <= few[what][1] + 60 * 200 + 2048 * 60, (what, few, many)

    run(main)


def test_images_that_expire_together_leave_in_one_commit(tmp_path: Path) -> None:
    async def main() -> None:
        url = await make_volume(f"file://{tmp_path / 'store'}")
        async with opened(url, tmp_path / "maker") as volume:
            await make_directory(volume, "one", 40, expires_s=1.0)
            await make_directory(volume, "two", 40, expires_s=1.0)
            stays = await volume.create(ROOT_ID, "stays")
            before = volume.catalog.revision
            report = await collect(volume)
            assert sorted(report.expired) == sorted(f"{name}/vm-{number:06}.raw" for name in ("one", "two") for number in range(40))
            assert volume.catalog.revision == before + 1
            assert [e.name for e in await volume.catalog.list((await volume.catalog.resolve("one")).node_id)] == []
            assert (await volume.catalog.resolve("stays")).node_id == stays.node_id

    run(main)


# -- collection and check -----------------------------------------------------------------------------------------


async def upkeep_costs(directory: Path, chunks: int) -> dict[str, tuple[int, int]]:
    directory.mkdir()
    url = await make_volume(f"file://{directory / 'store'}")
    per_image = 1024
    async with opened(url, directory / "maker") as volume:
        rows = await store_chunks(volume, 0, chunks, frames=32)
        for first in range(0, chunks, per_image):
            await name_image(volume, ROOT_ID, f"i{first:08}", await mapped(volume, rows[first : first + per_image]))
    found: dict[str, tuple[int, int]] = {}

    async def collected(volume: Volume, *, dry_run: bool, packs: int, references: int) -> None:
        report = await collect(volume, dry_run=dry_run, everything=True)
        assert report.complete
        assert (report.packs_live >= packs, report.references) == (True, references)

    async with counted(directory, "dry") as (volume, store):
        found["dry run"] = await cost(store, lambda: collected(volume, dry_run=True, packs=chunks // 32, references=chunks))
        assert not (await check(volume)).problems
        found["check"] = await cost(store, partial(check, volume))
        for number, entry in enumerate(await volume.catalog.list(ROOT_ID)):
            if number % 2:
                await volume.unlink(ROOT_ID, entry.name)
    for what, days in (("first pass", 2), ("second pass", 4), ("nothing to do", 6)):
        async with counted(directory, what, ahead_s=days * DAY_S) as (volume, store):
            work = partial(collected, volume, dry_run=False, packs=chunks // 64, references=chunks // 2)
            found[what] = await cost(store, work)
    async with counted(directory, "after") as (volume, _):
        assert not (await check(volume)).problems
    return found


def test_twice_the_chunks_cost_a_collection_and_a_check_at_most_twice_the_requests(tmp_path: Path) -> None:
    """A constant beside, for what every run lists; a look at each pack is the largest part."""

    async def main() -> None:
        small, large = await upkeep_costs(tmp_path / "small", 4_096), await upkeep_costs(tmp_path / "large", 8_192)
        for what, (requests, moved) in large.items():
            assert requests <= 2 * small[what][0] + 8, (what, small, large)
            assert moved <= 2.1 * small[what][1] + 65_536, (what, small, large)

    run(main)


def test_rows_that_wait_are_sorted_a_few_times_however_many_follow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retention, "MERGE_ROWS", 64)
    queue, sorted_rows, merge = retention._Queue(), 0, retention._Queue._merge

    def merging(self: retention._Queue) -> None:
        nonlocal sorted_rows
        sorted_rows += sum(len(rows) for rows in self._rows)
        merge(self)

    monkeypatch.setattr(retention._Queue, "_merge", merging)
    different, times = 20_000, 2
    raw = os.urandom(64 * different)
    every = np.frombuffer(raw, dtype=REFERENCE_DTYPE)
    for _ in range(times):
        for start in range(0, different, 50):
            part = every[start : start + 50]
            queue.add(part, np.ones(len(part), dtype=np.int64))
    found = list(queue.drain())
    assert sum(len(rows) for rows, _ in found) == different
    assert {int(weight) for _, weights in found for weight in weights} == {times}
    assert sorted_rows <= 6 * different * times


def test_maps_that_a_collection_reads_do_not_stay_in_l1_and_those_of_guests_do(tmp_path: Path) -> None:
    async def main() -> None:
        url = await make_volume(f"file://{tmp_path / 'store'}")
        async with opened(url, tmp_path / "maker") as volume:
            rows = await store_chunks(volume, 0, 2048)
            for number in range(2):
                await name_image(volume, ROOT_ID, f"i{number}", await mapped(volume, rows[number * 1024 : number * 1024 + 1024]))
        async with counted(tmp_path, "here") as (volume, _):
            image = await volume.open_image((await volume.catalog.resolve("i0")).node_id)
            await image.read(0, CHUNK)
            nodes = {
                name: (await volume.open_image((await volume.catalog.resolve(name)).node_id)).head.map_state(CHUNK) for name in ("i0", "i1")
            }
            ids = {name: [node.chunk_id for node in state.node_references()] for name, state in nodes.items()}
            assert volume.cache.present(ids["i0"][0])
            assert (await collect(volume, dry_run=True)).references == 2048
            assert not (await check(volume)).problems
            await volume.cache.wait_idle()
            assert volume.cache.present(ids["i0"][0])
            assert [i for i in (*ids["i0"][1:], *ids["i1"]) if volume.cache.present(i)] == []

    run(main)


def test_names_are_found_among_sorted_ones_as_numpy_finds_them() -> None:
    dice = np.random.default_rng(5)
    for many in (0, 1, 7, 300):
        ids = [bytes(dice.integers(0, 2, 16, dtype=np.uint8)) for _ in range(many)]
        wanted = np.array(sorted(ids[: many // 2]), dtype="S16")
        names = np.array([*ids, bytes(16), b"\xff" * 16], dtype="S16")
        assert among(names, wanted).tolist() == np.isin(names, wanted).tolist()


def test_work_on_many_items_takes_few_tasks_and_raises_the_first_error() -> None:
    async def main() -> None:
        running = peak = 0
        done: list[int] = []

        async def work(item: int) -> None:
            nonlocal running, peak
            running += 1
            peak = max(peak, running, trio.lowlevel.current_statistics().tasks_living)
            await trio.lowlevel.checkpoint()
            running -= 1
            done.append(item)
            if item == 5000:
                raise BugError("the five thousandth")

        before = trio.lowlevel.current_statistics().tasks_living
        await for_each(range(1000), work, at_once=4)
        assert sorted(done) == list(range(1000))
        assert peak <= before + 4
        with pytest.raises(BugError, match="thousandth"):
            await for_each(range(10_000), work, at_once=4)
        assert len(done) < 1000 + 5010

    run(main)


# -- what hosts do with the list of all packs ---------------------------------------------------------------------


def references(count: int) -> list[Reference]:
    return [Reference(ChunkId(secrets.token_bytes(32)), PackId(bytes(16)), 0, 1, 0) for _ in range(count)]


def test_a_dedup_index_is_opened_without_counting_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = DedupIndex(tmp_path / "d.sqlite", chunks_max=3000)
    index.record(references(2000))
    index.close()
    counts = 0
    count = dedup._count

    def counting(connection: Any) -> int:
        nonlocal counts
        counts += 1
        return count(connection)

    monkeypatch.setattr(dedup, "_count", counting)
    index = DedupIndex(tmp_path / "d.sqlite", chunks_max=3000)
    assert counts == 0
    assert index.has_room()
    for _ in range(20):
        index.record(references(100))
    assert counts <= 20  # where it is not certain that it fits, and after rows have left
    assert 1500 < len(index) <= 3000
    index.record(references(3000 - len(index)))
    assert not index.has_room()
    index.close()


def test_filling_the_index_costs_a_bounded_listing_and_reaches_every_pack_in_the_end(tmp_path: Path) -> None:
    async def main() -> None:
        url = await make_volume(f"file://{tmp_path / 'store'}")
        async with opened(url, tmp_path / "maker") as volume:
            await store_chunks(volume, 0, 64, frames=2)
        async with counted(tmp_path, "here") as (volume, store):
            read = [await volume.dedup.fill(packs_max=3, listed_max=10) for _ in range(3)]
            assert read == [3, 3, 3]
            store.reset()
            assert await volume.dedup.fill(packs_max=100, listed_max=10) == 10
            assert store.requests["list"] == 1
            for _ in range(4):
                await volume.dedup.fill(packs_max=100, listed_max=10)
            assert len(volume.dedup.index) == 64
            assert await volume.dedup.fill() == 0
            volume.dedup.index._chunks_max = 60  # full
            store.reset()
            assert await volume.dedup.fill() == 0
            assert store.count == 0

    run(main)


def test_an_index_with_room_is_not_taken_for_full_by_the_size_of_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row takes more of the file than its 61 bytes: what is half full seems almost full; it is counted then, once."""
    index = DedupIndex(tmp_path / "d.sqlite", chunks_max=100_000)
    index.record(references(2000))
    index.close()
    index = DedupIndex(tmp_path / "d.sqlite", chunks_max=100_000)
    index._chunks_max = index._rows_max + 1  # so the estimate is within the last sixteenth
    assert len(index) < index._room < index._rows_max
    assert index.has_room()
    monkeypatch.setattr(dedup, "_count", None)
    assert index.has_room()
    index.close()


def test_use_of_a_large_volume_is_what_the_last_collection_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(volume_module, "USAGE_PACKS_MAX", 10)

    async def main() -> None:
        url = await make_volume(f"file://{tmp_path / 'store'}")
        async with opened(url, tmp_path / "maker") as volume:
            rows = await store_chunks(volume, 0, 64, frames=2)
            await name_image(volume, ROOT_ID, "a", await mapped(volume, rows))
            listed = sum(info.size for info in await volume.client.list("packs/"))
            assert (await volume.usage()).used_bytes == listed  # nobody has collected yet
            assert (await collect(volume)).stored_bytes == listed
        async with counted(tmp_path, "here") as (volume, store):
            assert (await volume.usage()).used_bytes == listed
            assert store.requests["list"] <= 4  # the catalog, the first packs, the last collection

    run(main)
