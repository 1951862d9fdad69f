"""The book of features: one at a time and in batches the same, bounded, and what the table in its docstring says."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from novafs.eviction.features import BATCH_MIN, FEATURES, Book
from novafs.eviction.trees import BINS


def key_of(number: int) -> bytes:
    return number.to_bytes(8, "little")


def filled(count: int, *, scale: float = 64.0) -> tuple[Book, list[int]]:
    book = Book()
    book.set_scale(scale)
    slots = []
    for number in range(count):
        slot = book.enter(key_of(number), 65536, number, prefetched=False, marked=False)
        book.access(slot)
        slots.append(slot)
    return book, slots


def test_a_batch_of_different_chunks_does_what_single_accesses_do() -> None:
    one, slots = filled(200)
    many, _ = filled(200)
    random = np.random.default_rng(5)
    for _ in range(20):
        chosen = random.permutation(200)[: BATCH_MIN + 20]
        for number in chosen.tolist():
            one.access(slots[number])
        many.access_many(np.array([slots[number] for number in chosen.tolist()], dtype=np.int64))
        assert one.now == many.now
    every = np.array(slots, dtype=np.int64)
    singly, batched = one.rows(every).astype(int), many.rows(every).astype(int)
    # Ages of regions are a batch's length off, and with them nothing else; a run in a batch is counted from the batch's own order.
    same = [number for number in range(FEATURES) if number not in (15, 17, 19)]
    assert (np.abs(singly - batched)[:, same] <= 1).all()


def test_a_chunk_that_is_in_a_batch_very_often_is_counted_as_often() -> None:
    one, slots = filled(4)
    many, _ = filled(4)
    batch = [slots[0]] * 60 + [slots[1]] * 2
    for slot in batch:
        one.access(slot)
    many.access_many(np.array(batch, dtype=np.int64))
    rows_one, rows_many = one.rows(np.array(slots)), many.rows(np.array(slots))
    assert rows_one[:, 4].tolist() == rows_many[:, 4].tolist()
    assert rows_one[:, 0].tolist() == rows_many[:, 0].tolist()
    assert np.abs(rows_one[:, 8].astype(int) - rows_many[:, 8].astype(int)).max() <= 2


def test_features_say_what_their_table_says() -> None:
    book, slots = filled(8, scale=16.0)
    rows = book.rows(np.array(slots))
    assert rows[:, 0].tolist() == sorted(rows[:, 0].tolist(), reverse=True)  # the oldest access first
    assert (rows[:, 1] == BINS - 1).all()  # no second access, no gap
    assert rows[:, 19].tolist() == sorted(rows[:, 19].tolist())  # the run grew
    assert rows[0, 9] == BINS - 1  # nobody at -1
    assert rows[1, 9] < BINS - 1
    assert rows[0, 23] >= BINS // 2  # its right neighbour was read after it
    assert rows[1, 22] < BINS // 2  # its left one before it


def test_a_prefetched_chunk_has_no_accesses_until_it_is_used() -> None:
    book, _ = filled(4)
    slot = book.enter(b"guessed!", 65536, 100, prefetched=True, marked=False)
    assert book.unused(slot)
    assert book.rows(np.array([slot]))[0, 4] == 0
    book.access(slot)
    assert not book.unused(slot)
    assert book.rows(np.array([slot]))[0, 4] > 0


def test_a_chunk_without_a_place_has_no_neighbours() -> None:
    book, _ = filled(4)
    slot = book.enter(b"nowhere!", 65536, -1, prefetched=False, marked=False)
    book.access(slot)
    row = book.rows(np.array([slot]))[0]
    assert (row[[9, 10, 11, 12, 15, 17, 22, 23]] == BINS - 1).all()
    assert (row[[13, 14, 16, 18]] == 0).all()


def test_who_comes_back_is_remembered() -> None:
    book, slots = filled(4)
    for _ in range(5):
        book.access(slots[2])
    before = book.rows(np.array([slots[2]]))[0]
    book.leave(key_of(2), ghost=True)
    assert key_of(2) not in book.held
    assert book.slot(key_of(2)) == slots[2]
    assert book.enter(key_of(2), 1, 2, prefetched=False, marked=False) == slots[2]
    assert book.rows(np.array([slots[2]]))[0].tolist() == before.tolist()
    book.leave(key_of(2), ghost=False)
    assert book.slot(key_of(2)) == -1


def test_ghosts_are_bounded_and_their_examples_are_given_back() -> None:
    book = Book()
    book.set_scale(10.0)
    book.ghosts_max = 100
    for number in range(500):
        slot = book.enter(key_of(number), 1, number, prefetched=False, marked=False)
        book.access(slot)
        book.pending[slot] = number
        book.leave(key_of(number), ghost=True)
    assert len(book.ghosts) == 100
    assert book.dropped == list(range(400))
    assert book.memory_bytes < 1 << 20


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("eal"), st.integers(0, 40)), max_size=200))
def test_what_is_drawn_is_held(steps: list[tuple[str, int]]) -> None:
    book = Book()
    random = np.random.default_rng(1)
    for step, number in steps:
        key = key_of(number)
        if step == "e" and key not in book.held:
            book.access(book.enter(key, 10, number, prefetched=False, marked=number % 2 == 0))
        elif step == "a" and key in book.held:
            book.access(book.held[key])
        elif step == "l":
            book.leave(key, ghost=number % 3 > 0)
        if book.held:
            drawn = set(book.draw(random, 50).tolist())
            assert drawn <= set(book.held.values())
            assert all(book.key_of(slot) in book.held for slot in drawn)


@pytest.mark.parametrize("count", [3000, 40_000])
def test_arrays_grow_without_losing_what_is_in_them(count: int) -> None:
    book, slots = filled(count, scale=float(count))
    row = book.rows(np.array(slots[1:2]))[0]
    assert row[4] > 0
    assert row[9] < BINS - 1
    assert row[10] < BINS - 1
