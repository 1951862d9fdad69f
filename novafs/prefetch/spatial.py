"""Neighbours in the image. What lies next to a chunk was often written, and packed, with it.

Chunks that follow each other in an image lie next to each other in a pack, so a neighbour costs little more than its bytes:
the range request that brings the chunk is widened, not repeated. Whether a neighbour is worth even that, the gate says. Neighbours in the
pack are the other way round: the mount says what a request brings anyway (`PrefetchEngine.offered`), and the gate what to keep of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from novafs.prefetch.base import INDEX_MASK, Access, Candidate

NEIGHBOURS: Final = (-2, -1, 1, 2, 3, 4)
BEFORE: Final = NEIGHBOURS[0]
AFTER: Final = NEIGHBOURS[-1]
EVIDENCE: Final = 200
"""Evidence is this plus the distance; it shares its numbers with none of the sequential source's."""


FAR: Final = 10
"""Evidence of what a range request brings from farther away: this much more or less than `EVIDENCE`."""


def beside(distance: int) -> int:
    """The evidence of a chunk that is so many places ahead of the last access, however far."""
    if BEFORE <= distance <= AFTER:
        return EVIDENCE + distance
    return EVIDENCE + FAR if distance > 0 else EVIDENCE - FAR


class SpatialSource:
    """The places around the last access."""

    __slots__ = ("_candidates",)

    def __init__(self) -> None:
        self._candidates: list[Candidate] = []

    def observe(self, access: Access) -> None:
        place = access.place
        if 2 <= place & INDEX_MASK < INDEX_MASK - 4:
            self._candidates = [(place + distance, EVIDENCE + distance) for distance in NEIGHBOURS]
        else:
            index = place & INDEX_MASK
            self._candidates = [(place + d, EVIDENCE + d) for d in NEIGHBOURS if 0 <= index + d <= INDEX_MASK]

    def candidates(self) -> Sequence[Candidate]:
        return self._candidates
