"""Collection: what is freed, what is not, and when."""

from __future__ import annotations

from pathlib import Path

from novafs.catalogtree import ROOT_ID
from novafs.gc import collect
from tests.support.fixtures import run
from tests.support.hosts import World, pattern, read_image, write_image

HOUR = 3600.0


def test_a_removed_image_is_freed_in_two_passes_a_grace_apart(tmp_path: Path) -> None:
    async def main() -> None:
        world = World(tmp_path)
        with world.running():
            async with world.host("a") as volume:
                await write_image(volume, "kept", {i: pattern(i) for i in range(10)})
                await write_image(volume, "gone", {i: pattern(100 + i) for i in range(10)})
                await volume.unlink(ROOT_ID, "gone")
                packs = len(world.names("packs/"))
                first = await collect(volume, everything=True)
                print(first)
                assert first.packs_condemned == first.packs_deleted == 0
                world.sleep(2 * HOUR)
                second = await collect(volume, everything=True)
                print(second)
                world.sleep(HOUR / 2)
                third = await collect(volume, everything=True)
                assert third.packs_deleted == 0
                world.sleep(2 * HOUR)
                fourth = await collect(volume, everything=True)
                print(fourth)
                assert len(world.names("packs/")) < packs
                assert await read_image(volume, "kept") == b"".join(pattern(i) for i in range(10))

    run(main)
