"""Reading the configuration again under a running mount.

What is promised: the new configuration is read and validated as a whole before anything of it counts; one that is wrong changes nothing.
Then the keys that are declared `live` apply, all of them at once as far as requests can tell, and the others that differ are named:
they count from the next mount on, and until then what was reported before stays as it is. The store's credentials are read again, too
(from where they can change: a file, a process, a role), and are used if the store takes them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import trio

from novafs.configkeys import KEYS
from novafs.errors import RetryableError

if TYPE_CHECKING:
    from novafs.config import Config
    from novafs.volume import Volume

log = logging.getLogger(__name__)

SHRINK_BYTES: Final = 32 << 20
"""L1 gives up at most so much between two checkpoints: requests go on meanwhile."""


class Reloaded(NamedTuple):
    """Keys that changed and apply now, and those that a restart of the mount needs to apply."""

    applied: list[str]
    restart: list[str]

    def __str__(self) -> str:
        applied = f"changed {', '.join(self.applied)}" if self.applied else "no setting that can change now has changed"
        return applied + (f"; takes effect at the next mount: {', '.join(self.restart)}" if self.restart else "")


class Reloader:
    """Of one mount. `volume` is set once it is open."""

    def __init__(self, config: Config, reread: Callable[[], Config], changed: Callable[[Config], None]) -> None:
        """reread: reads the configuration again from where it came, blocking. changed: is told what holds from now on."""
        self.config = config
        """What holds now."""
        self._reread = reread
        self._changed = changed
        self._lock = trio.Lock()
        self.volume: Volume | None = None

    async def reload(self) -> Reloaded:
        """Read again and apply. Raises ConfigError and StoreDeniedError (of credentials that were read again), with nothing changed."""
        async with self._lock:
            wanted = await trio.to_thread.run_sync(self._reread)
            merged, outcome = merge(self.config, wanted)
            if self.volume is not None:
                await _renew(self.volume)
                await apply(self.volume, merged)
            self.config = merged
            self._changed(merged)
            return outcome


def merge(running: Config, wanted: Config) -> tuple[Config, Reloaded]:
    """The running configuration with the live keys of the wanted one, and what became of each key that differs."""
    applied: list[str] = []
    restart: list[str] = []
    merged = running
    for key in KEYS:
        value = _value(wanted, key.field)
        if value == _value(running, key.field):
            continue
        (applied if key.live else restart).append(key.name)
        if key.live:
            merged = _with(merged, key.field, value)
    return merged, Reloaded(applied, restart)


def _value(config: Config, field: str) -> Any:
    value: Any = config
    for part in field.split("."):
        value = getattr(value, part)
    return value


def _with(config: Config, field: str, value: object) -> Config:
    section, dot, name = field.partition(".")
    changes: dict[str, Any] = {section: replace(getattr(config, section), **{name: value}) if dot else value}
    return replace(config, **changes)


async def _renew(volume: Volume) -> None:
    """Have the store's credentials read again. A store that does not answer must not keep a setting from being changed."""
    try:
        await trio.to_thread.run_sync(volume.client.store.renew)
    except RetryableError as error:
        log.warning("the store's credentials are not read again: %s", error)


async def apply(volume: Volume, config: Config) -> None:
    """Have an open volume work with the live keys of `config` from now on."""
    volume.set_config(config)
    l1 = volume.cache.l1
    while l1.capacity_bytes != config.l1.capacity_bytes:
        volume.cache.set_l1_capacity(max(config.l1.capacity_bytes, l1.capacity_bytes - SHRINK_BYTES))
        if volume.prefetcher is not None:
            volume.prefetcher.weigh()
        await trio.lowlevel.checkpoint()
