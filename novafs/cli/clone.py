"""`novafs clone`: a new image from an old one, at once."""

from __future__ import annotations

import click

from novafs.cli import common
from novafs.cli.common import Settings
from novafs.units import format_size, parse_duration


@click.command()
@click.argument("volume")
@click.argument("source", metavar="SRC")
@click.argument("target", metavar="DST")
@click.option("--snapshot", metavar="NAME", help="Clone what SRC was at this snapshot.")
@click.option("--ttl", metavar="TIME", help="The clone is removed this long from now (such as 24h).")
@common.json_option
@common.volume_options
def clone(volume: str, source: str, target: str, snapshot: str | None, ttl: str | None, as_json: bool, settings: Settings) -> None:
    """Make image DST with the content of image SRC, both in VOLUME.

    Takes the same time whatever the size: both name the same chunks until one of them is written.
    """
    from novafs.operations import perform

    ttl_s = None if ttl is None else parse_duration(ttl)
    config = common.without_l2(settings.load(volume))
    made = common.run(lambda: perform(config, "clone", source=source, target=target, snapshot=snapshot, ttl_s=ttl_s))
    if as_json:
        common.emit_json(made)
    else:
        common.emit(f"{common.printable(made['image'])}: a clone of {common.printable(source)}, {format_size(made['size'])}")
