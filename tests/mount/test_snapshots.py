"""Snapshots, clones and rollbacks on a mounted volume: through the command line, seen in `.snapshots`."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.mounted import Mount

pytestmark = pytest.mark.fuse


def novafs(mount: Mount, *words: str, status: int = 0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "novafs.cli", words[0], mount.url, *words[1:], "--state-dir", str(mount.state_dir), "--l2-url", "none"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    return done


def answer(mount: Mount, *words: str) -> Any:
    return json.loads(novafs(mount, *words, "--json").stdout)


def write(path: Path, offset: int, data: bytes) -> None:
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    try:
        os.pwrite(fd, data, offset)
    finally:
        os.close(fd)


def test_a_snapshot_taken_while_mounted_is_readable_and_read_only(mounted: Mount) -> None:
    """semantics: S14."""
    disk = mounted.path / "web" / "disk.raw"
    disk.parent.mkdir()
    old = os.urandom(300_000)
    write(disk, 0, old)
    fd = os.open(disk, os.O_RDWR)  # open, and with data that no close has committed
    os.pwrite(fd, b"just now", 1000)
    novafs(mounted, "snapshot", "web/disk.raw", "monday")
    os.pwrite(fd, b"later...", 1000)
    os.close(fd)
    expected = bytearray(old)
    expected[1000:1008] = b"just now"

    view = mounted.path / ".snapshots" / "web" / "disk.raw" / "monday"
    assert view.read_bytes() == bytes(expected)
    assert ".snapshots" not in os.listdir(mounted.path)
    assert os.listdir(view.parent) == ["monday"]
    for attempt in (
        lambda: os.open(view, os.O_RDWR),
        lambda: view.unlink(),
        lambda: view.rename(view.parent / "other"),
        lambda: (view.parent / "new").write_bytes(b""),
        lambda: os.truncate(view, 0),
        lambda: os.setxattr(view, "user.x", b"1"),
        lambda: (view.parent / "directory").mkdir(),
        lambda: view.parent.rmdir(),
    ):
        with pytest.raises(OSError) as caught:
            attempt()
        assert caught.value.errno == errno.EROFS
    with pytest.raises(OSError) as caught:
        (mounted.path / ".snapshots").mkdir()
    assert caught.value.errno == errno.EEXIST
    rows = answer(mounted, "snapshots", "web/disk.raw")
    assert [row["name"] for row in rows] == ["monday"]
    novafs(mounted, "snapshot", "web/disk.raw", "monday", "--delete")
    with pytest.raises(FileNotFoundError):
        view.read_bytes()


def test_a_clone_made_while_mounted_appears_at_once(mounted: Mount) -> None:
    """semantics: S14."""
    data = os.urandom(200_000)
    write(mounted.path / "a.raw", 0, data)
    made = answer(mounted, "clone", "a.raw", "b.raw")
    assert made["image"] == "b.raw"
    assert (mounted.path / "b.raw").read_bytes() == data
    write(mounted.path / "b.raw", 0, b"b")
    assert (mounted.path / "a.raw").read_bytes() == data
    done = novafs(mounted, "clone", "a.raw", "b.raw", status=1)
    assert "exists already" in done.stderr
    done = novafs(mounted, "clone", "nothing", "c.raw", status=1)
    assert "no such image" in done.stderr


def test_rollback_is_refused_while_open_and_replaces_the_content_when_closed(mounted: Mount) -> None:
    """semantics: S15."""
    disk = mounted.path / "disk.raw"
    old, new = os.urandom(150_000), os.urandom(90_000)
    write(disk, 0, old)
    novafs(mounted, "snapshot", "disk.raw", "before")
    disk.write_bytes(new)
    assert disk.read_bytes() == new
    with disk.open("rb"):
        done = novafs(mounted, "rollback", "disk.raw", "before", status=1)
        assert "is open" in done.stderr
    done = novafs(mounted, "rollback", "disk.raw", "nothing", status=1)
    assert "there are: before" in done.stderr
    novafs(mounted, "rollback", "disk.raw", "before")
    assert disk.read_bytes() == old
    write(disk, 5, b"still writable")
    assert disk.read_bytes()[5:19] == b"still writable"


def test_the_same_commands_work_on_an_unmounted_volume(mounted: Mount) -> None:
    data = os.urandom(100_000)
    write(mounted.path / "disk.raw", 0, data)
    mounted.unmount()
    assert mounted.wait() == 0
    novafs(mounted, "snapshot", "disk.raw", "s")
    novafs(mounted, "clone", "disk.raw", "copy.raw", "--snapshot", "s", "--ttl", "24h")
    novafs(mounted, "rollback", "disk.raw", "s")
    assert [row["name"] for row in answer(mounted, "snapshots", "disk.raw")] == ["s"]
    assert (mounted.state_dir / "control.sock").exists() is False
