"""A boot profile of scattered chunks: prefetches leave half of the connections to readers, who never queue behind them."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import trio

from novafs.catalogtree import ROOT_ID
from tests.support.engine import fresh_volume, opened

CHUNK = 64 << 10
SPREAD = 4 * 200  # 200 chunks, each 192 KiB of others apart: a request each


def test_prefetches_leave_half_of_the_connections_to_readers(tmp_path: Path) -> None:
    async def main() -> None:
        async with fresh_volume(tmp_path) as volume:
            entry = await volume.create(ROOT_ID, "a")
            image = await volume.open_image(entry.node_id)
            await image.write(0, os.urandom(SPREAD * CHUNK))
            await image.commit()
            await volume.close_image(image)
        url = f"file://{tmp_path / 'store'}"
        async with opened(url, tmp_path / "state", prefetch=True, store__requests_max="8", l1__capacity="256MiB") as volume:
            entry = await volume.catalog.resolve("a")
            image = await volume.open_image(entry.node_id)
            for at in range(0, SPREAD, 4):
                await image.read(at * CHUNK, 4096)
            await volume.close_image(image)
            await volume.cache.wait_idle()
            volume.cache.l1.clear()
            volume.prefetcher.engine._presence.places.clear()
            image = await volume.open_image(entry.node_id)
            most = 0
            volume.client.store.get, real = (lambda *a: (threading.Event().wait(0.01), real(*a))[1]), volume.client.store.get
            await image.read(0, 4096)
            for _ in range(400):
                await trio.sleep(0.005)
                found = volume.client.statistics()
                most = max(most, found.waiting + volume.client._limiter.borrowed_tokens)
            await volume.close_image(image)
            assert most <= 5  # the reader itself among them

    trio.run(main)
