"""`novafs top` and `novafs stats --watch` on a mount: once into a pipe, on a terminal until q, and gone without a trace at Ctrl-C."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

from tests.support.cli import novafs, novafs_json
from tests.support.mounted import Mount

pytestmark = pytest.mark.fuse

HOSTILE = "[red]\x1b]0;owned\x07<b>.raw"


def fill(mount: Mount) -> Path:
    path = mount.path / HOSTILE
    path.write_bytes(os.urandom(300_000))
    path.read_bytes()
    return path


def test_top_into_a_pipe_shows_everything_once(mounted: Mount) -> None:
    with fill(mounted).open("rb"):
        shown = novafs("top", mounted.path, "-n", "0.2", environ={"COLUMNS": "160"})
    assert str(mounted.path) in shown
    for words in ("hit rate of L1", "data at risk", "prefetch", "L2", "images", "commit", "[red]"):
        assert words in shown
    assert "\x1b" not in shown and "\x07" not in shown
    assert re.search(r"^█+", shown, re.MULTILINE), "the residency of the open image"


def test_top_of_what_is_no_mount_says_so(tmp_path: Path) -> None:
    url = f"file://{tmp_path / 'v'}"
    novafs("init", url)
    done = subprocess.run(
        [sys.executable, "-m", "novafs.cli", "top", url, "--state-dir", str(tmp_path / "s")], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1 and "is not mounted on this host" in done.stderr and "Traceback" not in done.stderr


class Terminal:
    """A command on a terminal of its own."""

    def __init__(self, *arguments: str) -> None:
        self.master, slave = pty.openpty()
        termios.tcsetwinsize(self.master, (40, 120))
        self.before = termios.tcgetattr(slave)
        command = [sys.executable, "-m", "novafs.cli", *arguments]
        self.process = subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, env={**os.environ, "TERM": "xterm-256color"})
        self.slave = slave
        self.text = ""

    def wait_for(self, pattern: str) -> None:
        deadline_s = time.monotonic() + 60
        while not re.search(pattern, self.text):
            assert time.monotonic() < deadline_s, self.text[-2000:]
            if select.select([self.master], [], [], 1)[0]:
                self.text += os.read(self.master, 65536).decode(errors="replace")

    def end(self) -> int:
        deadline_s = time.monotonic() + 60
        while self.process.poll() is None:
            assert time.monotonic() < deadline_s, self.text[-2000:]
            if select.select([self.master], [], [], 0.05)[0]:
                self.text += os.read(self.master, 65536).decode(errors="replace")
        while select.select([self.master], [], [], 0)[0]:
            self.text += os.read(self.master, 65536).decode(errors="replace")
        assert termios.tcgetattr(self.slave) == self.before, "the terminal was left changed"
        os.close(self.slave)
        os.close(self.master)
        return self.process.returncode


def test_top_on_a_terminal_refreshes_until_q(mounted: Mount) -> None:
    with fill(mounted).open("rb"):
        terminal = Terminal("top", str(mounted.path), "-n", "0.2")
        terminal.wait_for(r"(?s)hit rate of L1.*hit rate of L1")
        os.write(terminal.master, b"q")
        assert terminal.end() == 0
    assert "\x1b[?1049h" in terminal.text and "\x1b[?1049l" in terminal.text, "on a screen of its own, which is left again"
    assert "\x1b]0;" not in terminal.text, "a name must not set the terminal's title"


def test_top_ends_cleanly_at_ctrl_c_and_when_the_mount_ends(mounted: Mount) -> None:
    for stop in ("interrupt", "unmount"):
        terminal = Terminal("top", str(mounted.path), "-n", "0.2")
        terminal.wait_for("hit rate of L1")
        if stop == "interrupt":
            terminal.process.send_signal(signal.SIGINT)
            assert terminal.end() == 0
        else:
            mounted.unmount()
            assert terminal.end() == 1
            assert "the mount has ended" in " ".join(terminal.text.split())
            assert mounted.wait() == 0
        assert "Traceback" not in terminal.text


def test_stats_watches_by_line_and_as_json_until_ctrl_c(mounted: Mount) -> None:
    fill(mounted)
    for arguments in ([], ["--json"]):
        command = [sys.executable, "-u", "-m", "novafs.cli", "stats", str(mounted.path), "--watch", "0.2", *arguments]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None and process.stderr is not None
            lines = [process.stdout.readline() for _ in range(3)]
            process.send_signal(signal.SIGINT)
            assert process.wait(60) == 0
            assert process.stderr.read() == ""
        if arguments:
            looks = [json.loads(line) for line in lines]
            assert looks[1]["time_s"] > looks[0]["time_s"] and looks[0]["traffic"]["writes"] >= 1
        else:
            assert lines[0].split()[:3] == ["time", "reads/s", "read/s"] and re.match(r"\d\d:\d\d:\d\d", lines[1])


def test_watching_what_is_not_mounted_says_so(tmp_path: Path) -> None:
    url = f"file://{tmp_path / 'v'}"
    novafs("init", url)
    done = subprocess.run(
        [sys.executable, "-m", "novafs.cli", "stats", url, "--watch", "--state-dir", str(tmp_path / "s")],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1 and "is not mounted on this host" in done.stderr


def test_stats_as_json_has_what_the_metrics_are_made_from(mounted: Mount) -> None:
    fill(mounted)
    found = novafs_json("stats", mounted.path)
    assert found["mount"]["phase"] == "mounted" and found["mount"]["status_page"].startswith("http://127.0.0.1:")
    assert found["traffic"]["written_bytes"] == 300_000 and found["latency"]["fuse"]["write"]["count"] >= 1
    assert found["written"]["new_chunks"] == 5 and found["store"]["up"] is True and found["leases"]["lost"] == 0
