"""A real guest's boot (QEMU, TCG) from a mount with nothing cached, beside its boot from a local file: seconds until it is up.

    python -m tests.bench.qemu_boot [--rounds 3] [--delay-ms 20] [--mbit 2000] [--json]

The first boot is of one image on one mount, and teaches; each round boots another clone on a mount that was never used (its own L1 and
state directory, an empty Redis, models from the store), then a copy of the image in a local file, QEMU `cache=none` both times.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import trio

from tests.bench.relay import relay
from tests.support.ceph import Ceph
from tests.support.engine import make_volume
from tests.support.guest import Guest, GuestImage, guest_image
from tests.support.mounted import running
from tests.support.redis_servers import RedisServer

SCRIPT = 'echo "GUEST up"\nsystemctl poweroff\n'


def boot(guest: GuestImage, disk: Path, workdir: Path) -> float:
    """Seconds until the guest says that it is up; returns once it has powered off."""
    began = time.monotonic()
    with Guest(guest, disk, script=SCRIPT, workdir=workdir, cache="none") as running_guest:
        running_guest.wait_for("GUEST up", timeout_s=600)
        took = time.monotonic() - began
        running_guest.wait_poweroff(timeout_s=600)
    return took


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--delay-ms", type=float, default=20)
    parser.add_argument("--mbit", type=float, default=2000)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    guest = guest_image()
    with (
        tempfile.TemporaryDirectory(dir="/var/tmp") as name,
        Ceph() as ceph,
        relay(ceph.port, delay_ms=arguments.delay_ms, mbit_per_s=arguments.mbit) as port,
    ):
        directory = Path(name)
        os.environ.update(ceph.environment)
        ceph.make_bucket("qemu")
        straight = ceph.volume_url("qemu")
        trio.run(lambda: make_volume(straight))
        run = [sys.executable, "-m", "novafs.cli"]
        subprocess.run([*run, "import", straight, str(guest.disk), "one.raw"], check=True, capture_output=True)
        for number in range(arguments.rounds):
            subprocess.run([*run, "clone", straight, "one.raw", f"clone{number}.raw"], check=True, capture_output=True)
        url = ceph.volume_url("qemu", endpoint=f"http://127.0.0.1:{port}")

        def on_mount(number: int, disk: str) -> float:
            here = directory / f"mount{number}"
            here.mkdir()
            with RedisServer(here) as redis, running(url, here / "mnt", here / "state", l2=redis.url) as mount:
                took = boot(guest, mount.path / disk, here)
                mount.unmount()
                mount.wait()
            return took

        first = on_mount(0, "one.raw")
        rounds = []
        for number in range(arguments.rounds):
            mounted = on_mount(number + 1, f"clone{number}.raw")
            local = directory / "local.raw"
            shutil.copyfile(guest.disk, local)
            os.sync()
            rounds.append({"mount_s": mounted, "local_s": boot(guest, local, directory)})
            if not arguments.json:
                print(f"mount {mounted:.1f} s, local file {rounds[-1]['local_s']:.1f} s", flush=True)
        result = {
            "first_s": first,
            "ratio": statistics.median(one["mount_s"] / one["local_s"] for one in rounds),
            "rounds": rounds,
        }
        print(json.dumps(result) if arguments.json else f"first, nothing learned: {first:.1f} s; median ratio {result['ratio']:.3f}")


if __name__ == "__main__":
    main()
