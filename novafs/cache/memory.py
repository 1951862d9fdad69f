"""L1: chunks in this process's memory, compressed, with the recently used ones plain as well. Trio thread only.

A chunk is held in one of three ways:

    frame              its payload, in L1's codec (lz4 unless told otherwise) or in the codec in which it came
    frame and decoded  also the plain content, while it is among the recently read: `peek` answers it without decoding
    plain              only the plain content: it does not compress, or has not been compressed yet (`compact`)

What came compressed stays as it came: most of what is read once is never decoded again, and to compress it anew would cost more than to
verify it. A chunk in a slow codec that is decoded after all is named to `on_slow`, whose answer is `recode`: the next time it is quick.

Decoded copies take at most `decoded_share` of the capacity and leave, oldest read first, before they do; a chunk's
decoded copy leaves with it. Who leaves the tier is for an `EvictionPolicy` to say; only where chunks that were prefetched and not read yet
hold more than their share (`novafs.eviction.probation`) does the oldest of those leave before the policy is asked.

Invariant: `used_bytes` is all that is held: payloads, decoded copies, `ENTRY_BYTES` and `DECODED_BYTES` of overhead,
and what others have reserved; it is never above `capacity_bytes`, not even inside a call, because room is made before
anything is kept. The one exception is `set_reserved`, which records bytes that exist already.

The hot path is `peek`: one dictionary lookup, one append to the list of touches. Recency is brought up to date in
batches, when that list is full and before anything is evicted. Nothing here takes a checkpoint or a lock.
"""

from __future__ import annotations

import itertools
import logging
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from novafs.cache.base import Frame, TierStatistics
from novafs.codec import PLAIN_MAX, Codec, decode
from novafs.errors import ConfigError, CorruptionError
from novafs.eviction.base import EvictionPolicy
from novafs.eviction.lru import LruPolicy
from novafs.eviction.probation import Probation

log = logging.getLogger(__name__)

ENTRY_BYTES: Final = 352
"""What an entry costs beside its payload: key, objects' headers, its places in the dictionaries here and in the policy.
Measured with tracemalloc at 1,000 to 88,000 entries: at most 321; `test_memory_tier` measures it again. The rest is malloc's rounding."""
DECODED_BYTES: Final = 224
"""The same for a decoded copy: at most 207 measured."""
FOREIGN_BYTES: Final = 128
"""The same for remembering a codec that is not the tier's own."""
SLOW: Final = (int(Codec.GZIP), int(Codec.ZSTD))
"""Codecs that take several times as long to decode as lz4 and snappy do (zstd 60 us for 64 KiB, lz4 20), on the thread of all reads."""
POLICY_FREE: Final = 20
"""What a policy takes up to one part in so many of the cap is not counted: L1 holds as many chunks under one that learns as under LRU."""
POLICY_SHARE: Final = 8
"""What a policy takes beside ENTRY_BYTES is counted up to one part in so many: in a tiny tier its tables would leave no room."""
TOUCHES_MAX: Final = 1024
"""Accesses noted before recency is brought up to date: about 0.1 ms of work at once, 8 KiB of list."""

_NONE: Final = int(Codec.NONE)


@dataclass(frozen=True, slots=True)
class MemoryStatistics(TierStatistics):
    """decoded_entries, decoded_bytes: of the decoded copies; reserved_bytes: what others hold against the same cap, by name."""

    decoded_entries: int
    decoded_bytes: int
    decoded_hits: int
    reserved_bytes: Mapping[str, int]


class MemoryTier:
    """The tier. Also a `Tier`, for the contract suite and for library use without `tiered`."""

    name = "l1"
    up = True

    def __init__(
        self,
        *,
        capacity_bytes: int,
        codec: Codec = Codec.LZ4,
        decoded_share: float = 0.25,
        policy: EvictionPolicy | None = None,
    ) -> None:
        """capacity_bytes: the cap on all bytes held. decoded_share: 0 to 1 of it. Raises ConfigError for values out of range."""
        if capacity_bytes <= 0:
            raise ConfigError(f"l1 capacity: expected more than 0 bytes, found {capacity_bytes}")
        if not 0 <= decoded_share <= 1:
            raise ConfigError(f"l1 decoded share: expected 0 to 1, found {decoded_share}")
        self.capacity_bytes = capacity_bytes
        self.codec = codec
        self.on_evict: Callable[[list[tuple[bytes, Frame]]], None] | None = None
        """Called with what has just been evicted, after it was given up. Must not call back into the tier."""
        self.on_slow: Callable[[bytes, bytes], bool] | None = None
        """Called with the id and content of a chunk that had to be decoded from a slow codec, until it says that it has taken note: once,
        then, while the chunk is here. Must not call back into the tier."""
        self._decoded_share = decoded_share
        self._decoded_max = int(capacity_bytes * decoded_share)
        self._policy: EvictionPolicy = LruPolicy() if policy is None else policy
        self._policy.set_capacity(capacity_bytes)
        self._codec = int(codec)

        self._probation = Probation()
        """Prefetched and not read yet."""

        # Invariant: the policy knows exactly the ids in `_frames` or `_plain`.
        self._frames: dict[bytes, bytes] = {}
        self._foreign: dict[bytes, int] = {}
        """Codec of those payloads in `_frames` that are not of the tier's own; ~codec of those that `on_slow` has taken note of."""
        self._plain: dict[bytes, bytes] = {}
        """All that `peek` finds at once: decoded copies and chunks held plain."""
        self._decoded: OrderedDict[bytes, None] = OrderedDict()
        """Ids in both `_frames` and `_plain`, oldest read first."""
        self._reserved: dict[str, int] = {}
        self._used = 0
        self._decoded_bytes = 0

        self._touched: list[bytes] = []
        self._ordered = 0
        """How many of `_touched` the order of `_decoded` reflects."""
        self._hits = 0
        """Without those still in `_touched`."""
        self._frame_hits = 0
        """Hits that were not answered with a decoded copy or a chunk held plain."""
        self._misses = 0
        self._insertions = 0
        self._evictions = 0
        self._errors = 0

    # --- the hot path -----------------------------------------------------------------------------------------

    def peek(self, chunk_id: bytes) -> bytes | None:
        """The plain content, or None. Counts a hit and notes the access; counts no miss (see `count_misses`)."""
        plain = self._plain.get(chunk_id)
        if plain is None:
            return self._peek_frame(chunk_id)
        touched = self._touched
        touched.append(chunk_id)
        if len(touched) >= TOUCHES_MAX:
            self._flush_touches()
        return plain

    def _peek_frame(self, chunk_id: bytes) -> bytes | None:
        payload = self._frames.get(chunk_id)
        if payload is None:
            return None
        codec = self._foreign.get(chunk_id, self._codec) if self._foreign else self._codec
        try:
            plain = decode(codec if codec >= 0 else ~codec, payload, PLAIN_MAX)
        except CorruptionError as error:
            # Verified when it came in, so this host's memory is at fault: the next tier has it.
            self._errors += 1
            self._drop(chunk_id)
            log.warning("L1 holds a frame of chunk %s that no longer decodes: %s; check this host's memory", chunk_id.hex(), error)
            return None
        self._touched.append(chunk_id)
        self._frame_hits += 1
        self._keep_decoded(chunk_id, plain)
        if (
            codec != self._codec
            and codec in SLOW
            and self.on_slow is not None
            and self.on_slow(chunk_id, plain)
            and chunk_id in self._foreign
        ):
            self._foreign[chunk_id] = ~codec
        if len(self._touched) >= TOUCHES_MAX:
            self._flush_touches()
        return plain

    def count_misses(self, count: int) -> None:
        """Chunks that were needed and not here: the caller of `peek` knows which of its misses are asked for again."""
        self._misses += count

    def contains(self, chunk_id: bytes) -> bool:
        """Whether it is held. Counts nothing, notes no access."""
        return chunk_id in self._plain or chunk_id in self._frames

    def frame(self, chunk_id: bytes) -> Frame | None:
        """As it is held, for whoever hands it on. Counts nothing, notes no access."""
        return self._frame_of(chunk_id)

    def unread(self, chunk_id: bytes) -> bool:
        """Whether it was prefetched and nobody has read it yet. Counts nothing, notes no access."""
        return chunk_id in self._probation

    # --- coming and going -------------------------------------------------------------------------------------

    def insert(self, chunk_id: bytes, plain: bytes, frame: Frame | None = None, *, prefetched: bool = False, place: int = -1) -> bool:
        """Hold a chunk, evicting others; whether it is held now (one that is larger than all there is, is not).

        frame: of `plain`, in any codec. None: it is held plain until `compact` brings one. place: where an image holds it, for the policy
        (`novafs.eviction.base`).
        A chunk that is here already counts as read, and takes `frame` where it was plain.
        """
        if chunk_id in self._frames or chunk_id in self._plain:
            self._touched.append(chunk_id)
            self._hits -= 1  # not a hit: nobody has read it from here
            if frame is not None:
                self.compact(chunk_id, frame)
            if len(self._touched) >= TOUCHES_MAX:
                self._flush_touches()
            return self.contains(chunk_id)
        if frame is None or frame.codec == _NONE:
            return self._hold_plain(chunk_id, plain, prefetched, place)
        if not self._hold_frame(chunk_id, frame, prefetched, place):
            return False
        self._keep_decoded(chunk_id, plain)
        return chunk_id in self._frames

    def compact(self, chunk_id: bytes, frame: Frame) -> None:
        """Replace a chunk that is held plain by its frame, keeping the content as a decoded copy where that share allows."""
        plain = self._plain.get(chunk_id)
        if plain is None or chunk_id in self._frames or frame.codec == _NONE:
            return
        self._used -= len(plain) + ENTRY_BYTES
        del self._plain[chunk_id]
        cost = self._frame_cost(frame)
        if cost > self.capacity_bytes - self._used:
            # Only a frame larger than its content does not fit into the room that this has just made.
            self._policy.remove(chunk_id)
            self._probation.leave(chunk_id)
            return
        self._frames[chunk_id] = frame.payload
        if frame.codec != self._codec:
            self._foreign[chunk_id] = frame.codec
        self._used += cost
        self._policy.resize(chunk_id, cost)
        self._keep_decoded(chunk_id, plain)

    def recode(self, chunk_id: bytes, frame: Frame) -> None:
        """Hold a chunk in this frame of it instead of the one that it came in, where there is room for what it is larger. One that the
        tier's own codec does not compress stays as it is."""
        if chunk_id not in self._foreign or frame.codec == _NONE:
            return
        before = self._frame_cost(Frame(self._codec_of(chunk_id), self._frames[chunk_id]))
        cost = self._frame_cost(frame)
        # A policy may choose this very chunk to make room.
        if not self._make_room(cost - before) or chunk_id not in self._foreign:
            return
        del self._foreign[chunk_id]
        self._frames[chunk_id] = frame.payload
        if frame.codec != self._codec:
            self._foreign[chunk_id] = frame.codec
        self._used += cost - before
        self._policy.resize(chunk_id, cost)

    def drop_many(self, chunk_ids: Iterable[bytes]) -> None:
        """Give them up without telling `on_evict`; no error for those that are not here."""
        for chunk_id in chunk_ids:
            self._drop(chunk_id)

    # --- bytes of others under the same cap --------------------------------------------------------------------

    def reserve(self, name: str, size: int) -> bool:
        """Ask for `size` bytes more under `name`, evicting chunks for them. False: there is no room, nothing is reserved.

        For whoever can do without: ask first, allocate after, `release` when done.
        """
        if not self._make_room(size):
            return False
        self._reserved[name] = self._reserved.get(name, 0) + size
        self._used += size
        return True

    def release(self, name: str, size: int) -> None:
        """Give back `size` bytes of what `name` has reserved."""
        self.set_reserved(name, self._reserved.get(name, 0) - size)

    def set_reserved(self, name: str, size: int) -> bool:
        """Say that `name` holds `size` bytes in all, evicting chunks for them.

        For whoever holds them anyway (maps, dirty data). False: all that is reserved is now more than the capacity; no chunk
        is held and none will be, until some of it is given back.
        """
        size = max(0, size)
        growth = size - self._reserved.get(name, 0)
        if growth > 0:
            self._evict_for(growth)
        self._used += growth
        if size:
            self._reserved[name] = size
        else:
            self._reserved.pop(name, None)
        return self._used <= self.capacity_bytes

    @property
    def used_bytes(self) -> int:
        """All bytes held, what is reserved included."""
        return self._used

    def set_capacity(self, capacity_bytes: int) -> None:
        """Another cap from now on; what is over it leaves at once, so a much smaller one is best reached in steps."""
        self.capacity_bytes = capacity_bytes
        self._decoded_max = int(capacity_bytes * self._decoded_share)
        self._policy.set_capacity(capacity_bytes)
        self._order_decoded()
        while self._decoded_bytes > self._decoded_max:
            self._drop_decoded(next(iter(self._decoded)))
        self._evict_for(0)

    # --- the policy -------------------------------------------------------------------------------------------

    @property
    def policy(self) -> EvictionPolicy:
        """Who says who leaves."""
        return self._policy

    def work(self) -> bool:
        """A slice of the policy's learning, for a moment in which nobody waits; whether there is more to do."""
        self._flush_touches()
        return self._policy.work()

    def weigh(self) -> None:
        """Count what the policy takes against the cap. Now and then: it costs a pass over its parts."""
        quality = self._policy.quality()
        if quality is not None:
            over = quality.memory_bytes - self.capacity_bytes // POLICY_FREE
            self.set_reserved("policy", max(0, min(over, self.capacity_bytes // POLICY_SHARE)))

    # --- Tier -------------------------------------------------------------------------------------------------

    def get_many(self, chunk_ids: Sequence[bytes]) -> dict[bytes, Frame]:
        """The frames it holds of those asked for; counts a hit or a miss for each and notes the access."""
        found = {}
        for chunk_id in chunk_ids:
            frame = self._frame_of(chunk_id)
            if frame is None:
                self._misses += 1
            else:
                found[chunk_id] = frame
                self._frame_hits += 1
                self._touched.append(chunk_id)
        if len(self._touched) >= TOUCHES_MAX:
            self._flush_touches()
        return found

    def put_many(self, frames: Mapping[bytes, Frame], chances: Mapping[bytes, float | None] = MappingProxyType({})) -> None:  # noqa: ARG002
        """Insert or replace, evicting others to stay within capacity; a frame larger than the capacity is not kept.

        chances: the tier has a policy of its own, and takes no notice.
        """
        for chunk_id, frame in frames.items():
            self._drop(chunk_id)
            if frame.codec == _NONE:
                self._hold_plain(chunk_id, frame.payload, prefetched=False)
            else:
                self._hold_frame(chunk_id, frame, prefetched=False)

    def rate_many(self, chances: Mapping[bytes, float | None]) -> None:
        """These count as accessed."""
        self._touched.extend(chances)
        self._hits -= len(chances)
        if len(self._touched) >= TOUCHES_MAX:
            self._flush_touches()

    def contains_many(self, chunk_ids: Sequence[bytes]) -> set[bytes]:
        """Those it holds. Counts nothing, notes no access."""
        return {chunk_id for chunk_id in chunk_ids if self.contains(chunk_id)}

    def delete_many(self, chunk_ids: Iterable[bytes]) -> None:
        """Drop them; no error for those that are not there."""
        self.drop_many(chunk_ids)

    def clear(self) -> None:
        """Drop every chunk. What others have reserved stays."""
        for chunk_id in [*self._frames, *(key for key in self._plain if key not in self._frames)]:
            self._drop(chunk_id)

    def statistics(self) -> MemoryStatistics:
        """A snapshot of the counters."""
        hits = self._hits + len(self._touched)
        return MemoryStatistics(
            name=self.name,
            entries=len(self._policy),
            used_bytes=self._used,
            capacity_bytes=self.capacity_bytes,
            hits=hits,
            misses=self._misses,
            insertions=self._insertions,
            evictions=self._evictions,
            errors=self._errors,
            up=True,
            decoded_entries=len(self._decoded),
            decoded_bytes=self._decoded_bytes,
            decoded_hits=hits - self._frame_hits,
            reserved_bytes=dict(self._reserved),
        )

    def close(self) -> None:
        """Give back the memory."""
        self.on_evict = None
        self.clear()

    # --- inside -----------------------------------------------------------------------------------------------

    def _frame_of(self, chunk_id: bytes) -> Frame | None:
        payload = self._frames.get(chunk_id)
        if payload is not None:
            return Frame(self._codec_of(chunk_id), payload)
        plain = self._plain.get(chunk_id)
        return None if plain is None else Frame(_NONE, plain)

    def _codec_of(self, chunk_id: bytes) -> int:
        codec = self._foreign.get(chunk_id, self._codec)
        return codec if codec >= 0 else ~codec

    def _frame_cost(self, frame: Frame) -> int:
        return len(frame.payload) + ENTRY_BYTES + (FOREIGN_BYTES if frame.codec != self._codec else 0)

    def _hold_plain(self, chunk_id: bytes, plain: bytes, prefetched: bool, place: int = -1) -> bool:
        cost = len(plain) + ENTRY_BYTES
        if not self._make_room(cost):
            return False
        self._plain[chunk_id] = plain
        self._enter(chunk_id, cost, prefetched, place)
        return True

    def _hold_frame(self, chunk_id: bytes, frame: Frame, prefetched: bool, place: int = -1) -> bool:
        cost = self._frame_cost(frame)
        if not self._make_room(cost):
            return False
        self._frames[chunk_id] = frame.payload
        if frame.codec != self._codec:
            self._foreign[chunk_id] = frame.codec
        self._enter(chunk_id, cost, prefetched, place)
        return True

    def _enter(self, chunk_id: bytes, cost: int, prefetched: bool, place: int) -> None:
        self._used += cost
        self._insertions += 1
        self._policy.insert(chunk_id, cost, prefetched=prefetched, place=place)
        if prefetched:
            self._probation.enter(chunk_id, cost)

    def _keep_decoded(self, chunk_id: bytes, plain: bytes) -> None:
        """Hold `plain` beside the frame where the decoded share has room for it; older decoded copies give way."""
        cost = len(plain) + DECODED_BYTES
        if cost > self._decoded_max or cost + len(self._frames[chunk_id]) + ENTRY_BYTES > self.capacity_bytes - self._reserved_total():
            return
        if self._decoded_bytes + cost > self._decoded_max:
            self._order_decoded()
            while self._decoded_bytes + cost > self._decoded_max:
                self._drop_decoded(next(iter(self._decoded)))
        # A policy may choose this very chunk to make room: then there is nothing to keep the copy beside.
        if not self._make_room(cost) or chunk_id not in self._frames:
            return
        self._plain[chunk_id] = plain
        self._decoded[chunk_id] = None
        self._decoded_bytes += cost
        self._used += cost

    def _drop_decoded(self, chunk_id: bytes) -> None:
        del self._decoded[chunk_id]
        cost = len(self._plain.pop(chunk_id)) + DECODED_BYTES
        self._decoded_bytes -= cost
        self._used -= cost

    def _drop(self, chunk_id: bytes) -> Frame | None:
        """Give up one chunk and say what its frame was."""
        frame = self._forget(chunk_id)
        if frame is not None:
            self._policy.remove(chunk_id)
        return frame

    def _forget(self, chunk_id: bytes) -> Frame | None:
        frame = self._frame_of(chunk_id)
        if frame is None:
            return None
        self._probation.leave(chunk_id)
        if chunk_id in self._decoded:
            self._drop_decoded(chunk_id)
        if self._frames.pop(chunk_id, None) is None:
            del self._plain[chunk_id]
            self._used -= len(frame.payload) + ENTRY_BYTES
        else:
            self._foreign.pop(chunk_id, None)
            self._used -= self._frame_cost(frame)
        return frame

    def _make_room(self, size: int) -> bool:
        """Evict until `size` bytes more fit. False, with nothing evicted, where they never will."""
        if self._used + size <= self.capacity_bytes:
            return True
        if size > self.capacity_bytes - self._reserved_total():
            return False
        self._evict_for(size)
        return True

    def _evict_for(self, size: int) -> None:
        """Evict until `size` bytes more fit or nothing is left."""
        self._flush_touches()
        while self._used + size > self.capacity_bytes:
            guess = self._probation.victim(self.capacity_bytes)
            if guess is not None:
                self._policy.remove(guess)
                self._evict([guess])
                continue
            victims = self._policy.victims(self._used + size - self.capacity_bytes)
            if not victims:
                return
            self._evict(victims)

    def _evict(self, victims: Sequence[bytes]) -> None:
        evicted = []
        for chunk_id in victims:
            frame = self._forget(chunk_id)
            if frame is not None:
                evicted.append((chunk_id, frame))
        self._evictions += len(evicted)
        if self.on_evict is not None and evicted:
            self.on_evict(evicted)

    def _flush_touches(self) -> None:
        """Tell the policy of the accesses noted so far."""
        self._order_decoded()
        touched = self._touched
        if touched:
            self._touched = []
            self._ordered = 0
            self._hits += len(touched)
            self._policy.touch_many(touched)
            self._probation.leave_many(touched)

    def _order_decoded(self) -> None:
        """Bring the decoded copies into the order of the accesses noted so far, without troubling the policy."""
        decoded = self._decoded
        for chunk_id in itertools.islice(self._touched, self._ordered, None):
            if chunk_id in decoded:
                decoded.move_to_end(chunk_id)
        self._ordered = len(self._touched)

    def _reserved_total(self) -> int:
        return sum(self._reserved.values())
