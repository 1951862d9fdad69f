"""Sealed records: what goes in comes out; anything else is one of two errors."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from novafs.errors import NewerFormatError, ObjectCorruptError
from novafs.record import seal, unseal


class Sample(msgspec.Struct):
    number: int
    data: bytes


@given(st.integers(0, 2**63), st.binary(max_size=3000))
def test_what_was_sealed_is_unsealed(number: int, data: bytes) -> None:
    sealed = seal(b"TEST", 3, Sample(number, data))
    assert unseal(b"TEST", 3, sealed, Sample, "x") == Sample(number, data)


@settings(max_examples=300)
@given(st.data())
def test_any_change_to_any_byte_is_recognised(data: st.DataObject) -> None:
    sealed = bytearray(seal(b"TEST", 1, Sample(7, b"payload" * 20)))
    position = data.draw(st.integers(0, len(sealed) - 1))
    sealed[position] ^= data.draw(st.integers(1, 255))
    with pytest.raises(ObjectCorruptError, match="the-name"):
        unseal(b"TEST", 1, bytes(sealed), Sample, "the-name")


@given(st.binary(max_size=200))
def test_garbage_is_corrupt(garbage: bytes) -> None:
    with pytest.raises(ObjectCorruptError):
        unseal(b"TEST", 1, garbage, Sample, "x")


def test_a_newer_version_is_refused_by_name() -> None:
    with pytest.raises(NewerFormatError, match="upgrade"):
        unseal(b"TEST", 1, seal(b"TEST", 2, Sample(1, b"")), Sample, "x")


def test_another_kind_is_refused() -> None:
    with pytest.raises(ObjectCorruptError, match="kind"):
        unseal(b"TEST", 1, seal(b"ELSE", 1, Sample(1, b"")), Sample, "x")


def test_a_body_of_the_wrong_shape_is_refused() -> None:
    class Other(msgspec.Struct):
        text: str

    with pytest.raises(ObjectCorruptError, match="parse"):
        unseal(b"TEST", 1, seal(b"TEST", 1, Other("x")), Sample, "x")
