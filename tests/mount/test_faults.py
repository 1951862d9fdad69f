"""What a user of the mount sees when data is damaged or the store is away: an error that is told, and nothing lost."""

from __future__ import annotations

import errno
import mmap
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.mounted import mounted, running

pytestmark = pytest.mark.fuse

NOBODY = 65534


def fails(number: int) -> pytest.RaisesExc[OSError]:
    return pytest.raises(OSError, check=lambda error: error.errno == number)


def damage_packs(store: Path) -> int:
    """Flip a byte in the middle of each frame-bearing object; how many."""
    packs = [path for path in (store / "packs").rglob("*") if path.is_file() and path.stat().st_size > 100_000]
    for path in packs:
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 0xFF
        path.unlink()
        path.write_bytes(data)
    return len(packs)


def test_damaged_data_is_eio_and_a_line_that_names_image_offset_and_pack(tmp_path: Path) -> None:
    """semantics: S1."""
    content = os.urandom(1 << 20)
    with mounted(tmp_path) as mount:
        (mount.path / "vm").mkdir()
        (mount.path / "vm" / "a.raw").write_bytes(content)
        (mount.path / "b.raw").write_bytes(b"small and in another pack")
        url = mount.url
    assert damage_packs(tmp_path / "store") == 1
    with mounted(tmp_path, url=url) as mount:
        fd = os.open(mount.path / "vm" / "a.raw", os.O_RDONLY | os.O_DIRECT)
        broken = []
        memory = mmap.mmap(-1, 64 << 10)
        for offset in range(0, 1 << 20, 64 << 10):
            try:
                os.preadv(fd, [memory], offset)
            except OSError as error:
                assert error.errno == errno.EIO
                broken.append(offset)
            else:
                assert memory[:] == content[offset : offset + (64 << 10)]
        os.close(fd)
        assert len(broken) == 1, "one flipped byte damages one chunk, and is never answered with zeros or the wrong bytes"
        line = mount.wait_log(r"read vm/a\.raw at ")
        assert f"at {broken[0]}+" in line
        assert "EIO" in line
        assert "pack" in line
        with (mount.path / "vm" / "a.raw").open("rb") as file, fails(errno.EIO):
            file.read()
        assert (mount.path / "b.raw").read_bytes() == b"small and in another pack"
        os.listdir(mount.path / "vm")


def test_a_store_that_is_away_is_eio_until_it_is_back(tmp_path: Path) -> None:
    """semantics: S5, S16. With `durability = "store"`: fsync and close report it, the data stays, and the next fsync stores it."""
    content = os.urandom(300_000)
    with mounted(tmp_path, "--durability", "store", "--set", "store.io_timeout=1s") as mount:
        path = mount.path / "a.raw"
        path.write_bytes(b"committed")
        (mount.path / "cached").write_bytes(content)
        fd = os.open(path, os.O_RDWR)
        os.pwrite(fd, b"first", 0)
        os.fsync(fd)
        (tmp_path / "store").rename(tmp_path / "away")
        try:
            os.pwrite(fd, content, 0)
            with fails(errno.EIO):
                os.fsync(fd)
            assert os.pread(fd, len(content), 0) == content
            with fails(errno.EIO):
                (mount.path / "new").mkdir()
        finally:
            (tmp_path / "away").rename(tmp_path / "store")
        os.fsync(fd)
        os.close(fd)
        assert path.read_bytes() == content
        assert "fsync a.raw: EIO" in mount.text
        url = mount.url
    with mounted(tmp_path, url=url) as mount:
        assert (mount.path / "a.raw").read_bytes() == content


def test_a_directory_with_a_damaged_image_is_listed_all_the_same(tmp_path: Path) -> None:
    with mounted(tmp_path) as mount:
        for name in ("a.raw", "b.raw"):
            (mount.path / name).write_bytes(name.encode())
        image_id = os.getxattr(mount.path / "a.raw", "user.novafs.image_id").decode()
        url = mount.url
    for path in (tmp_path / "store" / "images" / image_id).iterdir():
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 0xFF
        path.unlink()
        path.write_bytes(data)
    with mounted(tmp_path, url=url) as mount:
        assert sorted(os.listdir(mount.path)) == ["a.raw", "b.raw"]
        assert (mount.path / "b.raw").read_bytes() == b"b.raw"
        with fails(errno.EIO):
            (mount.path / "a.raw").open("rb")
        (mount.path / "a.raw").unlink()
        assert os.listdir(mount.path) == ["b.raw"]


@pytest.fixture
def public_dir() -> Iterator[Path]:
    """A directory that every user can reach."""
    directory = Path(tempfile.mkdtemp(prefix="novafs-test-"))
    directory.chmod(0o755)
    yield directory
    shutil.rmtree(directory)


def as_nobody(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, user=NOBODY, group=NOBODY, extra_groups=[], capture_output=True, text=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become another user")
def test_other_users_see_the_mount_only_with_allow_other_and_within_their_permissions(public_dir: Path) -> None:
    with mounted(public_dir) as mount:
        (mount.path / "a.raw").write_bytes(b"content")
        (mount.path / "a.raw").chmod(0o644)
        (mount.path / "secret.raw").write_bytes(b"secret")
        (mount.path / "secret.raw").chmod(0o600)
        assert "Permission denied" in as_nobody("cat", str(mount.path / "a.raw")).stderr
        url = mount.url
    with mounted(public_dir, "-o", "allow_other", url=url) as mount:
        assert as_nobody("cat", str(mount.path / "a.raw")).stdout == "content"
        assert "Permission denied" in as_nobody("cat", str(mount.path / "secret.raw")).stderr
        assert "Permission denied" in as_nobody("touch", str(mount.path / "new")).stderr
        assert "Permission denied" in as_nobody("sh", "-c", f"echo x >> {mount.path}/a.raw").stderr
        (mount.path / "theirs").mkdir()
        os.chown(mount.path / "theirs", NOBODY, NOBODY)
        assert as_nobody("sh", "-c", f"echo hello > {mount.path}/theirs/own.raw").returncode == 0
        found = (mount.path / "theirs" / "own.raw").stat()
        assert (found.st_uid, found.st_gid) == (NOBODY, NOBODY)


def test_an_image_removed_by_another_host_is_stale_or_missing_but_never_wrong(tmp_path: Path) -> None:
    """semantics: S10."""
    with mounted(tmp_path) as first, running(first.url, tmp_path / "mnt2", tmp_path / "state2") as second:
        (first.path / "a.raw").write_bytes(b"old")
        assert (second.path / "a.raw").read_bytes() == b"old"
        (first.path / "a.raw").unlink()
        (first.path / "a.raw").write_bytes(b"new and longer")
        # Within the second that names may lag, the old image or the new one; then the new one.
        for _ in range(200):
            found = (second.path / "a.raw").read_bytes()
            assert found in (b"old", b"new and longer")
            if found == b"new and longer":
                break
            subprocess.run(["sleep", "0.02"], check=True)
        assert found == b"new and longer"
        second.unmount()
        assert second.wait() == 0, second.text
