"""A volume mounted by the real daemon, in a process of its own, as a user does it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import trio

from novafs.mounttable import mount_at
from tests.support.engine import make_volume

START_TIMEOUT_S = 60
END_TIMEOUT_S = 90
READY = re.compile(r" mounted at ")
UNMEASURED = {"COVERAGE_PROCESS_CONFIG": None, "COVERAGE_PROCESS_START": None}
"""Environment of a daemon that will be killed: it reports nothing, so coverage would only slow it down."""


class Mount:
    """A running daemon. path: the mount point. log: what it wrote to stderr so far, by line."""

    def __init__(self, url: str, path: Path, state_dir: Path, arguments: Sequence[str], environ: Mapping[str, str | None]) -> None:
        """environ: on top of this process's environment; None takes a variable away."""
        self.url = url
        self.path = path
        self.state_dir = state_dir
        self.log: list[str] = []
        self._told = threading.Condition()
        self._ended = False
        command = [
            sys.executable,
            "-m",
            "novafs.cli",
            "mount",
            url,
            str(path),
            "--foreground",
            "-v",
            "--state-dir",
            str(state_dir),
            *arguments,
        ]
        given = {name: value for name, value in {**os.environ, **environ}.items() if value is not None}
        self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace", env=given)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        with self.process.stderr as stream:
            for line in stream:
                with self._told:
                    self.log.append(line.rstrip("\n"))
                    self._told.notify_all()
        with self._told:
            self._ended = True
            self._told.notify_all()

    @property
    def text(self) -> str:
        """The log as one text."""
        return "\n".join(self.log)

    def wait_log(self, pattern: str | re.Pattern[str], *, timeout_s: float = START_TIMEOUT_S) -> str:
        """The first line of the log that matches, waiting for it. Fails where the daemon ends without it."""
        compiled = re.compile(pattern)

        def found() -> str | None:
            return next((line for line in self.log if compiled.search(line)), None)

        with self._told:
            self._told.wait_for(lambda: found() is not None or self._ended, timeout_s)
            line = found()
        assert line is not None, f"no line like {compiled.pattern!r} from the daemon:\n{self.text}"
        return line

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the daemon."""
        self.process.send_signal(number)

    def unmount(self) -> None:
        """Unmount from outside. Fails where it is busy."""
        done = subprocess.run(["fusermount3", "-u", str(self.path)], capture_output=True, text=True)
        assert done.returncode == 0, f"{done.stderr}\n{self.text}"

    def wait(self) -> int:
        """The daemon's exit status, once it has ended, and its log is complete."""
        status = self.process.wait(END_TIMEOUT_S)
        self._reader.join(END_TIMEOUT_S)
        return status

    def kill(self) -> None:
        """kill -9: the mount point is left dead."""
        self.process.kill()
        self.wait()

    def clean_up(self) -> None:
        """Whatever went wrong: no process and no mount stays."""
        if self.process.poll() is None:
            self.process.kill()
            self.wait()
        while mount_at(self.path) is not None:
            if subprocess.run(["fusermount3", "-uz", str(self.path)], capture_output=True).returncode:
                break


@contextmanager
def running(
    url: str, path: Path, state_dir: Path, *arguments: str, l2: str = "none", environ: Mapping[str, str | None] | None = None
) -> Iterator[Mount]:
    """The volume at `url` mounted at `path` (made if missing); the test ends the daemon as it likes, or it is killed here."""
    if mount_at(path) is None:  # a dead mount could not be asked whether it is there
        path.mkdir(parents=True, exist_ok=True)
    mount = Mount(url, path, state_dir, ["--l2-url", l2, "--l1-capacity", "256MiB", *arguments], environ or {})
    try:
        mount.wait_log(READY)
        yield mount
    finally:
        mount.clean_up()


@contextmanager
def mounted(directory: Path, *arguments: str, url: str | None = None, chunk_size: int = 64 << 10, l2: str = "none") -> Iterator[Mount]:
    """A volume (a new one in `directory`, unless `url` is given) mounted at `directory/mnt`, and unmounted at the end.

    The end of the block must find it idle; the daemon must leave with status 0, with no traceback in its log.
    """
    url = url or trio.run(lambda: make_volume(f"file://{directory / 'store'}", chunk_size=chunk_size))
    with running(url, directory / "mnt", directory / "state", *arguments, l2=l2) as mount:
        yield mount
        if mount.process.poll() is None:
            mount.unmount()
        assert mount.wait() == 0, mount.text
        assert "Traceback" not in mount.text, mount.text
