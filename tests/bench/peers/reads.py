"""Reads of what L1 holds: at random and in sequence, past the page cache and through it."""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

from tests.bench.fio import fio, random_read_iops
from tests.bench.peers.nullfs import null_file
from tests.bench.peers.results import Round
from tests.bench.peers.site import Site

PIECE = 1 << 20


def random_reads(site: Site, rounds: int, depth: int, *, holes: bool = False) -> Iterator[Round]:
    """4 KiB at random places, so many at once. holes: of the disk image as it is, three quarters of which are holes."""
    with ExitStack() as stack:
        files = _warm(site, stack, holes=holes)
        for _ in range(rounds):
            yield {kind: random_read_iops(path, site.seconds, depth) for kind, path in files.items()}


def sequential_direct(site: Site, rounds: int) -> Iterator[Round]:
    """1 MiB after 1 MiB, past the page cache; bytes a second."""
    with ExitStack() as stack:
        files = _warm(site, stack)
        for _ in range(rounds):
            found = {}
            for kind, path in files.items():
                job = fio(path, "--readonly", "--rw=read", "--bs=1M", "--direct=1", seconds=site.seconds)
                found[kind] = float(job["read"]["bw_bytes"])
            yield found


def page_cache(site: Site, rounds: int) -> Iterator[Round]:
    """The whole file through the page cache, which has nothing of it first and all of it then; bytes a second, the open not counted."""
    with ExitStack() as stack:
        files = _warm(site, stack)
        host = site.images.dense
        for _ in range(rounds):
            found = {}
            for kind, path in {**files, "host": host}.items():
                size = path.stat().st_size
                drop_pages(path)
                found[kind] = size / read_through(path)
                found[f"{kind} again"] = size / read_through(path)
            yield found


def _warm(site: Site, stack: ExitStack, *, holes: bool = False) -> dict[str, Path]:
    """The file of each that takes part, read once."""
    image = site.images.disk if holes else site.images.dense
    files = {
        "null": stack.enter_context(null_file(site.directory / "null", size=image.stat().st_size)),
        "novafs": stack.enter_context(site.mounted(site.disk_volume if holes else site.dense_volume)).path / image.name,
        "juicefs": stack.enter_context(site.juice_with(image).mounted()) / image.name,
    }
    for path in files.values():
        read_through(path)
        drop_pages(path)
        random_read_iops(path, 1)  # what is first compiled, connected or measured is no part of a figure
    return files


def read_through(path: Path) -> float:
    """Read a file from its start to its end, into one buffer, as `dd` does; the seconds from the open on."""
    with mmap.mmap(-1, PIECE) as buffer:
        fd = os.open(path, os.O_RDONLY)
        try:
            began_s = time.perf_counter()
            while os.readv(fd, [buffer]):
                pass
            return time.perf_counter() - began_s
        finally:
            os.close(fd)


def drop_pages(path: Path) -> None:
    """Have the kernel forget what it holds of a file."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)
