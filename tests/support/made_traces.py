"""Traces made up for measuring prefetch on what it was not developed on: each a kind of load, none taken from a recorded trace.

Deterministic for a seed. Offsets and sizes are bytes on one disk; times have a clock.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

CHUNK = 65536
Request = tuple[float, int, int, int]
"""Seconds since the last, op (0 read, 1 write), offset, bytes."""


def zipf(numbers: random.Random, count: int) -> Iterator[Request]:
    """Independent reads of 16 KiB, popularity by Zipf's law (0.9) over 1.25 GiB, places at random: nothing to predict."""
    chunks = 20_000
    weights = np.cumsum(1.0 / np.arange(1, chunks + 1) ** 0.9)
    places = list(range(chunks))
    numbers.shuffle(places)
    for _ in range(count):
        rank = int(np.searchsorted(weights, numbers.random() * weights[-1]))
        yield numbers.expovariate(500.0), 0, places[rank] * CHUNK + numbers.randrange(4) * 16384, 16384


def scan_and_hot_set(numbers: random.Random, count: int) -> Iterator[Request]:
    """Half of the reads go to a hot set of 600 chunks at random; the other half scan 1 GiB in 128 KiB reads, again and again."""
    hot = numbers.sample(range(40_000, 80_000), 600)
    at = 0
    for _ in range(count):
        if numbers.random() < 0.5:
            yield numbers.expovariate(400.0), 0, hot[min(599, int(numbers.expovariate(1 / 120)))] * CHUNK, 4096
        else:
            yield numbers.expovariate(400.0), 0, at, 2 * CHUNK
            at = (at + 2 * CHUNK) % (1 << 30)


def streams(numbers: random.Random, count: int) -> Iterator[Request]:
    """Eight readers of files of 64 KiB to 16 MiB that take turns: three with a stride, one backward; one read in ten is at random."""
    places: list[tuple[int, int, int]] = []
    for turn in range(count):
        if numbers.random() < 0.1:
            yield numbers.expovariate(800.0), 0, numbers.randrange(1 << 20) * 4096, 4096
            continue
        which = turn % 8
        while len(places) <= which or places[which][2] <= 0:
            step = (1, 1, 1, 1, 2, 4, 3, -1)[len(places) if len(places) < 8 else which]
            begin = (numbers.randrange(60_000) + 300, step, int(2 ** numbers.uniform(0, 8)))
            if len(places) <= which:
                places.append(begin)
            else:
                places[which] = begin
        at, step, left = places[which]
        places[which] = (at + step, step, left - 1)
        yield numbers.expovariate(800.0), 0, at * CHUNK, CHUNK


def virtual_machine(numbers: random.Random, count: int) -> Iterator[Request]:
    """A guest: programs (lists of file pieces, always read in one order) started by Zipf's law, a log appended to, a database that
    reads at random and writes back, and now and then a backup that reads 128 MiB from one end to the other."""
    programs = []
    for _ in range(200):
        pieces = [(numbers.randrange(50_000), numbers.choice((1, 1, 2, 3, 8))) for _ in range(numbers.randrange(5, 60))]
        programs.append([(piece + at) * CHUNK for piece, length in pieces for at in range(length)])
    weights = np.cumsum(1.0 / np.arange(1, 201) ** 1.0)
    log, sent = 70_000 * CHUNK, 0
    while sent < count:
        kind = numbers.random()
        if kind < 0.35:
            program = programs[int(np.searchsorted(weights, numbers.random() * weights[-1]))]
            for offset in program:
                if numbers.random() < 0.97:
                    yield numbers.expovariate(2000.0), 0, offset, 16384
                    sent += 1
        elif kind < 0.6:
            for _ in range(20):
                yield numbers.expovariate(100.0), 1, log, 4096
                log += 4096
                sent += 1
        elif kind < 0.995:
            for _ in range(20):
                offset = (80_000 + min(7999, int(numbers.expovariate(1 / 1500)))) * CHUNK
                yield numbers.expovariate(300.0), 0, offset, 8192
                if numbers.random() < 0.3:
                    yield numbers.expovariate(300.0), 1, offset, 8192
                sent += 1
        else:
            first = numbers.randrange(50_000) * CHUNK
            for at in range(512):
                yield numbers.expovariate(1000.0), 0, first + at * 4 * CHUNK, 4 * CHUNK
                sent += 1


def index_walks(numbers: random.Random, count: int) -> Iterator[Request]:
    """A database of tables: each query walks one of 3,000 fixed chains of 4 to 40 pages from its beginning, chosen by Zipf's law (0.8)."""
    chains = [numbers.sample(range(30_000), numbers.randrange(4, 40)) for _ in range(3000)]
    weights = np.cumsum(1.0 / np.arange(1, 3001) ** 0.8)
    sent = 0
    while sent < count:
        chain = chains[int(np.searchsorted(weights, numbers.random() * weights[-1]))]
        for page in chain[: numbers.randrange(len(chain) // 2, len(chain)) + 1]:
            yield numbers.expovariate(1000.0), 0, page * CHUNK, 8192
            sent += 1


KINDS: dict[str, Callable[[random.Random, int], Iterator[Request]]] = {
    "zipf": zipf,
    "scan_and_hot_set": scan_and_hot_set,
    "streams": streams,
    "virtual_machine": virtual_machine,
    "index_walks": index_walks,
}


def make_trace(kind: str, folder: Path, *, count: int = 80_000, seed: int = 1) -> Path:
    """Write a trace of that kind as `.npz`."""
    rows = []
    now_s = 0.0
    for gap_s, op, offset, size in KINDS[kind](random.Random(seed), count):
        now_s += gap_s
        rows.append((int(now_s * 1e6), op, offset, size))
    table = np.array(rows, dtype=np.int64)
    path = folder / f"{kind}.npz"
    np.savez_compressed(path, time_us=table[:, 0], op=table[:, 1].astype(np.uint8), offset=table[:, 2], size=table[:, 3])
    return path
