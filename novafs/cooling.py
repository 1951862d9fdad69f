"""Cooling: have nothing but the store hold an image, so that its next read is measured as cold. The counterpart of `warming`.

An image's chunks and map nodes leave L1 and L2, whatever of them is on its way there, and the packs of a local store leave this host's
page cache; what was written is committed first. Other images lose nothing but the chunks that they share with this one: whoever cools an
image in use costs its readers time, never data. The kernel's own pages of the image are the caller's to drop (posix_fadvise(2)).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, Final

import trio

from novafs.cache.base import Tier
from novafs.chunk import ID_SIZE, PACK_ID_SIZE, Reference
from novafs.forward import chunk_ids, pack_ids
from novafs.imagemap import FANOUT
from novafs.objectstore.file import FileStore
from novafs.pack import pack_name

if TYPE_CHECKING:
    from novafs.image import Image
    from novafs.volume import Volume

PATIENCE_S: Final = 10.0
"""How long a batch may take to leave. Who reads the image all the while brings it back each time."""
IDLE_S: Final = 1.0
_LOOK_S: Final = 0.02
_SLICE: Final = 256
"""Chunks that leave L1 between two chances for readers."""
_BATCH: Final = 64 * FANOUT


async def cool(volume: Volume, image: Image, *, commit: bool = True) -> dict[str, int]:
    """Do it: {"chunks": that the image has, "left": which are in L1 or L2 all the same}. Raises what a commit and a read raise.

    commit: what was written and not committed, too; otherwise that is left alone.
    """
    if commit and image.dirty:
        await image.commit()
    nodes: list[bytes] = []

    async def fetch(references: Sequence[Reference]) -> list[bytes]:
        nodes.extend(reference.chunk_id for reference in references)
        return await volume.cache.fetch(references)

    batch: list[bytes] = []
    packs: set[bytes] = set()
    chunks = left = 0
    async with aclosing(image.map_leaves(fetch)) as leaves:
        async for _, entries in leaves:
            used = entries[entries["length"] > 0]
            batch += [bytes(found).ljust(ID_SIZE, b"\0") for found in chunk_ids(used)]
            packs |= {bytes(found).ljust(PACK_ID_SIZE, b"\0") for found in pack_ids(used)}
            chunks += len(used)
            if len(batch) >= _BATCH:
                left += await _give_up(volume, batch)
                batch = []
    left += await _give_up(volume, batch)
    image.trim_map(0)
    left += await _give_up(volume, nodes)
    store = volume.client.store
    if isinstance(store, FileStore):
        await trio.to_thread.run_sync(_uncache, store, packs)
    return {"chunks": chunks, "left": left}


async def _give_up(volume: Volume, ids: Sequence[bytes]) -> int:
    """Chunks and nodes leave both tiers; how many are there still once patience has ended."""
    cache = volume.cache
    here = there = clean = 0
    with trio.move_on_after(PATIENCE_S):
        while True:
            for start in range(0, len(ids), _SLICE):
                gone = ids[start : start + _SLICE]
                cache.l1.drop_many(gone)
                if cache.on_evicted is not None:
                    cache.on_evicted(gone)  # prefetch must not take them to be here
                await trio.lowlevel.checkpoint()
            with trio.move_on_after(IDLE_S) as limit:  # what waits to be written to L2 may be of these
                await cache.wait_idle()
            if cache.l2 is not None and cache.l2.up:
                there = await trio.to_thread.run_sync(_delete, cache.l2, ids)
            here = sum(map(cache.present, ids))
            clean = 0 if here or there else clean + 1
            if clean and (clean > 1 or not limit.cancelled_caught):
                break
            await trio.sleep(_LOOK_S)
    return here + there


def _delete(l2: Tier, ids: Sequence[bytes]) -> int:
    """How many L2 had. In a worker thread."""
    found = l2.contains_many(ids)
    l2.delete_many(found)
    return len(found)


def _uncache(store: FileStore, packs: set[bytes]) -> None:
    for pack_id in packs:
        store.uncache(pack_name(pack_id))


async def cool_by_name(volume: Volume, request: Mapping[str, Any]) -> dict[str, int]:
    """{"image", "commit"?, "unlearn"?} → `cool`, for the control socket.

    unlearn: prefetch, too, takes the image for new, and learns nothing for others from it as long as this process lives.
    """
    entry = await volume.catalog.resolve(str(request["image"]), max_age_s=0)
    image = await volume.open_image(entry.node_id)
    try:
        if request.get("unlearn") and volume.prefetcher is not None:
            volume.prefetcher.unlearn(image)
        return await cool(volume, image, commit=bool(request.get("commit", True)))
    finally:
        await volume.close_image(image)
