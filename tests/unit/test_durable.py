"""`novafs.durable` on a real directory, with faults scripted at its seam."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from novafs import durable
from novafs.durable import TEMP_PREFIX, FileOps


class Recording(FileOps):
    """The real calls, with a list of what was called; `fail` raises instead of, or after, the n-th call."""

    def __init__(self, fail_at: int = -1, error: BaseException | None = None, *, after: bool = False) -> None:
        self.calls: list[str] = []
        self._fail_at, self._error, self._after = fail_at, error, after

    def _do(self, what: str, work: Callable[[], Any]) -> Any:
        self.calls.append(what)
        failing = self._error is not None and len(self.calls) == self._fail_at
        if failing and not self._after:
            raise self._error
        result = work()
        if failing:
            raise self._error
        return result

    def create(self, path: Path, mode: int) -> int:
        return self._do("create", lambda: super(Recording, self).create(path, mode))

    def write(self, fd: int, data: memoryview) -> int:
        return self._do("write", lambda: super(Recording, self).write(fd, data))

    def fsync(self, fd: int) -> None:
        self._do("fsync", lambda: super(Recording, self).fsync(fd))

    def fsync_dir(self, path: Path) -> None:
        self._do(f"fsync_dir {path.name}", lambda: super(Recording, self).fsync_dir(path))

    def link(self, source: Path, target: Path) -> None:
        self._do("link", lambda: super(Recording, self).link(source, target))

    def rename(self, source: Path, target: Path) -> None:
        self._do("rename", lambda: super(Recording, self).rename(source, target))

    def unlink(self, path: Path) -> None:
        self._do("unlink", lambda: super(Recording, self).unlink(path))

    def mkdir(self, path: Path, mode: int) -> None:
        self._do(f"mkdir {path.name}", lambda: super(Recording, self).mkdir(path, mode))


def entries(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_a_new_file_has_its_content_and_nobody_else_may_read_it(tmp_path: Path) -> None:
    durable.write_new(tmp_path / "a", b"content")
    assert (tmp_path / "a").read_bytes() == b"content"
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o600
    assert entries(tmp_path) == ["a"]


def test_an_empty_file_and_a_view_of_other_items_are_written_whole(tmp_path: Path) -> None:
    durable.write_new(tmp_path / "empty", b"")
    durable.write_new(tmp_path / "view", memoryview(bytes(range(16))).cast("I"))
    assert (tmp_path / "empty").read_bytes() == b""
    assert (tmp_path / "view").read_bytes() == bytes(range(16))


def test_write_new_never_replaces(tmp_path: Path) -> None:
    durable.write_new(tmp_path / "a", b"first")
    with pytest.raises(FileExistsError):
        durable.write_new(tmp_path / "a", b"second")
    assert (tmp_path / "a").read_bytes() == b"first"
    assert entries(tmp_path) == ["a"]


def test_the_content_is_synced_before_the_name_and_the_directory_after(tmp_path: Path) -> None:
    ops = Recording()
    durable.write_new(tmp_path / "a", b"x", ops=ops)
    assert ops.calls == ["create", "write", "fsync", "link", "unlink", f"fsync_dir {tmp_path.name}"]
    ops = Recording()
    durable.replace(tmp_path / "a", b"y", ops=ops)
    assert ops.calls == ["create", "write", "fsync", "rename", f"fsync_dir {tmp_path.name}"]


def test_a_name_is_reported_taken_only_when_it_is_durable(tmp_path: Path) -> None:
    durable.write_new(tmp_path / "a", b"first")
    ops = Recording()
    with pytest.raises(FileExistsError):
        durable.write_new(tmp_path / "a", b"second", ops=ops)
    assert ops.calls == ["create", "write", "fsync", "link", f"fsync_dir {tmp_path.name}", "unlink"]


def test_a_link_whose_answer_was_lost_counts_as_made(tmp_path: Path) -> None:
    class LostAnswer(FileOps):
        def link(self, source: Path, target: Path) -> None:
            super().link(source, target)
            raise FileExistsError(errno.EEXIST, "as an NFS client says after a retransmission", str(target))

    durable.write_new(tmp_path / "a", b"x", ops=LostAnswer())
    assert (tmp_path / "a").read_bytes() == b"x"
    assert entries(tmp_path) == ["a"]


def test_temporary_files_lie_where_they_are_told_to(tmp_path: Path) -> None:
    (tmp_path / "temps").mkdir()
    seen: list[Path] = []

    class Looking(FileOps):
        def fsync(self, fd: int) -> None:
            seen.extend(tmp_path.rglob(TEMP_PREFIX + "*"))
            super().fsync(fd)

    durable.write_new(tmp_path / "a", b"x", temp_dir=tmp_path / "temps", ops=Looking())
    durable.replace(tmp_path / "a", b"y", temp_dir=tmp_path / "temps", ops=Looking())
    assert [path.parent.name for path in seen] == ["temps", "temps"]
    assert entries(tmp_path / "temps") == []


def test_replace_makes_and_replaces(tmp_path: Path) -> None:
    durable.replace(tmp_path / "a", b"first")
    durable.replace(tmp_path / "a", b"second", mode=0o640)
    assert (tmp_path / "a").read_bytes() == b"second"
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o640 & ~_umask()
    assert entries(tmp_path) == ["a"]


def _umask() -> int:
    current = os.umask(0o022)
    os.umask(current)
    return current


def test_short_writes_are_continued(tmp_path: Path) -> None:
    class Short(FileOps):
        def write(self, fd: int, data: memoryview) -> int:
            return super().write(fd, data[:7])

    content = os.urandom(1000)
    durable.write_new(tmp_path / "a", content, ops=Short())
    assert (tmp_path / "a").read_bytes() == content


@pytest.mark.parametrize("after", [False, True], ids=["instead of the call", "after the call"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_an_error_at_any_call_leaves_the_old_state_or_the_new_and_no_temporary_file(tmp_path: Path, code: int, after: bool) -> None:
    for write, old in [(durable.write_new, None), (durable.replace, None), (durable.replace, b"old")]:
        for fail_at in range(1, 7):
            path = tmp_path / "a"
            path.unlink(missing_ok=True)
            if old is not None:
                path.write_bytes(old)
            ops = Recording(fail_at, OSError(code, os.strerror(code)), after=after)
            failed = False
            try:
                write(path, b"new content", ops=ops)
            except OSError as error:
                assert error.errno == code
                failed = True
            found = path.read_bytes() if path.exists() else None
            assert found in (old, b"new content")
            assert failed or found == b"new content"
            leftovers = [name for name in entries(tmp_path) if name != "a"]
            # Where the failing call is the one that takes the temporary name away, or makes it, it may stay: see clean_temps.
            assert leftovers == [] or (len(leftovers) == 1 and ops.calls[fail_at - 1] in ("unlink", "create"))
            assert durable.clean_temps(tmp_path, older_than_s=-1) == len(leftovers)


def test_a_failed_fsync_is_not_repeated(tmp_path: Path) -> None:
    ops = Recording(3, OSError(errno.EIO, "disk"))
    with pytest.raises(OSError, match="disk"):
        durable.write_new(tmp_path / "a", b"x", ops=ops)
    assert ops.calls == ["create", "write", "fsync", "unlink"]
    assert entries(tmp_path) == []


class Crash(BaseException):
    """The machine stops: nothing after it happens."""


class Crashing(Recording):
    """Every call from the n-th on raises `Crash`."""

    def _do(self, what: str, work: Callable[[], Any]) -> Any:
        if len(self.calls) + 1 >= self._fail_at:
            raise Crash
        return super()._do(what, work)

    def close(self, fd: int) -> None:
        os.close(fd)


def test_a_crash_at_any_call_leaves_the_old_state_or_the_new(tmp_path: Path) -> None:
    for write, old in [(durable.write_new, None), (durable.replace, b"old")]:
        for crash_at in range(1, 7):
            path = tmp_path / "a"
            path.unlink(missing_ok=True)
            if old is not None:
                path.write_bytes(old)
            with contextlib.suppress(Crash):
                write(path, b"new content", ops=Crashing(crash_at))
            assert (path.read_bytes() if path.exists() else None) in (old, b"new content")
            durable.clean_temps(tmp_path, older_than_s=-1)
            assert entries(tmp_path) in ([], ["a"])


def test_remove_syncs_each_directory_once_also_when_the_file_is_gone_already(tmp_path: Path) -> None:
    for name in ("d1", "d2"):
        (tmp_path / name).mkdir()
    paths = [tmp_path / "d1" / "a", tmp_path / "d1" / "b", tmp_path / "d2" / "c"]
    for path in paths[:2]:
        path.write_bytes(b"x")
    ops = Recording()
    assert durable.remove(*paths, tmp_path / "missing" / "x", tmp_path / "d1", ops=ops) == 2
    assert ops.calls[-4:] == ["fsync_dir d1", "fsync_dir d2", "fsync_dir missing", f"fsync_dir {tmp_path.name}"]
    ops = Recording()
    assert durable.remove(paths[0], ops=ops) == 0
    assert ops.calls == ["unlink", "fsync_dir d1"]


def test_directories_are_synced_into_their_parents(tmp_path: Path) -> None:
    ops = Recording()
    durable.make_dirs(tmp_path / "a" / "b", ops=ops)
    assert ops.calls == ["mkdir a", f"fsync_dir {tmp_path.name}", "mkdir b", "fsync_dir a"]
    assert stat.S_IMODE((tmp_path / "a" / "b").stat().st_mode) == 0o700


def test_directories_that_exist_are_synced_again_below_the_one_that_is_given(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    ops = Recording()
    durable.make_dirs(tmp_path / "a" / "b", below=tmp_path, ops=ops)
    assert [call for call in ops.calls if call.startswith("fsync")] == [f"fsync_dir {tmp_path.name}", "fsync_dir a"]


def test_nothing_is_made_below_a_directory_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        durable.make_dirs(tmp_path / "root" / "a" / "b", below=tmp_path / "root")
    assert entries(tmp_path) == []


def test_a_file_in_the_way_of_a_directory_is_named(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"")
    with pytest.raises(NotADirectoryError, match="/a'"):
        durable.make_dirs(tmp_path / "a")
    with pytest.raises(NotADirectoryError):
        durable.make_dirs(tmp_path / "a" / "b", below=tmp_path)


def test_a_file_system_without_fsync_for_directories_is_tolerated_and_an_error_of_one_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(code: int) -> Callable[[int], None]:
        def fsync(fd: int) -> None:
            raise OSError(code, os.strerror(code))

        return fsync

    monkeypatch.setattr(os, "fsync", failing(errno.EINVAL))
    durable.fsync_dir(tmp_path)
    monkeypatch.setattr(os, "fsync", failing(errno.EIO))
    with pytest.raises(OSError, match=r"Errno 5"):
        durable.fsync_dir(tmp_path)


# ---- temporary files


def test_only_dead_and_old_temporary_files_are_cleaned(tmp_path: Path) -> None:
    old = 10_000
    for name in ["other", "young", TEMP_PREFIX + "old", TEMP_PREFIX + "young", TEMP_PREFIX + "locked"]:
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / (TEMP_PREFIX + "directory")).mkdir()
    (tmp_path / (TEMP_PREFIX + "link")).symlink_to(tmp_path / "other")
    os.mkfifo(tmp_path / (TEMP_PREFIX + "pipe"))
    for name in ["other", TEMP_PREFIX + "old", TEMP_PREFIX + "locked", TEMP_PREFIX + "directory", TEMP_PREFIX + "pipe"]:
        os.utime(tmp_path / name, (1, old))
    with (tmp_path / (TEMP_PREFIX + "locked")).open("rb") as locked:
        fcntl.flock(locked, fcntl.LOCK_EX)
        assert durable.clean_temps(tmp_path) == 1
        kept = ["directory", "link", "locked", "pipe", "young"]
        assert entries(tmp_path) == [*(TEMP_PREFIX + name for name in kept), "other", "young"]
    assert durable.clean_temps(tmp_path) == 1
    assert durable.clean_temps(tmp_path / "missing") == 0


def test_what_a_killed_writer_left_is_cleaned_and_what_a_live_one_writes_is_not(tmp_path: Path) -> None:
    program = f"""
import sys
from pathlib import Path
from novafs import durable
class Waiting(durable.FileOps):
    def link(self, source, target):
        print("here", flush=True)
        sys.stdin.read()
durable.write_new(Path({str(tmp_path)!r}) / "a", b"x", ops=Waiting())
"""
    writer = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"here\n"
        assert len(entries(tmp_path)) == 1
        assert durable.clean_temps(tmp_path, older_than_s=-1) == 0
        writer.kill()
    assert durable.clean_temps(tmp_path, older_than_s=-1) == 1
    assert entries(tmp_path) == []


def test_a_writer_whose_file_is_cleaned_before_it_has_locked_it_takes_another(tmp_path: Path) -> None:
    cleaned: list[int] = []

    class Raced(FileOps):
        def create(self, path: Path, mode: int) -> int:
            fd = super().create(path, mode)
            if len(cleaned) < 3:
                cleaned.append(durable.clean_temps(tmp_path, older_than_s=-1))
            return fd

    durable.write_new(tmp_path / "a", b"x", ops=Raced())
    assert cleaned == [1, 1, 1]
    assert entries(tmp_path) == ["a"]


def test_cleaning_all_the_time_disturbs_no_writer(tmp_path: Path) -> None:
    stop = threading.Event()

    def clean() -> None:
        while not stop.is_set():
            durable.clean_temps(tmp_path, older_than_s=-1)

    with ThreadPoolExecutor(5) as pool:
        cleaning = pool.submit(clean)
        try:
            list(pool.map(lambda number: durable.write_new(tmp_path / str(number), b"%d" % number), range(100)))
        finally:
            stop.set()
        cleaning.result()
    assert all((tmp_path / str(number)).read_bytes() == b"%d" % number for number in range(100))
    assert len(entries(tmp_path)) == 100


def test_a_file_system_without_locks_still_takes_files_and_their_leftovers_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(fd: object, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    durable.write_new(tmp_path / "a", b"x")
    (tmp_path / (TEMP_PREFIX + "left")).write_bytes(b"x")
    assert durable.clean_temps(tmp_path, older_than_s=-1) == 0
    assert entries(tmp_path) == [TEMP_PREFIX + "left", "a"]
