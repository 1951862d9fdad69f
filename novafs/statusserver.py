"""The port of a mount: metrics, status page, health. Read-only, on loopback unless told otherwise.

    /metrics          for Prometheus (`novafs.metrics`)
    /                 the status page (`novafs/statuspage`), and what it fetches:
    /status.json      figures, open images, events
    /residency.json   ?image=ID: where the chunks of an open image are
    /healthz          200 while the event loop turns
    /readyz           200 while requests are answered (`novafs.board`); else 503 with the reason in words

A server in threads of its own, which asks the trio thread through its token: a loop that does not turn is told by `/healthz` and can not
hold the server up. What always holds: only GET and HEAD; no answer depends on anything but the path and `image=`; at most
`REQUESTS_MAX` connections at a time, each for at most `REQUEST_S` to send its head and as long to take the answer, and one request each.
Names of images are told to the page alone, and only where the request's Host is an address, localhost or this host's name, with or
without its domain: a foreign page whose name was rebound to this address is refused (DNS rebinding). No answer may be framed, cached, or
take a script, style or picture from elsewhere.
"""

from __future__ import annotations

import base64
import concurrent.futures
import contextlib
import errno
import hashlib
import io
import ipaddress
import json
import logging
import re
import selectors
import socket
import socketserver
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import cache
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib import resources
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeVar
from urllib.parse import parse_qs, urlsplit

import trio

from novafs import metrics
from novafs.asynctools import open_nursery
from novafs.board import Board
from novafs.errors import ConfigError, MountError, NotFoundError, RetryableError
from novafs.events import scrubbed

log = logging.getLogger(__name__)

T = TypeVar("T")

PORTS: Final = range(9619, 9651)
"""What `auto` tries, in this order: several mounts of one host get one each, and a scraper can look at them all."""
ANSWER_S: Final = 5.0
REQUESTS_MAX: Final = 8
"""At a time; others are turned away."""
REQUEST_S: Final = 10.0
HEAD_BYTES_MAX: Final = 16 << 10
RESOLV_CONF: Final = Path("/etc/resolv.conf")
_HOST: Final = re.compile(r"(\[[0-9A-Fa-f:.%]+\]|[^:\[\]]+)(:\d+)?")


class Answer(NamedTuple):
    """One answer. status: of HTTP; kind: its Content-Type."""

    status: HTTPStatus
    kind: str
    body: bytes


def _text(status: HTTPStatus, text: str) -> Answer:
    return Answer(status, "text/plain; charset=utf-8", text.encode() + b"\n")


def _json(document: object) -> Answer:
    return Answer(HTTPStatus.OK, "application/json", json.dumps(document, default=str, separators=(",", ":")).encode())


class Page(NamedTuple):
    """The status page, whole, and the policy under which nothing but its own style and script runs in it."""

    html: bytes
    policy: str


@cache
def page() -> Page:
    """The page, put together from its parts."""
    parts = {name: resources.files("novafs.statuspage").joinpath(name).read_text("utf-8") for name in ("page.html", "page.css", "page.js")}
    html = parts["page.html"].replace("/*page.css*/", parts["page.css"]).replace("/*page.js*/", parts["page.js"])
    style, script = (base64.b64encode(hashlib.sha256(parts[name].encode()).digest()).decode() for name in ("page.css", "page.js"))
    policy = (
        f"default-src 'none'; style-src 'sha256-{style}'; script-src 'sha256-{script}'; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return Page(html.encode(), policy)


class _Server(socketserver.ThreadingMixIn, HTTPServer):
    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 16

    def __init__(self, family: int, address: tuple[Any, ...], board: Board, ask: Callable[[Callable[[], Awaitable[Any]]], Any]) -> None:
        self.address_family = family
        self.board = board
        self.ask = ask
        self._slots = threading.BoundedSemaphore(REQUESTS_MAX)
        self._end, self._ended = socket.socketpair()
        try:
            super().__init__(address, _Handler)
        except BaseException:
            # The base class has closed its own, where it had one.
            self._end.close()
            self._ended.close()
            raise

    def serve(self) -> None:
        """Until `end`. Not `serve_forever`, which wakes several times a second to see whether it is to end."""
        with selectors.DefaultSelector() as selector:
            selector.register(self, selectors.EVENT_READ)
            selector.register(self._ended, selectors.EVENT_READ)
            while True:
                for key, _ in selector.select():
                    if key.fileobj is self._ended:
                        return
                    self._handle_request_noblock()  # type: ignore[attr-defined]  # of every socketserver.BaseServer

    def end(self) -> None:
        """Have `serve` return."""
        self._end.send(b"x")

    def server_close(self) -> None:
        """Give back the sockets."""
        super().server_close()
        self._end.close()
        self._ended.close()

    def server_bind(self) -> None:
        """Without the look-up of a name for the address that the base class makes."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])

    def verify_request(self, request: Any, client_address: Any) -> bool:  # noqa: ARG002
        """Whether there is room for one more."""
        return self._slots.acquire(blocking=False)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Begin a thread of the request's own."""
        try:
            super().process_request(request, client_address)
        except BaseException:  # no thread could be had
            self._slots.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """In a thread of the request's own."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._slots.release()

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ARG002
        """A client that has gone, or a mistake here: neither is a matter of anybody else."""
        log.debug("a request to the status port failed", exc_info=True)


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    server_version = "NovaFS"
    sys_version = ""

    def handle(self) -> None:
        """One request."""
        head = self._read_head()
        if head is None:
            return
        self.connection.settimeout(REQUEST_S)
        self.rfile = io.BytesIO(head)
        self.raw_requestline = self.rfile.readline(65537)
        if not self.raw_requestline or not self.parse_request():
            return
        try:
            answer = self._answer()
        except (concurrent.futures.TimeoutError, RetryableError):
            answer = _text(HTTPStatus.SERVICE_UNAVAILABLE, f"the daemon's event loop has not answered within {ANSWER_S:g} s")
        except Exception:
            log.exception("status port: a mistake in NovaFS; please report it. The mount goes on")
            answer = _text(HTTPStatus.INTERNAL_SERVER_ERROR, "a mistake in NovaFS; the log has more")
        self._send(answer)

    def _read_head(self) -> bytes | None:
        """The request's head, read within REQUEST_S however slowly it drips; None where it does not come."""
        deadline_s = time.monotonic() + REQUEST_S
        head = bytearray()
        while b"\r\n\r\n" not in head and b"\n\n" not in head:
            self.connection.settimeout(max(0.01, deadline_s - time.monotonic()))
            part = b"" if len(head) > HEAD_BYTES_MAX or time.monotonic() > deadline_s else self.connection.recv(4096)
            if not part:
                return None
            head += part
        return bytes(head)

    def _answer(self) -> Answer:
        if self.command not in ("GET", "HEAD"):
            return _text(HTTPStatus.METHOD_NOT_ALLOWED, "only GET and HEAD")
        try:
            url = urlsplit(self.path)
        except ValueError:
            return _text(HTTPStatus.BAD_REQUEST, "this is no path")
        board, ask = self.server.board, self.server.ask
        if url.path == "/healthz":
            began_s = time.monotonic()
            ask(trio.lowlevel.checkpoint)
            return _text(HTTPStatus.OK, f"ok: the event loop answered within {time.monotonic() - began_s:.3f} s")
        if url.path == "/readyz":
            verdict = ask(board.ready)
            words = f"ready{': ' + verdict.reason if verdict.reason else ''}" if verdict.ready else f"not ready: {verdict.reason}"
            return _text(HTTPStatus.OK if verdict.ready else HTTPStatus.SERVICE_UNAVAILABLE, scrubbed(words))
        if url.path == "/metrics":
            body, kind = metrics.exposition(ask(_atomic(lambda: _scraped(board))), self.headers.get("Accept", ""))
            return Answer(HTTPStatus.OK, kind, body)
        if url.path not in ("/", "/status.json", "/residency.json"):
            return _text(HTTPStatus.NOT_FOUND, "there are /, /metrics, /healthz, /readyz, /status.json and /residency.json")
        if not host_is_ours(self.headers.get("Host", "")):
            return _text(
                HTTPStatus.MISDIRECTED_REQUEST,
                f"this page is shown under an address, localhost or this host's name ({socket.gethostname()}, also with its domain) only, "
                "so that no foreign site can read it",
            )
        if url.path == "/":
            return Answer(HTTPStatus.OK, "text/html; charset=utf-8", page().html)
        if url.path == "/status.json":
            return _json(ask(_atomic(board.status)))
        image = parse_qs(url.query).get("image", [""])[0]
        try:
            return _json(ask(lambda: board.residency(image)))
        except NotFoundError as error:
            return _text(HTTPStatus.NOT_FOUND, str(error))

    def _send(self, answer: Answer) -> None:
        self.send_response(answer.status)
        policy = page().policy if answer.kind.startswith("text/html") else "default-src 'none'; frame-ancestors 'none'"
        headers = {
            "Content-Type": answer.kind,
            "Content-Length": str(len(answer.body)),
            "Content-Security-Policy": policy,
            "Cache-Control": "no-store",
            "Referrer-Policy": "no-referrer",
            "X-Content-Type-Options": "nosniff",
            "X-Frame-Options": "DENY",
            "Cross-Origin-Resource-Policy": "same-origin",
            "Cross-Origin-Opener-Policy": "same-origin",
        }
        if answer.status == HTTPStatus.METHOD_NOT_ALLOWED:
            headers["Allow"] = "GET, HEAD"
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body)

    def log_message(self, format: str, *args: Any) -> None:
        """Scrapes are no events."""
        log.debug("status port: %s", format % args)


def _atomic(work: Callable[[], T]) -> Callable[[], Awaitable[T]]:
    async def run() -> T:
        await trio.lowlevel.checkpoint()
        return work()

    return run


def _scraped(board: Board) -> dict[str, Any]:
    return {**board.document(), "histograms": board.histograms()}


def host_is_ours(host: str) -> bool:
    """Whether a Host header names an address, localhost, or this host: what no foreign site's name can be."""
    matched = _HOST.fullmatch(host.strip())
    if matched is None:
        return False
    name = matched[1].strip("[]").rstrip(".").lower()
    try:
        ipaddress.ip_address(name.split("%")[0])
    except ValueError:
        own = socket.gethostname().lower()
        return name in ("localhost", own, own.split(".")[0]) or (name.startswith(f"{own}.") and name in _full_names(own))
    return True


def _full_names(own: str) -> set[str]:
    """This host's name with its domain, as the host's own resolver has it: the canonical name, and each domain that it searches.

    Not any domain behind the name: whoever guesses the name could make one of his own. Blocks; asked only where the name is right.
    """
    names: set[str] = set()
    with contextlib.suppress(OSError, UnicodeError):
        names.update(found[3].rstrip(".").lower() for found in socket.getaddrinfo(own, None, flags=socket.AI_CANONNAME))
    with contextlib.suppress(OSError):
        for line in RESOLV_CONF.read_text(errors="replace").splitlines():
            word, *domains = line.split() or [""]
            if word in ("search", "domain"):
                names.update(f"{own}.{domain.rstrip('.').lower()}" for domain in domains if domain.strip("."))
    return names - {""}


def _listen(where: str, make: Callable[[int, tuple[Any, ...]], _Server]) -> _Server:
    """Bind. Raises ConfigError where the address that was asked for can not be had, MountError where it is not there at the moment."""
    if where == metrics.AUTO:
        for port in (*PORTS, 0):
            try:
                return make(socket.AF_INET, ("127.0.0.1", port))
            except OSError as error:
                last = error
        raise ConfigError(f"metrics: no port of 127.0.0.1 can be had: {last.strerror}; say --metrics off") from last
    address, port = metrics.parse_address(where)
    try:
        found = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return make(found[0], found[4])
    except UnicodeError as error:
        raise ConfigError(f"metrics: {address!r} is no address and no name of a host; give another, or off") from error
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise ConfigError(
                f"metrics: port {port} of {address} is in use by another process: give another with --metrics, or auto for the first "
                f"that is free, or off"
            ) from error
        said = f"metrics: cannot listen on {address} port {port}: {error.strerror}; give another address, or off"
        # At boot the address, or who knows the name, may not be there yet: no mistake of the configuration, so the unit tries again.
        if error.errno in (errno.EADDRNOTAVAIL, socket.EAI_AGAIN):
            raise MountError(said) from error
        raise ConfigError(said) from error


@asynccontextmanager
async def status_server(where: str, board: Board) -> AsyncIterator[str]:
    """Serve at `where` (`auto`, or an address) for as long as the block lasts; the URL. Raises ConfigError where it can not be had."""
    token = trio.lowlevel.current_trio_token()
    async with open_nursery() as nursery:

        def ask(work: Callable[[], Awaitable[T]]) -> T:
            """From a thread of the server: have the trio thread do it."""
            future: concurrent.futures.Future[T] = concurrent.futures.Future()

            async def run() -> None:
                try:
                    result = await work()
                except Exception as error:
                    future.set_exception(error)
                except BaseException:
                    future.set_exception(RetryableError("the daemon is ending"))
                    raise
                else:
                    future.set_result(result)

            def begin() -> None:
                try:
                    nursery.start_soon(run)
                except RuntimeError:  # the server ends
                    future.set_exception(RetryableError("the daemon is ending"))

            try:
                token.run_sync_soon(begin)
            except trio.RunFinishedError as error:
                raise RetryableError("the daemon has ended") from error
            return future.result(ANSWER_S)

        server = _listen(where, lambda family, address: _Server(family, address, board, ask))
        host, port = server.server_address[:2]
        name = host.decode() if isinstance(host, bytes) else str(host)
        board.url = f"http://{f'[{name}]' if ':' in name else name}:{port}/"
        thread = threading.Thread(target=server.serve, name="novafs-status", daemon=True)
        thread.start()
        try:
            yield board.url
        finally:
            nursery.cancel_scope.cancel()
            with trio.CancelScope(shield=True):
                server.end()
                await trio.to_thread.run_sync(thread.join)
                server.server_close()
