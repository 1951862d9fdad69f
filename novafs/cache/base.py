"""What a cache tier is: frames under chunk ids, bounded in bytes, that may be lost at any moment.

A tier answers with whatever it holds and never raises for a chunk that it lacks. It does not verify: `tiered`
verifies every frame that did not come from this process. L1 (`memory`) is called on the trio thread, L2 (`redis`)
from worker threads.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol


class Frame(NamedTuple):
    """A chunk as stored: codec (`novafs.codec.Codec` value) and payload (compressed, or plain for `Codec.NONE`)."""

    codec: int
    payload: bytes


@dataclass(frozen=True, slots=True)
class TierStatistics:
    """Counts since the tier was opened; bytes are payload bytes plus the tier's own overhead per entry."""

    name: str
    entries: int
    used_bytes: int
    capacity_bytes: int
    hits: int
    misses: int
    insertions: int
    evictions: int
    errors: int
    up: bool


class Tier(Protocol):
    """The contract. `tests/contract/test_tier.py` runs on every implementation."""

    name: str

    @property
    def up(self) -> bool:
        """Whether asking is worth it now. False: every call returns at once, with nothing."""
        ...

    def get_many(self, chunk_ids: Sequence[bytes]) -> dict[bytes, Frame]:
        """The frames it holds of those asked for; counts a hit or a miss for each and notes the access."""
        ...

    def put_many(self, frames: Mapping[bytes, Frame], chances: Mapping[bytes, float | None] = ...) -> None:
        """Insert or replace, evicting others to stay within capacity; a frame larger than the capacity is not kept.

        chances: of each the chance, 0 to 1, that it is asked for again, where one is known; for a tier that has no policy of its own.
        """
        ...

    def rate_many(self, chances: Mapping[bytes, float | None]) -> None:
        """What is known now of chunks that it may hold, as in `put_many`. Counts as an access; cheap, and may take effect later."""
        ...

    def contains_many(self, chunk_ids: Sequence[bytes]) -> set[bytes]:
        """Those it holds. Counts nothing, notes no access."""
        ...

    def delete_many(self, chunk_ids: Iterable[bytes]) -> None:
        """Drop them; no error for those that are not there."""
        ...

    def clear(self) -> None:
        """Drop everything of this volume."""
        ...

    def statistics(self) -> TierStatistics:
        """A snapshot of the counters."""
        ...

    def close(self) -> None:
        """Give back connections and memory."""
        ...
