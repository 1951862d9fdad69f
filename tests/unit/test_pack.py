"""Packs: what a builder makes is what a footer tells; damage is recognised, never believed."""

from __future__ import annotations

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from novafs import codec, pack
from novafs.chunk import ChunkId, PackId, chunk_id
from novafs.codec import Codec
from novafs.errors import ObjectCorruptError
from novafs.pack import PackBuilder, PackRow


def build(plains: list[bytes]) -> tuple[PackBuilder, bytes]:
    builder = PackBuilder()
    for plain in plains:
        builder.add(chunk_id(plain), codec.encode(plain, Codec.ZSTD), len(plain))
    return builder, builder.finish()


def footer_of(pack_id: PackId, data: bytes) -> list[PackRow]:
    async def get(name: str, start: int, length: int) -> bytes:
        assert name == pack.pack_name(pack_id)
        return data[start : start + length]

    return trio.run(pack.read_footer, pack_id, len(data), get)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.binary(min_size=1, max_size=5000), max_size=20))
def test_footer_and_frame_headers_tell_every_frame(plains: list[bytes]) -> None:
    builder, data = build(plains)
    assert builder.size <= len(data)
    for rows in (footer_of(builder.pack_id, data), pack.scan_frames(builder.pack_id, data)):
        assert [row.reference for row in rows] == builder.references
        for row, plain in zip(rows, plains, strict=True):
            reference = row.reference
            payload = data[reference.offset : reference.offset + reference.length]
            assert codec.decode(reference.codec, payload, row.plain_length) == plain


def test_a_footer_longer_than_the_first_guess_takes_a_second_read() -> None:
    builder = PackBuilder()
    for number in range(3000):
        plain = number.to_bytes(8, "little") * 2
        builder.add(chunk_id(plain), codec.encode(plain, Codec.NONE), len(plain))
    data = builder.finish()
    assert len(footer_of(builder.pack_id, data)) == 3000


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_a_flipped_bit_in_the_footer_is_recognised(data: st.DataObject) -> None:
    builder, raw = build([b"a" * 100, b"b" * 100])
    footer_bytes = 2 * 48 + 32
    position = data.draw(st.integers(len(raw) - footer_bytes, len(raw) - 1))
    mutated = bytearray(raw)
    mutated[position] ^= 1 << data.draw(st.integers(0, 7))
    tail_padding = range(len(raw) - 16, len(raw) - 8)
    if position in tail_padding:
        return  # eight bytes that mean nothing
    with pytest.raises(ObjectCorruptError, match="packs/"):
        footer_of(builder.pack_id, bytes(mutated))


@pytest.mark.parametrize("cut", [0, 1, 31, 32, 100])
def test_a_truncated_pack_is_recognised(cut: int) -> None:
    builder, raw = build([b"a" * 1000])
    with pytest.raises(ObjectCorruptError):
        footer_of(builder.pack_id, raw[:cut])


def test_the_footer_of_another_pack_is_not_believed() -> None:
    _, raw = build([b"a" * 1000])
    other = pack.new_pack_id()
    with pytest.raises(ObjectCorruptError):
        trio.run(pack.read_footer, other, len(raw), _getter(raw))


def _getter(raw: bytes):  # type: ignore[no-untyped-def]
    async def get(name: str, start: int, length: int) -> bytes:
        return raw[start : start + length]

    return get


def test_frames_are_found_without_a_footer_up_to_the_first_damaged_one() -> None:
    plains = [bytes([n]) * 500 for n in range(5)]
    builder, raw = build(plains)
    third = builder.references[2]
    damaged = bytearray(raw)
    damaged[third.offset - 48] ^= 1
    assert len(pack.scan_frames(builder.pack_id, bytes(damaged))) == 2


def test_pack_names_go_both_ways() -> None:
    pack_id = pack.new_pack_id()
    assert pack.pack_id_of(pack.pack_name(pack_id)) == pack_id
    for name in ("packs/aa/zz", "images/00/" + "0" * 32, "packs/aa/" + "x" * 32):
        assert pack.pack_id_of(name) is None


def test_a_pack_is_full_at_its_target_size_or_at_its_frame_limit() -> None:
    builder = PackBuilder()
    big = bytes(range(256)) * 4096
    frame = codec.encode(big, Codec.NONE)
    while not builder.full:
        builder.add(ChunkId(bytes(32)), frame, len(big))
    assert pack.TARGET_BYTES <= builder.size < pack.TARGET_BYTES + len(big) + 4096
