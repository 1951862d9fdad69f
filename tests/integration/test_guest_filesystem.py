"""A guest's file system on an image survives kill -9 of the daemon: ext4 on a loop device on the mounted image.

A program in the guest's file system makes records (`tests.support.record_program`), each of which it acknowledges on its standard
output once the fsyncs that it asked for have returned. In the middle of that the daemon is killed; the device then gives I/O
errors, as a disk does that is pulled out. After the next mount the journal of ext4 is replayed, `e2fsck -fn` finds nothing, and
every acknowledged record is there.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trio

from tests.support import record_program
from tests.support.ceph import Ceph
from tests.support.engine import make_volume
from tests.support.loops import loop_device, mounted_at, tool, why_no_loop
from tests.support.mounted import UNMEASURED, running
from tests.support.redis_servers import RedisServer

pytestmark = [
    pytest.mark.fuse,
    pytest.mark.redis,
    pytest.mark.s3,
    pytest.mark.slow,
    pytest.mark.skipif(bool(why_no_loop()), reason=why_no_loop()),
]

ROUNDS = 4
RECORDS_MIN = 12
"""Acknowledged before a kill."""
ANSWER_TIMEOUT_S = 60
IMAGE_BYTES = 48 << 20


class Guest:
    """The program, and what it has acknowledged so far."""

    def __init__(self, place: Path, first: int) -> None:
        self.acknowledged: list[tuple[str, int]] = []
        self._told = threading.Condition()
        self._ended = False
        environ = {name: value for name, value in os.environ.items() if name not in UNMEASURED}
        command = [sys.executable, "-I", record_program.__file__, str(place), str(first)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environ
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as stream:
            for line in stream:
                with self._told:
                    self.acknowledged.append(tuple(json.loads(line)))
                    self._told.notify_all()
        with self._told:
            self._ended = True
            self._told.notify_all()

    def wait(self, number: int) -> None:
        """Until it has acknowledged so many."""
        with self._told:
            assert self._told.wait_for(lambda: len(self.acknowledged) >= number or self._ended, ANSWER_TIMEOUT_S), "the guest hangs"
        assert len(self.acknowledged) >= number, self.end()

    def end(self) -> str:
        """Wait for its end, which an I/O error is to bring; what it said."""
        try:
            self.process.wait(ANSWER_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            pytest.fail("the guest's program hangs although its disk is gone")
        self._reader.join(ANSWER_TIMEOUT_S)
        assert self.process.stderr is not None
        with self.process.stderr as stream:
            return stream.read()


@contextmanager
def disk(image: Path, place: Path, *options: str) -> Iterator[Path]:
    """The ext4 in an image, mounted."""
    with loop_device(image) as device, mounted_at(device, place, "-t", "ext4", *options):
        yield place


@pytest.mark.parametrize("durability", ["journal", "store"])
def test_ext4_on_an_image_keeps_every_fsynced_record_when_the_daemon_is_killed(
    s3_url: str, ceph_rgw: Ceph, redis_server: RedisServer, tmp_path: Path, durability: str
) -> None:
    """semantics: S2, S3."""
    trio.run(lambda: make_volume(s3_url))
    rng = random.Random(1)
    acknowledged: list[tuple[str, int]] = []
    rules = ("--durability", durability, "--set", "writeback.interval=300ms")
    for number in range(ROUNDS if durability == "journal" else 2):
        with running(s3_url, tmp_path / "mnt", tmp_path / "state", *rules, l2=redis_server.url, environ=UNMEASURED) as mount:
            image = mount.path / "guest.raw"
            if number == 0:
                with image.open("wb") as file:
                    file.truncate(IMAGE_BYTES)
                tool("mke2fs", "-q", "-t", "ext4", "-b", "4096", "-J", "size=4", image)
            else:
                check_guest(image, tmp_path / "guest", acknowledged, by_kernel=number % 2 == 0)
            first = acknowledged[-1][1] + 99 if acknowledged else 0
            guest = None
            try:
                with disk(image, tmp_path / "guest"):
                    guest = Guest(tmp_path / "guest", first)
                    guest.wait(RECORDS_MIN + rng.randrange(40))
                    mount.kill()
                    assert "Error" in guest.end()
            finally:
                if guest is not None and guest.process.poll() is None:
                    guest.process.kill()
            acknowledged += guest.acknowledged
    with running(s3_url, tmp_path / "mnt", tmp_path / "state", *rules, l2=redis_server.url) as mount:
        check_guest(mount.path / "guest.raw", tmp_path / "guest", acknowledged, by_kernel=True)
        mount.unmount()
        assert mount.wait() == 0, mount.text


def check_guest(image: Path, place: Path, acknowledged: list[tuple[str, int]], *, by_kernel: bool) -> None:
    """Replay the journal of ext4, by the kernel or by e2fsck; then e2fsck finds nothing, and the records are there."""
    if by_kernel:
        with disk(image, place):
            pass
    else:
        assert "recovering journal" in tool("e2fsck", "-p", "-E", "journal_only", image)
    tool("e2fsck", "-fn", image)
    with disk(image, place, "-o", "ro"):
        assert record_program.missing(place, acknowledged) == []
