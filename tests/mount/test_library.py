"""Keys of the library are the files of a mount, and the other way round."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from novafs import CacheConfig, HierarchicalCache
from novafs.errors import BusyError
from tests.support.mounted import Mount

pytestmark = pytest.mark.fuse

BIG = random.Random(3).randbytes((5 << 20) + 11)


def library(mount: Mount, directory: Path, **fields: object) -> HierarchicalCache:
    return HierarchicalCache(mount.url, CacheConfig(state_dir=directory / "library", fresh_s=0.0, **fields))  # type: ignore[arg-type]


def wait_for_content(path: Path, content: bytes) -> None:
    """A mount shows what other hosts have changed within a second."""
    deadline_s = time.monotonic() + 30
    while not (path.exists() and path.read_bytes() == content):
        assert time.monotonic() < deadline_s, f"{path} never had its new content"


def test_what_the_library_sets_is_a_file_and_a_file_is_what_it_gets(shared_mount: Mount, place: Path, tmp_path: Path) -> None:
    with library(shared_mount, tmp_path) as cache:
        cache.set("vm-001-disk", BIG)
        wait_for_content(shared_mount.path / "vm-001-disk", BIG)
        assert cache.delete("vm-001-disk")
        here = f"{place.name}/"
        cache.set(here + "web/index", b"hello")
        wait_for_content(place / "web" / "index", b"hello")
        with cache.open(here + "stream", "wb") as file:
            file.write(BIG)
        wait_for_content(place / "stream", BIG)

        (place / "from-mount").write_bytes(BIG[::-1])
        assert cache.get(here + "from-mount") == BIG[::-1]
        (place / "web" / "second").write_bytes(b"2")
        assert cache.keys(here) == [here + name for name in ("from-mount", "stream", "web/index", "web/second")]

        (place / "from-mount").unlink()
        assert cache.get(here + "from-mount") is None
        cache.delete(here + "stream")
        deadline_s = time.monotonic() + 30
        while (place / "stream").exists():
            assert time.monotonic() < deadline_s
        assert sorted(os.listdir(place)) == ["web"]


def test_a_file_that_is_changed_in_place_is_read_as_of_one_moment(shared_mount: Mount, place: Path, tmp_path: Path) -> None:
    """A program writes one letter over the whole file, commits, and goes on with the next; `get` never sees two of them."""
    path, key = place / "disk", f"{place.name}/disk"
    path.write_bytes(b"A" * (3 << 20))
    with library(shared_mount, tmp_path) as cache:
        for letter in b"BCDEF":
            with path.open("r+b") as file:
                file.write(bytes([letter]) * (3 << 20))
            found = cache.get(key)
            assert found is not None
            assert set(found) == {letter}
        reader = cache.open(key)
        first = reader.read(1 << 20)
        with path.open("r+b") as file:
            file.write(b"z" * (3 << 20))
        assert first + reader.read() == b"F" * (3 << 20)
        assert cache.get(key) == b"z" * (3 << 20)


def test_a_program_that_has_the_old_value_open_reads_on_in_it(shared_mount: Mount, place: Path, tmp_path: Path) -> None:
    with library(shared_mount, tmp_path) as cache:
        key = f"{place.name}/disk"
        cache.set(key, BIG)
        wait_for_content(place / "disk", BIG)
        with (place / "disk").open("rb", buffering=0) as file:
            cache.set(key, b"new")
            wait_for_content(place / "disk", b"new")
            assert file.read() == BIG


def test_mode_and_owner_stay_when_a_file_is_set_anew(shared_mount: Mount, place: Path, tmp_path: Path) -> None:
    path, key = place / "disk", f"{place.name}/disk"
    path.write_bytes(b"old")
    path.chmod(0o640)
    os.setxattr(path, "user.note", b"kept")
    with library(shared_mount, tmp_path) as cache:
        cache.set(key, b"new")
        wait_for_content(path, b"new")
        assert path.stat().st_mode & 0o777 == 0o640
        assert os.getxattr(path, "user.note") == b"kept"


def test_the_state_directory_of_a_running_mount_is_refused(shared_mount: Mount) -> None:
    with pytest.raises(BusyError, match="mounted already"):
        HierarchicalCache(shared_mount.url, CacheConfig(state_dir=shared_mount.state_dir))


def test_a_mount_is_refused_where_a_program_has_the_state_directory(shared_mount: Mount, tmp_path: Path) -> None:
    (tmp_path / "second").mkdir()
    with library(shared_mount, tmp_path):
        command = [sys.executable, "-m", "novafs.cli", "mount", shared_mount.url, str(tmp_path / "second")]
        done = subprocess.run([*command, "--state-dir", str(tmp_path / "library")], capture_output=True, text=True)
    assert done.returncode == 1
    assert "by a program that uses the library" in done.stderr
