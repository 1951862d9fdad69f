"""`novafs model`: what NovaFS has learned and keeps with a volume: list it, take it out, put it in, forget it."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from novafs import statedir
from novafs.cli import common
from novafs.cli.common import Settings
from novafs.config import Config
from novafs.errors import ConfigError, NovaError, SourceError
from novafs.units import format_size

if TYPE_CHECKING:
    from novafs.modeladmin import SavedModel

_TIMEOUT_S: Final = 60.0
_READ_MAX: Final = (8 << 20) + 1
"""One byte more than a model can have: enough to see that it is none."""


@click.group()
def model() -> None:
    """Learned models: what prefetch and eviction know of a volume, kept in it and shared by all hosts."""


@model.command("ls")
@click.argument("volume")
@common.json_option
@common.volume_options
def ls_(volume: str, as_json: bool, settings: Settings) -> None:
    """List the models of VOLUME."""
    rows = common.run(_list, common.without_l2(settings.load(volume)))
    if as_json:
        common.emit_json([asdict(row) for row in rows])
        return
    for row in rows:
        when = datetime.fromtimestamp(row.saved_s, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
        what = f"no good, and left out: {common.printable(row.error)}" if row.error else row.contents
        common.emit(f"{row.name:<12}{format_size(row.size):>11}  {when}  save {row.revision + 1}  {row.about} ({what})")
    if not rows:
        common.emit("nothing was learned yet")


@model.command("export")
@click.argument("volume")
@click.argument("name")
@click.argument("file", metavar="FILE")
@common.volume_options
def export_(volume: str, name: str, file: str, settings: Settings) -> None:
    """Write the model NAME of VOLUME to FILE (- for stdout)."""
    data = common.run(_export, common.without_l2(settings.load(volume)), name)
    if file == "-":
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
        return
    try:
        Path(file).write_bytes(data)
    except OSError as error:
        raise SourceError(f"cannot write {file}: {error.strerror}") from error
    common.emit(f"wrote {format_size(len(data))} to {common.printable(file)}")


@model.command("import")
@click.argument("volume")
@click.argument("name")
@click.argument("file", metavar="FILE")
@click.option("--replace", is_flag=True, help="In place of what VOLUME has, instead of joined with it.")
@common.volume_options
def import_(volume: str, name: str, file: str, replace: bool, settings: Settings) -> None:
    """Put a model from FILE (- for stdin) into VOLUME, as NAME.

    A FILE that is damaged, too large, or of another kind, version or chunk size is refused, and nothing is changed.
    """
    data, source = _read(file), "stdin" if file == "-" else file
    config = settings.load(volume)
    contents = common.run(_import, common.without_l2(config), name, data, source, replace)
    common.emit(f"{'replaced' if replace else 'imported'} {name}: {contents}")
    _tell_daemon(config, [name], reset=False)


@model.command("reset")
@click.argument("volume")
@click.argument("names", metavar="[NAME]...", nargs=-1)
@click.option("--yes", is_flag=True, help="Do not ask.")
@common.volume_options
def reset(volume: str, names: tuple[str, ...], yes: bool, settings: Settings) -> None:
    """Forget the models NAME of VOLUME, or all: they are learned anew.

    Mounts on other hosts go on with what they have in memory, and save it: unmount them first to be rid of it for good.
    """
    config = settings.load(volume)
    if sys.stdin.isatty() and not yes and not click.confirm(f"Forget {', '.join(names) or 'all models'}?", default=False, err=True):
        raise click.Abort
    # The daemon first: it must not save again what is deleted here.
    wanted = _checked(names)
    _tell_daemon(config, wanted, reset=True)
    gone = common.run(_reset, common.quiet_l2(config), wanted, not names)
    common.emit(f"forgot {', '.join(gone)}" if gone else "nothing was learned yet")


def _checked(names: Sequence[str]) -> list[str]:
    from novafs.modeladmin import CHECKS, check_name

    return [check_name(name) for name in names] or list(CHECKS)


def _read(file: str) -> bytes:
    try:
        if file == "-":
            return sys.stdin.buffer.read(_READ_MAX)
        with open(file, "rb", opener=lambda path, flags: os.open(path, flags | os.O_NONBLOCK)) as source:  # not even a FIFO hangs
            return source.read(_READ_MAX)
    except OSError as error:
        raise SourceError(f"cannot read {file}: {error.strerror}") from error


def _tell_daemon(config: Config, names: Sequence[str], *, reset: bool) -> None:
    """Have a mount on this host go by it at once; where it can not, say so."""
    if not statedir.is_locked(config.state_dir):
        return
    from novafs.control import call

    try:
        told: dict[str, Any] = call(
            config.state_dir / statedir.CONTROL_SOCKET, "models_changed", timeout_s=_TIMEOUT_S, names=list(names), reset=reset
        )
    except ConfigError:
        raise
    except NovaError as error:
        common.say(f"the mount on this host was not told: {error}")
        return
    if told["left"]:
        common.say(f"the mount on this host goes on with what it has of {', '.join(told['left'])} until it is mounted anew")


async def _list(config: Config) -> list[SavedModel]:
    from novafs.modeladmin import list_models
    from novafs.volume import open_volume

    async with open_volume(config, read_only=True) as volume:
        return await list_models(volume)


async def _export(config: Config, name: str) -> bytes:
    from novafs.modeladmin import check_name, export_model
    from novafs.volume import open_volume

    check_name(name)
    async with open_volume(config, read_only=True) as volume:
        return await export_model(volume, name)


async def _import(config: Config, name: str, data: bytes, source: str, replace: bool) -> str:
    from novafs.modeladmin import check_name, import_model
    from novafs.volume import open_volume

    check_name(name)
    async with open_volume(config) as volume:
        return await import_model(volume, name, data, source, replace=replace)


async def _reset(config: Config, names: Sequence[str], everything: bool) -> list[str]:
    from novafs.modeladmin import reset_models
    from novafs.volume import open_volume

    async with open_volume(config) as volume:
        return await reset_models(volume, names, plugins=everything)
