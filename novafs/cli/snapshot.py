"""`novafs snapshot`: give the present state of an image a name, or take such a name away."""

from __future__ import annotations

import click

from novafs.cli import common
from novafs.cli.common import Settings


@click.command()
@click.argument("volume")
@click.argument("image")
@click.argument("name", metavar="SNAP")
@click.option("--delete", is_flag=True, help="Forget the snapshot SNAP instead.")
@common.json_option
@common.volume_options
def snapshot(volume: str, image: str, name: str, delete: bool, as_json: bool, settings: Settings) -> None:
    """Keep IMAGE as it is now under the name SNAP.

    Takes the same time whatever the size. What a running machine holds in its own memory is not in it: freeze the guest's
    file system first (fsfreeze, or the guest agent) for more than what a disk holds after a power cut. In a mount the
    snapshot is the read-only file .snapshots/IMAGE/SNAP.
    """
    from novafs.operations import perform

    config = common.without_l2(settings.load(volume))
    result = common.run(lambda: perform(config, "snapshot", image=image, name=name, delete=delete))
    if as_json:
        common.emit_json(result)
    elif delete:
        common.emit(f"{common.printable(image)}: snapshot {common.printable(name)} is forgotten; 'novafs gc' frees what only it held")
    else:
        common.emit(f"{common.printable(image)}: snapshot {common.printable(name)} of generation {result['generation']}")
