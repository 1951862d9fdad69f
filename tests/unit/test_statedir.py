"""The state directory: one daemon at a time, and what it leaves for `novafs umount`."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import pwd
import stat
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from novafs import statedir
from novafs.errors import AccessDeniedError, BusyError, ConfigError, StoreFullError
from novafs.statedir import ExitRecord, MountRecord, StateLock


@pytest.fixture
def state(tmp_path: Path) -> Path:
    return statedir.prepare(tmp_path / "a" / "state")


def test_the_directory_is_made_for_its_owner_alone(state: Path) -> None:
    assert stat.S_IMODE(state.stat().st_mode) == 0o700
    assert statedir.prepare(state) == state


def test_a_file_in_its_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ConfigError, match=r"is not a directory: choose another with --state-dir"):
            statedir.prepare(path)


@pytest.mark.parametrize(
    ("number", "kind"), [(13, AccessDeniedError), (30, AccessDeniedError), (28, StoreFullError), (122, StoreFullError)]
)
def test_a_directory_that_cannot_be_made_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, kind: type[Exception]
) -> None:
    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "mkdir", fail)
    with pytest.raises(kind, match="the state directory"):
        statedir.prepare(tmp_path / "x")


def test_a_directory_of_somebody_else_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(AccessDeniedError, match="Permission denied; run as its owner, or choose another with --state-dir"):
        statedir.prepare(tmp_path)


def test_the_lock_is_held_by_one_and_names_its_holder(state: Path) -> None:
    assert not statedir.is_locked(state)
    assert statedir.holder(state) is None
    lock = StateLock.take(state, mountpoint="/mnt/a")
    assert statedir.is_locked(state)
    assert statedir.holder(state) == os.getpid()
    message = rf"mounted already on this host at /mnt/a \(process {os.getpid()}\), with the state directory {state}: use that mount"
    with pytest.raises(BusyError, match=message):
        StateLock.take(state, mountpoint="/mnt/b")
    with pytest.raises(BusyError, match=message):
        statedir.check_free(state)
    lock.release()
    statedir.check_free(state)
    StateLock.take(state, mountpoint="/mnt/b").release()
    assert statedir.holder(state) is None


def test_who_only_asks_whether_it_is_held_keeps_nobody_from_taking_it(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`novafs umount` and `novafs stats` look twenty times a second; a mount that starts beside them must not be told that it is held."""
    StateLock.take(state, mountpoint="/mnt/a").release()
    asking = os.open(state / "lock", os.O_RDONLY)
    fcntl.flock(asking, fcntl.LOCK_SH | fcntl.LOCK_NB)
    monkeypatch.setattr("time.sleep", lambda _: fcntl.flock(asking, fcntl.LOCK_UN))
    lock = StateLock.take(state, mountpoint="/mnt/b")
    assert statedir.holder(state) == os.getpid()
    lock.release()
    os.close(asking)


def test_a_lock_file_that_was_deleted_before_it_was_locked_is_no_lock(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever came next would make another, and both would write the journal."""
    real = fcntl.flock
    deleted: list[int] = []

    def flock(fd: int, how: int) -> None:
        if not deleted:
            deleted.append(fd)
            (state / "lock").unlink()
        real(fd, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    lock = StateLock.take(state, mountpoint="/mnt/a")
    assert deleted
    with pytest.raises(BusyError):
        StateLock.take(state, mountpoint="/mnt/b")
    lock.release()


def test_a_lock_that_can_not_be_made_says_what_to_do(state: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (state / "lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(AccessDeniedError, match="choose another with --state-dir"):
        StateLock.take(state, mountpoint="/mnt/a")
    assert not (tmp_path / "elsewhere").exists()
    (state / "lock").unlink()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, "ftruncate", full)
        lock = StateLock.take(state, mountpoint="/mnt/a")
        assert statedir.is_locked(state), "who holds it can not be noted, and it is held all the same"
        lock.release()
    with monkeypatch.context() as patched:
        patched.setattr(os, "open", full)
        with pytest.raises(StoreFullError, match="make room there"):
            StateLock.take(state, mountpoint="/mnt/a")
        with pytest.raises(StoreFullError):
            statedir.is_locked(state)


def test_a_read_only_file_system_is_called_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)
    flags = os.statvfs(tmp_path)
    monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_flag=flags.f_flag | os.ST_RDONLY))
    with pytest.raises(AccessDeniedError, match="Read-only file system"):
        statedir.prepare(tmp_path)


def test_a_lock_whose_holder_cannot_be_told_still_holds(state: Path) -> None:
    lock = StateLock.take(state, mountpoint="/mnt/a")
    (state / "lock").write_text("garbage")
    with pytest.raises(BusyError, match="mounted already on this host, with the state directory"):
        StateLock.take(state, mountpoint="/mnt/b")
    lock.release()


def test_a_killed_holder_lets_go_and_whoever_waits_goes_on(state: Path) -> None:
    code = f"""
import sys
from pathlib import Path
from novafs.statedir import StateLock
lock = StateLock.take(Path({str(state)!r}), mountpoint="/mnt/a")
print("locked", flush=True)
sys.stdin.read()
"""
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "locked\n"
        assert statedir.holder(state) == other.pid
        waited: list[float] = []

        def waiting(seconds: float) -> None:
            if not waited:
                other.kill()
            waited.append(seconds)

        statedir.wait_unlocked(state, other.pid, waiting=waiting)
        assert waited
    assert not statedir.is_locked(state)


def test_nobody_waits_for_a_later_holder(state: Path) -> None:
    lock = StateLock.take(state, mountpoint="/mnt/a")
    statedir.wait_unlocked(state, os.getpid() + 1)
    lock.release()


def test_how_a_daemon_ended_is_read_by_its_number(state: Path) -> None:
    assert statedir.read_exit(state, 7) is None
    statedir.write_exit(state, ExitRecord(7, 1, "no space"))
    assert statedir.read_exit(state, 7) == ExitRecord(7, 1, "no space")
    assert statedir.read_exit(state, 8) is None
    (state / "exit.json").write_text("{")
    assert statedir.read_exit(state, 7) is None


def test_an_end_that_cannot_be_noted_is_no_error(tmp_path: Path) -> None:
    statedir.write_exit(tmp_path / "missing", ExitRecord(7, 1, "x"))


# --- mount records ----------------------------------------------------------------------------------------------


@pytest.fixture
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The runtime directory of an ordinary user, whoever runs the tests."""
    directory = tmp_path / "run"
    directory.mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(directory))
    owner = os.getuid()
    real = statedir._records_dir

    def records_dir(uid: int) -> Path:
        return directory / "novafs" / "mounts" if uid == owner else real(uid)

    monkeypatch.setattr(statedir, "_records_dir", records_dir)
    return directory


def record(mountpoint: str = "/mnt/novafs test/a", pid: int = 7) -> MountRecord:
    return MountRecord(mountpoint, pid, "/state", "file:///v", "/state/mount.log")


@pytest.mark.usefixtures("runtime")
def test_a_mount_is_found_by_its_directory_until_it_is_forgotten() -> None:
    assert statedir.find_record(record().mountpoint) is None
    statedir.write_record(record())
    assert statedir.find_record(record().mountpoint) == record()
    assert statedir.find_record("/mnt/novafs test/b") is None
    statedir.remove_record(record())
    assert statedir.find_record(record().mountpoint) is None
    statedir.remove_record(record())


def test_what_an_older_version_noted_is_found(runtime: Path) -> None:
    statedir.write_record(record())
    (file,) = (runtime / "novafs" / "mounts").iterdir()
    noted = json.loads(file.read_text())
    assert noted.pop("config_file") == ""
    file.write_text(json.dumps(noted))
    assert statedir.find_record(record().mountpoint) == record()


@pytest.mark.usefixtures("runtime")
def test_a_daemon_that_ends_late_does_not_forget_its_successor() -> None:
    statedir.write_record(record(pid=8))
    statedir.remove_record(record(pid=7))
    assert statedir.find_record(record().mountpoint) == record(pid=8)


def test_a_record_that_is_damaged_or_another_users_is_not_believed(runtime: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    statedir.write_record(record())
    (file,) = (runtime / "novafs" / "mounts").iterdir()
    good = file.read_text()
    for text in ("", "[]", "{}", good.replace("novafs test/a", "other")):
        file.write_text(text)
        assert statedir.find_record(record().mountpoint) is None
    file.write_text(good)
    uid = os.getuid()
    monkeypatch.setattr(statedir, "_records_dir", lambda _uid: runtime / "novafs" / "mounts")
    monkeypatch.setattr(os, "getuid", lambda: uid + 1)
    if uid != 0:  # a record of root is believed by everybody
        assert statedir.find_record(record().mountpoint) is None
    assert statedir.find_record(record().mountpoint, fuse_uid=uid) == record()


def test_a_runtime_directory_that_cannot_be_written_is_a_clear_error(runtime: Path) -> None:
    (runtime / "novafs").write_text("a file")
    with pytest.raises(AccessDeniedError, match="cannot note the mount in"):
        statedir.write_record(record())


def test_records_lie_in_the_runtime_directory_of_their_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert statedir._records_dir(0) == Path("/run/novafs/mounts")
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setattr(os, "getuid", lambda: 54321)
    assert statedir._records_dir(54321) == tmp_path / "novafs" / "mounts"
    monkeypatch.setenv("XDG_RUNTIME_DIR", "relative")
    assert statedir._records_dir(54321) == Path("/run/user/54321/novafs/mounts")
    nobody = pwd.getpwnam("nobody")
    assert statedir._records_dir(nobody.pw_uid) == Path(nobody.pw_dir) / ".local/state/novafs/mounts"
