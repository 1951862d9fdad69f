"""After a crash: what the journal holds, and what becomes of it, before the mount answers (design 6).

For each image that the journal has records of:

    head's journal is this one     records with a sequence above the head's are replayed under a new epoch of the lease
                                   (taken at once: it is this host's own) and committed; of a damaged journal those before
                                   the first write that is missing, the others are kept aside
    head's journal is another      another host has written since. Records that this host's own last generation contains
                                   are of no use any more; the others are kept aside and named in the log
    no head                        the image was removed: they are kept aside
    the image can not be read      likewise: others shall not wait for its repair
    segments of another journal    likewise, segment by segment: whose they are can not be told

Then leases that this host held are given back, under a new epoch and after a commit that fences: a last request of the
process that died may still be on its way to the store, and must not count once somebody has read the image.

Replaying twice changes nothing: the head names the sequence up to which it contains the journal, so a crash at any
point of this leads to the same state.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import trio

from novafs.asynctools import open_nursery
from novafs.errors import CorruptionError, LeaseHeldError, LeaseLostError, NotFoundError, ObjectNotFoundError, StaleError
from novafs.generation import Generation, generation_chain
from novafs.journal import Journal
from novafs.journalfile import Record, Segment, unbroken
from novafs.lease import read_lease
from novafs.revisions import Chain, counter_of

if TYPE_CHECKING:
    from novafs.volume import Volume

log = logging.getLogger(__name__)

LEASES_AT_ONCE: Final = 8


@dataclass(slots=True)
class RecoveryReport:
    """What a replay did. replayed: image id -> records; aside: paths; returned: images whose lease was given back."""

    replayed: dict[bytes, int] = field(default_factory=dict)
    aside: list[str] = field(default_factory=list)
    returned: int = 0


async def recover(volume: Volume, journal: Journal, segments: Sequence[Segment]) -> RecoveryReport:
    """Replay the journal and give back leases. Raises StoreUnavailableError: then nothing is lost, and the next mount tries again."""
    report = RecoveryReport()
    by_image: dict[bytes, list[Record]] = {}
    for segment in segments:
        foreign = segment.header is not None and segment.header.journal_id != journal.journal_id
        if segment.damaged_at >= 0 or (foreign and segment.records):
            kept = await trio.to_thread.run_sync(journal.keep_whole, segment)
            what = f"is damaged at byte {segment.damaged_at}: fsynced writes in it are lost"
            what = "belongs to another journal than the one this directory has now: nothing in it is replayed" if foreign else what
            log.error("journal segment %s %s; the file is kept as %s, see 'novafs fsck'", segment.path, what, kept)
            report.aside.append(str(kept))
        journal.kept(segment)
        for record in () if foreign else segment.records:
            by_image.setdefault(record.image_id, []).append(record)
    for image_id, records in by_image.items():
        records.sort(key=lambda r: r.sequence)
        await _recover_image(volume, journal, image_id, records, report)
    slots = trio.CapacityLimiter(LEASES_AT_ONCE)

    async def give_back(image_id: bytes) -> None:
        async with slots:
            report.returned += await _give_back(volume, journal, image_id)

    async with open_nursery() as nursery:
        for image_id in await trio.to_thread.run_sync(volume.writeback.noted_leases):
            nursery.start_soon(give_back, image_id)
    return report


async def _recover_image(volume: Volume, journal: Journal, image_id: bytes, records: list[Record], report: RecoveryReport) -> None:
    last = records[-1].sequence
    journal.advance(last)
    try:
        todo, contained, reason = await _uncommitted(volume, journal, image_id, records)
        if todo and not reason:
            whole = unbroken(todo, contained)
            todo, rest = todo[:whole], todo[whole:]
            if todo:
                count = await _replay(volume, image_id, todo)
                report.replayed[image_id] = count
                log.warning("image %s: %d fsynced writes that were in no generation are replayed and committed", image_id.hex(), count)
            todo, reason = rest, "writes before them are lost with a damaged part of the journal"
    except (LeaseHeldError, LeaseLostError, StaleError, NotFoundError, CorruptionError) as error:
        todo, reason = records, str(error)
    if todo:
        path = await trio.to_thread.run_sync(journal.set_aside, image_id, todo)
        report.aside.append(str(path))
        log.error(
            "image %s: %d fsynced writes of this host are not replayed, because %s; they are kept in %s, see 'novafs fsck'",
            image_id.hex(),
            len(todo),
            reason,
            path,
        )
    journal.committed(image_id, last)


async def _uncommitted(volume: Volume, journal: Journal, image_id: bytes, records: list[Record]) -> tuple[list[Record], int, str]:
    """The records that no generation contains, the sequence up to which one does, and why they can not be replayed ("": they can)."""
    chain = generation_chain(volume.client, image_id)
    head = await chain.head()
    if head is None:
        return records, 0, "the image was removed"
    newest, reason = head.record, ""
    if newest.journal_id != journal.journal_id:
        reason = f"host {newest.host} has written generation {newest.counter} since"
        own = await last_under(volume, chain, records[-1].epoch)
        if own is None or own.journal_id != journal.journal_id:
            return records, 0, reason
        newest = own
    journal.advance(newest.sequence)
    return [r for r in records if r.sequence > newest.sequence], newest.sequence, reason


async def last_under(volume: Volume, chain: Chain[Generation], epoch: int) -> Generation | None:
    """The newest generation of an epoch, or of an older one; None where it was collected. Epochs never fall along a chain."""
    infos = await volume.client.list(chain.prefix)
    counters = sorted(counter for info in infos if (counter := counter_of(info.name)) is not None)
    found: Generation | None = None
    low, high = 0, len(counters)
    while low < high:
        middle = (low + high) // 2
        try:
            generation = await chain.read(counters[middle])
        except ObjectNotFoundError:  # collected since the listing: it is an old one
            low = middle + 1
            continue
        if generation.epoch <= epoch:
            found, low = generation, middle + 1
        else:
            high = middle
    return found


async def _replay(volume: Volume, image_id: bytes, records: list[Record]) -> int:
    image = await volume.open_image_by_id(image_id)
    try:
        await image.take_lease(replaying=True)
        # A last request of the process that died may have counted since the head was read: what it contains is not replayed.
        todo = [r for r in records if r.sequence > image.head.sequence]
        image.replay(todo)
        try:
            await image.commit()
        except CorruptionError:
            await image.discard(handles=1)
            raise
    finally:
        await volume.close_image(image)
    return len(todo)


async def _give_back(volume: Volume, journal: Journal, image_id: bytes) -> bool:
    """Give back a lease that is noted; False where it was another's meanwhile, or was released."""
    try:
        lease = await read_lease(volume.client, image_id)
        if lease is None or lease.released or lease.journal_id != journal.journal_id:
            await volume.writeback.forget_lease(image_id)
            return False
        image = await volume.open_image_by_id(image_id)
        try:
            await image.take_lease(replaying=True)
        finally:
            await volume.close_image(image)
    except NotFoundError:  # removed, and collected
        await volume.writeback.forget_lease(image_id)
        return False
    except (LeaseHeldError, StaleError, CorruptionError) as error:
        log.warning("image %s: its lease, which a process of this host held, is not given back: %s", image_id.hex(), error)
        return False
    return True
