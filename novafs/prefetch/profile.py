"""Boot profiles by themselves: the ordered first chunks after an open, kept by the content of the first.

Nobody records a profile and nobody asks for one. Each open is watched; when the image is closed, or `CHUNKS_MAX` different
chunks have been read, what was read is folded into the profile of its first chunk. At the next open of any image that
begins with the same content the profile is proposed at once, in order of need. Other images may begin alike (two systems
with one boot loader), so up to `VARIANTS_MAX` profiles share a first chunk and the one whose chunks the image at hand holds
is taken; where contents cannot be asked for, the latest.

An entry's chance is how often it was read after an open, with a prior (`PRIOR_USES` of `PRIOR_OPENS`). Boots of clones
touch the same chunks to 98–100 % (docs/prefetch.md), so one boot is enough to trust.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Final

import msgspec
import numpy as np

from novafs.errors import ObjectCorruptError
from novafs.prefetch.base import INDEX_MASK, Key, Place
from novafs.prefetch.blob import seal_model, unseal_model

KIND: Final = b"BOOT"
VERSION: Final = 1
CHUNKS_MAX: Final = 4096
PROFILES_MAX: Final = 64
BYTES_MAX: Final = 3 << 19
"""Of a saved book, 1.5 MiB: about 150 boots of 800 chunks."""
ENTRY_BYTES: Final = 12
"""What a chunk of a profile takes when saved: its key does not compress, its index and uses do."""
VARIANTS_MAX: Final = 4
PRIOR_USES: Final = 1.8
PRIOR_OPENS: Final = 2.0
CHANCE_MIN: Final = 0.3
MATCH_MIN: Final = 0.5
_PROBES: Final = 32
OPENS_MAX: Final = 1000


class Profile:
    """What one family of images reads after an open: index, key and uses of each chunk, in order of the latest open."""

    __slots__ = ("entries", "opens")

    def __init__(self) -> None:
        self.opens = 0
        self.entries: OrderedDict[int, tuple[Key, int]] = OrderedDict()
        """Index → key and uses."""

    def fold(self, order: dict[int, Key]) -> None:
        """One more open, which read these in this order."""
        self.opens = min(self.opens + 1, OPENS_MAX)
        folded: OrderedDict[int, tuple[Key, int]] = OrderedDict()
        for index, key in order.items():
            _, uses = self.entries.pop(index, (key, 0))
            folded[index] = (key, min(uses + 1, self.opens))
        for index, (key, uses) in self.entries.items():
            if len(folded) < CHUNKS_MAX and _chance(uses, self.opens) >= CHANCE_MIN:
                folded[index] = (key, uses)
        self.entries = folded

    def copy(self) -> Profile:
        """One of its own."""
        copied = Profile()
        copied.opens = self.opens
        copied.entries = self.entries.copy()
        return copied

    def joined(self, other: Profile) -> Profile:
        """This and what another host knows of the same images; joined with itself it is the same."""
        most, least = (self, other) if self.opens >= other.opens else (other, self)
        joined = most.copy()
        for index, (key, uses) in least.entries.items():
            ours = joined.entries.get(index)
            if ours is not None:
                joined.entries[index] = (ours[0], max(ours[1], min(uses, joined.opens)))
            elif len(joined.entries) < CHUNKS_MAX and _chance(uses, joined.opens) >= CHANCE_MIN:
                joined.entries[index] = (key, min(uses, joined.opens))
        return joined

    def proposals(self) -> Iterator[tuple[int, float]]:
        """Index and chance, in order of need."""
        for index, (_, uses) in self.entries.items():
            yield index, _chance(uses, self.opens)


def _chance(uses: int, opens: int) -> float:
    return (uses + PRIOR_USES) / (opens + PRIOR_OPENS)


class Recorder:
    """The first chunks after one open."""

    __slots__ = ("first", "order")

    def __init__(self) -> None:
        self.first: Key | None = None
        self.order: dict[int, Key] = {}

    def observe(self, index: int, key: Key) -> bool:
        """A chunk was read. True when there are enough and the recorder should be folded."""
        if self.first is None:
            self.first = key
        if index not in self.order:
            self.order[index] = key
        return len(self.order) >= CHUNKS_MAX


class ProfileRecord(msgspec.Struct, array_like=True):
    """What a sealed book holds: per profile the first key, opens, and columns of indexes, keys and uses."""

    chunk_size: int
    profiles: list[tuple[int, int, bytes, bytes, bytes]]


class ProfileBook:
    """The profiles of a volume, the least recently folded forgotten first."""

    __slots__ = ("_families", "chunk_size", "frozen")

    def __init__(self, chunk_size: int = 65536) -> None:
        self.chunk_size = chunk_size
        self._families: OrderedDict[Key, list[Profile]] = OrderedDict()
        self.frozen = False
        """Whether what is read after an open is not kept."""

    def __len__(self) -> int:
        return sum(len(variants) for variants in self._families.values())

    def contents(self) -> set[Key]:
        """All content that profiles name."""
        return {key for variants in self._families.values() for profile in variants for key, _ in profile.entries.values()}

    def named(self, first: Key) -> set[int]:
        """All chunks that profiles of images that begin with `first` name: what `find` may ask for."""
        return {index for profile in self._families.get(first, ()) for index in profile.entries}

    def clear(self) -> None:
        """Forget everything."""
        self._families.clear()

    def starts(self) -> list[tuple[int, Key]]:
        """Where profiles begin: the index and the content of their first chunk; those that were folded last come first."""
        found = []
        for first, variants in reversed(self._families.items()):
            for profile in variants:
                index = next((index for index, (key, _) in profile.entries.items() if key == first), None)
                if index is not None:
                    found.append((index, first))
        return list(dict.fromkeys(found))

    def find(self, first: Key, content: Callable[[int], Key | None] | None) -> Profile | None:
        """The profile of images that begin with `first`; `content(index)` tells what the image at hand holds, where that is known."""
        variants = self._families.get(first)
        if not variants:
            return None
        if content is None:
            return variants[-1]
        matches = [(_match(profile, content), number) for number, profile in enumerate(variants)]
        share, number = max(matches)
        return variants[number] if share >= MATCH_MIN else None

    def fold(self, recorder: Recorder) -> None:
        """Keep what an open has read."""
        first = recorder.first
        if first is None or len(recorder.order) < 2 or self.frozen:
            return
        variants = self._families.setdefault(first, [])
        self._families.move_to_end(first)
        known = [profile for profile in variants if _match(profile, recorder.order.get) >= MATCH_MIN]
        profile = known[-1] if known else Profile()
        if known:
            variants.remove(profile)
        variants.append(profile)
        del variants[:-VARIANTS_MAX]
        profile.fold(recorder.order)
        if len(self._families) > PROFILES_MAX:
            self._families.popitem(last=False)

    def merge(self, other: ProfileBook) -> None:
        """Take over what another host knows. Of one family's profile known to both, that of more opens gives the order."""
        for first, theirs in other._families.items():
            mine = self._families.get(first)
            if mine is None:
                if len(self._families) < PROFILES_MAX:
                    self._families[first] = [profile.copy() for profile in theirs]
                continue
            for profile in theirs:
                keys = {index: key for index, (key, _) in profile.entries.items()}
                for number, known in enumerate(mine):
                    if _match(known, keys.get) >= MATCH_MIN:
                        mine[number] = known.joined(profile)
                        break
                else:
                    if len(mine) < VARIANTS_MAX:
                        mine.insert(0, profile.copy())

    def to_bytes(self, bytes_max: int = BYTES_MAX) -> bytes:
        """The book as a sealed record of at most about `bytes_max`: what was read last stays. May run in another thread."""
        rows: list[tuple[int, int, bytes, bytes, bytes]] = []
        size = 0
        for first, variants in reversed(list(self._families.items())):
            for profile in reversed(list(variants)):
                entries = list(profile.entries.items())
                size += ENTRY_BYTES * len(entries)
                if size > bytes_max:
                    break
                table = np.array([(index, key) for index, (key, _) in entries], dtype="<u8").reshape(-1, 2)
                uses = np.array([uses for _, (_, uses) in entries], dtype="<u4")
                rows.append((first, profile.opens, table[:, 0].tobytes(), table[:, 1].tobytes(), uses.tobytes()))
        return seal_model(KIND, VERSION, ProfileRecord(self.chunk_size, rows[::-1]))

    @classmethod
    def from_bytes(cls, data: bytes, name: str, *, chunk_size: int | None) -> ProfileBook:
        """The book in an object called `name`. Raises ObjectCorruptError, NewerFormatError."""
        record = unseal_model(KIND, VERSION, data, ProfileRecord, name)
        if record.chunk_size != (chunk_size or record.chunk_size):
            raise ObjectCorruptError(f"{name}: profiles of chunks of {record.chunk_size} bytes, expected {chunk_size}; it will be rebuilt")
        book = cls(record.chunk_size)
        for first, opens, raw_indexes, raw_keys, raw_uses in record.profiles[-PROFILES_MAX * VARIANTS_MAX :]:
            count = len(raw_uses) // 4
            if len(raw_uses) % 4 or len(raw_indexes) != count * 8 or len(raw_keys) != count * 8 or count > CHUNKS_MAX or opens < 1:
                raise ObjectCorruptError(f"{name}: the columns of a profile do not fit together; it will be rebuilt")
            profile = Profile()
            profile.opens = min(opens, OPENS_MAX)
            indexes = np.frombuffer(raw_indexes, dtype="<u8")
            if count and int(indexes.max()) > INDEX_MASK:
                raise ObjectCorruptError(f"{name}: a profile names chunk {int(indexes.max())}, which no image has; it will be rebuilt")
            keys = np.frombuffer(raw_keys, dtype="<u8").tolist()
            uses = np.minimum(np.frombuffer(raw_uses, dtype="<u4"), profile.opens).tolist()
            profile.entries = OrderedDict((index, (key, use)) for index, key, use in zip(indexes.tolist(), keys, uses, strict=True))
            variants = book._families.setdefault(first, [])
            variants.append(profile)
            del variants[:-VARIANTS_MAX]
        while len(book._families) > PROFILES_MAX:
            book._families.popitem(last=False)
        return book


def _match(profile: Profile, content: Callable[[int], Key | None]) -> float:
    """The share of a sample of the profile's chunks that an image holds where the profile says."""
    indexes = list(profile.entries)
    sample = indexes[:: max(1, len(indexes) // _PROBES)]
    if not sample:
        return 0.0
    return sum(content(index) == profile.entries[index][0] for index in sample) / len(sample)


def places(image: Place, profile: Profile) -> Iterator[tuple[Place, float]]:
    """The profile's proposals as places of an image (its place of index 0)."""
    for index, chance in profile.proposals():
        yield image | index, chance
