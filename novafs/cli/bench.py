"""`novafs bench`: how fast a volume is, here and now, through the mount, as a guest's disk sees it.

Where the volume is mounted its mount is measured, in a directory of its own; otherwise it is mounted for the time being. Through the
library something else would be measured: a guest's reads come through the kernel and the daemon's loop.

What always holds: nothing is written but in a directory with a name of this run's own, which is removed at the end, however that comes
about, with what its chunks took of L1 and L2; only `kill -9` leaves it, and the next run says so.
"""

from __future__ import annotations

import errno
import math
import os
import re
import secrets
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import unquote, urlsplit

import click

import novafs
from novafs import statedir
from novafs.cli import common
from novafs.cli.common import Settings
from novafs.cli.eviction_table import split_names
from novafs.cli.mount import mount_volume
from novafs.cli.stats import state_dir_of_mount
from novafs.cli.umount import unmount
from novafs.errors import (
    AccessDeniedError,
    BusyError,
    ConfigError,
    ExistsError,
    MountError,
    NotFoundError,
    NovaError,
    ReadOnlyError,
    TooLargeError,
)
from novafs.mounttable import NOVAFS_TYPE, canonical, mount_at
from novafs.units import format_size, parse_size

if TYPE_CHECKING:
    from novafs.benching import Counters, Row
    from novafs.measure import Figures

PREFIX: Final = "novafs-bench-"
SIZE_MAX: Final = 256 << 20
"""Without --size."""
ASKED_MAX: Final = 1 << 40
"""With it: how often each block was written is remembered, in a thousandth of the size."""
L1_SHARE: Final = 4
"""Without --size, at most one part in so many of L1 is taken from what others have there."""
ROOM: Final = 1.25
SHOW_AFTER_S: Final = 2.0
SHOW_EACH_S: Final = 0.25
_TIMEOUT_S: Final = 600.0
_MIB: Final = 1 << 20
_ENDING: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass(frozen=True, slots=True)
class Request:
    """What was asked for. size_bytes: None for what suits L1."""

    works: frozenset[str]
    size_bytes: int | None
    seconds: float
    depth: int


@dataclass(frozen=True, slots=True)
class Place:
    """Where to measure. directory: exists, in the mount whose root is `root`. temporary: mounted for this run."""

    directory: Path
    root: Path
    state_dir: Path
    temporary: bool


@click.command()
@click.argument("target", metavar="VOLUME|DIR")
@click.option(
    "--work", "works", metavar="WORK", multiple=True, help="Only these, with commas: write, read, buffered, random, deep, fsync, images."
)
@click.option("--size", metavar="SIZE", help="Of the image that is written; default: 256 MiB, or a quarter of L1 if that is less.")
@click.option("--seconds", type=click.FloatRange(0.01, 3600), default=3.0, show_default=True, help="For each line of the result at most.")
@click.option("--depth", type=click.IntRange(2, 256), default=16, show_default=True, help="Reads under way at a time in 'deep'.")
@common.json_option
@common.volume_options
def bench(target: str, works: tuple[str, ...], size: str | None, seconds: float, depth: int, as_json: bool, settings: Settings) -> None:
    """Measure how fast VOLUME, or the mount at DIR, is.

    IOPS, throughput and latencies, cold (from the store alone) and warm (from memory), through the mount, with O_DIRECT but for 'buffered'.
    A volume that is not mounted here is mounted for the time being. Of what it reads, every byte is compared.

    It writes one image, and in 'images' some small ones, into a directory novafs-bench-… that it removes; the store gives their room back
    with 'novafs gc'. Their content does not compress and is nowhere else, so neither compression nor dedup help: real images do better.
    Caches inside of a remote store are not emptied. Others go on working beside it, and are slowed down by it as by any other guest.
    """
    from novafs.benching import WORKS

    chosen = split_names(works) if works else list(WORKS)
    unknown = [name for name in chosen if name not in WORKS]
    if unknown:
        raise ConfigError(f"--work {unknown[0]}: is none; choose of {', '.join(WORKS)}")
    if math.isnan(seconds):  # within every range, and never over
        raise ConfigError("--seconds nan: expected a number of seconds")
    size_bytes = None
    if size is not None:
        size_bytes = parse_size(size)
        if size_bytes < _MIB or size_bytes % _MIB:
            raise ConfigError(f"--size {size}: expected a multiple of 1 MiB")
        if size_bytes > ASKED_MAX:
            raise ConfigError(f"--size {size}: expected at most {format_size(ASKED_MAX)}")
    request = Request(frozenset(chosen), size_bytes, seconds, depth)
    with _Ending() as ending, _place(target, settings, ending) as place:
        document = _measured(place, request, ending)
    if as_json:
        common.emit_json(document)
    else:
        _print(document)


# --- where ----------------------------------------------------------------------------------------------------


class _Ending:
    """The first signal that asks for the end interrupts, once; later ones find the cleaning up under way, which they must not cut short."""

    def __init__(self) -> None:
        self._before: dict[signal.Signals, Any] = {}
        self._cleaning = False

    def __enter__(self) -> _Ending:
        for number in _ENDING:
            self._before[number] = signal.signal(number, self._told)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _told(self, _number: int, _frame: FrameType | None) -> None:
        if not self._cleaning:
            self._cleaning = True
            raise KeyboardInterrupt

    @contextmanager
    def then(self, clean: Callable[[], None]) -> Iterator[None]:
        """Whatever comes of the block, `clean` is called once, and no signal interrupts it."""
        try:
            try:
                yield
            finally:
                # A signal before this line is raised here, and leads to the other `finally` as well.
                was, self._cleaning = self._cleaning, True
        finally:
            clean()
        self._cleaning = was


@contextmanager
def _place(target: str, settings: Settings, ending: _Ending) -> Iterator[Place]:
    found = _mounted_directory(target)
    if found is not None:
        yield found
        return
    state_dir = settings.load(target).state_dir
    if statedir.holder(state_dir) is not None:
        root = (_ask(state_dir, "stats").get("mount") or {}).get("mountpoint")
        if root is None:
            raise BusyError(f"{target} is in use on this host by a program that has not mounted it: end that, or have it measure itself")
        if Path(root).name.startswith(PREFIX):
            # Its owner takes it away at the end, whoever is at work in it.
            raise BusyError(
                f"{target} is mounted at {root} by another bench, for the time being: wait for its end; "
                f"if it was killed: 'novafs umount {root}'"
            )
        yield Place(Path(root), Path(root), state_dir, temporary=False)
        return
    root = Path(tempfile.mkdtemp(prefix=PREFIX))
    with ending.then(lambda: _take_away(root)):
        # Its port may be another mount's by now, and nobody would look at it.
        status = mount_volume(target, str(root), [], replace(settings, flags={**settings.flags, "metrics": "off"}), quiet=True)
        if status:
            click.get_current_context().exit(status)
        yield Place(root, root, state_dir, temporary=True)


def _take_away(root: Path) -> None:
    try:
        if mount_at(root) is not None:
            unmount(str(root))
    except NovaError as error:  # what was measured is told all the same
        common.say(f"{error}; then 'novafs umount {root}'", error=True)
    with suppress(OSError):
        root.rmdir()


def _mounted_directory(target: str) -> Place | None:
    """The place that `target` names if it is a directory in a mount of ours."""
    if "://" in target or "\0" in target:
        return None
    directory = Path(canonical(target))
    for root in (directory, *directory.parents):
        line = mount_at(root)
        if line is None:
            continue
        if line.fstype != NOVAFS_TYPE:
            return None
        state_dir = state_dir_of_mount(str(root))
        if state_dir is None:
            return None
        if not directory.is_dir():
            raise NotFoundError(f"{target}: is no directory of the mount at {root}")
        return Place(directory, root, state_dir, temporary=False)
    return None


def _ask(state_dir: Path, op: str, **request: object) -> dict[str, Any]:
    from novafs.control import call  # loads trio

    document: dict[str, Any] = call(state_dir / statedir.CONTROL_SOCKET, op, timeout_s=_TIMEOUT_S, **request)
    return document


# --- the run --------------------------------------------------------------------------------------------------


def _measured(place: Place, request: Request, ending: _Ending) -> dict[str, Any]:
    from novafs.benching import Bench, Counters, Plan

    stats = _ask(place.state_dir, "stats")
    l1_bytes = int(stats["cache"]["l1"]["capacity_bytes"])
    size_bytes = request.size_bytes or max(_MIB, min(SIZE_MAX, l1_bytes // L1_SHARE) // _MIB * _MIB)
    _check_room(place, stats, size_bytes)
    for name in _left_behind(place.directory):
        common.say(f"{place.directory / name} was left by a bench that was killed: remove it with 'rm -r'")
    own = place.directory / f"{PREFIX}{_host()}-{os.getpid()}-{secrets.token_hex(4)}"
    inside = own.relative_to(place.root)
    shown = _Shown()

    def cool(name: str) -> int:
        return int(_ask(place.state_dir, "cool", image=str(inside / name), unlearn=True)["left"])

    def count() -> Counters:
        now = _ask(place.state_dir, "stats")
        traffic, store = now["traffic"], now["cache"]["l3_traffic"]
        return Counters(traffic["memory_reads"], traffic["waited_reads"], store["requests"], store["read_bytes"])

    plan = Plan(request.works, size_bytes, request.seconds, request.depth, int(stats["volume"]["chunk_size"]))
    run = Bench(own, plan, cool=cool, count=count, show=shown)
    made = False

    def clean() -> None:
        shown.end()
        if made:
            _remove(own, lambda name: _ask(place.state_dir, "cool", image=str(inside / name), commit=False))

    with ending.then(clean):
        # Nothing interrupts between the two: else what was made would be nobody's.
        with _held():
            _make(own)
            made = True
        run.run()
    if size_bytes > l1_bytes * 3 // 4 and request.works - {"images", "fsync", "write"}:
        run.notes.append(
            f"the image of {format_size(size_bytes)} does not fit into L1 of {format_size(l1_bytes)}: what is warm is not all in it"
        )
    return {
        "novafs": novafs.__version__,
        "volume": stats["volume"]["url"],
        "directory": str(place.directory),
        "temporary_mount": place.temporary,
        "chunk_size": plan.chunk_bytes,
        "l1_capacity_bytes": l1_bytes,
        "l2": stats["cache"]["l2"] is not None,
        "size_bytes": size_bytes,
        "seconds": request.seconds,
        "depth": request.depth,
        "results": [_row(row) for row in run.rows],
        "notes": run.notes,
    }


@contextmanager
def _held() -> Iterator[None]:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _ENDING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _host() -> str:
    return re.sub(r"[^A-Za-z0-9]+", "-", socket.gethostname())[:32] or "host"


def _make(own: Path) -> None:
    try:
        own.mkdir(mode=0o700)
    except FileExistsError as error:
        raise ExistsError(f"{own} exists already, and is not touched: run again") from error
    except PermissionError as error:
        raise AccessDeniedError(f"{own.parent}: you may not make a directory there") from error
    except OSError as error:
        if error.errno == errno.EROFS:
            raise ReadOnlyError(f"{own.parent} is mounted read-only: a bench writes the image that it reads") from error
        raise MountError(f"{own} can not be made: {error.strerror}") from error


def _left_behind(directory: Path) -> list[str]:
    """Directories of benches of this host whose process is gone."""
    pattern = re.compile(rf"{re.escape(PREFIX + _host())}-(\d+)-[0-9a-f]+")
    with suppress(OSError):
        found = [(name, match) for name in sorted(os.listdir(directory)) if (match := pattern.fullmatch(name))]  # noqa: PTH208
        return [name for name, match in found if not Path(f"/proc/{match[1]}").exists()]
    return []


def _remove(own: Path, forget: Callable[[str], object]) -> None:
    """The directory and what is in it, from the caches first. Where that fails it is said; an error before is the one to show."""
    try:
        for path in sorted(own.iterdir()):
            with suppress(NovaError):  # it only costs others some memory for a while
                forget(path.name)
            path.unlink()
        own.rmdir()
    except OSError as error:
        common.say(f"{own} could not be removed ({error.strerror}): remove it with 'rm -r'", error=True)


def _check_room(place: Place, stats: dict[str, Any], size_bytes: int) -> None:
    """Raises TooLargeError where the volume, or the disk of the journal, has no room for the image."""
    needed = int(size_bytes * ROOM)
    found = os.statvfs(place.directory)
    url = urlsplit(str(stats["volume"]["url"]))
    rooms = [(found.f_bavail * found.f_frsize, needed, "the volume")]
    if url.scheme == "file":
        rooms.append((shutil.disk_usage(unquote(url.path)).free, needed, f"the disk of {unquote(url.path)}"))
    journal_bytes = min(needed, 2 * int(stats["dirty_max_bytes"]))
    rooms.append((shutil.disk_usage(place.state_dir).free, journal_bytes, f"the disk of the journal, {place.state_dir},"))
    for room, most, where in rooms:
        if room < most:
            raise TooLargeError(
                f"a bench of {format_size(size_bytes)} needs {format_size(most)}, and {where} has {format_size(room)}; try a smaller --size"
            )


class _Shown:
    """What is being done, on one line of a terminal, once the run has taken two seconds. No thread of its own: that would be measured."""

    def __init__(self) -> None:
        self._on = sys.stderr.isatty()
        self._from_s = time.monotonic() + SHOW_AFTER_S
        self._next_s = 0.0
        self._title = ""
        self._shown = False

    def __call__(self, title: str, share: float) -> None:
        if not self._on:
            return
        now_s = time.monotonic()
        if now_s < self._from_s or (title == self._title and now_s < self._next_s):
            return
        self._title, self._next_s, self._shown = title, now_s + SHOW_EACH_S, True
        self._tell(f"{common.printable(title)}: {share:.0%}")

    def end(self) -> None:
        if self._shown:
            self._tell("")

    def _tell(self, text: str) -> None:
        try:
            print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)
        except OSError:  # the terminal was closed: what is made must be removed all the same
            self._on = self._shown = False
            os.dup2(os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC), sys.stderr.fileno())


# --- the result -----------------------------------------------------------------------------------------------


def _row(row: Row) -> dict[str, Any]:
    found, counted = row.figures, row.counted
    return {
        "work": row.work,
        "title": row.title,
        "state": row.state or None,
        "operations": found.operations,
        "bytes": found.bytes,
        "seconds": found.seconds,
        "iops": found.iops,
        "bytes_per_s": found.bytes_per_s,
        "latency_s": _latencies(found),
        "mount": counted._asdict(),
    }


def _latencies(found: Figures) -> dict[str, float]:
    return {
        "mean": found.mean_s,
        "p50": found.p50_s,
        "p90": found.p90_s,
        "p99": found.p99_s,
        "p999": found.p999_s,
        "max": found.max_s,
    }


def _print(document: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for number, title in enumerate(("", "", "operations/s", "throughput", "p50", "p90", "p99", "p99.9", "max", "from the store")):
        table.add_column(title, justify="right" if number > 1 else "left", no_wrap=True)
    work = None
    for row in document["results"]:
        latency, again = row["latency_s"], row["title"] == work
        work = row["title"]
        few = row["operations"] < 2
        table.add_row(
            "" if again else row["title"],
            row["state"] or "",
            "-" if few else f"{row['iops']:,.0f}" if row["iops"] >= 100 else f"{row['iops']:.1f}",
            f"{format_size(row['bytes_per_s'])}/s" if row["bytes"] else "-",
            *(_time(latency[name]) for name in ("p50", "p90", "p99", "p999", "max")),
            format_size(row["mount"]["store_bytes"]),
        )
    where = ", mounted for this" if document["temporary_mount"] else f" at {document['directory']}"
    common.emit(
        f"{common.printable(document['volume'])}{common.printable(where)}: an image of {format_size(document['size_bytes'])}, "
        f"chunks of {format_size(document['chunk_size'])}, L1 of {format_size(document['l1_capacity_bytes'])}"
    )
    common.emit("")
    # What is no terminal has no width: a table for a file is not cut to 80 columns.
    Console(highlight=False, width=None if sys.stdout.isatty() else 250).print(table)
    for note in document["notes"]:
        common.emit(f"note: {note}")


def _time(seconds: float) -> str:
    """A latency: three digits."""
    if seconds < 1e-3:
        return f"{seconds * 1e6:.0f} µs"
    if seconds < 1:
        return f"{seconds * 1e3:.3g} ms"
    return f"{seconds:.3g} s"
