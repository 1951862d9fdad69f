"""kill -9 of the daemon at any moment, on the real mount with the real Redis and Ceph: what fsync promised is there afterwards.

Programs outside the daemon write three images at random and note what they issued and what they were promised
(`tests.support.writers`, `tests.support.history`). The daemon is killed: in the middle of writes, fsyncs and closes; while a
chosen request to the store is on its way, which then arrives at the store after the daemon's death, or even after the next
mount has begun; in the middle of the replay. Then the volume is mounted again, over the dead mount or after a `umount`, and
each image must be what it was at some point in time not before the last promise. Some of it happens with `durability = "store"`,
some with a store that delays, fails, resets and loses answers; with `"store"` the state directory may be lost as well.

`NOVAFS_TEST_KILLS=N` kills as often (50 is the default, `make torture` takes thousands), `NOVAFS_TEST_KILL_SEED=S` draws the
same decisions again; what the threads and the kernel make of them may differ.
"""

from __future__ import annotations

import os
import random
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from tests.support.ceph import Ceph
from tests.support.cli import novafs
from tests.support.engine import make_volume
from tests.support.fault_proxy import Answer, Cut, Delay, Fault, Hold, HttpFaultProxy, LoseAnswer, Reset
from tests.support.fixtures import BUCKET
from tests.support.history import ImageHistory
from tests.support.loss import lose_host
from tests.support.mounted import READY, UNMEASURED, Mount
from tests.support.redis_servers import RedisServer
from tests.support.writers import Crowd, Writer

pytestmark = [pytest.mark.fuse, pytest.mark.redis, pytest.mark.s3, pytest.mark.slow]

KILLS = int(os.environ.get("NOVAFS_TEST_KILLS", "50"))
SERIES_KILLS = 50
"""Of one volume; the next series has a new one."""
SEED = int(os.environ.get("NOVAFS_TEST_KILL_SEED", "0" if KILLS <= SERIES_KILLS else random.SystemRandom().randrange(1 << 32)))
IMAGES = 3
HOLD_TIMEOUT_S = 30
SERIES_TIMEOUT_S = 400

MOMENTS = ("any", "fsync", "close", "request", "request", "replay")
REQUESTS = (("PUT", r"/images/"), ("PUT", r"/images/"), ("PUT", r"/packs/"), ("PUT", r"/leases/"), ("GET", r"list-type"))
"""What a daemon may be killed in: generations, packs, leases, looking for the newest of a chain."""


class Site:
    """One volume on Ceph behind a proxy, with Redis, one host's state directory and mount point, and its images."""

    def __init__(self, directory: Path, proxy: HttpFaultProxy, url: str, redis: RedisServer, rng: random.Random) -> None:
        self.rng = rng
        self.proxy = proxy
        self.histories = [ImageHistory(f"{number}.raw") for number in range(IMAGES)]
        self.kills = 0
        self.seen: Counter[str] = Counter()
        self.url = url
        self._path = directory / "mnt"
        self._path.mkdir()
        self.state_dir = directory / "state"
        self._redis = redis
        self._mount: Mount | None = None

    def start(self, durability: str) -> Mount:
        """The daemon on its way up; it may be killed before it is ready."""
        self._mount = Mount(
            self.url,
            self._path,
            self.state_dir,
            ["--l2-url", self._redis.url, "--l1-capacity", "64MiB", "--durability", durability, "--set", "writeback.interval=150ms"],
            UNMEASURED,
        )
        return self._mount

    def kill(self) -> None:
        """kill -9; half of the time the user unmounts what is left, else the next mount goes over it."""
        assert self._mount is not None
        self._mount.kill()
        self.kills += 1
        assert "Traceback" not in self._mount.text, self._mount.text
        if self.rng.random() < 0.5:
            subprocess.run(["fusermount3", "-u", "-q", str(self._path)], capture_output=True)  # it may not have come to a mount

    def check(self, *, host_lost: bool) -> None:
        """Every image is what may be left of it."""
        for history in self.histories:
            path = self._path / history.name
            if not path.exists():
                assert not history.promised, f"{history.name} is gone"
                continue
            self.seen["steps lost that were not promised"] += history.check(path.read_bytes(), host_lost=host_lost)

    def clean_up(self) -> None:
        if self._mount is not None:
            self._mount.clean_up()


def faults(rng: random.Random) -> list[Fault]:
    """A store that is bad in some way for a while; nothing that outlasts `store.io_timeout`."""
    kinds: list[Fault] = [
        Delay(rng.uniform(0.005, 0.03), times=None),
        Answer(503, times=rng.randint(1, 4), nth=rng.randint(1, 10)),
        Answer(500, method="PUT", times=rng.randint(1, 3), nth=rng.randint(1, 6)),
        Reset(times=rng.randint(1, 3), nth=rng.randint(1, 10)),
        LoseAnswer(method="PUT", path=r"/images/", times=1, nth=rng.randint(1, 4)),
        LoseAnswer(method="PUT", path=r"/leases/", times=1, nth=rng.randint(1, 3)),
        Cut(50, method="GET", times=2, nth=rng.randint(1, 5)),
    ]
    return rng.sample(kinds, rng.randint(1, 3))


def one_round(site: Site, moment: str, durability: str, bad: bool, *, host_lost: bool) -> None:
    """Mount, check what the last kill has left, write, kill."""
    rng, proxy = site.rng, site.proxy
    late: Hold | None = None
    if moment == "replay":
        late = Hold(nth=rng.randint(1, 25))
        proxy.script(late)
        killed = site.start(durability)
        ready_or_held(killed, late)
        site.kill()
    mount = site.start(durability)
    if late is not None and rng.random() < 0.5:
        late.release()  # the dead one's last request arrives beside the new one's first
    mount.wait_log(READY)
    proxy.clear()
    site.check(host_lost=host_lost)
    if bad:
        scripted = faults(rng)
        proxy.script(*scripted)
    with Crowd() as crowd:
        writers = [
            Writer(mount.path, history, random.Random(rng.random()), durability=durability, told=crowd.tell) for history in site.histories
        ]
        crowd.start(writers)
        if moment == "request":
            crowd.wait("any", rng.randint(5, 30))
            method, path = rng.choice(REQUESTS)
            late = Hold(method=method, path=path, nth=rng.randint(1, 3))
            proxy.script(late)
            assert late.reached.wait(HOLD_TIMEOUT_S), f"no {method} {path} was asked of the store"
            site.seen[f"killed in {method} {path}"] += 1
        else:
            event = moment if moment in ("fsync", "close") else "any"
            crowd.wait(event, rng.randint(1, {"fsync": 50, "close": 10}.get(event, 250)))
            time.sleep(rng.uniform(0, 0.01))  # into the call that has begun, or past it
        crowd.gone = True
        site.kill()
    for writer in writers:
        site.seen.update(writer.counts)
    if bad:
        site.seen.update(f"{type(fault).__name__} in the way" for fault in scripted if fault.fired)
    site.seen[f"durability {durability}"] += 1
    if moment == "request" and rng.random() < 0.5:
        # It stays where it is until the next daemon is up: `proxy.clear`.
        return
    proxy.clear()


def ready_or_held(mount: Mount, hold: Hold) -> None:
    """Until the daemon has come to the request that is held, or is ready without having made as many."""
    deadline = time.monotonic() + HOLD_TIMEOUT_S
    while not hold.reached.is_set() and READY.search(mount.text) is None:
        assert time.monotonic() < deadline and mount.process.poll() is None, mount.text
        hold.reached.wait(0.01)


@pytest.fixture
def proxy(ceph_rgw: Ceph) -> Iterator[HttpFaultProxy]:
    with HttpFaultProxy(ceph_rgw.port) as proxy:
        yield proxy


@pytest.mark.timeout(SERIES_TIMEOUT_S)
@pytest.mark.parametrize("series", range((KILLS + SERIES_KILLS - 1) // SERIES_KILLS))
def test_whatever_moment_the_daemon_is_killed_at_no_fsynced_byte_is_lost(
    ceph_rgw: Ceph, s3_prefix: str, proxy: HttpFaultProxy, redis_server: RedisServer, tmp_path: Path, series: int
) -> None:
    """semantics: S2, S3. Also S1: each block tells what it is."""
    url = ceph_rgw.volume_url(BUCKET, s3_prefix, endpoint=proxy.endpoint)
    trio.run(lambda: make_volume(url))
    print(f"NOVAFS_TEST_KILL_SEED={SEED}, series {series}")
    rng = random.Random(SEED + series)
    site = Site(tmp_path, proxy, url, redis_server, rng)
    try:
        host_lost, number = False, 0
        while site.kills < min(SERIES_KILLS, KILLS - series * SERIES_KILLS):
            number += 1
            durability = "store" if rng.random() < 0.35 else "journal"
            moment, bad = rng.choice(MOMENTS), rng.random() < 0.35
            try:
                one_round(site, moment, durability, bad, host_lost=host_lost)
            except BaseException as error:
                error.add_note(f"round {number}: {moment}, durability {durability}, faults {bad}; NOVAFS_TEST_KILL_SEED={SEED + series}")
                error.add_note(site._mount.text if site._mount is not None else "")
                raise
            proxy.seen.clear()
            host_lost = durability == "store" and rng.random() < 0.3
            if host_lost:
                proxy.clear()
                lose_host(url, site.state_dir, [history.name for history in site.histories])
                site.seen["hosts lost"] += 1
        site.start("journal").wait_log(READY)
        proxy.clear()
        site.check(host_lost=host_lost)
    finally:
        proxy.clear()
        site.clean_up()
    print(f"{site.kills} kills; {dict(site.seen)}")
    assert "no problems" in novafs("fsck", url, "--scrub", "--state-dir", tmp_path / "after", "--l2-url", "none")
    if KILLS > SERIES_KILLS:  # memory is wanted for the next one
        forget(ceph_rgw, s3_prefix)


def forget(ceph: Ceph, prefix: str) -> None:
    """Delete what a series has stored."""
    client = ceph.client()
    while rows := client.list_objects_v2(Bucket=BUCKET, Prefix=prefix).get("Contents", []):
        client.delete_objects(Bucket=BUCKET, Delete={"Objects": [{"Key": row["Key"]} for row in rows], "Quiet": True})
    client.close()
