"""Ten guests that boot from ten clones at once; and a mixed load on a small L1, for its memory."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

from tests.bench.boot_replay import replay
from tests.bench.fio import fio, random_read_iops
from tests.bench.fsync_ratio import synced_writes
from tests.bench.peers.boots import BOOT
from tests.bench.peers.reads import drop_pages, read_through
from tests.bench.peers.results import Round
from tests.bench.peers.site import DENSE, DISK, VOLUME, Metrics, Site, memory_of

GUESTS = 10
SMALL_L1 = "256MiB"
PARTS = 6
"""Of the time of the mixed load, each with the most memory that the daemon had in it: of an hour ten minutes."""
SAMPLES = 60
"""In each part."""
WORK = ("random reads", "boot", "whole image", "synced writes", "sequential reads")


def clones(site: Site, rounds: int) -> Iterator[Round]:
    """What one guest on one clone takes, and what ten on ten take: bytes from the store, chunks into L1. Nothing is cached or learned."""
    trace = site.trace(BOOT)
    url = site.volume_of_clones("clones", clones=GUESTS)
    for _ in range(rounds):
        found = {}
        for kind, guests in (("one", 1), ("ten", GUESTS)):
            site.novafs("clones", "model", "reset", VOLUME, "--yes")
            with site.mounted(url) as mount, ThreadPoolExecutor(guests) as pool:
                files = [mount.path / f"clone{number}.raw" for number in range(guests)]
                found[kind] = max(done["wall_s"] for done in pool.map(replay, [trace] * guests, files))
                metrics = Metrics(mount)
                found[f"{kind} l3 bytes"] = metrics.sum("novafs_store_read_bytes_total")
                found[f"{kind} l1 chunks"] = metrics.sum("novafs_promotions_total", tier="l3")
                found[f"{kind} l1 bytes"] = metrics.sum("novafs_tier_used_bytes", tier="l1")
        yield found


def mixed(site: Site, load_s: float) -> Iterator[Round]:
    """All kinds of work for so long, once, on a mount whose L1 is a fraction of what is read: bytes and memory."""
    trace = site.trace(BOOT)
    url = site.volume_of_clones("mixed", clones=GUESTS)
    site.novafs("mixed", "import", VOLUME, site.images.dense, DENSE, "--format", "raw")
    draw = random.Random(8)
    with (
        site.mounted(url, l1=SMALL_L1) as mount,
        _memory_sampled(mount.process.pid, load_s) as samples,
        ThreadPoolExecutor(2) as pool,
    ):
        dense, disk, written = mount.path / DENSE, mount.path / DISK, mount.path / "written.raw"
        ends_s = time.monotonic() + load_s
        ended = threading.Event()

        def program() -> None:
            while time.monotonic() < ends_s and not ended.is_set():
                match draw.choice(WORK):
                    case "random reads":
                        random_read_iops(dense, site.seconds, 16)
                    case "boot":
                        replay(trace, mount.path / f"clone{draw.randrange(GUESTS)}.raw")
                    case "whole image":
                        drop_pages(disk)
                        read_through(disk)
                    case "synced writes":
                        synced_writes(written, site.seconds)
                    case "sequential reads":
                        fio(dense, "--readonly", "--rw=read", "--bs=1M", "--direct=1", seconds=site.seconds)

        try:
            for done in [pool.submit(program) for _ in range(2)]:
                done.result()
        finally:
            ended.set()  # whatever ends this one ends the other
        metrics = Metrics(mount)
        yield {
            "seconds": load_s,
            "read": metrics.sum("novafs_guest_read_bytes_total"),
            "written": metrics.sum("novafs_guest_written_bytes_total"),
            "fetched": metrics.sum("novafs_store_read_bytes_total"),
            "evictions": metrics.sum("novafs_evictions_total", tier="l1"),
            **_by_part(samples),
        }


@contextmanager
def _memory_sampled(pid: int, load_s: float) -> Iterator[list[int]]:
    """The list of what a process has resident (bytes), which grows while the block lasts."""
    samples: list[int] = []
    ended = threading.Event()

    def sample() -> None:
        while not ended.wait(load_s / (PARTS * SAMPLES)):
            samples.append(memory_of(pid, "VmRSS"))

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield samples
    finally:
        ended.set()
        thread.join()


def _by_part(samples: list[int]) -> Round:
    """The most of each part of the samples; work that ends a little late belongs to the last."""
    edges = [len(samples) * part // PARTS for part in range(PARTS + 1)]
    return {f"memory {part + 1}": float(max(samples[edges[part] : edges[part + 1]], default=0)) for part in range(PARTS)}
