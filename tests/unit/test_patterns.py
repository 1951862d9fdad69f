"""The four patterns, of images and of keys: told apart on generated and recorded accesses, and what goes by them."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from novafs import CacheConfig, ChunkFeatures, HierarchicalCache, register_model, unregister_model
from novafs.prefetch.account import Settings
from novafs.prefetch.base import Access, Origin, place_of
from novafs.prefetch.engine import PATTERN_TICKS, PrefetchEngine
from novafs.prefetch.patterns import SPELL_AHEAD_S, SpellMemory
from novafs.traces import chunk_runs, open_trace
from tests.support.traces import REASON, traces_folder

HOUR_S = 3600.0


def engine() -> PrefetchEngine:
    return PrefetchEngine(capacity_chunks=64, settings=Settings(), content=lambda place: place & 0xFFFF)


def show(engine: PrefetchEngine, image: int, accesses: Sequence[tuple[float, int]]) -> None:
    for time_s, index in accesses:
        engine.observe(Access(place_of(image, index), index & 0xFFFF, time_s, False, True))


def generated() -> dict[str, list[tuple[float, int]]]:
    """(seconds, chunk) of accesses of each kind; "idle" is too few to tell."""
    rng = random.Random(2)
    chunks = [rng.randrange(1 << 20) for _ in range(3000)]
    starts = (0.0, 130.0, 910.0, 1400.0, 5000.0, 5180.0)
    return {
        "idle": [(float(at), chunks[at]) for at in range(30)],
        "sequential": [(at * 0.1, at) for at in range(2000)],
        "random": [(time_s, chunks[at]) for at, time_s in enumerate(sorted(rng.uniform(0, 3000) for _ in range(3000)))],
        "periodic": [(spell * 600.0 + at * 0.1, chunks[at]) for spell in range(10) for at in range(200)],
        "bursty": [(start + at * 0.01, chunks[at]) for start in starts for at in range(500)],
    }


def test_each_image_has_its_own_pattern() -> None:
    found = engine()
    for number, accesses in enumerate(generated().values(), start=1):
        show(found, number, accesses)
    words = list(generated())
    assert [found.pattern(number) for number in range(1, 6)] == words
    assert found.patterns() == dict.fromkeys(words, 1)
    assert [found.describe(number)["pattern"] for number in range(1, 6)] == words
    assert found.describe(words.index("periodic") + 1)["period_s"] == pytest.approx(600.0, abs=20.0)
    assert found.pattern(77) == "idle"


def test_a_pattern_that_is_known_is_not_looked_for_at_every_question() -> None:
    found = engine()
    show(found, 1, generated()["sequential"])
    assert found.pattern(1) == "sequential"
    state = found._images[1]
    state.watch._runs = 0.0
    assert found.pattern(1) == "sequential"
    show(found, 2, generated()["random"][: PATTERN_TICKS + 1])
    assert found.pattern(1) == "random"


@pytest.mark.traces
@pytest.mark.skipif(traces_folder() is None, reason=REASON)
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("msps_dtrs", {"sequential"}),
        ("cloudphysics_sample", {"sequential", "random", "bursty"}),
        ("hplajw_1992", {"bursty"}),
    ],
)
def test_recorded_disks_are_recognised(name: str, words: set[str]) -> None:
    folder = traces_folder()
    assert folder is not None
    found, seen = engine(), set()
    for number, (time_s, chunk) in enumerate(recorded(folder / f"{name}.npz")):
        found.observe(Access(place_of(1, chunk), chunk & 0xFFFF, time_s, False, True))
        if number % 5000 == 4999:
            seen.add(found.pattern(1))
    assert seen - {"idle"} <= words
    assert found.pattern(1) in words


def recorded(path: Path, most: int = 40_000) -> Iterator[tuple[float, int]]:
    count = 0
    for block in open_trace(path).blocks():
        for at, (first, last) in enumerate(zip(*chunk_runs(block, 65536), strict=True)):
            for chunk in range(int(first), int(last) + 1):
                yield int(block.time_us[at]) / 1e6, chunk
                count += 1
                if count >= most:
                    return


# --- what goes by them --------------------------------------------------------------------------------------------


def spell(engine: PrefetchEngine, began_s: float, chunks: Sequence[int]) -> None:
    show(engine, 1, [(began_s + at * 0.05, chunk) for at, chunk in enumerate(chunks)])


def test_what_is_read_periodically_is_there_before_its_next_spell() -> None:
    """Nothing else would fetch it: a transition needs the first chunk of the spell."""
    rng = random.Random(4)
    chunks, found = rng.sample(range(1, 1 << 16), 40), engine()
    for number in range(8):
        spell(found, number * HOUR_S / 6, chunks)
    last_s = 7 * HOUR_S / 6
    found.take(1000)
    found.evicted(chunks)
    assert found.warm(last_s + 60.0) == 0, "too early"
    due = found.warm(last_s + HOUR_S / 6 - 90.0)
    fetches = found.take(1000)
    assert due == len(fetches) >= 38
    assert {fetch.place for fetch in fetches} <= {place_of(1, chunk) for chunk in chunks}
    assert {fetch.origin for fetch in fetches} == {Origin.DAILY}
    for fetch in fetches:
        found.arrived(fetch.place, fetch.place & 0xFFFF)
    spell(found, last_s + HOUR_S / 6, chunks)
    counts = found.statistics().sources["daily"]
    assert counts.used == due
    assert counts.wasted == 0


def test_a_spell_that_did_not_come_is_not_waited_for() -> None:
    memory = SpellMemory()
    for start in (0.0, 600.0, 1200.0):
        for at in range(10):
            memory.observe(start + at, at)
    assert memory.due(1200.0 + 600.0 - SPELL_AHEAD_S - 1.0, 600.0) == []
    assert memory.due(1700.0, 600.0) == [(at, 1.0) for at in range(10)]
    assert memory.due(1700.0, None) == []
    assert memory.due(1205.0, 600.0) == [], "in use"
    assert memory.due(1200.0 + 2 * 600.0 - 10.0, 600.0) == [], "it missed one"


def test_what_was_in_one_spell_only_is_less_likely() -> None:
    memory = SpellMemory()
    for start, chunks in ((0.0, range(10)), (600.0, range(5, 15))):
        for at, chunk in enumerate(chunks):
            memory.observe(start + at, chunk)
    assert memory.due(1150.0, 600.0) == [(chunk, 0.5 if chunk < 10 else 0.25) for chunk in range(5, 15)]


class Listener:
    """A scorer that keeps what it is told."""

    def __init__(self) -> None:
        self.patterns: set[str] = set()

    def score(self, chunks: Sequence[ChunkFeatures]) -> Sequence[float]:
        self.patterns |= {chunk.pattern for chunk in chunks}
        return [0.0 if chunk.pattern == "sequential" else 1.0 for chunk in chunks]


def test_patterns_of_keys_are_shown_and_told_to_the_scorer(tmp_path: Path) -> None:
    listener = Listener()
    register_model("listener", listener)
    try:
        config = CacheConfig(state_dir=tmp_path / "state", l1_capacity="4MiB", eviction_policy="listener")
        with HierarchicalCache(tmp_path / "volume", config) as cache:
            cache.set("long", random.Random(1).randbytes(8 << 20))
            cache.set("short", b"x")
            for _ in range(2):
                with cache.open("long") as file:
                    while file.read1(65536):
                        pass
            cache.get("short")
            long, short = cache.patterns("long"), cache.patterns("short")
            assert long is not None
            assert short is not None
            assert (long.pattern, short.pattern) == ("sequential", "idle")
        assert "sequential" in listener.patterns
    finally:
        unregister_model("listener")
