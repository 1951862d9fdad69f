"""Sources: streams, neighbours, echoes, transitions. What they name, and that they stay bounded."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from novafs.errors import NewerFormatError, ObjectCorruptError
from novafs.prefetch.base import INDEX_MASK, key_of, place_of
from novafs.prefetch.echo import EchoSource
from novafs.prefetch.markov import MarkovSource, TransitionTable
from novafs.prefetch.sequential import REGIONS_MAX, STREAMS_MAX, SequentialSource
from novafs.prefetch.spatial import SpatialSource
from novafs.record import seal
from tests.support.accesses import access


def named(source: SequentialSource | SpatialSource, *indexes: int) -> list[int]:
    for index in indexes:
        source.observe(access(index))
    return [place & INDEX_MASK for place, _ in source.candidates()]


def test_a_window_begins_with_one_chunk_doubles_and_ends_at_its_cap() -> None:
    source = SequentialSource(10)
    assert named(source, 100) == []
    sizes = [len(named(source, 100 + step)) for step in range(1, 8)]
    assert sizes == [2, 4, 8, 10, 10, 10, 10]
    assert named(source, 108)[:3] == [109, 110, 111]


def test_a_backward_stream_is_followed_and_stops_at_the_beginning() -> None:
    source = SequentialSource(10)
    assert named(source, 7, 6, 5, 4) == [3, 2, 1, 0]
    assert source.direction == -1


def test_several_streams_are_told_apart_when_they_take_turns() -> None:
    source = SequentialSource(4)
    for step in range(5):
        for base in (1000, 5000, 90000):
            found = named(source, base + step)
    assert found == [90005, 90006, 90007, 90008]
    assert named(source, 1005) == [1006, 1007, 1008, 1009]


def test_a_jump_halves_the_window_of_what_begins_there() -> None:
    source = SequentialSource(16)
    named(source, *range(100, 110))
    assert named(source, 70000) == []
    assert len(named(source, 70001)) == 16
    fresh = SequentialSource(16)
    assert len(named(fresh, 70000, 70001)) == 2


def test_what_is_there_already_is_not_named_again_by_its_stream() -> None:
    source = SequentialSource(8)
    for index in range(100, 106):
        source.observe(access(index))
    assert [place for place, _ in source.candidates()] == list(range(106, 114))
    source.there(5)
    source.observe(access(106))
    assert [place for place, _ in source.candidates()] == [111, 112, 113, 114]
    assert [evidence % 16 for _, evidence in source.candidates()] == [5, 6, 7, 8]


@pytest.mark.parametrize("stride", [3, 17, -5])
def test_strides_are_told_from_three_accesses_with_the_same_distance(stride: int) -> None:
    source = SequentialSource(8)
    start = 2000
    assert named(source, *(start + stride * step for step in range(4)))[:2] == [start + stride * 4, start + stride * 5]


def test_random_accesses_name_hardly_anything_and_the_memory_is_bounded() -> None:
    source = SequentialSource(10)
    numbers = random.Random(1)
    total = sum(len(named(source, numbers.randrange(1 << 30))) for _ in range(5000))
    assert total == 0
    assert len(source._heads) <= STREAMS_MAX
    assert len(source._regions) <= REGIONS_MAX


def test_neighbours_stay_inside_the_image() -> None:
    assert named(SpatialSource(), 0) == [1, 2, 3, 4]
    assert named(SpatialSource(), 1) == [0, 2, 3, 4, 5]
    assert named(SpatialSource(), 50) == [48, 49, 51, 52, 53, 54]
    assert named(SpatialSource(), INDEX_MASK) == [INDEX_MASK - 2, INDEX_MASK - 1]


def test_an_echo_names_what_followed_the_last_time_in_its_order() -> None:
    echo = EchoSource(4)
    order = [5, 900, 17, 33, 2, 8]
    for index in order:
        echo.observe(place_of(0, index), 0)
    assert echo.candidates() == []
    echo.observe(place_of(0, 5), 1)
    assert [place for place, _ in echo.candidates()] == [900, 17, 33, 2]
    echo.observe(place_of(0, 900), 2)
    assert [place for place, _ in echo.candidates()] == [17, 33, 2, 8]
    assert echo.strength == 1


def test_an_echo_knows_no_past_beyond_its_ring() -> None:
    echo = EchoSource(4, history_bits=5)
    reference: list[int] = []
    last: dict[int, int] = {}
    numbers = random.Random(3)
    for tick in range(1, 500):
        place = numbers.randrange(40)
        echo.observe(place, last.get(place, 0))
        reference.append(place)
        before = last.get(place, 0)
        last[place] = tick
        expected = reference[before : before + min(4, tick - before - 1)] if before and tick - before <= 31 - 4 else []
        assert [named for named, _ in echo.candidates()] == expected


def fill(table: TransitionTable, keys: list[int]) -> None:
    for at in range(1, len(keys)):
        table.learn(keys[at - 2] if at > 1 else None, keys[at - 1], keys[at], keys[at])


def test_transitions_are_counted_as_shares() -> None:
    table = TransitionTable()
    fill(table, [1, 2, 1, 3, 1, 2, 1, 2])
    assert table.probability(1, 2) == 0.75
    assert table.probability(1, 3) == 0.25
    assert table.probability(2, 1) == 1.0
    assert table.probability(9, 1) == 0.0


def test_what_one_image_taught_serves_another_with_the_same_content() -> None:
    table = TransitionTable()
    teacher, pupil = MarkovSource(table), MarkovSource(table)
    for _ in range(3):
        for index in (10, 500, 7):
            teacher.observe(access(index, image=1, key=key_of(index.to_bytes(32, "little"))))
    pupil.observe(access(10, image=2, key=key_of((10).to_bytes(32, "little"))))
    assert [place for place, _ in pupil.candidates()] == [place_of(2, 500)]
    pupil.observe(access(500, image=2, key=key_of((500).to_bytes(32, "little"))))
    assert [place for place, _ in pupil.candidates()] == [place_of(2, 7)]
    assert [place for place, _ in pupil.second] == [place_of(2, 7)]


def test_the_table_is_bounded_and_keeps_what_is_counted_often() -> None:
    table = TransitionTable(states_max=100)
    for noise in range(5000):
        if noise % 10 == 0:
            table.learn(None, 1_000_000, 1_000_001, 1)
        table.learn(None, noise, noise + 7, noise + 7)
    assert len(table) <= 200
    assert table.probability(1_000_000, 1_000_001) > 0.9


def test_a_frequent_newcomer_takes_the_place_of_a_rare_successor() -> None:
    table = TransitionTable()
    for successor in range(6):
        table.learn(None, 1, 100 + successor, 0)
    for _ in range(20):
        table.learn(None, 1, 777, 0)
    assert table.probability(1, 777) > 0.5


def test_merging_adds_the_counts_of_both_hosts() -> None:
    here, there = TransitionTable(), TransitionTable()
    fill(here, [1, 2] * 4)
    fill(there, [1, 3] * 12)
    here.merge(there)
    assert here.probability(1, 3) == pytest.approx(12 / 16)
    assert here.probability(1, 2) == pytest.approx(4 / 16)
    assert there.probability(1, 2) == 0.0
    with pytest.raises(ValueError, match="4096"):
        here.merge(TransitionTable(4096))


keys = st.lists(st.integers(0, (1 << 64) - 1) | st.integers(0, 20), min_size=2, max_size=200)


@given(keys)
@settings(max_examples=60, deadline=None)
def test_a_table_survives_being_written_and_read(sequence: list[int]) -> None:
    table = TransitionTable()
    for at in range(1, len(sequence)):
        table.learn(sequence[at - 2] if at > 1 else None, sequence[at - 1], sequence[at], sequence[at] & INDEX_MASK)
    read = TransitionTable.from_bytes(table.to_bytes(), "models/markov", chunk_size=65536)
    assert read._one == table._one
    assert read._two == table._two
    small = TransitionTable.from_bytes(table.to_bytes(), "models/markov", chunk_size=65536, states_max=5)
    assert len(small) <= 10


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_damaged_tables_are_refused_by_name_whatever_the_damage(data: st.DataObject) -> None:
    table = TransitionTable()
    fill(table, list(range(50)))
    raw = bytearray(table.to_bytes())
    at = data.draw(st.integers(0, len(raw) - 1))
    if data.draw(st.booleans()):
        raw[at] ^= 1 << data.draw(st.integers(0, 7))
    else:
        del raw[at:]
    with pytest.raises((ObjectCorruptError, NewerFormatError), match="models/x"):
        TransitionTable.from_bytes(bytes(raw), "models/x", chunk_size=65536)


def test_a_sealed_table_that_lies_about_its_columns_is_refused() -> None:
    from novafs.prefetch.markov import KIND, VERSION, MarkovRecord

    empty = (b"", b"", b"", b"", b"", b"")
    one = (bytes(8), bytes(4), bytes(1), b"", b"", b"")
    for orders in ([empty], [empty, one], [(b"abc", b"", b"", b"", b"", b""), empty]):
        with pytest.raises(ObjectCorruptError):
            TransitionTable.from_bytes(seal(KIND, VERSION, MarkovRecord(65536, orders)), "m", chunk_size=65536)
    with pytest.raises(ObjectCorruptError, match="4096"):
        TransitionTable.from_bytes(TransitionTable(4096).to_bytes(), "m", chunk_size=65536)
    with pytest.raises(NewerFormatError):
        TransitionTable.from_bytes(seal(KIND, VERSION + 1, MarkovRecord(65536, [empty, empty])), "m", chunk_size=65536)
