"""The order in which dead packs leave L3: unit by unit, and in collections of a real store under a clock of the test's own."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from novafs.catalogtree import ROOT_ID
from novafs.chunk import PackId, chunk_id
from novafs.condemned import mark_damaged, read_condemned
from novafs.gc import GcReport, collect
from novafs.modelstore import model_prefix
from novafs.objectstore.base import ObjectInfo
from novafs.pack import pack_id_of
from novafs.packcount import PackCount
from novafs.packscore import DAY_S, PAST_MAX, Past, dump_pasts, load_pasts, next_past, worth
from novafs.prefetch.base import key_of
from novafs.prefetch.markov import TransitionTable
from novafs.revisions import revision_name
from novafs.volume import Volume
from tests.support.fixtures import run
from tests.support.hosts import World, pattern, read_image, write_image

HOUR = 3600.0


# --- the score ----------------------------------------------------------------------------------------------------


def test_who_was_of_use_lately_came_back_before_or_is_known_is_worth_more() -> None:
    now_s = 100 * DAY_S
    plain = worth(8 << 20, Past(90 * DAY_S), 0.0, now_s=now_s)
    assert worth(8 << 20, Past(99 * DAY_S), 0.0, now_s=now_s) > plain
    assert worth(8 << 20, Past(90 * DAY_S, revivals=1), 0.0, now_s=now_s) > plain
    assert worth(8 << 20, Past(90 * DAY_S), 0.5, now_s=now_s) > plain
    assert worth(64 << 10, Past(90 * DAY_S), 0.0, now_s=now_s) < plain
    assert worth(16 << 20, Past(90 * DAY_S), 0.0, now_s=now_s) == pytest.approx(plain, rel=0.02), "twice the bytes save twice as much"


@given(st.integers(0, 1 << 40), st.floats(0, 1e12), st.integers(0, 1 << 31), st.floats(0, 1), st.floats(0, 1e12))
def test_any_score_is_finite_and_above_nothing(size: int, used_s: float, revivals: int, known: float, now_s: float) -> None:
    score = worth(size, Past(used_s, revivals), known, now_s=now_s)
    assert 0.0 < score < float("inf")


IDS = st.binary(min_size=16, max_size=16)


@given(st.dictionaries(IDS, st.builds(Past, st.floats(0, 1e12), st.integers(0, 1 << 31), st.booleans()), max_size=20))
def test_what_is_known_of_packs_is_read_as_it_was_written(pasts: dict[bytes, Past]) -> None:
    assert load_pasts(dump_pasts(pasts)) == pasts


@given(st.binary(max_size=200))
def test_garbage_is_no_past(data: bytes) -> None:
    assert len(load_pasts(data)) <= len(data) // 32


def test_what_is_remembered_is_bounded_and_the_latest_stay() -> None:
    pasts = {number.to_bytes(16, "big"): Past(float(number)) for number in range(PAST_MAX + 50)}
    kept = load_pasts(dump_pasts(pasts))
    assert len(kept) == PAST_MAX
    assert min(past.used_s for past in kept.values()) == 50.0


def found(*, referenced: bool, modified_s: float = 1000.0) -> PackCount:
    count = PackCount(PackId(bytes(16)), ObjectInfo("packs/00/" + "0" * 32, 1000, modified_s), listed=True)
    count.referenced = referenced
    return count


def test_the_life_of_a_pack_is_followed_from_collection_to_collection() -> None:
    assert next_past(found(referenced=True), None, now_s=2000.0, collected_s=0.0) is None
    died = next_past(found(referenced=False), None, now_s=3000.0, collected_s=2000.0)
    assert died == Past(2000.0), "somebody referred to it when the last collection began"
    assert next_past(found(referenced=False), died, now_s=4000.0, collected_s=3000.0) == died
    revived = next_past(found(referenced=True), died, now_s=5000.0, collected_s=4000.0)
    assert revived == Past(5000.0, revivals=1, dead=False)
    assert next_past(found(referenced=True), revived, now_s=6000.0, collected_s=5000.0) == Past(6000.0, revivals=1, dead=False)
    again = next_past(found(referenced=False), revived, now_s=7000.0, collected_s=6000.0)
    assert again == Past(5000.0, revivals=1)
    assert next_past(found(referenced=True), again, now_s=8000.0, collected_s=7000.0) == Past(8000.0, revivals=2, dead=False)
    assert next_past(found(referenced=False, modified_s=9000.0), None, now_s=8000.0, collected_s=0.0) == Past(8000.0)


# --- collections --------------------------------------------------------------------------------------------------


def packs(world: World) -> list[str]:
    return world.names("packs/")


async def written(world: World, volume: Volume, name: str, seed: int, chunks: int = 10) -> str:
    """Write an image; the name of the pack that was made for it."""
    before = set(packs(world))
    await write_image(volume, name, {i: pattern(1000 * seed + i) for i in range(chunks)})
    world.sleep(60)
    (made,) = set(packs(world)) - before
    return made


async def collected(world: World, volume: Volume, times: int, *, room_bytes: int | None = None) -> GcReport:
    config = volume.config
    if room_bytes is not None:
        volume.config = dataclasses.replace(config, l3=dataclasses.replace(config.l3, capacity_bytes=room_bytes))
    for _ in range(times):
        world.sleep(2 * HOUR)
        report = await collect(volume)
        assert report.complete, report.problems
    volume.config = config
    return report


def test_packs_that_came_back_to_life_stay_longer_and_live_ones_never_leave(tmp_path: Path) -> None:
    async def main() -> None:
        world = World(tmp_path)
        with world.running():
            async with world.host("a") as volume:
                made = [await written(world, volume, f"i{number}", number) for number in range(4)]
                for number in range(3):
                    await volume.unlink(ROOT_ID, f"i{number}")
                await collected(world, volume, 1)
                # The oldest is written again, is found by its chunks, and is removed again.
                await write_image(volume, "again", {i: pattern(i) for i in range(10)})
                assert len(packs(world)) == 4
                await collected(world, volume, 1)
                await volume.unlink(ROOT_ID, "again")
                # No room at all for a moment, and then for one dead pack.
                one = (world.root / made[0]).stat().st_size
                report = await collected(world, volume, 2, room_bytes=2 * one + 1000)
                assert packs(world) == sorted([made[0], made[3]]), "the oldest, but it came back once"
                assert (report.packs_live, report.packs_kept) == (1, 1)
                report = await collected(world, volume, 2, room_bytes=1)
                assert packs(world) == [made[3]], "referred to, whatever the capacity"
                assert await read_image(volume, "i3") == b"".join(pattern(3000 + i) for i in range(10))

    run(main)


def test_packs_whose_content_models_know_stay_longer(tmp_path: Path) -> None:
    async def main() -> None:
        world = World(tmp_path)
        with world.running():
            async with world.host("a") as volume:
                made = [await written(world, volume, f"i{number}", number) for number in range(3)]
                table = TransitionTable(volume.chunk_size)
                keys = [key_of(chunk_id(pattern(i))) for i in range(10)]
                for before, after in itertools.pairwise(keys):
                    table.learn(None, before, after, 0)
                await volume.client.create(revision_name(model_prefix("transitions"), 0), table.to_bytes())
                await volume.client.create(revision_name(model_prefix("profiles"), 0), b"garbage")
                for number in range(3):
                    await volume.unlink(ROOT_ID, f"i{number}")
                one = (world.root / made[0]).stat().st_size
                await collected(world, volume, 2, room_bytes=one + 1000)
                assert packs(world) == [made[0]], "the oldest, but guests read it when they start"

    run(main)


def test_what_was_learned_of_packs_outlives_other_changes_of_the_list_and_garbage_in_it(tmp_path: Path) -> None:
    async def main() -> None:
        world = World(tmp_path)
        with world.running():
            async with world.host("a") as volume:
                made = await written(world, volume, "i", 1)
                await written(world, volume, "j", 2)
                await volume.unlink(ROOT_ID, "i")
                await collected(world, volume, 1)
                known = load_pasts((await read_condemned(volume.client)).past)
                assert list(known) == [pack_id_of(made)]
                await mark_damaged(volume.client, [(bytes(16), bytes(32))])
                assert load_pasts((await read_condemned(volume.client)).past) == known
                await collected(world, volume, 3)
                assert load_pasts((await read_condemned(volume.client)).past) == known
                assert made in packs(world)

    run(main)
