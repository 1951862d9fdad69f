"""A running machine goes from one host to another: two mounts with a memory, a journal and a state directory each, one Redis, one Ceph that
is 20 ms away; a real guest that writes records, and real emulators. None of what the guest was told to be safe is lost or wrong after.
"""

from __future__ import annotations

import os
import secrets
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import trio

from novafs.control import call
from novafs.statedir import CONTROL_SOCKET
from tests.bench.relay import relay
from tests.support.ceph import Ceph
from tests.support.cli import novafs
from tests.support.engine import make_volume
from tests.support.fixtures import BUCKET
from tests.support.guest import GuestImage, guest_image
from tests.support.mounted import Mount, running
from tests.support.record_guest import RecordGuest, missing_lines, record_guest, wrong_records
from tests.support.redis_servers import RedisServer

pytestmark = [pytest.mark.fuse, pytest.mark.redis, pytest.mark.s3, pytest.mark.qemu, pytest.mark.slow]

SOME = 20
"""So many records are written before the next thing happens."""


@dataclass
class Place:
    """Two hosts with one volume, a guest to run on them, and a directory in the volume, and one of this machine's, for each test."""

    one: Mount
    other: Mount
    guest: GuestImage
    name: str
    directory: Path
    format: str = "raw"
    """Of the file of the disk with the records."""

    def start(self, mount: Mount, *, memory: str = "memory", incoming: str = "", options: str = "") -> RecordGuest:
        """The guest on a mount's disks: new, or with a state that comes."""
        disks, directory = [mount.path / self.name / "raw", mount.path / self.name / "fs"], self.directory
        return RecordGuest(
            self.guest,
            disks,
            memory=directory / memory,
            workdir=directory / "guests",
            incoming=incoming,
            options=options,
            first_format=self.format,
        )

    def make_disks(self) -> None:
        disks = self.one.path / self.name
        disks.mkdir()
        subprocess.run(["qemu-img", "create", "-q", "-f", self.format, str(disks / "raw"), "64M"], check=True)
        path = {**os.environ, "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"}
        subprocess.run(["mke2fs", "-q", "-F", "-t", "ext4", str(disks / "fs"), "32M"], check=True, capture_output=True, env=path)

    def check(self, acknowledged: int, logged: int) -> None:
        """Nobody has the disks open any more: what the store has."""
        deadline_s = time.monotonic() + 60
        while any(call(mount.state_dir / CONTROL_SOCKET, "stats")["leases"]["held"] for mount in (self.one, self.other)):
            assert time.monotonic() < deadline_s, "the disks are not given back"
            time.sleep(0.02)
        for name in ("raw", "fs"):
            options = ("--l2-url", "none", "--state-dir", self.directory / "export-state")
            novafs("export", self.one.url, f"{self.name}/{name}", self.directory / name, *options)
        if self.format != "raw":
            # 3: clusters that nothing refers to, as an emulator leaves them that is killed while it writes.
            assert subprocess.run(["qemu-img", "check", "-q", str(self.directory / "raw")], check=False).returncode in (0, 3)
            (self.directory / "raw").rename(self.directory / "formatted")
            subprocess.run(["qemu-img", "convert", "-O", "raw", self.directory / "formatted", self.directory / "raw"], check=True)
        assert wrong_records(self.directory / "raw", acknowledged) == []
        assert missing_lines(self.directory / "fs", logged) == []


@pytest.fixture(scope="module")
def hosts(ceph_rgw: Ceph, redis_plain: RedisServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Mount, Mount, GuestImage]]:
    directory = tmp_path_factory.mktemp("live")
    prefix = f"live-migration-{secrets.token_hex(4)}"
    trio.run(lambda: make_volume(ceph_rgw.volume_url(BUCKET, prefix)))
    with relay(ceph_rgw.port, delay_ms=20) as port:
        url = ceph_rgw.volume_url(BUCKET, prefix, endpoint=f"http://127.0.0.1:{port}")
        with (
            running(url, directory / "one", directory / "one-state", l2=redis_plain.url) as one,
            running(url, directory / "other", directory / "other-state", l2=redis_plain.url) as other,
        ):
            yield one, other, record_guest(guest_image(), directory / "program")
            for mount in (one, other):
                mount.unmount()
                assert mount.wait() == 0, mount.text
                assert "Traceback" not in mount.text, mount.text


@pytest.fixture
def place(hosts: tuple[Mount, Mount, GuestImage], tmp_path: Path) -> Place:
    one, other, guest = hosts
    return Place(one, other, guest, tmp_path.name, tmp_path)


def test_a_running_machine_moves_to_another_host_and_its_memory_comes_back_from_a_file(place: Place) -> None:
    """`migrate` to an emulator on the other host, which begins before the first has ended; then `migrate` into a file on that host's
    mount, and back from it on the first."""
    place.make_disks()
    socket = f"unix:{place.directory}/migration"
    with place.start(place.one) as first:
        first.wait_said("log", SOME)
        with place.start(place.other, incoming="defer") as second:
            second.receive(socket)
            place.other.wait_log("host .* gives up image .* chunks that are hot")
            first.wait_said("ack", first.said("ack") + SOME)
            first.migrate(socket)
            told = first.said("ack")
            second.wait_said("ack", told + SOME)  # while the first emulator still has its disks open
            first.kill()
            second.wait_said("log", told + 2 * SOME)
            saved = place.directory / "saved"
            second.suspend(f"exec:cat >{place.other.path}/{place.name}/memory && touch {saved}")
            second.wait_until(saved.exists, "the end of the file with its memory")
            acknowledged, logged = second.said("ack"), second.said("log")
            second.kill()
    with place.start(place.one, memory="other-memory", incoming=f"exec:cat {place.one.path}/{place.name}/memory") as third:
        third.wait_until(lambda: third.qmp("query-status")["status"] == "paused", "the end of the migration from the file")
        third.qmp("cont")
        third.wait_said("log", logged + 2 * SOME)
        acknowledged, logged = max(acknowledged, third.said("ack")), third.said("log")
        third.kill()
    place.check(acknowledged, logged)


def test_a_machine_moves_whose_emulators_have_its_disks_open_for_writing_all_the_time(place: Place) -> None:
    """`auto-read-only=off`: both have them open for writing from the start to the end, so the source sends each fsync to the store. One is
    a qcow2, whose tables the target reads when it begins, and again when the machine has come."""
    place.format = "qcow2"
    place.make_disks()
    socket = f"unix:{place.directory}/migration"
    options = ",auto-read-only=off"
    with place.start(place.one, options=options) as first:
        first.wait_said("ack", SOME)
        with place.start(place.other, incoming="defer", options=options) as second:
            second.receive(socket)
            place.other.wait_log(f"{place.name}/raw: host .* commits each fsync to the store")
            place.other.wait_log(f"{place.name}/fs: host .* commits each fsync to the store")
            first.wait_said("log", first.said("log") + SOME)
            first.migrate(socket)
            told, logged = first.said("ack"), first.said("log")
            first.kill()
            second.wait_said("log", logged + 2 * SOME)
            acknowledged, logged = max(told, second.said("ack")), second.said("log")
            second.kill()
    place.check(acknowledged, logged)
