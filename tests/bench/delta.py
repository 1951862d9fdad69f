"""What the delta codec spares, and what it costs: the table of docs/performance.md.

    python -m tests.bench.delta [--size 256M] [--writes 2048] [--chunk-size 64K]

Random writes of 4 KiB into an image, a commit after each 1, 16 or 256 of them (a commit every five seconds is so many writes), and, in the
row "fsync", one that reaches the store after each (durability "store"). Once on a volume made for deltas, once on one that is
not. Two kinds of content: "pages" are database pages that compress to about a half, and "random" does not compress at all.
Each write replaces one page of 4 KiB by another of its kind. Then caches are emptied and the image is read: whole, and 4 KiB at a
time in random places. Bytes are what the store was sent and what it sent; processor time is the process's, per write or per
read. All in this process, on a directory in memory: no network and no disk is waited for.
"""

from __future__ import annotations

import argparse
import os
import random
import tempfile
import time
from pathlib import Path
from typing import Final, NamedTuple

import trio

from novafs.catalogtree import ROOT_ID
from novafs.image import Image
from novafs.units import format_size, parse_size
from novafs.volume import Volume
from tests.support.engine import make_volume, opened

PAGE: Final = 4096
READS: Final = 512


class Row(NamedTuple):
    """One run. Bytes and seconds are for each write, or each random read; whole_bytes: of reading the whole image, for each byte of it."""

    sent_bytes: float
    write_s: float
    deltas: int
    whole_bytes: float
    read_bytes: float
    read_s: float
    requests: float


def page(rng: random.Random, kind: str) -> bytes:
    """A page of the kind; a "page" has records of text and numbers."""
    if kind == "random":
        return rng.randbytes(PAGE)
    words = (b"customer", b"order-line", b"2026-11-0", b"delivered", b"warehouse", b"\0\0\0\x07", b"pending")
    out = bytearray()
    while len(out) < PAGE:
        out += rng.choice(words) + rng.randbytes(8) + rng.randrange(1 << 16).to_bytes(4, "big")
    return bytes(out[:PAGE])


def sent(volume: Volume) -> int:
    return sum(figures.written_bytes for figures in volume.client.statistics().by_operation.values())


async def one(directory: Path, *, delta: bool, kind: str, every: int, size: int, writes: int, chunk_size: int) -> Row:
    """Write, empty the caches, read."""
    rng = random.Random(7)
    url = await make_volume(f"file://{directory / 'store'}", chunk_size=chunk_size, delta=delta)
    durability = "journal" if every else "store"
    capacity = str(2 * size + (64 << 20))
    async with opened(url, directory / "state", durability=durability, writeback__interval="1h", l1__capacity=capacity) as volume:
        image = await volume.open_image((await volume.create(ROOT_ID, "disk")).node_id)
        for offset in range(0, size, 1 << 20):
            await image.write(offset, b"".join(page(rng, kind) for _ in range((1 << 20) // PAGE)))
        await image.commit()
        work = [(rng.randrange(size // PAGE) * PAGE, page(rng, kind)) for _ in range(writes)]
        before, began_s = sent(volume), time.process_time()
        for number, (offset, data) in enumerate(work, 1):
            await image.write(offset, data)
            if not every:
                await image.fsync()
            elif number % every == 0:
                await image.commit()
        await image.commit()
        write_s = (time.process_time() - began_s) / writes
        sent_bytes = (sent(volume) - before) / writes
        deltas = volume.deltas.statistics().stored
        await volume.close_image(image)
    async with opened(url, directory / "state", l1__capacity=capacity) as volume:
        image = await volume.open_image((await volume.catalog.resolve("disk")).node_id)
        for offset in range(0, size, 1 << 20):
            await image.read(offset, 1 << 20)
        whole = volume.cache.statistics().l3_traffic.read_bytes / size
        await volume.close_image(image)
    async with opened(url, directory / "state", l1__capacity=capacity) as volume:
        image = await volume.open_image((await volume.catalog.resolve("disk")).node_id)
        await image.read(0, 1)
        begin = volume.cache.statistics().l3_traffic
        began_s = time.process_time()
        await _read_at_random(image, [rng.choice(work)[0] for _ in range(READS)])
        read_s = (time.process_time() - began_s) / READS
        end = volume.cache.statistics().l3_traffic
        await volume.close_image(image)
    return Row(
        sent_bytes,
        write_s,
        deltas,
        whole,
        (end.read_bytes - begin.read_bytes) / READS,
        read_s,
        (end.requests - begin.requests) / READS,
    )


async def _read_at_random(image: Image, offsets: list[int]) -> None:
    for offset in offsets:
        await image.read(offset, PAGE)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument("--size", type=parse_size, default=256 << 20)
    parser.add_argument("--writes", type=int, default=2048)
    parser.add_argument("--chunk-size", type=parse_size, default=64 << 10)
    given = parser.parse_args()
    print(f"image of {format_size(given.size)}, {given.writes} random writes of 4 KiB, chunks of {format_size(given.chunk_size)}")
    print(
        "content  commit each   | sent a write     | cpu a write    | deltas | cold read, B/B | random read      | requests  | cpu a read"
    )
    shared = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    for kind in ("pages", "random"):
        for every in (1, 16, 256, 0):
            rows = []
            for delta in (False, True):
                with tempfile.TemporaryDirectory(dir=shared) as directory:
                    arguments = {"kind": kind, "every": every, "size": given.size, "writes": given.writes, "chunk_size": given.chunk_size}
                    rows.append(trio.run(lambda d=Path(directory), x=delta, a=arguments: one(d, delta=x, **a)))
            plain, made = rows
            print(
                f"{kind:8} {f'{every} writes' if every else 'fsync':13} "
                f"| {plain.sent_bytes:7.0f} {made.sent_bytes:7.0f} "
                f" | {plain.write_s * 1e6:5.0f} {made.write_s * 1e6:5.0f} us "
                f"| {made.deltas:6d} "
                f"| {plain.whole_bytes:6.3f} {made.whole_bytes:6.3f}  "
                f"| {plain.read_bytes:7.0f} {made.read_bytes:7.0f} B "
                f"| {plain.requests:4.2f} {made.requests:4.2f} "
                f"| {plain.read_s * 1e6:5.0f} {made.read_s * 1e6:5.0f} us",
                flush=True,
            )


if __name__ == "__main__":
    main()
