"""`novafs top`: what a mount is doing now, refreshed in the terminal."""

from __future__ import annotations

import contextlib
import select
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from novafs import statedir
from novafs.cli import common
from novafs.cli.stats import state_dir_of
from novafs.errors import ConfigError, NotFoundError, NovaError, UnsupportedError
from novafs.statusview import STATES, TIERS, Look, at, facts, hit_rate, rate, strip
from novafs.units import format_duration, format_size

if TYPE_CHECKING:
    from rich.console import RenderableType

_TIMEOUT_S: Final = 10.0
_IMAGES_MAX: Final = 8
_EVENTS_MAX: Final = 8
_COLOURS: Final = {
    "dirty": "dark_orange",
    "l1": "dodger_blue2",
    "prefetched": "sky_blue1",
    "l2": "medium_purple",
    "hole": "grey30",
    "store": "grey50",
}
_SIGNS: Final = {"dirty": "!", "l1": "█", "prefetched": "▓", "l2": "▒", "hole": " ", "store": "·"}
"""Told by form as well as by colour."""
_WORDS: Final = {
    "dirty": "not stored yet",
    "l1": "in L1",
    "prefetched": "prefetched",
    "l2": "in L2",
    "hole": "hole",
    "store": "in the store only",
}


@click.command()
@click.argument("target", metavar="DIR|VOLUME")
@click.option(
    "-n", "--interval", type=click.FloatRange(0.2, 3600), default=1.0, show_default=True, metavar="S", help="Seconds between two looks."
)
@common.volume_options
def top(target: str, interval: float, settings: common.Settings) -> None:
    """Show what the mount at DIR is doing, until q or Ctrl-C.

    Reads, writes, hit rates, latencies, data at risk, what of each open image is in which tier, and events. Where the output is no
    terminal it is shown once.
    """
    state_dir = state_dir_of(target, settings)
    if state_dir is None:
        raise NotFoundError(f"{target} is not mounted on this host: there is nothing to watch")
    from rich.console import Console

    console = Console()
    with contextlib.suppress(KeyboardInterrupt):
        if console.is_terminal:
            _refresh(console, state_dir, interval)
        else:
            first = look(state_dir)
            time.sleep(min(1.0, interval))
            second = look(state_dir)
            console.print(screen(second, first, _maps(state_dir, second), width=console.width))


def look(state_dir: Path) -> dict[str, Any]:
    """Ask the daemon. Raises what `control.call` raises."""
    from novafs.control import call  # loads trio

    try:
        found: dict[str, Any] = call(state_dir / statedir.CONTROL_SOCKET, "status", timeout_s=_TIMEOUT_S)
    except ConfigError as error:  # the operation is not known there
        raise UnsupportedError(
            f"the volume with the state directory {state_dir} is open in a program, or in a mount of an older version, which has no such "
            f"figures; 'novafs stats --watch' shows what it has"
        ) from error
    return found


def _maps(state_dir: Path, now: Look) -> dict[str, Any]:
    """Residency of the images that are shown; those that were closed meanwhile are left out."""
    from novafs.control import call

    found = {}
    for image in now["images"][:_IMAGES_MAX]:
        with contextlib.suppress(NotFoundError):
            found[image["id"]] = call(state_dir / statedir.CONTROL_SOCKET, "residency", timeout_s=_TIMEOUT_S, image=image["id"])
    return found


def _refresh(console: Any, state_dir: Path, interval_s: float) -> None:
    from rich.live import Live

    now, then = look(state_dir), None
    with _keys() as pressed, Live(console=console, screen=True, auto_refresh=False) as live:
        while True:
            live.update(screen(now, then, _maps(state_dir, now), width=console.width, height=console.height), refresh=True)
            if pressed(interval_s):
                return
            then = now
            try:
                now = look(state_dir)
            except NovaError as error:
                raise NotFoundError(f"the mount has ended, or does not answer: {error}") from error


@contextlib.contextmanager
def _keys() -> Iterator[Any]:
    """`pressed(seconds)`: whether q was pressed within that time. Keys are not echoed meanwhile; what the terminal was is put back."""
    if not sys.stdin.isatty():
        yield lambda seconds: time.sleep(seconds)
        return
    import termios
    import tty

    descriptor = sys.stdin.fileno()
    before = termios.tcgetattr(descriptor)

    def pressed(seconds: float) -> bool:
        until_s = time.monotonic() + seconds
        while (rest_s := until_s - time.monotonic()) > 0:
            if select.select([descriptor], [], [], rest_s)[0]:
                key = sys.stdin.read(1)
                if key in ("q", "Q", "\x04", ""):
                    return True
                if key in (" ", "\n"):
                    return False  # look again at once
        return False

    try:
        tty.setcbreak(descriptor)
        yield pressed
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)


# --- what is shown ------------------------------------------------------------------------------------------------


def screen(now: Look, then: Look | None, maps: dict[str, Any], *, width: int, height: int = 1000) -> RenderableType:
    """Everything, for a terminal of that size. Texts from outside are text: neither markup nor control characters of theirs count."""
    from rich.console import Group

    parts = [_head(now), _now(now, then), _tiers(now, then), _latency(now)]
    left = max(3, height - 26)
    parts.append(_images(now, then, maps, width, most=min(_IMAGES_MAX, max(1, left // 3))))
    parts.append(_events(now, most=min(_EVENTS_MAX, max(2, left // 3))))
    return Group(*parts)


def _text(words: str, style: str = "") -> Any:
    from rich.text import Text

    return Text(common.printable(words), style=style, overflow="ellipsis", no_wrap=True)


def _head(now: Look) -> Any:
    head = _text(f"NovaFS {at(now, 'mount.mountpoint') or ''}", "bold")
    head.append(f"  {common.printable(str(at(now, 'volume.url')))}", "dim")
    phase = str(at(now, "mount.phase"))
    up = at(now, "store.up")
    head.append(f"  {phase}", "green" if phase == "mounted" else "red")
    if up is False:
        head.append(f"  the store has not answered for {format_duration(at(now, 'store.failing_s') or 0)}", "bold red")
    if at(now, "cache.l2.up") is False:
        head.append("  Redis does not answer", "bold yellow")
    head.append(f"  up {format_duration(at(now, 'mount.uptime_s') or 0)}", "dim")
    return head


def _per_second(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}/s"


def _bytes_per_second(value: float | None) -> str:
    return "–" if value is None else f"{format_size(int(value))}/s"


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"


def _table(*titles: str) -> Any:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for number, title in enumerate(titles):
        table.add_column(title, justify="right" if number else "left", no_wrap=True, overflow="ellipsis")
    return table


def _now(now: Look, then: Look | None) -> Any:
    found = facts(now, then)
    table = _table("", "requests", "bytes", "", "")
    risk = f"{format_size(found.dirty_bytes)}, oldest {format_duration(found.dirty_age_s)}" if found.dirty_bytes else "none"
    style = "bold red" if found.dirty_max_bytes and found.dirty_bytes > 0.9 * found.dirty_max_bytes else ""
    recent = found.hit_rate if found.hit_rate is not None else hit_rate(now, None, "cache.l1")
    table.add_row("read", _per_second(found.reads), _bytes_per_second(found.read_bytes), "hit rate of L1", _share(recent))
    table.add_row("written", _per_second(found.writes), _bytes_per_second(found.written_bytes), "data at risk", _text(risk, style))
    table.add_row("", "", "", "prefetch: accuracy, coverage", f"{_share(found.accuracy)}, {_share(found.coverage)}")
    return table


def _tiers(now: Look, then: Look | None) -> Any:
    table = _table("tier", "hit rate", "since start", "hits", "misses", "read", "p50", "p95", "p99", "held", "of")
    for title, path, key in TIERS:
        latency = at(now, f"latency.{key}.get") or {}
        quantiles = [format_duration(latency[name]) if name in latency else "–" for name in ("p50_s", "p95_s", "p99_s")]
        held, capacity = at(now, f"cache.{key}.used_bytes"), at(now, f"cache.{key}.capacity_bytes")
        read = "traffic.memory_bytes" if key == "l1" else f"{path}.read_bytes"
        table.add_row(
            title,
            _share(hit_rate(now, then, path)),
            _share(hit_rate(now, None, path)),
            f"{at(now, f'{path}.hits') or 0:,}",
            f"{at(now, f'{path}.misses') or 0:,}",
            _bytes_per_second(rate(now, then, read)),
            *quantiles,
            "–" if held is None else format_size(held),
            "–" if capacity is None else format_size(capacity),
        )
    return table


def _latency(now: Look) -> Any:
    table = _table("latency", "times", "p50", "p95", "p99")
    shown = [("read that waited", "fuse.read"), ("write", "fuse.write"), ("fsync", "fuse.fsync"), ("journal sync", "journal.sync")]
    for title, path in [*shown, ("commit", "commit.commit"), ("store get", "store.get"), ("store create", "store.create")]:
        found = at(now, f"latency.{path}")
        if found is not None:
            table.add_row(title, f"{found['count']:,}", *(format_duration(found[name]) for name in ("p50_s", "p95_s", "p99_s")))
    return table


def _images(now: Look, then: Look | None, maps: dict[str, Any], width: int, *, most: int) -> Any:
    from rich.console import Group
    from rich.text import Text

    images = now["images"][:most]
    if not images:
        return _text("no image is open", "dim")
    legend = Text("images   ", "dim")
    for state in (*STATES, "store"):
        legend.append(_SIGNS[state] if state != "hole" else "␣", _COLOURS[state])
        legend.append(f" {_WORDS[state]}   ", "dim")
    before = {image["id"]: image for image in (then or {}).get("images", ())}
    parts: list[Any] = [legend]
    for image in images:
        new = {"time_s": now["time_s"], **image}
        old = {"time_s": then["time_s"], **before[image["id"]]} if then is not None and image["id"] in before else None
        line = _text(image["name"], "bold")
        line.append(f"  {format_size(image['size'])}", "dim")
        line.append(f"  {_per_second(rate(new, old, 'traffic.memory_reads', 'traffic.waited_reads'))} reads")
        line.append(f"  {_per_second(rate(new, old, 'traffic.writes'))} writes")
        if image["dirty_bytes"]:
            line.append(f"  {format_size(image['dirty_bytes'])} not stored yet", "dark_orange")
        parts.append(line)
        found = maps.get(image["id"])
        if found is not None:
            bar = Text(no_wrap=True)
            for state in strip(found, max(10, width - 1)):
                bar.append(_SIGNS[state], _COLOURS[state])
            parts.append(bar)
    left = len(now["images"]) - len(images) + now["images_left_out"]
    if left:
        parts.append(_text(f"and {left} more", "dim"))
    return Group(*parts)


def _events(now: Look, *, most: int) -> Any:
    from rich.text import Text

    lines = Text(overflow="ellipsis", no_wrap=True)
    styles = {"error": "bold red", "warning": "yellow", "commit": "green"}
    for event in now["happened"][:most]:
        lines.append(time.strftime("%H:%M:%S ", time.localtime(event["time_s"])), "dim")
        lines.append(f"{event['kind']:<8}", styles.get(event["kind"], "cyan"))
        lines.append(common.printable(event["text"]) + (f" ({event['count']} times)" if event["count"] > 1 else "") + "\n")
    return lines
