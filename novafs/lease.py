"""Leases: the right to write an image, one holder at a time over all hosts (design 5.4).

`leases/<image id>/` is a chain of revisions (`novafs.revisions`); the number is the epoch. Whoever creates the next
epoch holds the lease, or has released it:

    held       holder, its journal, its rules of takeover; the holder alone rewrites it, with a new heartbeat
    released   nobody holds it

A release is an epoch of its own, not a rewrite, so that a heartbeat which was sent before the release and arrives
after it changes an object that no longer matters. A heartbeat lists for a higher epoch first: a holder that finds one
is superseded, for good. The highest epoch is never deleted.

A lease that was not released is taken over at once by the journal that holds it (this host, after a crash). Others
take it over by themselves only where nothing that was promised can be lost by it: the holder's durability is "store",
or its takeover is "auto", and its heartbeat did not change for `ttl_s` counted between answers of the store, by the
observer's own clock. Else an operator breaks it (`novafs lease break`).

Times are CLOCK_BOOTTIME: a host that slept must not believe that its heartbeat is recent.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, NamedTuple

import msgspec
import trio

from novafs.errors import LeaseHeldError, LeaseLostError, NovaError, ObjectCorruptError, ObjectNotFoundError
from novafs.generation import HOST
from novafs.objectstore.base import ObjectInfo
from novafs.objectstore.client import StoreClient
from novafs.record import seal, unseal
from novafs.revisions import FRESH_S, GRACE_S_DEFAULT, Chain, ConflictError, Head, boot_time_s, new_nonce, revision_name, writers_grace_s

log = logging.getLogger(__name__)

KIND: Final = b"LEAS"
VERSION: Final = 1
PREFIX: Final = "leases/"
WANTS_PREFIX: Final = "wants/"
HANDOFFS_PREFIX: Final = "handoffs/"
"""See `novafs.handoff`."""
POLL_S: Final = 0.5
FIRST_POLL_S: Final = 0.05
"""A holder is often just about to give it back: looks come quickly at first."""
WANT_RENEW_S: Final = 5.0
WANT_TTL_S: Final = 20.0
SETTLE_S: Final = 2.0
"""After a lease was taken of an image that others have open for writing: until then they may go by their last look at it
(`novafs.follow`), so no fsync returns before."""
WITHDRAW_S: Final = 5.0
CURIOUS: Final = ".hot"
"""Ends the name of a request for what is hot alone: of a host that has the image open for reading, as a live migration's target has."""
MARGIN: Final = 0.25
"""Share of the ttl that a holder under takeover "auto" keeps as a margin: it stops acknowledging that much before."""


class LeaseRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One epoch. image_id, journal_id, nonce, heartbeat: 16 bytes; released: nobody holds it; acknowledged: journals
    that want the lease and were answered, so the holder commits every fsync to the store (design 6, live migration)."""

    image_id: bytes
    counter: int
    nonce: bytes
    predecessor: bytes = b""
    journal_id: bytes = b""
    host: str = ""
    released: bool = False
    heartbeat: bytes = b""
    ttl_s: float = 0.0
    durability: str = "journal"
    takeover: str = "manual"
    acknowledged: list[bytes] = []

    @property
    def epoch(self) -> int:
        """Counts a lease's holders."""
        return self.counter

    @property
    def may_expire(self) -> bool:
        """Whether another host may take it over by itself when the heartbeat stops."""
        return self.durability == "store" or self.takeover == "auto"


class WantRecord(msgspec.Struct, frozen=True, kw_only=True):
    """Another host asks for the lease. journal_id: 16 bytes; nonce: new for each request."""

    image_id: bytes
    journal_id: bytes
    host: str
    nonce: bytes


@dataclass(frozen=True, slots=True)
class LeaseRules:
    """ttl_s: how long a heartbeat counts; wait_s: how long a writer waits for a lease that another host holds; grace_s: `gc.grace`."""

    durability: str = "journal"
    takeover: str = "manual"
    ttl_s: float = 30.0
    wait_s: float = 5.0
    grace_s: float = GRACE_S_DEFAULT


def lease_prefix(image_id: bytes) -> str:
    """Where an image's epochs lie."""
    return f"{PREFIX}{image_id.hex()}/"


def want_name(image_id: bytes, journal_id: bytes) -> str:
    """The object by which a host asks for a lease."""
    return f"{WANTS_PREFIX}{image_id.hex()}/{journal_id.hex()}"


def lease_chain(client: StoreClient, image_id: bytes, *, grace_s: float = GRACE_S_DEFAULT) -> Chain[LeaseRecord]:
    """The chain of an image's epochs. grace_s: `gc.grace`, for whoever commits."""

    def decode(data: bytes, name: str) -> LeaseRecord:
        found = unseal(KIND, VERSION, data, LeaseRecord, name)
        if found.image_id != image_id:
            raise ObjectCorruptError(f"{name}: is a lease of image {found.image_id.hex()}; run 'novafs fsck'")
        return found

    return Chain(client, lease_prefix(image_id), encode=lambda r: seal(KIND, VERSION, r), decode=decode, grace_s=writers_grace_s(grace_s))


class _Unsure(NamedTuple):
    base: Head[LeaseRecord] | None


class Lease:
    """A held lease. `lost` once a higher epoch was seen; then nothing may be written under it ever again."""

    def __init__(self, chain: Chain[LeaseRecord], head: Head[LeaseRecord], beats: StoreClient, clock_s: Callable[[], float]) -> None:
        """beats: for heartbeats alone, so that requests which hang do not keep them from being sent."""
        self._chain = chain
        self._head = head
        self._beats = beats
        self._beats_chain = lease_chain(beats, head.record.image_id)
        self._clock_s = clock_s
        self._lock = trio.Lock()
        self.sent_s = head.read_s
        """Boot time before the last heartbeat that was answered was sent: the lease is surely ours until sent_s + ttl."""
        self.lost = False
        self.released = False
        self.unsure: _Unsure | None = None
        """Set where the answer to its creation was lost: it is not to be used, only to be released."""
        self._release: LeaseRecord | None = None
        """The release that was sent; one whose answer was lost is sent again as it was."""
        self.asked = False
        """Set before a want is acknowledged: from then on fsyncs reach the store, so that none is missed in between."""
        self.asks = 0
        """Counts the listings that had a want of it: a heartbeat that goes by an older listing must not take its acknowledgement back."""
        self.settles_s: float | None = None
        """Boot time before which no fsync returns, where others had the image open for writing when this was taken."""

    @property
    def record(self) -> LeaseRecord:
        """The epoch as last written."""
        return self._head.record

    @property
    def epoch(self) -> int:
        """The epoch that generations and journal records carry."""
        return self._head.record.counter

    @property
    def wanted(self) -> bool:
        """Whether another host asked and was answered: every fsync must reach the store before it returns."""
        return self.asked or bool(self._head.record.acknowledged)

    def note_followed(self) -> None:
        """Others had asked for it before it was taken: they find out within `SETTLE_S`, and from then on read what is fsynced."""
        self.asked = True
        self.asks += 1
        self.settles_s = self._clock_s() + SETTLE_S

    async def settled(self) -> None:
        """Wait until those know of it."""
        while self.settles_s is not None:
            left_s = self.settles_s - self._clock_s()
            if left_s <= 0:
                self.settles_s = None
            else:
                await trio.sleep(left_s)

    def check(self) -> None:
        """Raise LeaseLostError where nothing may be acknowledged under this lease now."""
        record = self._head.record
        if self.lost:
            raise LeaseLostError(f"image {record.image_id.hex()}: the lease (epoch {record.epoch}) went to another host")
        if record.takeover == "auto" and self._clock_s() - self.sent_s > record.ttl_s * (1 - MARGIN):
            raise LeaseLostError(
                f"image {record.image_id.hex()}: no heartbeat was answered for {self._clock_s() - self.sent_s:.0f} s, a host may have "
                f"taken the lease over; nothing is acknowledged until the store answers"
            )

    async def heartbeat(self, *, acknowledge: list[bytes] | None = None, asks: int | None = None) -> None:
        """Look for a higher epoch, then write a new heartbeat. Raises LeaseLostError, and what the store raises.

        asks: what `asks` was before the listing that `acknowledge` is of; where it is another by now, what is acknowledged stays.
        """
        async with self._lock:
            if self.released:
                return
            self._raise_lost(await self._beats_chain.head_counter())
            sent_s = self._clock_s()
            if acknowledge is None or (asks is not None and asks != self.asks):
                acknowledge = self._head.record.acknowledged
            record = msgspec.structs.replace(self._head.record, heartbeat=new_nonce(), acknowledged=acknowledge)
            await self._beats.put(revision_name(self._chain.prefix, record.counter), seal(KIND, VERSION, record))
            # What was written just before may have been written past a takeover that the listing did not see yet.
            self._raise_lost(await self._beats_chain.head_counter())
            self._head = Head(record, sent_s)
            self.sent_s = sent_s

    def _raise_lost(self, newest: int | None) -> None:
        if newest != self.epoch:
            self.lost = True
            raise LeaseLostError(
                f"image {self.record.image_id.hex()}: epoch {self.epoch} of the lease was followed by {newest}: another host has it now"
            )

    async def release(self) -> None:
        """Give it back: everything written under it is committed. No error where it was lost meanwhile.

        Raises what the store raises; then it is unknown whether it counts, and nothing may be written under the lease before
        this was called again and has returned.
        """
        async with self._lock:
            if self.released or self.lost:
                return
            try:
                if self.unsure is not None:
                    # First make sure that it is ours: the number after it may be the release of somebody else's.
                    await self._chain.commit(self.unsure.base, self.record)
                    self.unsure = None
                if self._release is None:
                    self._release = _release_of(self.record)
                await self._chain.commit(self._head, self._release)
            except ConflictError:
                self.lost = True
                return
            self.released = True


def _release_of(record: LeaseRecord) -> LeaseRecord:
    return LeaseRecord(
        image_id=record.image_id,
        counter=record.counter + 1,
        nonce=new_nonce(),
        predecessor=record.nonce,
        journal_id=record.journal_id,
        host=HOST,
        released=True,
    )


class LeaseManager:
    """Takes leases for one journal. `clock_s` is replaced in tests."""

    def __init__(
        self,
        client: StoreClient,
        journal_id: bytes,
        rules: LeaseRules,
        *,
        beats: StoreClient | None = None,
        clock_s: Callable[[], float] = boot_time_s,
        poll_s: float = POLL_S,
    ) -> None:
        """beats: a client with a limiter of its own for heartbeats and requests for leases; `client` where there is none."""
        self._client = client
        self._beats = beats or client
        self.journal_id = journal_id
        self.rules = rules
        self._clock_s = clock_s
        self._poll_s = poll_s
        self._unsure: dict[bytes, Lease] = {}
        self._free: dict[bytes, tuple[float, Head[LeaseRecord] | None]] = {}
        """Leases that `holder` found free: when it was asked, and the newest epoch. Of the last `FRESH_S`."""
        self._wants_seen: dict[str, tuple[float, float]] = {}
        """Requests of others: when the store says they were renewed last, and when that was first seen here."""
        self._askers: dict[bytes, int] = {}
        """How many here ask for the lease of an image by the one request that this host has: `acquire`, and a follower."""
        self._withdrawing: dict[bytes, trio.Event] = {}
        """Images whose request is being taken back: who asks anew meanwhile does so after that."""
        self.curious: dict[bytes, list[bytes]] = {}
        """Of the last `wants`: journals that ask for what is hot in an image alone."""

    async def acquire(self, image_id: bytes, name: str) -> Lease:
        """The lease of an image, waiting `rules.wait_s` for a holder to give it up. Raises LeaseHeldError that names the holder."""
        chain = lease_chain(self._client, image_id, grace_s=self.rules.grace_s)
        deadline_s = self._clock_s() + self.rules.wait_s
        wanted_s: float | None = None
        # Epoch and heartbeat last seen, and when an answer of the store first showed them: `ttl_s` counts from there.
        seen: tuple[int, bytes, float] | None = None
        alive = False
        pause_s = min(FIRST_POLL_S, self._poll_s)
        asked_s, head = self._free.pop(image_id, (float("-inf"), None))
        # Programs that open an image to write it do so at once. If the epoch is another's by now it can not be created, and is looked at.
        if self._clock_s() - asked_s < FRESH_S and (lease := await self._take(chain, head)) is not None:
            return lease
        try:
            while True:
                asked_s = self._clock_s()
                head = await chain.head()
                answered_s = self._clock_s()
                record = head.record if head is not None else None
                # As of when it was asked: this host may have slept with the answer in hand, while the holder went on.
                if record is None or record.released or record.journal_id == self.journal_id or self._expired(record, seen, asked_s):
                    lease = await self._take(chain, head)
                    if lease is not None:
                        return lease
                    continue
                if seen is None or seen[:2] != (record.counter, record.heartbeat):
                    alive = seen is not None
                    seen = (record.counter, record.heartbeat, answered_s)
                if wanted_s is None:
                    self.join(image_id)
                if wanted_s is None or answered_s - wanted_s > WANT_RENEW_S:
                    wanted_s = answered_s  # before the answer: one that is lost may have been written
                    await self.ask(image_id)
                # A holder that may expire is waited for until its heartbeat has shown that it lives.
                if answered_s >= deadline_s and (alive or not record.may_expire):
                    raise LeaseHeldError(_held(name, record))
                await trio.sleep(pause_s)
                pause_s = min(2 * pause_s, self._poll_s)
        finally:
            if wanted_s is not None:
                await self.withdraw(image_id)

    def join(self, image_id: bytes) -> None:
        """From now on the request is made by one more here, until `withdraw`: it is there until the last one takes it back."""
        self._askers[image_id] = self._askers.get(image_id, 0) + 1

    async def ask(self, image_id: bytes) -> None:
        """Ask the holder of a lease for it; to be renewed every `WANT_RENEW_S`. Raises what the store raises."""
        while (gone := self._withdrawing.get(image_id)) is not None:
            await gone.wait()
        await self._client.put(want_name(image_id, self.journal_id), self.request(image_id))

    def request(self, image_id: bytes) -> bytes:
        """What the object of a request holds."""
        return seal(b"WANT", VERSION, WantRecord(image_id=image_id, journal_id=self.journal_id, host=HOST, nonce=new_nonce()))

    async def withdraw(self, image_id: bytes) -> None:
        """Take the request back, within a few seconds or not at all, unless others here go on asking (`join`). Raises nothing."""
        left = self._askers.pop(image_id, 1) - 1
        if left:
            self._askers[image_id] = left
            return
        if image_id in self._withdrawing:
            return  # who has joined since that began has not asked yet
        self._withdrawing[image_id] = trio.Event()
        try:
            with trio.move_on_after(WITHDRAW_S, shield=True):
                await self._client.delete(want_name(image_id, self.journal_id))
        except NovaError as error:
            log.warning("the request for the lease of image %s stays behind: %s", image_id.hex(), error)
        finally:
            self._withdrawing.pop(image_id).set()

    async def holder(self, image_id: bytes) -> LeaseRecord | None:
        """The lease that another host holds, None where none does: then `acquire` need not ask again. Raises what the store raises."""
        asked_s = self._clock_s()
        head = await self.head(image_id)
        if head is not None and self.is_others(head.record):
            return head.record
        self._free = {one: seen for one, seen in self._free.items() if asked_s - seen[0] < FRESH_S}
        if head is None or head.record.released:
            self._free[image_id] = asked_s, head
        return None

    def is_others(self, record: LeaseRecord) -> bool:
        """Whether another host holds it."""
        return not record.released and record.journal_id != self.journal_id

    async def head(self, image_id: bytes, known: Head[LeaseRecord] | None = None) -> Head[LeaseRecord] | None:
        """The newest epoch of a lease: one request where that is still the `known` one, which must be a released one, since others are
        rewritten. Raises what the store raises."""
        return await lease_chain(self._client, image_id).head(known)

    async def is_wanted(self, image_id: bytes) -> bool:
        """Whether another host asks for a lease. One listing. Raises what the store raises."""
        infos = await self._client.list(f"{WANTS_PREFIX}{image_id.hex()}/")
        own, now_s = want_name(image_id, self.journal_id), self._clock_s()
        return any(
            info.name != own and not info.name.endswith(CURIOUS) and not self._is_old(self._wants_seen.get(info.name), info, now_s)
            for info in infos
        )

    def _is_old(self, known: tuple[float, float] | None, info: ObjectInfo, now_s: float) -> bool:
        return known is not None and known[0] == info.modified_s and now_s - known[1] > max(WANT_TTL_S, self.rules.ttl_s)

    def _expired(self, record: LeaseRecord, seen: tuple[int, bytes, float] | None, now_s: float) -> bool:
        same = seen is not None and seen[:2] == (record.counter, record.heartbeat)
        return record.may_expire and same and seen is not None and now_s - seen[2] > record.ttl_s

    async def _take(self, chain: Chain[LeaseRecord], head: Head[LeaseRecord] | None) -> Lease | None:
        image_id = bytes.fromhex(chain.prefix.split("/")[1])
        sent_s = self._clock_s()
        record = LeaseRecord(
            image_id=image_id,
            counter=head.record.counter + 1 if head is not None else 1,
            nonce=new_nonce(),
            predecessor=head.record.nonce if head is not None else b"",
            journal_id=self.journal_id,
            host=HOST,
            heartbeat=new_nonce(),
            ttl_s=self.rules.ttl_s,
            durability=self.rules.durability,
            takeover=self.rules.takeover,
        )
        lease = Lease(chain, Head(record, sent_s), self._beats, self._clock_s)
        try:
            await chain.commit(head, record)
        except ConflictError:
            return None
        except BaseException:
            lease.unsure = _Unsure(head)
            self._unsure[image_id] = lease
            raise
        return lease

    def take_unsure(self, image_id: bytes) -> Lease | None:
        """The lease that a failed `acquire` may have taken all the same (its answer was lost): to be released, not to be used."""
        return self._unsure.pop(image_id, None)

    async def wants(self) -> dict[bytes, list[bytes]]:
        """Who asks for what: image id -> journal ids. One listing.

        A request that was not renewed for `WANT_TTL_S` since it was first seen here does not count: its host died, or could
        not withdraw it, and for its sake no fsync shall go to the store for ever.
        """
        infos = await self._beats.list(WANTS_PREFIX)
        now_s = self._clock_s()
        known, self._wants_seen = self._wants_seen, {}
        found: dict[bytes, list[bytes]] = {}
        self.curious = {}
        for info in infos:
            modified_s, since_s = known.get(info.name, (-1.0, 0.0))
            if modified_s != info.modified_s:
                modified_s, since_s = info.modified_s, now_s
            self._wants_seen[info.name] = (modified_s, since_s)
            if now_s - since_s > max(WANT_TTL_S, self.rules.ttl_s):
                continue
            parts = info.name.split("/")
            try:
                image_id, journal_id = bytes.fromhex(parts[1]), bytes.fromhex(parts[2].removesuffix(CURIOUS))
            except (IndexError, ValueError):
                continue
            if journal_id != self.journal_id:
                (self.curious if parts[2].endswith(CURIOUS) else found).setdefault(image_id, []).append(journal_id)
        return found


async def read_lease(client: StoreClient, image_id: bytes) -> LeaseRecord | None:
    """The newest epoch of an image's lease, None where nobody ever held it."""
    head = await lease_chain(client, image_id).head()
    return head.record if head is not None else None


async def break_lease(client: StoreClient, image_id: bytes) -> LeaseRecord | None:
    """Take a lease from its holder, by an operator's decision: the epoch that was ended, None where nobody held it.

    The holder, if it still lives, finds out at its next heartbeat or commit, and stops writing. What it acknowledged
    and did not commit stays in its journal, aside.
    """
    chain = lease_chain(client, image_id)
    while True:
        head = await chain.head()
        if head is None or head.record.released:
            return None
        record = LeaseRecord(
            image_id=image_id, counter=head.record.counter + 1, nonce=new_nonce(), predecessor=head.record.nonce, host=HOST, released=True
        )
        try:
            await chain.commit(head, record)
        except (ConflictError, ObjectNotFoundError):
            continue
        return head.record


def _held(name: str, record: LeaseRecord) -> str:
    return (
        f"{name}: host {record.host} (journal {record.journal_id.hex()[:12]}) holds the lease, epoch {record.epoch}, and keeps it; "
        f"close the image there, or, where that host is dead for good, run 'novafs lease break' after reading what may be lost"
    )
