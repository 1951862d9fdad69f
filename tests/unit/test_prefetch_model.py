"""What is learned, saved and shared: it survives the way, joins with what others know, and no bytes can do more harm than none."""

from __future__ import annotations

import logging
import random
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from novafs.errors import NewerFormatError, ObjectCorruptError
from novafs.prefetch import gate as gate_module
from novafs.prefetch import shelf as shelf_module
from novafs.prefetch.account import Settings
from novafs.prefetch.blob import BLOB_MAX
from novafs.prefetch.engine import PrefetchEngine
from novafs.prefetch.gate import Gate, GateRecord, hashed
from novafs.prefetch.lstm import VOCABULARY, DeltaModel, Lstm
from novafs.prefetch.markov import STATES_MAX, TransitionTable
from novafs.prefetch.model import NAMES, TOTAL_MAX, dump_models, load_models, merge_models
from novafs.prefetch.profile import CHUNKS_MAX, PROFILES_MAX, ProfileBook, Recorder
from novafs.prefetch.shelf import KeptRecord, ShelfRecord
from novafs.record import seal
from tests.support.accesses import access


def taught(orders: list[list[int]], *, chunk_size: int = 65536) -> PrefetchEngine:
    """An engine that has seen these opens, each of an image of its own."""
    engine = PrefetchEngine(capacity_chunks=1000, settings=Settings(chunk_size=chunk_size))
    for image, order in enumerate(orders):
        engine.opened(image)
        for index in order:
            engine.observe(access(index, image=image))
            for fetch in engine.take(100):
                engine.arrived(fetch.place, fetch.place & 0xFFFFFFFF)
        engine.closed(image)
    return engine


def order(seed: int, count: int = 300) -> list[int]:
    return [seed, *random.Random(seed).sample(range(100, 30_000), count)]


def trained(slices: int) -> DeltaModel:
    model = DeltaModel()
    numbers = random.Random(4)
    while model.slices < slices:
        for _ in range(513):
            model.observe(numbers.choice((1, 1, 5, -3)), None)
        model.work()
    return model


def test_what_one_host_learned_another_knows() -> None:
    here = taught([order(1), order(1), order(2)])
    there = PrefetchEngine(capacity_chunks=1000)
    assert sorted(load_models(there, dump_models(here))) == sorted(NAMES)
    assert there.table._one == here.table._one
    assert there.table._two == here.table._two
    assert len(there.book) == len(here.book) == 2
    features = hashed(1, 2, 3, 4, 5, 6, 7, 8)
    assert there.gate.score(features) == pytest.approx(here.gate.score(features), abs=1e-5)
    there.opened(9)
    there.observe(access(1, image=9))
    assert len(there.take(1000)) == 300


def test_what_two_hosts_learned_is_joined_and_joining_again_changes_nothing() -> None:
    one, two = dump_models(taught([order(1), order(3)])), dump_models(taught([order(2), order(3)]))
    for name in NAMES:
        joined = merge_models(name, one[name], two[name])
        again = merge_models(name, joined, two[name])
        engine, second = PrefetchEngine(capacity_chunks=10), PrefetchEngine(capacity_chunks=10)
        assert load_models(engine, {name: joined}) == [name]
        assert load_models(second, {name: again}) == [name]
        assert engine.table._one == second.table._one
        assert len(engine.book) == len(second.book)
    joined = merge_models("transitions", one["transitions"], two["transitions"])
    table = TransitionTable.from_bytes(joined, "t", chunk_size=65536)
    for seed in (1, 2):
        first, following = order(seed)[:2]
        assert table.probability(first, following) == 1.0
    assert len(ProfileBook.from_bytes(merge_models("profiles", one["profiles"], two["profiles"]), "p", chunk_size=65536)) == 3


def test_rounds_through_the_store_do_not_make_counts_grow() -> None:
    engine = taught([order(1)])
    saved = dump_models(engine)
    for _ in range(5):
        load_models(engine, saved)
        saved = {name: merge_models(name, data, saved[name]) for name, data in dump_models(engine).items()}
    fresh = taught([order(1)])
    assert engine.table._one == fresh.table._one
    found, known = engine.book.find(1, None), fresh.book.find(1, None)
    assert found is not None
    assert known is not None
    assert found.opens == known.opens


def test_of_two_gates_the_one_that_has_seen_a_case_speaks_for_it() -> None:
    mine, theirs = Gate(), Gate()
    good, bad = hashed(1, 1, 1, 1, 1, 1, 1, 1), hashed(2, 2, 2, 2, 2, 2, 2, 2)
    for _ in range(300):
        mine.learn(good, mine.score(good), 1, 1.0)
        theirs.learn(bad, theirs.score(bad), 2, 0.0)
    before = mine.score(good)
    mine.merge(theirs)
    assert mine.score(good) == pytest.approx(before)
    assert mine.score(bad) == pytest.approx(theirs.score(bad))
    assert mine.odds(mine.score(bad), 2) == pytest.approx(theirs.odds(theirs.score(bad), 2))


def test_all_models_together_stay_below_their_bound_and_the_weightiest_stay() -> None:
    numbers = random.Random(2)
    engine = PrefetchEngine(capacity_chunks=1000)
    hot = [numbers.getrandbits(64) for _ in range(50)]
    for _ in range(3):
        for at in range(1, len(hot)):
            engine.table.learn(None, hot[at - 1], hot[at], at)
    before = None
    rows = STATES_MAX - 100
    for states, width in ((engine.table._one, 6), (engine.table._two, 4)):
        for _ in range(rows):
            states[numbers.getrandbits(64)] = [2]
            for _ in range(width):
                next(reversed(states.values())).extend((numbers.getrandbits(64), 1, numbers.getrandbits(38)))
    for family in range(PROFILES_MAX):
        recorder = Recorder()
        for index in range(CHUNKS_MAX):
            recorder.observe(index * 7, numbers.getrandbits(64))
        engine.book.fold(recorder)
        before = recorder.first if family == PROFILES_MAX - 1 else before
    noise = np.random.default_rng(1)
    engine.gate._weights = noise.standard_normal(len(engine.gate._weights)).tolist()
    engine.gate._squares = (1.0 + noise.random(len(engine.gate._squares))).tolist()
    model = trained(8)
    for family in range(20):
        engine.shelf.keep(family, model)
    blobs = dump_models(engine)
    assert sum(map(len, blobs.values())) <= TOTAL_MAX
    there = PrefetchEngine(capacity_chunks=1000)
    assert sorted(load_models(there, blobs)) == sorted(NAMES)
    assert all(there.table.probability(one, two) == 1.0 for one, two in pairwise(hot))
    assert 30_000 < len(there.table) < 2 * rows
    assert before is not None
    assert there.book.find(before, None) is not None
    assert len(there.shelf) == shelf_module.MODELS_MAX


def test_a_network_is_found_by_its_family_and_goes_on_where_it_was() -> None:
    shelf = shelf_module.DeltaShelf()
    model = trained(9)
    shelf.keep(77, model)
    shelf.keep(78, trained(1))
    assert len(shelf) == 1
    other = DeltaModel()
    for delta in (1, 1, 5, -3) * 20:
        model.observe(delta, None)
        other.observe(delta, None)
    shelf_module.DeltaShelf.from_bytes(shelf.to_bytes(), "models/lstm", chunk_size=65536).lend(77, other)
    assert other.begun
    assert not other.useful
    assert [delta for delta, _ in other.predict()] == [delta for delta, _ in model.predict()]
    untouched = DeltaModel()
    shelf.lend(78, untouched)
    assert not untouched.begun


def test_an_image_takes_over_the_network_of_its_family() -> None:
    engine = PrefetchEngine(capacity_chunks=100)
    engine.opened(1)
    engine.observe(access(5, image=1))
    engine._images[1].deltas = trained(8)
    blobs = dump_models(engine)
    there = PrefetchEngine(capacity_chunks=100)
    load_models(there, blobs)
    there.opened(4)
    there.observe(access(5, image=4))
    assert there._images[4].deltas.begun


BLOBS = dump_models(taught([order(1, 60)]))


@given(st.sampled_from(NAMES), st.data())
@settings(max_examples=80, deadline=None)
def test_damaged_models_cost_one_warning_and_teach_nothing(name: str, data: st.DataObject) -> None:
    raw = bytearray(BLOBS[name])
    kind = data.draw(st.sampled_from(["flip", "cut", "noise"]))
    at = data.draw(st.integers(0, len(raw) - 1))
    if kind == "flip":
        raw[at] ^= 1 << data.draw(st.integers(0, 7))
    elif kind == "cut":
        del raw[at:]
    else:
        raw[:] = data.draw(st.binary(max_size=200))
    engine = PrefetchEngine(capacity_chunks=10)
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign]
    logger = logging.getLogger("novafs.prefetch.model")
    logger.addHandler(handler)
    try:
        assert load_models(engine, {name: bytes(raw)}) == []
    finally:
        logger.removeHandler(handler)
    assert len(records) == 1
    assert f"models/{name}" in records[0].getMessage()
    assert len(engine.table) == len(engine.book) == len(engine.shelf) == 0
    with pytest.raises((ObjectCorruptError, NewerFormatError)):
        merge_models(name, BLOBS[name], bytes(raw))


@given(st.sampled_from(NAMES), st.recursive(st.none() | st.integers(-5, 1 << 63) | st.binary(max_size=40), lambda inner: st.lists(inner)))
@settings(max_examples=80, deadline=None)
def test_well_sealed_nonsense_is_refused(name: str, value: object) -> None:
    from novafs.prefetch import markov, profile

    module = {"transitions": markov, "gate": gate_module, "profiles": profile, "lstm": shelf_module}[name]
    blob = seal(module.KIND, 1, value)  # type: ignore[arg-type, attr-defined]
    engine = PrefetchEngine(capacity_chunks=10)
    load_models(engine, {name: blob})
    assert len(engine.table) == len(engine.book) == len(engine.shelf) == 0


def test_models_of_another_chunk_size_or_version_or_of_too_many_bytes_are_left_out(caplog: pytest.LogCaptureFixture) -> None:
    other = dump_models(taught([order(1, 60)], chunk_size=4096))
    engine = PrefetchEngine(capacity_chunks=10)
    with caplog.at_level(logging.WARNING):
        assert load_models(engine, other) == ["gate"]  # evidence is worth the same whatever the chunks
    assert [record.getMessage().count("4096") > 0 for record in caplog.records] == [True] * 3
    empty = GateRecord(b"", b"", b"", b"")
    for version, error in ((gate_module.VERSION + 1, NewerFormatError), (gate_module.VERSION - 1, ObjectCorruptError)):
        with pytest.raises(error, match="models/gate"):
            merge_models("gate", BLOBS["gate"], seal(gate_module.KIND, version, empty))
    caplog.clear()
    assert load_models(engine, {"gate": bytes(BLOB_MAX + 1), "another": b"?"}) == []
    assert str(BLOB_MAX) in caplog.text
    with pytest.raises(ValueError, match="transitions"):
        merge_models("another", b"", b"")


@pytest.mark.parametrize("value", [np.nan, np.inf, 5000.0])
def test_a_network_with_what_is_no_weight_is_refused(value: float) -> None:
    weights = {name: np.zeros(shape, dtype="<f2") for name, shape in Lstm.shapes(VOCABULARY).items()}
    weights["gates"][3, 3] = value
    record = ShelfRecord(65536, [KeptRecord(1, 9, [0, 1], {name: part.tobytes() for name, part in weights.items()})])
    with pytest.raises(ObjectCorruptError, match="gates"):
        shelf_module.DeltaShelf.from_bytes(seal(b"LSTM", 1, record), "models/lstm", chunk_size=65536)


def test_a_network_of_words_out_of_range_is_refused() -> None:
    for meanings, slices in (([], 1), ([0, 1 << 60], 1), (list(range(VOCABULARY + 1)), 1), ([0], -1)):
        record = ShelfRecord(65536, [KeptRecord(1, slices, meanings, {})])
        with pytest.raises(ObjectCorruptError, match="words"):
            shelf_module.DeltaShelf.from_bytes(seal(b"LSTM", 1, record), "models/lstm", chunk_size=65536)
    with pytest.raises(ObjectCorruptError, match="networks"):
        shelf_module.DeltaShelf.from_bytes(
            seal(b"LSTM", 1, ShelfRecord(65536, [KeptRecord(1, 1, [0], {})] * 9)), "models/lstm", chunk_size=65536
        )
