"""`novafs info`: what a volume or an image is, and what storing it costs."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import asdict
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

import click

from novafs import statedir
from novafs.cli import common
from novafs.cli.common import Settings
from novafs.config import Config
from novafs.errors import IsDirectoryError, NovaError
from novafs.units import format_duration, format_size

if TYPE_CHECKING:
    from novafs.catalogtree import Entry
    from novafs.volume import Volume

_AT_ONCE: Final = 16
_TIMEOUT_S: Final = 5.0


@click.command()
@click.argument("volume")
@click.argument("image", required=False)
@click.option("--settings", "show_settings", is_flag=True, help="Show every setting and where it comes from, without opening the volume.")
@common.json_option
@common.volume_options
def info(volume: str, image: str | None, show_settings: bool, as_json: bool, settings: Settings) -> None:
    """Show what VOLUME or IMAGE is and holds.

    Size, what is stored of it, holes, dedup and compression.
    """
    config = settings.load(volume)
    if show_settings:
        _show_settings(config, as_json)
        return
    config = common.without_l2(config)
    document = common.run(_image_info, config, image) if image is not None else common.run(_volume_info, config)
    if image is not None:
        document["reading"] = _reading(config, image)
    if as_json:
        common.emit_json(document)
    elif image is not None:
        _show_image(document)
    else:
        _show_volume(document)


def _show_settings(config: Config, as_json: bool) -> None:
    rows = config.describe()
    if as_json:
        common.emit_json({row.name: {"value": row.value, "origin": row.origin} for row in rows})
    else:
        common.emit_table([(row.name, f"{row.value}  ({row.origin})") for row in rows])


async def _image_info(config: Config, path: str) -> dict[str, Any]:
    from novafs.catalogtree import Kind
    from novafs.volume import open_volume

    async with open_volume(config, read_only=True) as volume:
        entry = await volume.catalog.resolve(path)
        if entry.kind is Kind.DIRECTORY:
            raise IsDirectoryError(f"{path or '/'}: is a directory; 'novafs ls' lists it")
        image = await volume.open_image(entry.node_id)
        try:
            figures = asdict(await image.statistics())
            return {
                "path": volume.catalog.path_of(entry),
                "id": entry.node_id.hex(),
                "mtime_ns": image.mtime_ns,
                "mode": entry.mode,
                "uid": entry.uid,
                "gid": entry.gid,
                "chunk_size": volume.chunk_size,
                **figures,
                "allocated_bytes": figures["allocated_chunks"] * volume.chunk_size,
                "hole_bytes": figures["hole_chunks"] * volume.chunk_size,
            }
        finally:
            await volume.close_image(image)


def _reading(config: Config, image: str) -> dict[str, Any]:
    """What the daemon that serves the volume on this host has seen of reads of the image; empty where there is none."""
    from novafs.control import call

    if not statedir.is_locked(config.state_dir):
        return {}
    try:
        found: dict[str, Any] = call(config.state_dir / statedir.CONTROL_SOCKET, "reading", timeout_s=_TIMEOUT_S, image=image)
    except NovaError as error:
        common.say(f"the daemon does not say how the image is read: {error}")
        return {}
    return found


def _read_as(reading: dict[str, Any]) -> str:
    text = str(reading["pattern"])
    if reading.get("period_s"):
        text += f" every {format_duration(reading['period_s'])}"
    if reading.get("usual_hours_utc"):
        text += f", usually at {', '.join(reading['usual_hours_utc'])} UTC"
    return text


def _prefetched(reading: dict[str, Any]) -> str:
    figures = [f"{name} {reading[name]:.1%}" for name in ("accuracy", "coverage") if reading.get(name) is not None]
    return f"{reading['issued']:,} chunks: {reading['used']:,} used, {reading['late']:,} late, {reading['wasted']:,} wasted" + (
        f" ({', '.join(figures)})" if figures else ""
    )


def _show_image(found: dict[str, Any]) -> None:
    reading = found["reading"]
    chunks = f"{found['allocated_chunks']:,} chunks, {found['unique_chunks']:,} different"
    common.emit_table(
        [
            ("image", common.printable(found["path"])),
            ("id", found["id"]),
            ("generation", found["generation"]),
            ("changed", _when(found["mtime_ns"])),
            ("size", common.with_bytes(found["size"])),
            ("data", f"{common.with_bytes(found['allocated_bytes'])} in {chunks}"),
            ("holes", common.with_bytes(found["hole_bytes"])),
            ("stored", common.with_bytes(found["unique_stored_bytes"])),
            ("dedup", common.ratio(found["dedup_ratio"]) + "  (within the image)"),
            ("compression", common.ratio(found["compression_ratio"])),
            *([("read here", _read_as(reading)), ("prefetched", _prefetched(reading))] if reading else []),
        ]
    )


async def _volume_info(config: Config) -> dict[str, Any]:
    import trio

    from novafs.asynctools import open_nursery
    from novafs.catalogtree import Kind
    from novafs.generation import generation_chain
    from novafs.volume import open_volume

    async with open_volume(config, read_only=True) as volume:
        totals = {"images": 0, "directories": 0, "size_bytes": 0, "allocated_bytes": 0, "referenced_bytes": 0}
        places = trio.Semaphore(_AT_ONCE)

        async def add(entry: Entry) -> None:
            try:
                head = await generation_chain(volume.client, entry.node_id).head()
            finally:
                places.release()
            if head is not None:  # else another host removes it at this moment
                totals["size_bytes"] += head.record.size
                totals["allocated_bytes"] += head.record.allocated_chunks * volume.chunk_size
                totals["referenced_bytes"] += head.record.stored_bytes

        async with open_nursery() as nursery, aclosing(_walk(volume)) as entries:
            async for entry in entries:
                totals["directories" if entry.kind is Kind.DIRECTORY else "images"] += 1
                if entry.kind is not Kind.DIRECTORY:
                    await places.acquire()
                    nursery.start_soon(add, entry)
        usage = await volume.usage()
        superblock = volume.superblock
        return {
            "url": volume.client.store.url,
            "id": superblock.volume_id,
            "format": superblock.format,
            "features": list(superblock.features),
            "chunk_size": superblock.chunk_size,
            "hash": superblock.hash,
            "created": superblock.created,
            "catalog_revision": volume.catalog.revision,
            **totals,
            "used_bytes": usage.used_bytes,
            "capacity_bytes": usage.capacity_bytes,
            "dedup_ratio": _quotient(totals["referenced_bytes"], usage.used_bytes),
            "compression_ratio": _quotient(totals["allocated_bytes"], totals["referenced_bytes"]),
        }


async def _walk(volume: Volume) -> AsyncGenerator[Entry, None]:
    """Every entry below the root; with a list of what is left, so that no depth is too deep."""
    from novafs.catalogtree import ROOT_ID, Kind

    left = [ROOT_ID]
    while left:
        for entry in await volume.catalog.list(left.pop()):
            if entry.kind is Kind.DIRECTORY:
                left.append(entry.node_id)
            yield entry


def _quotient(dividend: int, divisor: int) -> float:
    return dividend / divisor if dividend and divisor else 1.0


def _show_volume(found: dict[str, Any]) -> None:
    made_as = " with ".join([str(found["format"]), *found["features"]])
    common.emit_table(
        [
            ("volume", found["url"]),
            ("id", found["id"]),
            ("made", found["created"]),
            ("format", f"{made_as}, chunks of {format_size(found['chunk_size'])}, {found['hash']}"),
            (
                "holds",
                f"{found['images']:,} images in {found['directories'] + 1:,} directories; catalog revision {found['catalog_revision']}",
            ),
            ("size of the images", common.with_bytes(found["size_bytes"])),
            ("of it data", common.with_bytes(found["allocated_bytes"])),
            ("compressed", f"{common.with_bytes(found['referenced_bytes'])}, {common.ratio(found['compression_ratio'])}"),
            ("stored", f"{common.with_bytes(found['used_bytes'])}, dedup {common.ratio(found['dedup_ratio'])}"),
            ("capacity", common.with_bytes(found["capacity_bytes"])),
        ]
    )


def _when(time_ns: int) -> str:
    return datetime.fromtimestamp(time_ns / 1e9, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
