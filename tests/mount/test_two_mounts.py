"""Two mounts of one volume on this machine, each with its own L1, journal and kernel caches: close-to-open, one writer."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from novafs.control import call
from novafs.statedir import CONTROL_SOCKET
from tests.support.engine import make_volume
from tests.support.mounted import Mount, mounted

pytestmark = pytest.mark.fuse

MB = 1 << 20


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[tuple[Mount, Mount]]:
    url = trio.run(lambda: make_volume(f"file://{tmp_path / 'store'}"))
    rules = ("--set", "lease.wait=0s")
    with mounted(tmp_path / "one", *rules, url=url) as one, mounted(tmp_path / "two", *rules, url=url) as two:
        yield one, two


def wait_given_back(mount: Mount) -> None:
    """The kernel tells of a last close without waiting for it."""
    deadline_s = time.monotonic() + 60
    while call(mount.state_dir / CONTROL_SOCKET, "stats")["leases"]["held"]:
        assert time.monotonic() < deadline_s, "the lease is not given back"
        time.sleep(0.02)


def test_what_was_closed_on_one_host_is_seen_by_the_next_open_on_the_other(pair: tuple[Mount, Mount]) -> None:
    """semantics: S8."""
    one, two = pair
    for number in range(5):
        writer, reader = (one, two) if number % 2 == 0 else (two, one)
        data = os.urandom(MB + number * 1000)
        (writer.path / "a.raw").write_bytes(data)
        assert (reader.path / "a.raw").read_bytes() == data
        assert (reader.path / "a.raw").stat().st_size == len(data)
        wait_given_back(writer)


def test_pages_that_the_other_kernel_cached_are_dropped(pair: tuple[Mount, Mount]) -> None:
    """semantics: S8."""
    one, two = pair
    data = bytearray(os.urandom(MB))
    (one.path / "a.raw").write_bytes(data)
    assert (two.path / "a.raw").read_bytes() == data  # now in the second mount's page cache
    fd = os.open(one.path / "a.raw", os.O_RDWR)
    os.pwrite(fd, b"changed", 70_000)
    os.close(fd)
    data[70_000:70_007] = b"changed"
    assert (two.path / "a.raw").read_bytes() == data  # same size, another generation


def test_the_second_writer_gets_erofs_and_the_log_names_the_holder(pair: tuple[Mount, Mount]) -> None:
    """semantics: S6."""
    one, two = pair
    (one.path / "a.raw").write_bytes(bytes(MB))
    first = os.open(one.path / "a.raw", os.O_RDWR)
    os.pwrite(first, b"mine", 0)
    second = os.open(two.path / "a.raw", os.O_RDWR)  # opening takes no lease
    assert os.pread(second, 4, 0) in (bytes(4), b"mine")  # the holder is asked for it, and commits sooner or later
    with pytest.raises(OSError) as caught:
        os.pwrite(second, b"theirs", 0)
    assert caught.value.errno == errno.EROFS
    two.wait_log(r"holds the lease")
    os.close(second)
    os.close(first)
    wait_given_back(one)
    third = os.open(two.path / "a.raw", os.O_RDWR)
    assert os.pread(third, 4, 0) == b"mine"
    os.pwrite(third, b"ours", 0)
    os.close(third)
    assert (one.path / "a.raw").read_bytes()[:4] == b"ours"


def test_a_handle_that_was_overtaken_must_be_reopened_before_it_writes(pair: tuple[Mount, Mount]) -> None:
    """semantics: S6. Opened for writing here; written and closed there; then the first write here."""
    one, two = pair
    (one.path / "a.raw").write_bytes(bytes(MB))
    stale = os.open(one.path / "a.raw", os.O_RDWR)
    os.pread(stale, 10, 0)
    fd = os.open(two.path / "a.raw", os.O_RDWR)
    os.pwrite(fd, b"two", 0)
    os.close(fd)
    wait_given_back(two)
    with pytest.raises(OSError) as caught:
        os.pwrite(stale, b"one", 100)
    assert caught.value.errno == errno.ESTALE
    os.close(stale)
    again = os.open(one.path / "a.raw", os.O_RDWR)
    os.pwrite(again, b"one", 100)
    os.close(again)
    content = (two.path / "a.raw").read_bytes()
    assert (content[:3], content[100:103]) == (b"two", b"one")


def test_names_made_removed_and_moved_on_one_host_are_seen_on_the_other(pair: tuple[Mount, Mount]) -> None:
    """semantics: S8."""
    one, two = pair
    (one.path / "web").mkdir()
    (one.path / "web" / "a.raw").write_bytes(b"a")
    assert (two.path / "web" / "a.raw").read_bytes() == b"a"
    (two.path / "web" / "a.raw").rename(two.path / "b.raw")
    two_names = sorted(os.listdir(two.path))
    assert two_names == ["b.raw", "web"]
    deadline_looks = 200  # the kernel of the first may believe its own cache for at most a second
    while "b.raw" not in os.listdir(one.path) and deadline_looks:
        deadline_looks -= 1
        trio.run(trio.sleep, 0.02)
    assert (one.path / "b.raw").read_bytes() == b"a"


def test_a_second_mount_with_the_same_state_directory_is_refused(tmp_path: Path) -> None:
    url = trio.run(lambda: make_volume(f"file://{tmp_path / 'store'}"))
    with mounted(tmp_path, url=url) as first:
        (tmp_path / "mnt2").mkdir()
        again = Mount(url, tmp_path / "mnt2", first.state_dir, ["--l2-url", "none"], {})
        assert again.wait() == 1
        assert "mounted already" in again.text
        assert str(first.path) in again.text
