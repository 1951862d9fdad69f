"""A real guest: a small Debian under QEMU's emulator, driven from a test.

`guest_image()` gives the root file system with its kernel (built once by ``tools/guest-image.sh`` and kept under ``.cache/``);
`Guest` boots a disk with it. The guest runs the shell script that a test hands over: it travels as the raw bytes of a second
disk, so the image itself stays the same for every test and its content can be compared afterwards.

What always holds: leaving the ``with`` block ends the emulator, however the block was left; everything that the guest wrote to its
serial console is in `Guest.console` and in a log file; a wait that reaches its deadline, or whose guest died, raises `GuestError`
with the end of the console in it. The deadlines bound a hang only; no test depends on how fast the guest is.

The emulator is TCG on purpose: it runs wherever the tests run, with or without hardware virtualisation.
"""

import json
import re
import shutil
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

ROOT = Path(__file__).resolve().parents[2]
SECTOR = 512
TAIL = 4000


class GuestError(Exception):
    """The guest did not do in time what the test waited for, or ended before it; the message ends with its console."""


@dataclass(frozen=True)
class GuestImage:
    """A bootable root file system and the kernel that is installed in it. The disk is shared: copy it before writing."""

    disk: Path
    kernel: Path
    initrd: Path


def guest_image() -> GuestImage:
    """The cached guest, built first where it is missing; takes a minute or two then.

    Raises RuntimeError with the builder's last words where it cannot be built.
    """
    builder = ROOT / "tools" / "guest-image.sh"
    key = subprocess.run([builder, "--key"], check=True, capture_output=True, text=True).stdout.strip()
    directory = ROOT / ".cache" / "guests" / key
    if not (directory / "disk.raw").exists():
        done = subprocess.run([builder, directory], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"{builder.name} ended with status {done.returncode}:\n{done.stdout}{done.stderr}")
        for old in directory.parent.glob("*"):
            if old != directory:
                shutil.rmtree(old, ignore_errors=True)
    return GuestImage(directory / "disk.raw", directory / "vmlinuz", directory / "initrd")


class Guest:
    """One run of the emulator. `disk` is opened for writing with `cache`; `script` runs as root when the guest is up.

    `extra` is appended to the emulator's command line (for instance ``["-incoming", "defer"]``).
    """

    def __init__(
        self,
        image: GuestImage,
        disk: Path,
        *,
        script: str,
        workdir: Path,
        cache: str = "none",
        memory: str = "512M",
        cpus: int = 1,
        extra: Sequence[str] = (),
    ) -> None:
        self._image = image
        self._disk = disk
        self._cache = cache
        self._memory = memory
        self._cpus = cpus
        self._extra = tuple(extra)
        self._script = script
        self._workdir = workdir
        self._changed = threading.Condition()
        self._console = bytearray()  # Invariant: touched under _changed only; grows only.
        self._ended = False  # set by the reader at the end of the console, with _changed held
        self._process: subprocess.Popen[bytes] | None = None
        self._reader: threading.Thread | None = None
        self._socket_dir: tempfile.TemporaryDirectory[str] | None = None
        self._qmp: _Qmp | None = None
        self.log_path = workdir / f"console-{id(self):x}.log"

    # ------------------------------------------------------------------ life

    def __enter__(self) -> Self:
        self._workdir.mkdir(parents=True, exist_ok=True)
        script_disk = self._workdir / f"script-{id(self):x}.raw"
        script_disk.write_bytes(_padded(self._script.encode()))
        # A Unix socket's path has at most 107 bytes, and a test's own directory is often longer.
        self._socket_dir = tempfile.TemporaryDirectory(prefix="novafs-qmp-")
        qmp_path = f"{self._socket_dir.name}/qmp"
        process = subprocess.Popen(
            self._command(script_disk, qmp_path), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        self._process = process
        self._reader = threading.Thread(target=self._read_console, args=(process,), name="guest-console")
        self._reader.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.kill()
        if self._socket_dir is not None:
            self._socket_dir.cleanup()

    def kill(self) -> None:
        """Ends the emulator at once, as a power cut would end the guest. Idempotent."""
        if self._qmp is not None:
            self._qmp.close()
            self._qmp = None
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        if self._reader is not None:
            self._reader.join()

    # ------------------------------------------------------------------ what a test waits for

    @property
    def console(self) -> str:
        """Everything that came over the serial console so far (and what the emulator itself complained about)."""
        with self._changed:
            return self._console.decode(errors="replace")

    def wait_for(self, marker: str, *, timeout_s: float = 300) -> str:
        """Waits until a line of the console holds `marker`; returns that line from the marker on.

        A whole line is waited for, so that values that follow the marker are complete.
        """
        pattern = re.compile(re.escape(marker) + r"[^\r\n]*(?=[\r\n])")
        deadline = time.monotonic() + timeout_s
        with self._changed:
            while not (found := pattern.search(self._console.decode(errors="replace"))):
                if self._ended:
                    raise GuestError(f"the guest ended before it printed {marker!r}{self._tail()}")
                if not self._changed.wait(deadline - time.monotonic()):
                    raise GuestError(f"the guest did not print {marker!r} within {timeout_s} s{self._tail()}")
        return found.group()

    def wait_poweroff(self, *, timeout_s: float = 300) -> None:
        """Waits until the guest has powered itself off and the emulator has closed the disk and ended with status 0."""
        assert self._process is not None
        try:
            status = self._process.wait(timeout_s)
        except subprocess.TimeoutExpired as error:
            raise GuestError(f"the guest did not power off within {timeout_s} s{self._tail()}") from error
        if status != 0:
            raise GuestError(f"the emulator ended with status {status}{self._tail()}")

    def qmp(self, command: str, arguments: Mapping[str, Any] | None = None, *, timeout_s: float = 60) -> Any:
        """Runs one command of QEMU's machine protocol and returns its result; GuestError if the emulator refuses it."""
        if self._qmp is None:
            assert self._socket_dir is not None
            self._qmp = _Qmp.connect(f"{self._socket_dir.name}/qmp", timeout_s)
        return self._qmp.execute(command, arguments or {}, timeout_s)

    # ------------------------------------------------------------------ the emulator

    def _command(self, script_disk: Path, qmp_path: str) -> list[str]:
        return [
            "qemu-system-x86_64",
            *("-accel", "tcg", "-cpu", "max", "-machine", "q35", "-m", self._memory, "-smp", str(self._cpus)),
            *("-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-serial", "stdio"),
            *("-qmp", f"unix:{qmp_path},server=on,wait=off"),
            *("-kernel", str(self._image.kernel), "-initrd", str(self._image.initrd)),
            # net.ifnames and the rest of a desktop's boot are not in the image; panic=-1 turns a panic into an end of the emulator.
            *("-append", "root=/dev/vda rw console=ttyS0 panic=-1 loglevel=4 systemd.show_status=1"),
            *("-drive", f"file={escaped(self._disk)},format=raw,if=virtio,cache={self._cache}"),
            *("-drive", f"file={escaped(script_disk)},format=raw,if=virtio,readonly=on"),
            *("-device", "virtio-rng-pci"),
            *self._extra,
        ]

    def _read_console(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None
        with self.log_path.open("wb") as log, process.stdout as stream:
            while data := stream.read1(65536):  # type: ignore[attr-defined]
                log.write(data)
                log.flush()
                with self._changed:
                    self._console += data
                    self._changed.notify_all()
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def _tail(self) -> str:
        text = self._console.decode(errors="replace")
        return f"; the end of its console (all of it is in {self.log_path}):\n{text[-TAIL:]}"


class _Qmp:
    """A client of QEMU's machine protocol: JSON lines over a Unix socket, answers in order, events between them (dropped)."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._lines = connection.makefile("rb")

    @classmethod
    def connect(cls, path: str, timeout_s: float) -> Self:
        # The emulator creates the socket while it starts; nothing announces it, so this is the one place that polls.
        deadline = time.monotonic() + timeout_s
        while True:
            connection = socket.socket(socket.AF_UNIX)
            try:
                connection.connect(path)
                break
            except (FileNotFoundError, ConnectionRefusedError) as error:
                connection.close()
                if time.monotonic() > deadline:
                    raise GuestError(f"the emulator opened no control socket within {timeout_s} s") from error
                time.sleep(0.05)
        self = cls(connection)
        connection.settimeout(timeout_s)
        self._receive()  # the greeting
        self.execute("qmp_capabilities", {}, timeout_s)
        return self

    def execute(self, command: str, arguments: Mapping[str, Any], timeout_s: float) -> Any:
        self._connection.settimeout(timeout_s)
        self._connection.sendall(json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n")
        while True:
            answer = self._receive()
            if "error" in answer:
                raise GuestError(f"the emulator refused {command!r}: {answer['error']}")
            if "return" in answer:
                return answer["return"]

    def close(self) -> None:
        self._lines.close()
        self._connection.close()

    def _receive(self) -> dict[str, Any]:
        try:
            line = self._lines.readline()
        except TimeoutError as error:
            raise GuestError("the emulator did not answer on its control socket") from error
        if not line:
            raise GuestError("the emulator closed its control socket")
        answer: dict[str, Any] = json.loads(line)
        return answer


def _padded(script: bytes) -> bytes:
    """The script as whole sectors; newlines after its end change nothing for the shell that reads them."""
    return script + b"\n" * (-len(script) % SECTOR or SECTOR)


def escaped(path: Path) -> str:
    """A path inside a comma-separated option of QEMU."""
    return str(path).replace(",", ",,")
