"""What follows a fetch or a write, in the background: compressing in L1, and filling L2.

A chunk that comes in is in L1 at once, plain. The encoder compresses it there and hands on what L2 should have; the
writer brings that to L2, together with L1's victims that L2 lacks and the deletion of what is bad. Between them stand two
queues that are bounded in bytes and never make anybody wait: what finds one full stays plain in L1, or out of L2, and
is counted. A caller that wants to keep pace asks `behind`.

Trio thread only, but for the pure functions at the end, which run in worker threads.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Generic, NamedTuple, TypeVar

import trio

from novafs.cache.base import Frame, Tier
from novafs.cache.memory import MemoryTier
from novafs.codec import Codec, encode

log = logging.getLogger(__name__)

T = TypeVar("T")

ENCODE_CHUNKS_MAX: Final = 16
WRITE_CHUNKS_MAX: Final = 64
QUEUE_BYTES_MAX: Final = 32 << 20
"""For both queues together; or an eighth of L1, where that is less. Accounted there, under "queues", while the filler runs."""
QUEUE_ITEMS_MAX: Final = 8192
"""In one queue: for items of few bytes or none."""


@dataclass(frozen=True, slots=True)
class FillStatistics:
    """fills: chunks written to L2; demotions: L1's victims among them. dropped: chunks that did not get to L2 because a queue was full.

    uncompressed: chunks that stay plain in L1 for the same reason. queued_bytes: waiting or being worked on.
    """

    fills: int
    demotions: int
    dropped: int
    uncompressed: int
    queued_bytes: int


class Arrival(NamedTuple):
    """A chunk whose content is right. frame: of it, in any codec, if there is one. wants_l2, wants_l1: what it is to be compressed for.

    prefetched: nobody has asked for it yet. place: where an image holds it.
    """

    chunk_id: bytes
    plain: bytes
    frame: Frame | None
    wants_l2: bool
    wants_l1: bool = False
    prefetched: bool = False
    place: int = -1


class Filler:
    """Encoder and writer between one L1 and one L2."""

    def __init__(self, *, l1: MemoryTier, l2: Tier | None, l2_codec: Codec) -> None:
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

    def start(self, nursery: trio.Nursery) -> None:
        """Begin to work in `nursery`, until that is cancelled; then `stop`."""
        self._l1.set_reserved("queues", self._budget_bytes)
        nursery.start_soon(self._encode_forever)
        if self._l2 is not None:
            self._l1.on_evict = self._demote
            nursery.start_soon(self._write_forever, self._l2)

    def stop(self) -> None:
        """Take back what `start` did to L1."""
        self._l1.on_evict = None
        self._l1.set_reserved("queues", 0)

    @property
    def behind(self) -> bool:
        """Whether the encoder has more to do than it is likely to get done: compress before you admit."""
        return 2 * self._to_encode.used_bytes > self._to_encode.capacity_bytes

    def admit(self, arrival: Arrival) -> None:
        """Into L1 at once, and to the encoder what is to be compressed there or to go to L2."""
        frame = arrival.frame
        fits_l1 = frame is not None and frame.codec in (self._l1.codec, Codec.NONE)
        self._l1.insert(arrival.chunk_id, arrival.plain, frame if fits_l1 else None, prefetched=arrival.prefetched, place=arrival.place)
        wants_l2 = arrival.wants_l2 and self._l2 is not None and self._l2.up
        if not wants_l2 and fits_l1:
            return
        if not self._to_encode.put(arrival._replace(wants_l1=not fits_l1, wants_l2=wants_l2), len(arrival.plain)):
            self._uncompressed += not fits_l1
            self._dropped += wants_l2

    def delete(self, chunk_id: bytes) -> None:
        """Have L2 forget it; forgotten itself where the queue is full."""
        if self._l2 is not None:
            self._to_l2.put(_Change(chunk_id, None), 0)

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
        return FillStatistics(self._fills, self._demotions, self._dropped, self._uncompressed, queued_bytes)

    # --- inside -----------------------------------------------------------------------------------------------

    async def _encode_forever(self) -> None:
        while True:
            batch = await self._to_encode.get_batch(ENCODE_CHUNKS_MAX)
            try:
                frames = await trio.to_thread.run_sync(_encode, batch, self._l1.codec, self._l2_codec, limiter=self._encoders)
                for arrival, (l1_frame, l2_frame) in zip(batch, frames, strict=True):
                    if l1_frame is not None:
                        self._l1.compact(arrival.chunk_id, l1_frame)
                    if l2_frame is not None and not self._to_l2.put(_Change(arrival.chunk_id, l2_frame), len(l2_frame.payload)):
                        self._dropped += 1
            finally:
                self._to_encode.finish(sum(len(arrival.plain) for arrival in batch), len(batch))

    def _demote(self, victims: list[tuple[bytes, Frame]]) -> None:
        """L1's victims, to L2 where it lacks them; in whatever codec they are, because a value there says its own."""
        if self._l2 is not None and self._l2.up:
            for chunk_id, frame in victims:
                if not self._to_l2.put(_Change(chunk_id, frame, demoted=True), len(frame.payload)):
                    self._dropped += 1

    async def _write_forever(self, l2: Tier) -> None:
        while True:
            batch = await self._to_l2.get_batch(WRITE_CHUNKS_MAX)
            try:
                filled, demoted = await trio.to_thread.run_sync(_write, l2, batch, limiter=self._writers)
            except Exception:  # a tier raises nothing by contract; a mistake in one must not end the mount
                log.exception("L2 failed to take %d chunks", len(batch))
            else:
                self._fills += filled
                self._demotions += demoted
            finally:
                self._to_l2.finish(sum(len(change.frame.payload) for change in batch if change.frame is not None), len(batch))


class _Change(NamedTuple):
    """What L2 is to do: hold `frame`; only where it lacks it (demoted); or, without a frame, delete."""

    chunk_id: bytes
    frame: Frame | None
    demoted: bool = False


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


def _write(l2: Tier, batch: Sequence[_Change]) -> tuple[int, int]:
    """Do it; chunks written, and how many of them were demoted. Of several changes of one chunk the last counts."""
    latest = {change.chunk_id: change for change in batch}
    deleted = [change.chunk_id for change in latest.values() if change.frame is None]
    if deleted:
        l2.delete_many(deleted)
    victims = [change.chunk_id for change in latest.values() if change.demoted]
    known = l2.contains_many(victims) if victims else set()
    frames = {chunk_id: change.frame for chunk_id, change in latest.items() if change.frame is not None and chunk_id not in known}
    if not frames or not l2.up:
        return 0, 0
    l2.put_many(frames)
    return len(frames), len(victims) - len(known)
