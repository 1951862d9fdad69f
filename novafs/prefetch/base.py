"""Words that all parts of prefetch share.

A *place* is where a chunk stands: `image << 40 | index`, with the number that the engine's caller gave the image. A *key* is
what the chunk holds: the first eight bytes of its chunk id as an int. Streams and neighbours are about places, transitions
about keys, so that what one clone taught serves every image with the same content.

What the engine's caller answers when it is asked what an image holds at a place (`content` of `PrefetchEngine`), from what it
knows without I/O:

    the key       of the chunk that is mapped there
    NOTHING       a hole, or at or beyond the end of the image: streams stop there, nothing is fetched
    None          not known now (that part of the map is not in memory): the place is fetched blindly, and if it turns
                  out to be a hole the caller says `failed`, after which it is left alone for a while

Accesses to holes are no accesses: there is nothing to fetch, and the caller does not `observe` them.

A *source* watches accesses and names places that may be wanted next, each with its *evidence*: a small int that says how
strong the case is (the run's length and the distance; a share and a count). Sources do not judge and do not know what is
in the cache; `gate.py` learns what evidence is worth. What always holds: a source does no I/O, reads no clock, holds
bounded memory, and gives the same candidates for the same accesses.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import Final, NamedTuple, Protocol

Place = int
Key = int

INDEX_BITS: Final = 40
INDEX_MASK: Final = (1 << INDEX_BITS) - 1


NOTHING: Final[Key] = -1
"""The key of what cannot be fetched: a hole, and whatever lies at or beyond the end of an image. No content has it."""


def place_of(image: int, index: int) -> Place:
    """The place of chunk `index` of an image."""
    return image << INDEX_BITS | index


def key_of(chunk_id: bytes) -> Key:
    """What transitions are keyed by: 64 of the id's 256 bits. Two contents that share them share a prediction, no more."""
    return int.from_bytes(chunk_id[:8], "little")


class Access(NamedTuple):
    """One chunk that a guest touched. `hit` says that it was in L1 and nobody waited."""

    place: Place
    key: Key
    time_s: float
    is_write: bool
    hit: bool
    size: int = 0
    """Bytes of the chunk that were asked for; 0 where nobody knows."""
    more: bool = False
    """The same request asks for the next chunk, too: what comes next is known, and being fetched already."""


class Origin(IntEnum):
    """Which source speaks for a candidate; the first of these that named it."""

    SEQUENTIAL = 0
    MARKOV2 = 1
    MARKOV1 = 2
    ECHO = 3
    LSTM = 4
    SPATIAL = 5
    PROFILE = 6
    DAILY = 7


class Fetch(NamedTuple):
    """A place to fetch before it is asked for, and why. `chance` is the probability of use before eviction."""

    place: Place
    origin: Origin
    chance: float


Evidence = int
Candidate = tuple[Place, Evidence]


class Source(Protocol):
    """What watches and proposes. One object per image, except for the transitions, which all images share."""

    def observe(self, access: Access) -> None:
        """An access, in the order of the guest's. Repeats of the same chunk in a row are left out by the engine."""

    def candidates(self) -> Sequence[Candidate]:
        """Places that may be wanted after the access observed last, nearest need first."""


def magnitude(count: int) -> int:
    """A count as a small bucket: 0, 1, 2–3, 4–7, …, from 64 on 7."""
    return count.bit_length() if count < 64 else 7
