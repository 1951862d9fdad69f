"""What following costs: requests to the store of images that are open for writing, with and without the right to write them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from novafs import follow
from novafs.asynctools import open_nursery
from novafs.catalogtree import ROOT_ID
from novafs.image import Image
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

    async def main() -> None:
        url = await make_volume(f"file://{tmp_path / 'store'}")
        async with opened(url, tmp_path / "state", lease__ttl="1h") as volume:
            node_id = await make_image(volume)
            requests = Requests(volume, monkeypatch)
            image = await open_to_write(volume, node_id)
            await image.write(0, BLOCK)
            # The open looks at the lease; the write looks at it, takes it, and looks who follows.
            taken = [("list", "leases"), ("get", "leases")] * 2 + [("create", "leases"), ("list", "wants")]
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
