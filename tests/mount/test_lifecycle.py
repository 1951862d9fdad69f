"""How a mount begins and ends: signals, unmounting from outside, death, and what stands in the way of a start."""

from __future__ import annotations

import errno
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from novafs.control import call
from novafs.errors import MountError
from novafs.mounttable import mount_at
from novafs.statedir import CONTROL_SOCKET
from novafs_mount import mountpoint
from tests.support.engine import make_volume
from tests.support.mounted import Mount, mounted, running

pytestmark = pytest.mark.fuse

CAP_SYS_RESOURCE = 24


def new_volume(directory: Path) -> str:
    return trio.run(lambda: make_volume(f"file://{directory / 'store'}"))


def start(url: str, path: Path, directory: Path, *arguments: str) -> tuple[int, str]:
    """A mount that is expected to fail: exit status and stderr."""
    words = [sys.executable, "-m", "novafs.cli", "mount", url, str(path), "--foreground", "--state-dir", str(directory / "state")]
    done = subprocess.run([*words, "--l2-url", "none", *arguments], capture_output=True, text=True, timeout=60)
    return done.returncode, done.stderr


def content_after(url: str, directory: Path, name: str) -> bytes:
    with mounted(directory, url=url) as mount:
        return (mount.path / name).read_bytes()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_unmounts_and_commits(tmp_path: Path, number: signal.Signals) -> None:
    with mounted(tmp_path) as mount:
        (mount.path / "a.raw").write_bytes(b"content")
        mount.signal(number)
        assert mount.wait() == 0, mount.text
        assert mount_at(mount.path) is None
        assert os.listdir(mount.path) == []
    assert content_after(mount.url, tmp_path, "a.raw") == b"content"


def test_a_signal_with_open_files_serves_them_until_they_are_closed(tmp_path: Path) -> None:
    with mounted(tmp_path, "-o", "busy_timeout=600") as mount:
        file = (mount.path / "a.raw").open("w+b", buffering=0)
        file.write(b"before ")
        mount.signal(signal.SIGTERM)
        line = mount.wait_log("is busy")
        assert "a.raw" in line
        assert "1 open image" in line
        # Gone for newcomers, served for who is there.
        while mount_at(mount.path) is not None:
            time.sleep(0.01)
        file.write(b"and after")
        file.seek(0)
        assert file.read() == b"before and after"
        file.close()
        assert mount.wait() == 0, mount.text
    assert content_after(mount.url, tmp_path, "a.raw") == b"before and after"


def test_a_second_signal_cuts_open_files_off_and_loses_nothing(tmp_path: Path) -> None:
    with mounted(tmp_path, "-o", "busy_timeout=600") as mount:
        fd = os.open(mount.path / "a.raw", os.O_RDWR | os.O_CREAT)
        os.write(fd, b"written, never closed")
        for _ in range(2):
            mount.signal(signal.SIGTERM)
            mount.wait_log("is busy")
        mount.signal(signal.SIGTERM)
        assert mount.wait() == 0, mount.text
        with pytest.raises(OSError) as found:
            os.pread(fd, 10, 0)
        assert found.value.errno == errno.ENOTCONN
        with pytest.raises(OSError):
            os.close(fd)
    assert content_after(mount.url, tmp_path, "a.raw") == b"written, never closed"


def test_open_files_are_cut_off_when_their_time_is_over(tmp_path: Path) -> None:
    with mounted(tmp_path, "-o", "busy_timeout=0.1") as mount:
        fd = os.open(mount.path / "a.raw", os.O_RDWR | os.O_CREAT)
        os.write(fd, b"written, never closed")
        mount.signal(signal.SIGTERM)
        assert mount.wait() == 0, mount.text
        with pytest.raises(OSError):
            os.close(fd)
    assert content_after(mount.url, tmp_path, "a.raw") == b"written, never closed"


def test_a_hangup_ends_nothing(mounted: Mount) -> None:
    mounted.signal(signal.SIGHUP)
    mounted.wait_log("SIGHUP: no setting that can change now has changed")
    (mounted.path / "a.raw").write_bytes(b"still here")


def test_unmounting_from_outside_commits_and_ends_well(tmp_path: Path) -> None:
    with mounted(tmp_path) as mount:
        path = mount.path / "a.raw"
        with path.open("wb") as file:
            file.write(b"x" * 3_000_000)
            busy = subprocess.run(["fusermount3", "-u", str(mount.path)], capture_output=True, text=True)
            assert busy.returncode != 0
        mount.unmount()
        assert mount.wait() == 0, mount.text
    assert content_after(mount.url, tmp_path, "a.raw") == b"x" * 3_000_000


def test_a_lazy_unmount_from_outside_waits_for_the_last_close(tmp_path: Path) -> None:
    with mounted(tmp_path) as mount:
        with (mount.path / "a.raw").open("w+b", buffering=0) as file:
            subprocess.run(["fusermount3", "-uz", str(mount.path)], check=True)
            file.write(b"written after it was detached")
        assert mount.wait() == 0, mount.text
    assert content_after(mount.url, tmp_path, "a.raw") == b"written after it was detached"


def test_a_dead_mount_is_detached_and_mounted_again(tmp_path: Path) -> None:
    url = new_volume(tmp_path)
    with running(url, tmp_path / "mnt", tmp_path / "state") as mount:
        with (mount.path / "a.raw").open("wb") as file:
            file.write(b"committed")
            os.fsync(file.fileno())
        mount.process.kill()
        mount.wait()
        with pytest.raises(OSError) as found:
            os.listdir(mount.path)
        assert found.value.errno == errno.ENOTCONN
        with mounted(tmp_path, url=url) as again:
            assert "daemon that has died" in again.text
            assert (again.path / "a.raw").read_bytes() == b"committed"


@pytest.fixture
def connections() -> Iterator[Path]:
    """/sys/fs/fuse/connections, mounted where it is not (systemd does that on a real host)."""
    directory = Path("/sys/fs/fuse/connections")
    ours = mount_at(directory) is None
    if ours:
        done = subprocess.run(["mount", "-t", "fusectl", "none", str(directory)], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"fusectl is not mounted, and can not be: {done.stderr.strip()}")
    yield directory
    if ours:
        subprocess.run(["umount", str(directory)], check=True)


def test_an_aborted_connection_commits_and_fails(tmp_path: Path, connections: Path) -> None:
    url = new_volume(tmp_path)
    with running(url, tmp_path / "mnt", tmp_path / "state") as mount:
        assert "background requests" in mount.text
        abort = connections / str(os.minor(mount.path.stat().st_dev)) / "abort"
        fd = os.open(mount.path / "a.raw", os.O_RDWR | os.O_CREAT)
        os.write(fd, b"written before the abort")
        abort.write_text("1")
        assert mount.wait() == 1
        assert "has broken" in mount.text
        assert "Traceback" not in mount.text
        assert mount_at(mount.path) is None
        with pytest.raises(OSError):
            os.close(fd)
    assert content_after(url, tmp_path, "a.raw") == b"written before the abort"


def test_a_mount_point_that_is_missing_busy_or_a_file_is_refused(tmp_path: Path) -> None:
    url = new_volume(tmp_path)
    status, said = start(url, tmp_path / "none", tmp_path)
    assert (status, "mkdir -p" in said) == (1, True), said
    (tmp_path / "file").write_bytes(b"")
    status, said = start(url, tmp_path / "file", tmp_path)
    assert (status, "is not a directory" in said) == (1, True), said
    with mounted(tmp_path, url=url) as mount:
        (tmp_path / "other").mkdir()
        status, said = start(new_volume(tmp_path / "other"), mount.path, tmp_path / "other")
        assert (status, "is busy" in said) == (1, True), said
        (mount.path / "a.raw").write_bytes(b"unharmed")


def test_no_volume_no_mount(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "mnt").mkdir()
    status, said = start(f"file://{tmp_path / 'empty'}", tmp_path / "mnt", tmp_path)
    assert status == 1
    assert "novafs init" in said
    assert mount_at(tmp_path / "mnt") is None


def test_a_signal_while_the_volume_is_being_opened_ends_the_start(tmp_path: Path) -> None:
    """The store is a port that accepts and never answers."""
    import socket

    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        silent.settimeout(60)
        silent.settimeout(60)
        url = f"s3://bucket/volume?endpoint=http://127.0.0.1:{silent.getsockname()[1]}&region=us-east-1"
        (tmp_path / "mnt").mkdir()
        mount = Mount(
            url, tmp_path / "mnt", tmp_path / "state", ["--l2-url", "none"], {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}
        )
        try:
            connection, _ = silent.accept()
            mount.signal(signal.SIGTERM)
            assert mount.wait() == 0, mount.text
            assert "stopped before" in mount.text
            connection.close()
        finally:
            mount.clean_up()


def test_the_control_socket_answers(mounted: Mount) -> None:
    socket = mounted.state_dir / CONTROL_SOCKET
    assert stat.S_IMODE(socket.stat().st_mode) == 0o600
    with (mounted.path / "a.raw").open("wb"):
        found = call(socket, "stats")
        assert found["mount"]["handles"] == 1
        assert found["mount"]["mountpoint"] == str(mounted.path)
        assert found["mount"]["pid"] == mounted.process.pid
    assert call(socket, "ping")["pid"] == mounted.process.pid


def test_a_daemon_that_may_is_spared_by_reclaim_and_by_the_oom_killer(mounted: Mount) -> None:
    status = Path(f"/proc/{mounted.process.pid}/status").read_text()
    capabilities = next(int(line.split()[1], 16) for line in status.splitlines() if line.startswith("CapEff:"))
    may = bool(capabilities >> CAP_SYS_RESOURCE & 1)
    assert (int(Path(f"/proc/{mounted.process.pid}/oom_score_adj").read_text()) == -900) == may
    assert ("IO flusher" in mounted.text) == may


def test_buffered_reads_come_in_requests_of_one_mebibyte(mounted: Mount) -> None:
    read_ahead = Path(f"/sys/class/bdi/0:{os.minor(mounted.path.stat().st_dev)}/read_ahead_kb")
    assert read_ahead.read_text().strip() == ("1024" if os.geteuid() == 0 else "128")


def test_the_kernel_forgets_and_so_does_the_daemon(mounted: Mount) -> None:
    """Lookup counts: after the kernel drops its caches the daemon holds the root and what is open."""
    if os.geteuid() != 0:
        pytest.skip("needs root to drop caches")
    for number in range(100):
        (mounted.path / f"{number}").mkdir()
        (mounted.path / f"{number}").rename(mounted.path / f"renamed-{number}")
    os.listdir(mounted.path)
    socket = mounted.state_dir / CONTROL_SOCKET
    assert call(socket, "stats")["mount"]["nodes"] >= 100
    with (mounted.path / "a.raw").open("wb"):
        Path("/proc/sys/vm/drop_caches").write_text("2")
        deadline = time.monotonic() + 30
        while call(socket, "stats")["mount"]["nodes"] > 3 and time.monotonic() < deadline:
            Path("/proc/sys/vm/drop_caches").write_text("2")
        assert call(socket, "stats")["mount"]["nodes"] <= 3


def test_a_live_mount_with_the_number_of_the_dead_one_is_not_taken_for_it(tmp_path: Path) -> None:
    """Another daemon has replaced the dead mount meanwhile, and the kernel has given its device number to that."""
    with mounted(tmp_path) as mount:
        (mount.path / "a.raw").write_bytes(b"content")
        with pytest.raises(MountError, match="is busy"):
            mountpoint.clear(mount.path, dead=mountpoint.device_of(mount.path))
        assert (mount.path / "a.raw").read_bytes() == b"content"


def test_what_was_written_below_a_dead_mount_that_somebody_took_away_is_not_hidden_without_a_word(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "written.raw").write_bytes(b"below")
    mountpoint.clear(tmp_path, dead=(0, 1 << 19))
    assert "the mount hides what is in it (written.raw)" in caplog.text
