"""`novafs handoff`: give an image up to another host, with what is hot in it."""

from __future__ import annotations

from typing import Any

import click

from novafs import statedir
from novafs.cli import common
from novafs.cli.common import Settings
from novafs.errors import ConfigError
from novafs.units import parse_duration


@click.command()
@click.argument("volume")
@click.argument("image")
@click.option("--to", "target", metavar="HOST", required=True, help="What `hostname` prints there, or the id of its journal.")
@click.option("--timeout", metavar="TIME", default="30s", show_default=True, help="How long HOST may take to answer.")
@common.json_option
@common.volume_options
def handoff(volume: str, image: str, target: str, timeout: str, as_json: bool, settings: Settings) -> None:
    """Give IMAGE up to HOST, which has VOLUME mounted.

    What was written is committed, the right to write is given back, and HOST fetches what was read here last before its machine asks
    for it. Shut the machine down, or pause it, first. Where HOST does not answer nothing changes.
    """
    from novafs.control import call

    config = settings.load(volume)
    timeout_s = parse_duration(timeout)
    if not statedir.is_locked(config.state_dir):
        raise ConfigError(f"{volume} is not mounted on this host, so there is nothing to give up: open the image on {target}")
    socket = config.state_dir / statedir.CONTROL_SOCKET
    done: dict[str, Any] = call(socket, "handoff", timeout_s=timeout_s + 120, image=image, to=target, patience_s=timeout_s)
    if as_json:
        common.emit_json(done)
    else:
        name, hot = common.printable(done["image"]), done["hot_chunks"]
        common.emit(f"{name}: given up to {target} at generation {done['generation']}, with {hot:,} hot chunks")
