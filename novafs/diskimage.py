"""Disk images in files, as `qemu-img` sees them: what a source is, whether it is whole, and its raw content.

What is promised: `probe` either describes a source whose every part is there, or raises SourceError that says what
is wrong with it; no file that the source merely names (a backing file, an extent in another directory, an external
data file) is opened unless `follow` says so, because an image from elsewhere could name /etc/shadow.

`qemu-img` itself reads what is missing behind the end of a file as zeros, without an error, for qcow2, VDI and flat
VMDK. So a probe adds up three accounts: `qemu-img check`, the places of all data by `qemu-img map`, the sizes of flat extents.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import struct
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Final

import trio

from novafs.errors import SourceError, StoreFullError, UnsupportedError
from novafs.rawprobe import HEAD_BYTES, claimed_size, foreign_format

SECTOR: Final = 512
RAW: Final = "raw"

_VMDK_COMPRESSED: Final = 1 << 16

_CHECK_CORRUPT: Final = (1, 2)
"""Exit statuses of `qemu-img check`: 1 could not check, 2 corrupt, 3 only leaks, 63 the format has no check."""


@dataclass(frozen=True, slots=True)
class DiskImage:
    """A probed source. path: absolute. size_bytes: of the disk in it."""

    path: Path
    format: str
    size_bytes: int


def qemu_img() -> str:
    """The path of qemu-img. Raises UnsupportedError where it is not installed."""
    found = shutil.which("qemu-img")
    if found is None:
        raise UnsupportedError("qemu-img is not installed: install the package qemu-utils (raw sources need '--format raw' without it)")
    return found


def probe(source: str, *, format: str | None = None, follow: bool = False) -> DiskImage:
    """What the file or block device `source` is. Blocking.

    format: of qemu-img, None to find out; "raw" takes the bytes as they are without a further question. follow: read
    other files that the source names. Raises SourceError, UnsupportedError.
    """
    if "\0" in source:
        raise SourceError(f"{source!r}: no path has a NUL character in it")
    path = Path(os.path.abspath(source))  # noqa: PTH100  # links are kept: messages show what the user wrote
    size = _readable_size(source, path)
    if format == RAW:
        return DiskImage(path, RAW, size)
    info = _info(source, path, format)
    found = str(info.get("format"))
    if found == RAW:
        _check_raw(source, path, size)
        return DiskImage(path, RAW, size)
    if not follow:
        _refuse_others(source, path, info)
    _check_whole(source, path, size, info)
    if follow:
        _check_backing(source, path, found)
    return DiskImage(path, found, int(info["virtual-size"]))


def _readable_size(source: str, path: Path) -> int:
    try:
        found = path.stat()
        if stat.S_ISDIR(found.st_mode):
            raise SourceError(f"{source} is a directory: expected a disk image, a block device, or - for standard input")
        if not (stat.S_ISREG(found.st_mode) or stat.S_ISBLK(found.st_mode)):
            raise SourceError(f"{source} is neither a file nor a block device")
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
    except FileNotFoundError as error:
        raise SourceError(f"{source}: no such file") from error
    except OSError as error:
        raise SourceError(f"cannot read {source}: {error.strerror}") from error
    if size == 0:
        raise SourceError(f"{source} is empty: expected a disk image")
    return size


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    # stdin is closed so that no format driver can ask for a password on the terminal and wait for ever.
    return subprocess.run(
        [qemu_img(), *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
        env=_environment(),
    )


def _environment() -> dict[str, str]:
    return {**os.environ, "LC_ALL": "C.UTF-8"}


def _said(result: subprocess.CompletedProcess[str]) -> str:
    """The last line that qemu-img said, without its own name and without the name of the file said twice."""
    lines = [line.removeprefix("qemu-img: ") for line in result.stderr.splitlines() if line.strip()]
    return re.sub(r"^(Could not open '[^']*': )\1*", "", lines[-1]) if lines else f"qemu-img failed with status {result.returncode}"


def _info(source: str, path: Path, format: str | None) -> dict[str, Any]:
    result = _run("info", "--output=json", *(["-f", format] if format else []), "--", str(path))
    if result.returncode != 0:
        raise SourceError(f"{source} is no readable disk image: {_said(result)}")
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def _refuse_others(source: str, path: Path, info: dict[str, Any]) -> None:
    """Raise SourceError where the content lies in part in files that the source only names."""
    data = info.get("format-specific", {}).get("data", {})
    others = [("a backing file", info.get("full-backing-filename") or info.get("backing-filename")), ("a data file", data.get("data-file"))]
    for extent in data.get("extents", []):
        name = str(extent.get("filename", ""))
        if os.path.dirname(os.path.abspath(name)) != str(path.parent) or os.path.islink(name):  # noqa: PTH100, PTH114, PTH120
            others.append(("an extent outside its directory", name))
    for what, name in others:
        if name:
            raise SourceError(f"{source} has {what}, {name}, which would be read as well: add --follow if you trust the source")


def _check_whole(source: str, path: Path, size: int, info: dict[str, Any]) -> None:
    kind = str(info["format"])
    checked = _run("check", "-q", "-f", kind, "--", str(path))
    if checked.returncode in _CHECK_CORRUPT:
        first = next((line for line in checked.stderr.splitlines() if line.strip()), "")
        if "does not support checks" not in checked.stderr:
            raise SourceError(f"{source} is damaged or cut short (qemu-img check: {first.removeprefix('qemu-img: ') or 'errors found'})")
    if kind == "vhdx" and size % SECTOR:  # qemu-img rounds the file's size up to sectors before it compares
        raise SourceError(f"{source} is cut short: it has {size} bytes, and a VHDX is a whole number of sectors")
    extents = info.get("format-specific", {}).get("data", {}).get("extents", [])
    for extent in extents:
        name, needed = str(extent["filename"]), 0
        if extent.get("format") == "FLAT":
            needed = int(extent["virtual-size"])
        elif extent.get("format") == "SPARSE":
            needed = _sparse_extent_end(name)
        if (have := _size_of(name)) < needed:
            raise SourceError(f"{source} is cut short: its extent {name} has {have} of {needed} bytes")
    if len(extents) > 1 or (extents and extents[0].get("format") in ("FLAT", "SPARSE")):
        return  # the places that map gives are in files that it does not name
    mapped = _run("map", "--output=json", "-f", kind, "--", str(path))
    if mapped.returncode != 0:
        raise SourceError(f"{source} is damaged: {_said(mapped)}")
    for row in json.loads(mapped.stdout):
        # Rows of depth > 0 are in a backing file; rows without an offset are compressed, and fail to read if cut.
        if row["data"] and not row["zero"] and row["depth"] == 0 and "offset" in row and row["offset"] + row["length"] > size:
            raise SourceError(f"{source} is cut short: it has {size} bytes, and data up to byte {row['offset'] + row['length']}")


def _size_of(name: str) -> int:
    try:
        with open(name, "rb") as file:  # noqa: PTH123  # may be a block device
            return file.seek(0, os.SEEK_END)
    except OSError:
        return 0


def _check_backing(source: str, path: Path, kind: str) -> None:
    """Check the files behind the first one of a chain, each as if it were imported itself."""
    listed = _run("info", "--output=json", "--backing-chain", "-f", kind, "--", str(path))
    if listed.returncode != 0:
        raise SourceError(f"{source} is no readable disk image: {_said(listed)}")
    for info in json.loads(listed.stdout)[1:]:
        behind = Path(info["filename"])
        if info["format"] != RAW:
            _check_whole(f"{source}: its backing file {behind}", behind, _size_of(str(behind)), info)


def _sparse_extent_end(name: str) -> int:
    """Where the last grain in a sparse VMDK extent ends (VMware, Virtual Disk Format 5.0, "Hosted Sparse Extents").

    `qemu-img check` sees only that a grain begins behind the end of the file. 0 where there is nothing to compare:
    compressed grains do not decompress when they are cut.
    """
    with open(name, "rb") as file:  # noqa: PTH123  # named by the descriptor
        header = file.read(SECTOR)
        magic, _, flags, capacity, grain, _, _, per_table, _, directory_at = struct.unpack_from("<4sIIQQQQIQQ", header.ljust(SECTOR, b"\0"))
        if magic != b"KDMV" or flags & _VMDK_COMPRESSED or not grain or not per_table or capacity > 1 << 40:
            return 0
        grains = -(-capacity // grain)
        tables = _read_words(file, directory_at, -(-grains // per_table))
        end = 0
        for number, table_at in enumerate(tables):
            places = _read_words(file, table_at, min(per_table, grains - number * per_table)) if table_at else ()
            for index, place in enumerate(places, start=number * per_table):
                if place > 1:  # 0: a hole, 1: zeros
                    end = max(end, place + min(grain, capacity - index * grain))
    return end * SECTOR


def _read_words(file: BinaryIO, sector: int, count: int) -> tuple[int, ...]:
    file.seek(sector * SECTOR)
    found = file.read(4 * count)
    return struct.unpack(f"<{len(found) // 4}I", found[: len(found) // 4 * 4])


def _check_raw(source: str, path: Path, size: int) -> None:
    with path.open("rb") as file:
        head = file.read(HEAD_BYTES)
    check_raw_head(source, head)
    check_raw_size(source, head, size)


def check_raw_head(source: str, head: bytes) -> None:
    """Raise SourceError where what is taken for raw begins like something else."""
    foreign = foreign_format(head)
    if foreign is not None:
        todo = (
            f"unpack it first ({foreign.unpack} … | novafs import VOLUME - IMAGE)"
            if foreign.unpack
            else "import the file itself by its name"
        )
        raise SourceError(f"{source} is {foreign.what}, not a raw image: {todo}, or add --format raw to import these very bytes")


def check_raw_size(source: str, head: bytes, size: int) -> None:
    """Raise SourceError where what is taken for raw has no disk's size, or ends before its own partition table says."""
    if size % SECTOR:
        raise SourceError(
            f"{source} is no disk image: its size of {size} bytes is no multiple of {SECTOR}; add --format raw to import these very bytes"
        )
    claim = claimed_size(head)
    if claim is not None and claim.size_bytes > size:
        raise SourceError(
            f"{source} is cut short: it has {size} bytes, and its {claim.what} needs {claim.size_bytes}; "
            f"copy it again, or add --format raw to import what there is"
        )


def scratch_file(directory: Path, size: int) -> int:
    """A file of `size` bytes without a name, all of it a hole, open for reading and writing: gone when it is closed."""
    fd, name = tempfile.mkstemp(prefix="import-", dir=directory)
    os.unlink(name)  # noqa: PTH108
    os.truncate(fd, size)
    return fd


async def convert_to_raw(image: DiskImage, fd: int, progress: Callable[[int], None]) -> None:
    """Write the disk in `image` to the file `fd` of the same size, with holes. progress: bytes of the disk done.

    Raises SourceError, StoreFullError (no room where the scratch file is).
    """
    # -n with --target-is-zero: the file is there already and all holes, so zeros need not be written.
    command = [qemu_img(), "convert", "-p", "-n", "--target-is-zero", "-f", image.format, "-O", RAW, "--", str(image.path), f"/dev/fd/{fd}"]
    async with trio.open_nursery() as nursery:
        run = partial(trio.run_process, command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, check=False)
        process = await nursery.start(partial(run, pass_fds=(fd,), env=_environment()))
        said: list[bytes] = []
        nursery.start_soon(_collect, process.stderr, said)
        async for part in process.stdout:
            if percents := re.findall(rb"\(([0-9.]+)/100%\)", part):
                progress(int(float(percents[-1]) / 100 * image.size_bytes))
    if process.returncode != 0:
        text = b"".join(said).decode(errors="replace").strip()
        if "No space left on device" in text:
            raise StoreFullError(
                f"no space for the unpacked copy of {image.path.name}; it lies in the state directory: choose another with --state-dir"
            )
        raise SourceError(f"{image.path} cannot be read: {text.splitlines()[-1].removeprefix('qemu-img: ') if text else 'qemu-img failed'}")


async def _collect(stream: trio.abc.ReceiveStream, into: list[bytes]) -> None:
    async for part in stream:
        into.append(bytes(part))
        del into[:-100]  # the end is what matters
