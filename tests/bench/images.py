"""The disk image of the benches: a Debian root file system, with programs of this machine in what its size leaves."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

from tests.support.guest import GuestImage

SYSTEM_PATH = {**os.environ, "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"}


def make_disk(guest: GuestImage, directory: Path, *, size_bytes: int, used_bytes: int) -> Path:
    """The guest's root file system, grown, with files of this machine beside it: program code and data, as compressible as such are."""
    disk, filling = directory / "disk.raw", directory / "filling"
    subprocess.run(["cp", "--sparse=always", guest.disk, disk], check=True)
    missing = used_bytes - disk.stat().st_blocks * 512
    with filling.open("wb") as out:
        for path in sorted(Path("/usr").rglob("*")):
            if path.is_file() and not path.is_symlink() and missing > 0:
                with path.open("rb") as file:
                    data = file.read(missing)
                out.write(data)
                missing -= len(data)
    with disk.open("r+b") as file:
        file.truncate(size_bytes)
    for command in ("e2fsck", "-fp"), ("resize2fs",), ("debugfs", "-w", "-R", f"write {filling} /srv/filling"):
        subprocess.run([*command, str(disk)], check=True, capture_output=True, env=SYSTEM_PATH)
    filling.unlink()
    return disk


def data_ranges(path: Path) -> Iterator[tuple[int, int]]:
    """(offset, length) of what is no hole of a file."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        at = 0
        while at < size:
            try:
                start = os.lseek(file.fileno(), at, os.SEEK_DATA)
            except OSError:  # a hole to the end
                return
            at = os.lseek(file.fileno(), start, os.SEEK_HOLE)
            yield start, at - start


def make_dense(disk: Path, path: Path, *, size_bytes: int, piece_bytes: int = 1 << 20) -> Path:
    """The first data of a disk, without its holes: a file of which every part is read from somewhere."""
    with disk.open("rb") as source, path.open("wb") as out:
        missing = size_bytes
        for start, length in data_ranges(disk):
            source.seek(start)
            while length and missing:
                data = source.read(min(length, missing, piece_bytes))
                out.write(data)
                length -= len(data)
                missing -= len(data)
    if missing:
        raise ValueError(f"{disk} has {missing} bytes less than the {size_bytes} of data that were asked for")
    return path
