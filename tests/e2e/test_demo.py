"""`make demo` is the first thing that a newcomer runs: here its script runs as he runs it, twice, and is stopped."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from novafs.mounttable import NOVAFS_TYPE, mount_at

pytestmark = [pytest.mark.fuse, pytest.mark.slow]

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "tools" / "demo.sh"


def demo(directory: Path, *arguments: str) -> str:
    done = subprocess.run(
        [SCRIPT, *arguments],
        env={**os.environ, "DEMO_DIR": str(directory)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[Path]:
    """Where the demo lives; a blank in the path, as in many a home directory."""
    directory = tmp_path / "my demo"
    yield directory
    demo(directory, "clean")


def test_the_demo_runs_twice_stays_mounted_and_stops(directory: Path) -> None:
    images = directory / "images"

    first = demo(directory)
    found = mount_at(images)
    assert found is not None
    assert found.fstype == NOVAFS_TYPE
    assert "They are equal." in first
    source = directory / "source.raw"
    assert subprocess.run(["cmp", source, images / "web-02.raw"], check=False).returncode == 0

    second = demo(directory)
    assert second.count(" 0 new, ") == 2, second
    assert "from an earlier run" in second
    assert "They are equal." in second

    demo(directory, "stop")
    assert mount_at(images) is None
    assert demo(directory, "stop") == ""
    demo(directory, "clean")
    assert not directory.exists()
