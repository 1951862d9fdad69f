"""What only the directory store can meet: directories, mount points, errnos, files that are none of its objects."""

from __future__ import annotations

import errno
import os
import subprocess
from pathlib import Path

import pytest

from novafs import durable
from novafs.errors import (
    BucketMissingError,
    NovaError,
    ObjectExistsError,
    ObjectNotFoundError,
    StoreDeniedError,
    StoreFullError,
    StoreUnavailableError,
)
from novafs.objectstore.file import TEMP_DIR, FileStore, create_root


@pytest.fixture
def root(tmp_path: Path) -> Path:
    create_root(tmp_path / "some" / "store")
    return tmp_path / "some" / "store"


@pytest.fixture
def store(root: Path) -> FileStore:
    return FileStore(root)


CALLS = {
    "get": lambda store: store.get("a/b"),
    "create": lambda store: store.create("a/b", b"x"),
    "put": lambda store: store.put("a/b", b"x"),
    "list": lambda store: store.list(""),
    "list of a prefix": lambda store: store.list("a/"),
    "head": lambda store: store.head("a/b"),
    "delete": lambda store: store.delete("a/b"),
    "delete_many": lambda store: store.delete_many(["a/b", "c"]),
    "clock_s": lambda store: store.clock_s(),
    "usage": lambda store: store.usage(),
    "probe": lambda store: store.probe_create_only(),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("kind", ["nothing", "a file"])
def test_a_root_that_is_no_directory_is_missing_and_is_never_made(tmp_path: Path, call: str, kind: str) -> None:
    root = tmp_path / "store"
    if kind == "a file":
        root.write_bytes(b"")
    if call == "usage" and kind == "a file":
        return  # statvfs answers for a file as well
    with pytest.raises(BucketMissingError, match=r"store (does not exist|is no directory).*novafs init file://"):
        CALLS[call](FileStore(root))
    assert root.exists() == (kind == "a file")


def test_a_root_that_goes_away_while_it_is_used_is_not_made_again(store: FileStore, root: Path) -> None:
    store.create("a/b", b"x")
    root.rename(root.with_name("unmounted"))
    for call in CALLS.values():
        with pytest.raises(BucketMissingError):
            call(store)
    assert not root.exists()


def test_create_root_makes_what_is_missing_and_may_be_repeated(tmp_path: Path) -> None:
    create_root(tmp_path / "a" / "b")
    create_root(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()


def test_create_root_names_the_file_that_is_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"")
    for path in (tmp_path / "a", tmp_path / "a" / "b"):
        with pytest.raises(BucketMissingError, match=r"in the way at .*/a"):
            create_root(path)


def test_files_that_are_no_objects_are_neither_listed_nor_read(store: FileStore, root: Path) -> None:
    store.create("a/b", b"x")
    for name in ["lost+found", ".hidden", "a b"]:
        (root / name).mkdir()
        (root / name / "x").write_bytes(b"x")
    for name in [".file", "ä", "a/.file", "a/b~"]:
        (root / name).write_bytes(b"x")
    (root / "link").symlink_to(root / "a" / "b")
    (root / "links").symlink_to(root / "a")
    os.mkfifo(root / "pipe")
    assert [row.name for row in store.list("")] == ["a/b"]
    for name in ["link", "pipe", "a"]:
        with pytest.raises(ObjectNotFoundError):
            store.get(name)
        with pytest.raises(ObjectNotFoundError):
            store.head(name)


def test_a_listing_with_a_limit_reads_only_the_directories_that_it_needs(
    store: FileStore, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ["catalog/1", "catalog/2", "images/x/1", "images/y/1", "images/y/2", "packs/00/1", "packs/01/1", "packs/02/1"]:
        store.create(name, b"")
    read: list[str] = []
    real = os.scandir

    def scandir(path: Path) -> object:
        read.append(str(Path(path).relative_to(root)))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)

    def listing(prefix: str, after: str = "", limit: int | None = None) -> list[str]:
        read.clear()
        return [row.name for row in store.list(prefix, after=after, limit=limit)]

    assert (listing("catalog/", limit=1), read) == (["catalog/1"], ["catalog"])
    assert (listing("images/y/"), read) == (["images/y/1", "images/y/2"], ["images/y"])
    assert (listing("packs/", limit=1), read) == (["packs/00/1"], ["packs", "packs/00"])
    assert (listing("packs/0", after="packs/01"), read) == (["packs/01/1", "packs/02/1"], ["packs", "packs/01", "packs/02"])
    assert (listing("packs/", after="packs/01/1", limit=1), read) == (["packs/02/1"], ["packs", "packs/01", "packs/02"])
    assert (listing("", limit=1), read) == (["catalog/1"], [".", "catalog"])
    assert (listing("models/"), read) == ([], ["models"])


def test_directories_removed_by_hand_are_made_again(store: FileStore, root: Path) -> None:
    store.create("a/b/c", b"x")
    store.delete("a/b/c")
    (root / "a" / "b").rmdir()
    (root / "a").rmdir()
    (root / TEMP_DIR).rmdir()
    store.create("a/b/d", b"y")
    assert store.get("a/b/d") == b"y"


def test_the_first_write_of_a_process_cleans_up_after_dead_ones(store: FileStore, root: Path) -> None:
    temp = root / TEMP_DIR / (durable.TEMP_PREFIX + "left")
    temp.parent.mkdir()
    temp.write_bytes(b"x" * 1000)
    os.utime(temp, (1, 1))
    store.create("a", b"x")
    assert not temp.exists()
    assert store.clean_temps() == 0


def test_each_directory_on_the_way_is_synced_once_by_each_process(root: Path) -> None:
    class Counting(durable.FileOps):
        def __init__(self) -> None:
            self.synced: list[str] = []

        def fsync_dir(self, path: Path) -> None:
            self.synced.append(path.name)
            super().fsync_dir(path)

    for _process in range(2):
        ops = Counting()
        store = FileStore(root, ops=ops)
        store.put("packs/3f/1", b"x")
        # The temporary directory's and `packs`' names in the root, that of `3f` in `packs`, at last the object's.
        assert ops.synced == ["store", "store", "packs", "3f"]
        ops.synced.clear()
        store.put("packs/3f/2", b"x")
        assert ops.synced == ["3f"]


def test_more_directories_than_are_remembered_only_cost_time(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("novafs.objectstore.file.KNOWN_DIRS_MAX", 3)
    store = FileStore(root)
    names = [f"images/{number}/1" for number in range(8)]
    for name in names:
        store.create(name, b"x")
    assert [row.name for row in store.list("images/")] == names
    assert len(store._known_dirs) <= 3


def test_delete_many_syncs_each_directory_once(root: Path) -> None:
    synced: list[str] = []

    class Counting(durable.FileOps):
        def fsync_dir(self, path: Path) -> None:
            synced.append(path.name)
            super().fsync_dir(path)

    store = FileStore(root, ops=Counting())
    for name in ["a/1", "a/2", "b/1"]:
        store.create(name, b"x")
    synced.clear()
    store.delete_many(["a/1", "a/2", "b/1", "b/2"])
    assert synced == ["a", "b"]


class Failing(durable.FileOps):
    def __init__(self, code: int) -> None:
        self.code = code

    def write(self, fd: int, data: memoryview) -> int:
        raise OSError(self.code, os.strerror(self.code))

    def unlink(self, path: Path) -> None:
        if durable.TEMP_PREFIX not in path.name:
            raise OSError(self.code, os.strerror(self.code), str(path))
        super().unlink(path)


@pytest.mark.parametrize(
    ("code", "expected", "text"),
    [
        (errno.ENOSPC, StoreFullError, "No space left.*free space there"),
        (errno.EDQUOT, StoreFullError, "quota"),
        (errno.EFBIG, StoreFullError, "too large"),
        (errno.EACCES, StoreDeniedError, "Permission denied; check owner, mode"),
        (errno.EPERM, StoreDeniedError, "not permitted"),
        (errno.EROFS, StoreDeniedError, "Read-only file system"),
        (errno.EIO, StoreUnavailableError, "errno 5"),
        (errno.ESTALE, StoreUnavailableError, "Stale file handle"),
        (errno.EMFILE, StoreUnavailableError, "Too many open files"),
        (errno.ETIMEDOUT, StoreUnavailableError, "timed out"),
    ],
)
def test_errnos_become_the_stores_errors(root: Path, code: int, expected: type[NovaError], text: str) -> None:
    store = FileStore(root, ops=Failing(code))
    FileStore(root).create("there", b"x")
    for call in (lambda: store.create("a/b", b"x"), lambda: store.put("a/b", b"x"), lambda: store.delete("there")):
        with pytest.raises(expected, match=text) as caught:
            call()
        assert store.url in str(caught.value)
        assert caught.value.__cause__ is not None
    assert store.list("") == [store.head("there")]


def test_a_full_store_takes_objects_again_when_there_is_room(root: Path) -> None:
    ops = Failing(errno.ENOSPC)
    store = FileStore(root, ops=ops)
    with pytest.raises(StoreFullError):
        store.create("a", b"x")
    FileStore(root).create("a", b"x")
    assert store.get("a") == b"x"


def test_a_file_system_without_hard_links_is_named_as_such(root: Path) -> None:
    class NoLinks(durable.FileOps):
        def link(self, source: Path, target: Path) -> None:
            raise OSError(errno.EPERM, "Operation not permitted", str(source), None, str(target))

    with pytest.raises(StoreDeniedError, match="has no hard links"):
        FileStore(root, ops=NoLinks()).create("a", b"x")


def test_an_object_in_the_way_of_a_directory_is_refused_and_kept(store: FileStore) -> None:
    store.create("a", b"x")
    for write in (store.create, store.put):
        with pytest.raises(StoreDeniedError, match="a file is in the way of a directory"):
            write("a/b", b"y")
    store.create("d/e", b"x")
    with pytest.raises(ObjectExistsError):
        store.create("d", b"y")
    with pytest.raises(StoreDeniedError, match="the other way round"):
        store.put("d", b"y")
    assert store.get("a") == store.get("d/e") == b"x"


def test_the_time_can_be_asked_for_where_nothing_can_be_written(store: FileStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def read_only(**_: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    before_s = store.clock_s()
    monkeypatch.setattr("tempfile.TemporaryFile", read_only)
    assert abs(store.clock_s() - before_s) < 3600


def test_a_read_that_the_kernel_gives_in_pieces_is_whole(store: FileStore, monkeypatch: pytest.MonkeyPatch) -> None:
    content = os.urandom(1000)
    store.create("a", content)
    real = os.pread
    monkeypatch.setattr(os, "pread", lambda fd, length, offset: real(fd, min(length, 7), offset))
    assert store.get("a") == content
    assert store.get("a", 100, 50) == content[100:150]
    monkeypatch.setattr(os, "pread", lambda fd, length, offset: real(fd, min(length, 7), offset) if offset < 500 else b"")
    with pytest.raises(StoreUnavailableError, match="ends at"):
        store.get("a")


def test_a_path_with_odd_characters_is_quoted_in_the_url(tmp_path: Path) -> None:
    create_root(tmp_path / "a b#c?d%")
    store = FileStore(tmp_path / "a b#c?d%")
    store.create("x", b"y")
    assert store.url == f"file://{tmp_path}/a%20b%23c%3Fd%25"


def test_directories_nested_deeper_than_any_name_are_passed_over(store: FileStore, root: Path) -> None:
    """By mistake or on purpose: a listing neither recurses into them nor fails at the longest path that the kernel takes."""
    store.create("a/x", b"1")
    deepest = "/".join("d" * 255)
    store.create(f"{deepest}/y", b"2")
    here = os.open(root, os.O_RDONLY)
    try:
        for _ in range(3000):
            os.mkdir("d", dir_fd=here) if not os.path.lexists(f"/proc/self/fd/{here}/d") else None
            below = os.open("d", os.O_RDONLY, dir_fd=here)
            os.close(here)
            here = below
    finally:
        os.close(here)
    try:
        assert [info.name for info in store.list("")] == ["a/x", f"{deepest}/y"]
        assert [info.name for info in store.list("d", after="d/d")] == [f"{deepest}/y"]
    finally:
        subprocess.run(["rm", "-rf", str(root / "d")], check=True)
