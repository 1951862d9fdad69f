"""`novafs rollback`: make an image what a snapshot of it is."""

from __future__ import annotations

import click

from novafs.cli import common
from novafs.cli.common import Settings


@click.command()
@click.argument("volume")
@click.argument("image")
@click.argument("name", metavar="SNAP")
@common.json_option
@common.volume_options
def rollback(volume: str, image: str, name: str, as_json: bool, settings: Settings) -> None:
    """Make IMAGE what it was at its snapshot SNAP.

    The present state is replaced: take a snapshot of it first if it may be wanted. The image must not be open anywhere.
    """
    from novafs.operations import perform

    config = common.without_l2(settings.load(volume))
    result = common.run(lambda: perform(config, "rollback", image=image, name=name))
    if as_json:
        common.emit_json(result)
    else:
        common.emit(f"{common.printable(image)}: is {common.printable(name)} again, as generation {result['generation']}")
