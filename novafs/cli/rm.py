"""`novafs rm`: take images out of a volume."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from novafs.cli import common
from novafs.cli.common import Settings
from novafs.config import Config
from novafs.errors import IsDirectoryError

if TYPE_CHECKING:
    from novafs.catalogtree import Entry
    from novafs.volume import Volume


@click.command()
@click.argument("volume")
@click.argument("images", metavar="IMAGE...", nargs=-1, required=True)
@click.option("-r", "--recursive", is_flag=True, help="Remove directories, with all that is in them.")
@common.volume_options
def rm(volume: str, images: tuple[str, ...], recursive: bool, settings: Settings) -> None:
    """Remove IMAGEs from VOLUME.

    All of them are looked up before the first is removed, so a wrong name removes nothing. A host that has one open goes on
    reading it.
    """
    for path in common.run(_remove, common.without_l2(settings.load(volume)), images, recursive):
        common.emit(f"removed {common.printable(path)}")


async def _remove(config: Config, images: tuple[str, ...], recursive: bool) -> list[str]:
    from novafs.catalogtree import ROOT_ID, Kind
    from novafs.volume import open_volume

    async with open_volume(config) as volume:
        entries = {entry.node_id: entry for entry in [await volume.catalog.resolve(path) for path in images]}
        for path, entry in zip(images, entries.values(), strict=False):
            if entry.kind is Kind.DIRECTORY and (not recursive or entry.node_id == ROOT_ID):
                what = (
                    "is the volume's root directory" if entry.node_id == ROOT_ID else "is a directory; add -r to remove it with all in it"
                )
                raise IsDirectoryError(f"{path}: {what}")
        removed: list[str] = []
        for entry in entries.values():
            await _remove_entry(volume, entry, removed)
        return removed


async def _remove_entry(volume: Volume, entry: Entry, removed: list[str]) -> None:
    from novafs.catalogtree import Kind

    path = volume.catalog.path_of(entry)
    if entry.kind is Kind.DIRECTORY:
        for below in await volume.catalog.list(entry.node_id):
            await _remove_entry(volume, below, removed)
        await volume.rmdir(entry.parent_id, entry.name)
    else:
        await volume.unlink(entry.parent_id, entry.name)
    removed.append(path)
