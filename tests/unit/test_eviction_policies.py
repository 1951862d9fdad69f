"""Every eviction policy keeps the interface's promises; the classic experts do what their papers say."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from novafs.errors import ConfigError
from novafs.eviction.base import EvictionPolicy, make_policy, policy_names
from novafs.eviction.linear8 import Linear8Policy
from novafs.eviction.s3fifo import S3FifoPolicy
from novafs.eviction.tinylfu import Sketch, TinyLfuPolicy
from novafs.eviction.twoq import TwoQueuePolicy

NAMES = ("2q", "learned", "linear8", "lru", "s3fifo", "wtinylfu")


def key_of(number: int) -> bytes:
    return number.to_bytes(8, "little")


def test_all_policies_are_known_by_name() -> None:
    assert set(NAMES) <= set(policy_names())


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=40, deadline=None)
@given(
    steps=st.lists(st.tuples(st.sampled_from("iiittttmrsv"), st.integers(0, 25), st.integers(1, 30)), max_size=120),
    capacity=st.integers(0, 400),
)
def test_a_policy_holds_what_came_in_and_names_each_victim_once(name: str, steps: list[tuple[str, int, int]], capacity: int) -> None:
    policy = make_policy(name)
    if capacity:
        policy.set_capacity(capacity)
    sizes: dict[bytes, int] = {}
    for step, number, size in steps:
        key = key_of(number)
        if step == "i" and key not in sizes:
            policy.insert(key, size, prefetched=size % 5 == 0, place=number if size % 3 else -1)
            sizes[key] = size
        elif step == "t":
            policy.touch(key)
        elif step == "m":
            policy.touch_many([key_of((number + at * size) % 30) for at in range(size * 4)])
        elif step == "r":
            policy.remove(key)
            sizes.pop(key, None)
        elif step == "s":
            policy.resize(key, size)
            if key in sizes:
                sizes[key] = size
        elif step == "v":
            held = sum(sizes.values())
            victims = policy.victims(size)
            assert len(set(victims)) == len(victims)
            freed = sum(sizes.pop(victim) for victim in victims)
            assert freed >= min(size, held)
        assert len(policy) == len(sizes)
        assert all(key in policy for key in sizes)
        policy.work()
    assert sorted(policy.victims(1 << 30)) == sorted(sizes)
    assert len(policy) == 0
    assert policy.victims(1) == []


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("lru", "linear8")])
def test_a_capacity_that_holds_nothing_is_refused_by_name(name: str) -> None:
    with pytest.raises(ConfigError, match=f"policy {name}: a capacity of 0 bytes"):
        make_policy(name).set_capacity(0)


@pytest.mark.parametrize("name", NAMES)
def test_the_same_calls_give_the_same_victims(name: str) -> None:
    def replay() -> list[bytes]:
        policy = make_policy(name)
        policy.set_clock(lambda: 0.0)
        policy.set_capacity(50)
        random = np.random.default_rng(3)
        held: set[bytes] = set()
        gone = []
        for number in random.zipf(1.2, 4000) % 300:
            key = key_of(int(number))
            if key in held:
                policy.touch(key)
                continue
            if len(held) == 50:
                for victim in policy.victims(1):
                    held.remove(victim)
                    gone.append(victim)
            held.add(key)
            policy.insert(key, 1, place=int(number))
            while policy.work():
                pass
        return gone

    assert replay() == replay()


def misses(policy: EvictionPolicy, accesses: list[int], capacity: int) -> int:
    policy.set_capacity(capacity)
    held: set[bytes] = set()
    count = 0
    for number in accesses:
        key = key_of(number)
        if key in held:
            policy.touch(key)
            continue
        count += 1
        if len(held) == capacity:
            held.difference_update(policy.victims(1))
        held.add(key)
        policy.insert(key, 1, place=number)
        while policy.work():
            pass
    return count


def hot_set_between_scans() -> list[int]:
    """A hot set in no order, and reads that never come again."""
    random = np.random.default_rng(2)
    accesses = []
    for lap in range(4000):
        accesses += random.integers(0, 30, 3).tolist()
        accesses += [1000 + 3 * lap, 1001 + 3 * lap, 1002 + 3 * lap]
    return accesses


@pytest.mark.parametrize("name", ["2q", "s3fifo", "wtinylfu", "learned"])
def test_experts_and_the_learned_one_resist_scans_better_than_lru(name: str) -> None:
    accesses = hot_set_between_scans()
    assert misses(make_policy(name), accesses, 40) < 0.95 * misses(make_policy("lru"), accesses, 40)


def test_2q_promotes_who_comes_back_from_its_ghosts_and_not_who_bursts() -> None:
    policy = TwoQueuePolicy()
    policy.set_capacity(8)
    for number in range(8):
        policy.insert(key_of(number), 1)
    for _ in range(9):
        policy.touch(key_of(0))
    assert policy.victims(1) == [key_of(0)]
    policy.insert(key_of(0), 1)
    # It is in the main queue now, which is asked only when the first queue is within its quarter.
    assert policy.victims(5) == [key_of(number) for number in range(1, 6)]
    for number in range(20, 26):
        policy.insert(key_of(number), 1)
    assert key_of(0) not in policy.victims(6)


def test_s3fifo_keeps_who_was_asked_for_twice_and_drops_who_was_not() -> None:
    policy = S3FifoPolicy()
    policy.set_capacity(10)
    for number in range(10):
        policy.insert(key_of(number), 1)
    policy.touch(key_of(0))
    policy.touch(key_of(0))
    policy.touch(key_of(1))
    assert policy.victims(2) == [key_of(1), key_of(2)]
    assert key_of(0) in policy


def test_w_tinylfu_admits_who_was_asked_for_more_often() -> None:
    policy = TinyLfuPolicy()
    policy.set_capacity(20)
    for number in range(20):
        policy.insert(key_of(number), 1)
    for _ in range(5):
        policy.touch(key_of(18))
    # 19 and 18 are in the window; both leave it when two more come in, and only 18 wins its contest.
    gone = policy.victims(1)
    policy.insert(key_of(100), 1)
    gone += policy.victims(1)
    policy.insert(key_of(101), 1)
    gone += policy.victims(2)
    assert key_of(18) not in gone
    assert key_of(18) in policy


def test_a_sketch_counts_and_fades() -> None:
    sketch = Sketch(1000)
    for _ in range(6):
        sketch.add(b"abcdefgh")
    assert sketch.estimate(b"abcdefgh") == 6
    for number in range(10_000):
        sketch.add(key_of(number * 7919))
    assert sketch.estimate(b"abcdefgh") < 6


def test_linear8_scores_with_a_sigmoid_over_its_eight_features() -> None:
    now = 1000.0
    policy = Linear8Policy(tier=2)
    policy.set_clock(lambda: now)
    policy.insert(b"a", 65536, place=7)
    policy.insert(b"b", 32768, place=8)
    policy.annotate(b"b", ratio=2.0, references=5)
    policy.touch(b"b")
    now = 4600.0
    policy.weights = np.arange(1.0, 9.0)
    policy.bias = -10.0
    hour = 4600.0 / 3600.0 / 24.0
    first = 1 * 1.0 + 2 * 0.01 + 3 * 1.0 + 4 * 0.0 + 5 * hour + 6 * 2 / 3 + 7 * 1.0 + 8 * 0.1 - 10.0
    second = 1 * 1.0 + 2 * 0.02 + 3 * 0.5 + 4 * 1.0 + 5 * hour + 6 * 2 / 3 + 7 * 2.0 + 8 * 0.5 - 10.0
    expected = 1.0 / (1.0 + np.exp(-np.array([first, second])))
    assert policy.scores(np.array([0, 1])) == pytest.approx(expected)


def test_linear8_learns_by_gradient_descent() -> None:
    policy = Linear8Policy()
    policy.set_clock(lambda: 0.0)
    policy.insert(b"a", 65536)
    before = policy.bias
    policy.touch(b"a")
    assert policy.bias > before
    after = policy.bias
    assert policy.victims(1) == [b"a"]
    assert policy.bias < after
