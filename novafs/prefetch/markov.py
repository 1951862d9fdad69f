"""Transitions of order 1 and 2 between chunk contents, counted: `P(next | current) = count(current → next) / count(current)`.

Keyed by content (`base.key_of`), so what one image's accesses taught serves every image that shares the chunks. Each state
keeps its most counted successors; a newcomer has to wear the weakest one down first (as in J. Misra, D. Gries, "Finding
repeated elements", 1982), so noise does not push out what is known. With each successor goes the index at which it was seen
last: where to look for it in the image at hand. Order 2 is keyed by a mix of the two keys. After D. Joseph, D. Grunwald,
"Prefetching using Markov predictors", ISCA 1997.

Always holds: at most `states_max` states of each order. The oldest state leaves when a new one needs its place, unless it was
counted often: then its counts are halved and it stays another round. A state counted `TOTAL_MAX` times is halved, too. So what was true
once but is no longer fades.

A table can be merged into another (hosts learn separately) and written as bytes: a sealed record (`novafs.record`) of kind
`MARK`, numpy columns inside, no code in it. Whatever is wrong with such bytes, `from_bytes` raises and the table at hand stays as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import msgspec
import numpy as np
import numpy.typing as npt

from novafs.errors import ObjectCorruptError
from novafs.prefetch.base import INDEX_BITS, INDEX_MASK, Access, Candidate, Key, magnitude
from novafs.prefetch.blob import seal_model, unseal_model

KIND: Final = b"MARK"
VERSION: Final = 1
STATES_MAX: Final = 1 << 16
SUCCESSORS_1: Final = 6
SUCCESSORS_2: Final = 4
NAMED_MAX: Final = 4
"""Successors of order 1 that become candidates."""
TOTAL_MAX: Final = 512
"""A state that was counted so often is halved: what it leads to now outweighs what it led to then within as many accesses."""
BYTES_MAX: Final = 9 << 19
"""Of a saved table, 4.5 MiB: the states that were counted most stay, the newest of those counted alike."""
_ROUNDS: Final = 8
"""States looked at to find one that may leave; then the last of them leaves whatever its count."""
_KEY_MASK: Final = (1 << 64) - 1
_ROWS_MAX: Final = 4 * STATES_MAX

State = list[int]
"""The total; then successor, count, index, successor, …, most counted first. Flat, since lists of lists took thrice the memory."""


class MarkovRecord(msgspec.Struct, array_like=True):
    """What a sealed table holds. Columns are little-endian numpy arrays as bytes, order 1 and order 2."""

    chunk_size: int
    orders: list[tuple[bytes, bytes, bytes, bytes, bytes, bytes]]


def pair_key(before: Key, current: Key) -> Key:
    """The key of an order-2 state."""
    return ((before * 0x9E3779B97F4A7C15) ^ current) & _KEY_MASK


class TransitionTable:
    """The counts of all images of a volume."""

    __slots__ = ("_one", "_states_max", "_two", "chunk_size", "frozen")

    def __init__(self, chunk_size: int = 65536, *, states_max: int = STATES_MAX) -> None:
        self.chunk_size = chunk_size
        self._states_max = states_max
        self._one: dict[Key, State] = {}
        self._two: dict[Key, State] = {}
        self.frozen = False
        """Whether what is observed is not counted."""

    def __len__(self) -> int:
        return len(self._one) + len(self._two)

    def contents(self) -> set[Key]:
        """All content that something is known to follow."""
        return set(self._one)

    def clear(self) -> None:
        """Forget everything."""
        self._one.clear()
        self._two.clear()

    def learn(self, before: Key | None, current: Key, following: Key, index: int) -> None:
        """Count `current → following`, and `before, current → following` where `before` is known."""
        if self.frozen:
            return
        self._count(self._one, current, following, index, SUCCESSORS_1)
        if before is not None:
            self._count(self._two, ((before * 0x9E3779B97F4A7C15) ^ current) & _KEY_MASK, following, index, SUCCESSORS_2)

    def _count(self, states: dict[Key, State], key: Key, following: Key, index: int, width: int) -> None:
        state = states.get(key)
        if state is None:
            if len(states) >= self._states_max:
                _make_room(states)
            states[key] = [1, following, 1, index]
            return
        state[0] += 1
        if state[1] == following:
            state[2] += 1
            state[3] = index
        elif following in (successors := state[4::3]):
            at = 4 + 3 * successors.index(following)
            state[at + 1] += 1
            state[at + 2] = index
            if state[at + 1] >= state[at - 2]:
                state[at - 3 : at + 3] = state[at : at + 3] + state[at - 3 : at]
        elif len(state) < 3 * width:
            state += (following, 1, index)
        else:
            state[-2] -= 1
            if state[-2] <= 0:
                state[-3:] = (following, 1, index)
        if state[0] >= TOTAL_MAX:
            _halve(state)

    def one(self, current: Key) -> State | None:
        """The successors of a content."""
        return self._one.get(current)

    def two(self, before: Key, current: Key) -> State | None:
        """The successors of a content that came after another."""
        return self._two.get(((before * 0x9E3779B97F4A7C15) ^ current) & _KEY_MASK)

    def probability(self, current: Key, following: Key) -> float:
        """`count(current → following) / count(current)`; 0 for what was never seen or has faded."""
        state = self._one.get(current)
        if state is None or following not in state[1::3]:
            return 0.0
        return state[2 + 3 * state[1::3].index(following)] / state[0]

    def merge(self, other: TransitionTable) -> None:
        """Take over what another table of the same chunk size knows. The most counted successors stay.

        Where both have counted the larger count stands. A sum would be wrong: both have loaded what either saved before, and what is
        in both would double with each round through the store. Merging twice, or with oneself, changes nothing.
        The other table's states become this one's: it must not be used any more. Raises ValueError for another chunk size: its
        chunks are others.
        """
        if other.chunk_size != self.chunk_size:
            raise ValueError(f"transitions between chunks of {other.chunk_size} bytes say nothing of chunks of {self.chunk_size}")
        for mine, theirs, width in ((self._one, other._one, SUCCESSORS_1), (self._two, other._two, SUCCESSORS_2)):
            for key, state in theirs.items():
                known = mine.get(key)
                if known is not None:
                    known[:] = _joined(known, state, width)
                    continue
                if len(mine) >= self._states_max:
                    _make_room(mine)
                mine[key] = state

    def to_bytes(self, bytes_max: int = BYTES_MAX) -> bytes:
        """The table as a sealed record of at most `bytes_max`. May run in another thread while the table goes on learning."""
        # Copied in one step each, so no thread comes in between.
        orders = [list(self._one.items()), list(self._two.items())]
        sealed = seal_model(KIND, VERSION, MarkovRecord(self.chunk_size, [_columns(rows) for rows in orders]))
        while len(sealed) > bytes_max:
            share = 0.95 * bytes_max / len(sealed)
            orders = [_weightiest(rows, int(len(rows) * share)) for rows in orders]
            sealed = seal_model(KIND, VERSION, MarkovRecord(self.chunk_size, [_columns(rows) for rows in orders]))
        return sealed

    @classmethod
    def from_bytes(cls, data: bytes, name: str, *, chunk_size: int | None, states_max: int = STATES_MAX) -> TransitionTable:
        """The table in an object called `name`; chunk_size None: of any. Raises ObjectCorruptError for bytes that are damaged, too many,
        or about chunks of another size; NewerFormatError for a later version.
        """
        record = unseal_model(KIND, VERSION, data, MarkovRecord, name)
        if record.chunk_size != (chunk_size or record.chunk_size):
            raise ObjectCorruptError(
                f"{name}: transitions of chunks of {record.chunk_size} bytes, expected {chunk_size}; it will be rebuilt"
            )
        if len(record.orders) != 2:
            raise ObjectCorruptError(f"{name}: {len(record.orders)} orders of transitions, expected 2; it will be rebuilt")
        table = cls(record.chunk_size, states_max=states_max)
        for states, columns, width in zip((table._one, table._two), record.orders, (SUCCESSORS_1, SUCCESSORS_2), strict=True):
            _restore(states, columns, width, states_max, name)
        return table


def _make_room(states: dict[Key, State]) -> None:
    for round_ in range(_ROUNDS):
        key = next(iter(states))
        state = states.pop(key)
        if state[0] < 3 or round_ == _ROUNDS - 1:
            return
        _halve(state)
        states[key] = state


def _halve(state: State) -> None:
    """Halve the counts; successors that were counted once leave, but never the first."""
    kept = [state[0] // 2]
    for at in range(1, len(state), 3):
        if at == 1 or state[at + 1] > 1:
            kept += (state[at], max(1, state[at + 1] // 2), state[at + 2])
    state[:] = kept


def _joined(mine: State, theirs: State, width: int) -> State:
    known = {mine[at]: (mine[at + 1], mine[at + 2]) for at in range(1, len(mine), 3)}
    for at in range(1, len(theirs), 3):
        count, index = known.get(theirs[at], (0, theirs[at + 2]))
        known[theirs[at]] = (max(count, theirs[at + 1]), index)
    best = sorted(known.items(), key=lambda item: -item[1][0])[:width]
    joined = [max(mine[0], theirs[0], sum(count for _, (count, _) in best))]
    for key, (count, index) in best:
        joined += (key, count, index)
    if joined[0] >= TOTAL_MAX:
        _halve(joined)
    return joined


def _weightiest(rows: list[tuple[Key, State]], count: int) -> list[tuple[Key, State]]:
    """So many of the states, those with the highest totals, in the order they came."""
    ranked = sorted(range(len(rows)), key=lambda at: (rows[at][1][0], at), reverse=True)
    return [rows[at] for at in sorted(ranked[:count])]


def _columns(rows: list[tuple[Key, State]]) -> tuple[bytes, bytes, bytes, bytes, bytes, bytes]:
    heads: list[int] = []
    flat: list[int] = []
    for key, known in rows:
        state = known[:]  # in one step: another thread counts on, and may add or forget a successor between two of ours
        heads += (key, state[0], (len(state) - 1) // 3)
        flat += state[1:]
    head = np.array(heads, dtype="<u8").reshape(-1, 3)
    body = np.array(flat, dtype="<u8").reshape(-1, 3)
    return (
        head[:, 0].tobytes(),
        head[:, 1].astype("<u4").tobytes(),
        head[:, 2].astype("u1").tobytes(),
        body[:, 0].tobytes(),
        # A count that is just being worn down, in another thread, counts as one.
        np.maximum(body[:, 1], 1).astype("<u4").tobytes(),
        body[:, 2].tobytes(),
    )


def _restore(states: dict[Key, State], columns: Sequence[bytes], width: int, states_max: int, name: str) -> None:
    arrays: list[npt.NDArray[Any]] = []
    for data, kind in zip(columns, ("<u8", "<u4", "u1", "<u8", "<u4", "<u8"), strict=True):
        if len(data) % np.dtype(kind).itemsize:
            raise ObjectCorruptError(f"{name}: a column of {len(data)} bytes holds no whole numbers of {kind}; it will be rebuilt")
        arrays.append(np.frombuffer(data, dtype=kind))
    keys, totals, lengths, successors, counts, indexes = arrays
    rows = len(keys)
    if rows > _ROWS_MAX:
        raise ObjectCorruptError(f"{name}: {rows} states, a table has at most {_ROWS_MAX}; it will be rebuilt")
    sound = (
        len(totals) == rows == len(lengths)
        and len(successors) == len(counts) == len(indexes) == int(lengths.sum(dtype=np.int64))
        and (
            rows == 0
            or (int(lengths.min()) >= 1 and int(lengths.max()) <= width and int(totals.min()) >= 1 and int(totals.max()) <= TOTAL_MAX)
        )
        and (not len(counts) or (int(counts.min()) >= 1 and int(counts.max()) <= TOTAL_MAX and int(indexes.max()) <= INDEX_MASK))
    )
    if not sound:
        raise ObjectCorruptError(f"{name}: the columns of {rows} states do not fit together; it will be rebuilt")
    # The newest states come last: where a table is larger than this one may be, they are the ones to keep.
    first = max(0, rows - states_max)
    ends = (3 * np.cumsum(lengths, dtype=np.int64)).tolist()
    all_keys, all_totals = keys.tolist(), totals.tolist()
    flat = np.column_stack((successors, counts, indexes)).astype(np.uint64).ravel().tolist()
    for row in range(first, rows):
        states[all_keys[row]] = [all_totals[row], *flat[ends[row - 1] if row else 0 : ends[row]]]


def _within(column: npt.NDArray[Any], low: int, high: int) -> bool:
    return not len(column) or (int(column.min()) >= low and int(column.max()) <= high)


class MarkovSource:
    """One image's walk through the shared table. Evidence: 1 + eighths of the share * 8 + magnitude of the total."""

    __slots__ = ("_before", "_current", "_image", "second", "table")

    def __init__(self, table: TransitionTable) -> None:
        self.table = table
        self._before: Key | None = None
        self._current: Key | None = None
        self._image = 0
        self.second: Sequence[Candidate] = ()
        """The candidates of order 2, found by `candidates` along with those of order 1."""

    def observe(self, access: Access) -> None:
        place, key = access.place, access.key
        if self._current is not None:
            self.table.learn(self._before, self._current, key, place & INDEX_MASK)
        self._before, self._current = self._current, key
        self._image = place >> INDEX_BITS << INDEX_BITS

    def restart(self) -> None:
        """The image was opened anew: what came last before it is no cause of what comes now."""
        self._before = self._current = None

    def candidates(self) -> Sequence[Candidate]:
        current, before, image = self._current, self._before, self._image
        self.second = ()
        if current is None:
            return ()
        if before is not None:
            state = self.table.two(before, current)
            if state is not None:
                self.second = _named(state, image, SUCCESSORS_2)
        state = self.table.one(current)
        return () if state is None else _named(state, image, NAMED_MAX)


def _named(state: State, image: int, most: int) -> list[Candidate]:
    total = state[0]
    base = 1 + magnitude(total)
    if len(state) == 4:
        return [(image | state[3], base + state[2] * 8 // total * 8)]
    return [(image | state[at + 2], base + state[at + 1] * 8 // total * 8) for at in range(1, min(len(state), 1 + 3 * most), 3)]
