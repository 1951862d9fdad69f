"""What is checked before a mount, and how `fusermount3`'s answers are read. (Real mounts: tests/mount/test_lifecycle.py.)"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from novafs.errors import MountError
from novafs_mount import host, mountpoint
from novafs_mount.mountpoint import Unmounted


@pytest.fixture
def device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for /dev/fuse, which `prepare` only looks for."""
    path = tmp_path / "fuse"
    path.touch()
    monkeypatch.setattr(mountpoint, "FUSE_DEVICE", path)
    return path


@pytest.fixture
def helper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fusermount3 of our own, first in PATH."""
    directory = tmp_path / "bin"
    directory.mkdir()
    path = directory / "fusermount3"
    monkeypatch.setenv("PATH", str(directory) + os.pathsep + os.environ["PATH"])

    path.write_text("#!/bin/sh\nexit 0\n")
    path.chmod(0o755)
    return path


def test_a_machine_without_fuse_is_told_so(device: Path, tmp_path: Path) -> None:
    device.unlink()
    with pytest.raises(MountError, match="modprobe fuse"):
        mountpoint.prepare(tmp_path, allow_other=False)


def test_a_machine_without_the_helper_is_told_what_to_install(device: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mountpoint.shutil, "which", lambda *_args, **_more: None)
    with pytest.raises(MountError, match="install the package 'fuse3'"):
        mountpoint.prepare(tmp_path, allow_other=False)


def test_allow_other_needs_root_or_a_line_in_fuse_conf(device: Path, helper: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    conf = tmp_path / "fuse.conf"
    monkeypatch.setattr(mountpoint, "FUSE_CONF", conf)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(MountError, match="user_allow_other"):
        mountpoint.prepare(tmp_path, allow_other=True)
    conf.write_text("# user_allow_other\nmount_max = 10\n")
    with pytest.raises(MountError, match="user_allow_other"):
        mountpoint.prepare(tmp_path, allow_other=True)
    conf.write_text("mount_max = 10\n user_allow_other \n")
    assert mountpoint.prepare(tmp_path, allow_other=True) == tmp_path


def test_a_relative_path_and_a_link_become_the_directory(
    device: Path, helper: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    monkeypatch.chdir(tmp_path)
    assert mountpoint.prepare(Path("link"), allow_other=False) == tmp_path / "real"


def test_what_is_no_free_directory_is_refused(device: Path, helper: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path, message in ((tmp_path / "none", "mkdir -p"), (tmp_path / "file", "not a directory"), (Path("/proc"), "is busy")):
        with pytest.raises(MountError, match=message):
            mountpoint.prepare(path, allow_other=False)
    with pytest.raises(MountError, match="Not a directory"):
        mountpoint.prepare(tmp_path / "file" / "below", allow_other=False)


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("exit 0", Unmounted.DONE),
        ("echo 'fusermount3: failed to unmount /m: Device or resource busy' >&2; exit 1", Unmounted.BUSY),
        ("echo 'fusermount3: entry for /m not found in /etc/mtab' >&2; exit 1", Unmounted.NOT_MOUNTED),
    ],
)
def test_the_answers_of_the_helper(helper: Path, tmp_path: Path, script: str, expected: Unmounted) -> None:
    helper.write_text(f"#!/bin/sh\n{script}\n")
    assert mountpoint.unmount(tmp_path) is expected


def test_a_failure_of_the_helper_is_told(helper: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    helper.write_text("#!/bin/sh\necho 'Operation not permitted' >&2; exit 1\n")
    with pytest.raises(MountError, match="/proc: Operation not permitted"):
        mountpoint.unmount(Path("/proc"))
    helper.write_text("#!/bin/sh\nexit 9\n")
    with pytest.raises(MountError, match="status 9"):
        mountpoint.unmount(Path("/proc"), lazy=True)
    helper.write_text("#!/bin/sh\nsleep 60\n")
    monkeypatch.setattr(mountpoint, "COMMAND_TIMEOUT_S", 0.05)
    with pytest.raises(MountError, match="did not answer"):
        mountpoint.unmount(Path("/proc"))


def test_the_device_number_of_a_mount_comes_from_the_mount_table() -> None:
    found = os.stat("/proc").st_dev
    assert mountpoint.device_of(Path("/proc")) == (os.major(found), os.minor(found))
    assert mountpoint.device_of(Path("/proc/self")) is None


def test_what_the_host_refuses_is_done_without(monkeypatch: pytest.MonkeyPatch) -> None:
    assert host.tune_mount(0, 0) == []
