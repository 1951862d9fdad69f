"""Bad input gets a clear error and loses nothing: exit status and message of every such case that concerns commands.

Each test ends with a look at the volume: the image that was there before is still there, byte for byte, and nothing else is.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import secrets
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from novafs.superblock import FORMAT
from tests.support.ceph import Ceph, free_port
from tests.support.cli_fixtures import Cli, LocalVolume
from tests.support.fixtures import BUCKET

IMAGE_BYTES = 1 << 20


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "good.raw"
    path.write_bytes(random.Random(9).randbytes(IMAGE_BYTES))
    return path


@pytest.fixture
def volume(local_volume: LocalVolume, disk: Path, tmp_path: Path) -> Iterator[LocalVolume]:
    """A volume with one image, which the test must leave as it is."""
    local_volume("import", disk, "good.raw")
    yield local_volume
    assert local_volume.names() == ["good.raw"]
    local_volume("export", "good.raw", tmp_path / "after.raw", "--force")
    assert (tmp_path / "after.raw").read_bytes() == disk.read_bytes()
    temporary = [path.name for path in local_volume.state.iterdir() if path.name.startswith(("import-", ".novafs-tmp"))]
    assert temporary == [], "something half done was left in the state directory"


EVERY_COMMAND: list[tuple[str, ...]] = [
    ("init",),
    ("import", "/dev/null"),
    ("export", "good.raw", "/nonexistent/out"),
    ("ls",),
    ("info",),
    ("rm", "good.raw"),
    ("stats",),
    ("mount", "/mnt"),
]


# --- the volume -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", EVERY_COMMAND, ids=lambda arguments: arguments[0])
def test_an_unknown_url_scheme(command: Cli, arguments: tuple[str, ...]) -> None:
    name, *rest = arguments
    message = command.fails(name, "s4://bucket/prefix", *rest, status=2)
    assert message == "URL scheme s4:// is unknown: known are file://, s3://; did you mean s3?"


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("file://relative/path", "file://relative… names a host: write three slashes for an absolute path"),
        ("s3://b", "'b' is no bucket name"),
        ("s3://bucket/x?enpoint=http://h", "option 'enpoint' of an s3:// URL is unknown: known are ca_bundle, endpoint, path_style"),
        ("s3://bucket/x?endpoint=h:7480", "endpoint=h:7480 of an s3:// URL: expected http://HOST:PORT or https://HOST:PORT"),
        ("s3://key:secret@bucket/x", "a volume's s3:// URL has credentials in it; leave them out"),
        ("srv/volume", "'srv/volume' is neither a URL (file:///…, s3://…) nor the name of a file in /etc/novafs"),
        ("no-such-name", "no file /etc/novafs/no-such-name.toml gives 'no-such-name' a meaning: write the volume's URL instead"),
    ],
)
def test_a_url_that_is_none(command: Cli, url: str, message: str) -> None:
    said = command.fails("ls", url, status=2)
    assert said.startswith(message)
    assert "secret@" not in said


@pytest.mark.parametrize("arguments", EVERY_COMMAND[2:7], ids=lambda arguments: arguments[0])
def test_a_directory_that_is_no_volume(command: Cli, tmp_path: Path, arguments: tuple[str, ...]) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    name, *rest = arguments
    options = ("--state-dir", tmp_path / "state", "--l2-url", "none")
    message = command.fails(name, f"file://{empty}", *rest, *options)
    assert message == f"file://{empty}: there is no NovaFS volume here (novafs.json is missing); 'novafs init file://{empty}' makes one"
    assert list(empty.iterdir()) == []
    missing = command.fails(name, f"file://{tmp_path}/missing", *rest, *options)
    assert missing.startswith(f"the directory {tmp_path}/missing does not exist")
    assert not (tmp_path / "missing").exists()


def test_a_volume_of_a_newer_format(volume: LocalVolume) -> None:
    superblock = volume.root / "novafs.json"
    good = superblock.read_bytes()
    superblock.chmod(0o600)
    superblock.write_text(json.dumps({**json.loads(good), "format": 99}))
    assert volume.fails("ls") == f"{volume.url}: the volume has format 99, this NovaFS reads up to {FORMAT}; upgrade NovaFS"
    superblock.write_bytes(good[:-20])
    assert "novafs.json does not parse" in volume.fails("ls")
    superblock.write_bytes(good)


def test_a_volume_that_is_there_is_not_made_again(volume: LocalVolume) -> None:
    assert volume.fails("init") == f"{volume.url}: there is a NovaFS volume here already; 'novafs info' shows it"
    assert volume.fails("init", "--chunk-size", "4K") == f"{volume.url}: there is a NovaFS volume here already; 'novafs info' shows it"


# --- sources --------------------------------------------------------------------------------------------------


def source_cases() -> dict[str, tuple[Callable[[Path], None], str]]:
    """By name: how the source is made, and what must be said of it."""
    gpt = b"EFI PART".ljust(32, b"\0") + (1 << 20).to_bytes(8, "little")
    return {
        "missing": (lambda _: None, "{}: no such file"),
        "directory": (lambda path: path.mkdir(), "{} is a directory: expected a disk image, a block device, or - for standard input"),
        "empty": (lambda path: path.touch(), "{} is empty: expected a disk image"),
        "text": (lambda path: path.write_text("no image\n") and None, "{} is no disk image: its size of 9 bytes is no multiple of 512"),
        "compressed": (lambda path: path.write_bytes(b"\x1f\x8b\x08".ljust(2048)) and None, "{} is compressed with gzip, not a raw image"),
        "truncated": (
            lambda path: path.write_bytes(bytes(512) + gpt.ljust(7680, b"\0")) and None,
            "{} is cut short: it has 8192 bytes, and its",
        ),
    }


@pytest.mark.parametrize("case", list(source_cases()))
def test_a_source_that_is_no_image_or_truncated(volume: LocalVolume, tmp_path: Path, case: str) -> None:
    make, message = source_cases()[case]
    source = tmp_path / "source"
    make(source)
    assert volume.fails("import", source, "new.raw").startswith(message.format(source))
    assert volume.fails("import", source, "good.raw", "--replace").startswith(message.format(source))


@pytest.mark.qemu
@pytest.mark.parametrize("format_", ["qcow2", "vmdk", "vdi", "vhdx"])
def test_a_truncated_image_of_another_format(volume: LocalVolume, disk: Path, tmp_path: Path, format_: str) -> None:
    source = tmp_path / f"cut.{format_}"
    subprocess.run(["qemu-img", "convert", "-O", format_, disk, source], check=True)
    os.truncate(source, source.stat().st_size * 2 // 3)
    message = volume.fails("import", source)
    assert message.startswith(str(source))
    assert any(word in message for word in ("cut short", "damaged", "truncated"))


@pytest.mark.qemu
def test_a_vmdk_whose_extent_is_missing(volume: LocalVolume, disk: Path, tmp_path: Path) -> None:
    source = tmp_path / "flat.vmdk"
    subprocess.run(["qemu-img", "convert", "-O", "vmdk", "-o", "subformat=monolithicFlat", disk, source], check=True)
    (tmp_path / "flat-flat.vmdk").unlink()
    assert "No such file or directory" in volume.fails("import", source)


def test_a_source_that_shrinks_while_it_is_read(volume: LocalVolume, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "shrinking.raw"
    size = 24 << 20
    source.write_bytes(random.Random(4).randbytes(size))
    real = os.pread

    def pread(fd: int, length: int, at: int) -> bytes:
        if at == 8 << 20:
            os.truncate(source, 9 << 20)
        return real(fd, length, at)

    monkeypatch.setattr("novafs.rawsource.os.pread", pread)
    message = volume.fails("import", source)
    assert message == f"{source} became shorter while it was read: it ends at byte {9 << 20}, expected {size}"


# --- names ----------------------------------------------------------------------------------------------------

BAD_NAMES = [
    ("a/../b", "name '..': empty, '.' and '..' are no names"),
    ("../good.raw", "name '..': empty, '.' and '..' are no names"),
    ("./good.raw", "name '.': empty, '.' and '..' are no names"),
    ("a\0b", "name 'a\\x00b': must not contain '/' or NUL"),
    ("x" * 256, "name 'xxxxx"),
    ("a/" * 3000 + "b", "path 'a/a/"),
    ("a\udcffb", "name 'a\\udcffb': is not valid UTF-8"),
]


@pytest.mark.parametrize(("name", "message"), BAD_NAMES, ids=["dots", "up", "dot", "nul", "long", "deep", "no-utf8"])
def test_a_name_that_no_volume_can_hold(volume: LocalVolume, disk: Path, tmp_path: Path, name: str, message: str) -> None:
    assert volume.fails("import", disk, name, status=2).startswith(message)
    assert volume.fails("export", name, tmp_path / "out", status=2).startswith(message)
    assert volume.fails("rm", name, status=2).startswith(message)
    assert volume.fails("ls", name, status=2).startswith(message)
    assert volume.fails("info", name, status=2).startswith(message)
    assert not (tmp_path / "out").exists()


def test_an_empty_name(volume: LocalVolume, disk: Path) -> None:
    assert volume.fails("import", disk, "", status=2).startswith("name ''")
    assert volume.fails("import", disk, "/", status=2).startswith("name ''")


@pytest.mark.parametrize("source", ["a\0b", "\0"])
def test_a_source_with_nul(volume: LocalVolume, source: str) -> None:
    assert "no path has a NUL character in it" in volume.fails("import", source, "x.raw")


@pytest.mark.parametrize("destination", ["a\0b", "\0"])
def test_a_destination_with_nul(volume: LocalVolume, destination: str) -> None:
    assert "no path has a NUL character in it" in volume.fails("export", "good.raw", destination)


# --- settings -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", EVERY_COMMAND, ids=lambda arguments: arguments[0])
def test_an_unknown_key(command: Cli, tmp_path: Path, arguments: tuple[str, ...]) -> None:
    file = tmp_path / "a.toml"
    file.write_text('[l1]\n\ncapactiy = "1G"\n')
    name, *rest = arguments
    message = command.fails(name, f"file://{tmp_path}/v", *rest, "--config", file, status=2)
    assert message == f"{file} line 3: unknown key 'l1.capactiy'; did you mean 'l1.capacity'?"
    assert not (tmp_path / "v").exists()


@pytest.mark.parametrize("arguments", EVERY_COMMAND, ids=lambda arguments: arguments[0])
@pytest.mark.parametrize("size", ["10 apples", "-1", "1e9", "", "64KK"])
def test_a_size_that_is_no_size(command: Cli, tmp_path: Path, arguments: tuple[str, ...], size: str) -> None:
    name, *rest = arguments
    message = command.fails(name, f"file://{tmp_path}/v", *rest, f"--l1-capacity={size}", status=2)
    assert message == f"--l1-capacity: {size!r} is no size; allowed: a size such as 64K, 10GiB or 10GB, at least 4.0 MiB"
    assert not (tmp_path / "v").exists()


def test_a_redis_url_that_is_none_does_not_show_its_password(volume: LocalVolume) -> None:
    message = volume.command.fails("ls", volume.url, "--state-dir", volume.state, "--l2-url", "redsi://:hunter2@h", status=2)
    assert "redis://" in message
    assert "hunter2" not in message


# --- no space -------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of two mebibytes."""
    place = tmp_path / "small"
    place.mkdir()
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", place], capture_output=True).returncode:
        pytest.skip("a small file system needs root, and the right to mount")
    yield place
    subprocess.run(["umount", place], check=True)


def test_no_space_on_a_local_store(command: Cli, small_disk: Path, disk: Path, tmp_path: Path) -> None:
    url, options = f"file://{small_disk}/v", ("--state-dir", tmp_path / "state", "--l2-url", "none")
    command("init", url, *options)
    command("import", url, disk, "good.raw", *options)
    large = tmp_path / "large.raw"
    large.write_bytes(random.Random(2).randbytes(8 << 20))
    assert "no space" in command.fails("import", url, large, *options).lower()
    assert [row["name"] for row in command.json("ls", url, *options)] == ["good.raw"]
    command("export", url, "good.raw", tmp_path / "after.raw", *options)
    assert (tmp_path / "after.raw").read_bytes() == disk.read_bytes()


def test_no_space_for_an_export(volume: LocalVolume, small_disk: Path, tmp_path: Path) -> None:
    large = tmp_path / "large.raw"
    large.write_bytes(random.Random(2).randbytes(8 << 20))
    volume("import", large, "large.raw")
    assert volume.fails("export", "large.raw", small_disk / "out.raw") == f"no space for {small_disk}/out.raw: No space left on device"
    assert list(small_disk.iterdir()) == []
    volume("rm", "large.raw")


@pytest.mark.qemu
def test_no_space_to_unpack_a_source(volume: LocalVolume, small_disk: Path, tmp_path: Path) -> None:
    large, source = tmp_path / "large.raw", tmp_path / "large.qcow2"
    large.write_bytes(random.Random(2).randbytes(8 << 20))
    subprocess.run(["qemu-img", "convert", "-O", "qcow2", large, source], check=True)
    message = volume.command.fails("import", volume.url, source, "--l2-url", "none", "--state-dir", small_disk / "state")
    assert message == "no space for the unpacked copy of large.qcow2; it lies in the state directory: choose another with --state-dir"


# --- S3 ---------------------------------------------------------------------------------------------------------


class S3Volume:
    """A volume with one image on the real Ceph."""

    def __init__(self, command: Cli, url: str, disk: Path, tmp_path: Path) -> None:
        self.command = command
        self.url = url
        self.options = ("--state-dir", str(tmp_path / "state"), "--l2-url", "none")
        command("init", url, *self.options)
        command("import", url, disk, "good.raw", *self.options)

    def check(self, disk: Path, tmp_path: Path) -> None:
        assert [row["name"] for row in self.command.json("ls", self.url, *self.options)] == ["good.raw"]
        after = tmp_path / secrets.token_hex(4)
        self.command("export", self.url, "good.raw", after, *self.options)
        assert hashlib.sha256(after.read_bytes()).digest() == hashlib.sha256(disk.read_bytes()).digest()


@pytest.mark.s3
@pytest.mark.parametrize(
    "arguments", [case for case in EVERY_COMMAND if case[0] not in ("import", "mount")], ids=lambda arguments: arguments[0]
)
def test_a_bucket_that_is_missing(command: Cli, ceph_rgw: Ceph, tmp_path: Path, arguments: tuple[str, ...]) -> None:
    name, *rest = arguments
    url = ceph_rgw.volume_url("no-such-bucket", "v")
    message = command.fails(name, url, *rest, "--state-dir", tmp_path / "state", "--l2-url", "none")
    assert "no-such-bucket" in message
    assert "make the bucket first, or correct the URL" in message


@pytest.mark.s3
def test_credentials_that_are_refused(
    command: Cli, ceph_rgw: Ceph, s3_url: str, disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    volume = S3Volume(command, s3_url, disk, tmp_path)
    secret = secrets.token_hex(20)
    for name, key in (("a wrong secret", ceph_rgw.credentials.access_key), ("an unknown key", "NOBODYSKEY1234567890")):
        with monkeypatch.context() as patch:
            patch.setenv("AWS_ACCESS_KEY_ID", key)
            patch.setenv("AWS_SECRET_ACCESS_KEY", secret)
            for arguments in (("ls",), ("import", disk, "new.raw"), ("rm", "good.raw"), ("export", "good.raw", tmp_path / "out")):
                message = command.fails(arguments[0], s3_url, *arguments[1:], *volume.options)
                assert "credentials" in message.lower() or "refuse" in message.lower() or "denie" in message.lower(), (name, message)
                assert secret not in message
    assert not (tmp_path / "out").exists()
    volume.check(disk, tmp_path)


@pytest.mark.s3
def test_credentials_of_somebody_else_are_refused(
    command: Cli, ceph_rgw: Ceph, s3_url: str, disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    volume = S3Volume(command, s3_url, disk, tmp_path)
    stranger = ceph_rgw.add_user("stranger-" + secrets.token_hex(4))
    with monkeypatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", stranger.access_key)
        patch.setenv("AWS_SECRET_ACCESS_KEY", stranger.secret_key)
        message = command.fails("rm", s3_url, "good.raw", *volume.options)
        assert BUCKET in message
    volume.check(disk, tmp_path)


@pytest.mark.s3
def test_no_credentials_at_all(command: Cli, ceph_rgw: Ceph, s3_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    message = command.fails("init", s3_url, "--state-dir", tmp_path / "state", "--l2-url", "none")
    assert "credentials" in message.lower()


@pytest.mark.s3
def test_no_space_on_s3(command: Cli, ceph_rgw: Ceph, disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "poor-" + secrets.token_hex(4)
    poor = ceph_rgw.add_user(name, quota_bytes=3 << 20)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", poor.access_key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", poor.secret_key)
    ceph_rgw.make_bucket(name, poor)
    volume = S3Volume(command, ceph_rgw.volume_url(name, "v"), disk, tmp_path)
    large = tmp_path / "large.raw"
    large.write_bytes(random.Random(2).randbytes(16 << 20))
    message = command.fails("import", volume.url, large, *volume.options)
    assert "quota" in message.lower() or "no space" in message.lower() or "full" in message.lower()
    volume.check(disk, tmp_path)


def test_an_endpoint_where_nobody_answers(command: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x" * 16)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "y" * 16)
    url = f"s3://bucket/v?endpoint=http://127.0.0.1:{free_port()}&region=us-east-1"
    message = command.fails("ls", url, "--state-dir", tmp_path / "state", "--l2-url", "none", "--set", "store.io_timeout=1s")
    assert "127.0.0.1" in message


# --- mount points: tests/mount/test_cli_mount.py has the rest --------------------------------------------------------


@pytest.mark.fuse
def test_a_mount_point_that_is_missing_or_busy(volume: LocalVolume, tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    assert volume.fails("mount", missing) == f"mount point {missing} does not exist: create it with 'mkdir -p {missing}'"
    assert "is busy: " in volume.fails("mount", "/proc")
    assert "is not empty" in volume.fails("mount", tmp_path)
