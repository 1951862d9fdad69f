"""Folding a patch into the map while fsyncs go on, so that none of them waits for packs.

Patches grow with every fsync (`novafs.patch`), and so do their uploads; sooner or later one has to go into the map, which takes a pack
and then a generation that names it. A fold stores the pack and the map's nodes ahead, beside the commits: the next of them has only
to name the new map, and carries what has been written since.

Always holds of a fold whose `base` is the image's map (which may have grown holes at its end since the start, and `base` with it):
`base` under `layer` under `since` is what the newest generation says. What was stored counts for nothing until a generation names it;
a fold that is dropped leaves a pack that collection finds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple

import trio

from novafs import patch
from novafs.dirty import Layer
from novafs.imagemap import MapState
from novafs.packwriter import UsedPacks

FOLD_BYTES: Final = 64 << 10
"""Patches of this size are folded. A pack takes one or two fsyncs to store, so they stay below twice this."""
FOLD_EXTENTS: Final = 128
"""Or of so many extents, however short."""
FOLD_RETRY_S: Final = 1.0
"""How long after a fold that failed the next one is tried: each may leave a pack."""


class Stored(NamedTuple):
    """A map whose nodes and chunks are in L3, the packs that it may newly refer to, and its figures as a generation has them."""

    state: MapState
    used: UsedPacks
    stored_bytes: int
    allocated_chunks: int


@dataclass(slots=True, eq=False)
class Fold:
    """One of an image, from its start until a commit has named its result or it is dropped."""

    base: MapState
    layer: Layer
    since: Layer | None = None
    """What commits have added over `layer` since the start."""
    stored: Stored | None = None
    """`layer` written into `base`, once that is done."""
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    """Of its task."""

    def add(self, frozen: Sequence[Layer], chunk_size: int) -> bool:
        """A commit has added these layers. False where they are no patch: the fold can not go on."""
        self.since = patch.extended(self.since, frozen, chunk_size)
        return self.since is not None


def worthwhile(extents: Sequence[patch.Extent]) -> bool:
    """Whether a generation's patch is to be folded."""
    return len(extents) >= FOLD_EXTENTS or sum(len(data) for _, data in extents) >= FOLD_BYTES
