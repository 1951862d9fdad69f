"""Hosts that have one image open for writing, and take turns in writing it: no read gives anything older than the last fsync before it.

Times are a fifth of the real ones, so that much happens; what is asserted holds however slow the machine is.
"""

from __future__ import annotations

import random
from collections import Counter
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
import trio

from novafs import follow, lease, writeback
from novafs.asynctools import open_nursery
from novafs.catalogtree import ROOT_ID
from novafs.errors import LeaseHeldError, StaleError
from novafs.image import Image
from novafs.seen import PROBE_BYTES
from novafs.volume import Volume
from tests.support.engine import make_volume, opened

BLOCK = 4096
FIRST, END = PROBE_BYTES // BLOCK, PROBE_BYTES // BLOCK + 24
HOSTS = 3
SECONDS = 5.0
OPENS_MIN = 4


class Turns:
    """What all hosts together have done. fsynced: by block, the number that is surely in the store, or more."""

    def __init__(self, node_id: bytes) -> None:
        self.node_id = node_id
        self.fsynced = Counter[int]()
        self.counts = Counter[str]()
        self._number = 0

    async def host(self, volume: Volume, rng: random.Random) -> None:
        """One host: opens, reads and perhaps writes, closes."""
        began_s, opens = trio.current_time(), 0
        while trio.current_time() - began_s < SECONDS or opens < OPENS_MIN:
            opens += 1
            image, held = await volume.open_to_write(self.node_id)
            await volume.follow(image, lambda: None, held=held)
            volume.keep_lease(image)
            try:
                await self._use(image, rng)
            except (StaleError, LeaseHeldError) as error:
                self.counts[type(error).__name__] += 1
            await volume.let_go(image)
            await volume.close_image(image)
            await trio.sleep(0.3 * rng.random())

    async def _use(self, image: Image, rng: random.Random) -> None:
        incarnation, written = image.incarnation, Counter[int]()
        for _ in range(rng.randrange(1, 60)):
            step, block = rng.random(), rng.randrange(FIRST, END)
            if step < 0.7:
                await self._read(image, block)
            elif step < 0.8:
                await image.take_lease()  # from here on nobody else writes, so numbers grow
                self._number += 1
                await image.write(block * BLOCK, self._number.to_bytes(8, "little") * (BLOCK // 8), incarnation=incarnation)
                written[block] = self._number
                self.counts["write"] += 1
            elif step < 0.9 and image.lease is not None:
                await image.fsync(incarnation=incarnation)
                self.fsynced |= written  # the larger of both
                self.counts["fsync"] += 1
            else:
                await trio.sleep(0.1 * rng.random())

    async def _read(self, image: Image, block: int) -> None:
        """As a mount reads."""
        least, place = self.fsynced[block], (block * BLOCK, BLOCK)
        if image.follower is not None:
            image.follower.seen.begin(*place)
        data = image.read_nowait(*place)
        self.counts["read at once" if data is not None else "read"] += 1
        if data is None:
            data = await image.read(*place)
        if image.follower is not None:
            image.follower.seen.end(*place, data)
        assert int.from_bytes(data[:8], "little") >= least


def test_no_read_is_older_than_the_last_fsync_whoever_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """semantics: S22."""
    monkeypatch.setattr(lease, "SETTLE_S", 0.4)
    for name, seconds in {"VALID_S": 0.35, "LOOK_S": 0.25, "ARM_S": 0.1, "POLL_S": 0.05}.items():
        monkeypatch.setattr(follow, name, seconds)
    monkeypatch.setattr(writeback, "WANTS_POLL_S", 0.2)

    async def main() -> None:
        url = await make_volume(f"file://{tmp_path / 'store'}")
        async with AsyncExitStack() as stack:
            volumes = [await stack.enter_async_context(opened(url, tmp_path / f"state{n}", lease__wait="1s")) for n in range(HOSTS)]
            entry = await volumes[0].create(ROOT_ID, "disk")
            image = await volumes[0].open_image(entry.node_id)
            await image.resize(END * BLOCK)
            await volumes[0].close_image(image)
            turns = Turns(entry.node_id)
            async with open_nursery() as nursery:
                for number, volume in enumerate(volumes):
                    await volume.catalog.lookup(ROOT_ID, "disk", max_age_s=0)
                    nursery.start_soon(turns.host, volume, random.Random(number))
            assert all(turns.counts[what] for what in ("read", "read at once", "write", "fsync")), turns.counts

    trio.run(main)
