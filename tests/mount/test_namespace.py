"""Names through the mount: making, finding, moving, removing and listing them."""

from __future__ import annotations

import ctypes
import errno
import os
import stat
import subprocess
import threading
from functools import partial
from pathlib import Path

import pytest
import trio

from novafs.catalogtree import ROOT_ID
from tests.support.engine import fresh_volume
from tests.support.mounted import mounted

pytestmark = pytest.mark.fuse

RENAME_NOREPLACE, RENAME_EXCHANGE = 1, 2
AT_FDCWD = -100


def renameat2(old: Path, new: Path, flags: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.renameat2(AT_FDCWD, os.fsencode(old), AT_FDCWD, os.fsencode(new), flags):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(old))


def fails(number: int) -> pytest.RaisesExc[OSError]:
    return pytest.raises(OSError, check=lambda error: error.errno == number)


def test_an_image_is_made_found_and_removed(place: Path) -> None:
    path = place / "a.raw"
    assert not path.exists()
    path.write_bytes(b"content")
    assert path.read_bytes() == b"content"
    assert os.listdir(place) == ["a.raw"]
    path.unlink()
    assert not path.exists()
    assert os.listdir(place) == []


def test_exclusive_creation_finds_what_is_there(place: Path) -> None:
    flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY
    os.close(os.open(place / "a.raw", flags, 0o600))
    with fails(errno.EEXIST):
        os.open(place / "a.raw", flags)


def test_directories_nest_and_are_removed_only_when_empty(place: Path) -> None:
    deep = place / "one" / "two" / "three"
    deep.mkdir(parents=True)
    (deep / "a.raw").write_bytes(b"x")
    with fails(errno.ENOTEMPTY):
        deep.rmdir()
    with fails(errno.EISDIR):
        (place / "one").unlink()
    with fails(errno.ENOTDIR):
        os.rmdir(deep / "a.raw")
    (deep / "a.raw").unlink()
    for directory in (deep, deep.parent, deep.parent.parent):
        directory.rmdir()
    assert os.listdir(place) == []


def test_missing_and_wrong_paths(place: Path) -> None:
    (place / "a.raw").write_bytes(b"x")
    for number, path in (
        (errno.ENOENT, place / "none"),
        (errno.ENOENT, place / "none" / "a"),
        (errno.ENOTDIR, place / "a.raw" / "b"),
        (errno.ENAMETOOLONG, place / ("n" * 256)),
        (errno.EILSEQ, Path(os.fsdecode(os.fsencode(place) + b"/\xff\xfe"))),
    ):
        with fails(number):
            os.open(path, os.O_RDWR | (os.O_CREAT if number in (errno.EILSEQ, errno.ENAMETOOLONG) else 0))
    with fails(errno.ENOENT):
        os.stat(os.fsencode(place) + b"/\xff\xfe")
    with fails(errno.EEXIST):
        place.mkdir()


@pytest.mark.parametrize("name", ["n" * 255, "with space", "ünïcödé-镜像.raw", "line\nbreak", "-rf", "'\"$(x)`", "a\\b", ".hidden", "..."])
def test_any_name_that_a_file_may_have(place: Path, name: str) -> None:
    (place / name).write_bytes(name.encode())
    assert os.listdir(place) == [name]
    assert (place / name).read_bytes() == name.encode()
    (place / name).rename(place / "other")
    (place / "other").unlink()


def test_rename_replaces_atomically(place: Path) -> None:
    """semantics: S9."""
    old, new = place / "old.raw", place / "new.raw"
    old.write_bytes(b"old" * 1000)
    new.write_bytes(b"new")
    inode = old.stat().st_ino
    with new.open("rb") as replaced:
        old.rename(new)
        assert os.listdir(place) == ["new.raw"]
        assert new.read_bytes() == b"old" * 1000
        assert new.stat().st_ino == inode
        assert replaced.read() == b"new"
        assert os.fstat(replaced.fileno()).st_nlink == 0


def test_rename_of_an_open_image_keeps_the_handle(place: Path) -> None:
    (place / "sub").mkdir()
    with (place / "a.raw").open("w+b") as file:
        file.write(b"before")
        file.flush()
        (place / "a.raw").rename(place / "sub" / "b.raw")
        file.write(b" and after")
        file.flush()
        os.fsync(file.fileno())
        assert os.fstat(file.fileno()).st_nlink == 1
    assert (place / "sub" / "b.raw").read_bytes() == b"before and after"


def test_rename_across_and_onto_directories(place: Path) -> None:
    for name in ("empty", "full", "source"):
        (place / name).mkdir()
    (place / "full" / "a").write_bytes(b"x")
    (place / "source" / "b").write_bytes(b"y")
    with fails(errno.ENOTEMPTY):
        (place / "source").rename(place / "full")
    with fails(errno.EISDIR):
        (place / "full" / "a").rename(place / "empty")
    with fails(errno.ENOTDIR):
        (place / "empty").rename(place / "full" / "a")
    with fails(errno.EINVAL):
        (place / "source").rename(place / "source" / "below")
    (place / "source").rename(place / "empty")
    assert sorted(os.listdir(place)) == ["empty", "full"]
    assert (place / "empty" / "b").read_bytes() == b"y"


def test_rename_flags(place: Path) -> None:
    """semantics: S9."""
    a, b, c = place / "a", place / "b", place / "c"
    a.write_bytes(b"a")
    b.write_bytes(b"b")
    with fails(errno.EEXIST):
        renameat2(a, b, RENAME_NOREPLACE)
    assert b.read_bytes() == b"b"
    renameat2(a, c, RENAME_NOREPLACE)
    assert c.read_bytes() == b"a"
    with fails(errno.EINVAL):
        renameat2(b, c, RENAME_EXCHANGE)
    assert (b.read_bytes(), c.read_bytes()) == (b"b", b"a")


def test_an_unlinked_open_image_lives_until_it_is_closed(place: Path) -> None:
    """semantics: S10."""
    path = place / "a.raw"
    with path.open("w+b") as file:
        file.write(b"x" * 200_000)
        file.flush()
        path.unlink()
        assert not path.exists()
        assert os.fstat(file.fileno()).st_nlink == 0
        file.write(b"more")
        file.flush()
        os.fsync(file.fileno())
        os.fchmod(file.fileno(), 0o600)
        os.utime(file.fileno(), ns=(5, 7))
        os.ftruncate(file.fileno(), 200_002)
        found = os.fstat(file.fileno())
        assert (found.st_size, stat.S_IMODE(found.st_mode)) == (200_002, 0o600)
        file.seek(0)
        assert file.read() == b"x" * 200_000 + b"mo"
        path.write_bytes(b"another of the same name")
        file.seek(0)
        assert file.read(4) == b"xxxx"
    assert path.read_bytes() == b"another of the same name"


def test_what_a_volume_does_not_hold_is_refused(place: Path) -> None:
    """semantics: S21."""
    (place / "a.raw").write_bytes(b"x")
    with fails(errno.EPERM):
        (place / "link").symlink_to("a.raw")
    with fails(errno.EPERM):
        os.link(place / "a.raw", place / "link")
    with fails(errno.EPERM):
        os.mkfifo(place / "fifo")
    with fails(errno.EPERM):
        os.mknod(place / "device", stat.S_IFBLK | 0o600, os.makedev(7, 0))
    os.mknod(place / "b.raw", stat.S_IFREG | 0o640)
    assert stat.S_IMODE((place / "b.raw").stat().st_mode) == 0o640
    assert sorted(os.listdir(place)) == ["a.raw", "b.raw"]


def test_a_listing_has_the_dots_and_the_inode_numbers_of_stat(place: Path) -> None:
    (place / "sub").mkdir()
    (place / "a.raw").write_bytes(b"x")
    out = subprocess.run(["ls", "-1aif", str(place / "sub" / "..")], check=True, capture_output=True, text=True).stdout
    listed = {name: int(number) for number, name in (line.split() for line in out.splitlines())}
    assert listed == {
        ".": place.stat().st_ino,
        "..": place.parent.stat().st_ino,
        "sub": (place / "sub").stat().st_ino,
        "a.raw": (place / "a.raw").stat().st_ino,
    }
    with os.scandir(place) as entries:
        assert {(entry.name, entry.is_dir(), entry.inode()) for entry in entries} == {
            ("sub", True, listed["sub"]),
            ("a.raw", False, listed["a.raw"]),
        }


def test_a_directory_of_two_thousand_entries(tmp_path: Path) -> None:
    names = [f"image-{number:04}-{'x' * (number % 40)}" for number in range(2000)]

    async def make() -> str:
        async with fresh_volume(tmp_path) as volume:
            # All at once: the catalog commits them in groups. Through the mount each would be a commit of its own.
            async with trio.open_nursery() as nursery:
                for name in names:
                    nursery.start_soon(partial(volume.mkdir, ROOT_ID, name, mode=0o755, uid=0, gid=0))
            return volume.client.store.url

    with mounted(tmp_path, url=trio.run(make)) as mount:
        assert sorted(os.listdir(mount.path)) == sorted(names)
        subprocess.run(["ls", "-l", str(mount.path)], check=True, capture_output=True)
        # Removing what has been listed, while listing: nothing is skipped or seen twice.
        removed = []
        with os.scandir(mount.path) as entries, os.scandir(mount.path) as others:
            assert len(list(others)) == 2000
            for entry in entries:
                os.rmdir(entry.path)
                removed.append(entry.name)
                if len(removed) == 100:
                    break
            rest = [entry.name for entry in entries]
        assert len(set(removed)) == 100
        assert sorted(removed + rest) == sorted(names)
        assert sorted(os.listdir(mount.path)) == sorted(rest)


def test_rm_empties_a_tree(place: Path) -> None:
    for number in range(40):
        (place / f"d{number % 5}" / f"e{number}").mkdir(parents=True)
        (place / f"d{number % 5}" / f"f{number}").write_bytes(b"x" * number)
    subprocess.run(["rm", "-r", str(place)], check=True)
    assert not place.exists()


def test_a_seek_in_a_listing_goes_back_to_the_same_place(place: Path) -> None:
    for number in range(120):
        (place / f"{number:03}").mkdir()
    libc = ctypes.CDLL(None, use_errno=True)
    libc.opendir.restype = ctypes.c_void_p
    libc.readdir.restype = ctypes.c_void_p
    libc.telldir.restype = ctypes.c_long
    stream = ctypes.c_void_p(libc.opendir(os.fsencode(place)))

    def names(count: int) -> list[bytes]:
        found = []
        while len(found) < count and (at := libc.readdir(stream)):
            found.append(ctypes.string_at(at + 19))  # d_name
        return found

    try:
        start = names(30)
        position = libc.telldir(stream)
        rest = names(1000)
        libc.seekdir(stream, ctypes.c_long(position))
        assert names(1000) == rest
        (place / "new").mkdir()
        libc.rewinddir(stream)
        assert names(1000) == [*start, *rest, b"new"]
    finally:
        libc.closedir(stream)


def test_listing_while_entries_are_removed_and_made(place: Path) -> None:
    for number in range(60):
        (place / f"stays-{number:03}").mkdir()
    stop = threading.Event()
    errors: list[BaseException] = []

    def churn() -> None:
        try:
            number = 0
            while not stop.is_set():
                path = place / f"comes-{number % 20:03}"
                path.mkdir()
                path.rmdir()
                assert not path.exists()
                number += 1
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=churn)
    thread.start()
    try:
        for _ in range(30):
            found = os.listdir(place)
            assert len(found) == len(set(found))
            assert sum(name.startswith("stays-") for name in found) == 60
            subprocess.run(["ls", "-l", str(place)], check=False, capture_output=True)
    finally:
        stop.set()
        thread.join()
    assert not errors, errors
