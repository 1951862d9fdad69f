"""Pins: the generations that a host has open, so that no collection takes them from under its handles; `pins/<host>`.

A host that opens a generation has at least a grace from then on: it was the newest, or a snapshot, when it was opened. So
the pin need not be there before the first read; it is renewed in the background, every quarter of the grace and at least
once a minute, for as long as images are open, and removed at a clean close. A pin that was not renewed for a grace, by
the store's clock, does not count: its host is gone, or was away for so long that its handles are stale (ESTALE).

The host is its journal's id, or a random one for a process without a journal; only it writes its pin.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Final

import msgspec
import trio

from novafs.errors import NovaError, ObjectCorruptError, PermanentError
from novafs.generation import HOST
from novafs.objectstore.client import StoreClient
from novafs.record import seal, unseal
from novafs.revisions import new_nonce

log = logging.getLogger(__name__)

KIND: Final = b"PINS"
VERSION: Final = 1
PREFIX: Final = "pins/"
INTERVAL_S_MAX: Final = 60.0
INTERVAL_S_MIN: Final = 0.05


class PinRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What one host has open: (image id of 16 bytes, counter). nonce: new at each renewal."""

    host_id: bytes
    host: str = HOST
    nonce: bytes
    generations: list[tuple[bytes, int]]


def pin_name(host_id: bytes) -> str:
    """The object in which a host pins."""
    return f"{PREFIX}{host_id.hex()}"


async def read_pin(client: StoreClient, name: str) -> PinRecord:
    """One host's pin. Raises ObjectNotFoundError, ObjectCorruptError, NewerFormatError."""
    found = unseal(KIND, VERSION, await client.get(name), PinRecord, name)
    if pin_name(found.host_id) != name:
        raise ObjectCorruptError(f"{name}: is the pin of host {found.host_id.hex()}; run 'novafs fsck'")
    return found


class Pins:
    """The pin of this process. `opened` gives what it has open. On the trio thread alone."""

    def __init__(self, client: StoreClient, host_id: bytes, *, opened: Callable[[], Iterable[tuple[bytes, int]]], grace_s: float) -> None:
        self.host_id = host_id
        self.interval_s = max(INTERVAL_S_MIN, min(INTERVAL_S_MAX, grace_s / 4))
        self._client = client
        self._opened = opened
        self._written = False
        self._denied = False
        self._lock = trio.Lock()

    async def run(self) -> None:
        """Renew for as long as the volume is open; a store that is away is asked again the next time."""
        while True:
            await trio.sleep(self.interval_s)
            try:
                await self.beat()
            except PermanentError as error:
                if not self._denied:
                    log.warning("what is open here can not be pinned: %s; a collection may make it stale after gc.grace", error)
                self._denied = True
            except NovaError as error:
                log.warning("what is open here is not pinned anew yet: %s", error)

    async def beat(self) -> None:
        """Write what is open now; nothing open leaves no pin. Raises what the store raises."""
        async with self._lock:
            generations = sorted(set(self._opened()))
            if generations:
                record = PinRecord(host_id=self.host_id, nonce=new_nonce(), generations=generations)
                self._written = True  # before the answer: one that is lost may have been written
                await self._client.put(pin_name(self.host_id), seal(KIND, VERSION, record))
            elif self._written:
                await self._client.delete(pin_name(self.host_id))
                self._written = False

    async def remove(self) -> None:
        """A clean close: nothing is open here any more. Raises nothing; a pin that stays stops counting by itself."""
        async with self._lock:
            if self._written:
                try:
                    await self._client.delete(pin_name(self.host_id))
                    self._written = False
                except NovaError as error:
                    log.warning("the pin of this host stays behind until gc.grace has passed: %s", error)
