"""Scripted faults in front of a real server: the server stays real, only the way to it is bad.

`HttpFaultProxy` understands requests and answers (S3); `TcpFaultProxy` understands bytes (Redis): there a request is what
the client sends in one piece, and its answer all that the server sends until the next one.

    with HttpFaultProxy(ceph.port) as proxy:
        proxy.script(Answer(503, method="GET", times=2), Cut(1000, path=r"/packs/", nth=3))
        ...                                   # against proxy.endpoint
        proxy.assert_all_fired()

A fault is for the requests that match it (`method`, `path`: a regular expression, searched in the path with its query;
for TCP in the bytes), and of those for the `nth` (from 1) and the `times - 1` after it; `times=None`: for all from then
on. It counts how often it has fired; one that cuts or damages an answer fires only when it really did. Several faults may
fire on one request. What is not scripted passes unchanged. The proxies run in threads, so code under test may be in
this process or in another.
"""

from __future__ import annotations

import contextlib
import http.client
import re
import socket
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from types import TracebackType
from typing import Any, NamedTuple, Self

PIECE = 64 << 10
HOLD_TIMEOUT_S = 60
"""Bounds a hang where a test forgot to release; no test waits so long."""


class Seen(NamedTuple):
    """One request that came by. TCP: method is "", path the text of the bytes, body the bytes."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes


class _Abort(Exception):
    """The connection to the client ends here and now."""


@dataclass(kw_only=True)
class Fault:
    """What all faults share; see the module for `nth` and `times`."""

    method: str | None = None
    path: str | None = None
    nth: int = 1
    times: int | None = 1
    fired: int = field(default=0, init=False)
    matched: int = field(default=0, init=False)

    def _applies(self, seen: Seen) -> bool:
        if (self.method is not None and seen.method != self.method) or (self.path is not None and not re.search(self.path, seen.path)):
            return False
        self.matched += 1
        return self.matched >= self.nth and (self.times is None or self.matched < self.nth + self.times)


@dataclass
class Delay(Fault):
    """The answer begins `seconds` later."""

    seconds: float


@dataclass
class Bandwidth(Fault):
    """The answer comes at `bytes_per_s`."""

    bytes_per_s: float


@dataclass
class Cut(Fault):
    """The answer's body ends after `after` bytes, with the connection. Nothing happens to a shorter one."""

    after: int


@dataclass
class Corrupt(Fault):
    """The byte `at` of the answer's body is inverted. Nothing happens to a shorter one."""

    at: int


@dataclass
class Chunked(Fault):
    """The answer comes in chunks, without its length (HTTP)."""


@dataclass
class Answer(Fault):
    """The server is never asked; the client gets this. TCP: `body` alone."""

    status: int = 503
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class Reset(Fault):
    """The connection is reset before the server hears of the request."""


@dataclass
class LoseAnswer(Fault):
    """The server gets the request and answers; the client sees the connection end instead."""


@dataclass
class Hold(Fault):
    """The request waits in the proxy until the test calls `release`. `reached` is set when the first one waits."""

    reached: threading.Event = field(default_factory=threading.Event, init=False)
    released: threading.Event = field(default_factory=threading.Event, init=False)

    def release(self) -> None:
        self.released.set()


class _AnswerFilter:
    """Puts the bytes of one answer through the faults that apply to it."""

    def __init__(self, proxy: FaultProxy, faults: list[Fault]) -> None:
        self._proxy = proxy
        self._faults = faults
        self._position = 0
        self.begun = False

    def begin(self) -> None:
        """Before the first byte of the answer goes out. Raises _Abort."""
        self.begun = True
        for fault in self._faults:
            if isinstance(fault, Delay):
                self._proxy._fire(fault)
                time.sleep(fault.seconds)
            elif isinstance(fault, LoseAnswer):
                self._proxy._fire(fault)
                raise _Abort

    def pieces(self, data: bytes) -> Iterator[bytes]:
        """What goes out of the next bytes of the body. Raises _Abort after the last byte before a cut."""
        for first in range(0, len(data), PIECE):
            piece = bytearray(data[first : first + PIECE])
            start, end = self._position, self._position + len(piece)
            self._position = end
            cut = None
            for fault in self._faults:
                if isinstance(fault, Corrupt) and start <= fault.at < end:
                    piece[fault.at - start] ^= 0xFF
                    self._proxy._fire(fault)
                elif isinstance(fault, Cut) and start <= fault.after < end:
                    cut = fault.after - start
                    self._proxy._fire(fault)
                elif isinstance(fault, Bandwidth):
                    if start == 0:
                        self._proxy._fire(fault)
                    time.sleep(len(piece) / fault.bytes_per_s)
            yield bytes(piece[:cut])
            if cut is not None:
                raise _Abort


class FaultProxy(ABC):
    """What both proxies share: listening, the script, the end. Use one of the two below."""

    def __init__(self, upstream_port: int, *, upstream_host: str = "127.0.0.1") -> None:
        self.upstream = (upstream_host, upstream_port)
        self.port = 0
        self.seen: list[Seen] = []
        self._script: list[Fault] = []
        self._lock = threading.Lock()
        self._listener: socket.socket | None = None
        self._accepting: threading.Thread | None = None
        self._workers: set[threading.Thread] = set()
        self._open: set[socket.socket] = set()

    def script(self, *faults: Fault) -> None:
        """Add faults; they count requests from now on."""
        with self._lock:
            self._script.extend(faults)

    def clear(self) -> None:
        """Forget the script; requests that wait in a `Hold` go on."""
        with self._lock:
            faults, self._script = self._script, []
        for fault in faults:
            if isinstance(fault, Hold):
                fault.release()

    def assert_all_fired(self) -> None:
        """Every scripted fault has fired as often as it was scripted to (at least once where there is no bound)."""
        with self._lock:
            for fault in self._script:
                expected = fault.times or max(fault.fired, 1)
                assert fault.fired == expected, (
                    f"{fault} fired {fault.fired} times, expected {expected}; {fault.matched} requests matched it"
                )

    def count(self, method: str, path: str = "") -> int:
        """How many requests came by of this method whose path matches."""
        with self._lock:
            return sum(seen.method == method and re.search(path, seen.path) is not None for seen in self.seen)

    def refuse(self) -> None:
        """The server is down: connections end and new ones are refused, until `accept`."""
        listener, self._listener = self._listener, None
        if listener is not None:
            listener.shutdown(socket.SHUT_RDWR)  # wakes the thread in accept()
            listener.close()
        if self._accepting is not None:
            self._accepting.join()
            self._accepting = None
        self.drop_connections()

    def accept(self) -> None:
        """The server is up (again), on the same port."""
        self._listener = listener = socket.create_server(("127.0.0.1", self.port), reuse_port=False)
        self.port = int(listener.getsockname()[1])
        self._accepting = threading.Thread(target=self._accept, args=(listener,), daemon=True)
        self._accepting.start()

    def drop_connections(self) -> None:
        """All connections end; new ones are accepted."""
        with self._lock:
            sockets = list(self._open)
        for one in sockets:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def __enter__(self) -> Self:
        self.accept()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.clear()
        self.refuse()
        with self._lock:
            workers = list(self._workers)
        for worker in workers:
            worker.join()

    # ---- below

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            worker = threading.Thread(target=self._work, args=(connection,), daemon=True)
            with self._lock:
                self._workers.add(worker)
                self._open.add(connection)
            worker.start()

    def _work(self, connection: socket.socket) -> None:
        try:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with contextlib.suppress(OSError, _Abort):
                self._serve(connection)
        finally:
            with self._lock:
                self._open.discard(connection)
                self._workers.discard(threading.current_thread())
            connection.close()

    @abstractmethod
    def _serve(self, connection: socket.socket) -> None:
        """One connection, until it ends. Raises OSError or _Abort where it ends early."""

    def _note(self, seen: Seen) -> list[Fault]:
        with self._lock:
            self.seen.append(seen)
            return [fault for fault in self._script if fault._applies(seen)]

    def _fire(self, fault: Fault) -> None:
        with self._lock:
            fault.fired += 1

    def _before(self, connection: socket.socket, faults: list[Fault]) -> Answer | None:
        """What happens before the server hears of a request. Raises _Abort."""
        for fault in faults:
            if isinstance(fault, Hold):
                self._fire(fault)
                fault.reached.set()
                fault.released.wait(HOLD_TIMEOUT_S)
            elif isinstance(fault, Reset):
                self._fire(fault)
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
                connection.close()  # here, before another thread ends it in good order
                raise _Abort
            elif isinstance(fault, Answer):
                self._fire(fault)
                return fault
        return None


class TcpFaultProxy(FaultProxy):
    """For protocols whose client speaks first and waits, such as Redis."""

    def _serve(self, connection: socket.socket) -> None:
        with socket.create_connection(self.upstream) as server:
            server.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with self._lock:
                self._open.add(server)
            current = [_AnswerFilter(self, [])]
            back = threading.Thread(target=self._pump_back, args=(server, connection, current), daemon=True)
            back.start()
            try:
                while data := connection.recv(PIECE):
                    faults = self._note(Seen("", data.decode("latin-1"), {}, data))
                    if (answer := self._before(connection, faults)) is not None:
                        connection.sendall(answer.body)
                        continue
                    current[0] = _AnswerFilter(self, faults)
                    server.sendall(data)
            finally:
                with contextlib.suppress(OSError):
                    server.shutdown(socket.SHUT_RDWR)
                back.join()
                with self._lock:
                    self._open.discard(server)

    def _pump_back(self, server: socket.socket, connection: socket.socket, current: list[_AnswerFilter]) -> None:
        with contextlib.suppress(OSError, _Abort):
            while data := server.recv(PIECE):
                answer = current[0]
                if not answer.begun:
                    answer.begin()
                for piece in answer.pieces(data):
                    connection.sendall(piece)
        with contextlib.suppress(OSError):
            connection.shutdown(socket.SHUT_RDWR)


class HttpFaultProxy(FaultProxy):
    """For HTTP/1.1 with keep-alive. Answers are read whole from the server before they go on."""

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def _serve(self, connection: socket.socket) -> None:
        _HttpHandler(connection, self)


class _HttpHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1  # one segment for the headers

    def __init__(self, connection: socket.socket, proxy: HttpFaultProxy) -> None:
        self._proxy = proxy
        self._upstream = http.client.HTTPConnection(*proxy.upstream)
        super().__init__(connection, ("127.0.0.1", 0), None)  # type: ignore[arg-type]  # it never asks its server

    def finish(self) -> None:
        self._upstream.close()
        with contextlib.suppress(OSError):
            super().finish()

    def handle_expect_100(self) -> bool:
        going_on = super().handle_expect_100()
        self.wfile.flush()
        return going_on

    def log_message(self, format: str, *args: Any) -> None:
        """Silent: tests look at `seen`."""

    def _relay(self) -> None:
        body = self._read_body()
        headers = {name.lower(): value for name, value in self.headers.items()}
        seen = Seen(self.command, self.path, headers, body)
        faults = self._proxy._note(seen)
        if (answer := self._proxy._before(self.connection, faults)) is not None:
            self._send(answer.status, "Scripted", list(answer.headers.items()), answer.body, _AnswerFilter(self._proxy, []))
            return
        status, reason, back, data = self._ask(seen)
        through = _AnswerFilter(self._proxy, faults)
        through.begin()
        self._send(status, reason, back, data, through)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _relay

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            parts = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            while self.rfile.readline().strip():
                pass
            return b"".join(parts)
        length = int(self.headers.get("Content-Length", "0"))
        body = self.rfile.read(length)
        if len(body) < length:
            raise _Abort  # the client died in the middle of it: no server takes half a request
        return body

    def _ask(self, seen: Seen) -> tuple[int, str, list[tuple[str, str]], bytes]:
        upstream = self._upstream
        upstream.putrequest(seen.method, seen.path, skip_host=True, skip_accept_encoding=True)
        for name, value in self.headers.items():
            if name.lower() not in ("transfer-encoding", "content-length", "expect", "connection"):
                upstream.putheader(name, value)
        if seen.body or "content-length" in seen.headers:
            upstream.putheader("Content-Length", str(len(seen.body)))
        upstream.endheaders(seen.body or None)
        answer = upstream.getresponse()
        data = answer.read()
        return answer.status, answer.reason, answer.getheaders(), data

    def _send(self, status: int, reason: str, headers: list[tuple[str, str]], data: bytes, through: _AnswerFilter) -> None:
        self.send_response_only(status, reason)
        bodyless = self.command == "HEAD" or status in (204, 304)
        for name, value in headers:
            if name.lower() not in ("transfer-encoding", "connection") and (bodyless or name.lower() != "content-length"):
                self.send_header(name, value)
        chunked = [fault for fault in through._faults if isinstance(fault, Chunked)]
        if chunked:
            self._proxy._fire(chunked[0])
            self.send_header("Transfer-Encoding", "chunked")
        elif not bodyless:
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if bodyless:
            return
        if chunked:
            self.wfile.write((b"%x\r\n%s\r\n" % (len(data), data) if data else b"") + b"0\r\n\r\n")
            self.wfile.flush()
            return
        try:
            for piece in through.pieces(data):
                self.wfile.write(piece)
        finally:
            self.wfile.flush()
