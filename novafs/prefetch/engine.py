"""The engine: watches accesses, asks the sources, lets the gate judge and the governor decide, and learns from what happened.

One engine serves a volume. Its caller (the mount, or the simulator) owns the cache and the store and tells it everything:

    opened / closed     an image was opened or closed
    observe             a guest touched a chunk
    take                what to fetch now, in order of need, no more than there is room for
    offered             what a request brings anyway: which of it to keep
    arrived / failed    a fetch came back, or did not
    evicted             contents that left the cache

Always holds: no call does I/O, reads a clock or blocks; the same calls give the same answers; what is remembered is bounded
(`places_max` chunks, `IMAGES_MAX` images, the tables' own caps). A prefetch has exactly one end: *used* (a guest
asked for it when it was there), *late* (asked for while in flight), *wasted* (evicted unasked), or *dropped* (asked for
before it was sent, its time over before it was sent, failed, or its image closed). Accuracy is (used + late) / (used + late + wasted);
coverage is misses avoided / misses without, by the shadow cache.

Where the parts are: `judge.py` turns what the sources name into decisions and teaches the gate, `presence.py` knows what is held,
`state.py` what is remembered of one image, `governor.py` holds accuracy and traffic.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Final

from novafs.prefetch.account import Counts, EngineStatistics, Settings
from novafs.prefetch.base import INDEX_BITS, INDEX_MASK, NOTHING, Access, Fetch, Key, Origin, Place, key_of
from novafs.prefetch.echo import RING_MAX
from novafs.prefetch.gate import Features, Gate, logistic, logit
from novafs.prefetch.judge import Judge, Wanted
from novafs.prefetch.lstm import DeltaModel
from novafs.prefetch.markov import TransitionTable
from novafs.prefetch.patterns import SPELL_PAUSE_S
from novafs.prefetch.presence import Presence
from novafs.prefetch.profile import ProfileBook, Recorder, places
from novafs.prefetch.shadow import ShadowLru
from novafs.prefetch.shelf import DeltaShelf
from novafs.prefetch.state import ECHO_REACH, ImageState, Issue

IMAGES_MAX: Final = 256
HOPE_MISSES: Final = 512
HOPE_SHARE: Final = 20
"""An image of which, after so many misses, fewer than one in so many was helped is read in a way that nobody foresees."""
PATTERN_TICKS: Final = 1024
"""Accesses for which a pattern counts as known: to find one takes up to a tenth of a millisecond."""
QUEUE_MAX: Final = 4096
AT_ONCE_MAX: Final = 64
"""Prefetches that one access may lead to, the profile's apart."""
ECHO_REACH_MAX: Final = 32
WINDOW_SHARE: Final = 4
"""A quarter of the cache is the most that a stream's window, or a profile's, may take: as much as unused prefetches may hold."""
LATE_FACTOR: Final = 0.7
INTERVAL_MIN_S: Final = 1e-5
IMAGE_BYTES: Final = 30_000
STATE_BYTES: Final = 370
HELD_BYTES: Final = 210
GATE_BYTES: Final = 9 << 20
"""What one of each takes, measured with tracemalloc; `test_the_memory_that_is_told_is_about_what_is_taken` measures it again."""
PLACES_PER_CHUNK: Final = 16
"""Places remembered for each chunk of the cache, up to `Settings.places_max`: a small cache gets a small memory."""
PLACES_MIN: Final = 8192


class PrefetchEngine:
    """See the module."""

    def __init__(
        self,
        *,
        capacity_chunks: int,
        settings: Settings | None = None,
        content: Callable[[Place], Key | None] | None = None,
        table: TransitionTable | None = None,
        gate: Gate | None = None,
        book: ProfileBook | None = None,
        shelf: DeltaShelf | None = None,
    ) -> None:
        """capacity_chunks: how many L1 holds; content: what an image holds at a place, as `base` says."""
        self.settings = settings if settings is not None else Settings()
        self.capacity_chunks = max(1, capacity_chunks)
        self.table = table if table is not None else TransitionTable(self.settings.chunk_size)
        self.book = book if book is not None else ProfileBook(self.settings.chunk_size)
        self.shelf = shelf if shelf is not None else DeltaShelf(self.settings.chunk_size)
        self._content = content
        self._shadow = ShadowLru(self.capacity_chunks)
        self._images: OrderedDict[int, ImageState] = OrderedDict()
        self._tick = 0
        self._issued: dict[Place, Issue] = {}
        self._queue: deque[Place] = deque()
        places_max = min(self.settings.places_max, max(PLACES_MIN, PLACES_PER_CHUNK * self.capacity_chunks))
        self._judge = Judge(gate if gate is not None else Gate(), self._issued, places_max=places_max, life=2.0 * self.capacity_chunks)
        self._presence = Presence(self.capacity_chunks, 4 * self.capacity_chunks + 2 * QUEUE_MAX)
        self.gate.set_learning_rate(self.settings.learning_rate)
        self.table.frozen = self.book.frozen = not self.settings.learning_rate
        self._totals = Counts()
        self._by_origin = [Counts() for _ in Origin]
        self._misses = 0
        self._latency_s = 0.0

    @property
    def gate(self) -> Gate:
        """The model that all images share."""
        return self._judge.gate

    def retune(self, settings: Settings) -> None:
        """Other settings for all images from now on; what they have learned, and their accounts, stay."""
        self.settings = settings
        for image in self._images.values():
            image.retune(settings)

    # --- what the caller tells --------------------------------------------------------------------------------

    def opened(self, image: int) -> None:
        """An image was opened: watch what it reads first, and propose what its kind read last time once it begins."""
        state = self._image(image)
        self._images.move_to_end(image)
        self.closed(image)
        state.recorder = None if state.private else Recorder()
        state.markov.restart()

    def closed(self, image: int) -> None:
        """An image was closed: keep its profile, drop what is queued for it."""
        state = self._images.get(image)
        if state is None:
            return
        if state.recorder is not None:
            self.book.fold(state.recorder)
            state.recorder = None
        if state.family is not None:
            self.shelf.keep(state.family, state.deltas)
        state.replay.clear()
        for place in [place for place in self._queue if place >> INDEX_BITS == image]:
            self._drop(place)

    def unlearn(self, image: int) -> None:
        """Take an image for one that was never read, and learn nothing for others from what it reads from now on: for measurements."""
        state = self._image(image)
        state.recorder = state.family = None
        self.closed(image)
        fresh = self._images[image] = ImageState(image, self.settings, TransitionTable(self.table.chunk_size))
        fresh.private = True

    def observe(self, access: Access, *, sparing: bool = False) -> None:
        """A guest touched a chunk. Decides what to fetch next; `take` hands it out. sparing: above the CPU budget (`throttle.py`), what a
        replayed profile foresaw teaches the sources nothing.
        """
        place = access.place
        image = self._images.get(place >> INDEX_BITS)
        if image is None:
            image = self._image(place >> INDEX_BITS)
        if place == image.last:
            self._shadow.accesses += 1
            return
        if image.last >= 0:
            image.deltas.observe(place - image.last, None if image.sure < 0 else image.sure == place)
        image.last = place
        self._tick += 1
        tick = self._tick
        if self._shadow.observe(place):
            image.base_misses += self._shadow.weight
        issue = self._issued.get(place)
        missed = self._settle(image, access)
        # While a profile is replayed and holds, it has named what comes next: to judge others would cost as much as a fetch.
        replayed = not missed and (image.replaying > 0 or (issue is not None and issue.origin is Origin.PROFILE))
        self._judge.expire(tick)
        if sparing and replayed:
            image.last_s = access.time_s
            image.waited = not access.hit
            self._judge.skimmed(place, tick)
            self._presence.hold(place, access.key, self._issued)
            if image.recorder is not None:
                self._record(image, place, access.key)
            return
        age, echoed = self._judge.touched(place, tick, image.echo.tick + 1)
        if self._latency_s:
            self._look_ahead(image, access.time_s)
        image.last_s = access.time_s
        image.waited = not access.hit
        image.echo.observe(place, echoed)
        image.markov.observe(access)
        image.streams.observe(access)
        image.spatial.observe(access)
        self._presence.hold(place, access.key, self._issued)
        if image.recorder is not None:
            self._record(image, place, access.key)
        image.watch.observe(access.time_s, in_run=image.streams.run > 1)
        image.daily.observe(access.time_s, place & INDEX_MASK, access.key)
        image.spells.observe(access.time_s, place & INDEX_MASK)
        if not access.more and not replayed:
            image.governor.update(image.base_misses, image.misses, self._presence.displaced(self._judge.life))
            wanted = self._judge.consider(image, place, tick, age, echoed, self._presence.places, missed=missed)
            if wanted:
                self._decide(image, wanted)

    def skim_miss(self, place: Place, chunk_id: bytes) -> None:
        """A miss of an image on which prefetch is `hopeless`, of which less is noted than of a hit: that it was one, and after an open in
        which order, for its profile."""
        image = self._images.get(place >> INDEX_BITS)
        if image is not None:
            image.misses += 1
            image.base_misses += 1  # nothing would have been different without prefetch
            if image.recorder is not None:
                self._record(image, place, key_of(chunk_id))

    def skim(self, place: Place, chunk_id: bytes) -> None:
        """An access of which only the least is noted: that the chunk is in use, and after an open in which order. For hits above the CPU
        budget (`throttle.py`). chunk_id: or what begins with it, like the map's entry.

        The first use of a prefetch must go to `observe`; `expected` tells.
        """
        image = self._images.get(place >> INDEX_BITS)
        if self._shadow.observe(place) and image is not None:
            image.base_misses += self._shadow.weight
        self._judge.skimmed(place, self._tick)
        if image is not None and image.recorder is not None:
            self._record(image, place, key_of(chunk_id))

    def work(self) -> bool:
        """A slice of learning that can wait (about 10 ms): call it when there is CPU time to spare. False if there is nothing to do."""
        if not self.settings.learning_rate:
            return False
        return any(image.deltas.work() for image in self._images.values() if image.deltas.ready)

    def warm(self, time_s: float, ahead_s: float = 900.0) -> int:
        """Queue what is due: the chunks that an image usually reads at the hour which begins within `ahead_s`, or in the next spell of
        an image that is read periodically. How many.
        """
        queued = 0
        for image in self._images.values():
            due = image.daily.due(time_s, ahead_s)
            if not due and time_s - image.last_s > SPELL_PAUSE_S:
                due = image.spells.due(time_s, image.watch.period_s())
            for index, chance in due:
                place = image.number << INDEX_BITS | index
                if place not in self._presence.places and len(self._queue) < QUEUE_MAX and logit(chance) >= image.governor.trusted:
                    self._issue(image, place, Origin.DAILY, chance, None, 0.0, 0)
                    queued += 1
        return queued

    def shelve(self) -> None:
        """Put what open images have learned where `model.dump_models` finds it."""
        for image in list(self._images.values()):
            if image.family is not None:
                self.shelf.keep(image.family, image.deltas)

    def forget_networks(self) -> None:
        """Forget what the LSTMs of all images have learned, kept ones included."""
        self.shelf.clear()
        for image in self._images.values():
            image.deltas = DeltaModel()

    def pattern(self, image: int) -> str:
        """How an image is read, in one word of `patterns.Pattern`; "idle" for one that was never read."""
        state = self._images.get(image)
        if state is None:
            return "idle"
        since, word = state.pattern_known
        if word == "idle" or self._tick - since >= PATTERN_TICKS:  # that it is idle is cheap to see
            word = state.watch.pattern().value
            state.pattern_known = (self._tick, word)
        return word

    def patterns(self) -> dict[str, int]:
        """How many of the images that are remembered are read in which way."""
        return dict(Counter(self.pattern(number) for number in self._images))

    def describe(self, image: int) -> dict[str, object]:
        """What `novafs info` says of an image; empty for one that was never read."""
        state = self._images.get(image)
        if state is None:
            return {}
        slots = [f"{slot // 4:02d}:{slot % 4 * 15:02d}" for slot, _ in state.daily.usual_slots(state.last_s)]
        return {
            "pattern": state.watch.pattern().value,
            "period_s": state.watch.period_s(),
            "usual_hours_utc": slots,
            **{name: getattr(state.counts, name) for name in ("issued", "used", "late", "wasted", "dropped")},
            "accuracy": state.counts.accuracy,
            "coverage": 1.0 - state.misses / state.base_misses if state.base_misses else None,
            "lstm_used": state.deltas.useful,
            "lstm_precision": state.deltas.precision,
            "markov_precision": state.deltas.markov_precision,
            **state.governor.describe(),
        }

    def expected(self, place: Place) -> bool:
        """Whether a prefetch of this place has not ended."""
        return place in self._issued

    def replaying(self, number: int) -> bool:
        """Whether a profile says what this image will read next."""
        image = self._images.get(number)
        return image is not None and (image.replaying > 0 or bool(image.replay))

    def hopeless(self, number: int) -> bool:
        """Whether prefetch has found next to nothing to do on this image so far, as where reads are random."""
        image = self._images.get(number)
        return image is not None and image.misses >= HOPE_MISSES and image.counts.used * HOPE_SHARE < image.misses

    def set_latency(self, latency_s: float) -> None:
        """What a fetch takes at present: the sources look so far ahead that what they name can be there in time."""
        self._latency_s = latency_s

    def _look_ahead(self, image: ImageState, time_s: float) -> None:
        """Let the sources look as far ahead as the guest gets while a fetch takes place."""
        if not image.waited:
            # The guest's own time between requests: what it waited for us says nothing of how fast it would be.
            interval_s = min(max(time_s - image.last_s, INTERVAL_MIN_S), self._latency_s)
            image.interval_s += 0.05 * (interval_s - image.interval_s)
        ahead = int(min(self._latency_s / max(image.interval_s, INTERVAL_MIN_S), QUEUE_MAX))
        if self.settings.prefetch_window:
            most = min(self.settings.prefetch_window_bytes // self.settings.chunk_size, self.capacity_chunks // WINDOW_SHARE)
            image.streams.window_max = max(self.settings.prefetch_window, min(ahead * 2, most))
        image.echo.reach = max(ECHO_REACH, min(ahead + ECHO_REACH // 2, ECHO_REACH_MAX))

    def take(self, limit: int) -> list[Fetch]:
        """What to fetch now, at most `limit`, in order of need. Each is answered by `arrived`, `failed` or `evicted`.

        What has waited longer than its use was to be expected is dropped: its reader has gone by another way.
        """
        fetches: list[Fetch] = []
        queue = self._queue
        while queue and len(fetches) < limit:
            place = queue.popleft()
            issue = self._issued.get(place)
            if issue is None or issue.sent:
                continue
            if issue.overdue:
                self._drop(place)
                continue
            self._sent(issue)
            fetches.append(Fetch(place, issue.origin, issue.chance))
        return fetches

    def offered(self, offered: Iterable[Place]) -> list[Place]:
        """Those worth keeping of places that a range request for others brings anyway, neighbours in the pack.

        They cost no request and hardly traffic, but a chunk of the cache each: so accuracy and worth decide, traffic does not. Each
        that is named counts as a prefetch and is answered by `arrived`, `failed` or `evicted`.
        """
        kept: list[Place] = []
        for place in offered:
            issue = self._issued.get(place)
            if issue is not None and not issue.sent:
                self._sent(issue)  # decided already, and here before it was asked for
                kept.append(place)
                continue
            image = self._images.get(place >> INDEX_BITS)
            if image is None or image.last < 0 or place in self._presence.places:
                continue
            odds, _, origin, features, score, kind = self._judge.worth(image, place, self._tick)
            if odds < image.governor.worthy + image.governor.bias[origin] or image.governor.chances() < 1:
                continue
            self._issue(image, place, origin, logistic(odds), features, score, kind, queued=False)
            self._sent(self._issued[place])
            kept.append(place)
        return kept

    @property
    def waiting(self) -> int:
        """An upper bound of what `take` would give."""
        return len(self._queue)

    def arrived(self, place: Place, key: Key) -> None:
        """A fetched chunk is in the cache now."""
        self._presence.hold(place, key, self._issued)

    def failed(self, place: Place) -> None:
        """A fetch failed or was given up, or turned out to be of a hole or something the cache held. Not tried again at once."""
        self._drop(place)
        self._judge.mute(place, self._tick)

    def evicted(self, keys: Iterable[Key]) -> None:
        """These contents left the cache."""
        for key in keys:
            place = self._presence.left(key)
            if place is not None:
                issue = self._issued.pop(place, None)
                if issue is not None:
                    self._wasted(issue)

    def went_by(self, last: Place, time_s: float) -> None:
        """A read of a long run (`longrun.py`), whose chunks are `skim`med, ended at this place: how an image is read includes it."""
        image = self._image(last >> INDEX_BITS)
        image.watch.observe(time_s, in_run=True)
        image.last = last
        image.last_s = time_s

    def by_run(self, number: int, *, issued: int = 0, used: int = 0, late: int = 0, wasted: int = 0, dropped: int = 0) -> None:
        """Count what was fetched for a long run (`longrun.py`), or became of it, among the prefetches."""
        image = self._images.get(number)
        for counts in (self._totals, self._by_origin[Origin.SEQUENTIAL], *(() if image is None else (image.counts,))):
            counts.issued += issued
            counts.used += used
            counts.late += late
            counts.wasted += wasted
            counts.dropped += dropped

    def statistics(self) -> EngineStatistics:
        """A snapshot of the counters."""
        return EngineStatistics(
            accesses=self._shadow.accesses,
            misses=self._misses,
            misses_without=self._shadow.misses,
            total=replace(self._totals),
            sources={origin.name.lower(): replace(counts) for origin, counts in zip(Origin, self._by_origin, strict=True) if counts.issued},
            pending=len(self._issued),
            candidates=self._judge.judged,
            examples=self.gate.examples,
            right=self.gate.right,
            log_loss=self.gate.log_loss,
            patience=self._judge.patience,
            lifetime=self._judge.life,
            lstm_images=sum(image.deltas.useful for image in self._images.values()),
            lstm_asked=self._judge.lstm_asked,
        )

    def memory_bytes(self) -> int:
        """About what this engine takes: for the caller, who holds a cap on all memory. Costs a pass over the images."""
        images = sum(IMAGE_BYTES + 8 * min(image.echo.tick, RING_MAX) + image.deltas.memory_bytes for image in self._images.values())
        return images + self._judge.memory_bytes + STATE_BYTES * len(self.table) + HELD_BYTES * len(self._presence.places) + GATE_BYTES

    # --- what happened ----------------------------------------------------------------------------------------

    def _settle(self, image: ImageState, access: Access) -> bool:
        """Learn from this access: end the prefetch that it uses, or the example that it answers. Whether it was a miss."""
        place = access.place
        missed = not access.hit
        issue = self._issued.pop(place, None) if self._issued else None
        if issue is None:
            self._judge.answered(place, self._tick)
        else:
            self._judge.used(issue)
            if issue.sent:
                self._used(image, issue, late=missed)
                missed = False
            else:
                # The reader was faster than the queue.
                issue.image.governor.on_dropped(issue.chance, overdue=issue.overdue)
                self._count_drop(issue)
        self._presence.tick(place, missed=missed)
        if missed:
            self._misses += 1
            image.misses += 1
        return missed

    def _used(self, image: ImageState, issue: Issue, *, late: bool) -> None:
        for counts in (self._totals, self._by_origin[issue.origin], image.counts):
            if late:
                counts.late += 1
            else:
                counts.used += 1
        if late:
            # Right, but not early enough: look further ahead. A guest that always waits shows nothing of how fast it would be.
            image.interval_s = max(image.interval_s * LATE_FACTOR, INTERVAL_MIN_S)
        if issue.origin is Origin.PROFILE:
            issue.image.replaying -= 1
            self._feed(issue.image)
        issue.image.governor.on_used(issue.chance, issue.origin, overdue=issue.overdue)

    def _wasted(self, issue: Issue) -> None:
        for counts in (self._totals, self._by_origin[issue.origin], issue.image.counts):
            counts.wasted += 1
        self._judge.wasted(issue, self._tick)
        if issue.origin is Origin.PROFILE:
            issue.image.replaying -= 1
        issue.image.governor.on_wasted(issue.chance, issue.origin, overdue=issue.overdue)

    def _drop(self, place: Place) -> None:
        issue = self._issued.pop(place, None)
        if issue is None:
            return
        self._presence.give_up(place)
        issue.image.governor.on_dropped(issue.chance, overdue=issue.overdue)
        self._count_drop(issue)

    def _count_drop(self, issue: Issue) -> None:
        for counts in (self._totals, self._by_origin[issue.origin], issue.image.counts):
            counts.dropped += 1
        if issue.origin is Origin.PROFILE:
            issue.image.replaying -= 1

    # --- what to do -------------------------------------------------------------------------------------------

    def _decide(self, image: ImageState, wanted: list[Wanted]) -> None:
        """Issue what there is a chance for, the likeliest first, and only what can be fetched."""
        chances = min(AT_ONCE_MAX, image.governor.chances(), QUEUE_MAX - len(self._queue))
        end: Place | None = None
        for odds, place, origin, features, score, kind in wanted[: max(0, chances)]:
            if self._content is not None:
                key = self._content(place)
                if key is not None and (key == NOTHING or self._presence.holds(key)):
                    # A hole, or here under another name.
                    self._judge.mute(place, self._tick)
                    if key == NOTHING and origin is Origin.SEQUENTIAL:
                        end = place
                    continue
            if end is not None and origin is Origin.SEQUENTIAL and (place - end) * image.streams.direction > 0:
                continue  # streams end at holes
            self._issue(image, place, origin, logistic(odds), features, score, kind)

    def _issue(
        self,
        image: ImageState,
        place: Place,
        origin: Origin,
        chance: float,
        features: Features | None,
        score: float,
        kind: int,
        *,
        queued: bool = True,
    ) -> None:
        issue = self._issued[place] = Issue(image, self._tick, origin, chance, features, score, kind)
        if origin is Origin.SEQUENTIAL:
            issue.grace = min(abs(place - image.last), image.streams.window_max)
        self._presence.expect(place)
        # A profile's chunks are wanted within the boot, not within the gate's patience: they have no deadline but eviction.
        self._judge.decided(place, self._tick, deadline=features is not None)
        if queued:
            self._queue.append(place)
        image.governor.on_fetch(chance)

    def _sent(self, issue: Issue) -> None:
        issue.sent = True
        for counts in (self._totals, self._by_origin[issue.origin], issue.image.counts):
            counts.issued += 1

    def _record(self, image: ImageState, place: Place, key: Key) -> None:
        recorder = image.recorder
        if recorder is None:
            return
        if recorder.first is None:
            image.family = key
            self.shelf.lend(key, image.deltas)
            first = place >> INDEX_BITS << INDEX_BITS
            content = self._content
            profile = self.book.find(key, None if content is None else lambda index: content(first | index))
            if profile is not None:
                image.replay.extend(places(first, profile))
                self._feed(image)
        if recorder.observe(place & INDEX_MASK, key):
            self.book.fold(recorder)
            image.recorder = None

    def _feed(self, image: ImageState) -> None:
        """Propose what the profile names next: no more at once than has room on probation, or is free, and half of the cache at most."""
        free = self.capacity_chunks - len(self._presence.places)
        limit = max(1, self.capacity_chunks // WINDOW_SHARE, min(free, self.capacity_chunks // 2))
        replay = image.replay
        while replay and image.replaying < limit and len(self._queue) < QUEUE_MAX:
            place, chance = replay.popleft()
            if place in self._presence.places:
                continue
            if logit(chance) >= image.governor.trusted + image.governor.bias[Origin.PROFILE]:
                image.replaying += 1
                self._issue(image, place, Origin.PROFILE, chance, None, 0.0, 0)

    # --- bounds -----------------------------------------------------------------------------------------------

    def _image(self, number: int) -> ImageState:
        state = self._images.get(number)
        if state is None:
            state = self._images[number] = ImageState(number, self.settings, self.table)
            if len(self._images) > IMAGES_MAX:
                oldest = next(iter(self._images))  # opened longest ago
                self.closed(oldest)
                del self._images[oldest]
        return state
