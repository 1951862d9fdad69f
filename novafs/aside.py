"""Journals that were kept aside: fsynced writes that could not be replayed, because another host wrote the image meanwhile.

They lie in `aside/` of the state directory, one file for an image and a range of sequence numbers (`Journal.set_aside`),
or a whole damaged segment. What becomes of them is the operator's to say: `apply_aside` makes a NEW image of the generation they
were written on top of, with the writes applied, and never touches the image itself; deleting the file discards them.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from novafs import journalfile as files
from novafs.catalogtree import Entry, split_path
from novafs.errors import InvalidNameError, NotFoundError, ObjectCorruptError, ObjectNotFoundError, StaleError
from novafs.generation import Generation, generation_chain
from novafs.journal import ASIDE_DIR
from novafs.journalfile import Record, Segment
from novafs.recovery import last_under
from novafs.revisions import boot_time_s, new_nonce

if TYPE_CHECKING:
    from novafs.volume import Volume


@dataclass(frozen=True, slots=True)
class AsideFile:
    """One image's writes in one file. Ids: 16 bytes; first_s, last_s: when they were written, seconds since the epoch."""

    path: str
    image_id: bytes
    journal_id: bytes
    writes: int
    bytes: int
    first_s: float
    last_s: float
    damaged: bool


def list_aside(state_dir: Path) -> list[AsideFile]:
    """What is kept aside on this host; a row for each image that a file has writes of, one without image where it has none. Blocking."""
    found: list[AsideFile] = []
    directory = state_dir / ASIDE_DIR
    if not directory.is_dir():
        return found
    for segment in sorted(files.read_segments(directory), key=lambda s: s.path.name):
        if not segment.records:
            found.append(AsideFile(str(segment.path), b"", _journal_id(segment), 0, 0, 0.0, 0.0, segment.damaged_at >= 0))
        for image_id in sorted({record.image_id for record in segment.records}):
            records = [record for record in segment.records if record.image_id == image_id]
            found.append(
                AsideFile(
                    path=str(segment.path),
                    image_id=image_id,
                    journal_id=_journal_id(segment),
                    writes=len(records),
                    bytes=sum(len(record.data) for record in records),
                    first_s=records[0].time_ns / 1e9,
                    last_s=records[-1].time_ns / 1e9,
                    damaged=segment.damaged_at >= 0,
                )
            )
    return found


def _journal_id(segment: Segment) -> bytes:
    return segment.header.journal_id if segment.header is not None else b""


def read_aside(path: Path) -> Segment:
    """The writes in one file. Raises NotFoundError, ObjectCorruptError. Blocking."""
    if not path.is_file():
        raise NotFoundError(f"{path}: there is no such file; 'novafs fsck' lists what is kept aside")
    for segment in files.read_segments(path.parent):
        if segment.path == path:
            return segment
    raise ObjectCorruptError(f"{path}: is no journal segment, or its header is damaged")


async def find_base(volume: Volume, image_id: bytes, journal_id: bytes, records: Sequence[Record]) -> Generation:
    """The newest generation that the writes' own host made before them, or of what came before them in the journal. Raises
    NotFoundError where it was collected."""
    chain = generation_chain(volume.client, image_id)
    base = await last_under(volume, chain, records[-1].epoch)
    if base is None or base.journal_id != journal_id:
        raise NotFoundError(
            f"image {image_id.hex()}: the generation that the writes were made on top of is not in the store any more; choose another "
            f"one to apply them to (--onto NUMBER; 'novafs info' shows the newest), if you know that they fit"
        )
    # A replay may have ended before them, at a hole in a damaged journal.
    while True:
        try:
            newer = await chain.read(base.counter + 1)
        except ObjectNotFoundError:
            return base
        if newer.journal_id != journal_id or newer.sequence >= records[0].sequence:
            return base
        base = newer


async def apply_aside(
    volume: Volume, path: Path, segment: Segment, name: str, *, image_id: bytes | None = None, onto: int | None = None
) -> Entry:
    """A new image `name`: a clone of the generation that the writes in a file belong on, with the writes.

    image_id: where the file has writes of several. onto: the number of another generation. The file stays.
    Raises NotFoundError, ExistsError, InvalidNameError, ReadOnlyError (this process has no journal), and what a commit raises.
    """
    ids = sorted({record.image_id for record in segment.records})
    if image_id is None:
        if len(ids) != 1:
            known = ", ".join(i.hex() for i in ids) or "none"
            raise NotFoundError(f"{path}: has writes of {len(ids)} images ({known}); say which one is meant (--image)")
        image_id = ids[0]
    records = sorted((r for r in segment.records if r.image_id == image_id), key=lambda r: r.sequence)
    if not records:
        raise NotFoundError(f"{path}: has no writes of image {image_id.hex()}")
    parts = split_path(name)
    if not parts:
        raise InvalidNameError("the new image needs a name")
    parent = await volume.catalog.resolve("/".join(parts[:-1]), max_age_s=0)
    began_s = boot_time_s()
    chain = generation_chain(volume.client, image_id)
    base = await find_base(volume, image_id, _journal_id(segment), records) if onto is None else await chain.read(onto)
    contained = base.sequence if onto is None else 0
    now = time.time_ns()
    first = msgspec.structs.replace(
        base,
        image_id=secrets.token_bytes(16),
        counter=0,
        nonce=new_nonce(),
        predecessor=b"",
        committed_ns=now,
        epoch=0,
        journal_id=b"",
        sequence=0,
    )

    async def confirm() -> None:
        if volume.overdue(began_s):
            try:
                await chain.read(base.counter)
            except ObjectNotFoundError as error:
                raise StaleError(f"{name}: it took so long that a collection has taken what the writes belong on; try again") from error

    entry = await volume.create(parent.node_id, parts[-1], generation=first, confirm=confirm)
    image = await volume.open_image(entry.node_id)
    try:
        for record in records:
            if record.sequence <= contained:
                continue
            if record.kind is files.RecordKind.RESIZE:
                await image.resize(record.offset)
            else:
                await image.write(record.offset, record.data)
        await image.commit()
    finally:
        await volume.close_image(image)
    return entry
