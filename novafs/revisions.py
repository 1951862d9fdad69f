"""Revisions: a chain of immutable, numbered objects under a prefix; the highest number is the head.

A commit is the creation of the next number, and nothing else (design 4). The number is written as
`2**64-1 - counter` in 16 hex digits, so that a listing with the prefix and one key returns the newest.

Each record carries its own random nonce and its predecessor's. Whoever finds the next number taken reads it: with
his own nonce in it his commit had succeeded and only the answer was lost; otherwise somebody else was first.

A number that was collected could be created again by somebody who slept, so superseded numbers are kept for at
least `grace_s`, and a commit that took longer than `grace_s / 2` between reading its base and the answer counts only
if the predecessors of the listed head lead back to it. Time is CLOCK_BOOTTIME, which goes on while the host sleeps.
"""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Callable
from typing import Final, Generic, NamedTuple, Protocol, TypeVar

from novafs.errors import NovaError, ObjectCorruptError, ObjectExistsError, ObjectNotFoundError
from novafs.objectstore.client import StoreClient

_TOP: Final = 2**64 - 1
_REVISION: Final = re.compile("[0-9a-f]{16}")
NONCE_SIZE: Final = 16
OTHERS_AT_ONCE: Final = 100
FRESH_S: Final = 2.0
"""A head that was looked for so short a time ago is committed over without another look: where it is the head no more the next number is
taken, which costs a request. Short, so that this is rare, and never as long as a number takes to be collected."""
GRACE_S_DEFAULT: Final = 24 * 3600.0
GRACE_ASSUMED_S: Final = 600.0
"""What writers take `gc.grace` for where it is more: so they are safe beside a collector with any grace from this up."""


class Record(Protocol):
    """What every record of a chain has: counter, nonce, predecessor's nonce (16 bytes each; empty for the first)."""

    @property
    def counter(self) -> int: ...
    @property
    def nonce(self) -> bytes: ...
    @property
    def predecessor(self) -> bytes: ...


R = TypeVar("R", bound=Record)


class ConflictError(NovaError):
    """Somebody else committed first. `head` is what was found under the number; never shown to a user."""

    def __init__(self, name: str) -> None:
        super().__init__(f"{name} was created by another host")


class Head(NamedTuple, Generic[R]):
    """A record that was read as the head, and the boot time (seconds) before the listing that found it."""

    record: R
    read_s: float


def revision_name(prefix: str, counter: int) -> str:
    """The object's name: `prefix` ends in a slash."""
    return f"{prefix}{_TOP - counter:016x}"


def counter_of(name: str) -> int | None:
    """The counter in an object's name, or None where the name ends in no revision."""
    text = name.rpartition("/")[2]
    return _TOP - int(text, 16) if _REVISION.fullmatch(text) else None


def new_nonce() -> bytes:
    """16 random bytes."""
    return secrets.token_bytes(NONCE_SIZE)


def writers_grace_s(grace_s: float) -> float:
    """The grace that a writer counts with, given its own `gc.grace`: a look more often costs little, one too few costs data."""
    return min(grace_s, GRACE_ASSUMED_S)


def boot_time_s() -> float:
    """Seconds since boot, sleep included."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class Chain(Generic[R]):
    """The revisions under one prefix. `decode(data, name)` parses and checks a record."""

    def __init__(
        self,
        client: StoreClient,
        prefix: str,
        *,
        encode: Callable[[R], bytes],
        decode: Callable[[bytes, str], R],
        grace_s: float = GRACE_S_DEFAULT,
        clock_s: Callable[[], float] = boot_time_s,
    ) -> None:
        self.prefix = prefix
        self._client = client
        self._encode = encode
        self._decode = decode
        self._grace_s = grace_s
        self._clock_s = clock_s

    async def head_counter(self) -> int | None:
        """The newest number by one listing, None where there is none. What is no revision of ours is passed over."""
        after = ""
        while True:
            infos = await self._client.list(self.prefix, after=after, limit=1 if not after else OTHERS_AT_ONCE)
            for info in infos:
                if (counter := counter_of(info.name)) is not None and info.name == revision_name(self.prefix, counter):
                    return counter
            if not infos:
                return None
            after = infos[-1].name

    async def read(self, counter: int) -> R:
        """One record. Raises ObjectNotFoundError, ObjectCorruptError, NewerFormatError."""
        name = revision_name(self.prefix, counter)
        record = self._decode(await self._client.get(name), name)
        if record.counter != counter:
            # A copy under another number. Taken for the head, every commit after it would conflict, and be tried again for ever.
            raise ObjectCorruptError(f"{name}: holds revision {record.counter}, where {counter} should be; run 'novafs fsck'")
        return record

    async def head(self, known: Head[R] | None = None) -> Head[R] | None:
        """The newest record: two round trips, one where it is still the `known` one. None where the chain is empty."""
        for _ in range(8):
            read_s = self._clock_s()
            counter = await self.head_counter()
            if counter is None:
                return None
            if known is not None and known.record.counter == counter:
                return Head(known.record, read_s)
            try:
                return Head(await self.read(counter), read_s)
            except ObjectNotFoundError:
                continue  # collected between listing and reading: there is a newer one
        raise ConflictError(self.prefix)

    async def commit(self, base: Head[R] | None, record: R) -> Head[R]:
        """Create `record` as the successor of `base`; THE COMMIT POINT of everything in NovaFS.

        Raises ConflictError where another host was first (nothing of `record` counts then). After any other error
        it is unknown whether it counts: the caller commits again with the same nonce, or reads the head.
        """
        if record.counter > _TOP:
            raise ObjectCorruptError(f"{self.prefix}: has a revision {_TOP}, which none of ours reaches; run 'novafs fsck'")
        name = revision_name(self.prefix, record.counter)
        try:
            await self._client.create(name, self._encode(record))
        except ObjectExistsError:
            try:
                found = await self.read(record.counter)
            except ObjectNotFoundError:
                raise ConflictError(name) from None  # passed and collected
            if found.nonce != record.nonce:
                raise ConflictError(name) from None
        answered_s = self._clock_s()
        if base is not None and answered_s - base.read_s > self._grace_s / 2 and not await self._is_ancestor(record):
            raise ConflictError(name)
        return Head(record, answered_s)

    async def _is_ancestor(self, record: R) -> bool:
        """Whether the chain of predecessors from the listed head contains `record`."""
        head = await self.head()
        if head is None or head.record.counter < record.counter:
            return False
        current = head.record
        while current.counter > record.counter:
            try:
                previous = await self.read(current.counter - 1)
            except ObjectNotFoundError:
                return False
            if previous.nonce != current.predecessor:
                return False
            current = previous
        return current.nonce == record.nonce
