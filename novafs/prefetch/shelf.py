"""The LSTMs of a volume's images, kept by family: an image's is found again by the content of the chunk that it is opened with.

Images have no name that lasts (their numbers are the mount's, of one mount), and clones read alike; so, as with boot profiles, the family
is the key. An image that is opened and has no network of its own takes a copy of its family's and goes on from there; whether
it is listened to is judged on the image itself, as ever.

Bounded: `MODELS_MAX` networks, the least recently kept forgotten first. Saved as a sealed record of kind `LSTM`: weights as
little-endian float16, Adam's moments not at all.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Final

import msgspec
import numpy as np

from novafs.errors import ObjectCorruptError
from novafs.prefetch.base import INDEX_MASK, Key
from novafs.prefetch.blob import seal_model, unseal_model
from novafs.prefetch.lstm import SLICES_MIN, VOCABULARY, DeltaModel, Floats, Lstm

KIND: Final = b"LSTM"
VERSION: Final = 1
MODELS_MAX: Final = 8
WEIGHT_MAX: Final = 1000.0
SLICES_MAX: Final = 1 << 31


@dataclass(frozen=True, slots=True)
class Kept:
    """A network that nobody trains any more: its weights, what its words mean, and how long it was trained."""

    meanings: list[int]
    weights: dict[str, Floats]
    slices: int


class KeptRecord(msgspec.Struct, array_like=True):
    """One network: weights by name as float16."""

    family: int
    slices: int
    meanings: list[int]
    weights: dict[str, bytes]


class ShelfRecord(msgspec.Struct, array_like=True):
    """What a sealed shelf holds."""

    chunk_size: int
    models: list[KeptRecord]


class DeltaShelf:
    """The networks by family."""

    __slots__ = ("_kept", "chunk_size")

    def __init__(self, chunk_size: int = 65536) -> None:
        self.chunk_size = chunk_size
        self._kept: OrderedDict[Key, Kept] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def clear(self) -> None:
        """Forget everything."""
        self._kept.clear()

    def keep(self, family: Key, model: DeltaModel) -> None:
        """Keep a copy of what an image has learned, unless it is little, or less than what is known of its family."""
        known = self._kept.get(family)
        if model.slices < SLICES_MIN or (known is not None and known.slices > model.slices):
            return
        learned = model.export()
        if learned is not None:
            self._put(family, Kept(*learned, model.slices))

    def lend(self, family: Key, model: DeltaModel) -> None:
        """Give a model that has no network a copy of its family's."""
        kept = self._kept.get(family)
        if kept is not None and not model.begun:
            model.adopt(kept.meanings, kept.weights)

    def merge(self, other: DeltaShelf) -> None:
        """Take over what another host knows; of one family's the one that was trained longer."""
        for family, kept in other._kept.items():
            known = self._kept.get(family)
            if known is None or kept.slices > known.slices:
                self._put(family, kept)

    def _put(self, family: Key, kept: Kept) -> None:
        self._kept[family] = kept
        self._kept.move_to_end(family)
        if len(self._kept) > MODELS_MAX:
            self._kept.popitem(last=False)

    def to_bytes(self) -> bytes:
        """The shelf as a sealed record. May run in another thread."""
        models = [
            KeptRecord(
                family,
                kept.slices,
                kept.meanings,
                {name: np.clip(value, -WEIGHT_MAX, WEIGHT_MAX).astype("<f2").tobytes() for name, value in kept.weights.items()},
            )
            for family, kept in list(self._kept.items())
        ]
        return seal_model(KIND, VERSION, ShelfRecord(self.chunk_size, models))

    @classmethod
    def from_bytes(cls, data: bytes, name: str, *, chunk_size: int | None) -> DeltaShelf:
        """The shelf in an object called `name`. Raises ObjectCorruptError, NewerFormatError."""
        record = unseal_model(KIND, VERSION, data, ShelfRecord, name)
        if record.chunk_size != (chunk_size or record.chunk_size):
            raise ObjectCorruptError(f"{name}: distances in chunks of {record.chunk_size} bytes, expected {chunk_size}; it will be rebuilt")
        if len(record.models) > MODELS_MAX:
            raise ObjectCorruptError(f"{name}: {len(record.models)} networks, expected at most {MODELS_MAX}; it will be rebuilt")
        shelf = cls(record.chunk_size)
        shapes = Lstm.shapes(VOCABULARY)
        for model in record.models:
            meanings = model.meanings
            if not 1 <= len(meanings) <= VOCABULARY or not 0 <= model.slices <= SLICES_MAX or max(map(abs, meanings)) > INDEX_MASK:
                raise ObjectCorruptError(f"{name}: a network whose words are out of range; it will be rebuilt")
            weights: dict[str, Floats] = {}
            for part, shape in shapes.items():
                raw = model.weights.get(part, b"")
                if len(raw) != 2 * int(np.prod(shape)):
                    raise ObjectCorruptError(f"{name}: weights {part!r} of {len(raw)} bytes, expected {2 * int(np.prod(shape))}; rebuilt")
                value = np.frombuffer(raw, dtype="<f2").astype(np.float32).reshape(shape)
                if not np.isfinite(value).all() or float(np.abs(value).max()) > WEIGHT_MAX:
                    raise ObjectCorruptError(f"{name}: weights {part!r} hold what is no weight; it will be rebuilt")
                weights[part] = value
            shelf._kept[model.family] = Kept(meanings, weights, model.slices)
        return shelf
