"""What is retained, and what refers to what: the walk that collection and `fsck` share (design 4).

Retained are, as of the store's clock when the walk begins:

- the newest catalog, and those superseded less than a grace ago, with their directory pages
- of each image that a retained catalog names, that is pinned (`novafs.pins`), leased, or younger than the grace (an import in
  flight has no name yet): the newest generation, its snapshots, the pinned ones, and those superseded less than a grace ago
- what the maps of those refer to: nodes of all levels, and chunks, each resolved through forwards (`novafs.forward`)
- what delta frames among those need to be read (`novafs.delta`), resolved likewise

Others write while this walks, and no moment is frozen. That is sound because nothing can hide by moving: what was
retained when the walk began stays so for a grace, so whoever copies a reference to another root leaves the old one
where the walk still comes by; and what is made from nothing after the beginning is younger than the grace. A walk that finds
something retained gone was overtaken by another collector, or the volume is damaged: either way it is a problem
that blocks (`Problem.blocking`), and whoever walked must free nothing.

Maps share nodes, so each node is read once however many generations lead to it, level by level; memory is 72 bytes for each
different node (256 chunks), and what `novafs.packcount` takes.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import trio

from novafs import catalogtree as tree
from novafs import pack
from novafs.asynctools import for_each, open_nursery
from novafs.catalog import PREFIX as CATALOG_PREFIX
from novafs.catalog import CatalogRecord, catalog_chain
from novafs.catalogtree import Content, Entry, Kind
from novafs.chunk import REFERENCE_DTYPE, Reference
from novafs.errors import CorruptionError, NovaError, ObjectNotFoundError
from novafs.forward import ForwardTable, Rows
from novafs.generation import PREFIX as IMAGES_PREFIX
from novafs.generation import Generation, generation_chain
from novafs.imagemap import LEVELS_MAX, NODE_BYTES
from novafs.lease import HANDOFFS_PREFIX, WANTS_PREFIX, LeaseRecord, lease_chain
from novafs.lease import PREFIX as LEASES_PREFIX
from novafs.objectstore.base import ObjectInfo
from novafs.packcount import PackTable
from novafs.pins import PREFIX as PINS_PREFIX
from novafs.pins import read_pin
from novafs.revisions import counter_of

if TYPE_CHECKING:
    from novafs.volume import Volume

T = TypeVar("T")
R = TypeVar("R")

PROBE_PREFIX: Final = "probe/"
PROBE_AGE_S: Final = 3600.0
CLOCK_SLACK_S: Final = 1.0
"""S3 tells times in whole seconds: what seems so much younger than it is, is kept that much longer."""
LIST_PAGE: Final = 5000
READS_AT_ONCE: Final = 16
NODES_AT_ONCE: Final = 64
MERGE_ROWS: Final = 1 << 16
COUNT_ROWS: Final = 1 << 17
"""References to chunks that are counted together: 9 MB of them, and four times that while they are sorted."""

Progress = Callable[[str, int], None]
"""Called with a phase ("catalogs", "images", "nodes", "packs") and how many things of it are behind."""


def no_progress(phase: str, done: int) -> None:
    """Nobody watches."""


class Problem(NamedTuple):
    """Something that is not as it should be. name: the object, or the path of an image; blocking: nothing may be freed while it is so."""

    kind: str
    name: str
    message: str
    blocking: bool = True


@dataclass(slots=True)
class ImageRoots:
    """What is known of one image. path: in the newest catalog, "" where it is not in it; snapshots: name -> counter, likewise;
    kept: counters that retained catalogs or pins name; generations: counters in the store, newest first; retained: those that stay."""

    image_id: bytes
    path: str = ""
    visible: bool = False
    named: bool = False
    leased: bool = False
    pinned: bool = False
    snapshots: dict[str, int] = field(default_factory=dict)
    kept: set[int] = field(default_factory=set)
    generations: list[int] = field(default_factory=list)
    retained: list[int] = field(default_factory=list)
    newest_s: float = 0.0
    size: int = 0
    """Of the newest generation, in bytes."""


@dataclass(slots=True)
class Doomed:
    """Names of objects that nothing retained needs, older than the grace; packs and forwards not among them."""

    catalogs: list[str] = field(default_factory=list)
    generations: list[str] = field(default_factory=list)
    leases: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """Pins and wants that nobody renews, offers that nobody took, probes."""


@dataclass(slots=True)
class Retention:
    """What a walk found. started_s: the store's clock; references: from all retained maps, each node counted once."""

    started_s: float
    grace_s: float
    packs: PackTable
    forwards: ForwardTable
    images: dict[bytes, ImageRoots] = field(default_factory=dict)
    directories: int = 0
    catalogs: int = 0
    nodes: int = 0
    doomed: Doomed = field(default_factory=Doomed)
    problems: list[Problem] = field(default_factory=list)
    bad_nodes: dict[bytes, str] = field(default_factory=dict)
    """Chunk ids of map nodes that can not be read, and why."""
    strays: list[str] = field(default_factory=list)
    """Objects where ours lie, with names that none of ours has."""

    @property
    def complete(self) -> bool:
        """Whether everything that is retained was seen, so that what was not seen is not retained."""
        return not any(problem.blocking for problem in self.problems)

    @property
    def cutoff_s(self) -> float:
        """What was superseded, or made, before this time of the store's clock is older than the grace."""
        return self.started_s - self.grace_s - CLOCK_SLACK_S


async def walk(volume: Volume, *, grace_s: float, progress: Progress = no_progress) -> Retention:
    """Find all that is retained and count all that it refers to. Raises what the store raises, NewerFormatError."""
    started_s = await volume.client.clock_s()
    forwards = await ForwardTable.load(volume.client)
    infos = await volume.client.list(pack.PREFIX)
    table = PackTable(volume.client, infos, forwards)
    forwards.collapse(table)
    retention = Retention(started_s, grace_s, table, forwards)
    retention.problems += [Problem("forward", name, message) for name, message in forwards.problems]
    walker = _Walker(volume, retention, progress)
    await walker.catalogs()
    await walker.pins()
    await walker.leases()
    await walker.images()
    await walker.nodes()
    await table.add_bases()
    await walker.notes()
    return retention


class _Queue:
    """Map nodes of one level that wait to be read, each once; a weight for each."""

    def __init__(self) -> None:
        self._rows: list[Rows] = []
        self._weights: list[npt.NDArray[np.int64]] = []
        self._pending = self._merged = 0

    def add(self, rows: Rows, weights: npt.NDArray[np.int64]) -> None:
        self._rows.append(rows)
        self._weights.append(weights)
        self._pending += len(rows)
        # As much again as there is: each row is sorted a few times in all, and not once for each 65,536 that follow.
        if self._pending > max(MERGE_ROWS, self._merged):
            self._merge()

    def _merge(self) -> None:
        rows = np.concatenate(self._rows)
        keys = np.ascontiguousarray(rows).view("S64").ravel()
        _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
        weights = np.zeros(len(first), dtype=np.int64)
        np.add.at(weights, inverse, np.concatenate(self._weights))
        self._rows, self._weights = [rows[first]], [weights]
        self._pending, self._merged = 0, len(first)

    def drain(self) -> Iterator[tuple[Rows, npt.NDArray[np.int64]]]:
        """Batches of different nodes; nothing is added any more."""
        if not self._rows:
            return
        self._merge()
        rows, weights = self._rows[0], self._weights[0]
        self._rows, self._weights = [], []
        for at in range(0, len(rows), NODES_AT_ONCE):
            yield rows[at : at + NODES_AT_ONCE], weights[at : at + NODES_AT_ONCE]


class _Walker:
    """The steps of `walk`, in their order."""

    def __init__(self, volume: Volume, retention: Retention, progress: Progress) -> None:
        self._volume = volume
        self._client = volume.client
        self._found = retention
        self._progress = progress
        self._queues = [_Queue() for _ in range(LEVELS_MAX)]
        self._chunks: list[tuple[Rows, npt.NDArray[np.int64]]] = []
        self._waiting = 0
        """Rows of those."""
        self._pages: set[bytes] = set()
        self._slots = trio.CapacityLimiter(READS_AT_ONCE)
        self._done = 0

    def _problem(self, kind: str, name: str, error: NovaError | str, *, blocking: bool = True) -> None:
        self._found.problems.append(Problem(kind, name, str(error), blocking))

    def _root(self, image_id: bytes) -> ImageRoots:
        return self._found.images.setdefault(image_id, ImageRoots(image_id))

    # -- catalogs -----------------------------------------------------------------------------------------------

    async def catalogs(self) -> None:
        """The retained catalogs, newest first, so that only the newest gives paths; older ones mostly share its pages."""
        listed = await self._client.list(CATALOG_PREFIX)
        infos = [info for info in listed if counter_of(info.name) is not None]
        self._found.strays += [info.name for info in listed if counter_of(info.name) is None]
        kept: list[ObjectInfo] = []
        for number, info in enumerate(infos):
            superseded_s = infos[number - 1].modified_s if number else float("inf")
            if max(info.modified_s, superseded_s) > self._found.cutoff_s:
                kept.append(info)
            else:
                self._found.doomed.catalogs.append(info.name)
        chain = catalog_chain(self._client)

        async def read(info: ObjectInfo) -> CatalogRecord | None:
            try:
                return await chain.read(counter_of(info.name) or 0)
            except (CorruptionError, ObjectNotFoundError) as error:
                self._problem("catalog", info.name, error)
                return None

        async with aclosing(self._read_many(kept, read)) as records:
            async for number, record in records:
                if record is not None:
                    await self._directory(record.root.content, "", visible=number == 0)
                self._found.catalogs += 1
                self._progress("catalogs", self._found.catalogs)

    async def _read_many(self, items: Sequence[T], read: Callable[[T], Awaitable[R]]) -> AsyncGenerator[tuple[int, R], None]:
        """`read` of each item, several at once, in order."""
        for start in range(0, len(items), READS_AT_ONCE):
            part = items[start : start + READS_AT_ONCE]
            results: dict[int, R] = {}

            async def one(number: int, item: T, results: dict[int, R] = results) -> None:
                results[number] = await read(item)

            async with open_nursery() as nursery:
                for number, item in enumerate(part):
                    nursery.start_soon(one, number, item)
            for number in range(len(part)):
                yield start + number, results[number]

    async def _directory(self, content: Content, path: str, *, visible: bool) -> None:
        """All that is below one directory's content. Pages that another catalog shared were seen, and are left out."""
        waiting = [(content, path)]
        while waiting:
            content, path = waiting.pop()
            async with aclosing(self._entries(content, path, visible=visible)) as lists:
                async for entries in lists:
                    for entry in entries:
                        below = f"{path}/{entry.name}".lstrip("/")
                        if entry.kind is Kind.DIRECTORY:
                            self._found.directories += visible
                            waiting.append((entry.content, below))
                        else:
                            self._image(entry, below, visible=visible)

    def _image(self, entry: Entry, path: str, *, visible: bool) -> None:
        root = self._root(entry.node_id)
        root.named = True
        root.kept.update(snapshot.counter for snapshot in entry.snapshots.values())
        if visible:
            if root.visible:
                self._problem("catalog", path, f"{path}: the same image as {root.path}; remove one of the names", blocking=False)
            root.visible, root.path = True, path
            root.snapshots = {name: snapshot.counter for name, snapshot in entry.snapshots.items()}

    async def _entries(self, content: Content, path: str, *, visible: bool) -> AsyncGenerator[list[Entry], None]:
        where = path or "/"
        if content.inline:
            try:
                yield tree.decode_entries(content.inline, where)
            except CorruptionError as error:
                self._problem("directory", where, error)
            return
        references = [content.page] if content.page else []
        if content.index:
            (blob,) = await self._blobs([content.index], where, visible=visible)
            if blob is None:
                return
            try:
                references = [row.reference for row in tree.decode_index(blob, where)]
            except CorruptionError as error:
                self._problem("directory", where, error)
        for start in range(0, len(references), READS_AT_ONCE):
            for blob in await self._blobs(references[start : start + READS_AT_ONCE], where, visible=visible):
                if blob is not None:
                    try:
                        yield tree.decode_entries(blob, where)
                    except CorruptionError as error:
                        self._problem("directory", where, error)

    async def _blobs(self, references: Sequence[bytes], where: str, *, visible: bool) -> list[bytes | None]:
        """Pages, or an index, counted as live and read together; None where one was seen before, or can not be read."""
        new = [reference for reference in references if visible or reference not in self._pages]
        self._pages.update(new)
        rows = np.frombuffer(b"".join(new), dtype=REFERENCE_DTYPE)
        await self._found.packs.add(rows)
        rows = self._found.forwards.resolve(rows)
        places = {reference: _reference(rows, number) for number, reference in enumerate(new)}
        blobs: dict[bytes, bytes | None] = {}

        async def read(reference: bytes) -> None:
            try:
                (blobs[reference],) = await self._volume.cache.fetch([places[reference]])
            except (CorruptionError, ObjectNotFoundError) as error:
                self._problem("directory", where, f"{where}: a page of the directory can not be read: {error}")

        await for_each(new, read, at_once=READS_AT_ONCE)
        return [blobs.get(reference) for reference in references]

    # -- pins and leases ----------------------------------------------------------------------------------------

    async def pins(self) -> None:
        """What other processes have open."""
        infos = await self._client.list(PINS_PREFIX)
        self._found.doomed.notes += [info.name for info in infos if info.modified_s <= self._found.cutoff_s]

        async def read(info: ObjectInfo) -> None:
            try:
                record = await read_pin(self._client, info.name)
            except ObjectNotFoundError:
                return  # closed since: what it had open was retained for a grace from then on anyway
            except CorruptionError as error:
                self._problem("pin", info.name, error)
                return
            for image_id, counter in record.generations:
                root = self._root(image_id)
                root.pinned = True
                root.kept.add(counter)

        await for_each((info for info in infos if info.modified_s > self._found.cutoff_s), read, at_once=READS_AT_ONCE)

    async def leases(self) -> None:
        """Images that no catalog names, and that somebody writes; old epochs, never the highest."""
        async with aclosing(self._groups(LEASES_PREFIX)) as groups:
            async for image_id, infos in groups:
                # A holder's heartbeats are its epoch's own times; what follows an epoch says nothing about its age.
                self._found.doomed.leases += [info.name for info in infos[1:] if info.modified_s <= self._found.cutoff_s]
                root = self._found.images.get(image_id)
                if root is not None and root.named:
                    continue
                try:
                    head = await lease_chain(self._client, image_id).head()
                    held = head is not None and not _released(head.record)
                except CorruptionError as error:
                    self._problem("lease", infos[0].name, error, blocking=False)
                    held = True
                if held:
                    self._root(image_id).leased = True

    async def _groups(self, prefix: str) -> AsyncGenerator[tuple[bytes, list[ObjectInfo]], None]:
        """The revisions of each chain `<prefix><32 digits>/<revision>`, newest first, a page of the listing at a time."""
        group: list[ObjectInfo] = []
        after = ""
        while True:
            page = await self._client.list(prefix, after=after, limit=LIST_PAGE)
            for info in page:
                if _group_id(info.name) is None or counter_of(info.name) is None:
                    self._found.strays.append(info.name)
                    continue
                if group and _group_id(group[0].name) != _group_id(info.name):
                    yield _group_id(group[0].name) or b"", group
                    group = []
                group.append(info)
            if len(page) < LIST_PAGE:
                break
            after = page[-1].name
        if group:
            yield _group_id(group[0].name) or b"", group

    # -- images -------------------------------------------------------------------------------------------------

    async def images(self) -> None:
        """Which generations stay, and what their maps refer to."""
        waiting: list[tuple[ImageRoots, int]] = []
        async with aclosing(self._groups(IMAGES_PREFIX)) as groups:
            async for image_id, infos in groups:
                root = self._choose(image_id, infos)
                waiting += [(root, counter) for counter in root.retained]
                if len(waiting) >= READS_AT_ONCE:
                    await self._generations(waiting)
                    waiting = []
        await self._generations(waiting)
        for root in self._found.images.values():
            missing = sorted(set(root.snapshots.values()) - set(root.generations))
            where = root.path or root.image_id.hex()
            if root.visible and not root.generations:
                self._problem(
                    "image", where, f"{where}: has no generation in the store; restore images/{root.image_id.hex()}/, or remove it"
                )
            elif missing:
                self._problem("image", where, f"{where}: generations {missing}, which snapshots name, are gone", blocking=False)

    def _choose(self, image_id: bytes, infos: Sequence[ObjectInfo]) -> ImageRoots:
        cutoff_s = self._found.cutoff_s
        root = self._root(image_id)
        root.generations = [counter_of(info.name) or 0 for info in infos]
        root.newest_s = infos[0].modified_s
        stays = root.named or root.pinned or root.leased or infos[0].modified_s > cutoff_s
        for number, info in enumerate(infos):
            counter = root.generations[number]
            superseded_s = infos[number - 1].modified_s if number else float("inf")
            if stays and (counter in root.kept or max(info.modified_s, superseded_s) > cutoff_s):
                root.retained.append(counter)
            else:
                self._found.doomed.generations.append(info.name)
        return root

    async def _generations(self, wanted: Sequence[tuple[ImageRoots, int]]) -> None:
        async def read(item: tuple[ImageRoots, int]) -> Generation | None:
            root, counter = item
            try:
                return await generation_chain(self._client, root.image_id).read(counter)
            except (CorruptionError, ObjectNotFoundError) as error:
                where = root.path or f"image {root.image_id.hex()}"
                self._problem("generation", where, f"{where}: generation {counter} can not be read: {error}")
                return None

        async with aclosing(self._read_many(wanted, read)) as generations:
            async for number, generation in generations:
                if generation is not None:
                    await self._map(wanted[number][0], generation)
                self._done += 1
                self._progress("images", self._done)

    async def _map(self, root: ImageRoots, generation: Generation) -> None:
        newest = generation.counter == root.generations[0]
        if newest:
            root.size = generation.size
        try:
            state = generation.map_state(self._volume.chunk_size)
        except CorruptionError as error:
            where = root.path or f"image {root.image_id.hex()}"
            self._problem("generation", where, f"{where}: generation {generation.counter} can not be read: {error}")
            return
        weight = int(newest and root.visible) + list(root.snapshots.values()).count(generation.counter)
        await self._feed(state.levels, np.frombuffer(state.top, dtype=REFERENCE_DTYPE), None, weight)

    async def _feed(self, level: int, rows: Rows, weights: npt.NDArray[np.int64] | None, weight: int = 0) -> None:
        """Entries of a node above `level` (of a top, or a leaf where that is 0): chunks are counted, nodes are counted and wait."""
        used = rows["length"] > 0
        rows = rows[used]
        weights = np.full(len(rows), weight, dtype=np.int64) if weights is None else weights[used]
        if not len(rows):
            return
        if level:
            rows = self._found.forwards.resolve(rows)
            await self._found.packs.add(rows)
            self._queues[level - 1].add(rows, weights)
        else:
            self._chunks.append((rows, weights))
            self._waiting += len(rows)
            if self._waiting >= COUNT_ROWS:
                await self._count_chunks()

    async def _count_chunks(self) -> None:
        """Many at a time: what counting costs is looking at each pack that they name, more than the references themselves."""
        if self._chunks:
            waiting, self._chunks, self._waiting = self._chunks, [], 0
            await self._found.packs.add(np.concatenate([rows for rows, _ in waiting]), np.concatenate([weights for _, weights in waiting]))

    async def nodes(self) -> None:
        """All nodes of all maps, from the highest level down; each once. Then all references are counted."""
        for level in range(LEVELS_MAX - 1, -1, -1):
            for rows, weights in self._queues[level].drain():
                plains = await self._read_nodes(rows)
                good = [number for number, plain in enumerate(plains) if plain is not None]
                joined = b"".join(plain for plain in plains if plain is not None)
                entries = np.frombuffer(joined, dtype=REFERENCE_DTYPE)
                await self._feed(level, entries, np.repeat(weights[good], NODE_BYTES // REFERENCE_DTYPE.itemsize))
                self._found.nodes += len(rows)
                self._progress("nodes", self._found.nodes)
        await self._count_chunks()

    async def _read_nodes(self, rows: Rows) -> list[bytes | None]:
        references = [_reference(rows, number) for number in range(len(rows))]
        cache = self._volume.cache
        passing = [reference.chunk_id for reference in references if not cache.present(reference.chunk_id)]
        try:
            plains: list[bytes | None] = list(await cache.fetch(references))
        except (CorruptionError, ObjectNotFoundError):
            plains = [await self._read_node(reference) for reference in references]
        cache.l1.drop_many(passing)  # read once: all maps of a volume are not to fill L1, or to drive out what guests read
        for reference, plain in zip(references, plains, strict=True):
            if plain is not None and len(plain) != NODE_BYTES:
                self._bad_node(reference, f"{len(plain)} bytes, expected {NODE_BYTES}")
        return [plain if plain is not None and len(plain) == NODE_BYTES else None for plain in plains]

    async def _read_node(self, reference: Reference) -> bytes | None:
        try:
            return (await self._volume.cache.fetch([reference]))[0]
        except (CorruptionError, ObjectNotFoundError) as error:
            self._bad_node(reference, str(error))
            return None

    def _bad_node(self, reference: Reference, reason: str) -> None:
        self._found.bad_nodes[reference.chunk_id] = reason
        self._problem("node", reference.chunk_id.hex(), f"map node {reference.chunk_id.hex()} can not be read: {reason}")

    # -- the rest -----------------------------------------------------------------------------------------------

    async def notes(self) -> None:
        """Requests for leases, and probes, that nobody came back for."""
        doomed = self._found.doomed.notes
        for prefix in (WANTS_PREFIX, HANDOFFS_PREFIX):
            doomed += [info.name for info in await self._client.list(prefix) if info.modified_s <= self._found.cutoff_s]
        limit_s = self._found.started_s - min(self._found.grace_s, PROBE_AGE_S) - CLOCK_SLACK_S
        doomed += [info.name for info in await self._client.list(PROBE_PREFIX) if info.modified_s <= limit_s]


def _group_id(name: str) -> bytes | None:
    parts = name.split("/")
    try:
        return bytes.fromhex(parts[1]) if len(parts) == 3 and len(parts[1]) == 32 else None
    except ValueError:
        return None


def _released(record: LeaseRecord) -> bool:
    return record.released


def _reference(rows: Rows, number: int) -> Reference:
    return Reference.unpack(rows[number : number + 1].tobytes())
