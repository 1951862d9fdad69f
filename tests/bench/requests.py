"""Requests to the store that each operation makes, by kind and by where they go, and how often S3 lets a site do it.

    python -m tests.bench.requests [--idle-s 12] [--json]

Counted on a local directory that counts as S3 would (`tests.support.made_volumes.CountingStore`), on an image of 1 GiB, each operation on a
volume opened anew unless it goes on where the one before ended. The rates are those that AWS publishes for each prefix partition of S3
Standard, 3,500 PUT, POST or DELETE and 5,500 GET, HEAD or LIST a second: the first of the two that is reached, were all of an operation's
requests in one partition. Nobody has measured them here.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import trio

from novafs.catalogtree import ROOT_ID
from novafs.gc import collect
from novafs.snapshots import clone, roll_back, take_snapshot
from novafs.volume import Volume
from tests.bench.scale import GIB, counted
from tests.support.engine import make_volume, opened
from tests.support.made_volumes import CountingStore, mapped, name_image, store_chunks

PUT_RATE = 3500
GET_RATE = 5500
CLASS = {"get": "GET", "head": "GET", "list": "LIST", "put": "PUT", "delete": "DELETE"}
TTL_S = 3.0
CHUNKS = 16_384
FSYNCS = 50
SEQUENTIAL = 64 << 20


class Counts:
    """Of one operation: how many requests of each class go to each part of the volume."""

    def __init__(self, what: str) -> None:
        self.what = what
        self.by: dict[tuple[str, str], float] = {}
        self.seconds = 0.0

    def total(self, *classes: str) -> float:
        return sum(count for (kind, _), count in self.by.items() if kind in classes)

    @property
    def a_second(self) -> float:
        """How often a second by the published limits."""
        puts, gets = self.total("PUT", "DELETE"), self.total("GET", "LIST")
        return min(PUT_RATE / puts if puts else math.inf, GET_RATE / gets if gets else math.inf)

    def document(self) -> dict[str, Any]:
        return {"what": self.what, "requests": {f"{kind} {place}": count for (kind, place), count in sorted(self.by.items())}}


@asynccontextmanager
async def counting(made: list[Counts], what: str, store: CountingStore, *, times: float = 1) -> AsyncIterator[Counts]:
    """Count what the block asks for, as a `times`-th part of it."""
    found = Counts(what)

    def note(operation: str, name: str) -> None:
        key = CLASS[operation], name.split("/")[0]
        found.by[key] = found.by.get(key, 0) + 1

    store.on_request = note
    began_s = time.monotonic()
    try:
        yield found
    finally:
        store.on_request = lambda operation, name: None
        found.seconds = time.monotonic() - began_s
        found.by = {key: count / times for key, count in found.by.items()}
        made.append(found)


async def run(directory: Path, idle_s: float) -> list[Counts]:
    """All of them."""
    made: list[Counts] = []
    url = await make_volume(f"file://{directory / 'store'}")
    async with opened(url, directory / "maker") as volume:
        rows = await store_chunks(volume, 0, CHUNKS)
        await name_image(volume, ROOT_ID, "disk.raw", await mapped(volume, rows, size=GIB))

    async def one(what: str, work: Callable[[Volume], Awaitable[Any]]) -> None:
        async with counted(directory / "store", directory / "host") as (volume, store):
            await volume.catalog.resolve("disk.raw")
            async with counting(made, what, store):
                await work(volume)

    found = Counts("mount")
    async with _mounting(directory, found):
        pass
    made.append(found)
    await one("look a name up and open its image", _open)
    await _reads(directory, made)
    await one("create an image", lambda volume: volume.create(ROOT_ID, "new.raw"))
    await one("rename it", lambda volume: volume.rename(ROOT_ID, "new.raw", ROOT_ID, "newer.raw"))
    await one("remove it", lambda volume: volume.unlink(ROOT_ID, "newer.raw"))

    async def snapshot(volume: Volume) -> None:
        await take_snapshot(volume, await volume.catalog.resolve("disk.raw"), "s")

    async def cloned(volume: Volume) -> None:
        await clone(volume, await volume.catalog.resolve("disk.raw"), ROOT_ID, "clone.raw")

    async def rolled(volume: Volume) -> None:
        await roll_back(volume, await volume.catalog.resolve("disk.raw"), "s")

    await one("snapshot", snapshot)
    await one("clone", cloned)
    await one("rollback, the lease taken and given back", rolled)
    await _writes(directory, made)
    await _fsyncs(directory, made)
    await _idle(directory, made, idle_s)
    await one(f"gc of {CHUNKS:,} chunks", lambda volume: collect(volume, everything=True))
    return made


@asynccontextmanager
async def _mounting(directory: Path, found: Counts) -> AsyncIterator[None]:
    async with counted(directory / "store", directory / "fresh") as (_, store):
        for operation, count in store.requests.items():
            found.by[CLASS[operation], "superblock, catalog, probe"] = count
        yield


async def _open(volume: Volume) -> None:
    await volume.close_image(await volume.open_image((await volume.catalog.resolve("disk.raw")).node_id))


async def _reads(directory: Path, made: list[Counts]) -> None:
    async with counted(directory / "store", directory / "reader", l1__capacity="512MiB") as (volume, store):
        image = await volume.open_image((await volume.catalog.resolve("disk.raw")).node_id)
        async with counting(made, "the first 4 KiB of an open image", store):
            await image.read(0, 4096)
        async with counting(made, "4 KiB elsewhere, under a map node that is there", store):
            await image.read(100 * volume.chunk_size, 4096)
        at = 512 << 20
        await image.read(at - volume.chunk_size, 4096)
        async with counting(made, "1 MiB of 64 MiB read in order, nothing cached, no prefetch", store, times=SEQUENTIAL >> 20):
            for offset in range(at, at + SEQUENTIAL, 1 << 20):
                await image.read(offset, 1 << 20)
        async with counting(made, "any read that L1 holds", store):
            await image.read(0, 4096)
        await volume.close_image(image)


async def _writes(directory: Path, made: list[Counts]) -> None:
    async with counted(directory / "store", directory / "writer", writeback__interval="1h") as (volume, store):
        image = await volume.open_image((await volume.catalog.resolve("disk.raw")).node_id)
        async with counting(made, "the first write of an image: its lease", store):
            await image.write(0, os.urandom(4096))
        await image.commit()
        for _ in range(2):
            await image.write(0, os.urandom(4096))
            async with counting(made, "commit of 4 KiB: every `writeback.interval`", store):
                await image.commit()
        made.pop(-2)
        await image.write(0, os.urandom(4096))
        async with counting(made, "fsync into the journal", store):
            await image.fsync()
        async with counting(made, "the last close: commit, and the lease given back", store):
            await volume.close_image(image)


async def _fsyncs(directory: Path, made: list[Counts]) -> None:
    async with counted(directory / "store", directory / "synced", durability="store", writeback__interval="1h") as (volume, store):
        image = await volume.open_image((await volume.catalog.resolve("disk.raw")).node_id)
        await image.write(0, os.urandom(4096))
        await image.fsync()
        async with counting(made, 'fsync with `durability = "store"`', store, times=FSYNCS):
            for number in range(FSYNCS):
                await image.write(number * 4096, os.urandom(4096))
                await image.fsync()
        await volume.close_image(image)


async def _idle(directory: Path, made: list[Counts], idle_s: float) -> None:
    """What goes on while nothing happens: heartbeats in `leases/`, and looking for `wants/`, with each of them and once a second."""
    flags = {"lease__ttl": f"{TTL_S:g}s", "writeback__interval": "1h"}
    async with counted(directory / "store", directory / "idle", **flags) as (volume, store):
        image = await volume.open_image((await volume.catalog.resolve("disk.raw")).node_id)
        await image.write(0, os.urandom(4096))
        await image.commit()
        async with counting(made, "", store) as found:
            await trio.sleep(idle_s)
        beats = found.by["PUT", "leases"]
        made.pop()
        heartbeat = Counts("a heartbeat of one lease: every third of `lease.ttl`")
        heartbeats = Counts("the same, beside, for all leases of a host")
        second = Counts("a second of a host that holds leases")
        for (kind, place), count in found.by.items():
            if place == "leases":
                heartbeat.by[kind, place] = round(count / beats, 1)
            else:  # one with the heartbeats
                heartbeats.by[kind, place] = 1
                second.by[kind, place] = round((count - beats) / found.seconds, 1)
        made += [heartbeat, heartbeats, second]
        await volume.close_image(image)


def show(made: list[Counts]) -> None:
    print("| operation | GET | LIST | PUT | DELETE | where | a second at S3's rates for one partition |")
    print("|---|---|---|---|---|---|---|")
    for found in made:
        each = [f"{found.total(kind):.3g}" if found.total(kind) else "" for kind in ("GET", "LIST", "PUT", "DELETE")]
        where = ", ".join(sorted({place for _, place in found.by}))
        rate = f"{found.a_second:,.0f}" if found.by else "any"
        print(f"| {found.what} | {' | '.join(each)} | {where} | {rate} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--idle-s", type=float, default=12.0)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir="/var/tmp") as directory:
        made = trio.run(run, Path(directory), options.idle_s)
    if options.json:
        print(json.dumps([found.document() for found in made]))
    else:
        show(made)


if __name__ == "__main__":
    main()
