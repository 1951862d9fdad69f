"""Chains of revisions: lost answers, races, sleepers. The store is a real one, behind a shim that scripts the fault."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
import trio

from novafs.errors import NovaError, ObjectCorruptError, ObjectExistsError
from novafs.objectstore.client import StoreClient
from novafs.objectstore.url import create_root, open_store
from novafs.record import seal, unseal
from novafs.revisions import Chain, ConflictError, Head, counter_of, new_nonce, revision_name


class Note(msgspec.Struct, frozen=True):
    counter: int
    nonce: bytes
    predecessor: bytes = b""
    text: str = ""

    def next(self, text: str) -> Note:
        return Note(self.counter + 1, new_nonce(), self.nonce, text)


class Clock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def chain_on(directory: Path, clock: Callable[[], float], *, grace_s: float = 100) -> Chain[Note]:
    url = f"file://{directory / 'store'}"
    create_root(url)
    return Chain(
        StoreClient(open_store(url)),
        "notes/",
        encode=lambda note: seal(b"NOTE", 1, note),
        decode=lambda data, name: unseal(b"NOTE", 1, data, Note, name),
        grace_s=grace_s,
        clock_s=clock,
    )


def first() -> Note:
    return Note(0, new_nonce(), b"", "first")


def test_the_newest_number_is_the_first_key_of_a_listing() -> None:
    names = [revision_name("x/", counter) for counter in (0, 1, 2, 255, 256, 10**12)]
    assert names == sorted(names, reverse=True)
    assert [counter_of(name) for name in names] == [0, 1, 2, 255, 256, 10**12]
    assert counter_of("x/zzz") is None


def test_each_commit_becomes_the_head(tmp_path: Path) -> None:
    async def main() -> None:
        chain = chain_on(tmp_path, Clock())
        assert await chain.head() is None
        head = await chain.commit(None, first())
        for text in ("second", "third"):
            head = await chain.commit(head, head.record.next(text))
            found = await chain.head()
            assert found is not None
            assert found.record == head.record

    trio.run(main)


def test_of_two_hosts_that_commit_the_same_number_one_conflicts(tmp_path: Path) -> None:
    async def main() -> None:
        one, other = chain_on(tmp_path, Clock()), chain_on(tmp_path, Clock())
        head = await one.commit(None, first())
        await one.commit(head, head.record.next("mine"))
        with pytest.raises(ConflictError):
            await other.commit(head, head.record.next("theirs"))

    trio.run(main)


def test_a_create_whose_answer_was_lost_counts_when_its_retry_finds_the_name_taken(tmp_path: Path) -> None:
    """semantics: S3. The first try reached the store; the client saw an error and tried again."""

    async def main() -> None:
        chain = chain_on(tmp_path, Clock())
        head = await chain.commit(None, first())
        mine = head.record.next("mine")
        store = chain._client.store
        store.create(revision_name("notes/", 1), seal(b"NOTE", 1, mine))  # arrived, unanswered
        with pytest.raises(ObjectExistsError):
            store.create(revision_name("notes/", 1), seal(b"NOTE", 1, mine))
        assert (await chain.commit(head, mine)).record == mine

    trio.run(main)


def test_a_writer_that_slept_while_its_number_was_taken_passed_and_collected_does_not_count(tmp_path: Path) -> None:
    async def main() -> None:
        clock = Clock()
        sleeper, other = chain_on(tmp_path, clock), chain_on(tmp_path, clock)
        head = await sleeper.commit(None, first())
        mine = head.record.next("mine, late")
        second = await other.commit(head, head.record.next("second"))
        third = await other.commit(second, second.record.next("third"))
        clock.now_s += 500  # the sleeper sleeps; number 1 is superseded for long, and collected
        await other._client.delete(revision_name("notes/", 1))
        with pytest.raises(ConflictError):
            await sleeper.commit(Head(head.record, 1000.0), mine)
        newest = await other.head()
        assert newest is not None
        assert newest.record == third.record

    trio.run(main)


def test_a_slow_commit_counts_when_the_chain_leads_back_to_it(tmp_path: Path) -> None:
    async def main() -> None:
        clock = Clock()
        slow, other = chain_on(tmp_path, clock), chain_on(tmp_path, clock)
        head = await slow.commit(None, first())
        mine = head.record.next("mine")
        await slow._client.create(revision_name("notes/", 1), seal(b"NOTE", 1, mine))
        seen = await other.head()
        assert seen is not None
        await other.commit(seen, seen.record.next("built on mine"))
        clock.now_s += 500
        assert (await slow.commit(Head(head.record, 1000.0), mine)).record == mine

    trio.run(main)


def test_a_chain_that_was_emptied_is_no_reason_to_believe_a_slow_commit(tmp_path: Path) -> None:
    async def main() -> None:
        clock = Clock()
        chain = chain_on(tmp_path, clock)
        head = await chain.commit(None, first())
        mine = head.record.next("mine")
        clock.now_s += 500
        original = chain._client.list

        async def nothing(*args: object, **kwargs: object) -> list[object]:
            return []

        chain._client.list = nothing  # type: ignore[method-assign,assignment]
        with pytest.raises(NovaError):
            await chain.commit(Head(head.record, 1000.0), mine)
        chain._client.list = original  # type: ignore[method-assign]

    trio.run(main)


def test_what_is_no_revision_hides_none(tmp_path: Path) -> None:
    """A file that somebody left, a key that a console made: the chain looked empty, which is to say the image was removed."""

    async def main() -> None:
        chain = chain_on(tmp_path, Clock())
        await chain.commit(None, first())
        client = StoreClient(open_store(f"file://{tmp_path / 'store'}"))
        for name in ("-", "0", "0x00000000000000", "_000000000000000", "00000000000000000", "0000000000000zzz"):
            await client.create(f"notes/{name}", b"junk")
            assert await chain.head_counter() == 0
        for number in range(150):
            await client.create(f"notes/000-{number:03}", b"junk")
        found = await chain.head()
        assert found is not None
        assert found.record.counter == 0

    trio.run(main)


def test_a_revision_under_another_number_is_corrupt_and_not_the_head(tmp_path: Path) -> None:
    """Whoever took it for the head conflicted with what it really was, again and again without end."""

    async def main() -> None:
        chain = chain_on(tmp_path, Clock())
        note = first()
        await chain.commit(None, note)
        client = StoreClient(open_store(f"file://{tmp_path / 'store'}"))
        await client.create(revision_name("notes/", 7), seal(b"NOTE", 1, note))
        with pytest.raises(ObjectCorruptError, match="holds revision 0, where 7 should be"):
            await chain.head()
        with pytest.raises(ObjectCorruptError):
            await chain.commit(None, Note(2**64, new_nonce()))

    trio.run(main)
