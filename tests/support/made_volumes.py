"""Volumes with very many chunks and names, made in little time and room: what the cost of scale is counted and measured on.

    references = await store_chunks(volume, 0, 1_000_000)         a million different chunks, in packs as ordinary content fills them
    entry = await name_image(volume, ROOT_ID, "a.raw", await mapped(volume, references))

Everything is real: content, hashes, frames, footers, maps, generations, catalogs, all put in place by the engine's own writer. Only the
content is chosen so that making it costs little: a chunk is zeros and, at its end, its number, so the hash goes on from that of the zeros,
and its frame has some thirty bytes. A pack is closed after as many frames as it would hold of ordinary content.
"""

from __future__ import annotations

import hashlib
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt

from novafs import pack
from novafs.catalog import Changes
from novafs.catalogtree import ROOT_ID, Entry, Kind
from novafs.chunk import REFERENCE_DTYPE, REFERENCE_SIZE, ChunkId
from novafs.codec import Codec, encode
from novafs.generation import Generation
from novafs.imagemap import FANOUT, levels_for, top_entries
from novafs.objectstore.base import ObjectInfo
from novafs.objectstore.file import FileStore
from novafs.packwriter import Prepared
from novafs.revisions import new_nonce
from novafs.volume import Volume

FRAMES = 256
"""Of a pack of 8 MiB: chunks of 64 KiB that compress to half."""
LIST_KEYS = 1000
"""What S3 gives at a time."""
BATCH = 1024
NUMBER_BYTES = 8


class CountingStore(FileStore):
    """A directory that counts requests as S3 would: a listing is one for each thousand names. Its clock can be turned (`ahead_s`)."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.requests: dict[str, int] = {}
        self.read_bytes = self.written_bytes = 0
        self.ahead_s = 0.0
        self.on_request: Callable[[str, str], None] = lambda operation, name: None
        """Called before each, with its name."""

    def _count(self, operation: str, name: str, times: int = 1) -> None:
        self.requests[operation] = self.requests.get(operation, 0) + times
        self.on_request(operation, name)

    @property
    def count(self) -> int:
        """All requests."""
        return sum(self.requests.values())

    def reset(self) -> None:
        """Count from nothing."""
        self.requests = {}
        self.read_bytes = self.written_bytes = 0

    def get(self, name: str, start: int = 0, length: int | None = None) -> bytes:
        self._count("get", name)
        data = super().get(name, start, length)
        self.read_bytes += len(data)
        return data

    def create(self, name: str, data: bytes) -> None:
        self._count("put", name)
        super().create(name, data)
        self.written_bytes += len(data)

    def put(self, name: str, data: bytes) -> None:
        self._count("put", name)
        super().put(name, data)
        self.written_bytes += len(data)

    def head(self, name: str) -> ObjectInfo:
        self._count("head", name)
        return super().head(name)

    def list(self, prefix: str, *, after: str = "", limit: int | None = None) -> list[ObjectInfo]:
        found = super().list(prefix, after=after, limit=limit)
        self._count("list", prefix, max(1, -(-len(found) // LIST_KEYS)))
        return found

    def delete_many(self, names: list[str] | tuple[str, ...]) -> None:  # type: ignore[override]
        self._count("delete", names[0], max(1, -(-len(names) // LIST_KEYS)))
        super().delete_many(names)

    def clock_s(self) -> float:
        return super().clock_s() + self.ahead_s


@contextmanager
def usual_packs(frames: int = FRAMES) -> Iterator[None]:
    """Packs are closed after so many frames."""
    before = pack.FRAMES_MAX
    pack.FRAMES_MAX = frames  # type: ignore[misc]
    try:
        yield
    finally:
        pack.FRAMES_MAX = before  # type: ignore[misc]


def content(number: int, chunk_size: int) -> bytes:
    """What chunk `number` holds."""
    return bytes(chunk_size - NUMBER_BYTES) + (number + 1).to_bytes(NUMBER_BYTES, "big")


async def store_chunks(volume: Volume, first: int, count: int, *, frames: int = FRAMES) -> npt.NDArray[np.void]:
    """Chunks `first` to `first + count`, stored with so many in a pack: references, an array of `REFERENCE_DTYPE`."""
    zeros = hashlib.sha256(bytes(volume.chunk_size - NUMBER_BYTES))
    found: list[bytes] = []
    with usual_packs(frames):
        async with volume.pack_writer(cache=False) as writer:
            for start in range(first, first + count, BATCH):
                prepared = []
                for number in range(start, min(start + BATCH, first + count)):
                    plain = content(number, volume.chunk_size)
                    digest = zeros.copy()
                    digest.update(plain[-NUMBER_BYTES:])
                    prepared.append(Prepared(plain, ChunkId(digest.digest()), None, encode(plain, Codec.ZSTD, 1)))
                found += await writer.append(prepared)
            await writer.finish()
    return np.frombuffer(b"".join(found), dtype=REFERENCE_DTYPE)


async def mapped(volume: Volume, rows: npt.NDArray[np.void], *, size: int | None = None, every: int = 1) -> Generation:
    """The first generation of an image whose chunks 0, every, 2 * every, … are `rows`, over and over up to its size (bytes; None:
    as long as `rows`). Each leaf begins at another one of them, so that no two are alike."""
    chunks = len(rows) * every if size is None else size // volume.chunk_size
    levels = levels_for(chunks)
    level = np.empty(0, dtype=REFERENCE_DTYPE)
    async with volume.pack_writer(cache=False) as writer:
        used = -(-chunks // every)

        def leaf(number: int) -> bytes:
            node = np.zeros(FANOUT, dtype=REFERENCE_DTYPE)
            first = number * FANOUT
            at = np.arange(-(-first // every), min(used, -(-(first + FANOUT) // every)))
            if len(at):
                turn = at // len(rows)
                node[at * every - first] = rows[(at + turn * 7) % len(rows)]
            return node.tobytes()

        async def store(nodes: list[bytes]) -> npt.NDArray[np.void]:
            entries: list[bytes] = []
            for start in range(0, len(nodes), 64):
                entries += await writer.put(nodes[start : start + 64])
            return np.frombuffer(b"".join(entries), dtype=REFERENCE_DTYPE)

        if levels:
            parts = []
            for start in range(0, top_entries(chunks, 1), 4096):
                parts.append(await store([leaf(number) for number in range(start, min(start + 4096, top_entries(chunks, 1)))]))
            level = np.concatenate(parts)
            for above in range(2, levels + 1):
                raw = level.tobytes().ljust(top_entries(chunks, above) * FANOUT * REFERENCE_SIZE, b"\0")
                node_bytes = FANOUT * REFERENCE_SIZE
                level = await store([raw[at : at + node_bytes] for at in range(0, len(raw), node_bytes)])
            top = level.tobytes()
        else:
            top = leaf(0)[: chunks * REFERENCE_SIZE]
        await writer.finish()
    now = time.time_ns()
    return Generation(
        image_id=secrets.token_bytes(16),
        counter=0,
        nonce=new_nonce(),
        size=chunks * volume.chunk_size,
        mtime_ns=now,
        ctime_ns=now,
        committed_ns=now,
        levels=levels,
        top=top,
        stored_bytes=used * int(rows["length"][0]),
        allocated_chunks=used,
    )


async def name_image(volume: Volume, parent_id: bytes, name: str, generation: Generation) -> Entry:
    """A name for what `mapped` made."""
    return await volume.create(parent_id, name, generation=generation)


async def make_directory(volume: Volume, name: str, images: int, *, empty: bool = True, expires_s: float | None = None) -> Entry:
    """A directory of so many images, by one commit of the catalog. empty: each has a generation, of nothing; else there are names alone,
    which can be listed and moved."""
    directory = await volume.mkdir(ROOT_ID, name)
    now = time.time_ns()
    base = Generation(image_id=bytes(16), counter=0, nonce=bytes(16), mtime_ns=now, ctime_ns=now, committed_ns=now)
    made = [secrets.token_bytes(16) for _ in range(images)]
    for image_id in made if empty else ():
        await volume._generations(image_id).commit(None, msgspec.structs.replace(base, image_id=image_id, nonce=new_nonce()))

    async def add(changes: Changes) -> None:
        await changes.entries(directory.node_id)
        for number, image_id in enumerate(made):
            entry = Entry(f"vm-{number:06}.raw", image_id, Kind.IMAGE, 0o644, 0, 0, now, now, now)
            changes.set(msgspec.structs.replace(entry, parent_id=directory.node_id, expires_s=expires_s))

    await volume.catalog.change(add)
    return await volume.catalog.lookup(ROOT_ID, name)
