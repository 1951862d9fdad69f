"""Pins: what a host has open is noted for as long as it is open and the host lives."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio

from novafs.errors import ObjectCorruptError, StoreDeniedError
from novafs.pins import INTERVAL_S_MAX, Pins, pin_name, read_pin
from novafs.snapshots import take_snapshot
from tests.support.fixtures import run
from tests.support.hosts import World, pattern, write_image


def test_an_open_image_is_pinned_and_a_closed_one_is_not(tmp_path: Path) -> None:
    async def main() -> None:
        world = World(tmp_path)
        with world.running():
            async with world.host("a") as volume:
                node_id = await write_image(volume, "disk", {0: pattern(1)})
                await volume.pins.beat()
                assert world.names("pins/") == []
                image = await volume.open_image(node_id)
                await volume.pins.beat()
                (name,) = world.names("pins/")
                assert volume.writeback.journal is not None
                assert name == pin_name(volume.writeback.journal.journal_id)
                pin = await read_pin(volume.client, name)
                assert pin.generations == [(node_id, image.generation)]
                await volume.close_image(image)
                await volume.pins.beat()
                assert world.names("pins/") == []

    run(main)


def test_a_snapshot_that_is_open_is_pinned_by_its_own_number(tmp_path: Path) -> None:
    async def main() -> None:
        world = World(tmp_path)
        with world.running():
            async with world.host("a") as volume:
                node_id = await write_image(volume, "disk", {0: pattern(1)})
                taken = await take_snapshot(volume, await volume.catalog.resolve("disk"), "s")
                await write_image(volume, "disk", {0: pattern(2)})
                view = await volume.open_snapshot(node_id, taken.counter, name="s")
                await volume.pins.beat()
                pin = await read_pin(volume.client, world.names("pins/")[0])
                assert pin.generations == [(node_id, taken.counter)]
                await volume.close_image(view)
                await volume.pins.beat()
                assert world.names("pins/") == []

    run(main)


def test_a_clean_close_takes_the_pin_away(tmp_path: Path) -> None:
    async def main() -> None:
        world = World(tmp_path)
        with world.running():
            async with world.host("a") as volume:
                node_id = await write_image(volume, "disk", {0: pattern(1)})
                await volume.open_image(node_id)
                await volume.pins.beat()
                assert len(world.names("pins/")) == 1
            assert world.names("pins/") == []

    run(main)


def test_a_process_without_a_journal_pins_under_an_id_of_its_own(tmp_path: Path) -> None:
    async def main() -> None:
        world = World(tmp_path)
        with world.running():
            async with world.host("a") as a, world.host("b", read_only=True) as b:
                node_id = await write_image(a, "disk", {0: pattern(1)})
                image = await b.open_image_by_id(node_id)
                await b.pins.beat()
                (name,) = world.names("pins/")
                assert name == pin_name(b.pins.host_id)
                await b.close_image(image)

    run(main)


@pytest.mark.parametrize(("grace_s", "interval_s"), [(86400.0, INTERVAL_S_MAX), (100.0, 25.0), (0.1, 0.05)])
def test_a_pin_is_renewed_at_least_every_quarter_of_the_grace(grace_s: float, interval_s: float) -> None:
    pins = Pins(None, bytes(16), opened=list, grace_s=grace_s)  # type: ignore[arg-type]
    assert pins.interval_s == interval_s


def test_the_background_renews_it(tmp_path: Path) -> None:
    async def main() -> None:
        world = World(tmp_path)
        with world.running():
            async with world.host("a", gc__grace="0.1s") as volume:
                node_id = await write_image(volume, "disk", {0: pattern(1)})
                image = await volume.open_image(node_id)
                nonces = set()
                while len(nonces) < 3:
                    await trio.sleep(0)
                    for name in world.names("pins/"):
                        nonces.add((await read_pin(volume.client, name)).nonce)
                await volume.close_image(image)

    run(main)


def test_a_store_that_refuses_pins_is_said_once_and_stops_nobody(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        world = World(tmp_path)
        with world.running():
            async with world.host("a", gc__grace="0.1s") as volume:
                node_id = await write_image(volume, "disk", {0: pattern(1)})
                tries = []

                def deny(operation: str, name: str) -> None:
                    if operation == "put" and name.startswith("pins/"):
                        tries.append(name)
                        raise StoreDeniedError("read-only credentials")

                world.stores["a"].hook = deny
                image = await volume.open_image(node_id)
                while len(tries) < 3:
                    await volume.client.clock_s()
                assert await image.read(0, 10) == pattern(1)[:10]
                await volume.close_image(image)

    run(main)
    assert sum("can not be pinned" in record.message for record in caplog.records) == 1


def test_a_pin_under_a_wrong_name_is_not_believed(tmp_path: Path) -> None:
    async def main() -> None:
        world = World(tmp_path)
        with world.running():
            async with world.host("a") as volume:
                node_id = await write_image(volume, "disk", {0: pattern(1)})
                image = await volume.open_image(node_id)
                await volume.pins.beat()
                data = await volume.client.get(world.names("pins/")[0])
                await volume.client.put(pin_name(bytes(16)), data)
                with pytest.raises(ObjectCorruptError):
                    await read_pin(volume.client, pin_name(bytes(16)))
                await volume.close_image(image)

    run(main)
