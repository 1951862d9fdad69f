"""The control socket of a running mount: one line of JSON asked, one line answered.

Server: on trio, in the daemon, a Unix socket with mode 0600 in the state directory. Client: blocking, for the
command line. A connection may ask several times, one after the other.

    {"op": "stats", …}                 request; the other members are the operation's own
    {"ok": true, "result": …}          answer
    {"ok": false, "error": {"kind": "ConfigError", "message": "…"}}

What always holds: the server never stops because of a client (bad JSON, an unknown operation, a line that is too
long, silence, a reset are answered or dropped); a connection costs bounded memory and, while nothing is asked,
bounded time; the socket is never reachable with a wider mode than 0600.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Awaitable, Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import trio

import novafs
from novafs import errors
from novafs.errors import BugError, ConfigError, NotFoundError, NovaError, RetryableError

REQUEST_BYTES_MAX: Final = 1 << 20
ANSWER_BYTES_MAX: Final = 64 << 20
CONNECTIONS_MAX: Final = 32
_SUN_PATH_MAX: Final = 107
"""sockaddr_un holds 108 bytes with the final zero (unix(7))."""

Handler = Callable[[Mapping[str, Any]], Awaitable[object]]
"""Takes the request, returns what JSON can hold, raises NovaError for what the asker should read."""


class ControlServer:
    """Answers on one socket. Handlers run on the trio thread, each in the task of its connection."""

    def __init__(self, path: Path, *, request_timeout_s: float = 30) -> None:
        self.path = path
        self._request_timeout_s = request_timeout_s
        self._handlers: dict[str, Handler] = {"ping": _ping}

    def register(self, op: str, handler: Handler) -> None:
        """Answer `op` with `handler`, from now on. An operation is registered once."""
        if op in self._handlers:
            raise BugError(f"the control operation {op!r} is registered twice")
        self._handlers[op] = handler

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until cancelled; for `nursery.start`. The caller holds the state directory's lock: an older socket is removed."""
        listener = self._listen()
        try:
            async with trio.open_nursery() as nursery:
                places = trio.CapacityLimiter(CONNECTIONS_MAX)
                task_status.started()
                while True:
                    # The place is taken before the connection, so what is beyond the limit waits in the kernel's backlog.
                    place = object()
                    await places.acquire_on_behalf_of(place)
                    try:
                        connection, _ = await listener.accept()
                    except OSError:  # out of descriptors, or the client has gone: the others must go on
                        places.release_on_behalf_of(place)
                        await trio.sleep(0.1)
                        continue
                    except BaseException:
                        places.release_on_behalf_of(place)
                        raise
                    nursery.start_soon(self._serve, connection, places, place)
        finally:
            listener.close()
            with contextlib.suppress(OSError):
                self.path.unlink()

    def _listen(self) -> trio.socket.SocketType:
        with contextlib.suppress(FileNotFoundError):
            self.path.unlink()
        plain = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            with _reachable(self.path) as address:
                plain.bind(address)
            # Nobody can connect before listen(), so the mode is right before anybody could.
            self.path.chmod(0o600)
            plain.listen(CONNECTIONS_MAX)
        except BaseException:
            plain.close()
            raise
        return trio.socket.from_stdlib_socket(plain)

    async def _serve(self, connection: trio.socket.SocketType, places: trio.CapacityLimiter, place: object) -> None:
        try:
            stream = trio.SocketStream(connection)
            pending = bytearray()
            while True:
                with trio.move_on_after(self._request_timeout_s) as limit:
                    line = await _read_line(stream, pending)
                if limit.cancelled_caught or line is None:
                    return
                answer = await self._answer(line)
                with trio.move_on_after(self._request_timeout_s) as limit:
                    await stream.send_all(answer)
                if limit.cancelled_caught or len(line) > REQUEST_BYTES_MAX:
                    return
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            return  # the client has gone
        finally:
            connection.close()
            places.release_on_behalf_of(place)

    async def _answer(self, line: bytes) -> bytes:
        try:
            result = await self._dispatch(line)
            return json.dumps({"ok": True, "result": result}, default=str).encode() + b"\n"
        except NovaError as error:
            return _failure(type(error).__name__, str(error))
        except Exception as error:
            # A bug in a handler must not take the mount down with it: the asker gets it, and the mount goes on.
            return _failure("BugError", f"{type(error).__name__}: {error}")

    async def _dispatch(self, line: bytes) -> object:
        if len(line) > REQUEST_BYTES_MAX:
            raise ConfigError(f"the request is longer than {REQUEST_BYTES_MAX} bytes")
        try:
            request = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"the request is no JSON: {error}") from error
        op = request.get("op") if isinstance(request, dict) else None
        handler = self._handlers.get(op) if isinstance(op, str) else None
        if handler is None:
            raise ConfigError(f"unknown operation {op!r}; known: {', '.join(sorted(self._handlers))}")
        return await handler(_Request(request))


class _Request(dict[str, Any]):
    """What was asked. A key that it lacks is the asker's mistake, and no KeyError of ours."""

    def __missing__(self, key: str) -> Any:
        raise ConfigError(f"the operation {self['op']!r} needs {key!r}, and the request has only {', '.join(map(repr, sorted(self)))}")


async def _ping(_request: Mapping[str, Any]) -> object:
    await trio.lowlevel.checkpoint()
    return {"pid": os.getpid(), "version": novafs.__version__}


async def _read_line(stream: trio.SocketStream, pending: bytearray) -> bytes | None:
    """The next line without its end, None at the end of the stream; more than REQUEST_BYTES_MAX bytes where it is too long."""
    while True:
        line, newline, rest = pending.partition(b"\n")
        if newline:
            pending[:] = rest
            return bytes(line)
        if len(pending) > REQUEST_BYTES_MAX:
            return bytes(pending)
        received = await stream.receive_some(65536)
        if not received:
            return None
        pending += received


def _failure(kind: str, message: str) -> bytes:
    return json.dumps({"ok": False, "error": {"kind": kind, "message": message}}).encode() + b"\n"


def call(path: Path, op: str, /, *, timeout_s: float = 30, **arguments: object) -> Any:
    """Ask the daemon behind the socket `path`, and return its result. Blocking.

    Raises NotFoundError where nobody answers there, RetryableError where the answer takes longer than `timeout_s`
    or breaks off, and the error that the daemon answered with, as the same class of `novafs.errors`.
    """
    request = json.dumps({"op": op, **arguments}).encode() + b"\n"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(timeout_s)
        try:
            with _reachable(path) as address:
                connection.connect(address)
            connection.sendall(request)
            answer = _receive(connection)
        except (FileNotFoundError, ConnectionRefusedError) as error:
            raise NotFoundError(f"no mount answers at {path}: is the volume mounted?") from error
        except PermissionError as error:
            raise errors.AccessDeniedError(f"not allowed to ask the mount at {path}: it belongs to another user; try sudo") from error
        except TimeoutError as error:
            raise RetryableError(f"the mount at {path} did not answer within {timeout_s:g} s") from error
        except OSError as error:
            raise RetryableError(f"the mount at {path} broke off: {error.strerror or error}") from error
    try:
        parsed = json.loads(answer)
        if parsed["ok"]:
            return parsed["result"]
        kind, message = str(parsed["error"]["kind"]), str(parsed["error"]["message"])
    except (ValueError, LookupError, TypeError) as error:
        raise RetryableError(f"the mount at {path} broke off in the middle of its answer") from error
    raise _error(kind, message)


def _receive(connection: socket.socket) -> bytes:
    received = bytearray()
    while not received.endswith(b"\n") and len(received) <= ANSWER_BYTES_MAX:
        part = connection.recv(1 << 16)
        if not part:
            break
        received += part
    return bytes(received)


def _error(kind: str, message: str) -> NovaError:
    """The error under its own class, where that can be made from a message alone."""
    found = getattr(errors, kind, None)
    if isinstance(found, type) and issubclass(found, NovaError):
        with contextlib.suppress(TypeError):
            return found(message)
    return NovaError(message)


@contextlib.contextmanager
def _reachable(path: Path) -> Iterator[str]:
    """An address of the socket that fits into sockaddr_un: a long path is named through its open directory."""
    if len(os.fsencode(path)) <= _SUN_PATH_MAX:
        yield str(path)
        return
    directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{directory}/{path.name}"
    finally:
        os.close(directory)
