"""The control socket: asked and answered in lines of JSON, and never stopped by a client."""

from __future__ import annotations

import json
import os
import socket
import stat
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

import novafs
from novafs import control
from novafs.control import ControlServer, call
from novafs.errors import (
    AccessDeniedError,
    BugError,
    BusyError,
    ConfigError,
    FrameCorruptError,
    NotFoundError,
    NovaError,
    RetryableError,
    UserError,
)


class Served:
    """A server on a trio thread of its own, as the daemon runs it beside its other work."""

    def __init__(self, path: Path, request_timeout_s: float) -> None:
        self.server = ControlServer(path, request_timeout_s=request_timeout_s)
        self.path = path
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: trio.run(self._main))

    async def _main(self) -> None:
        self._token = trio.lowlevel.current_trio_token()
        self._scope = trio.CancelScope()
        async with trio.open_nursery() as nursery:
            with self._scope:
                await nursery.start(self.server.run)
                self._ready.set()
                await trio.sleep_forever()
            nursery.cancel_scope.cancel()

    def start(self) -> None:
        self._thread.start()
        assert self._ready.wait(10)

    def stop(self) -> None:
        self._token.run_sync_soon(self._scope.cancel)
        self._thread.join(10)
        assert not self._thread.is_alive()

    def raw(self, data: bytes) -> bytes:
        """Everything that the server says to these bytes, with the sending side closed after them."""
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(10)
            connection.connect(str(self.path))
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
            parts = []
            while part := connection.recv(65536):
                parts.append(part)
            return b"".join(parts)

    def is_well(self) -> bool:
        return bool(call(self.path, "ping")["pid"] == os.getpid())


@contextmanager
def serving(path: Path, *, request_timeout_s: float = 10, **handlers: Callable[[Mapping[str, Any]], Any]) -> Iterator[Served]:
    served = Served(path, request_timeout_s)
    for op, handler in handlers.items():
        served.server.register(op, handler)
    served.start()
    try:
        yield served
    finally:
        served.stop()


async def echo(request: Mapping[str, Any]) -> object:
    await trio.lowlevel.checkpoint()
    return {name: value for name, value in request.items() if name != "op"}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "control.sock"


def test_an_operation_gets_its_arguments_and_its_result_comes_back(path: Path) -> None:
    with serving(path, echo=echo):
        assert call(path, "echo", name="ünï", numbers=[1, 2.5, None]) == {"name": "ünï", "numbers": [1, 2.5, None]}
        assert call(path, "ping") == {"pid": os.getpid(), "version": novafs.__version__}


def test_one_connection_may_ask_several_times(path: Path) -> None:
    with serving(path, echo=echo) as served:
        answers = served.raw(b'{"op": "echo", "n": 1}\n{"op": "nothing"}\n{"op": "echo", "n": 2}\n')
    lines = [json.loads(line) for line in answers.splitlines()]
    assert lines[0] == {"ok": True, "result": {"n": 1}}
    assert lines[1]["error"]["kind"] == "ConfigError"
    assert lines[2] == {"ok": True, "result": {"n": 2}}


def test_the_socket_belongs_to_its_owner_alone_and_goes_with_the_server(path: Path) -> None:
    with serving(path):
        mode = path.stat().st_mode
        assert stat.S_ISSOCK(mode)
        assert stat.S_IMODE(mode) == 0o600
    assert not path.exists()


def test_a_socket_that_a_killed_daemon_left_is_replaced(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    with serving(path) as served:
        assert served.is_well()


def test_a_path_longer_than_an_address_can_be_works(tmp_path: Path) -> None:
    directory = tmp_path / ("d" * 120)
    directory.mkdir()
    path = directory / "control.sock"
    with serving(path, echo=echo):
        assert call(path, "echo", a=1) == {"a": 1}


def test_a_request_that_lacks_something_is_the_askers_mistake(path: Path) -> None:
    async def needy(request: Mapping[str, Any]) -> object:
        await trio.lowlevel.checkpoint()
        return request["image"]

    with (
        serving(path, needy=needy),
        pytest.raises(ConfigError, match=r"the operation 'needy' needs 'image', and the request has only 'b', 'op'"),
    ):
        call(path, "needy", b=1)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"this is no JSON\n", "the request is no JSON"),
        (b"\n", "the request is no JSON"),
        (b"\xff\xfe\n", "the request is no JSON"),
        (b"[" * 100_000 + b"\n", "the request is no JSON"),
        (b"[]\n", "unknown operation None; known: echo, ping"),
        (b'"ping"\n', "unknown operation None"),
        (b"{}\n", "unknown operation None"),
        (b'{"op": "reboot"}\n', "unknown operation 'reboot'; known: echo, ping"),
        (b'{"op": ["ping"]}\n', "unknown operation"),
    ],
)
def test_a_request_that_is_none_is_answered_with_an_error(path: Path, line: bytes, message: str) -> None:
    with serving(path, echo=echo) as served:
        answer = json.loads(served.raw(line))
        assert answer["ok"] is False
        assert message in answer["error"]["message"]
        assert served.is_well()


def test_a_line_that_is_too_long_is_answered_and_the_connection_ends(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "REQUEST_BYTES_MAX", 1000)
    with serving(path) as served:
        answer = served.raw(b"x" * 2000 + b"\n" + b'{"op": "ping"}\n')
        assert json.loads(answer)["error"]["message"] == "the request is longer than 1000 bytes"
        assert served.is_well()


def test_a_client_that_says_nothing_is_dropped(path: Path) -> None:
    with serving(path, request_timeout_s=0.05) as served, socket.socket(socket.AF_UNIX) as silent:
        silent.settimeout(10)
        silent.connect(str(path))
        silent.sendall(b'{"op": ')
        assert silent.recv(1) == b""
        assert served.is_well()


def test_a_client_that_goes_away_in_the_middle_harms_nobody(path: Path) -> None:
    with serving(path, echo=echo) as served:
        for data in (b"", b'{"op"', b'{"op": "echo", "x": "' + b"x" * 500_000 + b'"}\n'):
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(str(path))
                client.sendall(data)
        assert served.is_well()


def test_more_clients_than_there_are_places_wait_their_turn(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "CONNECTIONS_MAX", 2)
    with serving(path) as served:
        held = [socket.socket(socket.AF_UNIX) for _ in range(2)]
        for connection in held:
            connection.connect(str(path))
            connection.sendall(b'{"op": "ping"}\n')
            assert connection.recv(4096)
        waiting = socket.socket(socket.AF_UNIX)
        waiting.settimeout(10)
        waiting.connect(str(path))
        waiting.sendall(b'{"op": "ping"}\n')
        held[0].close()
        assert json.loads(waiting.recv(4096))["ok"]
        waiting.close()
        held[1].close()
        assert served.is_well()


def failing(error: Exception) -> Callable[[Mapping[str, Any]], Any]:
    async def handler(_request: Mapping[str, Any]) -> object:
        await trio.lowlevel.checkpoint()
        raise error

    return handler


@pytest.mark.parametrize("error", [ConfigError("a key"), BusyError("in use"), UserError("x"), NovaError("plain")])
def test_an_error_of_ours_arrives_under_its_own_class(path: Path, error: NovaError) -> None:
    with serving(path, fail=failing(error)), pytest.raises(NovaError) as caught:
        call(path, "fail")
    assert type(caught.value) is type(error)
    assert str(caught.value) == str(error)


def test_an_error_whose_class_needs_more_than_a_message_arrives_with_its_message(path: Path) -> None:
    with (
        serving(path, fail=failing(FrameCorruptError(b"\1" * 32, "pack 00", 7, "bad"))),
        pytest.raises(NovaError, match="in pack 00 at 7: bad"),
    ):
        call(path, "fail")


def test_a_bug_in_a_handler_is_told_and_the_server_goes_on(path: Path) -> None:
    with serving(path, fail=failing(ZeroDivisionError("oops"))) as served:
        with pytest.raises(BugError, match="ZeroDivisionError: oops"):
            call(path, "fail")
        assert served.is_well()


def test_a_result_that_json_lacks_is_written_as_text(path: Path) -> None:
    async def odd(_request: Mapping[str, Any]) -> object:
        await trio.lowlevel.checkpoint()
        return {"path": Path("/x")}

    with serving(path, odd=odd):
        assert call(path, "odd") == {"path": "/x"}


def test_an_operation_is_registered_once(path: Path) -> None:
    with pytest.raises(BugError, match="'ping' is registered twice"):
        ControlServer(path).register("ping", echo)


def test_no_daemon_is_a_clear_error(path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"no mount answers at .*control.sock: is the volume mounted"):
        call(path, "stats")
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    with pytest.raises(NotFoundError, match="no mount answers"):
        call(path, "stats")


def test_a_daemon_of_somebody_else_is_a_clear_error(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_self: socket.socket, _address: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    with pytest.raises(AccessDeniedError, match="belongs to another user; try sudo"):
        call(path, "stats")


def test_a_daemon_that_does_not_answer_is_given_up(path: Path) -> None:
    async def stuck(_request: Mapping[str, Any]) -> object:
        return await trio.sleep_forever()

    with serving(path, stuck=stuck), pytest.raises(RetryableError, match=r"did not answer within 0\.05 s"):
        call(path, "stuck", timeout_s=0.05)


@pytest.mark.parametrize("answer", [b"", b"{", b"garbage\n", b"[]\n", b'{"ok": false}\n'])
def test_an_answer_that_is_none_is_a_clear_error(path: Path, answer: bytes) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(1)

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(4096)
                connection.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        with pytest.raises(RetryableError, match="broke off in the middle of its answer"):
            call(path, "stats", timeout_s=10)
        thread.join()
