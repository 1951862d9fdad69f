"""The read path through the tiers: L1, then one shared fetch per chunk: L2 in one batch, then L3.

What always holds:

- **What is returned is what was stored.** A frame from L2 or L3 is decoded and its SHA-256 compared with the chunk id,
  in a worker thread, before anybody sees a byte. A bad L2 copy is deleted and the chunk read from L3. A bad L3 copy is read
  once more, because the transfer may be at fault, and then raises FrameCorruptError.
- **One fetch per chunk.** However many ask for a chunk while it is under way, they wait for the same fetch. Fetches run in the
  cache's own nursery: a caller that is cancelled leaves, and the fetch goes on for the others, and for L1.
- **L2 never hurts.** It is asked within `l2_timeout_s`, in threads of its own; after that, and whatever it says or
  does not say, L3 is asked. What goes to L2 goes in the background through a bounded queue that drops when it is full.
- Everything here runs on the trio thread, except for the pure functions at the end, so what stands between two awaits is
  atomic. A fetch that finds everything in L1 takes no checkpoint.

What comes in (fetched, or written by this host: `add`) is in L1 at once, plain; an encoder compresses it there in the
background and hands on what L2 should have. So a reader never waits for a compressor, unless the encoder is behind:
then fetches compress before they answer, which slows them to what the machine can do. L1's victims go to L2 where it lacks them.

The bytes in queues and in flight are accounted in L1 ("queues", "fetch"), under its cap.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Final, Generic, NamedTuple, Protocol, TypeVar

import trio

from novafs.asynctools import open_nursery
from novafs.cache.base import Frame, Tier, TierStatistics
from novafs.cache.memory import MemoryStatistics, MemoryTier
from novafs.chunk import ID_SIZE, Reference
from novafs.codec import PLAIN_MAX, Codec, decode, encode
from novafs.errors import BugError, CorruptionError, FrameCorruptError, ObjectNotFoundError, StoreUnavailableError

log = logging.getLogger(__name__)

T = TypeVar("T")

BATCH_BYTES: Final = 4 << 20
"""Plain bytes that one step of a fetch covers: one MGET, and the unit in which a long read is delivered."""
BATCH_CHUNKS_MAX: Final = 256
VERIFY_CHUNKS_MIN: Final = 4
"""Fewer are not worth a second thread: a hop costs what decoding and hashing a 64 KiB chunk does, about 0.1 ms."""
ENCODE_CHUNKS_MAX: Final = 16
WRITE_CHUNKS_MAX: Final = 64
QUEUE_BYTES_MAX: Final = 32 << 20
"""For both queues together; or an eighth of L1, where that is less."""
L2_THREADS: Final = 8

_HOLE: Final = bytes(ID_SIZE)


class FrameSource(Protocol):
    """Where L3's frames come from: `novafs.cache.packs.PackSource`."""

    async def read_frames(self, references: Sequence[Reference]) -> list[bytes]:
        """The payloads, in the order asked; unverified."""
        ...


@dataclass(frozen=True, slots=True)
class TrafficStatistics:
    """What fetches asked of L2 or L3, and got.

    requests: batches. hits, misses: chunks. read_bytes: payloads. seconds: sum over the requests, verification excluded.
    corruptions: frames that were not what they should be (in L3 each try counts). timeouts, errors: requests without an answer.
    """

    requests: int
    hits: int
    misses: int
    read_bytes: int
    seconds: float
    corruptions: int
    timeouts: int
    errors: int


@dataclass(frozen=True, slots=True)
class CacheStatistics:
    """l1, l2: the tiers' own counters. l2_traffic, l3_traffic: what this cache asked of them.

    fetches: chunks that were fetched. shared_fetches: chunks that were asked for while their fetch was under way. added: own writes.
    fills: chunks written to L2 (demotions included). demotions: L1's victims among them. fills_dropped: chunks that did not get there because
    a queue was full. uncompressed: chunks that stay plain in L1 for the same reason.
    """

    l1: MemoryStatistics
    l2: TierStatistics | None
    l2_traffic: TrafficStatistics
    l3_traffic: TrafficStatistics
    fetches: int
    shared_fetches: int
    added: int
    fills: int
    demotions: int
    fills_dropped: int
    uncompressed: int
    queued_bytes: int


class ChunkCache:
    """The tiers of one volume. Use inside `async with cache.running()`."""

    def __init__(
        self,
        *,
        l1: MemoryTier,
        l2: Tier | None,
        l3: FrameSource,
        chunk_size: int,
        l2_codec: Codec,
        l2_timeout_s: float = 0.5,
        threads: int | None = None,
    ) -> None:
        """l2_codec: of what is written to L2; what is read from it says its own. threads: that verify and compress; default: one per CPU."""
        self.l1 = l1
        self.l2 = l2
        self.peek: Callable[[bytes], bytes | None] = l1.peek
        """The plain content of a chunk from L1, or None. No checkpoint, no thread. It *is* L1's method: one call less on the hot path."""
        self._l3 = l3
        self._chunk_size = chunk_size
        self._batch_chunks = max(1, min(BATCH_CHUNKS_MAX, BATCH_BYTES // chunk_size))
        self._l2_codec = l2_codec
        self._l2_timeout_s = l2_timeout_s
        self._nursery: trio.Nursery | None = None
        self._flights: dict[bytes, _Flight] = {}
        """Invariant: a flight is here exactly while its fetch runs in the nursery."""
        self._thread_count = threads or os.cpu_count() or 1
        self._workers = trio.CapacityLimiter(self._thread_count)
        self._l2_readers = trio.CapacityLimiter(L2_THREADS)
        self._l2_writers = trio.CapacityLimiter(1)
        self._queue_bytes = min(QUEUE_BYTES_MAX, l1.capacity_bytes // 8)
        self._to_encode: _Queue[_Arrival] = _Queue(self._queue_bytes // 2)
        self._to_l2: _Queue[_Change] = _Queue(self._queue_bytes // 2)

        self._l2_traffic = _Traffic()
        self._l3_traffic = _Traffic()
        self._fetches = 0
        self._shared_fetches = 0
        self._added = 0
        self._fills = 0
        self._demotions = 0
        self._fills_dropped = 0
        self._uncompressed = 0

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """The cache's background: fetches, encoder, writer to L2. On leaving, what is still under way is given up."""
        if self._nursery is not None:
            raise BugError("ChunkCache.running() is entered twice")
        async with open_nursery() as nursery:
            self._nursery = nursery
            self.l1.set_reserved("queues", self._queue_bytes)
            nursery.start_soon(self._encode_forever)
            if self.l2 is not None:
                self.l1.on_evict = self._demote
                nursery.start_soon(self._write_forever, self.l2)
            try:
                yield
            finally:
                self._nursery = None
                self.l1.on_evict = None
                self.l1.set_reserved("queues", 0)
                nursery.cancel_scope.cancel()

    # --- reading ----------------------------------------------------------------------------------------------

    async def fetch(self, references: Sequence[Reference]) -> list[bytes]:
        """Plain contents in the order asked: chunks, map nodes, directory pages. A chunk may be asked for more than once.

        Raises the first error in the order asked: FrameCorruptError (a bad copy in L3, read twice), ObjectNotFoundError
        (the pack is gone; names chunk and pack), StoreUnavailableError and what else the store raises. The other chunks are
        in L1 all the same.
        """
        plains: list[bytes | None] = []
        waiting: list[tuple[int, Reference, _Flight]] = []
        fresh: list[_Flight] = []
        for reference in references:
            plain = self.peek(reference.chunk_id)
            plains.append(plain)
            if plain is None:
                flight = self._flights.get(reference.chunk_id)
                if flight is None:
                    flight = self._depart(reference)
                    fresh.append(flight)
                else:
                    self._shared_fetches += 1
                waiting.append((len(plains) - 1, reference, flight))
        self.l1.count_misses(len(waiting))
        for start in range(0, len(fresh), self._batch_chunks):
            self._start(fresh[start : start + self._batch_chunks])
        for at, reference, flight in waiting:
            plains[at] = await self._arrival(reference, flight)
        return [plain for plain in plains if plain is not None]

    def present(self, chunk_id: bytes) -> bool:
        """Whether it is in L1 or on its way. Counts nothing, notes no access."""
        return chunk_id in self._flights or self.l1.contains(chunk_id)

    # --- what this host has written -----------------------------------------------------------------------------

    def add(self, chunk_id: bytes, plain: bytes, frame: Frame | None = None) -> None:
        """A chunk that this host has just stored: into L1, and in the background into L2.

        frame: of `plain` in any codec, where the caller has one; saves compressing it again for a tier of that codec.
        """
        self._added += 1
        known = self.l1.contains(chunk_id)
        self._admit(_Arrival(chunk_id, bytes(plain), frame, wants_l2=not known))

    def drop(self, chunk_ids: Iterable[bytes]) -> None:
        """Give the chunks up in L1, and in the background in L2."""
        for chunk_id in chunk_ids:
            self.l1.drop_many([chunk_id])
            self._delete_from_l2(chunk_id)

    def statistics(self) -> CacheStatistics:
        """A snapshot of the counters."""
        return CacheStatistics(
            l1=self.l1.statistics(),
            l2=None if self.l2 is None else self.l2.statistics(),
            l2_traffic=self._l2_traffic.snapshot(),
            l3_traffic=self._l3_traffic.snapshot(),
            fetches=self._fetches,
            shared_fetches=self._shared_fetches,
            added=self._added,
            fills=self._fills,
            demotions=self._demotions,
            fills_dropped=self._fills_dropped,
            uncompressed=self._uncompressed,
            queued_bytes=self._to_encode.used_bytes + self._to_l2.used_bytes,
        )

    async def wait_idle(self) -> None:
        """Until nothing is being fetched, compressed or written to L2: for orderly ends, and for tests."""
        while True:
            if self._flights:
                await next(iter(self._flights.values())).done.wait()
            elif not self._to_encode.idle.is_set():
                await self._to_encode.idle.wait()
            elif not self._to_l2.idle.is_set():
                await self._to_l2.idle.wait()
            else:
                return

    # --- fetching ---------------------------------------------------------------------------------------------

    def _depart(self, reference: Reference) -> _Flight:
        if reference.chunk_id == _HOLE:
            raise BugError("a hole was asked of the cache: it has no content to fetch")
        if self._nursery is None:
            raise BugError("ChunkCache.fetch() outside of running()")
        flight = _Flight(reference)
        self._flights[reference.chunk_id] = flight
        self._fetches += 1
        return flight

    def _start(self, flights: list[_Flight]) -> None:
        if self._nursery is None:
            raise BugError("ChunkCache.fetch() outside of running()")
        self._nursery.start_soon(self._fly, flights)

    async def _arrival(self, reference: Reference, flight: _Flight) -> bytes:
        await flight.done.wait()
        if flight.error is not None and not _same_place(reference, flight.reference):
            # The fetch was somebody else's and read another copy of the chunk; what befell that one says nothing of ours.
            again = self.peek(reference.chunk_id)
            if again is not None:
                return again
            flight = self._flights.get(reference.chunk_id) or flight
            if flight.done.is_set():
                flight = self._depart(reference)
                self._start([flight])
            await flight.done.wait()
        if flight.error is not None:
            raise _again(flight.error) from flight.error
        if flight.plain is None:
            raise BugError(f"chunk {reference.chunk_id.hex()}: its fetch ended without content and without an error")
        return flight.plain

    async def _fly(self, flights: list[_Flight]) -> None:
        """Fetch some chunks; every flight is done when this returns, however it does."""
        in_flight_bytes = sum(self._chunk_size + flight.reference.length for flight in flights)
        reserved = self.l1.reserve("fetch", in_flight_bytes)
        try:
            missing = await self._from_l2(flights)
            packs: dict[bytes, list[_Flight]] = {}
            for flight in missing:
                packs.setdefault(flight.reference.pack_id, []).append(flight)
            async with open_nursery() as nursery:
                for part in packs.values():
                    nursery.start_soon(self._from_pack, part)
        except Exception as error:  # whoever waits gets it, and the cache lives on
            for flight in flights:
                self._land(flight, error=error)
        finally:
            if reserved:
                self.l1.release("fetch", in_flight_bytes)
            for flight in flights:
                self._land(flight, error=StoreUnavailableError(f"chunk {flight.reference.chunk_id.hex()}: the volume is being closed"))

    def _land(self, flight: _Flight, *, plain: bytes | None = None, error: Exception | None = None) -> None:
        """The flight is over; the first call counts."""
        if not flight.done.is_set():
            flight.plain = plain
            flight.error = error
            del self._flights[flight.reference.chunk_id]
            flight.done.set()

    async def _from_l2(self, flights: list[_Flight]) -> list[_Flight]:
        """Land what L2 has; the others."""
        l2, traffic = self.l2, self._l2_traffic
        if l2 is None or not l2.up:
            return flights
        ids = [flight.reference.chunk_id for flight in flights]
        frames: dict[bytes, Frame] | None = None
        traffic.requests += 1
        started_s = trio.current_time()
        try:
            with trio.move_on_after(self._l2_timeout_s) as patience:
                frames = await trio.to_thread.run_sync(l2.get_many, ids, limiter=self._l2_readers, abandon_on_cancel=True)
        except Exception:  # a tier raises nothing by contract; a mistake in one must not become a guest's EIO
            log.exception("L2 failed to answer; reading from L3")
            traffic.errors += 1
        traffic.seconds += trio.current_time() - started_s
        if frames is None:
            traffic.timeouts += patience.cancelled_caught
            return flights
        found = [flight for flight in flights if flight.reference.chunk_id in frames]
        checked = await self._verified([(flight.reference.chunk_id, frames[flight.reference.chunk_id]) for flight in found])
        for flight, item in zip(found, checked, strict=True):
            chunk_id = flight.reference.chunk_id
            traffic.read_bytes += len(frames[chunk_id].payload)
            if isinstance(item, CorruptionError):
                traffic.corruptions += 1
                log.warning("L2 holds a bad copy of chunk %s (%s): deleted, reading it from L3", chunk_id.hex(), item)
                self._delete_from_l2(chunk_id)
            else:
                traffic.hits += 1
                self._admit(_Arrival(chunk_id, item.plain, item.l1_frame or frames[chunk_id], wants_l2=False))
                self._land(flight, plain=item.plain)
        missing = [flight for flight in flights if not flight.done.is_set()]
        traffic.misses += len(missing)
        return missing

    async def _from_pack(self, flights: list[_Flight]) -> None:
        """Land chunks that lie in one pack, with content or error: what is wrong with a pack is no matter of others."""
        try:
            bad = await self._read_pack(flights)
            if bad:
                # Perhaps only the transfer went wrong. What is bad twice is bad in the store.
                bad = await self._read_pack(list(bad))
            for flight, reason in bad.items():
                place = flight.reference
                where = f"pack {place.pack_id.hex()}"
                self._land(flight, error=FrameCorruptError(place.chunk_id, where, place.offset, str(reason)))
        except ObjectNotFoundError as error:
            self._pack_gone(flights, error)
        except Exception as error:  # every waiter gets it
            for flight in flights:
                self._land(flight, error=error)

    def _pack_gone(self, flights: list[_Flight], error: ObjectNotFoundError) -> None:
        """The one place that knows that a pack is not where the references say: a compaction may have moved its frames."""
        self._l3_traffic.errors += 1
        for flight in flights:
            if not flight.done.is_set():
                place = flight.reference
                gone = ObjectNotFoundError(
                    f"chunk {place.chunk_id.hex()}: its pack {place.pack_id.hex()} is gone from the store ({error}); run 'novafs fsck'"
                )
                gone.__cause__ = error
                self._land(flight, error=gone)

    async def _read_pack(self, flights: list[_Flight]) -> dict[_Flight, CorruptionError]:
        """Land those whose content is right; the others, with what is wrong."""
        traffic = self._l3_traffic
        bad: dict[_Flight, CorruptionError] = {}
        wanted = []
        for flight in flights:
            if flight.reference.length > PLAIN_MAX:
                # Not read at all: a damaged reference must not make the host fetch gigabytes.
                bad[flight] = CorruptionError(
                    f"its reference names a payload of {flight.reference.length} bytes, at most {PLAIN_MAX} can be"
                )
                traffic.corruptions += 1
            else:
                wanted.append(flight)
        if not wanted:
            return bad
        traffic.requests += 1
        started_s = trio.current_time()
        try:
            payloads = await self._l3.read_frames([flight.reference for flight in wanted])
        except ObjectNotFoundError:
            raise
        except Exception:
            traffic.errors += 1
            raise
        finally:
            traffic.seconds += trio.current_time() - started_s
        frames = [Frame(flight.reference.codec, payload) for flight, payload in zip(wanted, payloads, strict=True)]
        checked = await self._verified([(flight.reference.chunk_id, frame) for flight, frame in zip(wanted, frames, strict=True)])
        for flight, frame, item in zip(wanted, frames, checked, strict=True):
            place = flight.reference
            traffic.read_bytes += len(frame.payload)
            if isinstance(item, CorruptionError):
                traffic.corruptions += 1
                bad[flight] = item
                log.warning("chunk %s in pack %s at %d: %s", place.chunk_id.hex(), place.pack_id.hex(), place.offset, item)
            else:
                traffic.hits += 1
                self._admit(_Arrival(place.chunk_id, item.plain, item.l1_frame or frame, wants_l2=True))
                self._land(flight, plain=item.plain)
        return bad

    async def _verified(self, items: Sequence[tuple[bytes, Frame]]) -> list[_Content | CorruptionError]:
        """Decode and check in worker threads, several frames a hop."""
        if not items:
            return []
        # Behind: then compress here, before anybody is answered, so that readers run no faster than the encoder.
        l1_codec = self.l1.codec if 2 * self._to_encode.used_bytes > self._to_encode.capacity_bytes else None
        size = max(VERIFY_CHUNKS_MIN, -(-len(items) // self._thread_count))
        parts = [items[start : start + size] for start in range(0, len(items), size)]
        checked: list[list[_Content | CorruptionError]] = [[] for _ in parts]

        async def check(number: int) -> None:
            checked[number] = await trio.to_thread.run_sync(_verify, parts[number], l1_codec, limiter=self._workers)

        if len(parts) == 1:
            await check(0)
        else:
            async with open_nursery() as nursery:
                for number in range(len(parts)):
                    nursery.start_soon(check, number)
        return [item for part in checked for item in part]

    # --- into L1, and on to L2 ----------------------------------------------------------------------------------

    def _admit(self, arrival: _Arrival) -> None:
        """Into L1 at once; to the encoder what is to be compressed there or to go to L2."""
        frame = arrival.frame
        fits_l1 = frame is not None and frame.codec in (self.l1.codec, Codec.NONE)
        self.l1.insert(arrival.chunk_id, arrival.plain, frame if fits_l1 else None)
        wants_l2 = arrival.wants_l2 and self.l2 is not None and self.l2.up
        if not wants_l2 and fits_l1:
            return
        work = arrival._replace(wants_l1=not fits_l1, wants_l2=wants_l2)
        if not self._to_encode.put(work, len(arrival.plain)):
            self._uncompressed += work.wants_l1
            self._fills_dropped += wants_l2

    async def _encode_forever(self) -> None:
        while True:
            batch = await self._to_encode.get_batch(ENCODE_CHUNKS_MAX)
            try:
                done = await trio.to_thread.run_sync(_encode, batch, self.l1.codec, self._l2_codec, limiter=self._workers)
            finally:
                self._to_encode.finish(batch_bytes := sum(len(arrival.plain) for arrival in batch), len(batch))
            del batch_bytes
            for arrival, (l1_frame, l2_frame) in zip(batch, done, strict=True):
                if l1_frame is not None:
                    self.l1.compact(arrival.chunk_id, l1_frame)
                if l2_frame is not None and not self._to_l2.put(_Change(arrival.chunk_id, l2_frame), len(l2_frame.payload)):
                    self._fills_dropped += 1

    def _demote(self, victims: list[tuple[bytes, Frame]]) -> None:
        """L1's victims, to L2 where it lacks them; in whatever codec they are, because a value there says its own."""
        if self.l2 is not None and self.l2.up:
            for chunk_id, frame in victims:
                if not self._to_l2.put(_Change(chunk_id, frame, demoted=True), len(frame.payload)):
                    self._fills_dropped += 1

    def _delete_from_l2(self, chunk_id: bytes) -> None:
        if self.l2 is not None:
            self._to_l2.put(_Change(chunk_id, None), 0)

    async def _write_forever(self, l2: Tier) -> None:
        while True:
            batch = await self._to_l2.get_batch(WRITE_CHUNKS_MAX)
            size = sum(len(change.frame.payload) for change in batch if change.frame is not None)
            try:
                filled, demoted = await trio.to_thread.run_sync(_write, l2, batch, limiter=self._l2_writers)
            except Exception:  # as in `_from_l2`
                log.exception("L2 failed to take %d chunks", len(batch))
            else:
                self._fills += filled
                self._demotions += demoted
            finally:
                self._to_l2.finish(size, len(batch))


# --- parts ------------------------------------------------------------------------------------------------------


class _Flight:
    """One chunk's fetch. `done` is set once, by `_land`, with exactly one of content and error."""

    __slots__ = ("done", "error", "plain", "reference")

    def __init__(self, reference: Reference) -> None:
        self.reference = reference
        self.done = trio.Event()
        self.plain: bytes | None = None
        self.error: Exception | None = None


class _Arrival(NamedTuple):
    """A verified chunk. frame: of it, in any codec, if there is one. wants_l1: to be compressed there."""

    chunk_id: bytes
    plain: bytes
    frame: Frame | None
    wants_l2: bool
    wants_l1: bool = False


class _Change(NamedTuple):
    """What L2 is to do: hold `frame`; only where it lacks it (demoted); or, without a frame, delete."""

    chunk_id: bytes
    frame: Frame | None
    demoted: bool = False


class _Content(NamedTuple):
    """Verified. l1_frame: of `plain` in L1's codec, where it was asked for."""

    plain: bytes
    l1_frame: Frame | None


class _Queue(Generic[T]):
    """Bounded by bytes, what is being worked on included; `put` never waits."""

    ITEMS_MAX: Final = 8192
    """For items of few bytes or none."""

    def __init__(self, capacity_bytes: int) -> None:
        self.capacity_bytes = capacity_bytes
        self.used_bytes = 0
        self.idle = trio.Event()
        self.idle.set()
        self._items: deque[T] = deque()
        self._open = 0
        self._filled = trio.Event()

    def put(self, item: T, size: int) -> bool:
        """Whether there was room."""
        if self.used_bytes + size > self.capacity_bytes or self._open >= self.ITEMS_MAX:
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


class _Traffic:
    """The counters behind `TrafficStatistics`."""

    def __init__(self) -> None:
        self.requests = self.hits = self.misses = self.read_bytes = self.corruptions = self.timeouts = self.errors = 0
        self.seconds = 0.0

    def snapshot(self) -> TrafficStatistics:
        return TrafficStatistics(
            requests=self.requests,
            hits=self.hits,
            misses=self.misses,
            read_bytes=self.read_bytes,
            seconds=self.seconds,
            corruptions=self.corruptions,
            timeouts=self.timeouts,
            errors=self.errors,
        )


def _same_place(one: Reference, other: Reference) -> bool:
    return one.pack_id == other.pack_id and one.offset == other.offset


def _again(error: Exception) -> Exception:
    """A copy to raise: one error reaches several waiters, and raising one object in several tasks mixes up their tracebacks."""
    copy = type(error).__new__(type(error), *error.args)
    copy.__dict__.update(error.__dict__)
    return copy


# Pure functions, run in worker threads.


def _verify(items: Sequence[tuple[bytes, Frame]], l1_codec: Codec | None) -> list[_Content | CorruptionError]:
    checked: list[_Content | CorruptionError] = []
    for chunk_id, frame in items:
        try:
            plain = decode(frame.codec, frame.payload, PLAIN_MAX)
        except CorruptionError as error:
            checked.append(error)
            continue
        digest = hashlib.sha256(plain).digest()
        if digest != chunk_id:
            checked.append(CorruptionError(f"its content hashes to {digest.hex()}"))
        else:
            compress = l1_codec is not None and frame.codec not in (l1_codec, Codec.NONE)
            checked.append(_Content(plain, encode(plain, l1_codec) if compress and l1_codec is not None else None))
    return checked


def _encode(batch: Sequence[_Arrival], l1_codec: Codec, l2_codec: Codec) -> list[tuple[Frame | None, Frame | None]]:
    """Frames for L1 and L2, None where none is wanted. What is plain in one codec is plain in all: it does not compress."""
    done = []
    for chunk_id, plain, frame, wants_l2, wants_l1 in batch:
        del chunk_id
        made = {} if frame is None else {frame.codec: frame}
        incompressible = made.get(Codec.NONE)

        def frame_in(codec: Codec, plain: bytes = plain, made: dict[int, Frame] = made, kept: Frame | None = incompressible) -> Frame:
            found = kept or made.get(codec)
            if found is None:
                found = made[codec] = encode(plain, codec)
            return found

        done.append((frame_in(l1_codec) if wants_l1 else None, frame_in(l2_codec) if wants_l2 else None))
    return done


def _write(l2: Tier, batch: Sequence[_Change]) -> tuple[int, int]:
    """Do it; chunks written, and how many of them were demoted. Of several changes of one chunk the last counts."""
    latest: Mapping[bytes, _Change] = {change.chunk_id: change for change in batch}
    deleted = [change.chunk_id for change in latest.values() if change.frame is None]
    if deleted:
        l2.delete_many(deleted)
    wanted = {change.chunk_id: change.frame for change in latest.values() if change.frame is not None}
    victims = [change.chunk_id for change in latest.values() if change.demoted]
    known = l2.contains_many(victims) if victims else set()
    frames = {chunk_id: frame for chunk_id, frame in wanted.items() if chunk_id not in known}
    if frames and l2.up:
        l2.put_many(frames)
    return len(frames), len(victims) - len(known)
