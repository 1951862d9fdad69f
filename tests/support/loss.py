"""The loss of a host: its state directory goes with it, and an operator takes its leases away, as `novafs lease break` does."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import trio

from novafs.lease import break_lease
from tests.support.engine import opened


def lose_host(url: str, state_dir: Path, names: Sequence[str]) -> None:
    """Its daemon is dead. names: the images that it may have been writing."""
    shutil.rmtree(state_dir)

    async def tell() -> None:
        async with opened(url, state_dir.with_name("operator"), read_only=True) as volume:
            for name in names:
                await break_lease(volume.client, (await volume.catalog.resolve(name)).node_id)

    trio.run(tell)
