"""The write journal: what was appended is there after anything that may happen to its files, and nothing else is (Hypothesis)."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import trio
from hypothesis import given, settings

from novafs import journal as journal_module
from novafs import journalfile as files
from novafs import statedir
from novafs.errors import NovaError, PermanentError, StoreFullError
from novafs.journal import SPARES_MAX, Journal
from novafs.journalfile import Record, RecordKind, Segment
from tests.crash.harness import SEGMENT_BYTES, small_segments
from tests.support.crash_disk import Call, DiskLog, DiskModel
from tests.support.simulation import Simulation

IMAGES = [bytes([number]) * 16 for number in range(3)]
SIZES = st.one_of(st.integers(0, 300), st.sampled_from([512, 4016, 4096, 8192, 20000, SEGMENT_BYTES - 4096 - 88, SEGMENT_BYTES, 90000]))
BATCH = st.lists(st.tuples(st.integers(0, 2), SIZES), min_size=1, max_size=5)
SETTINGS = settings(max_examples=60, deadline=None)


@dataclasses.dataclass
class World:
    """A journal on a disk that says what is durable, and all that was appended to it."""

    simulation: Simulation
    disk: DiskLog
    model: DiskModel
    journal: Journal = dataclasses.field(init=False)
    appended: list[Record] = dataclasses.field(default_factory=list)
    committed: dict[bytes, int] = dataclasses.field(default_factory=dict)

    def open(self) -> list[Segment]:
        statedir.prepare(self.disk.root / "state", ops=self.disk)
        self.journal, segments = Journal.open(self.disk.root / "state" / "journal", ops=self.disk)
        return segments

    def kill(self) -> None:
        """The process dies: only its descriptors are closed."""
        for fd in list(self.disk._open):
            self.disk.close(fd)

    def batch(self, shape: list[tuple[int, int]]) -> list[Record]:
        records = []
        for image, size in shape:
            sequence = self.journal.next_sequence()
            data = self.simulation.rng.randbytes(size)
            kind = RecordKind.DATA if size else RecordKind.RESIZE
            records.append(Record(kind, IMAGES[image], 1, sequence, sequence * 10, data, 5))
        return records

    async def append(self, *shapes: list[tuple[int, int]]) -> None:
        """Batches that wait at the same moment."""
        batches = [self.batch(shape) for shape in shapes]
        async with trio.open_nursery() as nursery:
            for records in batches:
                nursery.start_soon(self.journal.append, records)
        self.appended += [record for records in batches for record in records]

    def commit(self, image: bytes) -> None:
        sequence = max((r.sequence for r in self.appended if r.image_id == image), default=0)
        self.committed[image] = sequence
        self.journal.committed(image, sequence)

    def check(self, segments: list[Segment], *, damaged: bool = False) -> None:
        """The segments hold exactly the records that no generation has; of older ones, parts."""
        if not damaged:
            assert all(segment.damaged_at < 0 for segment in segments)
        found = joined([record for segment in segments for record in segment.records])
        for image in IMAGES:
            contained = self.committed.get(image, 0)
            needed = [r for r in self.appended if r.image_id == image and r.sequence > contained]
            assert [r for r in found if r.image_id == image and r.sequence > contained] == needed
        assert {r.sequence for r in found} <= {r.sequence for r in self.appended}, "something that was never appended"

    @property
    def directory(self) -> Path:
        return self.disk.root / "state" / "journal"


def joined(parts: list[Record]) -> list[Record]:
    """Large records are journaled in parts; a part may be there twice, after an error."""
    whole: dict[int, tuple[Record, dict[int, bytes]]] = {}
    for part in parts:
        first, pieces = whole.setdefault(part.sequence, (part, {}))
        pieces[part.offset] = part.data
    found = []
    for _, (first, pieces) in sorted(whole.items()):
        offsets = sorted(pieces)
        found.append(first._replace(offset=offsets[0], data=b"".join(pieces[offset] for offset in offsets), more=False))
    return found


@contextlib.contextmanager
def world(seed: int = 1) -> Iterator[World]:
    in_memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=in_memory) as directory, Simulation(seed, pause_s=0) as simulation, small_segments():
        made = World(simulation, DiskLog(Path(directory)), DiskModel())
        made.disk.record = made.model.tell
        made.open()
        yield made
        made.kill()


def run(made: World, main: Callable[[], Awaitable[Any]]) -> None:
    made.simulation.run(main)


@SETTINGS
@given(
    actions=st.lists(
        st.one_of(
            st.tuples(st.just("append"), st.lists(BATCH, min_size=1, max_size=3)),
            st.tuples(st.just("commit"), st.integers(0, 2)),
            st.tuples(st.just("reopen"), st.sampled_from(["closed", "killed", "power"])),
        ),
        max_size=12,
    ),
    seed=st.integers(0, 1000),
)
def test_what_was_appended_is_found_until_it_is_committed(actions: list[tuple[str, Any]], seed: int) -> None:
    """semantics: S2."""
    with world(seed) as made:

        async def main() -> None:
            nonlocal made
            for action, argument in actions:
                if action == "append":
                    await made.append(*argument)
                elif action == "commit":
                    made.commit(IMAGES[argument])
                else:
                    if argument == "closed":
                        made.journal.close()
                    made.kill()
                    if argument == "power":
                        _cut_power(made)
                    made.check(made.open())
                assert len(list(made.directory.iterdir())) <= 2 + SPARES_MAX + len(made.journal._needed), "files pile up"
            made.check(list(files.read_segments(made.directory)))

        run(made, main)


def _cut_power(made: World) -> None:
    """Go on, on another disk, with one of the states that a power cut may leave."""
    made.kill()
    state = made.model.crash(made.simulation.rng)
    root = Path(tempfile.mkdtemp(dir=made.disk.root))
    made.disk = DiskLog(root)
    made.disk.adopt(state.write_to(root))
    made.model = DiskModel(state)
    made.disk.record = made.model.tell


@SETTINGS
@given(batches=st.lists(BATCH, min_size=1, max_size=4), data=st.data())
def test_a_torn_tail_is_dropped_and_damage_before_it_is_not_passed_over(batches: list[list[tuple[int, int]]], data: st.DataObject) -> None:
    """semantics: S2. Bytes of the last fdatasync may be anything after a power cut; all before were promised: they are found, or said
    to be damaged, and what can be read behind the damage is found."""
    with world() as made:

        async def main() -> None:
            for shape in batches:
                await made.append([(image, min(size, 3000)) for image, size in shape])

        run(made, main)
        (path,) = made.directory.glob("*.seg")
        content = path.read_bytes()
        header = files.decode_header(content)
        assert header is not None
        assert files.scan(content, header.seed) == (made.appended, -1)
        places: list[tuple[int, int, int]] = []  # number of the fdatasync, start and end of each record
        at = files.HEADER_BYTES
        for number, shape in enumerate(batches):
            at = files.block_end(at)
            for _ in shape:
                end = at + files.RECORD_BYTES + len(made.appended[len(places)].data)
                places.append((number, at, end))
                at = end

        start = data.draw(st.integers(files.HEADER_BYTES, at - 1), label="damaged from")
        count = data.draw(st.integers(1, 5000), label="bytes")
        changed = bytearray(content)
        changed[start : start + count] = bytes(len(changed[start : start + count]))
        changed[start] = content[start] ^ data.draw(st.integers(1, 255), label="xor")
        hit = [any(changed[i] != content[i] for i in range(low, end)) for _, low, end in places]
        records, damaged_at = files.scan(bytes(changed), header.seed)
        if not any(hit):  # what lies between two fdatasyncs says nothing
            assert (records, damaged_at) == (made.appended, -1)
            return
        first = hit.index(True)
        batch_of = {made.appended[n].sequence: number for n, (number, _, _) in enumerate(places)}
        intact = [record for record, damaged in zip(made.appended, hit, strict=True) if not damaged]
        last = max(batch_of[record.sequence] for record in intact) if intact else -1
        known = last > places[first][0]  # a later record says that these bytes were synced; else it is a torn tail
        assert damaged_at == ((places[first - 1][2] if first else files.HEADER_BYTES) if known else -1)
        assert [r for r in records if r in intact] == records == sorted(records, key=lambda r: r.sequence)
        if not known:
            assert records == made.appended[:first]
        assert [r for r in intact if batch_of[r.sequence] < last] == [r for r in records if batch_of[r.sequence] < last], (
            "all that was synced"
        )


@SETTINGS
@given(shape=BATCH, more=st.lists(BATCH, min_size=1, max_size=3), count=st.integers(1, 3000))
def test_the_next_segment_tells_how_far_the_one_before_it_was_synced(
    shape: list[tuple[int, int]], more: list[list[tuple[int, int]]], count: int
) -> None:
    with world() as made:

        async def main() -> None:
            await made.append(shape)
            first = made.journal._current
            while made.journal._current is first:
                await made.append(*more)
            assert first is not None
            content = bytearray(first.path.read_bytes())
            end = first.synced
            low = max(files.HEADER_BYTES, end - count)
            content[low:end] = bytes(b ^ 0xFF for b in content[low:end])
            first.path.write_bytes(content)
            (found,) = [s for s in files.read_segments(made.directory) if s.path == first.path]
            assert files.HEADER_BYTES <= found.damaged_at < end

        run(made, main)


@SETTINGS
@given(
    before=st.lists(BATCH, max_size=3),
    during=st.lists(BATCH, min_size=1, max_size=4),
    after=st.lists(BATCH, min_size=1, max_size=3),
    operation=st.sampled_from(["write", "sync", "create", "rename", "sync_dir"]),
    number=st.sampled_from([errno.ENOSPC, errno.EIO, errno.EDQUOT]),
    skip=st.integers(0, 6),
    times=st.sampled_from([1, 2, 3, 1000]),
)
def test_a_full_or_failing_disk_loses_nothing_that_was_promised(
    before: list[Any], during: list[Any], after: list[Any], operation: str, number: int, skip: int, times: int
) -> None:
    """semantics: S2. Writers hear of it; what was promised before is there, and what is promised after it has passed is, too."""
    with world() as made:
        seen = 0

        def fail(name: str) -> None:
            nonlocal seen
            if name == operation:
                seen += 1
                if skip < seen <= skip + times:
                    raise OSError(number, os.strerror(number))

        async def main() -> None:
            for shape in before:
                await made.append(shape)
            made.disk.fault = fail
            waiting: list[Record] = []
            for shape in during:
                waiting += made.batch(shape)
                try:
                    await made.journal.append(waiting)
                except NovaError as error:
                    assert isinstance(error, StoreFullError if number in (errno.ENOSPC, errno.EDQUOT) else PermanentError)
                else:
                    made.appended += waiting
                    waiting = []
                names = len(list(made.directory.iterdir()))
                assert names <= 2 + SPARES_MAX + len(made.journal._needed), "half-made files stay on the full disk"
            made.disk.fault = lambda _: None
            await made.journal.append(waiting)
            made.appended += waiting
            for shape in after:
                await made.append(shape)
            _cut_power(made)
            made.check(made.open())

        run(made, main)


@SETTINGS
@given(batches=st.lists(BATCH, min_size=4, max_size=8), lag=st.integers(0, 2))
def test_a_recycled_segment_shows_nothing_of_its_past(batches: list[list[tuple[int, int]]], lag: int) -> None:
    with world() as made:

        async def main() -> None:
            for number, shape in enumerate(batches * 3):
                await made.append(shape)
                if number >= lag:
                    for image in IMAGES:
                        made.commit(image)
            made.check(list(files.read_segments(made.directory)))
            # Everything is committed: whatever is found is behind the heads, and at most what is in the open segment.
            assert len(list(made.directory.glob("*.seg"))) <= 1

        run(made, main)


def test_a_segment_with_a_damaged_header_is_kept_and_one_that_was_never_finished_goes(tmp_path: Path) -> None:
    with world() as made:

        async def main() -> None:
            await made.append([(0, 100)])

        run(made, main)
        (path,) = made.directory.glob("*.seg")
        content = bytearray(path.read_bytes())
        content[20] ^= 1
        path.write_bytes(content)
        for number in (2, 3):  # two crashes in a row while a segment was made; their names are the next ones
            (made.directory / f"{number:016x}.seg").write_bytes(bytes(number * 1000))
        (made.directory / "0000000000000009.spare").write_bytes(b"cut off")
        made.disk._names |= {f"state/journal/{p.name}": 100 + n for n, p in enumerate(made.directory.iterdir())}
        (segment,) = made.open()
        assert (segment.path, segment.header, segment.records, segment.damaged_at) == (path, None, [], 0)
        kept = made.journal.keep_whole(segment)
        assert kept == made.journal.keep_whole(segment), "kept once, however often"
        made.journal.kept(segment)
        assert kept.read_bytes() == bytes(content)
        run(made, main)
        assert sorted(p.suffix for p in made.directory.iterdir()) == ["", ".seg"], "what is of no use stays"


def test_what_is_set_aside_twice_is_kept_once() -> None:
    with world() as made:
        records = made.batch([(0, 100), (0, 90000), (0, 0)])
        path = made.journal.set_aside(IMAGES[0], records)
        assert made.journal.set_aside(IMAGES[0], records) == path
        assert len(list(path.parent.iterdir())) == 1
        (segment,) = files.read_segments(path.parent)
        assert joined(segment.records) == records


@pytest.mark.parametrize("text", [b"", b"nothing of the kind", b"ab" * 15, b"ab" * 17, b"AB" * 16, b"\xff" * 32, b"ab " * 10 + b"abab"])
def test_a_journal_id_that_is_damaged_is_refused(text: bytes) -> None:
    """An id of another length would be nobody's, or everybody's."""
    with world() as made:
        (made.directory / "id").write_bytes(text)
        with pytest.raises(NovaError, match=r"expected a journal id of 32 hex digits, found .* delete this file and mount again"):
            made.open()


def test_a_journal_whose_id_is_lost_is_known_by_its_segments() -> None:
    """What was fsynced is found again, under the id that the generations in the store name."""
    with world() as made:
        journal_id = made.journal.journal_id
        run(made, lambda: made.append([(0, 100)]))
        made.kill()
        (made.directory / "id").unlink()
        del made.disk._names["state/journal/id"]
        made.check(made.open())
        assert made.journal.journal_id == journal_id
        made.kill()
        made.check(made.open())
        assert made.journal.journal_id == journal_id


def test_segments_of_another_journal_are_shown_and_count_for_nothing() -> None:
    """The directory was put together from two, or its id was replaced: whose images they belong to can not be told."""
    with world() as made:
        run(made, lambda: made.append([(0, 100)]))
        made.kill()
        (made.directory / "id").write_text("12" * 16)
        (segment,) = made.open()
        assert segment.header is not None and segment.header.journal_id != made.journal.journal_id == bytes.fromhex("12" * 16)
        for image in IMAGES:
            made.journal.committed(image, 1000)
        assert segment.path.exists(), "kept for as long as nobody has it aside"
        kept = made.journal.keep_whole(segment)
        assert kept.name.startswith("foreign-")
        made.journal.kept(segment)
        made.journal.close()
        assert not segment.path.exists()
        assert [r.data for s in files.read_segments(kept.parent) for r in s.records] == [made.appended[0].data]


@pytest.mark.parametrize("linked", [False, True], ids=["", "symlink"])
def test_directories_that_were_made_by_somebody_who_was_killed_are_made_durable(linked: bool) -> None:
    """He made each and was about to sync the one above it. What is fsynced into the journal must be found through all of them."""
    with world() as made:
        for name in ("x", "x/y", "x/y/state"):
            made.disk.mkdir(made.disk.root / name, 0o700)
        state = made.disk.root / "x/y/state"
        if linked:
            (made.disk.root / "link").symlink_to(state)
        made.kill()
        calls: list[Call] = []
        made.disk.record = lambda call: (made.model.tell(call), calls.append(call))[0]
        made.journal, _ = Journal.open((made.disk.root / "link" if linked else state) / "journal", ops=made.disk)
        assert {("sync_dir", name) for name in (".", "x", "x/y")} <= set(calls)
        if linked:
            return  # the model knows no links
        run(made, lambda: made.append([(0, 100)]))
        for _ in range(20):
            left = made.model.crash(made.simulation.rng)
            assert any(name.startswith("x/y/state/journal/") and name.endswith(".seg") for name in left)


def test_a_new_segment_never_takes_the_name_of_one_that_can_not_be_read() -> None:
    with world() as made:
        run(made, lambda: made.append([(0, 100)]))
        made.kill()
        (path,) = made.directory.glob("*.seg")
        content = bytearray(path.read_bytes())
        content[9] ^= 1
        names = [f"{int(path.stem, 16) + more:016x}.seg" for more in range(3)]
        for name in names:
            (made.directory / name).write_bytes(bytes(content))
        assert len(made.open()) == 3
        made.appended.clear()
        run(made, lambda: made.append([(1, 100)]))
        assert all((made.directory / name).read_bytes() == bytes(content) for name in names)


def test_a_segment_on_which_the_disk_has_failed_is_never_used_again() -> None:
    """The kernel marks its pages clean: what it says of that file afterwards is worth nothing."""
    with world() as made:
        run(made, lambda: made.append([(0, 100)]))
        (failed,) = made.directory.glob("*.seg")
        syncs = 0

        def fail(operation: str) -> None:
            nonlocal syncs
            syncs += operation == "sync"
            if operation == "sync" and syncs == 1:
                raise OSError(errno.EIO, os.strerror(errno.EIO))

        made.disk.fault = fail
        run(made, lambda: made.append([(0, 100)]))
        made.check(list(files.read_segments(made.directory)))
        made.commit(IMAGES[0])
        assert not failed.exists() and made.journal._spares == []


def test_segments_that_are_gone_when_it_is_opened_do_not_come_back() -> None:
    """A journal that finds nothing counts anew: old records would pass for new ones."""
    with world() as made:
        run(made, lambda: made.append([(0, 100)]))
        made.commit(IMAGES[0])
        made.journal.close()
        made.kill()
        assert made.open() == []
        for _ in range(30):
            assert not [name for name in made.model.crash(made.simulation.rng) if name.endswith(".seg")]


def test_a_power_cut_while_a_segment_is_used_again_does_not_look_like_damage() -> None:
    """Its old name is gone for good before its header is overwritten: half a header and old records under it would be kept aside."""
    with world() as made:
        reused: list[Path] = []
        open_rw = made.disk.open_rw

        def reuse(path: Path) -> int:
            reused.append(path)
            return open_rw(path)

        def die(operation: str) -> None:
            if operation == "sync" and reused:  # the header is written, and on its way to the disk
                made.disk.record = lambda call: None
                raise OSError(errno.EIO, os.strerror(errno.EIO))

        made.disk.open_rw = reuse  # type: ignore[method-assign]
        made.disk.fault = die

        async def main() -> None:
            while not reused:
                records = made.batch([(0, SEGMENT_BYTES // 2)])
                with contextlib.suppress(PermanentError):
                    await made.journal.append(records)
                made.journal.committed(IMAGES[0], records[-1].sequence)

        run(made, main)
        for number in range(60):
            root = made.disk.root / f"left-{number}"
            root.mkdir()
            made.model.crash(made.simulation.rng).write_to(root)
            found = list(files.read_segments(root / "state" / "journal"))
            assert all(segment.header is not None and segment.damaged_at < 0 for segment in found)


def test_other_writes_of_the_same_numbers_are_kept_aside_beside_the_first() -> None:
    """A journal that was emptied counts anew: what it then sets aside must not pass for what it has set aside before."""
    with world() as made:
        first = made.batch([(0, 100), (0, 200)])
        others = [record._replace(data=bytes(len(record.data))) for record in first]
        paths = {made.journal.set_aside(IMAGES[0], records) for records in (first, others, first)}
        assert len(paths) == 2
        kept = [[r.data for r in segment.records] for segment in files.read_segments(next(iter(paths)).parent)]
        assert sorted(kept) == sorted([r.data for r in records] for records in (first, others))


def test_a_caller_that_is_cancelled_does_not_cost_a_spare_segment() -> None:
    with world() as made:

        async def main() -> None:
            while not made.journal._spares:
                await made.append([(0, SEGMENT_BYTES // 2)])
                made.commit(IMAGES[0])
            made.journal._close_current()
            spares = len(made.journal._spares)
            with trio.CancelScope() as scope:
                scope.cancel()
                await made.journal._start()
            assert scope.cancelled_caught and len(made.journal._spares) == spares

        run(made, main)


@SETTINGS
@given(sizes=st.lists(st.sampled_from([0, 10, 9000, 30000]), min_size=1, max_size=6), data=st.data())
def test_a_hole_in_an_images_writes_is_seen(sizes: list[int], data: st.DataObject) -> None:
    with world():
        records = [Record(RecordKind.DATA, IMAGES[0], 1, 7 + 3 * n, 50 * n, bytes(size), 5, 4 + 3 * n) for n, size in enumerate(sizes)]
        parts = [part for record in records for part in journal_module._split(record)]
        assert files.unbroken(parts, 4) == files.unbroken(sorted([*parts, *parts], key=lambda r: r.sequence), 4) / 2 == len(parts)
        gone = data.draw(st.integers(0, len(parts) - 1))
        left = parts[:gone] + parts[gone + 1 :]
        if gone + 1 < len(parts):
            assert files.unbroken(left, 4) == gone
        else:
            assert files.unbroken(left, 4) == len(left), "nothing follows on it"


def test_one_fdatasync_serves_all_who_wait() -> None:
    with world() as made:

        async def main() -> None:
            await made.append([(0, 10)])
            before = made.journal.statistics()
            made.simulation.pause_s = 1.0
            await made.append(*[[(n % 3, 1000)] for n in range(10)])
            after = made.journal.statistics()
            # The first who came is written alone; those who came meanwhile share the next.
            assert after.records - before.records == 10
            assert after.syncs - before.syncs <= 2

        run(made, main)
