"""The mount point: checked before, detached after, and a dead one recognised.

What is promised: nothing is mounted over a live mount; a mount whose daemon has died (every access answers ENOTCONN,
"Transport endpoint is not connected") is detached first, with a line in the log, and not before the next one can take its place: a guest
or a script that goes on must be told that the images are away, and not write files into the directory below. Every refusal is a MountError
that says what to do. All of it blocks and runs before the event loop or in a worker thread.
"""

from __future__ import annotations

import errno
import logging
import os
import shutil
import stat
import subprocess
import time
from enum import Enum
from pathlib import Path
from typing import Final

from novafs.errors import MountError, NotInstalledError
from novafs.mounttable import AUTOFS_TYPE, NOVAFS_TYPE, canonical, mount_at, parse_mountinfo

log = logging.getLogger(__name__)

FUSE_DEVICE: Final = Path("/dev/fuse")
FUSE_CONF: Final = Path("/etc/fuse.conf")
COMMAND_TIMEOUT_S: Final = 30.0
CACHES_S: Final = 3.0
"""Longer than the kernel keeps attributes (`attributes.TIMEOUT_S`)."""
CACHES_POLL_S: Final = 0.05

Device = tuple[int, int]
"""Major and minor number, by which one mount is told from another at the same place."""


class Unmounted(Enum):
    """What `unmount` found."""

    DONE = "unmounted"
    BUSY = "busy"
    NOT_MOUNTED = "not mounted"


def prepare(mountpoint: Path, *, allow_other: bool, dead: Device | None = None) -> Path:
    """Check that a volume can be mounted there, as far as that can be told while a dead mount is in the way. The absolute path.

    dead: of a mount there that is known to be dead, although the kernel may still answer from its caches. Raises MountError.
    """
    if not FUSE_DEVICE.exists():
        raise NotInstalledError(
            f"{FUSE_DEVICE} is missing: load the kernel module with 'modprobe fuse' (it is in the kernel's package), or pass the device to "
            f"this container"
        )
    fusermount()
    if allow_other and os.geteuid() != 0 and not _user_allow_other():
        raise MountError(f"allow_other needs root, or the line 'user_allow_other' in {FUSE_CONF}")
    path = Path(canonical(mountpoint))
    if dead is None and not is_dead(path):
        _check_free(path)
    return path


def clear(path: Path, *, dead: Device | None) -> None:
    """Take a dead mount away, right before the next is made. Raises MountError where that can not be."""
    # Where it is gone by now the directory below has been open to all: nobody has looked what is in it.
    replaced = dead is not None
    while dead is not None or is_dead(path):
        # The kernel gives the number of a mount that is gone to the next one: another daemon may have taken its place.
        if dead is None or (device_of(path) == dead and _dies(path)):
            log.warning("%s is the mount of a daemon that has died: detaching it before mounting again", path)
            if unmount(path, lazy=True) is not Unmounted.DONE:
                break
            replaced = True
        dead = None
    _check_free(path)
    if replaced and mount_at(path) is None and (hidden := sorted(found.name for found in path.iterdir())):
        names = ", ".join(hidden[:3]) + (", …" if len(hidden) > 3 else "")
        log.warning("the directory below %s is not empty, and the mount hides what is in it (%s): unmount to have a look", path, names)


def _check_free(path: Path) -> None:
    try:
        found = path.stat()
    except FileNotFoundError:
        raise MountError(f"mount point {path} does not exist: create it with 'mkdir -p {path}'") from None
    except OSError as error:
        raise MountError(f"mount point {path}: {error.strerror}") from error
    if not stat.S_ISDIR(found.st_mode):
        raise MountError(f"mount point {path} is not a directory")
    line = mount_at(path)
    # systemd's automount waits for exactly this mount, over its own. (It lets nobody look into the directory before.)
    if line is not None and line.fstype != AUTOFS_TYPE:
        hint = f"; unmount it with 'novafs umount {path}'" if line.fstype == NOVAFS_TYPE else ""
        raise MountError(f"mount point {path} is busy: {line.source} ({line.fstype}) is mounted there{hint}")
    if not os.access(path, os.W_OK | os.X_OK):
        raise MountError(f"mount point {path} is not writable by this user: choose another, or change its owner")


def fusermount() -> str:
    """The helper's path. Raises NotInstalledError."""
    found = shutil.which("fusermount3", path=f"{os.environ.get('PATH', os.defpath)}:/bin:/usr/bin:/sbin:/usr/sbin")
    if found is None:
        raise NotInstalledError("fusermount3 is not installed: install the package 'fuse3'")
    return found


def is_dead(path: Path) -> bool:
    """Whether `path` is a FUSE mount whose daemon is gone."""
    try:
        path.stat()
    except OSError as error:
        return error.errno in (errno.ENOTCONN, errno.ECONNABORTED)
    return False


def _dies(path: Path) -> bool:
    """`is_dead`, once the kernel has nothing in its caches any more by which it could answer for a daemon that is gone."""
    deadline_s = time.monotonic() + CACHES_S
    while not (dead := is_dead(path)) and time.monotonic() < deadline_s:
        time.sleep(CACHES_POLL_S)
    return dead


def unmount(path: Path, *, lazy: bool = False) -> Unmounted:
    """Take the mount away. lazy: from the name space at once, although files are open; they go on working.

    Raises MountError where the helper fails for any other reason than an open file or no mount.
    """
    command = [fusermount(), "-u", *(["-z"] if lazy else []), "--", str(path)]
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=COMMAND_TIMEOUT_S,
            check=False,
            env=_plain_environment(),
        )
    except subprocess.TimeoutExpired:
        raise MountError(f"fusermount3 did not answer within {COMMAND_TIMEOUT_S:.0f} s for {path}") from None
    if done.returncode == 0:
        return Unmounted.DONE
    said = done.stderr.strip()
    if "busy" in said.lower():
        return Unmounted.BUSY
    if mount_at(path) is None:
        return Unmounted.NOT_MOUNTED
    raise MountError(f"cannot unmount {path}: {said or f'fusermount3 failed with status {done.returncode}'}")


def device_of(path: Path) -> Device | None:
    """The device of the file system mounted at `path`, without asking its daemon; None: no mount."""
    wanted = canonical(path)
    numbers = None
    for line in Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines():
        parsed = parse_mountinfo(line)
        if parsed and parsed[0].mountpoint == wanted:
            major, _, minor = line.split(" ")[2].partition(":")
            numbers = (int(major), int(minor))
    return numbers


def _plain_environment() -> dict[str, str]:
    """The helper's messages are compared with English words."""
    return {**os.environ, "LC_ALL": "C"}


def _user_allow_other() -> bool:
    try:
        lines = FUSE_CONF.read_text().splitlines()
    except OSError:
        return False
    return any(line.strip() == "user_allow_other" for line in lines)
