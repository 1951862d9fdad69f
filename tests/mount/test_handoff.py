"""`novafs handoff` between two mounts: the second has the hot chunks, and the right to write is free."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from novafs.control import call
from novafs.statedir import CONTROL_SOCKET
from tests.support.cli import novafs, novafs_json
from tests.support.mounted import Mount, mounted, running

pytestmark = pytest.mark.fuse

CONTENT = random.Random(8).randbytes(6 << 20)


def stats(mount: Mount) -> Any:
    return call(mount.state_dir / CONTROL_SOCKET, "stats")


def test_an_image_is_given_to_another_mount_with_what_is_hot(tmp_path: Path) -> None:
    with mounted(tmp_path / "a") as one, mounted(tmp_path / "b", url=one.url) as other:
        options = ("--state-dir", one.state_dir, "--l2-url", "none")
        with (one.path / "disk").open("w+b") as file:
            file.write(CONTENT)
            file.flush()
            file.seek(0)
            assert file.read() == CONTENT
            target = stats(other)["volume"]["host_id"]
            said = novafs("handoff", one.url, "disk", "--to", "nowhere", "--timeout", "1s", *options, status=1)
            assert said == ""
            done = novafs_json("handoff", one.url, "disk", "--to", target, *options)
            assert done["to"] == target
            assert done["hot_chunks"] > 0
        deadline_s = time.monotonic() + 60
        while stats(other)["handoffs"]["chunks"] < done["hot_chunks"]:
            assert time.monotonic() < deadline_s, stats(other)["handoffs"]
        before = stats(other)["cache"]["l3_traffic"]["hits"]
        with (other.path / "disk").open("r+b") as file:
            assert file.read() == CONTENT
            if done["hot_chunks"] == len(CONTENT) >> 16:
                assert stats(other)["cache"]["l3_traffic"]["hits"] == before
            file.seek(0)
            file.write(b"taken over")
        assert stats(other)["handoffs"]["taken"] == 1


def test_a_source_that_is_killed_amid_a_handoff_has_its_image_again(tmp_path: Path) -> None:
    """The target stands still, so the source waits for its answer; when the target goes on it takes an offer that leads to nothing."""
    with mounted(tmp_path / "b") as other, running(other.url, tmp_path / "a" / "mnt", tmp_path / "a" / "state") as one:
        file = os.open(one.path / "disk", os.O_RDWR | os.O_CREAT)
        os.pwrite(file, CONTENT, 0)
        os.fsync(file)
        target = stats(other)["volume"]["host_id"]
        other.signal(signal.SIGSTOP)
        try:
            command = [sys.executable, "-m", "novafs.cli", "handoff", one.url, "disk", "--to", target]
            options = ["--state-dir", str(one.state_dir), "--l2-url", "none"]
            with subprocess.Popen([*command, *options], stderr=subprocess.PIPE, text=True) as asking:
                offers = tmp_path / "b" / "store" / "handoffs" / target
                wait_until(lambda: offers.is_dir() and any(offers.iterdir()))
                one.kill()
                said = asking.communicate()[1]
                assert asking.returncode == 1, said
                assert "Traceback" not in said
        finally:
            other.signal(signal.SIGCONT)
        with contextlib.suppress(OSError):
            os.close(file)
        wait_until(lambda: stats(other)["handoffs"]["taken"] == 1)
        assert not any(offers.iterdir())
        with running(other.url, one.path, one.state_dir) as again:
            with (again.path / "disk").open("r+b") as file_again:
                assert file_again.read() == CONTENT
                file_again.seek(0)
                file_again.write(b"goes on")
            assert (other.path / "disk").read_bytes() == b"goes on" + CONTENT[7:]
            again.unmount()
            assert again.wait() == 0, again.text


def wait_until(reached: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + 60
    while not reached():
        assert time.monotonic() < deadline_s
        time.sleep(0.02)
