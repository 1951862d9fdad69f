"""What is mounted where, by the kernel's own account (`/proc/self/mountinfo`, proc(5))."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Final, NamedTuple

NOVAFS_TYPE: Final = "fuse.novafs"
"""Type of our mounts: libfuse makes it from the option `subtype=novafs`."""


AUTOFS_TYPE: Final = "autofs"
"""Type of a mount point at which a mount is made at the first access."""


class MountLine(NamedTuple):
    """One mount. fuse_uid: the user who mounted it, for FUSE mounts."""

    mountpoint: str
    fstype: str
    source: str
    fuse_uid: int | None


def _unescape(text: str) -> str:
    """mountinfo writes space, tab, newline and backslash as three octal digits."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)


def parse_mountinfo(text: str) -> list[MountLine]:
    """The mounts in the order in which they were made; lines that do not parse are left out."""
    lines = []
    for line in text.splitlines():
        left, separator, right = line.partition(" - ")
        fields, rest = left.split(" "), right.split(" ")
        if not separator or len(fields) < 6 or len(rest) < 2:
            continue
        user = re.search(r"(?:^|,)user_id=(\d+)", rest[2] if len(rest) > 2 else "")
        fuse_uid = int(user[1]) if user and rest[0].startswith("fuse") else None
        lines.append(MountLine(_unescape(fields[4]), rest[0], _unescape(rest[1]), fuse_uid))
    return lines


def mount_at(directory: str | Path) -> MountLine | None:
    """The mount whose root `directory` is, the topmost if there are several; None if it is no mount point.

    Never touches the directory itself, so it answers for a mount whose daemon is dead or hangs.
    """
    wanted = canonical(directory)
    found = None
    for line in parse_mountinfo(Path("/proc/self/mountinfo").read_text(errors="surrogateescape")):
        if line.mountpoint == wanted:
            found = line
    return found


def canonical(directory: str | Path) -> str:
    """The path as mountinfo shows it: absolute, without links. Never waits for the file system mounted there.

    readlink(2) on the root of a mount answers EINVAL from the kernel alone, where stat(2) would ask the daemon.
    """
    path = os.path.abspath(directory)  # noqa: PTH100  # Path.resolve would stat the last component
    for _ in range(40):
        parent, name = os.path.split(path)
        path = os.path.join(os.path.realpath(parent), name) if name else path  # noqa: PTH118
        try:
            path = os.path.normpath(os.path.join(os.path.dirname(path), os.readlink(path)))  # noqa: PTH115, PTH118, PTH120
        except OSError:
            break
    return path
