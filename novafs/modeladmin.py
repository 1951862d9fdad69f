"""What an operator does with saved models: list, take out, put in, reset; `novafs model` and its part in a running mount.

A model comes from a file that anybody may have written, so it is believed no more than one from the store: sealed records of numbers and
texts, with limits on everything, and no code in them (`novafs.prefetch.blob`). What does not parse, is too large, or is of another kind,
version or chunk size is refused by name, and nothing is changed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import trio

from novafs.errors import ConfigError, NotFoundError, NovaError, ObjectCorruptError, RetryableError
from novafs.eviction.learned import LearnedPolicy
from novafs.keymodel import KeyModel
from novafs.keyprefetch import NAME as KEYS
from novafs.keyprefetch import merge_keys
from novafs.modelstore import EVICTION, PREFIX, TRIES_MAX, create_model, merge_saved, model_key, model_prefix, model_revisions, newest_model
from novafs.pluginmodels import PLUGIN, merge_plugins, plugin_name, read_plugin
from novafs.prefetch.blob import BLOB_MAX
from novafs.prefetch.gate import Gate
from novafs.prefetch.markov import TransitionTable
from novafs.prefetch.model import GATE, LSTM, NAMES, PROFILES, TRANSITIONS
from novafs.prefetch.profile import ProfileBook
from novafs.prefetch.shelf import DeltaShelf
from novafs.volume import Volume

Check = Callable[[bytes, str, int], str]
"""Parse a model (bytes, what it is called, chunk size) and say what is in it. Raises ObjectCorruptError, NewerFormatError."""


def _transitions(data: bytes, name: str, chunk_size: int) -> str:
    return f"{len(TransitionTable.from_bytes(data, name, chunk_size=chunk_size)):,} states"


def _gate(data: bytes, name: str, _: int) -> str:
    Gate.from_bytes(data, name)
    return "weights and calibration"


def _profiles(data: bytes, name: str, chunk_size: int) -> str:
    return f"{len(ProfileBook.from_bytes(data, name, chunk_size=chunk_size)):,} boots"


def _lstm(data: bytes, name: str, chunk_size: int) -> str:
    return f"{len(DeltaShelf.from_bytes(data, name, chunk_size=chunk_size)):,} networks"


def _eviction(data: bytes, name: str, _: int) -> str:
    LearnedPolicy().load(data, name)
    return "a forest"


def _keys(data: bytes, name: str, _: int) -> str:
    return f"{len(KeyModel.from_bytes(data, name)):,} keys"


CHECKS: Final[Mapping[str, Check]] = {
    TRANSITIONS: _transitions,
    GATE: _gate,
    PROFILES: _profiles,
    LSTM: _lstm,
    EVICTION: _eviction,
    KEYS: _keys,
}
"""Every model of NovaFS's own."""

ABOUT: Final[Mapping[str, str]] = {
    TRANSITIONS: "which content follows which",
    GATE: "what a prefetch is worth",
    PROFILES: "what images read after they are opened",
    LSTM: "networks for families of images",
    EVICTION: "what L1 should keep",
    KEYS: "which key follows which, for the library",
}
ABOUT_PLUGIN: Final = "a program's own"


@dataclass(frozen=True, slots=True)
class SavedModel:
    """One model of a volume. revision: counts its saves; contents: in words; error: why it is no good, or nothing."""

    name: str
    about: str
    revision: int
    size: int
    saved_s: float
    contents: str
    error: str


def check_name(name: str) -> str:
    """`name`, where it is a model's. Raises ConfigError."""
    if name not in CHECKS and plugin_name(name) is None:
        raise ConfigError(f"{name!r} is no model: expected one of {', '.join(CHECKS)}, or {PLUGIN} and the name that a program registered")
    return name


def _check_of(name: str) -> Check:
    known = CHECKS.get(name)
    if known is not None:
        return known
    registered = plugin_name(check_name(name)) or ""

    def check(data: bytes, where: str, _: int) -> str:
        record = read_plugin(data, where, registered)
        return f"{record.kind} of a program, {len(record.data):,} bytes"

    return check


async def plugin_names(volume: Volume) -> list[str]:
    """Models of programs that the volume has, sorted. Raises what the store raises."""
    prefix = PREFIX + PLUGIN
    names = {info.name.removeprefix(PREFIX).partition("/")[0] for info in await volume.client.list(prefix)}
    return sorted(name for name in names if plugin_name(name) is not None)


async def list_models(volume: Volume) -> list[SavedModel]:
    """Those that the volume has. Raises what the store raises."""
    found = []
    for name in (*CHECKS, *await plugin_names(volume)):
        infos = await model_revisions(volume.client, name, newest=True)
        newest = await newest_model(volume.client, name) if infos else None
        if newest is None:
            continue
        contents = error = ""
        try:
            contents = await trio.to_thread.run_sync(_check_of(name), newest[1], f"{PREFIX}{name}", volume.chunk_size)
        except NovaError as problem:
            error = str(problem)
        found.append(SavedModel(name, ABOUT.get(name, ABOUT_PLUGIN), newest[0], infos[0].size, infos[0].modified_s, contents, error))
    return found


async def export_model(volume: Volume, name: str) -> bytes:
    """A model's bytes. Raises NotFoundError, ObjectCorruptError."""
    newest = await newest_model(volume.client, check_name(name))
    if newest is None:
        raise NotFoundError(f"{volume.client.url}: has no model {name!r}; 'novafs model ls' shows those it has")
    await trio.to_thread.run_sync(_check_of(name), newest[1], f"{PREFIX}{name}", volume.chunk_size)
    return newest[1]


async def import_model(volume: Volume, name: str, data: bytes, source: str, *, replace: bool = False) -> str:
    """Join a model with the volume's, or put it in its place; what it holds, in words.

    source: where it comes from, for messages. Raises ObjectCorruptError, NewerFormatError, which name it, and what the store raises.
    """
    volume.check_writable()
    if len(data) > BLOB_MAX:
        raise ObjectCorruptError(f"{source}: has more than the {BLOB_MAX:,} bytes that a model can have")
    contents = await trio.to_thread.run_sync(_check_of(check_name(name)), data, source, volume.chunk_size)
    merge = merge_keys if name == KEYS else merge_plugins if name not in CHECKS else lambda mine, theirs: merge_saved(name, mine, theirs)
    for _ in range(TRIES_MAX):
        newest = await newest_model(volume.client, name)
        blob = data
        if newest is not None and not replace:
            try:
                blob = await trio.to_thread.run_sync(merge, data, newest[1])
            except ObjectCorruptError:
                blob = data  # what is there is no good
        if await create_model(volume.client, name, newest[0] + 1 if newest is not None else 0, blob):
            return contents
    raise RetryableError(f"{volume.client.url}: model {name!r} is saved by other hosts all the time; try again")


async def reset_models(volume: Volume, names: Sequence[str], *, plugins: bool = False) -> list[str]:
    """Forget what was learned, in the store and in L2; the names of those that were there. plugins: all that programs brought as well."""
    volume.check_writable()
    gone = []
    for name in dict.fromkeys([*names, *(await plugin_names(volume) if plugins else ())]):
        infos = await volume.client.list(model_prefix(check_name(name)))
        await volume.client.delete_many([info.name for info in infos])
        if infos:
            gone.append(name)
    if volume.cache.l2 is not None:
        l2, ids = volume.cache.l2, [model_key(volume.superblock.volume_id, name) for name in names]
        await trio.to_thread.run_sync(lambda: l2.delete_many(ids))
    return gone


async def models_changed(volume: Volume, request: Mapping[str, Any]) -> dict[str, Any]:
    """For a running mount: models in the store were reset or imported; go by it. {"names", "reset"} → what this mount could do."""
    names = [check_name(str(name)) for name in request["names"]]
    if volume.models is None:
        return {"applied": [], "left": names}
    applied = await volume.models.changed(names, reset=bool(request.get("reset")))
    return {"applied": applied, "left": [name for name in names if name not in applied], "time": time.time()}


__all__ = ["ABOUT", "CHECKS", "NAMES", "SavedModel", "export_model", "import_model", "list_models", "models_changed", "reset_models"]
