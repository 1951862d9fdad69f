"""The first write after an open: what the open has just looked at is not asked for again, and what has changed since is found out."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from novafs import image as image_module
from novafs import lease as lease_module
from novafs.catalogtree import ROOT_ID
from novafs.errors import LeaseHeldError, StaleError
from novafs.volume import Volume
from tests.support.engine import fresh_volume, opened
from tests.support.fixtures import trio_test


async def made(volume: Volume) -> bytes:
    """An image with content that was closed."""
    entry = await volume.create(ROOT_ID, "disk.raw")
    image = await volume.open_image(entry.node_id)
    await image.write(0, b"first")
    await volume.close_image(image)
    return entry.node_id


@trio_test
async def test_the_first_write_takes_three_requests_of_which_two_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease_module, "FRESH_S", 3600.0)  # a slow machine's moment
    monkeypatch.setattr(image_module, "FRESH_S", 3600.0)
    async with fresh_volume(tmp_path, durability="store", writeback__interval="1h") as volume:
        node_id = await made(volume)
        image, held = await volume.open_to_write(node_id)
        assert not held
        before = {name: one.requests for name, one in volume.client.statistics().by_operation.items()}
        await image.write(0, os.urandom(100))
        spent = {name: one.requests - before.get(name, 0) for name, one in volume.client.statistics().by_operation.items()}
        assert {name: count for name, count in spent.items() if count} == {"create": 2, "list": 1}  # epoch; fence, and who else wants it
        await volume.close_image(image)


@trio_test
@pytest.mark.parametrize("fresh_s", [0.0, 3600.0], ids=["looked at again", "not looked at again"])
async def test_what_another_host_did_between_open_and_first_write_is_found_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh_s: float
) -> None:
    monkeypatch.setattr(lease_module, "FRESH_S", fresh_s)
    monkeypatch.setattr(image_module, "FRESH_S", fresh_s)
    async with fresh_volume(tmp_path, durability="store", writeback__interval="1h") as volume:
        node_id = await made(volume)
        async with opened(f"file://{tmp_path / 'store'}", tmp_path / "other", durability="store", lease__wait="0.2s") as other:
            await other.catalog.resolve("disk.raw")
            # It has written, and given the lease back.
            image, _ = await volume.open_to_write(node_id)
            theirs, _ = await other.open_to_write(node_id)
            await theirs.write(0, b"other")
            await other.close_image(theirs)
            with pytest.raises(StaleError):
                await image.write(0, b"stale")
            await volume.close_image(image)
            image, _ = await volume.open_to_write(node_id)
            assert await image.read(0, 10) == b"other"
            await image.write(0, b"third")
            await volume.close_image(image)
            # It holds the lease.
            theirs, _ = await other.open_to_write(node_id)
            image, _ = await volume.open_to_write(node_id)
            await image.write(0, b"fifth")
            with pytest.raises(LeaseHeldError):
                await theirs.write(0, b"never")
            await other.close_image(theirs)
            await volume.close_image(image)
            theirs = await other.open_image(node_id)
            assert await theirs.read(0, 10) == b"fifth"
            await other.close_image(theirs)
