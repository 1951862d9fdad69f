"""Directories whose entries are long: every page stays small enough to be read back, or the change is refused."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
import pytest
import trio

from novafs.catalog import Changes
from novafs.catalogtree import PAGE_BYTES, ROOT_ID, Entry, Kind, Snapshot, encode_entries, page_bounds
from novafs.errors import TooLargeError
from tests.support.engine import fresh_volume, make_volume, opened

XATTR_BYTES = 60_000


def entries(count: int, xattr_bytes: int) -> list[Entry]:
    xattrs = {"user.a": bytes(xattr_bytes)}
    return [Entry(f"{n:06}", os.urandom(16), Kind.IMAGE, 0o644, 0, 0, 0, 0, 0, xattrs=xattrs) for n in range(count)]


def test_a_directory_of_images_with_large_attributes_is_read_back(tmp_path: Path) -> None:
    """More than one frame may hold in what was one page: it was stored, and nobody could open the volume again."""
    trio.run(_large_attributes, tmp_path)


async def _large_attributes(tmp_path: Path) -> None:
    url = await make_volume(f"file://{tmp_path / 'store'}")
    made = entries(90, XATTR_BYTES)
    async with opened(url, tmp_path / "state") as volume:

        async def add(changes: Changes) -> None:
            await changes.entries(ROOT_ID)
            for entry in made:
                changes.set(msgspec.structs.replace(entry, xattrs={"user.a": os.urandom(XATTR_BYTES)}))

        await volume.catalog.change(add)
    async with opened(url, tmp_path / "other") as volume:
        assert [e.name for e in await volume.catalog.list(ROOT_ID)] == [e.name for e in made]


def test_pages_are_cut_by_bytes_and_never_empty() -> None:
    for count, size in ((1, 2 * PAGE_BYTES), (5, 2 * PAGE_BYTES), (300, 5_000), (3000, 0)):
        made = entries(count, size)
        bounds = page_bounds(made)
        assert [b[0] for b in bounds] == [0, *(b[1] for b in bounds[:-1])]
        assert bounds[-1][1] == count
        for start, end in bounds:
            assert end > start
            assert end - start == 1 or len(encode_entries(made[start:end])) < 2 * PAGE_BYTES


def test_an_entry_that_could_not_be_read_back_is_refused_and_costs_nothing(tmp_path: Path) -> None:
    trio.run(_too_long_an_entry, tmp_path)


async def _too_long_an_entry(tmp_path: Path) -> None:
    async with fresh_volume(tmp_path) as volume:
        made = await volume.create(ROOT_ID, "much.raw")
        many = {f"{n:0200}": Snapshot(0, 0, 0) for n in range(22_000)}
        with pytest.raises(TooLargeError, match="delete snapshots"):
            await volume.catalog.update(made.node_id, lambda entry: msgspec.structs.replace(entry, snapshots=many))
        await volume.create(ROOT_ID, "next.raw")
        assert not (await volume.catalog.get(made.node_id)).snapshots
