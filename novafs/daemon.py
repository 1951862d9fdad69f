"""Going into the background, with the terminal kept until the work has begun.

`background(work, log=…)` forks twice before any thread exists. The daemon calls the `ready` that it is given once it
serves; until then the caller's process waits, and a daemon that fails first hands its message and exit status over. So
a command in the background fails on the terminal exactly as it would in the foreground.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, NoReturn

from novafs.errors import AccessDeniedError, BugError

LOOK_S = 0.2
"""How often a caller that waits for its daemon looks for signals."""
LOG_BYTES_MAX = 16 << 20
"""A log that is longer than this when a daemon starts becomes `mount.log.1`: two of them are the most that is kept."""


class Started(NamedTuple):
    """pid: of the daemon. status and message: None and "" where it is ready, else how it ended."""

    pid: int
    status: int | None
    message: str


Report = Callable[[int, str], None]
"""Hands exit status and message to whoever waits; without effect once `ready` was called."""


def background(work: Callable[[Callable[[], None], Report], int], *, log: Path, in_group: bool = False) -> Started:
    """Run `work(ready, report)` in a daemon (own session, `/` as directory, stdio to `log`) and wait until it is ready.

    in_group: the daemon stays in the caller's process group until it is ready. An automount (autofs) lets only its own group pass while it
    waits for the mount; everybody else who touches the directory waits, too.
    Returns in the calling process only; the daemon leaves with what `work` returns. KeyboardInterrupt while waiting
    ends the daemon and is raised again. Raises AccessDeniedError where the log cannot be written.
    """
    if threading.active_count() != 1:
        raise BugError(f"going into the background with {threading.active_count()} threads: a fork would copy only one of them")
    log_fd = _open_log(log)
    reader, writer = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    # An interruption must find the daemon's number known, or nobody could end the daemon: it waits until then.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGHUP})
    child = os.fork()
    if child == 0:
        _first_child(work, reader, writer, log_fd, mask, in_group)
    os.close(writer)
    os.close(log_fd)
    os.waitpid(child, 0)
    return _wait(reader, log, mask)


def _open_log(log: Path) -> int:
    try:
        if log.exists() and log.stat().st_size > LOG_BYTES_MAX:
            log.replace(log.with_name(log.name + ".1"))
        return os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise AccessDeniedError(f"cannot write the log {log}: {error.strerror}") from error


def _first_child(
    work: Callable[[Callable[[], None], Report], int],
    reader: int,
    writer: int,
    log_fd: int,
    mask: set[int | signal.Signals],
    in_group: bool,
) -> NoReturn:
    """Leave the terminal's session, fork again so that no terminal can be taken by accident, and go."""
    status = 70
    try:
        os.close(reader)
        if not in_group:
            os.setsid()
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        status = _daemon(work, writer, log_fd, in_group) if os.fork() == 0 else 0
    finally:
        # Not sys.exit: neither the caller's exit handlers nor its buffers belong to this process.
        os._exit(status)


def _daemon(work: Callable[[Callable[[], None], Report], int], writer: int, log_fd: int, in_group: bool) -> int:
    os.chdir("/")
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.dup2(log_fd, 1)
    os.dup2(log_fd, 2)
    _close_inherited(keep=writer)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, ValueError, OSError):
            stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]  # may be replaced by a plain TextIO
    waiting: list[int] = [writer]

    def tell(message: dict[str, object]) -> None:
        if waiting:
            fd = waiting.pop()
            with contextlib.suppress(BrokenPipeError):  # the caller was interrupted; it has sent us a signal as well
                os.write(fd, json.dumps(message).encode())
            os.close(fd)

    def ready() -> None:
        if in_group:
            os.setsid()
        tell({"ready": True})

    tell_pid = json.dumps({"pid": os.getpid()}).encode() + b"\n"
    os.write(writer, tell_pid)
    try:
        status = work(ready, lambda status, message: tell({"status": status, "message": message}))
    except BaseException as error:
        traceback.print_exc()
        tell({"status": 1, "message": f"{type(error).__name__}: {error}"})
        status = 1
    tell({"status": status, "message": ""})
    _finish_like_an_interpreter()
    return status


def _close_inherited(keep: int) -> None:
    """Close what the caller left open above stderr: a daemon that keeps a shell's `flock` or pipe open would hold it up for years."""
    for name in os.listdir("/proc/self/fd"):  # noqa: PTH208  # names, not paths
        if (fd := int(name)) > 2 and fd != keep:
            with contextlib.suppress(OSError):
                os.close(fd)


def _finish_like_an_interpreter() -> None:
    """What the interpreter does at its end and `os._exit` leaves out: buffers, and exit handlers (coverage writes its data in one)."""
    import atexit

    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()


def _wait(reader: int, log: Path, mask: set[int | signal.Signals]) -> Started:
    with open(reader, "rb") as pipe:  # a descriptor, not a path
        first = pipe.readline()
        pid = int(json.loads(first)["pid"]) if first.endswith(b"\n") else 0
        try:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            # A signal that comes just before a read blocks is seen only after it: so no wait here is long.
            while not select.select([pipe], [], [], LOOK_S)[0]:
                pass
            rest = pipe.read()
        except KeyboardInterrupt:
            if pid:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGTERM)
            raise
    if not rest:
        return Started(pid, 1, f"the daemon ended before it was ready; see the end of {log}")
    told = json.loads(rest)
    if told.get("ready"):
        return Started(pid, None, "")
    return Started(pid, int(told["status"]) or 1, str(told["message"]) or f"the daemon ended before it was ready; see the end of {log}")
