"""4 KiB random writes, each fsynced."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack

from tests.bench.fsync_ratio import synced_writes
from tests.bench.peers.results import Round
from tests.bench.peers.site import Site


def fsynced(site: Site, rounds: int) -> Iterator[Round]:
    """Writes a second on the file system that NovaFS's journal is on, on its mount, and on JuiceFS by default and with `--writeback`."""
    with ExitStack() as stack:
        mount = stack.enter_context(site.mounted(site.volume("writes")))
        files = {"host": site.directory / "host.raw", "novafs": mount.path / "written.raw"}
        for kind, options in {"juicefs": (), "writeback": ("--writeback",)}.items():
            files[kind] = stack.enter_context(site.juice_volume().mounted(*options)) / "written.raw"
        for path in files.values():
            synced_writes(path, 1)  # the file's layout is no part of the figure
        time.sleep(site.seconds)  # nor is what that has left to be uploaded
        for _ in range(rounds):
            yield {kind: synced_writes(path, site.seconds).iops for kind, path in files.items()}
