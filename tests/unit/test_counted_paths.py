"""What the paths that matter cost, counted: requests, thread hops, system calls. Beside them: `test_round_trips` (opening, hot reads, their
copies), `test_latency` (calls of a hot read), `test_patch` (fsync into the store), `test_scale` (large volumes).

Bounds are what the design promises, not what is measured today.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.to_thread

from novafs import durable
from novafs.bulk import import_stream
from novafs.catalogtree import ROOT_ID
from novafs.directio import DirectWriter
from novafs.image import Image
from novafs.volume import Volume
from tests.support.engine import make_volume, opened
from tests.support.fixtures import trio_test

CHUNK = 64 << 10
MIB = 1 << 20
SIZE = 32 * MIB


def content(seed: int, size: int = SIZE) -> bytes:
    """That does not compress."""
    return random.Random(seed).randbytes(size)


async def chunks_of(data: bytes) -> AsyncIterator[tuple[int, bytes]]:
    for offset in range(0, len(data), CHUNK):
        yield offset, data[offset : offset + CHUNK]
    await trio.lowlevel.checkpoint()


def asked(volume: Volume) -> Counter[str]:
    """Requests so far, by operation."""
    return Counter({name: figures.requests for name, figures in volume.client.statistics().by_operation.items()})


@contextmanager
def hops(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """Calls handed to worker threads in the block, by the name of what is called."""
    found: Counter[str] = Counter()
    run_sync: Any = trio.to_thread.run_sync

    async def counted(call: Any, *arguments: Any, **options: Any) -> Any:
        found[getattr(call, "__qualname__", type(call).__name__)] += 1
        return await run_sync(call, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(trio.to_thread, "run_sync", counted)
        yield found


async def imported(tmp_path: Path, data: bytes) -> str:
    url = await make_volume(f"file://{tmp_path / 'store'}")
    async with opened(url, tmp_path / "writer") as volume:
        await import_stream(volume, ROOT_ID, "disk.raw", chunks_of(data), size=len(data))
    return url


async def image_of(volume: Volume) -> Image:
    return await volume.open_image((await volume.catalog.resolve("disk.raw")).node_id)


@trio_test
async def test_a_hot_read_takes_no_thread_and_a_miss_one_request_and_two_hops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = content(1, 4 * MIB)
    url = await imported(tmp_path, data)
    async with opened(url, tmp_path / "reader", read_only=True) as volume:
        image = await image_of(volume)
        await image.read(0, 1)  # the map
        await volume.cache.wait_idle()
        before = asked(volume)
        with hops(monkeypatch) as taken:
            assert await image.read(10 * CHUNK + 5, 4096) == data[10 * CHUNK + 5 :][:4096]
            missed = Counter(taken)
            await volume.cache.wait_idle()
            taken.clear()
            for _ in range(100):
                assert await image.read(10 * CHUNK + 8192, 4096) == data[10 * CHUNK + 8192 :][:4096]
            assert not taken
        assert asked(volume) - before == Counter(get=1)
        # One to the store, one to decode and hash; compressing for L1 may have begun.
        assert missed.total() - missed["_encode"] <= 2, missed
        await volume.close_image(image)


@trio_test
async def test_reading_in_order_asks_for_no_byte_twice_and_once_for_each_mebibyte(tmp_path: Path) -> None:
    """With prefetch how much is joined depends on how fast the store answers; what is fetched does not."""
    data = content(2)
    url = await imported(tmp_path, data)
    for prefetch in (False, True):
        async with opened(url, tmp_path / f"reader-{prefetch}", read_only=True, prefetch=prefetch) as volume:
            image = await image_of(volume)
            before = volume.client.statistics().by_operation["get"]
            for offset in range(0, SIZE, MIB):
                assert await image.read(offset, MIB) == data[offset : offset + MIB]
            await volume.cache.wait_idle()
            after = volume.client.statistics().by_operation["get"]
            assert prefetch or after.requests - before.requests <= 1.5 * SIZE / MIB
            assert after.read_bytes - before.read_bytes <= 1.05 * SIZE, prefetch
            await volume.close_image(image)


@trio_test
async def test_an_import_is_a_request_for_each_pack_and_a_few(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = content(4)
    url = await make_volume(f"file://{tmp_path / 'store'}")
    async with opened(url, tmp_path / "state") as volume:
        before = asked(volume)
        with hops(monkeypatch) as taken:
            result = await import_stream(volume, ROOT_ID, "disk.raw", chunks_of(data), size=SIZE)
        made = asked(volume) - before
        assert result.new_chunks == SIZE // CHUNK
        assert made.total() <= SIZE / (8 * MIB) + 8, made
        assert taken.total() <= 8 * SIZE / MIB + 20, taken
        before = asked(volume)
        with hops(monkeypatch) as taken:
            again = await import_stream(volume, ROOT_ID, "again.raw", chunks_of(data), size=SIZE)
        assert again.new_chunks == 0
        assert (asked(volume) - before).total() <= SIZE / (8 * MIB) + 6  # of each pack that it refers to it is made sure
        assert taken.total() <= 8 * SIZE / MIB + 20, taken


class CountingOps(durable.FileOps):
    """What is asked of the journal's disk."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()

    def write(self, fd: int, data: memoryview) -> int:
        self.calls["write"] += 1
        return super().write(fd, data)

    def pwritev(self, fd: int, views: list[memoryview], offset: int) -> int:
        self.calls["write"] += 1
        return super().pwritev(fd, views, offset)

    def fdatasync(self, fd: int) -> None:
        self.calls["sync"] += 1
        super().fdatasync(fd)

    def fsync(self, fd: int) -> None:
        self.calls["sync"] += 1
        super().fsync(fd)

    def fsync_dir(self, path: Path) -> None:
        self.calls["sync"] += 1
        super().fsync_dir(path)


@trio_test
async def test_an_fsync_is_one_write_and_one_sync_of_the_journal_and_no_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = await make_volume(f"file://{tmp_path / 'store'}")
    async with opened(url, tmp_path / "state", writeback__interval="1h") as volume:
        image = await volume.open_image((await volume.create(ROOT_ID, "disk.raw")).node_id)
        await image.write(0, content(5, CHUNK))
        await image.fsync()
        journal = volume.writeback.journal
        assert journal is not None
        ops = CountingOps()
        monkeypatch.setattr(journal, "_ops", ops)
        begin: Any = DirectWriter.begin

        def direct(self: DirectWriter, *arguments: Any) -> None:
            ops.calls["direct"] += 1  # that is both
            begin(self, *arguments)

        monkeypatch.setattr(DirectWriter, "begin", direct)
        before = asked(volume)
        with hops(monkeypatch) as taken:
            for number in range(20):
                await image.write(number * 4096, content(number, 4096))
                await image.fsync()
        assert ops.calls["direct"] + ops.calls["sync"] == 20 and ops.calls["write"] == ops.calls["sync"], ops.calls
        assert not asked(volume) - before
        assert taken.total() <= 20, taken
        await volume.close_image(image)


@trio_test
async def test_a_commit_of_a_few_blocks_is_two_requests(tmp_path: Path) -> None:
    """A pack and a generation, whatever the size of the image."""
    data = content(6)
    url = await imported(tmp_path, data)
    async with opened(url, tmp_path / "state", writeback__interval="1h") as volume:
        image = await image_of(volume)
        await image.write(0, b"first")
        await image.commit()  # with what is read, and the lease, before it
        for number in range(5):
            await image.write(number * CHUNK, content(number, CHUNK))
        before = asked(volume)
        await image.commit()
        assert (asked(volume) - before).total() <= 2
        await volume.close_image(image)
