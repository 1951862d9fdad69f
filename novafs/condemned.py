"""What must not be referenced any more: condemned packs, and damaged frames; the chain `condemned/<rev>`.

A collection that finds a pack dead condemns it; at least `gc.grace` later another one, which finds it dead still,
claims it and deletes it. Each record holds the whole list, so the newest alone counts. A pack goes through

    condemned   writers never dedup against it any more. `since_s` is 0 in the record that adds it, and in the next one
                the store's own time of that record: no writer can have read it earlier
    claimed     `claimed_s` is set: it is being deleted, or is deleted already, and never comes back. The row stays for
                a while, so that nobody believes an older look at the pack

and out of `condemned` back to life only through a commit of this chain, which a claim can not pass by: two collectors
may run at once, and each deletes only what the chain says is its to delete.

Writers read the newest record before they look anything up (`CondemnedView`), at most `max_age_s` ago, well below the
grace. So a pack that a commit refers to was condemned after that commit began, and is deleted a grace later at the
earliest, by a collector that sees the commit's generation; a commit that takes longer than half of that looks again
(`novafs.packwriter`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Final, NamedTuple

import msgspec
import trio

from novafs.chunk import ID_SIZE, PACK_ID_SIZE, Reference
from novafs.errors import ObjectCorruptError, ObjectNotFoundError
from novafs.generation import HOST
from novafs.objectstore.client import StoreClient
from novafs.record import seal, unseal
from novafs.revisions import GRACE_S_DEFAULT, Chain, ConflictError, Head, boot_time_s, counter_of, new_nonce, writers_grace_s

log = logging.getLogger(__name__)

KIND: Final = b"COND"
VERSION: Final = 1
PREFIX: Final = "condemned/"
VIEW_AGE_S_MAX: Final = 10.0
"""How old a writer's look at the list may be; with a short grace an eighth of that."""


class CondemnedPack(msgspec.Struct, frozen=True, array_like=True):
    """pack_id: 16 bytes; since_s, claimed_s: the store's clock, seconds since the epoch; 0: not known yet, not claimed."""

    pack_id: bytes
    since_s: float = 0.0
    claimed_s: float = 0.0


class DamagedFrames(msgspec.Struct, frozen=True, array_like=True):
    """Frames of one pack that a scrub found damaged: their chunk ids (32 bytes each), one after the other."""

    pack_id: bytes
    chunk_ids: bytes


class CondemnedRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One state of the list. moved: ids of the packs that have a forward (16 bytes each), one after the other;
    summary: figures of the last complete collection (`novafs.gc.GcReport`); past: what it knew of dead packs (`novafs.packscore`)."""

    counter: int
    nonce: bytes
    predecessor: bytes = b""
    host: str = HOST
    packs: list[CondemnedPack] = []
    moved: bytes = b""
    damaged: list[DamagedFrames] = []
    summary: dict[str, float] = {}
    past: bytes = b""


class CondemnedHead(NamedTuple):
    """The newest record, every `since_s` in it filled in, and its place in the chain. Empty where there is none."""

    head: Head[CondemnedRecord] | None
    packs: dict[bytes, CondemnedPack]
    moved: frozenset[bytes]
    damaged: dict[bytes, frozenset[bytes]]
    summary: dict[str, float]
    past: bytes = b""


def condemned_chain(
    client: StoreClient, *, grace_s: float = GRACE_S_DEFAULT, clock_s: Callable[[], float] = boot_time_s
) -> Chain[CondemnedRecord]:
    """The chain of a volume's lists."""
    return Chain(
        client,
        PREFIX,
        encode=lambda r: seal(KIND, VERSION, r),
        decode=lambda data, name: unseal(KIND, VERSION, data, CondemnedRecord, name),
        grace_s=writers_grace_s(grace_s),
        clock_s=clock_s,
    )


def cut(joined: bytes, size: int) -> list[bytes]:
    """Ids of `size` bytes that are stored one after the other."""
    return [joined[at : at + size] for at in range(0, len(joined) - size + 1, size)]


def _open(head: Head[CondemnedRecord], written_s: float) -> CondemnedHead:
    record = head.record
    packs = {p.pack_id: p if p.since_s else msgspec.structs.replace(p, since_s=written_s) for p in record.packs}
    damaged = {d.pack_id: frozenset(cut(d.chunk_ids, ID_SIZE)) for d in record.damaged}
    return CondemnedHead(head, packs, frozenset(cut(record.moved, PACK_ID_SIZE)), damaged, record.summary, record.past)


EMPTY: Final = CondemnedHead(None, {}, frozenset(), {}, {})


async def read_condemned(client: StoreClient, known: CondemnedHead = EMPTY, *, clock_s: Callable[[], float] = boot_time_s) -> CondemnedHead:
    """The newest list: one round trip where it is still the `known` one, else two. Raises ObjectCorruptError, StoreUnavailableError."""
    chain = condemned_chain(client)
    while True:
        read_s = clock_s()
        infos = await client.list(PREFIX, limit=1)
        if not infos:
            return EMPTY
        counter = counter_of(infos[0].name)
        if counter is None:
            return EMPTY  # not ours; `fsck` names it
        if known.head is not None and known.head.record.counter == counter:
            return known._replace(head=Head(known.head.record, read_s))
        try:
            record = await chain.read(counter)
        except ObjectNotFoundError:
            continue  # collected between listing and reading: there is a newer one
        return _open(Head(record, read_s), infos[0].modified_s)


Edit = Callable[[CondemnedHead], CondemnedHead | None]


async def edit_condemned(client: StoreClient, edit: Edit, *, grace_s: float = GRACE_S_DEFAULT) -> CondemnedHead:
    """Commit `edit` of the newest list, again where somebody else was first; the list that holds then.

    `edit` gives None where nothing is to be done. Raises what the store raises; then it is unknown whether it counts.
    """
    chain = condemned_chain(client, grace_s=grace_s)
    while True:
        base = await read_condemned(client)
        wanted = edit(base)
        if wanted is None:
            return base
        before = base.head.record if base.head is not None else None
        record = CondemnedRecord(
            counter=before.counter + 1 if before is not None else 0,
            nonce=new_nonce(),
            predecessor=before.nonce if before is not None else b"",
            packs=sorted(wanted.packs.values(), key=lambda p: p.pack_id),
            moved=b"".join(sorted(wanted.moved)),
            damaged=[DamagedFrames(p, b"".join(sorted(ids))) for p, ids in sorted(wanted.damaged.items()) if ids],
            summary=wanted.summary,
            past=wanted.past,
        )
        try:
            await chain.commit(base.head, record)
        except ConflictError:
            continue
        return await read_condemned(client)


async def mark_damaged(client: StoreClient, frames: Iterable[tuple[bytes, bytes]], *, grace_s: float = GRACE_S_DEFAULT) -> None:
    """Note damaged frames (pack id, chunk id): no host makes a reference to one of them any more."""
    wanted: dict[bytes, set[bytes]] = {}
    for pack_id, chunk_id in frames:
        wanted.setdefault(pack_id, set()).add(chunk_id)

    def edit(base: CondemnedHead) -> CondemnedHead | None:
        damaged = dict(base.damaged)
        for pack_id, chunk_ids in wanted.items():
            damaged[pack_id] = damaged.get(pack_id, frozenset()) | chunk_ids
        return None if damaged == base.damaged else base._replace(damaged=damaged)

    await edit_condemned(client, edit, grace_s=grace_s)


class CondemnedView:
    """A writer's look at the list, kept for `max_age_s`. On the trio thread alone."""

    def __init__(self, client: StoreClient, *, grace_s: float = GRACE_S_DEFAULT) -> None:
        self._client = client
        self._max_age_s = min(VIEW_AGE_S_MAX, grace_s / 8)
        self._lock = trio.Lock()
        self._read_s: float | None = None
        self.current = EMPTY
        self.readable = True
        """False: the newest list is damaged; then nothing may be looked up."""

    async def refresh(self, max_age_s: float | None = None) -> None:
        """Look again, unless the last look is young enough. Raises what the store raises: nothing may be looked up then.

        A list that is damaged forbids everything, and must not stop commits: `readable` is False, and `current` is what it was.
        """
        limit_s = self._max_age_s if max_age_s is None else max_age_s
        asked_s = boot_time_s()
        async with self._lock:
            # A look that began after this call did is as good as one of our own.
            if self._read_s is not None and self._read_s >= asked_s - limit_s:
                return
            began_s = boot_time_s()
            try:
                self.current = await read_condemned(self._client, self.current)
            except ObjectCorruptError as error:
                if self.readable:
                    log.error("%s; until it is repaired everything that is written is stored anew ('novafs fsck --repair')", error)
                self.readable = False
            else:
                self.readable = True
            self._read_s = began_s

    def forbids(self, reference: Reference) -> bool:
        """Whether nothing may refer to this frame any more."""
        current = self.current
        if not self.readable:
            return True
        return reference.pack_id in current.packs or reference.chunk_id in current.damaged.get(reference.pack_id, ())
