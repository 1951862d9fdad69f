"""Which dead packs leave L3 first, where it holds more than its capacity: what is known of each, and the score made of it.

A dead pack (nothing retained refers to it) is kept for one thing: that somebody writes its chunks again, and finds them stored.
So its score is the chance of that for each byte it takes, up to a factor that all have in common:

    (1 + revivals) * (1 + known) / (1 day + time since it was last of use) * size / (size + `OVERHEAD_BYTES`)

- **last of use**: when a collection last saw something refer to it, or it was made. What died lately comes back sooner than what died
  long ago, and the chance of each further day falls as one over the time (the hazard of a heavy tail; the day keeps it finite).
- **revivals**: how often a pack was dead at one collection and referred to at the next: dedup hits, of all hosts.
- **known**: the share of its chunks that the models of prefetch know, which is content that guests read after they start (`models/`):
  systems and programs, which are written again with each new image, rather than somebody's data.
- **size**: what a pack costs beside its bytes (a name, a footer that is read at each collection) makes a small one worth less.

Bytes cancel out: twice the bytes save twice as much, and take twice the room. What L1's policy knows of single chunks has no part:
it forgets them within hours, and packs die over days.

Revivals and times are kept in the list of the condemned (`novafs.condemned`), so that all hosts' collections know them: 32 bytes
for each dead pack and each that was revived, the `PAST_MAX` that were of use last. Without them and without models the score is
the pack's age.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Final, NamedTuple

import numpy as np
import trio

from novafs import pack
from novafs.asynctools import open_nursery
from novafs.chunk import PACK_ID_SIZE
from novafs.errors import NovaError
from novafs.modelstore import load_saved
from novafs.objectstore.client import StoreClient
from novafs.packcount import PackCount
from novafs.prefetch.markov import TransitionTable
from novafs.prefetch.model import PROFILES, TRANSITIONS
from novafs.prefetch.profile import ProfileBook

log = logging.getLogger(__name__)

PAST_MAX: Final = 16_384
DAY_S: Final = 86_400.0
OVERHEAD_BYTES: Final = 256 << 10
FOOTERS_AT_ONCE: Final = 16
FOOTERS_MAX: Final = 4096
"""Dead packs whose content is looked at: of those that were of use longest ago, since these leave first."""
_ROWS: Final = np.dtype([("id", f"V{PACK_ID_SIZE}"), ("used_s", "<f8"), ("revivals", "<u4"), ("dead", "<u4")])


class Past(NamedTuple):
    """Of one pack. used_s: when it was last of use, by the store's clock; dead: whether the last collection found it so."""

    used_s: float
    revivals: int = 0
    dead: bool = True


def load_pasts(data: bytes) -> dict[bytes, Past]:
    """What `dump_pasts` made; nothing where that is no such thing, as it only orders what may go anyway."""
    if len(data) % _ROWS.itemsize:
        return {}
    rows = np.frombuffer(data, dtype=_ROWS)
    return {
        bytes(row["id"]).ljust(PACK_ID_SIZE, b"\0"): Past(float(row["used_s"]), int(row["revivals"]), bool(row["dead"]))
        for row in rows
        if math.isfinite(row["used_s"])
    }


def dump_pasts(pasts: Mapping[bytes, Past]) -> bytes:
    """As bytes, sorted by id; the `PAST_MAX` that were of use last."""
    kept = sorted(pasts.items(), key=lambda item: -item[1].used_s)[:PAST_MAX]
    rows = np.zeros(len(kept), dtype=_ROWS)
    for number, (pack_id, past) in enumerate(sorted(kept)):
        rows[number] = (np.void(pack_id), past.used_s, min(past.revivals, 1 << 31), past.dead)
    return rows.tobytes()


def next_past(found: PackCount, before: Past | None, *, now_s: float, collected_s: float) -> Past | None:
    """What a collection that found a pack so knows of it; None where there is nothing to remember.

    now_s: when it began; collected_s: when the one before it did, 0 for none: what died between the two was of use after the first.
    """
    if found.referenced:
        if before is None:
            return None
        revivals = before.revivals + before.dead
        return Past(now_s, revivals, dead=False) if revivals else None
    if before is None:
        return Past(min(now_s, max(found.info.modified_s, collected_s)))
    return before._replace(dead=True)


def worth(size: int, past: Past, known: float, *, now_s: float) -> float:
    """The score: of the packs with the lowest the volume is rid first. known: 0 to 1. Finite and above 0."""
    since_s = max(0.0, now_s - past.used_s)
    # To a power of two: among packs of about one size age decides.
    room = 1 << max(0, size).bit_length()
    return (1 + past.revivals) * (1.0 + known) / (DAY_S + since_s) * room / (room + OVERHEAD_BYTES)


async def known_contents(client: StoreClient) -> frozenset[int]:
    """Keys (`novafs.prefetch.base.key_of`) of all content that saved transitions and profiles know; none where they can not be read."""
    known: set[int] = set()
    for name in (TRANSITIONS, PROFILES):
        try:
            blob = await load_saved(client, name)
            if blob is not None:
                known |= await trio.to_thread.run_sync(_contents, name, blob)
        except NovaError as error:
            log.info("what models know of dead packs is left out: %s", error)
    return frozenset(known)


def _contents(name: str, blob: bytes) -> set[int]:
    model = TransitionTable if name == TRANSITIONS else ProfileBook
    return model.from_bytes(blob, f"models/{name}", chunk_size=None).contents()


async def known_shares(client: StoreClient, packs: list[PackCount]) -> dict[bytes, float]:
    """Of each of the first `FOOTERS_MAX` packs the share of chunks that models know; only of those that have any."""
    known = np.array(sorted(await known_contents(client)), dtype=np.uint64)
    shares: dict[bytes, float] = {}
    if not len(known):
        return shares
    slots = trio.CapacityLimiter(FOOTERS_AT_ONCE)

    async def look(found: PackCount) -> None:
        async with slots:
            try:
                footer = await pack.read_footer_bytes(found.pack_id, found.info.size, client.get)
            except NovaError:
                return  # gone or damaged: then it is worth no more than others
        ids = np.ascontiguousarray(np.frombuffer(footer, dtype=pack.FOOTER_DTYPE)["id"]).view("<u8").reshape(-1, 4)[:, 0]
        share = float(np.isin(ids, known).mean()) if len(ids) else 0.0
        if share:
            shares[found.pack_id] = share

    async with open_nursery() as nursery:
        for found in packs[:FOOTERS_MAX]:
            nursery.start_soon(look, found)
    return shares
