"""Readers of block traces: what a disk was asked for, in order. Used by `novafs simulate` and by benchmarks.

Promised: a file is read in blocks of at most `BLOCK_ROWS` requests, so memory does not grow with the trace (an `.npz` holds
its arrays as a whole); the same file gives the same requests every time; a file that is damaged, cut short or of another
kind raises SourceError that names the file, the row or byte, what was expected and what was found. Never a traceback of
numpy or zstandard, never an unpickled object.

| suffix | rows |
|---|---|
| `.csv`, `.csv.gz` with four columns | `t_us,op,offset,length`; op `r`, `w` or `f` (a flush, left out); a header line may lead |
| `.csv`, `.csv.gz` with seven columns | MSR Cambridge: `timestamp,host,disk,type,offset,size,response time`; the timestamp in 100 ns |
| `.npz` | arrays `time_us`, `op`, `offset`, `size`, and `dev` where there are several disks |
| `.vscsi` | libCacheSim's vscsiStats records, version 1 (32 bytes) or 2 (40 bytes) |
| `.oracleGeneral`, `.oracleGeneral.bin` | libCacheSim's records of 24 bytes; an object counts as one chunk whose number is its id |

Each may be followed by `.zst`. Rows without a clock (time steps of exactly one) are marked `timed = False`.
"""

from __future__ import annotations

import csv
import gzip
import io
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final, cast

import numpy as np
import numpy.typing as npt
import zstandard

from novafs.errors import NovaError, SourceError

READ: Final = 0
WRITE: Final = 1
UNKNOWN: Final = 255
BLOCK_ROWS: Final = 1 << 16
SIZE_MAX: Final = 1 << 30
"""Bytes of one request beyond which a row is taken for damage: no disk protocol asks for a GiB at once."""
SECTOR_BYTES: Final = 512

Ints = npt.NDArray[np.int64]

_VSCSI1: Final = np.dtype([("sn", "<u4"), ("len", "<u4"), ("sg", "<u4"), ("cmd", "<u2"), ("ver", "<u2"), ("lbn", "<u8"), ("ts", "<u8")])
_VSCSI2: Final = np.dtype(
    [("cmd", "<u2"), ("ver", "<u2"), ("sn", "<u4"), ("len", "<u4"), ("sg", "<u4"), ("lbn", "<u8"), ("ts", "<u8"), ("rt", "<u8")]
)
_ORACLE: Final = np.dtype([("clock", "<u4"), ("id", "<u8"), ("size", "<u4"), ("next", "<i8")])
_WRITE_COMMANDS: Final = (0x0A, 0x2A, 0xAA, 0x8A)
"""SCSI WRITE(6), (10), (12) and (16); everything else in a vscsiStats trace is a read."""
_OPS: Final = {"r": READ, "read": READ, "w": WRITE, "write": WRITE}


@dataclass(frozen=True, slots=True)
class Requests:
    """A block of requests, one array element each: microseconds, READ/WRITE/UNKNOWN, bytes, bytes, number of the disk.

    Where `objects` holds, `offset` is the number of a chunk, not of a byte, and each request is that one chunk.
    """

    time_us: Ints
    op: Ints
    offset: Ints
    size: Ints
    device: Ints
    objects: bool = False

    def __len__(self) -> int:
        return len(self.offset)


@dataclass(frozen=True, slots=True)
class Trace:
    """A trace file whose kind is known. `timed` says whether `time_us` is a clock or only counts."""

    path: Path
    timed: bool
    _read: Callable[[Path], Iterator[Requests]]

    @property
    def name(self) -> str:
        """The file's name without its suffixes."""
        return self.path.name.split(".")[0]

    def blocks(self) -> Iterator[Requests]:
        """The requests from the beginning, a block at a time. Raises SourceError."""
        row = 0
        for block in _guarded(self.path, self._read(self.path)):
            _check(self.path, row, block)
            row += len(block)
            yield block


def open_trace(path: Path | str) -> Trace:
    """The trace in a file, its kind told from its name and first bytes. Raises SourceError."""
    path = Path(path)
    if not path.is_file():
        raise SourceError(f"{path}: no such trace file")
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in (".zst", ".gz"):
        suffixes.pop()
    if len(suffixes) > 1 and suffixes[-1] == ".bin":
        suffixes.pop()
    reader = _READERS.get(suffixes[-1] if suffixes else "")
    if reader is None:
        raise SourceError(f"{path}: expected a trace named {', '.join(sorted(_READERS))} (.gz or .zst may follow)")
    first = next(_guarded(path, reader(path)), None)
    if first is None or not len(first):
        raise SourceError(f"{path}: holds no request")
    _check(path, 0, first)
    steps = np.diff(first.time_us[:1024])
    return Trace(path, timed=len(first) < 3 or not bool((steps == 1).all()), _read=reader)


def chunk_runs(block: Requests, chunk_size: int) -> tuple[Ints, Ints]:
    """For each request the numbers of its first and last chunk. A request of no bytes touches one."""
    if block.objects:
        return block.offset, block.offset
    return block.offset // chunk_size, (block.offset + np.maximum(block.size, 1) - 1) // chunk_size


def _guarded(path: Path, blocks: Iterator[Requests]) -> Iterator[Requests]:
    try:
        yield from blocks
    except NovaError:
        raise
    except (OSError, EOFError, ValueError, KeyError, zlib.error, zipfile.BadZipFile, zstandard.ZstdError) as error:
        raise SourceError(f"{path}: does not read as a trace of its kind: {error}") from error


def _check(path: Path, row: int, block: Requests) -> None:
    bad = np.flatnonzero((block.offset < 0) | (block.size < 0) | (block.size > SIZE_MAX) | (block.offset > (1 << 62)))
    if len(bad):
        at = int(bad[0])
        raise SourceError(
            f"{path}: request {row + at} asks for {int(block.size[at])} bytes at {int(block.offset[at])}; "
            f"expected 0 to {SIZE_MAX} bytes at an offset that a disk has"
        )


def _open(path: Path, stack: ExitStack) -> IO[bytes]:
    raw = stack.enter_context(path.open("rb"))
    suffix = path.suffix.lower()
    if suffix == ".gz":
        return cast(IO[bytes], stack.enter_context(gzip.GzipFile(fileobj=raw)))
    if suffix == ".zst":
        return io.BufferedReader(stack.enter_context(zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True)))
    return raw


def _rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    with ExitStack() as stack:
        text = io.TextIOWrapper(_open(path, stack), encoding="ascii", errors="strict", newline="")
        try:
            for number, row in enumerate(csv.reader(text), start=1):
                if row and not (number == 1 and not row[0].strip().lstrip("-").isdigit()):
                    yield number, row
        except csv.Error as error:
            raise SourceError(f"{path}: does not read as CSV: {error}") from error


def _read_csv(path: Path) -> Iterator[Requests]:
    columns: list[tuple[int, int, int, int, int]] = []
    width = 0
    for number, row in _rows(path):
        width = width or len(row)
        if width not in (4, 7) or len(row) != width:
            raise SourceError(f"{path}: line {number} has {len(row)} columns; expected four (t_us,op,offset,length) or MSR's seven in each")
        try:
            parsed = _own_row(row) if width == 4 else _msr_row(row)
        except (ValueError, OverflowError) as error:
            raise SourceError(f"{path}: line {number}: {error}") from error
        if parsed is not None:
            columns.append(parsed)
        if len(columns) == BLOCK_ROWS:
            yield _from_rows(columns)
            columns = []
    if columns:
        yield _from_rows(columns)


def _own_row(row: list[str]) -> tuple[int, int, int, int, int] | None:
    kind = row[1].strip().lower()
    if kind in ("f", "flush"):
        return None
    if kind not in _OPS:
        raise ValueError(f"operation {row[1]!r} is none of r, w, f")
    return _whole(row[0]), _OPS[kind], _whole(row[2]), _whole(row[3]), 0


def _msr_row(row: list[str]) -> tuple[int, int, int, int, int]:
    kind = row[3].strip().lower()
    if kind not in _OPS:
        raise ValueError(f"type {row[3]!r} is neither Read nor Write")
    return _whole(row[0]) // 10, _OPS[kind], _whole(row[4]), _whole(row[5]), _whole(row[2])


def _whole(text: str) -> int:
    value = int(text)
    if not 0 <= value < 1 << 63:
        raise ValueError(f"{text!r} is out of range")
    return value


def _from_rows(rows: list[tuple[int, int, int, int, int]]) -> Requests:
    table = np.array(rows, dtype=np.int64)
    time_us, op, offset, size, device = np.ascontiguousarray(table.T)
    return Requests(time_us, op, offset, size, device)


def _read_npz(path: Path) -> Iterator[Requests]:
    with ExitStack() as stack:
        # Opened here: numpy leaves a file that is no archive open.
        source = _open(path, stack)
        if path.suffix.lower() != ".npz":
            source = io.BytesIO(source.read())
        if not zipfile.is_zipfile(source):
            raise SourceError(f"{path}: is no .npz archive, or not all of one")
        source.seek(0)
        arrays = stack.enter_context(np.load(source, allow_pickle=False))
        offset = _column(path, arrays, "offset")
        size = _column(path, arrays, "size")
        time_us = _column(path, arrays, "time_us") if "time_us" in arrays else np.arange(len(offset), dtype=np.int64)
        op = _column(path, arrays, "op") if "op" in arrays else np.full(len(offset), UNKNOWN, dtype=np.int64)
        device = _column(path, arrays, "dev") if "dev" in arrays else np.zeros(len(offset), dtype=np.int64)
    if len({len(size), len(time_us), len(op), len(device), len(offset)}) != 1:
        raise SourceError(f"{path}: its arrays differ in length")
    for start in range(0, len(offset), BLOCK_ROWS):
        rows = slice(start, start + BLOCK_ROWS)
        yield Requests(time_us[rows], op[rows], offset[rows], size[rows], device[rows])


def _column(path: Path, arrays: Any, name: str) -> Ints:
    if name not in arrays:
        raise SourceError(f"{path}: has no array {name!r}, only {', '.join(arrays.files) or 'none'}")
    try:
        column = arrays[name]
    except ValueError as error:
        # numpy's own words recommend unpickling it.
        raise SourceError(f"{path}: array {name!r} holds objects, or does not parse; expected whole numbers") from error
    if column.ndim != 1 or column.dtype.kind not in "iu":
        raise SourceError(f"{path}: array {name!r} is {column.dtype} of {column.ndim} dimensions; expected whole numbers of one")
    return cast(Ints, column.astype(np.int64))


def _records(path: Path, record: np.dtype[Any]) -> Iterator[npt.NDArray[Any]]:
    done = 0
    with ExitStack() as stack:
        stream = _open(path, stack)
        while data := stream.read(BLOCK_ROWS * record.itemsize):
            if len(data) % record.itemsize:
                at = done + len(data) // record.itemsize
                raise SourceError(f"{path}: ends {len(data) % record.itemsize} bytes into record {at} of {record.itemsize}")
            done += len(data) // record.itemsize
            yield np.frombuffer(data, dtype=record)


def _read_vscsi(path: Path) -> Iterator[Requests]:
    with ExitStack() as stack:
        head = _open(path, stack).read(2 * _VSCSI2.itemsize)
    for version, record in ((1, _VSCSI1), (2, _VSCSI2)):
        known = np.frombuffer(head[: len(head) // record.itemsize * record.itemsize], dtype=record)[:2]
        if len(known) and (known["ver"] >> 8 == version).all():
            break
    else:
        raise SourceError(f"{path}: its first records carry no vscsiStats version; expected 1 or 2")
    for rows in _records(path, record):
        yield Requests(
            time_us=rows["ts"].astype(np.int64),
            op=np.isin(rows["cmd"] & 0xFF, _WRITE_COMMANDS).astype(np.int64),
            offset=np.minimum(rows["lbn"], 1 << 53).astype(np.int64) * SECTOR_BYTES,
            size=rows["len"].astype(np.int64),
            device=np.zeros(len(rows), dtype=np.int64),
        )


def _read_oracle(path: Path) -> Iterator[Requests]:
    for rows in _records(path, _ORACLE):
        ids = rows["id"]
        yield Requests(
            time_us=rows["clock"].astype(np.int64) * 1_000_000,
            op=np.full(len(rows), UNKNOWN, dtype=np.int64),
            # Hashed ids fill 64 bits; a chunk number has 40. Folding keeps small ids as they are, and with them who is whose neighbour.
            offset=((ids ^ (ids >> np.uint64(40))) & np.uint64((1 << 40) - 1)).astype(np.int64),
            size=np.minimum(rows["size"], SIZE_MAX).astype(np.int64),
            device=np.zeros(len(rows), dtype=np.int64),
            objects=True,
        )


_READERS: Final[dict[str, Callable[[Path], Iterator[Requests]]]] = {
    ".csv": _read_csv,
    ".npz": _read_npz,
    ".vscsi": _read_vscsi,
    ".oraclegeneral": _read_oracle,
}
