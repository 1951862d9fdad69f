"""Following: an image that is open for writing here while another host writes it, as on the target of a live migration.

    here                                                    the holder of the lease
    asks for it (`wants/`)
                                                            commits, and acknowledges: from now on each fsync is in the store
                                                            before it returns
    lists the head before each read, and takes over
    what is newer
                                                            nobody there has it open for writing any more: gives the lease back
    looks once more, and is an image like any other;
    the first write takes the lease

Always holds: between the acknowledgement and the end of following, a read gives nothing older than what the holder had fsynced when
the read began. The request is renewed for as long as the image is followed: the holder stops sending fsyncs to the store once it is gone.

A handle that was opened while its image is followed may write although generations have come since, if nothing was read here that they may
have changed: a target looks at the first bytes of its disk only (`PROBE_BYTES`), and all else comes from the source's memory.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Final, Protocol

import trio

from novafs.asynctools import GroupCommit
from novafs.errors import NovaError, StaleError
from novafs.lease import WANT_RENEW_S, LeaseManager

log = logging.getLogger(__name__)

POLL_S: Final = 0.25
"""How often the lease is looked at."""
PROBE_BYTES: Final = 65536
"""At the beginning of an image: what is read of these is no content."""


class Followed(Protocol):
    """What is asked of an image."""

    node_id: bytes
    name: str

    async def refresh(self) -> bool:
        """Take a newer generation over; whether there was one. Raises StaleError, and what the store raises."""
        ...

    def unfollow(self, follower: Follower) -> None:
        """It is an image like any other from now on."""
        ...


class Follower:
    """Of one image, from `Volume.follow` on until the lease is free or this host's, or nobody has it open for writing."""

    def __init__(
        self, image: Followed, leases: LeaseManager, *, changed: Callable[[], None], read_before: bool, after: Follower | None
    ) -> None:
        """changed: called when a newer generation was taken over. read_before: whether somebody has read here already.
        after: the one before of this image, whose request must be gone first."""
        self.has_read = read_before
        """Whether content was read."""
        self.acknowledged = False
        """Whether the holder has said that its fsyncs reach the store."""
        self.ended = trio.Event()
        self._image = image
        self._leases = leases
        self._changed = changed
        self._after = after
        self._answer = trio.Event()
        self._looks: GroupCommit[None] = GroupCommit(self._look)
        self._scope = trio.CancelScope()

    def stop(self) -> None:
        """The request is taken back, in the background."""
        self._scope.cancel()

    def note_read(self, offset: int, length: int) -> None:
        """These bytes are being read."""
        if offset + length > PROBE_BYTES:
            self.has_read = True

    async def answered(self, timeout_s: float) -> None:
        """Wait until the holder has acknowledged, or has given the lease back; not for longer than `timeout_s`."""
        with trio.move_on_after(timeout_s):
            await self._answer.wait()
            return
        log.warning(
            "%s: open for writing, and the host that writes it has not answered within %g s: until it does, what is read here may be older "
            "than what was fsynced there",
            self._image.name,
            timeout_s,
        )

    async def fresh(self) -> None:
        """The newest generation, as of a listing that begins after this call. Raises what the store raises."""
        await self._looks.submit(None)

    async def _look(self, _: list[None]) -> None:
        try:
            if await self._image.refresh():
                self._changed()
        except StaleError as error:
            log.info("%s: is followed no more: %s", self._image.name, error)
            self._end()

    def _end(self) -> None:
        self._image.unfollow(self)
        self.stop()

    async def run(self) -> None:
        """Ask, and look after the lease, until it is free, or `stop`."""
        self._leases.join(self._image.node_id)
        try:
            if self._after is not None:
                await self._after.ended.wait()
                self._after = None
            with self._scope:
                await self._run()
        finally:
            self._answer.set()
            with trio.CancelScope(shield=True):
                await self._leases.withdraw(self._image.node_id)
            self.ended.set()

    async def _run(self) -> None:
        renewed_s = float("-inf")
        while True:
            try:
                if trio.current_time() - renewed_s > WANT_RENEW_S:
                    await self._leases.ask(self._image.node_id)
                    renewed_s = trio.current_time()
                holder = await self._leases.holder(self._image.node_id)
                acknowledged = holder is not None and self._leases.journal_id in holder.acknowledged
                if holder is not None and acknowledged and not self.acknowledged:
                    log.info("%s: host %s commits each fsync to the store from now on", self._image.name, holder.host)
                self.acknowledged = acknowledged
                await self.fresh()
                if holder is None:
                    log.info("%s: the lease is free", self._image.name)
                    self._end()
                elif self.acknowledged:
                    self._answer.set()
            except NovaError as error:
                log.debug("%s: the lease can not be looked at: %s", self._image.name, error)
            await trio.sleep(POLL_S)
