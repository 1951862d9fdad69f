"""`novafs warm` on a mounted volume: the daemon's own L1 is filled, and nothing goes on once the command has ended."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from novafs.control import call
from novafs.statedir import CONTROL_SOCKET
from tests.support.cli import novafs, novafs_json
from tests.support.mounted import Mount, mounted

pytestmark = pytest.mark.fuse

CONTENT = random.Random(8).randbytes(12 << 20)
CHUNKS = len(CONTENT) >> 16


def stats(mount: Mount) -> Any:
    return call(mount.state_dir / CONTROL_SOCKET, "stats")


@pytest.fixture
def cold(tmp_path: Path) -> Any:
    """A mount of a volume with an image that it has not read."""
    with mounted(tmp_path / "first") as mount:
        (mount.path / "disk").write_bytes(CONTENT)
        url = mount.url
    with mounted(tmp_path / "second", url=url) as mount:
        yield mount


def test_a_warmed_image_is_read_without_the_store(cold: Mount) -> None:
    options = ("--state-dir", cold.state_dir, "--l2-url", "none")
    (done,) = novafs_json("warm", cold.url, "disk", *options)
    assert (done["tier"], done["chunks"], done["fetched"], done["failed"]) == ("l1", CHUNKS, CHUNKS, 0)
    before = stats(cold)["cache"]["l3_traffic"]["hits"]
    assert (cold.path / "disk").read_bytes() == CONTENT
    assert stats(cold)["cache"]["l3_traffic"]["hits"] == before
    assert f"{CHUNKS} were there, 0 brought" in novafs("warm", cold.url, "disk", *options)
    novafs("warm", cold.url, "missing", *options, status=1)
    novafs("warm", cold.url, "disk", "--tier", "l2", *options, status=2)


def test_interrupting_it_ends_it_in_the_daemon_as_well(cold: Mount) -> None:
    command = [sys.executable, "-m", "novafs.cli", "warm", cold.url, "disk", "--rate", "1MiB", "--state-dir", str(cold.state_dir)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as program:
        while not stats(cold)["cache"]["l3_traffic"]["hits"]:
            assert program.poll() is None
        program.send_signal(signal.SIGINT)
        _, said = program.communicate(timeout=60)
    assert program.returncode == 130, said
    found = stats(cold)["cache"]
    assert found["l1"]["entries"] < CHUNKS
    assert (cold.path / "disk").read_bytes() == CONTENT
