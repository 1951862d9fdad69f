"""Bytes through the mount: whatever is written, by whatever call, is what is read, before and after a remount."""

from __future__ import annotations

import errno
import mmap
import os
import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.mounted import Mount, mounted, running

pytestmark = pytest.mark.fuse

MIB = 1 << 20


def aligned(length: int) -> mmap.mmap:
    """Memory that O_DIRECT accepts."""
    return mmap.mmap(-1, length)


def pread_direct(fd: int, length: int, offset: int) -> bytes:
    with aligned(length) as memory:
        got = os.preadv(fd, [memory], offset)
        return memory[:got]


def pwrite_direct(fd: int, data: bytes, offset: int) -> None:
    with aligned(len(data)) as memory:
        memory[:] = data
        assert os.pwritev(fd, [memory], offset) == len(data)


def generation(path: Path) -> int:
    return int(os.getxattr(path, "user.novafs.generation"))


def test_a_sparse_file_reads_as_zeros_between_its_parts(place: Path) -> None:
    path = place / "a.raw"
    with path.open("wb") as file:
        file.seek(3 * MIB + 17)
        file.write(b"middle")
        file.truncate(10 * MIB)
    data = path.read_bytes()
    assert len(data) == 10 * MIB
    assert data[3 * MIB + 17 :][:6] == b"middle"
    assert data.count(0) == 10 * MIB - 6
    assert path.stat().st_blocks * 512 < 64 << 10


def test_appending_grows_the_file(place: Path) -> None:
    path = place / "log"
    expected = b""
    for number in range(50):
        line = f"line {number} ".encode() * (number * 37 % 500)
        with path.open("ab", buffering=0) as file:
            file.write(line)
            file.write(b"\n")
        expected += line + b"\n"
    assert path.read_bytes() == expected


def test_two_appenders_never_overwrite_each_other(place: Path) -> None:
    path = place / "log"
    path.touch()

    def append(letter: bytes) -> None:
        with path.open("ab", buffering=0) as file:
            for _ in range(200):
                file.write(letter * 100)

    threads = [threading.Thread(target=append, args=(letter,)) for letter in (b"a", b"b", b"c")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    data = path.read_bytes()
    assert len(data) == 60_000
    assert all(len(set(data[at : at + 100])) == 1 for at in range(0, len(data), 100))


def test_truncation_down_and_up_leaves_zeros(place: Path) -> None:
    path = place / "a.raw"
    path.write_bytes(b"x" * 300_000)
    os.truncate(path, 100_001)
    assert path.read_bytes() == b"x" * 100_001
    os.truncate(path, 200_000)
    assert path.read_bytes() == b"x" * 100_001 + bytes(99_999)
    with path.open("r+b") as file:
        file.truncate(70_000)
        file.truncate(130_000)
        file.seek(129_999)
        file.write(b"!")
    assert path.read_bytes() == b"x" * 70_000 + bytes(59_999) + b"!"
    with path.open("wb"):
        pass
    assert path.stat().st_size == 0
    with path.open("w+b") as file:
        file.write(b"new")
    assert path.read_bytes() == b"new"


def test_opening_with_truncation_empties_what_others_have_open(place: Path) -> None:
    path = place / "a.raw"
    path.write_bytes(b"x" * 100_000)
    with path.open("rb", buffering=0) as reader:
        assert reader.read(10) == b"x" * 10
        fd = os.open(path, os.O_WRONLY | os.O_TRUNC)
        assert os.fstat(reader.fileno()).st_size == 0
        os.pwrite(fd, b"new", 50)
        os.close(fd)
        reader.seek(0)
        assert reader.read() == bytes(50) + b"new"


def test_direct_io_of_any_aligned_block(place: Path) -> None:
    path = place / "a.raw"
    draw = random.Random(7)
    model = bytearray(4 * MIB)
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_DIRECT)
    try:
        os.ftruncate(fd, len(model))
        for _ in range(150):
            length = draw.choice((512, 4096, 65536, 200 * 512, 1 * MIB))
            offset = draw.randrange(0, len(model) - length + 1, 512)
            data = draw.randbytes(length)
            pwrite_direct(fd, data, offset)
            model[offset : offset + length] = data
            at = draw.randrange(0, len(model) - length + 1, 512)
            assert pread_direct(fd, length, at) == model[at : at + length]
        assert pread_direct(fd, 4096, len(model) - 512) == model[-512:]
        assert pread_direct(fd, 4096, len(model)) == b""
    finally:
        os.close(fd)
    assert path.read_bytes() == model


def test_direct_and_buffered_handles_see_each_other(place: Path) -> None:
    path = place / "a.raw"
    path.write_bytes(b"a" * MIB)
    direct = os.open(path, os.O_RDWR | os.O_DIRECT)
    buffered = os.open(path, os.O_RDWR)
    try:
        for number in range(20):
            at = number * 8192
            assert os.pread(buffered, 4096, at) == b"a" * 4096
            pwrite_direct(direct, b"d" * 4096, at)
            assert os.pread(buffered, 4096, at) == b"d" * 4096
            os.pwrite(buffered, b"b" * 100, at + 50)
            assert pread_direct(direct, 4096, at) == b"d" * 50 + b"b" * 100 + b"d" * 3946
    finally:
        os.close(direct)
        os.close(buffered)


def test_a_mapping_reads_and_writes(place: Path) -> None:
    path = place / "a.raw"
    content = random.Random(3).randbytes(MIB)
    path.write_bytes(content)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as memory:
        assert memory[:] == content
        assert memory[123_456:123_500] == content[123_456:123_500]
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as memory:
        memory[70_000:70_005] = b"mmap!"
        memory[-1:] = b"$"
        memory.flush()
        fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
        assert pread_direct(fd, 4096, 69_632)[368:373] == b"mmap!"
        os.close(fd)
    assert path.read_bytes() == content[:70_000] + b"mmap!" + content[70_005:-1] + b"$"


def test_a_mapping_that_is_closed_without_a_flush_is_not_lost(place: Path) -> None:
    path = place / "a.raw"
    path.write_bytes(b"x" * MIB)
    with path.open("r+b") as file:
        memory = mmap.mmap(file.fileno(), 0)
    memory[5000:5003] = b"yyy"  # the descriptor is closed; the mapping holds the file open
    memory.close()
    assert path.read_bytes() == b"x" * 5000 + b"yyy" + b"x" * (MIB - 5003)


SYNCHRONOUS = {
    "O_SYNC": (os.O_SYNC, 0),
    "O_DSYNC": (os.O_DSYNC, 0),
    "O_DIRECT|O_DSYNC": (os.O_DIRECT | os.O_DSYNC, 0),
    "RWF_DSYNC": (0, os.RWF_DSYNC),
}


@pytest.fixture(scope="module")
def strict(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mount]:
    """A mount on which a commit to L3 is what fsync waits for, so that `user.novafs.generation` tells of each."""
    with mounted(tmp_path_factory.mktemp("strict"), "--durability", "store") as mount:
        yield mount


@pytest.mark.parametrize("flags", SYNCHRONOUS.values(), ids=SYNCHRONOUS)
def test_each_synchronous_write_is_durable_before_it_returns(strict: Mount, flags: tuple[int, int]) -> None:
    """semantics: S2. The kernel sends an FSYNC after the WRITE, for O_SYNC, O_DSYNC and RWF_DSYNC, since handles have no direct_io."""
    path = strict.path / "a.raw"
    path.write_bytes(bytes(MIB))
    fd = os.open(path, os.O_RDWR | flags[0])
    try:
        os.pwrite(fd, b"x", MIB)
        os.fsync(fd)  # from here on the image is ours to write
        for number in range(3):
            before = generation(path)
            with aligned(4096) as memory:
                memory[:] = bytes([number + 1]) * 4096
                assert os.pwritev(fd, [memory], number * 4096, flags[1]) == 4096
            assert generation(path) > before
    finally:
        os.close(fd)


def test_fsync_fdatasync_and_close_commit(strict: Mount) -> None:
    """semantics: S2, S5."""
    path = strict.path / "b.raw"
    path.write_bytes(bytes(MIB))
    calls: list[Callable[[int], None]] = [os.fsync, os.fdatasync, os.close]
    fd = os.open(path, os.O_RDWR)
    os.pwrite(fd, b"x", 0)
    os.fsync(fd)
    seen = [generation(path)]
    for number, call in enumerate(calls):
        os.pwrite(fd, b"%d" % number, 0)
        assert generation(path) == seen[-1]
        call(fd)
        seen.append(generation(path))
    assert seen == sorted(set(seen))
    with path.open("rb") as file:
        os.fsync(file.fileno())
    assert generation(path) == seen[-1]


OPERATIONS = 1500


@pytest.mark.parametrize("chunk_size", [4 << 10, 64 << 10, 1 << 20])
def test_random_reads_writes_and_sizes_equal_those_of_a_plain_file(tmp_path: Path, chunk_size: int) -> None:
    """Three mounts one after the other; `OPERATIONS` steps in each, on the mount and on a plain file."""
    seed = 20_240_607 + chunk_size
    draw = random.Random(seed)
    plain = tmp_path / "plain"
    plain.write_bytes(b"")
    url = None
    limit = 3 * MIB + 12_345

    def step(a: int, b: int) -> None:
        kind = draw.random()
        if kind < 0.45:
            length = draw.choice((1, 511, 512, 4096, 4097, 65_536, 65_537, 300_000))
            data = draw.randbytes(length) if draw.random() < 0.8 else bytes(length)
            offset = draw.randrange(limit - length)
            for fd in (a, b):
                assert os.pwrite(fd, data, offset) == length
        elif kind < 0.9:
            length, offset = draw.choice((1, 512, 4096, 70_000, 400_000)), draw.randrange(limit)
            assert os.pread(a, length, offset) == os.pread(b, length, offset), f"seed {seed}, {length} bytes at {offset}"
        elif kind < 0.96:
            size = draw.randrange(limit)
            for fd in (a, b):
                os.ftruncate(fd, size)
        elif kind < 0.98:
            os.fsync(a)
        else:
            assert os.fstat(a).st_size == os.fstat(b).st_size

    for _ in range(3):
        with mounted(tmp_path, url=url, chunk_size=chunk_size) as mount:
            url = mount.url
            path = mount.path / "a.raw"
            for _ in range(5):
                a = os.open(path, os.O_RDWR | os.O_CREAT)
                b = os.open(plain, os.O_RDWR)
                for _ in range(OPERATIONS // 5):
                    step(a, b)
                os.close(a)
                os.close(b)
                assert path.read_bytes() == plain.read_bytes(), f"seed {seed}"
    with mounted(tmp_path, url=url) as mount:
        assert (mount.path / "a.raw").read_bytes() == plain.read_bytes(), f"seed {seed}"


def test_many_readers_of_one_image_read_the_same(tmp_path: Path) -> None:
    content = random.Random(9).randbytes(8 * MIB)
    with mounted(tmp_path) as mount:
        (mount.path / "a.raw").write_bytes(content)
        url = mount.url
    wrong: list[str] = []
    with mounted(tmp_path, url=url) as mount:

        def read(seed: int) -> None:
            draw = random.Random(seed)
            fd = os.open(mount.path / "a.raw", os.O_RDONLY | (os.O_DIRECT if seed % 2 else 0))
            try:
                for _ in range(60):
                    at = draw.randrange(0, 8 * MIB - 256 * 1024, 4096)
                    if pread_direct(fd, 256 * 1024, at) != content[at : at + 256 * 1024]:
                        wrong.append(f"reader {seed} at {at}")
            finally:
                os.close(fd)

        threads = [threading.Thread(target=read, args=(seed,)) for seed in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


def test_a_second_mount_sees_what_was_closed_in_the_first(tmp_path: Path) -> None:
    """semantics: S8, S13. Close-to-open (design 5.5): size, pages and O_APPEND of a kernel that had cached an older generation."""
    with mounted(tmp_path) as first, running(first.url, tmp_path / "mnt2", tmp_path / "state2") as second:
        here, there = first.path / "a.raw", second.path / "a.raw"
        here.write_bytes(b"one" * 10_000)
        assert there.read_bytes() == b"one" * 10_000
        for number in range(5):
            line = f"line {number}\n".encode() * 1000
            writer, reader = (here, there) if number % 2 else (there, here)
            before = reader.read_bytes()
            os.listdir(reader.parent)
            with writer.open("ab") as file:
                file.write(line)
            assert reader.read_bytes() == before + line
            assert reader.stat().st_size == len(before + line)
        with here.open("r+b") as file:
            file.write(b"TWO")
        assert there.read_bytes()[:6] == b"TWOone"
        os.truncate(there, 5)
        assert here.read_bytes() == b"TWOon"
        # Appending through a kernel that knows an older size must not overwrite what the other host appended.
        for number in range(6):
            with (here, there)[number % 2].open("ab", buffering=0) as file:
                file.write(b"%d" % number)
        assert here.read_bytes() == b"TWOon012345"
        second.unmount()
        assert second.wait() == 0, second.text


def test_a_large_directory_of_another_host_shows_sizes_that_can_be_appended_to(tmp_path: Path) -> None:
    """semantics: S13. A listing may show hints; an open must not believe them."""
    with mounted(tmp_path) as first, running(first.url, tmp_path / "mnt2", tmp_path / "state2") as second:
        for number in range(80):
            (first.path / f"{number}").write_bytes(b"x" * number)
        for number in (5, 50, 79):
            with (first.path / f"{number}").open("ab") as file:
                file.write(b"first")
            os.listdir(second.path)
            with (second.path / f"{number}").open("ab") as file:
                file.write(b"second")
            assert (first.path / f"{number}").read_bytes() == b"x" * number + b"firstsecond"
        second.unmount()
        assert second.wait() == 0, second.text


def test_pages_stay_cached_across_opens_of_one_generation(tmp_path: Path) -> None:
    """mincore(2) tells what the kernel holds, before the first read through a new handle."""
    with mounted(tmp_path, "--l1-capacity", "64MiB") as mount:
        path = mount.path / "a.raw"
        content = os.urandom(MIB)
        path.write_bytes(content)
        assert path.read_bytes() == content
        with path.open("rb") as held:
            assert resident(held.fileno(), MIB) == 1.0
        with path.open("rb") as file:
            assert resident(file.fileno(), MIB) == 1.0
            assert file.read() == content


def resident(fd: int, length: int) -> float:
    """The share of the file's pages that the kernel holds, mincore(2)."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    with mmap.mmap(fd, length, access=mmap.ACCESS_COPY) as memory:
        view = ctypes.c_char.from_buffer(memory)
        vector = (ctypes.c_ubyte * (length // 4096))()
        assert libc.mincore(ctypes.byref(view), ctypes.c_size_t(length), vector) == 0, os.strerror(ctypes.get_errno())
        del view
        return sum(value & 1 for value in vector) / len(vector)


def test_a_write_beyond_the_largest_image_is_efbig(place: Path) -> None:
    path = place / "a.raw"
    path.write_bytes(b"x")
    with path.open("r+b") as file, pytest.raises(OSError) as found:
        os.ftruncate(file.fileno(), (1 << 63) - 1)
    assert found.value.errno in (errno.EFBIG, errno.EINVAL)
    assert path.read_bytes() == b"x"
