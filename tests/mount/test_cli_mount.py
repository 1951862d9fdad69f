"""`novafs mount` and `umount` as a user calls them: in the background, and everything that can be in the way."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from novafs import statedir
from novafs.mounttable import mount_at
from novafs.statedir import MountRecord
from tests.support.cli_fixtures import LocalVolume

pytestmark = pytest.mark.fuse


class Place:
    """A volume and a directory to mount it at; commands run in processes of their own."""

    def __init__(self, volume: LocalVolume, mnt: Path) -> None:
        self.volume = volume
        self.mnt = mnt

    def run(self, *arguments: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "novafs.cli", *map(str, arguments)]
        return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120)

    def mount(self, *arguments: object, at: Path | None = None) -> subprocess.CompletedProcess[str]:
        return self.run("mount", self.volume.url, at or self.mnt, *self.volume.options, *arguments)

    def mounted(self, *arguments: object) -> int:
        """Mount in the background, which must succeed; the daemon's process."""
        done = self.mount(*arguments)
        assert (done.returncode, done.stderr) == (0, ""), done.stderr
        pid = statedir.holder(self.volume.state)
        assert pid is not None
        assert done.stdout == f"{self.volume.url} is mounted at {self.mnt} (process {pid}, log {self.volume.state}/mount.log)\n"
        return pid

    def umount(self) -> subprocess.CompletedProcess[str]:
        return self.run("umount", self.mnt)

    def log(self) -> str:
        return (self.volume.state / "mount.log").read_text()


@pytest.fixture
def place(local_volume: LocalVolume, tmp_path: Path) -> Iterator[Place]:
    mnt = tmp_path / "mnt"
    mnt.mkdir()
    yield Place(local_volume, mnt)
    pid = statedir.holder(local_volume.state)
    if pid is not None:
        os.kill(pid, signal.SIGKILL)
        statedir.wait_unlocked(local_volume.state, pid)
    while mount_at(mnt) is not None:
        subprocess.run(["fusermount3", "-uz", str(mnt)], check=True)


def failed(done: subprocess.CompletedProcess[str], status: int = 1) -> str:
    """The one line on stderr of a command that must have failed."""
    assert done.returncode == status, done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("novafs: ")
    return done.stderr.removeprefix("novafs: ").rstrip("\n")


def test_a_mount_answers_when_the_command_returns_and_all_is_stored_when_umount_does(place: Place) -> None:
    pid = place.mounted()
    (place.mnt / "a.raw").write_bytes(b"written through the mount".ljust(4096, b"\0"))
    found = json.loads(place.run("stats", place.mnt, "--json").stdout)
    assert found["mount"]["mountpoint"] == str(place.mnt)
    assert found["mount"]["pid"] == pid
    assert place.volume.json("stats")["mount"]["pid"] == pid, "the volume's name asks the daemon too"

    done = place.umount()
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert mount_at(place.mnt) is None
    assert statedir.holder(place.volume.state) is None, "the daemon has gone"
    out = place.volume.state / "out"
    place.volume("export", "a.raw", out)
    assert out.read_bytes().startswith(b"written through the mount")
    assert failed(place.umount()) == f"{place.mnt} is not mounted"


def test_the_daemon_has_let_go_of_the_terminal(place: Place) -> None:
    pid = place.mounted()
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    assert int(fields[3]) not in (os.getsid(0), pid)
    assert Path(f"/proc/{pid}/cwd").resolve() == Path("/")
    assert (Path(f"/proc/{pid}/fd/0").readlink(), Path(f"/proc/{pid}/fd/2").readlink()) == (
        Path("/dev/null"),
        place.volume.state / "mount.log",
    )
    assert place.umount().returncode == 0
    assert " mounted at " in place.log()
    assert "Traceback" not in place.log()


def test_the_mount_shows_its_volume_and_options_reach_it(place: Place) -> None:
    place.mounted("-o", "ro,uid=4321,gid=4322,umask=077,fsname=my images", "-o", "l1_capacity=16M,x-systemd.automount")
    line = mount_at(place.mnt)
    assert line is not None
    assert (line.fstype, line.source) == ("fuse.novafs", "my images")
    status = place.mnt.stat()
    assert (status.st_uid, status.st_gid, status.st_mode & 0o777) == (4321, 4322, 0o700)
    assert json.loads(place.run("stats", place.mnt, "--json").stdout)["cache"]["l1"]["capacity_bytes"] == 16 << 20
    with pytest.raises(OSError, match="Read-only"):
        (place.mnt / "x").touch()
    assert place.umount().returncode == 0


def test_a_link_to_the_mount_point_does_as_well(place: Place, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("mnt")
    assert place.mount(at=tmp_path / "link").returncode == 0
    assert mount_at(place.mnt) is not None
    assert place.run("stats", tmp_path / "link").returncode == 0
    assert place.run("umount", tmp_path / "link").returncode == 0


def test_a_second_mount_of_the_volume_is_refused_and_names_the_first(place: Place, tmp_path: Path) -> None:
    pid = place.mounted()
    second = tmp_path / "second"
    second.mkdir()
    message = failed(place.mount(at=second))
    assert message == (
        f"this volume is mounted already on this host at {place.mnt} (process {pid}), with the state directory {place.volume.state}: "
        f"use that mount, or unmount it first; a second mount of the volume needs a state directory of its own (--state-dir)"
    )
    assert "is busy" in failed(place.mount())
    assert place.run("mount", place.volume.url, second, "--l2-url", "none", "--state-dir", tmp_path / "state2").returncode == 0
    assert place.run("umount", second).returncode == 0
    assert place.umount().returncode == 0


def test_a_daemon_that_cannot_start_says_so_on_the_terminal(place: Place, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    done = place.run("mount", f"file://{empty}", place.mnt, *place.volume.options)
    assert failed(done).startswith(f"file://{empty}: there is no NovaFS volume here")
    foreground = place.run("mount", f"file://{empty}", place.mnt, "--foreground", *place.volume.options)
    assert foreground.returncode == 1
    assert foreground.stderr.splitlines()[-1] == done.stderr.splitlines()[-1]
    assert mount_at(place.mnt) is None
    assert statedir.find_record(str(place.mnt)) is None
    assert place.mounted()
    assert place.umount().returncode == 0


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        (["-o", "alow_other"], 2, "-o alow_other: unknown mount option; did you mean 'allow_other'?"),
        (["-o", "l1_capacity=lots"], 2, "--l1-capacity: 'lots' is no size"),
        (["-o", "uid=nobody-of-that-name"], 2, "-o uid: found 'nobody-of-that-name'"),
    ],
)
def test_an_option_that_is_none_is_wrong_usage(place: Place, options: list[str], status: int, message: str) -> None:
    assert failed(place.mount(*options), status).startswith(message)


def test_an_option_on_the_command_line_beats_the_one_after_o(place: Place) -> None:
    place.mounted("-o", "l1_capacity=lots", "--l1-capacity", "32M")
    assert json.loads(place.run("stats", place.mnt, "--json").stdout)["cache"]["l1"]["capacity_bytes"] == 32 << 20
    assert place.umount().returncode == 0


def test_a_mount_point_that_is_none_is_refused(place: Place, tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    assert failed(place.mount(at=missing)) == f"mount point {missing} does not exist: create it with 'mkdir -p {missing}'"
    file = tmp_path / "file"
    file.touch()
    assert failed(place.mount(at=file)) == f"mount point {file} is not a directory"


def test_a_mount_point_with_something_in_it_is_refused_unless_it_is_meant(place: Place) -> None:
    (place.mnt / "something").touch()
    assert failed(place.mount()) == (
        f"mount point {place.mnt} is not empty: a mount would hide what is in it; choose another, or add -o nonempty"
    )
    place.mounted("-o", "nonempty")
    assert list(place.mnt.iterdir()) == []
    assert place.umount().returncode == 0
    assert [path.name for path in place.mnt.iterdir()] == ["something"]


def test_without_fusermount_it_says_what_to_install(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    from novafs_mount import mountpoint

    monkeypatch.setattr(mountpoint.shutil, "which", lambda *_args, **_kwargs: None)
    assert shutil.which("sh") is None
    message = place.volume.command.fails("mount", place.volume.url, place.mnt, *place.volume.options, status=3)
    assert message == "fusermount3 is not installed: install the package 'fuse3'"


def test_without_fuse_it_says_what_to_do(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from novafs_mount import mountpoint

    monkeypatch.setattr(mountpoint, "FUSE_DEVICE", tmp_path / "fuse")
    message = place.volume.command.fails("mount", place.volume.url, place.mnt, *place.volume.options, status=3)
    assert message.startswith(f"{tmp_path}/fuse is missing: load the kernel module with 'modprobe fuse'")


def test_without_the_file_systems_package_it_says_what_to_install(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    message = place.volume.command.fails("mount", place.volume.url, place.mnt, *place.volume.options, status=3)
    assert message == "the Python package novafs_mount is not installed, and a mount needs it: install novafs anew with pip"


def test_a_name_with_nul_is_no_mount_point(place: Place) -> None:
    message = place.volume.command.fails("mount", place.volume.url, "a\0b", *place.volume.options)
    assert message == "mount point 'a\\x00b': no path has a NUL character in it"


# --- umount -----------------------------------------------------------------------------------------------------


def test_a_mount_in_use_is_not_taken_away(place: Place) -> None:
    place.mounted()
    with (place.mnt / "a.raw").open("wb") as file:
        file.write(b"x")
        assert failed(place.umount()) == (
            f"{place.mnt} is in use: close what is open in it ('fuser -vm {place.mnt}' shows who has) and try again"
        )
    assert place.umount().returncode == 0


def test_what_is_no_mount_of_ours_is_left_alone(place: Place, tmp_path: Path) -> None:
    assert failed(place.run("umount", "/proc")) == "/proc is a mount of type proc, not of NovaFS: use umount"
    assert failed(place.run("umount", tmp_path)) == f"{tmp_path} is not mounted"
    assert failed(place.run("umount", tmp_path / "missing")) == f"{tmp_path}/missing is not mounted"


def test_a_daemon_that_was_killed_is_told_of_and_its_mount_goes(place: Place) -> None:
    pid = place.mounted()
    os.kill(pid, signal.SIGKILL)
    statedir.wait_unlocked(place.volume.state, pid)
    assert "broke off" in (said := failed(place.run("stats", place.mnt))) or "no mount answers at" in said
    assert failed(place.umount()) == (
        f"{place.mnt} is unmounted, but its daemon (process {pid}) had died before: see {place.volume.state}/mount.log"
    )
    assert mount_at(place.mnt) is None
    assert failed(place.umount()) == f"{place.mnt} is not mounted"
    place.mounted()
    assert place.umount().returncode == 0


def test_a_dead_mount_is_replaced_by_the_next(place: Place) -> None:
    pid = place.mounted()
    os.kill(pid, signal.SIGKILL)
    statedir.wait_unlocked(place.volume.state, pid)
    done = place.mount()
    assert done.returncode == 0
    assert done.stderr == f"novafs: {place.mnt} is the mount of a daemon that has died (process {pid}): replacing it\n"
    assert "detaching it before mounting again" in place.log()
    assert list(place.mnt.iterdir()) == []
    assert place.umount().returncode == 0


def test_a_dead_mount_stays_until_the_next_can_take_its_place(place: Place) -> None:
    """Whoever goes on writing must not write into the directory below; and what is there all the same does not keep the volume away."""
    (place.mnt / "below.raw").write_bytes(b"x")
    pid = place.mounted("-o", "nonempty")
    os.kill(pid, signal.SIGKILL)
    statedir.wait_unlocked(place.volume.state, pid)
    away = place.volume.root.with_name("away")
    place.volume.root.rename(away)
    assert place.mount().returncode == 1
    assert mount_at(place.mnt) is not None
    with pytest.raises(OSError, match="not connected"):
        (place.mnt / "new.raw").write_bytes(b"written while nothing is mounted")
    away.rename(place.volume.root)
    assert place.mount().returncode == 0
    assert list(place.mnt.iterdir()) == []
    assert f"the directory below {place.mnt} is not empty, and the mount hides what is in it (below.raw)" in place.log()
    assert place.umount().returncode == 0
    assert [path.name for path in place.mnt.iterdir()] == ["below.raw"]


def test_a_mount_of_which_nothing_is_noted_is_unmounted_with_a_word(place: Place) -> None:
    pid = place.mounted()
    record = MountRecord(str(place.mnt), pid, str(place.volume.state), place.volume.url, f"{place.volume.state}/mount.log")
    statedir.remove_record(record)
    assert failed(place.run("stats", place.mnt)).startswith(f"nothing is noted of the mount at {place.mnt}")
    done = place.umount()
    assert done.returncode == 0
    assert done.stderr == f"novafs: {place.mnt} is unmounted; nothing is noted of its daemon, so it may still write\n"
    statedir.wait_unlocked(place.volume.state, pid)


def test_a_daemon_that_could_not_store_everything_makes_umount_fail(place: Place) -> None:
    place.mounted("--durability", "store")
    fd = os.open(place.mnt / "a.raw", os.O_WRONLY | os.O_CREAT, 0o644)
    os.pwrite(fd, b"x" * 4096, 0)
    away = place.volume.root.with_name("away")
    place.volume.root.rename(away)
    with pytest.raises(OSError, match="Input/output error"):
        os.close(fd)
    with pytest.raises(OSError, match="Input/output error"):
        (place.mnt / "b.raw").stat()
    done = place.umount()
    away.rename(place.volume.root)
    message = failed(done)
    assert message.startswith(f"{place.mnt} is unmounted, but its daemon failed: ")
    assert str(place.volume.root) in message
    for what in ("flush a.raw", "lookup /b.raw"):
        assert f'msg="{what}' in place.log(), place.log()
    last = place.log().rstrip().splitlines()[-1]
    assert " level=error " in last and message.partition("its daemon failed: ")[2] in last


# --- a daemon that takes its time: played by a process that holds the lock ------------------------------------------------

HOLDER = """
import os, sys
from pathlib import Path
from novafs import statedir
lock = statedir.StateLock.take(Path(sys.argv[1]), mountpoint=sys.argv[2])
print("locked", flush=True)
if sys.stdin.readline():
    statedir.write_exit(Path(sys.argv[1]), statedir.ExitRecord(os.getpid(), 0, ""))
"""


@pytest.mark.parametrize("killed", [False, True])
def test_umount_says_what_it_waits_for(place: Place, monkeypatch: pytest.MonkeyPatch, killed: bool) -> None:
    from novafs.cli import common, umount

    monkeypatch.setattr(umount, "_SAY_AFTER_S", 0.0)
    state, mnt = statedir.prepare(place.volume.state), str(place.mnt)
    command = [sys.executable, "-c", HOLDER, str(state), mnt]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as daemon:
        assert daemon.stdin is not None
        assert daemon.stdout is not None
        assert daemon.stdout.readline() == "locked\n"
        statedir.write_record(MountRecord(mnt, daemon.pid, str(state), place.volume.url, f"{state}/mount.log"))
        said: list[str] = []

        def say(message: str, *, error: bool = False) -> None:
            said.append(message)
            if message.startswith("waiting"):
                assert daemon.stdin is not None
                if killed:
                    daemon.kill()
                else:
                    daemon.stdin.write("end\n")
                    daemon.stdin.flush()

        monkeypatch.setattr(common, "say", say)
        result = place.volume.command.run("umount", mnt)
    assert said[:2] == [
        f"{mnt} is not mounted any more; its daemon still writes",
        f"waiting for the daemon (process {daemon.pid}) to store what was written; it says more in {state}/mount.log",
    ]
    assert result.status == (1 if killed else 0)
    assert ("was killed while it wrote" in said[-1]) == killed
    assert statedir.find_record(mnt) is None
