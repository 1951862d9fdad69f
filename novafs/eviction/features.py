"""What is known of chunks and of the places around them: the book of features that the learned model reads.

Time is counted in accesses. For each chunk, held or lately gone ("ghost"), there is a slot, and for each quantity an array over the
slots (structure of arrays), so that the features of many candidates are gathered with a few numpy calls. Beside the slots stand small
tables, hashed by place, of what was read where: a chunk's neighbours and the regions around it count whether they are held or not.

| # | feature of a chunk | # | |
|---|---|---|---|
| 0 | age: accesses since its last | 15, 16 | age and decayed count of its region of 16 chunks (1 MiB) |
| 1–3 | the last three gaps between its accesses | 17, 18 | the same of 256 chunks (16 MiB) |
| 4 | accesses; 0 while a prefetched chunk is unused | 19 | how long a sequential run was when it reached the chunk |
| 5 | accesses that came later than a burst's | 20 | accesses since it was first seen |
| 6–8 | decayed counts with half-lives of ¼, 1, 4 capacities | 21 | accesses since the access before the last burst |
| 9–12 | ages of the chunks at −1, +1, −2, +2 | 22, 23 | by how much the neighbours at −1, +1 were read before or after it |
| 13, 14 | decayed counts of those at ±1, at ±2 | | |

All are logarithms, cut into 64 steps. Half-lives and the length of a burst (a tenth) are in units of the number of chunks that the
tier holds, so that a model says the same of tiers of all sizes.

Always holds: every key held has a slot, `held` is in order of last access, oldest first; at most `ghosts_max` ghosts; nothing grows
with the image. Accesses come one at a time or in batches: a batch of `BATCH_MIN` or more is done with numpy, the same but for keys that
are in it more than `ROUNDS` times (what is between is only counted) and runs that interleave.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from novafs.eviction.trees import BINS, Bins

FEATURES: Final = 24
BATCH_MIN: Final = 48
ROUNDS: Final = 3
NEVER: Final = float(1 << 41)
"""A gap that has not been."""
HALF_LIVES: Final = (0.25, 1.0, 4.0)
BURST_SHARE: Final = 0.1
RUN_WITHIN: Final = 64
"""Accesses within which the chunk before must have been read for a run to go on."""
RUN_MAX: Final = 10_000
GHOSTS_MIN: Final = 2048
GHOSTS_MAX: Final = 131_072
REGION_BITS: Final = 13
_LAST: Final = BINS - 1
_NOWHERE: Final = -9

Slots = npt.NDArray[np.int64]

# Columns of the table.
LAST, GAP1, GAP2, GAP3, COUNT, APART, BEFORE, WARM1, WARM2, WARM3, FIRST, RUN, UNUSED, SIZE, MARK = range(15)
_COLUMNS: Final = 15
_NEW: Final = np.zeros(_COLUMNS)
_NEW[[LAST, BEFORE]] = -1.0
_NEW[[GAP1, GAP2, GAP3]] = NEVER
_STEPS: Final = np.array(
    [3, 2, 2, 2, 3, 4, 5, 5, 5, 2, 2, 2, 2, 5, 5, 2, 4, 2, 4, 4, 2, 2, 1.5, 1.5],
    dtype=np.float64,
)[:, None]
"""Steps for each doubling."""
_PHI: Final = np.uint64(0x9E3779B97F4A7C15)
_PHI_INT: Final = 0x9E3779B97F4A7C15
_MASK: Final = (1 << 64) - 1
_AROUND: Final = np.array([[-1], [1], [-2], [2]], dtype=np.int64)


class Book:
    """The features of one tier's chunks."""

    def __init__(self) -> None:
        self.now = 0
        """Accesses so far; the next one is at this time."""
        self.held: OrderedDict[bytes, int] = OrderedDict()
        """Key to slot, least recently used first."""
        self.ghosts: OrderedDict[bytes, int] = OrderedDict()
        self.scale = 1024.0
        """Chunks that the tier holds when it is full, as far as is known."""
        self.ghosts_max = GHOSTS_MIN
        self.dropped: list[int] = []
        """Examples whose chunk was forgotten before they were answered; for the learner to empty."""
        self._free: list[int] = []
        self._keys: list[bytes] = []
        """Key by slot."""
        self._used = 0
        self._table = np.zeros((_COLUMNS, 0))
        self.place: Slots = np.zeros(0, dtype=np.int64)
        self.pending: Slots = np.zeros(0, dtype=np.int64)
        """By slot: the example that waits for its next access, or -1."""
        self._seat: Slots = np.zeros(0, dtype=np.int64)
        """By slot: where it stands in `_seats`."""
        self._seats: Slots = np.zeros(0, dtype=np.int64)
        """Slots of what is held, in no order, to draw from."""
        self._seats_view = _view(self._seats)
        self._place_tag: Slots = np.zeros(0, dtype=np.int64)
        self._place_last = np.zeros(0)
        self._place_warm = np.zeros(0)
        self._place_run = np.zeros(0)
        self._grow(1024)
        self._regions = [np.zeros((2, 1 << REGION_BITS)) for _ in range(2)]
        self._region_views = [(_view(region[0]), _view(region[1])) for region in self._regions]

    # --- coming and going ------------------------------------------------------------------------------------

    def set_scale(self, chunks: float) -> None:
        """How many chunks the tier holds when full. Bounds the ghosts, too."""
        self.scale = max(4.0, chunks)
        self.ghosts_max = int(max(GHOSTS_MIN, min(2 * chunks, GHOSTS_MAX), chunks))

    def enter(self, key: bytes, size: int, place: int, *, prefetched: bool, marked: bool) -> int:
        """`key`, which is not held, is held now; its slot. No access yet (see `access`). `marked` is kept for `marked`."""
        slot = self.ghosts.pop(key, -1)
        if slot < 0:
            slot = self._new_slot()
            self._keys[slot] = key
        self.held[key] = slot
        self._place_view[slot] = place if place >= 0 else -1
        columns = self._columns
        columns[SIZE][slot] = size
        columns[MARK][slot] = marked
        if prefetched:
            columns[UNUSED][slot] = 1.0
            if columns[LAST][slot] < 0:
                columns[LAST][slot] = self.now
        seat = len(self.held) - 1
        if seat >= len(self._seats):
            self._seats = np.concatenate([self._seats, np.zeros(max(1024, len(self._seats)), dtype=np.int64)])
            self._seats_view = _view(self._seats)
        self._seats_view[seat] = slot
        self._seat_view[slot] = seat
        return slot

    def leave(self, key: bytes, *, ghost: bool) -> int:
        """`key` is held no longer; its slot (-1: it was not). With `ghost` what is known of it stays for a while."""
        slot = self.held.pop(key, -1)
        if slot < 0:
            return -1
        seats, at = self._seats_view, self._seat_view
        seat, last = at[slot], len(self.held)
        moved = seats[last]
        seats[seat] = moved
        at[moved] = seat
        self._columns[UNUSED][slot] = 0.0
        if not ghost:
            self._drop_slot(slot)
            return slot
        self.ghosts[key] = slot
        while len(self.ghosts) > self.ghosts_max:
            self._drop_slot(self.ghosts.popitem(last=False)[1])
        return slot

    def resize(self, key: bytes, size: int) -> int:
        """The bytes of `key` have changed; by how many. 0 where it is not held."""
        slot = self.held.get(key)
        if slot is None:
            return 0
        before = self._columns[SIZE][slot]
        self._columns[SIZE][slot] = size
        return size - int(before)

    def slot(self, key: bytes) -> int:
        """Of a key that is held or remembered; -1 for others."""
        slot = self.held.get(key, -1)
        return slot if slot >= 0 else self.ghosts.get(key, -1)

    def key_of(self, slot: int) -> bytes:
        """Whose slot it is."""
        return self._keys[slot]

    def size_of(self, slot: int) -> int:
        """Its bytes."""
        return int(self._columns[SIZE][slot])

    def last_of(self, slot: int) -> float:
        """When it was last accessed."""
        return float(self._columns[LAST][slot])

    def unused(self, slot: int) -> bool:
        """Whether it was prefetched and nobody has asked for it."""
        return bool(self._columns[UNUSED][slot])

    def mark(self, slot: int, marked: bool) -> None:
        """Keep something else than `enter` was told."""
        self._columns[MARK][slot] = marked

    def marked(self, slot: int) -> bool:
        """What `enter` or `mark` was told."""
        return bool(self._columns[MARK][slot])

    def marked_of(self, slots: Slots) -> npt.NDArray[np.int64]:
        """Which of these slots are marked: indexes into them."""
        return np.flatnonzero(self._table[MARK, slots])

    def apart(self, slot: int) -> int:
        """Accesses that came later than a burst's, the first included."""
        return int(self._columns[APART][slot])

    def sizes_of(self, slots: Slots) -> npt.NDArray[np.float64]:
        """Their bytes."""
        return np.asarray(self._table[SIZE, slots])

    def lasts_of(self, slots: Slots) -> npt.NDArray[np.float64]:
        """When they were last accessed."""
        return np.asarray(self._table[LAST, slots])

    def draw(self, random: np.random.Generator, count: int) -> Slots:
        """Slots of what is held, drawn with replacement. There is at least one."""
        return self._seats[random.integers(0, len(self.held), count)]

    # --- accesses --------------------------------------------------------------------------------------------

    def access(self, slot: int) -> int:
        """One access. The example that waited for it, or -1; its gap is `now - 1` less the example's time."""
        now = self.now
        self.now = now + 1
        columns = self._columns
        scale = self.scale
        last = columns[LAST][slot]
        seen = columns[COUNT][slot]
        columns[UNUSED][slot] = 0.0
        if seen > 0:
            gap = now - last
            columns[GAP3][slot] = columns[GAP2][slot]
            columns[GAP2][slot] = columns[GAP1][slot]
            columns[GAP1][slot] = gap
            columns[COUNT][slot] = seen + 1
            columns[WARM1][slot] = columns[WARM1][slot] * math.exp2(-gap / (scale * HALF_LIVES[0])) + 1
            warm = columns[WARM2][slot] * math.exp2(-gap / scale) + 1
            columns[WARM2][slot] = warm
            columns[WARM3][slot] = columns[WARM3][slot] * math.exp2(-gap / (scale * HALF_LIVES[2])) + 1
            if gap > scale * BURST_SHARE:
                columns[APART][slot] += 1
                columns[BEFORE][slot] = last
        else:
            columns[FIRST][slot] = now
            columns[COUNT][slot] = columns[APART][slot] = 1.0
            columns[WARM1][slot] = columns[WARM2][slot] = columns[WARM3][slot] = warm = 1.0
        columns[LAST][slot] = now
        place = self._place_view[slot]
        if place >= 0:
            self._access_place(slot, place, now, warm)
        example = self._pending_view[slot]
        if example >= 0:
            self._pending_view[slot] = -1
        return int(example)

    def _access_place(self, slot: int, place: int, now: int, warm: float) -> None:
        shift = self._place_shift
        tags, lasts, warms, runs = self._place_views
        run = 0.0
        before = (((place - 1) * _PHI_INT) & _MASK) >> shift
        if tags[before] == place - 1 and now - lasts[before] <= RUN_WITHIN:
            run = min(runs[before] + 1.0, RUN_MAX)
        columns = self._columns
        at = ((place * _PHI_INT) & _MASK) >> shift
        if tags[at] == place and now - lasts[at] <= RUN_WITHIN:
            run = max(run, columns[RUN][slot])  # more of the burst that brought it in
        columns[RUN][slot] = run
        tags[at] = place
        lasts[at] = now
        warms[at] = warm
        runs[at] = run
        for number, bits in enumerate((4, 8)):
            times, counts = self._region_views[number]
            region = (((place >> bits) * _PHI_INT) & _MASK) >> (64 - REGION_BITS)
            counts[region] = counts[region] * math.exp2((times[region] - now) / self.scale) + 1
            times[region] = now

    def access_many(self, slots: Slots) -> tuple[Slots, Slots]:
        """Accesses in order. The examples that waited for them and when those accesses were."""
        times = np.arange(self.now, self.now + len(slots), dtype=np.float64)
        self.now += len(slots)
        waiting = self.pending[slots]
        some = np.flatnonzero(waiting >= 0)
        if len(some):
            some = some[np.unique(slots[some], return_index=True)[1]]
        examples, when = waiting[some], times[some].astype(np.int64)
        self.pending[slots[some]] = -1
        rest_slots, rest_times = slots, times
        for number in range(ROUNDS):
            _, first = np.unique(rest_slots, return_index=True)
            self._access_once(rest_slots[first], rest_times[first], 1.0)
            if len(first) == len(rest_slots):
                break
            keep = np.ones(len(rest_slots), dtype=np.bool_)
            keep[first] = False
            rest_slots, rest_times = rest_slots[keep], rest_times[keep]
            if number == ROUNDS - 2:
                # The last round: of those that come more often only the last access is done, the others are counted.
                reversed_slots = rest_slots[::-1]
                unique, from_end, counts = np.unique(reversed_slots, return_index=True, return_counts=True)
                self._access_once(unique, rest_times[::-1][from_end], counts.astype(np.float64))
                break
        self._places_many(slots, times)
        return examples, when

    def _access_once(self, slots: Slots, times: npt.NDArray[np.float64], weight: npt.NDArray[np.float64] | float) -> None:
        table = self._table
        last = table[LAST, slots]
        seen = table[COUNT, slots]
        again = seen > 0
        gap = times - last
        table[GAP3, slots] = np.where(again, table[GAP2, slots], NEVER)
        table[GAP2, slots] = np.where(again, table[GAP1, slots], NEVER)
        table[GAP1, slots] = np.where(again, gap, NEVER)
        table[COUNT, slots] = seen + weight
        for column, half_life in zip((WARM1, WARM2, WARM3), HALF_LIVES, strict=True):
            table[column, slots] = np.where(again, table[column, slots] * np.exp2(-gap / (self.scale * half_life)), 0.0) + weight
        apart = again & (gap > self.scale * BURST_SHARE)
        table[APART, slots] = np.where(again, table[APART, slots] + apart, 1.0)
        table[BEFORE, slots] = np.where(apart, last, table[BEFORE, slots])
        table[FIRST, slots] = np.where(again, table[FIRST, slots], times)
        table[LAST, slots] = times
        table[UNUSED, slots] = 0.0

    def _places_many(self, slots: Slots, times: npt.NDArray[np.float64]) -> None:
        places = self.place[slots]
        known = places >= 0
        if not known.all():
            slots, times, places = slots[known], times[known], places[known]
        if not len(slots):
            return
        before = self._hashed(places - 1)
        here = self._hashed(places)
        going = (self._place_tag[before] == places - 1) & (times - self._place_last[before] <= RUN_WITHIN)
        head = np.where(going, self._place_run[before] + 1.0, 0.0)
        burst = (self._place_tag[here] == places) & (times - self._place_last[here] <= RUN_WITHIN)
        head = np.where(burst, np.maximum(head, self._table[RUN, slots]), head)
        # Within the batch: each access that follows its left neighbour's goes on counting from the first of them.
        follows = np.zeros(len(places), dtype=np.bool_)
        follows[1:] = places[1:] == places[:-1] + 1
        position = np.arange(len(places))
        start = np.maximum.accumulate(np.where(follows, 0, position))
        run = np.minimum(head[start] + (position - start), RUN_MAX)
        self._table[RUN, slots] = run
        self._place_tag[here] = places
        self._place_last[here] = times
        self._place_warm[here] = self._table[WARM2, slots]
        self._place_run[here] = run
        end = times[-1]
        decayed = np.exp2((times - end) / self.scale)
        for region, bits in zip(self._regions, (4, 8), strict=True):
            at, inverse = np.unique(_hash(places >> bits, 64 - REGION_BITS), return_inverse=True)
            fresh = np.bincount(inverse, decayed, len(at))
            region[1, at] = region[1, at] * np.exp2((region[0, at] - end) / self.scale) + fresh
            # To the batch's end the decayed count is exact, the age is wrong by less than a batch.
            region[0, at] = end

    # --- features --------------------------------------------------------------------------------------------

    def rows(self, slots: Slots) -> Bins:
        """The features of these slots now: slots × FEATURES."""
        now = float(self.now)
        known = self._table[:SIZE, slots]
        place = self.place[slots]
        value = np.empty((FEATURES, len(slots)))
        age = now - known[LAST]
        value[0] = age
        value[1:4] = known[GAP1 : GAP3 + 1]
        value[4] = known[COUNT] * (1.0 - known[UNUSED])
        value[5] = known[APART]
        scale = self.scale
        value[6] = known[WARM1] * np.exp2(age * (-1.0 / (scale * HALF_LIVES[0]))) * 16.0
        value[7] = known[WARM2] * np.exp2(age * (-1.0 / scale)) * 16.0
        value[8] = known[WARM3] * np.exp2(age * (-1.0 / (scale * HALF_LIVES[2]))) * 16.0
        around = place + _AROUND
        at = self._hashed(around)
        found = (self._place_tag[at] == around) & (place >= 0)
        last = self._place_last[at]
        gone = now - last
        value[9:13] = np.where(found, gone, NEVER)
        warm = np.where(found, self._place_warm[at] * np.exp2(gone * (-1.0 / scale)), 0.0) * 16.0
        value[13] = warm[0] + warm[1]
        value[14] = warm[2] + warm[3]
        for number, (region, bits) in enumerate(zip(self._regions, (4, 8), strict=True)):
            spot = _hash(place >> bits, 64 - REGION_BITS)
            since = now - region[0, spot]
            value[15 + 2 * number] = np.where(place >= 0, since, NEVER)
            value[16 + 2 * number] = np.where(place >= 0, region[1, spot] * np.exp2(since * (-1.0 / scale)) * 16.0, 0.0)
        value[19] = known[RUN]
        value[20] = now - known[FIRST]
        value[21] = np.where(known[BEFORE] >= 0, now - known[BEFORE], NEVER)
        apart = last[:2] - known[LAST]
        value[22:24] = np.abs(apart)
        np.maximum(value, 0.0, out=value)
        value += 1.0
        np.log2(value, out=value)
        value *= _STEPS
        steps = np.minimum(value, _LAST)
        # Before its own last access: 31 and down, after: 32 and up, 63: nothing is known there.
        half = BINS // 2
        side = np.where(
            apart > 0, np.minimum(half + np.floor(value[22:24]), _LAST), half - 1 - np.minimum(np.floor(value[22:24]), half - 1)
        )
        steps[22:24] = np.where(found[:2], side, _LAST)
        return np.ascontiguousarray(steps.T.astype(np.uint8))

    # --- arrays ----------------------------------------------------------------------------------------------

    @property
    def memory_bytes(self) -> int:
        """Of the arrays and, estimated, of the dictionaries."""
        arrays = self._table.nbytes + 8 * (4 * len(self.place)) + 32 * len(self._place_tag) + sum(region.nbytes for region in self._regions)
        return arrays + 130 * (len(self.held) + len(self.ghosts))

    def _hashed(self, places: Slots) -> npt.NDArray[np.uint64]:
        return _hash(places, self._place_shift)

    def _set_places(self, length: int) -> None:
        before = self._place_tag
        old = (before, self._place_last, self._place_warm, self._place_run)
        self._place_tag = np.full(length, _NOWHERE, dtype=np.int64)
        self._place_last = np.zeros(length)
        self._place_warm = np.zeros(length)
        self._place_run = np.zeros(length)
        self._place_shift = 64 - (length.bit_length() - 1)
        self._place_views = (
            _view(self._place_tag),
            _view(self._place_last),
            _view(self._place_warm),
            _view(self._place_run),
        )
        if len(before):
            known = np.flatnonzero(before != _NOWHERE)
            at = self._hashed(before[known])
            for new, values in zip((self._place_tag, self._place_last, self._place_warm, self._place_run), old, strict=True):
                new[at] = values[known]

    def _new_slot(self) -> int:
        if self._free:
            slot = self._free.pop()
        else:
            slot = self._used
            if slot == self._table.shape[1]:
                self._grow(2 * slot)
            self._used += 1
            self._keys.append(b"")
        self._table[:, slot] = _NEW
        self._columns[FIRST][slot] = self.now
        self._pending_view[slot] = -1
        return slot

    def _drop_slot(self, slot: int) -> None:
        example = self._pending_view[slot]
        if example >= 0:
            self.dropped.append(example)
            self._pending_view[slot] = -1
        self._keys[slot] = b""
        self._free.append(slot)

    def _grow(self, room: int) -> None:
        more = room - self._table.shape[1]
        self._table = np.concatenate([self._table, np.zeros((_COLUMNS, more))], axis=1)
        self._columns = [_view(column) for column in self._table]
        self.place = np.concatenate([self.place, np.full(more, -1, dtype=np.int64)])
        self.pending = np.concatenate([self.pending, np.full(more, -1, dtype=np.int64)])
        self._seat = np.concatenate([self._seat, np.zeros(more, dtype=np.int64)])
        self._place_view = _view(self.place)
        self._pending_view = _view(self.pending)
        self._seat_view = _view(self._seat)
        if 2 * room > len(self._place_tag):
            self._set_places(2 * room)


def _view(array: npt.NDArray[Any]) -> Any:
    """The same numbers, for reading and writing one at a time: three times as quick as through numpy."""
    return array.data


def _hash(numbers: Slots, shift: int) -> npt.NDArray[np.uint64]:
    return (numbers.astype(np.uint64) * _PHI) >> np.uint64(shift)
