"""A journal that the disk has damaged: what can be read is replayed as far as it is a point in time, the rest is kept and named."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from novafs import journalfile as files
from novafs.aside import apply_aside, read_aside
from novafs.catalogtree import ROOT_ID
from novafs.journalfile import Record
from novafs.volume import Volume
from tests.crash.harness import CHUNK
from tests.crash.place import Place, content, place
from tests.crash.test_crash import memory_dir

__all__ = ["memory_dir", "place"]


def journal_of(place: Place, name: str) -> Path:
    return place.directory / name / "state" / "journal"


def garble(path: Path, record: Record) -> None:
    """Damage one record's payload on the disk."""
    data = bytearray(path.read_bytes())
    at = data.index(record.data)
    data[at] ^= 1
    path.write_bytes(bytes(data))


def test_behind_a_hole_nothing_is_replayed_of_the_image_that_misses_a_write(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    """semantics: S3. The other image misses nothing, and is replayed wholly; what is not replayed can be applied to a new image."""
    names: dict[str, bytes] = {}

    async def before(volume: Volume) -> None:
        names["other"] = (await volume.create(ROOT_ID, "other.raw")).node_id
        image, other = await volume.open_image(place.node_id), await volume.open_image(names["other"])
        for number in (1, 2, 3, 4):
            await image.write(number * CHUNK, b"%d" % number * CHUNK)
            await image.fsync()
            await other.write(number * CHUNK, b"abcde"[number : number + 1] * CHUNK)
            await other.fsync()

    async def after(name: str) -> None:
        async with place.host(name) as volume:
            image, other = await volume.open_image(place.node_id), await volume.open_image(names["other"])
            assert await content(image) == bytes(CHUNK) + b"1" * CHUNK, "not with a hole where the second was"
            assert await content(other) == bytes(CHUNK) + b"".join(letter * CHUNK for letter in (b"b", b"c", b"d", b"e"))
            (kept,) = [kept for kept in place.aside(name) if "damaged-" not in kept.path]
            assert (kept.image_id, kept.writes) == (place.node_id, 2)
            entry = await apply_aside(volume, Path(kept.path), read_aside(Path(kept.path)), "rescued.raw")
            rescued = await volume.open_image(entry.node_id)
            assert await content(rescued) == b"".join(letter * CHUNK for letter in (b"\0", b"1", b"\0", b"3", b"4"))
            for opened in (image, other, rescued):
                await volume.close_image(opened)

    place.simulation.run(place.until_killed, "a", before)
    found = [(s.path.name, r) for s in files.read_segments(journal_of(place, "a")) for r in s.records if r.image_id == place.node_id]
    left = place.lose_power("a", keep=True)
    garble(journal_of(place, left) / found[1][0], found[1][1])
    with caplog.at_level(logging.ERROR):
        place.simulation.run(after, left)
    assert "is damaged at byte" in caplog.text and "writes before them are lost" in caplog.text and "novafs fsck" in caplog.text
    caplog.clear()

    async def again() -> None:
        async with place.host(left) as volume:
            image = await volume.open_image(place.node_id)
            assert await content(image) == bytes(CHUNK) + b"1" * CHUNK
            await image.write(0, b"life goes on")
            await volume.close_image(image)

    with caplog.at_level(logging.ERROR):
        place.simulation.run(again)
    assert not caplog.text, "said once"


def test_a_segment_that_is_gone_is_a_hole_as_well(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    """Deleted by hand, or lost by a file system check: no checksum is wrong anywhere."""

    async def before(volume: Volume) -> None:
        image = await volume.open_image(place.node_id)
        for number in range(40):
            await image.write(0, bytes([number + 1]) * CHUNK)
            await image.fsync()

    async def after(name: str) -> None:
        async with place.host(name) as volume:
            image = await volume.open_image(place.node_id)
            first = max(record.sequence for record in segments[0].records)
            expected = next(r.data[0] for r in segments[0].records if r.sequence == first)
            assert await content(image) == bytes([expected]) * CHUNK
            await volume.close_image(image)

    place.simulation.run(place.until_killed, "a", before)
    segments = list(files.read_segments(journal_of(place, "a")))
    assert len(segments) >= 3
    left = place.lose_power("a", keep=True)
    path = journal_of(place, left) / segments[1].path.name
    place.disks[left][0].unlink(path)
    with caplog.at_level(logging.ERROR):
        place.simulation.run(after, left)
    (kept,) = place.aside(left)
    assert kept.writes == sum(len(segment.records) for segment in segments[2:])
    assert "writes before them are lost" in caplog.text


def test_a_journal_of_another_id_is_kept_aside_and_named(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    async def before(volume: Volume) -> None:
        image = await volume.open_image(place.node_id)
        await image.write(0, b"fsynced")
        await image.fsync()

    async def after(name: str) -> None:
        async with place.host(name):
            pass

    place.simulation.run(place.until_killed, "a", before)
    left = place.lose_power("a", keep=True)
    (journal_of(place, left) / "id").write_text("12" * 16)
    with caplog.at_level(logging.ERROR):
        place.simulation.run(after, left)
    (kept,) = place.aside(left)
    assert (kept.image_id, kept.writes, kept.damaged) == (place.node_id, 1, False)
    assert "belongs to another journal" in caplog.text and kept.path in caplog.text
    assert not list(journal_of(place, left).glob("*.seg"))
