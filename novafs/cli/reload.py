"""`novafs reload`: a mount reads its configuration again."""

from __future__ import annotations

from pathlib import Path

import click

from novafs import statedir
from novafs.cli import common
from novafs.cli.common import Settings
from novafs.cli.stats import state_dir_of_mount
from novafs.config import file_of_name, is_url
from novafs.configkeys import redact
from novafs.errors import NotFoundError

_TIMEOUT_S = 120.0


@click.command()
@click.argument("target", metavar="VOLUME|DIR")
@common.json_option
@common.volume_options
def reload(target: str, as_json: bool, settings: Settings) -> None:
    """Have a mount read its configuration again.

    All of it is checked first; one that is wrong changes nothing. Then settings that can change under a running mount do, and the
    others that differ are named. What the mount was started with on its command line, or in its environment, stays.
    """
    from novafs.control import call  # loads trio
    from novafs.reload import Reloaded

    for state_dir in _state_dirs(target, settings):
        answer = call(state_dir / statedir.CONTROL_SOCKET, "reload", timeout_s=_TIMEOUT_S)
        if as_json:
            common.emit_json(answer)
        else:
            common.emit(str(Reloaded(**answer)))


def _state_dirs(target: str, settings: Settings) -> list[Path]:
    """Of the mounts that are meant. Asked of the mounts first: the configuration may be wrong, or name another place by now."""
    at = state_dir_of_mount(target)
    if at is not None:
        return [at]
    noted = statedir.find_mounts(redact(target))
    if not is_url(target):
        # Of two directories with a NAME.toml, each is a volume of its own.
        file = str((settings.file or file_of_name(target)).absolute())
        meant = [record for record in noted if record.config_file in (file, "")]
        if noted and not meant:
            others = ", ".join(f"the one at {record.mountpoint} was mounted from {record.config_file}" for record in noted)
            raise NotFoundError(f"no {target} of {file} is mounted on this host ({others}): name the directory instead, novafs reload DIR")
        noted = meant
    if noted:
        return [Path(record.state_dir) for record in noted]
    state_dir = settings.load(target).state_dir
    if not statedir.is_locked(state_dir):
        raise NotFoundError(f"{target} is not mounted on this host: there is nothing to reload")
    return [state_dir]
