"""Eviction policies on a real mount: a recorded disk's accesses, read with O_DIRECT, an L1 that holds a tenth of the chunks.

    python -m tests.bench.eviction_mount [--trace arc_P3] [--accesses 60000] [--chunk 64KiB] [--l1 64MiB] [--policies lru,learned]
        [--prefetch off,on] [--pause-ms 0] [--again]

Needs the trace folder (NOVAFS_TRACES, or `../shared/traces` beside the tree) and FUSE. The store is a directory, the image has random
bytes where the trace reads, and each row is a fresh mount with nothing cached and nothing learned. Printed: chunks that L1 had, what was
read from the store, the daemon's processor time, and what learning took of it. Each access is a read of 4 KiB at the chunk's place, one
after the other: without a pause that is the worst case for the share that policies take. With `--chunk 4KiB` each of the trace's chunks
is one of 4 KiB, so that many chunks need little memory.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import trio

from novafs.eviction_study import PLACE_BITS, stream_of
from novafs.traces import open_trace
from novafs.units import parse_size
from tests.support.engine import make_volume
from tests.support.mounted import running
from tests.support.traces import traces_folder

READ = 4096
TICKS = os.sysconf("SC_CLK_TCK")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", default="arc_P3")
    parser.add_argument("--accesses", type=int, default=60_000)
    parser.add_argument("--chunk", default="64KiB")
    parser.add_argument("--l1", default="64MiB")
    parser.add_argument("--pause-ms", type=float, default=0.0)
    parser.add_argument("--policies", default="lru,learned")
    parser.add_argument("--prefetch", default="off,on")
    parser.add_argument("--again", action="store_true", help="the same on a second mount, which begins with what the first has learned")
    arguments = parser.parse_args()
    folder = traces_folder()
    if folder is None:
        raise SystemExit("no trace folder: set NOVAFS_TRACES")
    places = stream_of(open_trace(folder / f"{arguments.trace}.npz")).places[: arguments.accesses].tolist()
    indexes = [(place >> PLACE_BITS) * (1 << 16) + (place & ((1 << PLACE_BITS) - 1)) for place in places]
    with tempfile.TemporaryDirectory(dir="/var/tmp") as name:
        directory = Path(name)
        chunk_size = parse_size(arguments.chunk)
        url = trio.run(lambda: make_volume(f"file://{directory / 'store'}", chunk_size=chunk_size))
        image = directory / "image.raw"
        _make_image(image, sorted(set(indexes)), chunk_size)
        subprocess.run([sys.executable, "-m", "novafs.cli", "import", url, str(image), "disk.raw"], check=True, capture_output=True)
        image.unlink()
        print(f"{arguments.trace}: {len(indexes)} accesses of {len(set(indexes))} chunks, L1 {arguments.l1}")
        columns = (
            "prefetch",
            "policy",
            "L1 hits",
            "from the store",
            "s",
            "CPU s",
            "eviction CPU s",
            "share",
            "prefetch CPU s",
            "share",
            "who",
        )
        print(f"| {' | '.join(columns)} |")
        print("|---|---|---|---|---|---|---|---|---|---|---|")
        for prefetch in arguments.prefetch.split(","):
            for policy in arguments.policies.split(","):
                shutil.rmtree(directory / "store" / "models", ignore_errors=True)  # what the row before has learned
                for again in range(1 + (arguments.again and policy == "learned")):
                    offsets = [index * chunk_size for index in indexes]
                    _row(directory, url, offsets, arguments.l1, policy, prefetch, arguments.pause_ms / 1e3, again)


def _make_image(path: Path, indexes: list[int], chunk_size: int) -> None:
    numbers = random.Random(5)
    with path.open("wb") as file:
        file.truncate((indexes[-1] + 1) * chunk_size)
        for index in indexes:
            file.seek(index * chunk_size)
            file.write(numbers.randbytes(chunk_size))


def _cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def _row(directory: Path, url: str, offsets: list[int], l1: str, policy: str, prefetch: str, pause_s: float, again: int) -> None:
    here = directory / f"{policy}-{prefetch}-{again}"
    options = ["--l1-capacity", l1, "--set", f"l1.policy={policy}", "--set", f"prefetch.enabled={'true' if prefetch == 'on' else 'false'}"]
    with running(url, here / "mnt", here / "state", *options) as mount:
        fd = os.open(mount.path / "disk.raw", os.O_RDONLY | os.O_DIRECT)
        view = memoryview(mmap.mmap(-1, READ))
        before_s, began_s = _cpu_s(mount.process.pid), time.perf_counter()
        for offset in offsets:
            if os.preadv(fd, [view], offset) != READ:
                raise SystemExit(f"a short read at {offset}")
            if pause_s:
                time.sleep(pause_s)
        took_s, cpu_s = time.perf_counter() - began_s, _cpu_s(mount.process.pid) - before_s
        os.close(fd)
        told = subprocess.run([sys.executable, "-m", "novafs.cli", "stats", str(mount.path), "--json"], capture_output=True, check=True)
        mount.unmount()
        mount.wait()
    document: dict[str, Any] = json.loads(told.stdout)
    hits, fetched = document["cache"]["l1"]["hits"], document["cache"]["l3_traffic"]["hits"]
    eviction = document["eviction"]
    learned_s = eviction.get("cpu_s") or 0.0
    guessed_s = (document["prefetch"] or {}).get("policy_cpu_s") or 0.0
    in_charge = f"{eviction['in_charge']}, {eviction['trainings']} trainings" if "in_charge" in eviction else "-"
    who = f"{policy}, another mount after it" if again else policy
    print(
        f"| {prefetch} | {who} | {hits} ({hits / len(offsets):.4f}) | {fetched} | {took_s:.1f} | {cpu_s:.1f} | {learned_s:.2f} "
        f"| {learned_s / cpu_s:.1%} | {guessed_s:.2f} | {guessed_s / cpu_s:.1%} | {in_charge} |",
        flush=True,
    )


if __name__ == "__main__":
    main()
