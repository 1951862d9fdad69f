"""L2 against a real Redis that is killed, paused, flushed, filled with garbage, out of memory, or no Redis at all."""

from __future__ import annotations

import logging
import multiprocessing
import secrets
import socket
import struct
import subprocess
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import given
from hypothesis import strategies as st

from novafs.cache.base import Frame
from novafs.cache.redis import ENTRY_BYTES, TOUCHES_MAX, RedisTier, open_l2, pack_value, unpack_value
from novafs.cache.redis_address import parse_redis_url
from novafs.codec import Codec
from tests.support.redis_servers import HOST, PASSWORD, ClusterServers, RedisServer, SentinelServers, cli_binary, free_port, wait_until

pytestmark = pytest.mark.redis

CAPACITY_BYTES = 16 << 20
UP_TIMEOUT_S = 30


def new_id() -> bytes:
    return secrets.token_bytes(32)


def frames_of(count: int, size: int = 4000) -> dict[bytes, Frame]:
    return {new_id(): Frame(Codec.NONE, secrets.token_bytes(size)) for _ in range(count)}


@contextmanager
def opened(url: str, volume_id: str, *, capacity_bytes: int = CAPACITY_BYTES, timeout_s: float = 0.25) -> Iterator[RedisTier]:
    tier = open_l2(url, capacity_bytes=capacity_bytes, volume_id=volume_id, state_dir=Path("/nonexistent"), timeout_s=timeout_s)
    assert isinstance(tier, RedisTier)
    try:
        yield tier
    finally:
        tier.close()


@pytest.fixture
def tier(redis_server: RedisServer, volume_id: str) -> Iterator[RedisTier]:
    # As long as a loaded machine may take: what is tested of time-outs has its own.
    with opened(redis_server.url, volume_id, timeout_s=5.0) as tier:
        yield tier


def use_every_call(tier: RedisTier, frames: dict[bytes, Frame]) -> None:
    """None of them may raise, whatever the servers do."""
    assert set(tier.get_many(list(frames))) <= set(frames)
    tier.put_many(frames)
    assert tier.contains_many(list(frames)) <= set(frames)
    tier.flush()
    tier.delete_many(list(frames))
    tier.clear()
    tier.statistics()


def real_use(server: RedisServer, volume_id: str) -> tuple[int, int]:
    """Bytes and entries that the data keys of a volume really are, by looking at each."""
    with server.client() as client:
        keys = [key for key in client.scan_iter(match=f"novafs:{{{volume_id}:*", count=1000) if b"}:d:" in key]
        pipeline = client.pipeline(transaction=False)
        for key in keys:
            pipeline.strlen(key)
        lengths = pipeline.execute()
    return sum(lengths) + len(keys) * ENTRY_BYTES, len(keys)


def told_use(server: RedisServer, volume_id: str) -> tuple[int, int]:
    """The same, by the shards' counters."""
    with server.client() as client:
        rows = [client.hmget(key, "bytes", "count") for key in client.scan_iter(match=f"novafs:{{{volume_id}:*}}:u")]
    return sum(int(row[0]) for row in rows), sum(int(row[1]) for row in rows)


# --- values -------------------------------------------------------------------------------------------------------


@given(chunk_id=st.binary(min_size=32, max_size=32), codec=st.integers(0, 255), payload=st.binary(max_size=200), data=st.data())
def test_a_value_is_its_frame_and_any_change_of_it_is_none(chunk_id: bytes, codec: int, payload: bytes, data: st.DataObject) -> None:
    frame = Frame(codec, payload)
    value = pack_value(chunk_id, frame)
    assert unpack_value(chunk_id, value) == frame
    at = data.draw(st.integers(0, len(value) - 1))
    if at != 3:  # the codec is not under the checksum: a wrong one fails to decode or to verify
        changed = value[:at] + bytes([value[at] ^ data.draw(st.integers(1, 255))]) + value[at + 1 :]
        assert unpack_value(chunk_id, changed) is None
    assert unpack_value(chunk_id, value[:at]) is None
    assert unpack_value(chunk_id, value + b"x") is None
    assert unpack_value(bytes(32) if any(chunk_id[:8]) else b"\1" * 32, value) is None


@given(st.one_of(st.binary(max_size=100), st.none(), st.integers(), st.lists(st.binary())))
def test_garbage_is_no_value(garbage: object) -> None:
    assert unpack_value(bytes(32), garbage) is None


# --- away ---------------------------------------------------------------------------------------------------------


def test_a_killed_server_is_missed_and_found_again(redis_server: RedisServer, tier: RedisTier, caplog: pytest.LogCaptureFixture) -> None:
    """semantics: S11."""
    frames = frames_of(20)
    tier.put_many(frames)
    caplog.set_level(logging.INFO)
    redis_server.kill()
    use_every_call(tier, frames)
    assert not tier.up
    errors = tier.statistics().errors
    for _ in range(100):
        use_every_call(tier, frames)
    assert tier.statistics().errors == errors  # down: the network is not touched
    redis_server.start()
    assert tier.wait_up(UP_TIMEOUT_S)
    tier.put_many(frames)
    assert tier.get_many(list(frames)) == frames
    messages = [record.getMessage() for record in caplog.records if record.name.startswith("novafs")]
    assert len([message for message in messages if "does not answer" in message]) == 1
    assert len([message for message in messages if "answers again" in message]) == 1


def test_a_server_that_was_restarted_between_two_calls_is_not_noticed(redis_server: RedisServer, tier: RedisTier) -> None:
    frames = frames_of(20)
    tier.put_many(frames)
    redis_server.kill()
    redis_server.start()
    assert tier.get_many(list(frames)) == {}
    tier.put_many(frames)
    assert tier.get_many(list(frames)) == frames
    assert tier.up
    assert told_use(redis_server, _volume_of(tier)) == real_use(redis_server, _volume_of(tier))


def test_a_server_that_is_away_at_the_start_is_found_when_it_comes(
    tmp_path: Path, volume_id: str, caplog: pytest.LogCaptureFixture
) -> None:
    server = RedisServer(tmp_path)
    with opened(server.url, volume_id) as tier:
        assert not tier.up
        assert "starting without it" in caplog.text
        use_every_call(tier, frames_of(3))
        with server:
            assert tier.wait_up(UP_TIMEOUT_S)
            frames = frames_of(3)
            tier.put_many(frames)
            assert tier.get_many(list(frames)) == frames


def test_a_paused_server_costs_one_time_out_and_is_found_when_it_goes_on(redis_server: RedisServer, tier: RedisTier) -> None:
    """semantics: S11."""
    frames = frames_of(20)
    tier.put_many(frames)
    redis_server.pause()
    assert tier.get_many(list(frames)) == {}
    assert not tier.up
    use_every_call(tier, frames)
    redis_server.resume()
    assert tier.wait_up(UP_TIMEOUT_S)
    assert tier.get_many(list(frames)) == frames


def test_accesses_noted_while_the_server_was_away_are_told_later(redis_server: RedisServer, tier: RedisTier) -> None:
    frames = frames_of(10)
    tier.put_many(frames)
    ids = list(frames)
    tier.get_many(ids[:1])
    redis_server.pause()
    tier.get_many(ids)
    tier.flush()
    redis_server.resume()
    assert tier.wait_up(UP_TIMEOUT_S)
    tier.flush()
    assert tier.contains_many(ids) == set(ids)


def test_noted_accesses_are_bounded(tier: RedisTier) -> None:
    frames = frames_of(TOUCHES_MAX // 8 + 10, 10)
    tier.put_many(frames)
    tier._wake.set = lambda: None  # type: ignore[method-assign] # nobody fetches them
    for chunk_id in frames:
        tier._touches[chunk_id] = 0.0
    tier._touches.update({new_id(): 0.0 for _ in range(TOUCHES_MAX - len(tier._touches))})
    more = frames_of(50, 10)
    tier.put_many(more)
    tier.get_many(list(more))
    assert len(tier._touches) <= TOUCHES_MAX


def test_an_idle_tier_finds_out_that_the_server_is_gone(
    redis_server: RedisServer, volume_id: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("novafs.cache.redis.REFRESH_S", 0)
    monkeypatch.setattr("novafs.cache.redis.FLUSH_S", 0.05)
    with opened(redis_server.url, volume_id) as one, opened(redis_server.url, volume_id) as other:
        one.put_many(frames_of(10))
        wait_until(lambda: other.statistics().entries == 10, "the other to be told of what the first has put")
        redis_server.kill()
        wait_until(lambda: not one.up and not other.up, "both to notice")
    assert "does not answer" in caplog.text


# --- flushed, damaged ---------------------------------------------------------------------------------------------


def _volume_of(tier: RedisTier) -> str:
    return tier._pattern.decode().partition("{")[2].partition(":")[0]


def test_a_flushed_server_starts_from_nothing(redis_server: RedisServer, tier: RedisTier) -> None:
    """semantics: S11."""
    tier.put_many(frames_of(100))
    with redis_server.client() as client:
        client.flushall()
    frames = frames_of(30)
    assert tier.get_many(list(frames)) == {}
    tier.put_many(frames)
    assert tier.get_many(list(frames)) == frames
    assert told_use(redis_server, _volume_of(tier)) == real_use(redis_server, _volume_of(tier))


@pytest.mark.parametrize("what", ["index", "use"])
@pytest.mark.parametrize("how", ["gone", "string", "list", "set", "hash of nonsense", "sorted set of nonsense"])
def test_counters_or_indexes_that_are_gone_or_wrong_are_put_right(
    redis_server: RedisServer, tier: RedisTier, volume_id: str, what: str, how: str
) -> None:
    frames = frames_of(200)
    tier.put_many(frames)
    with redis_server.client() as client:
        for shard in tier._shards:
            key = getattr(shard, what)
            client.delete(key)
            match how:
                case "string":
                    client.set(key, b"nonsense")
                case "list":
                    client.lpush(key, b"nonsense")
                case "set":
                    client.sadd(key, b"nonsense")
                case "hash of nonsense":
                    client.hset(key, mapping={"bytes": "many", "count": "a few"})
                case "sorted set of nonsense":
                    client.zadd(key, {b"nonsense": 1, b"x" * 36: 2})
    more = frames_of(200)
    tier.put_many(more)
    tier.get_many([*frames, *more])
    tier.flush()  # what an index had lost is taken back in
    assert tier.up
    assert tier.get_many(list(more)) == more
    told, real = told_use(redis_server, volume_id), real_use(redis_server, volume_id)
    assert real[0] <= told[0] <= CAPACITY_BYTES
    if how != "sorted set of nonsense":
        assert told == real
        assert tier.get_many(list(frames)) == frames
    # Whatever was left behind, the capacity holds, and nonsense is evicted in its turn.
    for _ in range(12):
        tier.put_many(frames_of(500))
    assert told_use(redis_server, volume_id) == real_use(redis_server, volume_id)
    assert real_use(redis_server, volume_id)[0] <= CAPACITY_BYTES


def test_values_that_are_garbage_are_missed_and_deleted(
    redis_server: RedisServer, tier: RedisTier, caplog: pytest.LogCaptureFixture
) -> None:
    """semantics: S11."""
    frames = frames_of(12)
    tier.put_many(frames)
    ids = list(frames)
    whole = pack_value(ids[0], frames[ids[0]])
    damage = [
        b"",
        b"x",
        b"nonsense that is long enough to have a header",
        whole[:-1],
        whole + b"x",
        whole[:100] + b"\0" + whole[101:],
        pack_value(ids[11], frames[ids[11]]),
        b"NV\x02" + whole[3:],
        struct.pack("<2sBBIQ", b"NV", 1, 0, 0xFFFFFFFF, 0),
    ]
    with redis_server.client() as client:
        for chunk_id, value in zip(ids, damage, strict=False):
            client.set(tier._key(chunk_id), value)
    good = ids[len(damage) :]
    assert tier.get_many(ids) == {chunk_id: frames[chunk_id] for chunk_id in good}
    assert tier.contains_many(ids) == set(good)
    bad = len(damage) - 1  # an empty one is as good as none
    assert tier.statistics().errors == bad
    assert f"{bad} values that are none of ours" in caplog.text
    tier.put_many(frames)
    assert tier.get_many(ids) == frames
    assert tier.up


def test_values_longer_than_any_of_ours_are_never_held(redis_server: RedisServer, tier: RedisTier) -> None:
    """semantics: S18. Somebody else's, or an attacker's: 512 MiB can be a value, and a batch has many."""
    frames = frames_of(64)
    tier.put_many(frames)
    ids = list(frames)
    with redis_server.client() as client:
        for chunk_id in ids[:30]:
            client.setrange(tier._key(chunk_id), 24 << 20, b"x")
    tracemalloc.start()
    try:
        found = tier.get_many(ids)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert found == {chunk_id: frames[chunk_id] for chunk_id in ids[30:]}
    assert peak < 40 << 20, "not 720 MiB"
    assert tier.contains_many(ids) == set(ids[30:])
    with redis_server.client() as client:
        assert not client.exists(*(tier._key(chunk_id) for chunk_id in ids[:30])), "deleted"


def test_a_long_value_of_ours_is_found_in_a_batch(tier: RedisTier) -> None:
    """A page of a directory, among chunks that are smaller."""
    frames = frames_of(63) | {bytes(range(32)): Frame(0, bytes(500 << 10))}
    tier.put_many(frames)
    assert tier.get_many(list(frames)) == frames


@pytest.mark.parametrize("make", ["lpush", "sadd", "zadd", "hset", "xadd"])
def test_keys_of_another_type_are_missed_and_replaced(redis_server: RedisServer, tier: RedisTier, make: str) -> None:
    frames = frames_of(5)
    tier.put_many(frames)
    with redis_server.client() as client:
        for chunk_id in frames:
            key = tier._key(chunk_id)
            client.delete(key)
            arguments: dict[str, tuple[Any, ...]] = {
                "lpush": ("a",),
                "sadd": ("a",),
                "zadd": ({"a": 1},),
                "hset": ("a", 1),
                "xadd": ({"a": 1},),
            }
            getattr(client, make)(key, *arguments[make])
    assert tier.get_many(list(frames)) == {}
    tier.put_many(frames)
    assert tier.get_many(list(frames)) == frames
    assert told_use(redis_server, _volume_of(tier)) == real_use(redis_server, _volume_of(tier))


def test_values_that_the_server_evicted_itself_are_not_counted_twice_when_they_come_back(
    redis_server: RedisServer, tier: RedisTier
) -> None:
    frames = frames_of(100)
    tier.put_many(frames)
    with redis_server.client() as client:
        for chunk_id in list(frames)[:50]:
            client.delete(tier._key(chunk_id))
    assert len(tier.get_many(list(frames))) == 50
    tier.put_many(frames)
    assert told_use(redis_server, _volume_of(tier)) == real_use(redis_server, _volume_of(tier))


def test_a_value_put_in_by_hand_under_another_length_survives_the_eviction_of_its_old_member(
    redis_server: RedisServer, volume_id: str
) -> None:
    with opened(redis_server.url, volume_id, capacity_bytes=16 * 10 * (4016 + ENTRY_BYTES)) as tier:
        shard = [bytes([0]) + secrets.token_bytes(31) for _ in range(30)]
        first = {shard[0]: Frame(Codec.NONE, bytes(4000))}
        tier.put_many(first)
        small = Frame(Codec.NONE, b"small")
        with redis_server.client() as client:
            client.set(tier._key(shard[0]), pack_value(shard[0], small))
        tier.put_many({chunk_id: Frame(Codec.NONE, bytes(4000)) for chunk_id in shard[1:12]})
        assert tier.get_many([shard[0]]) == {shard[0]: small}
        tier.flush()
        assert told_use(redis_server, volume_id) == real_use(redis_server, volume_id)


# --- no memory ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["noeviction", "allkeys-lru", "volatile-lru"])
def test_a_server_with_less_memory_than_our_capacity_is_used_as_far_as_it_goes(
    redis_server: RedisServer, tier: RedisTier, volume_id: str, policy: str
) -> None:
    with redis_server.client() as client:
        client.config_set("maxmemory-policy", policy)
        client.config_set("maxmemory", client.info("memory")["used_memory"] + (4 << 20))
    for _ in range(30):
        frames = frames_of(64)
        tier.put_many(frames)
        use = tier.get_many(list(frames))
        assert all(frames[chunk_id] == frame for chunk_id, frame in use.items())
    assert tier.up
    assert real_use(redis_server, volume_id)[0] > 1 << 20
    if policy != "allkeys-lru":
        assert len(use) > 0.9 * len(frames)  # what came last is there: room was made for it
        assert tier.statistics().evictions > 0
    with redis_server.client() as client:
        client.config_set("maxmemory", 0)
    tier.put_many(frames)
    assert tier.get_many(list(frames)) == frames


def test_a_server_without_any_memory_for_us_refuses_and_is_read_all_the_same(
    redis_server: RedisServer, tier: RedisTier, caplog: pytest.LogCaptureFixture
) -> None:
    frames = frames_of(20)
    tier.put_many(frames)
    with redis_server.client() as client:
        client.config_set("maxmemory-policy", "noeviction")
        client.config_set("maxmemory", 1)
    caplog.set_level(logging.INFO)
    for _ in range(10):
        tier.put_many(frames_of(20))
        tier.flush()
    assert tier.up
    assert tier.get_many(list(frames)).items() <= frames.items()
    with redis_server.client() as client:
        client.config_set("maxmemory", 0)
    tier.put_many(frames)
    assert tier.get_many(list(frames)) == frames


def test_a_replica_refuses_writes_and_is_read(redis_server: RedisServer, tier: RedisTier, caplog: pytest.LogCaptureFixture) -> None:
    frames = frames_of(20)
    tier.put_many(frames)
    with redis_server.client() as client:
        client.config_set("replica-serve-stale-data", "yes")
        client.replicaof(HOST, free_port())
        try:
            for _ in range(5):
                tier.put_many(frames_of(3))
            assert tier.get_many(list(frames)) == frames
            assert tier.up
            assert len([record for record in caplog.records if "refuses writes" in record.getMessage()]) == 1
        finally:
            client.replicaof("NO", "ONE")
    caplog.set_level(logging.INFO)
    tier.put_many(frames_of(3))
    assert "takes writes again" in caplog.text


# --- no server of ours ----------------------------------------------------------------------------------------------


@contextmanager
def answering(answer: bytes | None) -> Iterator[int]:
    """A TCP server that gives every request the same answer; None: closes at once."""
    with socket.create_server((HOST, 0)) as listener:

        def serve() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                with connection:
                    try:
                        while answer is not None and connection.recv(65536):
                            connection.sendall(answer)
                    except OSError:
                        pass

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            listener.shutdown(socket.SHUT_RDWR)
    thread.join()


@pytest.mark.parametrize(
    "answer",
    [
        None,
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
        b"+PONG\r\n",
        b"+OK\r\n" * 50,
        b"$999999999999\r\nabc",
        b"*2\r\n*-1\r\n",
        b"*-5\r\n:x\r\n",
        b":999\r\n" * 50,
        b"\0\xff\xfe\xfd\r\n" * 50,
        b"-WRONGPASS go away\r\n" * 50,
        b"-MOVED 1 127.0.0.1:1\r\n" * 50,
        b"-LOADING loading\r\n" * 50,
    ],
)
def test_what_is_no_redis_is_as_good_as_none(answer: bytes | None, volume_id: str) -> None:
    with answering(answer) as port, opened(f"redis://{HOST}:{port}", volume_id, timeout_s=0.1) as tier:
        use_every_call(tier, frames_of(20))
        assert tier.get_many([new_id()]) == {}


def test_a_wrong_password_is_as_good_as_none_and_is_not_shown(
    redis_tls: RedisServer, volume_id: str, caplog: pytest.LogCaptureFixture
) -> None:
    wrong = redis_tls.url.replace("correct", "hunter2")
    with opened(wrong, volume_id) as tier:
        assert not tier.up
        use_every_call(tier, frames_of(3))
    assert "hunter2" not in caplog.text
    assert PASSWORD not in caplog.text
    assert redis_tls.url.partition("@")[2].partition("?")[0] in caplog.text


def test_a_certificate_that_is_not_trusted_is_refused_unless_told_otherwise(redis_tls: RedisServer, volume_id: str) -> None:
    url = redis_tls.url.partition("?")[0]
    with opened(url, volume_id) as tier:
        assert not tier.up
    with opened(url + "?verify=no", volume_id) as tier:
        assert tier.up
    with opened(redis_tls.url + "&verify=authority", volume_id) as tier:
        assert tier.up


def test_the_url_of_one_server_that_is_part_of_a_cluster_says_what_to_do(
    redis_cluster: ClusterServers, volume_id: str, caplog: pytest.LogCaptureFixture
) -> None:
    with opened(redis_cluster.nodes[0].url, volume_id) as tier:
        assert not tier.up
        assert "use redis+cluster://" in caplog.text


# --- several servers ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_after_a_failover_the_new_primary_is_used(tmp_path: Path, volume_id: str) -> None:
    with SentinelServers(tmp_path) as servers, opened(servers.url, volume_id) as tier:
        assert tier.up
        frames = frames_of(20)
        tier.put_many(frames)
        with servers.primary.client() as client:
            client.wait(1, 5000)
        servers.primary.kill()
        use_every_call(tier, frames_of(3))
        assert not tier.up
        wait_until(lambda: tier.wait_up(1), "the failover")

        def writable() -> bool:
            more = frames_of(3)
            tier.put_many(more)
            return tier.get_many(list(more)) == more

        wait_until(writable, "the new primary to take writes")
        assert len(tier.get_many(list(frames))) == 20


@pytest.mark.slow
def test_a_cluster_is_followed_when_slots_move_and_when_a_node_dies(tmp_path: Path, volume_id: str) -> None:
    with ClusterServers(tmp_path) as servers, opened(servers.url, volume_id) as tier:
        frames = frames_of(100)
        tier.put_many(frames)
        assert tier.get_many(list(frames)) == frames
        _move_slots(servers, tier)
        assert tier.get_many(list(frames)) == frames
        tier.put_many(frames_of(100))
        assert tier.statistics().errors == 0

        servers.nodes[0].kill()
        use_every_call(tier, frames_of(100))
        assert not tier.up
        servers.nodes[0].start()
        wait_until(lambda: tier.wait_up(1), "the cluster to be whole again")
        more = frames_of(100)

        def works() -> bool:
            tier.put_many(more)
            return tier.get_many(list(more)) == more

        wait_until(works, "the cluster to take writes")


def test_a_map_of_slots_that_is_behind_is_set_right_by_the_answers(redis_cluster: ClusterServers, volume_id: str) -> None:
    """The node that a new map is read from may be the last one to hear of a move."""
    with opened(redis_cluster.url, volume_id) as tier:
        frames = frames_of(100)
        tier.put_many(frames)
        made = tier._link._connect

        def connect_with_an_old_map() -> Any:
            client, closers = made()
            slots = client.nodes_manager.slots_cache
            first = slots[0]
            for slot in slots:
                slots[slot] = list(first)
            return client, closers

        with patch.object(tier._link, "_connect", connect_with_an_old_map):
            tier._link.reset()
            assert tier.get_many(list(frames)) == frames
            tier.put_many(frames_of(100))
        assert tier.statistics().errors == 0


def _move_slots(servers: ClusterServers, tier: RedisTier) -> None:
    """Every slot of ours that another node holds goes to the first, keys and all."""
    cli = cli_binary()
    assert cli is not None
    with servers.nodes[0].client() as client:
        target = client.execute_command("CLUSTER MYID").decode()
    for node in servers.nodes[1:]:
        with node.client() as client:
            source = client.execute_command("CLUSTER MYID").decode()
        place = f"{HOST}:{node.port}"
        command = [
            cli,
            "--cluster",
            "reshard",
            place,
            "--cluster-from",
            source,
            "--cluster-to",
            target,
            "--cluster-slots",
            "5400",
            "--cluster-yes",
        ]
        subprocess.run(command, check=True, capture_output=True, timeout=120)


# --- the capacity -------------------------------------------------------------------------------------------------


def _write_much(url: str, volume_id: str, rounds: int, sizes: tuple[int, int]) -> int:
    """One writing process: puts, reads back some, deletes some. The errors that its tier counted."""
    with opened(url, volume_id, timeout_s=30) as tier:
        for _ in range(rounds):
            frames = {
                new_id(): Frame(Codec.NONE, secrets.token_bytes(sizes[0] + secrets.randbelow(sizes[1] - sizes[0]))) for _ in range(40)
            }
            tier.put_many(frames)
            tier.get_many(list(frames)[:10])
            tier.delete_many(list(frames)[:2])
        return tier.statistics().errors


def test_four_processes_that_write_at_once_stay_within_one_percent_of_the_capacity(redis_server: RedisServer, volume_id: str) -> None:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(4, mp_context=context) as pool:
        writers = [pool.submit(_write_much, redis_server.url, volume_id, 60, (1000, 20_000)) for _ in range(4)]
        while wait(writers, timeout=0.05).not_done:
            assert real_use(redis_server, volume_id)[0] <= 1.01 * CAPACITY_BYTES
        assert [writer.result() for writer in writers] == [0, 0, 0, 0]
    real = real_use(redis_server, volume_id)
    assert real == told_use(redis_server, volume_id)
    assert 0.97 * CAPACITY_BYTES <= real[0] <= CAPACITY_BYTES


def test_four_processes_that_write_to_a_cluster_at_once_stay_within_one_percent_of_the_capacity(
    redis_cluster: ClusterServers, volume_id: str
) -> None:
    def all_use(use: Callable[[RedisServer, str], tuple[int, int]]) -> int:
        return sum(use(node, volume_id)[0] for node in redis_cluster.nodes)

    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(4, mp_context=context) as pool:
        writers = [pool.submit(_write_much, redis_cluster.url, volume_id, 60, (1000, 20_000)) for _ in range(4)]
        while wait(writers, timeout=0.05).not_done:
            assert all_use(real_use) <= 1.01 * CAPACITY_BYTES
        assert [writer.result() for writer in writers] == [0, 0, 0, 0]
    real = all_use(real_use)
    assert real == all_use(told_use)
    assert 0.97 * CAPACITY_BYTES <= real <= CAPACITY_BYTES
    assert all(real_use(node, volume_id)[0] > 0 for node in redis_cluster.nodes)
    with opened(redis_cluster.url, volume_id) as tier:
        tier.clear()


def test_the_overhead_that_is_counted_is_what_an_entry_really_costs_the_server(redis_server: RedisServer, tier: RedisTier) -> None:
    size = 3072 - 16 - 8  # with header and the server's own bytes exactly one of its allocator's sizes
    tier.put_many(frames_of(100, size))
    with redis_server.client() as client:
        before = client.info("memory")["used_memory"]
        for _ in range(20):
            tier.put_many(frames_of(100, size))
        after = client.info("memory")["used_memory"]
    overhead = (after - before) / 2000 - (size + 16)
    assert 0.6 * ENTRY_BYTES < overhead <= 1.1 * ENTRY_BYTES


def test_a_tier_of_another_volume_on_the_same_server_is_left_alone(redis_plain: RedisServer, volume_id: str) -> None:
    with opened(redis_plain.url, volume_id) as one, opened(redis_plain.url, volume_id[::-1] + "0") as other:
        frames = frames_of(10)
        one.put_many(frames)
        other.put_many(frames)
        one.clear()
        assert one.get_many(list(frames)) == {}
        assert other.get_many(list(frames)) == frames


def test_two_hosts_see_each_others_chunks(redis_plain: RedisServer, volume_id: str) -> None:
    with opened(redis_plain.url, volume_id) as one, opened(redis_plain.url, volume_id) as other:
        frames = frames_of(10)
        one.put_many(frames)
        assert other.get_many(list(frames)) == frames
        assert parse_redis_url(redis_plain.url) == one.address
