"""Trees of directories that are deep, that hosts turn upside down, or that no NovaFS has written."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
import pytest
import trio

from novafs.catalog import Changes
from novafs.catalogtree import ROOT_ID, Entry, Kind
from novafs.errors import ObjectCorruptError
from tests.support.engine import make_volume, opened

DEPTH = 500
"""Deeper than what recursion gets to in Python: mkdirat(2) knows no limit."""


def directory(name: str, parent_id: bytes, node_id: bytes | None = None) -> Entry:
    return Entry(name, node_id or os.urandom(16), Kind.DIRECTORY, 0o755, 0, 0, 0, 0, 0, parent_id=parent_id)


def test_a_tree_may_be_as_deep_as_anybody_likes(tmp_path: Path) -> None:
    """RecursionError in walk ended ls, info and gc, and every look below."""
    trio.run(_deep, tmp_path)


async def _deep(tmp_path: Path) -> None:
    url = await make_volume(f"file://{tmp_path / 'store'}")
    async with opened(url, tmp_path / "state") as volume:
        at = ROOT_ID
        for _ in range(DEPTH // 50):

            async def add(changes: Changes, start: bytes = at) -> bytes:
                for _ in range(50):
                    await changes.entries(start)
                    made = directory("d", start)
                    changes.set(made)
                    start = made.node_id
                return start

            at = await volume.catalog.change(add)
        assert len([entry async for entry in volume.catalog.walk()]) == DEPTH
    async with opened(url, tmp_path / "other") as volume:
        found = [entry async for entry in volume.catalog.walk()]
        assert len(found) == DEPTH
        assert (await volume.catalog.get(found[-1].node_id)).name == "d"
        await volume.rmdir(found[-2].node_id, "d")


def test_directories_that_change_places_are_found(tmp_path: Path) -> None:
    """x/y became y/x elsewhere: what was below x was "removed" here, and an image open there lost its links for good."""
    trio.run(_swapped, tmp_path)


async def _swapped(tmp_path: Path) -> None:
    url = await make_volume(f"file://{tmp_path / 'store'}")
    async with opened(url, tmp_path / "a") as here, opened(url, tmp_path / "b") as there:
        x = await here.mkdir(ROOT_ID, "x")
        y = await here.mkdir(x.node_id, "y")
        made = await here.create(y.node_id, "disk.raw")
        for _ in range(3):
            for parent, node, other in ((x, y, x), (y, x, y)):
                await there.catalog.refresh()
                await there.catalog.list(ROOT_ID)
                await there.catalog.list(parent.node_id)
                await there.rename(parent.node_id, node.name, ROOT_ID, node.name)
                await there.rename(ROOT_ID, other.name, node.node_id, other.name)
                await here.catalog.refresh()
                assert (await here.catalog.get(node.node_id)).node_id == node.node_id
                await here.catalog.list(node.node_id)
                assert (await here.catalog.get(made.node_id)).name == "disk.raw"


@pytest.mark.parametrize(
    "change",
    [
        {"node_id": ROOT_ID},
        {"node_id": b"above" + bytes(11)},
        {"node_id": b"parent" + bytes(10)},
        {"node_id": b"short"},
        {"name": "a/b"},
        {"name": ".."},
        {"name": ""},
        {"name": "a\0b"},
        {"name": "n" * 300},
        {"uid": -1},
        {"mode": 1 << 40},
        {"size": 1 << 63},
        {"mtime_ns": 1 << 63},
        {"kind": Kind.SNAPSHOT},
    ],
)
def test_an_entry_that_nobody_writes_is_corruption_and_never_a_loop(tmp_path: Path, change: dict[str, object]) -> None:
    trio.run(_hostile, tmp_path, change)


async def _hostile(tmp_path: Path, change: dict[str, object]) -> None:
    url = await make_volume(f"file://{tmp_path / 'store'}")
    above, parent = b"above" + bytes(11), b"parent" + bytes(10)
    async with opened(url, tmp_path / "state") as volume:

        async def add(changes: Changes) -> None:
            for entry in (
                directory("above", ROOT_ID, above),
                directory("parent", above, parent),
                msgspec.structs.replace(directory("x", parent), **change),
            ):
                await changes.entries(entry.parent_id)
                changes._put(entry.parent_id, entry.name, entry)
                changes._places.setdefault(entry.node_id, (entry.parent_id, entry.name))

        await volume.catalog.change(add)
    async with opened(url, tmp_path / "other") as volume:
        with trio.fail_after(10), pytest.raises(ObjectCorruptError):
            async for _ in volume.catalog.walk():
                pass
        await volume.create(ROOT_ID, "sound.raw")
