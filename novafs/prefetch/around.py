"""Read-around: what lies beside a chunk that a guest waits for, while nothing is known yet of how its image is read.

The first boot of an image that no host has booted reads 2 % of it from a hundred places: no stream, nothing learned, and each chunk costs a
round trip. Such reads cluster, so a second request fetches what lies around each miss in the image, and beside it in the
pack. This is no prediction, and is not counted among prefetches: it has an account of its own, which holds it down to what helps:

- Only while the store is far. A region is at most `most_chunks`, and takes no longer to verify than to be asked for (`CHUNK_S`); where
  regions take much longer to come than a single chunk, the link is narrow, and they become smaller (additive increase,
  multiplicative decrease).
- Only while it pays. An image has `CREDIT` chunks to begin with; each that is used earns `EARNS`. The less is left, the smaller are its
  regions, down to `SMALL`. Where reads are random that is spent after a few regions, and earned again so slowly (`TRICKLE` per miss)
  that it costs next to no traffic.
- Never much of the cache: a region is at most one part in `CACHE_SHARE` of it, the credit half of it, and what nobody has used is on
  probation there (`novafs.eviction.probation`).

A miss in a part of an image whose map is not loaded costs two round trips, so the map is read ahead as well, `MAP_CHUNKS` of the image
at a time, once each.

No I/O, no clock; what is remembered is bounded by the cache and `IMAGES_MAX`. The idea is that of the page cache's read-around for
mapped files (Linux, mm/filemap.c, `do_sync_mmap_readahead`), and of the blocks in which other file systems on object stores fetch.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterable
from typing import Final

from novafs.prefetch.base import Key

CHUNK_S: Final = 0.00015
"""What a chunk may cost of the latency: it is about what it costs to verify, unpack and hold one."""
SMALL: Final = 32
"""Chunks of a region of an image whose credit is nearly spent; what a credit of `CREDIT_SHARE` times as many and more affords is larger."""
CREDIT_SHARE: Final = 2
CHUNKS_MIN: Final = 8
FAR_S: Final = 0.005
"""Of a nearer store, or for a smaller region, a second request is not worth its while."""
SLOW: Final = 4.0
"""A region that takes so many times what a demand read does comes over a narrow link."""
CREDIT: Final = 1536.0
EARNS: Final = 8.0
TRICKLE: Final = 1 / 64
CACHE_SHARE: Final = 8
IMAGES_MAX: Final = 256
MAP_CHUNKS: Final = 1 << 15
"""128 nodes of the map, of 16 KiB each: 2 GiB of an image."""
MAPS_MAX: Final = 4096


class ReadAround:
    """The accounts of all images. Images are numbers, chunks are what the engine calls keys."""

    __slots__ = ("_cap", "_capacity", "_credit", "_first", "_held", "_maps", "_most", "arrived_chunks", "used_chunks", "wasted_chunks")

    def __init__(self, *, most_chunks: int, capacity_chunks: int) -> None:
        """most_chunks: of a region; 0: there is no read-around. capacity_chunks: of the cache."""
        self._capacity = capacity_chunks
        self._first = min(CREDIT, capacity_chunks / 2)
        self._most = self._cap = 0
        self.retune(most_chunks=most_chunks)
        self._credit: OrderedDict[int, float] = OrderedDict()
        self._held: OrderedDict[Key, int] = OrderedDict()
        """What came, or is on its way, and was not used yet → its image."""
        self._maps: OrderedDict[tuple[int, int], None] = OrderedDict()
        self.arrived_chunks = 0
        self.used_chunks = 0
        self.wasted_chunks = 0
        """Evicted unused."""

    def retune(self, *, most_chunks: int) -> None:
        """Another size from now on."""
        self._most = self._cap = min(most_chunks, self._capacity // CACHE_SHARE)

    def region(self, image: int, index: int, latency_s: float) -> range:
        """The indexes to fetch around one that was missed, itself among them; empty where there are none. latency_s: of a demand read."""
        size = min(self._cap, int(latency_s / CHUNK_S))
        if size < CHUNKS_MIN or latency_s < FAR_S:
            return range(0)
        credit = self._credit.get(image)
        if credit is None:
            credit = self._credit[image] = self._first
            if len(self._credit) > IMAGES_MAX:
                self._credit.popitem(last=False)
        # A power of two: regions of different sizes lie in each other.
        size = 1 << min(size, max(SMALL, int(credit / CREDIT_SHARE))).bit_length() - 1
        if credit < size:
            self._credit[image] = credit + TRICKLE
            return range(0)
        first = index - index % size
        return range(first, first + size)

    def map_region(self, image: int, index: int, latency_s: float) -> range:
        """The chunks around one that was missed whose entries in the map are to be loaded; empty where that was said before."""
        if self._most < CHUNKS_MIN or latency_s < FAR_S:
            return range(0)
        part = image, index // MAP_CHUNKS
        if part in self._maps or self._credit.get(image, self._first) < SMALL:
            return range(0)
        self._maps[part] = None
        if len(self._maps) > MAPS_MAX:
            self._maps.popitem(last=False)
        first = part[1] * MAP_CHUNKS
        return range(first, first + MAP_CHUNKS)

    def forget(self, image: int) -> None:
        """Take an image for one that was never read."""
        self._credit.pop(image, None)
        for part in [part for part in self._maps if part[0] == image]:
            del self._maps[part]

    def asked(self, image: int, keys: Collection[Key]) -> None:
        """These are being fetched."""
        credit = self._credit.get(image)
        if credit is not None:  # of one whose account was given up nothing is remembered
            self._credit[image] = credit - len(keys)
        for key in keys:
            self._held[key] = image
        while len(self._held) > self._capacity:
            self._held.popitem(last=False)

    def arrived(self, chunks: int) -> None:
        """So many of them came."""
        self.arrived_chunks += chunks

    def failed(self, keys: Iterable[Key]) -> None:
        """These did not."""
        for key in keys:
            self._held.pop(key, None)

    def took(self, seconds: float, latency_s: float) -> None:
        """How long a region took from being asked for to its last chunk, and what a demand read takes."""
        if seconds > SLOW * latency_s:
            self._cap = min(self._most, max(CHUNKS_MIN, self._cap // 2))  # switched off meanwhile, it stays so
        else:
            self._cap = min(self._most, self._cap + 1)

    @property
    def holding(self) -> bool:
        """Whether anything came, or comes, that was not used yet: else `used` need not be called."""
        return bool(self._held)

    def used(self, key: Key) -> None:
        """A guest read a chunk, whatever brought it."""
        image = self._held.pop(key, None)
        if image is not None:
            self.used_chunks += 1
            credit = self._credit.get(image)
            if credit is not None:
                self._credit[image] = min(self._first, credit + EARNS)

    def evicted(self, keys: Iterable[Key]) -> None:
        """Contents left the cache."""
        for key in keys:
            if self._held.pop(key, None) is not None:
                self.wasted_chunks += 1

    def statistics(self) -> dict[str, int]:
        """Chunks that came, were used, and left the cache unused."""
        return {"arrived": self.arrived_chunks, "used": self.used_chunks, "wasted": self.wasted_chunks}
