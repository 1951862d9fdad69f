"""Generations: the committed states of an image, a chain of revisions under `images/<image id>/`.

A generation alone holds the truth about size, times and content; creating the next one is the commit point of every
write (design 4). `docs/format.md` has the fields as stored.
"""

from __future__ import annotations

import socket
from typing import Final

import msgspec

from novafs.chunk import REFERENCE_SIZE
from novafs.errors import ObjectCorruptError
from novafs.imagemap import MapState
from novafs.objectstore.client import StoreClient
from novafs.patch import Extent, fits
from novafs.record import seal, unseal
from novafs.revisions import GRACE_S_DEFAULT, Chain, new_nonce, writers_grace_s

KIND: Final = b"GENR"
VERSION: Final = 2
"""1: without a patch, and still written so; a NovaFS that knows no patches must not read a generation that has one."""
PREFIX: Final = "images/"

HOST: Final = socket.gethostname()


class Generation(msgspec.Struct, frozen=True, kw_only=True):
    """One committed state of an image.

    image_id: 16 bytes; counter from 0; nonce and predecessor: 16 bytes (predecessor empty at 0); size: bytes;
    times: nanoseconds since the epoch; levels and top: of the map; stored_bytes: payload bytes of all chunk references;
    allocated_chunks: chunks that are no hole; epoch: of the lease it was written under (0: none);
    journal_id and sequence: the journal, and its last record, that this generation contains; host: who wrote it, for people;
    patch: bytes that lie over the map (`novafs.patch`).
    """

    image_id: bytes
    counter: int
    nonce: bytes
    predecessor: bytes = b""
    size: int = 0
    mtime_ns: int = 0
    ctime_ns: int = 0
    committed_ns: int = 0
    levels: int = 0
    top: bytes = b""
    stored_bytes: int = 0
    allocated_chunks: int = 0
    epoch: int = 0
    journal_id: bytes = b""
    sequence: int = 0
    host: str = HOST
    patch: tuple[Extent, ...] = ()

    @property
    def held_bytes(self) -> int:
        """What the image keeps in the store: `stored_bytes` and the patch. 0 only where there is no content at all."""
        return self.stored_bytes + sum(len(data) for _, data in self.patch)

    def map_state(self, chunk_size: int) -> MapState:
        """The map, nothing of it loaded. Raises ObjectCorruptError where size, levels and top do not fit together."""
        return MapState((self.size + chunk_size - 1) // chunk_size, self.levels, self.top)

    def successor(self, **changes: object) -> Generation:
        """The next generation: counted up, linked back, with a nonce of its own and `changes` applied."""
        return msgspec.structs.replace(self, counter=self.counter + 1, nonce=new_nonce(), predecessor=self.nonce, host=HOST, **changes)


def generation_prefix(image_id: bytes) -> str:
    """Where an image's generations lie."""
    return f"{PREFIX}{image_id.hex()}/"


def generation_chain(client: StoreClient, image_id: bytes, *, grace_s: float = GRACE_S_DEFAULT) -> Chain[Generation]:
    """The chain of an image's generations. grace_s: `gc.grace`, for whoever commits."""

    def decode(data: bytes, name: str) -> Generation:
        found = unseal(KIND, VERSION, data, Generation, name)
        if found.image_id != image_id:
            raise ObjectCorruptError(f"{name}: holds a generation of image {found.image_id.hex()}; run 'novafs fsck'")
        if len(found.top) % REFERENCE_SIZE or found.size < 0:
            raise ObjectCorruptError(f"{name}: its map does not parse; run 'novafs fsck'")
        if not fits(found.patch, found.size):
            raise ObjectCorruptError(f"{name}: its patch does not fit an image of {found.size} bytes; run 'novafs fsck'")
        return found

    return Chain(
        client,
        generation_prefix(image_id),
        encode=lambda g: seal(KIND, VERSION if g.patch else 1, g),
        decode=decode,
        grace_s=writers_grace_s(grace_s),
    )
