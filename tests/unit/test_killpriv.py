"""The handshake that goes through a socket pair: what is changed, what is not, and that the session has its connection back."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator

import pytest
import trio
import trio.testing

from novafs_mount import killpriv
from novafs_mount.killpriv import FUSE_INIT, HANDLE_KILLPRIV_V2, handshake, with_flag

OFFERED = 0x73FFFFFB
UNIQUE = 2


def init(*, offered: int = OFFERED, opcode: int = FUSE_INIT, unique: int = UNIQUE, major: int = 7) -> bytes:
    """As Linux 6 sends it: 104 bytes."""
    return struct.pack("=IIQ24xIIII", 104, opcode, unique, major, 41, 131072, offered).ljust(104, b"\0")


def reply(*, flags: int = 0x1009, error: int = 0, unique: int = UNIQUE, major: int = 7) -> bytes:
    """As libfuse answers it: 80 bytes."""
    return struct.pack("=IiQIIII", 80, error, unique, major, 38, 131072, flags) + bytes(range(48))


def test_the_flag_is_added_and_nothing_else_changed() -> None:
    answer = with_flag(init(), reply())
    assert answer == reply(flags=0x1009 | HANDLE_KILLPRIV_V2)


@pytest.mark.parametrize(
    ("request_", "answer"),
    [
        (init(offered=OFFERED & ~HANDLE_KILLPRIV_V2), reply()),
        (init(), reply(error=-71)),
        (init(), reply(unique=3)),
        (init(), reply(major=8)),
        (init(major=8), reply()),  # another answer follows, to another INIT
        (init(opcode=3), reply()),
        (init(), struct.pack("=IiQ", 16, -5, UNIQUE)),
        (init()[:40], reply()),
        (b"", reply()),
        (init(), b""),
    ],
)
def test_what_is_not_as_expected_is_passed_on_as_it_is(request_: bytes, answer: bytes) -> None:
    assert with_flag(request_, answer) == answer


@pytest.fixture
def connection() -> Iterator[tuple[socket.socket, socket.socket]]:
    """What the kernel holds, and what the session holds."""
    kernel, session = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    kernel.setblocking(False)
    with kernel, session:
        yield kernel, session


def test_the_session_that_waits_already_has_its_connection_back(connection: tuple[socket.socket, socket.socket]) -> None:
    kernel, session = connection
    fd = session.fileno()

    async def libfuse() -> None:
        """The session's loop: INIT, its answer, and the next request."""
        await trio.lowlevel.wait_readable(fd)
        assert os.read(fd, 4096) == init()
        os.write(fd, reply())
        await trio.lowlevel.wait_readable(fd)
        assert os.read(fd, 4096) == b"the next request"
        os.write(fd, b"its answer")

    async def main() -> None:
        kernel.send(init())
        shaking = handshake(fd)
        assert shaking is not None
        with trio.fail_after(10):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(libfuse)
                await trio.testing.wait_all_tasks_blocked()
                nursery.start_soon(shaking.run)
                await trio.lowlevel.wait_readable(kernel)
                assert kernel.recv(4096) == with_flag(init(), reply())
                await trio.testing.wait_all_tasks_blocked()
                kernel.send(b"the next request")
            assert kernel.recv(4096) == b"its answer"
            assert shaking._ours.fileno() == -1

    trio.run(main)


def test_a_session_that_does_not_answer_has_its_connection_back(
    connection: tuple[socket.socket, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel, session = connection
    monkeypatch.setattr(killpriv, "ANSWER_S", 0.01)
    kernel.send(init())
    shaking = handshake(session.fileno())
    assert shaking is not None
    trio.run(shaking.run)
    kernel.send(b"another")
    assert session.recv(4096) == b"another"


def test_without_a_request_and_without_a_session_nothing_is_done(connection: tuple[socket.socket, socket.socket]) -> None:
    assert handshake(None) is None
    assert handshake(connection[1].fileno()) is None


def test_where_there_are_no_descriptors_left_init_stays_to_be_read(
    connection: tuple[socket.socket, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel, session = connection
    kernel.send(init())

    def refused(*_: object) -> tuple[socket.socket, socket.socket]:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(socket, "socketpair", refused)
    assert handshake(session.fileno()) is None
    assert session.recv(4096) == init()
