"""One HTTP request and its answer over a connection that botocore has made, without what urllib3 and http.client do for each.

They take half of a millisecond of processor time for a small request, headers and body go out in two pieces, and the answer's headers
are parsed as a mail's. Here a request is one piece (up to `PIECE_MAX`), and an answer is looked at for what an object store's answers have.

Always holds: only connections are used that the SDK has opened, checked (TLS) and put into its pool, and one goes back there only if
its answer was read to its end, nothing came after it, and the server keeps it open. Where there is none that is open, or there are
proxies, nothing is sent and the caller sends in the ordinary way. An answer's body may be shorter than its Content-Length, as with the
SDK: the caller checks.

HTTP/1.1: RFC 9112.
"""

from __future__ import annotations

import contextlib
import queue
import re
import socket
import weakref
from collections.abc import Iterator, Mapping
from typing import Any, Final, NamedTuple

from botocore.exceptions import ConnectionClosedError, ReadTimeoutError
from urllib3.util.connection import is_connection_dropped

PIECE_MAX: Final = 256 << 10
"""Bytes of a body that is sent together with the headers: a copy of so much takes no longer than another system call."""
HEAD_MAX: Final = 64 << 10
BODY_MAX: Final = 1 << 30
"""Bytes that an answer may say it has: far more than any object of ours. Memory for them is taken before they come."""
UNSAID_MAX: Final = 16 << 20
"""Bytes of an answer that does not say how many it has. None that counts is such a one."""
INTERIM_MAX: Final = 16
"""Answers before the answer (100 Continue)."""
_RECEIVE: Final = 64 << 10
_STATUS: Final = re.compile(rb"HTTP/1\.([01]) ([1-9]\d\d)(?: [^\r\n]*)?")
_QUICKACK: Final = getattr(socket, "TCP_QUICKACK", None)


class Headers(Mapping[str, str]):
    """Of an answer, by names in any case. Of several with one name the last."""

    def __init__(self, lines: list[bytes]) -> None:
        self._values: dict[str, str] = {}
        for line in lines:
            name, colon, value = line.partition(b":")
            if colon:
                self._values[name.decode("latin-1").lower()] = value.strip(b" \t").decode("latin-1")

    def __getitem__(self, name: str) -> str:
        return self._values[name.lower()]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


class WireAnswer(NamedTuple):
    """status: as sent. content: the body."""

    status: int
    headers: Headers
    content: bytes


class Wire:
    """To one server, over an SDK session's connections. Thread-safe, as they are."""

    def __init__(self, http_session: Any, url: str) -> None:
        """url: any of that server's."""
        self._session = http_session
        self._url = url
        # Not the pool itself: the session gives connections back by forgetting it.
        self._pool: weakref.ref[Any] | None = None

    @classmethod
    def of(cls, http_session: Any, url: str) -> Wire | None:
        """None where requests to the server go through a proxy, or the session is not built as it was known to be."""
        proxies = getattr(http_session, "_proxy_config", None)
        if proxies is None or not hasattr(http_session, "_manager") or proxies.proxy_url_for(url):
            return None
        return cls(http_session, url)

    def exchange(self, method: str, target: str, headers: Mapping[str, str], body: bytes) -> WireAnswer | None:
        """The answer, None where no connection is open, or a header is none: nothing was sent then. headers: with Host. Raises what the
        SDK raises where the connection breaks or the answer does not come in time."""
        lines = [f"{method} {target} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items())]
        if method != "GET":
            lines.append(f"content-length: {len(body)}")
        text = "\r\n".join((*lines, "", ""))
        if not text.isascii() or text.count("\n") != len(lines) + 1 or text.count("\r") != len(lines) + 1:
            return None  # credentials that no header can have: the SDK says so
        head = text.encode()
        pool, connection = self._open()
        if connection is None:
            return None
        connected: socket.socket = connection.sock
        kept = None
        try:
            connected.settimeout(pool.timeout.read_timeout)
            with contextlib.suppress(BrokenPipeError):  # a server that refuses a body may have said so, and closed
                if len(body) <= PIECE_MAX:
                    connected.sendall(head + body)
                else:
                    connected.sendall(head)
                    connected.sendall(body)
            reading = _Reading(connected)
            answer = reading.answer()
        except TimeoutError as error:
            raise ReadTimeoutError(endpoint_url=self._url, error=error) from error
        except (OSError, _Broken) as error:
            raise ConnectionClosedError(endpoint_url=self._url, error=error, request=None) from error
        else:
            # What TLS has decrypted already can not be seen by asking the kernel, as is done before the connection is used again.
            pending = getattr(connected, "pending", None)
            kept = connection if reading.whole and not (pending is not None and pending()) else None
            return answer
        finally:
            if kept is None:
                connection.close()
            pool._put_conn(kept)

    def _open(self) -> tuple[Any, Any]:
        """The pool, and a connection of it that is open, if there is one. None is made here: the SDK tells the pool how to (TLS), just
        before it takes one."""
        pool = self._pool() if self._pool is not None else None
        if pool is None or pool.pool is None:
            pool = self._session._manager.connection_from_url(self._url)
            self._pool = weakref.ref(pool)
        try:
            connection = pool.pool.get(block=False)
        except (queue.Empty, AttributeError):  # all are in use; it is being closed
            return pool, None
        if connection is not None and connection.sock is not None and not is_connection_dropped(connection):
            return pool, connection
        if connection is not None:
            connection.close()
        pool._put_conn(connection)
        return pool, None


class _Broken(Exception):  # noqa: N818 - always turned into the SDK's
    """The connection ended before an answer's headers did, or they are none."""


class _Reading:
    """One answer. whole: it was read to its end, and the server waits for another request."""

    def __init__(self, connected: socket.socket) -> None:
        self._socket = connected
        self._data = b""
        self.whole = False

    def answer(self) -> WireAnswer:
        for _ in range(INTERIM_MAX + 1):
            lines = self._until(b"\r\n\r\n", HEAD_MAX).split(b"\r\n")
            status = _STATUS.fullmatch(lines[0])
            if status is None:
                raise _Broken(f"no HTTP answer: {lines[0][:80]!r}")
            if status[2][0] != ord("1"):
                break
        else:
            raise _Broken(f"more than {INTERIM_MAX} answers before the answer")
        if _QUICKACK is not None:
            with contextlib.suppress(OSError):  # see `s3http`
                self._socket.setsockopt(socket.IPPROTO_TCP, _QUICKACK, 1)
        headers, code = Headers(lines[1:]), int(status[2])
        content = self._content(code, headers)
        if status[1] == b"0" or "close" in headers.get("Connection", "").lower():
            self.whole = False
        return WireAnswer(code, headers, content)

    def _content(self, code: int, headers: Headers) -> bytes:
        coding, length = headers.get("Transfer-Encoding", "").lower(), headers.get("Content-Length", "")
        if code in (204, 304):
            self.whole = not self._data
            return b""
        if coding:
            if coding != "chunked":
                raise _Broken(f"an answer in the transfer coding {coding!r}")
            return self._chunked()
        if not (length.isascii() and length.isdigit()):
            while self._more():
                if len(self._data) > UNSAID_MAX:
                    raise _Broken("an answer that does not end")
            return self._data
        if len(length) > 10 or (wanted := int(length)) > BODY_MAX:
            raise _Broken(f"an answer of {length[:20]} bytes")
        content = self._exactly(wanted)
        self.whole = len(content) == wanted and not self._data
        return content

    def _chunked(self) -> bytes:
        parts: list[bytes] = []
        total = 0
        while True:
            size = self._until(b"\r\n", HEAD_MAX).partition(b";")[0].strip()
            if not size or size.strip(b"0123456789abcdefABCDEF") or len(size) > 8:
                raise _Broken(f"no length of a chunk: {size[:20]!r}")
            if not (wanted := int(size, 16)):
                break
            if (total := total + wanted) > BODY_MAX:
                raise _Broken(f"an answer of {total} bytes")
            part = self._exactly(wanted + 2)
            if part[-2:] != b"\r\n" or len(part) != wanted + 2:
                raise _Broken("an answer's chunk is cut short")
            parts.append(part[:-2])
        while self._until(b"\r\n", HEAD_MAX):  # trailers
            pass
        self.whole = not self._data
        return b"".join(parts)

    def _more(self) -> bool:
        data = self._socket.recv(_RECEIVE)
        self._data += data
        return bool(data)

    def _until(self, end: bytes, most: int) -> bytes:
        """What comes before `end`, which is taken away with it."""
        while (at := self._data.find(end)) < 0:
            if len(self._data) > most or not self._more():
                raise _Broken("the connection was closed before the answer")
        found, self._data = self._data[:at], self._data[at + len(end) :]
        return found

    def _exactly(self, wanted: int) -> bytes:
        """So many bytes, fewer where the connection ends before."""
        if len(self._data) >= wanted:
            found, self._data = self._data[:wanted], self._data[wanted:]
            return found
        buffer = bytearray(wanted)
        view, filled = memoryview(buffer), len(self._data)
        view[:filled] = self._data
        self._data = b""
        while filled < wanted:
            try:
                count = self._socket.recv_into(view[filled:])
            except TimeoutError:
                raise
            except OSError:  # reset amid the body: as short as one that ended
                break
            if not count:
                break
            filled += count
        return bytes(view[:filled])
