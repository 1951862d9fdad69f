"""Redis in every kind of trouble, while programs write, fsync and read cold data on the real mount: it costs time, and nothing else.

Each test lets writers and a reader run (`tests.support.writers`), brings the trouble, lets them go on in it, ends it, and lets them
go on again. No call may fail and no byte may be wrong; what was written is there after a fresh mount. What the tier itself
does is tested in `tests/unit/test_redis_tier.py`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from novafs.control import call
from novafs.statedir import CONTROL_SOCKET
from tests.support.engine import make_volume
from tests.support.fault_proxy import Answer, Corrupt, Cut, Delay, TcpFaultProxy
from tests.support.history import ImageHistory
from tests.support.mounted import Mount, mounted
from tests.support.redis_servers import RedisServer, wait_until
from tests.support.writers import ColdReader, Crowd, Writer

pytestmark = [pytest.mark.fuse, pytest.mark.redis, pytest.mark.s3]

CALLS = 30
"""Of the writers, before, in and after the trouble."""
READS = 20
FIRE_TIMEOUT_S = 90
"""After a failure L2 is left alone for up to ten seconds."""


class Work:
    """The programs on one mount. `go_on` returns once they have done a good deal more, and raises what one of them met."""

    def __init__(self, mount: Mount, crowd: Crowd) -> None:
        self.mount = mount
        self.crowd = crowd
        self.histories = [ImageHistory(f"{number}.raw") for number in range(2)]
        self.cold = ColdReader(mount.path / "cold.raw", random.Random(0), told=crowd.tell)
        self.cold.make()
        writers = [Writer(mount.path, history, random.Random(history.name), told=crowd.tell) for history in self.histories]
        crowd.start([self.cold, *writers])

    def go_on(self) -> None:
        for _ in range(2):
            self.crowd.wait("any", CALLS)
            self.crowd.wait("cold", READS // 2)

    def l2(self) -> dict[str, Any]:
        """What the daemon has had of L2: hits, misses, errors, bytes."""
        found: dict[str, Any] = call(self.mount.state_dir / CONTROL_SOCKET, "stats")["cache"]["l2_traffic"]
        return found


@contextmanager
def at_work(directory: Path, url: str, l2: str) -> Iterator[Work]:
    """The programs on a new volume at `url`; L2 has been hit when this yields. At the end everything is found right, by a fresh mount."""
    trio.run(lambda: make_volume(url))
    small = ("--l1-capacity", "4MiB", "--set", "writeback.interval=200ms", "--set", "l2.timeout=1s")
    with mounted(directory, *small, url=url, l2=l2) as mount:
        with Crowd() as crowd:
            work = Work(mount, crowd)
            wait_until(lambda: work.l2()["hits"] > 0, "a hit in L2")
            work.go_on()
            yield work
            work.go_on()
        assert "EIO" not in mount.text, mount.text
    with mounted(directory, *small, url=url) as mount:
        for history in work.histories:
            history.promise(history.steps)  # all was closed
            history.check((mount.path / history.name).read_bytes())


def killed_and_restarted(server: RedisServer, work: Work) -> None:
    server.kill()
    work.mount.wait_log(r"L2 at .* does not answer")
    work.go_on()
    server.start()
    work.mount.wait_log(r"L2 at .* answers again")
    hits = work.l2()["hits"]
    wait_until(lambda: work.l2()["hits"] > hits, "a hit in the new server")


def paused(server: RedisServer, work: Work) -> None:
    server.pause()
    try:
        work.mount.wait_log(r"L2 at .* does not answer")
        work.go_on()
    finally:
        server.resume()
    work.mount.wait_log(r"L2 at .* answers again")


def flushed(server: RedisServer, work: Work) -> None:
    with server.client() as client:
        for _ in range(2):
            client.flushall()
            work.go_on()
        hits = work.l2()["hits"]
        wait_until(lambda: work.l2()["hits"] > hits and client.dbsize() > 0, "a hit after the flush")


def full(server: RedisServer, work: Work) -> None:
    """No memory for what is new: the server refuses, and never evicts by itself."""
    with server.client() as client:
        client.config_set("maxmemory-policy", "noeviction")
        client.config_set("maxmemory", "1")
        wait_until(lambda: client.info("errorstats").get("errorstat_OOM", {"count": 0})["count"] > 0, "a refused write")
        work.go_on()
        client.config_set("maxmemory", "0")
        keys = client.dbsize()
        wait_until(lambda: client.dbsize() > keys, "a write that is taken again")


def poisoned(server: RedisServer, work: Work) -> None:
    """Every chunk there is replaced by bytes that are none, or another chunk's."""
    with server.client() as client:
        for _ in range(2):
            keys = [key for key in client.scan_iter() if client.type(key) == b"string"]
            assert keys
            values = [client.get(key) for key in keys]
            for number, key in enumerate(keys):
                other = values[number - 1] or b"x"
                client.set(key, (b"garbage", other, b"", other[:-1], bytes(len(other)))[number % 5])
            work.go_on()
    work.mount.wait_log(r"L2 at .* holds \d+ values that are none of ours")


@pytest.mark.parametrize("trouble", [killed_and_restarted, paused, flushed, full, poisoned], ids=lambda trouble: trouble.__name__)
def test_nobody_notices_a_redis_that_is(
    s3_url: str, redis_server: RedisServer, tmp_path: Path, trouble: Callable[[RedisServer, Work], None]
) -> None:
    """semantics: S11."""
    with at_work(tmp_path, s3_url, redis_server.url) as work:
        trouble(redis_server, work)


def test_nobody_notices_a_redis_that_answers_garbage(s3_url: str, redis_server: RedisServer, tmp_path: Path) -> None:
    """semantics: S11, S1. What comes is no answer of Redis, an answer with wrong bytes in it, the half of one, or one much too late."""
    with TcpFaultProxy(redis_server.port) as proxy, at_work(tmp_path, s3_url, f"redis://127.0.0.1:{proxy.port}") as work:
        for fault, times in (
            # Reads of chunks alone: what looks whether the server is back must get through.
            (Answer(body=b"HTTP/1.1 400 Bad Request\r\n\r\n", path="GETRANGE", times=None), 1),
            (Corrupt(0, path="GETRANGE", times=None), 1),
            (Corrupt(300, path="GETRANGE", times=None), 10),
            (Corrupt(5000, path="GETRANGE", times=None), 10),
            (Cut(1000, path="GETRANGE", times=None), 1),
            (Delay(3, path="GETRANGE"), 1),
        ):
            proxy.script(fault)
            wait_until(lambda fault=fault, times=times: fault.fired >= times, f"{fault} to fire", FIRE_TIMEOUT_S)  # type: ignore[misc]
            work.crowd.wait("cold", READS // 2)
            proxy.clear()
        work.go_on()
