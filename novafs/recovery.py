"""After a crash: what the journal holds, and what becomes of it, before the mount answers (design 6).

For each image that the journal has records of:

    head's journal is this one     records with a sequence above the head's are replayed under a new epoch of the lease
                                   (taken at once: it is this host's own) and committed
    head's journal is another      another host has written since: the records are kept aside and named in the log
    no head                        the image was removed: likewise

Then leases that this host held are given back. Replaying twice changes nothing: the head names the sequence up to
which it contains the journal, so a crash at any point of this leads to the same state.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import trio

from novafs.errors import LeaseHeldError, LeaseLostError, NotFoundError, StaleError
from novafs.generation import generation_chain
from novafs.journal import Journal
from novafs.journalfile import Record, Segment

if TYPE_CHECKING:
    from novafs.volume import Volume

log = logging.getLogger(__name__)


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
        if segment.damaged_at >= 0:
            kept = await trio.to_thread.run_sync(_keep_damaged, journal, segment)
            log.error(
                "journal segment %s is damaged at byte %d: fsynced writes behind it are lost here; the file is kept as %s",
                segment.path,
                segment.damaged_at,
                kept,
            )
            report.aside.append(kept)
        for record in segment.records:
            by_image.setdefault(record.image_id, []).append(record)
    for image_id, records in by_image.items():
        records.sort(key=lambda r: r.sequence)
        await _recover_image(volume, journal, image_id, records, report)
    for image_id in await trio.to_thread.run_sync(volume.writeback.noted_leases):
        report.returned += await _give_back(volume, image_id)
    return report


async def _recover_image(volume: Volume, journal: Journal, image_id: bytes, records: list[Record], report: RecoveryReport) -> None:
    head = await generation_chain(volume.client, image_id).head()
    last = records[-1].sequence
    if head is None:
        reason = "the image was removed"
    elif head.record.journal_id != journal.journal_id:
        reason = f"host {head.record.host} has written generation {head.record.counter} since"
    else:
        journal.advance(head.record.sequence)
        todo = [r for r in records if r.sequence > head.record.sequence]
        if not todo:
            journal.committed(image_id, last)
            return
        try:
            await _replay(volume, image_id, todo)
        except (LeaseHeldError, LeaseLostError, StaleError) as error:
            reason = str(error)
        else:
            report.replayed[image_id] = len(todo)
            log.warning("image %s: %d fsynced writes that were in no generation are replayed and committed", image_id.hex(), len(todo))
            return
    path = await trio.to_thread.run_sync(journal.set_aside, image_id.hex(), records)
    journal.committed(image_id, last)
    report.aside.append(str(path))
    log.error(
        "image %s: %d fsynced writes of this host are not replayed, because %s; they are kept in %s, see 'novafs fsck'",
        image_id.hex(),
        len(records),
        reason,
        path,
    )


async def _replay(volume: Volume, image_id: bytes, records: list[Record]) -> None:
    image = await volume.open_image_by_id(image_id)
    try:
        await image.take_lease(replaying=True)
        image.replay(records)
        await image.commit()
    finally:
        await volume.close_image(image)


async def _give_back(volume: Volume, image_id: bytes) -> bool:
    """Release a lease that is noted and still ours. It is taken first, under a new epoch: what is released is held."""
    try:
        image = await volume.open_image_by_id(image_id)
    except NotFoundError:
        await volume.writeback.forget_lease(image_id)
        return False
    try:
        await image.take_lease()
    except (LeaseHeldError, StaleError) as error:
        log.info("image %s: %s", image_id.hex(), error)
        await volume.writeback.forget_lease(image_id)
        return False
    finally:
        await volume.close_image(image)
    return True


def _keep_damaged(journal: Journal, segment: Segment) -> str:
    directory = journal.directory.parent / "aside"
    directory.mkdir(mode=0o700, exist_ok=True)
    target = directory / f"damaged-{segment.path.name}"
    shutil.copyfile(segment.path, target)
    return str(target)
