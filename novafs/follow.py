"""Following: an image is open for writing here while this host does not have the right to write it, as on the target of a live migration.

    here                                                    another host
    asks for the lease (`wants/`), and waits:
    reads need a look at the lease that is not
    older than `VALID_S`
                                                            takes the lease, finds the request: each fsync is in the store before
                                                            it returns, the first one not before `SETTLE_S` have passed
    sees that the lease is taken, and follows:
    lists the head before each read, and takes over
    what is newer
                                                            nobody there has it open for writing any more: gives the lease back
    looks once more, and waits again;
    the first write takes the lease

Where the lease is another's already when the image is opened here, that answers the request: it commits, and acknowledges; reads wait for
that, at most `lease.wait`.

Always holds, but for a holder that has not answered within that time: a read gives nothing older than what another host had fsynced
when the read began. While this waits, every read needs a look that found the lease free and was sent less than `VALID_S` before; so
whoever takes it after that look, and waits `SETTLE_S` with his first fsync, has no reader here that does not know of him. The request is
there before the first look, is renewed for as long as the image is followed, and is looked for by whoever has just taken the lease: one of
the two sees the other.

Nothing is asked for the first `ARM_S` after an open, unless something is read: most programs that open an image for writing write it at
once. An image that is not read is looked at when the request is renewed alone.

A handle that was opened while its image is followed may write although generations have come since, if all that was read here in the
meantime still is as it was read (`novafs.seen`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Final, Protocol

import trio

from novafs.asynctools import GroupCommit
from novafs.errors import NovaError, StaleError
from novafs.lease import SETTLE_S, WANT_RENEW_S, WANT_TTL_S, LeaseManager, LeaseRecord
from novafs.revisions import Head, boot_time_s
from novafs.seen import Seen

log = logging.getLogger(__name__)

POLL_S: Final = 0.25
"""How often another host's lease is looked at."""
LOOK_S: Final = 1.25
"""How often one that is free is looked at while the image is read."""
VALID_S: Final = SETTLE_S - 0.25
"""How long reads may go by a look that found it free, from when that was sent. Less than `SETTLE_S`: clocks differ in speed."""
ARM_S: Final = 0.5
END_S: Final = 5.0
"""What the end waits for a look that is under way."""


class Followed(Protocol):
    """What is asked of an image."""

    node_id: bytes
    name: str

    async def refresh(self) -> bool:
        """Take a newer generation over; whether there was one. Raises StaleError, and what the store raises."""
        ...

    def unfollow(self, follower: Follower) -> None:
        """It was removed, or can not be followed."""
        ...


class Follower:
    """Of one image, from `Volume.follow` on until the lease is this host's, or nobody here has it open for writing."""

    def __init__(
        self,
        image: Followed,
        leases: LeaseManager,
        *,
        changed: Callable[[], None],
        seen: Seen,
        after: Follower | None = None,
        held: bool = False,
    ) -> None:
        """changed: called when a newer generation was taken over. after: the one before of this image, whose request must be gone first.
        held: another host has the lease, as far as is known."""
        self.seen = seen
        self.moved = False
        """Whether a newer generation was taken over since `seen` began."""
        self.settling = trio.Lock()
        """Held by who finds out whether `seen` still holds."""
        self.active = False
        """Whether another host has the lease."""
        self.acknowledged = False
        """Whether that has said that its fsyncs reach the store."""
        self.ended = trio.Event()
        self.failed = False
        """Whether it ended by itself."""
        self._image = image
        self._leases = leases
        self.changed = changed
        self._after = after
        self._held = held
        self._stopped = False
        self._joined = False
        self._asked_s = float("-inf")
        """Boot time before the request was made or renewed last."""
        self._free: Head[LeaseRecord] | None = None
        self._looked = False
        """Whether a look has found the lease free; then `_free` is its last epoch."""
        self._valid_s = float("-inf")
        """Boot time up to which reads may go by that look."""
        self._read = False
        """Whether something was read since the last look."""
        self._answer = trio.Event()
        self._answer_by_s = float("inf")
        self._looks: GroupCommit[None] = GroupCommit(self._look)
        self._refreshes: GroupCommit[None] = GroupCommit(self._refresh)
        self._scope = trio.CancelScope()

    def stop(self) -> None:
        """The request is taken back, in the background."""
        self._stopped = True
        self._scope.cancel()

    @property
    def settled(self) -> bool:
        """Whether a read may go by what is here: a short while ago no other host had the lease. Takes no checkpoint."""
        self._read = True
        return not self.active and boot_time_s() < self._valid_s

    @property
    def lapsed(self) -> bool:
        """Whether the request was not renewed for so long that the holder may have given it up, as when this host slept."""
        return boot_time_s() - self._asked_s > WANT_TTL_S / 2

    async def answered(self) -> None:
        """Wait until the holder has acknowledged, or has given the lease back; not for longer than `lease.wait` after it was seen."""
        with trio.move_on_at(min(self._answer_by_s, trio.current_time() + self._leases.rules.wait_s)):
            await self._answer.wait()
        if not self._answer.is_set():
            self._answer.set()
            log.warning(
                "%s: open for writing, and the host that writes it has not answered within %g s: until it does, what is read here may be "
                "older than what was fsynced there",
                self._image.name,
                self._leases.rules.wait_s,
            )

    def _expect_answer(self) -> None:
        if self._answer.is_set():  # else somebody waits for it
            self._answer = trio.Event()
        self._answer_by_s = trio.current_time() + self._leases.rules.wait_s

    async def fresh(self) -> None:
        """What is here is the newest generation, as of a look that begins after this call, or is not older than a look may be.
        Raises what the store raises."""
        if self._stopped or self.settled:
            return
        if not self.active or self.lapsed:
            await self._looks.submit(None)
        if self.active:
            if not self._answer.is_set():
                await self.answered()
            await self._refreshes.submit(None)

    async def _look(self, _: list[None]) -> None:
        """At the lease. Afterwards it is free and the newest generation here, or this is `active`."""
        if self._after is not None and not self._stopped:
            await self._after.ended.wait()
            self._after = None
        if self._stopped:
            return
        # Whoever has taken the lease since the last look must have found the request.
        stood = self._looked and not self.lapsed
        if self.active and self.lapsed:
            self._expect_answer()
        if boot_time_s() - self._asked_s > WANT_RENEW_S:
            if not self._joined:
                self._joined = True
                self._leases.join(self._image.node_id)
            asked_s = boot_time_s()
            await self._leases.ask(self._image.node_id)
            self._asked_s = asked_s
        sent_s = boot_time_s()
        head = await self._leases.head(self._image.node_id, self._free)
        if head is None or not self._leases.is_others(head.record):
            await self._note_free(head, sent_s)
            return
        record = head.record
        acknowledged = self._leases.journal_id in record.acknowledged
        if not self.active:
            self.active = True
            if not stood:
                self._expect_answer()
            log.info("%s: host %s writes it now, and is followed", self._image.name, record.host)
        if acknowledged and not self.acknowledged:
            log.info("%s: host %s commits each fsync to the store from now on", self._image.name, record.host)
        self.acknowledged = acknowledged
        if acknowledged:
            self._answer.set()

    async def _note_free(self, head: Head[LeaseRecord] | None, sent_s: float) -> None:
        known = self._free.record.counter if self._free is not None else 0
        if self.active or not self._looked or (head.record.counter if head is not None else 0) != known:
            await self._refresh([])  # somebody has written it, perhaps
        if self.active:
            log.info("%s: the lease is free", self._image.name)
        self.active = self.acknowledged = False
        self._looked, self._free = True, head if head is not None and head.record.released else None
        self._valid_s = sent_s + VALID_S
        self._answer.set()

    async def _refresh(self, _: list[None]) -> None:
        """Take over what is newer."""
        if self._stopped:
            return
        try:
            if await self._image.refresh():
                self.changed()
        except StaleError as error:
            if not self._stopped:
                log.info("%s: is followed no more: %s", self._image.name, error)
                self.failed = True
                self._image.unfollow(self)
                self.stop()

    async def run(self) -> None:
        """Ask, and look after the lease, until `stop`."""
        try:
            with self._scope:
                await self._run()
        finally:
            self._stopped = True
            self._answer.set()
            with trio.CancelScope(shield=True):
                with trio.move_on_after(END_S):
                    await self._end()
                if self._joined:
                    await self._leases.withdraw(self._image.node_id)
            self.ended.set()

    async def _end(self) -> None:
        """A look that is under way may be asking just now."""
        try:
            await self._looks.submit(None)
        except NovaError as error:
            log.debug("%s: the last look at the lease: %s", self._image.name, error)

    async def _run(self) -> None:
        if not self._held:
            await trio.sleep(ARM_S)
        while True:
            self._read = False
            began_s = trio.current_time()
            try:
                await self._looks.submit(None)
                if self.active:
                    await self._refreshes.submit(None)
            except NovaError as error:
                log.debug("%s: the lease can not be looked at: %s", self._image.name, error)
            spent_s = trio.current_time() - began_s  # of a slow store: reads shall find a look that still counts
            while True:
                await trio.sleep(POLL_S if self.active else max(POLL_S, LOOK_S - spent_s))
                if self.active or self._read or boot_time_s() - self._asked_s > WANT_RENEW_S:
                    break
