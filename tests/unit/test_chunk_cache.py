"""The read path through the tiers: a real store in a directory, a real Redis, and faults scripted between them and the cache."""

from __future__ import annotations

import hashlib
import itertools
import logging
import random
import secrets
import threading
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from types import MappingProxyType

import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from novafs.cache.base import Frame, Tier, TierStatistics
from novafs.cache.fill import ONE_OFF, WORTH
from novafs.cache.memory import MemoryTier
from novafs.cache.packs import GAP_MAX, RUN_MAX, PackSource, plan_runs
from novafs.cache.redis import RedisTier, open_l2, pack_value
from novafs.cache.tiered import ChunkCache
from novafs.chunk import ChunkId, PackId, Reference, chunk_id
from novafs.codec import PLAIN_MAX, WHOLE, Codec, encode
from novafs.errors import BugError, FrameCorruptError, NotFoundError, ObjectNotFoundError, StoreUnavailableError
from novafs.eviction.base import EvictionPolicy
from novafs.eviction.lru import LruPolicy
from novafs.objectstore.client import StoreClient
from novafs.objectstore.url import create_root, open_store
from novafs.pack import PackBuilder, pack_name
from tests.support.fixtures import trio_test
from tests.support.redis_servers import RedisServer

CHUNK = 65536


def plain_of(number: int, size: int = CHUNK) -> bytes:
    """Content that compresses to about half, different for each number."""
    return random.Random(number).randbytes(size // 2) + bytes(size - size // 2 - 8) + number.to_bytes(8, "big")


def noise(size: int = CHUNK) -> bytes:
    return secrets.token_bytes(size)


def id_of(plain: bytes) -> bytes:
    return hashlib.sha256(plain).digest()


class ScriptedReader:
    """Stands between PackSource and the real client: counts, holds requests back, damages or loses what comes."""

    def __init__(self, client: StoreClient) -> None:
        self.client = client
        self.requests: list[tuple[str, int, int | None]] = []
        self.gate: trio.Event | None = None
        self.arrived = trio.Event()
        self.damage: Callable[[bytes], bytes] | None = None
        self.errors: list[Exception] = []
        self.times = 1 << 30

    async def get(self, name: str, start: int = 0, length: int | None = None) -> bytes:
        self.requests.append((name, start, length))
        self.arrived.set()
        if self.gate is not None:
            await self.gate.wait()
        if self.errors:
            raise self.errors.pop()
        data = await self.client.get(name, start, length)
        if self.damage is not None and self.times > 0:
            self.times -= 1
            return self.damage(data)
        return data


class World:
    """A store in a directory with packs in it."""

    def __init__(self, directory: Path) -> None:
        url = f"file://{directory}/store"
        create_root(url)
        self.client = StoreClient(open_store(url))
        self.reader = ScriptedReader(self.client)
        self.source = PackSource(self.reader)

    async def pack(self, plains: Iterable[bytes], codec: Codec = Codec.ZSTD) -> list[Reference]:
        builder = PackBuilder()
        references = [builder.add(chunk_id(plain), encode(plain, codec), len(plain)) for plain in plains]
        await self.client.create(pack_name(builder.pack_id), builder.finish())
        return references

    @asynccontextmanager
    async def cache(
        self,
        l2: Tier | None = None,
        *,
        capacity_bytes: int = 64 << 20,
        l2_codec: Codec = Codec.SNAPPY,
        l2_timeout_s: float = 10,
        policy: EvictionPolicy | None = None,
    ) -> AsyncIterator[ChunkCache]:
        l1 = MemoryTier(capacity_bytes=capacity_bytes, policy=policy)
        cache = ChunkCache(l1=l1, l2=l2, l3=self.source, chunk_size=CHUNK, l2_codec=l2_codec, l2_timeout_s=l2_timeout_s, threads=2)
        async with cache.running():
            yield cache


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    world = World(tmp_path)
    yield world
    world.client.store.close()


@pytest.fixture
def l2(redis_unix: RedisServer, volume_id: str, tmp_path: Path) -> Iterator[RedisTier]:
    tier = open_l2(redis_unix.url, capacity_bytes=64 << 20, volume_id=volume_id, state_dir=tmp_path, timeout_s=10)
    assert isinstance(tier, RedisTier)
    yield tier
    tier.close()


# --- L1 and L3 ----------------------------------------------------------------------------------------------------


@trio_test
async def test_chunks_come_in_the_order_asked_and_are_peeked_after(world: World) -> None:
    plains = [plain_of(number) for number in range(20)]
    references = await world.pack(plains)
    async with world.cache() as cache:
        assert cache.peek(references[0].chunk_id) is None
        order = [3, 19, 0, 3, 7]
        assert await cache.fetch([references[number] for number in order]) == [plains[number] for number in order]
        assert cache.peek(references[19].chunk_id) == plains[19]
        assert cache.present(references[0].chunk_id)
        assert not cache.present(references[1].chunk_id)
        assert await cache.fetch([]) == []


@pytest.mark.parametrize("codec", WHOLE)
@trio_test
async def test_frames_of_every_codec_and_size_are_fetched(world: World, codec: Codec) -> None:
    plains = [b"", b"x", plain_of(1, 100), plain_of(2, 16 << 10), plain_of(3), noise(), plain_of(4, 1 << 20), plain_of(5, PLAIN_MAX)]
    references = await world.pack(plains, codec)
    async with world.cache() as cache:
        assert await cache.fetch(references) == plains


@trio_test
async def test_a_fetch_of_what_is_in_l1_takes_no_checkpoint(world: World) -> None:
    references = await world.pack([plain_of(1), plain_of(2)])
    async with world.cache() as cache:
        await cache.fetch(references)
        with trio.CancelScope() as scope:
            scope.cancel()
            await cache.fetch(references)
            reached = True
        assert reached


@trio_test
async def test_a_hundred_waiters_share_one_range_request(world: World) -> None:
    (reference,) = await world.pack([plain_of(1)])
    world.reader.gate = trio.Event()
    results: list[bytes] = []
    async with world.cache() as cache:

        async def ask() -> None:
            results.extend(await cache.fetch([reference]))

        async with trio.open_nursery() as nursery:
            for _ in range(100):
                nursery.start_soon(ask)
            await world.reader.arrived.wait()
            await trio.testing.wait_all_tasks_blocked()
            world.reader.gate.set()
        assert results == [plain_of(1)] * 100
        statistics = cache.statistics()
    assert len(world.reader.requests) == 1
    assert (statistics.fetches, statistics.shared_fetches, statistics.l1.misses) == (1, 99, 100)
    assert (statistics.l3_traffic.requests, statistics.l3_traffic.hits) == (1, 1)


@trio_test
async def test_neighbours_in_a_pack_are_joined_into_one_request(world: World) -> None:
    plains = [plain_of(number) for number in range(16)]
    references = await world.pack(plains)
    others = await world.pack([plain_of(100), noise(3 * GAP_MAX), plain_of(101)])
    async with world.cache() as cache:
        shuffled = random.Random(1).sample(references, 16)
        await cache.fetch(shuffled)
        assert len(world.reader.requests) == 1
        await cache.fetch([others[0], others[2]])
        assert len(world.reader.requests) == 3  # the gap between them is too wide
    counted = world.source.statistics()
    assert (counted.requests, counted.frames) == (3, 18)
    assert counted.payload_bytes <= counted.read_bytes < counted.payload_bytes + 20 * 100


@trio_test
async def test_a_long_read_goes_out_in_several_requests_at_once(world: World) -> None:
    plains = [noise() for _ in range(160)]
    references = await world.pack(plains)
    world.reader.gate = trio.Event()
    async with world.cache() as cache, trio.open_nursery() as nursery:

        async def ask() -> None:
            assert await cache.fetch(references) == plains

        nursery.start_soon(ask)
        await trio.testing.wait_all_tasks_blocked()
        assert len(world.reader.requests) == 3
        world.reader.gate.set()


@trio_test
async def test_a_pack_source_reads_several_packs_in_one_call_and_raises_a_plain_error(world: World) -> None:
    first, second = await world.pack([plain_of(1)]), await world.pack([plain_of(2)])
    payloads = await world.source.read_frames([*second, *first])
    assert payloads == [encode(plain_of(2), Codec.ZSTD).payload, encode(plain_of(1), Codec.ZSTD).payload]
    gone = second[0]._replace(pack_id=PackId(bytes(16)))
    with pytest.raises(ObjectNotFoundError):
        await world.source.read_frames([*first, gone])
    assert await world.source.read_frames([]) == []


references_strategy = st.lists(
    st.builds(
        lambda pack, offset, length: Reference(ChunkId(bytes(32)), PackId(bytes([pack]) * 16), offset, length, 0),
        st.integers(0, 2),
        st.integers(0, 5000),
        st.integers(0, 600),
    ),
    max_size=30,
)


@given(references=references_strategy, gap_max=st.integers(0, 300), run_max=st.integers(100, 2000))
def test_every_frame_lies_in_exactly_one_run(references: list[Reference], gap_max: int, run_max: int) -> None:
    runs = plan_runs(references, gap_max=gap_max, run_max=run_max)
    assert sorted(at for run_ in runs for at in run_.members) == list(range(len(references)))
    for one in runs:
        inside = [references[at] for at in one.members]
        assert all(r.pack_id == one.pack_id and one.start <= r.offset and r.offset + r.length <= one.start + one.length for r in inside)
        assert one.start == min(r.offset for r in inside)
        assert one.start + one.length == max(r.offset + r.length for r in inside)
        assert one.length <= run_max or one.length == max(r.length for r in inside)
    for before, after in itertools.pairwise(runs):
        if before.pack_id == after.pack_id:
            gap = after.start - (before.start + before.length)
            assert gap > gap_max or after.start + after.length - before.start > run_max
    assert RUN_MAX >= PLAIN_MAX


# --- damage in L3 -------------------------------------------------------------------------------------------------


async def _damage_pack(world: World, reference: Reference, change: Callable[[bytearray], object]) -> None:
    """Replace the pack's bytes in the store, as a failing disk would."""
    name = pack_name(reference.pack_id)
    data = bytearray(await world.client.get(name))
    change(data)
    await world.client.delete(name)
    await world.client.create(name, bytes(data))


@pytest.mark.parametrize("how", ["payload", "another chunk", "truncated"])
@trio_test
async def test_a_bad_copy_in_l3_is_read_twice_and_then_an_error_for_that_chunk_alone(world: World, how: str) -> None:
    """semantics: S1."""
    plains = [plain_of(number) for number in range(6)]
    references = await world.pack(plains)
    bad = references[-1]

    def change(data: bytearray) -> None:
        if how == "payload":
            data[bad.offset + 100] ^= 1
        elif how == "truncated":
            del data[bad.offset + 100 :]
        else:
            data[bad.offset : bad.offset + bad.length] = encode(plain_of(99), Codec.ZSTD).payload[: bad.length].ljust(bad.length, b"\0")

    await _damage_pack(world, bad, change)
    async with world.cache() as cache:
        with pytest.raises(FrameCorruptError) as caught:
            await cache.fetch(references)
        assert caught.value.chunk_id == bad.chunk_id
        assert (caught.value.where, caught.value.offset) == (f"pack {bad.pack_id.hex()}", bad.offset)
        assert await cache.fetch(references[:-1]) == plains[:-1]
        assert cache.statistics().l3_traffic.corruptions == 2
        assert not cache.present(bad.chunk_id)
        # It is tried anew each time: somebody may have repaired the pack.
        with pytest.raises(FrameCorruptError):
            await cache.fetch([bad])


@trio_test
async def test_a_transfer_that_went_wrong_once_is_no_error(world: World) -> None:
    references = await world.pack([plain_of(1), plain_of(2)])
    world.reader.damage = lambda data: bytes(len(data))
    world.reader.times = 1
    async with world.cache() as cache:
        assert await cache.fetch(references) == [plain_of(1), plain_of(2)]
        assert cache.statistics().l3_traffic.corruptions == 2
    assert len(world.reader.requests) == 2


@trio_test
async def test_a_pack_that_is_gone_is_named_with_the_chunk_and_others_are_read(world: World) -> None:
    lost, kept = await world.pack([plain_of(1)]), await world.pack([plain_of(2)])
    await world.client.delete(pack_name(lost[0].pack_id))
    async with world.cache() as cache:
        with pytest.raises(ObjectNotFoundError) as caught:
            await cache.fetch([*lost, *kept])
        assert lost[0].chunk_id.hex() in str(caught.value)
        assert lost[0].pack_id.hex() in str(caught.value)
        await cache.wait_idle()
        assert cache.peek(kept[0].chunk_id) == plain_of(2)


@trio_test
async def test_a_reference_to_gigabytes_is_refused_unread(world: World) -> None:
    (reference,) = await world.pack([plain_of(1)])
    async with world.cache() as cache:
        with pytest.raises(FrameCorruptError, match="at most"):
            await cache.fetch([reference._replace(length=0xFFFFFFFF)])
    assert world.reader.requests == []


@trio_test
async def test_a_frame_of_more_content_than_any_chunk_has_is_refused(world: World) -> None:
    references = await world.pack([bytes(PLAIN_MAX + 1)])
    async with world.cache() as cache:
        with pytest.raises(FrameCorruptError, match="at most"):
            await cache.fetch(references)


@trio_test
async def test_a_store_error_reaches_every_waiter_as_its_own_exception(world: World) -> None:
    (reference,) = await world.pack([plain_of(1)])
    world.reader.gate = trio.Event()
    world.reader.errors = [StoreUnavailableError("the store is away")]
    caught: list[Exception] = []
    async with world.cache() as cache:

        async def ask() -> None:
            with pytest.raises(StoreUnavailableError, match="the store is away") as one:
                await cache.fetch([reference])
            caught.append(one.value)

        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(ask)
            await world.reader.arrived.wait()
            world.reader.gate.set()
        assert len({id(error) for error in caught}) == 5
        assert cache.statistics().l3_traffic.errors == 1
        assert await cache.fetch([reference]) == [plain_of(1)]


@trio_test
async def test_who_knows_a_better_place_is_not_hurt_by_somebody_elses(world: World) -> None:
    (old,), (new,) = await world.pack([plain_of(1)]), await world.pack([plain_of(1)])
    await world.client.delete(pack_name(old.pack_id))
    world.reader.gate = trio.Event()
    async with world.cache() as cache, trio.open_nursery() as nursery:

        async def stale() -> None:
            with pytest.raises(ObjectNotFoundError):
                await cache.fetch([old])

        async def fresh() -> None:
            assert await cache.fetch([new]) == [plain_of(1)]

        nursery.start_soon(stale)
        await world.reader.arrived.wait()
        for _ in range(3):
            nursery.start_soon(fresh)
        await trio.testing.wait_all_tasks_blocked()
        world.reader.gate.set()
    assert len(world.reader.requests) == 2


# --- cancellation and the end ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("who", ["the first", "another", "all"])
@trio_test
async def test_a_cancelled_waiter_leaves_the_fetch_to_the_others(world: World, who: str) -> None:
    references = await world.pack([plain_of(1), plain_of(2)])
    world.reader.gate = trio.Event()
    results: dict[int, list[bytes]] = {}
    async with world.cache() as cache:
        scopes = [trio.CancelScope() for _ in range(3)]

        async def ask(number: int) -> None:
            with scopes[number]:
                results[number] = await cache.fetch(references)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask, 0)
            await world.reader.arrived.wait()
            nursery.start_soon(ask, 1)
            nursery.start_soon(ask, 2)
            await trio.testing.wait_all_tasks_blocked()
            cancelled = {"the first": [0], "another": [1], "all": [0, 1, 2]}[who]
            for number in cancelled:
                scopes[number].cancel()
            await trio.testing.wait_all_tasks_blocked()
            world.reader.gate.set()
        assert set(results) == {0, 1, 2} - set(cancelled)
        assert all(result == [plain_of(1), plain_of(2)] for result in results.values())
        await cache.wait_idle()
        assert cache.peek(references[0].chunk_id) == plain_of(1)
    assert len(world.reader.requests) == 1


@trio_test
async def test_who_waits_when_the_cache_ends_gets_an_error_and_does_not_hang(world: World) -> None:
    (reference,) = await world.pack([plain_of(1)])
    world.reader.gate = trio.Event()
    async with trio.open_nursery() as nursery, world.cache() as cache:

        async def ask() -> None:
            with pytest.raises(StoreUnavailableError, match="being closed"):
                await cache.fetch([reference])

        nursery.start_soon(ask)
        await world.reader.arrived.wait()
    with pytest.raises(BugError):
        await cache.fetch([reference])


@trio_test
async def test_an_error_inside_running_leaves_it_as_itself(world: World) -> None:
    with pytest.raises(NotFoundError):
        async with world.cache():
            raise NotFoundError("x")
    with pytest.raises(ZeroDivisionError):
        async with world.cache():
            _ = 1 // 0


@trio_test
async def test_misuse_is_a_bug(world: World) -> None:
    (reference,) = await world.pack([plain_of(1)])
    async with world.cache() as cache:
        with pytest.raises(BugError, match="hole"):
            await cache.fetch([reference._replace(chunk_id=ChunkId(bytes(32)))])
        with pytest.raises(BugError, match="twice"):
            async with cache.running():
                pass


# --- L2 -----------------------------------------------------------------------------------------------------------

redis = pytest.mark.redis


@redis
@trio_test
async def test_what_comes_from_l3_is_in_l2_for_the_next_host(world: World, l2: RedisTier) -> None:
    plains = [*(plain_of(number) for number in range(9)), noise()]
    references = await world.pack(plains)
    async with world.cache(l2) as cache:
        assert await cache.fetch(references) == plains
        await cache.wait_idle()
        held = l2.get_many([reference.chunk_id for reference in references])
        assert [held[id_of(plain)].codec for plain in plains] == [Codec.SNAPPY] * 9 + [Codec.NONE]
        assert cache.statistics().fill.fills == 10
        # L1 has it as it came: to compress it anew would cost more than to verify it.
        assert [frame.codec for frame in cache.l1.get_many([id_of(plain) for plain in plains]).values()] == [Codec.ZSTD] * 9 + [Codec.NONE]
    world.reader.requests.clear()
    async with world.cache(l2) as cache:
        assert await cache.fetch(references) == plains
        assert cache.statistics().l2_traffic.hits == 10
        await cache.wait_idle()
        # L1 has it as it came: to compress it anew would cost more than to verify it.
        assert [frame.codec for frame in cache.l1.get_many([id_of(plain) for plain in plains]).values()] == [Codec.SNAPPY] * 9 + [
            Codec.NONE
        ]
        assert cache.statistics().fill.fills == 0
    assert world.reader.requests == []


@redis
@trio_test
async def test_l2_and_l3_serve_one_fetch_together(world: World, l2: RedisTier) -> None:
    plains = [plain_of(number) for number in range(10)]
    references = await world.pack(plains)
    l2.put_many({id_of(plain): encode(plain, Codec.ZSTD) for plain in plains[::2]})
    async with world.cache(l2) as cache:
        assert await cache.fetch(references) == plains
        traffic = cache.statistics()
    assert (traffic.l2_traffic.hits, traffic.l2_traffic.misses, traffic.l3_traffic.hits) == (5, 5, 5)


@redis
@pytest.mark.parametrize("how", ["another chunk", "not decodable", "unknown codec", "no value"])
@trio_test
async def test_a_bad_copy_in_l2_is_deleted_and_read_from_l3(
    world: World, l2: RedisTier, caplog: pytest.LogCaptureFixture, how: str
) -> None:
    """semantics: S1."""
    plains = [plain_of(1), plain_of(2)]
    references = await world.pack(plains)
    bad = references[0].chunk_id
    wrong = {
        "another chunk": encode(plain_of(7), Codec.SNAPPY),
        "not decodable": Frame(Codec.LZ4, b"\xff" * 100),
        "unknown codec": Frame(77, b"abc"),
        "no value": None,
    }[how]
    l2.put_many({id_of(plain): encode(plain, Codec.SNAPPY) for plain in plains})
    with _client(l2) as client:
        client.set(l2._key(bad), b"garbage" if wrong is None else pack_value(bad, wrong))
    caplog.set_level(logging.WARNING)
    async with world.cache(l2) as cache:
        assert await cache.fetch(references) == plains
        await cache.wait_idle()
        assert l2.get_many([bad]) == {bad: encode(plains[0], Codec.SNAPPY)}
        traffic = cache.statistics()
    assert (traffic.l2_traffic.hits, traffic.l3_traffic.hits) == (1, 1)
    assert traffic.l2_traffic.corruptions == (0 if wrong is None else 1)
    assert bad.hex() in caplog.text


def _client(l2: RedisTier) -> object:
    import redis

    return redis.Redis(unix_socket_path=l2.address.path)


@redis
@trio_test
async def test_a_paused_redis_costs_time_and_no_error(world: World, redis_server: RedisServer, volume_id: str, tmp_path: Path) -> None:
    plains = [plain_of(number) for number in range(4)]
    references = await world.pack(plains)
    tier = open_l2(redis_server.url, capacity_bytes=64 << 20, volume_id=volume_id, state_dir=tmp_path, timeout_s=0.1)
    assert tier is not None
    async with world.cache(tier) as cache:
        redis_server.pause()
        assert await cache.fetch(references[:2]) == plains[:2]
        cache.add(id_of(plains[3]), plains[3])
        assert await cache.fetch(references) == plains
        await cache.wait_idle()
        redis_server.resume()
    await trio.to_thread.run_sync(tier.close)


class ScriptedTier:
    """Stands before a real tier: hangs, or fails in ways that no tier should."""

    name = "scripted"

    def __init__(self, inner: Tier) -> None:
        self.inner = inner
        self.up = True
        self.hold = threading.Event()
        self.hold.set()
        self.error: Exception | None = None
        self.calls: list[str] = []

    def _pass(self, name: str) -> None:
        self.calls.append(name)
        self.hold.wait(30)
        if self.error is not None:
            raise self.error

    def get_many(self, chunk_ids: Sequence[bytes]) -> dict[bytes, Frame]:
        self._pass("get_many")
        return self.inner.get_many(chunk_ids)

    def put_many(self, frames: Mapping[bytes, Frame], chances: Mapping[bytes, float | None] = MappingProxyType({})) -> None:
        self._pass("put_many")
        self.inner.put_many(frames, chances)

    def rate_many(self, chances: Mapping[bytes, float | None]) -> None:
        self._pass("rate_many")
        self.inner.rate_many(chances)

    def contains_many(self, chunk_ids: Sequence[bytes]) -> set[bytes]:
        self._pass("contains_many")
        return self.inner.contains_many(chunk_ids)

    def delete_many(self, chunk_ids: Iterable[bytes]) -> None:
        self._pass("delete_many")
        self.inner.delete_many(chunk_ids)

    def clear(self) -> None:
        self.inner.clear()

    def statistics(self) -> TierStatistics:
        return self.inner.statistics()

    def close(self) -> None:
        self.inner.close()


@trio_test
async def test_an_l2_that_does_not_answer_in_time_is_not_waited_for(world: World) -> None:
    references = await world.pack([plain_of(1)])
    tier = ScriptedTier(MemoryTier(capacity_bytes=64 << 20))
    tier.put_many({references[0].chunk_id: encode(plain_of(1), Codec.SNAPPY)})
    tier.hold.clear()
    async with world.cache(tier, l2_timeout_s=0.01) as cache:
        assert await cache.fetch(references) == [plain_of(1)]
        assert cache.statistics().l2_traffic.timeouts == 1
        assert cache.statistics().l3_traffic.hits == 1
        tier.hold.set()


@trio_test
async def test_an_l2_that_was_too_slow_is_left_alone_for_a_while_and_then_asked_again(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    references = await world.pack([plain_of(number) for number in range(5)])
    tier = ScriptedTier(MemoryTier(capacity_bytes=64 << 20))
    tier.put_many({reference.chunk_id: encode(plain_of(number), Codec.SNAPPY) for number, reference in enumerate(references)})
    tier.hold.clear()
    async with world.cache(tier, l2_timeout_s=0.01) as cache:
        for reference in references[:3]:
            await cache.fetch([reference])
        assert cache.statistics().l2_traffic.requests == 1
        tier.hold.set()
        monkeypatch.setattr("novafs.cache.tiered.trio.current_time", lambda: cache._l2_ask_from_s + 1)
        cache._l2_timeout_s = 60
        await cache.fetch(references[3:4])
        await cache.fetch(references[4:])
        assert cache.statistics().l2_traffic.hits == 2
    assert caplog.text.count("L2 did not answer within") == 1


@trio_test
async def test_an_l2_that_breaks_its_contract_is_no_readers_error(world: World, caplog: pytest.LogCaptureFixture) -> None:
    references = await world.pack([plain_of(1)])
    tier = ScriptedTier(MemoryTier(capacity_bytes=64 << 20))
    tier.error = RuntimeError("a mistake")
    async with world.cache(tier) as cache:
        assert await cache.fetch(references) == [plain_of(1)]
        await cache.wait_idle()
        assert cache.statistics().l2_traffic.errors == 1
        assert "L2 failed to answer" in caplog.text
        assert "L2 failed to take" in caplog.text


@trio_test
async def test_an_l2_that_is_down_is_not_asked_and_not_written_to(world: World) -> None:
    references = await world.pack([plain_of(1)])
    tier = ScriptedTier(MemoryTier(capacity_bytes=64 << 20))
    tier.up = False
    tier.error = RuntimeError("must not be asked")
    async with world.cache(tier) as cache:
        assert await cache.fetch(references) == [plain_of(1)]
        await cache.wait_idle()
        assert cache.statistics().l2_traffic.requests == 0
        assert cache.statistics().fill.fills == 0


# --- own writes, victims, queues ------------------------------------------------------------------------------------


@redis
@trio_test
async def test_an_own_write_is_in_l1_at_once_and_in_l2_soon(world: World, l2: RedisTier) -> None:
    compressible, random_bytes = plain_of(1), noise()
    async with world.cache(l2) as cache:
        cache.add(id_of(compressible), compressible, encode(compressible, Codec.ZSTD))
        cache.add(id_of(random_bytes), random_bytes, encode(random_bytes, Codec.ZSTD))
        assert cache.peek(id_of(compressible)) == compressible
        assert cache.peek(id_of(random_bytes)) == random_bytes
        await cache.wait_idle()
        assert l2.get_many([id_of(compressible), id_of(random_bytes)]) == {
            id_of(compressible): encode(compressible, Codec.SNAPPY),
            id_of(random_bytes): Frame(Codec.NONE, random_bytes),
        }
        assert cache.l1.get_many([id_of(compressible)])[id_of(compressible)] == encode(compressible, Codec.ZSTD)
        cache.add(id_of(compressible), compressible, None)
        await cache.wait_idle()
        assert cache.statistics().fill.fills == 2
        assert cache.statistics().added == 3


@redis
@trio_test
async def test_a_frame_in_the_tiers_codec_is_not_compressed_again(world: World, l2: RedisTier) -> None:
    plain = plain_of(1)
    own = Frame(Codec.ZSTD, encode(plain, Codec.ZSTD, 19).payload)
    async with world.cache(l2, l2_codec=Codec.ZSTD) as cache:
        cache.add(id_of(plain), plain, own)
        await cache.wait_idle()
        assert l2.get_many([id_of(plain)]) == {id_of(plain): own}


@redis
@trio_test
async def test_victims_of_l1_go_to_l2_where_it_lacks_them(world: World, l2: RedisTier) -> None:
    plains = [noise() for _ in range(90)]
    async with world.cache(l2, capacity_bytes=64 * CHUNK) as cache:
        for plain in plains[:10]:
            cache.add(id_of(plain), plain, Frame(Codec.NONE, plain))
            await cache.wait_idle()
        l2.clear()
        for plain in plains[10:]:
            cache.add(id_of(plain), plain, Frame(Codec.NONE, plain))
            await cache.wait_idle()
        assert not cache.l1.contains(id_of(plains[0]))
        assert l2.contains_many([id_of(plain) for plain in plains[:10]]) == {id_of(plain) for plain in plains[:10]}
        fill = cache.statistics().fill
        assert fill.demotions == 10
        assert (fill.fills, fill.dropped) == (100, 0)


@trio_test
async def test_what_finds_a_queue_full_is_counted_and_never_waited_for(world: World) -> None:
    tier = ScriptedTier(MemoryTier(capacity_bytes=64 << 20))
    tier.hold.clear()
    async with world.cache(tier, capacity_bytes=80 * CHUNK) as cache:
        plains = [plain_of(number) for number in range(30)]
        for plain in plains:
            cache.add(id_of(plain), plain)
        fill = cache.statistics().fill
        assert fill.queued_bytes <= 80 * CHUNK // 16
        assert fill.uncompressed == fill.dropped == 25
        assert cache.l1.used_bytes <= 80 * CHUNK
        assert all(cache.peek(id_of(plain)) == plain for plain in plains)
        tier.hold.set()
        await cache.wait_idle()
        assert cache.statistics().fill.queued_bytes == 0
        assert len(tier.contains_many([id_of(plain) for plain in plains])) == 5


@trio_test
async def test_what_is_decoded_from_a_slow_codec_is_in_a_quick_one_the_next_time(world: World) -> None:
    plains = [plain_of(number) for number in range(40)]
    references = await world.pack(plains)
    async with world.cache(capacity_bytes=16 * CHUNK) as cache:
        assert await cache.fetch(references) == plains

        def codec_of(number: int) -> Codec:
            return cache.l1.get_many([references[number].chunk_id])[references[number].chunk_id].codec

        old = next(number for number in range(40) if references[number].chunk_id in cache.l1._frames.keys() - cache.l1._plain.keys())
        assert codec_of(old) == Codec.ZSTD
        assert cache.peek(references[old].chunk_id) == plains[old]
        await cache.wait_idle()
        assert codec_of(old) == Codec.LZ4
        assert cache.peek(references[old].chunk_id) == plains[old]
        assert cache.statistics().fill.queued_bytes == 0


@trio_test
async def test_what_the_quick_codec_does_not_compress_is_tried_once(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    # Letters in no order: zstd makes three quarters of them, lz4 nothing.
    plain = bytes(random.Random(1).choices(range(64), k=CHUNK))
    references, tried = await world.pack([plain]), []
    assert references[0].codec == Codec.ZSTD
    assert encode(plain, Codec.LZ4).codec == Codec.NONE
    monkeypatch.setattr("novafs.cache.fill.encode", lambda plain, codec: tried.append(codec) or encode(plain, codec))
    async with world.cache() as cache:
        cache.l1._decoded_max = 0
        await cache.fetch(references)
        for _ in range(5):
            assert cache.peek(references[0].chunk_id) == plain
            await cache.wait_idle()
        assert tried == [Codec.LZ4]
        for _ in range(100):
            assert cache.peek(references[0].chunk_id) == plain
        assert cache.statistics().fill.queued_bytes == 0


@redis
@trio_test
async def test_dropped_chunks_are_in_neither_cache(world: World, l2: RedisTier) -> None:
    references = await world.pack([plain_of(1), plain_of(2)])
    ids = [reference.chunk_id for reference in references]
    async with world.cache(l2) as cache:
        await cache.fetch(references)
        await cache.wait_idle()
        cache.drop([ids[0], bytes(32)])
        assert cache.peek(ids[0]) is None
        await cache.wait_idle()
        assert l2.contains_many(ids) == {ids[1]}


@trio_test
async def test_bytes_in_flight_and_in_queues_are_accounted_under_l1s_cap_and_given_back(world: World) -> None:
    references = await world.pack([plain_of(number) for number in range(4)])
    world.reader.gate = trio.Event()
    async with world.cache() as cache:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(cache.fetch, references)
            await world.reader.arrived.wait()
            reserved = cache.statistics().l1.reserved_bytes
            assert reserved["fetch"] == 4 * CHUNK + sum(reference.length for reference in references)
            assert reserved["queues"] == 8 << 20
            world.reader.gate.set()
        await cache.wait_idle()
        assert "fetch" not in cache.statistics().l1.reserved_bytes
    assert cache.l1.statistics().reserved_bytes == {}


@redis
@trio_test
async def test_many_readers_of_a_small_cache_always_get_the_right_bytes(world: World, l2: RedisTier) -> None:
    plains = [plain_of(number) if number % 4 else noise() for number in range(60)]
    references = [*await world.pack(plains[:20]), *await world.pack(plains[20:40], Codec.GZIP), *await world.pack(plains[40:], Codec.NONE)]
    async with world.cache(l2, capacity_bytes=16 * CHUNK) as cache:

        async def read(seed: int) -> None:
            random_ = random.Random(seed)
            for _ in range(15):
                numbers = random_.choices(range(60), k=random_.randint(1, 8))
                if random_.random() < 0.3:
                    with trio.move_on_after(0.001):
                        await cache.fetch([references[number] for number in numbers])
                    continue
                found = await cache.fetch([references[number] for number in numbers])
                assert found == [plains[number] for number in numbers]
                assert cache.l1.used_bytes <= cache.l1.capacity_bytes

        async with trio.open_nursery() as nursery:
            for seed in range(12):
                nursery.start_soon(read, seed)
        await cache.wait_idle()
        statistics = cache.statistics()
        assert statistics.l2_traffic.hits > 0
        assert statistics.l2_traffic.corruptions == statistics.l3_traffic.corruptions == 0


# --- between the tiers --------------------------------------------------------------------------------------------


class SayingPolicy(LruPolicy):
    """An LRU that says what a test has it say of chunks."""

    rates = True

    def __init__(self) -> None:
        super().__init__()
        self.said: dict[bytes, float] = {}
        self.batches: list[int] = []

    def chances(self, keys: Sequence[bytes]) -> list[float | None]:
        self.batches.append(len(keys))
        return [self.said.get(key) for key in keys]


def scores_of(server: RedisServer, l2: RedisTier, ids: Iterable[bytes]) -> dict[bytes, float]:
    """What the indexes on the server have for chunks."""
    found: dict[bytes, float] = {}
    with server.client() as client:
        for shard in l2._shards:
            found |= {member[:32]: score for member, score in client.zrange(shard.index, 0, -1, withscores=True)}
    return {chunk_id: found[chunk_id] for chunk_id in ids}


@redis
@trio_test
async def test_a_read_from_l3_that_is_called_one_off_does_not_enter_l2(world: World, l2: RedisTier) -> None:
    policy = SayingPolicy()
    plains = [noise() for _ in range(12)]
    references = await world.pack(plains)
    ids = [id_of(plain) for plain in plains]
    policy.said = {**dict.fromkeys(ids[:4], ONE_OFF - 0.01), **dict.fromkeys(ids[4:8], ONE_OFF + 0.01)}
    async with world.cache(l2, policy=policy) as cache:
        assert await cache.fetch(references) == plains
        await cache.wait_idle()
        assert l2.contains_many(ids) == set(ids[4:])
        assert all(cache.l1.contains(chunk_id) for chunk_id in ids)
        fill = cache.statistics().fill
        assert (fill.one_offs, fill.admissions, fill.l3_promotions, fill.l2_promotions, fill.fills) == (4, 8, 12, 0, 8)
        assert max(policy.batches) == 12, "asked for all of them at once"


@redis
@trio_test
async def test_an_own_write_enters_l2_whatever_is_said_of_it(world: World, l2: RedisTier) -> None:
    policy = SayingPolicy()
    plain = noise()
    policy.said = {id_of(plain): 0.0}
    async with world.cache(l2, policy=policy) as cache:
        cache.add(id_of(plain), plain)
        await cache.wait_idle()
        assert l2.contains_many([id_of(plain)])
        fill = cache.statistics().fill
        assert (fill.one_offs, fill.admissions, fill.fills) == (0, 0, 1)


@redis
@trio_test
async def test_a_victim_of_l1_enters_l2_where_it_is_worth_a_place(world: World, l2: RedisTier) -> None:
    policy = SayingPolicy()
    plains = [noise() for _ in range(90)]
    ids = [id_of(plain) for plain in plains]
    policy.said = {**dict.fromkeys(ids[:5], WORTH - 0.01), **dict.fromkeys(ids[5:10], WORTH + 0.01)}
    async with world.cache(l2, capacity_bytes=64 * CHUNK, policy=policy) as cache:
        for number, plain in enumerate(plains):
            cache.add(ids[number], plain, Frame(Codec.NONE, plain))
            await cache.wait_idle()
            if number == 14:
                l2.clear()
        assert not any(cache.l1.contains(chunk_id) for chunk_id in ids[:15])
        assert l2.contains_many(ids[:15]) == set(ids[5:15]), "high ones, and those of which nothing is known"
        fill = cache.statistics().fill
        assert (fill.demotions, fill.demotions_refused) == (10, 5)


@redis
@trio_test
async def test_reads_and_evictions_refresh_the_scores_of_l2(
    world: World, redis_unix: RedisServer, volume_id: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("novafs.cache.redis.FLUSH_S", 1000)
    # One shard: each has a clock of its own.
    l2 = open_l2(redis_unix.url + "?shards=1", capacity_bytes=64 << 20, volume_id=volume_id, state_dir=tmp_path, timeout_s=10)
    assert isinstance(l2, RedisTier)
    policy = SayingPolicy()
    plains = [noise() for _ in range(3)]
    ids = [id_of(plain) for plain in plains]
    others = [noise() for _ in range(40)]
    references = await world.pack(plains)
    l2.put_many({secrets.token_bytes(32): Frame(Codec.NONE, b"") for _ in range(60)})
    l2.put_many({chunk_id: Frame(Codec.NONE, plain) for chunk_id, plain in zip(ids, plains, strict=True)})
    before = scores_of(redis_unix, l2, ids)
    policy.said = {ids[0]: 0.9, ids[1]: 0.0}
    async with world.cache(l2, capacity_bytes=32 * CHUNK, policy=policy) as cache:
        assert await cache.fetch(references) == plains
        await cache.wait_idle()
        l2.flush()
        after = scores_of(redis_unix, l2, ids)
        assert after[ids[0]] > after[ids[2]] > after[ids[1]], "likely, unknown, unlikely"
        assert after[ids[2]] > before[ids[2]], "read, of which nothing is known"
        assert cache.statistics().fill.l2_promotions == 3
        policy.said = {ids[1]: 1.0}
        for plain in others:
            cache.add(id_of(plain), plain, Frame(Codec.NONE, plain))
            await cache.wait_idle()
        assert not any(cache.l1.contains(chunk_id) for chunk_id in ids)
        l2.flush()
        last = scores_of(redis_unix, l2, ids)
        assert last[ids[1]] > after[ids[1]]
        assert last[ids[2]] == after[ids[2]], "L1's giving it up says nothing of its own"
        assert cache.statistics().fill.demotions == 0
    l2.close()


@trio_test
async def test_a_policy_that_rates_nothing_is_not_asked_by_reads_from_l2(world: World) -> None:
    tier = ScriptedTier(MemoryTier(capacity_bytes=64 << 20))
    plain = noise()
    tier.put_many({id_of(plain): Frame(Codec.NONE, plain)})
    (reference,) = await world.pack([plain])
    async with world.cache(tier) as cache:
        assert await cache.fetch([reference]) == [plain]
        await cache.wait_idle()
        assert tier.calls == ["put_many", "get_many"]
