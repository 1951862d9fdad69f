"""The kernel's table of mounts."""

from __future__ import annotations

from pathlib import Path

import pytest

from novafs.mounttable import MountLine, canonical, mount_at, parse_mountinfo

TABLE = r"""
25 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw
40 25 0:39 / /mnt/a\040b\134c rw,nosuid,nodev shared:2 - fuse.novafs s3://bucket/with\040blank rw,user_id=1000,group_id=1000,allow_other
41 25 0:40 / /mnt/x rw - fuse.sshfs host: rw,user_id=0,group_id=0
42 25 0:41 / /mnt/y rw master:1 propagate_from:2 - tmpfs tmpfs rw
broken line
43 25 0:42 / /mnt/z rw - tmpfs
"""


def test_lines_are_read_with_their_escapes_and_broken_ones_left_out() -> None:
    assert parse_mountinfo(TABLE) == [
        MountLine("/", "ext4", "/dev/vda", None),
        MountLine("/mnt/a b\\c", "fuse.novafs", "s3://bucket/with blank", 1000),
        MountLine("/mnt/x", "fuse.sshfs", "host:", 0),
        MountLine("/mnt/y", "tmpfs", "tmpfs", None),
    ]


def test_the_root_is_a_mount_and_a_plain_directory_is_none(tmp_path: Path) -> None:
    found = mount_at("/")
    assert found is not None
    assert found.mountpoint == "/"
    assert mount_at(tmp_path / "missing") is None
    assert mount_at(tmp_path) is None


def test_a_path_is_made_absolute_and_its_links_are_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = Path(tmp_path).resolve()
    (base / "real" / "mnt").mkdir(parents=True)
    (base / "link").symlink_to("real")
    (base / "last").symlink_to("link/mnt")
    (base / "loop").symlink_to("loop")
    monkeypatch.chdir(base)
    for spelling in ("real/mnt", "./real/../real/mnt/", "link/mnt", "last", base / "last"):
        assert canonical(spelling) == str(base / "real" / "mnt")
    assert canonical("missing/x") == str(base / "missing/x")
    assert canonical("/") == "/"
    assert Path(canonical("loop")).name == "loop"
