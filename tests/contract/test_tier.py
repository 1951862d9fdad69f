"""The contract of `novafs.cache.base.Tier`, on every tier: memory, and Redis in each of the ways to reach one."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from novafs.cache.base import Frame, Tier
from novafs.cache.memory import MemoryTier
from novafs.cache.redis import RedisTier, open_l2
from novafs.codec import Codec

CAPACITY_BYTES = 8 << 20
REDIS = ["redis_plain", "redis_tls", "redis_unix", "redis_sentinel", "redis_cluster", "embedded"]


@pytest.fixture(params=["memory", *(pytest.param(name, marks=pytest.mark.redis) for name in REDIS)])
def tier(request: pytest.FixtureRequest, tmp_path: Path, volume_id: str) -> Iterator[Tier]:
    if request.param == "memory":
        tier: Tier | None = MemoryTier(capacity_bytes=CAPACITY_BYTES)
    else:
        url = "embedded" if request.param == "embedded" else request.getfixturevalue(request.param).url
        tier = open_l2(url, capacity_bytes=CAPACITY_BYTES, volume_id=volume_id, state_dir=tmp_path, timeout_s=10)
    assert tier is not None
    assert tier.up
    yield tier
    tier.close()


def new_id() -> bytes:
    return secrets.token_bytes(32)


def frames_of(count: int, size: int = 1000) -> dict[bytes, Frame]:
    """Some of every codec: a tier does not look into payloads."""
    return {new_id(): Frame(number % len(Codec), secrets.token_bytes(size)) for number in range(count)}


def test_what_was_put_is_got_byte_for_byte(tier: Tier) -> None:
    frames = frames_of(40) | {new_id(): Frame(Codec.ZSTD, b""), new_id(): Frame(Codec.NONE, bytes(range(256)) * 1024)}
    tier.put_many(frames)
    assert tier.get_many(list(frames)) == frames


def test_what_was_not_put_is_not_got(tier: Tier) -> None:
    frames = frames_of(3)
    tier.put_many(frames)
    strange = new_id()
    assert tier.get_many([strange, *frames]) == frames
    assert tier.get_many([strange]) == {}
    assert tier.get_many([]) == {}


def test_a_put_replaces_what_was_there(tier: Tier) -> None:
    chunk_id = new_id()
    for frame in (
        Frame(Codec.LZ4, b"a" * 500),
        Frame(Codec.NONE, b"b" * 3000),
        Frame(Codec.SNAPPY, b"c" * 20),
        Frame(Codec.LZ4, b"d" * 500),
    ):
        tier.put_many({chunk_id: frame})
        assert tier.get_many([chunk_id]) == {chunk_id: frame}
        assert tier.statistics().entries == 1
        assert 0 < tier.statistics().used_bytes - len(frame.payload) < 600


def test_hits_and_misses_are_counted_one_by_one(tier: Tier) -> None:
    frames = frames_of(5)
    tier.put_many(frames)
    before = tier.statistics()
    tier.get_many([*frames, new_id(), new_id()])
    after = tier.statistics()
    assert (after.hits - before.hits, after.misses - before.misses) == (5, 2)
    assert after.insertions == 5


def test_contains_counts_nothing(tier: Tier) -> None:
    frames = frames_of(5)
    tier.put_many(frames)
    before = tier.statistics()
    assert tier.contains_many([*frames, new_id()]) == set(frames)
    assert tier.contains_many([]) == set()
    assert (tier.statistics().hits, tier.statistics().misses) == (before.hits, before.misses)


def test_what_was_deleted_is_gone_and_its_bytes_with_it(tier: Tier) -> None:
    frames = frames_of(10)
    empty = tier.statistics().used_bytes
    tier.put_many(frames)
    ids = list(frames)
    tier.delete_many([*ids[:6], new_id()])
    assert tier.get_many(ids) == {chunk_id: frames[chunk_id] for chunk_id in ids[6:]}
    assert tier.statistics().entries == 4
    tier.delete_many(ids)
    assert tier.statistics().used_bytes == empty
    tier.delete_many([])


def test_clear_drops_everything(tier: Tier) -> None:
    frames = frames_of(50)
    tier.put_many(frames)
    tier.clear()
    assert tier.contains_many(list(frames)) == set()
    assert (tier.statistics().entries, tier.statistics().used_bytes) == (0, 0)
    tier.put_many(frames)
    assert tier.get_many(list(frames)) == frames


def test_the_capacity_holds_and_is_used(tier: Tier) -> None:
    put: list[bytes] = []
    for _ in range(12):
        frames = frames_of(100, 10_000)
        tier.put_many(frames)
        put += frames
        assert tier.statistics().used_bytes <= CAPACITY_BYTES
    statistics = tier.statistics()
    assert statistics.used_bytes >= 0.9 * CAPACITY_BYTES
    assert statistics.evictions == len(put) - statistics.entries
    assert len(tier.contains_many(put)) == statistics.entries


def test_a_frame_larger_than_the_capacity_is_not_kept_and_evicts_nothing(tier: Tier) -> None:
    frames = frames_of(20)
    tier.put_many(frames)
    giant = new_id()
    tier.put_many({giant: Frame(Codec.NONE, bytes(CAPACITY_BYTES + 1))})
    assert tier.contains_many([giant, *frames]) == set(frames)


def test_who_was_read_lately_stays(tier: Tier) -> None:
    frames = frames_of(60, 10_000)
    tier.put_many(frames)
    ids = list(frames)
    wanted = ids[:20]
    for _ in range(12):
        assert len(tier.get_many(wanted)) == len(wanted)
        if isinstance(tier, RedisTier):
            tier.flush()
        tier.put_many(frames_of(100, 10_000))
    assert tier.contains_many(ids) == set(wanted)


@pytest.mark.redis
@pytest.mark.parametrize("tier", REDIS, indirect=True)
def test_many_threads_may_call_at_once(tier: Tier) -> None:
    def work(_: int) -> None:
        for _ in range(5):
            frames = frames_of(20, 3000)
            tier.put_many(frames)
            assert tier.get_many(list(frames)) == frames
            tier.delete_many(list(frames)[:10])
            assert len(tier.contains_many(list(frames))) == 10

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    assert tier.statistics().errors == 0
    assert tier.statistics().entries == 8 * 5 * 10


def test_a_closed_tier_holds_nothing_and_may_be_closed_again(tier: Tier) -> None:
    frames = frames_of(3)
    tier.put_many(frames)
    tier.close()
    assert tier.get_many(list(frames)) == {}
    tier.put_many({new_id(): Frame(Codec.NONE, b"x")} if isinstance(tier, RedisTier) else {})
    tier.close()
