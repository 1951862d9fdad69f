"""What systemd is told, over a real socket, and what happens when nobody listens."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio
import trio.testing

from novafs.writeback import DataAtRisk
from novafs_mount import supervision
from novafs_mount.sdnotify import Notifier


class Manager:
    """A service manager's end of the socket."""

    def __init__(self, address: str) -> None:
        self.address = address
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind("\0" + address[1:] if address.startswith("@") else address)
        self._socket.settimeout(20)

    def heard(self) -> str:
        """The next message, waiting for it."""
        return self._socket.recv(4096).decode()

    def close(self) -> None:
        self._socket.close()


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Manager]:
    found = Manager(str(tmp_path / "notify") if request.param == "path" else f"@novafs-test-{os.getpid()}-{tmp_path.name}")
    yield found
    found.close()


def test_a_service_manager_hears_what_it_is_told(manager: Manager) -> None:
    environ = {"NOTIFY_SOCKET": manager.address, "WATCHDOG_USEC": "30000000", "WATCHDOG_PID": str(os.getpid()), "HOME": "/"}
    notifier = Notifier.from_environment(environ)
    assert environ == {"HOME": "/"}, "no child may answer for us"
    assert (notifier.active, notifier.watchdog_s) == (True, 30.0)
    notifier.status("serving\n/images")
    notifier.status("serving /images")
    notifier.ready()
    notifier.watchdog()
    notifier.reloading()
    notifier.extend(1.5)
    notifier.stopping()
    assert [manager.heard() for _ in range(3)] == ["STATUS=serving /images", "READY=1", "WATCHDOG=1"]
    assert manager.heard().startswith("RELOADING=1\nMONOTONIC_USEC=")
    assert [manager.heard() for _ in range(2)] == ["EXTEND_TIMEOUT_USEC=1500000", "STOPPING=1"]
    notifier.close()
    notifier.ready()
    assert not notifier.active


def test_without_a_service_manager_nothing_is_told() -> None:
    notifier = Notifier.from_environment({})
    assert (notifier.active, notifier.watchdog_s) == (False, None)
    notifier.ready()
    notifier.status("x")


def test_a_service_manager_that_has_gone_or_does_not_read_holds_nothing_up(tmp_path: Path) -> None:
    gone = Notifier(str(tmp_path / "nobody"))
    gone.ready()
    gone.close()
    deaf = Manager(str(tmp_path / "deaf"))
    notifier = Notifier(deaf.address)
    for _ in range(5000):
        notifier.watchdog()
    notifier.close()
    deaf.close()


def test_an_address_that_is_none_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    notifier = Notifier("vsock:2:1234")
    assert not notifier.active
    assert "NOTIFY_SOCKET=vsock:2:1234" in caplog.text


@pytest.mark.parametrize(("usec", "pid"), [("", ""), ("0", ""), ("soon", ""), ("30000000", "1")])
def test_the_watchdog_of_another_process_is_not_ours(usec: str, pid: str, tmp_path: Path) -> None:
    environ = {"NOTIFY_SOCKET": str(tmp_path / "s"), "WATCHDOG_USEC": usec, "WATCHDOG_PID": pid}
    notifier = Notifier.from_environment(environ)
    assert notifier.watchdog_s is None
    notifier.close()


def test_a_directory_answers_and_a_mount_that_has_gone_does_not(tmp_path: Path) -> None:
    assert supervision.answers(tmp_path)
    assert supervision.answers(tmp_path / "missing"), "an error is an answer"


class _Writeback:
    """What the reporter asks a volume for, at one moment after the other."""

    def __init__(self, *moments: DataAtRisk) -> None:
        self._moments = list(moments)

    @property
    def at_risk(self) -> DataAtRisk:
        return self._moments.pop(0) if len(self._moments) > 1 else self._moments[0]


class _Volume:
    """At the second look at the end another pack has been sent, at the third its image is committed."""

    def __init__(self, *moments: DataAtRisk) -> None:
        self.writeback = _Writeback(*moments)
        self._sent = [(0, 3), (8, 3), (9, 1)]

    @property
    def stored_so_far(self) -> tuple[int, int]:
        return self._sent.pop(0) if len(self._sent) > 1 else self._sent[0]


def test_the_end_says_what_is_left_and_asks_for_time_only_while_that_shrinks(tmp_path: Path) -> None:
    manager = Manager(str(tmp_path / "notify"))
    notifier = Notifier(manager.address)
    serving = DataAtRisk(3 << 20, 1.5, 2)
    volume = _Volume(serving, DataAtRisk(3 << 20, 2, 2), DataAtRisk(3 << 20, 3, 2), DataAtRisk(1 << 20, 4, 1), DataAtRisk(0, 0, 0))

    async def main() -> None:
        reporter = supervision.Reporter(Path("/images"), notifier, open_files=lambda: 7)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(reporter.run, volume)
            await trio.sleep(1)
            reporter.ending()
            await trio.sleep(20)
            nursery.cancel_scope.cancel()

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
    notifier.close()
    assert manager.heard() == "STATUS=serving /images: 7 files open; 3.0 MiB of 2 images to store, the oldest 1.5 s old"
    assert manager.heard() == "STOPPING=1"
    assert manager.heard() == "STATUS=/images is unmounted; 3.0 MiB of 2 images left to store"
    assert manager.heard() == "EXTEND_TIMEOUT_USEC=90000000"
    assert manager.heard() == "EXTEND_TIMEOUT_USEC=90000000"
    assert manager.heard() == "STATUS=/images is unmounted; 1.0 MiB of 1 image left to store"
    assert manager.heard() == "EXTEND_TIMEOUT_USEC=90000000"
    assert manager.heard() == "STATUS=/images is unmounted; closing"
    manager.close()


def test_what_a_busy_manager_could_not_take_is_told_with_what_comes_next(manager: Manager) -> None:
    notifier = Notifier(manager.address)
    sent = 0
    while not notifier._unsent:
        notifier.status(f"number {sent}")
        sent += 1
    notifier.ready()
    notifier.watchdog()
    for number in range(sent - 1):
        assert manager.heard() == f"STATUS=number {number}"
    notifier.status("the newest")
    assert manager.heard() == "READY=1\nSTATUS=the newest"
    notifier.watchdog()
    assert manager.heard() == "WATCHDOG=1"
    notifier.close()


def test_a_wait_for_open_files_is_granted_by_the_manager(manager: Manager) -> None:
    notifier = Notifier(manager.address)
    reporter = supervision.Reporter(Path("/m"), notifier, open_files=lambda: 1)
    reporter.leaving()
    assert (manager.heard(), manager.heard()) == ("STOPPING=1", "STATUS=unmounting /m")
    reporter.leaving(": waiting at most 3600 s", 3600)
    assert (manager.heard(), manager.heard()) == ("STOPPING=1", f"EXTEND_TIMEOUT_USEC={int((3600 + supervision.EXTEND_S) * 1e6)}")
    assert reporter.is_leaving
    notifier.close()


def test_hung_calls_of_others_do_not_starve_the_watchdog(manager: Manager, tmp_path: Path) -> None:
    notifier = Notifier(manager.address, watchdog_s=0.3)

    async def main() -> None:
        limiter = trio.to_thread.current_default_thread_limiter()
        for holder in [object() for _ in range(int(limiter.total_tokens))]:
            limiter.acquire_on_behalf_of_nowait(holder)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(supervision.watch, tmp_path, notifier)
            heard = await trio.to_thread.run_sync(manager.heard, limiter=trio.CapacityLimiter(1))
            assert heard == "WATCHDOG=1"
            nursery.cancel_scope.cancel()

    trio.run(main)
    notifier.close()
