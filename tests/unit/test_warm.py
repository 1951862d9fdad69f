"""Warming: what is brought where, and that it is asked for step by step."""

from __future__ import annotations

import os
import random
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from novafs.catalogtree import ROOT_ID
from novafs.cli.warm import Wanted, _Pace, _read_keys, parse_range
from novafs.errors import ConfigError, NotFoundError, SourceError
from novafs.image import Image
from novafs.snapshots import clone
from novafs.volume import Volume
from novafs.warming import boot_profile, chunks_of, cut, plan, spans_of, step, warm_chunks
from tests.support.cli_fixtures import Cli
from tests.support.engine import make_volume, opened

CHUNK = 64 << 10
CHUNKS = 100
CONTENT = random.Random(2).randbytes(CHUNKS // 2 * CHUNK) + bytes(CHUNKS // 4 * CHUNK) + random.Random(3).randbytes(CHUNKS // 4 * CHUNK)
USED = CHUNKS // 2 + CHUNKS // 4


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A volume with `one.raw`, a quarter of which is a hole, and `dir/two.raw`, a clone of it."""
    directory = tmp_path_factory.mktemp("warm")

    async def make() -> None:
        url = await make_volume(f"file://{directory / 'store'}")
        async with opened(url, directory / "setup") as volume:
            entry = await volume.create(ROOT_ID, "one.raw")
            image = await volume.open_image(entry.node_id)
            await image.write(0, CONTENT)
            await volume.close_image(image)
            parent = await volume.mkdir(ROOT_ID, "dir")
            await clone(volume, await volume.catalog.get(entry.node_id), parent.node_id, "two.raw")

    trio.run(make)
    return directory


def on_volume(place: Path, drive: Callable[[Volume, Image], Awaitable[Any]], tmp_path: Path, **flags: str) -> Any:
    async def main() -> Any:
        async with opened(f"file://{place / 'store'}", tmp_path / "state", prefetch=True, **flags) as volume:
            image = await volume.open_image((await volume.catalog.resolve("one.raw")).node_id)
            try:
                return await drive(volume, image)
            finally:
                await volume.close_image(image)

    return trio.run(main)


def l3_hits(volume: Volume) -> int:
    return volume.cache.statistics().l3_traffic.hits


def test_what_was_warmed_is_read_without_the_store(place: Path, tmp_path: Path) -> None:
    async def drive(volume: Volume, image: Image) -> None:
        counts = await warm_chunks(volume, image, [(0, CHUNKS)])
        assert (counts.chunks, counts.held, counts.fetched, counts.failed, counts.error) == (USED, 0, USED, 0, "")
        assert counts.read_bytes >= USED * CHUNK
        before = l3_hits(volume)
        assert await image.read(0, len(CONTENT)) == CONTENT
        assert l3_hits(volume) == before
        again = await warm_chunks(volume, image, [(0, CHUNKS)])
        assert (again.held, again.fetched, again.read_bytes) == (USED, 0, 0)
        warmed = volume.tally.warmed
        assert (warmed.fetched, warmed.held, warmed.failed, warmed.read_bytes) == (USED, USED, 0, counts.read_bytes)

    on_volume(place, drive, tmp_path)


def test_l2_is_filled_past_l1_and_from_it(place: Path, tmp_path: Path, redis_server: Any) -> None:
    async def drive(volume: Volume, image: Image) -> None:
        first = await warm_chunks(volume, image, [(0, 30)], l1=False, l2=True)
        assert (first.chunks, first.held, first.fetched, first.failed) == (30, 0, 30, 0)
        assert first.read_bytes > 0
        assert not any(volume.cache.l1.contains(raw[:32]) for index in range(30) if (raw := image.entry_nowait(index)))
        await image.read(30 * CHUNK, 10 * CHUNK)
        second = await warm_chunks(volume, image, [(0, 40)], l1=False, l2=True)
        assert second.held + second.fetched == 40
        assert second.read_bytes == 0, "L1 had what L2 lacked"
        await volume.cache.wait_idle()
        assert (await warm_chunks(volume, image, [(0, 40)], l1=False, l2=True)).held == 40
        volume.cache.l1.clear()
        before = l3_hits(volume)
        both = await warm_chunks(volume, image, [(0, 40)], l1=True, l2=True)
        assert (both.chunks, both.fetched, both.failed) == (40, 40, 0)
        assert await image.read(0, 40 * CHUNK) == CONTENT[: 40 * CHUNK]
        assert l3_hits(volume) == before

    on_volume(place, drive, tmp_path, l2__url=redis_server.url)


def test_warming_more_than_l1_holds_stays_within_it_and_leaves_what_was_read(place: Path, tmp_path: Path) -> None:
    async def drive(volume: Volume, image: Image) -> None:
        await image.read(90 * CHUNK, 8 * CHUNK)
        await volume.cache.wait_idle()
        read = [raw[:32] for index in range(90, 98) if (raw := image.entry_nowait(index))]
        await warm_chunks(volume, image, [(0, CHUNKS)])
        assert volume.cache.l1.used_bytes <= volume.cache.l1.capacity_bytes
        assert all(volume.cache.l1.contains(chunk_id) for chunk_id in read)

    on_volume(place, drive, tmp_path, l1__capacity="4MiB", l1__policy="lru")


def test_a_chunk_that_can_not_be_read_is_counted_and_the_others_come(place: Path, tmp_path: Path) -> None:
    from novafs.chunk import Reference
    from novafs.pack import pack_name

    os.system(f"cp -al {place}/store {tmp_path}/store")

    async def drive(volume: Volume, image: Image) -> None:
        await image.load_entries(range(CHUNKS))
        raws = [raw for index in range(CHUNKS) if (raw := image.entry_nowait(index))]
        packs = [Reference.unpack(raw).pack_id for raw in raws if any(raw)]
        (tmp_path / "store" / pack_name(packs[0])).unlink()
        lost = len({raw[:32] for raw in raws if any(raw) and Reference.unpack(raw).pack_id == packs[0]})
        counts = await warm_chunks(volume, image, [(0, CHUNKS)])
        assert (counts.fetched, counts.failed) == (USED - lost, lost)
        assert "gone" in counts.error
        assert (volume.tally.warmed.fetched, volume.tally.warmed.failed) == (USED - lost, lost)

    on_volume(tmp_path, drive, tmp_path)


def test_a_boot_that_was_recorded_is_found_by_what_an_image_holds(place: Path, tmp_path: Path) -> None:
    """Read on one image, warmed on its clone, by another process."""
    os.system(f"cp -al {place}/store {tmp_path}/store && rm -rf {tmp_path}/store/models")
    place = tmp_path
    boot = random.Random(5).sample(range(1, CHUNKS // 2), 20)

    async def read(_: Volume, image: Image) -> None:
        with pytest.raises(NotFoundError, match="no boot is recorded"):
            await boot_profile(_, image)
        for index in [0, *boot, *random.Random(1).choices(boot, k=60)]:
            await image.read(index * CHUNK, 4096)

    async def look(volume: Volume, image: Image) -> None:
        clone_id = (await volume.catalog.resolve("dir/two.raw")).node_id
        other = await volume.open_image(clone_id)
        assert (await boot_profile(volume, other))[:21] == [0, *boot]
        await volume.close_image(other)
        found = await plan(volume, {"image": "dir/two.raw", "boot": True})
        assert (found["path"], found["tier"]) == ("dir/two.raw", "l1")
        counts = await step(volume, {"image": "dir/two.raw", "spans": found["spans"]})
        assert counts["chunks"] == len(set(boot)) + 1

    on_volume(place, read, tmp_path)
    on_volume(place, look, tmp_path)

    async def unmounted() -> None:
        """Without an engine: from what is saved."""
        async with opened(f"file://{place / 'store'}", tmp_path / "other") as volume:
            image = await volume.open_image((await volume.catalog.resolve("one.raw")).node_id)
            assert (await boot_profile(volume, image))[:21] == [0, *boot]
            await volume.close_image(image)

    trio.run(unmounted)


def test_spans_are_cut_joined_and_kept_within_the_image(place: Path, tmp_path: Path) -> None:
    assert chunks_of(1000, 64) == [(0, 16)]
    assert chunks_of(1000, 64, 64, 65) == [(1, 1)]
    assert chunks_of(1000, 64, 63, 65) == [(0, 2)]
    assert chunks_of(1000, 64, 1000) == chunks_of(0, 64) == chunks_of(1000, 64, 500, 500) == []
    assert spans_of([3, 4, 5, 9, 1, 2]) == [(3, 3), (9, 1), (1, 2)]
    assert list(cut([(0, 5), (10, 4)], 4)) == [[(0, 4)], [(4, 1), (10, 3)], [(13, 1)]]

    async def drive(volume: Volume, _: Image) -> None:
        counts = await step(volume, {"image": "one.raw", "spans": [[CHUNKS - 2, 50], [CHUNKS + 7, 3]], "tier": "l1"})
        assert counts["chunks"] == 2
        for bad in ([[0, 1 << 20]], [[-1, 2]], [[0, 0]]):
            with pytest.raises(ConfigError):
                await step(volume, {"image": "one.raw", "spans": bad})
        with pytest.raises(ConfigError, match="has no L2"):
            await plan(volume, {"image": "one.raw", "tier": "both"})
        with pytest.raises(ConfigError, match="expected l1, l2 or both"):
            await plan(volume, {"image": "one.raw", "tier": "l4"})

    on_volume(place, drive, tmp_path)


# --- the command ----------------------------------------------------------------------------------------------------


def test_the_command_fills_l2_of_a_volume_that_is_not_mounted(command: Cli, place: Path, tmp_path: Path, redis_server: Any) -> None:
    url, options = f"file://{place / 'store'}", ("--state-dir", tmp_path / "s", "--l2-url", redis_server.url)
    (first,) = command.json("warm", url, "one.raw", "--range", "0-1M", *options)
    assert (first["chunks"], first["fetched"], first["tier"]) == (16, 16, "l2")
    out = command("warm", url, "one.raw", "dir/two.raw", *options)
    assert out.splitlines()[0].startswith(f"one.raw: {USED} chunks in L2, 16 were there, {USED - 16} brought (")
    assert f"dir/two.raw: {USED} chunks in L2, {USED} were there, 0 brought" in out
    keys = tmp_path / "keys"
    keys.write_text("\none.raw\t0-128K\ndir/two.raw\n")
    assert [row["chunks"] for row in command.json("warm", url, "--keys", keys, *options)] == [2, USED]


def test_what_the_command_can_not_do_it_says(command: Cli, place: Path, tmp_path: Path) -> None:
    url, options = f"file://{place / 'store'}", ("--state-dir", tmp_path / "s", "--l2-url", "none")
    assert "not mounted on this host, and has no L2" in command.fails("warm", url, "one.raw", *options, status=2)
    assert "L1 is the memory of a mount" in command.fails("warm", url, "one.raw", "--tier", "l1", *options, status=2)
    assert "name an IMAGE" in command.fails("warm", url, *options, status=2)
    assert "one of them" in command.fails("warm", url, "one.raw", "--boot", "--range", "0-1", *options, status=2)
    assert "cannot read" in command.fails("warm", url, "--keys", tmp_path / "missing", *options)
    away = command.run("warm", url, "one.raw", "--state-dir", tmp_path / "s", "--l2-url", "redis://127.0.0.1:1")
    assert away.status == 2
    assert "does not answer: nothing can be warmed now" in away.err


@pytest.mark.parametrize("text", ["5", "", "-", "5-3", "a-b", "1M-1M"])
def test_a_range_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_range(text)


def test_ranges_and_files_of_keys(tmp_path: Path) -> None:
    assert parse_range("1K-2K") == (1024, 2048)
    assert parse_range("5G-") == (5 << 30, None)
    assert parse_range("-64M") == (0, 64 << 20)
    file = tmp_path / "keys"
    file.write_text("a b\n\nc\t1K-\n")
    assert _read_keys(str(file), True) == [Wanted("a b", boot=True), Wanted("c", 1024)]
    file.write_text("a\tb\n")
    with pytest.raises(SourceError, match="line 1: range 'b'"):
        _read_keys(str(file), False)
    file.write_bytes(b"\xff\n")
    with pytest.raises(SourceError, match="no text"):
        _read_keys(str(file), False)


def test_a_rate_is_held() -> None:
    async def main() -> None:
        began_s = trio.current_time()
        pace = _Pace(1 << 20)
        assert pace.step_bytes == (1 << 20) // 4
        for _ in range(40):
            await pace.wait(pace.step_bytes)
        assert trio.current_time() - began_s == pytest.approx(10.0, abs=0.01)
        free = _Pace(None)
        for _ in range(40):
            await free.wait(1 << 30)
        assert trio.current_time() - began_s == pytest.approx(10.0, abs=0.01)

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
