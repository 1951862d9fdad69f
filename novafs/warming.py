"""Warming: bring chunks of an image into L1 and L2 ahead of need; what `novafs warm`, `prefetch` of the library and handoffs use.

A *plan* says which chunks: ranges of the image, or what a family of images reads after an open (`novafs.prefetch.profile`), in that
order. A *step* (`warm_chunks`) brings some of them. Whoever warms asks step by step, so he paces himself, shows how far he is, and when he
stops asking, nothing goes on: there is no job to be stopped.

Demand comes first: a step has few requests under way, joined over neighbours in a pack, its frames are verified by threads of their own,
and in L1 its chunks are on probation: where L1 is full they push out each other before anything that was read.
Chunks that are there are not fetched again, so to warm twice costs a look at the map.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import trio

from novafs.cache.base import Frame, Tier
from novafs.cache.packs import PackSource
from novafs.chunk import HOLE_BYTES, Reference
from novafs.codec import PLAIN_MAX, Codec, decode, encode
from novafs.errors import BugError, ConfigError, CorruptionError, NotFoundError, NovaError, RetryableError
from novafs.imagereader import ImageReader
from novafs.prefetch.base import INDEX_MASK, Key, key_of, place_of
from novafs.prefetch.profile import Profile, ProfileBook
from novafs.volume import Volume

log = logging.getLogger(__name__)

BATCH_BYTES: Final = 4 << 20
"""Plain bytes under way at a time."""
L1_SHARE: Final = 16
STEP_CHUNKS_MAX: Final = 16384
THREADS_MAX: Final = 1

Span = tuple[int, int]
"""First chunk and number of chunks."""


@dataclass(slots=True)
class WarmCounts:
    """What a step did. chunks: looked at, holes left out; held: were there; fetched: brought; failed: could not be read, `error` says why.

    read_bytes: payloads that came from L3.
    """

    chunks: int = 0
    held: int = 0
    fetched: int = 0
    failed: int = 0
    read_bytes: int = 0
    error: str = ""

    def add(self, other: WarmCounts) -> None:
        """Count what another step did."""
        self.chunks += other.chunks
        self.held += other.held
        self.fetched += other.fetched
        self.failed += other.failed
        self.read_bytes += other.read_bytes
        self.error = self.error or other.error


def chunks_of(size: int, chunk_size: int, start: int = 0, end: int | None = None) -> list[Span]:
    """The chunks that hold the bytes `start` up to `end` of an image of `size` bytes."""
    end = size if end is None else min(end, size)
    if start >= end:
        return []
    first = start // chunk_size
    return [(first, (end + chunk_size - 1) // chunk_size - first)]


def spans_of(indexes: Iterable[int]) -> list[Span]:
    """Chunks in the order given, neighbours joined."""
    spans: list[Span] = []
    for index in indexes:
        if spans and spans[-1][0] + spans[-1][1] == index:
            spans[-1] = (spans[-1][0], spans[-1][1] + 1)
        else:
            spans.append((index, 1))
    return spans


def cut(spans: Iterable[Span], chunks: int) -> Iterable[list[Span]]:
    """The same spans in parts of at most `chunks` chunks."""
    part: list[Span] = []
    room = chunks
    for first, count in spans:
        while count:
            taken = min(count, room)
            part.append((first, taken))
            first, count, room = first + taken, count - taken, room - taken
            if not room:
                yield part
                part, room = [], chunks
    if part:
        yield part


def tiers_of(word: str, volume: Volume) -> tuple[bool, bool]:
    """Whether L1 and L2 are meant by "l1", "l2", "both" or "auto" (what there is). Raises ConfigError where the volume has no L2."""
    if word == "auto":
        return True, volume.cache.l2 is not None and volume.cache.l2.up
    if word not in ("l1", "l2", "both"):
        raise ConfigError(f"tier {word!r}: expected l1, l2 or both")
    if word != "l1" and volume.cache.l2 is None:
        raise ConfigError(f"tier {word}: this volume has no L2 here; set l2.url (--l2-url), or warm l1")
    return word != "l2", word != "l1"


async def warm_chunks(volume: Volume, image: ImageReader, spans: Iterable[Span], *, l1: bool = True, l2: bool = False) -> WarmCounts:
    """Bring chunks of an image into L1, L2 or both, and return when they are there. What can not be read is counted, not raised.

    Raises what reading the image's map raises.
    """
    counts = WarmCounts()
    try:
        await _warm_chunks(volume, image, spans, counts, l1=l1, l2=l2)
    finally:
        volume.tally.warmed.note(fetched=counts.fetched, held=counts.held, failed=counts.failed, read_bytes=counts.read_bytes)
    return counts


async def _warm_chunks(volume: Volume, image: ImageReader, spans: Iterable[Span], counts: WarmCounts, *, l1: bool, l2: bool) -> None:
    # What is under way is accounted in L1: in a small one it must not push out what was read.
    per_batch = max(1, min(BATCH_BYTES, volume.cache.l1.capacity_bytes // L1_SHARE) // volume.chunk_size)
    for part in cut(spans, per_batch):
        indexes = [index for first, count in part for index in range(first, first + count)]
        await image.load_entries(indexes)
        places: dict[bytes, tuple[Reference, int]] = {}
        for index in indexes:
            raw = image.entry_nowait(index)
            if raw is None:
                raise BugError(f"{image.name}: its map was loaded for chunk {index}, and is not there")
            if raw != HOLE_BYTES:
                places.setdefault(raw[:32], (Reference.unpack(raw), place_of(image.watch_number, index)))
        counts.chunks += len(places)
        lacking = list(places.values())
        if l2 and volume.cache.l2 is not None:
            lacking = await _into_l2(volume, volume.cache.l2, lacking, counts, last=not l1)
        if l1:
            await _into_l1(volume, list(places.values()), counts)
        elif lacking:  # L2 would not take them by itself: by way of L1
            await _into_l1(volume, lacking, counts)


async def _into_l1(volume: Volume, places: Sequence[tuple[Reference, int]], counts: WarmCounts) -> None:
    cache = volume.cache
    before = cache.statistics().l3_traffic.read_bytes
    flights = [flight for reference, place in places if (flight := cache.prefetch(reference, place)) is not None]
    counts.held += len(places) - len(flights)
    cache.start_prefetches(flights)
    for flight in flights:
        await flight.done.wait()
        if flight.error is None:
            counts.fetched += 1
            continue
        counts.failed += 1
        counts.error = counts.error or str(flight.error)
        if isinstance(flight.error, RetryableError):
            raise flight.error
    # Others may have read meanwhile: an upper bound.
    read = cache.statistics().l3_traffic.read_bytes - before
    counts.read_bytes += min(read, sum(flight.reference.length for flight in flights))


async def _into_l2(
    volume: Volume, l2: Tier, places: list[tuple[Reference, int]], counts: WarmCounts, *, last: bool
) -> list[tuple[Reference, int]]:
    """Put into L2 what it lacks, past L1; those that could not be read here. last: what is there counts as held."""
    if not places:
        return []
    if not l2.up:
        counts.failed += len(places) if last else 0
        counts.error = counts.error or "L2 does not answer"
        return []
    cache, threads = volume.cache, _threads(volume)
    have = await trio.to_thread.run_sync(l2.contains_many, [reference.chunk_id for reference, _ in places], limiter=threads)
    if last:
        counts.held += len(have)
    lacking = [(reference, place) for reference, place in places if reference.chunk_id not in have]
    frames: dict[bytes, Frame] = {
        reference.chunk_id: frame for reference, _ in lacking if (frame := cache.l1.frame(reference.chunk_id)) is not None
    }
    left = [item for item in lacking if item[0].chunk_id not in frames and item[0].length <= PLAIN_MAX]
    deltas = [item for item in left if item[0].codec == Codec.HDE]  # nothing for L2 as they are: by way of L1
    left = [item for item in left if item[0].codec != Codec.HDE]
    try:
        payloads = await PackSource(volume.client).read_frames([reference for reference, _ in left])
    except RetryableError:
        raise
    except NovaError as error:
        log.debug("warming L2 by way of L1, where packs are looked for: %s", error)
        return left + deltas
    counts.read_bytes += sum(map(len, payloads))
    items: list[tuple[bytes, Frame]] = [
        (reference.chunk_id, Frame(reference.codec, payload)) for (reference, _), payload in zip(left, payloads, strict=True)
    ]
    good = await trio.to_thread.run_sync(_checked, items, frames, volume.config.l2.codec, limiter=threads)
    await trio.to_thread.run_sync(l2.put_many, good, limiter=threads)
    if last:
        counts.fetched += len(good)
    return [item for item in left if item[0].chunk_id not in good] + deltas


def _threads(volume: Volume) -> trio.CapacityLimiter:
    """The threads that warm one volume: one at a time."""
    limiter = volume.warm_threads
    if limiter is None:
        limiter = volume.warm_threads = trio.CapacityLimiter(THREADS_MAX)
    return limiter


def _checked(items: Sequence[tuple[bytes, Frame]], known: dict[bytes, Frame], codec: Codec) -> dict[bytes, Frame]:
    """Frames for L2: those of L1, and those read whose content is right. In a worker thread."""
    made = dict(known)
    for chunk_id, frame in items:
        try:
            plain = decode(frame.codec, frame.payload, PLAIN_MAX)
        except CorruptionError:
            continue
        if hashlib.sha256(plain).digest() == chunk_id:
            made[chunk_id] = frame if frame.codec in (codec, Codec.NONE) else encode(plain, codec)
    return made


# --- what a guest reads after an open -------------------------------------------------------------------------


async def boot_profile(volume: Volume, image: ImageReader) -> list[int]:
    """The chunks that images which hold what this one holds have read after an open, in that order. Raises NotFoundError."""
    book = await _book(volume)
    profile = await _profile_of(book, image)
    if profile is None:
        raise NotFoundError(
            f"{image.name}: no boot is recorded of an image like it; one is when such an image is opened and read on a mount with prefetch"
        )
    return [index for index, _ in profile.proposals()]


async def _book(volume: Volume) -> ProfileBook:
    """What this process knows, and what is saved."""
    from novafs.modelstore import load_saved  # imports the engine's models
    from novafs.prefetch.model import PROFILES

    if volume.prefetcher is not None:
        return volume.prefetcher.engine.book
    saved = await load_saved(volume.client, PROFILES)
    if saved is None:
        return ProfileBook(volume.chunk_size)
    return await trio.to_thread.run_sync(lambda: ProfileBook.from_bytes(saved, "models/profiles", chunk_size=volume.chunk_size))


async def _profile_of(book: ProfileBook, image: ImageReader) -> Profile | None:
    def content(index: int) -> Key | None:
        raw = image.entry_nowait(index) if 0 <= index <= INDEX_MASK else None
        return None if raw is None or raw == HOLE_BYTES else key_of(raw)

    starts = book.starts()
    await image.load_entries(sorted({index for index, _ in starts}))
    for index, first in starts:
        if content(index) == first:
            await image.load_entries(sorted(book.named(first)))
            profile = book.find(first, content)
            if profile is not None:
                return profile
    return None


# --- by name, for the command line and the control socket --------------------------------------------------------


async def plan(volume: Volume, request: dict[str, Any]) -> dict[str, Any]:
    """What is to be warmed of an image: {"image", "start"?, "end"?, "boot"?, "tier"} → its size, chunk size and spans."""
    l1, l2 = tiers_of(str(request.get("tier", "auto")), volume)
    entry = await volume.catalog.resolve(str(request["image"]), max_age_s=0)
    image = await volume.open_image(entry.node_id)
    try:
        if request.get("boot"):
            spans = spans_of(await boot_profile(volume, image))
        else:
            spans = chunks_of(image.size, volume.chunk_size, int(request.get("start", 0)), request.get("end"))
        tier = "both" if l1 and l2 else "l1" if l1 else "l2"
        return {"path": volume.catalog.path_of(entry), "size": image.size, "chunk_size": volume.chunk_size, "spans": spans, "tier": tier}
    finally:
        await volume.close_image(image)


async def step(volume: Volume, request: dict[str, Any]) -> dict[str, Any]:
    """Warm some of a plan: {"image", "spans", "tier"} → `WarmCounts` as a table."""
    l1, l2 = tiers_of(str(request.get("tier", "auto")), volume)
    spans = [(int(first), int(count)) for first, count in request["spans"]]
    total = sum(count for _, count in spans)
    if total > STEP_CHUNKS_MAX or any(first < 0 or count < 1 for first, count in spans):
        raise ConfigError(f"warm: a step of {total} chunks; expected at most {STEP_CHUNKS_MAX}")
    entry = await volume.catalog.resolve(str(request["image"]))
    image = await volume.open_image(entry.node_id)
    try:
        counts = await warm_chunks(volume, image, _within(spans, image.size, volume.chunk_size), l1=l1, l2=l2)
    finally:
        await volume.close_image(image)
    return {name: getattr(counts, name) for name in WarmCounts.__slots__}


def _within(spans: Iterable[Span], size: int, chunk_size: int) -> list[Span]:
    """Without what lies beyond the end: the image may have become shorter, or its family's profile be longer."""
    chunks = (size + chunk_size - 1) // chunk_size
    return [(first, min(count, chunks - first)) for first, count in spans if first < chunks]
