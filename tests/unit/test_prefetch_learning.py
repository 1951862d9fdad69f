"""The gate, the governor, the shadow cache, the pacer, the throttle, profiles, patterns and the LSTM."""

from __future__ import annotations

import random

import numpy as np
import pytest

from novafs.errors import NewerFormatError, ObjectCorruptError
from novafs.prefetch.base import Origin
from novafs.prefetch.gate import KIND, VERSION, WEIGHT_BITS, Gate, GateRecord, hashed, logistic, logit
from novafs.prefetch.governor import Governor
from novafs.prefetch.judge import Judge
from novafs.prefetch.lstm import BATCH, STEPS, DeltaModel, Lstm
from novafs.prefetch.pacer import WINDOW_FIRST, Pacer
from novafs.prefetch.patterns import DAY_S, DailyProfile, Pattern, PatternWatch
from novafs.prefetch.profile import CHUNKS_MAX, PROFILES_MAX, Profile, ProfileBook, Recorder
from novafs.prefetch.shadow import ENTRIES_MAX, ShadowLru
from novafs.prefetch.throttle import Throttle
from novafs.record import seal


def taught(examples: int = 4000) -> Gate:
    """A gate that has seen candidates of two kinds: used nine times of ten, and one time of ten."""
    gate = Gate()
    numbers = random.Random(5)
    for number in range(examples):
        good = number % 2
        features = hashed(good, 2, 3, 4, 5, numbers.randrange(1000), 7, 8)
        gate.learn(features, gate.score(features), 1, float(numbers.random() < (0.9 if good else 0.1)))
    return gate


def test_the_gate_learns_what_evidence_is_worth_and_its_probabilities_mean_it() -> None:
    gate = taught()
    good = hashed(1, 2, 3, 4, 5, 12345, 7, 8)
    bad = hashed(0, 2, 3, 4, 5, 12345, 7, 8)
    assert logistic(gate.odds(gate.score(good), 1)) == pytest.approx(0.9, abs=0.06)
    assert logistic(gate.odds(gate.score(bad), 1)) == pytest.approx(0.1, abs=0.06)
    assert gate.log_loss < 0.5


def test_the_gate_is_calibrated_where_its_first_layer_is_not() -> None:
    """Reliability: of what it claims with some probability that share is used, although use depends on features through no logistic law."""
    gate = Gate()
    numbers = random.Random(7)
    claims: list[tuple[float, float]] = []
    for number in range(40_000):
        run, distance, share = numbers.randrange(8), numbers.randrange(10), numbers.randrange(9)
        chance = min(1.0, 0.05 + 0.9 * (share / 8) ** 3 + (0.5 if run > 4 and distance < 3 else 0.0))
        features = hashed(run * 128 + share, distance, run * 32 + distance, share, 5, numbers.randrange(5000), numbers.randrange(5000), run)
        score, kind, used = gate.score(features), 1 + (run > 4), float(numbers.random() < chance)
        if number > 10_000:
            claims.append((logistic(gate.odds(score, kind)), used))
        gate.learn(features, score, kind, used)
    off = 0.0
    for step in range(10):
        inside = [(claim, used) for claim, used in claims if step / 10 <= claim < (step + 1) / 10 + (step == 9)]
        claimed, right = (sum(column) for column in zip(*inside, strict=True)) if inside else (0.0, 0.0)
        off += abs(claimed - right)
        if len(inside) > 500:
            assert claimed / len(inside) == pytest.approx(right / len(inside), abs=0.06)
    assert off / len(claims) < 0.03


def test_the_judge_hashes_as_the_gate_says() -> None:
    judge = Judge(Gate(), {}, places_max=1024, life=100.0)
    numbers = random.Random(9)
    for tick in range(1, 200):
        judge.touched(numbers.randrange(300), tick, tick)
    for _ in range(300):
        candidate, place = numbers.randrange(300), numbers.randrange(300)
        position, one, two, echo = (numbers.randrange(400) for _ in range(4))
        age, echoed = numbers.randrange(25), numbers.randrange(200)
        record, before, after = (judge._seen.get(at) for at in (candidate, candidate - 1, candidate + 1))

        def bucket(seen: list[int] | None) -> int:
            return 24 if seen is None else (200 - seen[0]).bit_length()

        relation = 31
        if record is not None and echoed:
            apart = record[1] - echoed
            relation = min(30, apart.bit_length() if apart >= 0 else 16 + apart.bit_length())
        distance = candidate - place
        wanted = hashed(
            position * 128 + one,
            two * 512 + echo,
            echo * 32 + age,
            (bucket(before) * 32 + bucket(after)) * 32 + max(-9, min(9, distance)) + 9,
            relation * 32 + bucket(record),
            candidate ^ candidate >> 23,
            place * 31 + distance * 1000003,
            (position * 128 + one) * 128 + two,
        )
        assert judge._features(candidate, [position, one, two, echo], place, 200, age, echoed) == wanted


def test_a_gate_survives_being_written_and_read() -> None:
    gate = taught()
    read = Gate.from_bytes(gate.to_bytes(), "models/gate")
    features = hashed(1, 2, 3, 4, 5, 99, 7, 8)
    assert read.odds(read.score(features), 1) == pytest.approx(gate.odds(gate.score(features), 1), abs=1e-4)
    read.learn(features, read.score(features), 1, 1.0)


def test_a_gate_with_what_is_no_number_or_of_another_shape_is_refused() -> None:
    size = (1 << WEIGHT_BITS) * 4
    nan = np.full(1 << WEIGHT_BITS, np.nan, dtype="<f4").tobytes()
    for record in (GateRecord(nan, bytes(size), bytes(41 * 32 * 4), bytes(41 * 32 * 4)), GateRecord(b"", b"", b"", b"")):
        with pytest.raises(ObjectCorruptError, match="models/gate"):
            Gate.from_bytes(seal(KIND, VERSION, record), "models/gate")
    with pytest.raises(NewerFormatError):
        Gate.from_bytes(seal(KIND, VERSION + 1, GateRecord(b"", b"", b"", b"")), "models/gate")


def governed(chance_right: float, *, aggression: float = 0.0, count: int = 4000) -> tuple[Governor, int, int]:
    """A governor whose candidates claim any probability and are right with `chance_right` of the claim; fetched and used."""
    governor = Governor(accuracy_target=0.85, aggression=aggression, traffic_max=1.5)
    numbers = random.Random(11)
    fetched = used = 0
    base = misses = 0.0
    for _ in range(count):
        base += 1
        misses += 1
        governor.update(base, misses, 0.0)
        chance = numbers.random()
        if logit(chance) >= governor.threshold + governor.bias[Origin.SEQUENTIAL] and governor.chances() > 0:
            fetched += 1
            governor.on_fetch(chance)
            if numbers.random() < chance * chance_right:
                used += 1
                misses -= 1
                governor.on_used(chance, Origin.SEQUENTIAL, overdue=False)
            else:
                governor.on_wasted(chance, Origin.SEQUENTIAL, overdue=False)
    return governor, fetched, used


def test_the_governor_holds_accuracy_at_its_target() -> None:
    _, fetched, used = governed(1.0)
    assert fetched > 300
    assert used / fetched >= 0.85


def test_where_the_gate_is_too_sure_the_governor_asks_for_more() -> None:
    honest, _, _ = governed(1.0)
    boastful, fetched, used = governed(0.92)
    assert boastful.threshold > honest.threshold
    assert used / fetched > 0.8


def test_where_nothing_is_used_a_handful_is_tried_and_no_more() -> None:
    _, fetched, used = governed(0.0)
    assert used == 0
    assert fetched < 200


def test_an_eager_governor_spends_its_traffic_and_no_more() -> None:
    governor, fetched, used = governed(1.0, aggression=1.0)
    wasted = fetched - used
    assert 0.3 * 4000 < wasted <= 0.5 * 4000 + 50
    assert governor.fetched == fetched


def test_an_eager_governor_believes_a_boastful_gate_less() -> None:
    honest, _, _ = governed(1.0, aggression=1.0)
    boastful, fetched, used = governed(0.4, aggression=1.0)
    assert boastful.threshold > honest.threshold + 0.5
    assert fetched - used < 0.5 * 4000


def test_a_prefetch_that_was_overdue_and_then_used_costs_nothing_in_the_end() -> None:
    late, straight = (Governor(accuracy_target=0.85, aggression=0.0, traffic_max=1.5) for _ in range(2))
    for governor in (late, straight):
        governor.on_fetch(0.9)
    late.on_overdue(0.9)
    late.on_used(0.9, Origin.ECHO, overdue=True)
    straight.on_used(0.9, Origin.ECHO, overdue=False)
    assert late.describe() == straight.describe()
    dropped = Governor(accuracy_target=0.85, aggression=0.0, traffic_max=1.5)
    before = dropped.describe()
    dropped.on_fetch(0.5)
    dropped.on_dropped(0.5, overdue=False)
    assert dropped.describe() == before


def test_a_prefetch_must_be_likelier_to_win_than_its_place_is_worth() -> None:
    """Only an unused one keeps its place: chance / (1 - chance) against what the place would have won, and half as much again."""
    governor = Governor(accuracy_target=0.85, aggression=1.0, traffic_max=10.0)
    governor.update(1000.0, 500.0, 0.0)
    low = governor.threshold
    governor.update(1000.0, 500.0, 0.4)
    assert low < governor.threshold
    assert logistic(governor.threshold) == pytest.approx(0.6 / 1.6, abs=0.01)


def test_the_shadow_counts_as_an_lru_does_and_samples_when_large() -> None:
    small = ShadowLru(3)
    assert [small.observe(place) for place in (1, 2, 3, 1, 4, 2)] == [True, True, True, False, True, True]
    assert small.misses == 5
    numbers = random.Random(2)
    large = ShadowLru(ENTRIES_MAX * 4)
    for _ in range(200_000):
        large.observe(numbers.randrange(ENTRIES_MAX * 8))
    assert len(large._entries) <= ENTRIES_MAX
    first = ENTRIES_MAX * 4 / (ENTRIES_MAX * 8)
    assert large.misses / 200_000 == pytest.approx(1 - first + 0.12, abs=0.1)


def test_the_pacer_widens_with_arrivals_and_halves_once_per_round_trip() -> None:
    pacer = Pacer(100_000)
    assert pacer.room == WINDOW_FIRST
    for _ in range(10):
        sent = pacer.room
        pacer.sent(sent)
        assert pacer.room == 0
        pacer.arrived(sent, 0.03)
    wide = pacer.room
    assert wide > 500
    pacer.sent(10)
    pacer.failed(5, 1.0, timed_out=True)
    pacer.failed(5, 1.001, timed_out=True)
    assert pacer.room == wide // 2
    assert pacer.latency_s == pytest.approx(0.03)
    assert Pacer(40).room <= 10


def test_slower_demand_reads_narrow_the_pacer_only_while_prefetch_is_in_flight() -> None:
    pacer = Pacer(100_000)
    for _ in range(20):
        pacer.demand(0.02, 0.0)
    for step in range(100):
        pacer.demand(0.4, float(step))
    assert pacer.room == WINDOW_FIRST
    pacer.sent(4)
    pacer = Pacer(100_000)
    pacer.sent(4)
    for step in range(100):
        pacer.demand(0.02 if step < 20 else 0.4, float(step))
    assert pacer.room < WINDOW_FIRST - 4


def test_the_throttle_closes_above_its_share_and_opens_again() -> None:
    throttle = Throttle(0.05)
    for _ in range(10):
        throttle.account(0.1, 0.5)
    assert not throttle.open
    throttle.account(0.0, 20.0)
    assert throttle.open
    assert throttle.policy_s / throttle.process_s == pytest.approx(1.0 / 25.0)


def test_a_young_process_may_spend_what_it_has_earned_and_no_more() -> None:
    throttle = Throttle(0.05, spent_s=2.0)
    throttle.account(0.099, 0.0)
    assert throttle.open
    throttle.account(0.002, 0.0)
    assert not throttle.open


# --- profiles ---------------------------------------------------------------------------------------------------


def recorded(order: list[int], *, shift: int = 0) -> Recorder:
    recorder = Recorder()
    for index in order:
        recorder.observe(index, index * 1000 + shift * (index != order[0]))
    return recorder


def test_a_profile_is_found_by_its_first_chunk_and_told_from_others_by_content() -> None:
    book = ProfileBook()
    book.fold(recorded([0, 40, 41, 9]))
    book.fold(recorded([0, 70, 71, 72], shift=5))
    first = book.find(0, lambda index: index * 1000)
    other = book.find(0, lambda index: index * 1000 + 5 * (index != 0))
    assert first is not None
    assert other is not None
    assert [index for index, _ in first.proposals()] == [0, 40, 41, 9]
    assert [index for index, _ in other.proposals()] == [0, 70, 71, 72]
    assert book.find(0, lambda index: -index) is None
    assert book.find(123, None) is None


def test_what_is_no_longer_read_after_an_open_fades_from_its_profile() -> None:
    profile = Profile()
    profile.fold({0: 0, 1: 1, 2: 2})
    chances = dict(profile.proposals())
    assert chances[2] > 0.9
    for _ in range(10):
        profile.fold({0: 0, 1: 1})
    assert [index for index, _ in profile.proposals()] == [0, 1]


def test_a_recorder_ends_when_it_has_enough_and_the_book_is_bounded() -> None:
    recorder = Recorder()
    assert not any(recorder.observe(index, index) for index in range(CHUNKS_MAX - 1))
    assert recorder.observe(CHUNKS_MAX, 1)
    book = ProfileBook()
    for number in range(PROFILES_MAX + 20):
        single = Recorder()
        single.observe(0, number)
        single.observe(1, 5)
        book.fold(single)
    assert len(book) == PROFILES_MAX


def test_a_book_survives_being_written_and_read_and_refuses_damage() -> None:
    book = ProfileBook()
    book.fold(recorded([3, 40, 41, 9]))
    read = ProfileBook.from_bytes(book.to_bytes(), "models/boot", chunk_size=65536)
    found = read.find(3000, None)
    assert found is not None
    assert list(found.entries.items()) == [(3, (3000, 1)), (40, (40000, 1)), (41, (41000, 1)), (9, (9000, 1))]
    with pytest.raises(ObjectCorruptError):
        ProfileBook.from_bytes(book.to_bytes()[:-3], "models/boot", chunk_size=65536)
    with pytest.raises(ObjectCorruptError, match="4096"):
        ProfileBook.from_bytes(book.to_bytes(), "models/boot", chunk_size=4096)
    other = ProfileBook()
    other.merge(read)
    assert len(other) == 1


# --- patterns ---------------------------------------------------------------------------------------------------


def watched(times: list[float], *, in_run: bool = False) -> PatternWatch:
    watch = PatternWatch()
    for time_s in times:
        watch.observe(time_s, in_run=in_run)
    return watch


def test_patterns_are_told_apart() -> None:
    numbers = random.Random(4)
    steady = sorted(numbers.uniform(0, 3000) for _ in range(3000))
    assert watched([1.0] * 10).pattern() is Pattern.IDLE
    assert watched(steady, in_run=True).pattern() is Pattern.SEQUENTIAL
    assert watched(steady).pattern() is Pattern.RANDOM
    every_ten_minutes = [start * 600.0 + tick * 0.1 for start in range(12) for tick in range(200)]
    periodic = watched(every_ten_minutes)
    assert periodic.pattern() is Pattern.PERIODIC
    assert periodic.period_s() == pytest.approx(600.0, abs=20.0)
    bursts = sorted(start + tick * 0.01 for start in (0.0, 130.0, 910.0, 1400.0, 5000.0, 5180.0) for tick in range(500))
    assert watched(bursts).pattern() is Pattern.BURSTY


def test_a_long_pause_costs_bounded_memory() -> None:
    watch = watched([0.0, 1e9, 2e9])
    assert len(watch._counts) <= 2048


def test_an_image_read_every_morning_is_due_before_the_hour_and_not_while_in_use() -> None:
    daily = DailyProfile()
    morning = 8 * 3600.0
    for day in range(5):
        for step, index in enumerate((4, 9, 2)):
            daily.observe(day * DAY_S + morning + 10 * step, index, index)
    before = 5 * DAY_S + morning - 600.0
    assert [index for index, _ in daily.due(before, 900.0)] == [4, 9, 2]
    assert daily.due(before - 7200.0, 900.0) == []
    daily.observe(before, 1, 1)
    assert daily.due(before + 10.0, 900.0) == []


def test_one_day_is_no_habit() -> None:
    daily = DailyProfile()
    daily.observe(8 * 3600.0, 1, 1)
    assert daily.due(8 * 3600.0 + DAY_S - 60.0, 900.0) == []


# --- the LSTM ---------------------------------------------------------------------------------------------------


def test_the_gradients_are_those_of_the_loss() -> None:
    net = Lstm(7, embedding=3, hidden=4)
    net.weights = {name: value.astype(np.float64) for name, value in net.weights.items()}
    tokens = np.array([[1, 2], [3, 4], [5, 1]])
    targets = np.array([[3, 4], [5, 1], [0, 6]])

    def loss() -> float:
        chances, _ = net.forward(tokens)
        rows, columns = np.indices(tokens.shape)
        return float(-np.log(chances[rows, columns, targets]).mean())

    chances, tape = net.forward(tokens)
    gradients = net.backward(tokens, targets, chances, tape)
    for name, weight in net.weights.items():
        flat = weight.reshape(-1)
        for at in range(0, flat.size, max(1, flat.size // 5)):
            kept = flat[at]
            flat[at] = kept + 1e-2
            above = loss()
            flat[at] = kept - 1e-2
            below = loss()
            flat[at] = kept
            assert gradients[name].reshape(-1)[at] == pytest.approx((above - below) / 2e-2, abs=2e-3), name


def test_one_prediction_is_what_the_whole_pass_gives() -> None:
    net = Lstm(20, embedding=6, hidden=10, seed=3)
    tokens = np.random.default_rng(5).integers(0, 20, 12)
    assert np.allclose(net.last(tokens), net.forward(tokens[:, None])[0][-1, 0], atol=1e-6)


def test_the_model_learns_an_order_that_transitions_cannot_see_and_then_speaks_up() -> None:
    model = DeltaModel()
    pattern = [1, 1, 5, 1, 1, 9, -3, 1, 5, 5, 9, 1]
    assert not model.work()
    for number in range((BATCH * STEPS + 1) * 40):
        model.observe(pattern[number % len(pattern)], number % 3 == 0)
        if model.ready:
            model.work()
    assert model.precision > 0.9
    assert model.markov_precision < 0.4
    assert model.useful
    delta, chance = model.predict()[0]
    assert delta == pattern[((BATCH * STEPS + 1) * 40) % len(pattern)]
    assert chance > 0.5


def test_a_model_that_is_never_sure_is_never_asked() -> None:
    model = DeltaModel()
    numbers = random.Random(9)
    for _ in range((BATCH * STEPS + 1) * 12):
        model.observe(numbers.randrange(100_000), None)
        if model.ready:
            model.work()
    assert not model.useful
