"""Codec `hde` (hierarchical delta encoding): a rewritten chunk stored as what differs from its last version.

    payload, little endian   magic "HD" (2), version 1 (u8), depth (u8), length of the content (u32)
                             depth references of 64 bytes (`novafs.chunk`): the chain, from the last version down
                             one Zstandard frame (RFC 8878) that declares its content size, without checksum and without
                             dictionary id, made with the content of the chain's first reference as a raw dictionary

The chain names every frame that reading takes: its first is what this one was made against, each next what the one before was
made against, the last a frame of another codec. So a reader asks for all of them at once, however deep, follows no links, and no
damage can lead it in a circle. `DEPTH_MAX` bounds it. A pack's footer repeats the chains of its frames (`novafs.pack`), and a
collection keeps alive what the chains of live frames name (`novafs.packcount`).

What always holds, so that nothing that is needed is ever lost:

- Only what the map of a committed generation names is a base, by the writer of that very image: what the generation refers to is
  retained when the new frame is made, as for every reference that goes from one generation to the next.
- No reference to a delta frame is made but from one that is retained: the map of the commit that made it, and what is copied from that to
  the next generation, a clone, a snapshot. Dedup does not find it (`novafs.dedup`): a dead one does not keep its bases, so nothing may
  bring it back to life.
- Compaction and repair copy the content of one, never the frame: a forward leads to a frame of another codec. So no move of frames
  can make a chain longer than it was written, or lead it to itself.
- L1 and L2 hold content under frames that are whole: this codec is of packs alone.

Whether it pays is measured (`Judge`); where it does not, it is left for a while, and tried again later. Turned down: deltas against the
first version alone (one base to read, but it is not in memory when the third version is written), and rolling hashes across
chunks (no gain where guests write in place).

Trio thread only, but for `encode` and `decode`, which are pure.
"""

from __future__ import annotations

import hashlib
import struct
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from time import thread_time
from typing import Final, NamedTuple

import zstandard

from novafs.cache.base import Frame
from novafs.chunk import REFERENCE_SIZE, Reference
from novafs.codec import PLAIN_MAX, Codec
from novafs.errors import CorruptionError

DEPTH_MAX: Final = 4
RATIO_MIN: Final = 2
"""How many times smaller than the other codec's frame a delta must be: below, reading its bases costs more than it saves."""
CHAINS_MAX: Final = 16_384
"""Delta frames whose chain a volume remembers, up to half a KiB each: a chunk whose chain is not known is stored whole."""
JUDGES_MAX: Final = 1024

TRIALS: Final = 64
"""Chunks after which a judge decides."""
GAIN_MIN: Final = 0.15
"""Share of the uploads that must be spared."""
RATE_MIN: Final = 8e6
"""Bytes spared for each second of processor time: below, a link of 64 Mbit/s is as fast as the encoder."""
REST_MIN: Final = 1024
REST_MAX: Final = 1 << 16
"""Chunks that a judge lets pass after it found that deltas do not pay: the first time, and at most."""

_MAGIC: Final = b"HD"
_VERSION: Final = 1
_HEADER: Final = struct.Struct("<2sBBI")
_WINDOW_MAX: Final = 8 << 20
_LEVEL_SMALL: Final = 1
_LEVEL_LARGE: Final = 3
"""Beyond 128 KiB level 1 has too short a table to find the base again (measured: it finds nothing at 1 MiB)."""

Chain = tuple[Reference, ...]


class Base(NamedTuple):
    """The last version of a chunk: where it is stored, and its content."""

    reference: Reference
    plain: bytes


# --- the bytes --------------------------------------------------------------------------------------------------


def encode(plain: bytes, base: bytes, chain: Chain, *, below: int) -> Frame | None:
    """The delta frame of `plain` against `base`, the content of the chain's first reference; None where it takes `below` bytes or more.

    None as well where `base` is not what the reference names: memory is not trusted with what others will be read by.
    """
    if not 1 <= len(chain) <= DEPTH_MAX or hashlib.sha256(base).digest() != chain[0].chunk_id:
        return None
    level = _LEVEL_SMALL if len(plain) <= 128 << 10 else _LEVEL_LARGE
    compressor = zstandard.ZstdCompressor(
        level=level, dict_data=_dictionary(base), write_checksum=False, write_content_size=True, write_dict_id=False
    )
    header = _HEADER.pack(_MAGIC, _VERSION, len(chain), len(plain)) + b"".join(reference.pack() for reference in chain)
    payload = header + compressor.compress(plain)
    return Frame(Codec.HDE, payload) if len(payload) < below else None


def read_chain(payload: bytes) -> Chain:
    """The chain that a payload names, checked: 1 to `DEPTH_MAX` references, all but the last to delta frames. Raises CorruptionError."""
    if len(payload) < _HEADER.size:
        raise CorruptionError(f"delta frame of {len(payload)} bytes is too short for its header")
    magic, version, depth, length = _HEADER.unpack_from(payload)
    if magic != _MAGIC or version != _VERSION or not 1 <= depth <= DEPTH_MAX or length > PLAIN_MAX:
        raise CorruptionError(f"delta frame has no valid header: version {version}, depth {depth}, {length} bytes of content")
    if len(payload) < _HEADER.size + depth * REFERENCE_SIZE:
        raise CorruptionError(f"delta frame of {len(payload)} bytes is too short for the {depth} references of its chain")
    chain = tuple(Reference.unpack(payload, _HEADER.size + number * REFERENCE_SIZE) for number in range(depth))
    if not well_formed(chain):
        raise CorruptionError("delta frame names a chain that no writer makes")
    return chain


def well_formed(chain: Sequence[Reference]) -> bool:
    """Whether all of it but the last are delta frames, and the last is none."""
    if not 1 <= len(chain) <= DEPTH_MAX or any(reference.length > PLAIN_MAX or not reference.length for reference in chain):
        return False
    return [reference.codec == Codec.HDE for reference in chain] == [True] * (len(chain) - 1) + [False]


def decode(payload: bytes, base: bytes, plain_max: int) -> bytes:
    """The content of a delta frame, at most `plain_max` bytes. Raises CorruptionError for anything that `encode` does not make."""
    read_chain(payload)
    _, _, depth, length = _HEADER.unpack_from(payload)
    body = payload[_HEADER.size + depth * REFERENCE_SIZE :]
    try:
        parameters = zstandard.get_frame_parameters(body)
        if parameters.content_size != length or length > plain_max:
            raise CorruptionError(f"delta frame declares {length} and {parameters.content_size} bytes of content, at most {plain_max}")
        decompressor = zstandard.ZstdDecompressor(dict_data=_dictionary(base), max_window_size=_WINDOW_MAX)
        plain = decompressor.decompress(body, max_output_size=length, allow_extra_data=False)
    except (zstandard.ZstdError, ValueError) as error:
        raise CorruptionError(f"delta frame of {len(payload)} bytes does not decode: {error}") from error
    if len(plain) != length:
        raise CorruptionError(f"delta frame declares {length} bytes of content, holds {len(plain)}")
    return plain


def _dictionary(base: bytes) -> zstandard.ZstdCompressionDict:
    return zstandard.ZstdCompressionDict(base, dict_type=zstandard.DICT_TYPE_RAWCONTENT)


# --- what a volume knows of its deltas --------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class DeltaStatistics:
    """tried: chunks and nodes for which a delta was made; stored: that were stored so; delta_bytes: what those take; saved_bytes: by how
    much less that is than they would have taken; cpu_s: of making them. reads: delta frames read from L3; base_reads, base_bytes: frames
    that were read from L3 for them, and their payloads; resting: images for which it was found not to pay."""

    tried: int = 0
    stored: int = 0
    delta_bytes: int = 0
    saved_bytes: int = 0
    cpu_s: float = 0.0
    reads: int = 0
    base_reads: int = 0
    base_bytes: int = 0
    resting: int = 0


class Trial(NamedTuple):
    """What one attempt gave: bytes of the frame without, and of the one that is stored; seconds of processor time."""

    whole_bytes: int
    stored_bytes: int
    cpu_s: float


class Judge:
    """Whether deltas pay for one image: after each `TRIALS` attempts it goes on, or rests for so many chunks.

    They pay while they spare `GAIN_MIN` of the uploads, more bytes than reading brings again for bases, and `RATE_MIN` for each second.
    """

    def __init__(self) -> None:
        self._rest = 0
        self._next_rest = REST_MIN
        self._tried = self._whole = self._saved = self._bases = 0
        self._cpu_s = 0.0

    @property
    def resting(self) -> bool:
        """Whether chunks are stored whole for now."""
        return self._rest > 0

    def wants(self) -> bool:
        """Whether to try the next chunk; counts it."""
        if self._rest:
            self._rest -= 1
            return False
        return True

    def note(self, trial: Trial) -> None:
        """What an attempt gave."""
        self._tried += 1
        self._whole += trial.whole_bytes
        self._saved += trial.whole_bytes - trial.stored_bytes
        self._cpu_s += trial.cpu_s
        if self._tried >= TRIALS:
            self._decide()

    def note_bases(self, size: int) -> None:
        """So many bytes of bases were read for frames of this image."""
        self._bases += size

    def _decide(self) -> None:
        pays = self._saved >= GAIN_MIN * self._whole and self._saved > self._bases and self._saved >= RATE_MIN * self._cpu_s
        if pays:
            self._next_rest = REST_MIN
        else:
            self._rest, self._next_rest = self._next_rest, min(2 * self._next_rest, REST_MAX)
        self._tried = self._whole = self._saved = self._bases = 0
        self._cpu_s = 0.0


class Deltas:
    """Of one volume: chains of the delta frames that this process has written or read, the judges, the figures.

    enabled: whether any are made here. Those of others are read whatever it says.
    """

    def __init__(self, *, enabled: bool) -> None:
        self.enabled = enabled
        self._chains: OrderedDict[tuple[bytes, int], tuple[bytes, bytes]] = OrderedDict()
        self._judges: OrderedDict[bytes, Judge] = OrderedDict()
        self._tried = self._stored = self._whole_bytes = self._delta_bytes = self._reads = self._base_reads = self._base_bytes = 0
        self._cpu_s = 0.0

    def note(self, reference: Reference, chain: Chain, image: bytes = b"") -> None:
        """The frame at this place has this chain. image: whose it is, where that is known."""
        key = (reference.pack_id, reference.offset)
        known = self._chains.pop(key, None)
        packed = b"".join(base.pack() for base in chain)
        self._chains[key] = (packed, image or (known[1] if known is not None else b""))
        if len(self._chains) > CHAINS_MAX:
            self._chains.popitem(last=False)

    def chain_over(self, reference: Reference) -> Chain | None:
        """The chain of a frame that is made against this one; None where that is not known, or would be too deep."""
        if reference.codec != Codec.HDE:
            return (reference,)
        known = self._chains.get((reference.pack_id, reference.offset))
        if known is None or len(known[0]) >= DEPTH_MAX * REFERENCE_SIZE:
            return None
        self._chains.move_to_end((reference.pack_id, reference.offset))
        return (reference, *(Reference.unpack(known[0], at) for at in range(0, len(known[0]), REFERENCE_SIZE)))

    def judge(self, image: bytes) -> Judge:
        """The one of an image."""
        found = self._judges.pop(image, None)
        if found is None:
            found = Judge()
        self._judges[image] = found
        if len(self._judges) > JUDGES_MAX:
            self._judges.popitem(last=False)
        return found

    def note_trial(self, image: bytes, trial: Trial, *, stored: bool) -> None:
        """An attempt for a chunk of an image, and whether its delta is stored."""
        self.judge(image).note(trial)
        self._tried += 1
        self._cpu_s += trial.cpu_s
        if stored:
            self._stored += 1
            self._whole_bytes += trial.whole_bytes
            self._delta_bytes += trial.stored_bytes

    def note_read(self, reference: Reference, chain: Chain, base_reads: int, base_bytes: int) -> None:
        """A delta frame was read from L3, and so many frames for it. chain: none where it was not proven: no checksum covers it, and what
        was made over a wrong one could never be read."""
        if chain:
            self.note(reference, chain)
        known = self._chains.get((reference.pack_id, reference.offset))
        if known is not None and known[1]:
            self.judge(known[1]).note_bases(base_bytes)
        self._reads += 1
        self._base_reads += base_reads
        self._base_bytes += base_bytes

    def statistics(self) -> DeltaStatistics:
        """A snapshot of the counters."""
        return DeltaStatistics(
            tried=self._tried,
            stored=self._stored,
            delta_bytes=self._delta_bytes,
            saved_bytes=self._whole_bytes - self._delta_bytes,
            cpu_s=self._cpu_s,
            reads=self._reads,
            base_reads=self._base_reads,
            base_bytes=self._base_bytes,
            resting=sum(judge.resting for judge in self._judges.values()),
        )


def attempt(plain: bytes, base: bytes, chain: Chain, whole: Frame) -> tuple[Frame | None, Trial]:
    """A delta where it is `RATIO_MIN` times smaller than `whole`, the frame without; and what the attempt gave. In a worker thread."""
    began_s = thread_time()
    # A payload of exactly a half is small enough.
    frame = encode(plain, base, chain, below=len(whole.payload) // RATIO_MIN + 1)
    cpu_s = thread_time() - began_s
    return frame, Trial(len(whole.payload), len((frame or whole).payload), cpu_s)
