"""Codecs: how a frame's payload holds a chunk's plain content.

What always holds: `decode(frame.codec, frame.payload, plain_max)` of what `encode` returned is the plain content.
A payload that is anything else than what some `encode` made raises CorruptionError, never another exception, and
no more than `plain_max` bytes are allocated for its content, whatever length it declares: every format declares
its plain length at a fixed place, and that is compared before the library is called. That the content is the
right one is for the caller to verify by its SHA-256; no format here is relied on for a checksum.

    value  codec   payload
        0  NONE    the plain content
        1  GZIP    one gzip member (RFC 1952), no file name, time 0
        2  LZ4     plain length (u32, little endian), then one LZ4 block
        3  SNAPPY  raw Snappy: plain length as a varint, then the elements; not the framing format
        4  ZSTD    one Zstandard frame (RFC 8878) that declares its content size; no dictionary, no checksum
        5  HDE     a delta frame, that needs another to be read: `novafs.delta`. Not for `encode` and `decode`, nor for any tier

The ratio rule: a payload that is not smaller than the plain content by 1.2 or more is not worth the time to decode
it at each read, so `encode` answers with codec NONE and the plain content itself.

All calls are thread-safe and release the interpreter lock for the work proper.
"""

from __future__ import annotations

import difflib
import struct
import threading
import zlib
from collections.abc import Callable, Sequence
from enum import IntEnum
from typing import Final

import lz4.block
import snappy
import zstandard

from novafs.cache.base import Frame
from novafs.errors import ConfigError, CorruptionError

PLAIN_MAX: Final = 4 << 20
"""No frame of a volume holds more plain content than this: chunks are at most 1 MiB, map and directory nodes less."""

LEVEL_MAX: Final = {"gzip": 9, "lz4": 12, "zstd": 22}
"""The highest level of each codec that has levels; the lowest is 1."""

_RATIO_NUMERATOR: Final = 6
_RATIO_DENOMINATOR: Final = 5
_LZ4_HIGH_FROM: Final = 3
"""lz4.block's high-compression mode starts at 3; levels 1 and 2 are its default mode."""
_ZSTD_DEFAULT_LEVEL: Final = 3
_TOGETHER_MIN: Final = 4
"""One call for several contents makes a Zstandard context of its own: of no use for fewer."""
_GZIP_DEFAULT_LEVEL: Final = 6
_GZIP_WINDOW_BITS: Final = 31
"""zlib's way to say: largest window, gzip header and trailer."""
_GZIP_OVERHEAD: Final = 18
"""Header of 10 bytes, trailer of 8 (RFC 1952, section 2.3)."""
_ZSTD_WINDOW_MAX: Final = 8 << 20
"""The decoder refuses a frame that asks for more: those that `encode` makes never do, whatever the level."""

_U32: Final = struct.Struct("<I")


class Codec(IntEnum):
    """How a payload is compressed. The values are part of the format."""

    NONE = 0
    GZIP = 1
    LZ4 = 2
    SNAPPY = 3
    ZSTD = 4
    HDE = 5


WHOLE: Final = tuple(codec for codec in Codec if codec is not Codec.HDE)
"""Codecs whose frames can be read by themselves: those that `encode` knows, and a tier can have."""


def parse_codec(name: str) -> Codec:
    """The codec of that name, in any case. Raises ConfigError that names the known ones, the nearest first."""
    word = name.strip().lower()
    known = [codec.name.lower() for codec in WHOLE]
    if word in known:
        return Codec[word.upper()]
    near = difflib.get_close_matches(word, known, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ConfigError(f"{name!r} is no codec: expected one of {', '.join(known)}{hint}")


def check_level(codec: Codec, level: int | None) -> None:
    """Raise ConfigError where `level` is none of this codec's. None is every codec's own default."""
    if level is None:
        return
    highest = LEVEL_MAX.get(codec.name.lower())
    if highest is None:
        raise ConfigError(f"codec {codec.name.lower()} has no levels, found level {level}: leave the level out")
    if not 1 <= level <= highest:
        raise ConfigError(f"codec {codec.name.lower()} has levels 1 to {highest}, found {level}")


def encode(plain: bytes, codec: Codec, level: int | None = None) -> Frame:
    """The frame of `plain` under `codec`, or kept plain where the ratio rule says so. Raises ConfigError for a level that is none."""
    if codec is Codec.NONE:
        check_level(codec, level)
        return Frame(Codec.NONE, plain)
    if codec is Codec.HDE:
        raise ConfigError("codec hde needs the content that a chunk had before (see l3.delta): choose another one")
    payload = _compress(plain, codec, level)
    return Frame(codec, payload) if _pays(len(payload), len(plain)) else Frame(Codec.NONE, plain)


def encode_many(plains: Sequence[bytes | memoryview], codec: Codec, level: int | None = None) -> list[Frame]:
    """The frames of several contents, in order; each is what `encode` makes of it, and nothing in it belongs to `plains` afterwards.

    Zstandard compresses all of them in one call: the interpreter's lock is let go of and asked for again once, and not for each.
    """
    if codec is Codec.ZSTD and len(plains) >= _TOGETHER_MIN:
        check_level(codec, level)
        compressor = _zstd_compressor(level or _ZSTD_DEFAULT_LEVEL)
        if hasattr(compressor, "multi_compress_to_buffer") and all(plains):  # the C module has it, and refuses what is empty
            packed = compressor.multi_compress_to_buffer(list(plains), threads=1)
            payloads = [packed[number] for number in range(len(packed))]
            return [
                Frame(codec, payload.tobytes()) if _pays(len(payload), len(plain)) else Frame(Codec.NONE, bytes(plain))
                for payload, plain in zip(payloads, plains, strict=True)
            ]
    return [encode(bytes(plain), codec, level) for plain in plains]


def _pays(length: int, plain_length: int) -> bool:
    """The ratio rule."""
    return length * _RATIO_NUMERATOR <= plain_length * _RATIO_DENOMINATOR


def decode(codec: int, payload: bytes, plain_max: int) -> bytes:
    """The plain content, at most `plain_max` bytes. Raises CorruptionError for anything that `encode` does not make."""
    declared = plain_length(codec, payload)
    if declared > plain_max:
        raise CorruptionError(f"{_name(codec)} frame declares {declared} bytes of content, at most {plain_max} are allowed here")
    try:
        plain = _DECODERS[codec](payload, declared)
    except _DECODE_ERRORS as error:
        raise CorruptionError(f"{_name(codec)} frame of {len(payload)} bytes does not decode: {str(error) or 'malformed'}") from error
    if len(plain) != declared:
        raise CorruptionError(f"{_name(codec)} frame declares {declared} bytes of content, holds {len(plain)}")
    return plain


def plain_length(codec: int, payload: bytes) -> int:
    """The length of the content that the payload declares, bytes; nothing is decompressed. Raises CorruptionError."""
    measure = _LENGTHS.get(codec)
    if codec == Codec.HDE:
        raise CorruptionError("a delta frame where a whole one was expected: only packs hold them, and it takes its base to read one")
    if measure is None:
        raise CorruptionError(f"frame of codec {codec}: known are {', '.join(f'{c.value} ({c.name.lower()})' for c in Codec)}")
    return measure(payload)


# --- one codec each -------------------------------------------------------------------------------------------


class _PerThread(threading.local):
    """Zstandard contexts are costly to make and not thread-safe, so each thread keeps its own."""

    def __init__(self) -> None:
        self.compressors: dict[int, zstandard.ZstdCompressor] = {}
        self.decompressor: zstandard.ZstdDecompressor | None = None


_per_thread = _PerThread()


def _compress(plain: bytes, codec: Codec, level: int | None) -> bytes:
    check_level(codec, level)
    if codec is Codec.LZ4:
        if level is None or level < _LZ4_HIGH_FROM:
            return bytes(lz4.block.compress(plain, store_size=True))
        return bytes(lz4.block.compress(plain, mode="high_compression", compression=level, store_size=True))
    if codec is Codec.SNAPPY:
        return bytes(snappy.compress(plain))
    if codec is Codec.ZSTD:
        return _zstd_compressor(level or _ZSTD_DEFAULT_LEVEL).compress(plain)
    compressor = zlib.compressobj(level or _GZIP_DEFAULT_LEVEL, zlib.DEFLATED, _GZIP_WINDOW_BITS)
    return compressor.compress(plain) + compressor.flush()


def _zstd_compressor(level: int) -> zstandard.ZstdCompressor:
    found = _per_thread.compressors.get(level)
    if found is None:
        found = zstandard.ZstdCompressor(level=level, write_checksum=False, write_content_size=True)
        _per_thread.compressors[level] = found
    return found


def _zstd_decompressor() -> zstandard.ZstdDecompressor:
    found = _per_thread.decompressor
    if found is None:
        found = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW_MAX)
        _per_thread.decompressor = found
    return found


def _lz4_length(payload: bytes) -> int:
    if len(payload) < _U32.size:
        raise CorruptionError(f"lz4 frame of {len(payload)} bytes is too short for its length field")
    return int(_U32.unpack_from(payload)[0])


def _gzip_length(payload: bytes) -> int:
    if len(payload) < _GZIP_OVERHEAD:
        raise CorruptionError(f"gzip frame of {len(payload)} bytes is too short for its header and trailer")
    return int(_U32.unpack_from(payload, len(payload) - _U32.size)[0])


def _zstd_length(payload: bytes) -> int:
    try:
        header = zstandard.get_frame_parameters(payload)
    except (zstandard.ZstdError, ValueError) as error:
        raise CorruptionError(f"zstd frame of {len(payload)} bytes has no valid header: {error}") from error
    if header.content_size == zstandard.CONTENTSIZE_UNKNOWN or header.dict_id:
        raise CorruptionError("zstd frame without a content size, or with a dictionary: none of ours")
    return int(header.content_size)


def _gunzip(payload: bytes, declared: int) -> bytes:
    decompressor = zlib.decompressobj(wbits=_GZIP_WINDOW_BITS)
    # One byte more than declared, so that content beyond the declared length is seen and never inflated.
    plain = decompressor.decompress(payload, declared + 1)
    if not decompressor.eof or decompressor.unused_data or decompressor.unconsumed_tail:
        raise ValueError("the member does not end where the payload ends")
    return plain


def _varint(payload: bytes) -> int:
    """The u32 in little-endian base 128 that starts a raw Snappy stream (format_description.txt, section 1)."""
    value = 0
    for at, byte in enumerate(payload[:5]):
        value |= (byte & 0x7F) << (7 * at)
        if byte < 0x80:
            if value >> 32:
                break
            return value
    raise CorruptionError(f"snappy frame of {len(payload)} bytes has no valid length field")


def _name(codec: int) -> str:
    return Codec(codec).name.lower()


# Tables instead of comparisons with `Codec` members: L1 decodes a frame on the trio thread.
_LENGTHS: Final[dict[int, Callable[[bytes], int]]] = {
    0: len,
    1: _gzip_length,
    2: _lz4_length,
    3: _varint,
    4: _zstd_length,
}
_DECODERS: Final[dict[int, Callable[[bytes, int], bytes]]] = {
    0: lambda payload, _: bytes(payload),
    1: _gunzip,
    2: lambda payload, _: lz4.block.decompress(payload),
    3: lambda payload, _: snappy.uncompress(payload),
    4: lambda payload, declared: _zstd_decompressor().decompress(payload, max_output_size=declared, allow_extra_data=False),
}
_DECODE_ERRORS: Final = (lz4.block.LZ4BlockError, snappy.UncompressError, zstandard.ZstdError, zlib.error, ValueError, OverflowError)
