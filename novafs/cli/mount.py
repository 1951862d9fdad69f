"""`novafs mount`: a volume becomes a directory, served by a daemon."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, NamedTuple

import click

from novafs import daemon, logs, statedir
from novafs.cli import common
from novafs.cli.common import Settings
from novafs.config import Config, is_url
from novafs.configkeys import redact
from novafs.errors import BugError, ConfigError, MountError, NotInstalledError, NovaError
from novafs.mountoptions import MountOptions, parse_mount_options
from novafs.mounttable import AUTOFS_TYPE, NOVAFS_TYPE, canonical, mount_at
from novafs.statedir import ExitRecord, MountRecord, StateLock

log = logging.getLogger(__name__)

IMAGES_DIR: Final = Path("/images")
"""Where a volume is mounted that has a NAME and no `mountpoint`."""
_MOUNT_PACKAGE: Final = "novafs_mount"


@click.command()
@click.argument("volume")
@click.argument("directory", metavar="[DIR]", required=False)
@click.option(
    "-o",
    "options",
    metavar="OPTS",
    multiple=True,
    help="allow_other, ro, uid=, gid=, umask=, fsname=, busy_timeout=, nonempty, or any setting: l1_capacity=8G.",
)
@click.option("-f", "--foreground", is_flag=True, help="Stay on the terminal instead of becoming a daemon.")
@common.volume_options
def mount(volume: str, directory: str | None, options: tuple[str, ...], foreground: bool, settings: Settings) -> None:
    """Mount VOLUME at DIR.

    Returns when the mount answers; a daemon serves it from then on until 'novafs umount DIR'. What it has to say is in mount.log
    in the state directory. Without DIR: where the key mountpoint of NAME.toml says, or at /images/NAME.
    """
    click.get_current_context().exit(mount_volume(volume, directory, options, settings, foreground=foreground))


def mount_volume(
    volume: str,
    directory: str | None,
    options: Sequence[str],
    settings: Settings,
    *,
    foreground: bool = False,
    pretend: bool = False,
    quiet: bool = False,
) -> int:
    """What `novafs mount` does; the exit status. pretend: check everything, and leave the mounting out. Raises NovaError."""
    given = parse_mount_options(options)
    config = settings.load(volume, more=given.settings)
    parsed = parse_mount_options([config.mount_options, *options])
    path, dead = _check(directory or _configured_directory(config), parsed.options, nonempty=parsed.nonempty)
    if pretend:
        return 0
    state_dir = statedir.prepare(config.state_dir)
    statedir.check_free(state_dir)

    def reread() -> Config:
        # Not what the user wrote: a daemon in the background stands elsewhere.
        return absolute.load(config.volume_url if is_url(volume) else volume, more=given.settings)

    absolute = replace(settings, file=settings.file.absolute() if settings.file is not None else None)
    serve = _Server(config, path, parsed.options, settings.verbose, reread, dead)
    if foreground:
        serve.configure_logging("journal" if logs.is_journal() else "text")
        # The journal has the daemon's own line.
        status = serve.run(lambda: None if logs.is_journal() else common.say(f"{redact(volume)} is mounted at {path}"), foreground=True)
    else:
        log = state_dir / statedir.LOG_FILE
        started = daemon.background(serve.in_background, log=log, in_group=_is_automount(path))
        if started.status is None:
            # The daemon has seen it answer; this process may not see it where it lies in another mount name space.
            if not quiet:
                common.emit(f"{redact(volume)} is mounted at {path} (process {started.pid}, log {log})")
            return 0
        common.say(started.message)
        status = started.status
    return status


def _configured_directory(config: Config) -> str:
    """Where the volume is mounted if nobody says where; made where it is missing. Raises ConfigError, MountError."""
    if config.mountpoint is None and is_url(config.volume):
        raise ConfigError(f"where is {redact(config.volume)} to be mounted? Give a directory: novafs mount VOLUME DIR")
    path = config.mountpoint or IMAGES_DIR / config.volume
    if not _mount_module("mountpoint").is_dead(path):
        try:
            _make_directories(path)
        except FileExistsError as error:
            raise MountError(f"mount point {path} is not a directory") from error
        except OSError as error:
            raise MountError(f"mount point {path} can not be made: {error.strerror}") from error
    return str(path)


def _make_directories(path: Path) -> None:
    """The directory and those above it, open to all: the unit's umask would shut a hypervisor's user out of /images."""
    missing = [part for part in (path, *path.parents) if not part.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for part in missing:
        part.chmod(0o755)


class _DeadMount(NamedTuple):
    """A mount whose daemon has died, which is to be replaced. device: major and minor number; record: what is noted of it."""

    device: tuple[int, int]
    record: MountRecord


def _check(directory: str, options: MountOptions, *, nonempty: bool) -> tuple[Path, _DeadMount | None]:
    """Whether it can be mounted there: the path, and the dead mount that is to be replaced.

    Raises MountError that says what to do.
    """
    if "\0" in directory:
        raise MountError(f"mount point {directory!r}: no path has a NUL character in it")
    mountpoint = _mount_module("mountpoint")
    dead = _dead_mount(mountpoint, directory)
    path: Path = mountpoint.prepare(Path(directory), allow_other=options.allow_other, dead=dead.device if dead is not None else None)
    # An automount's listing would wait for this very mount; and what a dead one hides, it hid before.
    listed = not nonempty and not _is_automount(path) and dead is None and not mountpoint.is_dead(path)
    if listed and any(path.iterdir()):
        raise MountError(f"mount point {path} is not empty: a mount would hide what is in it; choose another, or add -o nonempty")
    return Path(canonical(path)), dead


def _is_automount(path: Path) -> bool:
    found = mount_at(path)
    return found is not None and found.fstype == AUTOFS_TYPE


def _dead_mount(mountpoint: Any, directory: str) -> _DeadMount | None:
    """A mount of ours there whose daemon has died; the next daemon takes it away when it can take its place.

    The lock tells it at once. Asking the mount does not: for a moment the kernel goes on answering from its caches.
    """
    path = canonical(directory)
    found = mount_at(path)
    if found is not None and found.fstype == NOVAFS_TYPE:
        record = statedir.find_record(path, fuse_uid=found.fuse_uid)
        if record is not None and statedir.holder(Path(record.state_dir)) != record.pid:
            common.say(f"{path} is the mount of a daemon that has died (process {record.pid}): replacing it")
            device = mountpoint.device_of(Path(path))
            return _DeadMount(device, record) if device is not None else None
    return None


def _mount_module(name: str) -> Any:
    """A module of the file system; by name, since the engine installs without FUSE. Raises NotInstalledError."""
    for package in (_MOUNT_PACKAGE, "pyfuse3"):
        if importlib.util.find_spec(package) is None:
            raise NotInstalledError(f"the Python package {package} is not installed, and a mount needs it: install novafs anew with pip")
    return importlib.import_module(f"{_MOUNT_PACKAGE}.{name}")


class _Server:
    """The daemon's side of a mount: the lock, the notes for `novafs umount`, and the file system in between."""

    def __init__(
        self,
        config: Config,
        path: Path,
        options: MountOptions,
        verbose: int,
        reread: Callable[[], Config],
        dead: _DeadMount | None,
    ) -> None:
        self._dead = dead
        self._config = config
        # Now: a daemon in the background stands elsewhere.
        self._config_file = str(config.config_file.absolute()) if config.config_file is not None else ""
        self._reread = reread
        self._path = path
        self._options = options
        self._verbose = verbose

    def in_background(self, ready: Callable[[], None], report: daemon.Report) -> int:
        """Serve as a daemon; what goes wrong before `ready` is told through `report`."""
        from novafs.cli import error_line, exit_status

        self.configure_logging("logfmt")
        try:
            return self.run(ready, foreground=False)
        except NovaError as error:
            log.error("%s", error_line(error), exc_info=error if isinstance(error, BugError) or self._verbose >= 2 else None)
            report(exit_status(error), error_line(error))
            return exit_status(error)

    def configure_logging(self, automatic: str) -> None:
        """As the configuration says; `automatic` is the format where it leaves that open."""
        chosen = self._config.log.format
        logs.configure(self._level(self._config), automatic if chosen == "auto" else chosen)
        logs.log_unforeseen()

    def _level(self, config: Config) -> int:
        """-v can only have more logged than the configuration says."""
        return min(logs.LEVELS[config.log.level], common.LEVELS[min(self._verbose, 2)])

    def run(self, ready: Callable[[], None], *, foreground: bool) -> int:
        """Mount and serve; the exit status. Raises NovaError."""
        from novafs.cli import error_line, plain

        state_dir = self._config.state_dir
        log = str(state_dir / statedir.LOG_FILE)
        record = MountRecord(str(self._path), os.getpid(), str(state_dir), redact(self._config.volume), log, self._config_file)
        lock = StateLock.take(state_dir, mountpoint=record.mountpoint)
        status, message = 1, "it ended unexpectedly"
        try:
            statedir.write_record(record)
            status = int(
                _mount_module("main").run(
                    self._config,
                    self._path,
                    self._options,
                    foreground=foreground,
                    ready=ready,
                    reread=self._reread,
                    changed=lambda config: logs.set_level(self._level(config)),
                    dead=self._dead.device if self._dead is not None else None,
                )
            )
            message = "" if status == 0 else f"it ended with status {status}; see {log}"
        except BaseException as error:
            cause = plain(error)
            message = error_line(cause)
            if isinstance(cause, NovaError) and cause is not error:
                raise cause from error
            raise
        finally:
            logs.flush_repeated(final=True)
            # Before the lock is let go: whoever waits for it reads these next.
            statedir.write_exit(state_dir, ExitRecord(record.pid, status, message))
            statedir.remove_record(record)
            if self._dead is not None and _mount_module("mountpoint").device_of(self._path) == self._dead.device:
                # It was not replaced: the next attempt must find out that it is dead.
                with contextlib.suppress(NovaError):
                    statedir.write_record(self._dead.record)
            lock.release()
        return status
