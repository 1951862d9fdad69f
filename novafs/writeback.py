"""Write-back: when dirty data is committed, how much of it there may be, and the leases it is written under.

Data at risk (dirty bytes, age of the oldest) has a hard cap: at the cap, writers wait. Commits start at half of the
cap, after `interval_s`, at fsync (durability "store") and at close; one that fails because the store is away is tried
again until it succeeds. Leases are heart-beaten here; one that is found lost makes its image set aside what it has.

Always holds: an image that is dirty, or holds a lease, is in `Volume.open_images`, handles or not.
"""

from __future__ import annotations

import contextlib
import errno
import logging
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import trio

from novafs import durable
from novafs import journalfile as files
from novafs.durable import FileOps
from novafs.errors import (
    LeaseHeldError,
    LeaseLostError,
    NovaError,
    PermanentError,
    ReadOnlyError,
    RetryableError,
    StaleError,
    StoreFullError,
)
from novafs.events import EventRing
from novafs.image import CommitTicket, Image, mistake
from novafs.journal import Journal
from novafs.journalfile import Record
from novafs.latency import Latency, LatencyBook
from novafs.lease import Lease, LeaseManager
from novafs.packwriter import PackWriter
from novafs.revisions import boot_time_s
from novafs.units import format_duration, format_size

log = logging.getLogger(__name__)

LEASES_DIR: Final = "leases"
COMMITS_MAX: Final = 4
TOLD_BYTES: Final = 1 << 20
"""By how much dirty data must have changed for L1, against which it counts, to be told."""
RETRY_S: Final = 1.0
WANTS_POLL_S: Final = 1.0
"""How often a host that holds a lease looks for who asks for it: one listing each time."""


@dataclass(frozen=True, slots=True)
class WritebackRules:
    """dirty_max_bytes: the cap; interval_s: how old dirty data gets before it is committed; flush_timeout_s: what a close waits."""

    durability: str = "journal"
    dirty_max_bytes: int = 256 << 20
    interval_s: float = 5.0
    flush_timeout_s: float = 30.0


@dataclass(frozen=True, slots=True)
class DataAtRisk:
    """bytes: of memory that is in no generation; age_s: of the oldest of them; images: how many are dirty."""

    bytes: int
    age_s: float
    images: int


@dataclass(frozen=True, slots=True)
class LeaseStatistics:
    """Images whose lease is held here; is still to be given back; is asked for by another host. lost: since the start.

    heartbeat_age_s: since the heartbeat that was answered longest ago was sent; 0 where none is held.
    """

    held: int
    leaving: int
    wanted: int
    lost: int
    heartbeat_age_s: float


class _Known:
    """What was known of who asks for a lease before a listing began."""

    __slots__ = ("acknowledged", "asks")

    def __init__(self, lease: Lease) -> None:
        self.asks = lease.asks
        self.acknowledged = bool(lease.record.acknowledged)


class WritebackController:
    """One per volume that may write. `images` gives the open images; `pack_writer` and `nursery` are the volume's."""

    def __init__(
        self,
        rules: WritebackRules,
        *,
        journal: Journal | None,
        leases: LeaseManager | None,
        state_dir: Path,
        images: Callable[[], Iterable[Image]],
        pack_writer: Callable[[], contextlib.AbstractAsyncContextManager[PackWriter]],
        ops: FileOps = durable.SYSTEM,
        events: EventRing | None = None,
        latencies: LatencyBook | None = None,
        held: Callable[[int], object] = lambda _: None,
    ) -> None:
        """held: told how many bytes of memory dirty data takes, whenever that has changed by `TOLD_BYTES`."""
        self.rules = rules
        self.journal = journal
        self.leases = leases
        self._lease_files = state_dir / LEASES_DIR
        self._images = images
        self.pack_writer = pack_writer
        self._nursery: trio.Nursery | None = None
        self._dirty_bytes = 0
        self._held = held
        self._held_bytes = 0
        self._high = trio.Event()
        self._room = trio.Event()
        self._stuck: dict[bytes, tuple[int, NovaError]] = {}
        """Images whose last commit here met an error that waiting can not mend: the generation they are stuck at, the error."""
        self._commits = trio.CapacityLimiter(COMMITS_MAX)
        self._committing: set[bytes] = set()
        self._answering: set[bytes] = set()
        self.on_wanted: Callable[[Image, list[bytes]], Awaitable[None]] | None = None
        """Called when the journals that ask for an image's lease have been answered, and with those that ask for what is hot alone.
        Raises nothing."""
        self._ops = ops
        self._disk = trio.CapacityLimiter(4)  # for small files beside the journal
        self.events = events if events is not None else EventRing()
        self._commit_latency = latencies.of("commit", "commit") if latencies is not None else Latency()
        self.commits = 0
        self.commit_errors = 0
        self.leases_lost = 0

    # -- what images ask ----------------------------------------------------------------------------------------

    @property
    def durability(self) -> str:
        """ "journal" or "store"."""
        return self.rules.durability

    @property
    def flush_timeout_s(self) -> float:
        """How long the close of a handle waits for the store."""
        return self.rules.flush_timeout_s

    def set_rules(self, rules: WritebackRules) -> None:
        """Other rules from now on; who waits for room under the old cap looks again."""
        self.rules = rules
        self.account_dirty(0)

    def account_dirty(self, change: int) -> None:
        """Dirty bytes of an image changed: wake the commits above half of the cap, and writers below it."""
        self._dirty_bytes += change
        if abs(self._dirty_bytes - self._held_bytes) >= TOLD_BYTES or not self._dirty_bytes:
            self._held_bytes = self._dirty_bytes
            self._held(self._held_bytes)
        if self._dirty_bytes > self.rules.dirty_max_bytes // 2:
            self._high.set()
        if self._dirty_bytes < self.rules.dirty_max_bytes:
            self._room.set()

    async def wait_dirty_room(self) -> bool:
        """Wait while dirty bytes are at their cap; whether it waited. Raises the error of a commit that waiting can not mend,
        once no image is left whose commit may make room: what one image met is no matter of the others."""
        waited = False
        while self._dirty_bytes >= self.rules.dirty_max_bytes:
            errors = [self._stuck_by(image) for image in self._images() if image.dirty]
            if errors and errors[0] is not None and None not in errors:
                raise errors[0]
            waited = True
            if self._room.is_set():  # never an event that another writer waits for
                self._room = trio.Event()
            self._high.set()
            await self._room.wait()
        return waited

    def _stuck_by(self, image: Image) -> NovaError | None:
        at, error = self._stuck.get(image.node_id, (-1, None))
        return error if at == image.generation else None

    async def acquire_lease(self, image: Image) -> Lease:
        """The right to write an image, noted on disk first: after a crash the next mount finds what it may give back."""
        if self.leases is None:
            raise ReadOnlyError(
                f"{image.name}: this process has no journal, so it can not write images; use the mount, or one command at a time"
            )
        await self._on_disk(self._note_lease, image.node_id)
        try:
            lease = await self.leases.acquire(image.node_id, image.name)
        except LeaseHeldError:
            await self.forget_lease(image.node_id)
            raise
        self.events.note("lease", f"{image.name}: lease taken, epoch {lease.epoch}")
        return lease

    def unsure_lease(self, image: Image) -> Lease | None:
        """The lease that a failed `acquire_lease` may have taken all the same; it is to be released."""
        return self.leases.take_unsure(image.node_id) if self.leases is not None else None

    async def is_followed(self, image: Image) -> bool:
        """Whether another host has an image open for writing, as far as can be told: where the store does not say, it is taken to."""
        if self.leases is None:
            return False
        try:
            return await self.leases.is_wanted(image.node_id)
        except NovaError as error:
            log.debug("%s: who asks for its lease can not be told: %s", image.name, error)
            return True

    async def release_lease(self, lease: Lease) -> None:
        """Give it back. Raises what the store raises; the note stays then, and the next mount tries again."""
        await lease.release()
        name = next((image.name for image in self._images() if image.node_id == lease.record.image_id), lease.record.image_id.hex())
        self.events.note("lease", f"{name}: lease of epoch {lease.epoch} given back")
        await self.forget_lease(lease.record.image_id)

    async def forget_lease(self, image_id: bytes) -> None:
        """The note of a lease is of no use any more. One that can not be deleted costs the next mount a look at the store."""
        try:
            await self._on_disk(lambda: durable.remove(self._lease_files / image_id.hex(), ops=self._ops))
        except PermanentError as error:
            log.warning("%s", error)

    async def _on_disk(self, work: Callable[..., object], *arguments: object) -> None:
        try:
            await trio.to_thread.run_sync(work, *arguments, limiter=self._disk)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise StoreFullError(f"no space left on the file system of {self._lease_files.parent}: make room there") from error
            raise PermanentError(f"the state directory {self._lease_files.parent} can not be written: {error}") from error

    def _note_lease(self, image_id: bytes) -> None:
        durable.make_dirs(self._lease_files, below=self._lease_files.parent, ops=self._ops)
        with contextlib.suppress(FileExistsError):
            durable.write_new(self._lease_files / image_id.hex(), b"", ops=self._ops)

    def note_commit(self, image: Image, taken_bytes: int, seconds: float) -> None:
        """A generation was committed: count it."""
        self.commits += 1
        self._commit_latency.note(seconds)
        if image.head.patch:  # one an fsync: nobody would see anything else
            return
        text = f"{image.name}: generation {image.generation} committed, {format_size(taken_bytes)} in {format_duration(seconds)}"
        self.events.note("commit", text)

    def note_lease_lost(self, image: Image) -> None:
        """Another host has taken the lease over: count it."""
        self.leases_lost += 1
        self.events.note("lease", f"{image.name}: another host has taken the lease over")

    def commit_soon(self, image: Image) -> CommitTicket:
        """Start a commit in the background."""
        ticket = CommitTicket()
        if self._nursery is None:
            raise StaleError(f"{image.name}: the volume is being closed")
        self._nursery.start_soon(ticket.run, image)
        return ticket

    def start(self, work: Callable[[], Awaitable[None]]) -> None:
        """Run it in the background; not at all where the volume is being closed. It handles its own errors."""
        if self._nursery is not None and not self._nursery.cancel_scope.cancel_called:
            self._nursery.start_soon(work)

    async def set_aside(self, image: Image, records: list[Record], error: NovaError) -> None:
        """Keep what was written under a lost lease in a file under `aside/`, and say where."""
        journal = self.journal
        if journal is None:
            return
        contained = image.head.sequence if image.head.journal_id == journal.journal_id else 0

        def keep() -> Path | None:
            stored = [
                r
                for s in files.read_segments(journal.directory)
                for r in s.records
                if r.image_id == image.node_id and r.sequence > contained
            ]
            known = {r.sequence for r in stored}
            every = sorted([*stored, *(r for r in records if r.sequence not in known)], key=lambda r: r.sequence)
            return journal.set_aside(image.node_id, every) if every else None

        try:
            path = await trio.to_thread.run_sync(keep)
        except OSError as keep_error:
            # Nothing is given away: what was fsynced stays in the journal, and the next mount sets it aside.
            log.error("%s: %s. What was written here can not be kept in a file of its own: %s", image.name, error, keep_error)
            return
        journal.committed(image.node_id, journal.next_sequence())
        log.error(
            "%s: %s. What was written here and is in no generation is kept in %s; 'novafs fsck' tells what to do with it",
            image.name,
            error,
            path,
        )

    # -- the background -----------------------------------------------------------------------------------------

    def lease_statistics(self) -> LeaseStatistics:
        """The leases of the open images."""
        held = leaving = wanted = 0
        oldest_s = now_s = boot_time_s()
        for image in self._images():
            leaving += image.leaving
            if (lease := image.lease) is not None:
                held += 1
                wanted += lease.wanted
                oldest_s = min(oldest_s, lease.sent_s)
        return LeaseStatistics(held, leaving, wanted, self.leases_lost, max(0.0, now_s - oldest_s))

    @property
    def at_risk(self) -> DataAtRisk:
        """Data that the store does not have yet."""
        since = [s for image in self._images() if (s := image.dirty_since_s) is not None and not image.unlinked]
        return DataAtRisk(self._dirty_bytes, trio.current_time() - min(since) if since else 0.0, len(since))

    async def run(self, nursery: trio.Nursery) -> None:
        """Commit in the background and keep leases; for as long as the volume is open."""
        self._nursery = nursery
        nursery.start_soon(self._commit_by_age)
        nursery.start_soon(self._commit_by_pressure)
        if self.leases is not None:
            nursery.start_soon(self._keep_leases, self.leases)
            nursery.start_soon(self._watch_wants, self.leases)

    async def _commit_by_age(self) -> None:
        while True:
            await trio.sleep(max(0.05, min(1.0, self.rules.interval_s / 4)))
            now = trio.current_time()
            for image in list(self._images()):
                since = image.dirty_since_s
                if since is not None and not image.unlinked and (now - since >= self.rules.interval_s or not image.handles):
                    self._start_commit(image)

    async def _commit_by_pressure(self) -> None:
        while True:
            await self._high.wait()
            self._high = trio.Event()
            while self._dirty_bytes > self.rules.dirty_max_bytes // 2:
                dirty = [i for i in self._images() if i.dirty and i.node_id not in self._committing]
                if dirty:
                    self._start_commit(max(dirty, key=lambda i: i.dirty_bytes))
                await trio.sleep(0.01)

    def _start_commit(self, image: Image) -> None:
        if image.node_id not in self._committing and self._nursery is not None:
            self._committing.add(image.node_id)
            self._nursery.start_soon(self._commit, image)

    async def _commit(self, image: Image) -> None:
        try:
            async with self._commits:
                await image.commit()
                self._stuck.pop(image.node_id, None)
        except RetryableError as error:
            self.commit_errors += 1
            self._stuck.pop(image.node_id, None)
            log.warning("%(image)s: not committed yet, the store does not answer: %(error)s", {"image": image.name, "error": error})
            await trio.sleep(RETRY_S)
        except NovaError as error:
            self.commit_errors += 1
            log.error("%(image)s: can not be committed: %(error)s", {"image": image.name, "error": error})
            await self._note_stuck(image, error)
        except Exception as error:
            self.commit_errors += 1
            await self._note_stuck(image, mistake(image, error))
        finally:
            self._committing.discard(image.node_id)

    async def _note_stuck(self, image: Image, error: NovaError) -> None:
        self._stuck[image.node_id] = (image.generation, error)
        self._room.set()
        await trio.sleep(RETRY_S)

    async def _keep_leases(self, leases: LeaseManager) -> None:
        while True:
            await trio.sleep(leases.rules.ttl_s / 3)
            try:
                await self.beat(leases)
            except Exception:  # a mistake here must not end the volume, nor the heartbeats
                log.exception("heartbeats: a mistake in NovaFS; please report it")

    async def _watch_wants(self, leases: LeaseManager) -> None:
        """Answer who asks sooner than the next heartbeat would."""
        while True:
            await trio.sleep(min(WANTS_POLL_S, leases.rules.ttl_s / 3))
            held = [(image, image.lease) for image in list(self._images()) if image.lease is not None]
            if not held:
                continue
            try:
                wanted = await leases.wants()
                for image, lease in held:
                    if image.lease is lease and (asking := wanted.get(image.node_id)):
                        self._start_answer(image, lease, asking)
                    if self.on_wanted is not None and (curious := leases.curious.get(image.node_id)):
                        await self.on_wanted(image, curious)
            except NovaError as error:
                log.debug("which hosts ask for leases can not be told: %s", error)
            except Exception:  # a mistake here must not end the volume
                log.exception("answering who asks for leases: a mistake in NovaFS; please report it")

    async def beat(self, leases: LeaseManager) -> None:
        """One heartbeat of every lease; who asked for one is answered by it, once what was fsynced is in the store."""
        held = [(image, lease, _Known(lease)) for image in list(self._images()) if (lease := image.lease) is not None]
        if not held:
            return
        wanted: dict[bytes, list[bytes]] | None = None
        try:
            wanted = await leases.wants()
        except NovaError as error:
            log.warning("which hosts ask for leases can not be told: %s", error)
        async with trio.open_nursery() as nursery:
            for image, lease, known in held:
                # None: not known, so what was acknowledged stays so.
                nursery.start_soon(self._beat_one, image, lease, wanted.get(image.node_id, []) if wanted is not None else None, known)

    async def _beat_one(self, image: Image, lease: Lease, wanted: list[bytes] | None, known: _Known) -> None:
        asks = known.asks
        if wanted:
            self._start_answer(image, lease, wanted)
            asks = lease.asks
        if image.node_id in self._answering:
            wanted = None
        if await self._send_beat(image, lease, wanted, asks) and wanted is not None and lease.asks == asks:
            # Who has asked since the listing may have found the acknowledgement that was only now taken back: whether somebody has,
            # the next listing tells, and until then fsyncs go on reaching the store.
            lease.asked = bool(wanted) or known.acknowledged

    def _start_answer(self, image: Image, lease: Lease, wanted: list[bytes]) -> None:
        """Not in the caller: a commit may take long, and other heartbeats must not wait for it."""
        lease.asks += 1
        if set(wanted) <= set(lease.record.acknowledged) or image.node_id in self._answering or self._nursery is None:
            return
        self._answering.add(image.node_id)
        self._nursery.start_soon(self._answer, image, lease, wanted)

    async def _answer(self, image: Image, lease: Lease, wanted: list[bytes]) -> None:
        """Acknowledge that others ask for the lease. From then on every fsync reaches the store; what came before must be there, too."""
        asked = lease.asked
        try:
            lease.asked = True
            await image.commit()
            await self._send_beat(image, lease, wanted)
            if self.on_wanted is not None:
                await self.on_wanted(image, wanted)
        except Exception as error:
            known = error if isinstance(error, NovaError) else mistake(image, error)
            log.warning("%s: who asks for its lease is answered later: %s", image.name, known)
            # Where it was set already an acknowledgement may be in the store, its answer lost.
            lease.asked = asked or bool(lease.record.acknowledged)
        finally:
            self._answering.discard(image.node_id)

    async def _send_beat(self, image: Image, lease: Lease, acknowledge: list[bytes] | None, asks: int | None = None) -> bool:
        try:
            await lease.heartbeat(acknowledge=acknowledge, asks=asks)
        except LeaseLostError as error:
            if image.lease is lease:
                await self._lose(image, error)
        except NovaError as error:
            log.warning("%(image)s: no heartbeat of its lease: %(error)s", {"image": image.name, "error": error})
        else:
            return True
        return False

    async def _lose(self, image: Image, error: LeaseLostError) -> None:
        try:
            await image.lose_lease(error)
        except Exception:  # the heartbeats of the others are under way
            log.exception("%s: %s, and keeping what was written under it failed; what was fsynced stays in the journal", image.name, error)

    def noted_leases(self) -> list[bytes]:
        """Images whose lease a process of this state directory held when it ended without giving it back. Blocking."""
        found: list[bytes] = []
        if self._lease_files.is_dir():
            for path in self._lease_files.iterdir():
                with contextlib.suppress(ValueError):
                    found.append(bytes.fromhex(path.name))
        return found
