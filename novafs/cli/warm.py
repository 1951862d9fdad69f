"""`novafs warm`: bring images into the caches before somebody asks for them.

Where the volume is mounted on this host its daemon does the work, a step for each request (`novafs.warming`): this command says which
step is next, paces them and shows how far they are. So to stop it is to stop asking. Otherwise the command fills L2 itself.
"""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import click

from novafs import statedir
from novafs.cli import common
from novafs.cli.common import Settings
from novafs.config import Config
from novafs.errors import BusyError, ConfigError, NotFoundError, SourceError
from novafs.units import format_size, parse_size

STEP_BYTES: Final = 32 << 20
STEPS_PER_S: Final = 4
"""With a rate, steps are so small that there are at least so many in a second."""
L1_BYTES: Final = "64MiB"
"""What this command itself needs where it fills L2."""
_TIMEOUT_S: Final = 600.0

Ask = Callable[[str, Mapping[str, Any]], Awaitable[Any]]


@dataclass(frozen=True, slots=True)
class Wanted:
    """One image, and what of it. end: None: to its end."""

    image: str
    start: int = 0
    end: int | None = None
    boot: bool = False


@click.command()
@click.argument("volume")
@click.argument("images", metavar="IMAGE...", nargs=-1)
@click.option("--range", "range_", metavar="A-B", help="Only these bytes of each IMAGE: 0-1G, 5G-, -64M.")
@click.option("--boot", "--profile", "boot", is_flag=True, help="Only what images like it read after they are opened, in that order.")
@click.option("--keys", "keys", metavar="FILE", help="More images from FILE (- for stdin): one a line, a range after a tab.")
@click.option("--tier", type=click.Choice(["l1", "l2", "both"]), help="Where to; default: L1 of the mount, and L2 where there is one.")
@click.option("--rate", metavar="SIZE", help="Read at most so many bytes a second from the store: 100MB.")
@common.json_option
@common.volume_options
def warm(
    volume: str,
    images: tuple[str, ...],
    range_: str | None,
    boot: bool,
    keys: str | None,
    tier: str | None,
    rate: str | None,
    as_json: bool,
    settings: Settings,
) -> None:
    """Bring IMAGEs of VOLUME into the caches ahead of need.

    Into L1 of the mount on this host and into L2; where the volume is not mounted here, into L2. What is there is not read again;
    readers go first. Stop it at any time.
    """
    if boot and range_ is not None:
        raise ConfigError("--boot and --range: one of them")
    start, end = parse_range(range_) if range_ is not None else (0, None)
    wanted = [Wanted(image, start, end, boot) for image in images]
    if keys is not None:
        wanted += _read_keys(keys, boot)
    if not wanted:
        raise ConfigError("nothing to warm: name an IMAGE, or a file of them with --keys")
    rate_bytes = parse_size(rate) if rate is not None else None
    if rate_bytes is not None and rate_bytes < 1:
        raise ConfigError(f"--rate {rate}: expected at least 1 byte a second")
    results = common.run(_warm, settings.load(volume), wanted, tier, rate_bytes)
    if as_json:
        common.emit_json(results)
    else:
        for result in results:
            common.emit(_line(result))
    if any(result["failed"] for result in results):
        click.get_current_context().exit(1)


def parse_range(text: str) -> tuple[int, int | None]:
    """ "A-B" as bytes: from A up to B; either may be missing. Raises ConfigError."""
    first, dash, last = text.partition("-")
    if not dash or not (first.strip() or last.strip()):
        raise ConfigError(f"range {text!r}: expected A-B, such as 0-1G, 5G- or -64M")
    start = parse_size(first) if first.strip() else 0
    end = parse_size(last) if last.strip() else None
    if end is not None and end <= start:
        raise ConfigError(f"range {text!r}: ends before it begins")
    return start, end


def _read_keys(name: str, boot: bool) -> list[Wanted]:
    try:
        text = sys.stdin.read() if name == "-" else Path(name).read_text(encoding="utf-8")
    except OSError as error:
        raise SourceError(f"cannot read {name}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise SourceError(f"{name}: is no text: {error}") from error
    wanted = []
    for number, line in enumerate(text.splitlines(), start=1):
        image, tab, range_ = line.partition("\t")
        if not image.strip():
            continue
        try:
            start, end = parse_range(range_) if tab else (0, None)
        except ConfigError as error:
            raise SourceError(f"{name} line {number}: {error}") from error
        wanted.append(Wanted(image.strip(), start, end, boot and not tab))
    return wanted


def _line(result: Mapping[str, Any]) -> str:
    where = {"l1": "L1", "l2": "L2", "both": "L1 and L2"}[result["tier"]]
    text = (
        f"{common.printable(result['image'])}: {result['chunks']:,} chunks in {where}, {result['held']:,} were there, "
        f"{result['fetched']:,} brought ({format_size(result['read_bytes'])} read from the store)"
    )
    return text + (f"; {result['failed']:,} failed: {common.printable(result['error'])}" if result["failed"] else "")


async def _warm(config: Config, wanted: list[Wanted], tier: str | None, rate_bytes: int | None) -> list[dict[str, Any]]:
    from novafs.warming import cut

    async with _asking(config, tier) as (ask, word):
        plans = []
        for one in wanted:
            request = {"image": one.image, "start": one.start, "end": one.end, "boot": one.boot, "tier": word}
            plans.append(await ask("warm_plan", request))
        pace = _Pace(rate_bytes)
        results = []
        with common.progress_bar("warming", sum(count * plan["chunk_size"] for plan in plans for _, count in plan["spans"])) as progress:
            done = 0
            for plan in plans:
                result: dict[str, Any] = {"image": plan["path"], "tier": plan["tier"], "error": ""}
                result |= dict.fromkeys(("chunks", "held", "fetched", "failed", "read_bytes"), 0)
                for part in cut([(first, count) for first, count in plan["spans"]], max(1, pace.step_bytes // plan["chunk_size"])):
                    counts = await ask("warm", {"image": plan["path"], "spans": part, "tier": plan["tier"]})
                    for name, value in counts.items():
                        result[name] = result[name] or value if name == "error" else result[name] + value
                    done += sum(count for _, count in part) * plan["chunk_size"]
                    progress(done)
                    await pace.wait(int(counts["read_bytes"]))
                results.append(result)
        return results


class _Pace:
    """So many bytes a second, where a rate is given."""

    def __init__(self, rate_bytes: int | None) -> None:
        self._rate_bytes = rate_bytes
        self._owed_until_s: float | None = None
        self.step_bytes = STEP_BYTES if rate_bytes is None else min(STEP_BYTES, max(1, rate_bytes // STEPS_PER_S))

    async def wait(self, read_bytes: int) -> None:
        """Wait as long as these bytes should have taken."""
        import trio

        if self._rate_bytes is None:
            return
        now_s = trio.current_time()
        since_s = now_s if self._owed_until_s is None else max(self._owed_until_s, now_s - 1.0)
        self._owed_until_s = since_s + read_bytes / self._rate_bytes
        await trio.sleep_until(self._owed_until_s)


@asynccontextmanager
async def _asking(config: Config, tier: str | None) -> AsyncIterator[tuple[Ask, str]]:
    """Whom to ask: the daemon that has the volume, or a volume opened here; and which tier is meant."""
    import trio

    from novafs.control import call

    if statedir.is_locked(config.state_dir):
        socket = config.state_dir / statedir.CONTROL_SOCKET

        async def ask_daemon(op: str, request: Mapping[str, Any]) -> Any:
            try:
                return await trio.to_thread.run_sync(lambda: call(socket, op, timeout_s=_TIMEOUT_S, **request), abandon_on_cancel=True)
            except NotFoundError as error:
                if socket.exists():
                    raise
                raise BusyError(
                    f"the state directory {config.state_dir} is in use by something that answers no requests: {error}"
                ) from error

        yield ask_daemon, tier or "auto"
        return
    if tier in ("l1", "both"):
        raise ConfigError(
            f"--tier {tier}: L1 is the memory of a mount, and {config.volume} is not mounted on this host; mount it, or warm l2"
        )
    if config.l2.url in ("none", "embedded"):
        raise ConfigError(
            f"nothing to warm: {config.volume} is not mounted on this host, and has no L2 that others share (l2.url is {config.l2.url}); "
            f"mount it first, or give --l2-url"
        )
    from dataclasses import replace

    from novafs.operations import OPERATIONS
    from novafs.volume import open_volume

    small = replace(config, l1=replace(config.l1, capacity_bytes=parse_size(L1_BYTES)))
    async with open_volume(small, read_only=True) as volume:
        if volume.cache.l2 is None or not volume.cache.l2.up:
            raise ConfigError(f"L2 at {config.l2.url} does not answer: nothing can be warmed now")

        async def ask_here(op: str, request: Mapping[str, Any]) -> Any:
            return await OPERATIONS[op](volume, request)

        yield ask_here, "l2"
