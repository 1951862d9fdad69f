"""`novafs stats`: what the daemon of a mount has done so far, or what a volume that is not mounted here holds."""

from __future__ import annotations

import contextlib
import itertools
import json
import time
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
from novafs.statusview import at, facts, hit_rate
from novafs.units import format_duration, format_size

_TIMEOUT_S: Final = 30.0
HEADING_LINES: Final = 20


@click.command()
@click.argument("target", metavar="VOLUME|DIR")
@common.json_option
@click.option(
    "--watch",
    type=click.FloatRange(0.2, 86400),
    is_flag=False,
    flag_value=2.0,
    metavar="[S]",
    help="Again every S seconds (2), with what has changed, until Ctrl-C. With --json: one document a line.",
)
@common.volume_options
def stats(target: str, as_json: bool, watch: float | None, settings: Settings) -> None:
    """Show what a mount has done: hits by tier, requests, bytes.

    Of the mount at DIR, or of VOLUME on this host. Where VOLUME is not mounted here, it is opened for a look.
    """
    state_dir = state_dir_of(target, settings)
    if watch is not None:
        if state_dir is None:
            raise NotFoundError(f"{target} is not mounted on this host: there is nothing to watch")
        with contextlib.suppress(KeyboardInterrupt):
            _watch(state_dir, watch, as_json=as_json)
        return
    document = common.run(_unmounted, common.quiet_l2(settings.load(target))) if state_dir is None else _ask(state_dir)
    if as_json:
        common.emit_json(document)
    else:
        for line in [*summary(document), "", *render(document)]:
            common.emit(line)


def _watch(state_dir: Path, interval_s: float, *, as_json: bool) -> None:
    """A line each time: what was done since the one before; the first is of since the start. A heading now and then, as vmstat has it."""
    then: dict[str, Any] | None = None
    for number in itertools.count():
        now = {**_ask(state_dir), "time_s": time.time()}
        if as_json:
            print(json.dumps(now, default=str), flush=True)
        else:
            if number % HEADING_LINES == 0:
                print(HEADING, flush=True)
            print(watch_line(now, then), flush=True)
        then = now
        time.sleep(interval_s)


_WIDTHS: Final = {
    "time": 8,
    "reads/s": 10,
    "read/s": 11,
    "writes/s": 10,
    "written/s": 11,
    "hit L1": 8,
    "hit L2": 8,
    "L2 up": 6,
    "at risk": 10,
    "oldest": 9,
    "commits": 8,
    "errors": 7,
}
HEADING: Final = "".join(f"{title:>{width}}" for title, width in _WIDTHS.items())


def watch_line(now: dict[str, Any], then: dict[str, Any] | None) -> str:
    """What has been done between two looks, or since the start, in one line under `HEADING`."""
    since = then if then is not None else {"time_s": now["time_s"] - (at(now, "mount.uptime_s") or 0.0)} | _zeros(now)
    found, l2 = facts(now, since), at(now, "cache.l2.up")
    errors = sum((at(now, "mount.errors") or {}).values()) - sum((at(since, "mount.errors") or {}).values())
    cells = [
        time.strftime("%H:%M:%S", time.localtime(now["time_s"])),
        f"{found.reads or 0:,.0f}",
        format_size(int(found.read_bytes or 0)),
        f"{found.writes or 0:,.0f}",
        format_size(int(found.written_bytes or 0)),
        *("-" if rate is None else f"{rate:.1%}" for rate in (found.hit_rate, hit_rate(now, then, "cache.l2_traffic"))),
        "-" if l2 is None else "yes" if l2 else "NO",
        format_size(found.dirty_bytes),
        format_duration(found.dirty_age_s),
        str((at(now, "commits") or 0) - (at(since, "commits") or 0)),
        str(errors),
    ]
    return "".join(f"{cell:>{width}}" for cell, width in zip(cells, _WIDTHS.values(), strict=True))


def _zeros(now: dict[str, Any]) -> dict[str, Any]:
    """A look at the counters as they were when the daemon began."""
    return {"traffic": dict.fromkeys(now.get("traffic", {}), 0)}


def state_dir_of(target: str, settings: Settings) -> Path | None:
    """The state directory of the daemon that has `target`, a mount point or a volume; None where none has."""
    state_dir = state_dir_of_mount(target)
    if state_dir is None:
        configured = settings.load(target).state_dir
        state_dir = configured if statedir.holder(configured) is not None else None
    return state_dir


def state_dir_of_mount(target: str) -> Path | None:
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
