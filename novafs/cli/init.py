"""`novafs init`: make an empty volume."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from novafs.cli import common
from novafs.cli.common import Settings
from novafs.config import HOST_SETTINGS_FILE, Config
from novafs.configkeys import redact
from novafs.units import format_size, parse_size

if TYPE_CHECKING:
    from novafs.superblock import Superblock


@click.command()
@click.argument("volume")
@click.option("--chunk-size", metavar="4K|64K|1M", default="64K", show_default=True, help="Unit of storage and dedup; fixed for good.")
@click.option(
    "--delta",
    is_flag=True,
    help="Let rewritten chunks be stored as differences (see l3.delta). Needs a NovaFS that knows such volumes, everywhere.",
)
@common.volume_options
def init(volume: str, chunk_size: str, delta: bool, settings: Settings) -> None:
    """Make an empty volume at VOLUME.

    A bucket must exist, a local directory is made. With --preset, the preset becomes this host's default for
    the volume.
    """
    from novafs.superblock import check_chunk_size

    size = check_chunk_size(parse_size(chunk_size))
    config = settings.load(volume)
    superblock = common.run(_init, config, size, delta)
    if "preset" in settings.flags:
        _remember_preset(config)
    common.emit(f"made volume {superblock.volume_id} at {redact(config.volume_url)}, with chunks of {format_size(size)}")


async def _init(config: Config, chunk_size: int, delta: bool) -> Superblock:
    import trio

    from novafs.objectstore.client import StoreClient
    from novafs.objectstore.url import StoreOptions, create_root, open_store
    from novafs.volume import init_volume

    options = StoreOptions(pool_size=config.store.requests_max)
    await trio.to_thread.run_sync(lambda: create_root(config.volume_url, options=options))
    store = await trio.to_thread.run_sync(lambda: open_store(config.volume_url, options=options))
    try:
        client = StoreClient(store, io_timeout_s=config.store.io_timeout_s, requests_max=config.store.requests_max)
        return await init_volume(client, chunk_size=chunk_size, delta=delta)
    finally:
        store.close()


def _remember_preset(config: Config) -> None:
    """Note the preset in the state directory, where `load_config` looks after all other places."""
    from novafs import durable, statedir

    path = statedir.prepare(config.state_dir) / HOST_SETTINGS_FILE
    durable.replace(path, f'# Written by novafs init for {redact(config.volume_url)}\npreset = "{config.preset}"\n'.encode())
