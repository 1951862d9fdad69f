"""`learned`: trees that fit, a learner that is judged by what happened, shadows that say who is better, and what is saved."""

from __future__ import annotations

import itertools
import struct
from collections.abc import Callable
from functools import cache

import msgspec
import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from novafs.errors import NewerFormatError, ObjectCorruptError
from novafs.eviction.allowance import CREDIT_MAX_S, Allowance
from novafs.eviction.base import EvictionPolicy, Quality
from novafs.eviction.features import BATCH_MIN, FEATURES
from novafs.eviction.learned import APPRENTICE, CHANCES_FIRST_S, LRU, MODEL, SHADOW_S, LearnedPolicy
from novafs.eviction.lru import LruPolicy
from novafs.eviction.shadow import SHADOW_CHUNKS, SHADOW_CHUNKS_MIN, Shadows
from novafs.eviction.state import KIND, MODEL_MAX, VERSION, ForestRecord
from novafs.eviction.trees import BINS, Training
from novafs.eviction.twoq import TwoQueuePolicy
from novafs.eviction_study import Stream, misses_of
from novafs.record import seal

CHUNK = 65536


def key_of(number: int) -> bytes:
    return number.to_bytes(8, "little")


def hot_set_and_streams(count: int = 10_000, seed: int = 3) -> Stream:
    """A hot set in no order among streams that are read once: what a place's neighbours say is worth something."""
    random = np.random.default_rng(seed)
    places = np.empty(count, dtype=np.int64)
    stream = 1 << 20
    for at in range(count):
        if at % 400 < 200:
            places[at] = random.integers(0, 120) * 5
        else:
            places[at] = stream
            stream += 1
    return Stream("made", places, np.arange(count) * 0.001, CHUNK)


@cache
def lesson() -> tuple[int, int, Quality, bytes, dict[str, list[float]]]:
    """One replay that learned: misses, LRU's misses, quality, what was saved, and the chances of what was held at the end."""
    stream, policy = hot_set_and_streams(), LearnedPolicy()
    missed = misses_of(stream, policy, 100)
    saved = policy.save()
    assert saved is not None
    chances: dict[str, list[float]] = {"hot": [], "cold": []}
    keys = [key_of(place) for place in sorted(set(stream.places.tolist()))]
    for key, chance in zip(keys, policy.chances(keys), strict=True):
        if chance is not None and key in policy:
            chances["hot" if int.from_bytes(key, "little") < 1 << 20 else "cold"].append(chance)
    return missed, misses_of(stream, LruPolicy(), 100), policy.quality(), saved, chances


def trained(held: int = 100) -> LearnedPolicy:
    """A full tier whose model is in charge."""
    policy = LearnedPolicy()
    policy.load(lesson()[3], "models/eviction")
    policy.set_capacity(held * CHUNK)
    for number in range(held):
        policy.insert(key_of(number), CHUNK, place=number)
    assert policy.quality().in_charge == MODEL
    return policy


# --- trees --------------------------------------------------------------------------------------------------------


def test_trees_find_what_the_target_depends_on() -> None:
    random = np.random.default_rng(1)
    rows = random.integers(0, BINS, (4000, 6)).astype(np.uint8)
    targets = np.where(rows[:, 2] > 20, 3.0, -1.0) + np.where((rows[:, 4] > 40) & (rows[:, 0] > 10), 2.0, 0.0)
    training = Training(rows, targets)
    while not training.done:
        training.step()
    forest = training.forest()
    fresh = random.integers(0, BINS, (1000, 6)).astype(np.uint8)
    expected = np.where(fresh[:, 2] > 20, 3.0, -1.0) + np.where((fresh[:, 4] > 40) & (fresh[:, 0] > 10), 2.0, 0.0)
    assert float(np.abs(forest.predict(fresh) - expected).mean()) < 0.1
    assert training.answers == pytest.approx(forest.predict(rows))


def test_a_training_that_is_not_finished_gives_the_trees_it_has() -> None:
    training = Training(np.zeros((10, 3), dtype=np.uint8), np.arange(10.0))
    assert training.forest().trees == 0
    assert training.forest().predict(np.zeros((2, 3), dtype=np.uint8)) == pytest.approx([4.5, 4.5])
    for _ in range(5):
        training.step()
    assert training.forest().trees == 1


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 200), st.integers(1, 5), st.integers(0, 1000))
def test_any_rows_make_a_finite_forest(count: int, width: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    rows = random.integers(0, BINS, (count, width)).astype(np.uint8)
    training = Training(rows, random.normal(size=count) * 100, trees=3)
    while not training.done:
        training.step()
    assert np.isfinite(training.forest().predict(rows)).all()


# --- shadows ------------------------------------------------------------------------------------------------------


def shadows(capacity: int, chunks: float) -> Shadows:
    return Shadows({"lru": LruPolicy, "2q": TwoQueuePolicy}, capacity, chunks, "lru", "none")


def test_the_better_expert_takes_over_and_a_tie_changes_nothing() -> None:
    judge = shadows(100, 100)
    random = np.random.default_rng(1)
    scan = 1000
    for _ in range(4000):
        for number in random.integers(0, 80, 3).tolist():
            judge.access(key_of(number), 1)
        for _ in range(3):
            judge.access(key_of(scan), 1)
            scan += 1
    assert judge.in_charge == "2q"
    assert judge.switches == 1
    rates = judge.hit_rates()
    assert rates["2q"] > rates["lru"] > 0
    even = shadows(100, 100)
    for number in random.integers(0, 400, 30_000).tolist():
        even.access(key_of(number), 1)
    assert even.switches == 0


def test_a_sample_of_the_keys_hits_as_often_as_all_of_them() -> None:
    random = np.random.default_rng(2)
    accesses = (random.geometric(0.0003, 60_000)).tolist()
    full, sampled = shadows(4096, SHADOW_CHUNKS), shadows(4096, 4 * SHADOW_CHUNKS)
    assert full.capacity_bytes == 4096
    assert sampled.capacity_bytes == 1024
    for number in accesses:
        key = key_of(number)
        assert full.sampled(key)
        full.access(key, 1)
        if sampled.sampled(key):
            sampled.access(key, 1)
    assert sampled.accesses / len(accesses) == pytest.approx(1 / 4, rel=0.2)
    for name, rate in full.hit_rates().items():
        assert sampled.hit_rates()[name] == pytest.approx(rate, abs=0.04)


def test_half_of_a_sample_goes_on_hitting_as_often() -> None:
    random = np.random.default_rng(2)
    judge = shadows(SHADOW_CHUNKS, SHADOW_CHUNKS)
    accesses = [key_of(number) for number in random.integers(0, 512, 40_000).tolist()]
    for key in accesses[:20_000]:
        judge.access(key, 1)
    before = judge.hit_rates()
    assert judge.coarsen()
    assert judge.coarsen()
    assert not judge.coarsen()
    assert judge.capacity_bytes == SHADOW_CHUNKS // 4
    seen = 0
    for key in accesses[20_000:]:
        if judge.sampled(key):
            seen += 1
            judge.access(key, 1)
    assert seen / 20_000 == pytest.approx(1 / 4, rel=0.25)
    for name, rate in judge.hit_rates().items():
        assert rate == pytest.approx(before[name], abs=0.1)


@pytest.mark.parametrize(
    ("chief", "lru_only", "model_only", "then"),
    [
        ("lru", 100, 110, "lru"),  # a lead that chance gives
        ("lru", 100, 130, "model"),
        ("lru", 0, 0, "lru"),
        ("model", 101, 100, "model"),
        ("model", 120, 100, "lru"),  # it is seen to be worse
        ("2q", 120, 100, "lru"),
    ],
)
def test_who_is_seen_to_be_worse_than_lru_gives_way_to_it_and_has_to_prove_itself(
    chief: str, lru_only: int, model_only: int, then: str
) -> None:
    makers: dict[str, Callable[[], EvictionPolicy]] = {"lru": LruPolicy, "2q": LruPolicy, "model": LruPolicy}
    judge = Shadows(makers, 100, 100, "lru", "model")
    judge.begin(chief)
    judge._outcomes[0b001] = lru_only
    judge._outcomes[0b100] = model_only if chief != "2q" else 0
    judge._outcomes[0b010] = model_only if chief == "2q" else 0
    assert judge._judge() == (chief != then)
    assert judge.in_charge == then


def test_what_is_counted_before_anything_had_to_leave_says_nothing() -> None:
    judge = shadows(1000, SHADOW_CHUNKS)
    for number in range(900):
        judge.access(key_of(number), 1)
    assert judge.hit_rates() == {}


# --- the policy ---------------------------------------------------------------------------------------------------


def test_lru_is_in_charge_until_something_is_known() -> None:
    policy, lru = LearnedPolicy(), LruPolicy()
    for each in (policy, lru):
        each.set_capacity(50)
    assert policy.quality().in_charge == LRU
    random = np.random.default_rng(4)
    held: set[bytes] = set()
    for number in random.integers(0, 100, 400).tolist():
        key = key_of(number)
        if key in held:
            policy.touch(key)
            lru.touch(key)
            continue
        if len(held) == 50:
            victims = policy.victims(1)
            assert victims == lru.victims(1)
            held.difference_update(victims)
        held.add(key)
        policy.insert(key, 1, place=number)
        lru.insert(key, 1)
    assert policy.chances([key_of(1)]) == [None]
    assert policy.save() is None


def test_it_beats_lru_and_says_how() -> None:
    missed, lru_missed, quality, _, _ = lesson()
    assert missed < 0.95 * lru_missed
    assert quality.in_charge != LRU
    assert quality.trainings > 1
    assert quality.judged > 100
    assert quality.accuracy is not None
    assert quality.accuracy > 0.6
    assert quality.shadow_hit_rates[MODEL] > quality.shadow_hit_rates[LRU]
    assert sum(count for _, _, count in quality.calibration) == quality.judged
    assert f"{quality.in_charge} decides" in quality.in_words()
    assert quality.memory_bytes > 0
    words = quality.in_words()
    for part in (f"{quality.in_charge} decides", f"{quality.judged:,} right", "chances off by 0.", "wtinylfu 0.", "s of processor time"):
        assert part in words


def test_chances_tell_the_hot_from_what_streams_by() -> None:
    chances = lesson()[4]
    assert len(chances["hot"]) > 10
    assert float(np.mean(chances["hot"])) > float(np.mean(chances["cold"])) + 0.2
    assert trained().chances([b"unknown!"]) == [None]


@pytest.mark.parametrize("expert", ["2q", "wtinylfu", "s3fifo", "lru", "model"])
def test_a_change_of_who_is_in_charge_drops_nothing(expert: str) -> None:
    policy = trained()
    shadow = policy._shadows
    assert shadow is not None
    before = set(policy._book.held)
    shadow.begin(expert)
    policy._take_over()
    assert set(policy._book.held) == before
    assert all(key in policy for key in before)
    policy.touch_many(sorted(before))
    gone = policy.victims(30 * CHUNK)
    assert len(gone) == 30
    assert set(gone) <= before
    policy.insert(b"newcomer", CHUNK)
    assert sorted(policy.victims(1 << 40)) == sorted((before - set(gone)) | {b"newcomer"})


def test_moving_over_goes_in_slices_and_ends() -> None:
    policy = LearnedPolicy()
    policy.set_capacity(3000 * CHUNK)
    for number in range(3000):
        policy.insert(key_of(number), CHUNK, place=number)
    named = len(policy.victims(1))
    assert policy._shadows is not None
    policy._shadows.begin("2q")
    policy._take_over()
    assert policy._moving is not None
    assert policy._main is not None
    assert len(policy._main) < 1000
    policy.remove(key_of(2999))
    for number in range(3000, 3020):
        policy.insert(key_of(number), CHUNK, place=number)
    assert policy._moving is None
    assert len(policy._main) == len(policy) == 3019 - named


def test_beyond_its_share_of_the_processor_it_is_lru() -> None:
    policy, process_s = trained(), 2.0
    policy._allowance = Allowance(0.05, process_s=lambda: process_s)
    assert policy._allowance.credit_s == pytest.approx(0.1)  # earned before
    policy._allowance.spend(1.0)
    assert not policy.work()
    assert policy.chances([key_of(1)]) == [None]
    oldest = next(iter(policy._book.held))
    assert policy.victims(1) == [oldest]
    # Far beyond it: not even looked at, but for who was read last.
    policy._catch_up()
    seen = policy._book.now
    key = next(iter(policy._book.held))
    policy.touch_many([key])
    policy._catch_up()
    assert policy._book.now == seen
    assert next(iter(policy._book.held)) != key
    assert policy.quality().cpu_s >= 1.0
    process_s += 1000.0
    policy.touch_many([key])
    policy._catch_up()
    assert policy._book.now == seen + 1
    assert policy.chances([key]) != [None]


def test_what_it_may_spend_grows_with_the_process_and_is_not_hoarded() -> None:
    process_s = 0.0
    assert Allowance(0.05, process_s=lambda: process_s).credit_s == 0.0
    process_s = 2.0
    allowance = Allowance(0.05, process_s=lambda: process_s)
    allowance.spend(0.25)
    assert allowance.credit_s == pytest.approx(0.1 - 0.25)
    process_s = 4.0
    allowance.refresh()
    assert allowance.credit_s == pytest.approx(0.1 - 0.15)
    process_s = 7000.0
    allowance.refresh()
    assert allowance.credit_s == CREDIT_MAX_S
    assert allowance.spent_s == 0.25
    free = Allowance()
    free.spend(1e9)
    assert free.credit_s > 0
    assert not free.limited


def test_what_the_tiers_below_ask_takes_a_share_of_what_may_be_spent() -> None:
    policy, process_s = trained(), 2.0
    policy._allowance = Allowance(0.05, process_s=lambda: process_s)
    assert policy.chances([key_of(1)]) != [None]
    policy._told_s = CHANCES_FIRST_S
    assert policy.chances([key_of(1)]) == [None]
    policy._allowance.spent_s = 10.0
    assert policy.chances([key_of(1)]) != [None]
    policy.limit_cpu(0.0)
    policy._told_s = 100.0
    assert policy.chances([key_of(1)]) != [None]


def test_where_its_time_is_limited_it_is_lru_until_it_has_learned_for_a_while() -> None:
    class Watched(LearnedPolicy):
        """Notes who was in charge after how many trainings."""

        def __init__(self) -> None:
            super().__init__()
            self.seen: list[tuple[int, str]] = []

        def work(self) -> bool:
            more = super().work()
            quality = self.quality()
            self.seen.append((quality.trainings, quality.in_charge))
            return more

    seconds = itertools.count()
    policy = Watched()
    policy._allowance = Allowance(1.0, process_s=lambda: float(next(seconds)))  # as much as it likes
    stream = hot_set_and_streams()
    missed = misses_of(stream, policy, 100)
    assert {in_charge for trainings, in_charge in policy.seen if trainings < APPRENTICE} == {LRU}
    assert next(in_charge for trainings, in_charge in policy.seen if trainings == APPRENTICE) == MODEL
    assert missed < misses_of(stream, LruPolicy(), 100)

    # What was learned in an earlier life is used at once.
    saved = policy.save()
    assert saved is not None
    heir = LearnedPolicy()
    heir.limit_cpu(0.05)
    heir.set_capacity(100 * CHUNK)
    heir.load(saved, "a model")
    assert heir.quality().in_charge == MODEL


def test_shadows_that_are_starved_take_a_smaller_sample() -> None:
    policy = trained(SHADOW_CHUNKS)
    policy._allowance = Allowance(0.05, process_s=lambda: 0.0)
    policy._allowance.spend(-SHADOW_S / 2)
    keys = [key_of(number) for number in range(BATCH_MIN)]
    shadow = policy._shadows
    assert shadow is not None
    for key in policy._book.held:
        shadow.access(key, CHUNK)
    before = shadow.capacity_bytes
    while shadow.capacity_bytes == before:
        policy._pending += keys
        policy._allowance.credit_s = SHADOW_S / 2
        policy._catch_up()
    assert shadow.capacity_bytes == before // 2
    marked = sum(policy._book.marked(slot) for slot in policy._book.held.values())
    assert SHADOW_CHUNKS_MIN / 2 < marked < SHADOW_CHUNKS * 0.9


def test_the_model_decides_only_where_it_was_seen_to_be_better() -> None:
    random = np.random.default_rng(5)
    noise = Stream("noise", random.integers(0, 400, 12_000), np.arange(12_000) * 0.001, CHUNK)
    policy = LearnedPolicy()
    missed = misses_of(noise, policy, 100)
    assert policy.quality().trainings > 1
    assert missed <= 1.01 * misses_of(noise, LruPolicy(), 100)


def test_accesses_are_known_of_whoever_left_before_they_were_told() -> None:
    policy = LearnedPolicy()
    policy.set_capacity(10 * CHUNK)
    for number in range(10):
        policy.insert(key_of(number), CHUNK, place=number)
    gone = policy.victims(1)
    assert policy._pending
    policy._catch_up()
    slot = policy._book.slot(gone[0])
    assert slot >= 0
    assert policy._book.last_of(slot) == 0.0
    assert policy._book.now == 10


def test_another_capacity_gives_other_shadows_and_drops_nothing() -> None:
    policy = trained(400)
    before = set(policy._book.held)
    policy.set_capacity(100 * CHUNK)
    assert policy._shadows is not None
    assert policy._shadows.capacity_bytes == 100 * CHUNK
    assert set(policy._book.held) == before
    policy.set_capacity(4096 * CHUNK)
    assert policy._shadows.capacity_bytes == SHADOW_CHUNKS * CHUNK
    assert policy.quality().in_charge == MODEL
    marked = sum(policy._book.marked(slot) for slot in policy._book.held.values())
    assert 8 < marked < 60
    assert len(policy.victims(300 * CHUNK)) == 300


def test_prefetched_chunks_are_told_apart() -> None:
    policy = LearnedPolicy()
    policy.set_capacity(10 * CHUNK)
    policy.insert(b"guessed!", CHUNK, prefetched=True, place=5)
    slot = policy._book.slot(b"guessed!")
    assert policy._book.unused(slot)
    policy.touch(b"guessed!")
    policy._catch_up()
    assert not policy._book.unused(slot)


# --- saved and loaded ---------------------------------------------------------------------------------------------


def test_a_saved_model_says_the_same_in_a_new_life() -> None:
    policy = trained()
    saved = policy.save()
    assert saved == lesson()[3]
    assert len(saved) < MODEL_MAX
    fresh = LearnedPolicy()
    fresh.load(saved, "models/eviction")
    rows = np.random.default_rng(1).integers(0, BINS, (50, FEATURES)).astype(np.uint8)
    ours, theirs = policy._learner.forest, fresh._learner.forest
    assert ours is not None
    assert theirs is not None
    assert theirs.predict(rows).tolist() == ours.predict(rows).tolist()
    assert fresh.save() == saved


def test_with_a_learning_rate_of_zero_it_does_as_it_was_taught_and_learns_nothing() -> None:
    """`enable_online=False` of the library: what was saved is used as it is."""
    stream, policy = hot_set_and_streams(4_000, seed=9), LearnedPolicy()
    policy.load(lesson()[3], "models/eviction")
    policy.set_learning_rate(0.0)
    assert misses_of(stream, policy, 100) <= misses_of(stream, LearnedPolicy(), 100)
    assert policy.quality().trainings == 0
    assert policy.save() == lesson()[3]


def test_a_loaded_model_helps_from_the_beginning() -> None:
    stream = hot_set_and_streams(4_000, seed=9)
    fresh = LearnedPolicy()
    fresh.load(lesson()[3], "models/eviction")
    assert misses_of(stream, fresh, 100) <= misses_of(stream, LearnedPolicy(), 100)


def tampered(**changes: object) -> bytes:
    saved = trained_record()
    return seal(KIND, VERSION, msgspec.structs.replace(saved, **changes))


def trained_record() -> ForestRecord:
    depth, trees = 2, 3
    return ForestRecord(
        inputs=FEATURES,
        depth=depth,
        base=0.0,
        features=np.zeros(trees * depth, dtype="<u2").tobytes(),
        thresholds=bytes(trees * depth),
        leaves=np.zeros(trees << depth, dtype="<f8").tobytes(),
        map_values=np.array([-1.0, 1.0], dtype="<f8").tobytes(),
        map_chances=np.array([0.1, 0.9], dtype="<f8").tobytes(),
    )


NAN = np.array([np.nan], dtype="<f8").tobytes()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "too few"),
        (b"x" * 100, "expected a record of kind"),
        (bytes(MODEL_MAX + 1), "an eviction model has at most"),
        (tampered(leaves=NAN * 12), "not finite"),
        (tampered(base=float("inf")), "not finite"),
        (tampered(inputs=FEATURES + 1), "expected 24"),
        (tampered(depth=0), "depth 0"),
        (tampered(depth=63), "depth 63"),
        (tampered(thresholds=b""), "0 questions"),
        (tampered(thresholds=bytes([BINS] * 6)), "features that there are not"),
        (tampered(features=np.full(6, FEATURES, dtype="<u2").tobytes()), "features that there are not"),
        (tampered(leaves=b"12345678"), "bytes of leaves"),
        (tampered(map_values=b""), "not whole"),
        (tampered(map_values=np.array([1.0, -1.0], dtype="<f8").tobytes()), "does not rise"),
        (tampered(map_chances=np.array([0.1, 1.5], dtype="<f8").tobytes()), "does not rise"),
    ],
)
def test_a_model_that_is_none_is_refused_by_name_and_lru_carries_on(data: bytes, message: str) -> None:
    policy = LearnedPolicy()
    with pytest.raises(ObjectCorruptError, match=message) as caught:
        policy.load(data, "models/eviction-l1")
    assert str(caught.value).startswith("models/eviction-l1: ")
    policy.insert(b"a", 1)
    policy.insert(b"b", 1)
    assert policy.victims(1) == [b"a"]


def test_a_good_record_loads() -> None:
    LearnedPolicy().load(tampered(), "models/eviction")


def test_models_of_other_versions_are_refused() -> None:
    with pytest.raises(NewerFormatError, match="upgrade"):
        LearnedPolicy().load(seal(KIND, VERSION + 1, trained_record()), "models/eviction")
    data = bytearray(seal(KIND, VERSION, trained_record()))
    struct.pack_into("<H", data, 8, VERSION - 1)
    struct.pack_into("<Q", data, 16, xxhash.xxh64_intdigest(bytes(data[:16]) + bytes(data[24:])))
    with pytest.raises(ObjectCorruptError, match="version 0"):
        LearnedPolicy().load(bytes(data), "models/eviction")


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(0, 255))
def test_a_damaged_model_is_refused(at: int, value: int) -> None:
    data = bytearray(tampered())
    at %= len(data)
    if data[at] == value:
        return
    data[at] = value
    with pytest.raises((ObjectCorruptError, NewerFormatError)):
        LearnedPolicy().load(bytes(data), "models/eviction")


def test_policies_that_do_not_learn_have_nothing_to_save() -> None:
    policy: EvictionPolicy = LruPolicy()
    assert policy.save() is None
    assert policy.quality() is None
    assert not policy.work()
    assert policy.chances([b"a"]) == [None]
    policy.load(b"anything", "models/eviction")
