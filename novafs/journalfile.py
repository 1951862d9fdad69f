"""Journal segments: the bytes of the write journal on the local disk.

A journal is a directory of segment files. Each is written front to back, and used again (under a new number, with a
new seed) once everything in it is in a committed generation; a file that was written before syncs in two thirds of
the time of one that grows, because no metadata changes.

    segment header, 4096 bytes   magic "NOVAJNL\\x01" (8), journal id (16), number (u64), seed (u64), number of the segment written
                                 before it (u64), bytes of that one that were synced (u64), zero, xxh64 of all before it (last 8)
    records                      header of 80 bytes, payload; those of one fdatasync follow each other, and begin at a multiple
                                 of 4096

    record header, 80 bytes      magic "JREC", kind (u8: 1 data, 2 resize), 1 where a later part of the same write follows
                                 (u8), zero (2), image id (16), epoch (u64), sequence (u64),
                                 offset in the image or new size (u64), payload length (u32), synced (u32), time in ns (u64), sequence
                                 of the image's write before this one (u64; its own in a later part of one write), xxh64, seeded with
                                 the segment's seed, of the 72 bytes before it and the payload

`synced` is how far into the segment the last fdatasync before this record had reached. What follows the last valid
record is a torn tail, and is dropped, unless a later record (found by its magic and a right checksum) or the next
segment says that the bytes had been synced: then the journal is damaged, and nobody may pretend that it was not
(`damaged_at`). What can be read behind the damage is found all the same; `unbroken` tells, by what each record says of the one before
it, which images miss a write. Blocks that hold synced bytes are never written again: a power cut may take a whole block with it.

A segment's name is durable only once its header is: one without a valid header holds no records (it is deleted),
unless it does (then its header is damaged, and it is kept aside).

Everything here is blocking and pure of state: the trio side is `novafs.journal`.
"""

from __future__ import annotations

import contextlib
import enum
import os
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final, NamedTuple

import xxhash

from novafs import durable
from novafs.durable import FileOps

SEGMENT_BYTES: Final = 16 << 20
HEADER_BYTES: Final = 4096
BLOCK_BYTES: Final = 4096
"""What a device or its file system may damage as a whole when power fails while a part of it is written."""
PAYLOAD_MAX: Final = 1 << 20
SUFFIX: Final = ".seg"
SPARE_SUFFIX: Final = ".spare"

_MAGIC: Final = b"NOVAJNL\x01"
_RECORD_MAGIC: Final = b"JREC"
_HEADER: Final = struct.Struct("<8s16sQQQQ")
_RECORD: Final = struct.Struct("<4sBB2x16sQQQIIQQ")
_DIGEST: Final = struct.Struct("<Q")
RECORD_BYTES: Final = _RECORD.size + _DIGEST.size


class RecordKind(enum.IntEnum):
    """What a record says."""

    DATA = 1
    RESIZE = 2


class Record(NamedTuple):
    """One write or resize, in the order of `sequence`. offset: bytes, or the new size; epoch: of the lease; previous: sequence of the
    image's write before this one, or its own where this is a later part of one write; 0: not known; more: a later part follows."""

    kind: RecordKind
    image_id: bytes
    epoch: int
    sequence: int
    offset: int
    data: bytes
    time_ns: int
    previous: int = 0
    more: bool = False


class SegmentHeader(NamedTuple):
    """Whose segment it is, its number, the seed of its records' checksums, and which segment was written before it, up to which byte
    (0: none)."""

    journal_id: bytes
    number: int
    seed: int
    previous: int = 0
    previous_synced: int = 0


class Segment(NamedTuple):
    """A segment as found on disk. damaged_at: byte where synced records are unreadable, -1 where there are none.

    header: None where it is damaged itself; damaged_at is 0 then, and there are no records.
    """

    path: Path
    header: SegmentHeader | None
    records: list[Record]
    damaged_at: int


def block_end(position: int) -> int:
    """`position` rounded up to a multiple of BLOCK_BYTES."""
    return -(-position // BLOCK_BYTES) * BLOCK_BYTES


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
    magic, *fields = _HEADER.unpack_from(body)
    return SegmentHeader(*fields) if magic == _MAGIC else None


def encode_record(record: Record, seed: int, synced: int) -> list[bytes]:
    """A record's bytes, the payload not copied."""
    head = _RECORD.pack(
        _RECORD_MAGIC,
        record.kind,
        record.more,
        record.image_id,
        record.epoch,
        record.sequence,
        record.offset,
        len(record.data),
        synced,
        record.time_ns,
        record.previous,
    )
    digest = xxhash.xxh64(head, seed=seed)
    digest.update(record.data)
    return [head, _DIGEST.pack(digest.intdigest()), record.data]


def _decode_record(view: memoryview, at: int, seed: int) -> tuple[Record, int, int] | None:
    """The record at byte `at`, the byte after it, and its `synced`; None where there is no valid one."""
    if at + RECORD_BYTES > len(view):
        return None
    magic, kind, more, image_id, epoch, sequence, offset, length, synced, time_ns, previous = _RECORD.unpack_from(view, at)
    end = at + RECORD_BYTES + length
    if magic != _RECORD_MAGIC or length > PAYLOAD_MAX or end > len(view) or kind not in (1, 2):
        return None
    digest = xxhash.xxh64(view[at : at + _RECORD.size], seed=seed)
    digest.update(view[at + RECORD_BYTES : end])
    if _DIGEST.unpack_from(view, at + _RECORD.size)[0] != digest.intdigest():
        return None
    data = bytes(view[at + RECORD_BYTES : end])
    return Record(RecordKind(kind), image_id, epoch, sequence, offset, data, time_ns, previous, bool(more)), end, synced


def _decode_next(view: memoryview, at: int, seed: int) -> tuple[Record, int, int] | None:
    """The record that follows on byte `at`: of the same fdatasync, or the first one of the next; None where neither is there."""
    found = _decode_record(view, at, seed)
    if found is None:
        found = _decode_record(view, block_end(at), seed)
        # Only if the fdatasync before it ended here: else what lies between is a record, and was synced.
        if found is not None and found[2] != at:
            return None
    return found


def scan(data: bytes, seed: int, synced: int = 0) -> tuple[list[Record], int]:
    """The records of a segment's bytes, and `damaged_at`. synced: how far it was, as the next segment says."""
    view = memoryview(data)
    records: list[Record] = []
    at, damaged_at = HEADER_BYTES, -1
    while True:
        while (found := _decode_next(view, at, seed)) is not None:
            records.append(found[0])
            at = found[1]
        # Behind the first invalid byte: a torn tail, unless something later was written when these bytes were synced.
        later = _after_damage(data, at, seed)
        if later < 0:
            return records, damaged_at if damaged_at >= 0 or at >= synced else at
        damaged_at = at if damaged_at < 0 else damaged_at
        at = later


def _after_damage(data: bytes, at: int, seed: int) -> int:
    """Where the next record behind `at` is, if a record behind `at` says that these bytes had been synced; else -1."""
    view, search, first = memoryview(data), at, -1
    while (search := data.find(_RECORD_MAGIC, search + 1)) >= 0:
        found = _decode_record(view, search, seed)
        if found is None:
            continue
        first = search if first < 0 else first
        if found[2] > at:
            return first
    return -1


def unbroken(records: Sequence[Record], contained: int) -> int:
    """How many of an image's records (sorted by sequence) follow on each other, and on `contained`, without a hole.

    A point in time holds no write that came after one that is missing.
    """
    sequence, end, more = contained, -1, False
    for number, record in enumerate(records):
        same = record.sequence == sequence  # a later part, or all of it once more after an error of the disk
        if more and not same:
            return number
        if record.previous == record.sequence:
            if not same or record.offset > end:
                return number
        elif record.previous > sequence:
            return number
        sequence, end, more = record.sequence, record.offset + len(record.data), record.more
    return len(records)


def read_segments(directory: Path) -> Iterator[Segment]:
    """The segments in a directory, in the order of their numbers; those whose header is damaged last.

    A file without a valid header that holds no records never got that far, and is passed over (`unfinished`).
    """
    found: list[tuple[SegmentHeader, Path]] = []
    damaged: list[Path] = []
    for path in sorted(directory.glob(f"*{SUFFIX}")):
        header = _read_header(path)
        if header is not None:
            found.append((header, path))
        elif _holds_records(path):
            damaged.append(path)
    found.sort(key=lambda entry: entry[0].number)
    synced: dict[tuple[bytes, int], int] = {}
    for later, _ in found:
        key = (later.journal_id, later.previous)
        synced[key] = max(synced.get(key, 0), later.previous_synced)
    for header, path in found:
        records, damaged_at = scan(path.read_bytes(), header.seed, synced.get((header.journal_id, header.number), 0))
        yield Segment(path, header, records, damaged_at)
    for path in damaged:
        yield Segment(path, None, [], 0)


def unfinished(directory: Path) -> list[Path]:
    """Segments whose making was cut off: no valid header, no records. Nothing was ever promised of them."""
    return [path for path in directory.glob(f"*{SUFFIX}") if _read_header(path) is None and not _holds_records(path)]


def _read_header(path: Path) -> SegmentHeader | None:
    with path.open("rb") as file:
        return decode_header(file.read(HEADER_BYTES))


def _holds_records(path: Path) -> bool:
    return path.read_bytes().find(_RECORD_MAGIC, HEADER_BYTES) >= 0


def start_segment(directory: Path, header: SegmentHeader, spare: Path | None, *, ops: FileOps = durable.SYSTEM) -> tuple[int, Path]:
    """A segment ready for records, durable with its name: descriptor and path. Uses the `spare` file, where there is one.

    Raises OSError, with the new file, or the spare one, gone. ENOSPC shows here, where nothing was promised yet, because
    the whole file is written.
    """
    path = directory / f"{header.number:016x}{SUFFIX}"
    content = memoryview(encode_header(header))
    if spare is None:
        fd, made = ops.create(path, durable.FILE_MODE), path
    else:
        # Its old name must not come back after a power cut with this header half written: that would look like damage.
        ops.fsync_dir(directory)
        fd, made = ops.open_rw(spare), spare
    try:
        _write_all(fd, [content], 0, ops)
        if spare is None:
            zeros = memoryview(bytes(1 << 20))
            for at in range(HEADER_BYTES, SEGMENT_BYTES, len(zeros)):
                _write_all(fd, [zeros[: SEGMENT_BYTES - at]], at, ops)
        ops.fsync(fd)
        if spare is not None:
            ops.rename(spare, path)
            made = path
        ops.fsync_dir(directory)
    except BaseException:
        ops.close(fd)
        # On a full disk half a segment would take the room that the next try needs.
        with contextlib.suppress(OSError):
            ops.unlink(made)
        raise
    return fd, path


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
