"""What the commands share: the options of a volume, made from the table of keys; output; progress; the way into trio."""

from __future__ import annotations

import functools
import json
import logging
import os
import sys
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, TypeVar

import click

from novafs import logs
from novafs.config import Config, load_config
from novafs.configkeys import KEYS, Secret
from novafs.errors import ConfigError
from novafs.units import format_duration, format_size

T = TypeVar("T")

LEVELS: Final = (logging.WARNING, logging.INFO, logging.DEBUG)
"""By the number of -v."""
_verbosity = 0


def verbosity() -> int:
    """How many -v were given; from 2 on, errors show their traceback."""
    return _verbosity


def configure_logging(verbose: int) -> None:
    """Log our own events to stderr, for people: warnings, with -v what is done, with -vv everything."""
    global _verbosity
    _verbosity = verbose
    logs.configure(LEVELS[min(verbose, 2)], "text")


@dataclass(frozen=True, slots=True)
class Settings:
    """What the options of a command say about the volume. flags: key name to text."""

    flags: dict[str, str]
    file: Path | None
    verbose: int

    def load(self, volume: str, *, more: Mapping[str, str] = MappingProxyType({})) -> Config:
        """The configuration of `volume`; `more` are settings weaker than the options. Raises ConfigError."""
        config = load_config(volume, flags={**more, **self.flags}, file=self.file)
        for secret in secrets_of(config, os.environ):
            logs.hide(secret)
        return config


def secrets_of(config: Config, environ: Mapping[str, str]) -> list[str]:
    """What must never be written: the passwords of L2, and the credentials of the store in the environment."""
    found = [environ.get(name) for name in ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")]
    url = config.l2.url.reveal()
    if url not in ("none", "embedded"):
        from novafs.cache.redis_address import parse_redis_url

        address = parse_redis_url(url)
        found += [address.password, address.sentinel_password]
    return [secret for secret in found if secret]


def volume_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options of every command that uses a volume; the function gets them as `settings: Settings`."""

    @functools.wraps(command)
    def with_settings(*args: Any, **kwargs: Any) -> Any:
        flags: dict[str, str] = {}
        for assignment in kwargs.pop("set_"):
            name, equals, value = assignment.partition("=")
            if not equals:
                raise ConfigError(f"--set {assignment}: expected KEY=VALUE, such as --set l1.codec=zstd")
            flags[name.strip()] = value
        for key in KEYS:
            if key.flag and (value := kwargs.pop(key.option)) is not None:
                flags[key.name] = value
        settings = Settings(flags, kwargs.pop("config"), kwargs.pop("verbose"))
        configure_logging(settings.verbose)
        return command(*args, settings=settings, **kwargs)

    decorated: Callable[..., Any] = with_settings
    extra = [
        click.option("--set", "set_", metavar="KEY=VALUE", multiple=True, help="Any other key of docs/configuration.md."),
        click.option("--config", type=click.Path(path_type=Path), metavar="FILE", help="TOML file with settings."),
        click.option("-v", "--verbose", count=True, help="Say what is done; -vv: everything, and tracebacks."),
    ]
    flags = [click.option(key.flag_name, key.option, metavar=key.kind.metavar, help=_first_sentence(key.doc)) for key in KEYS if key.flag]
    for option in reversed(flags + extra):
        decorated = option(decorated)
    return decorated


def _first_sentence(text: str) -> str:
    return text.split(". ")[0].rstrip(".").replace("`", "") + "."


def without_l2(config: Config) -> Config:
    """For a command that reads nothing twice: it need not reach Redis, and must not start an embedded server."""
    return replace(config, l2=replace(config.l2, url=Secret("none")))


def quiet_l2(config: Config) -> Config:
    """For a command that gains from what other hosts left in Redis, and nothing from an embedded server of its own."""
    return without_l2(config) if config.l2.url == "embedded" else config


json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")


def run(work: Callable[..., Awaitable[T]], *args: Any) -> T:
    """Run `work(*args)` on trio."""
    import trio

    return trio.run(work, *args)


# --- output ---------------------------------------------------------------------------------------------------


def say(message: str, *, error: bool = False) -> None:
    """A line for people, on stderr, whatever state stderr is in; systemd's journal marks it red if it is an error."""
    line = f"<{logs.priority(logging.ERROR)}>{message}" if error and logs.is_journal() else f"novafs: {message}"
    try:
        print(line, file=sys.stderr, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def emit(text: str) -> None:
    """A line of the result, on stdout."""
    print(text)


def emit_json(document: object) -> None:
    """The result as JSON, on stdout."""
    print(json.dumps(document, indent=2, ensure_ascii=False, default=str))


def printable(text: str) -> str:
    """Text with control characters, and what is no text, escaped: names come from other people."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in text)


def emit_table(rows: list[tuple[str, object]]) -> None:
    """Name and value, the values in one column."""
    width = max((len(name) for name, _ in rows), default=0)
    for name, value in rows:
        print(f"{name:<{width}}  {value}")


def with_bytes(size_bytes: int) -> str:
    """ "1.5 GiB (1,610,612,736 bytes)"."""
    return f"{format_size(size_bytes)} ({size_bytes:,} bytes)" if size_bytes >= 1024 else f"{size_bytes} bytes"


def ratio(value: float) -> str:
    """ "2.31 : 1"."""
    return f"{value:.2f} : 1"


# --- progress -------------------------------------------------------------------------------------------------

Progress = Callable[[int], None]


@contextmanager
def progress_bar(title: str, total: int | None) -> Iterator[Progress]:
    """A bar with rate and time left on stderr, where that is a terminal; called with the bytes done so far."""
    if not sys.stderr.isatty():
        yield lambda _: None
        return
    from rich import progress as bars
    from rich.console import Console

    columns = (
        bars.TextColumn("{task.description}"),
        bars.BarColumn(),
        bars.TaskProgressColumn(),
        bars.DownloadColumn(binary_units=True),
        bars.TransferSpeedColumn(),
        bars.TimeRemainingColumn(),
    )
    with bars.Progress(*columns, console=Console(stderr=True), transient=True) as display:
        task = display.add_task(printable(title), total=total)
        yield lambda done: display.update(task, completed=done)


def rate(size_bytes: int, seconds: float) -> str:
    """ "12.3 s, 81.2 MiB/s"."""
    return f"{format_duration(seconds)}, {format_size(size_bytes / max(seconds, 1e-6))}/s"
