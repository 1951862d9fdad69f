"""Which names objects may have: the one check that every store makes before it goes anywhere.

A name is 1 to 512 bytes of ``[A-Za-z0-9._-]`` in components of at most 200 between single slashes; no component starts with a
dot, which keeps ``.`` and ``..`` out and leaves hidden names to the stores themselves. A listing shows objects with such names only:
what else lies in a bucket or a directory (``lost+found``) is not ours.
"""

from __future__ import annotations

import re
from typing import Final

from novafs.errors import InvalidNameError

NAME_BYTES_MAX: Final = 512
COMPONENT_BYTES_MAX: Final = 200

_COMPONENT: Final = r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,199}"
_COMPONENT_ONLY: Final = re.compile(_COMPONENT, re.ASCII)
_NAME: Final = re.compile(rf"{_COMPONENT}(?:/{_COMPONENT})*", re.ASCII)
_PREFIX: Final = re.compile(rf"(?:{_COMPONENT}/)*(?:{_COMPONENT})?", re.ASCII)


def is_name(name: str) -> bool:
    """Whether an object may have this name."""
    return len(name) <= NAME_BYTES_MAX and _NAME.fullmatch(name) is not None


def is_component(name: str) -> bool:
    """Whether this may stand between two slashes of a name."""
    return _COMPONENT_ONLY.fullmatch(name) is not None


def check_name(name: str) -> None:
    """Raises InvalidNameError."""
    if not is_name(name):
        raise InvalidNameError(
            f"object name {name[:100]!r}: expected 1 to {NAME_BYTES_MAX} characters of A-Z a-z 0-9 . _ - in components"
            f" of at most {COMPONENT_BYTES_MAX} between single slashes, none of which starts with a dot"
        )


def check_prefix(prefix: str) -> None:
    """A prefix is the beginning of a name: empty, or ending anywhere in it. Raises InvalidNameError."""
    if len(prefix) > NAME_BYTES_MAX or _PREFIX.fullmatch(prefix) is None:
        raise InvalidNameError(f"object prefix {prefix[:100]!r}: expected the beginning of an object name, or nothing")


def check_range(start: int, length: int | None) -> None:
    """Raises ValueError: a negative range is the programmer's mistake."""
    if start < 0 or (length is not None and length < 0):
        raise ValueError(f"range from {start} of {length} bytes: neither may be negative")
