"""What follows a fetch or a write, in the background: compressing in L1, and filling L2.

A chunk that comes in is in L1 at once, in the frame that it came in; plain where it has none. The encoder compresses what is plain, and
what L1 had to decode from a slow codec, and hands on what L2 should have; the writer brings that to L2, together with L1's
victims that L2 lacks and the deletion of what is bad. Between them stand two queues that are bounded in bytes and never make
anybody wait: what finds one full stays plain in L1, or out of L2, and is counted.

What goes between the tiers follows the score: the chance that L1's policy gives a chunk of being asked for again
(`EvictionPolicy.chances`), asked for a batch at a time, here and never on the way of a read.

    L3 read     enters L2 unless the chance is below `ONE_OFF`
    L2 read     refreshes the score of L2's copy
    own write   enters L2, with its score: who reads it may be another host
    L1 victim   enters L2 where that lacks it, unless the chance is below `WORTH`; else it refreshes the score of L2's copy

Where the policy knows nothing (it is no learning one, has not learned yet, or has used up its processor time) everything
enters, and is in the order of its accesses.

Trio thread only, but for the pure functions at the end, which run in worker threads.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from time import perf_counter
from typing import Final, Generic, NamedTuple, TypeVar

import trio

from novafs.cache.base import Frame, Tier
from novafs.cache.memory import MemoryTier
from novafs.codec import Codec, encode
from novafs.latency import LatencyBook

log = logging.getLogger(__name__)

T = TypeVar("T")

ENCODE_CHUNKS_MAX: Final = 16
WRITE_CHUNKS_MAX: Final = 64
QUEUE_BYTES_MAX: Final = 32 << 20
"""For both queues together; or an eighth of L1, where that is less. Accounted there, under "queues", while the filler runs."""
QUEUE_ITEMS_MAX: Final = 8192
"""In one queue: for items of few bytes or none."""
ONE_OFF: Final = 0.05
"""With a smaller chance a chunk is asked for once: L2 would write it, and evict it in its turn, for nothing. Measured with
`tests.bench.tier_figures`: at 0.05 up to half of the writes are saved, at 0.1 and 0.2 L2 misses chunks that do come back."""
WORTH: Final = 0.23
"""The chance at which a score is that of recency alone (`novafs.cache.redis.gain_of`): a victim below it is worth less than
what L2 holds on average."""


@dataclass(frozen=True, slots=True)
class FillStatistics:
    """requests, written_bytes: batches written to L2, and payloads in them. fills: chunks written to L2; demotions: L1's victims among
    them. dropped: chunks that did not get to L2 because a queue was full.

    uncompressed: chunks that stay plain in L1 for the same reason. queued_bytes: waiting or being worked on.
    l2_promotions, l3_promotions: chunks that came up into L1 from there. admissions: those from L3 that were let into L2; one_offs:
    those that were not, as nobody was expected to ask for them again. demotions_refused: L1's victims that were not worth a place in L2.
    """

    requests: int
    written_bytes: int
    fills: int
    demotions: int
    dropped: int
    uncompressed: int
    queued_bytes: int
    l2_promotions: int = 0
    l3_promotions: int = 0
    admissions: int = 0
    one_offs: int = 0
    demotions_refused: int = 0


class Source(Enum):
    """Where a chunk came from."""

    WRITE = "write"
    L1 = "l1"
    L2 = "l2"
    L3 = "l3"


class Arrival(NamedTuple):
    """A chunk whose content is right. frame: of it, in any codec, if there is one. source: where it came from.

    wants_l2, wants_l1: what it is to be compressed for; set by `Filler.admit`. prefetched: nobody has asked for it yet. place: where an
    image holds it.
    """

    chunk_id: bytes
    plain: bytes
    frame: Frame | None
    source: Source
    wants_l2: bool = False
    wants_l1: bool = False
    prefetched: bool = False
    place: int = -1


class Filler:
    """Encoder and writer between one L1 and one L2."""

    def __init__(self, *, l1: MemoryTier, l2: Tier | None, l2_codec: Codec, latencies: LatencyBook) -> None:
        self._l1_puts, self._l2_puts = latencies.of("l1", "put"), latencies.of("l2", "put")
        self._requests = 0
        self._written_bytes = 0
        self._l1 = l1
        self._l2 = l2
        self._l2_codec = l2_codec
        self._budget_bytes = min(QUEUE_BYTES_MAX, l1.capacity_bytes // 8)
        self._to_encode: _Queue[Arrival] = _Queue(self._budget_bytes // 2)
        self._to_l2: _Queue[_Change] = _Queue(self._budget_bytes // 2)
        # A thread each: neither a hung L2 nor a long batch takes one that fetches need.
        self._encoders = trio.CapacityLimiter(1)
        self._writers = trio.CapacityLimiter(1)
        self._fills = 0
        self._demotions = 0
        self._dropped = 0
        self._uncompressed = 0
        self._promotions = dict.fromkeys(Source, 0)
        self._admissions = 0
        self._one_offs = 0
        self._demotions_refused = 0

    def start(self, nursery: trio.Nursery) -> None:
        """Begin to work in `nursery`, until that is cancelled; then `stop`."""
        self._l1.set_reserved("queues", self._budget_bytes)
        self._l1.on_slow = self._recode
        nursery.start_soon(self._encode_forever)
        if self._l2 is not None:
            self._l1.on_evict = self._demote
            nursery.start_soon(self._write_forever, self._l2)

    def refit(self) -> None:
        """L1's capacity has changed: the queues' share of it follows. What is in them already stays."""
        self._budget_bytes = min(QUEUE_BYTES_MAX, self._l1.capacity_bytes // 8)
        self._to_encode.capacity_bytes = self._to_l2.capacity_bytes = self._budget_bytes // 2
        self._l1.set_reserved("queues", self._budget_bytes)

    def stop(self) -> None:
        """Take back what `start` did to L1."""
        self._l1.on_evict = self._l1.on_slow = None
        self._l1.set_reserved("queues", 0)

    def admit(self, arrival: Arrival) -> None:
        """Into L1 at once, and to the encoder what is to be compressed there or to go to L2."""
        frame = arrival.frame
        began_s = perf_counter()
        self._l1.insert(arrival.chunk_id, arrival.plain, frame, prefetched=arrival.prefetched, place=arrival.place)
        self._l1_puts.note(perf_counter() - began_s)
        self._promotions[arrival.source] += 1
        l2_up = self._l2 is not None and self._l2.up
        if l2_up and arrival.source is Source.L2 and self._l1.policy.rates:
            self._to_l2.put(_Change(arrival.chunk_id, None, Why.RATE), 0)
        wants_l2 = l2_up and arrival.source is not Source.L2
        if not wants_l2 and frame is not None:
            return
        if not self._to_encode.put(arrival._replace(wants_l1=frame is None, wants_l2=wants_l2), len(arrival.plain)):
            self._uncompressed += frame is None
            self._dropped += wants_l2

    def _recode(self, chunk_id: bytes, plain: bytes) -> bool:
        """L1 decodes a chunk from a slow codec: have it in L1's own the next time. Without room in the queue, the time after."""
        return self._to_encode.put(Arrival(chunk_id, plain, None, Source.L1, wants_l1=True), len(plain))

    def delete(self, chunk_id: bytes) -> None:
        """Have L2 forget it; forgotten itself where the queue is full."""
        if self._l2 is not None:
            self._to_l2.put(_Change(chunk_id, None, Why.DELETE), 0)

    async def wait_idle(self) -> None:
        """Until there is nothing left to compress or to write."""
        while True:
            if not self._to_encode.idle.is_set():
                await self._to_encode.idle.wait()
            elif not self._to_l2.idle.is_set():
                await self._to_l2.idle.wait()
            else:
                return

    def statistics(self) -> FillStatistics:
        """A snapshot of the counters."""
        queued_bytes = self._to_encode.used_bytes + self._to_l2.used_bytes
        return FillStatistics(
            requests=self._requests,
            written_bytes=self._written_bytes,
            fills=self._fills,
            demotions=self._demotions,
            dropped=self._dropped,
            uncompressed=self._uncompressed,
            queued_bytes=queued_bytes,
            l2_promotions=self._promotions[Source.L2],
            l3_promotions=self._promotions[Source.L3],
            admissions=self._admissions,
            one_offs=self._one_offs,
            demotions_refused=self._demotions_refused,
        )

    # --- inside -----------------------------------------------------------------------------------------------

    async def _encode_forever(self) -> None:
        while True:
            batch = await self._to_encode.get_batch(ENCODE_CHUNKS_MAX)
            try:
                work = self._judged(batch)
                frames = await trio.to_thread.run_sync(_encode, work, self._l1.codec, self._l2_codec, limiter=self._encoders)
                for arrival, (l1_frame, l2_frame) in zip(work, frames, strict=True):
                    if l1_frame is not None and arrival.source is Source.L1:
                        self._l1.recode(arrival.chunk_id, l1_frame)
                    elif l1_frame is not None:
                        self._l1.compact(arrival.chunk_id, l1_frame)
                    if l2_frame is not None and not self._to_l2.put(_Change(arrival.chunk_id, l2_frame, Why.FILL), len(l2_frame.payload)):
                        self._dropped += 1
            finally:
                self._to_encode.finish(sum(len(arrival.plain) for arrival in batch), len(batch))

    def _judged(self, batch: list[Arrival]) -> list[Arrival]:
        """What is to be compressed: for L2 only what L2 is to have."""
        read = [arrival.chunk_id for arrival in batch if arrival.wants_l2 and arrival.source is Source.L3]
        chances = dict(zip(read, self._l1.policy.chances(read), strict=True))
        work = []
        for arrival in batch:
            if arrival.chunk_id in chances and arrival.wants_l2:
                chance = chances[arrival.chunk_id]
                if chance is not None and chance < ONE_OFF:
                    self._one_offs += 1
                    arrival = arrival._replace(wants_l2=False)
                else:
                    self._admissions += 1
            if arrival.wants_l1 or arrival.wants_l2:
                work.append(arrival)
        return work

    def _demote(self, victims: list[tuple[bytes, Frame]]) -> None:
        """L1's victims, to L2 where it lacks them; in whatever codec they are, because a value there says its own."""
        if self._l2 is not None and self._l2.up:
            for chunk_id, frame in victims:
                if not self._to_l2.put(_Change(chunk_id, frame, Why.DEMOTE), len(frame.payload)):
                    self._dropped += 1

    async def _write_forever(self, l2: Tier) -> None:
        while True:
            batch = await self._to_l2.get_batch(WRITE_CHUNKS_MAX)
            try:
                ids = list({change.chunk_id for change in batch if change.why is not Why.DELETE})
                chances = dict(zip(ids, self._l1.policy.chances(ids), strict=True))
                began_s = perf_counter()
                done = await trio.to_thread.run_sync(_write, l2, batch, chances, limiter=self._writers)
            except Exception:  # a tier raises nothing by contract; a mistake in one must not end the mount
                log.exception("L2 failed to take %d chunks", len(batch))
            else:
                if done.filled:
                    self._l2_puts.note(perf_counter() - began_s)
                    self._requests += 1
                    self._written_bytes += done.written_bytes
                self._fills += done.filled
                self._demotions += done.demoted
                self._demotions_refused += done.refused
            finally:
                self._to_l2.finish(sum(len(change.frame.payload) for change in batch if change.frame is not None), len(batch))


class Why(Enum):
    """What L2 is asked for: to hold a frame; to hold it where it lacks it; to refresh a score; to forget."""

    FILL = "fill"
    DEMOTE = "demote"
    RATE = "rate"
    DELETE = "delete"


class _Change(NamedTuple):
    """One chunk's change in L2. frame: for FILL and DEMOTE."""

    chunk_id: bytes
    frame: Frame | None
    why: Why


class _Queue(Generic[T]):
    """Bounded by bytes, what is being worked on included; `put` never waits. One consumer."""

    def __init__(self, capacity_bytes: int) -> None:
        self.capacity_bytes = capacity_bytes
        self.used_bytes = 0
        self.idle = trio.Event()
        self.idle.set()
        self._items: deque[T] = deque()
        self._open = 0
        """Items waiting or being worked on. Invariant: `idle` is set exactly while it is 0."""
        self._filled = trio.Event()

    def put(self, item: T, size: int) -> bool:
        """Whether there was room."""
        if self.used_bytes + size > self.capacity_bytes or self._open >= QUEUE_ITEMS_MAX:
            return False
        if not self._open:
            self.idle = trio.Event()
        self._open += 1
        self.used_bytes += size
        self._items.append(item)
        self._filled.set()
        return True

    async def get_batch(self, most: int) -> list[T]:
        """At least one and at most `most` items, oldest first. `finish` when they are done with."""
        while not self._items:
            self._filled = trio.Event()
            await self._filled.wait()
        return [self._items.popleft() for _ in range(min(most, len(self._items)))]

    def finish(self, size: int, count: int) -> None:
        """`count` items of `size` bytes in all need no room any more."""
        self.used_bytes -= size
        self._open -= count
        if not self._open:
            self.idle.set()


# --- in worker threads --------------------------------------------------------------------------------------------


def _encode(batch: Sequence[Arrival], l1_codec: Codec, l2_codec: Codec) -> list[tuple[Frame | None, Frame | None]]:
    """Frames for L1 and L2, None where none is wanted."""
    made = []
    for arrival in batch:
        l1_frame = _frame_in(l1_codec, arrival.plain, [arrival.frame]) if arrival.wants_l1 else None
        l2_frame = _frame_in(l2_codec, arrival.plain, [arrival.frame, l1_frame]) if arrival.wants_l2 else None
        made.append((l1_frame, l2_frame))
    return made


def _frame_in(codec: Codec, plain: bytes, known: Sequence[Frame | None]) -> Frame:
    """One of the known frames where it will do. What one codec has kept plain does not compress, so it is not tried again."""
    for frame in known:
        if frame is not None and frame.codec in (codec, Codec.NONE):
            return frame
    return encode(plain, codec)


class _Done(NamedTuple):
    """filled: chunks written, of `written_bytes`; demoted: L1's victims among them; refused: victims that were not worth it."""

    filled: int
    demoted: int
    refused: int
    written_bytes: int = 0


def _write(l2: Tier, batch: Sequence[_Change], chances: Mapping[bytes, float | None]) -> _Done:
    """Do it. Of several changes of one chunk the last counts, but for scores, which go with any."""
    latest = {change.chunk_id: change for change in batch if change.why is not Why.RATE}
    deleted = [change.chunk_id for change in latest.values() if change.why is Why.DELETE]
    if deleted:
        l2.delete_many(deleted)
    victims = [change.chunk_id for change in latest.values() if change.why is Why.DEMOTE]
    known = l2.contains_many(victims) if victims else set()
    refused = {chunk_id for chunk_id in victims if chunk_id not in known and not _worth(chances[chunk_id])}
    frames = {
        chunk_id: change.frame
        for chunk_id, change in latest.items()
        if change.frame is not None and chunk_id not in known and chunk_id not in refused
    }
    # A score that nobody knows says no more than L2 does by itself.
    rated = [change.chunk_id for change in batch if change.why is Why.RATE and change.chunk_id not in latest]
    scores = {chunk_id: chances[chunk_id] for chunk_id in (*rated, *known) if chances[chunk_id] is not None}
    if scores:
        l2.rate_many(scores)
    if not frames or not l2.up:
        return _Done(0, 0, len(refused))
    l2.put_many(frames, chances)
    written_bytes = sum(len(frame.payload) for frame in frames.values())
    return _Done(len(frames), len(victims) - len(known) - len(refused), len(refused), written_bytes)


def _worth(chance: float | None) -> bool:
    return chance is None or chance >= WORTH
