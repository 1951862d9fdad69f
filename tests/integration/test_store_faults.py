"""The object store in every kind of trouble, while programs write, fsync and read on the real mount (Ceph RGW behind a proxy).

Trouble that passes within `store.io_timeout` is not noticed. While it lasts longer: what L1 holds can be read, what is only in the
store is EIO; writes and fsyncs go on up to the cap on dirty data; and when the store is well again, commits resume by themselves
and everything is there. A test heals the store and then looks with a fresh mount, so nothing but the store can have kept it.
"""

from __future__ import annotations

import errno
import os
import random
import secrets
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import trio

from novafs.control import call
from novafs.statedir import CONTROL_SOCKET
from tests.support.ceph import Ceph
from tests.support.cli import novafs, novafs_json
from tests.support.engine import make_volume
from tests.support.fault_proxy import Answer, Cut, Delay, Fault, Hold, HttpFaultProxy, Reset
from tests.support.fixtures import BUCKET
from tests.support.history import ImageHistory
from tests.support.mounted import UNMEASURED, Mount, mounted, running
from tests.support.redis_servers import wait_until
from tests.support.writers import ColdReader, Crowd, Writer

pytestmark = [pytest.mark.fuse, pytest.mark.s3]

MIB = 1 << 20
CALLS = 60
READS = 30
WAIT_S = 60
DENIED = b'<?xml version="1.0"?><Error><Code>AccessDenied</Code><Message>not any more</Message></Error>'


@pytest.fixture
def proxy(ceph_rgw: Ceph) -> Iterator[HttpFaultProxy]:
    with HttpFaultProxy(ceph_rgw.port) as proxy:
        yield proxy


@pytest.fixture
def url(ceph_rgw: Ceph, s3_prefix: str, proxy: HttpFaultProxy) -> str:
    """A new volume behind the proxy."""
    return trio.run(lambda: make_volume(ceph_rgw.volume_url(BUCKET, s3_prefix, endpoint=proxy.endpoint)))


def fails(number: int) -> pytest.RaisesExc[OSError]:
    return pytest.raises(OSError, check=lambda error: error.errno == number)


def dirty_bytes(mount: Mount) -> int:
    return int(call(mount.state_dir / CONTROL_SOCKET, "stats")["data_at_risk"]["bytes"])


# --- trouble that passes -----------------------------------------------------------------------------------------------------


# Faults of one list are for requests that differ: of two that fit one request the second could not be seen to fire.


def slow() -> list[Fault]:
    return [Delay(0.03, times=60)]


def errors_500() -> list[Fault]:
    return [Answer(500, method="GET", times=3), Answer(500, method="PUT", times=3)]


def errors_503() -> list[Fault]:
    return [Answer(503, method=m, path=p, times=2) for m, p in (("GET", "list-type"), ("PUT", "/images/"), ("PUT", "/packs/"))]


def resets() -> list[Fault]:
    return [Reset(method=m, path=p, times=2) for m, p in (("GET", ""), ("PUT", "/images/"), ("PUT", "/packs/"))]


def truncated() -> list[Fault]:
    """Bodies that end early: of packs and of listings."""
    return [Cut(1000, method="GET", path="/packs/", times=4), Cut(30, method="GET", path="list-type", times=3)]


@pytest.mark.parametrize(
    ("trouble", "durability"),
    [(slow, "journal"), (errors_500, "store"), (errors_503, "journal"), (resets, "store"), (truncated, "journal")],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_store_in_trouble_for_a_while_is_not_noticed(
    url: str, proxy: HttpFaultProxy, tmp_path: Path, trouble: Callable[[], list[Fault]], durability: str
) -> None:
    rules = ("--l1-capacity", "4MiB", "--durability", durability, "--set", "writeback.interval=200ms")
    histories = [ImageHistory(f"{number}.raw") for number in range(2)]
    with mounted(tmp_path, *rules, url=url) as mount:
        with Crowd() as crowd:
            cold = ColdReader(mount.path / "cold.raw", random.Random(0), told=crowd.tell)
            cold.make()
            writers = [Writer(mount.path, h, random.Random(h.name), durability=durability, told=crowd.tell) for h in histories]
            crowd.start([cold, *writers])
            crowd.wait("cold", READS)
            faults = trouble()
            proxy.script(*faults)
            wait_until(lambda: all(fault.fired >= (fault.times or 1) for fault in faults), "every fault to fire", WAIT_S)
            crowd.wait("cold", READS)
            crowd.wait("any", CALLS)
        proxy.assert_all_fired()
        assert "EIO" not in mount.text, mount.text
    with mounted(tmp_path, url=url) as mount:
        for history in histories:
            history.promise(history.steps)
            history.check((mount.path / history.name).read_bytes())


# --- trouble that lasts ------------------------------------------------------------------------------------------------------


class Background(threading.Thread):
    """One call in a thread; `outcome` waits for it."""

    def __init__(self, call: Callable[[], object]) -> None:
        super().__init__(daemon=True)
        self._call = call
        self._error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self._call()
        except BaseException as error:
            self._error = error

    def outcome(self) -> None:
        """Raises what the call raised."""
        self.join(WAIT_S)
        assert not self.is_alive(), "the call hangs"
        if self._error is not None:
            raise self._error


def write_much(writer: Writer) -> None:
    """More than may be dirty."""
    for _ in range(300):
        writer.write()


def gone() -> list[Fault]:
    return [Answer(503, times=None)]


def cut_off() -> list[Fault]:
    return [Reset(times=None)]


def silent() -> list[Fault]:
    return [Hold(times=None)]


@pytest.mark.parametrize("trouble", [gone, cut_off, silent], ids=lambda trouble: trouble.__name__)
def test_while_the_store_is_away_everything_that_can_goes_on_and_the_rest_when_it_is_back(
    url: str, proxy: HttpFaultProxy, tmp_path: Path, trouble: Callable[[], list[Fault]]
) -> None:
    """semantics: S4. Reads of what L1 holds and writes go on, up to the cap on dirty data; other reads are EIO; all commits follow."""
    rules = ("--set", "writeback.interval=200ms", "--set", "writeback.dirty_max=8MiB", "--set", "store.io_timeout=1s")
    with mounted(tmp_path, url=url) as mount:
        cold, far = (ColdReader(mount.path / name, random.Random(0), size=MIB) for name in ("cold.raw", "far.raw"))
        cold.make()
        far.make()
    history = ImageHistory("a.raw")
    with mounted(tmp_path, *rules, url=url) as mount:
        cold.open()
        far.open()
        cold.read(3, 2)
        writer = Writer(mount.path, history, random.Random(0), blocks_max=4096)
        writer.open()
        for _ in range(10):
            writer.write()
        writer.fsync()
        proxy.script(*trouble())
        cold.read(3, 2)
        with fails(errno.EIO):
            far.read(7)
        mount.wait_log(r"read far\.raw at .*EIO")
        for _ in range(8):
            writer.write()
            writer.fsync()
            writer.read()
        # Now more than may be dirty: the writer stops, without an error, and goes on when there is room.
        many = Background(lambda: write_much(writer))
        wait_until(lambda: dirty_bytes(mount) >= 8 * MIB, "the cap on dirty data", WAIT_S)
        mount.wait_log(r"a\.raw: (not committed yet|can not be committed)")
        cold.read(3, 2)
        proxy.assert_all_fired()
        before = proxy.count("PUT", "/images/")
        proxy.clear()
        many.outcome()
        wait_until(lambda: dirty_bytes(mount) == 0, "the commits to resume", WAIT_S)
        assert proxy.count("PUT", "/images/") > before
        far.read(7)
        writer.fsync()
        for program in (writer, cold, far):
            program.close()
    with mounted(tmp_path, url=url) as mount:
        history.promise(history.steps)
        history.check((mount.path / history.name).read_bytes())


# --- refusals: waiting does not mend them, so writers are told at the cap -----------------------------------------------------


def write_until_refused(writer: Writer, number: int) -> None:
    """Write and fsync until the cap on dirty data is reached and nothing can make room."""
    writer.fsync()
    for _ in range(1000):
        mark = writer.history.steps
        try:
            writer.write()
        except OSError as error:
            assert error.errno == number
            writer.history.withdraw(mark)
            return
        writer.fsync()
    pytest.fail("more than may be dirty was written while nothing could be stored")


def goes_on(mount: Mount, writer: Writer) -> None:
    """After the end of a refusal: commits resume by themselves, and writing goes on."""
    wait_until(lambda: dirty_bytes(mount) == 0, "the commits to resume", WAIT_S)
    for _ in range(10):
        writer.write()
    writer.fsync()
    writer.close()


def test_a_store_that_refuses_the_credentials_mid_way_is_eio_at_the_cap_and_loses_nothing(
    url: str, proxy: HttpFaultProxy, tmp_path: Path
) -> None:
    """semantics: S4. Reads of what is in L1 go on, and so do writes and fsyncs up to the cap."""
    rules = ("--set", "writeback.interval=200ms", "--set", "writeback.dirty_max=4MiB")
    history = ImageHistory("a.raw")
    with mounted(tmp_path, url=url) as mount:
        cold, far = (ColdReader(mount.path / name, random.Random(0), size=MIB) for name in ("cold.raw", "far.raw"))
        cold.make()
        far.make()
    with mounted(tmp_path, *rules, url=url) as mount:
        writer = Writer(mount.path, history, random.Random(0), blocks_max=2048)
        writer.open()
        cold.open()
        far.open()
        cold.read(3, 2)
        writer.write()
        proxy.script(Answer(403, body=DENIED, times=None))
        write_until_refused(writer, errno.EIO)
        mount.wait_log(r"a\.raw: can not be committed: .*(credentials|denied|refuse|not allowed)")
        cold.read(3, 2)
        with fails(errno.EIO):
            far.read(7)
        proxy.assert_all_fired()
        proxy.clear()
        goes_on(mount, writer)
        far.read(7)
        cold.close()
        far.close()
    with mounted(tmp_path, url=url) as mount:
        history.promise(history.steps)
        history.check((mount.path / history.name).read_bytes())


def test_a_store_that_is_full_is_enospc_at_the_cap_and_loses_nothing(ceph_rgw: Ceph, tmp_path: Path) -> None:
    """semantics: S4. A real quota of RGW; raised again, everything follows by itself. A kill in between loses no fsynced byte."""
    name = "poor-" + secrets.token_hex(4)
    poor = ceph_rgw.add_user(name, quota_bytes=3 * MIB)
    ceph_rgw.make_bucket(name, poor)
    keys = {"AWS_ACCESS_KEY_ID": poor.access_key, "AWS_SECRET_ACCESS_KEY": poor.secret_key}
    url = ceph_rgw.volume_url(name, "v")
    novafs("init", url, "--state-dir", tmp_path / "operator", environ=keys)
    rules = ("--set", "writeback.interval=200ms", "--set", "writeback.dirty_max=4MiB", "--set", "l3.codec=none")
    history = ImageHistory("a.raw")
    with running(url, tmp_path / "mnt", tmp_path / "state", *rules, environ={**UNMEASURED, **keys}) as mount:
        writer = Writer(mount.path, history, random.Random(0), blocks_max=2048)
        writer.open()
        write_until_refused(writer, errno.ENOSPC)
        mount.wait_log(r"a\.raw: can not be committed: .*(quota|full|no space)")
        writer.read()
        mount.kill()
        with pytest.raises(OSError):
            writer.close()
    ceph_rgw.set_quota(name, 300 * MIB)
    with running(url, tmp_path / "mnt", tmp_path / "state", *rules, environ=keys) as mount:
        history.check((mount.path / history.name).read_bytes())
        ceph_rgw.set_quota(name, MIB)  # less than there is
        writer = Writer(mount.path, history, random.Random(1), blocks_max=2048)
        writer.open()
        write_until_refused(writer, errno.ENOSPC)
        ceph_rgw.set_quota(name, 300 * MIB)
        goes_on(mount, writer)
        mount.unmount()
        assert mount.wait() == 0, mount.text
    with running(url, tmp_path / "mnt", tmp_path / "state", environ=keys) as mount:
        history.promise(history.steps)
        history.check((mount.path / history.name).read_bytes())


# --- a lost object -----------------------------------------------------------------------------------------------------------


def test_a_pack_that_is_lost_is_eio_with_a_line_that_names_it_and_other_images_are_fine(
    ceph_rgw: Ceph, s3_prefix: str, url: str, tmp_path: Path
) -> None:
    """semantics: S1. Never zeros. `novafs fsck` names the image as well."""
    with mounted(tmp_path, url=url) as mount:
        images = [ColdReader(mount.path / name, random.Random(0), size=MIB) for name in ("lost.raw", "fine.raw")]
        for image in images:
            image.make()
    lost, fine = images
    client = ceph_rgw.client()
    rows = client.list_objects_v2(Bucket=BUCKET, Prefix=f"{s3_prefix}/packs/")["Contents"]
    # Noise does not compress, so its chunks lie in the packs as they are.
    first = lost.content[:4096]
    packs = [row["Key"] for row in rows if first in client.get_object(Bucket=BUCKET, Key=row["Key"])["Body"].read()]
    assert len(packs) == 1
    client.delete_object(Bucket=BUCKET, Key=packs[0])
    client.close()
    with mounted(tmp_path, url=url) as mount:
        fine.open()
        lost.open()
        for chunk in range(0, 16, 3):
            fine.read(chunk)
            with fails(errno.EIO):
                lost.read(chunk)
            line = mount.wait_log(rf"read lost\.raw at {chunk * ColdReader.CHUNK}\+")
            assert "EIO" in line
            assert packs[0].rpartition("/")[2] in line
        # The image can still be written, and what is written can be read.
        fd = os.open(mount.path / "lost.raw", os.O_RDWR)
        os.pwrite(fd, b"x" * ColdReader.CHUNK, 0)
        os.close(fd)
        with lost.path.open("rb", buffering=0) as file:
            assert file.read(ColdReader.CHUNK) == b"x" * ColdReader.CHUNK
        for image in images:
            image.close()
    found = novafs_json("fsck", url, "--state-dir", tmp_path / "operator", "--l2-url", "none", status=1)
    assert any(packs[0].rpartition("/")[2] in row["message"] and row["problem"] for row in found["findings"]), found
    assert {row["path"] for row in found["touched"]} == {"lost.raw"}, found
