"""Requests over the SDK's connections: signed as botocore signs, one piece, and every form that an answer may have."""

from __future__ import annotations

import contextlib
import select
import socket
import ssl
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import boto3
import botocore.auth
import pytest
from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.config import Config
from botocore.credentials import ReadOnlyCredentials
from botocore.exceptions import ConnectionClosedError, ReadTimeoutError
from botocore.utils import percent_encode
from hypothesis import given, settings
from hypothesis import strategies as st

from novafs.objectstore.s3http import acknowledge_at_once
from novafs.objectstore.s3sign import Signer
from novafs.objectstore.s3wire import BODY_MAX, INTERIM_MAX, UNSAID_MAX, Wire
from tests.support.certificates import Certificate, write_certificate

FIRST = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"


@pytest.mark.parametrize("token", [None, "a-session"])
@pytest.mark.parametrize("base", ["http://127.0.0.1:7480/bucket/", "https://bucket.s3.eu-north-1.amazonaws.com/", "http://[::1]:80/b/"])
@pytest.mark.parametrize(
    ("method", "name", "headers", "body"),
    [("PUT", "a/b", {"If-None-Match": "*"}, b"content"), ("GET", "a%20b~c", {"Range": "bytes=0-9"}, b""), ("GET", "a", {}, b"")],
)
def test_a_request_is_signed_as_botocore_signs(
    monkeypatch: pytest.MonkeyPatch, token: str | None, base: str, method: str, name: str, headers: Mapping[str, str], body: bytes
) -> None:
    at = datetime(2026, 2, 28, 23, 59, 59, tzinfo=UTC)
    monkeypatch.setattr(botocore.auth, "get_current_datetime", lambda: at)
    monkeypatch.setattr(time, "gmtime", lambda: at.timetuple())
    credentials = ReadOnlyCredentials("AK", "secret", token)
    request = AWSRequest(method, base + name, data=body, headers=dict(headers))
    S3SigV4Auth(credentials, "s3", "eu-north-1").add_auth(request)
    host = S3SigV4Auth(credentials, "s3", "eu-north-1").headers_to_sign(AWSRequest("GET", base))["host"]
    signer = Signer("eu-north-1", host)
    path = base.partition("://")[2].partition("/")[2]
    for _ in range(2):  # the second time by the key that is known
        signed = signer.signed(credentials, method, f"/{path}{name}", headers, body)
        assert signed["authorization"] == request.headers["Authorization"]
        assert {key.lower(): value for key, value in request.headers.items()} == {k: v for k, v in signed.items() if k != "host"}


HEADER = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=30)
NAME = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30)
BASES = ("http://127.0.0.1:7480", "https://EXAMPLE.com:443", "http://x:443", "https://x:80", "http://[::1]:8080")


@settings(max_examples=150, deadline=None)
@given(
    base=st.sampled_from(BASES),
    prefix=NAME,
    name=NAME,
    credentials=st.builds(ReadOnlyCredentials, HEADER, HEADER, st.none() | HEADER),
    method=st.sampled_from(["GET", "PUT"]),
    headers=st.dictionaries(st.sampled_from(["Range", "If-None-Match", "Content-Type", "x-amz-meta-A"]), HEADER),
    body=st.binary(max_size=30),
)
def test_any_request_is_signed_as_botocore_signs(
    base: str, prefix: str, name: str, credentials: ReadOnlyCredentials, method: str, headers: dict[str, str], body: bytes
) -> None:
    at = datetime(2026, 2, 28, 23, 59, 59, tzinfo=UTC)
    place = f"{base}/bucket/{percent_encode(prefix, safe='/~')}"
    key = percent_encode(name, safe="/~")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(botocore.auth, "get_current_datetime", lambda: at)
        patched.setattr(time, "gmtime", lambda: at.timetuple())
        request = AWSRequest(method, place + key, data=body, headers=dict(headers))
        S3SigV4Auth(credentials, "s3", "eu-north-1").add_auth(request)
        host = S3SigV4Auth(credentials, "s3", "eu-north-1").headers_to_sign(AWSRequest("GET", place))["host"]
        signed = Signer("eu-north-1", host).signed(credentials, method, urlsplit(place).path + key, headers, body)
    assert {key.lower(): value for key, value in request.headers.items()} == {k: v for k, v in signed.items() if k != "host"}


class Server:
    """Answers each request of one connection by the next text; `requests` has what came, in the pieces that it came in."""

    def __init__(self, listening: socket.socket, answers: list[bytes], tls: ssl.SSLContext | None) -> None:
        self.requests: list[bytes] = []
        self.connections = 0
        self._listening = listening
        self._tls = tls
        self.answers = answers
        self.thread = threading.Thread(target=self._serve)
        self.thread.start()

    def _serve(self) -> None:
        while self.answers:
            connection, _ = self._listening.accept()
            self.connections += 1
            if self._tls is not None and self.answers:
                connection = self._tls.wrap_socket(connection, server_side=True)
            with closing(connection), contextlib.suppress(ConnectionError):  # a client that has read enough
                while self.answers and (found := connection.recv(1 << 20)):
                    self.requests.append(found)
                    answer = self.answers.pop(0)
                    connection.sendall(answer)
                    if answer.endswith(b"<end>"):
                        break
                else:
                    if not self.answers:
                        connection.recv(1)  # until the client closes


@contextmanager
def served(*answers: bytes, read_timeout_s: float = 20, tls: Certificate | None = None) -> Iterator[tuple[Server, Wire]]:
    """A server, and a wire to it that has one open connection: the SDK has made a request."""
    with closing(socket.create_server(("127.0.0.1", 0))) as listening:
        context = None
        if tls is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(tls.certificate, tls.key)
        url = f"{'http' if tls is None else 'https'}://127.0.0.1:{listening.getsockname()[1]}"
        config = Config(read_timeout=read_timeout_s, retries={"total_max_attempts": 1}, s3={"addressing_style": "path"})
        client: Any = boto3.client(
            "s3",
            region_name="us-east-1",
            endpoint_url=url,
            aws_access_key_id="a",
            aws_secret_access_key="b",
            config=config,
            verify=str(tls.certificate) if tls is not None else None,
        )
        acknowledge_at_once(client)
        session: Any = client._endpoint.http_session
        wire = Wire.of(session, url + "/")
        assert wire is not None
        assert wire.exchange("GET", "/", {"host": "x"}, b"") is None, "nothing is open yet, and nothing is opened"
        server = Server(listening, [FIRST, *answers], context)
        try:
            session.send(AWSRequest("GET", url + "/").prepare())
            yield server, wire
        finally:
            client.close()
            server.answers.clear()
            with contextlib.suppress(OSError):  # where it waits for another connection
                socket.create_connection(listening.getsockname()).close()
            server.thread.join(20)


@pytest.mark.parametrize(
    ("answer", "status", "content", "kept"),
    [
        (b"HTTP/1.1 200 OK\r\nETag: x\r\nContent-Length: 5\r\n\r\nhello", 200, b"hello", True),
        (b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 206 Partial\r\nContent-Length: 2\r\n\r\nhi", 206, b"hi", True),
        (
            b"HTTP/1.1 404 No\r\ntransfer-encoding: chunked\r\n\r\n3;x=1\r\nabc\r\nA\r\n0123456789\r\n0\r\nT: x\r\n\r\n",
            404,
            b"abc0123456789",
            True,
        ),
        (b"HTTP/1.1 204\r\n\r\n", 204, b"", True),
        (b"HTTP/1.1 200 OK\r\nConnection: Close\r\nContent-Length: 2\r\n\r\nhi<end>", 200, b"hi", False),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhi<end>", 200, b"hi<end>", False),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi and more", 200, b"hi", False),
        (b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nhi", 200, b"hi", False),
        (b"HTTP/1.1 200 OK\r\n\r\nto the<end>", 200, b"to the<end>", False),
    ],
)
def test_answers_are_read_to_their_end(answer: bytes, status: int, content: bytes, kept: bool) -> None:
    with served(answer, b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n") as (server, wire):
        found = wire.exchange("PUT", "/a", {"host": "x"}, b"body")
        assert found is not None
        assert (found.status, found.content) == (status, content)
        assert server.requests[1] == b"PUT /a HTTP/1.1\r\nhost: x\r\ncontent-length: 4\r\n\r\nbody"
        again = wire.exchange("GET", "/b", {"host": "x"}, b"")
        assert (again is not None) == kept
        if again is None:  # the server waits for its last request
            wire._session.send(AWSRequest("GET", wire._url).prepare())


@pytest.mark.parametrize(
    "answer",
    [
        b"<end>",
        b"HTTP/1.1 200 OK\r\nContent-Le<end>",
        b"SSH-2.0-OpenSSH\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n\r\nabc",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\nabc",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nabc<end>",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nffffffff\r\nabc<end>",
        b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\nabc<end>" % (BODY_MAX + 1),
        b"HTTP/1.1 200 OK\r\nContent-Length: " + b"9" * 5000 + b"\r\n\r\nabc<end>",
        b"HTTP/1.1 200 OK\r\n\r\n" + bytes(UNSAID_MAX + (1 << 20)) + b"<end>",
        b"HTTP/1.1 100 Continue\r\n\r\n" * (INTERIM_MAX + 1) + b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n<end>",
    ],
    ids=range(11),
)
def test_what_is_no_answer_is_a_connection_that_broke(answer: bytes) -> None:
    with served(answer) as (_, wire):
        with pytest.raises(ConnectionClosedError):
            wire.exchange("GET", "/a", {"host": "x"}, b"")
        assert wire.exchange("GET", "/a", {"host": "x"}, b"") is None, "it is not used again"


def test_an_answer_that_does_not_come_is_a_time_out() -> None:
    with served(b"HTTP/1.1 200 OK\r\n", read_timeout_s=0.1) as (_, wire), pytest.raises(ReadTimeoutError):
        wire.exchange("GET", "/a", {"host": "x"}, b"")


def test_what_came_beyond_an_answer_is_no_answer_to_the_next_request(tmp_path: Path) -> None:
    """Over TLS, it is in no buffer of the kernel any more, where one looks before a connection is used again."""
    long = (
        b"HTTP/1.1 200 OK\r\nContent-Length: 20000\r\n\r\n"
        + b"x" * 20000
        + b"HTTP/1.1 200 OK\r\nETag: none\r\nContent-Length: 4\r\n\r\nlate"
    )
    with served(FIRST, long, FIRST, tls=write_certificate(tmp_path, "server")) as (_, wire):
        found = wire.exchange("PUT", "/a", {"host": "x"}, b"body")
        assert found is not None, "TLS itself is no reason"
        found = wire.exchange("GET", "/b", {"host": "x"}, b"")
        assert found is not None
        assert found.content == b"x" * 20000
        assert wire.exchange("PUT", "/c", {"host": "x"}, b"body") is None
        wire._session.send(AWSRequest("GET", wire._url).prepare())


@pytest.mark.parametrize("token", ["two\nlines", "a\r", "\u20ac"])
def test_a_header_that_can_not_be_is_left_to_the_sdk(token: str) -> None:
    with served(FIRST) as (server, wire):
        assert wire.exchange("GET", "/a", {"host": "x", "x-amz-security-token": token}, b"") is None
        assert len(server.requests) == 1
        assert wire.exchange("GET", "/a", {"host": "x"}, b"") is not None, "the connection is there still"


def test_a_thread_that_is_at_the_next_day_changes_no_signature_of_this_one() -> None:
    class Raced(Signer):
        """Another thread stores its key whenever this one has read."""

        _mine: tuple[str, str, bytes]

        @property
        def _key(self) -> tuple[str, str, bytes]:
            found, self._mine = self._mine, ("20260301", "secret", b"next")
            return found

        @_key.setter
        def _key(self, value: tuple[str, str, bytes]) -> None:
            self._mine = value

    usual: Signer = Signer("r", "h")
    raced = Raced("r", "h")
    raced._key = ("20260228", "secret", usual._key_of("20260228", "secret"))
    assert raced._key_of("20260228", "secret") == usual._key_of("20260228", "secret")
    raced._key = ("", "", b"")
    assert raced._key_of("20260228", "secret") == usual._key_of("20260228", "secret")


def test_a_connection_that_the_server_has_closed_is_not_used() -> None:
    """Without having said so: a create that was sent over it would be one of which nobody knows whether it counts."""
    with served(b"HTTP/1.1 200 OK\r\nContent-Length: 7\r\n\r\nhi<end>", FIRST) as (server, wire):
        found = wire.exchange("GET", "/a", {"host": "x"}, b"")
        assert found is not None
        assert found.content == b"hi<end>"
        assert wire._pool is not None
        pool: Any = wire._pool()
        assert select.select([pool.pool.queue[-1].sock], [], [], 20)[0], "the server closes"
        del pool  # while it is known here its connections stay open
        assert wire.exchange("PUT", "/b", {"host": "x"}, b"body") is None
        assert len(server.requests) == 2
        wire._session.send(AWSRequest("GET", wire._url).prepare())


@pytest.mark.parametrize(
    ("environment", "direct"),
    [({}, True), ({"HTTP_PROXY": "http://127.0.0.1:9"}, False), ({"HTTP_PROXY": "http://127.0.0.1:9", "NO_PROXY": "127.0.0.1"}, True)],
)
def test_a_proxy_of_the_environment_is_the_sdks_matter(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], direct: bool) -> None:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    url = "http://127.0.0.1:7480"
    client: Any = boto3.client("s3", region_name="us-east-1", endpoint_url=url, aws_access_key_id="a", aws_secret_access_key="b")
    try:
        assert (Wire.of(client._endpoint.http_session, url + "/bucket/") is not None) == direct
    finally:
        client.close()
