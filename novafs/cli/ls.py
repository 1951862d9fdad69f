"""`novafs ls`: what is in a volume, in columns like those of `ls -l`."""

from __future__ import annotations

import grp
import pwd
import stat
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

import click

from novafs.cli import common
from novafs.cli.common import Settings
from novafs.config import Config
from novafs.units import format_size

if TYPE_CHECKING:
    from novafs.catalogtree import Entry
    from novafs.volume import Volume

EXACT_MAX: Final = 256
"""Up to so many images each one's head is read; beyond, size and times are those of the last commit that the catalog knows of."""
_AT_ONCE: Final = 16


@click.command()
@click.argument("volume")
@click.argument("path", required=False, default="")
@click.option("--human", "-H", is_flag=True, help="Sizes in KiB, MiB, …")
@common.json_option
@common.volume_options
def ls(volume: str, path: str, human: bool, as_json: bool, settings: Settings) -> None:
    """List a directory of VOLUME, or one image.

    The columns are mode, owner, group, size, bytes really stored, time of the last change, name.
    """
    rows = common.run(_list, common.without_l2(settings.load(volume)), path)
    if as_json:
        common.emit_json(rows)
        return
    size: Callable[[int], str] = format_size if human else str
    table = [_columns(row, size) for row in rows]
    widths = [max((len(line[at]) for line in table), default=0) for at in range(5)]
    for mode, owner, group, size_text, stored, when, name in table:
        common.emit(
            f"{mode:<{widths[0]}} {owner:<{widths[1]}} {group:<{widths[2]}} {size_text:>{widths[3]}} {stored:>{widths[4]}} {when} {name}"
        )


def _columns(row: dict[str, Any], size: Callable[[int], str]) -> list[str]:
    kind = stat.S_IFDIR if row["kind"] == "directory" else stat.S_IFREG
    when = time.strftime("%Y-%m-%d %H:%M", time.localtime(row["mtime_ns"] / 1e9))
    name = common.printable(row["name"]) + ("/" if row["kind"] == "directory" else "")
    owner, group = _user(row["uid"]), _group(row["gid"])
    return [stat.filemode(kind | row["mode"]), owner, group, size(row["size"]), size(row["stored_bytes"]), when, name]


def _user(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def _group(gid: int) -> str:
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return str(gid)


async def _list(config: Config, path: str) -> list[dict[str, Any]]:
    from novafs.catalogtree import Kind
    from novafs.volume import open_volume

    async with open_volume(config, read_only=True) as volume:
        entry = await volume.catalog.resolve(path)
        entries = await volume.catalog.list(entry.node_id) if entry.kind is Kind.DIRECTORY else [entry]
        return await _rows(volume, entries)


async def _rows(volume: Volume, entries: list[Entry]) -> list[dict[str, Any]]:
    import trio

    from novafs.asynctools import open_nursery

    hint = len(entries) > EXACT_MAX
    found: dict[bytes, dict[str, Any]] = {}
    places = trio.CapacityLimiter(_AT_ONCE)

    async def look(entry: Entry) -> None:
        async with places:
            attributes = await volume.attributes(entry, hint=hint)
        found[entry.node_id] = {
            "name": entry.name,
            "kind": entry.kind.name.lower(),
            "mode": entry.mode,
            "uid": entry.uid,
            "gid": entry.gid,
            "size": attributes.size,
            "stored_bytes": attributes.stored_bytes,
            "mtime_ns": attributes.mtime_ns,
            "id": entry.node_id.hex(),
        }

    async with open_nursery() as nursery:
        for entry in entries:
            nursery.start_soon(look, entry)
    return [found[entry.node_id] for entry in entries]
