"""4 KiB random O_DIRECT reads over an image eight times as large as L1: what prefetch costs where it can not help.

    python -m tests.bench.random_reads [--rounds 5] [--seconds 4] [--depth 1] [--store s3|file] [--delay-ms 20] [--json]

Two mounts of one volume, one with prefetch and one without, take turns; each round gives one ratio. The store is a Ceph RADOS Gateway
behind a relay that delays every answer and holds 2 Gbit/s, or a local directory, where a miss costs a hundredth of that and every
microsecond of the policy shows.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from contextlib import ExitStack
from pathlib import Path

import trio

from tests.bench.boot_replay import stats
from tests.bench.fio import random_read_iops
from tests.bench.relay import relay
from tests.support.ceph import Ceph
from tests.support.engine import make_volume
from tests.support.mounted import running

L1 = "64MiB"
IMAGE_BYTES = 512 << 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=4)
    parser.add_argument("--depth", type=int, default=1)
    parser.add_argument("--store", choices=("s3", "file"), default="s3")
    parser.add_argument("--delay-ms", type=float, default=20)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir="/var/tmp") as name, ExitStack() as stack:
        directory = Path(name)
        url = f"file://{directory / 'store'}"
        if arguments.store == "s3":
            ceph = stack.enter_context(Ceph())
            os.environ.update(ceph.environment)
            ceph.make_bucket("random")
            port = stack.enter_context(relay(ceph.port, delay_ms=arguments.delay_ms, mbit_per_s=2000))
            url = ceph.volume_url("random", endpoint=f"http://127.0.0.1:{port}")
        trio.run(lambda: make_volume(url))
        paths: dict[str, Path] = {}
        for kind in ("on", "off"):
            flags = ("--l1-capacity", L1, "--l2-url", "none", "--set", f"prefetch.enabled={'true' if kind == 'on' else 'false'}")
            mount = stack.enter_context(running(url, directory / kind, directory / f"state-{kind}", *flags))
            paths[kind] = mount.path
        with (paths["on"] / "disk.raw").open("wb") as file:
            for _ in range(IMAGE_BYTES >> 20):
                file.write(os.urandom(1 << 20))
        for path in paths.values():
            # What is uploaded and what is first learned is no part of the figure.
            random_read_iops(path / "disk.raw", arguments.seconds, arguments.depth)
        rounds = []
        for _ in range(arguments.rounds):
            rounds.append({kind: random_read_iops(path / "disk.raw", arguments.seconds, arguments.depth) for kind, path in paths.items()})
        prefetch = stats(paths["on"])["prefetch"]
    result = {
        "ratio": statistics.median(one["on"] / one["off"] for one in rounds),
        "rounds": rounds,
        **{key: prefetch[key] for key in ("policy_cpu_s", "process_cpu_s")},
    }
    if arguments.json:
        print(json.dumps(result))
        return
    for one in rounds:
        print(f"prefetch on {one['on']:6.0f} IOPS, off {one['off']:6.0f}, ratio {one['on'] / one['off']:.3f}")
    share = result["policy_cpu_s"] / result["process_cpu_s"]
    print(f"median ratio {result['ratio']:.3f}; policy work {share:.1%} of the CPU time of the mount with prefetch")


if __name__ == "__main__":
    main()
