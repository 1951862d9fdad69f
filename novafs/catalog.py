"""The namespace of a volume: names -> images and directories, committed as a whole.

A commit writes what changed (`novafs.catalogtree`) and creates the next `catalog/<rev>`; that creation is the commit
point. Whoever finds the number taken reads the newer state and applies his change again, so every change is a
function that looks before it touches. Changes that wait at the same moment share one commit.

Always holds: `_head` is a committed revision. A loaded directory counts only while its content is the one that its
parent's entry names, so a newer head makes stale directories load again without any bookkeeping.
"""

from __future__ import annotations

import builtins
import itertools
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import AbstractAsyncContextManager
from typing import Any, Final, NamedTuple

import msgspec
import trio

from novafs import catalogtree as tree
from novafs.asynctools import GroupCommit
from novafs.catalogtree import ROOT_ID, Content, Entry, Kind, PageRow, check_name, split_path
from novafs.chunk import Reference
from novafs.errors import (
    CorruptionError,
    ExistsError,
    InvalidNameError,
    IsDirectoryError,
    NotDirectoryError,
    NotEmptyError,
    NotFoundError,
    NovaError,
    ObjectCorruptError,
    UserError,
)
from novafs.generation import HOST
from novafs.imagemap import Fetch
from novafs.objectstore.client import StoreClient
from novafs.packwriter import PackWriter
from novafs.record import seal, unseal
from novafs.revisions import GRACE_S_DEFAULT, Chain, ConflictError, Head, boot_time_s, new_nonce, writers_grace_s

KIND: Final = b"CATL"
VERSION: Final = 1
PREFIX: Final = "catalog/"
REFRESH_S: Final = 1.0
"""How old a look at the head may be when a name is looked up (design 5.5: at most one second)."""


TURN_S: Final = 4.0
TURN_BESIDE_S: Final = 0.25
OTHERS_S: Final = 30.0
"""How long a host commits one state after the other before it lets others have a turn: less where one has committed in the last
`OTHERS_S`."""
MAKE_WAY: Final = 10
MAKE_WAY_S_MAX: Final = 2.0
"""It then waits for so many times as long as its last commit took, and at most so long: a host that lost has to look at the head, read it
and what changed, and store pages, before it can try again, and would always be late."""
MOVES_MAX: Final = 8
"""How often a node is looked for again in one call because other hosts have moved it."""


class CatalogRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One committed namespace: the root directory's own entry, whose content holds or names all else."""

    counter: int
    nonce: bytes
    predecessor: bytes = b""
    root: Entry
    written_ns: int = 0
    host: str = HOST


def root_entry(mode: int = 0o755, uid: int = 0, gid: int = 0) -> Entry:
    """The root directory of a new volume."""
    now = time.time_ns()
    return Entry("", ROOT_ID, Kind.DIRECTORY, mode, uid, gid, now, now, now)


def catalog_chain(client: StoreClient, *, grace_s: float = GRACE_S_DEFAULT) -> Chain[CatalogRecord]:
    """The chain of a volume's catalogs. grace_s: `gc.grace`, for whoever commits."""
    return Chain(
        client,
        PREFIX,
        encode=lambda r: seal(KIND, VERSION, r),
        decode=lambda data, name: unseal(KIND, VERSION, data, CatalogRecord, name),
        grace_s=writers_grace_s(grace_s),
    )


class _Page(NamedTuple):
    entries: list[Entry]
    row: PageRow
    directories: frozenset[bytes]
    """Node ids of those among the entries."""


def _page(entries: list[Entry], row: PageRow) -> _Page:
    return _Page(entries, row, frozenset(e.node_id for e in entries if e.kind is Kind.DIRECTORY))


class _Directory:
    """A loaded directory: entries by name, the content they came from, and its pages by first name."""

    __slots__ = ("content", "entries", "pages")

    def __init__(self, content: Content, entries: dict[str, Entry], pages: dict[str, _Page]) -> None:
        self.content = content
        self.entries = entries
        self.pages = pages


class Catalog:
    """The namespace, as this host sees it. On the trio thread alone."""

    def __init__(
        self,
        chain: Chain[CatalogRecord],
        head: Head[CatalogRecord],
        *,
        fetch: Fetch,
        pack_writer: Callable[[], AbstractAsyncContextManager[PackWriter]],
    ) -> None:
        self._chain = chain
        self._head = head
        self._fetch = fetch
        self._pack_writer = pack_writer
        self._directories: dict[bytes, _Directory] = {}
        # Where each node that was seen lies: (parent id, name). Checked at each use, since another host may move it; and noted anew
        # whenever a name is looked up, since a slow look at the directory that it was moved out of may have ended last.
        self._places: dict[bytes, tuple[bytes, str]] = {}
        self._commits: GroupCommit[_Request] = GroupCommit(self._commit)
        # Of the commits that this host has made without a pause: when the first began and the last ended, and how long that one took.
        self._turn_began_s = self._turn_ended_s = self._commit_s = 0.0
        self._others_s = float("-inf")
        """When another host's commit was seen last."""

    @property
    def revision(self) -> int:
        """Counter of the committed revision that this host sees."""
        return self._head.record.counter

    @property
    def root(self) -> Entry:
        """The root directory's own entry."""
        return self._head.record.root

    async def refresh(self, max_age_s: float = 0.0) -> bool:
        """See what other hosts committed, unless the last look is at most `max_age_s` old; whether it is newer."""
        if max_age_s and boot_time_s() - self._head.read_s <= max_age_s:
            return False
        head = await self._chain.head(self._head)
        if head is None:
            raise NotFoundError("catalog/: the volume has no catalog any more; was it removed?")
        if head.record.counter < self.revision:
            return False  # a commit of our own was faster than this listing
        newer = head.record.counter > self.revision
        self._head = head
        if newer:
            self._others_s = boot_time_s()
        return newer

    # -- looking ------------------------------------------------------------------------------------------------

    async def lookup(self, parent_id: bytes, name: str, *, max_age_s: float = REFRESH_S) -> Entry:
        """The entry of a name. Raises NotFoundError, NotDirectoryError."""
        await self.refresh(max_age_s)
        entry = (await self._directory(parent_id)).entries.get(name)
        if entry is None:
            path = f"{self.path_of_id(parent_id)}/{name}".lstrip("/")
            raise NotFoundError(f"{path}: no such image or directory")
        self._places[entry.node_id] = (parent_id, name)
        return entry

    async def resolve(self, path: str, *, max_age_s: float = REFRESH_S) -> Entry:
        """The entry of a path inside the volume; "" or "/" is the root. Raises InvalidNameError, NotFoundError."""
        await self.refresh(max_age_s)
        entry = self.root
        for name in split_path(path):
            if entry.kind is not Kind.DIRECTORY:
                raise NotDirectoryError(f"{path}: {self.path_of(entry)} is an image, not a directory")
            found = (await self._directory(entry.node_id)).entries.get(name)
            if found is None:
                raise NotFoundError(f"{path}: no such image or directory; 'novafs ls' shows what is there")
            self._places[found.node_id] = (entry.node_id, name)
            entry = found
        return entry

    async def get(self, node_id: bytes) -> Entry:
        """The entry of a node that was seen before. Raises NotFoundError where it is gone."""
        for _ in range(MOVES_MAX):
            entry, way = self.root, self._way_to(node_id)
            for below, place in way:
                found = (await self._loaded(entry)).entries.get(place[1]) if entry.kind is Kind.DIRECTORY else None
                if found is None or found.node_id != below:
                    if self._way_to(node_id) == way:
                        raise NotFoundError(f"node {node_id.hex()}: removed, or moved by another host")
                    break  # loading a directory on the way has found it in another place
                entry = found
            else:
                return entry
        raise NotFoundError(f"node {node_id.hex()}: other hosts move it all the time")

    def _way_to(self, node_id: bytes) -> builtins.list[tuple[bytes, tuple[bytes, str]]]:
        """The nodes on the way from the root, each with its place. Never recursive: directories may lie as deep as anybody likes."""
        way: dict[bytes, tuple[bytes, str]] = {}
        while node_id != ROOT_ID:
            place = self._places.get(node_id)
            if place is None or node_id in way:
                raise NotFoundError(f"node {node_id.hex()}: removed, or moved by another host")
            way[node_id] = place
            node_id = place[0]
        return builtins.list(reversed(way.items()))

    async def list(self, node_id: bytes, *, max_age_s: float = REFRESH_S) -> list[Entry]:
        """A directory's entries, sorted by name. Raises NotFoundError, NotDirectoryError."""
        await self.refresh(max_age_s)
        entries = (await self._directory(node_id)).entries
        self._places.update((e.node_id, (node_id, name)) for name, e in entries.items())
        return [entries[name] for name in sorted(entries)]

    async def walk(self, node_id: bytes = ROOT_ID) -> AsyncIterator[Entry]:
        """Every entry below a directory, parents first."""
        left = [iter(await self.list(node_id))]
        while left:
            entry = next(left[-1], None)
            if entry is None:
                left.pop()
                continue
            yield entry
            if entry.kind is Kind.DIRECTORY:
                left.append(iter(await self.list(entry.node_id)))

    def path_of(self, entry: Entry) -> str:
        """The path of an entry inside the volume, for people; as far as this host has seen the directories above."""
        return self.path_of_id(entry.node_id) or entry.name

    def path_of_id(self, node_id: bytes) -> str:
        """The path of a node that was seen, "" for the root."""
        parts: list[str] = []
        while node_id != ROOT_ID and (place := self._places.get(node_id)) is not None and len(parts) < 4096:
            parts.append(place[1])
            node_id = place[0]
        return "/".join(reversed(parts))

    async def _directory(self, node_id: bytes) -> _Directory:
        entry = await self.get(node_id)
        if entry.kind is not Kind.DIRECTORY:
            raise NotDirectoryError(f"{self.path_of(entry)}: is an image, not a directory")
        return await self._loaded(entry)

    async def _loaded(self, entry: Entry) -> _Directory:
        node_id = entry.node_id
        known = self._directories.get(node_id)
        if known is not None and (known.content is entry.content or known.content == entry.content):
            return known
        if entry.content.index:
            return await self._load_pages(entry, known)
        data = entry.content.inline
        if entry.content.page:
            (data,) = await self._fetch([Reference.unpack(entry.content.page)])
        entries = self._own(tree.decode_entries(data, self.path_of(entry) or "/"), node_id)
        loaded = _Directory(entry.content, {e.name: e for e in entries}, {})
        self._replace(node_id, known.entries.values() if known is not None else (), loaded, entries)
        return loaded

    async def _load_pages(self, entry: Entry, known: _Directory | None) -> _Directory:
        """A directory of several pages. Those that it had when it was looked at last are not read again: a change costs its page."""
        node_id, where = entry.node_id, self.path_of(entry) or "/"
        (blob,) = await self._fetch([Reference.unpack(entry.content.index)])
        rows = tree.decode_index(blob, where)
        had = {page.row.reference: page for page in known.pages.values()} if known is not None else {}
        wanted = [row for row in rows if row.reference not in had]
        blobs = await self._fetch([Reference.unpack(row.reference) for row in wanted])
        read = {row.reference: self._own(tree.decode_entries(data, where), node_id) for row, data in zip(wanted, blobs, strict=True)}
        kept = [had[row.reference] for row in rows if row.reference in had]
        if not self._above(node_id).isdisjoint(itertools.chain.from_iterable(page.directories for page in kept)):
            raise self._within_itself(node_id)
        pages = {row.first: had.get(row.reference) or _page(read[row.reference], row) for row in rows}
        if known is None or not known.pages or self._directories.get(node_id) is not known:
            # No pages were known, or another look was faster; then what was known does not say which places are.
            entries = {e.name: e for page in pages.values() for e in page.entries}
            loaded = _Directory(entry.content, entries, pages)
            self._replace(node_id, known.entries.values() if known is not None else (), loaded, entries.values())
            return loaded
        stays = {page.row.reference for page in kept}
        gone = [e for page in known.pages.values() if page.row.reference not in stays for e in page.entries]
        new = [e for part in read.values() for e in part]
        entries = dict(known.entries)
        for old in gone:
            entries.pop(old.name, None)
        entries.update((e.name, e) for e in new)
        loaded = _Directory(entry.content, entries, pages)
        self._replace(node_id, gone, loaded, new)
        return loaded

    def _replace(self, node_id: bytes, gone: Iterable[Entry], loaded: _Directory, new: Iterable[Entry]) -> None:
        """Know a directory as it was loaded; gone, new: entries by which it differs from what was known. No checkpoint."""
        for old in gone:
            if self._places.get(old.node_id) == (node_id, old.name):
                del self._places[old.node_id]
        self._directories[node_id] = loaded
        for entry in new:
            self._places[entry.node_id] = (node_id, entry.name)

    def _above(self, node_id: bytes) -> set[bytes]:
        """A directory, and those that it lies in."""
        above, place = {ROOT_ID, node_id}, self._places.get(node_id)
        while place is not None and place[0] not in above:
            above.add(place[0])
            place = self._places.get(place[0])
        return above

    def _within_itself(self, node_id: bytes) -> ObjectCorruptError:
        return ObjectCorruptError(f"{self.path_of_id(node_id) or '/'}: holds a directory that it lies in; run 'novafs fsck'")

    def _own(self, entries: builtins.list[Entry], parent_id: bytes) -> builtins.list[Entry]:
        above = self._above(parent_id)
        for entry in entries:
            tree.check_entry(entry, self.path_of_id(parent_id) or "/")
            if entry.node_id in above:
                raise self._within_itself(parent_id)
        if parent_id == ROOT_ID:
            return entries
        return [msgspec.structs.replace(e, parent_id=parent_id) for e in entries]

    # -- changing -----------------------------------------------------------------------------------------------

    async def change(self, operation: Callable[[Changes], Awaitable[Any]]) -> Any:
        """Run `operation` on the newest state and commit what it set; its result.

        It may run several times, and must look at everything it needs before it sets anything. What it raises
        reaches the caller, and nothing of it is committed.
        """
        request = _Request(operation)
        await self._commits.submit(request)
        if request.error is not None:
            raise request.error
        return request.result

    async def _make_way(self) -> None:
        """Wait for a moment where this host has committed all the time, so that others come to commit as well.

        Who commits next needs one round trip after his last commit, and who lost several: without this one host that creates names in
        a loop shuts all others out.
        """
        now_s, pause_s = boot_time_s(), min(MAKE_WAY_S_MAX, MAKE_WAY * self._commit_s)
        if now_s - self._turn_ended_s > pause_s:
            self._turn_began_s = now_s
        elif now_s - self._turn_began_s > (TURN_BESIDE_S if now_s - self._others_s < OTHERS_S else TURN_S):
            await trio.sleep(pause_s * (0.5 + random.random()))  # noqa: S311  # so that hosts do not move in step
            self._turn_began_s = boot_time_s()

    async def _commit(self, requests: builtins.list[_Request]) -> None:
        await self._make_way()
        while True:
            began_s = boot_time_s()
            base = self._head
            changes = Changes(self)
            for request in requests:
                await request.run(changes)
            if not changes.dirty:
                return
            try:
                head = await self._store(base, changes)
            except ConflictError:
                await self.refresh()
                self._turn_began_s = boot_time_s()
                continue
            self._turn_ended_s = boot_time_s()
            self._commit_s = self._turn_ended_s - began_s
            # A listing that ran beside the commit may have seen it first, or a newer one; then the nodes made here must be
            # known all the same. What `adopt` notes is checked at each use, so it can be noted whichever head is current.
            if head.record.counter > self.revision:
                self._head = head
            changes.adopt()
            return

    async def _store(self, base: Head[CatalogRecord], changes: Changes) -> Head[CatalogRecord]:
        """Commit `changes` on top of `base`; once more where that took so long that a collection has taken a page. Raises ConflictError."""
        while True:
            async with self._pack_writer() as writer:
                root = await changes.store(writer)
                await writer.finish()
            if await writer.used.lost():
                continue
            record = CatalogRecord(
                counter=base.record.counter + 1,
                nonce=new_nonce(),
                predecessor=base.record.nonce,
                root=root,
                written_ns=time.time_ns(),
            )
            base = await self._chain.commit(base, record)
            if not await writer.used.lost():
                return base

    async def create(self, entry: Entry, *, replace: bool = False) -> Entry:
        """Add `entry` to its parent, or put it in an image's place where `replace`.

        Raises ExistsError, NotFoundError, NotDirectoryError, IsDirectoryError, InvalidNameError.
        """
        check_name(entry.name)

        async def operation(changes: Changes) -> Entry:
            where = f"{self.path_of_id(entry.parent_id)}/{entry.name}".lstrip("/")
            old = (await changes.entries(entry.parent_id)).get(entry.name)
            if old is not None and not replace:
                raise ExistsError(f"{where}: exists already")
            if old is not None and old.kind is Kind.DIRECTORY:
                raise IsDirectoryError(f"{where}: is a directory, and can not be replaced by an image")
            parent = await changes.get(entry.parent_id)
            if old is not None:
                changes.unset(old)
            changes.set(entry)
            changes.touch(parent)
            return entry

        found: Entry = await self.change(operation)
        return found

    async def remove(self, parent_id: bytes, name: str, *, directory: bool) -> Entry:
        """Take a name away; the entry it had. Raises NotFoundError, IsDirectoryError, NotDirectoryError, NotEmptyError."""

        async def operation(changes: Changes) -> Entry:
            entry = (await changes.entries(parent_id)).get(name)
            where = f"{self.path_of_id(parent_id)}/{name}".lstrip("/")
            if entry is None:
                raise NotFoundError(f"{where}: no such image or directory")
            if directory:
                if entry.kind is not Kind.DIRECTORY:
                    raise NotDirectoryError(f"{where}: is an image")
                if await changes.entries(entry.node_id):
                    raise NotEmptyError(f"{where}: the directory is not empty")
            elif entry.kind is Kind.DIRECTORY:
                raise IsDirectoryError(f"{where}: is a directory")
            parent = await changes.get(parent_id)
            changes.unset(entry)
            changes.touch(parent)
            return entry

        found: Entry = await self.change(operation)
        return found

    async def rename(self, parent_id: bytes, name: str, new_parent_id: bytes, new_name: str, *, replace: bool = True) -> Entry | None:
        """Move a name, atomically; the entry that it replaced, if any.

        Raises NotFoundError, ExistsError (not `replace`), NotEmptyError, IsDirectoryError, NotDirectoryError,
        InvalidNameError (a directory into itself).
        """
        check_name(new_name)

        async def operation(changes: Changes) -> Entry | None:
            entry = (await changes.entries(parent_id)).get(name)
            where = f"{self.path_of_id(new_parent_id)}/{new_name}".lstrip("/")
            if entry is None:
                raise NotFoundError(f"{name}: no such image or directory")
            target = (await changes.entries(new_parent_id)).get(new_name)
            if target is not None:
                if not replace:
                    raise ExistsError(f"{where}: exists already")
                if target.node_id == entry.node_id:
                    return None
                if target.kind is Kind.DIRECTORY:
                    if entry.kind is not Kind.DIRECTORY:
                        raise IsDirectoryError(f"{where}: is a directory, and can not be replaced by an image")
                    if await changes.entries(target.node_id):
                        raise NotEmptyError(f"{where}: the directory is not empty")
                elif entry.kind is Kind.DIRECTORY:
                    raise NotDirectoryError(f"{where}: is an image, and can not be replaced by a directory")
            if entry.kind is Kind.DIRECTORY and await changes.is_below(new_parent_id, entry.node_id):
                raise InvalidNameError(f"{where}: a directory can not be moved into itself")
            parents = [await changes.get(parent_id), await changes.get(new_parent_id)]
            now = time.time_ns()
            changes.unset(entry)
            if target is not None:
                changes.unset(target)
            changes.set(msgspec.structs.replace(entry, name=new_name, parent_id=new_parent_id, ctime_ns=now))
            for parent in parents[: 1 if parent_id == new_parent_id else 2]:
                changes.touch(parent)
            return target

        found: Entry | None = await self.change(operation)
        return found

    async def update(self, node_id: bytes, edit: Callable[[Entry], Entry]) -> Entry:
        """Replace a node's entry by `edit` of it (name and node id stay). Raises NotFoundError, and what `edit` raises."""

        async def operation(changes: Changes) -> Entry:
            entry = await changes.get(node_id)
            edited = edit(entry)
            if edited != entry:
                changes.set(edited)
            return edited

        found: Entry = await self.change(operation)
        return found


class _Request:
    """One change that waits for a commit."""

    __slots__ = ("_operation", "error", "result")

    def __init__(self, operation: Callable[[Changes], Awaitable[Any]]) -> None:
        self._operation = operation
        self.result: Any = None
        self.error: NovaError | None = None

    async def run(self, changes: Changes) -> None:
        """Apply it to `changes`, or note why it can't be, leaving them as they were."""
        self.error = None
        staged = changes.begin()
        try:
            self.result = await self._operation(changes)
        except NovaError as error:
            changes.roll_back(staged)
            self.error = error
            if not isinstance(error, UserError | CorruptionError):
                raise  # not about this one request: a store that is away concerns all


class Changes:
    """A state of the namespace under construction: the catalog's head, with entries set and unset."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog
        self._base_root = catalog.root
        self._root = catalog.root
        self._entries: dict[bytes, dict[str, Entry]] = {}
        self._loaded: dict[bytes, _Directory] = {}
        self._places: dict[bytes, tuple[bytes, str] | None] = {}
        self._undo: list[Callable[[], None]] = []
        # Of each directory in `_entries` the names that were set or unset, and some that were not after all.
        self._touched: dict[bytes, set[str]] = {}
        self._stored: dict[bytes, _Directory] = {}

    @property
    def dirty(self) -> bool:
        """Whether anything differs from the head."""
        return bool(self._entries) or self._root is not self._base_root

    def begin(self) -> int:
        """A mark to roll back to."""
        self._undo.clear()
        return 0

    def roll_back(self, mark: int) -> None:
        """Undo what was set since the mark."""
        while len(self._undo) > mark:
            self._undo.pop()()

    async def get(self, node_id: bytes) -> Entry:
        """The entry of a node. Raises NotFoundError."""
        if node_id == ROOT_ID:
            return self._root
        if node_id in self._places:
            place = self._places[node_id]
            if place is None:
                raise NotFoundError(f"node {node_id.hex()}: removed")
            return (await self.entries(place[0]))[place[1]]
        entry = await self._catalog.get(node_id)
        return self._entries.get(entry.parent_id, {}).get(entry.name, entry)

    async def entries(self, node_id: bytes) -> dict[str, Entry]:
        """A directory's entries by name; not to be changed. Raises NotFoundError, NotDirectoryError."""
        entry = await self.get(node_id)
        if entry.kind is not Kind.DIRECTORY:
            raise NotDirectoryError(f"{entry.name}: is an image, not a directory")
        if node_id in self._entries:
            return self._entries[node_id]
        if node_id not in self._loaded:
            if entry.content == Content():
                self._loaded[node_id] = _Directory(Content(), {}, {})
            else:
                self._loaded[node_id] = await self._catalog._directory(node_id)
        return self._loaded[node_id].entries

    async def is_below(self, node_id: bytes, ancestor_id: bytes) -> bool:
        """Whether a node is `ancestor_id` or lies below it."""
        while node_id != ROOT_ID:
            if node_id == ancestor_id:
                return True
            node_id = (await self.get(node_id)).parent_id
        return ancestor_id == ROOT_ID

    def _mutable(self, node_id: bytes) -> dict[str, Entry]:
        if node_id not in self._entries:
            self._entries[node_id] = dict(self._loaded[node_id].entries)
        return self._entries[node_id]

    def _put(self, parent_id: bytes, name: str, entry: Entry | None) -> None:
        known = parent_id in self._entries
        entries = self._mutable(parent_id)
        before = entries.get(name)

        def undo() -> None:
            if not known:
                del self._entries[parent_id]
            elif before is None:
                entries.pop(name, None)
            else:
                entries[name] = before

        self._undo.append(undo)
        self._touched.setdefault(parent_id, set()).add(name)
        if entry is None:
            del entries[name]
        else:
            entries[name] = entry

    def _place(self, node_id: bytes, place: tuple[bytes, str] | None) -> None:
        had = node_id in self._places
        before = self._places.get(node_id)

        def undo() -> None:
            if had:
                self._places[node_id] = before
            else:
                self._places.pop(node_id, None)

        self._undo.append(undo)
        self._places[node_id] = place

    def set(self, entry: Entry) -> None:
        """Put an entry under its name; the directory was looked at before (`entries`, or `get` of something in it)."""
        if entry.node_id == ROOT_ID:
            before = self._root
            self._undo.append(lambda: setattr(self, "_root", before))
            self._root = entry
            return
        if entry.parent_id not in self._loaded and entry.parent_id not in self._entries:
            self._loaded[entry.parent_id] = self._catalog._directories[entry.parent_id]
        self._put(entry.parent_id, entry.name, entry)
        self._place(entry.node_id, (entry.parent_id, entry.name))

    def unset(self, entry: Entry) -> None:
        """Take an entry away."""
        self._put(entry.parent_id, entry.name, None)
        self._place(entry.node_id, None)

    def touch(self, directory: Entry) -> None:
        """Set a directory's times to now."""
        now = time.time_ns()
        self.set(msgspec.structs.replace(directory, mtime_ns=now, ctime_ns=now))

    # -- storing ------------------------------------------------------------------------------------------------

    async def store(self, writer: PackWriter) -> Entry:
        """Write the changed directories, the deepest first; the new root entry, which names them all."""
        pending = dict.fromkeys(self._entries)
        depths: dict[bytes, int] = {}
        for node_id in list(pending):
            if not await self._find_depth(node_id, depths):
                del pending[node_id]  # removed again, with all that is in it
        while pending:
            node_id = max(pending, key=depths.__getitem__)
            del pending[node_id]
            if node_id == ROOT_ID:
                break
            entry = await self.get(node_id)
            stored = await self._store_directory(node_id, writer, tree.INLINE_MAX)
            parent = await self.get(entry.parent_id)
            await self.entries(entry.parent_id)
            self.set(msgspec.structs.replace(entry, content=stored.content))
            depths[parent.node_id] = depths[node_id] - 1
            pending[parent.node_id] = None
        if ROOT_ID in self._entries:
            stored = await self._store_directory(ROOT_ID, writer, tree.ROOT_INLINE_MAX)
            self._root = msgspec.structs.replace(self._root, content=stored.content)
        return self._root

    async def _find_depth(self, node_id: bytes, depths: dict[bytes, int]) -> bool:
        """Add the depth of a node, and of all above it, to `depths`; False where it is not there any more."""
        way: list[bytes] = []
        try:
            while node_id != ROOT_ID and node_id not in depths:
                way.append(node_id)
                node_id = (await self.get(node_id)).parent_id
        except (NotFoundError, KeyError):
            return False
        depth = depths.setdefault(node_id, 0)
        for at, below in enumerate(reversed(way), 1):
            depths[below] = depth + at
        return True

    async def _store_directory(self, node_id: bytes, writer: PackWriter, inline_max: int) -> _Directory:
        by_name = self._entries[node_id]
        stored = _Directory(Content(), by_name, {})
        self._stored[node_id] = stored
        if not by_name:
            return stored
        old = self._loaded.get(node_id)
        parts = tree.cut_again([page.entries for page in old.pages.values()], by_name, self._touched[node_id]) if old is not None else None
        if parts is None:
            entries = [by_name[name] for name in sorted(by_name)]
            parts = [entries[start:end] for start, end in tree.page_bounds(entries)]
        if len(parts) == 1:
            data = tree.encode_entries(parts[0])
            if len(data) <= inline_max:
                stored.content = Content(inline=data)
            else:
                stored.content = Content(page=(await writer.put_blob(data)).pack())
            return stored
        for part in parts:
            known = old.pages.get(part[0].name) if old is not None else None
            if known is None or not _same(known.entries, part):
                reference = await writer.put_blob(tree.encode_entries(part))
                known = _page(part, PageRow(part[0].name, len(part), reference.pack()))
            stored.pages[part[0].name] = known
        blob = await writer.put_blob(tree.encode_index([page.row for page in stored.pages.values()]))
        stored.content = Content(index=blob.pack())
        return stored

    def adopt(self) -> None:
        """The commit succeeded: the catalog goes on from this state."""
        self._catalog._directories.update(self._stored)
        for node_id, place in self._places.items():
            if place is None:
                self._catalog._places.pop(node_id, None)
                self._catalog._directories.pop(node_id, None)
            else:
                self._catalog._places[node_id] = place


def _same(before: list[Entry], now: list[Entry]) -> bool:
    return before is now or (len(before) == len(now) and all(a is b for a, b in zip(before, now, strict=True)))
