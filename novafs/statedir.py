"""The state directory of a volume on this host: its lock, and who mounted what from it.

What always holds: the directory is made 0700; `lock` is held with flock(2) by the one daemon that mounts the volume with
this directory, from before it opens anything in it until the process ends (the kernel lets go, so a kill leaves
nothing to clean up). Whoever gets the lock therefore knows that no daemon is left, and has flushed or is dead. Who only
asks whether it is held (`is_locked`) holds it, shared, for a moment: whoever takes it tries again for a while.

    lock           flock; its content names the holder, for messages
    control.sock   the daemon's control socket (`novafs.control`)
    mount.log      what a daemon in the background wrote
    exit.json      how the last daemon ended, for `novafs umount`
    settings.toml  what `novafs init --preset` chose

A mount is found by its directory through a small file in the runtime directory (`mount_records`), since the
directory cannot be asked for it once its daemon is dead.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import pwd
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from novafs import durable
from novafs.errors import AccessDeniedError, BusyError, ConfigError, NovaError, StoreFullError

LOCK_FILE: Final = "lock"
CONTROL_SOCKET: Final = "control.sock"
LOG_FILE: Final = "mount.log"
EXIT_FILE: Final = "exit.json"
LOCK_TRIES: Final = 20
LOCK_PAUSE_S: Final = 0.01


@dataclass(frozen=True, slots=True)
class MountRecord:
    """One mount of this host. volume: as the user wrote it, without secrets. config_file: the TOML file that was read, absolute; "" for
    none, and for a daemon of a version that did not note it."""

    mountpoint: str
    pid: int
    state_dir: str
    volume: str
    log: str
    config_file: str = ""


@dataclass(frozen=True, slots=True)
class ExitRecord:
    """How a daemon ended. message: what it would have said on a terminal, or nothing."""

    pid: int
    status: int
    message: str


def prepare(state_dir: Path, *, ops: durable.FileOps = durable.SYSTEM) -> Path:
    """Make the directory (0700) where it is missing, durably, because the journal will lie in it; the directory.

    Raises ConfigError, AccessDeniedError, StoreFullError.
    """
    try:
        if not state_dir.is_dir():
            durable.make_dirs(state_dir, ops=ops)
        _check_writable(state_dir)
    except (FileExistsError, NotADirectoryError) as error:
        raise ConfigError(f"the state directory {state_dir} is not a directory: choose another with --state-dir") from error
    except OSError as error:
        raise _unusable(state_dir, error) from error
    return state_dir


def _check_writable(state_dir: Path) -> None:
    if not os.access(state_dir, os.W_OK | os.X_OK):
        number = errno.EROFS if os.statvfs(state_dir).f_flag & os.ST_RDONLY else errno.EACCES
        raise OSError(number, os.strerror(number))


def _unusable(state_dir: Path, error: OSError) -> NovaError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StoreFullError(f"no space for the state directory {state_dir}: make room there, or choose another with --state-dir")
    return AccessDeniedError(
        f"cannot use the state directory {state_dir}: {error.strerror}; run as its owner, or choose another with --state-dir"
    )


class StateLock:
    """The lock of a state directory, held until `release` or the end of the process."""

    def __init__(self, state_dir: Path, fd: int) -> None:
        self.state_dir = state_dir
        self._fd = fd

    @classmethod
    def take(cls, state_dir: Path, *, mountpoint: str) -> StateLock:
        """Lock the directory for a mount at `mountpoint`, at once or not at all.

        Raises BusyError that names the holder, AccessDeniedError, StoreFullError.
        """
        for _ in range(LOCK_TRIES):
            try:
                fd = os.open(state_dir / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            except OSError as error:
                raise _unusable(state_dir, error) from error
            if _lock(fd, state_dir / LOCK_FILE):
                # For messages only: a full disk is no reason not to mount.
                with contextlib.suppress(OSError):
                    os.ftruncate(fd, 0)
                    os.pwrite(fd, json.dumps({"pid": os.getpid(), "mountpoint": mountpoint}).encode(), 0)
                return cls(state_dir, fd)
            os.close(fd)
            time.sleep(LOCK_PAUSE_S)
        raise _busy(state_dir)

    def release(self) -> None:
        """Let go. The end of the process does the same."""
        os.close(self._fd)


def _lock(fd: int, path: Path) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    # A file that was deleted meanwhile is no lock: the next one would make, and get, a new one.
    try:
        return os.path.samestat(os.fstat(fd), path.lstat())
    except FileNotFoundError:
        return False


def _read_holder(state_dir: Path) -> tuple[int, str] | None:
    """Process and mount point of whoever took the lock last; None where that cannot be told."""
    try:
        found = json.loads((state_dir / LOCK_FILE).read_text())
        return int(found["pid"]), str(found["mountpoint"])
    except (OSError, ValueError, LookupError, TypeError):  # not written yet; the lock itself is what counts
        return None


def _busy(state_dir: Path) -> BusyError:
    return BusyError(
        f"this volume is mounted already on this host{_holder(state_dir)}, with the state directory {state_dir}: use that mount, or "
        f"unmount it first; a second mount of the volume needs a state directory of its own (--state-dir)"
    )


def _holder(state_dir: Path) -> str:
    found = _read_holder(state_dir)
    return f" {'at' if found[1].startswith('/') else 'by'} {found[1]} (process {found[0]})" if found else ""


def check_free(state_dir: Path) -> None:
    """Raise BusyError where a daemon holds this directory now: for a message before the work begins; `take` decides."""
    if is_locked(state_dir):
        raise _busy(state_dir)


def is_locked(state_dir: Path) -> bool:
    """Whether a daemon holds this directory now. Raises AccessDeniedError where that can not be told."""
    try:
        fd = os.open(state_dir / LOCK_FILE, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise _unusable(state_dir, error) from error
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def holder(state_dir: Path) -> int | None:
    """The process that holds the directory now; None where nobody does."""
    found = _read_holder(state_dir) if is_locked(state_dir) else None
    return found[0] if found else None


def wait_unlocked(state_dir: Path, pid: int, *, waiting: Callable[[float], None] = lambda _: None) -> None:
    """Return when the daemon `pid` does not hold the directory any more; a later one may.

    `waiting` is called about twenty times a second with the seconds so far.
    """
    start = time.monotonic()
    while holder(state_dir) == pid:
        waiting(time.monotonic() - start)
        time.sleep(0.05)


def write_exit(state_dir: Path, record: ExitRecord) -> None:
    """Note how this daemon ends. A full disk must not hide the error itself, so failures are ignored."""
    with contextlib.suppress(OSError):
        _write_whole(state_dir / EXIT_FILE, json.dumps(asdict(record)))


def read_exit(state_dir: Path, pid: int) -> ExitRecord | None:
    """How the daemon `pid` ended; None where it could not say (killed)."""
    try:
        found = json.loads((state_dir / EXIT_FILE).read_text())
        record = ExitRecord(int(found["pid"]), int(found["status"]), str(found["message"]))
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return record if record.pid == pid else None


# --- which mount belongs to which state directory -------------------------------------------------------------


def _records_dir(uid: int) -> Path:
    if uid == 0:
        return Path("/run/novafs/mounts")
    runtime = os.environ.get("XDG_RUNTIME_DIR", "") if uid == os.getuid() else ""
    base = Path(runtime) if runtime.startswith("/") else Path(f"/run/user/{uid}")
    if not base.is_dir():
        # No session of systemd-logind. Not /tmp: whoever comes first owns a name there.
        try:
            base = Path(pwd.getpwuid(uid).pw_dir) / ".local" / "state"
        except KeyError:
            base = Path(f"/run/user/{uid}")
    return base / "novafs" / "mounts"


def _record_path(mountpoint: str, uid: int) -> Path:
    return _records_dir(uid) / f"{hashlib.sha256(os.fsencode(mountpoint)).hexdigest()[:32]}.json"


def write_record(record: MountRecord) -> None:
    """Make the mount findable by its directory. Raises AccessDeniedError."""
    path = _record_path(record.mountpoint, os.getuid())
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        _write_whole(path, json.dumps(asdict(record)))
    except OSError as error:
        raise AccessDeniedError(f"cannot note the mount in {path.parent}: {error.strerror}") from error


def remove_record(record: MountRecord) -> None:
    """Forget this mount, unless another has taken its place; no error where none is noted."""
    if find_record(record.mountpoint) == record:
        with contextlib.suppress(OSError):
            _record_path(record.mountpoint, os.getuid()).unlink()


def find_record(mountpoint: str, *, fuse_uid: int | None = None) -> MountRecord | None:
    """What is noted for the mount at this directory, by this user, root, or the user `fuse_uid` who mounted it.

    A file that belongs to neither of them is not believed: it could lead root to a directory of an attacker's choice.
    """
    for uid in dict.fromkeys((os.getuid(), 0, os.getuid() if fuse_uid is None else fuse_uid)):
        record = _read_record(_record_path(mountpoint, uid), uid)
        if record is not None and record.mountpoint == mountpoint:
            return record
    return None


def find_mounts(volume: str) -> list[MountRecord]:
    """What is noted, by this user or root, of mounts of the volume, as it was written when it was mounted, whose daemons live."""
    found = []
    for uid in dict.fromkeys((os.getuid(), 0)):
        directory = _records_dir(uid)
        for path in sorted(directory.glob("*.json")) if os.access(directory, os.R_OK | os.X_OK) else ():
            record = _read_record(path, uid)
            if record is not None and record.volume == volume and holder(Path(record.state_dir)) == record.pid:
                found.append(record)
    return found


def _read_record(path: Path, uid: int) -> MountRecord | None:
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_uid != uid:
                return None
            found = json.loads(file.read(65536))
        # A daemon of an older version may live longer than its version is installed.
        return MountRecord(**{name: found[name] for name in MountRecord.__slots__ if name != "config_file" or name in found})
    except (OSError, ValueError, LookupError, TypeError):
        return None


def _write_whole(path: Path, text: str) -> None:
    """Whole or not at all for readers. It need not survive a power cut: neither does what it tells of."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    temporary.write_text(text)
    temporary.replace(path)
