"""Giving an image up to another host: what is hot goes along, what was written is committed, and nobody loses anything."""

from __future__ import annotations

import os
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from novafs import handoff
from novafs.catalogtree import ROOT_ID
from novafs.errors import BusyError, ConfigError, RetryableError
from novafs.handoff import PREFIX, hand_off, hot_chunks, offer_name, own_names
from novafs.image import Image
from novafs.lease import read_lease
from novafs.volume import Volume
from tests.support.cli_fixtures import Cli
from tests.support.engine import make_volume, opened

CHUNK = 64 << 10
CHUNKS = 120
CONTENT = random.Random(6).randbytes(CHUNKS * CHUNK)
ORDER = random.Random(7).sample(range(CHUNKS), 50)


@asynccontextmanager
async def two_hosts(directory: Path, **flags: str) -> AsyncIterator[tuple[Volume, Volume]]:
    """Two mounts' worth of engine on one volume with `disk`, nothing cached."""
    url = await make_volume(f"file://{directory / 'store'}")
    async with opened(url, directory / "setup") as volume:
        entry = await volume.create(ROOT_ID, "disk")
        image = await volume.open_image(entry.node_id)
        await image.write(0, CONTENT)
        await volume.close_image(image)
    async with (
        opened(url, directory / "a", prefetch=True, **flags) as one,
        opened(url, directory / "b", prefetch=True, **flags) as other,
    ):
        yield one, other


async def disk(volume: Volume) -> Image:
    return await volume.open_image((await volume.catalog.resolve("disk")).node_id)


def target_of(volume: Volume) -> str:
    return volume.pins.host_id.hex()


async def read_hot(volume: Volume, image: Image) -> None:
    for index in ORDER:
        await image.read(index * CHUNK, 4096)
    assert volume.prefetcher is not None
    assert volume.prefetcher.read_last(image, 3) == ORDER[:-4:-1]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handoff, "POLL_S", 0.02)
    monkeypatch.setattr(handoff, "ANSWER_POLL_S", 0.02)


def test_the_next_host_has_what_was_hot_and_may_write_at_once(tmp_path: Path) -> None:
    async def main() -> None:
        async with two_hosts(tmp_path, lease__wait="0s") as (one, other):
            image = await disk(one)
            await read_hot(one, image)
            await image.write(0, b"written on the first host")
            assert (await hot_chunks(one, image))[:5] == ORDER[:-6:-1]
            done = await hand_off(one, await one.catalog.resolve("disk"), target_of(other))
            assert done["hot_chunks"] >= len(ORDER)
            lease = await read_lease(one.client, image.node_id)
            assert lease is not None
            assert lease.released
            there = await disk(other)
            while not all(other.cache.l1.contains((there.entry_nowait(index) or b"")[:32]) for index in ORDER[1:]):
                await trio.sleep(0.01)
            assert other.receiver is not None
            assert other.receiver.taken == 1
            assert (one.tally.handoffs.given, one.tally.handoffs.given_failed) == (1, 0)
            before = other.cache.statistics().l3_traffic.hits
            for index in ORDER[1:]:
                if index:
                    assert await there.read(index * CHUNK, CHUNK) == CONTENT[index * CHUNK : (index + 1) * CHUNK]
            assert other.cache.statistics().l3_traffic.hits == before
            assert await there.read(0, 25) == b"written on the first host"
            await there.write(0, b"written on the second one")
            await other.close_image(there)
            await one.close_image(image)
            assert not await one.client.list(PREFIX)

    trio.run(main)


def test_a_host_that_is_away_changes_nothing(tmp_path: Path) -> None:
    async def main() -> None:
        async with two_hosts(tmp_path) as (one, _):
            image = await disk(one)
            await image.write(0, b"mine")
            entry = await one.catalog.resolve("disk")
            with pytest.raises(RetryableError, match=r"host nowhere did not answer within 0.2 s, so the image stays here"):
                await hand_off(one, entry, "nowhere", timeout_s=0.2)
            assert image.lease is not None
            assert not await one.client.list(PREFIX)
            with trio.move_on_after(0.1):
                await hand_off(one, entry, "nowhere")
            assert not await one.client.list(PREFIX), "cancelled, and withdrawn"
            for name in ("", "a/b", "..", "x" * 300, *own_names(one)):
                with pytest.raises(ConfigError):
                    await hand_off(one, entry, name)
            assert (one.tally.handoffs.given, one.tally.handoffs.given_failed) == (0, 1)
            await one.close_image(image)

    trio.run(main)


def test_a_host_that_asks_for_a_lease_is_offered_what_is_hot(tmp_path: Path) -> None:
    """Nobody said `handoff`: a machine was live-migrated."""

    async def main() -> None:
        async with two_hosts(tmp_path, lease__ttl="1s", lease__wait="20s") as (one, other):
            image = await disk(one)
            await read_hot(one, image)
            await image.write(0, b"the first host writes")
            there = await disk(other)

            async def write_there() -> None:
                await there.write(0, b"the second host wants to")

            async with trio.open_nursery() as nursery:
                nursery.start_soon(write_there)
                assert other.receiver is not None
                while not other.receiver.taken:
                    await trio.sleep(0.02)
                await one.close_image(image)
            while not other.receiver.warmed:
                await trio.sleep(0.02)
            await other.close_image(there)

    trio.run(main)


@pytest.mark.parametrize("data", [b"", b"garbage", os.urandom(5000)])
def test_an_offer_that_is_no_good_is_deleted(tmp_path: Path, data: bytes) -> None:
    async def main() -> None:
        async with two_hosts(tmp_path) as (one, other):
            await one.client.put(offer_name(target_of(other), bytes(16)), data)
            await one.client.put(offer_name("somebody-else", bytes(16)), data)
            while [info.name for info in await one.client.list(PREFIX)] != [f"{PREFIX}somebody-else/{bytes(16).hex()}"]:
                await trio.sleep(0.02)
            assert (other.tally.handoffs.taken, other.tally.handoffs.taken_failed) == (0, 1)

    trio.run(main)


def test_an_offer_of_an_image_that_is_gone_is_deleted(tmp_path: Path) -> None:
    async def main() -> None:
        async with two_hosts(tmp_path) as (one, other):
            image = await disk(one)
            await handoff.offer(one, image, target_of(other))
            await one.client.delete_many([info.name for info in await one.client.list(f"images/{image.node_id.hex()}/")])
            while await one.client.list(PREFIX):
                await trio.sleep(0.02)
            await one.close_image(image)

    trio.run(main)


def test_the_command_needs_a_mount(command: Cli, tmp_path: Path) -> None:
    url, options = f"file://{tmp_path}/v", ("--state-dir", tmp_path / "s", "--l2-url", "none")
    command("init", url, *options)
    assert "not mounted on this host" in command.fails("handoff", url, "disk", "--to", "there", *options, status=2)


def test_two_handoffs_at_once_leave_the_image_to_whoever_writes_first(tmp_path: Path) -> None:
    async def main() -> None:
        async with two_hosts(tmp_path) as (one, other), opened(one.client.store.url, tmp_path / "c", prefetch=True) as third:
            image = await disk(one)
            await read_hot(one, image)
            await image.write(0, b"mine")
            entry = await one.catalog.resolve("disk")
            async with trio.open_nursery() as nursery:
                nursery.start_soon(hand_off, one, entry, target_of(other))
                nursery.start_soon(hand_off, one, entry, target_of(third))
            assert image.lease is None
            there = await disk(third)
            assert await there.read(0, 4) == b"mine"
            await there.write(0, b"ours")
            await third.close_image(there)
            await one.close_image(image)
            assert not await one.client.list(PREFIX)

    trio.run(main)


def test_an_image_that_is_written_all_the_time_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with two_hosts(tmp_path) as (one, other):
            image = await disk(one)
            await image.write(0, b"first")
            commit = image.commit

            async def commit_and_write(*, brief: bool = False) -> int:
                generation = await commit(brief=brief)
                await image.write(1, b"more")
                return generation

            monkeypatch.setattr(image, "commit", commit_and_write)
            with pytest.raises(BusyError, match="disk: is written all the time"):
                await hand_off(one, await one.catalog.resolve("disk"), target_of(other))
            assert image.lease is not None
            monkeypatch.undo()
            await one.close_image(image)

    trio.run(main)
