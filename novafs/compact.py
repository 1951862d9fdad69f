"""Compaction: the live frames of packs that are less than half live go into new packs, and a forward says where.

    new packs stored  ->  forward created  ->  only now may the old pack be condemned (`novafs.gc`)

Each frame is decoded and its SHA-256 compared before it is copied; a damaged one stays where it is, keeps its pack
alive, and is reported. The copy of a delta frame is a whole one (`novafs.delta`), so what is moved needs nothing else. Killed
anywhere, this leaves packs that nothing names, or forwards of packs that are still
there: both are what a later collection expects to find. Two collectors that compact the same pack make two copies; the
forward that was created first counts, and the other copy is garbage.

The same repairs a pack whose footer is lost (`fsck --repair`): what is referenced in it is found by the references.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np
import trio

from novafs import delta
from novafs.cache.base import Frame
from novafs.cache.packs import PackSource
from novafs.chunk import Reference
from novafs.codec import PLAIN_MAX, Codec, decode, encode
from novafs.errors import CorruptionError, ObjectNotFoundError
from novafs.forward import ForwardTable, Rows, rows_from, write_forward
from novafs.packwriter import PackWriter, Prepared
from novafs.revisions import ConflictError

if TYPE_CHECKING:
    from novafs.volume import Volume

log = logging.getLogger(__name__)

GROUP_BYTES: Final = 64 << 20
GROUP_PACKS: Final = 64
"""Packs that are compacted together: their frames share new packs."""
BATCH_BYTES: Final = 4 << 20
"""What is in memory at a time of frames, and of the contents of deltas."""


@dataclass(slots=True)
class Compaction:
    """What was done. moved: pack id -> all rows of its new forward; emptied: packs of which everything live was moved."""

    moved: dict[bytes, Rows] = field(default_factory=dict)
    emptied: set[bytes] = field(default_factory=set)
    damaged: list[Reference] = field(default_factory=list)
    copied_bytes: int = 0


class Candidate(NamedTuple):
    """A pack, and its live frames in the order of their places. whole: these are all of them."""

    pack_id: bytes
    live: Sequence[Reference]
    whole: bool = True


async def compact(volume: Volume, forwards: ForwardTable, candidates: AsyncIterator[Candidate]) -> Compaction:
    """Move the frames that the candidates hold. Raises what the store raises."""
    done = Compaction()
    group: list[Candidate] = []
    size = 0
    async for candidate in candidates:
        group.append(candidate)
        size += sum(reference.length for reference in candidate.live)
        if size >= GROUP_BYTES or len(group) >= GROUP_PACKS:
            await _compact_group(volume, forwards, group, done)
            group, size = [], 0
    if group:
        await _compact_group(volume, forwards, group, done)
    forwards.extend(done.moved)
    return done


async def _compact_group(volume: Volume, forwards: ForwardTable, group: Sequence[Candidate], done: Compaction) -> None:
    copies: dict[bytes, list[Reference]] = {}
    whole: set[bytes] = set()
    async with volume.pack_writer(cache=False) as writer:
        for candidate in group:
            try:
                copied, damaged, complete = await _copy(volume, writer, candidate.live)
            except ObjectNotFoundError:
                log.warning("pack %s is gone: another collection runs beside this one", candidate.pack_id.hex())
                continue
            done.damaged += damaged
            if copied:
                copies[candidate.pack_id] = copied
            if candidate.whole and complete:
                whole.add(candidate.pack_id)
        await writer.finish()
    if await writer.used.lost():
        log.warning("a compaction took so long that another collection has taken its new packs; it is done again the next time")
        return
    done.copied_bytes += writer.counts.stored_bytes
    for pack_id, copied in copies.items():
        old = forwards.rows_of(pack_id)
        rows = np.concatenate([old, rows_from(copied)]) if len(old) else rows_from(copied)
        try:
            head = await write_forward(volume.client, pack_id, forwards.heads.get(pack_id), rows, grace_s=volume.grace_s)
        except ConflictError:
            log.info("pack %s was compacted by another collection at the same moment", pack_id.hex())
            continue
        if await writer.used.lost():
            # It names packs that may go. The old pack has not been condemned yet: references lead there again.
            await write_forward(volume.client, pack_id, head, old, grace_s=volume.grace_s)
            continue
        forwards.heads[pack_id] = head
        done.moved[pack_id] = rows
        if pack_id in whole:
            done.emptied.add(pack_id)


async def _copy(volume: Volume, writer: PackWriter, live: Sequence[Reference]) -> tuple[list[Reference], list[Reference], bool]:
    """Put frames into new packs: where they are now, in the same order; those that were left because they are damaged; and whether all
    were copied. A delta frame whose base can not be read is left as well, and may be well itself."""
    source = PackSource(volume.client)
    copied: list[Reference] = []
    damaged: list[Reference] = []
    for batch in _batches(live, volume.chunk_size):
        payloads = await source.read_frames(batch)
        bases = await read_bases(volume, batch, payloads)
        plains = await trio.to_thread.run_sync(_verify, batch, payloads, bases)
        good = []
        for reference, payload, plain in zip(batch, payloads, plains, strict=True):
            if plain is None and (reference.codec != Codec.HDE or reference in bases):
                damaged.append(reference)
            elif plain is not None and reference.codec != Codec.HDE:
                good.append(Prepared(plain, reference.chunk_id, None, Frame(reference.codec, payload)))
            elif plain is not None:
                frame = await trio.to_thread.run_sync(encode, plain, volume.config.l3.codec, volume.config.l3.codec_level)
                good.append(Prepared(plain, reference.chunk_id, None, frame))
        copied += [Reference.unpack(raw) for raw in await writer.append(good)]
    return copied, damaged, len(copied) == len(live)


async def read_bases(volume: Volume, references: Sequence[Reference], payloads: Sequence[bytes]) -> dict[Reference, bytes]:
    """What delta frames among these were made against, by way of the tiers; those are left out for which that can not be read.

    Raises what the store raises.
    """
    bases: dict[Reference, bytes] = {}
    for reference, payload in zip(references, payloads, strict=True):
        if reference.codec != Codec.HDE:
            continue
        try:
            chain = delta.read_chain(payload)
        except CorruptionError:
            bases[reference] = b""  # itself damaged, whatever its base is
            continue
        with contextlib.suppress(CorruptionError, ObjectNotFoundError):
            (bases[reference],) = await volume.cache.fetch(chain[:1])
    return bases


def _batches(live: Sequence[Reference], chunk_size: int) -> Iterator[list[Reference]]:
    batch: list[Reference] = []
    size = 0
    for reference in live:
        batch.append(reference)
        # A delta may be a hundred times smaller than its content and that of its base.
        size += reference.length if reference.codec != Codec.HDE else 2 * chunk_size
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _verify(references: Sequence[Reference], payloads: Sequence[bytes], bases: Mapping[Reference, bytes]) -> list[bytes | None]:
    return [verified(reference, payload, bases.get(reference)) for reference, payload in zip(references, payloads, strict=True)]


def verified(reference: Reference, payload: bytes, base: bytes | None = None) -> bytes | None:
    """The plain content of a frame, None where it is not what the reference names. base: of a delta frame."""
    if len(payload) != reference.length:
        return None
    try:
        plain = decode(reference.codec, payload, PLAIN_MAX) if base is None else delta.decode(payload, base, PLAIN_MAX)
    except CorruptionError:
        return None
    return plain if hashlib.sha256(plain).digest() == reference.chunk_id else None


async def put_forwards_right(volume: Volume, forwards: ForwardTable, wanted: Iterable[bytes], written: Mapping[bytes, Rows]) -> int:
    """Write anew the forwards that do not name final places (`ForwardTable.stale`), of the `wanted` packs; how many.

    written: those that were written just now, with final places.
    """
    count = 0
    for pack_id in wanted:
        rows = forwards.rows_of(pack_id)
        if pack_id not in forwards.stale or (pack_id in written and rows.tobytes() == written[pack_id].tobytes()):
            continue
        try:
            forwards.heads[pack_id] = await write_forward(volume.client, pack_id, forwards.heads.get(pack_id), rows, grace_s=volume.grace_s)
        except ConflictError:
            continue  # another collection did
        count += 1
    return count
