"""The helpers of mount(8) and umount(8), called as these call them. (tests/e2e/test_service.py has mount(8) itself, fstab and systemd.)"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from novafs import statedir
from novafs.cli import mount_helper
from novafs.cli.mount_helper import _words
from novafs.mounttable import mount_at
from tests.support.cli_fixtures import LocalVolume

pytestmark = pytest.mark.fuse


class Place:
    """A volume that has a NAME, and a directory."""

    def __init__(self, volume: LocalVolume, directory: Path) -> None:
        self.volume = volume
        self.mnt = directory / "mnt"
        self.mnt.mkdir()
        (directory / "etc").mkdir()
        self.file = directory / "etc/web.toml"
        self.file.write_text(
            f'volume = "{volume.url}"\nstate_dir = "{volume.state}"\nmetrics = "off"\n[l2]\nurl = "none"\n[l1]\ncapacity = "64MiB"\n'
        )
        self._environ = {**os.environ, "NOVAFS_CONFIG_DIR": str(directory / "etc")}

    def call(self, name: str, *arguments: object, status: int = 0) -> str:
        """One line of what the helper says, "" for nothing."""
        command = [sys.executable, "-P", "-m", "novafs.cli.mount_helper", name, *map(str, arguments)]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120, env=self._environ)
        assert done.returncode == status, done.stdout + done.stderr
        assert (done.stdout + done.stderr).count("\n") <= 1, done.stdout + done.stderr
        return (done.stdout + done.stderr).rstrip("\n")


@pytest.fixture
def place(local_volume: LocalVolume, tmp_path: Path) -> Iterator[Place]:
    found = Place(local_volume, tmp_path)
    yield found
    pid = statedir.holder(local_volume.state)
    if pid is not None:
        os.kill(pid, 9)
        statedir.wait_unlocked(local_volume.state, pid)
    while mount_at(found.mnt) is not None:
        subprocess.run(["fusermount3", "-uz", str(found.mnt)], check=True)


def test_it_mounts_and_unmounts_as_mount_8_asks(place: Place) -> None:
    options = "rw,noexec,_netdev,nofail,x-systemd.automount,x-systemd.mount-timeout=2min,comment=x,l1_capacity=48M,uid=4321"
    assert place.call("mount", "web", place.mnt, "-n", "-o", options) == ""
    assert place.mnt.stat().st_uid == 4321
    (place.mnt / "a.raw").write_bytes(b"x" * 4096)
    assert place.call("umount", place.mnt, "-n", "-t", "fuse.novafs") == ""
    assert mount_at(place.mnt) is None
    assert statedir.holder(place.volume.state) is None, "everything is stored when umount returns"


def test_read_only_and_verbose(place: Place) -> None:
    assert re.fullmatch(r"web is mounted at \S+ \(process \d+, log \S+\)", place.call("mount", "-v", "-r", "web", place.mnt))
    with pytest.raises(OSError, match="Read-only"):
        (place.mnt / "x").touch()
    place.call("umount", "-l", place.mnt)


def test_rw_of_mount_8_does_not_undo_the_files_ro(place: Place) -> None:
    place.file.write_text('mount_options = "ro,uid=77"\n' + place.file.read_text())
    place.call("mount", "web", place.mnt, "-o", "rw,uid=78")
    with pytest.raises(OSError, match="Read-only"):
        (place.mnt / "x").touch()
    assert place.mnt.stat().st_uid == 78, "what is given wins else"
    place.call("umount", place.mnt)


def test_a_pretence_checks_everything_and_mounts_nothing(place: Place) -> None:
    assert place.call("mount", "-f", "web", place.mnt, "-o", "ro") == ""
    assert mount_at(place.mnt) is None
    assert "does not exist" in place.call("mount", "-f", "web", place.mnt / "missing", status=32)


def test_a_sloppy_call_passes_over_what_it_does_not_know(place: Place) -> None:
    assert place.call("mount", "-s", "-f", "web", place.mnt, "-o", "ro,nosuchthing,foo=bar,uid=5") == ""


def test_a_namespace_is_entered(place: Place) -> None:
    """`-N` as mount(8) gives it: a path to the name space."""
    if os.geteuid() != 0:
        pytest.skip("entering a mount name space needs root")
    assert place.call("mount", "web", place.mnt, "-N", "/proc/self/ns/mnt") == ""
    place.call("umount", place.mnt, f"-vN{os.getpid()}")
    assert mount_at(place.mnt) is None


def test_a_hung_daemon_can_be_cut_off(place: Place) -> None:
    place.call("mount", "web", place.mnt)
    pid = statedir.holder(place.volume.state)
    assert pid is not None
    if os.geteuid() != 0:
        pytest.skip("umount -f needs root")
    place.call("umount", "-f", place.mnt)
    statedir.wait_unlocked(place.volume.state, pid)
    assert mount_at(place.mnt) is None


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["-o", "alow_other"], 1, "-o alow_other: unknown mount option; did you mean 'allow_other'?"),
        (["-o", "l1_capacity=lots"], 1, "--l1-capacity: 'lots' is no size; allowed: a size such as 64K"),
        (["-o", "remount,ro"], 1, "-o remount: a mount's options can not be changed: unmount it"),
        (["-z"], 1, "option -z not recognized; usage: mount -t novafs VOLUME DIR"),
        (["third"], 1, "expected a volume and a directory, found 3 operands"),
    ],
)
def test_wrong_usage_is_one_line_and_status_1(
    place: Place, arguments: list[str], status: int, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("NOVAFS_CONFIG_DIR", str(place.file.parent))
    assert mount_helper.main(["mount", "web", str(place.mnt), *arguments]) == status
    error = capsys.readouterr().err
    assert error.startswith(f"mount.novafs: {message}") and error.count("\n") == 1


def test_what_is_wrong_with_the_place_is_one_line_and_status_32(place: Place) -> None:
    assert place.call("mount", "web", place.mnt / "no", status=32).endswith(f"does not exist: create it with 'mkdir -p {place.mnt}/no'")
    assert "no file" in place.call("mount", "wbe", place.mnt, status=1)
    place.call("mount", "web", place.mnt)
    assert "is busy: web (fuse.novafs) is mounted there" in place.call("mount", "web", place.mnt, status=32)
    with (place.mnt / "open.raw").open("wb"):
        assert "is in use: close what is open in it" in place.call("umount", place.mnt, status=32)
    place.call("umount", place.mnt)
    assert "is not mounted" in place.call("umount", place.mnt, status=32)


def test_commas_in_a_value_are_no_ends_of_words() -> None:
    assert _words(r"ro,l2_url=redis+sentinel://a\,b/x,,uid=5") == ["ro", r"l2_url=redis+sentinel://a\,b/x", "uid=5"]
