"""The superblock, `novafs.json`: what kind of volume lies at a URL. Created once by `init`, never changed.

JSON, so that a person who finds a bucket can tell what it is: {"format": 1, "volume_id": "…", "chunk_size": 65536,
"hash": "sha256", "created": "2026-01-01T00:00:00Z"}. Unknown keys are ignored; a higher `format` is refused.

Format 2 is format 1 with `"features": ["…"]`: what a reader, a writer and above all a collector of the volume must know, or keep
their hands off it. One that is not known is refused by its name. A volume without any is of format 1, which every NovaFS reads.

    feature  what it means
    delta    packs may hold delta frames (`novafs.delta`), whose bases a collection must keep
"""

from __future__ import annotations

import secrets
from datetime import UTC, datetime
from typing import Final

import msgspec

from novafs.chunk import CHUNK_SIZE_DEFAULT, CHUNK_SIZES
from novafs.errors import (
    ConfigError,
    NewerFormatError,
    NoVolumeError,
    ObjectCorruptError,
    ObjectExistsError,
    ObjectNotFoundError,
    VolumeExistsError,
)
from novafs.objectstore.client import StoreClient

NAME: Final = "novafs.json"
FORMAT: Final = 2
DELTA: Final = "delta"
FEATURES: Final = (DELTA,)


class Superblock(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """format: version of the whole layout; volume_id: 32 hex digits; chunk_size: bytes; hash: of chunk ids; created: ISO 8601, UTC;
    features: of `FEATURES`."""

    format: int
    volume_id: str
    chunk_size: int
    hash: str
    created: str
    features: tuple[str, ...] = ()

    @property
    def delta(self) -> bool:
        """Whether the volume may hold delta frames."""
        return DELTA in self.features


class _Format(msgspec.Struct):
    format: int
    features: tuple[str, ...] = ()


def check_chunk_size(chunk_size: int) -> int:
    """`chunk_size`, where it is one that a volume can have. Raises ConfigError."""
    if chunk_size not in CHUNK_SIZES:
        raise ConfigError(f"chunk size {chunk_size}: must be one of 4K, 64K, 1M")
    return chunk_size


async def read_superblock(client: StoreClient) -> Superblock:
    """The volume's superblock. Raises NoVolumeError, NewerFormatError, ObjectCorruptError."""
    where = client.store.url
    try:
        data = await client.get(NAME)
    except ObjectNotFoundError as error:
        raise NoVolumeError(f"{where}: there is no NovaFS volume here ({NAME} is missing); 'novafs init {where}' makes one") from error
    try:
        start = msgspec.json.decode(data, type=_Format)
        if start.format > FORMAT:
            raise NewerFormatError(f"{where}: the volume has format {start.format}, this NovaFS reads up to {FORMAT}; upgrade NovaFS")
        if unknown := [feature for feature in start.features if feature not in FEATURES]:
            raise NewerFormatError(
                f"{where}: the volume has the feature {unknown[0]!r}, this NovaFS knows {', '.join(FEATURES)}; upgrade NovaFS"
            )
        found = msgspec.json.decode(data, type=Superblock)
    except msgspec.MsgspecError as error:
        raise ObjectCorruptError(f"{where}: {NAME} does not parse ({error}); restore it, the rest of the volume is untouched") from error
    if found.chunk_size not in CHUNK_SIZES or found.hash != "sha256":
        raise ObjectCorruptError(f"{where}: {NAME} names chunk size {found.chunk_size} and hash {found.hash!r}, which no NovaFS writes")
    return found


async def create_superblock(client: StoreClient, *, chunk_size: int = CHUNK_SIZE_DEFAULT, delta: bool = False) -> Superblock:
    """Make the volume. delta: with that feature. Raises VolumeExistsError where there is one, ConfigError for a chunk size that is none."""
    check_chunk_size(chunk_size)
    created = datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
    superblock = Superblock(
        format=2 if delta else 1,
        volume_id=secrets.token_hex(16),
        chunk_size=chunk_size,
        hash="sha256",
        created=created,
        features=(DELTA,) if delta else (),
    )
    data = msgspec.json.format(msgspec.json.encode(superblock)) + b"\n"
    try:
        await client.create(NAME, data)
    except ObjectExistsError as error:
        # After a lost answer it may be our own: then the bytes are the same.
        if await client.get(NAME) != data:
            raise VolumeExistsError(f"{client.store.url}: there is a NovaFS volume here already; 'novafs info' shows it") from error
    return superblock
