"""Directories whose entries are long: every page stays small enough to be read back, or the change is refused."""

from __future__ import annotations

import os
import random
from pathlib import Path

import msgspec
import pytest
import trio

from novafs.catalog import Changes
from novafs.catalogtree import PAGE_BYTES, ROOT_ID, Entry, Kind, Snapshot, cut_again, encode_entries, page_bounds
from novafs.chunk import Reference
from novafs.errors import TooLargeError
from tests.support.engine import fresh_volume, make_volume, opened

XATTR_BYTES = 60_000


def entries(count: int, xattr_bytes: int) -> list[Entry]:
    xattrs = {"user.a": bytes(xattr_bytes)}
    return [Entry(f"{n:06}", os.urandom(16), Kind.IMAGE, 0o644, 0, 0, 0, 0, 0, xattrs=xattrs) for n in range(count)]


def test_a_directory_of_images_with_large_attributes_is_read_back(tmp_path: Path) -> None:
    """More than one frame may hold in what was one page: it was stored, and nobody could open the volume again."""
    trio.run(_large_attributes, tmp_path)


async def _large_attributes(tmp_path: Path) -> None:
    url = await make_volume(f"file://{tmp_path / 'store'}")
    made = entries(90, XATTR_BYTES)
    async with opened(url, tmp_path / "state") as volume:

        async def add(changes: Changes) -> None:
            await changes.entries(ROOT_ID)
            for entry in made:
                changes.set(msgspec.structs.replace(entry, xattrs={"user.a": os.urandom(XATTR_BYTES)}))

        await volume.catalog.change(add)
    async with opened(url, tmp_path / "other") as volume:
        assert [e.name for e in await volume.catalog.list(ROOT_ID)] == [e.name for e in made]


def test_pages_are_cut_by_bytes_and_never_empty() -> None:
    for count, size in ((1, 2 * PAGE_BYTES), (5, 2 * PAGE_BYTES), (300, 5_000), (3000, 0)):
        made = entries(count, size)
        bounds = page_bounds(made)
        assert [b[0] for b in bounds] == [0, *(b[1] for b in bounds[:-1])]
        assert bounds[-1][1] == count
        for start, end in bounds:
            assert end > start
            assert end - start == 1 or len(encode_entries(made[start:end])) < 2 * PAGE_BYTES


def test_an_entry_that_could_not_be_read_back_is_refused_and_costs_nothing(tmp_path: Path) -> None:
    trio.run(_too_long_an_entry, tmp_path)


async def _too_long_an_entry(tmp_path: Path) -> None:
    async with fresh_volume(tmp_path) as volume:
        made = await volume.create(ROOT_ID, "much.raw")
        many = {f"{n:0200}": Snapshot(0, 0, 0) for n in range(22_000)}
        with pytest.raises(TooLargeError, match="delete snapshots"):
            await volume.catalog.update(made.node_id, lambda entry: msgspec.structs.replace(entry, snapshots=many))
        await volume.create(ROOT_ID, "next.raw")
        assert not (await volume.catalog.get(made.node_id)).snapshots


def test_pages_cut_around_a_change_are_those_of_the_whole_directory_cut_anew() -> None:
    dice = random.Random(7)
    for _ in range(7):
        # "z", "zz", … to "z" * 255: runs of names of which none begins a page, so that full pages do.
        names = {f"{dice.randrange(10**6):06}" for _ in range(dice.choice((0, 1, 300, 3000)))} | {
            "z" * n for n in range(dice.choice((0, 200)))
        }
        by_name = {name: entry_named(name) for name in names if name}
        for _ in range(7):
            ordered = [by_name[name] for name in sorted(by_name)]
            pages = [ordered[start:end] for start, end in page_bounds(ordered)]
            firsts = [page[0].name for page in pages]
            changed = dict(by_name)
            touched = set(dice.sample(sorted(by_name), min(len(by_name), dice.choice((0, 1, 5, 700)))))
            touched |= set(dice.sample(firsts, min(len(firsts), dice.choice((0, 1, 3)))))
            for name in touched:
                del changed[name]
                if dice.random() < 0.3:
                    changed[name] = entry_named(name, xattr_bytes=dice.choice((0, 0, PAGE_BYTES // 3)))
            for _ in range(dice.choice((0, 1, 1, 50, 2500))):
                name = f"{dice.randrange(10**6):06}"
                touched.add(name)
                if name not in changed:
                    changed[name] = entry_named(name)
            made = cut_again(pages, changed, touched)
            ordered = [changed[name] for name in sorted(changed)]
            expected = [ordered[start:end] for start, end in page_bounds(ordered)]
            assert made is None if not pages else made == expected
            by_name = changed


def entry_named(name: str, xattr_bytes: int = 0) -> Entry:
    xattrs = {"user.a": bytes(xattr_bytes)} if xattr_bytes else {}
    return Entry(name, os.urandom(16), Kind.IMAGE, 0o644, 0, 0, 0, 0, 0, xattrs=xattrs)


def test_pages_that_are_not_in_order_are_cut_anew_as_a_whole() -> None:
    made = entries(600, 0)
    by_name = {e.name: e for e in made}
    assert cut_again([made[300:], made[:300]], by_name, {"000001"}) is None
    assert cut_again([made, []], by_name, {"000001"}) is None


def test_a_directory_of_pages_that_another_host_changes_is_as_it_was_stored(tmp_path: Path) -> None:
    """Pages that stayed are not read again; names that came, went, moved and came back are all seen."""

    async def main() -> None:
        dice = random.Random(3)
        url = await make_volume(f"file://{tmp_path / 'store'}")
        async with opened(url, tmp_path / "a") as a, opened(url, tmp_path / "b") as b:
            ids = [(await a.mkdir(ROOT_ID, name)).node_id for name in ("one", "two")]

            async def add(changes: Changes) -> None:
                for node_id in ids:
                    await changes.entries(node_id)
                    for e in entries(1500, 0):
                        changes.set(msgspec.structs.replace(e, parent_id=node_id, node_id=os.urandom(16)))

            await a.catalog.change(add)
            assert [(await b.catalog.resolve(name, max_age_s=0)).node_id for name in ("one", "two")] == ids
            for _ in range(16):
                writer, reader = dice.sample((a, b), 2)
                seen = {e.node_id: (e.parent_id, e.name) for node_id in ids for e in await writer.catalog.list(node_id, max_age_s=0)}
                for moved in dice.sample(sorted(seen), dice.choice((1, 1, 4))):
                    parent_id, name = seen[moved]
                    now = {e.name: e.node_id for e in await writer.catalog.list(parent_id)}
                    if now.get(name) != moved:
                        continue  # another one took its place
                    if dice.random() < 0.2:
                        await writer.catalog.remove(parent_id, name, directory=False)
                    else:
                        await writer.rename(parent_id, name, dice.choice(ids), f"{dice.randrange(1700):06}")
                for node_id in ids:
                    assert await reader.catalog.list(node_id, max_age_s=0) == await writer.catalog.list(node_id, max_age_s=0)
                    for e in await reader.catalog.list(node_id):
                        assert await reader.catalog.get(e.node_id) == e
                        assert reader.catalog.path_of(e) == f"{('one', 'two')[ids.index(node_id)]}/{e.name}"

    trio.run(main)


def test_a_name_that_is_looked_up_is_known_whichever_directory_was_loaded_last(tmp_path: Path) -> None:
    """A slow look at the directory that a name was moved out of ended after the look at the one that it was moved to: it was listed
    there, and could not be opened, until its page changed."""

    async def main() -> None:
        url = await make_volume(f"file://{tmp_path / 'store'}")
        async with opened(url, tmp_path / "a") as a, opened(url, tmp_path / "b") as b:
            old, new = [(await b.mkdir(ROOT_ID, name)).node_id for name in ("old", "new")]

            async def fill(changes: Changes) -> None:
                for node_id in (old, new):
                    await changes.entries(node_id)
                    for e in entries(600, 0):
                        changes.set(msgspec.structs.replace(e, parent_id=node_id, node_id=os.urandom(16)))

            await b.catalog.change(fill)
            for name in ("old", "new"):
                await a.catalog.list((await a.catalog.resolve(name, max_age_s=0)).node_id)
            moved = await b.create(old, "moved")
            fetch, may_go_on, fetching = a.catalog._fetch, trio.Event(), trio.Event()

            async def slow(references: list[Reference]) -> list[bytes]:
                found = await fetch(references)
                fetching.set()
                await may_go_on.wait()
                return found

            async with trio.open_nursery() as nursery:
                a.catalog._fetch = slow  # type: ignore[assignment]
                nursery.start_soon(lambda: a.catalog.list(old, max_age_s=0))
                await fetching.wait()
                a.catalog._fetch = fetch
                await b.rename(old, "moved", new, "moved")
                await a.catalog.list(new, max_age_s=0)
                may_go_on.set()
            assert "moved" not in [e.name for e in await a.catalog.list(old)]
            looks = (a.catalog.lookup(new, "moved"), a.catalog.resolve("new/moved"))
            for found in [await look for look in looks]:
                assert await a.catalog.get(moved.node_id) == found
            del a.catalog._places[moved.node_id]
            assert moved.node_id in [e.node_id for e in await a.catalog.list(new)]
            assert (await a.catalog.get(moved.node_id)).parent_id == new

    trio.run(main)
