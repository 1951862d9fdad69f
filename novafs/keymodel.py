"""Which key follows which: the library's built-in predictor, transitions of order 1 and 2 between keys.

The counts are those of `novafs.prefetch.markov`, under 64 bits of a hash of the key; with them goes a table of the keys themselves, since a
prediction has to name one. Beyond the direct successors of a key the chain is walked on: what follows the likeliest, with the
product of the probabilities. Each stream (a thread of the program) is a sequence of its own.

Saved as a sealed record of kind `KEYS` in `models/keys/`: columns of numbers and a list of texts, no code. Two hosts' tables join as
transitions do: the larger count stands, so to join twice changes nothing.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from typing import Final

import msgspec
import xxhash

from novafs.errors import NovaError, ObjectCorruptError
from novafs.prefetch.base import Key
from novafs.prefetch.blob import seal_model, unseal_model
from novafs.prefetch.markov import State, TransitionTable
from novafs.values import check_key

KIND: Final = b"KEYS"
VERSION: Final = 1
STATES_MAX: Final = 1 << 14
NAMES_MAX: Final = 2 * STATES_MAX
STREAMS_MAX: Final = 64
TABLE_BYTES_MAX: Final = 1 << 20
NAME_BYTES_MAX: Final = 2 << 20
"""Of all names in a saved model."""
ORDER_2_SHARE: Final = 0.75
"""How much of a prediction is what came after the last two keys, where that was seen twice; the rest what came after the last."""
CHANCE_MIN: Final = 0.02
_UNIT: Final = 1


class KeysRecord(msgspec.Struct, array_like=True):
    """What a sealed model holds: the transitions as sealed by themselves, and the names they are about."""

    table: bytes
    names: list[str]


def hash_of(key: str) -> Key:
    """What transitions know a key by."""
    return xxhash.xxh64_intdigest(key.encode("utf-8", "surrogatepass"))


class KeyModel:
    """The predictor `markov`. On one thread."""

    def __init__(self) -> None:
        self.table = TransitionTable(_UNIT, states_max=STATES_MAX)
        self._names: OrderedDict[Key, str] = OrderedDict()
        """Named last at the end."""
        self._streams: OrderedDict[int, tuple[Key | None, Key]] = OrderedDict()
        """The last two keys of each stream, the newest stream last."""

    def __len__(self) -> int:
        return len(self._names)

    def observe(self, key: str, stream: int) -> None:
        """See `novafs.registry.Predictor`."""
        now = hash_of(key)
        before, last = self._streams.pop(stream, (None, None))
        if last is not None and last != now:
            self.table.learn(before, last, now, 0)
            self._name(now, key)
        elif last is None:
            self._name(now, key)
        self._streams[stream] = (last, now) if last != now else (before, now)
        if len(self._streams) > STREAMS_MAX:
            self._streams.popitem(last=False)

    def _name(self, hashed: Key, key: str) -> None:
        if self.table.frozen:
            return
        self._names[hashed] = key
        self._names.move_to_end(hashed)
        if len(self._names) > NAMES_MAX:
            self._names.popitem(last=False)

    def forget(self, key: str) -> None:
        """The key is gone: it is predicted no more."""
        self._names.pop(hash_of(key), None)

    def predict(self, key: str, n: int) -> list[tuple[str, float]]:
        """See `novafs.registry.Predictor`."""
        start = hash_of(key)
        before = next((b for b, last in reversed(self._streams.values()) if last == start), None)
        best: dict[Key, float] = {}
        # Likeliest first (Dijkstra on probabilities): a key's chance is that of the likeliest way to it.
        heap: list[tuple[float, int, Key | None, Key]] = [(-1.0, 0, before, start)]
        visited: set[Key] = set()
        order = 0
        while heap and len(visited) <= n:
            chance, _, previous, current = heapq.heappop(heap)
            if current in visited:
                continue
            visited.add(current)
            for following, share in self._shares(previous, current).items():
                reached = -chance * share
                if following not in visited and reached >= CHANCE_MIN and reached > best.get(following, 0.0):
                    best[following] = reached
                    order += 1
                    heapq.heappush(heap, (-reached, order, current, following))
        named = [(self._names[hashed], chance) for hashed, chance in best.items() if hashed in self._names and hashed != start]
        # Of those alike likely the nearest first, as they were found.
        return sorted(named, key=lambda item: -item[1])[:n]

    def _shares(self, before: Key | None, current: Key) -> dict[Key, float]:
        one = _shares(self.table.one(current))
        two_state = self.table.two(before, current) if before is not None else None
        if two_state is None or two_state[0] < 2:
            return one
        two = _shares(two_state)
        return {key: ORDER_2_SHARE * two.get(key, 0.0) + (1.0 - ORDER_2_SHARE) * one.get(key, 0.0) for key in dict.fromkeys([*two, *one])}

    # --- saved -----------------------------------------------------------------------------------------------

    def save(self) -> bytes:
        """The model as a sealed record: the names that were used last, as many as there is room for."""
        names: list[str] = []
        size = 0
        for name in reversed(self._names.values()):
            size += len(name.encode()) + 5
            if size > NAME_BYTES_MAX:
                break
            names.append(name)
        return seal_model(KIND, VERSION, KeysRecord(self.table.to_bytes(TABLE_BYTES_MAX), names[::-1]))

    def load(self, data: bytes, name: str = "models/keys") -> None:
        """Learn what a saved one knows, too. Raises ObjectCorruptError, NewerFormatError, which name it, and stays as it is."""
        self.merge(KeyModel.from_bytes(data, name))

    def merge(self, other: KeyModel) -> None:
        """Take over what another knows, which must not be used any more."""
        self.table.merge(other.table)
        for hashed, key in other._names.items():
            if hashed not in self._names:
                self._names[hashed] = key
                self._names.move_to_end(hashed, last=False)
        while len(self._names) > NAMES_MAX:
            self._names.popitem(last=False)

    @classmethod
    def from_bytes(cls, data: bytes, name: str) -> KeyModel:
        """The model in an object called `name`. Raises ObjectCorruptError, NewerFormatError."""
        record = unseal_model(KIND, VERSION, data, KeysRecord, name)
        if len(record.names) > NAMES_MAX:
            raise ObjectCorruptError(f"{name}: {len(record.names)} keys, a model has at most {NAMES_MAX}; it will be rebuilt")
        model = cls()
        model.table = TransitionTable.from_bytes(record.table, name, chunk_size=_UNIT, states_max=STATES_MAX)
        for key in record.names:
            try:
                check_key(key)
            except NovaError as error:
                raise ObjectCorruptError(f"{name}: holds what is no key; it will be rebuilt") from error
            model._names[hash_of(key)] = key
        return model


def _shares(state: State | None) -> dict[Key, float]:
    if state is None:
        return {}
    return {state[at]: min(1.0, state[at + 1] / state[0]) for at in range(1, len(state), 3)}
