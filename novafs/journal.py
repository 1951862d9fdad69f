"""The write journal of a volume on this host: what makes `fsync` true before a generation holds the data (design 6).

    sequence = journal.next_sequence()      at each write or resize, in the order they were issued
    await journal.append(records)           returns when they would survive a power cut
    journal.committed(image_id, sequence)   a generation holds everything of the image up to there: trim

All callers of `append` that wait at one moment share one sync. `start` begins to write records of which the caller expects to be asked
soon, so that the disk works while that request is on its way; it promises nothing, and the next `append` finds it done.

Promised: when `append` returns, every record is on the device; when it raises, the caller keeps the data and may call again. A failed
sync is never repeated on the same file (the kernel may have dropped the pages): the segment is given up and the records go to another one.
A segment is used again only when no image needs anything in it, which a crash in between turns into a segment whose
records are all behind the heads' sequences: replay passes them by.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Final, NamedTuple

import trio
import xxhash

from novafs import durable
from novafs import journalfile as files
from novafs.asynctools import GroupCommit
from novafs.directio import DirectWriter
from novafs.durable import FileOps
from novafs.errors import ObjectCorruptError, PermanentError, StoreFullError
from novafs.journalfile import Record, Segment, SegmentHeader
from novafs.latency import Latency
from novafs.promptly import SLOW_S, Promptly

log = logging.getLogger(__name__)

ID_FILE: Final = "id"
ASIDE_DIR: Final = "aside"
"""Beside the journal: what could not be replayed, for 'novafs fsck' and for people."""
SPARES_MAX: Final = 4
PROMPT_BYTES: Final = 68 << 10
"""More than this is not waited for on the spot: it is not only the device's delay that takes time."""
_UNKEPT: Final = b"unkept"
"""Stands for an image in what is needed of a segment that is to be kept aside as a whole, and was not yet."""
_ID: Final = re.compile(rb"[0-9a-f]{32}\n?")
_FULL: Final = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@dataclass(frozen=True, slots=True)
class JournalStatistics:
    """records and syncs since it was opened; bytes on disk of segments that are needed; segments likewise."""

    records: int
    syncs: int
    written_bytes: int
    segments: int
    segment_bytes: int


class _Open:
    """The segment that takes records: where the next goes, and what it holds."""

    __slots__ = ("direct", "fd", "header", "path", "position", "synced")

    def __init__(self, fd: int, header: SegmentHeader, path: Path, direct: int | None) -> None:
        self.fd = fd
        self.direct = direct
        """The same file for a `DirectWriter`."""
        self.header = header
        self.path = path
        self.position = files.HEADER_BYTES
        self.synced = files.HEADER_BYTES


class _Ahead(NamedTuple):
    """Records whose writing has begun before anybody asked for it, and where they end in the current segment."""

    records: Sequence[Record]
    position: int
    end: int


class Journal:
    """One per volume and host; its directory is owned through the state directory's lock. On the trio thread alone."""

    def __init__(self, directory: Path, journal_id: bytes, found: Sequence[Segment], *, ops: FileOps = durable.SYSTEM) -> None:
        self.directory = directory
        self.journal_id = journal_id
        self._ops = ops
        self._limiter = trio.CapacityLimiter(1)  # its own, as `_disk` has: hung store calls never starve an fdatasync
        self._disk = Promptly()
        # Whoever puts other calls in the place of the system's wants to see each of them.
        self._writer = _direct_writer(directory) if ops is durable.SYSTEM else None
        self._use_writer = True
        self._last_ids: set[bytes] = set()
        """Images of the last write."""
        self._group: GroupCommit[Sequence[Record]] = GroupCommit(self._write)
        self._current: _Open | None = None
        self._ahead: _Ahead | None = None
        """Only ever in the current segment, and nothing else is written there while it is set."""
        self._begun_in: _Open | None = None
        """Where the writer's last write went."""
        self._spares = sorted(directory.glob(f"*{files.SPARE_SUFFIX}"))
        # path -> image id -> highest sequence in it; Invariant: a segment leaves only when this is empty.
        self._needed: dict[Path, dict[bytes, int]] = {}
        self._failed: set[Path] = set()
        """Segments on which the disk has failed: never used again."""
        self._committed: dict[bytes, int] = {}
        self._previous = (0, 0)
        """Number of the segment that was written last, and its synced bytes."""
        self._number = 1
        self._sequence = 0
        self._records = self._syncs = self._written = 0
        self.sync_latency = Latency()
        """Of writing and syncing what waits, the wait for the one before excluded."""
        for path in directory.glob(f"*{files.SUFFIX}"):  # whatever is in it: its name is taken
            with contextlib.suppress(ValueError):
                self._number = max(self._number, int(path.stem, 16) + 1)
        for segment in found:
            last: dict[bytes, int] = {}
            if segment.header is not None:
                self._number = max(self._number, segment.header.number + 1)
            else:
                self._failed.add(segment.path)
            foreign = segment.header is not None and segment.header.journal_id != journal_id
            for record in () if foreign else segment.records:
                last[record.image_id] = max(last.get(record.image_id, 0), record.sequence)
                self._sequence = max(self._sequence, record.sequence)
            if segment.damaged_at >= 0 or foreign:
                last[_UNKEPT] = 1  # until `kept`
            self._needed[segment.path] = last

    @classmethod
    def open(cls, directory: Path, *, ops: FileOps = durable.SYSTEM) -> tuple[Journal, list[Segment]]:
        """The journal in a directory, made where there is none, and the segments that wait for replay. Blocking.

        Segments of another journal id, if there are any, are among them. Raises ObjectCorruptError where the id file is damaged,
        StoreFullError, PermanentError.
        """
        try:
            return cls._open(directory, ops)
        except OSError as error:
            if error.errno in _FULL:
                raise _error(directory, error) from error
            raise PermanentError(
                f"journal {directory}: can not be opened ({error}); check the disk, its mount options and owner"
            ) from error

    @classmethod
    def _open(cls, directory: Path, ops: FileOps) -> tuple[Journal, list[Segment]]:
        # Whoever made these directories may have been killed before they were durable; each of them, as far as this file system goes,
        # and where they really are.
        durable.make_dirs(directory, below=directory.parent, ops=ops)
        device = directory.stat().st_dev
        for above in dict.fromkeys((directory.parent.parent, *directory.parent.resolve().parents)):
            with contextlib.suppress(PermissionError):
                if above.stat().st_dev == device:
                    ops.fsync_dir(above)
        # What is not here now must not come back: numbers and sequences may begin anew.
        ops.fsync_dir(directory)
        for path in _leftovers(directory):
            ops.unlink(path)
        segments = list(files.read_segments(directory))
        id_path = directory / ID_FILE
        if not id_path.exists():
            # Lost, perhaps, while what was fsynced is there: the segments say whose they are.
            known = {segment.header.journal_id for segment in segments if segment.header is not None}
            journal_id = known.pop() if len(known) == 1 else secrets.token_bytes(16)
            with contextlib.suppress(FileExistsError):
                durable.write_new(id_path, journal_id.hex().encode(), ops=ops)
        text = id_path.read_bytes()
        if not _ID.fullmatch(text):
            raise ObjectCorruptError(
                f"{id_path}: expected a journal id of 32 hex digits, found {text[:40]!r}; delete this file and mount again: the segments "
                f"beside it know it"
            )
        return cls(directory, bytes.fromhex(text.decode()), segments, ops=ops), segments

    def next_sequence(self) -> int:
        """The number of the next write of any image."""
        self._sequence += 1
        return self._sequence

    def advance(self, sequence: int) -> None:
        """Later numbers are higher than this one: a head may know a higher one than the segments that are left."""
        self._sequence = max(self._sequence, sequence)

    async def append(self, records: Sequence[Record]) -> None:
        """Make records durable. Raises StoreFullError (the local disk), PermanentError; nothing of them counts then."""
        if records:
            await self._group.submit(records)

    def start(self, records: Sequence[Record]) -> None:
        """Begin to write records of one image, all that wait, which an `append` is expected to name first; or do nothing.

        The caller keeps them whatever happens. Nothing is done where the journal is at work, where the kernel can not do it by itself, or
        where other images write, too: their turns are shared better by one sync for all.
        """
        current = self._current
        if current is None or self._ahead is not None or self._group.running:
            return
        parts, start, end, count = self._encoded(current, records)
        if count < len(records) or {record.image_id for record in records} != self._last_ids:
            return
        self._note_needed(current, records)
        try:
            if self._begin(current, start, parts, end) is not None:
                self._ahead = _Ahead(tuple(records), start, end)
        except OSError as error:
            log.debug("journal %s: %s", self.directory, error)  # `append` will see whether it can be written

    def _begin(self, current: _Open, start: int, parts: list[bytes], end: int) -> DirectWriter | None:
        """Have the kernel write the bytes, where it can: whom to ask for the end. Raises OSError with nothing begun."""
        writer = self._writer
        if writer is None or writer.busy or current.direct is None or not self._use_writer or end - start > writer.bytes_max:
            return None
        self._begun_in = current
        try:
            writer.begin(current.direct, start, parts)
        except OSError:
            self._use_writer = False
            raise
        if writer.seconds > SLOW_S:
            # It was to be handed over, and was waited for: a file system that does so would hold up everybody each time.
            log.info("journal %s: direct writes hold up the event loop (%.0f ms); using threads", self.directory, writer.seconds * 1e3)
            self._use_writer = False
        return writer

    async def _end(self, writer: DirectWriter, *, alone: bool) -> None:
        try:
            await self._disk.end(writer, alone=alone)
        except OSError:
            self._use_writer = False
            raise
        finally:
            self._ahead = None

    async def _finish_ahead(self, queue: list[Record]) -> list[Record]:
        """Wait for what was begun ahead, if anything was; what is left of the queue. Raises OSError with nothing of it counted."""
        ahead, current, writer = self._ahead, self._current, self._writer
        if current is None or writer is None:
            return queue
        if ahead is None:
            if writer.busy and self._begun_in is current:
                # A KeyboardInterrupt came before anybody waited for it: it might come down on what is written there next.
                await self._end(writer, alone=True)
            return queue
        began_s = perf_counter()
        await self._end(writer, alone=True)
        self.sync_latency.note(perf_counter() - began_s)
        self._wrote(current, ahead.position, ahead.end, len(ahead.records))
        # As they were begun, or not at all: a commit may have made them needless, and others may have come first.
        count = len(ahead.records)
        same = len(queue) >= count and all(record is begun for record, begun in zip(queue, ahead.records, strict=False))
        return queue[count:] if same else queue

    async def _write(self, batches: list[Sequence[Record]]) -> None:
        queue = [part for batch in batches for record in batch for part in _split(record)]
        while queue:
            try:
                queue = await self._write_some(queue)
            except OSError as error:
                first = error
            else:
                continue
            # The segment is given up: what was synced in it stays needed, its tail may be torn.
            log.warning("journal %s: %s; going on in a new segment", self.directory, first)
            self._give_up()
            try:
                queue = await self._write_some(queue)
            except OSError as error:
                self._give_up()
                raise _error(self.directory, error) from error

    async def _write_some(self, queue: list[Record]) -> list[Record]:
        """Write as many as the segment takes, and sync; those that are left."""
        queue = await self._finish_ahead(queue)
        if not queue:
            return queue
        size = files.RECORD_BYTES + len(queue[0].data)
        if self._current is None or files.block_end(self._current.position) + size > files.SEGMENT_BYTES:
            await self._start()
        current = self._current
        assert current is not None
        parts, start, end, count = self._encoded(current, queue)
        self._note_needed(current, queue[:count])
        began_s = perf_counter()
        # Where images take turns a thread lets them share the next fdatasync, so nobody may hold them up.
        image_ids = {record.image_id for record in queue[:count]}
        alone, self._last_ids = end - start <= PROMPT_BYTES and image_ids == self._last_ids, image_ids
        await trio.lowlevel.checkpoint_if_cancelled()
        writer = self._begin(current, start, parts, end)
        if writer is not None:
            await self._end(writer, alone=alone)
        else:
            await self._disk.run(lambda: files.append(current.fd, start, parts, ops=self._ops), alone=alone)
        self.sync_latency.note(perf_counter() - began_s)
        self._wrote(current, start, end, count)
        return queue[count:]

    def _encoded(self, current: _Open, queue: Sequence[Record]) -> tuple[list[bytes], int, int, int]:
        """The bytes of as many records as the segment takes; where they begin and end in it; how many they are."""
        parts: list[bytes] = []
        start = end = files.block_end(current.position)
        count = 0
        for record in queue:
            size = files.RECORD_BYTES + len(record.data)
            if end + size > files.SEGMENT_BYTES:
                break
            parts += files.encode_record(record, current.header.seed, current.synced)
            end += size
            count += 1
        return parts, start, end, count

    def _note_needed(self, current: _Open, records: Sequence[Record]) -> None:
        """Before the write: a segment that may hold a record is not given away under it."""
        last = self._needed[current.path]
        for record in records:
            if record.sequence > self._committed.get(record.image_id, 0):
                last[record.image_id] = max(last.get(record.image_id, 0), record.sequence)

    def _wrote(self, current: _Open, start: int, end: int, count: int) -> None:
        self._written += end - start
        self._records += count
        self._syncs += 1
        current.position = current.synced = end

    async def _start(self) -> None:
        self._close_current()
        header = SegmentHeader(self.journal_id, self._number, secrets.randbits(64), *self._previous)
        self._number += 1
        spare = self._spares.pop() if self._spares else None
        try:
            fd, path = await trio.to_thread.run_sync(
                lambda: files.start_segment(self.directory, header, spare, ops=self._ops), limiter=self._limiter
            )
        except trio.Cancelled:  # before it began
            self._spares += [spare] if spare is not None else []
            raise
        direct = None
        if self._writer is not None:
            try:
                direct = self._writer.open(path)
            except OSError as error:
                log.debug("journal %s: no direct writes here: %s", self.directory, error)
        self._current = _Open(fd, header, path, direct)
        self._needed[path] = {}
        self._recycle()

    def _give_up(self) -> None:
        if self._current is not None:
            self._failed.add(self._current.path)
        self._close_current()

    def _close_current(self) -> None:
        if self._current is not None:
            current, self._current = self._current, None
            self._previous = (current.header.number, current.synced)
            self._ops.close(current.fd)
            if current.direct is not None:
                self._ops.close(current.direct)

    def committed(self, image_id: bytes, sequence: int) -> None:
        """Everything of an image up to `sequence` is in a committed generation, or was set aside."""
        # Kept, because records that are on their way to the disk now are not needed there either.
        self._committed[image_id] = max(self._committed.get(image_id, 0), sequence)
        for last in self._needed.values():
            if last.get(image_id, sequence + 1) <= sequence:
                del last[image_id]
        self._recycle()

    def _recycle(self) -> None:
        for path, last in list(self._needed.items()):
            if last or (self._current is not None and path == self._current.path):
                continue
            del self._needed[path]
            # Neither call needs to be durable: a segment that comes back after a crash holds nothing that replay takes.
            try:
                if path not in self._failed and len(self._spares) < SPARES_MAX and path.stat().st_size == files.SEGMENT_BYTES:
                    spare = path.with_suffix(files.SPARE_SUFFIX)
                    self._ops.rename(path, spare)
                    self._spares.append(spare)
                else:
                    self._ops.unlink(path)
                    self._failed.discard(path)
            except OSError as error:
                log.warning("journal segment %s could not be given back: %s", path, error)

    def set_aside(self, image_id: bytes, records: Sequence[Record]) -> Path:
        """Keep an image's records in a file of their own under `aside/`, durable; its path. Blocking; for replay.

        The same records are kept once, however often a crash has them set aside again; others of the same numbers (a journal that was
        empty counts anew) beside them.
        """
        directory = self.directory.parent / ASIDE_DIR
        durable.make_dirs(directory, ops=self._ops)
        seed = secrets.randbits(64)
        content = bytearray(files.encode_header(SegmentHeader(self.journal_id, 0, seed)))
        for record in records:
            for part in _split(record):
                content += b"".join(files.encode_record(part, seed, 0))
        first, last = min(r.sequence for r in records), max(r.sequence for r in records)
        digest = xxhash.xxh64()
        for record in records:
            digest.update(b"".join(files.encode_record(record, 0, 0)))
        path = directory / f"{image_id.hex()}-{self.journal_id.hex()[:12]}-{first}-{last}-{digest.hexdigest()}{files.SUFFIX}"
        with contextlib.suppress(FileExistsError):
            durable.write_new(path, bytes(content), ops=self._ops)
        return path

    def keep_whole(self, segment: Segment) -> Path:
        """Keep a segment that is damaged, or another journal's, as it is under `aside/`, durable; its path. Blocking; for replay."""
        directory = self.directory.parent / ASIDE_DIR
        durable.make_dirs(directory, ops=self._ops)
        content = segment.path.read_bytes()
        kind = "damaged" if segment.damaged_at >= 0 else "foreign"
        path = directory / f"{kind}-{segment.path.stem}-{xxhash.xxh64_hexdigest(content)}{files.SUFFIX}"
        with contextlib.suppress(FileExistsError):
            durable.write_new(path, content, ops=self._ops)
        return path

    def kept(self, segment: Segment) -> None:
        """`keep_whole` has returned, or is not needed: the segment may go once nothing else in it is needed."""
        self._needed[segment.path].pop(_UNKEPT, None)

    def statistics(self) -> JournalStatistics:
        """Counts and sizes as of now."""
        return JournalStatistics(self._records, self._syncs, self._written, len(self._needed), len(self._needed) * files.SEGMENT_BYTES)

    def close(self) -> None:
        """Close the open segment, and give back what nobody needs; nothing is lost by it, nor by not calling it."""
        self._ahead = None  # nobody has asked for it; the kernel ends it by itself
        if self._writer is not None:
            if not self._writer.close() and self._current is not None:
                self._failed.add(self._current.path)  # nothing else may ever lie where that write comes down
            self._writer = None
        self._close_current()
        self._recycle()


def _direct_writer(directory: Path) -> DirectWriter | None:
    try:
        return DirectWriter(PROMPT_BYTES)
    except OSError as error:
        log.debug("journal %s: no native AIO: %s", directory, error)
        return None


def _leftovers(directory: Path) -> list[Path]:
    """Files of a journal that a crash has left half made: they hold nothing, and a new segment may want their names."""
    spares = [path for path in directory.glob(f"*{files.SPARE_SUFFIX}") if path.stat().st_size != files.SEGMENT_BYTES]
    return [*files.unfinished(directory), *spares]


def _split(record: Record) -> list[Record]:
    if len(record.data) <= files.PAYLOAD_MAX:
        return [record]
    view = memoryview(record.data)
    return [
        record._replace(
            offset=record.offset + at,
            data=bytes(view[at : at + files.PAYLOAD_MAX]),
            previous=record.sequence if at else record.previous,
            more=at + files.PAYLOAD_MAX < len(view),
        )
        for at in range(0, len(view), files.PAYLOAD_MAX)
    ]


def _error(directory: Path, error: OSError) -> PermanentError:
    if error.errno in _FULL:
        return StoreFullError(
            f"journal {directory}: no space left on its file system; make room there: until then fsync fails and nothing new is promised"
        )
    return PermanentError(f"journal {directory}: can not be written ({error}); what was fsynced before is safe, check the disk")
