"""The TCP proxy in front of a small server of its own kind: a line in, the same line back twice."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.support.fault_proxy import Answer, Bandwidth, Corrupt, Cut, Delay, Hold, HttpFaultProxy, LoseAnswer, Reset, TcpFaultProxy


@pytest.fixture
def server() -> Iterator[int]:
    """The port of a server that answers each line with itself, twice."""
    listener = socket.create_server(("127.0.0.1", 0))
    threads: list[threading.Thread] = []

    def serve(connection: socket.socket) -> None:
        with connection, connection.makefile("rwb") as stream:
            try:
                for line in stream:
                    stream.write(line.rstrip(b"\n") * 2 + b"\n")
                    stream.flush()
            except OSError:
                return

    def accept() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threads.append(threading.Thread(target=serve, args=(connection,)))
            threads[-1].start()

    accepting = threading.Thread(target=accept)
    accepting.start()
    yield listener.getsockname()[1]
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    accepting.join()
    for thread in threads:
        thread.join()


@pytest.fixture
def proxy(server: int) -> Iterator[TcpFaultProxy]:
    with TcpFaultProxy(server) as proxy:
        yield proxy


@contextmanager
def talking(proxy: TcpFaultProxy) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", proxy.port), timeout=30) as connection:
        yield connection


def ask(connection: socket.socket, line: bytes) -> bytes:
    """The answer, without its newline; what came of it where the connection ended."""
    try:
        connection.sendall(line + b"\n")
        answer = b""
        while not answer.endswith(b"\n"):
            data = connection.recv(100)
            if not data:
                break
            answer += data
    except ConnectionError:
        return b"reset"
    return answer.removesuffix(b"\n")


def test_what_is_not_scripted_passes(proxy: TcpFaultProxy) -> None:
    with talking(proxy) as one, talking(proxy) as other:
        assert [ask(one, b"a"), ask(other, b"b"), ask(one, b"c")] == [b"aa", b"bb", b"cc"]
    assert proxy.count("", "a") == 1


def test_faults_happen_to_the_requests_that_they_are_for(proxy: TcpFaultProxy) -> None:
    proxy.script(
        Corrupt(1, path="^b", nth=2), Answer(path="^c", body=b"scripted\n", times=2), Delay(0.001, path="^d"), Bandwidth(1e6, path="^d")
    )
    with talking(proxy) as one:
        answers = [ask(one, line) for line in (b"a", b"b1", b"b2", b"b3", b"c", b"c", b"c", b"d")]
    assert answers == [b"aa", b"b1b1", bytes([ord("b"), ord("2") ^ 0xFF]) + b"b2", b"b3b3", b"scripted", b"scripted", b"cc", b"dd"]
    proxy.assert_all_fired()


@pytest.mark.parametrize(("fault", "expected"), [(Cut(2), b"ab"), (LoseAnswer(), b""), (Reset(), b"reset")])
def test_a_connection_ends_where_the_script_says(proxy: TcpFaultProxy, fault: Cut, expected: bytes) -> None:
    proxy.script(fault)
    with talking(proxy) as one:
        assert ask(one, b"abc") == expected
    with talking(proxy) as one:
        assert ask(one, b"abc") == b"abcabc"
    proxy.assert_all_fired()


def test_a_request_waits_as_long_as_it_is_held(proxy: TcpFaultProxy) -> None:
    hold = Hold(path="a")
    proxy.script(hold)
    with talking(proxy) as one:
        answers: list[bytes] = []
        asking = threading.Thread(target=lambda: answers.append(ask(one, b"a")))
        asking.start()
        assert hold.reached.wait(30)
        assert answers == []
        hold.release()
        asking.join()
    assert answers == [b"aa"]


def test_a_server_that_is_down_refuses_and_comes_back_on_its_port(proxy: TcpFaultProxy) -> None:
    with talking(proxy) as one:
        assert ask(one, b"a") == b"aa"
        proxy.refuse()
        assert ask(one, b"a") in (b"", b"reset")
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", proxy.port))
    proxy.accept()
    with talking(proxy) as one:
        assert ask(one, b"a") == b"aa"


def test_a_fault_that_did_not_fire_is_found(proxy: TcpFaultProxy) -> None:
    proxy.script(Cut(100, path="a"))
    with talking(proxy) as one:
        assert ask(one, b"a") == b"aa"
    with pytest.raises(AssertionError, match="fired 0 times, expected 1; 1 requests matched"):
        proxy.assert_all_fired()


def test_half_a_request_whose_client_died_is_not_passed_on(server: int) -> None:
    with HttpFaultProxy(server) as proxy, socket.create_connection(("127.0.0.1", proxy.port), timeout=30) as connection:
        connection.sendall(b"PUT /bucket/pack HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\nthe first bytes")
        connection.shutdown(socket.SHUT_WR)
        assert connection.recv(100) == b""
        assert proxy.seen == []
