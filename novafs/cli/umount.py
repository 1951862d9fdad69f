"""`novafs umount`: take a mount away, and wait until its daemon has written everything."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import click

from novafs import statedir
from novafs.cli import common
from novafs.cli.mount import _mount_module
from novafs.errors import BusyError, MountError, NovaError
from novafs.mounttable import NOVAFS_TYPE, canonical, mount_at
from novafs.statedir import MountRecord

_SAY_AFTER_S: Final = 2.0


@click.command()
@click.argument("directory", metavar="DIR")
@click.option("-v", "--verbose", count=True, help="Say what is done; -vv: tracebacks.")
def umount(directory: str, verbose: int) -> None:
    """Unmount DIR; return when all is stored."""
    common.configure_logging(verbose)
    unmount(directory)


def unmount(directory: str, *, lazy: bool = False) -> None:
    """Unmount, and return when its daemon has stored all; lazy: at once, while what is open goes on. Raises NovaError."""
    path = canonical(directory)
    found = mount_at(path)
    record = statedir.find_record(path, fuse_uid=found.fuse_uid if found else None)
    if found is None:
        if record is None or not _alive(record):
            raise MountError(f"{directory} is not mounted")
        # Somebody else took it away a moment ago, and its daemon still writes.
        common.say(f"{directory} is not mounted any more; its daemon still writes")
    elif found.fstype != NOVAFS_TYPE:
        raise MountError(f"{directory} is a mount of type {found.fstype}, not of NovaFS: use umount")
    else:
        _unmount(path, directory, lazy=lazy)
    if lazy:
        return
    if record is None:
        common.say(f"{directory} is unmounted; nothing is noted of its daemon, so it may still write")
    else:
        _wait(record)


def _unmount(path: str, directory: str, *, lazy: bool) -> None:
    outcome = _mount_module("mountpoint").unmount(Path(path), lazy=lazy).name
    if outcome == "BUSY":
        raise BusyError(f"{directory} is in use: close what is open in it ('fuser -vm {directory}' shows who has) and try again")
    if outcome == "NOT_MOUNTED":
        raise MountError(f"{directory} is not mounted")


def _alive(record: MountRecord) -> bool:
    return statedir.holder(Path(record.state_dir)) == record.pid


def _wait(record: MountRecord) -> None:
    """Return when the daemon has ended well. Raises NovaError where it could not store everything."""
    state_dir = Path(record.state_dir)
    had_daemon = _alive(record)
    said = False

    def waiting(seconds: float) -> None:
        nonlocal said
        if seconds > _SAY_AFTER_S and not said:
            said = True
            common.say(f"waiting for the daemon (process {record.pid}) to store what was written; it says more in {record.log}")

    statedir.wait_unlocked(state_dir, record.pid, waiting=waiting)
    statedir.remove_record(record)
    ended = statedir.read_exit(state_dir, record.pid)
    if ended is not None and ended.status != 0:
        raise NovaError(f"{record.mountpoint} is unmounted, but its daemon failed: {ended.message}")
    if ended is None:
        when = "was killed while it wrote" if had_daemon else "had died before"
        raise NovaError(f"{record.mountpoint} is unmounted, but its daemon (process {record.pid}) {when}: see {record.log}")
