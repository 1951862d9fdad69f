"""`novafs snapshots`: the snapshots of an image."""

from __future__ import annotations

from datetime import UTC, datetime

import click

from novafs.cli import common
from novafs.cli.common import Settings
from novafs.units import format_size


@click.command()
@click.argument("volume")
@click.argument("image")
@common.json_option
@common.volume_options
def snapshots(volume: str, image: str, as_json: bool, settings: Settings) -> None:
    """List the snapshots of IMAGE, the oldest first."""
    from novafs.operations import perform

    config = common.without_l2(settings.load(volume))
    rows = common.run(lambda: perform(config, "snapshots", image=image))
    if as_json:
        common.emit_json(rows)
        return
    for row in rows:
        taken = datetime.fromtimestamp(row["created_ns"] / 1e9, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
        common.emit(f"{taken}  {format_size(row['size']):>10}  generation {row['generation']:<8} {common.printable(row['name'])}")
