"""Commits that fail: nothing piles up, nobody hangs, everything is tried again; and those that are of no use to anybody."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import trio
import trio.testing

from novafs.catalogtree import ROOT_ID
from novafs.errors import BugError, NovaError, StoreUnavailableError
from novafs.generation import generation_chain, generation_prefix
from novafs.image import Image
from novafs.lease import read_lease
from novafs.objectstore.client import StoreClient
from tests.crash.harness import CHUNK
from tests.crash.place import Place, content, place
from tests.crash.test_crash import memory_dir

__all__ = ["memory_dir", "place"]


def generations(place: Place) -> list[str]:
    prefix = generation_prefix(place.node_id)
    return [name for name in place.store.objects if name.startswith(prefix)]


def test_a_store_that_is_away_for_long_costs_neither_memory_nor_readers(place: Place) -> None:
    """semantics: S4, S16. Each try freezes what has come since the last one; a layer for each would be looked through by every read."""

    async def main() -> None:
        async with place.host("a", writeback__interval="1s") as volume:
            image = await volume.open_image(place.node_id)
            await image.write(0, b"0" * 4 * CHUNK)
            place.away()
            for number in range(200):
                await image.write(number % 4 * CHUNK, b"%d" % (number % 10) * 100)
                await image.fsync()
                await trio.sleep(1)
                assert len(image._layers) <= 3
                assert image.dirty_bytes <= 3 * 4 * CHUNK + 100
            assert volume.writeback.commit_errors > 30, "it has been tried all the time"
            expected = await content(image)
            sequence = image._last_sequence
            place.back()
            while image.dirty:
                await trio.sleep(1)
            assert image.head.sequence == sequence
            assert await content(image) == expected
            assert volume.writeback.at_risk.bytes == 0
            await volume.close_image(image)
        async with place.host("b") as volume:
            image = await volume.open_image(place.node_id)
            assert await content(image) == expected
            await volume.close_image(image)

    place.simulation.run(main)


def test_each_generation_is_a_point_in_time_also_after_commits_that_failed(place: Place) -> None:
    """semantics: S3. What was written while a failed commit was under way is in none of its tries, and in the next commit wholly."""

    async def main() -> None:
        async with place.host("a") as volume:
            image = await volume.open_image(place.node_id)
            await image.write(0, b"A" * 2 * CHUNK)
            for letter in (b"B", b"C"):
                place.away()
                with pytest.raises(StoreUnavailableError):
                    await image.commit()
                place.back()
                await image.write(100, letter * CHUNK)
                await image.resize(CHUNK)
                await image.resize(2 * CHUNK)
            at_freeze = await content(image)
            prefix = generation_prefix(place.node_id)
            place.simulation.pause_s = 0.05
            async with trio.open_nursery() as nursery:
                nursery.start_soon(image.commit)
                await trio.sleep(0.001)
                await image.write(0, b"after the freeze")
            head = await generation_chain(StoreClient(place.store), place.node_id).head()
            assert head is not None and head.record.counter == image.generation and prefix
            async with place.host("b", read_only=True) as other:
                seen = await other.open_image(place.node_id)
                assert await content(seen) == at_freeze
                await other.close_image(seen)
            await volume.close_image(image)

    place.simulation.run(main)


@pytest.mark.parametrize("error", [OSError(5, "scripted"), MemoryError(), KeyError("a bug")], ids=["disk", "memory", "bug"])
@pytest.mark.parametrize("durability", ["journal", "store"])
def test_an_error_that_nobody_expected_fails_who_waits_and_is_tried_again(
    place: Place, durability: str, error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        async with place.host("a", durability=durability, writeback__interval="1s") as volume:
            image = await volume.open_image(place.node_id)
            await image.write(0, b"data")
            works = volume.writeback.pack_writer

            def fail() -> Any:
                raise error

            volume.writeback.pack_writer = fail  # type: ignore[method-assign]
            with pytest.raises((BugError, type(error))):
                await image.flush()
            while not volume.writeback.commit_errors:
                await trio.sleep(1)
            assert image.dirty and await content(image) == b"data"
            volume.writeback.pack_writer = works  # type: ignore[method-assign]
            while image.dirty:
                await trio.sleep(1)
            await image.flush()
            await volume.close_image(image)
        async with place.host("b") as volume:
            image = await volume.open_image(place.node_id)
            assert await content(image) == b"data"
            await volume.close_image(image)

    with caplog.at_level(logging.ERROR):
        place.simulation.run(main)
    assert "failed by a mistake in NovaFS; the data is kept, and tried again" in caplog.text
    assert type(error).__name__ in caplog.text


def test_writers_at_the_cap_hear_of_an_error_that_nobody_expected(place: Place) -> None:
    async def main() -> None:
        async with place.host("a", writeback__dirty_max="4MiB") as volume:
            image = await volume.open_image(place.node_id)
            await image.write(0, b"x")
            works = volume.writeback.pack_writer

            def fail() -> Any:
                raise KeyError("a bug")

            volume.writeback.pack_writer = fail  # type: ignore[method-assign]
            with pytest.raises(BugError, match="failed with KeyError"), trio.fail_after(60):
                for number in range(100):
                    await image.write(number * 100_000, b"x" * 100_000)
            volume.writeback.pack_writer = works  # type: ignore[method-assign]
            await volume.close_image(image)

    place.simulation.run(main)


def test_a_mistake_in_one_commit_or_in_the_background_ends_nothing_else(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    """At the end of the volume the other images are committed all the same; before it, the volume goes on."""

    async def main() -> None:
        with pytest.raises(BugError, match=r"disk.raw: committing it failed with KeyError"):
            async with place.host("a") as volume:
                entry = await volume.create(ROOT_ID, "other.raw")
                image, other = await volume.open_image(place.node_id), await volume.open_image(entry.node_id)
                await image.write(0, b"x")

                async def fail(*_: object, **__: object) -> Any:
                    raise KeyError("a bug")

                change, volume.catalog.change = volume.catalog.change, fail  # type: ignore[method-assign]
                volume._note_hint(other)
                await trio.sleep(5)
                volume.catalog.change = change  # type: ignore[method-assign]
                await other.write(0, b"y")
                image._store_own = fail  # type: ignore[method-assign]
                leases = volume.writeback.leases
                assert leases is not None and image.lease is not None
                await volume.writeback._answer(image, image.lease, [bytes(16)])
                assert not image.lease.asked
        async with place.host("a") as volume:
            image, other = await volume.open_image(place.node_id), await volume.open_image(entry.node_id)
            assert (await content(image), await content(other)) == (b"x", b"y"), "the first was in the journal"
            assert other.generation > 1
            for opened in (image, other):
                await volume.close_image(opened)

    with caplog.at_level(logging.WARNING):
        place.simulation.run(main)
    assert "sizes in the catalog lag behind" in caplog.text and "who asks for its lease is answered later" in caplog.text


def test_a_close_does_not_take_the_end_of_the_volume_for_a_success(place: Place) -> None:
    """The commit that a close waits for is cut off with the volume: what it has not done must not count as done."""

    async def main() -> None:
        outcomes: list[NovaError | None] = []
        async with place.host("a") as volume:
            image = await volume.open_image(place.node_id)
            await image.write(0, b"data")
            place.simulation.pause_s = 1.0
            async with trio.open_nursery() as nursery:
                volume.writeback._nursery, kept = nursery, volume.writeback._nursery
                ticket = volume.writeback.commit_soon(image)
                volume.writeback._nursery = kept
                await trio.lowlevel.checkpoint()
                nursery.cancel_scope.cancel()
            outcomes.append(await ticket.outcome())
            place.simulation.pause_s = 0
            await volume.close_image(image)
        (outcome,) = outcomes
        assert isinstance(outcome, StoreUnavailableError)

    place.simulation.run(main)


# -- images without a name ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("durability", ["journal", "store"])
def test_an_image_without_a_name_is_not_made_durable(place: Place, durability: str) -> None:
    """semantics: S10. A temporary file: whatever its program does with it, nothing of it can be found after a crash."""

    async def main() -> None:
        async with place.host("a", durability=durability, writeback__interval="1s") as volume:
            image = await volume.open_image(place.node_id)
            await image.write(0, b"A" * CHUNK)
            await image.commit()
            await image.write(10, b"pending")
            await volume.unlink(ROOT_ID, "disk.raw")
            assert image.dirty_bytes == CHUNK, "nothing waits for the journal any more"
            before, journal = generations(place), volume.writeback.journal
            assert journal is not None
            records = journal.statistics().records
            for number in range(20):
                await image.write(number * 100, b"%02d" % number)
                await image.fsync()
                await image.flush()
                assert image.dirty_bytes == CHUNK
                await trio.sleep(1)
            assert (generations(place), journal.statistics().records) == (before, records)
            assert volume.writeback.at_risk.age_s == 0
            again = await volume.open_image(place.node_id)
            assert again is image and (await content(image))[1900:1902] == b"19"
            await volume.close_image(again)
            await volume.close_image(image)
            assert volume.image(place.node_id) is None and generations(place) == before
            record = await read_lease(StoreClient(place.store), place.node_id)
            assert record is not None and record.released

    place.simulation.run(main)


def test_a_large_image_without_a_name_still_fits_into_memory(place: Place) -> None:
    """Then the store is where it is kept for as long as it is open: writers must not wait for ever."""

    async def main() -> None:
        async with place.host("a", writeback__dirty_max="4MiB") as volume:
            image = await volume.open_image(place.node_id)
            await image.write(0, b"x")
            await volume.unlink(ROOT_ID, "disk.raw")
            with trio.fail_after(600):
                for number in range(60):
                    await image.write(number << 18, bytes([number + 1]) * (1 << 18))
            assert image.dirty_bytes <= 4 << 20 and image.size == 60 << 18
            for number in (0, 30, 59):
                assert await image.read(number << 18, 10) == bytes([number + 1]) * 10
            await volume.close_image(image)

    place.simulation.run(main)


def test_an_image_without_a_name_that_is_opened_while_it_is_forgotten_keeps_what_is_written(place: Place) -> None:
    """The last close throws its data away; another open by number (the kernel still knows it) comes just before that."""

    async def main() -> None:
        async with place.host("a") as volume:
            image = await volume.open_image(place.node_id)
            await image.write(0, b"A" * CHUNK)
            await volume.unlink(ROOT_ID, "disk.raw")
            opened: list[Image] = []

            async def close() -> None:
                await volume.close_image(image)

            # A commit is under way, so that the close has to wait before it may throw anything away.
            async with image._commit_lock:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(close)
                    await trio.testing.wait_all_tasks_blocked()
                    opened.append(await volume.open_image_by_id(place.node_id))
                    await opened[0].write(0, b"new")
                    image._commit_lock.release()
                    await trio.testing.wait_all_tasks_blocked()
                await image._commit_lock.acquire()
            assert opened[0] is image and await content(image) == b"new" + b"A" * (CHUNK - 3)
            await volume.close_image(image)
            assert volume.image(place.node_id) is None

    place.simulation.run(main)


def test_what_was_written_to_an_image_without_a_name_is_not_kept_aside(place: Place) -> None:
    async def main(volume: Any) -> None:
        image = await volume.open_image(place.node_id)
        await image.write(0, b"A")
        await image.fsync()
        await volume.unlink(ROOT_ID, "disk.raw")
        await image.write(0, b"B")
        await image.lose_lease(StoreUnavailableError("scripted"))

    place.simulation.run(place.until_killed, "a", main)
    assert not place.aside("a")
