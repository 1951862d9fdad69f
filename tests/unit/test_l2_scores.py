"""Who leaves L2: scores in the sorted sets of real servers (one, a Cluster of three, the embedded one), with any host evicting."""

from __future__ import annotations

import multiprocessing
import random
import secrets
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from novafs.cache.base import Frame
from novafs.cache.redis import ENTRY_BYTES, RedisTier, gain_of, open_l2
from novafs.cache.redis_scripts import GAIN_MAX, GAIN_MIN, REACH
from novafs.codec import Codec
from tests.support.redis_servers import ClusterServers, RedisServer

pytestmark = pytest.mark.redis

SIZE = 4000
COST = SIZE + 16 + ENTRY_BYTES
"""Of an entry, header and overhead included."""


def new_id(shard: int | None = None) -> bytes:
    return secrets.token_bytes(32) if shard is None else bytes([shard]) + secrets.token_bytes(31)


def frame() -> Frame:
    return Frame(Codec.NONE, secrets.token_bytes(SIZE))


@contextmanager
def opened(url: str, volume_id: str, *, entries: int, state_dir: Path = Path("/nonexistent")) -> Iterator[RedisTier]:
    """A tier with room for so many entries in all its shards together."""
    tier = open_l2(url, capacity_bytes=entries * COST, volume_id=volume_id, state_dir=state_dir, timeout_s=10)
    assert isinstance(tier, RedisTier)
    try:
        yield tier
    finally:
        tier.close()


Opener = Callable[..., RedisTier]


@pytest.fixture(params=["redis_plain", "redis_cluster", "embedded"])
def open_tier(request: pytest.FixtureRequest, tmp_path: Path, volume_id: str) -> Iterator[Opener]:
    """Opens a host's tier of one and the same L2."""
    url = "embedded" if request.param == "embedded" else request.getfixturevalue(request.param).url
    with ExitStack() as stack:
        yield lambda entries: stack.enter_context(opened(url, volume_id, entries=entries, state_dir=tmp_path))


def aged(tier: RedisTier, count: int) -> list[bytes]:
    """Fill a tier up and over, so that its shards have a span."""
    ids = []
    for _ in range(count // 50):
        frames = {new_id(): frame() for _ in range(50)}
        tier.put_many(frames)
        ids += frames
    return ids


def test_the_gain_of_a_chance_is_recency_where_nothing_is_known() -> None:
    assert gain_of(None) == gain_of(float("nan")) == gain_of(-1.0) == gain_of(2.0) == 0.0
    assert (gain_of(0.0), gain_of(1.0)) == (GAIN_MIN, GAIN_MAX)
    assert gain_of(0.2) < 0 < gain_of(0.3)


ROOM = 1600
"""Entries: 100 in each of 16 shards, so that chance makes little difference between them."""


def test_who_is_likely_to_be_asked_for_again_stays_and_the_one_off_leaves(open_tier: Opener) -> None:
    one = open_tier(ROOM)
    aged(one, 2000)
    likely, unknown, one_off = ([new_id() for _ in range(160)] for _ in range(3))
    chances: dict[bytes, float | None] = {**dict.fromkeys(likely, 0.9), **dict.fromkeys(unknown), **dict.fromkeys(one_off, 0.06)}
    order = [*likely, *unknown, *one_off]
    random.Random(1).shuffle(order)
    one.put_many({chunk_id: frame() for chunk_id in order}, chances)
    other = open_tier(ROOM)  # a host that knows nothing evicts what the first has scored
    aged(other, 800)
    held = other.contains_many(order)
    assert len(held & set(one_off)) < 25
    assert len(held & set(unknown)) > 140
    aged(other, 1200)
    held = other.contains_many(order)
    assert len(held & set(unknown)) < 25
    assert len(held & set(likely)) > 140
    assert other.statistics().used_bytes <= ROOM * COST
    assert one.statistics().errors == other.statistics().errors == 0


def test_what_is_said_of_a_read_changes_who_leaves(open_tier: Opener) -> None:
    tier = open_tier(ROOM)
    aged(tier, 2000)
    again, never = ([new_id() for _ in range(160)] for _ in range(2))
    tier.put_many({chunk_id: frame() for chunk_id in (*again, *never)})
    assert len(tier.get_many([*again, *never])) == 320
    tier.rate_many({**dict.fromkeys(again, 0.9), **dict.fromkeys(never, 0.0)})
    tier.flush()
    aged(tier, 1100)
    assert len(tier.contains_many(never)) < 16
    assert len(tier.contains_many(again)) > 140


def test_a_rating_of_what_is_not_there_is_nothing(open_tier: Opener) -> None:
    tier = open_tier(400)
    tier.rate_many({new_id(): 0.5 for _ in range(20)})
    tier.flush()
    assert (tier.statistics().entries, tier.statistics().errors) == (0, 0)


def test_without_chances_it_is_an_lru(redis_plain: RedisServer, volume_id: str) -> None:
    """Step for step, against a plain model of one."""
    numbers = random.Random(3)
    room = 30
    names = [new_id() for _ in range(60)]
    model: OrderedDict[bytes, None] = OrderedDict()
    with opened(redis_plain.url + "?shards=1", volume_id, entries=room) as tier:
        for _ in range(60):
            batch = numbers.sample(names, numbers.randrange(1, 8))
            if numbers.random() < 0.5:
                assert set(tier.get_many(batch)) == {chunk_id for chunk_id in batch if chunk_id in model}
                tier.flush()
                for chunk_id in batch:
                    if chunk_id in model:
                        model.move_to_end(chunk_id)
            else:
                tier.put_many({chunk_id: frame() for chunk_id in batch})
                for chunk_id in batch:
                    if chunk_id not in model and len(model) == room:
                        model.popitem(last=False)
                    model[chunk_id] = None
                    model.move_to_end(chunk_id)
            assert tier.contains_many(names) == set(model)


def test_reads_and_scores_are_one_batch_each(redis_plain: RedisServer, volume_id: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(redis_plain.url, volume_id, entries=400) as tier:
        ids = [new_id() for _ in range(60)]
        tier.put_many({chunk_id: frame() for chunk_id in ids})
        tier.flush()
        batches: list[int] = []
        execute = tier._link.execute

        def counted(commands: Sequence[Any]) -> list[Any]:
            batches.append(len(commands))
            return execute(commands)

        monkeypatch.setattr(tier._link, "execute", counted)
        monkeypatch.setattr(tier._wake, "set", lambda: None)
        tier.get_many(ids)
        assert batches == [60]
        tier.rate_many(dict.fromkeys(ids, 0.5))
        assert batches == [60]
        tier.flush()
        assert sum(batches) == 60 + len({chunk_id[0] & 15 for chunk_id in ids}), "one call for each shard, of all 60 together"
        assert len(batches) == 2


@pytest.mark.parametrize("score", ["inf", "1e300", "9e15", "-inf", "-1", "0"])
def test_scores_of_somebody_else_neither_stay_for_ever_nor_break_the_capacity(
    redis_server: RedisServer, volume_id: str, score: str
) -> None:
    """semantics: S18."""
    with opened(redis_server.url + "?shards=1", volume_id, entries=100) as tier:
        aged(tier, 150)
        with redis_server.client() as client:
            index = tier._shards[0].index
            members = client.zrange(index, 0, -1)
            for member in members[:40]:
                client.zadd(index, {member: score})
            client.zadd(index, {b"nonsense": score, b"x" * 36: score})
        mine = [member[:32] for member in members[:40]]
        for _ in range(8):
            aged(tier, 100)
            assert tier.statistics().used_bytes <= 100 * COST
        with redis_server.client() as client:
            assert client.zscore(index, b"nonsense") is None
            assert client.zcard(index) <= 100
        assert not tier.contains_many(mine), f"{len(members)} scores of {score}, {REACH} brought back in each call"
        assert tier.statistics().errors == 0


@pytest.mark.parametrize("clock", [None, b"", b"nonsense", b"nan", b"inf", b"-inf", b"-5", b"7", b"9e15"])
def test_a_clock_that_is_lost_or_wrong_is_put_right(redis_server: RedisServer, volume_id: str, clock: bytes | None) -> None:
    with opened(redis_server.url + "?shards=1", volume_id, entries=100) as tier:
        old = aged(tier, 200)[100:]
        with redis_server.client() as client:
            use = tier._shards[0].use
            client.hdel(use, "clock") if clock is None else client.hset(use, "clock", clock)
        aged(tier, 800)
        assert not tier.contains_many(old)
        late = aged(tier, 50)
        assert tier.contains_many(late) == set(late)
        assert (tier.statistics().entries, tier.statistics().errors) == (100, 0)


def test_an_index_of_before_there_was_a_clock_goes_on_in_its_order(redis_server: RedisServer, volume_id: str) -> None:
    """docs/format.md: scores were the server's time in µs, and the use had no clock."""
    with opened(redis_server.url + "?shards=1", volume_id, entries=100) as tier:
        ids = [new_id() for _ in range(100)]
        tier.put_many({chunk_id: frame() for chunk_id in ids})
        with redis_server.client() as client:
            shard = tier._shards[0]
            client.hdel(shard.use, "clock")
            seconds, micros = client.time()
            at = {member[:32]: member for member in client.zrange(shard.index, 0, -1)}
            for age, chunk_id in enumerate(ids):
                client.zadd(shard.index, {at[chunk_id]: seconds * 1_000_000 + micros - 3_600_000_000 + age * 36_000_000})
        new = aged(tier, 50)
        assert tier.contains_many([*ids, *new]) == {*ids[50:], *new}
        newer = aged(tier, 50)
        assert tier.contains_many([*ids, *new, *newer]) == {*new, *newer}


def test_all_keys_of_a_shard_are_in_one_slot(redis_cluster: ClusterServers, volume_id: str) -> None:
    with opened(redis_cluster.url, volume_id, entries=400) as tier:
        aged(tier, 100)
        with redis_cluster.nodes[0].client() as client:
            slots = set()
            for shard in tier._shards:
                keys = [shard.index, shard.use, *(shard.prefix + new_id() for _ in range(3))]
                of_shard = {client.execute_command("CLUSTER KEYSLOT", key) for key in keys}
                assert len(of_shard) == 1
                slots |= of_shard
        assert len(slots) == len(tier._shards)


def _write(url: str, volume_id: str, entries: int, rounds: int) -> int:
    """A host that writes, reads and rates. The errors that its tier counted."""
    numbers = random.Random(secrets.randbits(32))
    with opened(url, volume_id, entries=entries) as tier:
        for _ in range(rounds):
            frames = {new_id(): Frame(Codec.NONE, secrets.token_bytes(numbers.randrange(1000, 20_000))) for _ in range(40)}
            tier.put_many(frames, {chunk_id: numbers.choice((None, numbers.random())) for chunk_id in frames})
            tier.get_many(list(frames)[:10])
            tier.rate_many({chunk_id: numbers.random() for chunk_id in list(frames)[:10]})
            tier.delete_many(list(frames)[:2])
        return tier.statistics().errors


def _real_use(servers: ClusterServers, volume_id: str) -> int:
    """Bytes that the data keys of a volume really are, on all nodes."""
    used = 0
    for node in servers.nodes:
        with node.client() as client:
            keys = [key for key in client.scan_iter(match=f"novafs:{{{volume_id}:*", count=1000) if b"}:d:" in key]
            pipeline = client.pipeline(transaction=False)
            for key in keys:
                pipeline.strlen(key)
            used += sum(pipeline.execute()) + len(keys) * ENTRY_BYTES
    return used


def test_hosts_that_write_at_once_to_a_cluster_stay_within_one_percent_of_the_capacity(
    redis_cluster: ClusterServers, volume_id: str
) -> None:
    entries = 4000
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(3, mp_context=context) as pool:
        writers = [pool.submit(_write, redis_cluster.url, volume_id, entries, 40) for _ in range(3)]
        while wait(writers, timeout=0.1).not_done:
            assert _real_use(redis_cluster, volume_id) <= 1.01 * entries * COST
        assert [writer.result() for writer in writers] == [0, 0, 0]
    assert 0.97 * entries * COST <= _real_use(redis_cluster, volume_id) <= entries * COST
