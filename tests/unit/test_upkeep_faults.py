"""What goes wrong with one image in the background is no matter of the others, nor of the volume."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import patch

import pytest
import trio

from novafs.catalogtree import ROOT_ID
from novafs.errors import LeaseLostError, StoreUnavailableError
from novafs.image import Image
from novafs.lease import break_lease
from novafs.volume import Volume
from tests.support.engine import fresh_volume


async def written(volume: Volume, name: str) -> Image:
    """An image that is written, and open for reading as well."""
    entry = await volume.create(ROOT_ID, name)
    image = await volume.open_image(entry.node_id)
    await volume.open_image(entry.node_id)
    await image.write(0, b"content")
    await image.commit()
    return image


def test_an_image_whose_lease_can_not_be_given_back_does_not_keep_those_of_others(tmp_path: Path) -> None:
    async def main() -> None:
        async with fresh_volume(tmp_path) as volume:
            first, second = await written(volume, "first"), await written(volume, "second")
            failing = patch.object(Image, "release_lease", side_effect=StoreUnavailableError("the store is away"))
            with failing:
                for image in (first, second):
                    await volume.let_go(image)
            with patch.object(first, "release_lease", side_effect=StoreUnavailableError("the store is away")), trio.fail_after(60):
                while second.lease is not None:
                    await trio.sleep(0.02)
                assert first.lease is not None
            with trio.fail_after(60):
                while first.lease is not None:
                    await trio.sleep(0.02)
            for image in (first, second):
                for _ in range(2):
                    await volume.close_image(image)

    trio.run(main)


def test_a_lost_lease_whose_data_can_not_be_kept_does_not_end_the_heartbeats_of_others(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        async with fresh_volume(tmp_path) as volume:
            lost, kept = await written(volume, "lost"), await written(volume, "kept")
            leases = volume.writeback.leases
            assert leases is not None
            assert kept.lease is not None
            await lost.write(0, b"more")
            await lost.fsync()
            await break_lease(volume.client, lost.node_id)
            before_s = kept.lease.sent_s
            with patch.object(type(volume.writeback), "set_aside", side_effect=RuntimeError("a mistake")):
                await volume.writeback.beat(leases)
            assert kept.lease.sent_s > before_s
            assert lost.lease is None
            assert "what was fsynced stays in the journal" in caplog.text
            with pytest.raises(LeaseLostError):
                await lost.fsync()
            for image in (lost, kept):
                for _ in range(2):
                    await volume.close_image(image)

    trio.run(main)
