"""What things cost as images, directories and volumes grow: seconds, processor seconds, memory, requests and bytes, and the growth of each.

    python -m tests.bench.scale [--only images directory chunks import index revisions catalog mount] [--chunks 10000 100000 1000000]
                                [--sizes-gib 1 16 1024] [--entries 100 1000 10000] [--directory DIR] [--json]

    images      an image of each size, sparse (ten chunks are mapped) and full: open, first read, a write, clone, snapshot, rollback
    directory   so many images in one directory: look up, list, create, rename, remove, and what another host's change costs
    mount       the same on a real mount: until it answers, `ls -l`, create, rename, remove, and the daemon's memory
    chunks      `gc` and `fsck` over so many chunks: a dry run, with nothing to do, both passes after half of the images were removed;
                "in order" as imports lay them out, "scattered" with neighbours in different packs, where most of each pack is removed
    import      one more image of 1 GiB, into a volume of so many chunks, on a host that has never seen it and on one that has
    index       opening the dedup index
    revisions   an image with so many superseded generations: its head
    catalog     so many hosts that create names in one volume, each as fast as it can, the store 20 ms away

The store is a local directory that counts requests as S3 would (`tests.support.made_volumes`, which also makes the volumes). Each
measurement is in a process of its own, on a volume opened anew unless it says otherwise. Memory: by how much the peak of the process lies
above what it had when the measured work began. k: the exponent of the growth, fitted over all sizes: time ~ n^k.

DIR keeps the volumes of `chunks` for the next run. A million chunks take about a minute to make and 250 MB on disk.
"""

from __future__ import annotations

import argparse
import gc as collector
import json
import math
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import trio

from novafs.bulk import import_stream
from novafs.catalogtree import ROOT_ID
from novafs.config import load_config
from novafs.dedup import DedupIndex
from novafs.fsck import check
from novafs.gc import collect
from novafs.generation import generation_chain
from novafs.snapshots import clone, roll_back, take_snapshot
from novafs.statedir import StateLock
from novafs.volume import Volume, open_volume
from tests.support.engine import FLAGS, make_volume, opened
from tests.support.made_volumes import CountingStore, content, make_directory, mapped, name_image, store_chunks
from tests.support.mounted import running

GIB = 1 << 30
DAY_S = 86_400.0
IMAGE_CHUNKS = 2048
"""Of each image of `chunks`: 128 MiB."""
IMPORT_CHUNKS = 16_384
DELAY_S = 0.02
CATALOG_S = 12.0
BASE_CHUNKS = 65_536
"""Of which full images are made, over and over."""
SECTIONS = ("images", "directory", "chunks", "import", "index", "revisions", "catalog", "mount")


@dataclass(slots=True)
class Row:
    """One measurement. n: what grows; note: what it found."""

    what: str
    n: int
    seconds: float = 0.0
    cpu_s: float = 0.0
    memory_mib: float = 0.0
    requests: int = 0
    read_bytes: int = 0
    written_bytes: int = 0
    note: str = ""


def _status(key: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) / 1024
    return 0.0


async def measured(what: str, n: int, store: CountingStore | None, work: Callable[[], Awaitable[Any]]) -> tuple[Row, Any]:
    """The cost of `work`, and what it returns."""
    collector.collect()
    if store is not None:
        store.reset()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    memory, cpu_s, began_s = _status("VmRSS"), time.process_time(), time.perf_counter()
    result = await work()
    row = Row(what, n, time.perf_counter() - began_s, time.process_time() - cpu_s, max(0.0, _status("VmHWM") - memory))
    if store is not None:
        row.requests, row.read_bytes, row.written_bytes = store.count, store.read_bytes, store.written_bytes
    return row, result


def apart(work: Callable[..., Awaitable[Any]], *arguments: Any) -> Any:
    """`work` in a process of its own."""
    read, write = os.pipe()
    sys.stdout.flush()
    pid = os.fork()
    if not pid:
        status = 1
        try:
            os.close(read)
            with os.fdopen(write, "wb") as out:
                pickle.dump(trio.run(work, *arguments), out)
            status = 0
        finally:
            sys.stderr.flush()
            os._exit(status)
    os.close(write)
    with os.fdopen(read, "rb") as answer:
        data = answer.read()
    _, status = os.waitpid(pid, 0)
    if status:
        raise SystemExit("a measurement failed; see above")
    return pickle.loads(data)


@asynccontextmanager
async def counted(root: Path, state_dir: Path, *, ahead_s: float = 0.0, **flags: str) -> AsyncIterator[tuple[Volume, CountingStore]]:
    """The volume at `root`, on a store that counts, by a host that may write."""
    store = CountingStore(root)
    store.ahead_s = ahead_s
    given = {**FLAGS, "state_dir": str(state_dir), **{key.replace("__", "."): value for key, value in flags.items()}}
    state_dir.mkdir(parents=True, exist_ok=True)
    lock = StateLock.take(state_dir, mountpoint="bench")
    try:
        async with open_volume(load_config(store.url, flags=given, environ={}), owns_state=True, store=store) as volume:
            yield volume, store
    finally:
        lock.release()


# -- images ------------------------------------------------------------------------------------------------------


async def _make_images(directory: Path, sizes_gib: Sequence[int]) -> None:
    url = await make_volume(f"file://{directory / 'store'}")
    async with opened(url, directory / "maker") as volume:
        rows = await store_chunks(volume, 0, BASE_CHUNKS)
        for size in sizes_gib:
            chunks = size * GIB // volume.chunk_size
            sparse = await mapped(volume, rows[:10], every=chunks // 10)
            await name_image(volume, ROOT_ID, f"sparse-{size}", sparse)
            await name_image(volume, ROOT_ID, f"full-{size}", await mapped(volume, rows, size=size * GIB))


async def _image_steps(directory: Path, kind: str, size: int) -> list[Row]:
    """Each step on a volume that was opened anew, with nothing of it cached."""
    made: list[Row] = []
    name = f"{kind}-{size}"
    steps: dict[str, Callable[[Volume], Awaitable[None]]] = {}

    async def look(volume: Volume) -> None:
        await volume.close_image(await volume.open_image((await volume.catalog.resolve(name)).node_id))

    async def first_read(volume: Volume) -> None:
        image = await volume.open_image((await volume.catalog.resolve(name)).node_id)
        offset = image.size // 10 * 3 // volume.chunk_size * volume.chunk_size
        assert len(await image.read(offset, 4096)) == 4096
        await volume.close_image(image)

    async def write(volume: Volume) -> None:
        image = await volume.open_image((await volume.catalog.resolve(name)).node_id)
        await image.write(image.size // 3, os.urandom(4096))
        await volume.close_image(image)

    async def make_clone(volume: Volume) -> None:
        await clone(volume, await volume.catalog.resolve(name), ROOT_ID, f"{name}-clone")

    async def snapshot(volume: Volume) -> None:
        await take_snapshot(volume, await volume.catalog.resolve(name), "s")

    async def rollback(volume: Volume) -> None:
        await roll_back(volume, await volume.catalog.resolve(name), "s")

    steps = {
        "open": look,
        "first read": first_read,
        "clone": make_clone,
        "snapshot": snapshot,
        "4 KiB written, and closed": write,
        "rollback": rollback,
    }
    for what, step in steps.items():
        async with counted(directory / "store", directory / f"state-{name}") as (volume, store):
            row, _ = await measured(f"{kind} image: {what}", size, store, partial(step, volume))
            made.append(row)
    return made


def images(options: argparse.Namespace, directory: Path) -> list[Row]:
    apart(_make_images, directory, options.sizes_gib)
    return [row for kind in ("sparse", "full") for size in options.sizes_gib for row in apart(_image_steps, directory, kind, size)]


# -- a directory -------------------------------------------------------------------------------------------------


async def _make_directory(directory: Path, entries: int) -> str:
    url = await make_volume(f"file://{directory / 'store'}")
    async with opened(url, directory / "maker") as volume:
        await make_directory(volume, "many", entries)
    return url


async def _directory_steps(directory: Path, n: int) -> list[Row]:
    made: list[Row] = []
    async with AsyncExitStack() as stack:
        volume, store = await stack.enter_async_context(counted(directory / "store", directory / "state"))
        other, _ = await stack.enter_async_context(counted(directory / "store", directory / "other"))

        async def step(what: str, work: Callable[[], Awaitable[Any]]) -> Any:
            row, result = await measured(f"directory: {what}", n, store, work)
            made.append(row)
            return result

        await step("first name looked up", lambda: volume.catalog.resolve(f"many/vm-{n // 2:06}.raw"))
        many = (await volume.catalog.resolve("many")).node_id

        async def listed() -> None:
            for entry in await volume.catalog.list(many):
                await volume.attributes(entry, hint=True)

        await step("listed, with sizes", listed)
        for _ in range(2):  # the first pays for what is done once a host
            await step("create", lambda: volume.create(many, f"new-{len(made)}"))
        made.pop(-2)
        await step("rename", lambda: volume.rename(many, f"new-{len(made) - 1}", many, "renamed"))
        await step("remove", lambda: volume.unlink(many, f"vm-{n // 3:06}.raw"))
        await other.create((await other.catalog.resolve("many")).node_id, "of-another-host")
        await step("look-up after another host's change", lambda: volume.catalog.lookup(many, "of-another-host", max_age_s=0))
    return made


def directory_(options: argparse.Namespace, directory: Path) -> list[Row]:
    made = []
    for n in options.entries:
        place = directory / f"entries-{n}"
        apart(_make_directory, place, n)
        made += apart(_directory_steps, place, n)
    return made


def mount(options: argparse.Namespace, directory: Path) -> list[Row]:
    made: list[Row] = []
    for n in options.entries:
        place = directory / f"mount-{n}"
        url = apart(_make_directory, place, n)
        began_s = time.perf_counter()
        with running(url, place / "mnt", place / "state") as daemon:
            made.append(Row("mount: until it answers", n, time.perf_counter() - began_s))

            def step(what: str, *command: str, n: int = n, pid: int = daemon.process.pid) -> None:
                cpu_s, began_s = _cpu_s(pid), time.perf_counter()
                subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
                made.append(Row(f"mount: {what}", n, time.perf_counter() - began_s, _cpu_s(pid) - cpu_s))

            many = daemon.path / "many"
            step("ls -l, the first time", "ls", "-l", str(many))
            step("ls -l, again", "ls", "-l", str(many))
            step("create", "touch", str(many / "new"))
            step("rename", "mv", str(many / "new"), str(many / "renamed"))
            step("remove", "rm", str(many / "renamed"))
            status = Path(f"/proc/{daemon.process.pid}/status").read_text()
            made.append(Row("mount: memory of the daemon", n, memory_mib=int(status.split("VmHWM:")[1].split()[0]) / 1024))
            daemon.unmount()
            daemon.wait()
    return made


def _cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


# -- chunks ------------------------------------------------------------------------------------------------------


async def _make_chunks(place: Path, chunks: int, scattered: bool) -> None:
    url = await make_volume(f"file://{place / 'store'}")
    async with opened(url, place / "maker") as volume:
        rows = await store_chunks(volume, 0, chunks)
        if scattered:
            rows = rows[np.random.default_rng(1).permutation(chunks)]
        for first in range(0, chunks, IMAGE_CHUNKS):
            await name_image(volume, ROOT_ID, f"image-{first // IMAGE_CHUNKS:06}", await mapped(volume, rows[first : first + IMAGE_CHUNKS]))
    (place / "whole").touch()


def _made(directory: Path, chunks: int, layout: str) -> Path:
    place = directory / f"chunks-{chunks}-{layout.replace(' ', '-')}"
    if not (place / "whole").exists():
        shutil.rmtree(place, ignore_errors=True)
        apart(_make_chunks, place, chunks, layout == "scattered")
    return place


async def _open(place: Path, n: int, layout: str) -> list[Row]:
    async def work() -> None:
        async with counted(place / "store", place / "state"):
            pass

    return [(await measured(f"{layout}: volume opened and closed", n, None, work))[0]]


async def _collection(place: Path, n: int, what: str, days: int, dry_run: bool) -> Row:
    async with counted(place / "store", place / "state", ahead_s=days * DAY_S) as (volume, store):
        row, report = await measured(what, n, store, lambda: collect(volume, dry_run=dry_run, everything=True))
    assert report.complete, report.problems
    row.note = (
        f"{report.packs:,} packs, {report.references:,} references; {report.packs_newly_condemned:,} newly condemned, "
        f"{report.packs_deleted:,} deleted, {report.packs_compacted:,} compacted"
    )
    return row


async def _check(place: Path, n: int, what: str) -> Row:
    async with counted(place / "store", place / "state") as (volume, store):
        row, report = await measured(what, n, store, lambda: check(volume))
    row.note = f"{report.packs:,} packs, {report.map_nodes:,} nodes, {len(report.problems)} problems"
    return row


async def _remove(place: Path, keep_every: int) -> None:
    async with counted(place / "store", place / "state") as (volume, _):
        for number, entry in enumerate(await volume.catalog.list(ROOT_ID)):
            if number % keep_every:
                await volume.unlink(ROOT_ID, entry.name)


def chunks_(options: argparse.Namespace, directory: Path) -> list[Row]:
    made: list[Row] = []
    for layout in ("in order", "scattered"):
        for n in options.chunks:
            kept = _made(directory, n, layout)
            place = directory / "work"
            shutil.copytree(kept, place)
            made += apart(_open, place, n, layout)
            made.append(apart(_collection, place, n, f"{layout}: gc --dry-run", 0, True))
            made.append(apart(_check, place, n, f"{layout}: fsck"))
            made.append(apart(_collection, place, n, f"{layout}: gc, nothing to do", 2, False))
            apart(_remove, place, 2 if layout == "in order" else 4)
            made.append(apart(_collection, place, n, f"{layout}: gc, the first pass after images were removed", 4, False))
            made.append(apart(_collection, place, n, f"{layout}: gc, the second pass", 6, False))
            shutil.rmtree(place)
    return made


async def _imports(place: Path, n: int, state: str) -> list[Row]:
    made = []
    async with counted(place / "store", place / state) as (volume, store):

        async def source(first: int) -> AsyncIterator[tuple[int, bytes]]:
            for number in range(IMPORT_CHUNKS):
                yield number * volume.chunk_size, content(first + number, volume.chunk_size)

        for number, what in enumerate(("on a host that never saw the volume", "once more")):
            size = IMPORT_CHUNKS * volume.chunk_size
            work = partial(import_stream, volume, ROOT_ID, f"imported-{number}", source((number + 1) << 40), size=size)
            row, result = await measured(f"import of 1 GiB, {what}", n, store, work)
            row.note = f"{result.new_chunks:,} new chunks"
            made.append(row)
    return made


def import_(options: argparse.Namespace, directory: Path) -> list[Row]:
    made: list[Row] = []
    for n in options.chunks:
        place = directory / "work"
        shutil.copytree(_made(directory, n, "in order"), place)
        made += apart(_imports, place, n, "fresh-state")
        shutil.rmtree(place)
    return made


async def _index(path: Path, n: int) -> list[Row]:
    from novafs.chunk import ChunkId, PackId, Reference

    index = DedupIndex(path)
    for start in range(0, n, 65_536):
        rows = [Reference(ChunkId(os.urandom(32)), PackId(bytes(16)), 0, 1, 0) for _ in range(min(65_536, n - start))]
        index.record(rows)
    index.close()

    async def opening() -> DedupIndex:
        return DedupIndex(path)

    row, index = await measured("dedup index: opened", n, None, opening)
    ids = [os.urandom(32) for _ in range(1000)]

    async def lookup() -> None:
        index.lookup(ids)

    looked, _ = await measured("dedup index: 1,000 look-ups", n, None, lookup)
    row.note = f"{path.stat().st_size / n:.0f} bytes a chunk"
    return [row, looked]


def index_(options: argparse.Namespace, directory: Path) -> list[Row]:
    return [row for n in options.chunks for row in apart(_index, directory / f"index-{n}.sqlite", n)]


# -- revisions and the catalog ---------------------------------------------------------------------------------


async def _revisions(directory: Path, n: int) -> list[Row]:
    url = await make_volume(f"file://{directory / f'revisions-{n}'}")
    async with opened(url, directory / f"state-{n}") as volume:
        entry = await volume.create(ROOT_ID, "a.raw")
        chain = generation_chain(volume.client, entry.node_id)
        head = await chain.head()
        assert head is not None
        for _ in range(n):
            head = await chain.commit(head, head.record.successor())
        row, _ = await measured("head of an image with superseded generations", n, None, chain.head)
    return [row]


def revisions(options: argparse.Namespace, directory: Path) -> list[Row]:
    return [row for n in options.entries for row in apart(_revisions, directory, n)]


class FarStore(CountingStore):
    """A store whose answers take `DELAY_S`."""

    def _count(self, operation: str, name: str, times: int = 1) -> None:
        time.sleep(DELAY_S)
        super()._count(operation, name, times)


async def _contention(root: Path, hosts: int) -> list[Row]:
    await make_volume(f"file://{root / 'store'}")
    stores = [FarStore(root / "store") for _ in range(hosts)]
    made = [0] * hosts
    commits = 0

    async with AsyncExitStack() as stack:
        volumes = []
        for number, store in enumerate(stores):
            given = {**FLAGS, "state_dir": str(root / f"host-{number}")}
            volumes.append(
                await stack.enter_async_context(open_volume(load_config(store.url, flags=given, environ={}), owns_state=False, store=store))
            )
        for store in stores:
            store.reset()
        first = volumes[0].catalog.revision

        async def host(number: int) -> None:
            volume = volumes[number]
            while True:
                await volume.mkdir(ROOT_ID, f"d-{number}-{made[number]}")
                made[number] += 1

        async def work() -> None:
            nonlocal commits
            with trio.move_on_after(CATALOG_S):
                async with trio.open_nursery() as nursery:
                    for number in range(hosts):
                        nursery.start_soon(host, number)
            await volumes[0].catalog.refresh()
            commits = volumes[0].catalog.revision - first

        row, _ = await measured("catalog: names that hosts create at once", hosts, None, work)
    row.requests = sum(store.count for store in stores)
    row.note = (
        f"{commits / CATALOG_S:.1f} commits/s, {row.requests / max(1, commits):.1f} requests a commit, slowest host {min(made)}, "
        f"fastest {max(made)}"
    )
    return [row]


def catalog(options: argparse.Namespace, directory: Path) -> list[Row]:
    return [row for hosts in options.hosts for row in apart(_contention, directory / f"hosts-{hosts}", hosts)]


# -- the table ----------------------------------------------------------------------------------------------------


def growth(rows: Sequence[Row], of: Callable[[Row], float]) -> float | None:
    """k of n^k, fitted over all sizes; None where there is nothing to fit."""
    points = [(math.log(row.n), math.log(of(row))) for row in rows if of(row) > 0]
    if len({x for x, _ in points}) < 2:
        return None
    return float(np.polyfit(*np.array(points).T, 1)[0])


def show(rows: Sequence[Row]) -> None:
    by_name: dict[str, list[Row]] = {}
    for row in rows:
        by_name.setdefault(row.what, []).append(row)
    for what, part in by_name.items():
        print(f"\n{what}")
        print(f"{'n':>12} {'seconds':>9} {'cpu s':>9} {'MiB':>7} {'requests':>9} {'read':>13} {'written':>11}")
        for row in part:
            print(
                f"{row.n:>12,} {row.seconds:>9.3f} {row.cpu_s:>9.3f} {row.memory_mib:>7.0f} {row.requests:>9,} {row.read_bytes:>13,} "
                f"{row.written_bytes:>11,}  {row.note}"
            )
        fits = {"seconds": growth(part, lambda r: r.seconds), "requests": growth(part, lambda r: float(r.requests))}
        found = ", ".join(f"{name} ~ n^{k:.2f}" for name, k in fits.items() if k is not None)
        if found:
            print(f"{'':>12} {found}")


WORK: dict[str, Callable[[argparse.Namespace, Path], list[Row]]] = {
    "images": images,
    "directory": directory_,
    "chunks": chunks_,
    "import": import_,
    "index": index_,
    "revisions": revisions,
    "catalog": catalog,
    "mount": mount,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=SECTIONS)
    parser.add_argument("--chunks", nargs="+", type=int, default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--sizes-gib", nargs="+", type=int, default=[1, 16, 1024])
    parser.add_argument("--entries", nargs="+", type=int, default=[100, 1000, 10_000])
    parser.add_argument("--hosts", nargs="+", type=int, default=[1, 2, 4, 8, 16])
    parser.add_argument("--directory", type=Path, help="keep the volumes of `chunks` there")
    parser.add_argument("--make-only", action="store_true", help="make the volumes of `chunks` in --directory, and measure nothing")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(dir="/var/tmp") as temporary:
        for name in options.only:
            kept = options.directory if options.directory is not None and name in ("chunks", "import") else Path(temporary) / name
            kept.mkdir(parents=True, exist_ok=True)
            if options.make_only:
                for layout in ("in order", "scattered"):
                    for n in options.chunks:
                        _made(kept, n, layout)
                continue
            rows += WORK[name](options, kept)
    if options.json:
        print(json.dumps([asdict(row) for row in rows]))
    else:
        show(rows)


if __name__ == "__main__":
    main()
