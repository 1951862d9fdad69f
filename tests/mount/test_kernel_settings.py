"""What the kernel is told of a mount, and what it keeps of a file from one open to the next: settings and requests, counted."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest

from novafs import configkeys
from novafs.control import call
from novafs.statedir import CONTROL_SOCKET
from novafs_mount import host
from tests.support.cli import novafs
from tests.support.mounted import Mount, mounted

pytestmark = pytest.mark.fuse

CONTENT = os.urandom(4 << 20)


def settings(mount: Mount) -> tuple[str, ...]:
    """read_ahead_kb, max_background, congestion_threshold; the last two where the kernel shows them (fusectl)."""
    minor = os.minor(mount.path.stat().st_dev)
    control = Path(f"/sys/fs/fuse/connections/{minor}")
    files = [Path(f"/sys/class/bdi/0:{minor}/read_ahead_kb"), control / "max_background", control / "congestion_threshold"]
    return tuple(path.read_text().strip() for path in files if path.exists())


def expected(*values: str) -> tuple[str, ...]:
    """What a mount has with these: the kernel's own where it may set none."""
    values = values if os.geteuid() == 0 else ("128", "12", "9")
    return values if Path("/sys/fs/fuse/connections").exists() and os.listdir("/sys/fs/fuse/connections") else values[:1]


def reads(mount: Mount) -> int:
    """READ requests so far."""
    traffic = call(mount.state_dir / CONTROL_SOCKET, "stats")["traffic"]
    return int(traffic["memory_reads"] + traffic["waited_reads"])


def test_the_defaults_are_those_of_the_configuration_and_say_so(tmp_path: Path) -> None:
    defaults = [configkeys.BY_NAME[name] for name in ("kernel.read_ahead", "kernel.background_max")]
    assert [key.kind.parse(key.default) for key in defaults] == [host.READ_AHEAD_BYTES, host.BACKGROUND_MAX]
    with mounted(tmp_path) as mount:
        assert settings(mount) == expected("1024", "128", "96")
        if os.geteuid() == 0:
            assert "read-ahead 1024 KiB" in mount.text


def test_settings_are_set_at_the_mount_and_by_a_reload(tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text('[kernel]\nread_ahead = "256KiB"\nbackground_max = 40\n')
    with mounted(tmp_path, "--config", str(file)) as mount:
        assert settings(mount) == expected("256", "40", "30")
        file.write_text('[kernel]\nread_ahead = "4MiB"\nbackground_max = 1\n')
        assert novafs("reload", mount.path) == "changed kernel.read_ahead, kernel.background_max\n"
        assert settings(mount) == expected("4096", "1", "1")
        file.write_text('[kernel]\nread_ahead = "0"\nbackground_max = 65535\n')
        novafs("reload", mount.path)
        assert settings(mount) == expected("0", "65535", "49151")
        (mount.path / "a.raw").write_bytes(CONTENT)
        assert (mount.path / "a.raw").read_bytes() == CONTENT


def test_what_may_not_be_set_is_a_line_for_debugging_and_no_error(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, logger="novafs_mount"):
        assert host.tune_mount(0, 1 << 20, read_ahead_bytes=1 << 20, background_max=64) == []
    assert [record.levelname for record in caplog.records] == ["DEBUG", "DEBUG"]
    assert "read_ahead_kb: No such file or directory" in caplog.text


def test_a_second_read_is_served_by_the_page_cache_also_through_another_open(tmp_path: Path) -> None:
    with mounted(tmp_path) as mount:
        path = mount.path / "a.raw"
        path.write_bytes(CONTENT)
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        before = reads(mount)
        assert path.read_bytes() == CONTENT
        first = reads(mount)
        assert first > before
        for _ in range(3):
            assert path.read_bytes() == CONTENT
        with path.open("rb") as one, path.open("rb") as other:
            assert one.read() == other.read() == CONTENT
        with path.open("r+b") as file:
            assert file.read() == CONTENT
        assert path.read_bytes() == CONTENT
        assert reads(mount) == first, "the content has not changed: the kernel has it"


def test_what_was_written_here_is_kept_and_nothing_older(tmp_path: Path) -> None:
    with mounted(tmp_path) as mount:
        path = mount.path / "a.raw"
        path.write_bytes(CONTENT)
        assert path.read_bytes() == CONTENT
        with path.open("r+b") as file:
            file.seek(1 << 20)
            file.write(b"new")
        wanted = CONTENT[: 1 << 20] + b"new" + CONTENT[(1 << 20) + 3 :]
        assert path.read_bytes() == wanted
        before = reads(mount)
        for _ in range(2):
            assert path.read_bytes() == wanted
        assert reads(mount) == before
