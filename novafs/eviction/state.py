"""A learned model as bytes: a sealed record (`novafs.record`: magic, kind, version, length, checksum), with no key and no place in it.

What loads is a forest that answers: every number finite, every index in range, no larger than a model is. Anything else is
ObjectCorruptError (an older version, too: features have changed, so its numbers mean nothing), and NewerFormatError for a later
version, which must not be replaced by ours. The caller goes on with what he has; a model is worth nothing but time.
"""

from __future__ import annotations

import struct
from typing import Final

import msgspec
import numpy as np

from novafs.errors import ObjectCorruptError
from novafs.eviction.features import FEATURES
from novafs.eviction.learner import Learner
from novafs.eviction.trees import BINS, DEPTH_MAX, Forest
from novafs.record import seal, unseal

KIND: Final = b"EVIC"
VERSION: Final = 1
"""Changes with every change of the features."""
MODEL_MAX: Final = 1 << 20
TREES_MAX: Final = 1000
_MAP_MAX: Final = 1000
_VERSION: Final = struct.Struct("<H")
_VERSION_AT: Final = 8


class ForestRecord(msgspec.Struct, array_like=True):
    """Little-endian arrays. features u16 and thresholds u8: trees × depth; leaves f64: trees × 2**depth; the map: f64 pairs."""

    inputs: int
    depth: int
    base: float
    features: bytes
    thresholds: bytes
    leaves: bytes
    map_values: bytes
    map_chances: bytes


def save_model(learner: Learner) -> bytes | None:
    """The learner's forest, or None where it has none."""
    forest = learner.forest
    if forest is None:
        return None
    values, chances = learner.chance_map
    return seal(
        KIND,
        VERSION,
        ForestRecord(
            inputs=FEATURES,
            depth=forest.features.shape[1],
            base=forest.base,
            features=forest.features.astype("<u2").tobytes(),
            thresholds=forest.thresholds.tobytes(),
            leaves=forest.leaves.astype("<f8").tobytes(),
            map_values=values.astype("<f8").tobytes(),
            map_chances=chances.astype("<f8").tobytes(),
        ),
    )


def load_model(learner: Learner, data: bytes, name: str) -> None:
    """Give the learner the forest saved in `data`. Raises ObjectCorruptError, NewerFormatError; the learner is then as it was."""
    if len(data) > MODEL_MAX:
        raise ObjectCorruptError(f"{name}: {len(data)} bytes, an eviction model has at most {MODEL_MAX}; it will be learned anew")
    record = unseal(KIND, VERSION, data, ForestRecord, name)
    (found,) = _VERSION.unpack_from(data, _VERSION_AT)
    if found != VERSION:
        raise ObjectCorruptError(f"{name}: written in version {found} of its format, expected {VERSION}; it will be learned anew")
    fault = _fault(record)
    if fault:
        raise ObjectCorruptError(f"{name}: {fault}; it will be learned anew")
    trees = len(record.thresholds) // record.depth
    learner.restore(
        Forest(
            record.base,
            np.frombuffer(record.features, dtype="<u2").astype(np.int64).reshape(trees, record.depth),
            np.frombuffer(record.thresholds, dtype=np.uint8).reshape(trees, record.depth).copy(),
            np.frombuffer(record.leaves, dtype="<f8").astype(np.float64).reshape(trees, 1 << record.depth),
        ),
        np.frombuffer(record.map_values, dtype="<f8").astype(np.float64),
        np.frombuffer(record.map_chances, dtype="<f8").astype(np.float64),
    )


def check_older(data: bytes, name: str) -> None:
    """Raise NewerFormatError where a newer NovaFS wrote it, and ObjectCorruptError where nobody can read it."""
    unseal(KIND, VERSION, data[:MODEL_MAX], ForestRecord, name)


def _fault(record: ForestRecord) -> str:
    """What is wrong with it, or nothing."""
    if record.inputs != FEATURES:
        return f"a model of {record.inputs} features, expected {FEATURES}"
    if not 1 <= record.depth <= DEPTH_MAX:
        return f"trees of depth {record.depth}, expected 1 to {DEPTH_MAX}"
    questions = len(record.thresholds)
    trees = questions // record.depth
    if not 1 <= trees <= TREES_MAX or questions % record.depth or len(record.features) != 2 * questions:
        return f"{questions} questions do not make 1 to {TREES_MAX} trees of depth {record.depth}"
    if len(record.leaves) != 8 * (trees << record.depth):
        return f"{len(record.leaves)} bytes of leaves for {trees} trees"
    steps = len(record.map_values)
    if not 0 < steps <= 8 * _MAP_MAX or steps % 8 or steps != len(record.map_chances):
        return "its map from values to chances is not whole"
    if int(np.frombuffer(record.features, dtype="<u2").max()) >= FEATURES or max(record.thresholds) >= BINS:
        return "it asks for features that there are not"
    values = np.frombuffer(record.map_values, dtype="<f8")
    chances = np.frombuffer(record.map_chances, dtype="<f8")
    numbers = np.concatenate([[record.base], np.frombuffer(record.leaves, dtype="<f8"), values, chances])
    if not np.isfinite(numbers).all():
        return "it holds numbers that are not finite"
    if (np.diff(values) < 0).any() or chances.min() < 0.0 or chances.max() > 1.0:
        return "its map from values to chances does not rise from 0 to 1"
    return ""
