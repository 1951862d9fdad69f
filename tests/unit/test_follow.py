"""What following costs: requests to the store of images that are open for writing, with and without the right to write them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from novafs import follow, lease
from novafs.asynctools import open_nursery
from novafs.catalogtree import ROOT_ID
from novafs.errors import StaleError
from novafs.image import Image
from novafs.lease import want_name
from novafs.seen import BYTES_MAX, PROBE_BYTES, RANGES_MAX, Seen
from novafs.volume import Volume
from tests.support.engine import make_volume, opened

BLOCK = b"content " * 512


class Requests:
    """What the store is asked about leases and who wants them, from now on: operation and name, or prefix."""

    def __init__(self, volume: Volume, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made: list[tuple[str, str]] = []
        for operation in ("get", "put", "create", "list", "delete"):
            monkeypatch.setattr(volume.client.store, operation, self._noting(operation, getattr(volume.client.store, operation)))

    def _noting(self, operation: str, ask: Callable[..., Any]) -> Callable[..., Any]:
        def noting(name: str, *arguments: Any, **options: Any) -> Any:
            if name.startswith(("wants/", "leases/")) and name != "wants/":  # a holder lists that once a second, whoever follows
                self.made.append((operation, name.split("/")[0]))
            return ask(name, *arguments, **options)

        return noting


async def make_image(volume: Volume) -> bytes:
    """One that was written before, and is open nowhere."""
    entry = await volume.create(ROOT_ID, "disk")
    image = await volume.open_image(entry.node_id)
    await image.write(0, BLOCK)
    await volume.close_image(image)
    return entry.node_id


async def open_to_write(volume: Volume, node_id: bytes) -> Image:
    """As a mount does it."""
    image, held = await volume.open_to_write(node_id)
    await volume.follow(image, lambda: None, held=held)
    return image


async def end(volume: Volume, image: Image) -> None:
    """As a mount does it when the only handle is closed."""
    await volume.let_go(image)
    await volume.close_image(image)


def test_an_image_that_is_written_at_once_costs_one_request_for_being_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is asked for; whoever takes a lease looks who does. Under the lease reads, writes and fsyncs cost nothing."""
    monkeypatch.setattr(follow, "ARM_S", 3600.0)

    monkeypatch.setattr(lease, "FRESH_S", 3600.0)  # however slow this machine is

    async def main() -> None:
        url = await make_volume(f"file://{tmp_path / 'store'}")
        async with opened(url, tmp_path / "state", lease__ttl="1h") as volume:
            node_id = await make_image(volume)
            requests = Requests(volume, monkeypatch)
            image = await open_to_write(volume, node_id)
            await image.write(0, BLOCK)
            # The open looks at the lease; the write takes it, and looks who follows.
            taken = [("list", "leases"), ("get", "leases"), ("create", "leases"), ("list", "wants")]
            assert requests.made == taken
            for _ in range(100):
                await image.write(4096, BLOCK)
                await image.fsync()
                assert image.read_nowait(4096, 4096) == BLOCK
                assert await image.read(0, 4096) == BLOCK
            assert requests.made == taken
            await end(volume, image)

    trio.run(main)


@pytest.mark.parametrize("reading", [True, False])
def test_an_image_that_is_open_for_writing_and_not_written_costs_one_request_a_second_while_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reading: bool
) -> None:
    """Reads that L1 answers are answered by it all the same; an image that is not read costs two requests in six seconds."""
    monkeypatch.setattr(follow, "boot_time_s", trio.current_time)

    async def main() -> None:
        url = await make_volume(f"file://{tmp_path / 'store'}")
        async with opened(url, tmp_path / "state") as volume:
            node_id = await make_image(volume)
            image = await open_to_write(volume, node_id)
            requests, began_s = Requests(volume, monkeypatch), trio.current_time()
            waited = 0
            while trio.current_time() - began_s < 20:
                await trio.sleep(0.05)
                if reading and image.read_nowait(0, 4096) is None:
                    waited += 1
                    assert await image.read(0, 4096) == BLOCK
            count, seconds = len(requests.made), trio.current_time() - began_s
            assert image.follower is not None
            # The request itself; looks of the background; on a slow machine those of reads that found no look that still counts.
            rate = 1 / follow.WANT_RENEW_S + (1 / follow.LOOK_S + 1 / follow.VALID_S if reading else 1 / follow.WANT_RENEW_S)
            assert count <= 5 + rate * seconds
            if reading:
                assert waited <= 2 + seconds / follow.VALID_S
            await end(volume, image)

    trio.run(main, clock=trio.testing.MockClock(rate=10))


def test_many_who_read_at_once_share_one_look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        url = await make_volume(f"file://{tmp_path / 'store'}")
        async with opened(url, tmp_path / "state") as volume:
            node_id = await make_image(volume)
            image = await open_to_write(volume, node_id)
            requests = Requests(volume, monkeypatch)
            async with open_nursery() as nursery:
                for _ in range(50):
                    nursery.start_soon(image.read, 0, 4096)
            # The first reader's look begins before the others come, so there may be two of them: at the epoch, too, by the first.
            assert requests.made[:3] == [("put", "wants"), ("list", "leases"), ("get", "leases")]
            assert requests.made[3:] in ([], [("list", "leases")])
            await end(volume, image)

    trio.run(main)


def test_what_was_read_holds_until_one_byte_of_it_is_another() -> None:
    async def main() -> None:
        content = bytearray(range(256)) * 4096

        async def read(offset: int, length: int) -> bytes:
            return bytes(content[offset : offset + length])

        seen = Seen()
        for offset in (0, 100_000, 200_000, len(content) - 100):
            seen.begin(offset, 4096)
            seen.end(offset, 4096, await read(offset, 4096))
        assert await seen.holds(read)
        content[PROBE_BYTES - 1] ^= 1
        content[150_000] ^= 1
        assert await seen.holds(read)
        content[100_001] ^= 1
        assert not await seen.holds(read)
        seen.begin(100_000, 4096)
        seen.end(100_000, 4096, await read(100_000, 4096))
        assert await seen.holds(read)
        content.append(0)  # it grows: the last read would be longer
        assert not await seen.holds(read)

    trio.run(main)


def test_what_is_being_read_and_what_is_too_much_does_not_hold() -> None:
    async def main() -> None:
        async def read(offset: int, length: int) -> bytes:
            return bytes(length)

        seen = Seen()
        seen.begin(100_000, 512)
        assert not await seen.holds(read)
        seen.end(100_000, 512, bytes(512))
        assert await seen.holds(read)
        for number in range(RANGES_MAX):
            seen.end(200_000 + 512 * number, 512, bytes(512))
        assert seen.everything
        assert not await seen.holds(read)
        seen = Seen()
        seen.end(1 << 20, BYTES_MAX + 1, bytes(BYTES_MAX + 1))
        assert seen.everything

    trio.run(main)


PLACE = 2 * PROBE_BYTES


async def read(image: Image, offset: int, length: int) -> bytes:
    """As a mount reads while an image is followed."""
    data = image.read_nowait(offset, length)
    data = data if data is not None else await image.read(offset, length)
    if image.follower is not None:
        image.follower.seen.end(offset, length, data)
    return data


def test_a_write_does_not_pass_by_a_look_at_what_was_read_that_an_open_has_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """semantics: S6. What was read is another by now, and who opens the image a second time is finding that out."""
    looking, written = trio.Event(), trio.Event()
    holds = Seen.holds

    async def slow(seen: Seen, ask: Callable[[int, int], Any]) -> bool:
        looking.set()
        with trio.move_on_after(0.3):  # a write that waits for this does not get there
            await written.wait()
        return await holds(seen, ask)

    monkeypatch.setattr(Seen, "holds", slow)
    monkeypatch.setattr(lease, "SETTLE_S", 0.1)
    monkeypatch.setattr(follow, "VALID_S", 0.05)

    async def main() -> None:
        url = await make_volume(f"file://{tmp_path / 'store'}")
        async with opened(url, tmp_path / "one") as one, opened(url, tmp_path / "two") as two:
            node_id = await make_image(one)
            await two.catalog.lookup(ROOT_ID, "disk", max_age_s=0)
            image = await open_to_write(two, node_id)
            incarnation = image.incarnation
            await read(image, PLACE, 4096)
            source = await open_to_write(one, node_id)
            await source.write(PLACE, BLOCK)
            await end(one, source)
            refused: list[StaleError] = []

            async def write() -> None:
                try:
                    await image.write(PLACE, BLOCK, incarnation=incarnation)
                except StaleError as error:
                    refused.append(error)
                written.set()

            async with open_nursery() as nursery:
                nursery.start_soon(open_to_write, two, node_id)
                await looking.wait()
                nursery.start_soon(write)
            assert refused
            await two.close_image(image)
            await end(two, image)

    trio.run(main)


def test_a_host_that_slept_asks_again_before_it_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """semantics: S22. Its request was gone by then, so fsyncs of the host that writes went to the journal again."""
    now_s = [1000.0]
    monkeypatch.setattr(follow, "boot_time_s", lambda: now_s[0])

    async def main() -> None:
        url = await make_volume(f"file://{tmp_path / 'store'}")
        async with opened(url, tmp_path / "one", writeback__interval="1h") as one, opened(url, tmp_path / "two") as two:
            node_id = await make_image(one)
            await two.catalog.lookup(ROOT_ID, "disk", max_age_s=0)
            source = await open_to_write(one, node_id)
            await source.write(PLACE, BLOCK)
            image = await open_to_write(two, node_id)
            assert image.follower is not None
            assert image.follower.acknowledged
            assert await read(image, PLACE, 4096) == BLOCK
            # It sleeps: nothing is renewed.
            leases = one.writeback.leases
            assert two.writeback.leases is not None
            assert leases is not None
            assert source.lease is not None
            await one.client.delete(want_name(node_id, two.writeback.leases.journal_id))
            while source.lease.wanted:
                await one.writeback.beat(leases)
                await trio.sleep(0.01)
            await source.write(PLACE, b"slept 42" * 512)
            await source.fsync()
            now_s[0] += 3600
            assert await read(image, PLACE, 4096) == b"slept 42" * 512
            await end(two, image)
            await end(one, source)

    trio.run(main)


@pytest.mark.parametrize("reader", [True, False])
def test_an_fsync_after_the_close_waits_for_those_who_go_by_a_look_of_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reader: bool
) -> None:
    """semantics: S22. As sync(1) does it for a file that was just written."""
    monkeypatch.setattr(lease, "SETTLE_S", 1.0)
    monkeypatch.setattr(follow, "VALID_S", 0.9)
    monkeypatch.setattr(follow, "LOOK_S", 3600.0)

    async def main() -> None:
        url = await make_volume(f"file://{tmp_path / 'store'}")
        async with opened(url, tmp_path / "one") as one, opened(url, tmp_path / "two") as two:
            node_id = await make_image(one)
            await two.catalog.lookup(ROOT_ID, "disk", max_age_s=0)
            image = await open_to_write(two, node_id)
            await read(image, 0, 4096)
            source = await open_to_write(one, node_id)
            if reader:
                await one.open_image(node_id)
            await read(image, 0, 4096)
            await source.write(0, b"closed 7" * 512)
            await end(one, source)
            again = source if reader else await one.open_image(node_id)
            await again.fsync()
            assert await read(image, 0, 4096) == b"closed 7" * 512
            await one.close_image(again)
            await end(two, image)

    trio.run(main)


def test_a_time_that_is_set_leaves_no_lease_to_a_reader(tmp_path: Path) -> None:
    """semantics: S6. utimensat(2) has no handle whose close could give it back."""

    async def main() -> None:
        url = await make_volume(f"file://{tmp_path / 'store'}")
        async with opened(url, tmp_path / "state") as volume:
            node_id = await make_image(volume)
            reader = await volume.open_image(node_id)
            await volume.set_attributes(node_id, mtime_ns=1)
            assert reader.lease is None
            assert not reader.dirty
            writer = await open_to_write(volume, node_id)
            await writer.write(0, BLOCK)
            await volume.set_attributes(node_id, mtime_ns=2)
            assert writer.lease is not None
            await end(volume, writer)
            await volume.close_image(reader)

    trio.run(main)


def test_a_long_range_that_was_read_is_looked_at_without_waiting_for_the_write_that_needs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "SETTLE_S", 0.1)
    monkeypatch.setattr(follow, "VALID_S", 0.05)

    async def main() -> None:
        url = await make_volume(f"file://{tmp_path / 'store'}")
        async with opened(url, tmp_path / "one") as one, opened(url, tmp_path / "two") as two:
            node_id = await make_image(one)
            await two.catalog.lookup(ROOT_ID, "disk", max_age_s=0)
            source = await open_to_write(one, node_id)
            await source.write(4 << 20, BLOCK)
            await source.commit()
            image = await open_to_write(two, node_id)
            await read(image, 1 << 20, 3 << 19)
            await source.write(0, BLOCK)
            await end(one, source)
            await image.write(0, BLOCK)
            await end(two, image)

    trio.run(main)
