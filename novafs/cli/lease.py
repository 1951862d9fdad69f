"""`novafs lease`: who may write which image, and taking that away from a host that is dead."""

from __future__ import annotations

import re
import sys
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Final

import click

from novafs.cli import common
from novafs.cli.common import Settings
from novafs.config import Config
from novafs.errors import NotFoundError
from novafs.units import format_duration

if TYPE_CHECKING:
    from novafs.lease import LeaseRecord
    from novafs.volume import Volume

_AT_ONCE: Final = 16
_IMAGE_ID: Final = re.compile("[0-9a-f]{32}")


@dataclass(frozen=True, slots=True)
class Row:
    """One image's lease. state: "held" or "released"; age_s: since the last heartbeat, by the store's clock; ttl_s: how long one counts."""

    image: str
    image_id: str
    epoch: int
    state: str
    host: str
    journal_id: str
    age_s: float
    ttl_s: float
    durability: str
    takeover: str
    generation: int
    committed_ns: int


@click.group()
def lease() -> None:
    """The right to write an image: list who has it, or take it away."""


@lease.command("ls")
@click.argument("volume")
@click.argument("image", required=False)
@click.option("--all", "everything", is_flag=True, help="Released ones, too.")
@common.json_option
@common.volume_options
def ls_(volume: str, image: str | None, everything: bool, as_json: bool, settings: Settings) -> None:
    """List who holds the leases of VOLUME, or of one IMAGE."""
    rows = common.run(_list, common.without_l2(settings.load(volume)), image, everything or image is not None)
    if as_json:
        common.emit_json([asdict(row) for row in rows])
        return
    for row in rows:
        if row.state == "held":
            over = ", may be taken over" if row.age_s > row.ttl_s and _may_expire(row) else ""
            beat = f"heartbeat {format_duration(row.age_s)} ago{over}"
            common.emit(f"{common.printable(row.image)}: held by {common.printable(row.host)} (epoch {row.epoch}, {beat})")
        else:
            common.emit(f"{common.printable(row.image)}: released (epoch {row.epoch})")
    if not rows:
        common.emit("no image is being written")


@lease.command("break")
@click.argument("volume")
@click.argument("image")
@click.option("--yes", is_flag=True, help="Do not ask.")
@common.json_option
@common.volume_options
def break_(volume: str, image: str, yes: bool, as_json: bool, settings: Settings) -> None:
    """Take the lease of IMAGE from its holder.

    IMAGE is a path, or the id of an image without a name. For a host that is dead for good: a living one finds out, stops
    writing, and keeps aside what it had not committed.
    """
    config = common.without_l2(settings.load(volume))
    row = common.run(_one, config, image)
    if row is None or row.state != "held":
        if as_json:
            common.emit_json({"image": image, "broken": False})
        else:
            common.emit(f"{common.printable(image)}: nobody holds its lease")
        return
    for line in _warning(row):
        common.say(line)
    if sys.stdin.isatty() and not yes and not click.confirm("Take the lease away?", default=False, err=True):
        raise click.Abort
    ended = common.run(_break, config, row.image_id)
    if as_json:
        common.emit_json({"image": row.image, "broken": ended is not None, "epoch": ended.epoch if ended is not None else None})
    elif ended is None:
        common.emit(f"{common.printable(row.image)}: it was released meanwhile")
    else:
        common.emit(f"{common.printable(row.image)}: epoch {ended.epoch}, held by {common.printable(ended.host)}, is ended")


def _may_expire(row: Row) -> bool:
    return row.durability == "store" or row.takeover == "auto"


def _warning(row: Row) -> list[str]:
    """What the operator should know first."""
    lines = [f"{common.printable(row.image)}: host {common.printable(row.host)} holds the lease (epoch {row.epoch})"]
    if row.age_s <= row.ttl_s:
        lines.append(f"its heartbeat is {format_duration(row.age_s)} old: that host is most likely alive; close the image there instead")
    if row.durability == "store":
        lines.append(f"nothing that was fsynced is lost: all of it is in generation {row.generation}")
    else:
        lines.append(
            f"what that host fsynced after generation {row.generation} is in its journal alone: the image goes on without it; "
            f"when the host comes back, its mount keeps those writes aside, and 'novafs fsck' there tells how to get at them"
        )
    return lines


async def _list(config: Config, image: str | None, everything: bool) -> list[Row]:
    import trio

    from novafs.asynctools import open_nursery
    from novafs.catalogtree import Kind
    from novafs.lease import PREFIX
    from novafs.volume import open_volume

    async with open_volume(config, read_only=True) as volume:
        if image is not None:
            row = await _row(volume, *await _resolve(volume, image))
            return [row] if row is not None else []
        paths = {e.node_id: volume.catalog.path_of(e) async for e in volume.catalog.walk() if e.kind is Kind.IMAGE}
        ids = {info.name.split("/")[1] for info in await volume.client.list(PREFIX)}
        rows: list[Row] = []
        slots = trio.CapacityLimiter(_AT_ONCE)

        async def look(text: str) -> None:
            image_id = bytes.fromhex(text)
            async with slots:
                row = await _row(volume, image_id, paths.get(image_id, f"image {text}"))
            if row is not None and (everything or row.state == "held"):
                rows.append(row)

        async with open_nursery() as nursery:
            for text in ids:
                nursery.start_soon(look, text)
        return sorted(rows, key=lambda row: row.image)


async def _one(config: Config, image: str) -> Row | None:
    from novafs.volume import open_volume

    async with open_volume(config, read_only=True) as volume:
        return await _row(volume, *await _resolve(volume, image))


async def _break(config: Config, image_id: str) -> LeaseRecord | None:
    from novafs.lease import break_lease
    from novafs.volume import open_volume

    async with open_volume(config) as volume:
        return await break_lease(volume.client, bytes.fromhex(image_id))


async def _resolve(volume: Volume, image: str) -> tuple[bytes, str]:
    """Image id, and how to call it. Raises NotFoundError."""
    try:
        entry = await volume.catalog.resolve(image)
    except NotFoundError:
        if not _IMAGE_ID.fullmatch(image):
            raise
        return bytes.fromhex(image), f"image {image}"
    return entry.node_id, volume.catalog.path_of(entry)


async def _row(volume: Volume, image_id: bytes, path: str) -> Row | None:
    from novafs.generation import generation_chain
    from novafs.lease import lease_prefix, read_lease

    record = await read_lease(volume.client, image_id)
    if record is None:
        return None
    infos = await volume.client.list(lease_prefix(image_id), limit=1)
    age_s = max(0.0, await volume.client.clock_s() - infos[0].modified_s) if infos else 0.0
    head: Any = await generation_chain(volume.client, image_id).head()
    return Row(
        image=path,
        image_id=image_id.hex(),
        epoch=record.epoch,
        state="released" if record.released else "held",
        host=record.host,
        journal_id=record.journal_id.hex(),
        age_s=age_s,
        ttl_s=record.ttl_s,
        durability=record.durability,
        takeover=record.takeover,
        generation=head.record.counter if head is not None else -1,
        committed_ns=head.record.committed_ns if head is not None else 0,
    )
