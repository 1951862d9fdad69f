"""Sizes, durations and shares: a text means one number or is refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from novafs.errors import ConfigError
from novafs.units import format_duration, format_size, parse_duration, parse_share, parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("4096", 4096),
        ("512B", 512),
        ("64K", 65536),
        ("64k", 65536),
        ("64KiB", 65536),
        ("64Ki", 65536),
        ("64KB", 64000),
        ("64kB", 64000),
        ("10GiB", 10 << 30),
        ("10 GB", 10 * 10**9),
        ("250MB", 250 * 10**6),
        ("1.5T", 3 << 39),
        (".5M", 1 << 19),
        ("  7 MiB ", 7 << 20),
        ("0.1K", 102),
    ],
)
def test_a_size_means_one_number_of_bytes(text: str, size: int) -> None:
    assert parse_size(text) == size


NO_SIZES = [
    "",
    " ",
    "K",
    "ten",
    "10 apples",
    "-1",
    "-64K",
    "1e6",
    "1,5G",
    "1.2.3M",
    "64 K B",
    "0x10",
    "1.5",
    "0.5B",
    "∞",
    "nan",
    "٣K",
    "64K\0",
    "1G1",
]


@pytest.mark.parametrize("text", NO_SIZES)
def test_what_is_no_size_is_refused_with_what_is_allowed(text: str) -> None:
    with pytest.raises(ConfigError, match=r"is no size: write a number and a unit: 64K or 64KiB .*10GB"):
        parse_size(text)


def test_a_size_beyond_what_a_file_can_have_is_refused() -> None:
    assert parse_size("7E") == 7 << 60
    with pytest.raises(ConfigError, match=r"beyond the largest size, 8\.0 EiB"):
        parse_size("8E")
    with pytest.raises(ConfigError, match="beyond the largest size"):
        parse_size("9" * 400 + "T")


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("0", 0.0),
        ("30", 30.0),
        ("30ms", 0.03),
        ("250 us", 0.00025),
        ("5µs", 5e-6),
        ("1.5s", 1.5),
        ("10m", 600.0),
        ("10min", 600.0),
        ("24h", 86400.0),
        ("7d", 604800.0),
        ("2 H", 7200.0),
    ],
)
def test_a_duration_means_one_number_of_seconds(text: str, seconds: float) -> None:
    assert parse_duration(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "ms", "-1s", "1 fortnight", "1h30m", "1:30", "inf", "24 h d"])
def test_what_is_no_duration_is_refused_with_what_is_allowed(text: str) -> None:
    with pytest.raises(ConfigError, match=r"is no duration: write a number and a unit: 30ms, 1.5s"):
        parse_duration(text)


def test_a_duration_of_centuries_is_taken_for_a_mistake() -> None:
    with pytest.raises(ConfigError, match="ten years"):
        parse_duration("40000d")


@pytest.mark.parametrize(("text", "share"), [("0", 0.0), ("1", 1.0), ("0.25", 0.25), ("25%", 0.25), ("12.5 %", 0.125), ("100%", 1.0)])
def test_a_share_is_a_fraction_or_a_percentage(text: str, share: float) -> None:
    assert parse_share(text) == pytest.approx(share)


@pytest.mark.parametrize("text", ["", "%", "-0.1", "half", "0.5x"])
def test_what_is_no_share_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="is no share: write a share between 0 and 1"):
        parse_share(text)


@pytest.mark.parametrize("text", ["1.01", "101%", "2"])
def test_a_share_of_more_than_all_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="more than the whole"):
        parse_share(text)


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (512, "512 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (65536, "64.0 KiB"),
        (3 << 29, "1.5 GiB"),
        (1 << 40, "1.0 TiB"),
        (1 << 62, "4.0 EiB"),
    ],
)
def test_sizes_are_shown_in_the_largest_fitting_unit(size: int, text: str) -> None:
    assert format_size(size) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (0.00085, "850 µs"), (0.03, "30 ms"), (1.5, "1.5 s"), (59.9, "59.9 s"), (725, "12 min 5 s"), (12000, "3 h 20 min")],
)
def test_durations_are_shown_in_fitting_units(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


@given(st.integers(min_value=0, max_value=(1 << 63) - 1))
def test_every_whole_number_of_bytes_is_a_size(size: int) -> None:
    assert parse_size(str(size)) == size


@given(st.text(max_size=12))
def test_no_text_makes_the_parsers_fail_otherwise(text: str) -> None:
    for parse in (parse_size, parse_duration, parse_share):
        try:
            value = parse(text)
        except ConfigError:
            continue
        assert value >= 0
