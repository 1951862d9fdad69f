"""Long runs: what lies ahead of a reader that goes through an image, how much of it, and what that costs."""

from __future__ import annotations

import contextlib
import os
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st

from novafs.cache.packs import plan_runs
from novafs.catalogtree import ROOT_ID
from novafs.errors import NovaError
from novafs.image import Image
from novafs.prefetch.longrun import CACHE_SHARE, FAR, GOING, PIECE, RUNS_MAX, SLACK, UNREAD_SHARE, LongRuns, Run
from novafs.prefetcher import LOOKED_AT, NEVER, NOTED_FIRST
from novafs.volume import Volume
from tests.support.engine import fresh_volume, make_volume, opened
from tests.support.fixtures import trio_test

CHUNK = 64 << 10
MOST = 512
FIRST, HOLE, SECOND = 1000, 3000, 200
"""Chunks of the image: data, a hole, data."""


def runs(most: int = MOST) -> LongRuns:
    return LongRuns(most_chunks=most, capacity_chunks=1 << 16)


def test_a_run_is_a_long_one_once_it_has_come_far_and_had_to_wait() -> None:
    found = runs()
    assert [found.read(1, at, at, waited=not at) for at in range(FAR)] == [None] * FAR
    assert found.read(1, FAR, FAR, waited=True) is not None
    assert found.read(2, FAR + 1, FAR + 1, waited=True) is None  # another image's


def test_what_is_all_there_makes_no_run() -> None:
    found = runs()
    assert not any(found.read(1, at, at, waited=False) for at in range(4 * FAR))
    assert not found._runs


@pytest.mark.parametrize("chunks", [300, 600, 2000, 10_000])
def test_random_reads_are_hardly_ever_taken_for_one(chunks: int) -> None:
    found, rng = runs(), random.Random(3)
    taken = [run.end for run in (found.read(1, at, at, waited=True) for at in rng.choices(range(chunks), k=3000)) if run is not None]
    # At the end of the image there is nothing that it would do.
    assert sum(end < chunks - 64 for end in taken) <= 60


def test_many_small_pieces_at_a_time_are_of_one_run() -> None:
    found = runs()
    for at in range(0, 100, 2):
        for piece in range(32):
            run = found.read(1, at + piece // 16, at + piece // 16, waited=True)
        run = found.read(1, at, at, waited=True)
    assert run is not None


def test_a_run_that_stands_still_sleeps_until_it_has_to_wait() -> None:
    found = runs()
    for at in range(FAR + 1):
        found.read(1, at, at, waited=True)
    found.rest()
    assert found.served(1)
    found.rest()
    assert not found.served(1)
    assert found.awake() == []
    assert found.read(1, FAR + 1, FAR + 1, waited=False) is None
    assert found.read(1, FAR + 2, FAR + 2, waited=True) is not None
    assert found.served(1)


def test_a_small_image_that_is_read_again_and_again_is_none() -> None:
    found = runs()
    for _ in range(5):
        taken = [found.read(1, at, at, waited=True) is not None for at in range(60)]
    assert sum(taken) <= 16  # its end lies beside its beginning: the engine is to see that it is read in order


def test_what_is_read_here_and_there_is_none() -> None:
    found = runs()
    assert not any(found.read(1, at, at, waited=True) for at in range(0, 4000, 2))
    assert not any(found.read(1, at * 977 % 100_000, at * 977 % 100_000, waited=True) for at in range(3000))
    assert len(found._runs) <= RUNS_MAX


def test_pieces_that_come_out_of_order_are_of_one_run() -> None:
    found, order = runs(), [at ^ 1 for at in range(40)]
    assert [found.read(1, 16 * at, 16 * at + 15, waited=True) is not None for at in order][-1]
    assert len(found._runs) == 1


def test_readers_of_parts_of_chunks_are_followed() -> None:
    found = runs()
    for at in range(100):
        run = found.read(1, at, at + 1, waited=True)
    assert run is not None
    assert (run.start, run.end, run.seen) == (0, 100, 101)


def test_what_is_ahead_is_at_most_a_third_of_what_lies_behind() -> None:
    found = runs()
    for at in range(4000):
        run = found.read(1, at, at, waited=True)
        if run is None:
            continue
        while count := found.room(run):
            found.asked(run, range(run.ahead, run.ahead + count), [1 << 30 | index for index in range(run.ahead, run.ahead + count)])
            run.ahead += count
        assert len(run.asked) <= min(MOST, (at + 1) // 3)
    assert run is not None
    assert len(run.asked) > MOST // 2


def ask_ahead(found: LongRuns) -> None:
    """All that the runs may ask for, of an image without holes."""
    for run in found.awake():
        while count := found.room(run):
            ahead = range(run.ahead, run.ahead + count)
            found.asked(run, ahead, [run.image << 40 | index for index in ahead])
            run.ahead += count


def test_a_run_that_begins_to_leave_out_much_is_served_no_longer() -> None:
    found, rng = runs(), random.Random(1)
    for at in range(200):
        found.read(1, at, at, waited=True)
    ask_ahead(found)
    at, asked = 200, found.pending
    while at < 20_000:
        found.read(1, at, at, waited=True)
        ask_ahead(found)
        at += rng.randrange(3, 60)
    assert found.pending <= asked + 400 // 3
    for index in range(at, 4 * at):  # all is read again: what it left out is little now
        run = found.read(1, index, index, waited=True)
    assert run is not None
    assert found.awake() == [run]


def test_chunks_that_are_read_again_do_not_count_again() -> None:
    found, rng = runs(), random.Random(1)
    for at in (0, 50):
        found.read(1, at, at, waited=True)
    assert not any(found.read(1, at % 2 + 50, at % 2 + 50, waited=True) for at in range(200))
    read: set[int] = set()
    while len(read) < 35:  # less than three in four of what makes a run
        at = rng.randrange(1000, 1060)
        read.add(at)
        assert found.read(2, at, at, waited=True) is None


def test_several_runs_share_what_the_cache_keeps_of_unread_chunks() -> None:
    found, capacity = LongRuns(most_chunks=MOST, capacity_chunks=1024), 1024
    for at in range(0, 4000, 16):
        for image in range(1, 9):
            found.read(image, at, at + 15, waited=True)
            for index in range(at, at + 16):
                found.used(image << 40 | index)
            ask_ahead(found)
            assert found.pending <= capacity // UNREAD_SHARE + PIECE
    ahead = [len(run.asked) for run in found._runs.values()]
    assert len(ahead) == 8
    assert min(ahead) > 0
    for at in range(4000, 4000 + 16 * 2 * GOING, 16):  # the others have stopped
        found.read(1, at, at + 15, waited=True)
        for index in range(at, at + 16):
            found.used(1 << 40 | index)
        ask_ahead(found)
    assert max(len(run.asked) for run in found._runs.values()) > capacity // CACHE_SHARE // 2


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.integers(-SLACK + 1, SLACK), st.integers(1, 300)), max_size=40))
def test_a_run_knows_how_many_of_its_chunks_were_read(steps: list[tuple[int, int]]) -> None:
    """Whatever the order, and the length of the reads; what lies further back than a run remembers counts as read."""
    run = Run(1, 1000, 1003)
    read = {1000, 1001, 1002, 1003}
    for step, length in steps:
        first = max(0, run.end + step)
        behind = run.end - SLACK
        run.went(first, first + length - 1)
        read |= {index for index in range(first, first + length) if index > behind and index >= run.start}
        assert run.end == max(read)
        assert run.seen == len(read)
        assert run.trail == sum(1 << run.end - index for index in read if run.end - index < SLACK)


def test_a_closed_image_is_forgotten_and_what_it_brought_is_accounted_for() -> None:
    found = runs()
    for at in range(FAR + 1):
        run = found.read(7, at, at, waited=True)
    assert run is not None
    found.asked(run, [FAR + 1, FAR + 2, FAR + 3], [1, 2, 3])
    assert found.expected(1)
    assert found.used(1) == 7
    assert found.used(1) is None
    assert not found.expected(1)
    assert found.pending == 2
    found.forget(7)
    assert found.awake() == []
    assert found.gone([2, 3, 4]) == {7: 2}
    assert not found.holding


def test_without_streams_there_are_none() -> None:
    found = runs(0)
    assert not any(found.read(1, at, at, waited=True) for at in range(2 * FAR))


# --- on a volume ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A volume with an image of data, a hole and data."""
    directory = tmp_path_factory.mktemp("longrun")

    async def make() -> None:
        url = await make_volume(f"file://{directory / 'store'}")
        async with opened(url, directory / "setup") as volume:
            image = await volume.open_image((await volume.create(ROOT_ID, "one.raw")).node_id)
            await image.resize((FIRST + HOLE + SECOND) * CHUNK)
            for at in (*range(0, FIRST, 50), *range(FIRST + HOLE, FIRST + HOLE + SECOND, 50)):
                await image.write(at * CHUNK, os.urandom(50 * CHUNK))
            await volume.close_image(image)

    trio.run(make)
    return directory


@pytest.fixture
def place(store: Path, tmp_path: Path) -> Path:
    """A copy of that volume for one test, since hosts leave there what they have learned: links, since objects are never changed."""
    os.system(f"cp -al {store}/store {tmp_path}/store")
    return tmp_path


def copied(place: Path, chunks: int) -> dict[str, Any]:
    """Read the first chunks of the image by 16, each time until all that it led to has come; figures of prefetch and of the store."""

    async def main() -> dict[str, Any]:
        async with opened(f"file://{place / 'store'}", place / "host", prefetch=True, l1__capacity="256MiB") as volume:
            return await drive(volume)

    async def drive(volume: Volume) -> dict[str, Any]:
        image = await volume.open_image((await volume.catalog.lookup(ROOT_ID, "one.raw")).node_id)
        waited = 0
        for at in range(0, chunks, 16):
            if image.read_nowait(at * CHUNK, 16 * CHUNK) is None:
                waited += 1
                await image.read(at * CHUNK, 16 * CHUNK)
            await trio.testing.wait_all_tasks_blocked(0.002)
            await volume.cache.wait_idle()
            await trio.testing.wait_all_tasks_blocked(0.002)
        assert volume.prefetcher is not None
        await volume.close_image(image)  # with which the last reads are noted
        found = volume.prefetcher.statistics()
        return {"waited": waited, "requests": volume.cache.statistics().l3_traffic.requests, **found}

    return trio.run(main)


def test_a_copy_of_an_image_waits_at_its_beginning_and_asks_in_large_pieces(place: Path) -> None:
    found = copied(place, FIRST + HOLE + SECOND)
    assert found["waited"] <= 12
    assert found["total"]["wasted"] == 0
    assert found["total"]["used"] + found["total"]["late"] >= 0.9 * (FIRST + SECOND)
    # 1,200 chunks, their map of 17 leaves, and a beginning in small pieces.
    assert found["requests"] <= 90
    assert found["candidates"] < 3000  # what was judged one by one
    assert found["patterns"] == {"sequential": 1}


def test_a_copy_that_stops_was_right_three_times_in_four(place: Path) -> None:
    found = copied(place, 400)
    brought = found["total"]["issued"] + found["around"]["arrived"]
    assert brought <= 400 + 400 // 3 + 64


# --- what goes otherwise --------------------------------------------------------------------------------------------


async def settled(volume: Volume) -> None:
    """Until all that reads have led to has come."""
    prefetcher = volume.prefetcher
    assert prefetcher is not None
    while True:
        await trio.testing.wait_all_tasks_blocked(0.002)
        await volume.cache.wait_idle()
        if not prefetcher._requests and not prefetcher._log:
            return


async def read(image: Image, first: int, chunks: int = 16) -> bytes:
    at, length = first * image.chunk_size, chunks * image.chunk_size
    found = image.read_nowait(at, length)
    return found if found is not None else await image.read(at, length)


def accounted(volume: Volume) -> dict[str, Any]:
    """The figures, which add up."""
    prefetcher = volume.prefetcher
    assert prefetcher is not None
    found = prefetcher.statistics()
    total, queued = found["total"], sum(not issue.sent for issue in prefetcher.engine._issued.values())
    # What is dropped unsent was never issued, but counted as dropped.
    ended = total["used"] + total["late"] + total["wasted"]
    assert ended + found["pending"] - queued <= total["issued"] <= ended + total["dropped"] + found["pending"] - queued, found
    assert prefetcher.pacer.in_flight == prefetcher._requests == 0
    return found


async def image_of(volume: Volume, name: str = "one.raw") -> Image:
    return await volume.open_image((await volume.catalog.lookup(ROOT_ID, name)).node_id)


async def written(volume: Volume, name: str, chunks: list[bytes]) -> None:
    image = await volume.open_image((await volume.create(ROOT_ID, name)).node_id)
    for at, chunk in enumerate(chunks):
        await image.write(at * len(chunk), chunk)
    await volume.close_image(image)


@trio_test
async def test_a_reader_that_leaves_out_much_after_a_long_run_costs_a_few_chunks(place: Path) -> None:
    async with opened(f"file://{place / 'store'}", place / "host", prefetch=True, l1__capacity="256MiB") as volume:
        image, rng = await image_of(volume), random.Random(1)
        for at in range(0, 192, 16):
            await read(image, at)
            await settled(volume)
        asked, at = volume.cache.statistics().l3_traffic.hits, 192
        while at < 700:
            await read(image, at, 1)
            await settled(volume)
            at += rng.randrange(5, 50)
        assert volume.cache.statistics().l3_traffic.hits - asked <= 150
        accounted(volume)
        await volume.close_image(image)


@trio_test
async def test_an_image_with_the_same_at_several_places_is_accounted_for(tmp_path: Path) -> None:
    async with fresh_volume(tmp_path) as volume:
        same = [os.urandom(CHUNK) for _ in range(160)]
        await written(volume, "one.raw", [os.urandom(CHUNK) for _ in range(64)] + [same[at * at % 160] for at in range(200)])
        await written(volume, "two.raw", same)
        url = volume.config.volume_url
    async with opened(url, tmp_path / "host", prefetch=True) as volume:
        image, other = await image_of(volume), await image_of(volume, "two.raw")
        for at in range(0, 256, 16):
            await read(image, at)
            await settled(volume)
            accounted(volume)
            await read(other, at // 3 % 150, 1)  # what was brought for the one is used by the other
        await settled(volume)
        found = accounted(volume)
        assert found["total"]["issued"] > 16
        assert found["total"]["dropped"] <= 64
        for one in (image, other):
            account = volume.prefetcher.engine._images[one.watch_number].counts
            assert account.used + account.late + account.wasted + account.dropped <= account.issued
            await volume.close_image(one)


@trio_test
async def test_copies_side_by_side_do_not_drive_out_what_each_other_needs(tmp_path: Path) -> None:
    async with fresh_volume(tmp_path) as volume:
        for number in range(5):
            await written(volume, f"{number}.raw", [os.urandom(CHUNK) for _ in range(208)])
        url = volume.config.volume_url
    async with opened(url, tmp_path / "host", prefetch=True, read_only=True, l1__capacity="32MiB") as volume:
        prefetcher, counts = volume.prefetcher, Counter[str]()
        assert prefetcher is not None
        by_run = prefetcher.engine.by_run

        def counted(number: int, **changes: int) -> None:
            counts.update(changes)
            by_run(number, **changes)

        prefetcher.engine.by_run = counted  # type: ignore[method-assign]
        # What is fetched by judgement follows the time that the store takes, and drives out what it likes.
        prefetcher.engine.take = lambda most: []  # type: ignore[method-assign]
        images = [await image_of(volume, f"{number}.raw") for number in range(5)]
        for at in range(0, 208, 16):
            for image in images:
                await read(image, at)
            await settled(volume)
        accounted(volume)
        assert counts["issued"] > 5 * 30
        assert counts["wasted"] <= counts["issued"] // 10
        for image in images:
            await volume.close_image(image)


@trio_test
async def test_an_image_that_lies_apart_in_the_store_takes_no_more_requests_than_prefetch_may_send(place: Path) -> None:
    async with opened(f"file://{place / 'store'}", place / "setup") as volume:
        image = await image_of(volume)
        for at in range(400):  # three of four in other packs: what stays has gaps between that no request spans
            if at % 4:
                await image.write(at * CHUNK, os.urandom(CHUNK))
        await volume.close_image(image)
    async with opened(f"file://{place / 'store'}", place / "host", prefetch=True, l1__capacity="256MiB") as volume:
        image, prefetcher = await image_of(volume), volume.prefetcher
        assert prefetcher is not None
        most, take = 0, prefetcher._take

        def taking(places: list[Any]) -> int:
            nonlocal most
            requests = take(places)
            assert requests == len(plan_runs([reference for _, reference in places]))
            most = max(most, prefetcher._requests)
            return requests

        prefetcher._take = taking  # type: ignore[method-assign]
        prefetcher._requests_max = 2
        for at in range(0, 400, 16):
            await read(image, at)
            await settled(volume)
        found = accounted(volume)
        assert found["total"]["used"] + found["total"]["late"] > 50
        assert most == 2
        await volume.close_image(image)


@trio_test
async def test_a_run_before_a_huge_hole_looks_a_little_way_into_it(tmp_path: Path) -> None:
    async with fresh_volume(tmp_path) as volume:
        await written(volume, "one.raw", [os.urandom(CHUNK) for _ in range(160)])
        image = await image_of(volume)
        await image.resize(1 << 40)
        await volume.close_image(image)
        url = volume.config.volume_url
    async with opened(url, tmp_path / "host", prefetch=True) as volume:
        image, prefetcher = await image_of(volume), volume.prefetcher
        assert prefetcher is not None
        for at in range(0, 160, 16):
            await read(image, at)
            await settled(volume)
        for _ in range(50):
            prefetcher._dispatch()
            await trio.testing.wait_all_tasks_blocked()
        assert 1 < len(image.loaded_leaves()) <= 3 * LOOKED_AT // 256
        await volume.close_image(image)


@trio_test
async def test_what_fails_is_not_asked_for_again_and_again(place: Path) -> None:
    async with opened(f"file://{place / 'store'}", place / "host", prefetch=True, l1__capacity="256MiB") as volume:
        image = await image_of(volume)
        for at in range(0, 192, 16):
            await read(image, at)
            await settled(volume)
        await image.load_entries(range(0, FIRST, 256))
        for pack in (place / "store" / "packs").rglob("*"):
            if pack.is_file():
                pack.unlink()
        before = volume.cache.statistics().l3_traffic.requests
        for at in range(192, 400, 16):
            with contextlib.suppress(NovaError):
                await read(image, at)
            await settled(volume)
        found = accounted(volume)
        assert found["total"]["dropped"] > 0
        assert volume.cache.statistics().l3_traffic.requests - before <= 400
        await volume.close_image(image)


@trio_test
async def test_all_reads_of_an_image_are_noted_while_a_run_is_served_there(place: Path) -> None:
    async with opened(f"file://{place / 'store'}", place / "host", prefetch=True, l1__capacity="256MiB") as volume:
        image, prefetcher = await image_of(volume), volume.prefetcher
        assert prefetcher is not None
        for at in range(0, 304, 16):
            await read(image, at)
            await settled(volume)
        assert image.watch_from < NEVER
        image.watch_reads = NOTED_FIRST
        prefetcher._hurried = True
        used = accounted(volume)["total"]["used"]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(prefetcher.throttle, "_credit_s", -1e9)
            for at in range(304, 336):
                assert image.read_nowait(at * CHUNK, CHUNK) is not None
                assert prefetcher._hurried
            prefetcher._work_off()
        assert accounted(volume)["total"]["used"] == used + 32
        prefetcher.unlearn(image)
        for at in range(2):
            image.read_nowait(at * CHUNK, CHUNK)
            prefetcher._work_off()
        assert image.watch_from == NEVER
        await volume.close_image(image)
