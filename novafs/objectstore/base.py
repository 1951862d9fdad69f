"""What an object store must do: named, immutable objects, created once.

Calls are blocking and are made from worker threads; an implementation is thread-safe and keeps no state that
matters beyond its connection pool. `novafs.objectstore.client.StoreClient` is the async side.

Names are relative to the volume (``packs/3f/…``), use ``/`` and ``[A-Za-z0-9._-]``, at most 512 bytes.

Every call may raise `StoreUnavailableError` (retryable), `StoreDeniedError`, `BucketMissingError`; what else a
call raises, and whether it may be repeated, is said at each.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple


class ObjectInfo(NamedTuple):
    """One row of a listing. size: bytes; modified_s: seconds since the epoch, by the store's own clock."""

    name: str
    size: int
    modified_s: float


class StoreUsage(NamedTuple):
    """capacity_bytes and free_bytes of what the store lies on; None where a store has no such bound (S3)."""

    capacity_bytes: int | None
    free_bytes: int | None


class ObjectStore(ABC):
    """The contract. `tests/contract/test_objectstore.py` runs on every implementation."""

    url: str
    """Where it is, without credentials: for messages and logs."""

    @abstractmethod
    def get(self, name: str, start: int = 0, length: int | None = None) -> bytes:
        """The object's bytes, or `length` of them from `start`. Idempotent.

        A range that reaches past the end returns what there is (maybe nothing). A body that ends early raises
        StoreUnavailableError, never returns short. Raises ObjectNotFoundError.
        """

    @abstractmethod
    def create(self, name: str, data: bytes) -> None:
        """Make the object, whole or not at all, durable on return; never replace one.

        Raises ObjectExistsError where the name is taken. After an unanswered try that may be the caller's own
        object: compare content before believing that somebody else was first. Raises StoreFullError.
        """

    @abstractmethod
    def put(self, name: str, data: bytes) -> None:
        """Make or replace the object, atomically and durably. Only for leases and pins, by their one holder. Idempotent."""

    @abstractmethod
    def list(self, prefix: str, *, after: str = "", limit: int | None = None) -> list[ObjectInfo]:
        """Objects whose name starts with `prefix` and is greater than `after`, in name order, at most `limit`. Idempotent."""

    @abstractmethod
    def head(self, name: str) -> ObjectInfo:
        """Size and time of one object. Idempotent. Raises ObjectNotFoundError."""

    @abstractmethod
    def delete(self, name: str) -> None:
        """Remove the object; no error where there is none. Idempotent."""

    @abstractmethod
    def clock_s(self) -> float:
        """The store's own idea of now, seconds since the epoch (S3: the Date of an answer)."""

    @abstractmethod
    def usage(self) -> StoreUsage:
        """Space of what the store lies on."""

    @abstractmethod
    def probe_create_only(self) -> bool:
        """Whether `create` really refuses to replace, tried on a scratch object under ``probe/`` that is deleted again."""

    def delete_many(self, names: Sequence[str]) -> None:
        """Remove objects; no error for those that are not there. Idempotent; stores override it with a batch call."""
        for name in names:
            self.delete(name)

    def renew(self) -> None:  # noqa: B027  # a store without credentials has none to read again
        """Read the credentials again, and use them from now on if the store takes them. Raises what it raises; then the old ones stay."""

    def close(self) -> None:  # noqa: B027  # a store without connections has nothing to give back
        """Give back connections. The store is not used after."""
