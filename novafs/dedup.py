"""Where a chunk is stored already: a bounded local index, and the check that its answer is still true.

The index is an SQLite file in the state directory, 32 bytes of id and 29 of place a chunk (about 71 on disk). It is
filled from own uploads and, lazily, from pack footers. It may be lost, stale or damaged at any time: a damaged file
is replaced by an empty one, and each row carries a checksum.

Promised (design 5.8): a hit makes a reference only after the pack's footer was read in this process, within
`VERIFIED_S` (less with a short grace), and lists exactly this frame, and only where the newest list of what is
condemned or damaged (`novafs.condemned`) does not forbid it. A stale row is dropped and the chunk is stored again.
"""

from __future__ import annotations

import contextlib
import logging
import sqlite3
import struct
import threading
from collections import OrderedDict
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Final

import trio
import xxhash

from novafs import pack
from novafs.asynctools import open_nursery
from novafs.chunk import ChunkId, PackId, Reference
from novafs.codec import Codec
from novafs.condemned import CondemnedView
from novafs.errors import CorruptionError, ObjectNotFoundError
from novafs.forward import Forwards
from novafs.objectstore.client import StoreClient
from novafs.revisions import GRACE_S_DEFAULT, boot_time_s, writers_grace_s

log = logging.getLogger(__name__)

CHUNKS_MAX: Final = 16_000_000
VERIFIED_S: Final = 3600.0
FILL_LISTED_MAX: Final = 100_000
"""Packs that one `fill` lists: a hundred requests, and about what an index has room for."""
FILL_LISTED_OFTEN: Final = 2000
FILL_PAUSE: Final = 20
VERIFIED_PACKS_MAX: Final = 512
VERIFIED_ROWS_MAX: Final = 1 << 18
"""Of all footers that are remembered, 270 bytes each."""
FOOTERS_IN_FLIGHT: Final = 16

_PLACE: Final = struct.Struct("<16sIIB")
_CHECK: Final = struct.Struct("<I")
_ROW_BYTES: Final = 61
"""Of a row, at least: id and place, without what SQLite adds."""
_QUERY_MAX: Final = 500
"""Ids in one query: well below SQLite's limit on bound parameters."""


def _seal(chunk_id: bytes, place: bytes) -> bytes:
    return place + _CHECK.pack(xxhash.xxh32_intdigest(chunk_id + place))


def _whole(references: Iterable[Reference]) -> list[Reference]:
    """Without delta frames: a dead one does not keep what it needs (`novafs.delta`), so a hit could bring back what can not be read."""
    return [reference for reference in references if reference.codec != Codec.HDE]


def _count(connection: sqlite3.Connection) -> int:
    return int(connection.execute("SELECT count(*) FROM chunk").fetchone()[0])


class DedupIndex:
    """The SQLite file. Blocking and thread-safe; safe beside other processes with the same state directory."""

    def __init__(self, path: Path, *, chunks_max: int = CHUNKS_MAX) -> None:
        self._path = path
        self._chunks_max = chunks_max
        self._lock = threading.Lock()
        # At least as many rows as there are: counting them reads the whole file, which may be a gigabyte.
        self._rows_max = 0
        self._counted = False
        self._evict_at = 0
        self._connection = self._open()

    def _open(self, *, whole: bool = False) -> sqlite3.Connection:
        """The index; an empty one in its place where it is damaged, one in memory where the disk is full or it is locked."""
        try:
            try:
                return self._connect(self._path, whole=whole)
            except sqlite3.OperationalError:
                raise
            except sqlite3.DatabaseError as error:
                log.warning("dedup index %s is damaged (%s): starting an empty one; it fills again by itself", self._path, error)
                for suffix in ("", "-wal", "-shm"):
                    Path(f"{self._path}{suffix}").unlink(missing_ok=True)
                return self._connect(self._path)
        except (sqlite3.Error, OSError) as error:
            log.warning("dedup index %s can not be used (%s): one in memory serves until the next start", self._path, error)
            return self._connect(":memory:")

    def _connect(self, path: Path | str, *, whole: bool = False) -> sqlite3.Connection:
        """whole: read all of it, to see whether it can be."""
        connection = sqlite3.connect(path, timeout=30, check_same_thread=False, isolation_level=None)
        try:
            # The index can be rebuilt, so it never waits for the disk.
            connection.execute("PRAGMA synchronous = OFF")
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("CREATE TABLE IF NOT EXISTS chunk (id BLOB PRIMARY KEY, place BLOB NOT NULL) WITHOUT ROWID")
            connection.execute("CREATE TABLE IF NOT EXISTS pack (id BLOB PRIMARY KEY) WITHOUT ROWID")
            self._counted = whole
            if whole:
                self._rows_max = _count(connection)
            else:
                (pages,), (page_bytes,) = (connection.execute(f"PRAGMA page_{what}").fetchone() for what in ("count", "size"))
                self._rows_max = pages * page_bytes // _ROW_BYTES
        except BaseException:
            connection.close()
            raise
        return connection

    @contextlib.contextmanager
    def _guard(self) -> Iterator[None]:
        with self._lock:
            try:
                yield
            except sqlite3.OperationalError as error:
                # Full disk or locked for long: the index is an optimisation, so go on without.
                log.warning("dedup index %s: %s", self._path, error)
            except sqlite3.DatabaseError:
                self._connection.close()
                self._connection = self._open(whole=True)

    def lookup(self, chunk_ids: Sequence[bytes]) -> dict[bytes, Reference]:
        """Where those that are known were stored last."""
        found: dict[bytes, Reference] = {}
        with self._guard():
            for start in range(0, len(chunk_ids), _QUERY_MAX):
                part = chunk_ids[start : start + _QUERY_MAX]
                marks = ",".join("?" * len(part))
                query = f"SELECT id, place FROM chunk WHERE id IN ({marks})"  # noqa: S608  # only question marks
                for chunk_id, sealed in self._connection.execute(query, part):
                    place = bytes(sealed[: _PLACE.size])
                    if _seal(chunk_id, place) == sealed:
                        pack_id, offset, length, codec = _PLACE.unpack(place)
                        found[chunk_id] = Reference(ChunkId(chunk_id), PackId(pack_id), offset, length, codec)
        return found

    def record(self, references: Iterable[Reference], packs: Iterable[bytes] = ()) -> None:
        """Note where chunks are, and packs whose footer is known."""
        rows = [(r.chunk_id, _seal(r.chunk_id, _PLACE.pack(r.pack_id, r.offset, r.length, r.codec))) for r in references]
        with self._guard():
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                self._connection.executemany("INSERT OR REPLACE INTO chunk VALUES (?, ?)", rows)
                self._connection.executemany("INSERT OR IGNORE INTO pack VALUES (?)", [(p,) for p in packs])
            finally:
                self._connection.execute("COMMIT")
            self._rows_max += len(rows)
            if not self._fits():
                while self._rows_max > self._room:
                    self._evict()

    @property
    def _room(self) -> int:
        """A sixteenth less than may be in it, so that there is some when it was full."""
        return self._chunks_max - self._chunks_max // 16

    def _fits(self) -> bool:
        """Whether no row has to leave. Counts where that is not certain."""
        if self._rows_max > self._chunks_max:
            self._count()
        return self._rows_max <= self._chunks_max

    def _count(self) -> None:
        self._rows_max, self._counted = _count(self._connection), True

    def has_room(self) -> bool:
        """Whether more can be noted, of what others have stored, without another row's leaving for it."""
        room = False
        with self._guard():
            if self._rows_max > self._room and not self._counted:
                self._count()
            room = self._fits() and self._rows_max <= self._room
        return room  # noqa: RET504  # `_guard` passes over what goes wrong

    def _evict(self) -> None:
        # Ids are uniform, so a sixteenth of the key space is a sixteenth of the rows; the next time takes the next one.
        low, high = bytes([self._evict_at]), bytes([self._evict_at + 15]) + b"\xff" * 32
        self._connection.execute("DELETE FROM chunk WHERE id >= ? AND id <= ?", (low, high))
        self._connection.execute("DELETE FROM pack")
        self._evict_at = (self._evict_at + 16) % 256
        self._count()

    def forget(self, chunk_ids: Iterable[bytes], pack_id: bytes | None = None) -> None:
        """Drop rows that turned out stale, and the note that a pack's footer is known."""
        with self._guard():
            self._connection.executemany("DELETE FROM chunk WHERE id = ?", [(i,) for i in chunk_ids])
            if pack_id is not None:
                self._connection.execute("DELETE FROM pack WHERE id = ?", (pack_id,))

    def unknown_packs(self, pack_ids: Sequence[PackId]) -> list[PackId]:
        """Those whose footer has not been read into the index."""
        known: set[bytes] = set()
        with self._guard():
            known = {row[0] for row in self._connection.execute("SELECT id FROM pack")}
        return [p for p in pack_ids if p not in known]

    def __len__(self) -> int:
        found = 0
        with self._guard():
            found = _count(self._connection)
        return found  # noqa: RET504  # `_guard` passes over what goes wrong

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._connection.close()


class Deduplicator:
    """The async side: finds stored chunks, and checks each answer against the pack's footer before it counts."""

    def __init__(self, index: DedupIndex, client: StoreClient, *, enabled: bool = True, grace_s: float = GRACE_S_DEFAULT) -> None:
        """grace_s: `gc.grace`, of which every limit here is a part."""
        self.index = index
        self.guard_s = writers_grace_s(grace_s) / 2
        """A commit that takes longer than this looks at the packs it refers to again (`lost`)."""
        self.condemned = CondemnedView(client, grace_s=writers_grace_s(grace_s))
        self.forwards = Forwards(client, grace_s=grace_s)
        self._verified_s = min(VERIFIED_S, writers_grace_s(grace_s) / 4)
        self.enabled = enabled
        """False: nothing is ever found, so every chunk is stored anew; own uploads are noted all the same."""
        self._client = client
        self._limiter = trio.CapacityLimiter(2)
        # pack id -> (boot time of the check, rows of its footer); most recently used last
        self._verified: OrderedDict[bytes, tuple[float, dict[bytes, Reference]]] = OrderedDict()
        self._verified_rows = 0
        self._filled_to = ""
        """The name after which `fill` goes on."""
        self._fill_again_s = 0.0
        """Boot time before which it does not look again."""

    async def find(self, chunk_ids: Sequence[bytes]) -> dict[bytes, Reference]:
        """References, each checked, for those of the chunks that are stored and may be referred to."""
        if not chunk_ids:
            return {}
        # The list first: a pack that is condemned after this look is deleted a whole grace after it.
        await self.condemned.refresh()
        if not self.enabled:
            return {}
        candidates = await trio.to_thread.run_sync(self.index.lookup, chunk_ids, limiter=self._limiter)
        return await self.check({c: r for c, r in candidates.items() if not self.condemned.forbids(r)})

    async def lost(self, pack_ids: Collection[bytes]) -> list[PackId]:
        """Those of the packs that are gone or condemned, by a look that begins now; they are never hit again."""
        await self.condemned.refresh(0)
        # A list that can not be read forbids hits (`CondemnedView`), but tells nothing of those that were made before.
        condemned = self.condemned.current.packs
        lost = [PackId(p) for p in pack_ids if p in condemned]
        slots = trio.CapacityLimiter(FOOTERS_IN_FLIGHT)

        async def look(pack_id: PackId) -> None:
            async with slots:
                try:
                    await self._client.head(pack.pack_name(pack_id))
                except ObjectNotFoundError:
                    lost.append(pack_id)

        async with open_nursery() as nursery:
            for pack_id in pack_ids:
                if pack_id not in condemned:
                    nursery.start_soon(look, PackId(pack_id))
        for pack_id in lost:
            self._forget_verified(pack_id)
        return lost

    async def put_right(self, node: bytes) -> tuple[bytes, set[bytes]]:
        """A map node that is about to be stored, with what compactions have moved at its new places; and the packs of those."""
        await self.condemned.refresh()
        return await self.forwards.put_right(node, self.condemned.current.moved)

    async def check(self, candidates: dict[bytes, Reference]) -> dict[bytes, Reference]:
        """Those whose pack exists and lists them so; the others are dropped from the index."""
        by_pack: dict[PackId, list[bytes]] = {}
        for chunk_id, reference in candidates.items():
            by_pack.setdefault(reference.pack_id, []).append(chunk_id)
        rows_of = await self._footers(list(by_pack))
        good: dict[bytes, Reference] = {}
        for pack_id, chunk_ids in by_pack.items():
            rows = rows_of[pack_id]  # whole frames: a delta is never hit (`_whole`)
            stale = [c for c in chunk_ids if rows.get(c) != candidates[c]]
            good.update((c, candidates[c]) for c in chunk_ids if rows.get(c) == candidates[c])
            if stale:
                await trio.to_thread.run_sync(self.index.forget, stale, pack_id, limiter=self._limiter)
        return good

    async def _footers(self, pack_ids: list[PackId]) -> dict[PackId, dict[bytes, Reference]]:
        """Rows of each pack's footer, no older than `_verified_s`; none for a pack that is gone or damaged."""
        found: dict[PackId, dict[bytes, Reference]] = {}
        missing: list[PackId] = []
        for pack_id in pack_ids:
            known = self._verified.get(pack_id)
            if known is not None and boot_time_s() - known[0] < self._verified_s:
                self._verified.move_to_end(pack_id)
                found[pack_id] = known[1]
            else:
                missing.append(pack_id)
        if missing:
            slots = trio.CapacityLimiter(FOOTERS_IN_FLIGHT)

            async def read(pack_id: PackId) -> None:
                async with slots:
                    found[pack_id] = await self._read_footer(pack_id)

            async with open_nursery() as nursery:
                for pack_id in missing:
                    nursery.start_soon(read, pack_id)
        return found

    async def _read_footer(self, pack_id: PackId) -> dict[bytes, Reference]:
        started_s = boot_time_s()
        name = pack.pack_name(pack_id)
        try:
            info = await self._client.head(name)
            rows = await pack.read_footer(pack_id, info.size, self._client.get)
        except ObjectNotFoundError:
            return {}
        except CorruptionError as error:
            log.error("%s", error)
            return {}
        references: dict[bytes, Reference] = {r.chunk_id: r for r in _whole(row.reference for row in rows)}
        self.note_verified(pack_id, list(references.values()), started_s)
        return references

    def note_verified(self, pack_id: PackId, references: Iterable[Reference], at_s: float) -> None:
        """The pack is known to hold these frames since boot time `at_s`: read from its footer, or uploaded by us."""
        self._forget_verified(pack_id)
        rows: dict[bytes, Reference] = {r.chunk_id: r for r in _whole(references)}
        self._verified[pack_id] = (at_s, rows)
        self._verified_rows += len(rows)
        while len(self._verified) > 1 and (len(self._verified) > VERIFIED_PACKS_MAX or self._verified_rows > VERIFIED_ROWS_MAX):
            self._forget_verified(next(iter(self._verified)))

    def _forget_verified(self, pack_id: bytes) -> None:
        _, rows = self._verified.pop(pack_id, (0.0, {}))
        self._verified_rows -= len(rows)

    async def note_uploaded(self, pack_id: PackId, references: list[Reference], at_s: float) -> None:
        """An own pack is stored: later writes may refer to its chunks."""
        references = _whole(references)
        self.note_verified(pack_id, references, at_s)
        await trio.to_thread.run_sync(self.index.record, references, [pack_id], limiter=self._limiter)

    async def fill(self, *, packs_max: int = 10_000, listed_max: int = FILL_LISTED_MAX) -> int:
        """Read footers of packs that the index does not know, at most `packs_max` of them; how many were read.

        An import calls it first, so that it finds what other hosts stored; a lost index comes back by it. It costs a listing of at most
        `listed_max` packs and one or two range requests for each new one, whatever the volume holds: the next call goes on where this
        one ended. Nothing is listed while the index is full, nor, where it takes more than a request or two, again before 20 times as
        long has passed as it took.
        """
        if boot_time_s() < self._fill_again_s or not await trio.to_thread.run_sync(self.index.has_room, limiter=self._limiter):
            return 0
        began_s = boot_time_s()
        infos = await self._client.list(pack.PREFIX, after=self._filled_to, limit=listed_max)
        at_end = len(infos) < listed_max
        if at_end and self._filled_to:
            infos += await self._client.list(pack.PREFIX, limit=listed_max - len(infos))
            at_end = len(infos) < listed_max
        now_s = boot_time_s()
        self._fill_again_s = now_s + FILL_PAUSE * (now_s - began_s) if len(infos) > FILL_LISTED_OFTEN else 0.0
        names = {pack_id: info.name for info in infos if (pack_id := pack.pack_id_of(info.name)) is not None}
        unknown = await trio.to_thread.run_sync(self.index.unknown_packs, list(names), limiter=self._limiter)
        if len(unknown) > packs_max:
            unknown = unknown[:packs_max]
            self._filled_to = names[unknown[-1]]
            self._fill_again_s = 0.0
        else:
            self._filled_to = "" if at_end else infos[-1].name
        for start in range(0, len(unknown), FOOTERS_IN_FLIGHT):
            part = unknown[start : start + FOOTERS_IN_FLIGHT]
            rows = await self._footers(part)
            references = [r for p in part for r in rows[p].values()]
            await trio.to_thread.run_sync(
                self.index.record, references, [p for p in part if rows[p] or p in self._verified], limiter=self._limiter
            )
        return len(unknown)
