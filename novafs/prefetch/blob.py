"""The envelope of what is learned, as it is saved: a sealed record (`novafs.record`) with two more promises.

A model is worth nothing but time: whatever is wrong with one, it is left out and learned anew. So `unseal_model` raises one error,
ObjectCorruptError, for all of it: damage, more bytes than a model can have, and a version that is *older* than ours, too, since weights
of other features are noise. Only a *newer* version is NewerFormatError: whoever meets it must not replace it with his own.
"""

from __future__ import annotations

import struct
from typing import Final, TypeVar

import msgspec

from novafs.errors import ObjectCorruptError
from novafs.record import seal, unseal

BLOB_MAX: Final = 8 << 20
"""Bytes that a saved model may have; all those of a volume together stay below it."""

_VERSION: Final = struct.Struct("<H")
_VERSION_AT: Final = 8

T = TypeVar("T", bound=msgspec.Struct)


def seal_model(kind: bytes, version: int, value: msgspec.Struct) -> bytes:
    """The model's bytes."""
    return seal(kind, version, value)


def unseal_model(kind: bytes, version: int, data: bytes, into: type[T], name: str) -> T:
    """The struct in a model called `name`. Raises ObjectCorruptError, NewerFormatError for a later version."""
    if len(data) > BLOB_MAX:
        raise ObjectCorruptError(f"{name}: {len(data)} bytes, a model has at most {BLOB_MAX}; it will be rebuilt")
    record = unseal(kind, version, data, into, name)
    (found,) = _VERSION.unpack_from(data, _VERSION_AT)
    if found != version:
        raise ObjectCorruptError(f"{name}: written in version {found} of its format, expected {version}; it will be rebuilt")
    return record
