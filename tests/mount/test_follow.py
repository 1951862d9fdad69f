"""An image that is open for writing on one mount while another writes it, as during a live migration: `novafs.follow`."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from mmap import mmap
from pathlib import Path

import pytest
import trio

from novafs.control import call
from novafs.statedir import CONTROL_SOCKET
from tests.support.cli import novafs
from tests.support.engine import make_volume
from tests.support.mounted import Mount, mounted, running

pytestmark = pytest.mark.fuse

BLOCK = 4096
SIZE = 4 << 20
ANSWERED = r": host .* commits each fsync to the store"


def block(number: int) -> bytes:
    return number.to_bytes(8, "little") * (BLOCK // 8)


class Disk:
    """An image that is open for writing past the kernel's cache, in blocks."""

    def __init__(self, mount: Mount, name: str) -> None:
        self.fd = os.open(mount.path / name, os.O_RDWR | os.O_DIRECT)
        self._aligned = mmap(-1, BLOCK)

    def write(self, at: int, number: int) -> None:
        self._aligned[:] = block(number)
        assert os.pwrite(self.fd, self._aligned, at * BLOCK) == BLOCK

    def read(self, at: int) -> int:
        assert os.preadv(self.fd, [self._aligned], at * BLOCK) == BLOCK
        number = int.from_bytes(self._aligned[:8], "little")
        assert bytes(self._aligned) == block(number)
        return number

    def close(self) -> None:
        os.close(self.fd)

    def close_quietly(self) -> None:
        """Its daemon is gone."""
        with contextlib.suppress(OSError):
            self.close()


def wait_until(reached: Callable[[], bool], what: str) -> None:
    deadline_s = time.monotonic() + 60
    while not reached():
        assert time.monotonic() < deadline_s, what
        time.sleep(0.02)


def held(mount: Mount) -> int:
    """Images whose lease a mount holds."""
    count: int = call(mount.state_dir / CONTROL_SOCKET, "stats")["leases"]["held"]
    return count


Pair = tuple[Mount, Mount]


def make_disk(mount: Mount, name: str) -> None:
    with (mount.path / name).open("wb") as file:
        file.truncate(SIZE)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """Two hosts for all tests that kill none."""
    directory = tmp_path_factory.mktemp("follow")
    url = trio.run(lambda: make_volume(f"file://{directory / 'store'}"))
    with mounted(directory / "one", url=url) as one, mounted(directory / "two", "--set", "lease.wait=1s", url=url) as two:
        yield one, two


@pytest.fixture
def disk(pair: Pair, request: pytest.FixtureRequest) -> str:
    """The name of a disk of zeros of this test's own."""
    name: str = request.node.name
    make_disk(pair[0], name)
    return name


def test_what_was_fsynced_is_seen_at_once_by_who_has_it_open_for_writing(pair: Pair, disk: str) -> None:
    """semantics: S22. The promise of the acknowledgement: no read gives anything older than the last fsync before it began."""
    one, two = pair
    source = Disk(one, disk)
    source.write(0, 1)
    target = Disk(two, disk)
    two.wait_log(disk + ANSWERED)
    for number in range(2, 42):
        source.write(number * 7, number)
        source.write(1, number)
        os.fsync(source.fd)
        assert (target.read(number * 7), target.read(1)) == (number, number)
    source.close()
    target.close()


def test_a_target_that_has_read_nothing_but_the_first_bytes_goes_on_with_what_the_source_left(pair: Pair, disk: str) -> None:
    """It opens the disk for writing before the source ends, and writes after that through the same handle."""
    one, two = pair
    source = Disk(one, disk)
    source.write(0, 1)
    target = Disk(two, disk)
    assert target.read(0) in (0, 1)
    source.write(0, 2)
    source.write(500, 3)
    source.close()
    wait_until(lambda: held(one) == 0, "the source gives the lease back")
    target.write(501, 4)
    os.fsync(target.fd)
    assert [target.read(at) for at in (0, 500, 501)] == [2, 3, 4]
    target.close()
    again = Disk(one, disk)
    assert [again.read(at) for at in (0, 500, 501)] == [2, 3, 4]
    again.close()


def test_a_target_that_has_read_what_was_written_since_must_reopen(pair: Pair, disk: str) -> None:
    """semantics: S6. A machine that was started a second time by mistake knows blocks that are old by now."""
    one, two = pair
    source = Disk(one, disk)
    source.write(500, 1)
    target = Disk(two, disk)
    two.wait_log(disk + ANSWERED)
    assert target.read(500) in (0, 1)
    source.write(500, 2)
    os.fsync(source.fd)
    source.close()
    wait_until(lambda: held(one) == 0, "the source gives the lease back")
    with pytest.raises(OSError) as caught:
        target.write(501, 3)
    assert caught.value.errno == errno.ESTALE
    again = Disk(two, disk)
    again.write(501, 3)
    assert [again.read(at) for at in (500, 501)] == [2, 3]
    with pytest.raises(OSError) as caught:
        target.write(501, 4)
    assert caught.value.errno == errno.ESTALE
    again.close()
    target.close()


def test_a_target_that_has_read_again_what_was_written_since_goes_on(pair: Pair, disk: str) -> None:
    """So does an emulator whose disk has a format: it reads the tables before the machine comes, and again when it has come."""
    one, two = pair
    source = Disk(one, disk)
    for at in (300, 400, 500):
        source.write(at, 1)
    target = Disk(two, disk)
    two.wait_log(disk + ANSWERED)
    assert [target.read(at) for at in (300, 400, 500)] == [1, 1, 1]
    source.write(400, 2)
    source.write(500, 2)
    os.fsync(source.fd)
    source.close()
    wait_until(lambda: held(one) == 0, "the source gives the lease back")
    assert [target.read(at) for at in (400, 500)] == [2, 2]
    target.write(501, 3)
    os.fsync(target.fd)
    assert [target.read(at) for at in (300, 400, 500, 501)] == [1, 2, 2, 3]
    target.close()


def test_a_target_that_opens_it_before_the_source_has_written_goes_on_with_what_the_source_left(pair: Pair, disk: str) -> None:
    """semantics: S22. A quiet data disk: nobody has the lease when both open it for writing."""
    one, two = pair
    source = Disk(one, disk)
    target = Disk(two, disk)
    assert target.read(0) == 0
    source.write(500, 1)
    os.fsync(source.fd)
    assert target.read(500) == 1
    source.close()
    wait_until(lambda: held(one) == 0, "the source gives the lease back")
    target.write(501, 2)
    os.fsync(target.fd)
    assert [target.read(at) for at in (0, 500, 501)] == [0, 1, 2]
    target.close()


def test_who_waits_reads_nothing_older_than_the_last_fsync_whenever_the_first_write_comes(pair: Pair, disk: str) -> None:
    """semantics: S22. The target reads all the time, from L1, with no lease to look for; then the source takes it, three times."""
    one, two = pair
    target = Disk(two, disk)
    fsynced = 0
    seen = threading.Semaphore(0)

    def write() -> None:
        nonlocal fsynced
        for number in range(1, 4):
            source = Disk(one, disk)
            assert source.read(7) == number - 1
            for _ in range(3):
                source.write(7, number)
                os.fsync(source.fd)
                fsynced = number
            source.close()
            assert seen.acquire(timeout=60)

    with ThreadPoolExecutor(1) as pool:
        writer, known = pool.submit(write), 0
        while not writer.done():
            least = fsynced
            found = target.read(7)
            assert found >= least, f"read {found} when {least} was fsynced"
            if found > known and held(one) == 0:
                known = found
                seen.release()
        writer.result()
    target.close()


def test_two_that_wait_take_turns_in_writing(pair: Pair, disk: str) -> None:
    """Both have it open for writing, neither has read anything that the other changes, and the first one closes."""
    one, two = pair
    first, second = Disk(one, disk), Disk(two, disk)
    assert (first.read(0), second.read(0)) == (0, 0)
    first.write(100, 1)
    first.close()
    wait_until(lambda: held(one) == 0, "the first gives the lease back")
    second.write(200, 2)
    os.fsync(second.fd)
    first = Disk(one, disk)
    assert [first.read(at) for at in (100, 200)] == [1, 2]
    second.close()
    wait_until(lambda: held(two) == 0, "the second gives the lease back")
    first.write(300, 3)
    assert [first.read(at) for at in (100, 200, 300)] == [1, 2, 3]
    first.close()


def test_who_has_made_a_file_and_waits_follows_as_well(pair: Pair, disk: str) -> None:
    """`open` with O_CREAT, for a new name and for one that another host has made a moment before."""
    one, two = pair
    made = os.open(one.path / f"{disk}-new", os.O_RDWR | os.O_CREAT)
    source = os.open(two.path / f"{disk}-new", os.O_RDWR | os.O_CREAT)
    os.pwrite(source, b"written elsewhere", 0)
    os.fsync(source)
    wait_until(lambda: os.pread(made, 17, 0) == b"written elsewhere", "the kernel learns the size")
    os.close(source)
    wait_until(lambda: held(two) == 0, "the lease is given back")
    os.pwrite(made, b"here", 0)
    os.close(made)
    assert (one.path / f"{disk}-new").read_bytes() == b"hereten elsewhere"


def test_a_source_whose_image_was_handed_off_follows_who_has_it(pair: Pair, disk: str) -> None:
    """semantics: S22. Its machine stands still, its disk is open for writing all the same."""
    one, two = pair
    source = Disk(one, disk)
    source.write(500, 1)
    novafs(
        "handoff", one.url, disk, "--to", call(two.state_dir / CONTROL_SOCKET, "stats")["volume"]["host_id"], "--state-dir", one.state_dir
    )
    target = Disk(two, disk)
    target.write(500, 2)
    os.fsync(target.fd)
    assert source.read(500) == 2
    target.close()
    wait_until(lambda: held(two) == 0, "the lease is given back")
    with pytest.raises(OSError) as caught:
        source.write(501, 3)
    assert caught.value.errno == errno.ESTALE
    source.close()


def test_who_opens_it_for_reading_past_the_page_cache_is_offered_what_is_hot(pair: Pair, disk: str) -> None:
    """So an emulator does that waits for a machine, as `-drive` and libvirt have it; fsyncs do not go to the store for it."""
    one, two = pair
    source = Disk(one, disk)
    for number in range(0, SIZE // BLOCK, 16):
        source.write(number, number)
    source.close()
    source = Disk(one, disk)
    for number in range(0, SIZE // BLOCK, 16):
        assert source.read(number) == number
    source.write(0, 5)
    taken = call(two.state_dir / CONTROL_SOCKET, "stats")["handoffs"]["taken"]
    reader = os.open(two.path / disk, os.O_RDONLY | os.O_DIRECT)
    wait_until(lambda: call(two.state_dir / CONTROL_SOCKET, "stats")["handoffs"]["taken"] > taken, "the offer")
    one.wait_log(disk + r": \d+ chunks that are hot are offered")
    assert call(one.state_dir / CONTROL_SOCKET, "stats")["leases"]["wanted"] == 0
    os.close(reader)
    source.close()


def test_the_lease_is_free_when_nobody_writes_any_more_although_somebody_reads(pair: Pair, disk: str) -> None:
    """semantics: S6. The emulator that a machine has left keeps its disk open for reading until it is told to end."""
    one, two = pair
    source = Disk(one, disk)
    source.write(7, 1)
    reader = os.open(one.path / disk, os.O_RDONLY)
    source.close()
    wait_until(lambda: held(one) == 0, "the source gives the lease back")
    target = Disk(two, disk)
    target.write(8, 2)
    os.fsync(target.fd)
    assert target.read(7) == 1
    assert (held(one), held(two)) == (0, 1)
    target.close()
    os.close(reader)


def test_a_machine_that_goes_on_where_it_was_writes_on(pair: Pair, disk: str) -> None:
    """The migration fails: the target gives up, and the source opens its disk for writing again."""
    one, two = pair
    source = Disk(one, disk)
    source.write(7, 1)
    target = Disk(two, disk)
    two.wait_log(disk + ANSWERED)
    target.close()
    reader = os.open(one.path / disk, os.O_RDONLY)
    source.close()
    source = Disk(one, disk)
    source.write(8, 2)
    os.fsync(source.fd)
    assert (source.read(7), source.read(8)) == (1, 2)
    # Without a target fsyncs go to the journal again.
    wait_until(lambda: call(one.state_dir / CONTROL_SOCKET, "stats")["leases"]["wanted"] == 0, "the request is gone")
    source.close()
    os.close(reader)


def test_a_source_that_is_lost_with_its_journal_has_lost_nothing_that_was_fsynced(tmp_path: Path) -> None:
    """semantics: S22. While a target has the image open for writing, the store has each fsync."""
    url = trio.run(lambda: make_volume(f"file://{tmp_path / 'store'}"))
    with mounted(tmp_path / "two", url=url) as two:
        with running(url, tmp_path / "one" / "mnt", tmp_path / "one" / "state") as one:
            make_disk(one, "disk")
            source = Disk(one, "disk")
            source.write(0, 1)
            os.fsync(source.fd)
            target = Disk(two, "disk")
            two.wait_log("disk" + ANSWERED)
            for number in range(2, 30):
                source.write(number, number)
                os.fsync(source.fd)
            one.kill()
            shutil.rmtree(one.state_dir)
            source.close_quietly()
        assert [target.read(number) for number in range(2, 30)] == list(range(2, 30))
        target.close()
        novafs("lease", "break", url, "disk", "--yes", "--state-dir", tmp_path / "elsewhere", "--l2-url", "none")
        target = Disk(two, "disk")
        target.write(0, 99)
        os.fsync(target.fd)
        assert [target.read(number) for number in range(30)] == [99, 0, *range(2, 30)]
        target.close()


def test_a_target_that_is_killed_leaves_the_source_as_it_was(tmp_path: Path) -> None:
    url = trio.run(lambda: make_volume(f"file://{tmp_path / 'store'}"))
    with mounted(tmp_path / "one", url=url) as one:
        make_disk(one, "disk")
        source = Disk(one, "disk")
        source.write(0, 1)
        with running(url, tmp_path / "two" / "mnt", tmp_path / "two" / "state") as two:
            target = Disk(two, "disk")
            two.wait_log("disk" + ANSWERED)
            two.kill()
            target.close_quietly()
        for number in range(1, 20):
            source.write(number, number)
            os.fsync(source.fd)
        assert [source.read(number) for number in range(1, 20)] == list(range(1, 20))
        source.close()


def test_a_source_that_does_not_answer_does_not_keep_a_target_from_reading(pair: Pair, disk: str) -> None:
    """It is paused, or its host is dead: the open goes on after `lease.wait`, reads what is committed, and must not write."""
    one, two = pair
    source = Disk(one, disk)
    source.write(0, 1)
    source.close()
    source = Disk(one, disk)
    source.write(1, 1)
    one.signal(signal.SIGSTOP)
    try:
        target = Disk(two, disk)
        two.wait_log(disk + ": open for writing, and the host that writes it has not answered within 1 s")
        assert target.read(0) == 1
        with pytest.raises(OSError) as caught:
            target.write(0, 2)
        assert caught.value.errno == errno.EROFS
        target.close()
    finally:
        one.signal(signal.SIGCONT)
    source.close()


def test_two_writers_that_close_at_the_same_time_leave_no_lease_to_a_reader(pair: Pair, disk: str) -> None:
    """semantics: S6. Whichever of them is the last, and although the first is still committing."""
    one, _ = pair
    reader = os.open(one.path / disk, os.O_RDONLY)
    for number in range(20):
        first, second = Disk(one, disk), Disk(one, disk)
        first.write(7, number)
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(Disk.close, (first, second)))
        wait_until(lambda: held(one) == 0, "the lease is given back")
    os.close(reader)


def test_a_truncation_by_name_leaves_no_lease_to_a_reader(pair: Pair, disk: str) -> None:
    """semantics: S6. truncate(2) has no handle whose close could give it back."""
    one, two = pair
    reader = os.open(one.path / disk, os.O_RDONLY)
    os.truncate(one.path / disk, SIZE + BLOCK)
    wait_until(lambda: held(one) == 0, "the lease is given back")
    target = Disk(two, disk)
    target.write(SIZE // BLOCK, 2)
    assert target.read(SIZE // BLOCK) == 2
    target.close()
    os.close(reader)


def test_a_target_does_not_read_by_itself_what_the_kernel_has_of_before(pair: Pair, disk: str) -> None:
    """semantics: S6. A machine that was started a second time by mistake, its disk in the page cache since it was read here."""
    one, two = pair
    source = Disk(one, disk)
    source.write(500, 1)
    os.fsync(source.fd)
    wait_until(lambda: (two.path / disk).read_bytes()[500 * BLOCK : 501 * BLOCK] == block(1), "the source commits")
    target = os.open(two.path / disk, os.O_RDWR)
    two.wait_log(disk + ANSWERED)
    assert os.pread(target, BLOCK, 500 * BLOCK) == block(1)
    source.write(500, 2)
    os.fsync(source.fd)
    source.close()
    wait_until(lambda: held(one) == 0, "the source gives the lease back")
    with pytest.raises(OSError) as caught:
        os.pwrite(target, block(3), 501 * BLOCK)
    assert caught.value.errno == errno.ESTALE
    os.close(target)


@pytest.mark.parametrize("how", ["utime", "getxattr", "truncate"])
@pytest.mark.parametrize("reading", [True, False])
def test_an_open_finds_what_was_closed_elsewhere_although_something_else_has_looked_before(
    pair: Pair, disk: str, how: str, reading: bool
) -> None:
    """semantics: S8. What takes a newer generation over without an open leaves the kernel's pages as they are."""
    one, two = pair
    path = two.path / disk
    wait_until(path.exists, "the name is known")
    reader = os.open(path, os.O_RDONLY)
    assert os.pread(reader, BLOCK, 500 * BLOCK) == bytes(BLOCK)
    if not reading:
        os.close(reader)
    source = Disk(one, disk)
    source.write(500, 1)
    source.close()
    wait_until(lambda: held(one) == 0, "the source gives the lease back")
    if how == "utime":
        os.utime(path, ns=(1, 1))
    elif how == "getxattr":
        os.getxattr(path, "user.novafs.dedup_ratio")
    else:
        os.truncate(path, SIZE)
    with path.open("rb") as file:
        assert os.pread(file.fileno(), BLOCK, 500 * BLOCK) == block(1)
    if reading:
        os.close(reader)


def test_who_appends_and_waits_writes_over_nothing_that_was_appended_elsewhere(pair: Pair, disk: str) -> None:
    """semantics: S13. The kernel computes the offset from the size that it knows."""
    one, two = pair
    name = disk + ".log"
    source = os.open(one.path / name, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    wait_until((two.path / name).exists, "the name is known")
    target = os.open(two.path / name, os.O_WRONLY | os.O_APPEND)
    os.write(source, b"source\n")
    os.fsync(source)
    os.close(source)
    wait_until(lambda: held(one) == 0, "the source gives the lease back")
    with contextlib.suppress(OSError):
        os.write(target, b"target\n")
    os.close(target)
    assert (two.path / name).read_bytes() in (b"source\n", b"source\ntarget\n")
    with (two.path / name).open("ab") as file:
        file.write(b"target\n")
    assert (two.path / name).read_bytes().endswith(b"target\n")
    assert (two.path / name).read_bytes().startswith(b"source\n")
