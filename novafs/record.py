"""Sealed records: the envelope of every small metadata object in L3 (catalogs, generations, leases, …).

    offset  size  field
         0     4  magic "NOVA"
         4     4  kind, four ASCII letters
         8     2  version of the kind, u16
        10     2  zero
        12     4  length of the body in bytes, u32
        16     8  xxh64 of bytes 0–15 and the body, u64
        24     …  body: zstd-compressed MessagePack of one struct

Promised: `unseal` gives back exactly what `seal` was given or raises; it never raises anything but
ObjectCorruptError and NewerFormatError, whatever the bytes, and never allocates more than `BODY_MAX`.
Who the record belongs to is part of the body; its reader checks it.
"""

from __future__ import annotations

import struct
from typing import Final, TypeVar

import msgspec
import xxhash
import zstandard

from novafs.errors import NewerFormatError, ObjectCorruptError

MAGIC: Final = b"NOVA"
BODY_MAX: Final = 64 << 20

_HEAD: Final = struct.Struct("<4s4sH2xI")
_DIGEST: Final = struct.Struct("<Q")

T = TypeVar("T", bound=msgspec.Struct)


def seal(kind: bytes, version: int, value: msgspec.Struct) -> bytes:
    """The object's bytes."""
    body = zstandard.ZstdCompressor(level=3).compress(msgspec.msgpack.encode(value))
    head = _HEAD.pack(MAGIC, kind, version, len(body))
    return head + _DIGEST.pack(xxhash.xxh64_intdigest(head + body)) + body


def unseal(kind: bytes, version: int, data: bytes, into: type[T], name: str) -> T:
    """The struct in an object called `name`. Raises ObjectCorruptError, NewerFormatError."""
    start = _HEAD.size + _DIGEST.size
    if len(data) < start:
        raise ObjectCorruptError(f"{name}: {len(data)} bytes are too few for a record; run 'novafs fsck'")
    magic, found_kind, found_version, length = _HEAD.unpack_from(data)
    if magic != MAGIC or found_kind != kind:
        raise ObjectCorruptError(f"{name}: expected a record of kind {kind!r}, found {data[:8]!r}; run 'novafs fsck'")
    body = data[start:]
    (digest,) = _DIGEST.unpack_from(data, _HEAD.size)
    if length != len(body) or xxhash.xxh64_intdigest(data[: _HEAD.size] + body) != digest:
        raise ObjectCorruptError(f"{name}: the record of {len(data)} bytes fails its checksum; run 'novafs fsck'")
    if found_version > version:
        raise NewerFormatError(
            f"{name}: written in version {found_version} of its format, this NovaFS reads up to {version}; upgrade NovaFS"
        )
    try:
        size = zstandard.frame_content_size(body)
        if not 0 <= size <= BODY_MAX:
            raise ObjectCorruptError(f"{name}: claims {size} bytes of content, at most {BODY_MAX} are allowed")
        plain = zstandard.ZstdDecompressor().decompress(body, max_output_size=BODY_MAX)
        return msgspec.msgpack.decode(plain, type=into)
    except (zstandard.ZstdError, msgspec.MsgspecError) as error:
        raise ObjectCorruptError(f"{name}: does not parse ({error}); run 'novafs fsck'") from error
