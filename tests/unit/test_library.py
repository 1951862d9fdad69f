"""The cache as a library: values under keys, whole or not at all, from any number of threads."""

from __future__ import annotations

import io
import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trio

import novafs
from novafs import AsyncHierarchicalCache, CacheConfig, HierarchicalCache, PrefetchRequest
from novafs.errors import (
    BusyError,
    ClosedError,
    ConfigError,
    InvalidNameError,
    IsDirectoryError,
    NotDirectoryError,
    NotFoundError,
    NovaError,
    NoVolumeError,
    ReadOnlyError,
    TooLargeError,
    UnsupportedError,
)
from tests.support.mounted import UNMEASURED

MIB = 1 << 20
BIG = random.Random(7).randbytes(3 * MIB + 17)
UNMEASURED_ENVIRON = {name: value for name, value in os.environ.items() if name not in UNMEASURED}
"""Of a program that will be killed: it reports nothing, so coverage would only slow it down."""


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[HierarchicalCache]:
    with opened(tmp_path) as found:
        yield found


def opened(directory: Path, **fields: Any) -> HierarchicalCache:
    """The cache in a directory, with a state directory beside it."""
    fields.setdefault("state_dir", directory / "state")
    return HierarchicalCache(directory / "volume", CacheConfig.default(**fields))


def run_python(source: str, *arguments: object, status: int = 0, **options: Any) -> str:
    """What a program prints."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(source), *map(str, arguments)], capture_output=True, text=True, timeout=120, **options
    )
    assert done.returncode == status, f"{done.stdout}\n{done.stderr}"
    return done.stdout


# --- values -------------------------------------------------------------------------------------------------------


def test_a_cache_needs_neither_server_nor_arguments_and_leaves_nothing_behind() -> None:
    with HierarchicalCache() as cache:
        directory = Path(cache.volume_url.removeprefix("file://")).parent
        assert directory.is_dir()
        cache.set("vm-001-disk", b"content")
        assert cache.get("vm-001-disk") == b"content"
    assert not directory.exists()


@pytest.mark.parametrize("size", [0, 1, 65535, 65536, 65537, len(BIG)])
def test_a_value_of_any_size_is_read_as_it_was_set(cache: HierarchicalCache, size: int) -> None:
    cache.set("a", BIG[:size])
    assert cache.get("a") == BIG[:size]
    assert cache.size("a") == size
    cache.drop_cached()
    assert cache.get("a") == BIG[:size]


@pytest.mark.parametrize("data", [bytes(200_000), b"x" + bytes(200_000), bytes(200_000) + b"x"])
def test_zeros_count(cache: HierarchicalCache, data: bytes) -> None:
    cache.set("a", data)
    assert cache.get("a") == data
    with cache.open("b", "wb") as file:
        file.write(data)
    assert cache.get("b") == data


def test_bytes_of_every_kind_are_taken(cache: HierarchicalCache) -> None:
    cache.set("a", bytearray(b"abc"))
    assert cache.get("a") == b"abc"
    cache.set("a", memoryview(b"xabcx")[1:4])
    assert cache.get("a") == b"abc"


def test_set_replaces_and_delete_removes(cache: HierarchicalCache) -> None:
    cache.set("a", b"one")
    cache.set("a", b"two")
    assert (cache.get("a"), len(cache)) == (b"two", 1)
    assert cache.delete("a")
    assert not cache.delete("a")
    assert cache.get("a") is None
    assert cache.get("a", b"default") == b"default"
    assert "a" not in cache


def test_keys_may_lie_in_directories(cache: HierarchicalCache) -> None:
    cache.set_multi({"web/a": b"1", "web/deep/er/b": b"2", "db": b"3"})
    assert cache.keys() == list(cache) == ["db", "web/a", "web/deep/er/b"]
    assert cache.keys("web/") == ["web/a", "web/deep/er/b"]
    assert not cache.contains("web")
    assert cache.clear() == 3
    assert (len(cache), cache.keys(), bool(cache)) == (0, [], True)
    cache.set("web", b"a value now")
    assert cache.get("web") == b"a value now"


def test_several_at_once(cache: HierarchicalCache) -> None:
    values = {f"k{number}": bytes([number]) * 70_000 for number in range(40)}
    cache.set_multi(values)
    assert cache.get_multi([*values, "missing"]) == values
    assert cache.delete_multi(["k1", "k2", "missing"]) == 2
    assert len(cache) == 38


def test_what_was_set_is_there_for_the_next_that_opens_it(tmp_path: Path) -> None:
    with opened(tmp_path) as cache:
        cache.set("a", BIG)
    with opened(tmp_path, state_dir=tmp_path / "other") as cache:
        assert cache.get("a") == BIG


def test_a_value_that_has_snapshots_keeps_them(cache: HierarchicalCache) -> None:
    """And mode, owner and attributes, which replacing a name would lose."""
    from novafs.snapshots import take_snapshot

    cache.set("disk", b"first")
    inner = cache._portal.value
    volume = inner._volume

    async def snapshot() -> None:
        entry = await volume.catalog.resolve("disk")
        await volume.set_attributes(entry.node_id, mode=0o600)
        await volume.set_xattr(entry.node_id, "user.owner", b"me")
        await take_snapshot(volume, entry, "before")

    async def look() -> tuple[bytes, int, dict[str, bytes]]:
        entry = await volume.catalog.resolve("disk")
        view = await volume.open_snapshot(entry.node_id, entry.snapshots["before"].counter, name="disk")
        content = await view.read(0, 100)
        await volume.close_image(view)
        return content, entry.mode, entry.xattrs

    cache._portal.call(snapshot)
    cache.set("disk", b"second", ttl=100)
    assert cache.get("disk") == b"second"
    cache.set_multi({"disk": b"third", "other": b"x"})
    assert cache.get_multi(["disk", "other"]) == {"disk": b"third", "other": b"x"}
    assert cache._portal.call(look) == (b"first", 0o600, {"user.owner": b"me"})


# --- time-outs ----------------------------------------------------------------------------------------------------


def test_a_value_whose_time_is_over_is_gone_at_once(cache: HierarchicalCache, monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = time.time()
    monkeypatch.setattr(time, "time", lambda: now_s)
    cache.set("a", b"short", ttl=10)
    cache.set("b", b"long", ttl=1000)
    assert cache.get("a") == b"short"
    now_s += 10.5
    assert cache.get("a") is None
    assert (cache.contains("a"), cache.keys(), len(cache)) == (False, ["b"], 1)
    with pytest.raises(NotFoundError):
        cache.open("a")
    assert cache.get_multi(["a", "b"]) == {"b": b"long"}
    assert not cache.delete("a")
    assert not cache.touch("a", 5)


def test_setting_anew_ends_the_time_out_and_touch_changes_it(cache: HierarchicalCache, monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = time.time()
    monkeypatch.setattr(time, "time", lambda: now_s)
    cache.set("a", b"1", ttl=10)
    cache.set("a", b"2")
    cache.set("b", b"3", ttl=10)
    assert cache.touch("b", 100)
    cache.set("c", b"4", ttl=10)
    assert cache.touch("c")
    cache.set("d", b"5", ttl=10)
    with cache.open("d", "wb", ttl=50) as file:
        file.write(b"6")
    now_s += 20
    assert cache.get_multi(list("abcd")) == {"a": b"2", "b": b"3", "c": b"4", "d": b"6"}
    now_s += 2000
    assert sorted(cache.get_multi(list("abcd"))) == ["a", "c"]


def test_a_collection_takes_what_is_over(tmp_path: Path) -> None:
    with opened(tmp_path, settings={"gc.grace": "0.1s"}) as cache:
        cache.set("a", BIG, ttl=0.05)
        cache.set("b", b"stays")
        deadline_s = time.monotonic() + 60
        report = cache.collect()
        while not report.packs_deleted and time.monotonic() < deadline_s:
            report = cache._portal.call(lambda: collect_all(cache))
        assert report.packs_deleted
        assert cache.keys() == ["b"]
        assert cache.get("b") == b"stays"


async def collect_all(cache: HierarchicalCache) -> Any:
    from novafs.gc import collect

    return await collect(cache._portal.value._volume, everything=True)


@pytest.mark.parametrize("ttl", [0, -1, float("nan"), float("inf"), "10", True])
def test_a_time_out_that_is_none_is_refused(cache: HierarchicalCache, ttl: Any) -> None:
    cache.set("a", b"old")
    for change in (lambda: cache.set("a", b"new", ttl=ttl), lambda: cache.touch("a", ttl), lambda: cache.open("a", "wb", ttl=ttl)):
        with pytest.raises(ConfigError, match="ttl"):
            change()
    assert cache.get("a") == b"old"


# --- streams ------------------------------------------------------------------------------------------------------


def test_a_large_value_is_written_and_read_as_a_stream(cache: HierarchicalCache) -> None:
    with cache.open("a", "wb") as file:
        for at in range(0, len(BIG), 100_000):
            assert file.write(BIG[at : at + 100_000]) == len(BIG[at : at + 100_000])
            assert file.tell() == min(at + 100_000, len(BIG))
        assert not cache.contains("a")
    with cache.open("a", "rb") as file:
        assert file.read(10) == BIG[:10]
        assert file.seek(-5, io.SEEK_END) == len(BIG) - 5
        assert file.read() == BIG[-5:]
        file.seek(100_000)
        assert file.read(70_000) == BIG[100_000:170_000]
        assert file.seek(5, io.SEEK_CUR) == 170_005
        assert file.read() == BIG[170_005:]
        with pytest.raises((OSError, NovaError)):
            file.seek(-1)


def test_a_reader_goes_on_with_what_it_opened(cache: HierarchicalCache) -> None:
    cache.set("a", BIG)
    with cache.open("a") as file:
        assert file.read(5) == BIG[:5]
        cache.set("a", b"new")
        cache.drop_cached()
        assert file.read() == BIG[5:]
        cache.delete("a")
        file.seek(0)
        assert file.read() == BIG


def test_a_stream_that_is_left_by_an_exception_changes_nothing(cache: HierarchicalCache) -> None:
    cache.set("a", b"old")
    with pytest.raises(ZeroDivisionError), cache.open("a", "wb") as file:
        file.write(BIG)
        raise ZeroDivisionError
    assert cache.get("a") == b"old"
    file = cache.open("a", "wb")
    file.write(b"never closed")
    with pytest.warns(ResourceWarning, match="given up"):
        del file
    assert cache.get("a") == b"old"


def test_a_closed_stream_takes_nothing(cache: HierarchicalCache) -> None:
    writer = cache.open("a", "wb")
    writer.write(b"x")
    writer.close()
    writer.close()
    for use in (lambda: writer.write(b"y"), lambda: cache.open("a").close() or writer.write(b"")):
        with pytest.raises(ValueError):
            use()
    reader = cache.open("a")
    reader.close()
    with pytest.raises(ValueError):
        reader.read()


# --- bad input ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "key", ["", "/a", "a/", "a//b", ".", "..", "a/../b", "a\0b", "x" * 256, "\udcff", ".snapshots", ".snapshots/a", "a/" * 2100 + "a"]
)
def test_an_illegal_key_is_refused_by_every_call(cache: HierarchicalCache, key: str) -> None:
    calls: list[Callable[[], object]] = [
        lambda: cache.get(key),
        lambda: cache.set(key, b""),
        lambda: cache.delete(key),
        lambda: cache.contains(key),
        lambda: cache.get_multi([key]),
        lambda: cache.set_multi({"fine": b"", key: b""}),
        lambda: cache.open(key),
        lambda: cache.open(key, "wb"),
        lambda: cache.prefetch(PrefetchRequest([key])),
        lambda: cache.predict_next(key),
        lambda: cache.touch(key),
    ]
    for call in calls:
        with pytest.raises(InvalidNameError):
            call()
    assert cache.keys() == []


def test_what_is_no_key_and_no_value_is_refused(cache: HierarchicalCache) -> None:
    with pytest.raises(InvalidNameError, match="is a int"):
        cache.get(3)  # type: ignore[arg-type]
    assert 3 not in cache
    with pytest.raises(ConfigError, match="expected bytes"):
        cache.set("a", "text")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="list of keys"):
        cache.prefetch(PrefetchRequest("abc"))
    with pytest.raises(ConfigError, match="priority"):
        cache.prefetch(PrefetchRequest(["a"], priority="high"))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="at least 1"):
        cache.predict_next("a", 0)
    for mode in ("r", "w", "ab", "r+b", ""):
        with pytest.raises(UnsupportedError, match="rb"):
            cache.open("a", mode)


def test_a_value_over_the_limit_is_refused_and_streams_are_not(tmp_path: Path) -> None:
    with opened(tmp_path, value_max=1000) as cache:
        cache.set("a", bytes(1000))
        with pytest.raises(TooLargeError, match=r"a: the value has 1,001 bytes, value_max is 1,000; write it with open"):
            cache.set("a", bytes(1001))
        with cache.open("b", "wb") as file:
            file.write(b"y" * 5000)
        with pytest.raises(TooLargeError, match="read it with open"):
            cache.get("b")
        assert cache.open("b").read() == b"y" * 5000
        assert cache.get("a") == bytes(1000)


def test_a_directory_is_no_value_and_a_value_no_directory(cache: HierarchicalCache) -> None:
    cache.set("web/a", b"1")
    for call in (lambda: cache.get("web"), lambda: cache.set("web", b""), lambda: cache.delete("web"), lambda: cache.open("web", "wb")):
        with pytest.raises(IsDirectoryError):
            call()
    with pytest.raises(NotDirectoryError):
        cache.set("web/a/b", b"")
    with pytest.raises(NotDirectoryError):
        cache.set_multi({"x": b"", "x/y": b""})
    assert cache.get("web/a/b") is None
    assert not cache.delete("web/a/b")
    assert cache.keys() == ["web/a"]


def test_a_closed_cache_says_so(tmp_path: Path) -> None:
    cache = opened(tmp_path)
    cache.set("a", b"1")
    reader, writer = cache.open("a"), cache.open("b", "wb")
    cache.close()
    cache.close()
    assert cache.closed
    assert "closed" in repr(cache)
    for call in (
        lambda: cache.get("a"),
        lambda: cache.set("a", b""),
        lambda: len(cache),
        cache.stats,
        cache.__enter__,
        lambda: cache.open("a"),
    ):
        with pytest.raises(ClosedError):
            call()
    with pytest.raises(ClosedError):
        reader.read()
    reader.close()
    writer.write(b"x")
    with pytest.raises(ClosedError):
        writer.close()
    with opened(tmp_path) as again:
        assert again.keys() == ["a"]


def test_a_volume_is_opened_once_by_a_process_and_once_by_a_host(tmp_path: Path) -> None:
    with opened(tmp_path) as cache:
        with pytest.raises(BusyError, match="this process has the volume open already"):
            opened(tmp_path)
        said = run_python(
            """
            import sys
            from novafs import CacheConfig, HierarchicalCache
            from novafs.errors import BusyError
            try:
                HierarchicalCache(sys.argv[1] + "/volume", CacheConfig(state_dir=sys.argv[1] + "/state"))
            except BusyError as error:
                print(error)
            """,
            tmp_path,
        )
        assert f"a program that uses the library (process {os.getpid()})" in said
        with opened(tmp_path, state_dir=tmp_path / "another") as second:
            cache.set("a", b"1")
            second.set("b", b"2")
            assert second.keys() == ["a", "b"]


def test_a_volume_that_is_not_there_is_made_only_where_that_is_wanted(tmp_path: Path) -> None:
    with pytest.raises(NovaError, match="init"):
        opened(tmp_path, create=False)
    (tmp_path / "volume").mkdir()
    with pytest.raises(NoVolumeError):
        opened(tmp_path, create=False)
    with pytest.raises(NovaError):
        opened(tmp_path, read_only=True)
    opened(tmp_path).close()
    opened(tmp_path, create=False).close()


def test_a_read_only_cache_reads(tmp_path: Path) -> None:
    with opened(tmp_path) as cache:
        cache.set("a", b"1")
        with opened(tmp_path, read_only=True) as reader:
            assert reader.get("a") == b"1"
            for call in (lambda: reader.set("a", b""), lambda: reader.delete("a"), reader.clear, lambda: reader.open("b", "wb")):
                with pytest.raises(ReadOnlyError):
                    call()


# --- threads, signals, processes ------------------------------------------------------------------------------------


def test_readers_in_many_threads_find_whole_values_while_one_writes(cache: HierarchicalCache) -> None:
    """Each value is of one letter: another one in it would be a mixture."""
    letters = [bytes([65 + number]) * (150_000 + 1000 * number) for number in range(8)]
    cache.set("a", letters[0])
    over, failed = threading.Event(), []

    def read(seed: int) -> None:
        rng = random.Random(seed)
        while not over.is_set():
            found = cache.open("a").read() if rng.random() < 0.3 else cache.get("a")
            if found not in letters:
                failed.append(None if found is None else (len(found), set(found)))

    threads = [threading.Thread(target=read, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for turn in range(60):
        cache.set("a", letters[turn % len(letters)])
    over.set()
    for thread in threads:
        thread.join()
    assert failed == []


def test_threads_write_beside_each_other(cache: HierarchicalCache) -> None:
    def write(number: int) -> None:
        for turn in range(5):
            cache.set(f"t{number}/{turn}", bytes([number, turn]) * 1000)
            assert cache.get(f"t{number}/{turn}") == bytes([number, turn]) * 1000
            cache.set("shared", bytes([number]) * 1000)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(cache) == 31
    shared = cache.get("shared")
    assert shared is not None
    assert len(set(shared)) == 1


def test_closing_waits_for_calls_of_other_threads(tmp_path: Path) -> None:
    cache = opened(tmp_path)
    started, outcome = threading.Barrier(2), []

    def write() -> None:
        started.wait()
        try:
            cache.set("a", BIG)
            outcome.append("done")
        except ClosedError:
            outcome.append("refused")

    thread = threading.Thread(target=write)
    thread.start()
    started.wait()
    cache.close()
    thread.join()
    with opened(tmp_path) as again:
        assert outcome == (["done"] if again.contains("a") else ["refused"])


def test_ctrl_c_ends_the_call_and_the_cache_goes_on(cache: HierarchicalCache) -> None:
    """The main thread waits for a call that would never end."""
    waiting = threading.Event()

    async def forever() -> None:
        waiting.set()
        try:
            await trio.sleep_forever()
        finally:
            ended.append(True)

    def interrupt() -> None:
        waiting.wait()
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    ended: list[bool] = []
    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        cache._portal.call(forever)
    assert ended == [True]
    cache.set("a", b"1")
    assert cache.get("a") == b"1"


def test_ctrl_c_in_the_middle_of_a_set_leaves_a_whole_value(cache: HierarchicalCache) -> None:
    rng, main = random.Random(5), threading.main_thread().ident or 0
    letters = [bytes([65 + number]) * 400_000 for number in range(5)]
    cache.set("a", letters[0])
    for _ in range(12):
        timer = threading.Timer(0.005 + rng.random() * 0.03, signal.pthread_kill, (main, signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            timer.start()
            while True:
                cache.set("a", rng.choice(letters))
        timer.join()
        assert cache.get("a") in letters
    assert cache.keys() == ["a"]


def test_a_call_from_inside_of_the_cache_is_refused(cache: HierarchicalCache) -> None:
    async def inside() -> None:
        await trio.lowlevel.checkpoint()
        cache.get("a")

    with pytest.raises(UnsupportedError, match="from inside"):
        cache._portal.call(inside)


def test_a_child_of_a_fork_has_no_cache_and_does_not_keep_the_lock(tmp_path: Path) -> None:
    said = run_python(
        """
        import os, sys
        from novafs import CacheConfig, HierarchicalCache
        from novafs.errors import ClosedError
        config = CacheConfig(state_dir=sys.argv[1] + "/state")
        cache = HierarchicalCache(sys.argv[1] + "/volume", config)
        cache.set("a", b"1")
        go, gone = os.pipe(), os.pipe()
        child = os.fork()
        if not child:
            try:
                cache.get("a")
            except ClosedError as error:
                print("child:", error, flush=True)
            cache.close()
            os.write(gone[1], b"x")
            os.read(go[0], 1)
            sys.exit(0)  # exit handlers and all
        os.read(gone[0], 1)
        print("parent:", cache.get("a"), flush=True)
        cache.close()
        with HierarchicalCache(sys.argv[1] + "/volume", config) as again:  # the child lives
            print("again:", again.get("a"), flush=True)
        os.write(go[1], b"x")
        print("status:", os.waitpid(child, 0)[1])
        """,
        tmp_path,
    )
    lines = said.splitlines()
    assert lines[0].startswith("child: the cache of ")
    assert "before this one was forked" in lines[0]
    assert lines[1:] == ["parent: b'1'", "again: b'1'", "status: 0"]


@pytest.mark.parametrize("how", ["the end of the program", "an exception", "sys.exit", "forgotten"])
def test_a_program_that_does_not_close_ends_and_loses_nothing(tmp_path: Path, how: str) -> None:
    end = {"the end of the program": "", "an exception": "1 / 0", "sys.exit": "sys.exit(0)", "forgotten": "del cache; gc.collect()"}[how]
    said = run_python(
        f"""
        import gc, sys
        from novafs import CacheConfig, HierarchicalCache
        temporary = HierarchicalCache()
        temporary.set("x", b"1")
        print(temporary.volume_url.removeprefix("file://"), flush=True)
        cache = HierarchicalCache(sys.argv[1] + "/volume", CacheConfig(state_dir=sys.argv[1] + "/state"))
        cache.set("a", b"1")
        writer = cache.open("b", "wb")
        writer.write(b"not closed")
        {end}
        """,
        tmp_path,
        status=1 if how == "an exception" else 0,
    )
    assert not Path(said.strip()).exists()
    with opened(tmp_path) as cache:
        assert cache.keys() == ["a"]


def test_a_writer_that_is_killed_leaves_the_old_value_or_the_new(tmp_path: Path) -> None:
    """Again and again, at moments that nobody chose; each value is of one letter."""
    source = """
    import itertools, sys
    from novafs import CacheConfig, HierarchicalCache
    cache = HierarchicalCache(sys.argv[1] + "/volume", CacheConfig(state_dir=sys.argv[1] + "/state"))
    for turn in itertools.count(int(sys.argv[2])):
        cache.set("a", bytes([turn % 250 + 1]) * 300_000)
        cache.set_multi({"x": b"%d" % turn, "y": b"%d" % turn})
        print(turn, flush=True)
    """
    rng, turn = random.Random(11), 0
    for _ in range(4):
        command = [sys.executable, "-c", textwrap.dedent(source), str(tmp_path), str(turn)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=UNMEASURED_ENVIRON) as program:
            assert program.stdout is not None
            printed = "".join(program.stdout.readline() for _ in range(rng.randrange(1, 6)))
            timer = threading.Timer(rng.random() * 0.02, program.kill)
            timer.start()
            printed += program.stdout.read()
            timer.join()
        turn = int(printed.rpartition("\n")[0].rpartition("\n")[2])
        with opened(tmp_path) as cache:
            values = cache.get_multi(["a", "x", "y"])
            assert values["a"] in (bytes([turn % 250 + 1]) * 300_000, bytes([(turn + 1) % 250 + 1]) * 300_000)
            assert values["x"] == values["y"]
            assert int(values["x"]) in (turn, turn + 1)


def test_other_commands_see_an_open_cache(tmp_path: Path) -> None:
    """It has the state directory, so it answers them as a mount does."""
    with opened(tmp_path) as cache:
        cache.set("a", BIG)
        options = ["--state-dir", str(tmp_path / "state"), "--l2-url", "none"]
        command = [sys.executable, "-m", "novafs.cli"]
        done = subprocess.run([*command, "stats", cache.volume_url, "--json", *options], capture_output=True, text=True, check=True)
        document = json.loads(done.stdout)
        assert document["library"]["keys"]["sets"] == 1
        subprocess.run([*command, "snapshot", cache.volume_url, "a", "one", *options], capture_output=True, check=True)
        cache.set("a", b"new")
        done = subprocess.run(
            [*command, "snapshots", cache.volume_url, "a", "--json", *options], capture_output=True, text=True, check=True
        )
        assert [row["name"] for row in json.loads(done.stdout)] == ["one"]


# --- two hosts ------------------------------------------------------------------------------------------------------


def test_another_process_sees_changes_within_what_is_fresh(tmp_path: Path) -> None:
    with opened(tmp_path) as one, opened(tmp_path, state_dir=tmp_path / "two", fresh_s=0.0) as two:
        assert two.get("a") is None
        for turn in range(5):
            one.set("a", b"%d" % turn * 50_000)
            assert two.get("a") == b"%d" % turn * 50_000
        one.delete("a")
        assert two.get("a") is None


def test_a_reader_elsewhere_survives_that_its_value_is_collected(tmp_path: Path) -> None:
    """What it looked up is gone from the store when it reads: it looks again."""
    short = {"gc.grace": "0.1s"}
    with opened(tmp_path, settings=short) as one:
        one.set("a", BIG)
        two = opened(tmp_path, state_dir=tmp_path / "two", fresh_s=60.0, settings=short)
    with opened(tmp_path, settings=short) as one, two:
        assert two.contains("a")
        one.set("a", b"new")
        # Nobody has it open, and a collection with the least grace takes it.
        deadline_s = time.monotonic() + 60
        while not one._portal.call(lambda: collect_all(one)).packs_deleted and time.monotonic() < deadline_s:
            pass
        assert two.get("a") == b"new"


# --- ahead of need ----------------------------------------------------------------------------------------------------


def test_a_prefetch_request_brings_values_into_l1(cache: HierarchicalCache) -> None:
    cache.set_multi({"a": BIG, "b": BIG[::-1]})
    cache.drop_cached()
    ticket = cache.prefetch(PrefetchRequest(["a", "missing"], priority=3))
    found = ticket.wait(60)
    assert ticket.done
    assert (found.keys, found.missing, found.failed, found.error) == (1, ("missing",), 0, "")
    assert found.fetched == found.chunks == 49
    before = cache.stats().tiers["l3"].hits
    assert cache.get("a") == BIG
    assert cache.stats().tiers["l3"].hits == before
    again = cache.prefetch(PrefetchRequest(["a"])).wait(60)
    assert (again.fetched, again.held) == (0, 49)
    assert cache.prefetch(PrefetchRequest([])).wait(1).keys == 0


def test_a_prefetch_that_was_given_up_ends(cache: HierarchicalCache) -> None:
    cache.set_multi({f"k{number}": BIG for number in range(3)})
    cache.drop_cached()
    ticket = cache.prefetch(PrefetchRequest([f"k{number}" for number in range(3)] * 50))
    ticket.cancel()
    assert ticket.wait(60).missing == ()
    assert cache.get("k0") == BIG


def test_keys_that_follow_each_other_are_predicted_and_fetched(cache: HierarchicalCache) -> None:
    names = [f"frame{number}" for number in random.Random(3).sample(range(1000), 40)]
    cache.set_multi({name: random.Random(name).randbytes(100_000) for name in names})
    for _ in range(3):
        for name in names:
            cache.get(name)
    predicted = cache.predict_next(names[4], 3)
    assert [name for name, _ in predicted] == names[5:8]
    assert all(0.5 < chance <= 1.0 for _, chance in predicted)
    cache.drop_cached()
    cache.get(names[0])
    deadline_s = time.monotonic() + 60
    while cache.stats().prefetch.keys_issued < 3 and time.monotonic() < deadline_s:
        pass
    figures = cache.stats()
    assert figures.prefetch.keys_issued >= 3
    assert (figures.model_accuracy["predictor"] or 0) > 0.5


def test_what_was_learned_of_keys_is_known_to_the_next_process(tmp_path: Path) -> None:
    names = [f"n{number}" for number in range(12)]
    with opened(tmp_path) as cache:
        cache.set_multi(dict.fromkeys(names, b"x"))
        for _ in range(4):
            for name in names:
                cache.get(name)
    with opened(tmp_path, state_dir=tmp_path / "other") as cache:
        assert cache.predict_next("n3", 1)[0][0] in ("n4", "n5")


# --- figures ----------------------------------------------------------------------------------------------------------


def test_stats_count_what_happened(cache: HierarchicalCache) -> None:
    cache.set("a", BIG)
    cache.set("copy", BIG)
    cache.set("text", b"the same words over and over. " * 10_000)
    cache.get("a")
    cache.get("missing")
    found = cache.stats()
    assert (found.keys.hits, found.keys.misses, found.keys.sets, found.hit_rate) == (1, 1, 3, 0.5)
    assert found.dedup_ratio > 1.5
    assert found.compression_ratio > 1.05
    assert found.saved_bytes > len(BIG)
    assert found.tiers["l1"].hit_rate == 1.0
    assert found.latency["set"].count == 3
    assert found.latency["get"].p99_s >= found.latency["get"].p50_s > 0
    cache.drop_cached()
    cache.get("a")
    after = cache.stats()
    assert after.tiers["l1"].misses > 0
    assert after.tiers["l3"].hits >= 49
    assert set(after.model_accuracy) == {"eviction", "prefetch", "predictor"}
    pattern = cache.patterns("a")
    assert pattern is not None
    assert pattern.pattern in ("idle", "sequential")
    assert cache.patterns("never read") is None


def test_the_package_names_what_a_program_uses() -> None:
    for name in novafs.__all__:
        assert getattr(novafs, name) is not None
    with pytest.raises(AttributeError, match="nothing_such"):
        _ = novafs.nothing_such
    said = run_python("import sys, novafs.cli; print('novafs.volume' in sys.modules, 'boto3' in sys.modules)")
    assert said == "False False\n"


# --- on trio ------------------------------------------------------------------------------------------------------------


def test_the_async_twin_does_the_same(tmp_path: Path) -> None:
    async def main() -> None:
        config = CacheConfig.default(state_dir=tmp_path / "state")
        cache = AsyncHierarchicalCache(tmp_path / "volume", config)
        with pytest.raises(ClosedError):
            await cache.get("a")
        async with cache:
            await cache.set("a", BIG)
            async with trio.open_nursery() as nursery:
                for number in range(10):
                    nursery.start_soon(cache.set, f"k{number}", b"x" * number)
            assert await cache.count() == 11
            reader = await cache.open("a")
            async with reader:
                assert await reader.read(5) == BIG[:5]
                assert await reader.read() == BIG[5:]
                assert await reader.read() == b""
            writer = await cache.open("b", "wb")
            async with writer:
                await writer.write(BIG)
            assert await cache.get("b") == BIG
            await cache.drop_cached()
            result = await cache.prefetch(PrefetchRequest(["a"])).wait()
            assert result.fetched == 49
            with pytest.raises(BusyError):
                await cache.__aenter__()
            with trio.CancelScope() as scope:
                scope.cancel()
                await cache.set("a", b"cancelled before it began")
            assert await cache.get("a") == BIG
        with pytest.raises(ClosedError):
            await cache.get("a")
        async with cache:
            assert await cache.contains("k3")

    trio.run(main)
