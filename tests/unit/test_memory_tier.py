"""L1: the cap that is never exceeded, decoded copies, bytes of others, and what an entry really costs."""

from __future__ import annotations

import gc
import gzip
import logging
import secrets
import tracemalloc
from collections.abc import Callable

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from novafs.cache.base import Frame
from novafs.cache.memory import DECODED_BYTES, ENTRY_BYTES, FOREIGN_BYTES, POLICY_FREE, POLICY_SHARE, TOUCHES_MAX, MemoryTier
from novafs.codec import Codec, encode
from novafs.errors import ConfigError
from novafs.eviction.learned import LearnedPolicy
from novafs.eviction.lru import LruPolicy

CHUNK = 4096

WHOLE = [codec for codec in Codec if codec is not Codec.HDE]
"""A delta needs more than its frame, so no tier but the store ever has one."""


def new_id() -> bytes:
    return secrets.token_bytes(32)


def text(number: int = 0, size: int = CHUNK) -> bytes:
    """Content that compresses, different for each number."""
    return (b"%010d " % number * (size // 11 + 1))[:size]


def noise(size: int = CHUNK) -> bytes:
    return secrets.token_bytes(size)


class Watched(MemoryTier):
    """Fails where more is held than the capacity, at every single step."""

    def __setattr__(self, name: str, value: object) -> None:
        if name == "_used" and hasattr(self, "_used"):
            assert isinstance(value, int)
            reserved = sum(self._reserved.values())
            assert value <= max(self.capacity_bytes, reserved + self.growing), f"{value} bytes held of {self.capacity_bytes}"
        super().__setattr__(name, value)

    growing = 0
    """What `set_reserved` is about to take, whether there is room or not."""


def recount(tier: MemoryTier) -> int:
    """`used_bytes` from what is there."""
    total = sum(tier._reserved.values())
    for chunk_id, payload in tier._frames.items():
        total += len(payload) + ENTRY_BYTES + (FOREIGN_BYTES if chunk_id in tier._foreign else 0)
        total += len(tier._plain[chunk_id]) + DECODED_BYTES if chunk_id in tier._plain else 0
    return total + sum(len(plain) + ENTRY_BYTES for chunk_id, plain in tier._plain.items() if chunk_id not in tier._frames)


# --- reading ------------------------------------------------------------------------------------------------------


def test_a_chunk_is_peeked_from_its_frame_and_then_from_its_decoded_copy() -> None:
    tier = MemoryTier(capacity_bytes=1 << 20)
    chunk_id, plain = new_id(), text()
    tier.put_many({chunk_id: encode(plain, Codec.LZ4)})
    assert tier.statistics().decoded_entries == 0
    first = tier.peek(chunk_id)
    assert first == plain
    assert tier.statistics().decoded_entries == 1
    assert tier.peek(chunk_id) is first
    assert (tier.statistics().hits, tier.statistics().decoded_hits) == (2, 1)
    assert tier.peek(new_id()) is None
    assert tier.statistics().misses == 0
    tier.count_misses(3)
    assert tier.statistics().misses == 3


@pytest.mark.parametrize("codec", WHOLE)
def test_frames_of_every_codec_are_peeked(codec: Codec) -> None:
    tier = MemoryTier(capacity_bytes=1 << 20, codec=Codec.LZ4)
    chunk_id = new_id()
    tier.put_many({chunk_id: encode(text(), codec)})
    assert tier.peek(chunk_id) == text()
    assert tier.get_many([chunk_id]) == {chunk_id: encode(text(), codec)}
    assert tier.used_bytes == recount(tier)


def test_a_chunk_that_does_not_compress_is_held_once() -> None:
    tier = MemoryTier(capacity_bytes=1 << 20)
    chunk_id, plain = new_id(), noise()
    tier.insert(chunk_id, plain, encode(plain, Codec.LZ4))
    assert tier.peek(chunk_id) is plain
    assert tier.used_bytes == CHUNK + ENTRY_BYTES
    assert tier.statistics().decoded_entries == 0


def test_a_chunk_inserted_plain_is_compacted_when_its_frame_comes() -> None:
    tier = MemoryTier(capacity_bytes=1 << 20)
    chunk_id, plain = new_id(), text()
    frame = encode(plain, Codec.LZ4)
    assert tier.insert(chunk_id, plain)
    assert tier.get_many([chunk_id]) == {chunk_id: Frame(Codec.NONE, plain)}
    tier.compact(chunk_id, frame)
    assert tier.get_many([chunk_id]) == {chunk_id: frame}
    assert tier.peek(chunk_id) is plain  # kept, as a decoded copy
    assert tier.used_bytes == recount(tier) == len(frame.payload) + ENTRY_BYTES + CHUNK + DECODED_BYTES
    tier.compact(new_id(), frame)
    tier.compact(chunk_id, encode(plain, Codec.ZSTD))
    assert tier.get_many([chunk_id]) == {chunk_id: frame}


def test_a_slow_frame_is_named_when_it_is_decoded_and_may_be_replaced() -> None:
    tier, named = MemoryTier(capacity_bytes=20 * CHUNK, decoded_share=0.0), []
    tier.on_slow = lambda chunk_id, plain: bool(named.append((chunk_id, plain))) or True
    slow, quick, plain = new_id(), new_id(), text(7)
    tier.insert(slow, plain, encode(plain, Codec.ZSTD))
    tier.insert(quick, plain, encode(plain, Codec.SNAPPY))
    assert tier.peek(slow) == tier.peek(quick) == plain
    assert named == [(slow, plain)]
    tier.recode(slow, encode(plain, Codec.LZ4))
    tier.recode(new_id(), encode(plain, Codec.LZ4))  # evicted meanwhile
    assert tier.peek(slow) == plain
    assert len(named) == 1
    assert tier.get_many([slow])[slow] == encode(plain, Codec.LZ4)
    assert tier.used_bytes == recount(tier)


def test_a_slow_frame_is_named_until_somebody_takes_note_and_then_no_more() -> None:
    tier, named = MemoryTier(capacity_bytes=20 * CHUNK, decoded_share=0.0), []

    def note(chunk_id: bytes, plain: bytes) -> bool:
        named.append(chunk_id)
        return len(named) == 3

    tier.on_slow = note
    slow, plain = new_id(), text(7)
    frame = encode(plain, Codec.ZSTD)
    tier.insert(slow, plain, frame)
    for _ in range(10):
        assert tier.peek(slow) == plain
        assert tier.frame(slow) == frame
    tier.recode(slow, Frame(Codec.NONE, plain))  # the tier's codec does not compress it
    assert tier.peek(slow) == plain
    assert named == [slow] * 3
    assert tier.used_bytes == recount(tier)
    tier.delete_many([slow])
    tier.insert(slow, plain, frame)
    assert tier.peek(slow) == plain
    assert len(named) == 4


def test_a_frame_that_would_be_larger_than_what_there_is_replaces_nothing() -> None:
    plain, chunk_id = text(7), new_id()
    small = encode(plain, Codec.ZSTD)
    tier = MemoryTier(capacity_bytes=len(small.payload) + ENTRY_BYTES + FOREIGN_BYTES, decoded_share=0.0)
    assert tier.insert(chunk_id, plain, small)
    tier.recode(chunk_id, Frame(Codec.LZ4, noise()))
    assert tier.get_many([chunk_id])[chunk_id] == small
    assert tier.used_bytes == recount(tier)


def test_compacting_keeps_no_copy_where_the_decoded_share_has_no_room() -> None:
    tier = MemoryTier(capacity_bytes=1 << 20, decoded_share=0)
    chunk_id = new_id()
    tier.insert(chunk_id, text())
    tier.compact(chunk_id, encode(text(), Codec.LZ4))
    assert tier.statistics().decoded_bytes == 0
    assert tier.peek(chunk_id) == text()
    assert tier.used_bytes == recount(tier) < CHUNK


def test_inserting_what_is_there_counts_as_read_and_takes_the_frame() -> None:
    tier = MemoryTier(capacity_bytes=1 << 20)
    chunk_id = new_id()
    tier.insert(chunk_id, text())
    for _ in range(TOUCHES_MAX + 1):
        assert tier.insert(chunk_id, text())
    assert tier.insert(chunk_id, text(), encode(text(), Codec.LZ4))
    assert tier.statistics().entries == 1
    assert tier.statistics().hits == 0
    assert tier.get_many([chunk_id])[chunk_id].codec == Codec.LZ4


def test_a_frame_that_no_longer_decodes_is_dropped_and_missed(caplog: pytest.LogCaptureFixture) -> None:
    tier = MemoryTier(capacity_bytes=1 << 20)
    chunk_id = new_id()
    tier.put_many({chunk_id: Frame(Codec.LZ4, b"\xff\xff\xff\xffgarbage")})
    with caplog.at_level(logging.WARNING):
        assert tier.peek(chunk_id) is None
    assert chunk_id.hex() in caplog.text
    assert tier.statistics().errors == 1
    assert (tier.statistics().entries, tier.used_bytes) == (0, 0)


# --- the cap ------------------------------------------------------------------------------------------------------


def test_the_oldest_read_are_evicted_and_told_of() -> None:
    evicted: list[tuple[bytes, Frame]] = []
    tier = MemoryTier(capacity_bytes=10 * (CHUNK + ENTRY_BYTES))
    tier.on_evict = evicted.extend
    plains = {new_id(): noise() for _ in range(10)}
    for chunk_id, plain in plains.items():
        tier.insert(chunk_id, plain)
    ids = list(plains)
    for chunk_id in ids[:5]:
        tier.peek(chunk_id)
    for _ in range(3):
        tier.insert(new_id(), noise())
    assert evicted == [(chunk_id, Frame(Codec.NONE, plains[chunk_id])) for chunk_id in ids[5:8]]
    assert tier.contains_many(ids) == set(ids[:5] + ids[8:])
    assert tier.statistics().evictions == 3


def test_the_decoded_share_is_kept_and_its_oldest_copy_leaves_first() -> None:
    tier = MemoryTier(capacity_bytes=40 * CHUNK, decoded_share=0.25)
    ids = [new_id() for _ in range(20)]
    for number, chunk_id in enumerate(ids):
        tier.insert(chunk_id, text(number), encode(text(number), Codec.LZ4))
    room = int(10 * CHUNK / (CHUNK + DECODED_BYTES))
    assert tier.statistics().decoded_entries == room
    kept = ids[-room:]
    assert tier.peek(kept[0]) is not None
    tier.peek(ids[0])  # decodes, and its copy takes the place of the oldest read, which kept[0] no longer is
    frame_hits = tier.statistics().hits - tier.statistics().decoded_hits
    tier.peek(kept[0])
    tier.peek(ids[0])
    assert tier.statistics().hits - tier.statistics().decoded_hits == frame_hits
    tier.peek(kept[1])
    assert tier.statistics().hits - tier.statistics().decoded_hits == frame_hits + 1
    assert tier.statistics().decoded_bytes <= 10 * CHUNK
    assert tier.used_bytes == recount(tier)


def test_a_chunk_larger_than_all_there_is_is_not_kept_and_evicts_nothing() -> None:
    tier = MemoryTier(capacity_bytes=10 * CHUNK)
    chunk_id = new_id()
    tier.insert(chunk_id, noise())
    assert not tier.insert(new_id(), noise(10 * CHUNK))
    assert not tier.insert(new_id(), noise(20 * CHUNK), Frame(Codec.LZ4, bytes(20 * CHUNK)))
    assert tier.contains(chunk_id)


def test_many_touches_are_handed_to_the_policy_in_batches_and_in_order() -> None:
    batches: list[list[bytes]] = []

    class Listening(LruPolicy):
        def touch_many(self, keys: object) -> None:
            assert isinstance(keys, list)
            batches.append(keys)

    tier = MemoryTier(capacity_bytes=1 << 20, policy=Listening())
    a, b = new_id(), new_id()
    tier.insert(a, noise())
    tier.insert(b, noise())
    for _ in range(TOUCHES_MAX):
        tier.peek(a)
        tier.peek(b)
    assert batches == [[a, b] * (TOUCHES_MAX // 2)] * 2
    assert tier.statistics().hits == 2 * TOUCHES_MAX


def test_prefetched_chunks_are_announced_as_such() -> None:
    seen: list[bool] = []

    class Listening(LruPolicy):
        def insert(self, key: bytes, size: int, *, prefetched: bool = False, place: int = -1) -> None:
            seen.append(prefetched)
            super().insert(key, size)

    tier = MemoryTier(capacity_bytes=1 << 20, policy=Listening())
    tier.insert(new_id(), noise(), prefetched=True)
    tier.insert(new_id(), text(), encode(text(), Codec.LZ4), prefetched=True)
    tier.insert(new_id(), noise())
    assert seen == [True, True, False]


# --- bytes of others ----------------------------------------------------------------------------------------------


def test_what_is_reserved_evicts_and_is_given_back() -> None:
    """semantics: S18."""
    tier = MemoryTier(capacity_bytes=10 * (CHUNK + ENTRY_BYTES))
    for _ in range(10):
        tier.insert(new_id(), noise())
    assert tier.reserve("prefetch", 3 * CHUNK)
    assert tier.statistics().entries == 7
    assert tier.reserve("prefetch", CHUNK)
    assert tier.statistics().reserved_bytes == {"prefetch": 4 * CHUNK}
    assert not tier.reserve("prefetch", 10 * CHUNK)
    assert tier.statistics().entries > 0  # asked for in vain, and nothing was evicted for it
    tier.release("prefetch", 3 * CHUNK)
    tier.release("prefetch", CHUNK)
    assert tier.statistics().reserved_bytes == {}
    assert tier.used_bytes == recount(tier)


def test_bytes_that_exist_anyway_are_counted_even_above_the_capacity() -> None:
    tier = MemoryTier(capacity_bytes=10 * CHUNK)
    chunk_id = new_id()
    tier.insert(chunk_id, noise())
    assert tier.set_reserved("maps", 4 * CHUNK)
    assert tier.contains(chunk_id)
    assert not tier.set_reserved("dirty", 7 * CHUNK)
    assert tier.used_bytes == 11 * CHUNK
    assert not tier.contains(chunk_id)
    assert not tier.insert(chunk_id, noise(10))
    assert not tier.reserve("prefetch", 1)
    assert tier.set_reserved("dirty", CHUNK)
    assert tier.insert(chunk_id, noise())
    assert tier.set_reserved("dirty", 0)
    assert tier.set_reserved("maps", -5)
    assert tier.statistics().reserved_bytes == {}


def test_a_policy_that_learns_takes_a_twentieth_of_the_cap_for_nothing_and_what_is_over_it_counts() -> None:
    policy = LearnedPolicy()
    tier = MemoryTier(capacity_bytes=100 * CHUNK, policy=policy)
    tier.weigh()
    quality = policy.quality()
    over = quality.memory_bytes - 100 * CHUNK // POLICY_FREE
    assert over > 0
    assert tier.statistics().reserved_bytes.get("policy", 0) == min(over, 100 * CHUNK // POLICY_SHARE)
    tier.set_capacity(POLICY_FREE * (quality.memory_bytes + CHUNK))
    tier.weigh()
    assert "policy" not in tier.statistics().reserved_bytes


def test_clearing_and_closing_give_back_the_memory_but_not_what_others_hold() -> None:
    tier = MemoryTier(capacity_bytes=1 << 20)
    tier.set_reserved("maps", 1000)
    for number in range(10):
        tier.insert(new_id(), text(number), encode(text(number), Codec.LZ4))
        tier.insert(new_id(), noise())
    tier.clear()
    assert tier.used_bytes == 1000
    tier.close()
    assert tier.used_bytes == 1000


@pytest.mark.parametrize(("settings", "message"), [({"capacity_bytes": 0}, "l1 capacity"), ({"decoded_share": 1.5}, "decoded share")])
def test_settings_out_of_range_are_refused_by_name(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MemoryTier(**{"capacity_bytes": 1 << 20, **settings})  # type: ignore[arg-type]


# --- the whole of it, against what is really there ------------------------------------------------------------------


class Machine(RuleBasedStateMachine):
    """Any sequence of calls: content stays right, the counter stays what is there, and the cap holds at every step."""

    @initialize(capacity=st.integers(2000, 60_000), share=st.sampled_from([0.0, 0.25, 1.0]))
    def start(self, capacity: int, share: float) -> None:
        self.tier = Watched(capacity_bytes=capacity, decoded_share=share)
        self.tier.on_evict = lambda victims: None
        self.tier.on_slow = lambda chunk_id, plain: chunk_id[0] % 2 == 0
        self.plains = [text(number, 500 + 300 * number) if number % 3 else noise(500 + 100 * number) for number in range(12)]
        self.ids = [bytes([number]) * 32 for number in range(12)]

    number = st.integers(0, 11)

    @rule(number=number, how=st.sampled_from(["plain", "lz4", "zstd"]), prefetched=st.booleans())
    def insert(self, number: int, how: str, prefetched: bool) -> None:
        plain = self.plains[number]
        frame = None if how == "plain" else encode(plain, Codec[how.upper()])
        held = self.tier.insert(self.ids[number], plain, frame, prefetched=prefetched)
        assert held == self.tier.contains(self.ids[number])

    @rule(number=number, how=st.sampled_from(["lz4", "zstd", "swollen"]))
    def compact(self, number: int, how: str) -> None:
        self.tier.compact(self.ids[number], self.frame(number, how))

    @rule(number=number, how=st.sampled_from(["lz4", "zstd", "swollen"]))
    def recode(self, number: int, how: str) -> None:
        self.tier.recode(self.ids[number], self.frame(number, how))

    def frame(self, number: int, how: str) -> Frame:
        plain = self.plains[number]
        return Frame(Codec.GZIP, gzip.compress(plain, 0)) if how == "swollen" else encode(plain, Codec[how.upper()])

    @rule(number=number, codec=st.sampled_from(WHOLE))
    def put(self, number: int, codec: Codec) -> None:
        self.tier.put_many({self.ids[number]: encode(self.plains[number], codec)})

    @rule(number=number)
    def peek(self, number: int) -> None:
        held = self.tier.contains(self.ids[number])
        assert self.tier.peek(self.ids[number]) == (self.plains[number] if held else None)

    @rule(number=number)
    def delete(self, number: int) -> None:
        self.tier.delete_many([self.ids[number]])
        assert not self.tier.contains(self.ids[number])

    @rule(size=st.integers(0, 20_000))
    def reserve(self, size: int) -> None:
        self.tier.reserve("prefetch", size)

    @rule(size=st.integers(0, 70_000))
    def set_reserved(self, size: int) -> None:
        self.tier.growing = size
        self.tier.set_reserved("maps", size)
        self.tier.growing = 0

    @precondition(lambda self: self.tier._touched)
    @rule()
    def clear(self) -> None:
        self.tier.clear()

    @invariant()
    def the_counters_are_what_is_there(self) -> None:
        tier = self.tier
        assert tier.used_bytes == recount(tier)
        assert tier._decoded_bytes == sum(len(tier._plain[key]) + DECODED_BYTES for key in tier._decoded)
        assert tier._decoded_bytes <= tier._decoded_max
        assert set(tier._decoded) == set(tier._frames) & set(tier._plain)
        assert {key for key in self.ids if key in tier._policy} == set(tier._frames) | set(tier._plain)
        assert set(tier._foreign) <= set(tier._frames)
        assert tier.used_bytes <= max(tier.capacity_bytes, sum(tier._reserved.values()))


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)


# --- what an entry costs --------------------------------------------------------------------------------------------


def held_per_entry(count: int, fill: Callable[[MemoryTier, bytes], None]) -> float:
    """Bytes that tracemalloc sees for each entry, at the worst moment while `count` of them come in."""
    tier = MemoryTier(capacity_bytes=1 << 30)
    worst = 0.0
    gc.collect()
    tracemalloc.start()
    try:
        base = tracemalloc.get_traced_memory()[0]
        for number in range(count):
            fill(tier, secrets.token_bytes(32))
            if number > 500 and number % 50 == 0:
                worst = max(worst, (tracemalloc.get_traced_memory()[0] - base) / (number + 1))
        worst = max(worst, (tracemalloc.get_traced_memory()[0] - base) / count)
    finally:
        tracemalloc.stop()
    return worst


PAYLOAD = 100


def test_the_overhead_that_is_counted_is_what_an_entry_really_costs() -> None:
    """semantics: S18."""
    frame = encode(text(0, 1000), Codec.LZ4)
    length = len(frame.payload)

    def frame_only(tier: MemoryTier, key: bytes) -> None:
        tier.put_many({key: Frame(Codec.LZ4, bytes(bytearray(frame.payload)))})

    def foreign(tier: MemoryTier, key: bytes) -> None:
        tier.put_many({key: Frame(Codec.ZSTD, bytes(bytearray(frame.payload)))})

    def decoded(tier: MemoryTier, key: bytes) -> None:
        tier.insert(key, bytes(bytearray(1000)), Frame(Codec.LZ4, bytes(bytearray(frame.payload))))

    measured = {fill.__name__: max(held_per_entry(count, fill) for count in (1500, 6000, 22000)) for fill in (frame_only, foreign, decoded)}
    assert 0.7 * ENTRY_BYTES < measured["frame_only"] - length <= ENTRY_BYTES
    assert measured["foreign"] - length <= ENTRY_BYTES + FOREIGN_BYTES
    assert 0.7 * (ENTRY_BYTES + DECODED_BYTES) < measured["decoded"] - length - 1000 <= ENTRY_BYTES + DECODED_BYTES
