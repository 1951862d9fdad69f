"""A program in a guest's file system: numbered records, each told on standard output once the fsyncs that it asked for have returned.

    python tests/support/record_program.py DIRECTORY FIRST-NUMBER

Three kinds in turn, as databases and mail servers make them: a line appended to a log; a file of its own in a directory; a
file that replaces an older one by rename. It ends with the first error. `missing` is who looks for them afterwards.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path

KINDS = ("log", "file", "state")


def content(number: int) -> bytes:
    """Of a record, in its file."""
    head = b"record %d " % number
    return head + hashlib.shake_128(head).digest(37 * (number % 400))


def line(number: int) -> str:
    """Of a record, in the log."""
    return f"{number:08d} {hashlib.sha256(content(number)).hexdigest()}"


def _write(path: Path, flags: int, data: bytes) -> None:
    fd = os.open(path, flags | os.O_WRONLY | os.O_CREAT, 0o644)
    try:
        written = os.write(fd, data)
        if written != len(data):
            raise OSError(f"{written} of {len(data)} bytes were written")
        (os.fdatasync if flags & os.O_APPEND else os.fsync)(fd)
    finally:
        os.close(fd)


def _sync_dir(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def make(place: Path, number: int) -> str:
    """Make one record; its kind, when it is safe."""
    kind = KINDS[number % len(KINDS)]
    if kind == "log":
        _write(place / "log", os.O_APPEND, f"{line(number)}\n".encode())
        if number < len(KINDS):
            _sync_dir(place)
    elif kind == "file":
        _write(place / "files" / str(number), os.O_EXCL, content(number))
        _sync_dir(place / "files")
    else:
        _write(place / "state.new", os.O_TRUNC, content(number))
        (place / "state.new").rename(place / "state")
        _sync_dir(place)
    return kind


def missing(place: Path, told: list[tuple[str, int]]) -> list[str]:
    """Which of the records that were told are not there, or not whole."""
    log = set((place / "log").read_text().splitlines())
    lost = []
    for kind, number in told:
        if kind == "log":
            there = line(number) in log
        elif kind == "file":
            path = place / "files" / str(number)
            there = path.exists() and path.read_bytes() == content(number)
        else:  # this one, or one that replaced it
            found = (place / "state").read_bytes()
            newest = int(found.split()[1])
            there = newest >= number and found == content(newest)
        if not there:
            lost.append(f"{kind} {number}")
    return lost


def main() -> None:
    place, number = Path(sys.argv[1]), int(sys.argv[2])
    (place / "files").mkdir(exist_ok=True)
    _sync_dir(place)
    while True:
        print(json.dumps([make(place, number), number]), flush=True)
        number += 1


if __name__ == "__main__":
    main()
