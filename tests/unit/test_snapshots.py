"""Snapshots, clones, rollbacks: contents, O(1) cost, refusals; by the library and through the command line."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import trio

from novafs import snapshots
from novafs.catalogtree import ROOT_ID, Entry
from novafs.errors import BusyError, ExistsError, InvalidNameError, IsDirectoryError, NotFoundError
from novafs.volume import Volume
from tests.support.engine import fresh_volume, opened

CHUNK = 4096


async def make(volume: Volume, name: str, data: bytes) -> Entry:
    entry = await volume.create(ROOT_ID, name)
    await put(volume, entry, 0, data)
    return await volume.catalog.get(entry.node_id)


async def put(volume: Volume, entry: Entry, offset: int, data: bytes) -> None:
    image = await volume.open_image(entry.node_id)
    await image.write(offset, data)
    await volume.close_image(image)


async def content(volume: Volume, entry: Entry) -> bytes:
    image = await volume.open_image(entry.node_id)
    try:
        return await image.read(0, 1 << 24)
    finally:
        await volume.close_image(image)


def test_a_clone_shares_all_and_then_goes_its_own_way(tmp_path: Path) -> None:
    """semantics: S14."""
    data = os.urandom(50 * CHUNK + 17)

    async def main() -> None:
        async with fresh_volume(tmp_path, chunk_size=CHUNK) as volume:
            one = await make(volume, "one", data)
            stored = len(await volume.client.list("packs/"))
            two = await snapshots.clone(volume, one, ROOT_ID, "two")
            assert len(await volume.client.list("packs/")) == stored
            assert await content(volume, two) == data
            await put(volume, two, 5, b"changed")
            assert await content(volume, one) == data
            assert (await content(volume, two))[5:12] == b"changed"
            with pytest.raises(ExistsError):
                await snapshots.clone(volume, one, ROOT_ID, "two")

    trio.run(main)


def test_a_clone_of_an_open_image_has_what_was_written_a_moment_ago(tmp_path: Path) -> None:
    """semantics: S14."""

    async def main() -> None:
        async with fresh_volume(tmp_path, chunk_size=CHUNK, writeback__interval="1h") as volume:
            one = await make(volume, "one", b"old" * 5000)
            image = await volume.open_image(one.node_id)
            await image.write(0, b"new")
            two = await snapshots.clone(volume, one, ROOT_ID, "two")
            assert (await content(volume, two))[:6] == b"newold"
            await volume.close_image(image)

    trio.run(main)


def test_snapshots_keep_what_the_image_was_and_rollback_brings_it_back(tmp_path: Path) -> None:
    """semantics: S15."""

    async def main() -> None:
        async with fresh_volume(tmp_path, chunk_size=CHUNK) as volume:
            entry = await make(volume, "disk", b"1" * 30000)
            await snapshots.take_snapshot(volume, entry, "monday")
            await put(volume, entry, 100, b"2" * 50000)
            entry = await volume.catalog.get(entry.node_id)
            await snapshots.take_snapshot(volume, entry, "tuesday")
            entry = await volume.catalog.get(entry.node_id)
            assert sorted(entry.snapshots) == ["monday", "tuesday"]
            monday = await snapshots.snapshot_generation(volume, entry, "monday")
            view = await volume.open_snapshot(entry.node_id, monday.counter, name="disk@monday")
            assert await view.read(0, 1 << 20) == b"1" * 30000
            cloned = await snapshots.clone(volume, entry, ROOT_ID, "from-monday", snapshot="monday")
            assert await content(volume, cloned) == b"1" * 30000
            await snapshots.roll_back(volume, entry, "monday")
            assert await content(volume, entry) == b"1" * 30000
            await snapshots.roll_back(volume, entry, "tuesday")
            assert await content(volume, entry) == b"1" * 100 + b"2" * 50000
            with pytest.raises(ExistsError):
                await snapshots.take_snapshot(volume, entry, "monday")
            await snapshots.delete_snapshot(volume, entry, "monday")
            entry = await volume.catalog.get(entry.node_id)
            with pytest.raises(NotFoundError, match="tuesday"):
                snapshots.find_snapshot(volume, entry, "monday")
        async with opened(f"file://{tmp_path / 'store'}", tmp_path / "other") as volume:
            entry = await volume.catalog.resolve("disk")
            assert list(entry.snapshots) == ["tuesday"]

    trio.run(main)


def test_an_open_image_is_not_rolled_back_and_a_directory_is_no_image(tmp_path: Path) -> None:
    """semantics: S15."""

    async def main() -> None:
        async with fresh_volume(tmp_path, chunk_size=CHUNK) as volume:
            entry = await make(volume, "disk", b"1" * 30000)
            await snapshots.take_snapshot(volume, entry, "s")
            entry = await volume.catalog.get(entry.node_id)
            image = await volume.open_image(entry.node_id)
            with pytest.raises(BusyError, match="open"):
                await snapshots.roll_back(volume, entry, "s")
            await volume.close_image(image)
            folder = await volume.mkdir(ROOT_ID, "folder")
            with pytest.raises(IsDirectoryError):
                await snapshots.take_snapshot(volume, folder, "s")
            with pytest.raises(InvalidNameError):
                await snapshots.take_snapshot(volume, entry, "a/b")

    trio.run(main)


def test_the_cost_does_not_grow_with_the_image(tmp_path: Path) -> None:
    """semantics: S14. Counted, not timed: requests for a snapshot and a clone of 4 MiB and of 1 TiB."""

    async def requests_for(volume: Volume, name: str, size: int) -> int:
        entry = await make(volume, name, b"x" * CHUNK)
        image = await volume.open_image(entry.node_id)
        await image.resize(size)
        await image.write(size - 5, b"12345")
        await volume.close_image(image)
        entry = await volume.catalog.get(entry.node_id)
        before = sum(o.requests for o in volume.client.statistics().by_operation.values())
        await snapshots.take_snapshot(volume, entry, "s")
        await snapshots.clone(volume, entry, ROOT_ID, f"{name}-clone")
        return sum(o.requests for o in volume.client.statistics().by_operation.values()) - before

    async def main() -> None:
        async with fresh_volume(tmp_path, chunk_size=64 << 10) as volume:
            assert await requests_for(volume, "small", 4 << 20) == await requests_for(volume, "large", 1 << 40)

    trio.run(main)
