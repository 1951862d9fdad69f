"""Long runs: what lies ahead of a reader that goes through an image, how much of it, and what that costs."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from novafs.catalogtree import ROOT_ID
from novafs.prefetch.longrun import FAR, RUNS_MAX, LongRuns
from novafs.volume import Volume
from tests.support.engine import make_volume, opened

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


def test_what_is_read_here_and_there_is_none() -> None:
    found = runs()
    assert not any(found.read(1, at, at, waited=True) for at in range(0, 4000, 2))
    assert not any(found.read(1, at * 977 % 100_000, at * 977 % 100_000, waited=True) for at in range(3000))
    assert len(found._runs) <= RUNS_MAX


@pytest.mark.parametrize("chunks", [300, 600, 2000, 10_000])
def test_random_reads_are_hardly_ever_taken_for_one(chunks: int) -> None:
    found, rng = runs(), random.Random(3)
    taken = [run.end for run in (found.read(1, at, at, waited=True) for at in rng.choices(range(chunks), k=3000)) if run is not None]
    # At the end of the image there is nothing that it would do.
    assert sum(end < chunks - 64 for end in taken) <= 60


def test_pieces_that_come_out_of_order_are_of_one_run() -> None:
    found, order = runs(), [at ^ 1 for at in range(40)]
    assert [found.read(1, 16 * at, 16 * at + 15, waited=True) is not None for at in order][-1]
    assert len(found._runs) == 1


def test_readers_of_parts_of_chunks_are_followed() -> None:
    found = runs()
    for at in range(100):
        run = found.read(1, at, at + 1, waited=True)
    assert run is not None
    assert (run.start, run.end, run.left_out) == (0, 100, 0)


def test_many_small_pieces_at_a_time_are_of_one_run() -> None:
    found = runs()
    for at in range(0, 100, 2):
        for piece in range(32):
            run = found.read(1, at + piece // 16, at + piece // 16, waited=True)
        run = found.read(1, at, at, waited=True)
    assert run is not None


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


def test_a_closed_image_is_forgotten_and_what_it_brought_is_accounted_for() -> None:
    found = runs()
    for at in range(FAR + 1):
        run = found.read(7, at, at, waited=True)
    assert run is not None
    found.asked(run, [FAR + 1, FAR + 2, FAR + 3], [1, 2, 3])
    assert found.used(1)
    assert not found.used(1)
    found.forget(7)
    assert found.awake() == []
    assert found.gone([2, 3, 4]) == {7: 2}
    assert not found.holding


def test_a_run_that_stands_still_sleeps_until_it_has_to_wait() -> None:
    found = runs()
    for at in range(FAR + 1):
        found.read(1, at, at, waited=True)
    found.rest()
    assert found.running(1)
    found.rest()
    assert not found.running(1)
    assert found.awake() == []
    assert found.read(1, FAR + 1, FAR + 1, waited=False) is None
    assert found.read(1, FAR + 2, FAR + 2, waited=True) is not None
    assert found.running(1)


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


def test_a_copy_that_stops_was_right_three_times_in_four(place: Path) -> None:
    found = copied(place, 400)
    brought = found["total"]["issued"] + found["around"]["arrived"]
    assert brought <= 400 + 400 // 3 + 64
