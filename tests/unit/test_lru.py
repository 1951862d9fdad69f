"""LRU and the registry of policies."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from novafs.errors import ConfigError
from novafs.eviction.base import make_policy, policy_names, register_policy
from novafs.eviction.lru import LruPolicy


def filled(*keys: bytes, size: int = 10) -> LruPolicy:
    policy = LruPolicy()
    for key in keys:
        policy.insert(key, size)
    return policy


def test_who_was_read_longest_ago_leaves_first() -> None:
    policy = filled(b"a", b"b", b"c", b"d")
    policy.touch(b"a")
    policy.touch_many([b"c", b"unknown", b"b"])
    assert policy.victims(25) == [b"d", b"a", b"c"]
    assert len(policy) == 1
    assert b"b" in policy
    assert b"a" not in policy


def test_victims_are_no_more_than_are_needed_and_no_more_than_there_are() -> None:
    policy = filled(b"a", b"b", b"c")
    assert policy.victims(0) == []
    assert policy.victims(1) == [b"a"]
    assert policy.victims(1000) == [b"b", b"c"]
    assert policy.victims(1) == []


def test_a_new_size_counts_and_is_no_access() -> None:
    policy = filled(b"a", b"b", b"c")
    policy.resize(b"a", 100)
    policy.resize(b"unknown", 100)
    assert policy.victims(100) == [b"a"]
    assert len(policy) == 2


def test_what_was_removed_is_no_victim() -> None:
    policy = filled(b"a", b"b")
    policy.remove(b"a")
    policy.remove(b"unknown")
    assert policy.victims(1000) == [b"b"]


@given(st.lists(st.tuples(st.sampled_from("itrv"), st.integers(0, 9), st.integers(1, 30))))
def test_lru_does_what_a_list_does(steps: list[tuple[str, int, int]]) -> None:
    policy, model = LruPolicy(), dict[bytes, int]()
    for step, number, size in steps:
        key = b"%d" % number
        if step == "i" and key not in model:
            policy.insert(key, size, prefetched=size % 2 == 0)
            model[key] = size
        elif step == "t":
            policy.touch(key)
            if key in model:
                model[key] = model.pop(key)
        elif step == "r":
            policy.remove(key)
            model.pop(key, None)
        elif step == "v":
            expected, freed = [], 0
            while freed < size and model:
                oldest = next(iter(model))
                freed += model.pop(oldest)
                expected.append(oldest)
            assert policy.victims(size) == expected
        assert len(policy) == len(model)


def test_policies_are_made_by_name() -> None:
    assert isinstance(make_policy("lru"), LruPolicy)
    assert isinstance(make_policy(" LRU "), LruPolicy)
    assert make_policy("lru") is not make_policy("lru")
    assert "lru" in policy_names()


def test_an_unknown_policy_is_refused_with_the_nearest_known_one() -> None:
    with pytest.raises(ConfigError, match=r"'lruu' is no eviction policy: expected one of .*lru.*; did you mean 'lru'\?"):
        make_policy("lruu")
    with pytest.raises(ConfigError, match="expected one of"):
        make_policy("")


def test_a_registered_policy_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("novafs.eviction.base._POLICIES", {})
    register_policy("mine", lambda: filled(b"x"))
    assert len(make_policy("mine")) == 1
    assert {"lru", "mine"} <= set(policy_names())
