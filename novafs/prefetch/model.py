"""What an engine has learned, as bytes and back: what hosts share through `models/` in the store.

    transitions   which content follows which                (markov.py)
    gate          weights and calibration                    (gate.py)
    profiles      what images read after they are opened     (profile.py)
    lstm          networks of families of images             (shelf.py)

Promised: all of a volume's models together are at most `TOTAL_MAX`; a model is written by one version and chunk size and read by the
same or not at all; no code is in them (sealed MessagePack and columns of numbers). Whatever is wrong with one costs that one, and
is one warning. Transitions, profiles and networks join idempotently: what a host has loaded, learned on and saved again is not counted
twice when it meets its own past, so any number of hosts may load, merge and save in any order. Gates are averaged by how much each has
learned; one that meets itself stays as it is.

`dump_models` and `merge_models` take up to about half a second for full tables and belong into a worker thread; they may
run there while the engine works on.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Final

from novafs.errors import NewerFormatError, ObjectCorruptError
from novafs.prefetch.blob import BLOB_MAX
from novafs.prefetch.engine import PrefetchEngine
from novafs.prefetch.gate import Gate
from novafs.prefetch.markov import TransitionTable
from novafs.prefetch.profile import ProfileBook
from novafs.prefetch.shelf import DeltaShelf

log = logging.getLogger(__name__)

TRANSITIONS: Final = "transitions"
GATE: Final = "gate"
PROFILES: Final = "profiles"
LSTM: Final = "lstm"
NAMES: Final = (TRANSITIONS, GATE, PROFILES, LSTM)
TOTAL_MAX: Final = BLOB_MAX


def dump_models(engine: PrefetchEngine) -> dict[str, bytes]:
    """All that is worth sharing, by name, sealed."""
    engine.shelve()
    return {
        TRANSITIONS: engine.table.to_bytes(),
        GATE: engine.gate.to_bytes(),
        PROFILES: engine.book.to_bytes(),
        LSTM: engine.shelf.to_bytes(),
    }


def load_models(engine: PrefetchEngine, blobs: Mapping[str, bytes]) -> list[str]:
    """Teach an engine what these say, on top of what it knows; the names of those that were any good.

    One that is damaged, too large, or of another version or chunk size, is left out with a warning. Other names are ignored. To be called
    where the engine is called; takes about 0.2 s for full tables.
    """
    chunk_size = engine.settings.chunk_size
    takers: dict[str, Callable[[bytes], None]] = {
        TRANSITIONS: lambda data: engine.table.merge(TransitionTable.from_bytes(data, "models/transitions", chunk_size=chunk_size)),
        GATE: lambda data: engine.gate.merge(Gate.from_bytes(data, "models/gate")),
        PROFILES: lambda data: engine.book.merge(ProfileBook.from_bytes(data, "models/profiles", chunk_size=chunk_size)),
        LSTM: lambda data: engine.shelf.merge(DeltaShelf.from_bytes(data, "models/lstm", chunk_size=chunk_size)),
    }
    loaded = []
    for name, take in takers.items():
        data = blobs.get(name)
        if data is None:
            continue
        try:
            take(data)
        except (ObjectCorruptError, NewerFormatError) as error:
            log.warning("prefetch starts without a saved model: %s", error)
        else:
            loaded.append(name)
    return loaded


def reset_models(engine: PrefetchEngine, names: Iterable[str]) -> None:
    """Have an engine forget what it has learned; what it counts of accesses and prefetches stays. Other names are ignored."""
    for name in names:
        if name == TRANSITIONS:
            engine.table.clear()
        elif name == GATE:
            engine.gate.clear()
        elif name == PROFILES:
            engine.book.clear()
        elif name == LSTM:
            engine.forget_networks()


def merge_models(name: str, mine: bytes, theirs: bytes) -> bytes:
    """What both know, sealed: to be saved in place of `theirs`.

    Raises ObjectCorruptError where `theirs` is no good, or of another chunk size: then `mine` may replace it. Raises NewerFormatError
    where a newer NovaFS wrote it: then it has to stay. ValueError for a name that is not in `NAMES`.
    """
    called = f"models/{name}"
    if name == TRANSITIONS:
        table = TransitionTable.from_bytes(mine, called, chunk_size=None)
        joined = TransitionTable.from_bytes(theirs, called, chunk_size=table.chunk_size)
        joined.merge(table)
        return joined.to_bytes()
    if name == GATE:
        gate = Gate.from_bytes(mine, called)
        gate.merge(Gate.from_bytes(theirs, called))
        return gate.to_bytes()
    if name == PROFILES:
        book = ProfileBook.from_bytes(mine, called, chunk_size=None)
        book.merge(ProfileBook.from_bytes(theirs, called, chunk_size=book.chunk_size))
        return book.to_bytes()
    if name == LSTM:
        shelf = DeltaShelf.from_bytes(mine, called, chunk_size=None)
        shelf.merge(DeltaShelf.from_bytes(theirs, called, chunk_size=shelf.chunk_size))
        return shelf.to_bytes()
    raise ValueError(f"{name!r} is no model: expected one of {', '.join(NAMES)}")
