"""The journal begins to write before it is asked: what is on disk is what it would have been, and nothing else is promised."""

from __future__ import annotations

import errno
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from novafs import directio
from novafs import journalfile as files
from novafs.catalogtree import ROOT_ID
from novafs.directio import DirectWriter
from novafs.durable import FileOps
from novafs.image import PAIRS_MIN
from novafs.journal import Journal
from novafs.journalfile import Record, RecordKind
from tests.support.engine import make_volume, opened
from tests.support.fixtures import trio_test

A, B = b"a" * 16, b"b" * 16


@pytest.fixture(autouse=True)
def anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """The file system of the test's directory counts as one that syncs direct writes; a test has no power cuts."""
    monkeypatch.setattr(DirectWriter, "_file_system", lambda *_: min(directio._FILE_SYSTEMS))


def record(journal: Journal, image_id: bytes = A, size: int = 4096, previous: int = 0) -> Record:
    sequence = journal.next_sequence()
    return Record(RecordKind.DATA, image_id, 1, sequence, 0, bytes([sequence % 256]) * size, time.time_ns(), previous)


def found(directory: Path) -> list[int]:
    """The sequences of what is on disk, in its order; nothing may be damaged."""
    segments = list(files.read_segments(directory))
    assert all(segment.damaged_at < 0 for segment in segments)
    return [record.sequence for segment in segments for record in segment.records]


async def begun(directory: Path) -> tuple[Journal, list[Record]]:
    """A journal that has written one record of A and begun to write another."""
    directory.parent.mkdir()
    journal, _ = Journal.open(directory)
    first = record(journal)
    await journal.append([first])
    second = record(journal, previous=first.sequence)
    journal.start([second])
    return journal, [first, second]


@trio_test
async def test_what_was_begun_is_written_once(tmp_path: Path) -> None:
    directory = tmp_path / "state" / "journal"
    journal, records = await begun(directory)
    await journal.append(records[1:])
    assert found(directory) == [1, 2]
    assert journal.statistics().syncs == 2
    assert journal.statistics().records == 2
    third = record(journal)
    await journal.append([third])
    assert found(directory) == [1, 2, 3]
    journal.close()


@trio_test
async def test_what_came_after_it_follows_it(tmp_path: Path) -> None:
    directory = tmp_path / "state" / "journal"
    journal, records = await begun(directory)
    third = record(journal, previous=2)
    await journal.append([records[1], third])
    assert found(directory) == [1, 2, 3]
    journal.close()


@trio_test
async def test_another_image_may_come_first(tmp_path: Path) -> None:
    directory = tmp_path / "state" / "journal"
    journal, records = await begun(directory)
    await journal.append([record(journal, B)])
    await journal.append(records[1:])
    assert set(found(directory)) == {1, 2, 3}
    _, segments = Journal.open(directory)
    mine = sorted((r for s in segments for r in s.records if r.image_id == A), key=lambda r: r.sequence)
    assert files.unbroken(mine, 0) == len(mine)
    journal.close()


@trio_test
async def test_a_disk_that_fails_on_it_fails_nobody_who_can_be_served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = tmp_path / "state" / "journal"
    journal, records = await begun(directory)

    def fail(writer: DirectWriter) -> None:
        writer.busy = False
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(DirectWriter, "result", fail)
    await journal.append(records[1:])
    assert found(directory)[-1] == 2
    journal.start([record(journal, previous=2)])  # not tried again
    await journal.append([record(journal, previous=3)])
    assert found(directory)[-1] == 4
    journal.close()


@trio_test
async def test_a_kernel_that_refuses_direct_writes_is_not_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def refuse(writer: DirectWriter, fd: int, position: int, parts: Sequence[bytes]) -> None:
        asked.append(position)
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(DirectWriter, "begin", refuse)
    directory = tmp_path / "state" / "journal"
    journal, records = await begun(directory)
    await journal.append(records[1:])
    assert found(directory) == [1, 2]
    assert len(asked) <= 1
    journal.close()


@trio_test
async def test_what_an_interrupt_leaves_in_flight_has_ended_before_anything_is_written_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tmp_path / "state" / "journal"
    journal, records = await begun(directory)
    await journal.append(records[1:])
    begin = DirectWriter.begin

    def interrupted(writer: DirectWriter, fd: int, position: int, parts: Sequence[bytes]) -> None:
        begin(writer, fd, position, parts)
        raise KeyboardInterrupt

    monkeypatch.setattr(DirectWriter, "begin", interrupted)
    third, fourth = record(journal, previous=2), record(journal, previous=3)
    with pytest.raises(KeyboardInterrupt):
        await journal.append([third])
    monkeypatch.undo()
    busy: list[bool] = []
    write = files.append

    def watched(fd: int, position: int, parts: Sequence[bytes], *, ops: FileOps) -> None:
        busy.append(journal._writer is not None and journal._writer.busy)
        write(fd, position, parts, ops=ops)

    monkeypatch.setattr(files, "append", watched)
    await journal.append([third, fourth])
    assert not any(busy)
    assert found(directory) == [1, 2, 3, 4]
    journal.close()


@trio_test
async def test_a_segment_is_not_used_again_under_a_write_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = tmp_path / "state" / "journal"
    journal, _ = await begun(directory)
    writer = journal._writer
    assert writer is not None
    assert writer.busy
    journal.committed(A, 2)
    with monkeypatch.context() as hanging:
        hanging.setattr(DirectWriter, "ended_within", lambda *_: False)
        journal.close()
    assert not list(directory.glob("*.s*"))  # neither a segment nor a spare one
    assert writer.ended_within(10)
    writer.close()


@trio_test
async def test_nobody_may_ask_for_it_ever(tmp_path: Path) -> None:
    directory = tmp_path / "state" / "journal"
    journal, _ = await begun(directory)
    journal.close()
    assert found(directory)[:1] == [1]
    again, segments = Journal.open(directory)
    assert len(segments) == 1
    again.close()


@trio_test
async def test_a_generation_may_hold_it_before_it_is_asked_for(tmp_path: Path) -> None:
    directory = tmp_path / "state" / "journal"
    journal, _ = await begun(directory)
    journal.committed(A, 2)
    third = record(journal, B)
    await journal.append([third])
    journal.committed(B, 3)
    journal.close()
    assert not list(directory.glob(f"*{files.SUFFIX}"))


@trio_test
async def test_a_guest_that_syncs_each_write_is_served_ahead_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    starts: list[int] = []
    start = Journal.start

    def counted(journal: Journal, records: Sequence[Record]) -> None:
        starts.append(len(records))
        start(journal, records)

    monkeypatch.setattr(Journal, "start", counted)
    url = await make_volume(f"file://{tmp_path / 'store'}")
    async with opened(url, tmp_path / "state") as volume:
        entry = await volume.create(ROOT_ID, "a.raw")
        image = await volume.open_image(entry.node_id)
        for number in range(PAIRS_MIN + 3):
            await image.write(number * 4096, bytes([number]) * 4096)
            await image.fsync()
        assert starts == [1, 1, 1]
        for number in range(5):
            await image.write(number * 4096, b"w" * 4096)
        await image.fsync()
        await image.write(0, b"x" * 4096)
        assert starts == [1, 1, 1, 1]
        assert await image.read(0, 4096) == b"x" * 4096
        assert await image.read(4096, 4096) == b"w" * 4096
        assert await image.read(5 * 4096, 4096) == b"\5" * 4096
        await volume.close_image(image)
