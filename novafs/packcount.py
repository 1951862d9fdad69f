"""Counting references: one bitmap per pack, frame number in the pack's footer -> bit, and a counter for each frame.

A reference names a payload's offset; the footer's offsets, sorted, turn it into a frame number. A footer is read when
the first reference names its pack, several at a time. Memory is 12 bytes and a bit for each frame of the packs that
are referenced (about 100 MB for a volume of 1 TB in chunks of 64 KiB), and about half a KiB a pack.

`live` bits are set by every retained reference, map nodes and directory pages included, and by the chains of live delta frames
(`novafs.delta`), which their packs' footers repeat. `counts` counts those from
chunks of images and snapshots as they are now, once for each image: they make the figures, and decide nothing.

Never wrong in the dangerous direction: a pack with a reference that its footer does not list, or whose footer can not
be read, is whole and live (`opaque`), and is neither compacted nor condemned.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from novafs import delta, pack
from novafs.asynctools import for_each
from novafs.cache.packs import PackSource
from novafs.chunk import PACK_ID_SIZE, PackId, Reference
from novafs.codec import PLAIN_MAX, Codec
from novafs.errors import CorruptionError, ObjectNotFoundError
from novafs.forward import ForwardTable, Rows, chunk_ids, pack_ids, rows_from
from novafs.objectstore.base import ObjectInfo
from novafs.objectstore.client import StoreClient

FOOTERS_AT_ONCE: Final = 16
FOOTERS_BATCH: Final = 256
BROKEN_MAX: Final = 100_000
"""References that lead nowhere and are remembered one by one; beyond, only their number is."""


class BrokenReference(NamedTuple):
    """A reference that can not be followed. reason: "no such pack" or "not listed in its pack"."""

    reference: Reference
    reason: str


class PackCount:
    """One pack: what the listing says, and, once it is referenced, its frames."""

    __slots__ = (
        "_bases",
        "_bases_taken",
        "_bits",
        "counts",
        "footer_error",
        "info",
        "lengths",
        "listed",
        "loaded",
        "offsets",
        "opaque",
        "pack_id",
        "referenced",
    )

    def __init__(self, pack_id: PackId, info: ObjectInfo, *, listed: bool) -> None:
        self.pack_id = pack_id
        self.info = info
        self.listed = listed
        """Whether it was there when the collection began; only such a pack may be condemned, compacted or deleted."""
        self.loaded = False
        self.referenced = False
        self.opaque = False
        self.footer_error = ""
        self.offsets: npt.NDArray[np.uint32] = np.empty(0, dtype=np.uint32)
        self.lengths: npt.NDArray[np.uint32] = np.empty(0, dtype=np.uint32)
        self.counts: npt.NDArray[np.uint32] = np.empty(0, dtype=np.uint32)
        self._bits: npt.NDArray[np.uint8] = np.empty(0, dtype=np.uint8)
        self._bases: Rows = np.empty(0, dtype=pack.BASE_DTYPE)
        self._bases_taken: npt.NDArray[np.bool_] = np.empty(0, dtype=bool)

    def load(self, footer: pack.Footer) -> None:
        """Take the frames from the footer."""
        rows = np.frombuffer(footer.rows, dtype=pack.FOOTER_DTYPE)
        order = np.argsort(rows["offset"], kind="stable")
        self.offsets = rows["offset"][order]
        self.lengths = rows["length"][order]
        self.counts = np.zeros(len(rows), dtype=np.uint32)
        self._bits = np.zeros((len(rows) + 7) // 8, dtype=np.uint8)
        self._bases = np.frombuffer(footer.bases, dtype=pack.BASE_DTYPE)
        self._bases_taken = np.zeros(len(self._bases), dtype=bool)
        self.loaded = True

    def take_bases(self) -> Rows:
        """What live delta frames in it need, as references; of each frame once."""
        if not len(self._bases) or self._bases_taken.all():
            return self._bases["base"][:0]
        frames = np.minimum(np.searchsorted(self.offsets, self._bases["offset"]), max(0, len(self.offsets) - 1))
        new = self.live[frames] & (self.offsets[frames] == self._bases["offset"]) & ~self._bases_taken
        self._bases_taken |= new
        return np.ascontiguousarray(self._bases["base"][new])

    def frames_over(self, is_bad: Callable[[Rows], npt.NDArray[np.bool_]]) -> list[int]:
        """Payload offsets of live delta frames that need a frame which `is_bad`."""
        if not len(self._bases):
            return []
        taken = self._bases[self._bases_taken]
        return sorted({int(offset) for offset in taken["offset"][is_bad(np.ascontiguousarray(taken["base"]))]})

    def find(self, offsets: npt.NDArray[np.uint32], lengths: npt.NDArray[np.uint32]) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.bool_]]:
        """Frame numbers of payloads, and whether the footer lists each so."""
        if not len(self.offsets):
            return np.zeros(len(offsets), dtype=np.intp), np.zeros(len(offsets), dtype=bool)
        at = np.minimum(np.searchsorted(self.offsets, offsets), len(self.offsets) - 1)
        return at, (self.offsets[at] == offsets) & (self.lengths[at] == lengths)

    def mark(self, frames: npt.NDArray[np.intp]) -> None:
        """Set the bits of frames."""
        np.bitwise_or.at(self._bits, frames >> 3, (1 << (frames & 7)).astype(np.uint8))

    @property
    def live(self) -> npt.NDArray[np.bool_]:
        """Which frames something retained refers to."""
        found: npt.NDArray[np.bool_] = np.unpackbits(self._bits, count=len(self.offsets), bitorder="little").astype(bool)
        return found

    def live_offsets(self) -> set[int] | None:
        """Payload offsets of the live frames; None where its footer does not tell."""
        return set(self.offsets[self.live].tolist()) if self.loaded and not self.opaque else None

    @property
    def live_bytes(self) -> int:
        """Payload bytes of the live frames."""
        return int(self.lengths[self.live].sum(dtype=np.int64)) if self.loaded else 0

    @property
    def payload_bytes(self) -> int:
        """Payload bytes of all frames, as far as they are known."""
        return int(self.lengths.sum(dtype=np.int64)) if self.loaded else self.info.size


@dataclass(frozen=True, slots=True)
class CountFigures:
    """references: of images and snapshots as they are now, to chunks; unique_chunks: frames they refer to; unique_bytes, referenced_bytes:
    payloads of those, each once, and once for each reference; histogram: "1", "2", "3-4", "5-8", … -> chunks with so many references."""

    references: int
    unique_chunks: int
    unique_bytes: int
    referenced_bytes: int
    histogram: dict[str, int] = field(default_factory=dict)


class PackTable:
    """All packs of a volume, and what refers to them. On the trio thread alone."""

    def __init__(self, client: StoreClient, infos: Iterable[ObjectInfo], forwards: ForwardTable) -> None:
        self._client = client
        self.forwards = forwards
        self.packs: dict[bytes, PackCount] = {}
        self.strays: list[str] = []
        self.broken: dict[tuple[bytes, int], BrokenReference] = {}
        """(pack id, offset) as the reference names it, resolved -> what is wrong."""
        self.broken_count = 0
        self.unlisted: dict[bytes, dict[int, Reference]] = {}
        """References into packs whose footer can not be read or does not list them: pack id -> offset -> reference."""
        for info in infos:
            pack_id = pack.pack_id_of(info.name)
            if pack_id is None:
                self.strays.append(info.name)
            else:
                self.packs[pack_id] = PackCount(pack_id, info, listed=True)
        self._missing: set[bytes] = set()

    def __contains__(self, pack_id: object) -> bool:
        return pack_id in self.packs

    def __iter__(self) -> Iterator[PackCount]:
        return iter(self.packs.values())

    @property
    def stored_bytes(self) -> int:
        """Of all packs that were listed."""
        return sum(found.info.size for found in self if found.listed)

    async def add(self, rows: Rows, weights: npt.NDArray[np.int64] | None = None) -> None:
        """Count references; holes are not among them. weights: of each one as a chunk's, None for nodes and pages.

        Raises what the store raises.
        """
        if not len(rows):
            return
        rows = self.forwards.resolve(rows)
        packs = pack_ids(rows)
        order = np.argsort(packs, kind="stable")
        names, starts = np.unique(packs[order], return_index=True)
        ids = [bytes(name).ljust(PACK_ID_SIZE, b"\0") for name in names]
        await self._load(ids)
        bounds = [*starts.tolist(), len(rows)]
        for number, pack_id in enumerate(ids):
            where = order[bounds[number] : bounds[number + 1]]
            found = self.packs.get(pack_id)
            part = rows[where]
            if found is None:
                self._break(part, "no such pack")
                continue
            found.referenced = True
            if not found.loaded:
                found.opaque = True
                self._note_unlisted(found, part)
                continue
            frames, listed = found.find(part["offset"], part["length"])
            if not listed.all():
                found.opaque = True
                self._break(part[~listed], "not listed in its pack")
                self._note_unlisted(found, part[~listed])
                frames, where = frames[listed], where[listed]
            found.mark(frames)
            if weights is not None:
                np.add.at(found.counts, frames, weights[where].astype(np.uint32))

    def _break(self, rows: Rows, reason: str) -> None:
        self.broken_count += len(rows)
        for number in range(min(len(rows), max(0, BROKEN_MAX - len(self.broken)))):
            reference = Reference.unpack(rows[number : number + 1].tobytes())
            self.broken[(reference.pack_id, reference.offset)] = BrokenReference(reference, reason)

    def _note_unlisted(self, found: PackCount, rows: Rows) -> None:
        # At most as many as a pack has frames, so at most 8192 of them.
        known = self.unlisted.setdefault(found.pack_id, {})
        for number in range(len(rows)):
            if len(known) >= pack.FRAMES_MAX:
                break
            reference = Reference.unpack(rows[number : number + 1].tobytes())
            known[reference.offset] = reference

    async def _load(self, pack_ids: Iterable[bytes]) -> None:
        wanted = [i for i in pack_ids if i not in self._missing and ((found := self.packs.get(i)) is None or _unread(found))]
        if not wanted:
            return
        await for_each((PackId(pack_id) for pack_id in wanted), self._load_one, at_once=FOOTERS_AT_ONCE)

    async def _load_one(self, pack_id: PackId) -> None:
        found = self.packs.get(pack_id)
        try:
            if found is None:
                # Uploaded since the listing, by a commit that was faster than the walk, or not there at all.
                info = await self._client.head(pack.pack_name(pack_id))
                found = self.packs.get(pack_id) or PackCount(pack_id, info, listed=False)
            footer = await pack.read_whole_footer(pack_id, found.info.size, self._client.get)
            if not found.loaded:  # another look may have been faster, and its bits must stay
                found.load(footer)
        except ObjectNotFoundError:
            self._missing.add(pack_id)
            self.packs.pop(pack_id, None)
            return
        except CorruptionError as error:
            if found is not None:
                found.footer_error = str(error)
        if found is not None:
            self.packs[pack_id] = found

    async def add_bases(self) -> None:
        """Count what live delta frames need, and what that needs: after all references, and before anything is judged by the counts.

        Raises what the store raises.
        """
        asked: set[tuple[bytes, int]] = set()
        while True:
            rows = [found.take_bases() for found in self.packs.values()]
            rows.append(await self._bases_unlisted(asked))
            needed = np.concatenate(rows) if rows else rows_from(())
            if not len(needed):
                return
            await self.add(needed)

    async def _bases_unlisted(self, asked: set[tuple[bytes, int]]) -> Rows:
        """Of delta frames that no footer tells of: what they say themselves. One that says nothing can not be read anyway."""
        source = PackSource(self._client)
        chains: list[Reference] = []
        for pack_id, references in list(self.unlisted.items()):
            for reference in list(references.values()):
                key = (pack_id, reference.offset)
                if reference.codec != Codec.HDE or reference.length > PLAIN_MAX or key in asked:
                    continue
                asked.add(key)
                with contextlib.suppress(CorruptionError, ObjectNotFoundError):
                    (payload,) = await source.read_frames([reference])
                    chains += delta.read_chain(payload)
        return rows_from(chains)

    async def load_footers(self, progress: Callable[[str, int], None]) -> None:
        """Read every footer that no reference has made known yet: for `fsck`. progress: told of "packs"."""
        unread = [p.pack_id for p in self if _unread(p)]
        for start in range(0, len(unread), FOOTERS_BATCH):
            await self._load(unread[start : start + FOOTERS_BATCH])
            progress("packs", start)

    def live_rows(self, found: PackCount, footer: bytes) -> list[pack.PackRow]:
        """The live frames of a pack, by the footer that was counted with, in the order of their places."""
        rows = np.frombuffer(footer, dtype=pack.FOOTER_DTYPE)
        rows = rows[np.argsort(rows["offset"], kind="stable")][found.live]
        return [
            pack.PackRow(
                Reference(chunk.ljust(32, b"\0"), found.pack_id, int(row["offset"]), int(row["length"]), int(row["codec"])),
                int(row["plain"]),
            )
            for chunk, row in zip(chunk_ids(rows).tolist(), rows, strict=True)
        ]

    def figures(self) -> CountFigures:
        """What the counters say."""
        references = unique = unique_bytes = referenced_bytes = 0
        buckets = np.zeros(34, dtype=np.int64)
        for found in self:
            if not found.loaded:
                continue
            used = found.counts > 0
            counts, lengths = found.counts[used].astype(np.int64), found.lengths[used].astype(np.int64)
            references += int(counts.sum())
            unique += len(counts)
            unique_bytes += int(lengths.sum())
            referenced_bytes += int((counts * lengths).sum())
            if len(counts):
                buckets += np.bincount(np.ceil(np.log2(counts)).astype(np.intp), minlength=34)
        histogram = {_bucket(power): int(count) for power, count in enumerate(buckets) if count}
        return CountFigures(references, unique, unique_bytes, referenced_bytes, histogram)


def _unread(found: PackCount) -> bool:
    return not found.loaded and not found.footer_error


def _bucket(power: int) -> str:
    low, high = (1 << power >> 1) + 1, 1 << power
    return str(high) if low >= high else f"{low}-{high}"
