"""What the kernel's settings of a mount change: read-ahead, and how many requests it sends in the background. As root.

    python -m tests.bench.kernel_settings [--rounds 5] [--seconds 1] [--size 128MiB] [--delay-ms 20] [--only SETTING] [--values A,B]
        [--work WORD] [--json]

One mount; in each round every value of a setting is set and measured in turn, the other setting at its default, so each round gives a
ratio to the kernel's own value. The image is read through the page cache, emptied before: from L1 in pieces of 1 MiB and of 128 KiB
(`cp`, `qemu-img`), and cold ("cool" through the control socket) from a Ceph RADOS Gateway behind a relay that delays every answer. Random
reads are of 4 KiB, with O_DIRECT, at depth 16 and 32, from L1 and, of each chunk one, cold; and at depth 4
from L1 while another reads an image that is cold.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import trio

from novafs.control import call
from novafs.measure import MIB, Content, one_of_each, random_blocks, read_deep, write_all
from novafs.statedir import CONTROL_SOCKET
from novafs.units import parse_size
from novafs_mount.host import tune_mount
from novafs_mount.mountpoint import device_of
from tests.bench.relay import relay
from tests.support.ceph import Ceph
from tests.support.engine import make_volume
from tests.support.mounted import Mount, running

READ_AHEADS_KIB = (128, 256, 512, 1024, 2048, 4096, 8192)
BACKGROUNDS = (12, 32, 64, 128, 512)
"""The first of each is the kernel's own."""
CONGESTIONS = (96, 9, 128)
"""Thresholds at 128 background requests. The first, with which the others are compared: three quarters, as the kernel's 9 are of 12."""
DEFAULT = (1024, 128)
RUN_BYTES = 1 << 20
IMAGE, OTHER = "disk.raw", "other.raw"

Measure = Callable[[Path], float]


def drop_pages(path: Path) -> None:
    """Of this file alone."""
    with opened(path, os.O_RDONLY) as fd:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)


@contextmanager
def opened(path: Path, flags: int) -> Iterator[int]:
    fd = os.open(path, flags | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def read_through_pages(path: Path, piece_bytes: int) -> float:
    """MiB a second of one reader, from the begin to the end, with the page cache emptied before."""
    drop_pages(path)
    buffer = bytearray(piece_bytes)
    with opened(path, os.O_RDONLY) as fd:
        began_s, total = time.perf_counter(), 0
        while length := os.readv(fd, [buffer]):
            total += length
        return total / MIB / (time.perf_counter() - began_s)


def run(arguments: argparse.Namespace, mount: Mount) -> dict[str, dict[str, dict[int, list[float]]]]:
    """Setting → work → value → figures by round."""
    path, content = mount.path / IMAGE, Content(parse_size(arguments.size))
    device = device_of(mount.path)
    assert device is not None
    other = Content(16 * MIB)
    write_all(path, content, lambda _share: None)
    write_all(path.with_name(OTHER), other, lambda _share: None)

    def cold(path: Path) -> float:
        call(mount.state_dir / CONTROL_SOCKET, "cool", image=IMAGE, unlearn=True)
        return read_through_pages(path, MIB)

    def short_runs(path: Path) -> tuple[float, float]:
        """MiB a second of a reader that goes on in order for RUN_BYTES, cold, and then elsewhere; and bytes fetched for a byte read."""
        call(mount.state_dir / CONTROL_SOCKET, "cool", image=IMAGE, unlearn=True)
        drop_pages(path)
        places = list(range(content.size_bytes // RUN_BYTES))
        random.shuffle(places)
        fetched = store_bytes()
        with opened(path, os.O_RDONLY) as fd:
            began_s, total = time.perf_counter(), 0
            while places and time.perf_counter() - began_s < arguments.seconds:
                place = places.pop() * RUN_BYTES
                for offset in range(place, place + RUN_BYTES, 128 << 10):
                    total += len(os.pread(fd, 128 << 10, offset))
            seconds = time.perf_counter() - began_s
        return total / MIB / seconds, (store_bytes() - fetched) / total

    def store_bytes() -> int:
        return int(call(mount.state_dir / CONTROL_SOCKET, "stats")["cache"]["l3_traffic"]["read_bytes"])

    def deep(depth: int) -> Measure:
        def measure(path: Path) -> float:
            with opened(path, os.O_RDONLY | os.O_DIRECT) as fd:
                found = read_deep(fd, content, arguments.seconds, lambda _share: None, random_blocks(content, random.Random()), depth)
            return found.iops

        return measure

    def cold_deep(path: Path) -> float:
        call(mount.state_dir / CONTROL_SOCKET, "cool", image=IMAGE, unlearn=True)
        blocks = one_of_each(content, 64 << 10, random.Random())
        with opened(path, os.O_RDONLY | os.O_DIRECT) as fd:
            return read_deep(fd, content, arguments.seconds, lambda _share: None, blocks, 32).iops

    def beside_cold(path: Path) -> float:
        """What another guest gets of L1 while this one waits for the store."""
        call(mount.state_dir / CONTROL_SOCKET, "cool", image=IMAGE, unlearn=True)
        reads = ["--rw=randread", "--randrepeat=0", "--bs=4k", "--direct=1", "--ioengine=libaio", "--iodepth=32", "--readonly"]
        command = ["fio", "--name=cold", f"--filename={path}", *reads, "--time_based", f"--runtime={arguments.seconds + 2:.0f}"]
        with (
            subprocess.Popen(command, stdout=subprocess.DEVNULL) as cold_reader,
            opened(path.with_name(OTHER), os.O_RDONLY | os.O_DIRECT) as fd,
        ):
            waited = reads_that_wait()
            while reads_that_wait() < waited + 64:
                assert cold_reader.poll() is None
            found = read_deep(fd, other, arguments.seconds, lambda _share: None, random_blocks(other, random.Random()), 4)
            cold_reader.terminate()
        return found.iops

    def reads_that_wait() -> int:
        return int(call(mount.state_dir / CONTROL_SOCKET, "stats")["traffic"]["waited_reads"])

    sequential: dict[str, Measure] = {
        "short runs cold, MiB/s": lambda path: short_runs(path)[0],
        "short runs cold, bytes fetched for a byte": lambda path: short_runs(path)[1],
        "cold, MiB/s": cold,  # before the next: it leaves all of it in L1
        "from L1 by 1 MiB, MiB/s": lambda path: read_through_pages(path, MIB),
        "from L1 by 128 KiB, MiB/s": lambda path: read_through_pages(path, 128 << 10),
    }
    random_reads: dict[str, Measure] = {
        "O_DIRECT depth 16, IOPS": deep(16),
        "O_DIRECT depth 32, IOPS": deep(32),
        "O_DIRECT depth 32, cold, IOPS": cold_deep,
        "O_DIRECT depth 4 from L1 beside that, IOPS": beside_cold,
    }
    cells: dict[str, tuple[dict[str, Measure], dict[int, tuple[int, int]]]] = {
        "read-ahead": (sequential, {kib: (kib, DEFAULT[1]) for kib in READ_AHEADS_KIB}),
        "background": (sequential | random_reads, {number: (DEFAULT[0], number) for number in BACKGROUNDS}),
        "congestion": (sequential | random_reads, dict.fromkeys(CONGESTIONS, DEFAULT)),
    }
    found: dict[str, dict[str, dict[int, list[float]]]] = {}
    for number in range(arguments.rounds):
        for setting, (works, values) in cells.items():
            if arguments.only not in (None, setting):
                continue
            # Whatever drifts while a round lasts must not favour one end of the scale.
            chosen = [item for item in values.items() if not arguments.values or item[0] in arguments.values]
            for value, (kib, background) in chosen[:: -1 if number % 2 else 1]:
                tune_mount(*device, read_ahead_bytes=kib << 10, background_max=background)
                if setting == "congestion":
                    Path(f"/sys/fs/fuse/connections/{device[1]}/congestion_threshold").write_text(str(value))
                for work, measure in works.items():
                    if arguments.work not in work:
                        continue
                    found.setdefault(setting, {}).setdefault(work, {}).setdefault(value, []).append(measure(path))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1)
    parser.add_argument("--size", default="128MiB")
    parser.add_argument("--delay-ms", type=float, default=20)
    parser.add_argument("--only", choices=("read-ahead", "background", "congestion"))
    parser.add_argument("--values", type=lambda text: [int(word) for word in text.split(",")], default=[], help="only these, with commas")
    parser.add_argument("--work", default="", help="only those with this in their name")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir="/var/tmp") as name, ExitStack() as stack:
        directory = Path(name)
        ceph = stack.enter_context(Ceph())
        os.environ.update(ceph.environment)
        ceph.make_bucket("kernel")
        port = stack.enter_context(relay(ceph.port, delay_ms=arguments.delay_ms, mbit_per_s=2000))
        url = ceph.volume_url("kernel", endpoint=f"http://127.0.0.1:{port}")
        trio.run(lambda: make_volume(url))
        mount = stack.enter_context(running(url, directory / "mnt", directory / "state", "--l1-capacity", "1GiB"))
        found = run(arguments, mount)
    if arguments.json:
        print(json.dumps(found))
        return
    for setting, works in found.items():
        for work, values in works.items():
            first = next(iter(values))
            print(f"{setting}: {work}")
            for value in sorted(values):
                ratios = [one / base for one, base in zip(values[value], values[first], strict=True)]
                print(
                    f"  {value:>5}: median {statistics.median(values[value]):8.4g}   to {first}: "
                    f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
                )


if __name__ == "__main__":
    main()
