"""The port of a mount: what it answers, whom it refuses, and that nobody holds it up."""

from __future__ import annotations

import contextlib
import errno
import http.client
import json
import re
import socket
import socketserver
import threading
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pytest
import trio
import trio.testing

from novafs import statusserver
from novafs.board import Board, Phase, Verdict
from novafs.errors import ConfigError, MountError, StoreUnavailableError
from novafs.objectstore.client import StoreHealth
from novafs.statusserver import host_is_ours, page, status_server

T = TypeVar("T")


def port_of(url: str) -> int:
    found = re.fullmatch(r"http://127\.0\.0\.1:(\d+)/", url)
    assert found is not None
    return int(found[1])


def serving(visit: Callable[[int], T], board: Board | None = None) -> T:
    """Run `visit(port)` in a thread beside a server."""

    async def main() -> T:
        async with status_server(f"127.0.0.1:{free_port()}", board or Board("file:///v")) as url:
            return await trio.to_thread.run_sync(visit, port_of(url))

    return trio.run(main)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def ask(port: int, path: str, *, method: str = "GET", host: str | None = None) -> tuple[int, dict[str, str], bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    connection.request(method, path, headers={"Host": host or f"127.0.0.1:{port}"})
    answer = connection.getresponse()
    return answer.status, dict(answer.getheaders()), answer.read()


def test_before_the_volume_is_open_it_is_alive_and_not_ready() -> None:
    def visit(port: int) -> None:
        assert ask(port, "/healthz")[0] == 200
        status, _, body = ask(port, "/readyz")
        assert (status, b"opening" in body) == (503, True)
        status, headers, body = ask(port, "/metrics")
        assert status == 200 and headers["Content-Type"].startswith("text/plain")
        assert b"novafs_mounted 0.0" in body and b"process_cpu_seconds_total" in body
        shown = json.loads(ask(port, "/status.json")[2])
        assert shown["mount"]["phase"] == "opening" and shown["images"] == []

    serving(visit)


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "PATCH", "CONNECT", "TRACE"])
def test_nothing_but_reading_is_served(method: str) -> None:
    status, headers, _ = serving(lambda port: ask(port, "/metrics", method=method))
    assert status == 405 and headers["Allow"] == "GET, HEAD"


def test_head_is_get_without_a_body() -> None:
    def visit(port: int) -> None:
        status, headers, body = ask(port, "/", method="HEAD")
        assert (status, body) == (200, b"") and int(headers["Content-Length"]) == len(page().html)

    serving(visit)


@pytest.mark.parametrize("path", ["/", "/status.json", "/residency.json?image=00"])
def test_names_are_not_told_to_a_page_that_was_rebound_to_this_address(path: str) -> None:
    def visit(port: int) -> None:
        assert ask(port, path, host=f"attacker.example:{port}")[0] == 421
        assert ask(port, path, host=f"localhost:{port}")[0] in (200, 404)

    serving(visit)


def test_what_a_host_header_may_be() -> None:
    for host in (
        "127.0.0.1:9619",
        "[::1]:9619",
        "10.0.0.7",
        "localhost",
        "LOCALHOST:1",
        socket.gethostname(),
        f"{socket.gethostname()}:9619",
    ):
        assert host_is_ours(host), host
    for host in (
        "",
        "evil.example",
        "127.0.0.1.evil.example",
        "localhost.evil.example",
        "127.0.0.1:9619:1",
        "[::1",
        "a b",
        "127.0.0.1@evil",
    ):
        assert not host_is_ours(host), host


def test_the_hosts_name_with_its_domain_is_its_name_and_with_a_foreign_one_is_not(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def resolved(name: str, port: None, *, flags: int) -> list[tuple[object, ...]]:
        assert (name, flags) == ("web07", socket.AI_CANONNAME), "nobody is asked about a name that is not this host's"
        return [(socket.AF_INET, 1, 6, "web07.Hosts.example.", ("10.0.0.7", 0)), (socket.AF_INET, 2, 17, "", ("10.0.0.7", 0))]

    resolv = tmp_path / "resolv.conf"
    resolv.write_text("# made by hand\nsearch rack.example. dc.example\n\nnameserver 10.0.0.1\nsearch\n")
    monkeypatch.setattr(statusserver, "RESOLV_CONF", resolv)
    monkeypatch.setattr(socket, "gethostname", lambda: "web07")
    monkeypatch.setattr(socket, "getaddrinfo", resolved)
    for host in ("web07", "web07.hosts.example:9619", "WEB07.rack.example.", "web07.dc.example"):
        assert host_is_ours(host), host
    for host in ("web07.attacker.example", "web07.", "web07..example", "web070.dc.example", "dc.example", "other.dc.example"):
        assert host_is_ours(host) == (host == "web07."), host

    def nobody(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_AGAIN, "no resolver")

    monkeypatch.setattr(socket, "getaddrinfo", nobody)
    resolv.unlink()
    assert not host_is_ours("web07.dc.example") and host_is_ours("web07")


def test_an_unknown_path_names_the_known_ones_and_an_unknown_image_is_told() -> None:
    def visit(port: int) -> None:
        assert ask(port, "/../etc/passwd")[0] == 404
        status, _, body = ask(port, "/residency.json?image=%3Cscript%3E")
        assert status == 404 and b"<" not in body

    serving(visit)


def test_every_answer_forbids_framing_sniffing_keeping_and_foreign_content() -> None:
    def visit(port: int) -> None:
        for path in ("/", "/metrics", "/status.json", "/healthz", "/nothing"):
            headers = ask(port, path)[1]
            assert (
                "default-src 'none'" in headers["Content-Security-Policy"]
                and "frame-ancestors 'none'" in headers["Content-Security-Policy"]
            )
            assert (headers["X-Content-Type-Options"], headers["Cache-Control"]) == ("nosniff", "no-store")

    serving(visit)


def test_the_page_fetches_nothing_from_elsewhere_and_its_policy_allows_its_own_parts_only() -> None:
    html = page().html.decode()
    markup = html.split("<script>")[0]
    assert [found for found in re.findall(r"""(?:src|href|action)\s*=\s*["']?([^"'\s>]*)""", markup) if found != "data:,"] == []
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)|url\(|@import", html)
    assert not re.search(r"<[^>]*\s(?:style|on\w+)\s*=", markup)
    assert "unsafe" not in page().policy


def test_clients_that_connect_and_say_nothing_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statusserver, "REQUEST_S", 1.0)

    def visit(port: int) -> None:
        before = threading.active_count()
        clients = [socket.create_connection(("127.0.0.1", port)) for _ in range(60)]
        clients[0].sendall(b"GET / HT")  # and no more
        deadline_s = time.monotonic() + 20
        while time.monotonic() < deadline_s:
            assert threading.active_count() - before <= statusserver.REQUESTS_MAX
            try:
                if ask(port, "/healthz")[0] == 200:
                    break
            except OSError:
                continue  # turned away: the silent ones still hold every place
        else:
            pytest.fail("silent clients hold the port for ever")
        for client in clients:
            client.close()

    serving(visit)


def test_a_head_that_drips_is_given_up_at_its_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statusserver, "REQUEST_S", 0.5)

    def visit(port: int) -> None:
        with socket.create_connection(("127.0.0.1", port), timeout=20) as client:
            ended = threading.Event()

            def drip() -> None:
                while not ended.wait(0.05):
                    try:
                        client.sendall(b"x")
                    except OSError:
                        return

            dripping = threading.Thread(target=drip)
            dripping.start()
            with contextlib.suppress(ConnectionResetError):
                assert client.recv(100) == b""
            ended.set()
            dripping.join()

    serving(visit)


def test_a_head_without_end_is_cut() -> None:
    def visit(port: int) -> None:
        with socket.create_connection(("127.0.0.1", port), timeout=20) as client:
            try:
                client.sendall(b"GET / HTTP/1.1\r\n" + b"X: " + b"y" * (statusserver.HEAD_BYTES_MAX + 8192))
                assert client.recv(100) == b""
            except ConnectionError:
                pass

    serving(visit)


def test_a_loop_that_does_not_turn_is_told_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statusserver, "ANSWER_S", 0.2)
    found: list[tuple[int, dict[str, str], bytes]] = []

    async def main() -> None:
        async with status_server(f"127.0.0.1:{free_port()}", Board("file:///v")) as url:
            visitor = threading.Thread(target=lambda: found.append(ask(port_of(url), "/healthz")))
            visitor.start()
            visitor.join()  # the loop stands still meanwhile

    trio.run(main)
    assert found[0][0] == 503 and b"event loop" in found[0][2]


def test_a_second_server_takes_the_next_port_and_a_busy_port_that_was_asked_for_is_named() -> None:
    async def main() -> None:
        async with status_server("auto", Board("a")) as one, status_server("auto", Board("b")) as other:
            assert port_of(one) != port_of(other)
            assert {port_of(one), port_of(other)} <= set(statusserver.PORTS)
            with pytest.raises(ConfigError, match=f"port {port_of(one)} of 127.0.0.1 is in use"):
                async with status_server(f"127.0.0.1:{port_of(one)}", Board("c")):
                    pass

    trio.run(main)


def test_a_mistake_in_a_figure_is_an_answer_and_the_server_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    def visit(port: int) -> None:
        assert ask(port, "/status.json")[0] == 500
        assert ask(port, "/healthz")[0] == 200

    def broken() -> dict[str, object]:
        raise ZeroDivisionError

    board = Board("file:///v")
    board.mount = broken
    serving(visit, board)
    assert "a mistake in NovaFS" in caplog.text


def test_a_mount_that_hangs_is_told_and_asked_by_one_thread_only() -> None:
    async def main() -> None:
        board = Board("file:///v")
        board.volume, board.phase = _Away(), Phase.MOUNTED  # type: ignore[assignment]
        release, limiter, asked = threading.Event(), trio.CapacityLimiter(1), [0]

        def hang() -> bool:
            asked[0] += 1
            return release.wait(60)

        async def answer() -> bool:
            return await trio.to_thread.run_sync(hang, limiter=limiter, abandon_on_cancel=True)

        board.answers = answer
        for _ in range(3):
            assert "did not answer" in (await board.ready()).reason
        assert asked == [1]
        release.set()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("novafs.board.MOUNT_ANSWERS_S", 0.1)
        trio.run(main)


def test_an_ipv6_address_is_served_and_named() -> None:
    async def main() -> None:
        async with status_server(f"[::1]:{free_port()}", Board("a")) as url:
            assert url.startswith("http://[::1]:")

            def visit() -> int:
                with urllib.request.urlopen(f"{url}status.json", timeout=20) as answer:
                    return int(answer.status)

            assert await trio.to_thread.run_sync(visit) == 200

    if not socket.has_ipv6:
        return
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return  # no IPv6 on this host
    trio.run(main)


class _Away:
    """A volume whose store does not answer, as far as `Board.ready` looks."""

    def __init__(self, durability: str = "journal", dirty_bytes: int = 0) -> None:
        health = StoreHealth()
        health.note(StoreUnavailableError("s3://v: no route to host"))

        class Client:
            pass

        class Rules:
            dirty_max_bytes = 1000

        class Risk:
            bytes = dirty_bytes

        class Writeback:
            rules, at_risk = Rules(), Risk()

        self.client, self.writeback = Client(), Writeback()
        self.client.health = health  # type: ignore[attr-defined]
        self.writeback.rules.durability = durability  # type: ignore[attr-defined]


def verdict(volume: object, *, failed_s: float = float("-inf"), answers: bool = True) -> Verdict:
    async def main() -> Verdict:
        board = Board("file:///v")
        board.volume = volume  # type: ignore[assignment]
        board.phase = Phase.MOUNTED
        board.store_failed_s = lambda: failed_s

        async def answer() -> bool:
            await trio.lowlevel.checkpoint()
            return answers

        board.answers = answer
        return await board.ready()

    return trio.run(main)


def test_a_store_that_is_away_is_degraded_until_something_fails_by_it() -> None:
    assert verdict(_Away()).ready and "degraded" in verdict(_Away()).reason and "no route to host" in verdict(_Away()).reason
    assert not verdict(_Away(), failed_s=time.monotonic() + 1).ready
    assert not verdict(_Away(durability="store")).ready
    assert not verdict(_Away(dirty_bytes=1000)).ready
    assert "did not answer" in verdict(_Away(), answers=False).reason


def test_asking_when_the_daemon_has_ended_is_answered() -> None:
    async def slow() -> None:
        await trio.sleep_forever()

    async def main() -> None:
        board = Board("file:///v")
        board.ready = slow  # type: ignore[method-assign, assignment]
        found: list[tuple[int, dict[str, str], bytes]] = []
        async with status_server(f"127.0.0.1:{free_port()}", board) as url:
            visitor = threading.Thread(target=lambda: found.append(ask(port_of(url), "/readyz")))
            visitor.start()
            await trio.testing.wait_all_tasks_blocked(0.2)
        await trio.to_thread.run_sync(visitor.join)
        assert found[0][0] == 503

    trio.run(main)


@pytest.mark.parametrize("target", ["http://[", "http://[::1/metrics", "//["])
def test_a_target_that_is_no_url_is_the_clients_mistake(target: str, caplog: pytest.LogCaptureFixture) -> None:
    def visit(port: int) -> bytes:
        with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
            connection.sendall(f"GET {target} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
            return connection.makefile("rb").readline()

    assert serving(visit).split()[1] in (b"400", b"404")
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


@pytest.mark.parametrize("where", ["a..b:9619", f"{'a' * 70}.example:9619", "nosuchhost.invalid:9619"])
def test_a_name_that_is_none_is_a_line_and_no_bug(where: str) -> None:
    async def main() -> None:
        async with status_server(where, Board("file:///v")):
            pass

    with pytest.raises((ConfigError, MountError), match=r"^metrics: .*; give another"):
        trio.run(main)


def test_a_family_of_addresses_that_the_kernel_lacks_is_a_line_and_no_bug(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = socket.socket

    def without_ipv6(family: int = socket.AF_INET, *arguments: int, **more: int) -> socket.socket:
        if family == socket.AF_INET6:
            raise OSError(errno.EAFNOSUPPORT, "Address family not supported by protocol")
        return whole(family, *arguments, **more)

    monkeypatch.setattr(socket, "socket", without_ipv6)
    with pytest.raises(ConfigError, match="Address family not supported"):
        statusserver._listen("[::1]:9619", lambda family, address: statusserver._Server(family, address, Board("v"), lambda work: None))


def test_an_address_that_is_not_there_yet_does_not_stop_the_unit_for_good() -> None:
    async def main() -> None:
        async with status_server("192.0.2.77:9619", Board("file:///v")):
            pass

    # Exit status 1, after which systemd starts again; 2 is for mistakes in the configuration.
    with pytest.raises(MountError, match=r"cannot listen on 192\.0\.2\.77"):
        trio.run(main)


def test_a_thread_that_can_not_be_had_costs_no_place(monkeypatch: pytest.MonkeyPatch) -> None:
    def visit(port: int) -> int:
        with monkeypatch.context() as patched:

            def process_request(*_: object) -> None:
                raise RuntimeError("can't start new thread")

            patched.setattr(socketserver.ThreadingMixIn, "process_request", process_request)
            for _ in range(statusserver.REQUESTS_MAX + 2):
                with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
                    assert connection.recv(1) == b""
        return ask(port, "/healthz")[0]

    assert serving(visit) == 200
