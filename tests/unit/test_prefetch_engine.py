"""The engine: what becomes of each prefetch, what it promises, and that everything in it is bounded."""

from __future__ import annotations

import gc
import random
import tracemalloc
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import replace

import pytest

from novafs.errors import ConfigError
from novafs.prefetch.account import Settings
from novafs.prefetch.base import INDEX_BITS, NOTHING, Origin, place_of
from novafs.prefetch.engine import GATE_BYTES, IMAGES_MAX, QUEUE_MAX, PrefetchEngine
from novafs.simulate import Scenario
from tests.support.accesses import access, replayed, requests, scans, uniform

DEFAULT = Scenario()
EAGER = Scenario(prefetch="eager")


def boot(engine: PrefetchEngine, image: int, order: list[int], *, sparing: bool = False) -> list[int]:
    """Open an image, read it in this order with everything fetched at once; the indexes that had to be waited for."""
    engine.opened(image)
    held: set[int] = set()
    missed = []
    for index in order:
        hit = index in held
        if not hit:
            missed.append(index)
            held.add(index)
        engine.observe(access(index, image=image, hit=hit), sparing=sparing)
        for fetch in engine.take(1000):
            found = fetch.place & ((1 << INDEX_BITS) - 1)
            assert fetch.place >> INDEX_BITS == image
            held.add(found)
            engine.arrived(fetch.place, found)
    engine.closed(image)
    return missed


def test_the_first_boot_of_one_image_makes_that_of_its_clone_fast() -> None:
    numbers = random.Random(6)
    order = [0, *numbers.sample(range(1, 30_000), 400)]
    engine = PrefetchEngine(capacity_chunks=1000)
    assert len(boot(engine, 1, order)) > 350
    assert boot(engine, 2, order) == [0]
    counts = engine.statistics().sources["profile"]
    assert counts.used == 400
    assert counts.wasted == 0


def test_a_clone_on_another_host_profits_from_what_was_saved() -> None:
    from novafs.prefetch.markov import TransitionTable
    from novafs.prefetch.profile import ProfileBook

    order = [0, *random.Random(6).sample(range(1, 30_000), 200)]
    here = PrefetchEngine(capacity_chunks=1000)
    boot(here, 1, order)
    there = PrefetchEngine(
        capacity_chunks=1000,
        table=TransitionTable.from_bytes(here.table.to_bytes(), "models/markov", chunk_size=65536),
        book=ProfileBook.from_bytes(here.book.to_bytes(), "models/boot", chunk_size=65536),
    )
    assert boot(there, 7, order) == [0]


def test_above_the_cpu_budget_a_replayed_boot_is_counted_and_teaches_the_sources_nothing() -> None:
    order = [0, *random.Random(6).sample(range(1, 30_000), 200)]
    here = PrefetchEngine(capacity_chunks=1000)
    boot(here, 1, order)
    candidates, pairs = here.statistics().candidates, len(here.table.to_bytes())
    assert boot(here, 2, order, sparing=True) == [0]
    after = here.statistics()
    assert len(here.table.to_bytes()) == pairs
    assert after.candidates - candidates < 10, "of the first access, which was a miss"
    assert after.sources["profile"].used == 200


def test_a_profile_of_another_image_with_the_same_first_chunk_is_not_replayed() -> None:
    contents = {image: {index: (image, index) for index in range(100)} for image in (1, 2)}
    engine = PrefetchEngine(capacity_chunks=1000, content=lambda place: hash(contents[place >> INDEX_BITS].get(place & 0xFFFF, 0)))
    for image in (1, 2):
        engine.opened(image)
        engine.observe(access(0, image=image, key=42))
        assert engine.take(100) == []
        for index in range(10, 60, 7):
            engine.observe(access(index, image=image, key=hash((image, index))))
        engine.closed(image)


def test_a_sequential_reader_soon_waits_for_nothing() -> None:
    replay = replayed(requests(range(3000)), 500, DEFAULT)
    assert replay.engine is not None
    statistics = replay.engine.statistics()
    assert replay.hits / 3000 > 0.95
    assert statistics.total.accuracy is not None
    assert statistics.total.accuracy > 0.97
    assert "sequential" in statistics.sources


def test_streams_that_take_turns_are_all_read_ahead() -> None:
    replay = replayed(requests(scans(6000, 60_000, 6)), 500, DEFAULT)
    assert replay.hits / 6000 > 0.9


@pytest.mark.parametrize("scenario", [DEFAULT, EAGER], ids=["default", "eager"])
def test_on_random_reads_prefetch_falls_silent_within_two_thousand(scenario: Scenario) -> None:
    order = uniform(3000, 200_000, 1)
    first = replayed(requests(order[:2000]), 2500, scenario)
    both = replayed(requests(order), 2500, scenario)
    assert both.prefetched - first.prefetched < 0.05 * (both.misses - first.misses) + (64 if scenario is EAGER else 0)
    assert first.prefetched < 0.05 * first.misses


@pytest.mark.parametrize("scenario", [DEFAULT, EAGER], ids=["default", "eager"])
@pytest.mark.parametrize("chunks", [5_000, 10_000, 40_000])
def test_random_reads_of_an_image_a_few_times_the_cache_are_not_prefetched_either(scenario: Scenario, chunks: int) -> None:
    order = uniform(5000, chunks, 3)
    replay = replayed(requests(order), 2500, scenario)
    base = replayed(requests(order), 2500, Scenario(prefetch="off"))
    assert replay.prefetched < (0.02 if scenario is DEFAULT else 0.05) * replay.misses
    assert replay.misses < base.misses * 1.01


def test_every_prefetch_has_one_end() -> None:
    order = scans(3000, 9000, 3) + uniform(1000, 9000, 2)
    for scenario in (DEFAULT, EAGER, Scenario(prefetch="eager", latency_s=0.03, bandwidth=250e6)):
        replay = replayed(requests(order), 300, scenario)
        assert replay.engine is not None
        statistics = replay.engine.statistics()
        total = statistics.total
        queued = sum(not issue.sent for issue in replay.engine._issued.values())
        assert total.issued == total.used + total.late + total.wasted + statistics.pending - queued
        assert total.issued >= replay.prefetched


def test_what_was_asked_for_before_it_was_sent_is_dropped_and_not_fetched() -> None:
    engine = PrefetchEngine(capacity_chunks=1000)
    for index in range(40):
        engine.observe(access(index))
    assert engine.waiting
    waiting = {place for place in engine._queue if place in engine._issued}
    for index in range(40, 60):
        engine.observe(access(index))
    fetched = {fetch.place for fetch in engine.take(QUEUE_MAX)}
    assert not fetched & {place_of(0, index) for index in range(60)}
    assert waiting - fetched <= {place_of(0, index) for index in range(60)}
    assert engine.statistics().total.dropped > 0


def test_a_failed_fetch_may_be_proposed_again_and_a_closed_image_drops_its_queue() -> None:
    engine = PrefetchEngine(capacity_chunks=1000)
    for index in range(60):
        engine.observe(access(index))
    fetches = engine.take(1)
    engine.failed(fetches[0].place)
    assert not engine.expected(fetches[0].place)
    engine.closed(0)
    assert engine.take(100) == []


def test_a_chunk_of_the_same_request_is_no_prediction() -> None:
    engine = PrefetchEngine(capacity_chunks=1000)
    for index in range(200):
        engine.observe(access(index)._replace(more=True))
    assert engine.take(100) == []


def test_usual_hours_are_warmed() -> None:
    engine = PrefetchEngine(capacity_chunks=1000)
    for day in range(4):
        for step, index in enumerate((5, 900, 33)):
            engine.observe(access(index, time_s=day * 86400.0 + 28800.0 + step))
        engine.take(100)
        engine.evicted([5, 900, 33])
    assert engine.warm(4 * 86400.0 + 20000.0) == 0
    assert engine.warm(4 * 86400.0 + 28300.0) == 3
    fetches = engine.take(100)
    assert {fetch.origin for fetch in fetches} == {Origin.DAILY}
    assert engine.describe(0)["usual_hours_utc"] == ["08:00"]


def test_memory_stays_bounded_whatever_is_read() -> None:
    engine = PrefetchEngine(capacity_chunks=200, settings=Settings(places_max=2048))
    numbers = random.Random(8)
    live: list[int] = []
    for turn in range(20_000):
        image, index = numbers.randrange(2000), numbers.randrange(1 << 20)
        engine.observe(access(index, image=image, key=turn))
        live.append(turn)
        if len(live) > 200:
            engine.evicted([live.pop(0)])
        engine.take(3)
    assert len(engine._judge._seen) <= 2048
    assert len(engine._images) <= IMAGES_MAX
    assert len(engine._presence.places) <= engine._presence._most
    assert len(engine._queue) <= QUEUE_MAX
    assert len(engine._presence._ghosts) <= engine._presence._ghosts_max
    assert len(engine._judge._pending) < 20 * 400 * 2


@pytest.mark.parametrize("order", [uniform(3000, 1 << 30, 1), scans(3000, 40_000, 5)], ids=["random", "streams"])
def test_the_memory_that_is_told_is_about_what_is_taken(order: list[int]) -> None:
    gc.collect()
    tracemalloc.start()
    try:
        engine = PrefetchEngine(capacity_chunks=2000)
        engine.opened(0)
        live: deque[int] = deque()
        for index in order:
            engine.observe(access(index))
            for fetch in engine.take(10):
                engine.arrived(fetch.place, fetch.place)
                live.append(fetch.place)
            live.append(index)
            while len(live) > 2000:
                engine.evicted([live.popleft()])
        gc.collect()
        taken = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    # The gate is told as it is when it has learned much: this one has not.
    assert taken < engine.memory_bytes() < 1.5 * taken + GATE_BYTES


def test_skimmed_hits_keep_a_chunk_young_and_cost_no_candidates() -> None:
    engine = PrefetchEngine(capacity_chunks=100)
    for index in range(50):
        engine.observe(access(index))
    before = engine.statistics().candidates
    for _ in range(100):
        engine.skim(access(7).place, bytes(32))
    assert engine.statistics().candidates == before
    assert engine.statistics().accesses == 150


def taught_streams(content: Callable[[int], int | None] | None = None) -> PrefetchEngine:
    """An engine that has read three files from one end to the other and has learned that this pays."""
    engine = PrefetchEngine(capacity_chunks=4000, content=content)
    for first in (10_000, 20_000, 30_000):
        read(engine, range(first, first + 300))
    return engine


def read(engine: PrefetchEngine, indexes: Iterable[int]) -> list[int]:
    """Read with everything fetched at once; the indexes that were prefetched."""
    fetched = []
    for index in indexes:
        engine.observe(access(index, hit=engine.expected(place_of(0, index))))
        for fetch in engine.take(1000):
            engine.arrived(fetch.place, fetch.place)
            fetched.append(fetch.place)
    return fetched


def test_streams_stop_at_holes_and_at_the_end_of_the_image() -> None:
    fetched = read(taught_streams(lambda place: NOTHING if place >= 50_040 else None), range(50_000, 50_040))
    assert set(fetched) >= set(range(50_010, 50_040))
    assert max(fetched) == 50_039


def test_what_the_cache_holds_under_another_name_is_not_fetched() -> None:
    twin = {50_000 + at: 30_200 + at for at in range(100)}
    engine = taught_streams(lambda place: twin.get(place, place))
    assert not {place for place in read(engine, range(49_950, 50_090)) if place in twin}


def test_a_hole_that_was_fetched_blindly_is_left_alone_for_a_while() -> None:
    engine = taught_streams()
    failed = []
    for index in range(50_000, 50_030):
        engine.observe(access(index))
        for fetch in engine.take(1000):
            if fetch.place >= 50_030:
                engine.failed(fetch.place)
                failed.append(fetch.place)
            else:
                engine.arrived(fetch.place, fetch.place)
    assert failed
    assert len(failed) == len(set(failed))


def test_what_a_request_brings_anyway_is_kept_where_it_pays() -> None:
    engine = PrefetchEngine(capacity_chunks=4000)
    numbers = random.Random(3)
    assert engine.offered([place_of(0, 7)]) == []  # an image that nobody has read
    kept: list[int] = []
    for _ in range(2000):
        # All four chunks of the lower half of a cluster are read, in no order that transitions could tell, and nothing of the upper half.
        base = numbers.randrange(10_000) * 8
        kept.clear()
        for index in numbers.sample(range(4), 4):
            engine.observe(access(base + index, hit=engine.expected(place_of(0, base + index))))
            if not kept:
                kept += engine.offered(range(base, base + 8))
                for place in kept:
                    engine.arrived(place, place)
        for fetch in engine.take(100):
            engine.failed(fetch.place)
    counts = engine.statistics().sources["spatial"]
    assert counts.used > 300
    engine.observe(access(900_000))
    assert engine.offered([900_000]) == []  # held


def test_what_was_decided_and_comes_anyway_is_not_fetched_again() -> None:
    engine = taught_streams()
    for index in range(50_000, 50_010):
        engine.observe(access(index))
    queued = [place for place in engine._queue if engine.expected(place)]
    assert engine.offered([queued[0]]) == [queued[0]]
    assert queued[0] not in {fetch.place for fetch in engine.take(1000)}


def test_what_has_waited_until_its_reader_must_have_passed_is_not_sent() -> None:
    engine = taught_streams()
    for index in range(50_000, 50_008):
        engine.observe(access(index))
    assert engine.waiting
    queued = set(engine._queue)
    for index in uniform(3000, 5_000, 1):
        engine.observe(access(index, hit=True))
    assert not {fetch.place for fetch in engine.take(1000)} & queued
    assert engine.statistics().total.dropped >= len(queued)


def test_a_bulk_copy_runs_at_about_the_speed_of_the_link() -> None:
    slow = Scenario(latency_s=0.03, bandwidth=250e6)
    copied = replayed(requests(range(8000), gap_s=0.00005), 2000, slow)
    assert copied.now_s < 2.0 * 8000 * 65536 / 250e6
    alone = replayed(requests(range(8000), gap_s=0.00005), 2000, replace(slow, prefetch="off"))
    assert alone.now_s > 50 * copied.now_s


def test_a_window_takes_no_more_than_its_bytes_and_its_share_of_the_cache() -> None:
    for capacity, most in ((100, 25), (100_000, 128)):
        engine = PrefetchEngine(capacity_chunks=capacity, settings=Settings(prefetch_window_bytes=8 << 20))
        engine.set_latency(1.0)
        for index in range(400):
            engine.observe(access(index, time_s=index * 0.0001, hit=True))
        assert engine._images[0].streams.window_max == most


def test_what_is_described_is_what_was_counted() -> None:
    engine = taught_streams()
    found = engine.describe(0)
    total = engine.statistics().total
    assert (found["issued"], found["used"], found["wasted"]) == (total.issued, total.used, total.wasted)
    assert found["accuracy"] == total.accuracy
    assert found["pattern"] == "sequential"
    assert engine.describe(5) == {}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("prefetch_window", -1),
        ("prefetch_window_bytes", 1),
        ("chunk_size", 1),
        ("prefetch_accuracy_target", 1.0),
        ("prefetch_aggression", 1.5),
        ("prefetch_traffic_max", 0.5),
        ("places_max", 1),
    ],
)
def test_settings_out_of_range_are_refused_by_name(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=name):
        Settings(**{name: value})  # type: ignore[arg-type]


def test_a_window_of_none_switches_streams_off() -> None:
    engine = PrefetchEngine(capacity_chunks=1000, settings=Settings(prefetch_window=0))
    for index in range(300):
        engine.observe(access(index))
        engine.take(100)
    assert "sequential" not in engine.statistics().sources
