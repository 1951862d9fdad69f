"""Sizes, durations and shares as people write them, and back.

What is promised: a text either means exactly one number or raises ConfigError with what is allowed; nothing is
guessed. `64K` and `64KiB` are 65,536 bytes (powers of 1024), `64kB` and `64KB` are 64,000 (powers of 1000): a
unit with a B but no i is decimal, as disks are sold. A number without a unit is bytes, or seconds.
"""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Final

from novafs.errors import ConfigError

SIZE_HELP: Final = "a number and a unit: 64K or 64KiB (powers of 1024), 10GB (powers of 1000), or plain bytes"
DURATION_HELP: Final = "a number and a unit: 30ms, 1.5s, 10m, 24h or 7d, or plain seconds"
SHARE_HELP: Final = "a share between 0 and 1, such as 0.25 or 25%"

_NUMBER: Final = re.compile(r"\s*(\d+(?:\.\d+)?|\.\d+)\s*([A-Za-zµ%]*)\s*", re.ASCII)
_SIZE_MAX: Final = (1 << 63) - 1
_DURATION_S_MAX: Final = Decimal(10 * 366 * 86400)
"""Ten years: beyond it somebody has mistaken the unit, and float seconds still are exact to the microsecond."""


def _size_units() -> dict[str, int]:
    units = {"": 1, "b": 1}
    for power, letter in enumerate("kmgtpe", start=1):
        units[letter] = units[letter + "ib"] = units[letter + "i"] = 1024**power
        units[letter + "b"] = 1000**power
    return units


_SIZE_UNITS: Final = _size_units()
_DURATION_UNITS: Final = {
    "": Decimal(1),
    "us": Decimal("1e-6"),
    "µs": Decimal("1e-6"),
    "ms": Decimal("1e-3"),
    "s": Decimal(1),
    "sec": Decimal(1),
    "m": Decimal(60),
    "min": Decimal(60),
    "h": Decimal(3600),
    "d": Decimal(86400),
}


def _split(text: str) -> tuple[Decimal, str] | None:
    match = _NUMBER.fullmatch(text)
    return (Decimal(match[1]), match[2]) if match else None


def parse_size(text: str) -> int:
    """Bytes. "64K", "10GiB", "10 GB", "1.5T", "4096". Raises ConfigError for anything else.

    A fraction is rounded down to whole bytes; a fraction of bytes ("1.5", "0.5B") is nonsense and refused.
    """
    parts = _split(text)
    unit = _SIZE_UNITS.get(parts[1].lower()) if parts else None
    if parts is None or unit is None or (unit == 1 and parts[0] != int(parts[0])):
        raise ConfigError(f"{text!r} is no size: write {SIZE_HELP}")
    size = int(parts[0] * unit)
    if size > _SIZE_MAX:
        raise ConfigError(f"{text!r} is beyond the largest size, {format_size(_SIZE_MAX + 1)}")
    return size


def parse_duration(text: str) -> float:
    """Seconds. "30ms", "1.5s", "24h", "7d", "30". Raises ConfigError for anything else."""
    parts = _split(text)
    unit = _DURATION_UNITS.get(parts[1].lower()) if parts else None
    if parts is None or unit is None:
        raise ConfigError(f"{text!r} is no duration: write {DURATION_HELP}")
    seconds = parts[0] * unit
    if seconds > _DURATION_S_MAX:
        raise ConfigError(f"{text!r} is beyond the longest duration, ten years")
    return float(seconds)


def parse_share(text: str) -> float:
    """A number from 0 to 1. "0.25", "25%". Raises ConfigError for anything else."""
    parts = _split(text)
    if parts is None or parts[1] not in ("", "%"):
        raise ConfigError(f"{text!r} is no share: write {SHARE_HELP}")
    share = parts[0] / (100 if parts[1] else 1)
    if share > 1:
        raise ConfigError(f"{text!r} is more than the whole: write {SHARE_HELP}")
    return float(share)


def format_size(size_bytes: float) -> str:
    """For people: "0 B", "512 B", "64.0 KiB", "1.5 GiB"."""
    value = float(size_bytes)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB", "PiB"):
        if abs(value) < 1023.95:
            return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} EiB"


def format_duration(seconds: float) -> str:
    """For people: "850 µs", "30 ms", "1.5 s", "12 min 5 s", "3 h 20 min"."""
    if seconds == 0:
        return "0 s"
    if seconds < 0.001:
        return f"{seconds * 1e6:.0f} µs"
    if seconds < 1:
        return f"{seconds * 1e3:.0f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
