"""What models of a program's own have learned, kept with the volume: `models/plugin-<name>/<rev>`.

A model that `register_model` knows is kept where it has both of

    save() -> bytes        what it has learned, at most `DATA_MAX` bytes, in a form of its own
    load(data) -> None     learn what `save` gave, in this process or another, of this version of the model or an older one. What it
                           raises says that the bytes are no good: it goes on as it was, with one warning
    merge(mine, theirs) -> bytes     optional: what both know, from what two `save` gave; without it the newer replaces the older

The first two are called on the cache's own thread, when it is opened, now and then, and when it is closed; `merge` on another one, so it
goes by its arguments alone. A model that was switched off is not saved. The bytes travel in a sealed record with
the model's name and kind, so what is damaged, too large, or of another model never reaches `load`. NovaFS never runs code that it
finds in a volume, and a model should not either: what is loaded was written by whoever may write the volume, so no pickle.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from typing import Any, Final

import msgspec

from novafs.errors import NovaError, ObjectCorruptError
from novafs.modelstore import PREFIX, load_saved, save_merged
from novafs.objectstore.client import StoreClient
from novafs.prefetch.blob import seal_model, unseal_model
from novafs.registry import NAME_MAX, Guard

log = logging.getLogger(__name__)

PLUGIN: Final = "plugin-"
"""What names of such models begin with, in the volume and for `novafs model`."""
KIND: Final = b"PLUG"
VERSION: Final = 1
DATA_MAX: Final = 4 << 20


class PluginRecord(msgspec.Struct, frozen=True, kw_only=True):
    """name: as registered; kind: "predictor" or "scorer"; data: what `save` gave."""

    name: str
    kind: str
    data: bytes


def plugin_name(saved_name: str) -> str | None:
    """The registered name in one of a saved model, None where it is none of a plugin's."""
    name = saved_name.removeprefix(PLUGIN)
    return name if name != saved_name and name.isidentifier() and len(name) <= NAME_MAX else None


def read_plugin(data: bytes, where: str, name: str) -> PluginRecord:
    """The record, checked. Raises ObjectCorruptError, NewerFormatError."""
    record = unseal_model(KIND, VERSION, data, PluginRecord, where)
    if record.name != name or record.kind not in ("predictor", "scorer") or len(record.data) > DATA_MAX:
        raise ObjectCorruptError(f"{where}: holds {record.kind} {record.name!r:.80} of {len(record.data)} bytes, expected model {name!r}")
    return record


def is_kept(model: object) -> bool:
    """Whether it can be kept."""
    return all(callable(getattr(model, method, None)) for method in ("save", "load"))


class KeptModel:
    """One model of one cache, and what the volume has of it. On the trio thread alone; raises nothing."""

    def __init__(self, name: str, kind: str, model: Any, guard: Guard) -> None:
        """guard: of the calls into it: whether it works."""
        self._guard = guard
        self._name = name
        self._kind = kind
        self._model = model
        self._saved: bytes | None = None
        """What the volume has, as far as known here."""

    async def load(self, client: StoreClient) -> None:
        """Teach the model what the volume has of it."""
        where = f"{PREFIX}{PLUGIN}{self._name}"
        try:
            data = await load_saved(client, PLUGIN + self._name)
            if data is None:
                return
            record = read_plugin(data, where, self._name)
        except NovaError as error:
            log.warning("%s model %r starts without what was saved: %s", self._kind, self._name, error)
            return
        try:
            self._model.load(record.data)
            self._saved = record.data
        except Exception as error:
            log.warning("%s model %r starts without what was saved, which it does not take: %s", self._kind, self._name, _told(error))

    async def save(self, client: StoreClient) -> None:
        """Keep what it has learned, where that is something else than what the volume has."""
        if self._guard.disabled:
            return
        try:
            data = _checked_data(self._model.save())
        except Exception as error:
            log.warning("%s model %r is not saved: %s", self._kind, self._name, _told(error))
            return
        if data == self._saved:
            return
        try:
            await save_merged(client, PLUGIN + self._name, self._sealed(data), self._merged)
        except NovaError as error:
            log.warning("%s model %r is not saved: %s", self._kind, self._name, error)
        else:
            self._saved = data

    def _sealed(self, data: bytes) -> bytes:
        return seal_model(KIND, VERSION, PluginRecord(name=self._name, kind=self._kind, data=data))

    def _merged(self, mine: bytes, theirs: bytes) -> bytes:
        where = f"{PREFIX}{PLUGIN}{self._name}"
        other = read_plugin(theirs, where, self._name)
        merge: Callable[[bytes, bytes], bytes] | None = getattr(self._model, "merge", None)
        if not callable(merge):
            return mine
        try:
            return self._sealed(_checked_data(merge(read_plugin(mine, where, self._name).data, other.data)))
        except Exception as error:
            log.warning("%s model %r could not be joined with what was saved: %s", self._kind, self._name, _told(error))
            return mine


def _checked_data(data: object) -> bytes:
    if not isinstance(data, (bytes, bytearray, memoryview)):
        raise TypeError(f"it gave a {type(data).__name__}, expected bytes")
    if memoryview(data).nbytes > DATA_MAX:
        raise ValueError(f"it gave {memoryview(data).nbytes:,} bytes, at most {DATA_MAX:,} are kept")
    return bytes(data)


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:300]


def merge_plugins(mine: bytes, theirs: bytes) -> bytes:
    """For imports: nobody is there to join them, so `mine`, unless theirs is a newer NovaFS's. Raises NewerFormatError."""
    with contextlib.suppress(ObjectCorruptError):
        unseal_model(KIND, VERSION, theirs, PluginRecord, "the saved model")
    return mine
