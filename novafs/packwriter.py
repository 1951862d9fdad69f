"""From plain chunks to stored packs: zero test, hash, dedup, compress, pack, upload. Every writer goes through here.

    async with open_pack_writer(…) as writer:
        entries = await writer.put(plains)       64-byte map entries, in order
        reference = await writer.put_blob(node)  one map node or directory page
        await writer.finish()                    from here on the references may be named by a generation

Promised: before `finish` has returned, no reference that `put` gave may be made durable; after it, every pack that
they name is stored (own uploads answered, dedup hits checked). An upload that fails makes `finish` raise, and nothing
that was put counts. Chunks keep their order within packs, so neighbours in an image are neighbours in a pack.

Where the caller knows what a chunk was before (`Base`), it may be stored as a delta frame (`novafs.delta`). The packs of its chain
count as packs that the references name.

A commit that takes long may be overtaken by a collection, so its caller asks `used.lost()` twice: before it creates what
names the references, and after the answer. Where a pack was lost it stores everything again, with another writer.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Sequence
from collections.abc import Set as AbstractSet
from contextlib import asynccontextmanager
from dataclasses import dataclass, fields
from time import perf_counter
from typing import Final, NamedTuple

import numpy as np
import trio

from novafs import codec as codecs
from novafs.asynctools import open_nursery
from novafs.cache.base import Frame
from novafs.cache.tiered import ChunkCache
from novafs.chunk import HOLE_BYTES, REFERENCE_DTYPE, ChunkId, PackId, Reference, chunk_id, is_zero
from novafs.codec import Codec
from novafs.dedup import Deduplicator
from novafs.delta import Base, Chain, Deltas, Trial, attempt, well_formed
from novafs.errors import NovaError, ObjectExistsError
from novafs.objectstore.client import StoreClient
from novafs.pack import PackBuilder, pack_name
from novafs.revisions import boot_time_s

UPLOADS_MAX: Final = 4
"""Packs in flight of one writer: 4 × 8 MiB fill a 2 Gbit/s link at 100 ms, and bound its memory."""

JOINED_MAX: Final = 1 << 20
"""A pack up to this many bytes is put together on the spot: a thread takes longer to wake."""

PLACED_MAX: Final = 1 << 18
"""Chunks whose place a writer remembers, 270 bytes each: a source of a terabyte has 16 million. Far more than can be in packs that
are not uploaded yet; of what it has forgotten the dedup index knows, and a chunk that nobody knows is stored once more."""


@dataclass(slots=True)
class WriteCounts:
    """What a writer has done. plain_bytes: content of chunks that are no holes; new_bytes: of what is stored anew, blobs included, and
    stored_bytes: its payloads."""

    new_chunks: int = 0
    dedup_chunks: int = 0
    hole_chunks: int = 0
    plain_bytes: int = 0
    new_bytes: int = 0
    stored_bytes: int = 0
    packs: int = 0
    uploaded_bytes: int = 0

    def add(self, other: WriteCounts) -> None:
        """Count what `other` has counted as well."""
        for each in fields(self):
            setattr(self, each.name, getattr(self, each.name) + getattr(other, each.name))


class PacksLostError(NovaError):
    """A collection has overtaken a commit: packs that it refers to are gone or condemned. Never shown where it can be redone.

    committed: what refers to them was created already.
    """

    def __init__(self, packs: Sequence[PackId], *, committed: bool = False) -> None:
        self.committed = committed
        super().__init__(
            f"it took so long that a collection has taken {len(packs)} of the packs it refers to ({packs[0].hex()}, …); try again"
        )


class UsedPacks:
    """The packs that a commit's references name, and since when: what a collection may have overtaken."""

    def __init__(self, dedup: Deduplicator, packs: AbstractSet[bytes] = frozenset(), since_s: float | None = None) -> None:
        self._dedup = dedup
        self.packs: set[bytes] = set(packs)
        self.since_s = boot_time_s() if since_s is None else since_s

    @property
    def overdue(self) -> bool:
        """Whether more than half a grace has passed since, on a clock that counts sleep."""
        return boot_time_s() - self.since_s > self._dedup.guard_s

    async def lost(self) -> list[PackId]:
        """Those that a collection has condemned or deleted; not looked for unless `overdue`. Raises what the store raises."""
        return await self._dedup.lost(self.packs) if self.overdue else []

    def joined(self, other: UsedPacks | None) -> UsedPacks:
        """These, and those of another commit of the same content."""
        if other is None:
            return self
        return UsedPacks(self._dedup, self.packs | other.packs, min(self.since_s, other.since_s))


Content = bytes | memoryview
"""Of a chunk: a view of what was read, where nobody keeps it."""


class Prepared(NamedTuple):
    """A chunk on its way: its id (None for a hole), where it is stored already, or its frame; of a delta frame the chain, and the frame
    that the tiers may have."""

    plain: Content
    chunk_id: ChunkId | None
    known: Reference | None
    frame: Frame | None
    chain: Chain = ()
    whole: Frame | None = None


class _Encoded(NamedTuple):
    """frame: what is stored; whole: without a delta; trial: what trying one gave."""

    frame: Frame
    whole: Frame
    chain: Chain = ()
    trial: Trial | None = None


class PackWriter:
    """Use through `open_pack_writer`. One task at a time calls `put`, `append`, `put_blob` and `finish`; `prepare` may run in several."""

    def __init__(
        self,
        nursery: trio.Nursery,
        client: StoreClient,
        dedup: Deduplicator,
        *,
        codec: Codec,
        codec_level: int | None,
        workers: trio.CapacityLimiter,
        cache: ChunkCache | None,
        totals: WriteCounts | None = None,
        deltas: Deltas | None = None,
    ) -> None:
        self._totals = totals
        self._deltas = deltas if deltas is not None and deltas.enabled else None
        self.image = b""
        """Whose chunks these are, where bases are given."""
        self._nursery = nursery
        self._client = client
        self._dedup = dedup
        self._codec = codec
        self._codec_level = codec_level
        self._workers = workers
        self._cache = cache
        self._builder = PackBuilder()
        # What this writer has placed, oldest first; true once its pack is uploaded.
        self._placed: dict[bytes, Reference] = {}
        self._slots = trio.CapacityLimiter(UPLOADS_MAX)
        self._uploading = 0
        self._idle = trio.Event()
        self._idle.set()
        self._error: BaseException | None = None
        self.used = UsedPacks(dedup)
        self.known: trio.Event | None = None
        """Where the caller gives one, dedup is asked when it is set: what is stored is being looked at still."""
        self.counts = WriteCounts()
        self.resized_bytes = 0
        """By how much the frames of chunks in nodes that were put right have grown: compaction makes whole ones of deltas."""

    @property
    def wants_bases(self) -> bool:
        """Whether it is of use to say what chunks were before."""
        return self._deltas is not None

    async def prepare(self, plains: Sequence[Content], bases: Sequence[Base | None] = ()) -> list[Prepared]:
        """Zero test, hash, dedup lookup, compression of what is new; in worker threads. bases: what the chunks were before, in the
        same order, in the committed map that the new references take the place of; none where that is not known."""
        ids = await trio.to_thread.run_sync(_identify, plains, limiter=self._workers)
        # Taken along, because `_placed` may have forgotten them when `append` comes to them.
        placed: dict[bytes, Reference] = {i: self._placed[i] for i in ids if i is not None and i in self._placed}
        wanted = {i for i in ids if i is not None and i not in placed}
        if self.known is not None:
            await self.known.wait()
        known: dict[bytes, Reference] = {**await self._dedup.find(list(wanted)), **placed}
        before: dict[ChunkId | None, Base | None] = dict(zip(ids, bases, strict=True)) if bases else {}
        for chunk in wanted - known.keys():
            # The same content again: it may stay where it is, and if that is a delta frame dedup does not know it.
            base = before.get(chunk)
            if base is not None and base.reference.chunk_id == chunk and not self._dedup.condemned.forbids(base.reference):
                known[chunk] = base.reference
        fresh = {i: plain for i, plain in zip(ids, plains, strict=True) if i in wanted and i not in known}
        encoded: dict[ChunkId | None, _Encoded] = {}
        if fresh:
            work = [(plain, *await self._chain_over(i, before.get(i))) for i, plain in fresh.items()]
            made = await trio.to_thread.run_sync(_encode, work, self._codec, self._codec_level, limiter=self._workers)
            encoded = dict(zip(fresh, made, strict=True))
        for each in encoded.values():
            if each.trial is not None and self._deltas is not None:
                self._deltas.note_trial(self.image, each.trial, stored=each.frame.codec == Codec.HDE)
        prepared = []
        for i, plain in zip(ids, plains, strict=True):
            new = encoded.get(i)
            if new is not None:
                prepared.append(Prepared(plain, i, None, new.frame, new.chain, new.whole))
            else:
                prepared.append(Prepared(plain, i, known.get(i) if i is not None else None, None))
        return prepared

    async def _chain_over(self, chunk_id: ChunkId | None, base: Base | None) -> tuple[bytes, Chain]:
        """What a delta may be made against: content, and the chain of the frames that have it; nothing where it may not.

        Each frame of the chain is named at its final place, and none is where nothing may be referred to any more.
        """
        deltas = self._deltas
        if base is None or deltas is None or base.reference.chunk_id == chunk_id or not deltas.judge(self.image).wants():
            return b"", ()
        over = deltas.chain_over(base.reference)
        if over is None:
            return b"", ()
        condemned = self._dedup.condemned
        chain: list[Reference] = []
        for reference in over:
            place = Reference.unpack((await self._dedup.put_right(reference.pack()))[0])
            if condemned.forbids(place) or place.pack_id in condemned.current.moved:
                return b"", ()
            chain.append(place)
            if place.codec != Codec.HDE:  # it was when the chain was made, and has been compacted since
                break
        return (base.plain, tuple(chain)) if well_formed(chain) else (b"", ())

    async def append(self, prepared: Sequence[Prepared]) -> list[bytes]:
        """Place chunks in packs, in order; the map entry of each. Waits while `UPLOADS_MAX` packs are in flight."""
        return [await self._place(item) for item in prepared]

    async def _place(self, item: Prepared) -> bytes:
        counts = self.counts
        if item.chunk_id is None:
            counts.hole_chunks += 1
            return HOLE_BYTES
        counts.plain_bytes += len(item.plain)
        reference = self._placed.get(item.chunk_id) or item.known
        if reference is not None:
            counts.dedup_chunks += 1
        else:
            assert item.frame is not None  # `prepare` gives a place or a frame
            if self._builder.full:
                await self._upload()
            reference = self._builder.add(item.chunk_id, item.frame, len(item.plain), item.chain)
            if item.chain and self._deltas is not None:
                self._deltas.note(reference, item.chain, self.image)
                self.used.packs.update(base.pack_id for base in item.chain)
            counts.new_chunks += 1
            counts.new_bytes += len(item.plain)
            counts.stored_bytes += reference.length
            self._placed[item.chunk_id] = reference
            if len(self._placed) > PLACED_MAX:
                del self._placed[next(iter(self._placed))]
        self.used.packs.add(reference.pack_id)
        if self._cache is not None:
            self._cache.add(item.chunk_id, bytes(item.plain), item.whole or item.frame)
        return reference.pack()

    async def put(self, plains: Sequence[Content], bases: Sequence[Base | None] = ()) -> list[bytes]:
        """Map entries of plain chunks, in order: 64 bytes each, `HOLE_BYTES` for zeros. bases: see `prepare`."""
        return await self.append(await self.prepare(plains, bases))

    async def put_blob(self, plain: bytes, base: Base | None = None) -> Reference:
        """Store a blob that is no chunk of an image (a map node, a directory page); not counted as one. base: what it was before."""
        before = (self.counts.new_chunks, self.counts.dedup_chunks, self.counts.plain_bytes)
        (entry,) = await self.append(await self.prepare([plain], [base]))
        self.counts.new_chunks, self.counts.dedup_chunks, self.counts.plain_bytes = before
        return Reference.unpack(entry)

    async def put_right(self, node: bytes, level: int) -> bytes:
        """A map node before it is stored: what compactions have moved is named at its new place."""
        righted, packs = await self._dedup.put_right(node)
        self.used.packs |= packs
        if not level and righted is not node:
            self.resized_bytes += _stored_bytes(righted) - _stored_bytes(node)
        return righted

    def forbids(self, raw: bytes) -> bool:
        """Whether nothing may refer to the frame of a 64-byte map entry any more: a new copy takes its place."""
        return raw != HOLE_BYTES and self._dedup.condemned.forbids(Reference.unpack(raw))

    async def _upload(self) -> None:
        builder, self._builder = self._builder, PackBuilder()
        if not len(builder):
            return
        self._raise_failed()
        await self._slots.acquire_on_behalf_of(builder)
        if not self._uploading:
            self._idle = trio.Event()
        self._uploading += 1
        self._nursery.start_soon(self._send, builder)

    async def _send(self, builder: PackBuilder) -> None:
        try:
            started_s = boot_time_s()
            data = await trio.to_thread.run_sync(builder.finish) if builder.size > JOINED_MAX else builder.finish()
            began_s = perf_counter()
            with contextlib.suppress(ObjectExistsError):  # ids are random: it is this very pack, whose first answer was lost
                await self._client.create(pack_name(builder.pack_id), data)
            self._client.latencies.of("l3", "put").note(perf_counter() - began_s)
            self.counts.packs += 1
            self.counts.uploaded_bytes += len(data)
            await self._dedup.note_uploaded(builder.pack_id, builder.references, started_s)
        except Exception as error:
            self._error = self._error or error
        finally:
            self._slots.release_on_behalf_of(builder)
            self._uploading -= 1
            if not self._uploading:
                self._idle.set()

    def _raise_failed(self) -> None:
        if self._error is not None:
            raise self._error

    async def finish(self) -> None:
        """Upload what is left and wait for all of it. Raises the first error of any upload."""
        await self._upload()
        await self._idle.wait()
        self._raise_failed()
        if self._totals is not None:
            self._totals.add(self.counts)
            self._totals = None  # once, however often this is called


def _stored_bytes(node: bytes) -> int:
    return int(np.frombuffer(node, dtype=REFERENCE_DTYPE)["length"].sum(dtype=np.int64))


def _identify(plains: Sequence[Content]) -> list[ChunkId | None]:
    return [None if is_zero(plain) else chunk_id(plain) for plain in plains]


def _encode(work: Sequence[tuple[Content, bytes, Chain]], codec: Codec, level: int | None) -> list[_Encoded]:
    """Frames of contents; of those that have a base and its chain a delta frame where that is small enough."""
    made = []
    frames = codecs.encode_many([plain for plain, _, _ in work], codec, level)
    for (plain, base, chain), whole in zip(work, frames, strict=True):
        delta, trial = attempt(bytes(plain), base, chain, whole) if chain else (None, None)
        made.append(_Encoded(delta, whole, chain, trial) if delta is not None else _Encoded(whole, whole, (), trial))
    return made


@asynccontextmanager
async def open_pack_writer(
    client: StoreClient,
    dedup: Deduplicator,
    *,
    codec: Codec,
    codec_level: int | None = None,
    workers: trio.CapacityLimiter,
    cache: ChunkCache | None = None,
    totals: WriteCounts | None = None,
    deltas: Deltas | None = None,
) -> AsyncIterator[PackWriter]:
    """A writer for one commit. Leaving the block without `finish` abandons what was put (packs may stay, unreferenced).

    totals: where what it has done is added up at `finish`. deltas: of the volume; without, or where it is not enabled, none are made.
    """
    async with open_nursery() as nursery:
        yield PackWriter(
            nursery,
            client,
            dedup,
            codec=codec,
            codec_level=codec_level,
            workers=workers,
            cache=cache,
            totals=totals,
            deltas=deltas,
        )
        nursery.cancel_scope.cancel()
