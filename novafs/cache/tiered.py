"""The read path through the tiers: L1, then one shared fetch per chunk: L2 in one batch, then L3.

What always holds:

- **What is returned is what was stored.** A frame from L2 or L3 is decoded and its SHA-256 compared with the chunk id,
  in a worker thread, before anybody sees a byte. A bad L2 copy is deleted and the chunk read from L3. A bad L3 copy is read
  once more, because the transfer may be at fault, and then raises FrameCorruptError.
- **One fetch per chunk.** However many ask for a chunk while it is under way, they wait for the same fetch. Fetches run in the
  cache's own nursery: a caller that is cancelled leaves, and the fetch goes on for the others, and for L1.
- **L2 never hurts.** It is asked within `l2_timeout_s`, in threads of its own; after that, and whatever it says or
  does not say, L3 is asked. When it was too slow it is not asked at all for a second, then two, up to ten, so that an L2
  that answers late costs a time-out now and then and not one for every read.
- Everything here runs on the trio thread, except for the pure function at the end, so what stands between two awaits is
  atomic. A fetch that finds everything in L1 takes no checkpoint.

What comes in (fetched, or written by this host: `add`) is in L1 at once, in the frame that it came in if there is one. What has
none is compressed, and L2 filled, in the background (`fill`). So a reader never waits for a compressor.

A delta frame (`novafs.delta`) takes the content of its base to be read: from L1, from L2, else from the frames of its chain in L3,
all at once. Those fetches are the reader's own and shared with nobody, so none ever waits for one that waits for it.

Bytes in flight are accounted in L1 ("fetch"), under its cap, where there is room for them.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import math
import os
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import asynccontextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import Final, NamedTuple, Protocol

import trio

from novafs import delta
from novafs.asynctools import open_nursery
from novafs.cache.base import Frame, Tier, TierStatistics
from novafs.cache.fill import Arrival, Filler, FillStatistics, Source
from novafs.cache.memory import MemoryStatistics, MemoryTier
from novafs.chunk import ID_SIZE, Reference
from novafs.codec import PLAIN_MAX, Codec, decode
from novafs.errors import BugError, CorruptionError, FrameCorruptError, NovaError, ObjectNotFoundError, StoreUnavailableError
from novafs.latency import LatencyBook

log = logging.getLogger(__name__)

BATCH_BYTES: Final = 4 << 20
"""Plain bytes that one step of a fetch covers: one batch of L2, and the unit in which a long read is delivered."""
BATCH_CHUNKS_MAX: Final = 256
VERIFY_CHUNKS_MIN: Final = 4
"""Fewer are not worth a second thread: a hop costs what decoding and hashing a 64 KiB chunk does, about 0.1 ms."""
PREFETCH_VERIFY_CHUNKS: Final = 16
L2_THREADS: Final = 8
L2_PAUSE_S_MIN: Final = 1.0
L2_PAUSE_S_MAX: Final = 10.0
GONE_MAX: Final = 4096
HOPS_MAX: Final = 8
"""How often one fetch follows frames that were moved again."""

_HOLE: Final = bytes(ID_SIZE)


Relocate = Callable[[Sequence[Reference], AbstractSet[bytes]], Awaitable[dict[bytes, Reference]]]
"""Where frames are now whose packs are gone, or that are damaged where they were: chunk id -> place in none of the packs given."""


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
    """l1, l2: the tiers' own counters. l2_traffic, l3_traffic: what this cache asked of them. fill: the background's.

    fetches: chunks that were fetched. shared_fetches: times that a chunk was asked for while its fetch was under way. added: own writes.
    """

    l1: MemoryStatistics
    l2: TierStatistics | None
    l2_traffic: TrafficStatistics
    l3_traffic: TrafficStatistics
    fill: FillStatistics
    fetches: int
    shared_fetches: int
    added: int


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
        relocate: Relocate | None = None,
        latencies: LatencyBook | None = None,
    ) -> None:
        """l2_codec: of what is written to L2; what is read from it says its own. threads: that verify; default: one per CPU.

        relocate: asked about frames that are not, or not whole, where their references say. latencies: where reads and writes of
        the tiers are noted.
        """
        self.latencies = latencies if latencies is not None else LatencyBook()
        self._l2_gets, self._l3_gets = self.latencies.of("l2", "get"), self.latencies.of("l3", "get")
        self.l1 = l1
        self.l2 = l2
        self.peek: Callable[[bytes], bytes | None] = l1.peek
        """The plain content of a chunk from L1, or None. No checkpoint, no thread. It *is* L1's method: one call less on the hot path."""
        self._l3 = l3
        self._relocate = relocate
        self._gone: OrderedDict[bytes, None] = OrderedDict()
        """Packs that were found gone and forwarded, latest last: these are not asked for in vain again."""
        self._chunk_size = chunk_size
        self._batch_chunks = max(1, min(BATCH_CHUNKS_MAX, BATCH_BYTES // chunk_size))
        self._l2_timeout_s = l2_timeout_s
        self._l2_pause_s = 0.0
        """How long L2 is left alone after its last time-out; 0: it answered since."""
        self._l2_ask_from_s = -math.inf
        self.on_evicted: Callable[[Sequence[bytes]], None] | None = None
        """Told the ids of chunks that L1 has evicted. Must not call back into the tiers."""
        self.on_l3_read: Callable[[float, bool], None] | None = None
        """Told how many seconds reading frames of one pack took, verification excluded, and whether somebody waited for them."""
        self.on_delta_read: Callable[[Reference, delta.Chain, int, int], None] | None = None
        """Told of each delta frame that was read from L3: its place, its chain, how many frames were read for it, and their bytes.
        The chain only where all its frames were read where it says that they are: content from memory proves no place."""
        self._nursery: trio.Nursery | None = None
        self._flights: dict[bytes, _Flight] = {}
        """Invariant: a flight is here exactly while its fetch runs in the nursery; none of a base is (`_base`)."""
        self._thread_count = threads or os.cpu_count() or 1
        self._workers = trio.CapacityLimiter(self._thread_count)
        self._prefetch_workers = trio.CapacityLimiter(1)
        self._l2_readers = trio.CapacityLimiter(L2_THREADS)
        self._filler = Filler(l1=l1, l2=l2, l2_codec=l2_codec, latencies=self.latencies)

        self._l2_traffic = _Traffic()
        self._l3_traffic = _Traffic()
        self._fetches = 0
        self._shared_fetches = 0
        self._added = 0

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """The cache's background. On leaving, what is still under way is given up."""
        if self._nursery is not None:
            raise BugError("ChunkCache.running() is entered twice")
        async with open_nursery() as nursery:
            self._nursery = nursery
            self._filler.start(nursery)
            demote = self.l1.on_evict

            def on_evict(evicted: list[tuple[bytes, Frame]]) -> None:
                if demote is not None:
                    demote(evicted)
                if self.on_evicted is not None:
                    self.on_evicted([chunk_id for chunk_id, _ in evicted])

            self.l1.on_evict = on_evict
            try:
                yield
            finally:
                self._nursery = None
                self._filler.stop()
                nursery.cancel_scope.cancel()

    # --- reading ----------------------------------------------------------------------------------------------

    async def fetch(self, references: Sequence[Reference], places: Sequence[int] = ()) -> list[bytes]:
        """Plain contents in the order asked: chunks, map nodes, directory pages. A chunk may be asked for more than once.

        places: where images hold them, in the same order, for the policy that evicts; none: nobody says.

        Raises the first error in the order asked: FrameCorruptError (a bad copy in L3, read twice), ObjectNotFoundError
        (the pack is gone; names chunk and pack), StoreUnavailableError and what else the store raises. The fetch of the others
        goes on, into L1.
        """
        plains: list[bytes | None] = []
        waiting: list[tuple[int, Reference, _Flight]] = []
        fresh: list[_Flight] = []
        for number, reference in enumerate(references):
            plain = self.peek(reference.chunk_id)
            plains.append(plain)
            if plain is None:
                flight = self._flights.get(reference.chunk_id)
                if flight is None:
                    flight = self._depart(reference)
                    flight.where = places[number] if places else -1
                    fresh.append(flight)
                else:
                    self._shared_fetches += 1
                    flight.prefetched = False
                waiting.append((len(plains) - 1, reference, flight))
        self.l1.count_misses(len(waiting))
        for start in range(0, len(fresh), self._batch_chunks):
            self._start(fresh[start : start + self._batch_chunks])
        for at, reference, flight in waiting:
            plains[at] = await self._arrival(reference, flight)
        return [plain for plain in plains if plain is not None]

    def prefetch(self, reference: Reference, place: int = -1) -> _Flight | None:
        """Make ready to fetch a chunk that nobody has asked for yet; None where it is here or on its way. `start_prefetches` sends it."""
        if self.present(reference.chunk_id) or self._nursery is None:
            return None
        flight = self._depart(reference)
        flight.prefetched = True
        flight.where = place
        return flight

    def start_prefetches(self, flights: list[_Flight]) -> None:
        """Fetch what `prefetch` gave, joined into as few requests as it takes; in the same step as those calls.

        Whoever asks for one of the chunks meanwhile shares its fetch. A failure is nobody's but theirs.
        """
        for start in range(0, len(flights), self._batch_chunks):
            self._start(flights[start : start + self._batch_chunks])

    def present(self, chunk_id: bytes) -> bool:
        """Whether it is in L1 or on its way. Counts nothing, notes no access."""
        return chunk_id in self._flights or self.l1.contains(chunk_id)

    # --- what this host has written -----------------------------------------------------------------------------

    def add(self, chunk_id: bytes, plain: bytes, frame: Frame | None = None) -> None:
        """A chunk that this host has just stored: into L1, and in the background into L2.

        frame: of `plain` in any codec, where the caller has one; saves compressing it again for a tier of that codec.
        """
        self._added += 1
        if self.l1.contains(chunk_id):
            self.l1.insert(chunk_id, plain)  # read again, so to speak; L2 has had it, too, or gets it when it leaves
        else:
            self._filler.admit(Arrival(chunk_id, bytes(plain), frame, Source.WRITE))

    def set_l1_capacity(self, capacity_bytes: int) -> None:
        """Another cap for L1 and what waits beside it; what is over it leaves at once, so a much smaller one is best reached in steps."""
        self.l1.set_capacity(capacity_bytes)
        self._filler.refit()

    def drop(self, chunk_ids: Iterable[bytes]) -> None:
        """Give the chunks up in L1, and in the background in L2."""
        for chunk_id in chunk_ids:
            self.l1.drop_many([chunk_id])
            self._filler.delete(chunk_id)

    def statistics(self) -> CacheStatistics:
        """A snapshot of the counters."""
        return CacheStatistics(
            l1=self.l1.statistics(),
            l2=None if self.l2 is None else self.l2.statistics(),
            l2_traffic=self._l2_traffic.snapshot(),
            l3_traffic=self._l3_traffic.snapshot(),
            fill=self._filler.statistics(),
            fetches=self._fetches,
            shared_fetches=self._shared_fetches,
            added=self._added,
        )

    async def wait_idle(self) -> None:
        """Until nothing is being fetched, compressed or written to L2: for orderly ends, and for tests."""
        while True:
            if self._flights:
                await next(iter(self._flights.values())).done.wait()
            else:
                await self._filler.wait_idle()
                if not self._flights:
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
        while True:
            if not flight.done.is_set():  # else it would be a checkpoint, and a turn of the event loop, for each chunk of a read
                await flight.done.wait()
            if flight.plain is not None:
                return flight.plain
            if flight.error is None:
                raise BugError(f"chunk {reference.chunk_id.hex()}: its fetch ended without content and without an error")
            if _same_place(reference, flight.reference):
                raise _again(flight.error) from flight.error
            # The fetch was somebody else's and read another copy of the chunk; what befell that one says nothing of ours.
            plain = self.peek(reference.chunk_id)
            if plain is not None:
                return plain
            running = self._flights.get(reference.chunk_id)
            flight = running or self._depart(reference)
            if running is None:
                self._start([flight])

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
                if not flight.done.is_set():
                    self._land(flight, error=StoreUnavailableError(f"chunk {flight.reference.chunk_id.hex()}: the volume is being closed"))

    def _land(self, flight: _Flight, *, plain: bytes | None = None, error: Exception | None = None) -> None:
        """The flight is over; the first call counts."""
        if not flight.done.is_set():
            flight.plain = plain
            flight.error = error
            if not flight.of_base:
                del self._flights[flight.reference.chunk_id]
            flight.done.set()

    async def _from_l2(self, flights: list[_Flight]) -> list[_Flight]:
        """Land what L2 has; the others."""
        l2, traffic = self.l2, self._l2_traffic
        if l2 is None or not l2.up or trio.current_time() < self._l2_ask_from_s:
            return flights
        ids = [flight.reference.chunk_id for flight in flights]
        frames: dict[bytes, Frame] | None = None
        traffic.requests += 1
        started_s = perf_counter()
        try:
            with trio.move_on_after(self._l2_timeout_s) as patience:
                frames = await trio.to_thread.run_sync(l2.get_many, ids, limiter=self._l2_readers, abandon_on_cancel=True)
        except Exception:  # a tier raises nothing by contract; a mistake in one must not become a guest's EIO
            log.exception("L2 failed to answer; reading from L3")
            traffic.errors += 1
        took_s = perf_counter() - started_s
        traffic.seconds += took_s
        self._l2_gets.note(took_s)
        if frames is None:
            if patience.cancelled_caught:
                traffic.timeouts += 1
                self._leave_l2_alone()
            return flights
        self._l2_pause_s = 0.0
        found = [flight for flight in flights if flight.reference.chunk_id in frames]
        items = [_Item(flight.reference.chunk_id, frames[flight.reference.chunk_id]) for flight in found]
        checked = await self._verified(items, demand=_demanded(found))
        for flight, item in zip(found, checked, strict=True):
            chunk_id = flight.reference.chunk_id
            traffic.read_bytes += len(frames[chunk_id].payload)
            if isinstance(item, CorruptionError):
                traffic.corruptions += 1
                log.warning("L2 holds a bad copy of chunk %s (%s): deleted, reading it from L3", chunk_id.hex(), item)
                self._filler.delete(chunk_id)
            else:
                traffic.hits += 1
                arrival = Arrival(
                    chunk_id,
                    item,
                    frames[chunk_id],
                    Source.L2,
                    prefetched=flight.prefetched and not flight.of_base,
                    place=flight.where,
                )
                self._filler.admit(arrival)
                self._land(flight, plain=item)
        missing = [flight for flight in flights if not flight.done.is_set()]
        traffic.misses += len(missing)
        return missing

    def _leave_l2_alone(self) -> None:
        if trio.current_time() >= self._l2_ask_from_s:  # of several fetches that waited at the same time the first decides
            if not self._l2_pause_s:
                log.warning("L2 did not answer within %.2f s: reading from L3 and trying again later", self._l2_timeout_s)
            self._l2_pause_s = min(max(2 * self._l2_pause_s, L2_PAUSE_S_MIN), L2_PAUSE_S_MAX)
            self._l2_ask_from_s = trio.current_time() + self._l2_pause_s

    async def _from_pack(self, flights: list[_Flight], gone: AbstractSet[bytes] = frozenset()) -> None:
        """Land chunks that lie in one pack, with content or error: what is wrong with a pack is no matter of others."""
        try:
            bad = await self._read_pack(flights)
            if bad:
                # Perhaps only the transfer went wrong. What is bad twice is bad in the store.
                bad = await self._read_pack(list(bad))
            if bad:
                moved: dict[bytes, Reference] = {}
                with contextlib.suppress(NovaError):  # that they are damaged tells more than why no other copy was found
                    moved = await self._moved(list(bad), gone)
                for flight, reason in bad.items():
                    place = flight.place
                    if place.chunk_id in moved:
                        continue
                    if isinstance(reason, ObjectNotFoundError):
                        self._land(flight, error=_again(reason))
                    else:
                        where = f"pack {place.pack_id.hex()}"
                        self._land(flight, error=FrameCorruptError(place.chunk_id, where, place.offset, str(reason)))
                await self._from_places(list(bad), moved, gone)
        except ObjectNotFoundError as error:
            await self._pack_gone(flights, gone, error)
        except Exception as error:  # every waiter gets it
            for flight in flights:
                self._land(flight, error=error)

    async def _pack_gone(self, flights: list[_Flight], gone: AbstractSet[bytes], error: ObjectNotFoundError) -> None:
        """The one place that knows that a pack is not where the references say: a compaction may have moved its frames."""
        flights = [flight for flight in flights if not flight.done.is_set()]
        if not flights:
            return
        pack_id = flights[0].place.pack_id
        gone = gone | {pack_id}
        try:
            moved = await self._moved(flights, gone)
        except Exception as failure:  # every waiter gets it
            for flight in flights:
                self._land(flight, error=failure)
            return
        if moved:
            self._gone[pack_id] = None
            self._gone.move_to_end(pack_id)
            if len(self._gone) > GONE_MAX:
                self._gone.popitem(last=False)
        for flight in flights:
            place = flight.place
            if place.chunk_id not in moved:
                self._l3_traffic.errors += 1
                missing = ObjectNotFoundError(
                    f"chunk {place.chunk_id.hex()}: its pack {place.pack_id.hex()} is gone from the store ({error}); run 'novafs fsck'"
                )
                missing.__cause__ = error
                self._land(flight, error=missing)
        await self._from_places(flights, moved, gone)

    async def _moved(self, flights: list[_Flight], gone: AbstractSet[bytes]) -> dict[bytes, Reference]:
        if self._relocate is None or len(gone) > HOPS_MAX:
            return {}
        return await self._relocate([flight.reference for flight in flights], gone | {flight.place.pack_id for flight in flights})

    async def _from_places(self, flights: list[_Flight], moved: dict[bytes, Reference], gone: AbstractSet[bytes]) -> None:
        """Read those that were moved at the places where they are now."""
        packs: dict[bytes, list[_Flight]] = {}
        for flight in flights:
            if (place := moved.get(flight.reference.chunk_id)) is not None:
                gone = gone | {flight.place.pack_id}
                flight.place = place
                packs.setdefault(place.pack_id, []).append(flight)
        for part in packs.values():
            await self._from_pack(part, gone)

    async def _read_pack(self, flights: list[_Flight]) -> dict[_Flight, CorruptionError | ObjectNotFoundError]:
        """Land those whose content is right; the others, with what is wrong."""
        traffic = self._l3_traffic
        bad: dict[_Flight, CorruptionError | ObjectNotFoundError] = {}
        wanted = []
        for flight in flights:
            if flight.place.length > PLAIN_MAX:
                # Not read at all: a damaged reference must not make the host fetch gigabytes.
                bad[flight] = CorruptionError(f"its reference names a payload of {flight.place.length} bytes, at most {PLAIN_MAX} can be")
                traffic.corruptions += 1
            else:
                wanted.append(flight)
        if not wanted:
            return bad
        if wanted[0].place.pack_id in self._gone:
            raise ObjectNotFoundError("it was gone before")
        traffic.requests += 1
        started_s, demand = trio.current_time(), _demanded(wanted)  # as it was sent: who joins it waits shorter than it takes
        try:
            payloads = await self._l3.read_frames([flight.place for flight in wanted])
        except ObjectNotFoundError:
            raise
        except Exception:
            traffic.errors += 1
            raise
        finally:
            took_s = trio.current_time() - started_s
            traffic.seconds += took_s
            self._l3_gets.note(took_s)
            if self.on_l3_read is not None:
                self.on_l3_read(took_s, demand)
        frames = [Frame(flight.place.codec, payload) for flight, payload in zip(wanted, payloads, strict=True)]
        bases: dict[_Flight, bytes] = {}
        if any(frame.codec == Codec.HDE for frame in frames):
            bases, without = await self._bases(wanted, frames)
            bad.update(without)
            wanted, frames = _others(wanted, frames, bad)
        items = [_Item(flight.place.chunk_id, frame, bases.get(flight)) for flight, frame in zip(wanted, frames, strict=True)]
        checked = await self._verified(items, demand=_demanded(wanted))
        for flight, frame, item in zip(wanted, frames, checked, strict=True):
            place = flight.place
            traffic.read_bytes += len(frame.payload)
            if isinstance(item, CorruptionError):
                traffic.corruptions += 1
                bad[flight] = item
                log.warning("chunk %s in pack %s at %d: %s", place.chunk_id.hex(), place.pack_id.hex(), place.offset, item)
            else:
                traffic.hits += 1
                whole = frame if frame.codec != Codec.HDE else None
                prefetched = flight.prefetched and not flight.of_base
                arrival = Arrival(place.chunk_id, item, whole, Source.L3, prefetched=prefetched, place=flight.where)
                self._filler.admit(arrival)
                self._land(flight, plain=item)
        return bad

    # --- delta frames -----------------------------------------------------------------------------------------

    async def _bases(
        self, flights: Sequence[_Flight], frames: Sequence[Frame]
    ) -> tuple[dict[_Flight, bytes], dict[_Flight, CorruptionError | ObjectNotFoundError]]:
        """Of the flights whose frame is a delta, the content it was made against; or why there is none. Lands those that fail
        otherwise (the store is away)."""
        found: dict[_Flight, bytes] = {}
        without: dict[_Flight, CorruptionError | ObjectNotFoundError] = {}

        async def find(flight: _Flight, payload: bytes) -> None:
            try:
                chain = delta.read_chain(payload)
                found[flight] = await self._under(flight) if flight.of_base else await self._base(flight, chain)
            except CorruptionError as error:
                without[flight] = error
            except ObjectNotFoundError as error:
                without[flight] = ObjectNotFoundError(f"chunk {flight.place.chunk_id.hex()}: what it was made against is gone: {error}")
            except Exception as error:
                self._land(flight, error=error)

        async with open_nursery() as nursery:
            for flight, frame in zip(flights, frames, strict=True):
                if frame.codec == Codec.HDE:
                    nursery.start_soon(find, flight, frame.payload)
        return found, without

    async def _base(self, flight: _Flight, chain: delta.Chain) -> bytes:
        """The content of the chain's first frame. Raises CorruptionError, ObjectNotFoundError, and what the store raises."""
        missing: list[_Flight] = []
        plain: bytes | None = None
        for reference in chain:
            plain = self.peek(reference.chunk_id)
            if plain is not None:
                break
            missing.append(_Flight(reference, of_base=True))
        for base in missing:
            base.prefetched = flight.prefetched
        in_flight_bytes = sum(self._chunk_size + base.reference.length for base in missing)
        reserved = self.l1.reserve("fetch", in_flight_bytes)
        try:
            if missing:
                await self._from_l2(missing)
            for number, base in enumerate(missing):
                if base.plain is not None:  # what lies below it is not needed
                    plain, missing = base.plain, missing[:number]
                    break
            for number, base in enumerate(missing):
                base.under = missing[number + 1] if number + 1 < len(missing) else plain
            async with open_nursery() as nursery:
                for base in missing:
                    nursery.start_soon(self._from_pack, [base])
        finally:
            if reserved:
                self.l1.release("fetch", in_flight_bytes)
        if self.on_delta_read is not None:
            proven = len(missing) == len(chain) and all(base.plain is not None for base in missing)
            self.on_delta_read(flight.place, chain if proven else (), len(missing), sum(base.reference.length for base in missing))
        if missing:
            plain = await self._landed(missing[0])
        if plain is None:
            raise BugError(f"chunk {flight.place.chunk_id.hex()}: nothing was read of its chain, and nothing is wrong")
        return plain

    async def _under(self, flight: _Flight) -> bytes:
        """What the frame of a base was made against itself: the next of the chain. Who is waited for stands behind in the chain, always."""
        if flight.under is None:
            raise CorruptionError("the chain of a delta frame ends with another delta frame")
        return await self._landed(flight.under) if isinstance(flight.under, _Flight) else flight.under

    async def _landed(self, base: _Flight) -> bytes:
        await base.done.wait()
        if base.plain is None:
            error = base.error or BugError("a base was neither read nor found wrong")
            if isinstance(error, CorruptionError):
                told = str(error).partition("; run ")[0]  # what to do is told once, at the end
                raise CorruptionError(f"what it was made against can not be read: {told}") from error
            raise _again(error) from error
        return base.plain

    async def _verified(self, items: Sequence[_Item], *, demand: bool) -> list[bytes | CorruptionError]:
        """Decode and check in worker threads, several frames a hop. What nobody waits for has a thread of its own."""
        if not items:
            return []
        size = max(VERIFY_CHUNKS_MIN, -(-len(items) // self._thread_count)) if demand else PREFETCH_VERIFY_CHUNKS
        limiter = self._workers if demand else self._prefetch_workers
        parts = [items[start : start + size] for start in range(0, len(items), size)]
        checked: list[list[bytes | CorruptionError]] = [[] for _ in parts]

        async def check(number: int) -> None:
            checked[number] = await trio.to_thread.run_sync(_verify, parts[number], limiter=limiter)

        if len(parts) == 1:
            await check(0)
        else:
            async with open_nursery() as nursery:
                for number in range(len(parts)):
                    nursery.start_soon(check, number)
        return [item for part in checked for item in part]


# --- parts ------------------------------------------------------------------------------------------------------


class _Flight:
    """One chunk's fetch. `done` is set once, by `_land`, with exactly one of content and error."""

    __slots__ = ("done", "error", "of_base", "place", "plain", "prefetched", "reference", "under", "where")

    def __init__(self, reference: Reference, *, of_base: bool = False) -> None:
        self.of_base = of_base
        """Nobody's but one delta frame's."""
        self.under: _Flight | bytes | None = None
        """Of a base: the next of the chain, or its content."""
        self.reference = reference
        """As it was asked for."""
        self.place = reference
        """Where it is read: another place once it was found to have been moved."""
        self.done = trio.Event()
        self.plain: bytes | None = None
        self.error: Exception | None = None
        self.prefetched = False
        """Nobody has asked for it yet."""
        self.where = -1
        """The place in an image that it was asked for; -1: nobody said."""


class _Item(NamedTuple):
    """A frame to be verified. base: of a delta frame."""

    chunk_id: bytes
    frame: Frame
    base: bytes | None = None


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


def _others(flights: Sequence[_Flight], frames: Sequence[Frame], bad: Mapping[_Flight, object]) -> tuple[list[_Flight], list[Frame]]:
    """Those that are neither bad nor over, with their frames."""
    left = [(flight, frame) for flight, frame in zip(flights, frames, strict=True) if flight not in bad and not flight.done.is_set()]
    return [flight for flight, _ in left], [frame for _, frame in left]


def _demanded(flights: Sequence[_Flight]) -> bool:
    return not all(flight.prefetched for flight in flights)


def _same_place(one: Reference, other: Reference) -> bool:
    return one.pack_id == other.pack_id and one.offset == other.offset


def _again(error: Exception) -> Exception:
    """A copy to raise: one error reaches several waiters, and raising one object in several tasks mixes up their tracebacks."""
    copy = type(error).__new__(type(error), *error.args)
    copy.__dict__.update(error.__dict__)
    return copy


def _verify(items: Sequence[_Item]) -> list[bytes | CorruptionError]:
    checked: list[bytes | CorruptionError] = []
    for chunk_id, frame, base in items:
        try:
            plain = decode(frame.codec, frame.payload, PLAIN_MAX) if base is None else delta.decode(frame.payload, base, PLAIN_MAX)
        except CorruptionError as error:
            checked.append(error)
            continue
        digest = hashlib.sha256(plain).digest()
        if digest != chunk_id:
            checked.append(CorruptionError(f"its content hashes to {digest.hex()}"))
        else:
            checked.append(plain)
    return checked
