"""Packs: many frames in one immutable object, with an index at the end.

Layout, little endian (docs/format.md has the same tables):

    header, 32 bytes        magic "NOVAPK\\x01\\n" (8), pack id (16), zero (8)
    frames                  each: header of 48 bytes, then the payload
    footer                  one row of 48 bytes for each frame, in the order of the frames; then one of 72 bytes for each base
    tail, 32 bytes          rows (u32), footer length in bytes (u32), xxh64 of pack id + footer (u64), zero (8), magic "NOVAPKFT"

    frame header, 48 bytes  magic "NVFR", codec (u8), zero (3), payload length (u32), plain length (u32), chunk id (32)
    footer row, 48 bytes    chunk id (32), payload offset (u32), payload length (u32), plain length (u32), codec (u8), zero (3)
    base row, 72 bytes      payload offset of a delta frame in this pack (u32), zero (u32), a reference of its chain (64)

A reference names the payload's offset, so a read needs neither header nor footer. Footers serve the dedup index,
collection and repair; frame headers let repair find frames where a footer is damaged. Base rows repeat what delta frames say
themselves (`novafs.delta`), so that a collection knows what they need; a pack without such frames has none. Frames of chunks that
follow each other in an image lie next to each other, so that one range request reads a run of them.
"""

from __future__ import annotations

import secrets
import struct
from collections.abc import Awaitable, Callable, Sequence
from typing import Final, NamedTuple

import numpy as np
import xxhash

from novafs.cache.base import Frame
from novafs.chunk import PACK_ID_SIZE, REFERENCE_DTYPE, ChunkId, PackId, Reference
from novafs.errors import ObjectCorruptError

PREFIX: Final = "packs/"
MAGIC: Final = b"NOVAPK\x01\n"
FRAME_MAGIC: Final = b"NVFR"
FOOTER_MAGIC: Final = b"NOVAPKFT"
TARGET_BYTES: Final = 8 << 20
FRAMES_MAX: Final = 8192
"""More frames than this would make the footer, which is read whole, larger than a quarter of a small pack."""
TAIL_READ_BYTES: Final = 64 << 10
"""A first guess at tail + footer: holds 1,364 rows, which is a pack of 64 KiB chunks at any usual ratio."""

_HEADER: Final = struct.Struct("<8s16s8x")
_FRAME: Final = struct.Struct("<4sB3xII32s")
_ROW: Final = struct.Struct("<32sIIIB3x")
_BASE: Final = struct.Struct("<I4x64s")
_TAIL: Final = struct.Struct("<IIQ8x8s")

FOOTER_DTYPE: Final = np.dtype(
    {
        "names": ["id", "offset", "length", "plain", "codec", "zero"],
        "formats": ["V32", "<u4", "<u4", "<u4", "u1", "V3"],
        "offsets": [0, 32, 36, 40, 44, 45],
        "itemsize": _ROW.size,
    }
)
BASE_DTYPE: Final = np.dtype([("offset", "<u4"), ("zero", "<u4"), ("base", REFERENCE_DTYPE)])
FRAME_HEADER_BYTES: Final = _FRAME.size


class Footer(NamedTuple):
    """rows: of `FOOTER_DTYPE`; bases: of `BASE_DTYPE`."""

    rows: bytes
    bases: bytes


class PackRow(NamedTuple):
    """One footer row: the reference it makes, and the length of the plain content in bytes."""

    reference: Reference
    plain_length: int


def new_pack_id() -> PackId:
    """A random id: packs of different hosts never meet."""
    return PackId(secrets.token_bytes(PACK_ID_SIZE))


def pack_name(pack_id: bytes) -> str:
    """The object's name in the volume."""
    text = pack_id.hex()
    return f"{PREFIX}{text[:2]}/{text}"


def pack_id_of(name: str) -> PackId | None:
    """The id in an object's name, or None where the name is no pack's."""
    text = name.rpartition("/")[2]
    if not name.startswith(PREFIX) or len(text) != 2 * PACK_ID_SIZE:
        return None
    try:
        return PackId(bytes.fromhex(text))
    except ValueError:
        return None


class PackBuilder:
    """Collects the frames of one pack. References are known as frames are added; they hold once the pack is stored."""

    def __init__(self) -> None:
        self.pack_id = new_pack_id()
        self._parts: list[bytes] = [_HEADER.pack(MAGIC, self.pack_id)]
        self._rows: list[bytes] = []
        self._bases: list[bytes] = []
        self.references: list[Reference] = []
        self.size = _HEADER.size

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def full(self) -> bool:
        """Whether the next frame belongs into another pack."""
        return self.size >= TARGET_BYTES or len(self._rows) >= FRAMES_MAX

    def add(self, chunk_id: ChunkId, frame: Frame, plain_length: int, chain: Sequence[Reference] = ()) -> Reference:
        """Append a frame; where it will be. chain: of a delta frame."""
        length = len(frame.payload)
        offset = self.size + _FRAME.size
        self._parts.append(_FRAME.pack(FRAME_MAGIC, frame.codec, length, plain_length, chunk_id))
        self._parts.append(frame.payload)
        self._rows.append(_ROW.pack(chunk_id, offset, length, plain_length, frame.codec))
        if chain:
            self._bases += [_BASE.pack(offset, base.pack()) for base in chain]
        self.size = offset + length
        reference = Reference(chunk_id, self.pack_id, offset, length, frame.codec)
        self.references.append(reference)
        return reference

    def finish(self) -> bytes:
        """The object's bytes; may be called in a thread. The builder is not used after, and lets go of the frames: they are held once."""
        footer = b"".join([*self._rows, *self._bases])
        digest = xxhash.xxh64_intdigest(self.pack_id + footer)
        tail = _TAIL.pack(len(self._rows), len(footer), digest, FOOTER_MAGIC)
        parts, self._parts = [*self._parts, footer, tail], []
        return b"".join(parts)


def _footer(pack_id: PackId, end: bytes) -> Footer | int:
    """The footer, checked, or how many bytes of the pack's end are needed."""
    name = pack_name(pack_id)
    if len(end) < _TAIL.size:
        raise ObjectCorruptError(f"{name}: {len(end)} bytes are too few for a pack; run 'novafs fsck'")
    rows, footer_length, digest, magic = _TAIL.unpack_from(end, len(end) - _TAIL.size)
    bases_length = footer_length - rows * _ROW.size
    if magic != FOOTER_MAGIC or bases_length < 0 or bases_length % _BASE.size:
        raise ObjectCorruptError(f"{name}: does not end in a pack's footer; run 'novafs fsck'")
    needed = int(footer_length) + _TAIL.size
    if needed > len(end):
        return needed
    footer = end[len(end) - needed : len(end) - _TAIL.size]
    if xxhash.xxh64_intdigest(pack_id + footer) != digest:
        raise ObjectCorruptError(f"{name}: the footer fails its checksum; run 'novafs fsck'")
    return Footer(footer[: rows * _ROW.size], footer[rows * _ROW.size :])


def parse_footer(pack_id: PackId, end: bytes) -> list[PackRow] | int:
    """The rows of a pack from its last bytes, or how many bytes of its end are needed.

    Raises ObjectCorruptError where the tail or the footer is damaged or belongs to another pack.
    """
    footer = _footer(pack_id, end)
    return footer if isinstance(footer, int) else _rows(pack_id, footer.rows)


def parse_chains(pack_id: PackId, data: bytes) -> dict[int, list[Reference]]:
    """The chains of a whole pack's delta frames, as its footer repeats them, by payload offset. Raises ObjectCorruptError."""
    footer = _footer(pack_id, data)
    chains: dict[int, list[Reference]] = {}
    for offset, base in _BASE.iter_unpack(footer.bases if isinstance(footer, Footer) else b""):
        chains.setdefault(offset, []).append(Reference.unpack(base))
    return chains


def _rows(pack_id: PackId, footer: bytes) -> list[PackRow]:
    return [
        PackRow(Reference(ChunkId(chunk), pack_id, offset, length, codec), plain)
        for chunk, offset, length, plain, codec in _ROW.iter_unpack(footer)
    ]


async def read_whole_footer(pack_id: PackId, size: int, get: Callable[[str, int, int], Awaitable[bytes]]) -> Footer:
    """The footer of a stored pack of `size` bytes, checked; by one range request, two for a long one.

    Raises ObjectCorruptError, ObjectNotFoundError, StoreUnavailableError.
    """
    name = pack_name(pack_id)
    wanted = min(size, TAIL_READ_BYTES)
    for _ in range(2):
        end = await get(name, size - wanted, wanted)
        footer = _footer(pack_id, end)
        if not isinstance(footer, int):
            return footer
        if footer > size:
            break
        wanted = footer
    raise ObjectCorruptError(f"{name}: the footer is longer than the pack; run 'novafs fsck'")


async def read_footer_bytes(pack_id: PackId, size: int, get: Callable[[str, int, int], Awaitable[bytes]]) -> bytes:
    """The frames' rows of a stored pack, of `FOOTER_DTYPE`. Raises what `read_whole_footer` raises."""
    return (await read_whole_footer(pack_id, size, get)).rows


async def read_footer(pack_id: PackId, size: int, get: Callable[[str, int, int], Awaitable[bytes]]) -> list[PackRow]:
    """The rows of a stored pack of `size` bytes. Raises what `read_whole_footer` raises."""
    return _rows(pack_id, await read_footer_bytes(pack_id, size, get))


def scan_frames(pack_id: PackId, data: bytes) -> list[PackRow]:
    """The frames found by their headers, for repair where the footer is damaged. Stops at the first that is not whole."""
    rows: list[PackRow] = []
    at = _HEADER.size
    while at + _FRAME.size <= len(data):
        magic, codec, length, plain, chunk = _FRAME.unpack_from(data, at)
        payload_at = at + _FRAME.size
        if magic != FRAME_MAGIC or payload_at + length > len(data):
            break
        rows.append(PackRow(Reference(ChunkId(chunk), pack_id, payload_at, length, codec), plain))
        at = payload_at + length
    return rows
