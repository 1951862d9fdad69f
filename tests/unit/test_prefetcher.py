"""Prefetch on open volumes: what readers find there already, what hosts teach each other, and that nothing of it can hurt."""

from __future__ import annotations

import logging
import os
import random
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from novafs.catalogtree import ROOT_ID
from novafs.chunk import HOLE_BYTES, Reference
from novafs.image import Image
from novafs.modelstore import model_prefix
from novafs.pack import pack_name
from novafs.prefetch.model import NAMES
from novafs.prefetch.throttle import FAR_S, Throttle
from novafs.prefetcher import NOTED, NOTED_FIRST
from novafs.snapshots import clone
from novafs.volume import Volume
from tests.support.engine import make_volume, opened

CHUNK = 64 << 10
CHUNKS = 600
BOOT = random.Random(4).sample(range(CHUNKS), 200)
"""What a guest reads first, in this order: no streams, nothing that a cold engine could guess."""


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A volume with an image of random content and a clone of it."""
    directory = tmp_path_factory.mktemp("prefetch")

    async def make() -> None:
        url = await make_volume(f"file://{directory / 'store'}")
        async with opened(url, directory / "setup") as volume:
            entry = await volume.create(ROOT_ID, "one.raw")
            image = await volume.open_image(entry.node_id)
            for at in range(0, CHUNKS, 50):
                await image.write(at * CHUNK, os.urandom(50 * CHUNK))
            await volume.close_image(image)
            await clone(volume, await volume.catalog.get(entry.node_id), ROOT_ID, "two.raw")

    trio.run(make)
    return directory


@pytest.fixture
def place(store: Path, tmp_path: Path) -> Path:
    """A copy of that volume for one test: links, since objects are never changed."""
    os.system(f"cp -al {store}/store {tmp_path}/store")
    return tmp_path


Drive = Callable[[Volume], Awaitable[Any]]


def on_host(place: Path, name: str, drive: Drive, **flags: str) -> Any:
    """Run `drive` on a host with a state directory of its own."""

    async def main() -> Any:
        async with opened(f"file://{place / 'store'}", place / name, prefetch=True, **flags) as volume:
            return await drive(volume)

    return trio.run(main)


async def image_of(volume: Volume, name: str) -> Image:
    return await volume.open_image((await volume.catalog.lookup(ROOT_ID, name)).node_id)


async def read(volume: Volume, image: Image, chunks: list[int], *, settle: bool = True) -> int:
    """Read chunks as a guest that thinks until all that it led to is there; how many it waited for."""
    waited = 0
    for index in chunks:
        if image.read_nowait(index * CHUNK, 4096) is None:
            waited += 1
            await image.read(index * CHUNK, 4096)
        if settle:
            await trio.testing.wait_all_tasks_blocked(0.002)
            await volume.cache.wait_idle()
            await trio.testing.wait_all_tasks_blocked(0.002)
    return waited


def boots(name: str, chunks: list[int] = BOOT) -> Drive:
    async def drive(volume: Volume) -> int:
        image = await image_of(volume, name)
        waited = await read(volume, image, chunks)
        await volume.close_image(image)
        return waited

    return drive


def test_a_sequential_reader_waits_for_its_first_chunks_only(place: Path) -> None:
    assert on_host(place, "a", boots("one.raw", list(range(300)))) <= 12
    assert on_host(place, "b", boots("one.raw", list(range(299, 0, -1)))) <= 20


def test_a_boot_on_one_host_makes_the_first_boot_of_a_clone_on_another_fast(place: Path) -> None:
    assert on_host(place, "a", boots("one.raw")) > 150

    async def drive(volume: Volume) -> tuple[int, dict[str, Any]]:
        waited = await boots("two.raw")(volume)
        assert volume.prefetcher is not None
        return waited, volume.prefetcher.statistics()

    waited, found = on_host(place, "b", drive)
    assert waited <= 10
    assert found["accuracy"] >= 0.95
    assert found["coverage"] >= 0.95


def test_prefetch_is_off_where_it_is_switched_off(place: Path) -> None:
    async def drive(volume: Volume) -> None:
        assert volume.prefetcher is None
        assert volume.statistics()["prefetch"] is None
        assert await boots("one.raw", list(range(20)))(volume) == 20

    on_host(place, "a", drive, prefetch__enabled="false")


def test_random_reads_are_left_alone(place: Path) -> None:
    """L1 holds a fifth of what is read: prefetches stay below 5 % of what the guest fetches itself, in both modes."""
    rng = random.Random(8)
    chunks = [rng.randrange(CHUNKS) for _ in range(2000)]

    async def drive(volume: Volume) -> tuple[int, int]:
        image = await image_of(volume, "one.raw")
        waited = await read(volume, image, chunks, settle=False)
        await volume.close_image(image)
        assert volume.prefetcher is not None
        return waited, volume.prefetcher.statistics()["total"]["issued"]

    waited, issued = on_host(place, "a", drive, l1__capacity="8MiB")
    assert waited > 1000
    assert issued <= 0.05 * waited
    assert volume_is_bounded(place)


def volume_is_bounded(place: Path) -> bool:
    """A sequential pass through an L1 of 8 MiB: at no moment are there more bytes in it than that."""

    async def drive(volume: Volume) -> bool:
        image = await image_of(volume, "one.raw")
        for index in range(CHUNKS):
            if image.read_nowait(index * CHUNK, CHUNK) is None:
                await image.read(index * CHUNK, CHUNK)
            if volume.cache.l1.used_bytes > volume.cache.l1.capacity_bytes:
                return False
        await volume.close_image(image)
        return True

    return bool(on_host(place, "bounded", drive, l1__capacity="8MiB"))


def test_hits_that_are_too_many_to_note_are_noted_now_and_then(place: Path) -> None:
    async def drive(volume: Volume) -> None:
        prefetcher, image = volume.prefetcher, await image_of(volume, "one.raw")
        assert prefetcher is not None
        await read(volume, image, [0], settle=False)
        prefetcher._work_off()

        def noted(reads: int) -> int:
            """How many of them are; without a checkpoint, so nothing else works them off."""
            before, found = len(prefetcher._log), 0
            for _ in range(reads):
                assert prefetcher is not None
                prefetcher.touched(image, 0, 0)
                found += len(prefetcher._log) - before
                prefetcher._log.clear()
                before = 0
            return found

        prefetcher._hurried = True
        image.watch_reads = 0
        assert noted(NOTED_FIRST) == NOTED_FIRST
        assert noted(10 * NOTED) == 10
        prefetcher._hurried = False
        assert noted(100) == 100
        await volume.close_image(image)
        again = await image_of(volume, "one.raw")
        assert again.watch_reads == 0
        await volume.close_image(again)

    on_host(place, "a", drive)


def test_how_far_over_its_share_the_cpu_time_is_tells_what_is_noted() -> None:
    throttle = Throttle(0.05)
    assert not throttle.open
    assert not throttle.far_over
    throttle.account(2 * FAR_S, 0.0)
    assert throttle.far_over
    throttle.account(0.0, 40 * FAR_S)
    assert not throttle.far_over


def test_what_a_prefetch_can_not_read_is_an_error_for_its_reader_alone(place: Path) -> None:
    """A pack is gone: the chunks before it are read, no error before its own are asked for, and prefetch goes on after."""

    async def drive(volume: Volume) -> None:
        image = await image_of(volume, "one.raw")
        await image.load_entries(range(CHUNKS))
        entries = [image.entry_nowait(index) for index in range(CHUNKS)]
        packs = [Reference.unpack(raw).pack_id for raw in entries if raw is not None and raw != HOLE_BYTES]
        lost = packs[300]
        first = packs.index(lost)
        (place / "store" / pack_name(lost)).unlink()
        await read(volume, image, list(range(first - 20, first)))
        with pytest.raises(Exception, match="gone"):
            await image.read(first * CHUNK, 4096)
        after = first + packs.count(lost)
        assert await read(volume, image, list(range(after, min(after + 60, CHUNKS)))) <= 12
        await volume.close_image(image)

    on_host(place, "a", drive)


def test_a_reader_that_overtakes_a_prefetch_shares_its_fetch(place: Path) -> None:
    """Nothing is fetched twice, and it counts as late."""

    async def drive(volume: Volume) -> None:
        image = await image_of(volume, "one.raw")
        await read(volume, image, list(range(40)), settle=False)
        await volume.cache.wait_idle()
        assert volume.prefetcher is not None
        found = volume.prefetcher.statistics()["total"]
        assert found["used"] + found["late"] > 0
        await volume.close_image(image)
        await volume.cache.wait_idle()  # a prefetch may have begun since
        statistics = volume.cache.statistics()
        assert statistics.l3_traffic.hits == statistics.fetches

    on_host(place, "a", drive)


def test_a_closed_image_leaves_nothing_behind(place: Path) -> None:
    on_host(place, "a", boots("one.raw"))

    async def drive(volume: Volume) -> None:
        image = await image_of(volume, "two.raw")
        await image.read(BOOT[0] * CHUNK, 4096)
        await volume.close_image(image)
        assert volume.prefetcher is not None
        await trio.testing.wait_all_tasks_blocked(0.01)
        assert volume.prefetcher.engine.waiting == 0
        await volume.cache.wait_idle()
        await trio.testing.wait_all_tasks_blocked(0.01)
        assert volume.prefetcher.pacer.in_flight == 0

    on_host(place, "b", drive)


# -- models ------------------------------------------------------------------------------------------------------


def models(place: Path) -> dict[str, list[Path]]:
    return {name: sorted((place / "store" / model_prefix(name)).glob("*")) for name in NAMES}


def test_models_are_joined_by_hosts_that_save_in_turn_and_old_ones_go(place: Path) -> None:
    other = [index for index in range(CHUNKS) if index not in BOOT][:150]
    for turn in range(3):
        on_host(place, f"a{turn}", boots("one.raw"))
        on_host(place, f"b{turn}", boots("two.raw", other))
    assert all(1 <= len(files) <= 2 for files in models(place).values())
    assert on_host(place, "c", boots("two.raw")) <= 10
    assert on_host(place, "d", boots("one.raw", other)) <= 10


@pytest.mark.parametrize("damage", ["garbage", "empty", "cut", "huge"])
def test_a_damaged_model_costs_one_warning_and_is_replaced(place: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    on_host(place, "a", boots("one.raw"))
    for files in models(place).values():
        content = files[0].read_bytes()
        files[0].unlink()
        new = {"garbage": os.urandom(len(content)), "empty": b"", "cut": content[:-5], "huge": bytes(9 << 20)}[damage]
        files[0].write_bytes(new)
    with caplog.at_level(logging.WARNING):
        assert on_host(place, "b", boots("one.raw")) > 150
    assert sum("prefetch starts without" in message for message in caplog.messages) == len(NAMES)
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        assert on_host(place, "c", boots("two.raw")) <= 10
    assert not caplog.messages


def test_a_read_only_volume_loads_models_and_saves_none(place: Path) -> None:
    on_host(place, "a", boots("one.raw"))
    before = models(place)

    async def main() -> None:
        async with opened(f"file://{place / 'store'}", place / "b", prefetch=True, read_only=True) as volume:
            assert await boots("two.raw")(volume) <= 10

    trio.run(main)
    assert models(place) == before


def test_hosts_of_a_site_share_models_through_l2(place: Path, redis_server: Any) -> None:
    """Before anything of them is in the store: the first host is still running."""

    async def main() -> None:
        url, l2 = f"file://{place / 'store'}", redis_server.url
        async with opened(url, place / "a", prefetch=True, l2__url=l2) as first:
            await boots("one.raw")(first)
            assert first.models is not None
            await first.models.share()
            assert not any(models(place).values())
            async with opened(url, place / "b", prefetch=True, l2__url=l2) as second:
                assert second.models is not None
                assert sorted(second.models.loaded) == sorted(NAMES)
                second.cache.l1.clear()
                assert await boots("two.raw")(second) <= 10

    trio.run(main)
