"""A mount as systemd runs it: what it tells over the notification socket, a reload, a configuration that is wrong, the end."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from novafs.cli import main
from novafs.mounttable import mount_at
from tests.support.cli import novafs
from tests.support.engine import make_volume
from tests.support.mounted import Mount, running

pytestmark = pytest.mark.fuse


class Manager:
    """systemd's end of NOTIFY_SOCKET."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(path))
        self.heard: list[str] = []

    def wait(self, wanted: str, *, timeout_s: float = 60) -> str:
        """The next message that begins with `wanted`."""
        self._socket.settimeout(timeout_s)
        while True:
            self.heard.append(self._socket.recv(4096).decode())
            if self.heard[-1].startswith(wanted):
                return self.heard[-1]

    def silent(self, for_s: float) -> bool:
        """Whether no sign of life comes in this time (what is on its way is taken first)."""
        self._socket.settimeout(0.2)
        try:
            while True:
                self._socket.recv(4096)
        except TimeoutError:
            pass
        self._socket.settimeout(for_s)
        try:
            return not self._socket.recv(4096).startswith(b"WATCHDOG=1")
        except TimeoutError:
            return True


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Manager]:
    found = Manager(tmp_path / "notify")
    yield found
    found._socket.close()


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    url = trio.run(lambda: make_volume(f"file://{tmp_path / 'store'}"))
    (tmp_path / "etc").mkdir()
    file = tmp_path / "etc/web.toml"
    file.write_text(f'volume = "{url}"\nmountpoint = "{tmp_path}/images/web"\nmetrics = "off"\n[writeback]\ninterval = "1h"\n')
    return file


def supervised(file: Path, manager: Manager, *, watchdog_s: float | None = None) -> Mount:
    """Mounted as the unit does it, in the foreground."""
    environ: dict[str, str | None] = {"NOTIFY_SOCKET": str(manager.path), "NOVAFS_CONFIG_DIR": str(file.parent), "HOME": str(file.parent)}
    if watchdog_s is not None:
        environ["WATCHDOG_USEC"] = str(int(watchdog_s * 1e6))
    base = file.parent.parent
    (base / "images/web").mkdir(parents=True, exist_ok=True)
    return Mount("web", base / "images/web", base / "state", ["--l2-url", "none", "--l1-capacity", "64MiB"], environ)


def test_ready_means_that_the_mount_answers_and_the_end_that_everything_is_stored(config_file: Path, manager: Manager) -> None:
    mount = supervised(config_file, manager)
    try:
        manager.wait("READY=1")
        assert os.listdir(mount.path) == []
        assert any(line.startswith("STATUS=opening web") for line in manager.heard)
        assert any(line.startswith("EXTEND_TIMEOUT_USEC=") for line in manager.heard)
        assert f"STATUS=serving {mount.path}: 0 files open; everything stored" in manager.heard
        fd = os.open(mount.path / "a.raw", os.O_WRONLY | os.O_CREAT)
        os.write(fd, b"x" * (3 << 20))
        assert re.search(r": 1 file open; \S+ MiB of 1 image to store, the oldest \S+ s old$", manager.wait("STATUS=serving"))
        mount.signal(signal.SIGTERM)
        manager.wait("STOPPING=1")
        assert manager.wait("STATUS=unmounting") == f"STATUS=unmounting {mount.path}"
        assert "waiting at most 10 s for what is open in it" in manager.wait("STATUS=unmounting")
        mount.signal(signal.SIGTERM)
        assert "is unmounted; " in manager.wait("STATUS=")
        with pytest.raises(OSError, match=r"abort|not connected"):
            os.close(fd)
        assert mount.wait() == 0, mount.text
        assert "ended with status 0, everything is stored" in mount.text
    finally:
        mount.clean_up()


def test_the_watchdog_is_fed_while_the_mount_answers_and_only_then(config_file: Path, manager: Manager) -> None:
    mount = supervised(config_file, manager, watchdog_s=0.6)
    try:
        for _ in range(3):
            manager.wait("WATCHDOG=1")
        mount.signal(signal.SIGSTOP)
        assert manager.silent(1.0)
        mount.signal(signal.SIGCONT)
        manager.wait("WATCHDOG=1")
        # What systemd does to a daemon that hangs.
        mount.signal(signal.SIGABRT)
        assert mount.wait() == -signal.SIGABRT
        assert "Fatal Python error: Aborted" in mount.text and "most recent call first" in mount.text
    finally:
        mount.clean_up()


def test_a_reload_changes_what_can_change_and_refuses_what_is_wrong_as_a_whole(config_file: Path, manager: Manager) -> None:
    mount = supervised(config_file, manager)
    environ = {"NOVAFS_CONFIG_DIR": str(config_file.parent), "HOME": str(config_file.parent)}
    try:
        manager.wait("READY=1")
        before = config_file.read_text()
        config_file.write_text('durability = "store"\n' + before.replace('"1h"', '"2s"') + '[log]\nlevel = "debug"\n')
        assert (
            novafs("reload", "web", environ=environ)
            == "changed log.level, writeback.interval; takes effect at the next mount: durability\n"
        )
        assert manager.wait("RELOADING=1") and manager.wait("READY=1")
        config_file.write_text(before.replace('"1h"', '"soon"'))
        mount.signal(signal.SIGHUP)
        line = mount.wait_log("SIGHUP: nothing was changed")
        assert f"{config_file} line 5: writeback.interval: 'soon' is no duration; allowed: " in line
        command = [sys.executable, "-m", "novafs.cli", "reload", str(mount.path)]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environ})
        assert done.returncode == 2 and "line 5: writeback.interval" in done.stderr
        for broken in ("x = " + "[" * 5000, "l1.capacity = " + "9" * 5000):
            config_file.write_text(before + broken)
            mount.signal(signal.SIGHUP)
            mount.wait_log("SIGHUP: nothing was changed.*is no TOML file")
        config_file.write_text(before)
        mount.signal(signal.SIGHUP)
        mount.wait_log("SIGHUP: changed log.level, writeback.interval$")
        mount.signal(signal.SIGTERM)
        assert mount.wait() == 0
    finally:
        mount.clean_up()


def test_a_name_means_the_mount_of_its_own_file(config_file: Path, manager: Manager) -> None:
    """Two directories of configuration may each have a web.toml."""
    mount = supervised(config_file, manager)
    other = config_file.parent.parent / "other"
    other.mkdir()
    (other / "web.toml").write_text(config_file.read_text())
    environ = {"NOVAFS_CONFIG_DIR": str(other), "HOME": str(other), "NOVAFS_STATE_DIR": str(other)}
    try:
        manager.wait("READY=1")
        command = [sys.executable, "-m", "novafs.cli", "reload"]
        done = subprocess.run([*command, "web"], capture_output=True, text=True, env={**os.environ, **environ})
        assert done.returncode == 1
        # Other tests that run at this time may have a mount by that name, too.
        assert done.stderr.startswith(f"novafs: no web of {other}/web.toml is mounted on this host (")
        assert f"the one at {mount.path} was mounted from {config_file}" in done.stderr
        assert done.stderr.endswith("): name the directory instead, novafs reload DIR\n")
        assert "no setting that can change" in novafs("reload", "web", "--config", config_file, environ=environ)
        assert "no setting that can change" in novafs("reload", mount.path, environ=environ)
        mount.signal(signal.SIGTERM)
        assert mount.wait() == 0
    finally:
        mount.clean_up()


def test_without_a_directory_it_is_mounted_where_the_file_says(config_file: Path) -> None:
    base = config_file.parent.parent
    environ = {"NOVAFS_CONFIG_DIR": str(config_file.parent), "NOVAFS_STATE_DIR": str(base / "state"), "NOVAFS_L2_URL": "none"}
    config_file.write_text('mount_options = "uid=4321"\n' + config_file.read_text())
    umask = os.umask(0o077)  # the unit's
    try:
        assert f"web is mounted at {base}/images/web (process" in novafs("mount", "web", "-o", "gid=4322", environ=environ)
    finally:
        os.umask(umask)
    assert (base / "images").stat().st_mode & 0o777 == 0o755, "a hypervisor's own user must get in"
    found = (base / "images/web").stat()
    assert (found.st_uid, found.st_gid) == (4321, 4322)
    novafs("umount", base / "images/web")
    config_file.write_text(config_file.read_text().replace("/images/web", "/etc/web.toml/x"))
    novafs("mount", "web", environ=environ, status=1)
    novafs("mount", f"file://{base}/store", environ=environ, status=2)


def test_what_is_not_mounted_can_not_be_reloaded(config_file: Path) -> None:
    environ = {"NOVAFS_CONFIG_DIR": str(config_file.parent), "HOME": str(config_file.parent), "NOVAFS_STATE_DIR": str(config_file.parent)}
    command = [sys.executable, "-m", "novafs.cli", "reload", "web"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environ})
    assert (done.returncode, done.stderr) == (1, "novafs: web is not mounted on this host: there is nothing to reload\n")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[l1]\ncapcity = 3\n", r"{file} line 7: unknown key 'l1.capcity'; did you mean 'l1.capacity'\?"),
        ("[log]\nlevel = 3\n", r"{file} line 7: log.level: found 3, a whole number; allowed: one of error, warning, info, debug"),
        ("[l1]\ncapacity = \n", r"{file} is no TOML file: .*line 7"),
        ("[log]\n[log]\n", r"{file} is no TOML file: .*line 7"),
    ],
)
def test_a_mistake_in_the_file_ends_the_unit_with_status_2_and_says_where(
    config_file: Path, text: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config_file.write_text(config_file.read_text() + text)
    monkeypatch.setenv("NOVAFS_CONFIG_DIR", str(config_file.parent))
    assert main(["mount", "--foreground", "web"]) == 2
    assert re.fullmatch(f"novafs: {message.format(file=config_file)}.*\n", capsys.readouterr().err)
    assert "RestartPreventExitStatus=2 3\n" in (Path(__file__).resolve().parents[2] / "systemd/novafs@.service").read_text()


def test_options_of_the_file_must_be_options_of_a_mount(
    config_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config_file.write_text('mount_options = "ro,l1_capacity=8M"\n' + config_file.read_text())
    monkeypatch.setenv("NOVAFS_CONFIG_DIR", str(config_file.parent))
    assert main(["mount", "--foreground", "web"]) == 2
    assert "line 1: mount_options: l1.capacity is a key of its own; allowed: options of a mount" in capsys.readouterr().err


def test_a_metrics_port_that_is_taken_is_named(config_file: Path, manager: Manager) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        config_file.write_text(config_file.read_text().replace('"off"', f'"127.0.0.1:{port}"'))
        mount = supervised(config_file, manager)
        assert mount.wait() == 2, mount.text
        mount.wait_log(rf"port {port} of 127\.0\.0\.1 is in use")
    assert mount_at(mount.path) is None


@pytest.mark.parametrize("format_", ["logfmt", "journal"])
def test_each_line_of_a_mounts_log_is_one_event(format_: str, tmp_path: Path) -> None:
    url = trio.run(lambda: make_volume(f"file://{tmp_path / 'store'}"))
    with running(url, tmp_path / "mnt", tmp_path / "state", "--log-format", format_, "--log-level", "debug") as mount:
        with pytest.raises(FileNotFoundError):
            os.stat(mount.path / "no such\nimage")
        mount.unmount()
        assert mount.wait() == 0
    begin = {"logfmt": "time=20", "journal": "<"}[format_]
    lines = [line for line in mount.log if not line.startswith(f"novafs: {url} is mounted")]
    assert all(line.startswith(begin) for line in lines), mount.text
    assert any("ENOENT" in line for line in lines)
