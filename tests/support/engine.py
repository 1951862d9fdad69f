"""Volumes in a directory, opened in this process: what most engine tests run on."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from novafs.config import load_config
from novafs.objectstore.client import StoreClient
from novafs.objectstore.url import create_root, open_store
from novafs.statedir import StateLock
from novafs.volume import Volume, init_volume, open_volume

FLAGS = {"l2.url": "none", "l1.capacity": "64MiB", "prefetch.read_around": "0"}
"""Read-around depends on how long the store takes, which on a machine under load is anything: tests of it switch it on."""


async def make_volume(url: str, *, chunk_size: int = 64 << 10, delta: bool = False) -> str:
    """An empty volume at `url`; the URL."""
    create_root(url)
    client = StoreClient(open_store(url))
    try:
        await init_volume(client, chunk_size=chunk_size, delta=delta)
    finally:
        client.store.close()
    return url


@asynccontextmanager
async def opened(url: str, state_dir: Path, *, read_only: bool = False, prefetch: bool = False, **flags: str) -> AsyncIterator[Volume]:
    """The volume at `url`; `flags` are configuration keys with `__` for the dot."""
    given = {**FLAGS, "state_dir": str(state_dir), **{key.replace("__", "."): value for key, value in flags.items()}}
    config = load_config(url, flags=given, environ={})
    state_dir.mkdir(parents=True, exist_ok=True)
    lock = StateLock.take(state_dir, mountpoint="tests")
    try:
        async with open_volume(config, read_only=read_only, owns_state=True, prefetch=prefetch) as volume:
            yield volume
    finally:
        lock.release()


@asynccontextmanager
async def fresh_volume(directory: Path, *, chunk_size: int = 64 << 10, **flags: str) -> AsyncIterator[Volume]:
    """A new volume below `directory`."""
    url = await make_volume(f"file://{directory / 'store'}", chunk_size=chunk_size)
    async with opened(url, directory / "state", **flags) as volume:
        yield volume
