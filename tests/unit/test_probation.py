"""Prefetched chunks on probation: wrong guesses make room for each other, not for what a guest has just read."""

from __future__ import annotations

import secrets

import pytest

from novafs.cache.memory import ENTRY_BYTES, MemoryTier
from novafs.eviction.base import make_policy
from novafs.eviction.probation import SHARE, Probation

CHUNK = 4096
HELD = 100


def noise_tier(policy: str = "lru") -> MemoryTier:
    chosen = make_policy(policy)
    tier = MemoryTier(capacity_bytes=HELD * (CHUNK + ENTRY_BYTES), decoded_share=0.0, policy=chosen)
    chosen.set_capacity(tier.capacity_bytes)
    return tier


def bring(tier: MemoryTier, count: int, *, prefetched: bool) -> list[bytes]:
    ids = [secrets.token_bytes(32) for _ in range(count)]
    for chunk_id in ids:
        assert tier.insert(chunk_id, secrets.token_bytes(CHUNK), prefetched=prefetched)
    return ids


@pytest.mark.parametrize("policy", ["lru", "2q", "wtinylfu", "s3fifo", "learned"])
def test_a_flood_of_wrong_guesses_leaves_what_was_just_read(policy: str) -> None:
    tier = noise_tier(policy)
    bring(tier, 2 * HELD, prefetched=False)
    read = bring(tier, 20, prefetched=False)
    for chunk_id in read:
        tier.peek(chunk_id)
    bring(tier, 5 * HELD, prefetched=True)
    held = sum(tier.contains(chunk_id) for chunk_id in read)
    assert held == len(read)
    assert tier._probation.used_bytes <= SHARE * tier.capacity_bytes + CHUNK + ENTRY_BYTES


def test_a_guess_that_was_used_is_a_chunk_like_any_other() -> None:
    tier = noise_tier()
    good = bring(tier, 20, prefetched=True)
    for chunk_id in good:
        assert tier.peek(chunk_id) is not None
    bring(tier, 3 * HELD, prefetched=True)
    assert all(tier.contains(chunk_id) for chunk_id in good)
    assert len(tier._probation) <= HELD


def test_in_an_empty_tier_guesses_may_take_all_there_is() -> None:
    tier = noise_tier()
    ids = bring(tier, HELD, prefetched=True)
    assert all(tier.contains(chunk_id) for chunk_id in ids)
    first, *_ = bring(tier, 1, prefetched=False)
    assert tier.contains(first)
    assert [tier.contains(chunk_id) for chunk_id in ids] == [False, *[True] * (HELD - 1)]


def test_what_is_dropped_or_evicted_leaves_probation_with_it() -> None:
    tier = noise_tier()
    evicted: list[bytes] = []
    tier.on_evict = lambda gone: evicted.extend(chunk_id for chunk_id, _ in gone)
    ids = bring(tier, 30, prefetched=True)
    tier.drop_many(ids[:10])
    assert len(tier._probation) == 20
    bring(tier, 2 * HELD, prefetched=False)
    assert len(tier._probation) <= 20
    assert set(evicted) >= {chunk_id for chunk_id in ids[10:] if not tier.contains(chunk_id)}
    tier.clear()
    assert len(tier._probation) == tier._probation.used_bytes == 0
    assert tier.used_bytes == 0


def test_the_oldest_guess_beyond_the_share_makes_room() -> None:
    probation = Probation()
    for number in range(4):
        probation.enter(bytes([number]), 10)
    assert probation.victim(160) is None
    assert probation.victim(159) == bytes([0])
    probation.leave_many([bytes([0]), bytes([9])])
    assert probation.used_bytes == 30
    assert bytes([1]) in probation
    assert probation.victim(100) == bytes([1])
