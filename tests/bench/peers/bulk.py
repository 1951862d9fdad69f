"""Whole images: read with nothing cached, and put in."""

from __future__ import annotations

import compileall
import hashlib
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import trio

from novafs.codec import Codec, encode
from tests.bench.images import data_ranges
from tests.bench.peers.reads import read_through
from tests.bench.peers.results import Round
from tests.bench.peers.site import DISK, VOLUME, Metrics, Site, copy_in, timed
from tests.support.cli import novafs_json
from tests.support.engine import make_volume
from tests.support.guest import ROOT

CHUNK = 64 << 10
MEMORY = "/dev/shm"


def whole_image(site: Site, rounds: int) -> Iterator[Round]:
    """From start to end with 1 MiB reads through the page cache, as `cp` does, on hosts that were never here; seconds."""
    juice = site.juice_with(site.images.disk)
    url = site.volume_of_clones("whole")
    for _ in range(rounds):
        site.novafs("whole", "model", "reset", VOLUME, "--yes")
        with site.mounted(url) as mount:
            found = {"novafs": timed(read_through, mount.path / DISK)}
            found["novafs bytes"] = Metrics(mount).sum("novafs_store_read_bytes_total")
        with juice.mounted() as place:
            found["juicefs"] = timed(read_through, place / DISK)
            found["juicefs bytes"] = juice.fetched_bytes()
        yield found


def import_image(site: Site, rounds: int) -> Iterator[Round]:
    """`novafs import` into an empty volume, `cp` into a mounted JuiceFS, and what SHA-256 and Zstd take for the same chunks; seconds.

    "novafs" is the whole command, "novafs import" what it says that the import took: the rest is Python's start and the volume's.
    "local import" is the same into a volume on a directory in memory: there both processors are the import's alone.
    """
    juice = site.juice_volume()
    disk = site.images.disk
    chunks = chunks_of(site)
    # As pip leaves an installed package: without it each start compiles a tree that has changed.
    compileall.compile_dir(ROOT / "novafs", quiet=1)
    with juice.mounted() as place, tempfile.TemporaryDirectory(dir=MEMORY, prefix="novafs-peers-") as memory:
        for number in range(rounds):
            name = f"import{number}"
            found: Round = {}
            found["novafs"], found["novafs import"] = timed_import(site, site.volume(name), name)
            found["juicefs"] = timed(copy_in, disk, place / f"{number}.raw")
            found["bound"] = timed(hash_and_compress, chunks)
            directory = Path(memory) / name
            url = trio.run(make_volume, f"file://{directory}")
            found["local"], found["local import"] = timed_import(site, url, f"local{number}")
            shutil.rmtree(directory)
            yield found


def timed_import(site: Site, url: str, name: str) -> tuple[float, float]:
    """The seconds that the whole command takes, and those that it says the import took."""
    command = ("import", url, site.images.disk, DISK, "--l2-url", "none", "--state-dir", site.directory / name)
    began_s = time.perf_counter()
    said = novafs_json(*command)
    return time.perf_counter() - began_s, said["seconds"]


def chunks_of(site: Site) -> list[bytes]:
    """The chunks of the image that are not all zeros."""
    found = []
    with site.images.disk.open("rb") as file:
        for start, length in data_ranges(site.images.disk):
            file.seek(start)
            for _ in range(0, length, CHUNK):
                chunk = file.read(CHUNK)
                if any(chunk):
                    found.append(chunk)
    return found


def hash_and_compress(chunks: Sequence[bytes]) -> None:
    """What no import can do without, on two threads: both let go of the interpreter's lock."""

    def work(part: Sequence[bytes]) -> None:
        seen = set()
        for chunk in part:
            digest = hashlib.sha256(chunk).digest()
            if digest not in seen:
                seen.add(digest)
                encode(chunk, Codec.ZSTD)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(work, (chunks[0::2], chunks[1::2])))
