"""Prefetch on an open volume: between what guests read, the engine that decides (`novafs.prefetch`) and the tiers.

    image reads ──► touched / missed ──► log ──► PrefetchEngine ──► batches ──► ChunkCache.prefetch ──► L1
                    (an append)                  (after the answer)   (few large range requests)

What always holds: a reader never waits for anything here. A read of chunks that L1 has appends one entry to a bounded log; the
engine sees it once the guest has its answer: at once where it missed, or used what was prefetched, else with the next few hundred
or the next tick. Demand comes first: its requests are sent before the prefetches that it leads to, prefetches take at most half
of the store's connections, and their frames are verified by a thread of their own. How much is in flight follows the store
(`novafs.prefetch.pacer`), and so does how far ahead the engine looks. CPU time is measured, and kept below its share
(`novafs.prefetch.throttle`). What goes wrong with a prefetch is counted and forgotten: the demand read that follows tells the guest.

Places are of images as they are open here: the engine knows an image by a number that its node keeps while this process lives.
"""

from __future__ import annotations

import logging
import time
from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any, Final, NamedTuple

import trio

from novafs.cache.packs import Run, plan_runs
from novafs.cache.tiered import ChunkCache
from novafs.chunk import HOLE_BYTES, Reference
from novafs.errors import NovaError, RetryableError
from novafs.imagemap import NODE_BYTES
from novafs.imagereader import ImageReader
from novafs.prefetch.account import Settings
from novafs.prefetch.around import ReadAround
from novafs.prefetch.base import INDEX_BITS, INDEX_MASK, NOTHING, Access, Fetch, Key, Place, key_of
from novafs.prefetch.engine import PrefetchEngine
from novafs.prefetch.longrun import PIECE, LongRuns
from novafs.prefetch.longrun import Run as LongRun
from novafs.prefetch.pacer import Pacer
from novafs.prefetch.throttle import Throttle

log = logging.getLogger(__name__)

LOG_WAKE: Final = 256
"""Hits that wait for company: one pass over so many costs a guest's next read about 10 ms at worst, and few of them anything."""
SPARED: Final = 16
"""Where prefetch finds nothing to do and the policies are above their share of the CPU, one of so many misses is considered."""
SPARED_WAKE: Final = 64
"""The others wait for company: waking up costs as much as all that is spared."""
LOG_MAX: Final = 4096
NOTED: Final = 32
NOTED_FIRST: Final = 2048
"""Of the hits of an image one in so many is noted where there are too many to note, but the first after an open all: its profile
begins with them."""
RECENT_MAX: Final = 1 << 14
STEP: Final = 64
"""Log entries worked on between two chances for readers."""
TICK_S: Final = 0.25
WARM_S: Final = 60.0
WEIGH_S: Final = 10.0
REST_S: Final = 1.0
ENGINE_SHARE: Final = 4
"""What the engine takes is counted in L1 up to one part in so many: in a tiny one its tables would leave no room."""
IDLE_S: Final = 1.0
"""Without a read for so long the engine may learn in slices."""
BATCH_CHUNKS: Final = 512
NUMBERS_MAX: Final = 4096
SOON: Final = 4
"""Chunks behind a missed one that do not wait for the rest of its region."""
NEVER: Final = 1 << 62
LOOKED_AT: Final = 4096
"""Chunks behind the last that was asked for which a long run looks through for the next that are no holes: of the map 256 KiB."""
AROUND_PART: Final = 32
"""Chunks of a region that one request brings: what comes first need not wait for the rest to be verified."""
MAP_SHARE: Final = 8
"""Of L1 at most one part in so many is filled with a map that is read ahead."""
MAP_SPARE: Final = 4
"""Requests that reading a map ahead leaves to others."""
NEAR: Final = 4
"""Chunks behind a fetched one that are looked at whether they come along."""


@contextmanager
def harmless() -> Iterator[None]:
    """A mistake inside costs prefetches, and neither a read, an open or a close, nor the volume."""
    try:
        yield
    except Exception:
        log.exception("prefetch: a mistake in NovaFS; please report it. Reads go on without")


def _ahead(settings: Settings) -> int:
    """Chunks that a long run may have ahead."""
    return settings.prefetch_window_bytes // settings.chunk_size if settings.prefetch_window else 0


class _Entry(NamedTuple):
    """Chunks `first` to `last` were read; those in `missing` were waited for. spared: they are noted, not considered. alone: the first of
    the missing that nobody was fetching; -1 for none."""

    image: ImageReader
    first: int
    last: int
    missing: Sequence[int]
    spared: bool = False
    alone: int = -1


class Prefetcher:
    """One per volume. Everything here runs on the trio thread; `run` is its background."""

    def __init__(self, cache: ChunkCache, settings: Settings, *, requests_max: int) -> None:
        """requests_max: how many requests the store's client sends at once, of which half may be for prefetches."""
        capacity = max(1, cache.l1.capacity_bytes // settings.chunk_size)
        self.engine = PrefetchEngine(capacity_chunks=capacity, settings=settings, content=self._content)
        self.around = ReadAround(most_chunks=settings.read_around_bytes // settings.chunk_size, capacity_chunks=capacity)
        self.runs = LongRuns(most_chunks=_ahead(settings), capacity_chunks=capacity)
        self.pacer = Pacer(capacity, first=BATCH_CHUNKS)
        self.throttle = Throttle(spent_s=time.process_time())
        self._cache = cache
        self._requests_max = max(1, requests_max // 2)
        self._shift = settings.chunk_size.bit_length() - 1
        self._requests = 0
        self._spared = 0
        self._last_miss = (-1, -1)
        self._log: list[_Entry] = []
        self._recent: deque[tuple[int, int, int]] = deque(maxlen=RECENT_MAX)
        """Image number, first and last chunk of the latest reads, for `read_last`: the engine does not see them all."""
        self._lost = 0
        self._hurried = False
        """Whether hits are so quick that to note them all takes too large a part of the CPU."""
        self._wake = trio.Event()
        self._numbers: OrderedDict[bytes, int] = OrderedDict()
        self._next_number = 1
        self._open: dict[int, list[ImageReader]] = {}
        """Image number → what is open of it, latest last. A snapshot's view has a number of its own."""
        self._waiting: dict[int, list[_Entry]] = {}
        """Images whose first read is known, and whose map is being loaded where their profile looks: what they read since."""
        self._fresh: set[int] = set()
        self._last_read_s = -1e9
        self._expected = self.engine.expected
        self._nursery: trio.Nursery | None = None
        cache.on_evicted = self._evicted
        cache.on_l3_read = self._l3_read

    def retune(self, settings: Settings) -> None:
        """Other settings from now on; what was learned stays."""
        self.engine.retune(settings)
        self.around.retune(most_chunks=settings.read_around_bytes // settings.chunk_size)
        self.runs.retune(most_chunks=_ahead(settings))

    # -- what images tell ---------------------------------------------------------------------------------------

    def opened(self, image: ImageReader, name: bytes) -> None:
        """An image, or a view of a snapshot, was opened. name: what tells it from all others, and is the same at its next open."""
        number = self._numbers.get(name)
        if number is None:
            number = self._numbers[name] = self._next_number
            self._next_number += 1
            while len(self._numbers) > NUMBERS_MAX:
                self._numbers.popitem(last=False)
        self._numbers.move_to_end(name)
        image.watch_number = number
        image.watch_reads = 0
        image.watch_from = NEVER
        self._open.setdefault(number, []).append(image)
        if len(self._open[number]) == 1:
            self._fresh.add(number)
            with harmless():
                self.engine.opened(number)

    def closed(self, image: ImageReader) -> None:
        """Its last handle was closed."""
        number = image.watch_number
        held = self._open.get(number, [])
        if image in held:
            held.remove(image)
        if not held and number in self._open:
            with harmless():
                self._work_off()  # what it read last belongs into its profile
            del self._open[number]
            self._fresh.discard(number)
            self._waiting.pop(number, None)
            with harmless():
                self.runs.forget(number)
                self.engine.closed(number)

    def unlearn(self, image: ImageReader) -> None:
        """Take it for an image that was never read, and learn nothing for others from it from now on: for measurements."""
        with harmless():
            self._work_off()
            self.engine.unlearn(image.watch_number)
            self.around.forget(image.watch_number)
            self.runs.forget(image.watch_number)

    def read_last(self, image: ImageReader, most: int) -> list[int]:
        """The chunks of an image that were read last, as far as they are remembered: the last one first."""
        with harmless():
            self._work_off()
        number, found = image.watch_number, dict[int, None]()
        for other, first, last in reversed(self._recent):
            if other == number:
                for index in range(last, first - 1, -1):
                    found.setdefault(index)
                if len(found) >= most:
                    break
        return list(found)[:most]

    def finish(self) -> None:
        """The volume is being closed: what is still open has been read as far as it will be."""
        with harmless():
            self._work_off()
            for number in list(self._open):
                self.engine.closed(number)

    def touched(self, image: ImageReader, first: int, last: int) -> None:
        """Chunks were read, and were all there. On the path of every read: an append."""
        expected = self._expected(image.watch_number << INDEX_BITS | last)
        image.watch_reads += 1
        wanted = image.watch_from <= last
        if (
            self._hurried
            and image.watch_from == NEVER  # else a long run would not be seen to go on, nor what it brought to be used
            and image.watch_reads % NOTED
            and not (expected or wanted)
            and image.watch_reads * (last - first + 1) > NOTED_FIRST
        ):
            return
        entries = self._log
        if len(entries) >= LOG_MAX:
            self._lost += 1
            return
        entries.append(_Entry(image, first, last, ()))
        if len(entries) == LOG_WAKE or expected or wanted:
            self._wake.set()

    def missed(self, image: ImageReader, first: int, last: int, missing: Sequence[int]) -> None:
        """Chunks are being read, and some of them must be fetched."""
        number, before, self._last_miss = image.watch_number, self._last_miss, (image.watch_number, last)
        spared = (before[0] != number or abs(first - before[1]) > 1) and self._sparing(number)
        if spared:
            self._spared = (self._spared + 1) % SPARED
            spared = self._spared != 0
        if len(self._log) < LOG_MAX:
            self._log.append(_Entry(image, first, last, missing, spared, self._alone(image, missing)))
        else:
            self._lost += 1
        if not spared or len(self._log) >= SPARED_WAKE:
            self._wake.set()

    def _alone(self, image: ImageReader, missing: Sequence[int]) -> int:
        """The first of these that is not on its way: what lies around the others was looked at when they were asked for."""
        for index in missing:
            raw = image.entry_nowait(index)
            if raw is not None and not self._cache.present(raw[:32]):
                return index
        return -1

    def _sparing(self, number: int) -> bool:
        """Whether misses of an image are dear: the policies are above their share of the CPU, and have saved next to nothing.

        However slow the store is: readers that wait for it side by side share this thread.
        """
        return self.engine.hopeless(number) and not self.throttle.open

    # -- the background -----------------------------------------------------------------------------------------

    async def run(self, nursery: trio.Nursery) -> None:
        """Work until cancelled."""
        self._nursery = nursery
        warm_at_s = trio.current_time() + WARM_S
        weigh_at_s = rest_at_s = 0.0
        process_s = time.process_time()
        while True:
            with trio.move_on_after(TICK_S):
                await self._wake.wait()
            self._wake = trio.Event()
            began_s = time.thread_time()
            try:
                while self._log:
                    self._work_off(STEP)
                    self._dispatch()
                    if not self._log:
                        break
                    spent_s = time.thread_time() - began_s
                    await trio.lowlevel.checkpoint()
                    self.throttle.account(spent_s, 0.0)
                    began_s = time.thread_time()
                now_s = trio.current_time()
                if now_s >= weigh_at_s:
                    weigh_at_s = now_s + WEIGH_S
                    self.weigh()
                if now_s >= rest_at_s:
                    rest_at_s = now_s + REST_S
                    self._rest()
                if now_s >= warm_at_s:
                    warm_at_s = now_s + WARM_S
                    self.engine.warm(time.time())
                if now_s - self._last_read_s > IDLE_S and self.throttle.open:
                    self.engine.work()
                self._dispatch()
            except Exception:  # a mistake here must not end the volume; it costs prefetches
                log.exception("prefetch: a mistake in NovaFS; please report it. Reads go on without")
                self._log.clear()
                await trio.sleep(1)
            before_s, process_s = process_s, time.process_time()
            self.throttle.account(time.thread_time() - began_s, process_s - before_s)
            self._hurried = self.throttle.far_over

    def _work_off(self, most: int = LOG_MAX) -> None:
        """Show the engine what was read."""
        entries, self._log = self._log[:most], self._log[most:]
        if not entries:
            return
        self._last_read_s = trio.current_time()
        now_s = time.time()
        for entry in entries:
            number = entry.image.watch_number
            if number not in self._open:
                continue
            self._recent.append((number, entry.first, entry.last))
            if number in self._waiting:
                self._waiting[number].append(entry)
                del self._waiting[number][LOG_MAX:]
            elif number in self._fresh:
                self._begin(number, entry, now_s)
            else:
                self._observe(entry, now_s)

    def _begin(self, number: int, entry: _Entry, now_s: float) -> None:
        """The first read after an open. Its profile compares contents, so the map is loaded first where the profile looks."""
        first = entry.image.entry_nowait(entry.first)
        if first is None or first == HOLE_BYTES:
            return
        self._fresh.discard(number)
        unknown = [i for i in self.engine.book.named(key_of(first)) if entry.image.entry_nowait(i) is None]
        if not unknown or self._nursery is None:
            self._observe(entry, now_s)
            return
        self._waiting[number] = [entry]
        self._nursery.start_soon(self._load_profile, number, entry.image, unknown)

    async def _load_profile(self, number: int, image: ImageReader, indexes: list[int]) -> None:
        try:
            await image.load_entries(indexes)
        except NovaError as error:
            log.debug("%s: its map could not be read ahead: %s", image.name, error)
        except Exception:
            log.exception("prefetch: a mistake in NovaFS; please report it. Reads go on without")
        now_s = time.time()
        with harmless():
            for entry in self._waiting.pop(number, ()):
                self._observe(entry, now_s)
            self._dispatch()

    def _observe(self, entry: _Entry, now_s: float) -> None:
        engine, image = self.engine, entry.image
        base = image.watch_number << INDEX_BITS
        if self.around.holding and not image.hole_nowait(entry.first, entry.last):
            for index in range(entry.first, entry.last + 1):
                raw = image.entry_nowait(index)
                if raw is not None:
                    self.around.used(key_of(raw))
        run = None
        if not engine.replaying(image.watch_number):
            run = self.runs.read(image.watch_number, entry.first, entry.last, waited=bool(entry.missing))
        if run is not None or self.runs.holding:
            self._by_run(entry, now_s, far=run is not None)
        if run is None and image.watch_from != NEVER and not self.runs.served(image.watch_number):
            image.watch_from = NEVER
        if run is not None:
            return
        skimming = not self.throttle.open
        if skimming and entry.first == entry.last and not entry.missing and not engine.expected(base | entry.first):  # most of them
            raw = image.entry_nowait(entry.first)
            if raw is not None and raw != HOLE_BYTES:
                engine.skim(base | entry.first, raw)
            return
        seen: list[tuple[int, bytes]] = []
        for index in range(entry.first, entry.last + 1):
            raw = image.entry_nowait(index)
            if raw is not None and raw != HOLE_BYTES:
                seen.append((index, raw))
        for index, raw in seen:
            place, hit = base | index, index not in entry.missing
            if skimming and hit and not engine.expected(place):
                engine.skim(place, raw)
            elif entry.spared and not engine.expected(place):
                engine.skim_miss(place, raw)
            else:
                engine.observe(Access(place, key_of(raw), now_s, False, hit, more=index != seen[-1][0]), sparing=skimming)
        if entry.alone >= 0 and not engine.replaying(image.watch_number):
            self._look_around(image, entry.alone)

    def _by_run(self, entry: _Entry, now_s: float, *, far: bool) -> None:
        """What was read of what long runs have brought; and, where this read is of such a run itself, all else that is noted of it."""
        engine, image, number = self.engine, entry.image, entry.image.watch_number
        base = number << INDEX_BITS
        if image.hole_nowait(entry.first, entry.last):
            return
        for index in range(entry.first, entry.last + 1):
            raw = image.entry_nowait(index)
            if raw is None or raw == HOLE_BYTES:
                continue
            key, missed = key_of(raw), index in entry.missing
            brought = self.runs.used(key)
            if brought is not None:  # perhaps for another image that has the same there
                engine.by_run(brought, late=int(missed), used=int(not missed))
            if not far:
                continue
            if engine.expected(base | index):
                # Of before it was a long one. `more`: what comes next is known.
                engine.observe(Access(base | index, key, now_s, False, not missed, more=True), sparing=True)
            elif missed and brought is None:
                engine.skim_miss(base | index, raw)
            else:
                engine.skim(base | index, raw)
        if far:
            engine.went_by(base | entry.last, now_s)

    # -- fetching -----------------------------------------------------------------------------------------------

    def _serve_runs(self) -> None:
        """Fetch what lies ahead of long runs."""
        for run in self.runs.awake():
            held = self._open.get(run.image)
            while held and self._nursery is not None and self._requests < self._requests_max:
                most = min(self.runs.room(run), self.pacer.room)
                if not most or run.loading:
                    break
                places = self._few(run, self._ahead_of(run, held[-1], most))
                if not places:
                    break
                self.runs.asked(run, [place & INDEX_MASK for place, _ in places], [key_of(reference.chunk_id) for _, reference in places])
                self.engine.by_run(run.image, issued=len(places))
                self._nursery.start_soon(self._fetch_for_run, run.image, places, self._take(places))
            if held and not run.asked and run.ahead << self._shift >= held[-1].size:
                run.asleep = True  # nothing is left to be asked for, and nothing to be read of it
            elif held and not run.asleep:
                # Whoever is told of reads is to be woken when a piece more may be asked for.
                held[-1].watch_from = run.asked[min(PIECE, len(run.asked)) - 1] if run.asked else run.end

    def _few(self, run: LongRun, places: list[tuple[Place, Reference]]) -> list[tuple[Place, Reference]]:
        """The first of these, as many as take no more requests than are free: an image that was written here and there is apart in the
        store. The others are looked at again."""
        free, kept = self._requests_max - self._requests, places
        while len(plan_runs([reference for _, reference in kept])) > free:
            kept = kept[: max(free, len(kept) // 2)]
        if len(kept) < len(places):
            run.ahead = places[len(kept)][0] & INDEX_MASK
        return kept

    def weigh(self) -> None:
        """Count what the engine takes against L1. Now and then, and when L1 is another size: it costs a pass over the images."""
        l1 = self._cache.l1
        l1.set_reserved("prefetch", min(self.engine.memory_bytes(), l1.capacity_bytes // ENGINE_SHARE))

    def _rest(self) -> None:
        """Runs that have stood still since the last call are over, and their images are read as any other."""
        self.runs.rest()
        for number, held in self._open.items():
            if not self.runs.served(number):
                for image in held:
                    image.watch_from = NEVER

    def _ahead_of(self, run: LongRun, image: ImageReader, most: int) -> list[tuple[Place, Reference]]:
        """The next chunks ahead of a run that are neither holes nor here; none where the map is to be loaded first or all is here."""
        places: list[tuple[Place, Reference]] = []
        asked = set[bytes]()  # an image may hold the same at several places
        base, here = run.image << INDEX_BITS, 0
        # From the last that was asked for, and not from where it looked last: a hole may reach to the end of a huge image.
        end = min((run.asked[-1] if run.asked else run.end) + 1 + LOOKED_AT, -(-image.size >> self._shift))
        while run.ahead < end and len(places) < most:
            raw = image.entry_nowait(run.ahead)
            if raw is None:
                if not places:
                    self._load_ahead(run, image)
                break
            if raw != HOLE_BYTES:
                if not (self._cache.present(raw[:32]) or raw[:32] in asked or self.runs.expected(key_of(raw))):
                    asked.add(raw[:32])
                    places.append((base | run.ahead, Reference.unpack(raw)))
                else:
                    here += 1
                    if here > most and not places:
                        run.asleep = True
                        break
            run.ahead += 1
        return places

    def _load_ahead(self, run: LongRun, image: ImageReader) -> None:
        if self._nursery is None:
            return

        async def load() -> None:
            try:
                await image.load_entries(range(run.ahead, run.ahead + LOOKED_AT, 256))
            except NovaError as error:
                run.asleep = True
                log.debug("%s: its map could not be read ahead: %s", image.name, error)
            except Exception:
                run.asleep = True
                log.exception("prefetch: a mistake in NovaFS; please report it. Reads go on without")
            finally:
                run.loading = False
            with harmless():
                self._dispatch()

        run.loading = True
        self._nursery.start_soon(load)

    async def _fetch_for_run(self, number: int, places: list[tuple[Place, Reference]], requests: int) -> None:
        missing = {place for place, _ in places}
        try:
            await self._fetch_counted(places, missing, requests)
        except Exception:
            log.exception("prefetch: a mistake in NovaFS; please report it. Reads go on without")
        with harmless():
            if missing:
                lost = self.runs.gone([key_of(reference.chunk_id) for place, reference in places if place in missing])
                self.engine.by_run(number, dropped=sum(lost.values()))
            # L1 had no room for what came, where others hold it all: nobody will say that it left.
            held = self._cache.l1.contains
            lost = self.runs.gone([key_of(reference.chunk_id) for _, reference in places if not held(reference.chunk_id)])
            if lost:
                self.engine.by_run(number, wasted=sum(lost.values()))
            self._dispatch()

    def _dispatch(self) -> None:
        """Send what the engine wants and the store can take."""
        self._serve_runs()
        while self._nursery is not None and self.engine.waiting and self._requests < self._requests_max:
            fetches = self.engine.take(min(BATCH_CHUNKS, self.pacer.room))
            if not fetches:
                return
            self.pacer.sent(len(fetches))
            # Until it is known how many requests they are: one.
            self._requests += 1
            self._nursery.start_soon(self._fetch, fetches)

    async def _fetch(self, fetches: list[Fetch]) -> None:
        sent, arrived, timed_out = len(fetches), 0, False
        open_places = {fetch.place for fetch in fetches}
        try:
            places = await self._resolve(fetches)
            extra = self._brought_along(places, plan_runs([reference for _, reference in places]))
            self.pacer.sent(len(extra))
            sent += len(extra)
            open_places.update(place for place, _ in extra)
            places += extra
            runs = plan_runs([reference for _, reference in places])
            while runs:
                # As many requests as are free: one is this fetch's own. The others follow, so that no reader queues behind them all.
                wide = max(1, min(len(runs), self._requests_max - self._requests + 1))
                wave, runs = [places[at] for run in runs[:wide] for at in run.members], runs[wide:]
                self._requests += wide - 1
                try:
                    came, late = await self._fetch_together(wave, open_places)
                finally:
                    self._requests -= wide - 1
                arrived += came
                timed_out |= late
        except NovaError as error:
            log.debug("a prefetch of %d chunks failed: %s", len(fetches), error)
            timed_out = isinstance(error, RetryableError)
        except Exception:
            log.exception("prefetch: a mistake in NovaFS; please report it. Reads go on without")
        finally:
            self._requests -= 1
            if arrived < sent:
                self.pacer.failed(sent - arrived, trio.current_time(), timed_out=timed_out)
            with harmless():
                for place in open_places:
                    self.engine.failed(place)
        with harmless():
            self._dispatch()

    def _look_around(self, image: ImageReader, index: int) -> None:
        """Fetch what lies around a missed chunk, and beside it in its pack, where that pays (`novafs.prefetch.around`)."""
        number, latency_s = image.watch_number, self.pacer.demand_s
        if self._nursery is None or self._requests >= self._requests_max:
            return
        if part := self.around.map_region(number, index, latency_s):
            self._nursery.start_soon(self._load_map, image, part, index)
        raw = image.entry_nowait(index)
        if raw is None or raw == HOLE_BYTES:
            return
        region = self.around.region(number, index, latency_s)
        if not region:
            return
        middle, reach = Reference.unpack(raw), len(region) * self.engine.settings.chunk_size
        places: list[tuple[Place, Reference]] = []
        for near in region:
            raw = image.entry_nowait(near)
            if raw is None or raw == HOLE_BYTES or self._cache.present(raw[:32]):
                continue
            place, reference = number << INDEX_BITS | near, Reference.unpack(raw)
            if reference.pack_id == middle.pack_id and abs(reference.offset - middle.offset) < reach and not self.engine.expected(place):
                places.append((place, reference))
        # What follows is asked for next more often than not: it comes in a request of its own, and not with the last of the region.
        after = number << INDEX_BITS | index
        soon = [one for one in places if after < one[0] <= after + SOON]
        rest = [one for one in places if not after < one[0] <= after + SOON]
        # The nearest first, since what is read next is near, and they share one thread that verifies them.
        parts = [rest[start : start + AROUND_PART] for start in range(0, len(rest), AROUND_PART)]
        parts.sort(key=lambda part: min(abs(part[0][0] - after), abs(part[-1][0] - after)))
        for places in (soon, *parts):
            kept = self._afford(places[: self.pacer.room])
            if kept:
                self.around.asked(number, [key_of(reference.chunk_id) for _, reference in kept])
                self._nursery.start_soon(self._fetch_around, kept, self._take(kept))

    def _afford(self, places: list[tuple[Place, Reference]], *, spare: int = 0) -> list[tuple[Place, Reference]]:
        """What is far apart in the store takes a request each: of those free all but `spare`, for what brings most."""
        runs = plan_runs([reference for _, reference in places])
        runs = sorted(runs, key=lambda run: -len(run.members))[: max(0, self._requests_max - self._requests - spare)]
        return [places[at] for at in sorted(at for run in runs for at in run.members)]

    def _take(self, places: list[tuple[Place, Reference]]) -> int:
        """Count them as sent; how many requests they are."""
        requests = len(plan_runs([reference for _, reference in places]))
        self.pacer.sent(len(places))
        self._requests += requests
        return requests

    async def _load_map(self, image: ImageReader, part: range, index: int) -> None:
        """Load the map where an image is read, ahead of the reads, what is nearest first."""
        nodes = image.map_ahead(part.start, part.stop)
        nodes.sort(key=lambda node: abs(node[0] - index))
        del nodes[self._cache.l1.capacity_bytes // MAP_SHARE // NODE_BYTES :]
        try:
            while nodes and image.watch_number in self._open:
                # Written one after the other while the image was, they are apart in the store, and each takes a request.
                wave = self._afford(nodes[: self.pacer.room], spare=min(MAP_SPARE, self._requests_max - 1))
                if not wave:
                    await trio.sleep(self.pacer.demand_s)
                    continue
                taken = {first for first, _ in wave}
                nodes = [node for node in nodes if node[0] not in taken]
                missing = set(taken)
                await self._fetch_counted(wave, missing, self._take(wave), node=True)
                # What was here before, or on its way for others, has not failed.
                missing -= {first for first, reference in wave if self._cache.present(reference.chunk_id)}
                # From L1 by now: whoever reads there waits for nothing.
                await image.load_entries([first for first in taken if first not in missing])
                if missing:
                    return
        except NovaError as error:
            log.debug("%s: its map could not be read ahead: %s", image.name, error)
        except Exception:
            log.exception("prefetch: a mistake in NovaFS; please report it. Reads go on without")
        with harmless():
            self._dispatch()

    async def _fetch_around(self, places: list[tuple[Place, Reference]], requests: int) -> None:
        began_s, missing = trio.current_time(), {place for place, _ in places}
        try:
            await self._fetch_counted(places, missing, requests)
        except Exception:
            log.exception("prefetch: a mistake in NovaFS; please report it. Reads go on without")
        finally:
            self.around.failed(key_of(reference.chunk_id) for place, reference in places if place in missing)
        if len(missing) < len(places):
            self.around.took(trio.current_time() - began_s, self.pacer.demand_s)
            self.around.arrived(len(places) - len(missing))
        with harmless():
            self._dispatch()

    async def _fetch_counted(
        self, places: list[tuple[Place, Reference]], missing: set[Place], requests: int, *, node: bool = False
    ) -> None:
        """`_fetch_together` of what `_take` has counted."""
        arrived, timed_out = 0, False
        try:
            arrived, timed_out = await self._fetch_together(places, missing, node=node)
        finally:
            self._requests -= requests
            if arrived < len(places):
                self.pacer.failed(len(places) - arrived, trio.current_time(), timed_out=timed_out)

    async def _fetch_together(
        self, places: list[tuple[Place, Reference]], open_places: set[Place], *, node: bool = False
    ) -> tuple[int, bool]:
        """How many came, and whether one timed out; what came is no longer open. node: they are no chunks, but nodes of a map."""
        began_s, arrived, timed_out = trio.current_time(), 0, False
        # Apart: what comes first must not wait for the last.
        flights = [(place, reference, self._cache.prefetch(reference, -1 if node else place)) for place, reference in places]
        self._cache.start_prefetches([flight for _, _, flight in flights if flight is not None])
        for place, reference, flight in flights:
            if flight is None:
                continue  # there by now
            if not flight.done.is_set():
                await flight.done.wait()
            if flight.error is not None:
                timed_out |= isinstance(flight.error, RetryableError)
                continue
            open_places.discard(place)
            arrived += 1
            if not node:
                self.engine.arrived(place, key_of(reference.chunk_id))
        if arrived:
            self.pacer.arrived(arrived, trio.current_time() - began_s)
        return arrived, timed_out

    async def _resolve(self, fetches: list[Fetch]) -> list[tuple[Place, Reference]]:
        """Where the places' chunks lie, without those that are holes, here already, or of images that were closed."""
        unknown: dict[int, list[int]] = {}
        for fetch in fetches:
            number, index = fetch.place >> INDEX_BITS, fetch.place & INDEX_MASK
            if number in self._open and self._open[number][-1].entry_nowait(index) is None:
                unknown.setdefault(number, []).append(index)
        for number, indexes in unknown.items():
            if number in self._open:
                await self._open[number][-1].load_entries(indexes)
        found: list[tuple[Place, Reference]] = []
        for fetch in fetches:
            number, index = fetch.place >> INDEX_BITS, fetch.place & INDEX_MASK
            raw = self._open[number][-1].entry_nowait(index) if number in self._open else None
            if raw is not None and raw != HOLE_BYTES and not self._cache.present(raw[:32]):
                found.append((fetch.place, Reference.unpack(raw)))
        return found

    def _brought_along(self, places: list[tuple[Place, Reference]], runs: list[Run]) -> list[tuple[Place, Reference]]:
        """Neighbours in the image whose frames lie in the gaps of these requests, and so come for nothing: those the gate wants."""
        if len(runs) == len(places):
            return []  # no request has a gap
        spans = {run.pack_id: (run.start, run.start + run.length) for run in runs if len(run.members) > 1}
        wanted = {place for place, _ in places}
        found: dict[Place, Reference] = {}
        for place, reference in places:
            span = spans.get(reference.pack_id)
            held = self._open.get(place >> INDEX_BITS)
            if span is None or not held:
                continue
            for near in range(place + 1, place + 1 + NEAR):
                if near in wanted:
                    break  # what follows is its to look for
                raw = held[-1].entry_nowait(near & INDEX_MASK)
                if raw is None or raw == HOLE_BYTES:
                    break
                other = Reference.unpack(raw)
                if other.pack_id != reference.pack_id or not span[0] <= other.offset < span[1]:
                    break
                if not self._cache.present(other.chunk_id):
                    found[near] = other
        return [(place, found[place]) for place in self.engine.offered(found)]

    # -- what the cache tells -----------------------------------------------------------------------------------

    def _content(self, place: Place) -> Key | None:
        held = self._open.get(place >> INDEX_BITS)
        if not held:
            return NOTHING
        raw = held[-1].entry_nowait(place & INDEX_MASK)
        if raw is None:
            return None
        return NOTHING if raw == HOLE_BYTES else key_of(raw)

    def _evicted(self, chunk_ids: Sequence[bytes]) -> None:
        with harmless():
            keys = [key_of(chunk_id) for chunk_id in chunk_ids]
            self.engine.evicted(keys)
            if self.around.holding:
                self.around.evicted(keys)
            if self.runs.holding:
                for number, count in self.runs.gone(keys).items():
                    self.engine.by_run(number, wasted=count)

    def _l3_read(self, seconds: float, demand: bool) -> None:
        if demand:
            with harmless():
                self.pacer.demand(seconds, trio.current_time())
                self.engine.set_latency(self.pacer.demand_s)

    # -- figures ------------------------------------------------------------------------------------------------

    def describe(self, name: bytes) -> dict[str, object]:
        """What the engine knows of an image that was opened under `name`; empty where it was not, or not read."""
        return self.engine.describe(self._numbers[name]) if name in self._numbers else {}

    def statistics(self) -> dict[str, Any]:
        """A JSON-able document: what was prefetched, from which source, and what became of it."""
        found = self.engine.statistics()
        return {
            **asdict(found),
            "pending": found.pending + self.runs.pending,
            "patterns": self.engine.patterns(),
            "accuracy": found.total.accuracy,
            "coverage": found.coverage,
            "around": self.around.statistics(),
            "in_flight": self.pacer.in_flight,
            "latency_s": self.pacer.latency_s,
            "policy_cpu_s": self.throttle.policy_s,
            "process_cpu_s": self.throttle.process_s,
            "log_lost": self._lost,
        }
