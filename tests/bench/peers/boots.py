"""A recorded boot, replayed back to back: with everything cached, with nothing cached, and with nothing learned either."""

from __future__ import annotations

from collections.abc import Iterator

from tests.bench.boot_replay import replay
from tests.bench.peers.results import Round
from tests.bench.peers.site import DISK, VOLUME, Metrics, Site

BOOT = "boot_debian_1"
ANOTHER_BOOT = "boot_debian_3"
"""Of the same image, by another machine on another day: what a clone's boot has taught."""


def warm(site: Site, rounds: int) -> Iterator[Round]:
    """Everything is in L1, or in JuiceFS's cache; seconds."""
    trace = site.trace(BOOT)
    juice = site.juice_with(site.images.disk)
    with site.mounted(site.disk_volume) as mount, juice.mounted() as place:
        files = {"novafs": mount.path / DISK, "juicefs": place / DISK}
        for path in files.values():
            replay(trace, path)
        for _ in range(rounds):
            yield {kind: replay(trace, path)["wall_s"] for kind, path in files.items()}


def learned(site: Site, rounds: int) -> Iterator[Round]:
    """Each round on a host that was never here, a clone of its own; another boot of another clone has taught; seconds."""
    trace = site.trace(BOOT)
    juice = site.juice_with(site.images.disk)
    url = site.volume_of_clones("boot-learned", clones=rounds)
    with site.mounted(url) as mount:
        replay(site.trace(ANOTHER_BOOT), mount.path / DISK)
    for number in range(rounds):
        with site.mounted(url) as mount:
            clone = mount.path / f"clone{number}.raw"
            found = {"novafs": replay(trace, clone)["wall_s"]}
            found["novafs bytes"] = Metrics(mount).sum("novafs_store_read_bytes_total")
            found["novafs again"] = replay(trace, clone)["wall_s"]
        with juice.mounted() as place:
            found["juicefs"] = replay(trace, place / DISK)["wall_s"]
            found["juicefs bytes"] = juice.fetched_bytes()
        yield found


def unlearned(site: Site, rounds: int) -> Iterator[Round]:
    """Each round on a host that was never here, with all models of the volume forgotten; seconds, and bytes from the store."""
    trace = site.trace(BOOT)
    juice = site.juice_with(site.images.disk)
    url = site.volume_of_clones("boot-unlearned")
    for _ in range(rounds):
        site.novafs("boot-unlearned", "model", "reset", VOLUME, "--yes")
        with site.mounted(url) as mount:
            found = {"novafs": replay(trace, mount.path / DISK)["wall_s"]}
            found["novafs bytes"] = Metrics(mount).sum("novafs_store_read_bytes_total")
        with juice.mounted() as place:
            found["juicefs"] = replay(trace, place / DISK)["wall_s"]
            found["juicefs bytes"] = juice.fetched_bytes()
        yield found
