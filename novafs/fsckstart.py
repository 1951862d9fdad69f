"""What has to be right before a volume can be opened at all: its superblock, and one readable catalog.

Both can be mended without a guess. The chunk size is that of any chunk of any image; the volume's id only names caches,
so a new one does. An unreadable newest catalog is followed by the newest one that can be read; without any, by an
empty one. Names that are lost with them are given back as `lost+found` (`fsck --relink`).
"""

from __future__ import annotations

import time
from typing import Final

import numpy as np

from novafs.cache.packs import PackSource
from novafs.catalog import PREFIX as CATALOG_PREFIX
from novafs.catalog import CatalogRecord, catalog_chain, root_entry
from novafs.chunk import CHUNK_SIZES, REFERENCE_DTYPE, Reference
from novafs.compact import verified
from novafs.errors import CorruptionError, NoVolumeError, ObjectCorruptError, ObjectNotFoundError
from novafs.fsck import Finding
from novafs.fsckrepair import republish
from novafs.generation import PREFIX as IMAGES_PREFIX
from novafs.generation import Generation, generation_chain
from novafs.objectstore.client import StoreClient
from novafs.pack import PREFIX as PACKS_PREFIX
from novafs.revisions import new_nonce
from novafs.superblock import NAME as SUPERBLOCK_NAME
from novafs.superblock import create_superblock, read_superblock

GENERATIONS_MAX: Final = 1000
"""Generations that are tried for a chunk that can be read."""


async def check_start(client: StoreClient, *, repair: bool) -> tuple[list[Finding], list[str]]:
    """What keeps the volume from being opened, and what was done about it. Raises NoVolumeError where there is none, NewerFormatError."""
    findings: list[Finding] = []
    repaired: list[str] = []
    await _superblock(client, repair, findings, repaired)
    await _catalog(client, repair, findings, repaired)
    return findings, repaired


async def _superblock(client: StoreClient, repair: bool, findings: list[Finding], repaired: list[str]) -> None:
    try:
        await read_superblock(client)
    except NoVolumeError:
        if not await client.list(CATALOG_PREFIX, limit=1) and not await client.list(PACKS_PREFIX, limit=1):
            raise
        message = f"{SUPERBLOCK_NAME} is missing, and a volume is here"
    except ObjectCorruptError as error:
        message = str(error)
    else:
        return
    chunk_size = await infer_chunk_size(client)
    if chunk_size is None:
        findings.append(
            Finding("superblock", SUPERBLOCK_NAME, f"{message}; no chunk tells the chunk size, so it can only be restored from a copy")
        )
    elif repair:
        await client.delete(SUPERBLOCK_NAME)
        # What the volume was made for is lost as well, so for all that there is: nobody who does not know it may collect here.
        await create_superblock(client, chunk_size=chunk_size, delta=True)
        repaired.append(f"{SUPERBLOCK_NAME}: made anew, with the chunk size of the images ({chunk_size}) and a new volume id")
    else:
        findings.append(Finding("superblock", SUPERBLOCK_NAME, f"{message}; --repair makes it anew"))


async def _catalog(client: StoreClient, repair: bool, findings: list[Finding], repaired: list[str]) -> None:
    chain = catalog_chain(client)
    try:
        if await chain.head() is not None:
            return
        message = f"{CATALOG_PREFIX} is empty: the names of all images are lost"
    except ObjectCorruptError as error:
        message = str(error)
    if not repair:
        findings.append(Finding("catalog", CATALOG_PREFIX, f"{message}; --repair goes back to the newest one that can be read"))
        return
    again = await republish(client, chain)
    if again is not None:
        repaired.append(f"{CATALOG_PREFIX}: the names are those of revision {again} again; --relink finds what is newer")
        return
    counter = await chain.head_counter()
    record = CatalogRecord(counter=0 if counter is None else counter + 1, nonce=new_nonce(), root=root_entry(), written_ns=time.time_ns())
    await chain.commit(None, record)
    repaired.append(f"{CATALOG_PREFIX}: an empty one; --relink gives the images names in lost+found")


async def infer_chunk_size(client: StoreClient) -> int | None:
    """The length of the first chunk of any image that can be read, bytes."""
    for info in await client.list(IMAGES_PREFIX, limit=GENERATIONS_MAX):
        parts = info.name.split("/")
        try:
            image_id, counter = bytes.fromhex(parts[1]), 2**64 - 1 - int(parts[2], 16)
            found = await _chunk_length(client, await generation_chain(client, image_id).read(counter))
        except (ValueError, IndexError, CorruptionError, ObjectNotFoundError):
            continue
        if found in CHUNK_SIZES:
            return found
    return None


async def _chunk_length(client: StoreClient, generation: Generation) -> int | None:
    source, node = PackSource(client), generation.top
    for _ in range(generation.levels + 1):
        rows = np.frombuffer(node, dtype=REFERENCE_DTYPE)
        used = np.flatnonzero(rows["length"] > 0)
        if not len(used):
            return None
        reference = Reference.unpack(rows[used[0] : used[0] + 1].tobytes())
        (payload,) = await source.read_frames([reference])
        plain = verified(reference, payload)
        if plain is None:
            return None
        node = plain
    return len(node)
