"""What `fsck --repair` does: only what needs no guess, and nothing that loses something.

    condemned list unreadable    the newest readable one is committed again: what was condemned since is not condemned any more
    footer lost, frame not       the frames that are referred to are verified, copied into new packs, and forwarded, as in a
    listed                       compaction; the old pack is dead then
    frame damaged or missing     where the volume holds another, good copy of the chunk, a forward leads there
    forwards                     written anew where they do not name final places; unreadable ones are deleted where their pack is there
    pins, wants, probes          of hosts that are gone: deleted
    temporary files              older than an hour, that nobody writes: deleted
    with `relink`                an image without a name, that nobody writes and that is no import under way, gets one in lost+found
    with `step_back`             an image whose newest generation can not be read goes back to the newest one that can

Each step is what some other part of NovaFS does anyway, through the same calls, so that it is as safe beside writers, and to be
killed in the middle of, as they are.
"""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import msgspec
import numpy as np
import trio

from novafs import durable
from novafs.catalogtree import ROOT_ID, Entry, Kind
from novafs.chunk import Reference
from novafs.compact import Candidate, compact
from novafs.condemned import EMPTY, condemned_chain, read_condemned
from novafs.condemned import PREFIX as CONDEMNED_PREFIX
from novafs.errors import CorruptionError, ExistsError, NotFoundError, ObjectCorruptError, ObjectNotFoundError
from novafs.forward import rows_from, write_forward
from novafs.generation import generation_chain
from novafs.lease import read_lease
from novafs.objectstore.client import StoreClient
from novafs.objectstore.file import TEMP_DIR, FileStore
from novafs.retention import CLOCK_SLACK_S, ImageRoots, Retention
from novafs.revisions import Chain, ConflictError, Head, R, boot_time_s, counter_of, new_nonce
from novafs.scrub import find_copies

if TYPE_CHECKING:
    from novafs.volume import Volume

log = logging.getLogger(__name__)

LOST_NAME: Final = "lost+found"
IMPORT_AGE_S: Final = 3600.0
"""A nameless image that was changed less than this ago may be an import under way, and is left alone."""

Bad = Mapping[bytes, Mapping[int, Reference]]
"""Frames that are referred to and can not be read: pack id -> offset -> reference."""


class Repair:
    """One repair, from what a check has found."""

    def __init__(self, volume: Volume, found: Retention, bad: Bad, *, relink: bool, step_back: bool) -> None:
        self._volume = volume
        self._client = volume.client
        self._found = found
        self._bad = bad
        self._relink = relink
        self._step_back = step_back
        self._done: list[str] = []

    async def run(self) -> list[str]:
        """Do it; a line for each thing that was done. Raises what the store raises; it can be run again."""
        await self._condemned()
        if self._step_back:
            await self._heads()
        await self._rescue()
        await self._heal()
        await self._forwards()
        await self._notes()
        if self._relink:
            await self._names()
        await self._temps()
        return self._done

    async def _condemned(self) -> None:
        try:
            await read_condemned(self._client)
        except ObjectCorruptError:
            chain = condemned_chain(self._client, grace_s=self._volume.grace_s)
            again = await republish(self._client, chain)
            self._done.append(
                f"{CONDEMNED_PREFIX}: the list of revision {again} holds again"
                if again is not None
                else f"{CONDEMNED_PREFIX}: no list can be read; it is left to the next collection"
            )

    async def _heads(self) -> None:
        for root in self._found.images.values():
            if not root.generations or root.leased:
                continue
            chain = generation_chain(self._client, root.image_id, grace_s=self._volume.grace_s)
            newest, where = root.generations[0], root.path or root.image_id.hex()
            try:
                await chain.read(newest)
            except ObjectNotFoundError:
                continue
            except ObjectCorruptError:
                lease = await read_lease(self._client, root.image_id)
                if lease is not None and not lease.released:
                    log.warning("%s: host %s holds its lease; it does not go back before that is released or broken", where, lease.host)
                    continue
                again = await republish(self._client, chain)
                if again is not None:
                    self._done.append(f"{where}: is what it was at generation {again}, {newest - again} before its newest")

    async def _rescue(self) -> None:
        """Frames that are referred to in packs whose footer does not tell of them."""

        async def candidates() -> AsyncIterator[Candidate]:
            for pack_id, references in self._found.packs.unlisted.items():
                if pack_id in self._found.packs:
                    yield Candidate(pack_id, [references[offset] for offset in sorted(references)], whole=False)

        moved = await compact(self._volume, self._found.forwards, candidates())
        for pack_id in moved.moved:
            left = sum(reference.pack_id == pack_id for reference in moved.damaged)
            but = f", but for {left} damaged frames" if left else ""
            self._done.append(f"pack {pack_id.hex()}: what is referred to in it was moved{but}")

    async def _heal(self) -> None:
        """Lead to another copy of what is damaged or missing, where there is one."""
        wanted = [reference for frames in self._bad.values() for reference in frames.values()]
        if not wanted:
            return
        avoid = {(reference.pack_id, reference.offset) for reference in wanted}
        try:
            condemned = (await read_condemned(self._client)).packs
        except ObjectCorruptError:
            condemned = EMPTY.packs
        copies = await find_copies(self._volume, self._found.packs, wanted, avoid, leave=condemned)
        by_id = {copy.chunk_id: copy for copy in copies}
        forwards = self._found.forwards
        for pack_id, frames in self._bad.items():
            rows = rows_from(by_id[r.chunk_id] for r in frames.values() if r.chunk_id in by_id)
            if not len(rows):
                continue
            old = forwards.rows_of(pack_id)
            try:
                await write_forward(
                    self._client, pack_id, forwards.heads.get(pack_id), np.concatenate([old, rows]), grace_s=self._volume.grace_s
                )
            except ConflictError:
                continue  # a collection was faster; the next repair does it
            self._done.append(f"pack {pack_id.hex()}: {len(rows)} of {len(frames)} damaged or missing frames are read from other copies")

    async def _forwards(self) -> None:
        forwards = self._found.forwards
        for name, _ in forwards.problems:
            pack_id = bytes.fromhex(name.split("/")[1])
            if pack_id in self._found.packs:
                await self._client.delete(name)
                self._done.append(f"{name}: deleted; its pack is there, so nobody needs it")

    async def _notes(self) -> None:
        names = self._found.doomed.notes
        await self._client.delete_many(names)
        self._done += [f"{name}: deleted" for name in names]

    async def _names(self) -> None:
        limit_s = self._found.started_s - min(IMPORT_AGE_S, self._volume.grace_s) - CLOCK_SLACK_S
        for root in self._found.images.values():
            if root.named or root.leased or root.pinned or not root.generations or root.newest_s > limit_s:
                continue
            path = await self._name(root)
            if path:
                self._done.append(f"{path}: an image without a name has one again")

    async def _name(self, root: ImageRoots) -> str:
        volume = self._volume
        chain = generation_chain(self._client, root.image_id, grace_s=volume.grace_s)
        read_s = boot_time_s()
        try:
            record = await chain.read(root.generations[0])
        except (CorruptionError, ObjectNotFoundError):
            return ""
        try:
            parent = await volume.catalog.resolve(LOST_NAME, max_age_s=0)
        except NotFoundError:
            parent = await volume.mkdir(ROOT_ID, LOST_NAME)
        name, now = root.image_id.hex(), time.time_ns()
        entry = Entry(name, root.image_id, Kind.IMAGE, 0o600, 0, 0, now, record.mtime_ns, now, record.size, parent_id=parent.node_id)
        try:
            await volume.catalog.create(entry)
        except ExistsError:
            return ""
        try:
            # One that no collection has seen: a run that saw the image without its name may be deleting the others.
            await chain.commit(Head(record, read_s), record.successor())
        except ConflictError:
            log.info("image %s is being written", name)
        return f"{LOST_NAME}/{name}"

    async def _temps(self) -> None:
        removed = await trio.to_thread.run_sync(lambda: sum(durable.clean_temps(path) for path in temp_dirs(self._volume)))
        if removed:
            self._done.append(f"{removed} temporary files: deleted")


def temp_dirs(volume: Volume) -> Sequence[Path]:
    """Where this host makes temporary files."""
    state_dir, store = volume.config.state_dir, volume.client.store
    local = [state_dir, state_dir / "journal", state_dir / "aside", state_dir / "leases"]
    return [*local, store.root / TEMP_DIR] if isinstance(store, FileStore) else local


async def republish(client: StoreClient, chain: Chain[R]) -> int | None:
    """Commit the newest record of a chain that can be read as its newest; its old number, None where none can be read.

    Raises ConflictError where somebody commits at the same moment.
    """
    infos = [info for info in await client.list(chain.prefix) if counter_of(info.name) is not None]
    for info in infos:
        counter = counter_of(info.name) or 0
        try:
            record: Any = await chain.read(counter)
        except (CorruptionError, ObjectNotFoundError):
            continue
        newest = counter_of(infos[0].name) or 0
        await chain.commit(None, msgspec.structs.replace(record, counter=newest + 1, nonce=new_nonce(), predecessor=record.nonce))
        return counter
    return None
