"""Read-around: what is fetched beside a miss while nothing is known of an image, and that it stops where that does not help."""

from __future__ import annotations

import math
import os
import random
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from novafs.cache.packs import PackSource
from novafs.catalogtree import ROOT_ID
from novafs.image import Image
from novafs.imagemap import NODE_BYTES
from novafs.prefetch.around import CACHE_SHARE, CREDIT, EARNS, IMAGES_MAX, MAP_CHUNKS, MAPS_MAX, SMALL, ReadAround
from novafs.prefetch.pacer import Pacer
from novafs.volume import Volume
from tests.support.engine import make_volume, opened

FAR_S = 0.02
CHUNK = 64 << 10
CHUNKS = 2048


def account(most_chunks: int = 32, capacity_chunks: int = 4096) -> ReadAround:
    return ReadAround(most_chunks=most_chunks, capacity_chunks=capacity_chunks)


def test_a_region_is_aligned_and_holds_what_was_missed() -> None:
    assert account().region(1, 70, FAR_S) == range(64, 96)
    assert account().region(1, 64, FAR_S) == range(64, 96)
    assert account(most_chunks=10).region(1, 19, FAR_S) == range(16, 24)


def test_a_near_store_is_asked_for_nothing_and_a_less_far_one_for_less() -> None:
    assert not account().region(1, 70, 0.0)
    assert not account().region(1, 70, 0.004)
    assert 8 <= len(account(128).region(1, 70, 0.008)) < len(account(128).region(1, 70, FAR_S))


def test_nothing_where_it_is_switched_off_or_the_cache_is_tiny() -> None:
    assert not account(most_chunks=0).region(1, 70, FAR_S)
    assert not account(capacity_chunks=3 * CACHE_SHARE).region(1, 70, FAR_S)
    assert len(account(capacity_chunks=8 * CACHE_SHARE).region(1, 70, FAR_S)) == 8


def test_what_nobody_uses_is_soon_enough() -> None:
    around = account()
    rng, brought = random.Random(1), 0
    for miss in range(5000):
        region = around.region(1, rng.randrange(1 << 20), FAR_S)
        if region:
            around.asked(1, range(miss * 64, miss * 64 + len(region)))
            brought += len(region)
    assert brought <= CREDIT + 5000 / 64 + 32
    assert around.region(2, 0, FAR_S)  # another image is another matter


def test_regions_become_smaller_as_the_credit_is_spent_and_lie_in_each_other() -> None:
    around = account(most_chunks=128)
    sizes, asked = [], 0
    while region := around.region(1, 1000, FAR_S):
        assert region.start % len(region) == 0
        sizes.append(len(region))
        around.asked(1, range(asked, asked + len(region)))
        asked += len(region)
    assert sizes[0] == 128
    assert sizes[-1] == SMALL
    assert sizes == sorted(sizes, reverse=True)
    assert asked <= CREDIT


def test_a_map_is_read_ahead_once_for_each_part_and_only_while_that_pays() -> None:
    around = account()
    part = around.map_region(1, MAP_CHUNKS + 5, FAR_S)
    assert part == range(MAP_CHUNKS, 2 * MAP_CHUNKS)
    assert not around.map_region(1, MAP_CHUNKS + 6, FAR_S)
    assert around.map_region(1, 5, FAR_S)
    assert around.map_region(2, MAP_CHUNKS, FAR_S)
    assert not around.map_region(1, 2 * MAP_CHUNKS, 0.001)
    assert around.region(1, 5, FAR_S)
    around.asked(1, range(int(CREDIT)))
    assert not around.map_region(1, 2 * MAP_CHUNKS, FAR_S)
    around.forget(1)
    assert around.map_region(1, 5, FAR_S)


def test_one_chunk_in_eight_that_is_used_keeps_it_going() -> None:
    around = account()
    for miss in range(500):
        region = around.region(1, miss * 32, FAR_S)
        assert region
        around.asked(1, range(miss * 32, miss * 32 + 32))
        for used in range(int(32 / EARNS)):
            around.used(miss * 32 + used)
    assert around.statistics()["used"] == 500 * 4


def test_a_narrow_link_is_asked_for_smaller_regions_and_a_wide_one_for_larger_ones_again() -> None:
    around = account()
    for _ in range(3):
        around.took(5 * FAR_S, FAR_S)
    assert len(around.region(1, 0, FAR_S)) == 8
    for _ in range(40):
        around.took(FAR_S, FAR_S)
    assert len(around.region(1, 0, FAR_S)) == 32


def test_what_left_the_cache_unused_is_counted_once_and_forgotten() -> None:
    around = account()
    around.asked(1, [1, 2, 3, 4])
    around.used(2)  # before it came
    around.failed([4])
    around.arrived(3)
    around.used(2)
    around.evicted([1, 2, 3, 4])
    assert around.statistics() == {"arrived": 3, "used": 1, "wasted": 2}
    assert not around.holding


def test_what_is_remembered_is_bounded() -> None:
    around = account(capacity_chunks=100)
    for image in range(2000):
        around.region(image, 0, FAR_S)
    around.asked(1, range(10_000))
    for part in range(10_000):
        around.map_region(2, part * MAP_CHUNKS, FAR_S)
    assert len(around._credit) <= 256
    assert len(around._maps) <= MAPS_MAX
    assert len(around._held) <= 100


# --- on a volume ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A volume with an image that was written from front to end."""
    directory = tmp_path_factory.mktemp("around")

    async def make() -> None:
        url = await make_volume(f"file://{directory / 'store'}")
        async with opened(url, directory / "setup") as volume:
            entry = await volume.create(ROOT_ID, "one.raw")
            image = await volume.open_image(entry.node_id)
            for at in range(0, CHUNKS, 128):
                await image.write(at * CHUNK, os.urandom(128 * CHUNK))
            await volume.close_image(image)

    trio.run(make)
    return directory


class FarPacer(Pacer):
    """What it is told of a store is always that it is far."""

    def demand(self, took_s: float, now_s: float) -> None:
        super().demand(FAR_S, now_s)


async def _read_far(volume: Volume, image: Image, chunks: list[int]) -> int:
    """Read chunks as a guest of a store that is far away; how many it waited for."""
    assert volume.prefetcher is not None
    volume.prefetcher.pacer = FarPacer(4096, first=512)
    waited = 0
    for index in chunks:
        if image.read_nowait(index * CHUNK, 4096) is None:
            waited += 1
            await image.read(index * CHUNK, 4096)
        await trio.testing.wait_all_tasks_blocked(0.002)
        await volume.cache.wait_idle()
        await trio.testing.wait_all_tasks_blocked(0.002)
    return waited


@pytest.fixture(autouse=True)
def _no_link_is_narrow(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a volume: how long a region takes on a machine under load says nothing of a link."""
    if "tmp_path" in request.fixturenames:
        monkeypatch.setattr("novafs.prefetch.around.SLOW", math.inf)


def _cold(store: Path, place: Path, chunks: list[int], **flags: str) -> tuple[int, dict[str, Any]]:
    """How many a first reader waits for, and prefetch's figures."""

    async def main() -> tuple[int, dict[str, Any]]:
        # Read-only: the next test finds nothing learned either.
        async with opened(
            f"file://{store / 'store'}", place, prefetch=True, read_only=True, **{"prefetch__read_around": "2MiB", **flags}
        ) as volume:
            image = await volume.open_image((await volume.catalog.lookup(ROOT_ID, "one.raw")).node_id)
            waited = await _read_far(volume, image, chunks)
            assert volume.prefetcher is not None
            found = volume.prefetcher.statistics()
            await volume.close_image(image)
            return waited, found

    return trio.run(main)


def _clustered() -> list[int]:
    """Twenty places, at each of which ten chunks of 32 are read, in no order."""
    rng = random.Random(3)
    return [32 * place + at for place in rng.sample(range(CHUNKS // 32), 20) for at in rng.sample(range(32), 10)]


def test_a_first_reader_waits_once_for_each_place(store: Path, tmp_path: Path) -> None:
    waited, found = _cold(store, tmp_path / "a", _clustered())
    assert waited <= 25
    # What the process has spent so far says how much of it prefetch names by itself.
    assert found["around"]["used"] + found["total"]["used"] + found["total"]["late"] >= 170
    assert 100 <= found["around"]["used"] <= found["around"]["arrived"] <= 20 * 31
    assert found["total"]["issued"] == found["total"]["used"] + found["total"]["wasted"] + found["total"]["late"] + found["pending"]


def test_without_it_a_first_reader_waits_for_most_chunks(store: Path, tmp_path: Path) -> None:
    waited, found = _cold(store, tmp_path / "a", _clustered(), prefetch__read_around="0")
    assert waited >= 100
    assert found["around"]["arrived"] == 0


def test_random_reads_bring_a_bounded_number_of_chunks_in_vain(store: Path, tmp_path: Path) -> None:
    _, found = _cold(store, tmp_path / "a", random.Random(5).sample(range(0, CHUNKS, 32), CHUNKS // 32))
    assert found["around"]["arrived"] <= CREDIT + 32


def test_the_map_is_there_before_it_is_asked_for(store: Path, tmp_path: Path) -> None:
    async def main() -> None:
        async with opened(
            f"file://{store / 'store'}", tmp_path / "a", prefetch=True, read_only=True, prefetch__read_around="2MiB"
        ) as volume:
            image = await volume.open_image((await volume.catalog.lookup(ROOT_ID, "one.raw")).node_id)
            prefetcher = volume.prefetcher
            assert prefetcher is not None
            await _read_far(volume, image, [0, 1024])
            while len(image.loaded_leaves()) < CHUNKS // 256 or prefetcher._requests:
                await trio.sleep(0.001)
            assert prefetcher.pacer.in_flight == 0
            assert not image.map_ahead(0, CHUNKS)
            await volume.close_image(image)

    trio.run(main)


@pytest.mark.parametrize("requests_max", [1, 4, 16])
def test_the_map_is_read_ahead_with_few_requests_and_where_parts_of_it_are_here(
    store: Path, tmp_path: Path, requests_max: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        async with opened(
            f"file://{store / 'store'}", tmp_path / "a", prefetch=True, read_only=True, prefetch__read_around="2MiB"
        ) as volume:
            image = await volume.open_image((await volume.catalog.lookup(ROOT_ID, "one.raw")).node_id)
            prefetcher = volume.prefetcher
            assert prefetcher is not None
            prefetcher._requests_max = requests_max
            prefetcher.pacer.demand_s = 0.001
            await image.load_entries(range(0, CHUNKS, 256))  # now its nodes are in L1
            image.trim_map(keep_leaves=0)
            ahead = image.map_ahead(0, CHUNKS)
            assert len(ahead) == CHUNKS // 256
            volume.cache.l1.drop_many(reference.chunk_id for _, reference in ahead[::2])
            await prefetcher._load_map(image, range(CHUNKS), 0)
            assert len(image.loaded_leaves()) == CHUNKS // 256
            assert prefetcher.pacer.in_flight == prefetcher._requests == 0
            image.trim_map(keep_leaves=0)
            monkeypatch.setattr("novafs.prefetcher.MAP_SHARE", volume.cache.l1.capacity_bytes // (3 * NODE_BYTES))
            await prefetcher._load_map(image, range(CHUNKS), 0)
            assert sorted(image.loaded_leaves()) == [0, 1, 2]
            await volume.close_image(image)

    trio.run(main)


def test_a_region_that_comes_late_does_not_switch_it_on_again() -> None:
    for most in (0, 4):
        around = account()
        around.retune(most_chunks=most)
        around.took(10 * FAR_S, FAR_S)
        assert not around.region(1, 70, FAR_S)


def test_accounts_are_bounded_whoever_uses_what_came() -> None:
    around = account()
    for image in range(3 * IMAGES_MAX):
        around.asked(image, [*around.region(image, 0, FAR_S), image])
    for image in range(3 * IMAGES_MAX):
        around.used(image)
    assert len(around._credit) <= IMAGES_MAX


def test_an_image_that_is_unlearned_has_a_new_account(store: Path, tmp_path: Path) -> None:
    async def main() -> None:
        async with opened(
            f"file://{store / 'store'}", tmp_path / "a", prefetch=True, read_only=True, prefetch__read_around="2MiB"
        ) as volume:
            image = await volume.open_image((await volume.catalog.lookup(ROOT_ID, "one.raw")).node_id)
            assert volume.prefetcher is not None
            around = volume.prefetcher.around
            while around.region(image.watch_number, 0, FAR_S):
                around.asked(image.watch_number, range(32))
            volume.prefetcher.unlearn(image)
            assert around.region(image.watch_number, 0, FAR_S)
            await volume.close_image(image)

    trio.run(main)


def test_places_far_apart_in_the_pack_take_no_more_requests_than_prefetch_may_send(tmp_path: Path) -> None:
    async def main() -> None:
        url = await make_volume(f"file://{tmp_path / 'store'}")
        async with opened(url, tmp_path / "setup") as volume:
            image = await volume.open_image((await volume.create(ROOT_ID, "one.raw")).node_id)
            await image.write(0, os.urandom(32 * CHUNK))
            await image.commit()
            for index in range(32):  # three of four in another pack: what stays has gaps between that no request spans
                if index % 4:
                    await image.write(index * CHUNK, os.urandom(CHUNK))
            await volume.close_image(image)
        async with opened(url, tmp_path / "a", prefetch=True, read_only=True, prefetch__read_around="2MiB") as volume:
            image = await volume.open_image((await volume.catalog.lookup(ROOT_ID, "one.raw")).node_id)
            prefetcher, source = volume.prefetcher, volume.cache._l3
            assert prefetcher is not None
            assert isinstance(source, PackSource)
            prefetcher._requests_max = 2
            prefetcher.pacer = FarPacer(4096, first=512)
            await image.load_entries(range(32))
            prefetcher.pacer.demand(FAR_S, trio.current_time())
            before = source.statistics().requests
            await image.read(0, 4096)
            while prefetcher._log:
                await trio.testing.wait_all_tasks_blocked()
            most = prefetcher._requests
            assert most <= 2
            await volume.cache.wait_idle()
            while prefetcher._requests:
                await trio.testing.wait_all_tasks_blocked()
            assert prefetcher.pacer.in_flight == 0
            assert source.statistics().requests - before <= 1 + 2
            await volume.close_image(image)

    trio.run(main)
