"""Journal segments: the bytes of the write journal on the local disk.

A journal is a directory of segment files. Each is written front to back, and used again (under a new number, with a
new seed) once everything in it is in a committed generation; a file that was written before syncs in two thirds of
the time of one that grows, because no metadata changes.

    segment header, 4096 bytes   magic "NOVAJNL\\x01" (8), journal id (16), number (u64), seed (u64), zero, xxh64 of all before it (last 8)
    records                      header of 80 bytes, payload

    record header, 80 bytes      magic "JREC", kind (u8: 1 data, 2 resize), zero (3), image id (16), epoch (u64), sequence (u64),
                                 offset in the image or new size (u64), payload length (u32), synced (u32), time in ns (u64), zero (8),
                                 xxh64, seeded with the segment's seed, of the 72 bytes before it and the payload

`synced` is how far into the segment the last fdatasync before this record had reached. What follows the last valid
record is a torn tail, and is dropped, unless a later record (found by its magic and a right checksum) says that the
bytes had been synced: then the journal is damaged, and nobody may pretend that it was not (`damaged_at`).

Everything here is blocking and pure of state: the trio side is `novafs.journal`.
"""

from __future__ import annotations

import enum
import os
import secrets
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final, NamedTuple

import xxhash

from novafs import durable
from novafs.durable import FileOps

SEGMENT_BYTES: Final = 16 << 20
HEADER_BYTES: Final = 4096
PAYLOAD_MAX: Final = 1 << 20
SUFFIX: Final = ".seg"
SPARE_SUFFIX: Final = ".spare"

_MAGIC: Final = b"NOVAJNL\x01"
_RECORD_MAGIC: Final = b"JREC"
_HEADER: Final = struct.Struct("<8s16sQQ")
_RECORD: Final = struct.Struct("<4sB3x16sQQQIIQ8x")
_DIGEST: Final = struct.Struct("<Q")
RECORD_BYTES: Final = _RECORD.size + _DIGEST.size


class RecordKind(enum.IntEnum):
    """What a record says."""

    DATA = 1
    RESIZE = 2


class Record(NamedTuple):
    """One write or resize, in the order of `sequence`. offset: bytes, or the new size; epoch: of the lease."""

    kind: RecordKind
    image_id: bytes
    epoch: int
    sequence: int
    offset: int
    data: bytes
    time_ns: int


class SegmentHeader(NamedTuple):
    """Whose segment it is, its number, and the seed of its records' checksums."""

    journal_id: bytes
    number: int
    seed: int


class Segment(NamedTuple):
    """A segment as found on disk. damaged_at: byte where synced records are unreadable, -1 where there are none."""

    path: Path
    header: SegmentHeader
    records: list[Record]
    damaged_at: int


def encode_header(header: SegmentHeader) -> bytes:
    """The first 4096 bytes of a segment."""
    body = _HEADER.pack(_MAGIC, *header).ljust(HEADER_BYTES - _DIGEST.size, b"\0")
    return body + _DIGEST.pack(xxhash.xxh64_intdigest(body))


def decode_header(data: bytes) -> SegmentHeader | None:
    """The header, None where these bytes are no valid one."""
    if len(data) < HEADER_BYTES:
        return None
    body = data[: HEADER_BYTES - _DIGEST.size]
    if _DIGEST.unpack_from(data, len(body))[0] != xxhash.xxh64_intdigest(body):
        return None
    magic, journal_id, number, seed = _HEADER.unpack_from(body)
    return SegmentHeader(journal_id, number, seed) if magic == _MAGIC else None


def encode_record(record: Record, seed: int, synced: int) -> list[bytes]:
    """A record's bytes, the payload not copied."""
    head = _RECORD.pack(
        _RECORD_MAGIC, record.kind, record.image_id, record.epoch, record.sequence, record.offset, len(record.data), synced, record.time_ns
    )
    digest = xxhash.xxh64(head, seed=seed)
    digest.update(record.data)
    return [head, _DIGEST.pack(digest.intdigest()), record.data]


def _decode_record(view: memoryview, at: int, seed: int) -> tuple[Record, int, int] | None:
    """The record at byte `at`, the byte after it, and its `synced`; None where there is no valid one."""
    if at + RECORD_BYTES > len(view):
        return None
    magic, kind, image_id, epoch, sequence, offset, length, synced, time_ns = _RECORD.unpack_from(view, at)
    end = at + RECORD_BYTES + length
    if magic != _RECORD_MAGIC or length > PAYLOAD_MAX or end > len(view) or kind not in (1, 2):
        return None
    digest = xxhash.xxh64(view[at : at + _RECORD.size], seed=seed)
    digest.update(view[at + RECORD_BYTES : end])
    if _DIGEST.unpack_from(view, at + _RECORD.size)[0] != digest.intdigest():
        return None
    data = bytes(view[at + RECORD_BYTES : end])
    return Record(RecordKind(kind), image_id, epoch, sequence, offset, data, time_ns), end, synced


def scan(data: bytes, seed: int) -> tuple[list[Record], int]:
    """The records of a segment's bytes, and `damaged_at`."""
    view = memoryview(data)
    records: list[Record] = []
    at = HEADER_BYTES
    while (found := _decode_record(view, at, seed)) is not None:
        records.append(found[0])
        at = found[1]
    # Behind the first invalid byte: a torn tail, unless something later was written when these bytes were synced.
    search = at
    while (search := data.find(_RECORD_MAGIC, search + 1)) >= 0:
        later = _decode_record(view, search, seed)
        if later is not None and later[2] > at:
            return records, at
    return records, -1


def read_segments(directory: Path) -> Iterator[Segment]:
    """The segments in a directory, in the order of their numbers. A file with no valid header never got that far, and is passed over."""
    found: list[tuple[int, Path]] = []
    for path in directory.glob(f"*{SUFFIX}"):
        with path.open("rb") as file:
            header = decode_header(file.read(HEADER_BYTES))
        if header is not None:
            found.append((header.number, path))
    for _, path in sorted(found):
        data = path.read_bytes()
        header = decode_header(data)
        if header is not None:
            records, damaged_at = scan(data, header.seed)
            yield Segment(path, header, records, damaged_at)


def start_segment(
    directory: Path, journal_id: bytes, number: int, spare: Path | None, *, ops: FileOps = durable.SYSTEM
) -> tuple[int, SegmentHeader, Path]:
    """A segment ready for records, durable with its name: descriptor, header, path. Uses the `spare` file, where there is one.

    Raises OSError; ENOSPC shows here, where nothing was promised yet, because the whole file is written.
    """
    header = SegmentHeader(journal_id, number, secrets.randbits(64))
    path = directory / f"{number:016x}{SUFFIX}"
    content = memoryview(encode_header(header))
    fd = ops.create(path, durable.FILE_MODE) if spare is None else ops.open_rw(spare)
    try:
        _write_all(fd, [content], 0, ops)
        if spare is None:
            zeros = memoryview(bytes(1 << 20))
            for at in range(HEADER_BYTES, SEGMENT_BYTES, len(zeros)):
                _write_all(fd, [zeros[: SEGMENT_BYTES - at]], at, ops)
        ops.fsync(fd)
        if spare is not None:
            ops.rename(spare, path)
        ops.fsync_dir(directory)
    except BaseException:
        ops.close(fd)
        raise
    return fd, header, path


def append(fd: int, position: int, parts: Sequence[bytes], *, ops: FileOps = durable.SYSTEM) -> None:
    """Write record bytes at `position` and fdatasync, once. Raises OSError; then nothing of it counts and the segment is given up."""
    _write_all(fd, [memoryview(part) for part in parts if part], position, ops)
    ops.fdatasync(fd)


def _write_all(fd: int, views: list[memoryview], position: int, ops: FileOps) -> None:
    iov_max = os.sysconf("SC_IOV_MAX")
    at = 0
    while at < len(views):
        taken = ops.pwritev(fd, views[at : at + iov_max], position)
        position += taken
        while at < len(views) and taken >= len(views[at]):
            taken -= len(views[at])
            at += 1
        if taken:
            views[at] = views[at][taken:]
