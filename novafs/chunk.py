"""Chunks: splitting, zero test, identity, and the reference that says where one is stored.

A chunk is `chunk_size` bytes at an aligned offset of an image, the last one zero-padded, so every chunk of a
volume has the same length. Its id is the SHA-256 of its plain content (FIPS 180-4). A chunk of zeros is a hole:
it has no id, is never stored and reads as zeros.

A reference is 64 bytes, little endian; maps and directory nodes are arrays of it:

    offset  size  field
         0    32  chunk id (all zero: a hole, and then all else is zero as well)
        32    16  pack id
        48     4  offset of the payload in the pack, bytes
        52     4  length of the payload, bytes
        56     1  codec (`novafs.codec.Codec`)
        57     7  zero, reserved
"""

from __future__ import annotations

import hashlib
import struct
from typing import Final, NamedTuple, NewType

import numpy as np

ChunkId = NewType("ChunkId", bytes)
ChunkIndex = NewType("ChunkIndex", int)
PackId = NewType("PackId", bytes)

CHUNK_SIZES: Final = (4 << 10, 64 << 10, 1 << 20)
CHUNK_SIZE_DEFAULT: Final = 64 << 10
ID_SIZE: Final = 32
PACK_ID_SIZE: Final = 16
REFERENCE_SIZE: Final = 64

_REFERENCE: Final = struct.Struct("<32s16sIIB7x")
_LENGTH: Final = struct.Struct("<I")
_LENGTH_AT: Final = 52
_ZEROS: Final = bytes(64)

HOLE_BYTES: Final = bytes(REFERENCE_SIZE)
REFERENCE_DTYPE: Final = np.dtype(
    {
        # "zero" is a field, because numpy does not copy what lies between fields.
        "names": ["id", "pack", "offset", "length", "codec", "zero"],
        "formats": ["V32", "V16", "<u4", "<u4", "u1", "V7"],
        "offsets": [0, 32, 48, 52, 56, 57],
        "itemsize": REFERENCE_SIZE,
    }
)


class Reference(NamedTuple):
    """Where the frame of one chunk is stored.

    chunk_id: 32 bytes; pack_id: 16 bytes; offset and length: of the payload in the pack, bytes; codec: `Codec` value.
    """

    chunk_id: ChunkId
    pack_id: PackId
    offset: int
    length: int
    codec: int

    def pack(self) -> bytes:
        """The 64 bytes of this reference."""
        return _REFERENCE.pack(*self)

    @classmethod
    def unpack(cls, raw: bytes | bytearray | memoryview, at: int = 0) -> Reference:
        """The reference at byte `at` of `raw`. Raises struct.error where `raw` is too short."""
        chunk_id, pack_id, offset, length, codec = _REFERENCE.unpack_from(raw, at)
        return cls(ChunkId(chunk_id), PackId(pack_id), offset, length, codec)


def stored_bytes(raw: bytes) -> int:
    """The length of the payload that a reference's 64 bytes name."""
    return int(_LENGTH.unpack_from(raw, _LENGTH_AT)[0])


def chunk_id(plain: bytes | bytearray | memoryview) -> ChunkId:
    """SHA-256 of the plain content, 32 bytes."""
    return ChunkId(hashlib.sha256(plain).digest())


def is_zero(data: bytes | bytearray | memoryview) -> bool:
    """Whether every byte is zero. The first bytes decide for most data; only then is it all looked at."""
    view = memoryview(data)
    if view[:64] != _ZEROS[: min(64, len(view))]:
        return False
    return not np.frombuffer(view, dtype=np.uint8).any()
