"""`novafs mount`: a volume becomes a directory, served by a daemon."""

from __future__ import annotations

import importlib
import importlib.util
import os
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import click

from novafs import daemon, statedir
from novafs.cli import common
from novafs.cli.common import Settings
from novafs.config import Config
from novafs.configkeys import redact
from novafs.errors import BugError, MountError, NovaError
from novafs.mountoptions import MountOptions, parse_mount_options
from novafs.mounttable import NOVAFS_TYPE, canonical, mount_at
from novafs.statedir import ExitRecord, MountRecord, StateLock

_MOUNT_PACKAGE: Final = "novafs_mount"


@click.command()
@click.argument("volume")
@click.argument("directory", metavar="DIR")
@click.option(
    "-o",
    "options",
    metavar="OPTS",
    multiple=True,
    help="allow_other, ro, uid=, gid=, umask=, fsname=, busy_timeout=, nonempty, or any setting: l1_capacity=8G.",
)
@click.option("-f", "--foreground", is_flag=True, help="Stay on the terminal instead of becoming a daemon.")
@common.volume_options
def mount(volume: str, directory: str, options: tuple[str, ...], foreground: bool, settings: Settings) -> None:
    """Mount VOLUME at DIR.

    Returns when the mount answers; a daemon serves it from then on until 'novafs umount DIR'. What it has to say is in mount.log
    in the state directory.
    """
    parsed = parse_mount_options(options)
    config = settings.load(volume, more=parsed.settings)
    path = _check(directory, parsed.options, nonempty=parsed.nonempty)
    state_dir = statedir.prepare(config.state_dir)
    statedir.check_free(state_dir)
    serve = _Server(config, path, parsed.options, settings.verbose)
    if foreground:
        common.configure_logging(max(settings.verbose, 1))
        status = serve.run(lambda: common.say(f"{redact(volume)} is mounted at {path}"), foreground=True)
    else:
        log = state_dir / statedir.LOG_FILE
        started = daemon.background(serve.in_background, log=log)
        if started.status is None:
            # The daemon has seen it answer; this process may not see it where it lies in another mount name space.
            common.emit(f"{redact(volume)} is mounted at {path} (process {started.pid}, log {log})")
            return
        common.say(started.message)
        status = started.status
    click.get_current_context().exit(status)


def _check(directory: str, options: MountOptions, *, nonempty: bool) -> Path:
    """Whether it can be mounted there. Raises MountError that says what to do."""
    if "\0" in directory:
        raise MountError(f"mount point {directory!r}: no path has a NUL character in it")
    mountpoint = _mount_module("mountpoint")
    _detach_dead(mountpoint, directory)
    path: Path = mountpoint.prepare(Path(directory), allow_other=options.allow_other)
    if not nonempty and any(path.iterdir()):
        raise MountError(f"mount point {path} is not empty: a mount would hide what is in it; choose another, or add -o nonempty")
    return Path(canonical(path))


def _detach_dead(mountpoint: Any, directory: str) -> None:
    """Take away a mount of ours whose daemon has died.

    The lock tells it at once. Asking the mount does not: for a moment the kernel goes on answering from its caches.
    """
    path = canonical(directory)
    found = mount_at(path)
    if found is not None and found.fstype == NOVAFS_TYPE:
        record = statedir.find_record(path, fuse_uid=found.fuse_uid)
        if record is not None and statedir.holder(Path(record.state_dir)) != record.pid:
            common.say(f"{path} is the mount of a daemon that has died (process {record.pid}): detaching it")
            mountpoint.unmount(Path(path), lazy=True)


def _mount_module(name: str) -> Any:
    """A module of the file system; by name, since the engine installs without FUSE. Raises MountError where it is missing."""
    for package in (_MOUNT_PACKAGE, "pyfuse3"):
        if importlib.util.find_spec(package) is None:
            raise MountError(f"the Python package {package} is not installed, and a mount needs it: install novafs anew with pip")
    return importlib.import_module(f"{_MOUNT_PACKAGE}.{name}")


class _Server:
    """The daemon's side of a mount: the lock, the notes for `novafs umount`, and the file system in between."""

    def __init__(self, config: Config, path: Path, options: MountOptions, verbose: int) -> None:
        self._config = config
        self._path = path
        self._options = options
        self._verbose = verbose

    def in_background(self, ready: Callable[[], None], report: daemon.Report) -> int:
        """Serve as a daemon; what goes wrong before `ready` is told through `report`."""
        from novafs.cli import error_line, exit_status

        common.configure_logging(max(self._verbose, 1), timestamps=True)
        try:
            return self.run(ready, foreground=False)
        except NovaError as error:
            if isinstance(error, BugError) or self._verbose >= 2:
                traceback.print_exc()
            common.say(error_line(error))
            report(exit_status(error), error_line(error))
            return exit_status(error)

    def run(self, ready: Callable[[], None], *, foreground: bool) -> int:
        """Mount and serve; the exit status. Raises NovaError."""
        from novafs.cli import error_line, plain

        state_dir = self._config.state_dir
        log = str(state_dir / statedir.LOG_FILE)
        record = MountRecord(str(self._path), os.getpid(), str(state_dir), redact(self._config.volume), log)
        lock = StateLock.take(state_dir, mountpoint=record.mountpoint)
        status, message = 1, "it ended unexpectedly"
        try:
            statedir.write_record(record)
            status = int(_mount_module("main").run(self._config, self._path, self._options, foreground=foreground, ready=ready))
            message = "" if status == 0 else f"it ended with status {status}; see {log}"
        except BaseException as error:
            cause = plain(error)
            message = error_line(cause)
            if isinstance(cause, NovaError) and cause is not error:
                raise cause from error
            raise
        finally:
            # Before the lock is let go: whoever waits for it reads these next.
            statedir.write_exit(state_dir, ExitRecord(record.pid, status, message))
            statedir.remove_record(record)
            lock.release()
        return status
