"""One open image: write, resize, fsync, commit. `novafs.imagereader` is the half that reads.

A write takes the lease if it is the first (`novafs.lease`), then goes into the newest layer and waits for nothing but the cap
on dirty data. `fsync` makes what was written durable in the journal. A commit freezes the layers in one step (so every
generation is a point in time), stores what they change, creates the next generation (THE COMMIT POINT) and only then
forgets them and trims the journal; after an error they are all still there, and the next commit takes them again.

Always holds: what is dirty was written under `_lease`, and each write has a sequence number of the journal; those that neither the
journal nor a generation has are in `_pending`, in order. An image whose name is gone (`note_unlinked`) promises nothing beyond its last
handle: it is committed only where memory runs short.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import AbstractAsyncContextManager
from functools import partial
from time import perf_counter
from typing import Final, NamedTuple, Protocol

import msgspec
import numpy as np
import trio

from novafs import dirty
from novafs.asynctools import open_nursery
from novafs.cache.tiered import ChunkCache
from novafs.chunk import HOLE_BYTES, ChunkIndex, Reference
from novafs.delta import Base
from novafs.dirty import Layer
from novafs.errors import (
    BugError,
    LeaseLostError,
    NovaError,
    ObjectNotFoundError,
    ReadOnlyError,
    RetryableError,
    StaleError,
    StoreUnavailableError,
    TooLargeError,
)
from novafs.fold import FOLD_RETRY_S, Fold, Stored, worthwhile
from novafs.follow import Follower
from novafs.generation import Generation
from novafs.imagemap import FANOUT, LEVELS_MAX, TOP_MAX, MapState
from novafs.imagereader import ImageReader, Watcher
from novafs.journal import Journal
from novafs.journalfile import Record, RecordKind
from novafs.lease import Lease
from novafs.packwriter import PacksLostError, PackWriter, UsedPacks
from novafs.patch import extended, extents_of
from novafs.revisions import FRESH_S, Chain, ConflictError, Head, boot_time_s, new_nonce
from novafs.seen import Seen

log = logging.getLogger(__name__)

COMMIT_BATCH_CHUNKS: Final = 32
"""Chunks merged, hashed and compressed at a time by a commit: bounds its memory, and keeps two workers busy."""

PAIRS_MIN: Final = 4
"""So many fsyncs in a row, each of one write, and the journal begins with the next such write before its fsync is here."""


class Writeback(Protocol):
    """What an image asks of its volume when it writes. journal: None where the volume is not this process's to write images of."""

    @property
    def journal(self) -> Journal | None: ...

    @property
    def durability(self) -> str:
        """What fsync waits for: "journal" or "store"."""
        ...

    @property
    def flush_timeout_s(self) -> float:
        """How long the close of a handle waits for the store."""
        ...

    def pack_writer(self) -> AbstractAsyncContextManager[PackWriter]: ...

    async def acquire_lease(self, image: Image) -> Lease:
        """The right to write an image. Raises LeaseHeldError, ReadOnlyError."""
        ...

    def unsure_lease(self, image: Image) -> Lease | None:
        """The lease that a failed `acquire_lease` may have taken all the same; it is to be released."""
        ...

    async def is_followed(self, image: Image) -> bool:
        """Whether another host has the image open for writing, as far as can be told."""
        ...

    async def release_lease(self, lease: Lease) -> None:
        """Give it back."""
        ...

    def commit_soon(self, image: Image) -> CommitTicket:
        """Start a commit in the background."""
        ...

    async def set_aside(self, image: Image, records: list[Record], error: NovaError) -> None:
        """The lease was lost: keep what was written and not committed, and say where."""
        ...

    def account_dirty(self, change: int) -> None:
        """Dirty bytes of an image changed; may start a commit in the background."""
        ...

    async def wait_dirty_room(self) -> bool:
        """Wait until the volume's dirty bytes are below their cap; whether it took a checkpoint."""
        ...

    def start(self, work: Callable[[], Awaitable[None]]) -> None:
        """Run it in the background; not at all where the volume is being closed."""
        ...

    def note_commit(self, image: Image, taken_bytes: int, seconds: float) -> None:
        """A generation was committed that holds so many bytes of dirty data more than the one before."""
        ...

    def note_lease_lost(self, image: Image) -> None:
        """Another host has taken the lease over."""
        ...


class CommitTicket:
    """A commit under way in the background."""

    def __init__(self) -> None:
        self._done = trio.Event()
        self._error: NovaError | None = StoreUnavailableError("the volume was closed before the commit was done")

    async def run(self, image: Image) -> None:
        """Commit, and keep what it raised. What it raises by mistake fails those who wait, and nobody else."""
        try:
            await image.commit()
        except NovaError as error:
            self._error = error
        except Exception as error:
            self._error = mistake(image, error)
        else:
            self._error = None
        finally:
            self._done.set()

    async def outcome(self) -> NovaError | None:
        """Wait for it; None where it succeeded."""
        await self._done.wait()
        return self._error


class _Committed(NamedTuple):
    """A commit that succeeded: the head and the map from now on. same_map: that is the map of before, perhaps with holes at its end."""

    head: Head[Generation]
    state: MapState
    same_map: bool = False


class _Patched(NamedTuple):
    generation: Generation
    state: MapState


def mistake(image: Image, error: Exception) -> BugError:
    """Log an error that no commit should raise; what those who wait for it are told. The data is still there."""
    log.error("%s: committing it failed by a mistake in NovaFS; the data is kept, and tried again", image.name, exc_info=error)
    return BugError(f"{image.name}: committing it failed with {type(error).__name__}: {error}; please report it, with the log")


class Image(ImageReader):
    """Use through `Volume.open_image`, which gives one object per image however many handles there are."""

    def __init__(
        self,
        *,
        node_id: bytes,
        name: str,
        chunk_size: int,
        head: Head[Generation],
        chain: Chain[Generation],
        cache: ChunkCache,
        writeback: Writeback,
        read_only: bool,
        watcher: Watcher | None = None,
    ) -> None:
        super().__init__(node_id=node_id, name=name, chunk_size=chunk_size, head=head, cache=cache, watcher=watcher)
        self.size_max = min(TOP_MAX * FANOUT**LEVELS_MAX * chunk_size, (1 << 63) - 1)
        self.read_only = read_only
        self.handles = 0
        self.unlinked = False
        """Set by `note_unlinked`, for good."""
        self._chain = chain
        self._writeback = writeback
        self._unanswered: UsedPacks | None = None
        """Of commits of which it is not known whether they count."""
        self._passed_over = False
        """Whether the map here is not the newest generation's (`_pass_over`): chunks that it names may be gone by now."""
        self._fold: Fold | None = None
        self._folding = False
        """Whether the task of a fold runs, perhaps of one that was dropped: there is one at a time, so what hangs does not pile up."""
        self._folds_after_s = 0.0
        """Trio time before which none is begun."""
        self._commit_lock = trio.Lock()
        self._lease_lock = trio.Lock()
        self._journal_lock = trio.Lock()
        self._lease: Lease | None = None
        self._leaving: Lease | None = None
        """A lease whose release is under way or failed: nothing is written under it, and it is released before another is taken."""
        self._dirty_bytes = 0
        self._dirty_since_s: float | None = None
        self._pending: list[Record] = []
        self._pairs = 0
        """Fsyncs in a row that found one write to sync."""
        self._last_sequence = 0
        self._safe_sequence = 0
        """Every write up to here is in the journal or in a generation."""
        self._lost: tuple[int, NovaError] | None = None
        """Handles opened before this incarnation wrote something that was then set aside: their fsync must fail."""
        self.incarnation = 0
        """Counts generations of other hosts that were taken over: a handle that was opened before must not write."""
        self.adopted = 0
        """Counts generations that were taken over, whether or not handles go on: who has pages of before has old ones."""

    @property
    def map_bytes(self) -> int:
        """See `ImageReader.map_bytes`; with what a fold keeps."""
        fold = self._fold
        layers = (fold.layer, fold.since) if fold is not None else ()
        return super().map_bytes + sum(len(layer.chunks) for layer in layers if layer is not None) * self.chunk_size

    @property
    def dirty_bytes(self) -> int:
        """Memory that dirty chunks, and writes that wait for the journal, take."""
        return self._dirty_bytes

    @property
    def dirty_since_s(self) -> float | None:
        """Trio time of the oldest write that is in no generation, None where all are."""
        return self._dirty_since_s if self.dirty else None

    @property
    def lease(self) -> Lease | None:
        """The held lease, if this host writes the image."""
        return self._lease

    @property
    def leaving(self) -> bool:
        """Whether a lease is still to be given back (`release_lease`)."""
        return self._leaving is not None

    async def read(self, offset: int, length: int) -> bytes:
        """See `ImageReader.read`. Raises StaleError where the generation that is open here was collected: the image was removed,
        or written elsewhere, and this host did not renew its pin for `gc.grace`."""
        if self.follower is not None:
            await self.follower.fresh()
        try:
            return await super().read(offset, length)
        except ObjectNotFoundError as error:
            try:
                await self._chain.read(self.generation)
            except ObjectNotFoundError:
                raise StaleError(
                    f"{self.name}: generation {self.generation}, which is open here, was replaced or removed elsewhere, and collected "
                    f"while this host was away; close and reopen it"
                ) from error
            raise

    # -- writing ------------------------------------------------------------------------------------------------

    async def write(self, offset: int, data: bytes | memoryview, *, incarnation: int | None = None) -> int:
        """Store bytes, growing the image where they reach past its end; how many (always all).

        incarnation: what it was when the handle was opened. The first write takes the lease; later ones wait only
        while the volume's dirty data is at its cap. Raises ReadOnlyError, LeaseHeldError, LeaseLostError, StaleError,
        TooLargeError.
        """
        if not len(data):
            return 0
        if offset + len(data) > self.size_max:
            raise TooLargeError(f"{self.name}: a write to byte {offset + len(data)} is beyond the largest image of {self.size_max} bytes")
        await self._prepare_write(incarnation)
        # No checkpoint from here on: the write is whole, in one layer, under the lease.
        self._apply(RecordKind.DATA, offset, bytes(data))
        self.traffic.writes += 1
        self.traffic.written_bytes += len(data)
        if self._pairs >= PAIRS_MIN:
            self._start_journal()
        return len(data)

    def _start_journal(self) -> None:
        """Each write was followed by its fsync of late: the disk may begin before that is here."""
        journal = self._writeback.journal
        if len(self._pending) > 1 or journal is None or self._lease is None or self._lease.wanted:
            self._pairs = 0
        elif self._pending:
            journal.start(self._pending)

    async def resize(self, size: int, *, incarnation: int | None = None) -> None:
        """Cut or grow to `size` bytes; what growth adds reads as zeros. Raises what `write` raises."""
        if size > self.size_max or size < 0:
            raise TooLargeError(f"{self.name}: {size} bytes, the largest image has {self.size_max}")
        if size == self.size and not self.read_only:
            return
        await self._prepare_write(incarnation)
        self._apply(RecordKind.RESIZE, size, b"")

    async def set_mtime(self, mtime_ns: int) -> None:
        """Set the time of the last change to the content; durable with the next commit. Raises what `write` raises."""
        await self._prepare_write(None)
        self._touch()
        self.mtime_ns = mtime_ns

    async def _prepare_write(self, incarnation: int | None) -> None:
        """Everything that a write may have to wait for. On return, and up to the next checkpoint, it may be applied."""
        if self.read_only:
            raise ReadOnlyError(f"{self.name}: opened on a read-only volume, mount or snapshot")
        while True:
            if incarnation is not None:
                self._check_lost(incarnation)
            self._check_incarnation(incarnation)
            if self._lease is None:
                await self.take_lease()
                continue
            self._lease.check()
            if not await self._writeback.wait_dirty_room():
                return

    def _check_incarnation(self, incarnation: int | None) -> None:
        if incarnation is not None and incarnation != self.incarnation:
            raise StaleError(f"{self.name}: another host wrote the image since this handle was opened; close and reopen it")

    def _apply(self, kind: RecordKind, offset: int, data: bytes, *, record: Record | None = None) -> None:
        """Put one change into the newest layer and into the queue for the journal. `record`: it comes from there (replay)."""
        layer, taken = self._layers[-1], 0
        if kind is RecordKind.RESIZE:
            if offset < self.size:
                taken = -layer.truncate(self.chunk_size, offset)
            self.size = offset
        else:
            taken = layer.write(self.chunk_size, offset, data)
            self.size = max(self.size, offset + len(data))
        self._touch()
        journal = self._writeback.journal
        if record is not None:
            self._last_sequence = self._safe_sequence = max(self._last_sequence, record.sequence)
        elif journal is not None and self._lease is not None:
            previous, self._last_sequence = self._last_sequence, journal.next_sequence()
            if self._writeback.durability == "journal" and not self.unlinked:
                epoch = self._lease.epoch
                self._pending.append(Record(kind, self.node_id, epoch, self._last_sequence, offset, data, self.mtime_ns, previous))
                taken += len(data)
        self._account(taken)

    def _touch(self) -> None:
        self.mtime_ns = self.ctime_ns = time.time_ns()
        self._layers[-1].touched = True
        if self._dirty_since_s is None:
            self._dirty_since_s = trio.current_time()

    def _account(self, change: int) -> None:
        if change:
            self._dirty_bytes += change
            self._writeback.account_dirty(change)

    # -- the right to write -------------------------------------------------------------------------------------

    async def take_lease(self, *, replaying: bool = False) -> None:
        """Take the lease and commit once under it, so that nobody who held it before can commit any more.

        replaying: the journal has writes that the head does not contain; the sequence that the head names stays.
        Raises LeaseHeldError, StaleError where the head is no longer the generation that was read here.
        """
        async with self._lease_lock:
            if self._lease is not None:
                return
            await self._finish_leaving()
            try:
                lease = await self._writeback.acquire_lease(self)
            except BaseException:
                self._leaving = self._writeback.unsure_lease(self)
                raise
            try:
                async with self._commit_lock, open_nursery() as nursery:
                    nursery.start_soon(self._look_for_followers, lease)
                    await self._fence(lease, replaying)
            except BaseException:
                self._leaving = lease
                with trio.move_on_after(5, shield=True):
                    try:
                        await self._finish_leaving()
                    except NovaError as error:
                        log.warning("%s: its lease is given back later: %s", self.name, error)
                raise
            self._lease = lease
            if self.follower is not None:
                self.follower.stop()
                self.follower = None

    async def _look_for_followers(self, lease: Lease) -> None:
        """Of a lease that was just taken: who looks at it later finds it taken."""
        if await self._writeback.is_followed(self):
            lease.note_followed()

    def unfollow(self, follower: Follower) -> None:
        """It was removed, or can not be followed."""
        if self.follower is follower:
            self.follower = None

    async def _fence(self, lease: Lease, replaying: bool) -> None:
        journal = self._writeback.journal
        journal_id = journal.journal_id if journal is not None else b""
        # What was looked for at the open a moment ago: where somebody has committed since, this one conflicts.
        fresh = not replaying and boot_time_s() - self._head.read_s < FRESH_S
        looked: Head[Generation] | None = self._head if fresh else None
        while True:
            head = looked if looked is not None else await self._chain.head(self._head)
            looked = None
            if head is None:
                raise StaleError(f"{self.name}: the image was removed from the store")
            if head.record.epoch > lease.epoch:
                # Even where it is known here: a refresh may have adopted it while this lease was on its way.
                lease.lost = True
                raise StaleError(f"{self.name}: another host took the lease over before it was used here; close and reopen it")
            if head.record.counter != self.generation:
                known = self._is_own_fence(head.record) or self._is_followed()
                if not known and not (replaying and head.record.journal_id == journal_id):
                    raise StaleError(f"{self.name}: another host wrote the image since it was opened; close and reopen it")
                self._adopt(head)
                self.adopted += 1
                if self.follower is not None:
                    self.follower.changed()
            await self._check_seen()
            sequence = head.record.sequence
            if journal is not None and not replaying:
                # Whatever the journal still has of this image is in older generations, perhaps under another host's: never again.
                if head.record.journal_id == journal_id:
                    journal.advance(sequence)
                sequence = journal.next_sequence()
            generation = head.record.successor(epoch=lease.epoch, journal_id=journal_id, sequence=sequence, committed_ns=time.time_ns())
            try:
                self._adopt(await self._chain.commit(head, generation), self._state)
            except ConflictError:
                continue  # another host's, or an earlier request of this one that was long on its way
            self._last_sequence = self._safe_sequence = max(self._last_sequence, sequence)
            return

    def _is_own_fence(self, newer: Generation) -> bool:
        """Whether a newer generation is this host's own, with the content that is known here: the answer of a fence was lost."""
        journal, known = self._writeback.journal, self._head.record
        same = (newer.size, newer.levels, newer.top, newer.patch) == (known.size, known.levels, known.top, known.patch)
        return journal is not None and newer.journal_id == journal.journal_id and same

    def _is_followed(self) -> bool:
        """Whether handles may go on with a newer generation of another host, perhaps: `_check_seen` says so before the first write."""
        if self.follower is None or self.follower.seen.everything:
            return False
        self.follower.moved = True
        return True

    async def _check_seen(self) -> None:
        """Raise StaleError where another host has changed what was read here: nobody must write over what he has not seen."""
        if not await self.settle_handles():
            raise StaleError(f"{self.name}: another host changed what was read here since it was opened; close and reopen it")

    async def settle_handles(self) -> bool:
        """Find out whether the handles that are open may go on with the newer generation that was taken over, if any; else they must
        not write, and who opens it from now on begins anew. Raises what reading raises."""
        follower = self.follower
        if follower is None:
            return True
        async with follower.settling:  # a write must not pass by a look that is not done
            if not follower.moved:
                return True
            follower.moved = False
            try:
                holds = await follower.seen.holds(super().read)
            except BaseException:
                follower.moved = True
                raise
            if not holds:
                self._note_stale()
            return holds

    def _note_stale(self) -> None:
        """No handle that is open now may write any more; what is opened from here on begins anew."""
        self.incarnation += 1
        if self.follower is not None:
            self.follower.seen, self.follower.moved = Seen(), False

    async def replace_content(self, other: Generation) -> None:
        """Commit a generation with the content of `other`, an older one of this image; the lease is held, nothing is dirty.

        Raises LeaseLostError, and what the store raises.
        """
        async with self._commit_lock:
            lease = self._lease
            if lease is None or lease.lost or self.dirty:
                raise LeaseLostError(f"{self.name}: the right to write it was lost, or it was written meanwhile; nothing was rolled back")
            journal, now = self._writeback.journal, time.time_ns()
            sequence = journal.next_sequence() if journal is not None else 0
            generation = self._head.record.successor(
                size=other.size,
                levels=other.levels,
                top=other.top,
                patch=other.patch,
                stored_bytes=other.stored_bytes,
                allocated_chunks=other.allocated_chunks,
                mtime_ns=now,
                ctime_ns=now,
                committed_ns=now,
                epoch=lease.epoch,
                sequence=sequence,
            )
            try:
                head = await self._chain.commit(self._head, generation)
            except ConflictError as error:
                lease.lost = True
                raise LeaseLostError(f"{self.name}: another host wrote the image; nothing was rolled back") from error
            self.incarnation += 1
            self._adopt(head)

    async def release_lease(self) -> None:
        """Give the lease back; nothing is dirty. No error where there is none. After an error (what the store raises) it
        is still to be given back (`leaving`): call again."""
        async with self._lease_lock:
            if self._lease is not None and not self.dirty:
                self._lease, self._leaving = None, self._lease
                self._drop_fold()
            await self._finish_leaving()

    async def _finish_leaving(self) -> None:
        if self._leaving is not None:
            await self._writeback.release_lease(self._leaving)
            self._leaving = None

    def note_unlinked(self) -> None:
        """Its name is gone, so nothing of it can be found after a crash: it is no use to make it durable."""
        self.unlinked = True
        self._drop_fold()
        self._account(-_payload(self._pending))
        self._pending = []

    async def discard(self, *, handles: int = 0) -> bool:
        """What is dirty is of no use to anybody: the image was removed and nobody has it open, or it can not be committed.

        handles: of the caller; does nothing, and says so, where there are more, because somebody has opened it meanwhile.
        """
        async with self._commit_lock, self._journal_lock:
            if self.handles > handles:
                return False
            self._forget_dirty()
            journal = self._writeback.journal
            if journal is not None:
                journal.committed(self.node_id, self._last_sequence)
            return True

    def _forget_dirty(self) -> None:
        self._layers = [Layer()]
        self._drop_fold()
        self._pending = []
        self._account(-self._dirty_bytes)
        self._dirty_since_s = None
        self._adopt(self._head, self._state)

    async def lose_lease(self, error: NovaError) -> None:
        """Another host has the lease: forget what is dirty, after it was kept aside. Readers see the last generation from here on."""
        # The journal's lock as well: what is on its way there is neither pending nor found on disk.
        async with self._commit_lock, self._journal_lock:
            if self._lease is None:
                return
            self._lease.lost = True
            self._writeback.note_lease_lost(self)
            pending, had = self._pending, self.dirty
            self._lease = None
            self.incarnation += 1
            self._lost = (self.incarnation, error)
            self._forget_dirty()
            if had and not self.unlinked:
                await self._writeback.set_aside(self, pending, error)

    # -- durability ---------------------------------------------------------------------------------------------

    def _check_lost(self, incarnation: int | None) -> None:
        if self._lost is not None and (incarnation is None or incarnation < self._lost[0]):
            raise LeaseLostError(str(self._lost[1]))

    async def fsync(self, *, incarnation: int | None = None) -> None:
        """Return when everything written before would survive a power cut of this host (durability "journal"), or its
        loss (durability "store", or while another host waits for the lease).

        Raises StoreFullError (the local disk), LeaseLostError, and what `commit` raises.
        """
        self._check_lost(incarnation)
        lease = self._lease
        if lease is None or self.unlinked:
            return  # nothing was written since the last commit, or nobody could find it
        if lease.lost:
            lease.check()
        if self._writeback.durability == "journal" and not lease.wanted:
            await self._write_journal()
        else:
            await self.commit(brief=True)
        if lease.settles_s is not None:
            await lease.settled()
        lease.check()

    async def keep(self) -> None:
        """Put what is not there yet into the journal, whatever the lease says: the volume is being closed. Raises what `fsync` raises."""
        if self._writeback.durability == "journal":
            await self._write_journal()

    async def _write_journal(self) -> None:
        journal, target = self._writeback.journal, self._last_sequence
        if self._safe_sequence >= target or journal is None:
            return
        async with self._journal_lock:
            if self._safe_sequence >= target or not self._pending:
                return  # the one before us took ours along, or a commit did
            batch, self._pending = self._pending, []
            self._pairs = self._pairs + 1 if len(batch) == 1 else 0
            try:
                await journal.append(batch)
            except BaseException:
                # A commit may have taken some of them meanwhile.
                left = [r for r in batch if r.sequence > self._safe_sequence]
                self._account(_payload(left) - _payload(batch))
                self._pending = left + self._pending
                raise
            self._account(-_payload(batch))
            self._safe_sequence = max(self._safe_sequence, batch[-1].sequence)

    async def flush(self, *, incarnation: int | None = None) -> None:
        """A handle is being closed: commit, so that the next open elsewhere sees the data (close-to-open).

        Under durability "journal" a store that is away does not fail the close: the data is in the journal, the lease
        is kept, and the commit follows when the store is back. Raises what `fsync` raises.
        """
        self._check_lost(incarnation)
        if not self.dirty or self.unlinked:
            return
        if self._writeback.durability != "journal" or self._writeback.journal is None:
            await self.commit()
            return
        # The commit goes on in the background when this stops waiting: a request that is under way is not called back.
        commit = self._writeback.commit_soon(self)
        error: NovaError | None = None
        with trio.move_on_after(self._writeback.flush_timeout_s):
            error = await commit.outcome()
            if error is None:
                return
        if error is not None and not isinstance(error, RetryableError):
            raise error
        await self.fsync(incarnation=incarnation)
        log.warning(
            "%s: closed while the store does not answer (%s); %d bytes are in the journal of this host and not yet in the store",
            self.name,
            error or "time-out",
            self._dirty_bytes,
        )

    async def commit(self, *, brief: bool = False) -> int:
        """Make a generation in L3 that holds all writes issued before and none after; its counter.

        brief: a caller waits for it: as a patch, in one round trip, where that is possible.

        Does nothing where nothing is dirty. After an error all data is still here and the next commit takes it again.
        Raises StoreUnavailableError, StoreFullError, LeaseLostError, StaleError (another host has written the image).
        """
        if not self.dirty and not self._commit_lock.locked():
            return self.generation
        try:
            async with self._commit_lock:
                return await self._commit_locked(brief)
        except LeaseLostError as error:
            await self.lose_lease(error)
            raise

    async def _commit_locked(self, brief: bool) -> int:
        if not self.dirty:
            return self.generation
        lease = self._lease
        if lease is None or lease.lost:
            raise LeaseLostError(f"{self.name}: the right to write it went to another host")
        began_s = perf_counter()
        # The freeze, in one step: layers, size, times and sequence are of this moment. While the store is away each try freezes
        # what has come since the last one, too.
        if self._layers[-1].touched:
            self._layers.append(Layer())
        frozen = self._layers[:-1]
        since_s, self._dirty_since_s = self._dirty_since_s, None
        sequence = self._last_sequence
        generation = self._head.record.successor(
            size=self.size,
            mtime_ns=self.mtime_ns,
            ctime_ns=self.ctime_ns,
            committed_ns=time.time_ns(),
            epoch=lease.epoch,
            sequence=sequence,
        )
        fold = self._going_fold()
        try:
            head, state, same_map = await self._store_own(frozen, generation, lease, brief)
        except BaseException:
            self._drop_fold()
            self._dirty_since_s = since_s
            for layer in frozen[1:]:
                self._account(-frozen[0].absorb(self.chunk_size, layer))
            del self._layers[1 : len(frozen)]
            raise
        # Adopted in one step as well: no reader sees the new map without, or the old map with, the layers gone.
        del self._layers[: len(frozen)]
        if fold is not None:
            if same_map and fold.add(frozen, self.chunk_size):
                fold.base = state
            else:
                self._drop_fold()
        self._adopt(head, state)
        self._passed_over = False
        taken = sum(len(layer.chunks) for layer in frozen) * self.chunk_size
        taken += _payload(r for r in self._pending if r.sequence <= sequence)
        self._pending = [r for r in self._pending if r.sequence > sequence]
        self._safe_sequence = max(self._safe_sequence, sequence)
        self._account(-taken)
        journal = self._writeback.journal
        if journal is not None:
            journal.committed(self.node_id, sequence)
        self._writeback.note_commit(self, taken, perf_counter() - began_s)
        if brief:
            self._start_fold()
        return self.generation

    async def _store_own(self, frozen: list[Layer], generation: Generation, lease: Lease, brief: bool) -> _Committed:
        """`_store`, again where the number was taken by an earlier try of our own whose answer was lost, and where a collection
        has overtaken it. Then without deltas: so much time may have passed that what they would be made against is gone."""
        for tried in itertools.count():
            brief = brief and not self._passed_over
            try:
                if brief and (fold := self._going_fold()) is not None and fold.stored is not None:
                    if (patched := self._patched(fold.since, fold.stored.state, frozen, generation)) is not None:
                        return _Committed(*await self._name(fold.stored._replace(state=patched.state), patched.generation))
                elif brief and (patched := self._patched(self._patch, self._state, frozen, generation)) is not None:
                    return _Committed(await self._store_patch(patched.generation), patched.state, same_map=True)
                layers = [self._patch, *frozen] if self._patch is not None else frozen
                return _Committed(*await self._store(layers, generation, deltas=not (tried or self._passed_over)))
            except ConflictError as error:
                self._drop_fold()
                head = await self._chain.head()
                ours = (generation.epoch, generation.journal_id, generation.counter)
                if head is None or (head.record.epoch, head.record.journal_id, head.record.counter) != ours:
                    lease.lost = True
                    raise LeaseLostError(
                        f"{self.name}: another host wrote the image although this one held epoch {lease.epoch} of its lease"
                    ) from error
                if self._unanswered is not None and await self._unanswered.lost():
                    self._pass_over(head.record)
                else:
                    # The frozen layers hold all that it holds, and more: applied once more they give the same bytes.
                    self._adopt(head)
                newest = self._head.record
                self._unanswered = None
                figures = {"stored_bytes": newest.stored_bytes, "allocated_chunks": newest.allocated_chunks}
                generation = msgspec.structs.replace(generation, **figures)
            except PacksLostError as error:
                self._drop_fold()
                log.warning("%s: the commit took so long that a collection has overtaken it; everything is stored again", self.name)
                if not error.committed:
                    continue  # nothing names what was lost
                self._unanswered = None
                self._pass_over(generation)
            newest = self._head.record
            generation = msgspec.structs.replace(generation, counter=newest.counter + 1, predecessor=newest.nonce, nonce=new_nonce())
        raise AssertionError  # count() has no end

    def _pass_over(self, lost: Generation) -> None:
        """The newest generation is our own, and a collection has taken its packs: count on from it, with the content from before
        it, which is retained for a grace; the frozen layers have all the rest."""
        self._passed_over = True
        record = msgspec.structs.replace(self._head.record, counter=lost.counter, nonce=lost.nonce, predecessor=lost.predecessor)
        self._adopt(Head(record, self._head.read_s), self._state)

    def replay(self, records: Sequence[Record]) -> None:
        """Apply records of the journal, in order; the lease is held. Nothing is durable anew before `commit`."""
        for record in records:
            self._apply(record.kind, record.offset, record.data, record=record)

    def _going_fold(self) -> Fold | None:
        """The fold of what the image is now. One of an earlier map is dropped."""
        if self._fold is not None and self._fold.base is not self._state:
            self._drop_fold()
        return self._fold

    def _drop_fold(self) -> None:
        if self._fold is not None:
            self._fold.scope.cancel()
            self._fold = None

    def _start_fold(self) -> None:
        if self._fold is not None or self._folding or trio.current_time() < self._folds_after_s:
            return
        if self._patch is not None and worthwhile(self.head.patch):
            self._fold = Fold(self._state, self._patch)
            self._writeback.start(partial(self._run_fold, self._fold, self._state, self.head))

    async def _run_fold(self, fold: Fold, base: MapState, generation: Generation) -> None:
        """Store what a fold is to give. Where that fails the patch stays, and the next commit that is none takes it along."""
        self._folding = True
        try:
            with fold.scope:
                fold.stored = await self._store_map([fold.layer], generation, base)
        except NovaError as error:
            log.debug("%s: its patch was not folded into the map: %s", self.name, error)
            self._folds_after_s = trio.current_time() + FOLD_RETRY_S
        except Exception as error:
            mistake(self, error)
            self._folds_after_s = trio.current_time() + FOLD_RETRY_S
        finally:
            self._folding = False
            if fold.stored is None and self._fold is fold:
                self._fold = None

    def _patched(self, under: Layer | None, state: MapState, frozen: list[Layer], generation: Generation) -> _Patched | None:
        """`generation` with the map `state`, as long as the image is, and `under` and what the layers say over that as a patch, where
        it is one."""
        grown = state.grown((generation.size + self.chunk_size - 1) // self.chunk_size)
        layer = extended(under, frozen, self.chunk_size) if grown is not None else None
        if grown is None or layer is None:
            return None
        changes = {"levels": grown.levels, "top": grown.top, "patch": extents_of(layer, self.chunk_size)}
        return _Patched(msgspec.structs.replace(generation, **changes), grown)

    async def _store_patch(self, generation: Generation) -> Head[Generation]:
        # It refers to nothing that the generation before it does not: no pack of it can be missing.
        head = await self._chain.commit(self._head, generation)
        self._unanswered = None  # an earlier try's number is taken now
        return head

    async def _store(self, frozen: list[Layer], generation: Generation, *, deltas: bool) -> tuple[Head[Generation], MapState]:
        stored = await self._store_map(frozen, generation, self._state, deltas=deltas)
        return await self._name(stored, msgspec.structs.replace(generation, patch=()))

    async def _store_map(self, frozen: list[Layer], generation: Generation, base: MapState, *, deltas: bool = True) -> Stored:
        """Write layers into the map `base`, whose figures `generation` has, for an image of its size; nothing names the result yet.

        deltas: whether what `base` names may be what others are made against (`novafs.delta`), where the volume has such frames.
        """
        size = generation.size
        chunks = (size + self.chunk_size - 1) // self.chunk_size
        floor = min(layer.floor for layer in frozen)
        clear_from = min((floor + self.chunk_size - 1) // self.chunk_size, chunks)
        indexes = sorted(index for index in dirty.dirty_indexes(frozen, self.chunk_size) if index < chunks)
        stored_bytes, allocated = generation.stored_bytes, generation.allocated_chunks
        if clear_from < base.chunks:
            lost_bytes, lost = await self._count_from(base, clear_from)
            stored_bytes, allocated = stored_bytes - lost_bytes, allocated - lost
        async with self._writeback.pack_writer() as writer:
            writer.image = self.node_id
            with_bases = deltas and writer.wants_bases
            changes: dict[ChunkIndex, bytes] = {}
            for at in range(0, len(indexes), COMMIT_BATCH_CHUNKS):
                batch = indexes[at : at + COMMIT_BATCH_CHUNKS]
                olds = [(await base.entries(index, 1, self._cache.fetch))[0] for index in batch]
                plains, fetched = await self._merge(frozen, batch, olds)
                bases = [self._before(old, plain) for old, plain in zip(olds, fetched, strict=True)] if with_bases else ()
                for index, old, new in zip(batch, olds, await writer.put(plains, bases), strict=True):
                    if index < clear_from and old != HOLE_BYTES:  # beyond, it is counted by _count_from
                        stored_bytes, allocated = stored_bytes - Reference.unpack(old).length, allocated - 1
                    if new != HOLE_BYTES:
                        stored_bytes, allocated = stored_bytes + Reference.unpack(new).length, allocated + 1
                    if new[:32] != old[:32] or index >= clear_from or writer.forbids(old) or self._passed_over:
                        changes[ChunkIndex(index)] = new
                    elif new != HOLE_BYTES:  # the same content: keep the reference there was
                        stored_bytes += Reference.unpack(old).length - Reference.unpack(new).length
            put_over = writer.put_blob if with_bases else None
            state = await base.rewrite(changes, chunks, clear_from, self._cache.fetch, writer.put_blob, writer.put_right, put_over)
            stored_bytes += writer.resized_bytes
            await writer.finish()
        return Stored(state, writer.used, stored_bytes, allocated)

    async def _name(self, stored: Stored, generation: Generation) -> tuple[Head[Generation], MapState]:
        """Commit `generation` with the map that was stored. Raises PacksLostError, ConflictError."""
        state, used = stored.state, stored.used
        if gone := await used.lost():
            raise PacksLostError(gone)
        generation = msgspec.structs.replace(
            generation, levels=state.levels, top=state.top, stored_bytes=stored.stored_bytes, allocated_chunks=stored.allocated_chunks
        )
        # Until the answer, what the store has under the number may be this try's or an earlier one's.
        earlier, self._unanswered = self._unanswered, used.joined(self._unanswered)
        try:
            head = await self._chain.commit(self._head, generation)
        except ConflictError:
            self._unanswered = earlier
            raise
        self._unanswered = used
        if gone := await used.lost():  # until here the journal has it all
            raise PacksLostError(gone, committed=True)
        self._unanswered = None
        return head, state

    async def _count_from(self, state: MapState, first: int) -> tuple[int, int]:
        """Payload bytes and number of the chunks from index `first` on."""
        stored = count = 0
        if first == 0:
            return self._head.record.stored_bytes, self._head.record.allocated_chunks
        async for start, entries in state.leaves(self._cache.fetch, from_chunk=first):
            part = entries[max(0, first - start) :]
            lengths = part["length"]
            stored += int(lengths.sum(dtype=np.int64))
            count += int(np.count_nonzero(lengths))
        return stored, count

    async def _merge(self, frozen: list[Layer], indexes: Sequence[int], olds: Sequence[bytes]) -> tuple[list[bytes], list[bytes | None]]:
        """The full content of chunks as of the freeze; what was not written comes from the committed map: that of those that needed it."""
        overlays = [dirty.overlay(frozen, self.chunk_size, index) for index in indexes]
        needed = [
            (number, Reference.unpack(old), index << self._shift)
            for number, (index, old, found) in enumerate(zip(indexes, olds, overlays, strict=True))
            if old != HOLE_BYTES and (found is None or not dirty.covers(found, 0, self.chunk_size))
        ]
        plains = await self._fetch([r for _, r, _ in needed], [o for _, _, o in needed])
        bases: dict[int, bytes] = {number: plain for (number, _, _), plain in zip(needed, plains, strict=True)}
        merged: list[bytes] = []
        for number, found in enumerate(overlays):
            base = bases.get(number)
            if found is None:
                merged.append(base if base is not None else bytes(self.chunk_size))
            else:
                merged.append(bytes(dirty.compose(found, base, 0, self.chunk_size)))
        return merged, [bases.get(number) for number in range(len(olds))]

    def _before(self, old: bytes, plain: bytes | None) -> Base | None:
        """What a chunk was in the committed map, where that is at hand: nothing is read for it."""
        if old == HOLE_BYTES:
            return None
        plain = plain if plain is not None else self._cache.peek(old[:32])
        return Base(Reference.unpack(old), plain) if plain is not None else None

    # -- other hosts, figures, walks ----------------------------------------------------------------------------

    async def refresh(self) -> bool:
        """Take over a newer generation of another host, where there is one and nothing is dirty here; whether it did."""
        async with self._commit_lock:
            head = await self._chain.head(self._head)
            if head is None:
                raise StaleError(f"{self.name}: the image was removed")
            if head.record.counter == self.generation:
                self._head = head
                return False
            if self.dirty:
                raise StaleError(
                    f"{self.name}: another host wrote the image while data written here was not committed; close and reopen it"
                )
            if not self._is_own_fence(head.record) and not self._is_followed():
                self._note_stale()
            self._adopt(head)
            self.adopted += 1
            return True


def _payload(records: Iterable[Record]) -> int:
    """Bytes that records waiting for the journal take."""
    return sum(len(record.data) for record in records)
