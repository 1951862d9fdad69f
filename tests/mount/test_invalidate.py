"""Kernel invalidations, on the real kernel: what is dropped, and that nothing waits for one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.fuse


def test_invalidations_drop_what_they_say_and_nobody_waits(tmp_path: Path) -> None:
    """A page invalidation meets a page that a READ has locked (design 6): other requests are answered meanwhile."""
    command = [sys.executable, "-m", "tests.support.invalidation_probe", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=Path(__file__).parents[2])
    subprocess.run(["fusermount3", "-uqz", str(tmp_path)], check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines() == [
        "pages dropped",
        "attributes dropped",
        "name dropped",
        "unknown inode ignored",
        "requests answered while an invalidation waits",
        "queue bounded",
        "stopped",
    ]
