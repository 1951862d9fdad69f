"""Whole values under names: what the library's `set`, `delete` and `clear` do to a volume.

A value becomes a new image, stored and complete before it has a name; one commit of the catalog then puts it where the old
one was. So a reader finds the old value or the new one, never a mixture and never nothing, wherever a writer is killed, and any number
of values change at once or not at all. Whoever has the old one open reads on in it.

An image that has snapshots keeps its identity, because they belong to it: its content is replaced under its lease, in one generation
(`Image.replace_content`). Mode, owner and extended attributes of what was there before stay in either case.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec
import trio

from novafs.asynctools import open_nursery
from novafs.bulk import StoredContent
from novafs.catalog import Changes
from novafs.catalogtree import ROOT_ID, Entry, Kind, split_path
from novafs.errors import InvalidNameError, IsDirectoryError, UserError
from novafs.generation import Generation, generation_chain
from novafs.packwriter import PacksLostError
from novafs.revisions import ConflictError, Head, boot_time_s
from novafs.volume import SNAPSHOTS_NAME, Volume

Parts = tuple[str, ...]
"""A key: the directories that it lies in, and its name."""

AT_ONCE = 16
"""Generations created at the same time."""


@dataclass(frozen=True, slots=True)
class NewValue:
    """A value that is stored and waits for its name. expires_s: since the epoch; None: it stays."""

    parts: Parts
    content: StoredContent
    expires_s: float | None


@dataclass(slots=True, eq=False)
class _Made:
    """A value with its first generation."""

    value: NewValue
    head: Head[Generation]
    began_s: float


class _HasSnapshotsError(UserError):
    """Never shown: what is to be replaced has snapshots, which a new image would lose."""

    def __init__(self, one: _Made, entry: Entry) -> None:
        self.one = one
        self.entry = entry
        super().__init__(f"{entry.name}: has snapshots")


@dataclass(slots=True)
class _Placed:
    """What one commit did."""

    entries: list[Entry] = field(default_factory=list)
    replaced: list[Entry] = field(default_factory=list)


def check_key(key: object) -> Parts:
    """The parts of a key: names with "/" between them, none at the ends. Raises InvalidNameError."""
    if not isinstance(key, str):
        raise InvalidNameError(f"key {key!r}: is a {type(key).__name__}, expected a str such as 'vm-001-disk' or 'web/vm-001-disk'")
    parts = tuple(split_path(key))
    if not parts or "/".join(parts) != key:
        raise InvalidNameError(f"key {key[:80]!r}: expected names with one '/' between them and none at the ends")
    if parts[0] == SNAPSHOTS_NAME:
        raise InvalidNameError(f"key {key[:80]!r}: {SNAPSHOTS_NAME} is where a mount shows snapshots; choose another name")
    return parts


def is_expired(entry: Entry, now_s: float) -> bool:
    """Whether its time is over: then it counts as gone, although only a collection takes it away."""
    return entry.expires_s is not None and entry.expires_s <= now_s


async def publish(volume: Volume, values: Sequence[NewValue]) -> list[Entry]:
    """Give values their names, all in one commit (but for those that replace what has snapshots: one each, after the others).

    Missing directories are made. The entries, in order. Raises IsDirectoryError, NotDirectoryError, PacksLostError (the content must be
    stored again), LeaseHeldError (has snapshots, and another host writes it), and what the store raises.
    """
    volume.check_writable()
    made = await _create(volume, values)
    kept: dict[int, Entry] = {}
    while True:
        wanted = [(at, one) for at, one in enumerate(made) if at not in kept]
        try:
            placed: _Placed = await volume.catalog.change(_operation([one for _, one in wanted]))
        except _HasSnapshotsError as error:
            # Found out in the commit, so that a snapshot taken a moment ago counts.
            kept[made.index(error.one)] = error.entry
            continue
        break
    for replaced in placed.replaced:
        volume._note_unlinked(replaced)
    entries = dict(zip([at for at, _ in wanted], placed.entries, strict=True))
    for _, one in wanted:
        volume.remember_head(one.head)
        if volume.overdue(one.began_s):
            await _count_on(volume, one)
    for at, entry in kept.items():
        entries[at] = await _replace_content(volume, entry, made[at].value)
    return [entries[at] for at in range(len(made))]


async def _create(volume: Volume, values: Sequence[NewValue]) -> list[_Made]:
    """Create the first generation of each; what they refer to is there."""
    made: dict[int, _Made] = {}
    slots = trio.CapacityLimiter(AT_ONCE)

    async def create(at: int, value: NewValue) -> None:
        async with slots:
            first, began_s = value.content.generation, boot_time_s()
            head = await generation_chain(volume.client, first.image_id, grace_s=volume.grace_s).commit(None, first)
            await value.content.confirm()
            made[at] = _Made(value, head, began_s)

    async with open_nursery() as nursery:
        for at, value in enumerate(values):
            nursery.start_soon(create, at, value)
    return [made[at] for at in range(len(values))]


async def _count_on(volume: Volume, one: _Made) -> None:
    # A collection that saw no name yet may be deleting the generation: one more it has not seen.
    chain = generation_chain(volume.client, one.head.record.image_id, grace_s=volume.grace_s)
    try:
        volume.remember_head(await chain.commit(one.head, one.head.record.successor()))
    except ConflictError:
        return  # somebody who writes it has made one


class _operation:  # noqa: N801 - used like a function
    """Puts the values under their names, in a state of the namespace that is under construction."""

    def __init__(self, made: Sequence[_Made]) -> None:
        self._made = made

    async def __call__(self, changes: Changes) -> _Placed:
        placed = _Placed()
        now = time.time_ns()
        for one in self._made:
            parts, first = one.value.parts, one.value.content.generation
            parent_id = await _directory(changes, parts[:-1], now)
            old = (await changes.entries(parent_id)).get(parts[-1])
            if old is not None and old.kind is Kind.DIRECTORY:
                raise IsDirectoryError(f"{'/'.join(parts)}: is a directory, and can not be replaced by a value")
            if old is not None and old.snapshots:
                raise _HasSnapshotsError(one, old)
            entry = Entry(
                parts[-1],
                first.image_id,
                Kind.IMAGE,
                old.mode if old is not None else 0o644,
                old.uid if old is not None else os.getuid(),
                old.gid if old is not None else os.getgid(),
                now,
                first.mtime_ns,
                now,
                first.size,
                first.held_bytes,
                xattrs=old.xattrs if old is not None else {},
                expires_s=one.value.expires_s,
                parent_id=parent_id,
            )
            parent = await changes.get(parent_id)
            if old is not None:
                changes.unset(old)
                placed.replaced.append(old)
            changes.set(entry)
            changes.touch(parent)
            placed.entries.append(entry)
        return placed


async def _directory(changes: Changes, names: Sequence[str], now: int) -> bytes:
    """The node of a directory; made where it is missing. Raises NotDirectoryError."""
    node_id = ROOT_ID
    for name in names:
        found = (await changes.entries(node_id)).get(name)
        if found is None:
            parent = await changes.get(node_id)
            found = Entry(name, secrets.token_bytes(16), Kind.DIRECTORY, 0o755, os.getuid(), os.getgid(), now, now, now, parent_id=node_id)
            changes.set(found)
            changes.touch(parent)
        node_id = found.node_id
    return node_id


async def _replace_content(volume: Volume, entry: Entry, value: NewValue) -> Entry:
    await value.content.confirm()
    image = await volume.open_image(entry.node_id)
    try:
        await image.take_lease()
        await image.replace_content(value.content.generation)
        volume.remember_head(Head(image.head, boot_time_s()))
        if gone := await value.content.used.lost():
            raise PacksLostError(gone, committed=True)
    finally:
        await volume.close_image(image)
    # After the content: a value whose time is over must not come back for a moment.
    return await volume.catalog.update(entry.node_id, lambda e: msgspec.structs.replace(e, expires_s=value.expires_s))


async def remove(volume: Volume, keys: Sequence[Parts]) -> list[Entry | None]:
    """Take names away, in one commit; the entry of each that was there. Raises IsDirectoryError, and nothing is removed."""
    volume.check_writable()

    async def operation(changes: Changes) -> list[Entry | None]:
        found: list[Entry | None] = []
        for parts in keys:
            entry = await _find(changes, parts)
            if entry is not None and entry.kind is Kind.DIRECTORY:
                raise IsDirectoryError(f"{'/'.join(parts)}: is a directory; 'keys' with a prefix lists what is in it")
            if entry is not None:
                parent = await changes.get(entry.parent_id)
                changes.unset(entry)
                changes.touch(parent)
            found.append(entry)
        return found

    removed: list[Entry | None] = await volume.catalog.change(operation)
    for entry in removed:
        if entry is not None:
            volume._note_unlinked(entry)
    return removed


async def _find(changes: Changes, parts: Parts) -> Entry | None:
    node_id, entry = ROOT_ID, None
    for name in parts:
        if entry is not None and entry.kind is not Kind.DIRECTORY:
            return None
        entry = (await changes.entries(node_id)).get(name)
        if entry is None:
            return None
        node_id = entry.node_id
    return entry


async def remove_all(volume: Volume) -> list[Entry]:
    """Empty the volume, directories and all, in one commit; the images that there were. What is made before the commit goes with it,
    what is made after stays."""
    volume.check_writable()

    async def operation(changes: Changes) -> list[Entry]:
        images: list[Entry] = []
        entries = list((await changes.entries(ROOT_ID)).values())
        if not entries:
            return images
        # Looked for here, in the state that is emptied: an image that was made a moment ago is gone as well, and must be told so.
        waiting = list(entries)
        while waiting:
            entry = waiting.pop()
            if entry.kind is Kind.DIRECTORY:
                waiting.extend((await changes.entries(entry.node_id)).values())
            else:
                images.append(entry)
        root = await changes.get(ROOT_ID)
        for entry in entries:
            changes.unset(entry)
        changes.touch(root)
        return images

    images: list[Entry] = await volume.catalog.change(operation)
    for image in images:
        volume._note_unlinked(image)
    return images
