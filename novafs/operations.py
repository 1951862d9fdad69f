"""What can be asked of a volume by name, mounted or not: `clone`, `snapshot`, `snapshots`, `rollback`, ….

Where a daemon has the volume's state directory, the command line asks it through the control socket: only the daemon
knows what was written and not committed yet. Otherwise the command takes the state directory's lock and does it here.
Arguments and results are what JSON can hold, so both ways are the same.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, Final

import trio

from novafs import aside, control, cooling, handoff, snapshots, statedir, warming
from novafs.catalogtree import Entry, split_path
from novafs.config import Config
from novafs.errors import InvalidNameError
from novafs.statedir import CONTROL_SOCKET, StateLock
from novafs.volume import Volume, open_volume

Operation = Callable[[Volume, Mapping[str, Any]], Awaitable[Any]]
CALL_TIMEOUT_S: Final = 600.0


async def _image(volume: Volume, request: Mapping[str, Any], key: str = "image") -> Entry:
    return await volume.catalog.resolve(str(request[key]), max_age_s=0)


async def _place(volume: Volume, path: str) -> tuple[bytes, str]:
    """Parent and name for a new image. Raises InvalidNameError, NotFoundError."""
    parts = split_path(path)
    if not parts:
        raise InvalidNameError(f"{path!r}: is no name for an image")
    parent = await volume.catalog.resolve("/".join(parts[:-1]), max_age_s=0)
    return parent.node_id, parts[-1]


async def _clone(volume: Volume, request: Mapping[str, Any]) -> Any:
    entry = await _image(volume, request, "source")
    parent_id, name = await _place(volume, str(request["target"]))
    ttl_s = request.get("ttl_s")
    made = await snapshots.clone(
        volume, entry, parent_id, name, snapshot=request.get("snapshot"), expires_s=None if ttl_s is None else time.time() + float(ttl_s)
    )
    return {"image": volume.catalog.path_of(made), "size": made.size, "id": made.node_id.hex()}


async def _snapshot(volume: Volume, request: Mapping[str, Any]) -> Any:
    entry = await _image(volume, request)
    if request.get("delete"):
        await snapshots.delete_snapshot(volume, entry, str(request["name"]))
        return {"image": volume.catalog.path_of(entry), "deleted": request["name"]}
    taken = await snapshots.take_snapshot(volume, entry, str(request["name"]))
    return {"image": volume.catalog.path_of(entry), "name": request["name"], "generation": taken.counter, "size": taken.size}


async def _snapshots(volume: Volume, request: Mapping[str, Any]) -> Any:
    entry = await _image(volume, request)
    rows = sorted(entry.snapshots.items(), key=lambda item: item[1].created_ns)
    return [{"name": name, "created_ns": s.created_ns, "generation": s.counter, "size": s.size} for name, s in rows]


async def _rollback(volume: Volume, request: Mapping[str, Any]) -> Any:
    entry = await _image(volume, request)
    image = await snapshots.roll_back(volume, entry, str(request["name"]))
    return {"image": volume.catalog.path_of(entry), "generation": image.generation, "size": image.size}


async def _apply_aside(volume: Volume, request: Mapping[str, Any]) -> Any:
    path = Path(str(request["path"]))
    segment = await trio.to_thread.run_sync(aside.read_aside, path)
    wanted = request.get("image_id")
    try:
        image_id = bytes.fromhex(str(wanted)) if wanted is not None else None
    except ValueError as error:
        raise InvalidNameError(f"{wanted!r}: is no image id; 'novafs fsck' shows them") from error
    made = await aside.apply_aside(volume, path, segment, str(request["name"]), image_id=image_id, onto=request.get("onto"))
    return {"image": volume.catalog.path_of(made), "id": made.node_id.hex()}


async def _reading(volume: Volume, request: Mapping[str, Any]) -> Any:
    entry = await _image(volume, request)
    return volume.prefetcher.describe(entry.node_id) if volume.prefetcher is not None else {}


async def _warm_plan(volume: Volume, request: Mapping[str, Any]) -> Any:
    return await warming.plan(volume, dict(request))


async def _warm(volume: Volume, request: Mapping[str, Any]) -> Any:
    return await warming.step(volume, dict(request))


async def _handoff(volume: Volume, request: Mapping[str, Any]) -> Any:
    entry = await _image(volume, request)
    return await handoff.hand_off(volume, entry, str(request["to"]), timeout_s=float(request.get("patience_s", 30.0)))


async def _models_changed(volume: Volume, request: Mapping[str, Any]) -> Any:
    from novafs.modeladmin import models_changed  # imports every model

    return await models_changed(volume, request)


OPERATIONS: Final[Mapping[str, Operation]] = {
    "clone": _clone,
    "snapshot": _snapshot,
    "snapshots": _snapshots,
    "rollback": _rollback,
    "apply_aside": _apply_aside,
    "reading": _reading,
    "handoff": _handoff,
    "models_changed": _models_changed,
    "warm_plan": _warm_plan,
    "warm": _warm,
    "cool": cooling.cool_by_name,
}


async def perform(config: Config, op: str, **request: Any) -> Any:
    """Do one operation on the volume of `config`, through its daemon where there is one. Raises what the operation raises."""
    if statedir.is_locked(config.state_dir):
        return await trio.to_thread.run_sync(
            lambda: control.call(config.state_dir / CONTROL_SOCKET, op, timeout_s=CALL_TIMEOUT_S, **request), abandon_on_cancel=True
        )
    statedir.prepare(config.state_dir)
    lock = StateLock.take(config.state_dir, mountpoint=f"novafs {op}")
    try:
        async with open_volume(config, owns_state=True) as volume:
            return await OPERATIONS[op](volume, request)
    finally:
        lock.release()
