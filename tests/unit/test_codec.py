"""Frames: round trips, the ratio rule, and that damage is always a CorruptionError and never costs memory."""

from __future__ import annotations

import gzip
import secrets
import struct
import threading
import tracemalloc

import lz4.block
import pytest
import snappy
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from novafs.cache.base import Frame
from novafs.codec import LEVEL_MAX, PLAIN_MAX, WHOLE, Codec, check_level, decode, encode, parse_codec, plain_length
from novafs.errors import ConfigError, CorruptionError

COMPRESSING = [codec for codec in WHOLE if codec is not Codec.NONE]
TEXT = b"".join(b"%d bottles of beer on the wall, " % number for number in range(2000))


@pytest.mark.parametrize("codec", WHOLE)
@given(plain=st.one_of(st.binary(max_size=300), st.builds(lambda part, times: part * times, st.binary(max_size=20), st.integers(0, 5000))))
def test_a_frame_decodes_to_what_was_encoded(codec: Codec, plain: bytes) -> None:
    frame = encode(plain, codec)
    assert decode(frame.codec, frame.payload, len(plain)) == plain
    assert plain_length(frame.codec, frame.payload) == len(plain)


@pytest.mark.parametrize("codec", COMPRESSING)
def test_compressible_content_is_compressed(codec: Codec) -> None:
    frame = encode(TEXT, codec)
    assert frame.codec == codec
    assert len(frame.payload) * 1.2 <= len(TEXT)


@pytest.mark.parametrize("codec", COMPRESSING)
def test_content_that_does_not_reach_the_ratio_is_kept_plain(codec: Codec) -> None:
    plain = secrets.token_bytes(65536)
    assert encode(plain, codec) == Frame(Codec.NONE, plain)
    # Close to the edge on either side: random bytes, then zeros that compress to almost nothing.
    for zeros, kept in ((0.13, True), (0.22, False)):
        length = int(65536 * zeros)
        mixed = secrets.token_bytes(65536 - length) + bytes(length)
        frame = encode(mixed, codec)
        assert (frame.codec == Codec.NONE) is kept
        assert kept or len(frame.payload) * 1.2 <= len(mixed)


@pytest.mark.parametrize("name", list(LEVEL_MAX))
def test_every_level_decodes_and_others_are_refused(name: str) -> None:
    codec = parse_codec(name)
    for level in range(1, LEVEL_MAX[name] + 1):
        frame = encode(TEXT, codec, level)
        assert decode(frame.codec, frame.payload, PLAIN_MAX) == TEXT
    for level in (0, -1, LEVEL_MAX[name] + 1):
        with pytest.raises(ConfigError, match=f"{name} has levels 1 to {LEVEL_MAX[name]}"):
            encode(TEXT, codec, level)


def test_a_codec_without_levels_refuses_one() -> None:
    for codec in (Codec.NONE, Codec.SNAPPY):
        check_level(codec, None)
        with pytest.raises(ConfigError, match="has no levels"):
            encode(TEXT, codec, 1)


@pytest.mark.parametrize("codec", WHOLE)
def test_the_same_content_makes_the_same_frame(codec: Codec) -> None:
    assert encode(TEXT, codec) == encode(TEXT, codec)


@pytest.mark.parametrize("codec", COMPRESSING)
def test_content_beyond_the_allowed_length_is_refused(codec: Codec) -> None:
    frame = encode(TEXT, codec)
    assert decode(frame.codec, frame.payload, len(TEXT)) == TEXT
    with pytest.raises(CorruptionError, match="at most"):
        decode(frame.codec, frame.payload, len(TEXT) - 1)
    with pytest.raises(CorruptionError, match="at most"):
        decode(Codec.NONE, TEXT, len(TEXT) - 1)


@pytest.mark.parametrize("codec", [-1, 6, 255, 1 << 40])
def test_an_unknown_codec_is_corruption(codec: int) -> None:
    with pytest.raises(CorruptionError, match="known are"):
        decode(codec, b"abc", PLAIN_MAX)


def test_codecs_are_named_in_any_case_and_the_nearest_is_proposed() -> None:
    assert [parse_codec(name) for name in ("none", "GZIP", " lz4", "Snappy", "zstd")] == list(WHOLE)
    with pytest.raises(ConfigError, match=r"'zstf'.*none, gzip, lz4, snappy, zstd; did you mean 'zstd'\?"):
        parse_codec("zstf")
    with pytest.raises(ConfigError, match="expected one of"):
        parse_codec("auto")


# --- damage -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", WHOLE)
@given(payload=st.binary(max_size=2000))
def test_any_bytes_decode_or_are_corrupt(codec: Codec, payload: bytes) -> None:
    try:
        plain = decode(codec, payload, 65536)
    except CorruptionError:
        return
    assert len(plain) <= 65536


@pytest.mark.parametrize("codec", COMPRESSING)
@settings(max_examples=300)
@given(data=st.data())
def test_a_mutated_frame_decodes_to_something_bounded_or_is_corrupt(codec: Codec, data: st.DataObject) -> None:
    payload = bytearray(encode(TEXT, codec).payload)
    for _ in range(data.draw(st.integers(1, 4))):
        match data.draw(st.sampled_from(["flip", "cut", "insert", "append", "header"])):
            case "flip" if payload:
                payload[data.draw(st.integers(0, len(payload) - 1))] ^= data.draw(st.integers(1, 255))
            case "cut":
                del payload[data.draw(st.integers(0, len(payload))) :]
            case "insert":
                at = data.draw(st.integers(0, len(payload)))
                payload[at:at] = data.draw(st.binary(min_size=1, max_size=8))
            case "append":
                payload += data.draw(st.binary(min_size=1, max_size=100))
            case "header":
                payload[:20] = data.draw(st.binary(min_size=20, max_size=20))
    try:
        plain = decode(codec, bytes(payload), len(TEXT))
    except CorruptionError:
        return
    assert len(plain) <= len(TEXT)


@pytest.mark.parametrize("codec", COMPRESSING)
def test_a_truncated_or_lengthened_frame_is_corrupt(codec: Codec) -> None:
    payload = encode(TEXT, codec).payload
    for damaged in (b"", payload[:1], payload[:5], payload[: len(payload) // 2], payload[:-1], payload + b"x"):
        with pytest.raises(CorruptionError):
            decode(codec, damaged, PLAIN_MAX)


GIANT = bytes(64 << 20)

BOMBS = {
    "lz4 that inflates": (Codec.LZ4, lambda: lz4.block.compress(GIANT, store_size=True)),
    "lz4 that lies about a large length": (Codec.LZ4, lambda: struct.pack("<I", 0x7FFFFFFF) + b"\0"),
    "lz4 that lies about a small length": (Codec.LZ4, lambda: struct.pack("<I", 10) + lz4.block.compress(GIANT, store_size=False)),
    "lz4 of negative length": (Codec.LZ4, lambda: struct.pack("<i", -1) + b"\0"),
    "snappy that inflates": (Codec.SNAPPY, lambda: bytes(snappy.compress(GIANT))),
    "snappy that lies": (Codec.SNAPPY, lambda: b"\xff\xff\xff\xff\x0f" + b"\0" * 10),
    "snappy with an endless length": (Codec.SNAPPY, lambda: b"\xff" * 12),
    "zstd that inflates": (Codec.ZSTD, lambda: zstandard.ZstdCompressor().compress(GIANT)),
    "zstd without a length": (Codec.ZSTD, lambda: zstandard.ZstdCompressor(write_content_size=False).compress(GIANT)),
    "zstd that asks for a large window": (
        Codec.ZSTD,
        lambda: b"\x28\xb5\x2f\xfd" + bytes([0b10000000, 0xA0]) + struct.pack("<I", 1000) + b"\x01\x00\x00",
    ),
    "zstd in two frames": (Codec.ZSTD, lambda: 2 * zstandard.ZstdCompressor().compress(TEXT)),
    "gzip that inflates": (Codec.GZIP, lambda: gzip.compress(GIANT)),
    "gzip that lies about a small length": (Codec.GZIP, lambda: gzip.compress(GIANT)[:-4] + struct.pack("<I", 100)),
    "gzip of two members": (Codec.GZIP, lambda: gzip.compress(TEXT) + gzip.compress(TEXT)),
    "gzip with a wrong checksum": (Codec.GZIP, lambda: gzip.compress(TEXT)[:-8] + b"abcd" + gzip.compress(TEXT)[-4:]),
}


@pytest.mark.parametrize("name", list(BOMBS))
def test_a_bomb_is_corrupt_and_is_not_inflated(name: str) -> None:
    codec, make = BOMBS[name]
    payload = make()
    tracemalloc.start()
    try:
        with pytest.raises(CorruptionError):
            decode(codec, payload, 1 << 20)
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


def test_threads_do_not_share_a_context() -> None:
    failures: list[object] = []

    def work(number: int) -> None:
        plain = b"%d:" % number + TEXT
        for _ in range(50):
            frame = encode(plain, Codec.ZSTD, 1 + number % 5)
            if decode(frame.codec, frame.payload, PLAIN_MAX) != plain:
                failures.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
