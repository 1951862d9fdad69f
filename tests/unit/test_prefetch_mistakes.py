"""Models and the engine may fail, and cost prefetches only."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import trio

from novafs import modelstore
from novafs.catalogtree import ROOT_ID
from novafs.prefetch.markov import TransitionTable
from tests.support.engine import fresh_volume, opened

CHUNK = 64 << 10


class Counted(list):
    """A state that another thread adds a successor to between two looks at it."""

    def __len__(self):
        found = super().__len__()
        if found == 4:
            self += [9, 1, 9]
        return found


def test_a_table_that_is_learned_on_while_it_is_saved_is_whole() -> None:
    table = TransitionTable()
    table._one = {5: Counted([2, 7, 1, 7])}
    TransitionTable.from_bytes(table.to_bytes(), "x", chunk_size=65536)


async def _image(tmp_path: Path) -> None:
    async with fresh_volume(tmp_path) as volume:
        image = await volume.open_image((await volume.create(ROOT_ID, "a")).node_id)
        await image.write(0, os.urandom(200 * CHUNK))
        await image.commit()
        await volume.close_image(image)


@pytest.mark.parametrize("name", ["load_models", "dump_models"])
def test_a_mistake_with_models_fails_neither_mount_nor_unmount(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    def fail(*_):
        raise KeyError("a mistake")

    async def main() -> None:
        await _image(tmp_path)
        monkeypatch.setattr(modelstore, name, fail)
        monkeypatch.setattr(modelstore, "SHARE_S", 0.1)
        async with opened(f"file://{tmp_path / 'store'}", tmp_path / "state", prefetch=True) as volume:
            image = await volume.open_image((await volume.catalog.resolve("a")).node_id)
            for at in range(200):
                await image.read(at * CHUNK, CHUNK)
            await trio.sleep(0.5)
            await volume.close_image(image)

    trio.run(main)


def test_a_mistake_of_the_engine_fails_neither_a_read_nor_a_close(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_, **__):
        raise KeyError("a mistake")

    async def main() -> None:
        await _image(tmp_path)
        async with opened(f"file://{tmp_path / 'store'}", tmp_path / "state", prefetch=True, l1__capacity="4MiB") as volume:
            for name in ("observe", "evicted", "set_latency", "failed", "closed", "opened", "take"):
                monkeypatch.setattr(volume.prefetcher.engine, name, fail)
            image = await volume.open_image((await volume.catalog.resolve("a")).node_id)
            for at in range(200):
                assert len(await image.read(at * CHUNK, CHUNK)) == CHUNK
            await volume.close_image(image)

    trio.run(main)


def test_what_was_read_right_before_a_close_is_in_the_profile(tmp_path: Path) -> None:
    async def main() -> None:
        await _image(tmp_path)
        async with opened(f"file://{tmp_path / 'store'}", tmp_path / "state", prefetch=True) as volume:
            image = await volume.open_image((await volume.catalog.resolve("a")).node_id)
            await image.read(0, 100 * CHUNK)
            volume.prefetcher.engine.book._families.clear()
            await volume.close_image(image)
            volume.prefetcher.engine.book._families.clear()
            image = await volume.open_image((await volume.catalog.resolve("a")).node_id)
            for at in range(100):
                assert image.read_nowait(at * CHUNK, CHUNK) is not None
            await volume.close_image(image)
            (variants,) = volume.prefetcher.engine.book._families.values()
            assert len(variants[-1].entries) == 100

    trio.run(main)
