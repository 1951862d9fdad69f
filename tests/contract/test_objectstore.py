"""The contract of `novafs.objectstore.base`, on every store: a directory, and the bucket of a real Ceph."""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from novafs.errors import InvalidNameError, ObjectExistsError, ObjectNotFoundError
from novafs.objectstore.base import ObjectInfo, ObjectStore
from novafs.objectstore.url import create_root, open_store

BAD_NAMES = [
    "",
    "/",
    "/a",
    "a/",
    "a//b",
    "..",
    "../a",
    "a/../b",
    "./a",
    "a/.",
    ".hidden",
    "a/.hidden",
    "a b",
    "a\0b",
    "a\nb",
    "a\n",
    "ä",
    "a\\b",
    "a*",
    "a" * 201,
    "/".join(["a" * 100] * 6),
]


@pytest.fixture(params=["file", pytest.param("s3", marks=pytest.mark.s3)])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return f"file://{tmp_path}/store" if request.param == "file" else request.getfixturevalue("s3_url")


@pytest.fixture
def store(url: str) -> Iterator[ObjectStore]:
    create_root(url)
    store = open_store(url)
    yield store
    store.close()


def names(rows: list[ObjectInfo]) -> list[str]:
    return [row.name for row in rows]


def test_what_was_created_is_read_back_whole(store: ObjectStore) -> None:
    for name, data in {"novafs.json": b"{}", "packs/3f/abc": bytes(range(256)) * 100, "empty/one": b""}.items():
        store.create(name, data)
        assert store.get(name) == data
        assert store.head(name)[:2] == (name, len(data))


def test_an_object_of_16_mib_is_read_back_whole_and_in_ranges(store: ObjectStore) -> None:
    data = os.urandom(16 << 20)
    store.create("packs/00/large", data)
    assert store.get("packs/00/large") == data
    for start, length in [(0, 1), (4 << 20, 100), ((4 << 20) - 1, 2), (10_000_000, 5 << 20), ((16 << 20) - 7, 100)]:
        assert store.get("packs/00/large", start, length) == data[start : start + length]


def test_a_range_that_reaches_past_the_end_returns_what_there_is(store: ObjectStore) -> None:
    store.create("a", b"0123456789")
    assert store.get("a", 3, 4) == b"3456"
    assert store.get("a", 7, 100) == b"789"
    assert store.get("a", 7) == b"789"
    assert store.get("a", 9, 1) == b"9"
    assert store.get("a", 10, 5) == b""
    assert store.get("a", 10) == b""
    assert store.get("a", 1000, 1) == b""
    assert store.get("a", 4, 0) == b""


def test_a_range_of_an_empty_object_is_empty(store: ObjectStore) -> None:
    store.create("a", b"")
    assert store.get("a", 0, 10) == b""
    assert store.get("a", 5) == b""


def test_a_negative_range_is_the_programmers_mistake(store: ObjectStore) -> None:
    store.create("a", b"0123")
    for start, length in [(-1, 2), (0, -1)]:
        with pytest.raises(ValueError, match="neither may be negative"):
            store.get("a", start, length)


def test_what_is_not_there_is_not_found(store: ObjectStore) -> None:
    store.create("a/b/c", b"x")
    for missing in ["a/b/d", "a/x/y", "z", "a/b", "a"]:
        for read in (lambda m=missing: store.get(m), lambda m=missing: store.get(m, 5, 3), lambda m=missing: store.get(m, 0, 0)):
            with pytest.raises(ObjectNotFoundError, match=missing):
                read()
        with pytest.raises(ObjectNotFoundError, match=missing):
            store.head(missing)
    assert store.list("z") == []
    assert store.list("z/y/x") == []


def test_create_never_replaces(store: ObjectStore) -> None:
    store.create("a", b"first")
    for second in (b"second", b"first", b""):
        with pytest.raises(ObjectExistsError, match="object a "):
            store.create("a", second)
    assert store.get("a") == b"first"


def test_a_deleted_name_can_be_created_again(store: ObjectStore) -> None:
    store.create("a", b"first")
    store.delete("a")
    store.create("a", b"second")
    assert store.get("a") == b"second"


def test_put_makes_and_replaces(store: ObjectStore) -> None:
    store.put("pins/host", b"one")
    assert store.get("pins/host") == b"one"
    store.put("pins/host", b"another")
    assert store.get("pins/host") == b"another"
    with pytest.raises(ObjectExistsError):
        store.create("pins/host", b"third")


@pytest.mark.parametrize("size", [10, 5 << 20], ids=["small", "larger than a RADOS object"])
def test_of_many_creates_of_one_name_at_once_exactly_one_wins(store: ObjectStore, size: int) -> None:
    writers = 8
    for round_ in range(5 if size < 1000 else 2):
        name, together = f"catalog/{round_:016x}", threading.Barrier(writers)
        contents = [bytes([writer]) * size for writer in range(writers)]

        def create(data: bytes, name: str = name, together: threading.Barrier = together) -> bool:
            together.wait()
            try:
                store.create(name, data)
            except ObjectExistsError:
                return False
            return True

        with ThreadPoolExecutor(writers) as pool:
            won = list(pool.map(create, contents))
        assert Counter(won) == {True: 1, False: writers - 1}
        assert store.get(name) == contents[won.index(True)]


def test_whoever_finds_a_name_taken_can_read_the_winner_at_once(store: ObjectStore) -> None:
    writers = 4
    for round_ in range(5):
        name, together = f"a/{round_}", threading.Barrier(writers)

        def create_or_read(writer: int, name: str = name, together: threading.Barrier = together) -> bytes:
            together.wait()
            data = b"%d" % writer
            try:
                store.create(name, data)
            except ObjectExistsError:
                return store.get(name)
            return data

        with ThreadPoolExecutor(writers) as pool:
            assert len(set(pool.map(create_or_read, range(writers)))) == 1


def test_a_reader_never_sees_a_part_of_what_is_being_put(store: ObjectStore) -> None:
    contents = [bytes([number]) * (300_000 + number) for number in range(20)]
    store.put("a", contents[0])
    done = threading.Event()

    def write() -> None:
        for data in contents:
            store.put("a", data)
        done.set()

    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(write)
        while not done.is_set() and not writing.done():
            assert store.get("a") in contents
        writing.result()
    assert store.get("a") == contents[-1]


LISTED = ["a", "a-b", "a.b", "a0", "catalog/1", "catalog/10", "catalog/2", "d/a", "d/a-/z", "d/a/x", "d/a/y", "d/a0", "d/b", "novafs.json"]


@pytest.fixture
def listed(store: ObjectStore) -> ObjectStore:
    # In a directory "d/a" is either a file or a directory; a bucket would take both.
    for name in reversed([name for name in LISTED if name != "d/a"]):
        store.create(name, name.encode())
    return store


PREFIXES = ["", "a", "a-", "c", "catalog/", "catalog/1", "d/", "d/a", "d/a/", "d/a-", "e", "nov", "d/a/x/y"]
AFTERS = ["a", "a-", "a-b", "catalog", "catalog/1", "catalog/11", "d/a", "d/a-", "d/a/", "d/a/x", "d/a/x0", "d/zzz", "zzz"]


def test_a_listing_is_what_starts_with_the_prefix_in_name_order(listed: ObjectStore) -> None:
    for prefix in PREFIXES:
        expected = sorted(name for name in LISTED if name.startswith(prefix) and name != "d/a")
        rows = listed.list(prefix)
        assert names(rows) == expected, prefix
        assert [row.size for row in rows] == [len(name) for name in expected]


def test_a_listing_begins_after_a_name_and_ends_at_its_limit(listed: ObjectStore) -> None:
    for prefix in ["", "catalog/", "d/a"]:
        for after in AFTERS:
            expected = sorted(name for name in LISTED if name.startswith(prefix) and name > after and name != "d/a")
            for limit in [None, 1, 2]:
                assert names(listed.list(prefix, after=after, limit=limit)) == expected[:limit], (prefix, after, limit)
    assert names(listed.list("", limit=100)) == sorted(name for name in LISTED if name != "d/a")
    assert listed.list("", limit=0) == []


def test_the_newest_revision_is_one_listing_of_one(store: ObjectStore) -> None:
    for counter in range(30):
        store.create(f"catalog/{2**64 - 1 - counter:016x}", b"%d" % counter)
    assert names(store.list("catalog/", limit=1)) == [f"catalog/{2**64 - 30:016x}"]


def test_the_time_of_an_object_is_by_the_stores_own_clock(store: ObjectStore) -> None:
    before_s = store.clock_s()
    store.create("a/b", b"x")
    after_s = store.clock_s()
    # S3's Date has whole seconds, and so has the time of a HEAD.
    for row in (store.head("a/b"), *store.list("a")):
        assert before_s - 1 <= row.modified_s <= after_s + 1
    assert abs(after_s - time.time()) < 3600


def test_delete_may_be_repeated(store: ObjectStore) -> None:
    store.create("a/b", b"x")
    store.delete("a/b")
    store.delete("a/b")
    store.delete("never/there")
    store.delete("a")
    with pytest.raises(ObjectNotFoundError):
        store.get("a/b")
    assert store.list("") == []


def test_delete_many_removes_what_is_there_and_minds_nothing_else(store: ObjectStore) -> None:
    for name in ["a/1", "a/2", "b/1"]:
        store.create(name, b"x")
    store.delete_many(["a/1", "never/there", "b/1"])
    store.delete_many(["a/1"])
    store.delete_many([])
    assert names(store.list("")) == ["a/2"]


CALLS: dict[str, Callable[[ObjectStore, str], object]] = {
    "get": lambda store, name: store.get(name),
    "create": lambda store, name: store.create(name, b"x"),
    "put": lambda store, name: store.put(name, b"x"),
    "head": lambda store, name: store.head(name),
    "delete": lambda store, name: store.delete(name),
    "delete_many": lambda store, name: store.delete_many(["a", name]),
}


@pytest.mark.parametrize("call", CALLS)
def test_names_that_are_no_object_names_are_rejected(store: ObjectStore, call: str) -> None:
    for name in BAD_NAMES:
        with pytest.raises(InvalidNameError, match="object name"):
            CALLS[call](store, name)
    assert store.list("") == []


def test_prefixes_that_begin_no_name_are_rejected(store: ObjectStore) -> None:
    for prefix in ["/", "../", "..", "a/../", "a//", ".", "a b", "a\n"]:
        with pytest.raises(InvalidNameError, match="prefix"):
            store.list(prefix)


def test_the_longest_name_is_taken(store: ObjectStore) -> None:
    name = "/".join(["a" * 200, "b" * 200, "c" * 110])
    assert len(name) == 512
    store.create(name, b"x")
    assert store.get(name) == b"x"
    assert names(store.list("")) == [name]


def test_the_probe_finds_that_create_only_holds_and_leaves_nothing(store: ObjectStore) -> None:
    assert store.probe_create_only() is True
    assert store.list("") == []


def test_free_space_is_part_of_the_capacity_where_there_is_one(store: ObjectStore) -> None:
    usage = store.usage()
    if usage.capacity_bytes is not None and usage.free_bytes is not None:
        assert 0 < usage.free_bytes <= usage.capacity_bytes


def test_two_openings_of_one_url_see_the_same_objects(store: ObjectStore, url: str) -> None:
    store.create("a/b", b"x")
    other = open_store(url)
    try:
        assert other.get("a/b") == b"x"
        with pytest.raises(ObjectExistsError):
            other.create("a/b", b"y")
        other.delete("a/b")
        store.create("a/b", b"z")
        assert other.get("a/b") == b"z"
    finally:
        other.close()


def test_many_threads_may_use_one_store(store: ObjectStore) -> None:
    def work(number: int) -> None:
        name, data = f"t/{number % 5}/{number}", os.urandom(1000)
        store.create(name, data)
        assert store.get(name) == data
        assert name in names(store.list(f"t/{number % 5}/"))
        store.delete(name)

    with ThreadPoolExecutor(12) as pool:
        list(pool.map(work, range(60)))
    assert store.list("") == []
