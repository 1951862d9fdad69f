"""The cap on dirty data: writers of one image do not answer for what keeps another from being committed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import trio

from novafs.catalogtree import ROOT_ID
from novafs.errors import FrameCorruptError
from novafs.pack import pack_name
from novafs.volume import Volume
from tests.support.engine import make_volume, opened

CHUNK = 64 << 10


async def damaged_image(volume: Volume, store: Path) -> bytes:
    """The id of an image of one chunk whose only copy in the store is damaged, and not in L1."""
    entry = await volume.create(ROOT_ID, "damaged.raw")
    image = await volume.open_image(entry.node_id)
    await image.write(0, os.urandom(CHUNK))
    await image.commit()
    (raw,) = await image._state.entries(0, 1, volume.cache.fetch)
    path = store / pack_name(raw[32:48])
    data = bytearray(path.read_bytes())
    data[200] ^= 1
    path.chmod(0o600)
    path.write_bytes(data)
    await volume.close_image(image)
    return entry.node_id


def test_an_image_that_can_not_be_committed_does_not_fail_the_writes_of_others(tmp_path: Path) -> None:
    trio.run(_others_go_on, tmp_path)


async def _others_go_on(tmp_path: Path) -> None:
    url = await make_volume(f"file://{tmp_path / 'store'}")
    async with opened(url, tmp_path / "state") as volume:
        damaged = await damaged_image(volume, tmp_path / "store")
    behind = False
    with pytest.raises(FrameCorruptError):  # of the end: the damaged image stays dirty
        async with opened(url, tmp_path / "state", writeback__dirty_max="4MiB", writeback__interval="100ms") as volume:
            entry = await volume.create(ROOT_ID, "sound.raw")
            sound = await volume.open_image(entry.node_id)
            stuck = await volume.open_image(damaged)
            await stuck.write(100, b"a part of a chunk that can not be read")
            with pytest.raises(FrameCorruptError):
                await stuck.commit()
            # The store is slow from here on, so that the cap is reached.
            commit = sound.commit

            async def slow_commit() -> int:
                await trio.sleep(1.5)
                return await commit()

            sound.commit = slow_commit  # type: ignore[method-assign]
            content = os.urandom(12 << 20)
            for at in range(0, len(content), CHUNK):
                await sound.write(at, content[at : at + CHUNK])
            sound.commit = commit  # type: ignore[method-assign]
            await sound.commit()
            assert await sound.read(0, CHUNK) == content[:CHUNK]
            # Where nothing else is dirty, waiting is of no use, and the writer is told.
            with pytest.raises(FrameCorruptError), trio.fail_after(20):
                for at in range(CHUNK, 12 << 20, CHUNK):
                    await stuck.write(at, content[:CHUNK])
            behind = True
    assert behind
