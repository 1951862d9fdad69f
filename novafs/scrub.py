"""Scrub: every pack is read and every frame in it verified, at a given rate; and what other copies there are of a damaged one.

A frame is damaged where its payload does not decode to what hashes to its chunk id. A delta frame is tried only where something
needs it, with what it was made against; where that can not be read, that is what is damaged, or missing. What a scrub finds is noted for
good (`novafs.condemned`): no host makes a reference to it any more, so what is written again is stored again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Container, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import numpy as np
import trio

from novafs import delta, pack
from novafs.asynctools import open_nursery
from novafs.cache.packs import PackSource
from novafs.chunk import ChunkId, PackId, Reference
from novafs.codec import Codec
from novafs.compact import read_bases, verified
from novafs.errors import CorruptionError, ObjectNotFoundError
from novafs.forward import chunk_ids
from novafs.packcount import PackCount, PackTable
from novafs.retention import Progress, no_progress

if TYPE_CHECKING:
    from novafs.volume import Volume

PACKS_AT_ONCE: Final = 4
FOOTERS_AT_ONCE: Final = 16


@dataclass(slots=True)
class ScrubResult:
    """packs, read_bytes, frames: that were read; damaged: frames as their pack's footer names them (or, without one, their headers)."""

    packs: int = 0
    read_bytes: int = 0
    frames: int = 0
    damaged: list[Reference] = field(default_factory=list)


async def scrub(volume: Volume, packs: PackTable, *, rate_bytes_s: float | None = None, progress: Progress = no_progress) -> ScrubResult:
    """Verify all packs. rate_bytes_s: read no faster; None: as fast as it goes. Raises what the store raises."""
    result = ScrubResult()
    started_s = trio.current_time()
    slots = trio.CapacityLimiter(1 if rate_bytes_s else PACKS_AT_ONCE)

    async def one(found: PackCount) -> None:
        async with slots:
            if rate_bytes_s:
                await trio.sleep_until(started_s + result.read_bytes / rate_bytes_s)
            try:
                data = await volume.client.get(pack.pack_name(found.pack_id))
            except ObjectNotFoundError:
                return  # collected meanwhile; where something refers to it, the walk has said so
            frames, damaged, deltas = await trio.to_thread.run_sync(_verify_pack, found.pack_id, data)
            damaged += await _damaged_deltas(volume, found, data, deltas)
            result.packs += 1
            result.read_bytes += len(data)
            result.frames += frames
            result.damaged += damaged
            progress("packs", result.packs)

    wanted = sorted((p for p in packs if p.listed), key=lambda p: p.pack_id)
    async with open_nursery() as nursery:
        for found in wanted:
            await slots_free(slots)
            nursery.start_soon(one, found)
    return result


async def slots_free(slots: trio.CapacityLimiter) -> None:
    """Wait until somebody could be let in: so that tasks do not queue by the thousand."""
    async with slots:
        pass


def _verify_pack(pack_id: PackId, data: bytes) -> tuple[int, list[Reference], list[Reference]]:
    """How many frames there are, those that are damaged, and those that are deltas."""
    try:
        rows = pack.parse_footer(pack_id, data)
    except CorruptionError:
        rows = 0
    if isinstance(rows, int):  # a footer that is damaged is found by the check itself; its frames may be well
        rows = pack.scan_frames(pack_id, data)
    references = [row.reference for row in rows]
    deltas = [reference for reference in references if reference.codec == Codec.HDE]
    damaged = [
        reference for reference in references if reference.codec != Codec.HDE and verified(reference, _payload(data, reference)) is None
    ]
    return len(rows), damaged, deltas


def _payload(data: bytes, reference: Reference) -> bytes:
    return data[reference.offset : reference.offset + reference.length]


async def _damaged_deltas(volume: Volume, found: PackCount, data: bytes, deltas: Sequence[Reference]) -> list[Reference]:
    needed = found.live_offsets()
    damaged = []
    chains: dict[int, list[Reference]] = {}
    with contextlib.suppress(CorruptionError):  # a footer that is damaged is found by the check itself
        chains = pack.parse_chains(found.pack_id, data)
    for reference in deltas:
        if needed is not None and reference.offset not in needed:
            continue  # what it was made against may be gone
        payload = _payload(data, reference)
        if reference.offset in chains and not _names(payload, chains[reference.offset]):
            damaged.append(reference)  # whoever has the base in memory would not notice
            continue
        bases = await read_bases(volume, [reference], [payload])
        if reference in bases and await trio.to_thread.run_sync(verified, reference, payload, bases[reference]) is None:
            damaged.append(reference)
    return damaged


def _names(payload: bytes, chain: Sequence[Reference]) -> bool:
    try:
        return list(delta.read_chain(payload)) == chain
    except CorruptionError:
        return False


async def find_copies(
    volume: Volume, packs: PackTable, wanted: Iterable[Reference], avoid: Collection[tuple[bytes, int]], *, leave: Container[bytes] = ()
) -> list[Reference]:
    """A good copy of each chunk that has one in another place than `avoid` (pack id, offset), and in no pack of `leave`: read, and
    verified."""
    ids = {reference.chunk_id for reference in wanted}
    names = np.array(sorted(ids), dtype="S32")
    candidates: dict[bytes, list[Reference]] = {}
    slots = trio.CapacityLimiter(FOOTERS_AT_ONCE)

    async def look(found: PackCount) -> None:
        async with slots:
            try:
                footer = await pack.read_footer_bytes(found.pack_id, found.info.size, volume.client.get)
            except (CorruptionError, ObjectNotFoundError):
                return
        rows = np.frombuffer(footer, dtype=pack.FOOTER_DTYPE)
        for at in np.flatnonzero(np.isin(chunk_ids(rows), names)):
            row = rows[at]
            chunk_id = bytes(row["id"]).ljust(32, b"\0")
            reference = Reference(ChunkId(chunk_id), found.pack_id, int(row["offset"]), int(row["length"]), int(row["codec"]))
            # Not a delta: it may need the very frame that is looked for.
            if (found.pack_id, reference.offset) not in avoid and reference.codec != Codec.HDE:
                candidates.setdefault(chunk_id, []).append(reference)

    if not ids:
        return []
    async with open_nursery() as nursery:
        for found in packs:
            if found.pack_id not in leave:
                await slots_free(slots)
                nursery.start_soon(look, found)
    copies: list[Reference] = []
    for places in candidates.values():
        copy = await _first_good(volume, places)
        if copy is not None:
            copies.append(copy)
    return copies


async def _first_good(volume: Volume, places: Sequence[Reference]) -> Reference | None:
    source = PackSource(volume.client)
    for place in places:
        try:
            (payload,) = await source.read_frames([place])
        except ObjectNotFoundError:
            continue
        if await trio.to_thread.run_sync(verified, place, payload) is not None:
            return place
    return None
