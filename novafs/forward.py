"""Forwards: where the frames of a compacted pack are now; the chains `forward/<pack id>/<rev>`.

Maps name packs, and are never rewritten for a compaction. So the collector that moves a pack's live frames leaves a
forward, and only then may the pack be condemned. A reader that meets "no such pack" asks here (`Forwards.relocate`),
a commit puts right the map nodes that it writes anyway (`Forwards.put_right`), and the collector resolves references
before it counts them (`ForwardTable`). The newest record of a chain alone counts; it names final places, because it is
written anew when those move, and it lives while any retained map or any other forward names its pack. In between, and
after a crash of the collector, a place may itself be forwarded: everybody follows up to HOPS_MAX of them.

Always holds: a forward is created after the packs that it names, and those hold the same content: the same frames, byte
for byte, or a whole one for a delta (`novafs.delta`). No forward leads to a delta frame.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Container, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any, Final

import msgspec
import numpy as np
import numpy.typing as npt

from novafs.asynctools import for_each
from novafs.chunk import PACK_ID_SIZE, REFERENCE_DTYPE, REFERENCE_SIZE, PackId, Reference
from novafs.errors import ObjectCorruptError, ObjectNotFoundError
from novafs.generation import HOST
from novafs.objectstore.base import ObjectInfo
from novafs.objectstore.client import StoreClient
from novafs.record import seal, unseal
from novafs.revisions import GRACE_S_DEFAULT, Chain, Head, boot_time_s, counter_of, new_nonce, writers_grace_s

KIND: Final = b"FRWD"
VERSION: Final = 1
PREFIX: Final = "forward/"
HOPS_MAX: Final = 8
NEGATIVE_S: Final = 5.0
"""How long "this pack has no forward" is remembered by a reader."""
POSITIVE_S_MAX: Final = 60.0
ROWS_MAX: Final = 50_000
"""Rows that a reader remembers, about 250 bytes each."""
LOADS_AT_ONCE: Final = 16

Rows = npt.NDArray[np.void]
"""An array of REFERENCE_DTYPE."""


class ForwardRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One revision. pack_id: the pack that was compacted; references: of its frames where they are now, 64 bytes each."""

    pack_id: bytes
    counter: int
    nonce: bytes
    predecessor: bytes = b""
    host: str = HOST
    references: bytes = b""


def forward_prefix(pack_id: bytes) -> str:
    """Where the forwards of a pack lie."""
    return f"{PREFIX}{pack_id.hex()}/"


def forwarded_pack(name: str) -> PackId | None:
    """The pack in a forward's name, None where the name is none of a forward."""
    parts = name.split("/")
    try:
        pack_id = bytes.fromhex(parts[1]) if len(parts) == 3 and parts[0] + "/" == PREFIX else b""
    except ValueError:
        return None
    return PackId(pack_id) if len(pack_id) == PACK_ID_SIZE else None


def forward_chain(client: StoreClient, pack_id: bytes, *, grace_s: float = GRACE_S_DEFAULT) -> Chain[ForwardRecord]:
    """The chain of a pack's forwards."""

    def decode(data: bytes, name: str) -> ForwardRecord:
        found = unseal(KIND, VERSION, data, ForwardRecord, name)
        if found.pack_id != pack_id or len(found.references) % REFERENCE_SIZE:
            raise ObjectCorruptError(f"{name}: is no forward of pack {pack_id.hex()}; run 'novafs fsck'")
        return found

    return Chain(client, forward_prefix(pack_id), encode=lambda r: seal(KIND, VERSION, r), decode=decode, grace_s=writers_grace_s(grace_s))


async def write_forward(
    client: StoreClient, pack_id: bytes, base: Head[ForwardRecord] | None, rows: Rows, *, grace_s: float = GRACE_S_DEFAULT
) -> Head[ForwardRecord]:
    """Commit the next forward of a pack. Raises ConflictError where another collector was first."""
    record = ForwardRecord(
        pack_id=pack_id,
        counter=base.record.counter + 1 if base is not None else 0,
        nonce=new_nonce(),
        predecessor=base.record.nonce if base is not None else b"",
        references=rows.tobytes(),
    )
    return await forward_chain(client, pack_id, grace_s=grace_s).commit(base, record)


# --- for readers and writers ------------------------------------------------------------------------------------


class Forwards:
    """Follows forwards, and remembers some. On the trio thread alone."""

    def __init__(self, client: StoreClient, *, grace_s: float = GRACE_S_DEFAULT) -> None:
        self._client = client
        # Well below the grace: the forwards that an old answer leads on to may be collected after it.
        self._positive_s = min(POSITIVE_S_MAX, writers_grace_s(grace_s) / 4)
        # pack id -> (boot time before the look, chunk id -> place; None: no forward); oldest first
        self._known: OrderedDict[bytes, tuple[float, dict[bytes, Reference] | None]] = OrderedDict()
        self._rows = 0
        self._moved: AbstractSet[bytes] = frozenset()
        self._moved_sorted: npt.NDArray[np.bytes_] = np.empty(0, dtype="S16")
        self.lookups = 0

    async def relocate(self, references: Sequence[Reference], gone: AbstractSet[bytes]) -> dict[bytes, Reference]:
        """Where chunks are now: chunk id -> place, in none of the packs `gone`; nothing for those of which nobody knows.

        Raises ObjectCorruptError, StoreUnavailableError.
        """
        found: dict[bytes, Reference] = {}
        for fresh in (False, True):  # what is remembered may lead to a pack that was moved in turn
            for reference in references:
                if reference.chunk_id not in found:
                    place = await self._follow(reference, gone, fresh=fresh)
                    if place is not None:
                        found[reference.chunk_id] = place
            if len(found) == len({r.chunk_id for r in references}):
                break
        return found

    async def _follow(self, reference: Reference, gone: Container[bytes], *, fresh: bool) -> Reference | None:
        place = reference
        for _ in range(HOPS_MAX):
            table = await self._load(place.pack_id, fresh=fresh)
            target = table.get(reference.chunk_id) if table is not None else None
            if target is None or target == place:
                return None
            if target.pack_id not in gone:
                return target
            place = target
        return None

    async def _load(self, pack_id: PackId, *, fresh: bool) -> dict[bytes, Reference] | None:
        known = self._known.get(pack_id)
        if known is not None:
            limit_s = 1.0 if fresh else (NEGATIVE_S if known[1] is None else self._positive_s)
            if boot_time_s() - known[0] <= min(limit_s, self._positive_s):
                return known[1]
        self.lookups += 1
        read_s = boot_time_s()
        head = await forward_chain(self._client, pack_id).head()
        table = None
        if head is not None:
            raw = head.record.references
            rows = [Reference.unpack(raw, at) for at in range(0, len(raw), REFERENCE_SIZE)]
            table = dict(zip((bytes(row.chunk_id) for row in rows), rows, strict=True))
        self._remember(pack_id, read_s, table)
        return table

    def _remember(self, pack_id: PackId, read_s: float, table: dict[bytes, Reference] | None) -> None:
        old = self._known.pop(pack_id, None)
        self._rows += (len(table) if table else 1) - (0 if old is None else len(old[1] or ()) or 1)
        self._known[pack_id] = (read_s, table)
        while self._rows > ROWS_MAX and len(self._known) > 1:
            _, (_, dropped) = self._known.popitem(last=False)
            self._rows -= len(dropped or ()) or 1

    async def put_right(self, node: bytes, moved: AbstractSet[bytes]) -> tuple[bytes, set[bytes]]:
        """A map node, or the top of a map, with the references into packs that were `moved` replaced by the places where the
        chunks are now; and the packs of those."""
        if not moved or not node:
            return node, set()
        if moved is not self._moved:  # for as long as the list of them stays the same: a commit asks of every node it writes
            self._moved, self._moved_sorted = moved, np.array(sorted(moved), dtype="S16")
        wanted = np.flatnonzero(among(pack_ids(np.frombuffer(node, dtype=REFERENCE_DTYPE)), self._moved_sorted))
        if not len(wanted):
            return node, set()
        edited = bytearray(node)
        named: set[bytes] = set()
        for number in wanted:
            at = int(number) * REFERENCE_SIZE
            place = await self._follow(Reference.unpack(node, at), moved, fresh=False)
            if place is not None:
                edited[at : at + REFERENCE_SIZE] = place.pack()
                named.add(place.pack_id)
        return bytes(edited), named


# --- for the collector ------------------------------------------------------------------------------------------


def pack_ids(rows: Rows) -> npt.NDArray[np.bytes_]:
    """The pack of each reference, as something that numpy sorts and compares (it leaves out trailing zeros: pad with `ljust`)."""
    return np.ascontiguousarray(rows["pack"]).view("S16").ravel()


def chunk_ids(rows: Rows) -> npt.NDArray[np.bytes_]:
    """The chunk id of each reference, likewise."""
    return np.ascontiguousarray(rows["id"]).view("S32").ravel()


def among(names: npt.NDArray[np.bytes_], wanted: npt.NDArray[np.bytes_]) -> npt.NDArray[np.bool_]:
    """Which of the names are among the `wanted` ones, which are sorted; `np.isin` would sort those each time."""
    if not len(wanted):
        return np.zeros(len(names), dtype=bool)
    found: npt.NDArray[np.bool_] = wanted[np.minimum(np.searchsorted(wanted, names), len(wanted) - 1)] == names
    return found


class _Table:
    """The rows of one forward, sorted by chunk id."""

    __slots__ = ("ids", "rows")

    def __init__(self, rows: Rows) -> None:
        ids = chunk_ids(rows)
        order = np.argsort(ids, kind="stable")
        self.ids = ids[order]
        self.rows = rows[order]

    def find(self, ids: npt.NDArray[np.bytes_]) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.intp]]:
        """Which of the ids are here, and where."""
        at = np.minimum(np.searchsorted(self.ids, ids), max(0, len(self.ids) - 1))
        return (self.ids[at] == ids if len(self.ids) else np.zeros(len(ids), dtype=bool)), at


class ForwardTable:
    """All forwards of a volume at one moment, chains collapsed. Rows whose place does not exist do not count."""

    def __init__(self) -> None:
        self.heads: dict[bytes, Head[ForwardRecord]] = {}
        self.objects: dict[bytes, list[ObjectInfo]] = {}
        """All revisions of each pack's forward, newest first."""
        self.stale: set[bytes] = set()
        """Packs whose newest record does not name final places, or names one that does not exist."""
        self.dangling: dict[bytes, int] = {}
        """Pack id -> rows of its newest record that lead nowhere."""
        self.targets: dict[bytes, set[bytes]] = {}
        """Pack id -> packs that its records name, superseded ones included: a reader may just have read one of those."""
        self.named: set[bytes] = set()
        """Packs that a reference named when `resolve` saw it."""
        self.problems: list[tuple[str, str]] = []
        """Objects that can not be read, and why."""
        self._tables: dict[bytes, _Table] = {}
        self._packs: npt.NDArray[np.bytes_] = np.empty(0, dtype="S16")

    @classmethod
    async def load(cls, client: StoreClient) -> ForwardTable:
        """All newest forwards, as stored; `collapse` comes next. Raises what the store raises."""
        table = cls()
        for info in await client.list(PREFIX):
            found = forwarded_pack(info.name)
            if found is not None and counter_of(info.name) is not None:
                table.objects.setdefault(found, []).append(info)

        async def read(wanted: tuple[bytes, ObjectInfo]) -> None:
            pack_id, info = wanted
            read_s = boot_time_s()
            try:
                record = await forward_chain(client, pack_id).read(counter_of(info.name) or 0)
            except ObjectNotFoundError:
                return  # a superseded one that another collector has deleted
            except ObjectCorruptError as error:
                table.problems.append((info.name, str(error)))
                return
            rows = np.frombuffer(record.references, dtype=REFERENCE_DTYPE)
            table.targets.setdefault(pack_id, set()).update(bytes(p).ljust(PACK_ID_SIZE, b"\0") for p in np.unique(pack_ids(rows)))
            if info is table.objects[pack_id][0]:
                table.heads[pack_id] = Head(record, read_s)

        await for_each(((pack_id, info) for pack_id, infos in table.objects.items() for info in infos), read, at_once=LOADS_AT_ONCE)
        return table

    def collapse(self, existing: Container[bytes]) -> None:
        """Name final places. `existing`: packs, listed after `load` had returned, so that what a forward names is among them."""
        for pack_id, head in self.heads.items():
            rows = np.frombuffer(head.record.references, dtype=REFERENCE_DTYPE)
            self._tables[pack_id] = _Table(rows)
        final: dict[bytes, _Table] = {}
        for pack_id, table in self._tables.items():
            rows = table.rows.copy()
            for _ in range(HOPS_MAX):
                if not self._step(rows):
                    break
            packs = pack_ids(rows)
            known = {bytes(p): bytes(p).ljust(PACK_ID_SIZE, b"\0") in existing for p in np.unique(packs)}
            good = np.array([known[bytes(p)] for p in packs], dtype=bool)
            if not good.all():
                self.dangling[pack_id] = int(len(good) - np.count_nonzero(good))
            if not good.all() or rows.tobytes() != table.rows.tobytes():
                self.stale.add(pack_id)
            final[pack_id] = _Table(rows[good])
        self._tables = final
        self._index()

    def _step(self, rows: Rows) -> bool:
        """Follow one hop, in place; whether any row moved."""
        packs, moved = pack_ids(rows), False
        for name in np.unique(packs):
            table = self._tables.get(bytes(name).ljust(PACK_ID_SIZE, b"\0"))
            if table is None:
                continue
            where = np.flatnonzero(packs == name)
            hits, at = table.find(chunk_ids(rows[where]))
            if hits.any():
                rows[where[hits]] = table.rows[at[hits]]
                moved = True
        return moved

    def _index(self) -> None:
        self._packs = np.array(sorted(self._tables), dtype="S16")

    def __len__(self) -> int:
        return len(self._tables)

    def resolve(self, rows: Rows) -> Rows:
        """The references at their final places; notes in `named` which forwarded packs they name."""
        if not len(self._packs) or not len(rows):
            return rows
        packs = pack_ids(rows)
        mine = np.flatnonzero(among(packs, self._packs))
        if not len(mine):
            return rows
        resolved = rows.copy()
        for name in np.unique(packs[mine]):
            pack_id = bytes(name).ljust(PACK_ID_SIZE, b"\0")
            self.named.add(pack_id)
            where = mine[packs[mine] == name]
            table = self._tables[pack_id]
            hits, at = table.find(chunk_ids(rows[where]))
            resolved[where[hits]] = table.rows[at[hits]]
        return resolved

    def rows_of(self, pack_id: bytes) -> Rows:
        """The rows that count of a pack's forward, at their final places; none where it has no forward."""
        table = self._tables.get(pack_id)
        return table.rows if table is not None else np.empty(0, dtype=REFERENCE_DTYPE)

    def extend(self, moved: Mapping[bytes, Rows]) -> None:
        """Count with these rows from here on: forwards that were just written, the pack's older rows among them."""
        for pack_id, rows in moved.items():
            self._tables[pack_id] = _Table(rows)
        for pack_id, table in list(self._tables.items()):
            rows = table.rows.copy()
            if self._step(rows):
                self._tables[pack_id] = _Table(rows)
                self.stale.add(pack_id)
        self._index()


def rows_from(references: Iterable[Reference]) -> Rows:
    """References as an array."""
    raw = b"".join(reference.pack() for reference in references)
    found: npt.NDArray[Any] = np.frombuffer(raw, dtype=REFERENCE_DTYPE)
    return found
