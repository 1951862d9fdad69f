"""A guest that does nothing but write records: up in a few seconds, on the kernel of `tests.support.guest` and a RAM disk of its own.

`record_guest.c` is its only program, and says what it writes. Here: its RAM disk, the emulator's command line, and the judge of its disks.
Two emulators with the same disks, one of them with ``-incoming``, are a live migration; what the guest says comes on the console of the
one that it runs in. Their memory is one file, which is not sent: QEMU's emulated processor (TCG, 7.2) loses pages that are written while
they are sent, whatever its disks lie on; one migration in six was damaged so on plain local files. One that stands still is sent whole.
Always holds: a number that `said` gives was on the console in a whole line, so its fsync had returned in the guest.
"""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from tests.support.guest import Guest, GuestError, GuestImage, escaped

SOURCE = Path(__file__).with_suffix(".c")
BLOCK = 4096
WORDS = BLOCK // 8
LOG_EVERY = 8
MEMORY = "128M"
TIMEOUT_S = 120
"""Bounds a hang: each of the waits here takes seconds."""


def record_guest(image: GuestImage, directory: Path) -> GuestImage:
    """The guest of `image` with a RAM disk that has the program as well; compiled and packed in `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    program, initrd = directory / "writer", directory / "initrd"
    subprocess.run(["gcc", "-O2", "-static", "-Wall", "-Werror", "-o", str(program), str(SOURCE)], check=True)
    given = image.initrd.read_bytes()
    # The kernel unpacks archives one after the other; the modules are in the first.
    initrd.write_bytes(given + bytes(-len(given) % 4) + _member("writer", 0o100755, program.read_bytes()) + _member("TRAILER!!!", 0, b""))
    return GuestImage(image.disk, image.kernel, initrd)


def _member(name: str, mode: int, data: bytes) -> bytes:
    """One file of a cpio archive of the form "newc"."""
    fields = (1, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name) + 1, 0)
    head = b"070701" + b"".join(b"%08x" % field for field in fields) + name.encode() + b"\0"
    return head + bytes(-len(head) % 4) + data + bytes(-len(data) % 4)


class RecordGuest(Guest):
    """One emulator with this guest. disks: the raw one, then the one with ext4, if any, both `cache=none`."""

    def __init__(
        self,
        image: GuestImage,
        disks: Sequence[Path],
        *,
        memory: Path,
        workdir: Path,
        incoming: str = "",
        options: str = "",
        first_format: str = "raw",
    ) -> None:
        """memory: the file of its memory; an empty one is made. incoming: where its state comes from; "defer" for `receive`.
        options: more of each disk, for instance ",auto-read-only=off". first_format: of the file of the first disk."""
        super().__init__(image, disks[0], script="", workdir=workdir, memory=MEMORY, extra=["-incoming", incoming] if incoming else [])
        self._disks = tuple(disks)
        self._memory_file = memory
        self._options = options
        self._formats = (first_format, *("raw" for _ in disks[1:]))

    def _command(self, script_disk: Path, qmp_path: str) -> list[str]:
        disks = zip(self._disks, self._formats, strict=True)
        drives = [f"file={escaped(disk)},format={format_},if=virtio,cache=none{self._options}" for disk, format_ in disks]
        return [
            "qemu-system-x86_64",
            *("-accel", "tcg", "-cpu", "max", "-machine", "q35,memory-backend=ram", "-m", self._memory),
            *("-object", f"memory-backend-file,id=ram,size={self._memory},mem-path={escaped(self._memory_file)},share=on"),
            *("-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-serial", "stdio"),
            *("-qmp", f"unix:{qmp_path},server=on,wait=off"),
            *("-kernel", str(self._image.kernel), "-initrd", str(self._image.initrd)),
            *("-append", "console=ttyS0 panic=-1 loglevel=4 rdinit=/writer"),
            *(word for drive in drives for word in ("-drive", drive)),
            *self._extra,
        ]

    def said(self, word: str) -> int:
        """The last number that a whole line gave after `word`; 0 where there is none. Fails where the guest found something wrong."""
        console = self.console
        if "GUEST wrong" in console:
            raise GuestError(f"the guest found something wrong:\n{console[-2000:]}")
        found = re.findall(rf"(?:^|\n){word} (\d+)\r?\n", console)
        return int(found[-1]) if found else 0

    def wait_said(self, word: str, least: int) -> int:
        """Wait until it has said so much after `word`."""
        self.wait_until(lambda: self.said(word) >= least, f"'{word} {least}'")
        return self.said(word)

    def wait_until(self, reached: Callable[[], bool], what: str) -> None:
        """Poll until something holds. Raises GuestError where it takes too long, or the emulator has ended."""
        deadline_s = time.monotonic() + TIMEOUT_S
        while not reached():
            assert self._process is not None
            if time.monotonic() > deadline_s or self._process.poll() is not None:
                raise GuestError(f"the guest did not come to {what}:\n{self.console[-2000:]}")
            time.sleep(0.02)

    def receive(self, uri: str) -> None:
        """Wait for a machine that is alive, whose memory is this one's file."""
        self._send_memory(False)
        self.qmp("migrate-incoming", {"uri": uri})

    def migrate(self, uri: str) -> None:
        """Move the machine, alive, to an emulator with the same memory. Returns when this one says that it is over; raises GuestError where
        that fails."""
        self._send_memory(False)
        self._migrate(uri)

    def suspend(self, uri: str) -> None:
        """Stop the machine and send it, its memory included. Returns when all is sent; the receiver may still be writing."""
        self.qmp("stop")
        self._send_memory(True)
        self._migrate(uri)

    def _send_memory(self, sent: bool) -> None:
        self.qmp("migrate-set-capabilities", {"capabilities": [{"capability": "x-ignore-shared", "state": not sent}]})

    def _migrate(self, uri: str) -> None:
        self.qmp("migrate", {"uri": uri})
        self.wait_until(lambda: self._migration() == "completed", f"the end of the migration to {uri}")

    def _migration(self) -> str:
        status: str = self.qmp("query-migrate").get("status", "none")
        if status in ("failed", "cancelled"):
            raise GuestError(f"the migration {status}:\n{self.console[-2000:]}")
        return status


def _mixed(numbers: np.ndarray[tuple[int], np.dtype[np.uint64]]) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
    """splitmix64, as the program has it."""
    x = numbers + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def wrong_records(disk: Path, last: int) -> list[int]:
    """Which of the records 1 to `last` are not on a raw disk as they were written."""
    places = 1 << ((disk.stat().st_size // BLOCK).bit_length() - 1)
    wrong = []
    with disk.open("rb") as file:
        for number in range(1, last + 1):
            expected = _mixed(np.arange(number * WORDS, (number + 1) * WORDS, dtype=np.uint64))
            expected[0] = number
            if os.pread(file.fileno(), BLOCK, number * 2654435761 % places * BLOCK) != expected.tobytes():
                wrong.append(number)
    return wrong


def missing_lines(disk: Path, last: int) -> list[int]:
    """Check the file system of a disk (its journal is replayed: it is as after a power cut); which lines up to `last` its log lacks."""
    path = {**os.environ, "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"}
    for mode, fine in (("-fp", (0, 1)), ("-fn", (0,))):
        done = subprocess.run(["e2fsck", mode, str(disk)], capture_output=True, text=True, env=path, check=False)
        assert done.returncode in fine, done.stdout + done.stderr
    log = subprocess.run(["debugfs", "-R", "cat /log", str(disk)], capture_output=True, text=True, env=path, check=True).stdout
    numbers = range(LOG_EVERY, last + 1, LOG_EVERY)
    there = set(log.splitlines())
    checksums = _mixed(np.array(numbers, dtype=np.uint64))
    return [number for number, checksum in zip(numbers, checksums, strict=True) if f"{number} {int(checksum):016x}" not in there]
