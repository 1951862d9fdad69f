"""`novafs stats`: what the daemon of a mount has done so far, or what a volume that is not mounted here holds."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import click

from novafs import statedir
from novafs.cli import common
from novafs.cli.common import Settings
from novafs.config import Config
from novafs.errors import NotFoundError
from novafs.mounttable import NOVAFS_TYPE, canonical, mount_at
from novafs.units import format_duration, format_size

_TIMEOUT_S: Final = 30.0


@click.command()
@click.argument("target", metavar="VOLUME|DIR")
@common.json_option
@common.volume_options
def stats(target: str, as_json: bool, settings: Settings) -> None:
    """Show what a mount has done: hits by tier, requests, bytes.

    Of the mount at DIR, or of VOLUME on this host. Where VOLUME is not mounted here, it is opened for a look.
    """
    state_dir = _state_dir_of_mount(target)
    if state_dir is None:
        config = settings.load(target)
        state_dir = config.state_dir if statedir.holder(config.state_dir) is not None else None
    document = common.run(_unmounted, common.quiet_l2(config)) if state_dir is None else _ask(state_dir)
    if as_json:
        common.emit_json(document)
    else:
        for line in [*summary(document), "", *render(document)]:
            common.emit(line)


def _state_dir_of_mount(target: str) -> Path | None:
    """The state directory of the mount at `target`; None where that is no mount point. Raises NotFoundError for a foreign one."""
    if "://" in target or "\0" in target:
        return None
    path = canonical(target)
    found = mount_at(path)
    if found is None or found.fstype != NOVAFS_TYPE:
        return None
    record = statedir.find_record(path, fuse_uid=found.fuse_uid)
    if record is None:
        raise NotFoundError(
            f"nothing is noted of the mount at {target}: its daemon was started in another way, or by a user you cannot see"
        )
    return Path(record.state_dir)


def _ask(state_dir: Path) -> dict[str, Any]:
    from novafs.control import call  # loads trio

    document: dict[str, Any] = call(state_dir / statedir.CONTROL_SOCKET, "stats", timeout_s=_TIMEOUT_S)
    return document


async def _unmounted(config: Config) -> dict[str, Any]:
    from novafs.volume import open_volume

    async with open_volume(config, read_only=True) as volume:
        usage = await volume.usage()
        return {**volume.statistics(), "usage": asdict(usage), "mounted": False}


def summary(document: dict[str, Any]) -> list[str]:
    """The figures that one looks for first: which tier served how many chunks, and what is not stored yet."""
    cache = document.get("cache", {})
    served = [
        (title, int(cache.get(name, {}).get("hits", 0))) for title, name in (("L1", "l1"), ("L2", "l2_traffic"), ("L3", "l3_traffic"))
    ]
    total = sum(hits for _, hits in served)
    shares = ", ".join(f"{title} {hits:,} ({hits / total:.1%})" if total else f"{title} {hits}" for title, hits in served)
    mount = document.get("mount")
    where = (
        f"mounted at {common.printable(str(mount.get('mountpoint')))} by process {mount.get('pid')}"
        if mount
        else "not mounted on this host"
    )
    return [
        f"{common.printable(str(document.get('volume', {}).get('url')))}, {where}",
        f"chunks served from {shares}",
        f"written and not stored yet: {format_size(document.get('data_at_risk', {}).get('bytes', 0))}",
    ]


def render(document: dict[str, Any], indent: str = "") -> list[str]:
    """A statistics document as lines for people. Units are told by the ends of the names, as everywhere in NovaFS."""
    plain = {name: value for name, value in document.items() if not isinstance(value, (dict, list))}
    if "hits" in plain and "misses" in plain and (asked := plain["hits"] + plain["misses"]):
        plain["hit_rate"] = plain["hits"] / asked
    width = max((len(_title(name)) for name in plain), default=0)
    lines = [f"{indent}{_title(name):<{width}}  {_value(name, value)}" for name, value in plain.items()]
    for name, value in document.items():
        for number, part in enumerate(value if isinstance(value, list) else [value]):
            if isinstance(part, dict):
                lines += [f"{indent}{_title(str(part.get('name', name)))}", *render(part, indent + "  ")] if part else []
            elif isinstance(value, list):
                lines.append(f"{indent}{_title(name)} {number}  {_value(name, part)}")
    return lines


def _title(name: str) -> str:
    for end in ("_bytes", "_s"):
        name = name.removesuffix(end)
    return common.printable(name.replace("_", " "))


def _value(name: str, value: object) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "-"}[value]
    if not isinstance(value, (int, float)):
        return common.printable(str(value))
    if name.endswith("bytes") or name in ("chunk_size", "size"):
        return format_size(value)
    if name.endswith("_s") or name == "seconds":
        return format_duration(value)
    if name.endswith(("_rate", "_share")):
        return f"{value:.1%}"
    if name in ("pid", "format"):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.2f}"
