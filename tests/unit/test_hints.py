"""Sizes that the volume remembers: never older ones over newer ones, and none lost because the store was away for a moment."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import trio

from novafs.catalogtree import ROOT_ID
from novafs.config import load_config
from novafs.errors import CorruptionError, StoreUnavailableError
from novafs.objectstore.client import StoreClient
from novafs.objectstore.file import create_root
from novafs.pack import pack_name
from novafs.statedir import StateLock
from novafs.volume import Volume, init_volume, open_volume
from tests.support.engine import FLAGS, fresh_volume, make_volume, opened
from tests.support.flaky_store import FlakyStore, Gate


async def write(volume: Volume, node_id: bytes, size: int) -> None:
    image = await volume.open_image(node_id)
    await image.write(0, os.urandom(size))
    await volume.close_image(image)


def test_a_slow_look_at_the_head_does_not_replace_a_newer_one(tmp_path: Path) -> None:
    """stat after close told the size from before, for up to a second."""
    create_root(tmp_path / "store")
    store = FlakyStore(tmp_path / "store")

    async def main() -> None:
        await init_volume(StoreClient(store))
        (tmp_path / "state").mkdir()
        config = load_config(store.url, flags={**FLAGS, "state_dir": str(tmp_path / "state")}, environ={})
        lock = StateLock.take(tmp_path / "state", mountpoint="tests")
        async with open_volume(config, store=store, owns_state=True) as volume, trio.open_nursery() as nursery:
            entry = await volume.create(ROOT_ID, "disk.raw")
            volume._heads.clear()
            gate = Gate()
            store.before["get"] = [gate]  # the old head was listed, and is now being read
            nursery.start_soon(volume.attributes, entry)
            await trio.to_thread.run_sync(gate.wait_reached)
            await write(volume, entry.node_id, 5000)
            gate.open()
            await trio.sleep(0.1)
            assert (await volume.attributes(entry)).size == 5000
        lock.release()

    trio.run(main)


def test_hints_are_kept_until_they_are_committed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with fresh_volume(tmp_path) as volume:
            entry = await volume.create(ROOT_ID, "disk.raw")
            await write(volume, entry.node_id, 5000)
            change = volume.catalog.change

            async def away(_: object) -> None:
                raise StoreUnavailableError("away")

            with monkeypatch.context() as patch:
                patch.setattr(volume.catalog, "change", away)
                with pytest.raises(StoreUnavailableError):
                    await volume._flush_hints()
                assert (await volume.attributes(entry, hint=True)).size == 5000
            assert volume.catalog.change == change
            await volume._flush_hints()
            assert (await volume.catalog.get(entry.node_id)).size == 5000
            assert not volume._hints

    trio.run(main)


def test_a_damaged_directory_fails_nobody_elses_change(tmp_path: Path) -> None:
    """Changes that wait at the same moment share a commit; one that meets a damaged page failed all of them."""

    async def main() -> None:
        url = await make_volume(f"file://{tmp_path / 'store'}")
        async with opened(url, tmp_path / "state") as volume:
            damaged = await volume.mkdir(ROOT_ID, "damaged")
            names = [f"{n:0200}" for n in range(40)]
            for name in names:
                await volume.mkdir(damaged.node_id, name)
            page = (await volume.catalog.get(damaged.node_id)).content.page
            assert page
        (tmp_path / "store" / pack_name(page[32:48])).chmod(0o600)
        path = tmp_path / "store" / pack_name(page[32:48])
        path.write_bytes(bytes(len(path.read_bytes())))
        async with opened(url, tmp_path / "other") as volume:
            await volume.catalog.list(ROOT_ID)
            outcome: dict[str, object] = {}

            async def make(parent_id: bytes, name: str) -> None:
                try:
                    outcome[name] = await volume.mkdir(parent_id, name)
                except CorruptionError as error:
                    outcome[name] = error

            async with trio.open_nursery() as nursery:
                for number in range(6):
                    nursery.start_soon(make, damaged.node_id, f"bad{number}")
                    nursery.start_soon(make, ROOT_ID, f"good{number}")
            listed = {entry.name for entry in await volume.catalog.list(ROOT_ID)}
            assert listed == {"damaged", *(f"good{n}" for n in range(6))}
            assert all(isinstance(outcome[f"bad{n}"], CorruptionError) for n in range(6))

    trio.run(main)
