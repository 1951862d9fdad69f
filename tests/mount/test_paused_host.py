"""A host that was paused while its lease went to another: it resumes, and can not damage the image.

Two real mounts of one volume on Ceph, each with its own state directory and L1. Host A writes and fsyncs and is stopped
(SIGSTOP), idle or in the middle of a commit. Its lease goes to B: an operator breaks it, or it expires under `takeover = "auto"`.
B writes and closes. A goes on (SIGCONT): what B wrote stays, A's writers get EIO, what A had is kept aside, and `novafs fsck`
tells how to get at it.
"""

from __future__ import annotations

import errno
import os
import re
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from tests.support.ceph import Ceph
from tests.support.cli_fixtures import Cli
from tests.support.engine import make_volume
from tests.support.fault_proxy import Hold, HttpFaultProxy
from tests.support.fixtures import BUCKET
from tests.support.mounted import Mount, mounted, running

pytestmark = [pytest.mark.fuse, pytest.mark.s3]

CHUNK = 64 << 10
BASE = b"0" * (4 * CHUNK)
RULES = {
    "broken": ("--set", "lease.ttl=1s"),
    # Long enough for a heartbeat on a machine that is busy, short enough to wait for its end.
    "expired": ("--set", "lease.ttl=4s", "--set", "lease.takeover=auto"),
}
HOLD_TIMEOUT_S = 30


@pytest.fixture
def proxy(ceph_rgw: Ceph) -> Iterator[HttpFaultProxy]:
    """Between host A and the store."""
    with HttpFaultProxy(ceph_rgw.port) as proxy:
        yield proxy


def fails(number: int) -> pytest.RaisesExc[OSError]:
    return pytest.raises(OSError, check=lambda error: error.errno == number)


def write(path: Path, offset: int, data: bytes) -> None:
    """Open, write, close (which commits)."""
    fd = os.open(path, os.O_RDWR)
    try:
        os.pwrite(fd, data, offset)
    finally:
        os.close(fd)


def patched(*changes: tuple[int, bytes]) -> bytes:
    """BASE with these bytes at these places."""
    content = bytearray(BASE)
    for offset, data in changes:
        content[offset : offset + len(data)] = data
    return bytes(content)


@pytest.mark.parametrize("committing", [False, True], ids=["idle", "in-a-commit"])
@pytest.mark.parametrize("way", ["broken", "expired"])
def test_a_host_that_was_paused_while_its_lease_went_to_another_cannot_damage_the_image(
    ceph_rgw: Ceph, s3_prefix: str, proxy: HttpFaultProxy, command: Cli, tmp_path: Path, way: str, committing: bool
) -> None:
    """semantics: S6, S7."""
    url = trio.run(lambda: make_volume(ceph_rgw.volume_url(BUCKET, s3_prefix)))
    rules = (*RULES[way], "--set", "writeback.interval=1h")
    with (
        running(ceph_rgw.volume_url(BUCKET, s3_prefix, endpoint=proxy.endpoint), tmp_path / "a", tmp_path / "state-a", *rules) as a,
        mounted(tmp_path / "b", *rules, url=url) as b,
    ):
        (a.path / "vm.raw").write_bytes(BASE)
        (a.path / "other.raw").write_bytes(b"not concerned")
        fd = os.open(a.path / "vm.raw", os.O_RDWR)
        os.pwrite(fd, b"A, fsynced", 100)
        os.fsync(fd)
        os.pwrite(fd, b"A, not fsynced", CHUNK + 100)
        late, closing = Hold(method="PUT", path="/images/"), None
        # No process is started while A is stopped: closing what it inherits of A's files would wait for A.
        if committing:
            proxy.script(late)
            closing = Closing(os.dup(fd))
            closing.start()
            assert late.reached.wait(HOLD_TIMEOUT_S), "no generation is on its way to the store"
        a.signal(signal.SIGSTOP)
        try:
            if way == "broken":
                said = command("lease", "break", url, "vm.raw", "--yes", "--state-dir", tmp_path / "operator", "--l2-url", "none")
                assert re.search(r"epoch \d+, held by .* is ended", said)
            write(b.path / "vm.raw", 2 * CHUNK, b"B was here")
            write(b.path / "vm.raw", 100, b"B again")
            due = patched((2 * CHUNK, b"B was here"), (100, b"B again"))
            assert (b.path / "vm.raw").read_bytes() == due
            late.release()  # what A had sent arrives now
        finally:
            a.signal(signal.SIGCONT)
        if way == "expired":  # nothing is acknowledged from the first moment on
            with fails(errno.EIO):
                os.fsync(fd)
        aside = Path(
            a.wait_log(r"vm\.raw: .* is kept in .*; 'novafs fsck' tells what to do with it").partition(" is kept in ")[2].split(";")[0]
        )
        for _ in range(2):
            with fails(errno.EIO):
                os.pwrite(fd, b"A goes on", 3 * CHUNK)
            with fails(errno.EIO):
                os.fsync(fd)
        with fails(errno.EIO):
            os.close(fd)
        for host in (a, b):
            assert (host.path / "vm.raw").read_bytes() == due
            assert (host.path / "other.raw").read_bytes() == b"not concerned"
        if closing is not None:
            assert closing.outcome() == errno.EIO
            proxy.assert_all_fired()

        tell_and_apply(command, url, a, aside)
        # A may write again, once it has opened the image as it is now; and B after it.
        write(a.path / "vm.raw", 3 * CHUNK, b"A once more")
        write(b.path / "vm.raw", 3 * CHUNK + 20, b"and B")
        due = patched((2 * CHUNK, b"B was here"), (100, b"B again"), (3 * CHUNK, b"A once more"), (3 * CHUNK + 20, b"and B"))
        assert (a.path / "vm.raw").read_bytes() == due
        a.unmount()
        assert a.wait() == 0, a.text
        assert "Traceback" not in a.text, a.text
    with mounted(tmp_path / "c", url=url) as c:
        assert (c.path / "vm.raw").read_bytes() == due


class Closing(threading.Thread):
    """A program of host A that closes a descriptor of the image, which commits; `error` is what it gets."""

    def __init__(self, fd: int) -> None:
        super().__init__(daemon=True)
        self._fd = fd
        self.error: OSError | None = None

    def run(self) -> None:
        try:
            os.close(self._fd)
        except OSError as error:
            self.error = error

    def outcome(self) -> int | None:
        """Its errno."""
        self.join(HOLD_TIMEOUT_S)
        assert not self.is_alive(), "the close hangs"
        return self.error.errno if self.error is not None else None


def tell_and_apply(command: Cli, url: str, a: Mount, aside: Path) -> None:
    """What the operator does with what was kept aside."""
    options = ("--state-dir", a.state_dir, "--l2-url", "none")
    assert aside.parent == a.state_dir / "aside"
    said = command("fsck", url, *options)
    assert str(aside) in said
    assert "--apply-aside" in said
    assert "no problems" in said
    command("fsck", url, "--apply-aside", aside, "--as", "rescued.raw", *options)
    found = (a.path / "rescued.raw").read_bytes()
    assert found == patched((100, b"A, fsynced"), (CHUNK + 100, b"A, not fsynced"))
