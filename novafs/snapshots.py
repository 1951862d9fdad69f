"""Snapshots and clones: names for generations, and images that start from one; O(1) in the size of the image.

A snapshot is a row in the image's catalog entry: the counter of a generation, which is retained for as long as the
row is there. A clone is a new image whose first generation names the same map. A rollback is a new generation with an
older one's map, committed under the lease like any write, so it can be rolled back as well.
"""

from __future__ import annotations

import secrets
import time
from functools import partial

import msgspec

from novafs.catalogtree import Entry, Kind, Snapshot, check_name
from novafs.errors import BusyError, ExistsError, IsDirectoryError, NotFoundError, ObjectNotFoundError, StaleError
from novafs.generation import Generation, generation_chain
from novafs.image import Image
from novafs.revisions import boot_time_s, new_nonce
from novafs.volume import Volume


def _require_image(volume: Volume, entry: Entry) -> None:
    if entry.kind is Kind.DIRECTORY:
        raise IsDirectoryError(f"{volume.catalog.path_of(entry) or '/'}: is a directory, an image was expected")


async def _committed(volume: Volume, entry: Entry) -> Generation:
    """The newest generation, what this host has not committed yet included."""
    image = await volume.open_image(entry.node_id)
    try:
        await image.commit()
        return image.head
    finally:
        await volume.close_image(image)


def find_snapshot(volume: Volume, entry: Entry, name: str) -> Snapshot:
    """The snapshot of that name. Raises NotFoundError that lists those there are."""
    found = entry.snapshots.get(name)
    if found is None:
        known = ", ".join(sorted(entry.snapshots)) or "none"
        raise NotFoundError(f"{volume.catalog.path_of(entry)}: has no snapshot {name!r}; there are: {known}")
    return found


async def take_snapshot(volume: Volume, entry: Entry, name: str) -> Snapshot:
    """Name the image as it is now. Raises ExistsError, InvalidNameError, ReadOnlyError, and what a commit raises."""
    volume.check_writable()
    check_name(name)
    _require_image(volume, entry)
    while True:
        began_s = boot_time_s()
        generation = await _committed(volume, entry)
        taken = Snapshot(generation.counter, time.time_ns(), generation.size)

        def edit(current: Entry, taken: Snapshot = taken) -> Entry:
            if name in current.snapshots:
                raise ExistsError(f"{volume.catalog.path_of(current)}: has a snapshot {name!r} already")
            return msgspec.structs.replace(current, snapshots={**current.snapshots, name: taken}, ctime_ns=taken.created_ns)

        await volume.catalog.update(entry.node_id, edit)
        if not volume.overdue(began_s):
            return taken
        # The generation may have been superseded, and collected, before its name was there: name the one of now.
        await volume.catalog.update(entry.node_id, partial(_without, name, taken))


def _without(name: str, taken: Snapshot, current: Entry) -> Entry:
    if current.snapshots.get(name) != taken:
        return current
    return msgspec.structs.replace(current, snapshots={k: v for k, v in current.snapshots.items() if k != name})


async def delete_snapshot(volume: Volume, entry: Entry, name: str) -> None:
    """Forget a snapshot; its bytes go with the next collection, where nothing else needs them. Raises NotFoundError."""
    volume.check_writable()

    def edit(current: Entry) -> Entry:
        find_snapshot(volume, current, name)
        return msgspec.structs.replace(current, snapshots={k: v for k, v in current.snapshots.items() if k != name})

    await volume.catalog.update(entry.node_id, edit)


async def snapshot_generation(volume: Volume, entry: Entry, name: str) -> Generation:
    """The generation that a snapshot names. Raises NotFoundError, ObjectNotFoundError where the store has lost it."""
    return await generation_chain(volume.client, entry.node_id).read(find_snapshot(volume, entry, name).counter)


async def roll_back(volume: Volume, entry: Entry, name: str) -> Image:
    """Make the image what the snapshot is.

    Raises NotFoundError, BusyError where it is open here, LeaseHeldError where it is open elsewhere.
    """
    volume.check_writable()
    _require_image(volume, entry)
    find_snapshot(volume, entry, name)
    image = await volume.open_image(entry.node_id)
    try:
        if image.handles > 1:
            raise BusyError(f"{volume.catalog.path_of(entry)}: is open; close it (shut the machine down) before rolling it back")
        await image.take_lease()
        await image.replace_content(await snapshot_generation(volume, entry, name))
    finally:
        await volume.close_image(image)
    return image


async def clone(
    volume: Volume, entry: Entry, parent_id: bytes, name: str, *, snapshot: str | None = None, expires_s: float | None = None
) -> Entry:
    """A new image with the content that `entry` has now, or had at a snapshot. Raises ExistsError, NotFoundError, InvalidNameError."""
    volume.check_writable()
    _require_image(volume, entry)
    began_s = boot_time_s()
    source = await snapshot_generation(volume, entry, snapshot) if snapshot is not None else await _committed(volume, entry)

    async def confirm() -> None:
        # As long as the source's generation is there, a collection has not begun to take what it refers to.
        if volume.overdue(began_s):
            try:
                await generation_chain(volume.client, entry.node_id).read(source.counter)
            except ObjectNotFoundError as error:
                raise StaleError(f"{name}: it took so long that a collection has taken what was to be cloned; try again") from error

    now = time.time_ns()
    first = msgspec.structs.replace(
        source,
        image_id=secrets.token_bytes(16),
        counter=0,
        nonce=new_nonce(),
        predecessor=b"",
        mtime_ns=now,
        ctime_ns=now,
        committed_ns=now,
        epoch=0,
        journal_id=b"",
        sequence=0,
    )
    return await volume.create(
        parent_id,
        name,
        mode=entry.mode,
        uid=entry.uid,
        gid=entry.gid,
        generation=first,
        xattrs=entry.xattrs,
        expires_s=expires_s,
        confirm=confirm,
    )
