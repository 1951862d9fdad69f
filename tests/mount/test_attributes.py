"""stat, chmod, chown, times, statfs, extended attributes, and what the mount's options make of them."""

from __future__ import annotations

import errno
import json
import os
import stat
import subprocess
import time
from pathlib import Path

import pytest

from tests.support.mounted import Mount, mounted

pytestmark = pytest.mark.fuse


def fails(number: int) -> pytest.RaisesExc[OSError]:
    return pytest.raises(OSError, check=lambda error: error.errno == number)


def test_modes_owners_and_times_are_kept(mounted: Mount) -> None:
    path = mounted.path / "a.raw"
    path.write_bytes(b"x")
    path.chmod(0o640)
    os.utime(path, ns=(1_234_567_890_123_456_789, 1_700_000_000_987_654_321))
    if os.geteuid() == 0:
        os.chown(path, 1234, 2345)
    found = path.stat()
    assert stat.filemode(found.st_mode) == "-rw-r-----"
    assert (found.st_atime_ns, found.st_mtime_ns) == (1_234_567_890_123_456_789, 1_700_000_000_987_654_321)
    if os.geteuid() == 0:
        assert (found.st_uid, found.st_gid) == (1234, 2345)
        os.chown(path, -1, 99)
        assert (path.stat().st_uid, path.stat().st_gid) == (1234, 99)
    os.utime(path)
    assert abs(path.stat().st_mtime - time.time()) < 60
    (mounted.path / "dir").mkdir(mode=0o710)
    assert stat.filemode((mounted.path / "dir").stat().st_mode) == "drwx--x---"


def test_the_umask_of_the_caller_counts_once(place: Path) -> None:
    before = os.umask(0o027)
    try:
        os.close(os.open(place / "a.raw", os.O_CREAT | os.O_WRONLY, 0o666))
        (place / "dir").mkdir()
    finally:
        os.umask(before)
    assert stat.S_IMODE((place / "a.raw").stat().st_mode) == 0o640
    assert stat.S_IMODE((place / "dir").stat().st_mode) == 0o750


def test_a_group_directory_gives_its_group(place: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root")
    shared = place / "shared"
    shared.mkdir()
    os.chown(shared, 0, 4321)
    shared.chmod(0o2775)
    (shared / "a.raw").write_bytes(b"x")
    (shared / "below").mkdir()
    assert (shared / "a.raw").stat().st_gid == (shared / "below").stat().st_gid == 4321
    assert (shared / "below").stat().st_mode & stat.S_ISGID


def test_times_move_with_writes_and_names(place: Path) -> None:
    path = place / "a.raw"
    path.write_bytes(b"x")
    os.utime(path, ns=(1, 1))
    before = path.stat()
    directory_before = place.stat().st_mtime_ns
    with path.open("ab") as file:
        file.write(b"y")
    after = path.stat()
    assert after.st_mtime_ns > before.st_mtime_ns
    assert after.st_ctime_ns > before.st_ctime_ns
    (place / "other").mkdir()
    assert place.stat().st_mtime_ns > directory_before


def test_blocks_tell_what_is_stored_and_blksize_is_a_chunk(place: Path) -> None:
    """semantics: S19."""
    sparse, zeros, noise = place / "sparse", place / "zeros", place / "noise"
    with sparse.open("wb") as file:
        file.truncate(1 << 40)
    zeros.write_bytes(bytes(1 << 20))
    noise.write_bytes(os.urandom(1 << 20))
    assert (sparse.stat().st_size, sparse.stat().st_blocks) == (1 << 40, 0)
    assert zeros.stat().st_blocks == 0
    assert 1 << 20 <= noise.stat().st_blocks * 512 < (1 << 20) + (1 << 14)
    assert noise.stat().st_blksize == 64 << 10
    assert noise.stat().st_nlink == 1
    used = subprocess.run(["du", "-B1", "-s", str(sparse)], check=True, capture_output=True, text=True).stdout
    assert used.split()[0] == "0"


def test_statfs_shows_capacity_and_use(mounted: Mount) -> None:
    found = os.statvfs(mounted.path)
    assert found.f_namemax == 255
    assert found.f_blocks > 0
    assert 0 < found.f_bavail <= found.f_blocks
    subprocess.run(["df", "-h", str(mounted.path)], check=True, capture_output=True)


def test_user_attributes(place: Path) -> None:
    path = place / "a.raw"
    path.write_bytes(b"x")
    for target in (path, place):
        os.setxattr(target, "user.note", b"first")
        os.setxattr(target, "user.empty", b"")
        os.setxattr(target, "user.binary", bytes(range(256)))
        os.setxattr(target, "user.note", b"second")
        assert os.getxattr(target, "user.note") == b"second"
        assert os.getxattr(target, "user.empty") == b""
        assert os.getxattr(target, "user.binary") == bytes(range(256))
        assert sorted(os.listxattr(target)) == ["user.binary", "user.empty", "user.note"]
        with fails(errno.EEXIST):
            os.setxattr(target, "user.note", b"third", os.XATTR_CREATE)
        with fails(errno.ENODATA):
            os.setxattr(target, "user.none", b"third", os.XATTR_REPLACE)
        os.setxattr(target, "user.note", b"third", os.XATTR_REPLACE)
        os.removexattr(target, "user.note")
        with fails(errno.ENODATA):
            os.getxattr(target, "user.note")
        with fails(errno.ENODATA):
            os.removexattr(target, "user.note")
    with path.open("rb") as file:
        os.setxattr(file.fileno(), "user.note", b"by descriptor")
    assert os.getxattr(path, "user.note") == b"by descriptor"


def test_attributes_have_a_limit(place: Path) -> None:
    path = place / "a.raw"
    path.write_bytes(b"x")
    os.setxattr(path, "user.big", bytes(60_000))
    with fails(errno.ENOSPC):
        os.setxattr(path, "user.more", bytes(60_000))
    assert os.listxattr(path) == ["user.big"]


@pytest.mark.parametrize("name", ["security.capability", "system.posix_acl_access", "trusted.note", "security.selinux"])
def test_other_namespaces_are_not_supported(place: Path, name: str) -> None:
    path = place / "a.raw"
    path.write_bytes(b"x")
    with fails(errno.ENOTSUP):
        os.getxattr(path, name)
    with pytest.raises(OSError):
        os.setxattr(path, name, b"x")


def test_figures_of_an_image_are_attributes(place: Path) -> None:
    """semantics: S20."""
    path = place / "a.raw"
    block = os.urandom(64 << 10)
    path.write_bytes(block * 8 + b"compressible " * 40_000)

    def figure(name: str) -> str:
        return os.getxattr(path, f"user.novafs.{name}").decode()

    assert len(bytes.fromhex(figure("image_id"))) == 16
    assert int(figure("size")) == path.stat().st_size
    assert int(figure("chunk_size")) == 64 << 10
    assert int(figure("generation")) >= 1
    assert 0 < int(figure("stored_bytes")) < path.stat().st_size
    chunks = -(-path.stat().st_size // (64 << 10))
    assert int(figure("allocated_chunks")) == chunks
    assert int(figure("hole_chunks")) == 0
    assert int(figure("unique_chunks")) < chunks
    assert float(figure("dedup_ratio")) > 1.5
    assert float(figure("compression_ratio")) > 1.0
    assert 0 < int(figure("unique_stored_bytes")) <= int(figure("stored_bytes"))
    before = int(figure("generation"))
    with path.open("r+b") as file:
        file.write(b"changed")
    assert int(figure("generation")) > before
    with fails(errno.EPERM):
        os.setxattr(path, "user.novafs.generation", b"1")
    with fails(errno.EPERM):
        os.removexattr(path, "user.novafs.generation")
    for missing, target in (("nonsense", path), ("generation", place)):
        with fails(errno.ENODATA):
            os.getxattr(target, f"user.novafs.{missing}")
    assert os.listxattr(path) == []


def test_owner_and_mode_can_be_overridden(tmp_path: Path) -> None:
    with mounted(tmp_path, "-o", "uid=1111,gid=2222,umask=027") as mount:
        path = mount.path / "a.raw"
        path.write_bytes(b"x")
        (mount.path / "dir").mkdir()
        for found in (path.stat(), (mount.path / "dir").stat(), mount.path.stat()):
            assert (found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)) == (1111, 2222, 0o750)


def test_a_read_only_mount_refuses_every_change(tmp_path: Path) -> None:
    with mounted(tmp_path) as mount:
        (mount.path / "a.raw").write_bytes(b"content")
        (mount.path / "dir").mkdir()
        os.setxattr(mount.path / "a.raw", "user.note", b"x")
        url = mount.url
    with mounted(tmp_path, "-o", "ro", url=url) as mount:
        path = mount.path / "a.raw"
        assert path.read_bytes() == b"content"
        assert os.getxattr(path, "user.note") == b"x"
        for change in (
            lambda: path.open("r+b"),
            lambda: (mount.path / "b.raw").open("wb"),
            lambda: path.unlink(),
            lambda: path.chmod(0o600),
            lambda: os.truncate(path, 1),
            lambda: path.rename(mount.path / "c"),
            lambda: (mount.path / "new").mkdir(),
            lambda: (mount.path / "dir").rmdir(),
            lambda: os.setxattr(path, "user.note", b"y"),
            lambda: os.utime(path),
        ):
            with fails(errno.EROFS):
                change()


def test_the_mount_table_shows_type_and_source(mounted: Mount) -> None:
    out = subprocess.run(["findmnt", "-J", "-T", str(mounted.path)], check=True, capture_output=True, text=True).stdout
    (found,) = json.loads(out)["filesystems"]
    assert found["fstype"] == "fuse.novafs"
    assert found["source"] == mounted.url


def test_images_have_no_bits_that_a_write_would_have_to_clear(mounted: Mount) -> None:
    path = mounted.path / "a.raw"
    fd = os.open(path, os.O_CREAT | os.O_RDWR, 0o6755)
    try:
        os.fchmod(fd, 0o6755)
        assert stat.S_IMODE(os.fstat(fd).st_mode) == 0o755
        path.chmod(0o1740)
        assert stat.S_IMODE(path.stat().st_mode) == 0o1740
    finally:
        os.close(fd)


def test_the_kernel_does_not_ask_for_capabilities_before_each_write(tmp_path: Path) -> None:
    with mounted(tmp_path, "-o", "debug") as mount:
        fd = os.open(mount.path / "a.raw", os.O_CREAT | os.O_RDWR)
        for number in range(20):
            os.pwrite(fd, bytes(4096), 4096 * number)
            os.fsync(fd)
        os.close(fd)
    asked = [line for line in mount.log if "opcode: GETXATTR" in line]
    written = [line for line in mount.log if "opcode: WRITE " in line]
    assert len(written) == 20
    assert len(asked) <= 2
