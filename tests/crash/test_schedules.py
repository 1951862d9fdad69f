"""Schedules that have bitten others, each as a test that fails without its guard.

Virtual time and a scripted store (`tests.support.simulation`), or, where threads are what it is about, real ones.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from novafs.catalogtree import ROOT_ID
from novafs.errors import LeaseLostError, NovaError, RetryableError, StaleError, StoreUnavailableError
from novafs.generation import generation_chain, generation_prefix
from novafs.image import Image
from novafs.lease import break_lease, read_lease
from novafs.objectstore.client import StoreClient
from novafs.objectstore.file import FileStore, create_root
from novafs.volume import Volume, init_volume, open_volume
from tests.crash.harness import CHUNK, config_for
from tests.crash.place import FLAGS, Place, content, fail, kill, place
from tests.crash.test_crash import memory_dir
from tests.support.crash_disk import DiskLog, DiskModel
from tests.support.fixtures import run
from tests.support.flaky_store import FlakyStore, Gate

__all__ = ["memory_dir", "place"]

# -- journal and commit -------------------------------------------------------------------------------------------


def test_a_crash_between_commit_and_trim_undoes_neither_an_overwrite_nor_a_truncate(place: Place) -> None:
    """Both came after the journaled writes, and are in the generation: replay must not bring the older bytes back."""

    async def before(volume: Volume) -> None:
        image = await volume.open_image(place.node_id)
        await image.write(0, b"A" * 3 * CHUNK)
        await image.fsync()
        await image.write(100, b"B" * 50)
        await image.resize(CHUNK)
        await image.resize(2 * CHUNK)
        generations = generation_prefix(place.node_id)
        place.on("create", generations, kill, moment="after")  # the commit point is passed, nobody has heard of it
        await image.commit()

    async def after(name: str) -> None:
        async with place.host(name) as volume:
            image = await volume.open_image(place.node_id)
            assert await content(image) == b"A" * 100 + b"B" * 50 + b"A" * (CHUNK - 150) + bytes(CHUNK)
            await volume.close_image(image)
        assert not place.aside(name)

    place.simulation.run(place.until_killed, "a", before)
    assert [p.name for p in (place.directory / "a" / "state" / "journal").glob("*.seg")], "the journal was not trimmed"
    place.simulation.run(after, place.lose_power("a", keep=True))


def test_a_segment_that_comes_back_after_its_trim_is_passed_by(place: Place) -> None:
    """The rename of a segment that nobody needs is not waited for: a power cut may undo it."""

    async def before() -> None:
        async with place.host("a") as volume:
            image = await volume.open_image(place.node_id)
            for number in range(40):  # three segments
                await image.write(0, bytes([number]) * CHUNK)
                await image.fsync()
            await image.commit()
            await image.write(0, b"newer" * 100)
            await volume.close_image(image)

    async def after(name: str) -> None:
        async with place.host(name) as volume:
            image = await volume.open_image(place.node_id)
            assert await content(image) == b"newer" * 100 + bytes([39]) * (CHUNK - 500)
            await volume.close_image(image)
        assert not place.aside(name)

    place.simulation.run(before)
    for _ in range(5):
        _, model = place.disks["a"]
        state = model.crash(place.simulation.rng)
        name = f"left-{len(place.disks)}"
        (place.directory / name).mkdir()
        left = DiskLog(place.directory / name)
        left.adopt(state.write_to(place.directory / name))
        place.disks[name] = left, DiskModel(state)
        place.simulation.run(after, name)


def test_a_create_whose_answer_was_lost_is_recognised_when_its_retry_gets_412(place: Place) -> None:
    """For a pack, for a generation, and for the epoch of a lease: the object under the name is one's own."""

    async def main() -> None:
        lost: list[str] = []

        def lose_each_answer_once(moment: str, operation: str, name: str) -> None:
            if (moment, operation) == ("after", "create") and name not in lost:
                lost.append(name)
                fail()

        place.store.fault = lose_each_answer_once
        async with place.host("a") as volume:
            image = await volume.open_image(place.node_id)
            await image.write(0, b"x" * 5000)
            generation = await image.commit()
            assert image.lease is not None and image.lease.epoch == 3
            await volume.close_image(image)
        assert {name.split("/")[0] for name in lost} >= {"packs", "images", "leases"}
        place.back()
        async with place.host("b") as volume:
            image = await volume.open_image(place.node_id)
            assert image.generation == generation, "and not one more"
            assert await content(image) == b"x" * 5000
            await volume.close_image(image)

    async def make_an_epoch() -> None:
        async with place.host("b") as volume:
            image = await volume.open_image(place.node_id)
            await image.write(0, b"y")
            await volume.close_image(image)

    place.simulation.run(make_an_epoch)
    place.simulation.run(main)


def test_a_commit_whose_answers_were_all_lost_is_found_by_the_next_one(place: Place) -> None:
    """The request was tried until it timed out; the store had it from the first time on."""

    async def main() -> None:
        async with place.host("a") as volume:
            image = await volume.open_image(place.node_id)
            await image.write(0, b"first")
            place.store.fault = _then_away(place, generation_prefix(place.node_id))
            with pytest.raises(StoreUnavailableError):
                await image.commit()
            await image.write(5, b" second")
            assert await content(image) == b"first second"
            place.back()
            await image.commit()
            assert await content(image) == b"first second"
            await volume.close_image(image)
        chain = generation_chain(StoreClient(place.store), place.node_id)
        head = await chain.head()
        assert head is not None
        assert (await chain.read(head.record.counter - 1)).size == 5
        assert head.record.size == 12
        assert not place.aside("a")

    place.simulation.run(main)


def _then_away(place: Place, part: str) -> Callable[[str, str, str], None]:
    def fault(moment: str, operation: str, name: str) -> None:
        if (moment, operation) == ("after", "create") and part in name:
            place.away()
            fail()

    return fault


def test_a_lost_fence_does_not_make_its_own_handle_stale(place: Place) -> None:
    """The first write commits once to fence older holders. Its answer was lost for good: the next write finds it, and goes on."""

    async def main() -> None:
        async with place.host("a") as volume:
            image = await volume.open_image(place.node_id)
            place.store.fault = _then_away(place, generation_prefix(place.node_id))
            with pytest.raises(StoreUnavailableError):
                await image.write(0, b"x", incarnation=image.incarnation)
            place.back()
            await image.write(0, b"x", incarnation=0)
            await image.fsync(incarnation=0)
            await volume.close_image(image)

    place.simulation.run(main)


def test_a_journal_beside_a_head_that_is_not_its_base_is_kept_aside(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    """semantics: S7. The host died, an operator gave its lease away, another host wrote: nothing of it may be replayed."""

    async def first(volume: Volume) -> None:
        image = await volume.open_image(place.node_id)
        await image.write(0, b"A" * 1000)
        await image.commit()
        await image.write(500, b"lost to others")
        await image.fsync()

    async def second() -> None:
        ended = await break_lease(StoreClient(place.store), place.node_id)
        assert ended is not None
        async with place.host("b") as volume:
            image = await volume.open_image(place.node_id)
            await image.write(0, b"B" * 10)
            await volume.close_image(image)

    async def third(name: str) -> None:
        async with place.host(name) as volume:
            image = await volume.open_image(place.node_id)
            assert await content(image) == b"B" * 10 + b"A" * 990
            await volume.close_image(image)

    place.simulation.run(place.until_killed, "a", first)
    place.simulation.run(second)
    left = place.lose_power("a", keep=True)
    with caplog.at_level(logging.ERROR):
        place.simulation.run(third, left)
    (kept,) = place.aside(left)
    assert (kept.image_id, kept.writes, kept.bytes) == (place.node_id, 1, len(b"lost to others")), "what a generation has is not kept"
    assert kept.path in caplog.text and "novafs fsck" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.ERROR):
        place.simulation.run(third, left)
    assert len(place.aside(left)) == 1 and not caplog.text, "once is enough"


# -- several hosts ------------------------------------------------------------------------------------------------


def test_a_handle_that_was_overtaken_gets_estale_until_it_is_reopened(place: Place) -> None:
    """semantics: S6. Opened for writing here; written and closed there; then the first write here."""

    async def main() -> None:
        async with place.host("a") as one, place.host("b") as two:
            mine = await one.open_image(place.node_id)
            before = mine.incarnation
            assert await content(mine) == b""
            theirs = await two.open_image(place.node_id)
            await theirs.write(0, b"two")
            await two.close_image(theirs)
            with pytest.raises(StaleError, match="close and reopen it"):
                await mine.write(0, b"one", incarnation=before)
            # Another program opens it here: that makes the host see the newest generation, and must not let the old handle write.
            again = await one.open_image(place.node_id)
            assert again is mine and await content(again) == b"two"
            with pytest.raises(StaleError, match="close and reopen it"):
                await mine.write(0, b"one", incarnation=before)
            await again.write(3, b"one", incarnation=again.incarnation)
            assert await content(again) == b"twoone"
            await one.close_image(again)
            await one.close_image(mine)

    place.simulation.run(main)


def test_a_lease_that_was_passed_on_before_it_was_used_does_not_fence(place: Place) -> None:
    """A host slept between taking the lease and its first commit; another took over; an open in between shows the newer head."""

    async def main() -> None:
        async with place.host("a") as one, place.host("b") as two:
            mine = await one.open_image(place.node_id)
            client = StoreClient(place.store)

            async def overtake() -> None:
                await break_lease(client, place.node_id)
                theirs = await two.open_image(place.node_id)
                await theirs.write(0, b"two")
                await theirs.commit()
                again = await one.open_image(place.node_id)  # adopts the other's generation
                await one.close_image(again)

            acquire = one.writeback.acquire_lease

            async def slow(image: Image) -> Any:
                lease = await acquire(image)
                await overtake()
                return lease

            one.writeback.acquire_lease = slow  # type: ignore[method-assign]
            with pytest.raises(StaleError):
                await mine.write(0, b"one")
            one.writeback.acquire_lease = acquire  # type: ignore[method-assign]
            theirs = two.image(place.node_id)
            assert theirs is not None and theirs.lease is not None
            await theirs.write(3, b"more")
            await theirs.commit()
            theirs.lease.check()
            await two.close_image(theirs)
            await one.close_image(mine)

    place.simulation.run(main)


@pytest.mark.parametrize("who", ["heartbeat", "commit", "both"])
def test_a_holder_that_was_overtaken_keeps_its_data_aside_once(place: Place, who: str, caplog: pytest.LogCaptureFixture) -> None:
    """semantics: S7. Heartbeat and commit find out at the same moment, while an fsync is on its way to the disk."""

    async def main() -> None:
        place.simulation.pause_s = 0.02
        async with place.host("a") as one, place.host("b") as two:
            mine = await one.open_image(place.node_id)
            await mine.write(0, b"committed")
            await mine.commit()
            await mine.write(0, b"fsynced")
            await mine.fsync()
            await mine.write(100, b"pending")
            await break_lease(StoreClient(place.store), place.node_id)
            theirs = await two.open_image(place.node_id)
            await theirs.write(0, b"theirs")
            leases = one.writeback.leases
            assert leases is not None and theirs.lease is not None
            failures: list[type[Exception]] = []

            async def commit() -> None:
                try:
                    await mine.commit()
                except NovaError as error:
                    failures.append(type(error))

            async def fsync() -> None:
                try:
                    await mine.fsync(incarnation=0)
                except NovaError as error:
                    failures.append(type(error))

            async with trio.open_nursery() as nursery:
                nursery.start_soon(fsync)
                if who != "commit":
                    nursery.start_soon(one.writeback.beat, leases)
                if who != "heartbeat":
                    nursery.start_soon(commit)
            assert set(failures) <= {LeaseLostError}
            assert mine.lease is None and not mine.dirty and mine.dirty_bytes == 0
            assert one.writeback.at_risk.bytes == 0
            for attempt in (mine.write(0, b"again", incarnation=0), mine.fsync(incarnation=0), mine.flush(incarnation=0)):
                with pytest.raises(LeaseLostError):
                    await attempt
            await theirs.commit()
            fresh = await one.open_image(place.node_id)
            assert await content(fresh) == b"theirsted"
            for image in (fresh, mine):
                await one.close_image(image)
            await two.close_image(theirs)

    with caplog.at_level(logging.ERROR):
        place.simulation.run(main)
    (kept,) = place.aside("a")
    assert (kept.writes, kept.bytes) == (2, len(b"fsyncedpending"))
    assert caplog.text.count(kept.path) == 1, "named in the log, once"


def test_a_heartbeat_that_races_a_release_never_wins(place: Place) -> None:
    """It was sent while the last handle was being closed; whichever the store sees first, the lease is free afterwards."""

    async def main() -> None:
        place.simulation.pause_s = 0.02
        async with place.host("a") as one, place.host("b") as two:
            leases = one.writeback.leases
            assert leases is not None
            for number in range(20):
                image = await one.open_image(place.node_id)
                await image.write(number, b"x")
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(one.writeback.beat, leases)
                    nursery.start_soon(one.close_image, image)
                record = await read_lease(StoreClient(place.store), place.node_id)
                assert record is not None and record.released
                theirs = await two.open_image(place.node_id)
                await theirs.write(0, b"y")
                await two.close_image(theirs)
        assert not place.aside("a")

    place.simulation.run(main)


# -- the store is away --------------------------------------------------------------------------------------------


def test_closing_while_the_store_is_away_keeps_the_data_in_the_journal(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    """semantics: S5. durability = "journal": the close succeeds, the lease is kept, and the commit follows by itself."""

    async def main(volume: Volume) -> None:
        image = await volume.open_image(place.node_id)
        await image.write(0, b"data")
        place.away()
        before_s = trio.current_time()
        await image.flush()
        assert trio.current_time() - before_s > 2, "it has waited for the store"
        with pytest.raises(StoreUnavailableError):  # what RELEASE does; nobody sees it
            await volume.close_image(image)
        assert image.dirty and image.lease is not None and volume.image(place.node_id) is image

    async def also_when_it_is_back() -> None:
        async with place.host("b") as volume:
            image = await volume.open_image(place.node_id)
            await image.write(4, b" more")
            place.away()
            await image.flush()
            with pytest.raises(StoreUnavailableError):
                await volume.close_image(image)
            place.back()
            while volume.image(place.node_id) is not None:  # committed, given back and forgotten, by itself
                await trio.sleep(1)
            record = await read_lease(StoreClient(place.store), place.node_id)
            assert record is not None and record.released
            assert await volume.attributes(await volume.catalog.get(place.node_id)) is not None

    async def after(name: str) -> None:
        async with place.host(name) as volume:
            image = await volume.open_image(place.node_id)
            assert await content(image) == b"data"
            await volume.close_image(image)

    with caplog.at_level(logging.WARNING):
        place.simulation.run(place.until_killed, "a", main)
    assert "closed while the store does not answer" in caplog.text
    place.back()
    place.simulation.run(after, place.lose_power("a"))
    place.simulation.run(also_when_it_is_back)


def test_closing_while_the_store_is_away_fails_where_the_store_was_promised(place: Place) -> None:
    """semantics: S5. durability = "store": the error is the close's own; what was written is committed when the store is back."""

    async def main() -> None:
        async with place.host("a", durability="store") as volume:
            image = await volume.open_image(place.node_id)
            await image.write(0, b"data")
            place.away()
            with pytest.raises(RetryableError):
                await image.flush()
            with pytest.raises(RetryableError):
                await volume.close_image(image)
            place.back()
            while volume.image(place.node_id) is not None:
                await trio.sleep(1)
            image = await volume.open_image(place.node_id)
            assert await content(image) == b"data"
            await volume.close_image(image)

    place.simulation.run(main)


def test_an_unmount_while_the_store_is_away_leaves_everything_in_the_journal(place: Place) -> None:
    """Also what nobody has fsynced: the next mount commits it."""

    async def main() -> None:
        with pytest.raises(StoreUnavailableError):
            async with place.host("a") as volume:
                image = await volume.open_image(place.node_id)
                await image.write(0, b"data")
                place.away()

    async def after(name: str) -> None:
        async with place.host(name) as volume:
            image = await volume.open_image(place.node_id)
            assert await content(image) == b"data"
            await volume.close_image(image)

    place.simulation.run(main)
    place.back()
    place.simulation.run(after, place.lose_power("a"))


def test_a_lease_whose_release_failed_is_given_back_when_the_store_is_back(place: Place) -> None:
    """Otherwise no other host could write the image until this one is restarted."""

    async def main() -> None:
        async with place.host("a") as one, place.host("b") as two:
            image = await one.open_image(place.node_id)
            await image.write(0, b"x")
            await image.commit()
            place.away()
            await one.close_image(image)
            assert image.leaving
            place.back()
            while one.image(place.node_id) is not None:
                await trio.sleep(1)
            theirs = await two.open_image(place.node_id)
            await theirs.write(0, b"y")
            await two.close_image(theirs)

    place.simulation.run(main)


def test_writers_that_wait_for_room_all_go_on(place: Place) -> None:
    """semantics: S4. At the cap on dirty data each waits for the same moment; none may be forgotten when it comes."""

    async def main() -> None:
        async with place.host("a", writeback__dirty_max="4MiB") as volume:
            image = await volume.open_image(place.node_id)

            async def write(number: int) -> None:
                for part in range(8):
                    await image.write((number * 8 + part) << 18, bytes([number + 1]) * (1 << 18))

            async with trio.open_nursery() as nursery:
                for number in range(6):
                    nursery.start_soon(write, number)
            assert image.size == 6 * 8 << 18
            await volume.close_image(image)

    place.simulation.run(main)


def test_hung_requests_do_not_keep_an_fsync_from_the_disk(tmp_path: Path) -> None:
    """Every thread that store requests may have hangs in one, and every thread that trio gives to anybody; the journal has its own."""
    requests = 48  # more than the threads that trio gives by default
    store = FlakyStore(tmp_path / "store")
    gate = Gate()

    async def main() -> None:
        create_root(tmp_path / "store")
        await init_volume(StoreClient(FileStore(tmp_path / "store")), chunk_size=CHUNK)
        flags = {**FLAGS, "store.requests_max": str(requests), "store.io_timeout": "60s", "l1.capacity": "16MiB"}
        async with open_volume(config_for(tmp_path / "state", **flags), owns_state=True, store=store) as volume:
            images = []
            for number in range(requests):
                entry = await volume.create(ROOT_ID, f"{number}.raw")
                image = await volume.open_image(entry.node_id)
                await image.write(0, bytes([number + 1]) * 100)
                await volume.close_image(image)
                images.append(await volume.open_image(entry.node_id))
            entry = await volume.create(ROOT_ID, "disk.raw")
            disk = await volume.open_image(entry.node_id)
            await disk.write(0, b"takes the lease")
            volume.cache.l1.clear()
            store.before["get"] = [gate] * requests
            async with trio.open_nursery() as nursery:
                for image in images:
                    nursery.start_soon(image.read, 0, 100)
                for _ in range(requests):
                    await trio.to_thread.run_sync(gate.wait_reached, limiter=trio.CapacityLimiter(1))
                held = threading.Event()
                common = trio.to_thread.current_default_thread_limiter()
                for _ in range(int(common.total_tokens)):
                    nursery.start_soon(trio.to_thread.run_sync, held.wait)
                await trio.testing.wait_all_tasks_blocked()
                assert not common.available_tokens
                try:
                    await disk.write(0, b"fsynced while the store hangs")
                    with trio.fail_after(30):
                        await disk.fsync()
                finally:
                    held.set()
                    gate.open()
            for image in [*images, disk]:
                await volume.close_image(image)

    run(main)
