"""What can happen to a host: its disk fills up under the journal, or it dies with its journal. On the real mount, store on Ceph."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from tests.support.cli import novafs
from tests.support.engine import make_volume
from tests.support.history import ImageHistory
from tests.support.loops import mounted_at
from tests.support.loss import lose_host
from tests.support.mounted import UNMEASURED, mounted, running
from tests.support.writers import Crowd, Writer

pytestmark = [pytest.mark.fuse, pytest.mark.s3]

MIB = 1 << 20
QUIET = ("--set", "writeback.interval=1h")
"""Nothing is committed unless a test closes something."""


def fails(number: int) -> pytest.RaisesExc[OSError]:
    return pytest.raises(OSError, check=lambda error: error.errno == number)


@pytest.fixture
def url(s3_url: str) -> str:
    return trio.run(lambda: make_volume(s3_url))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for three segments of the journal."""
    if os.geteuid() != 0:
        pytest.skip("a small file system needs root")
    try:
        with mounted_at("tmpfs", tmp_path / "small", "-t", "tmpfs", "-o", "size=64m") as place:
            yield place
    except AssertionError as error:
        pytest.skip(f"no small file system can be mounted here: {error}")


def fill(path: Path) -> None:
    """Use up all the room there is."""
    with path.open("wb", buffering=0) as file:
        for size in (MIB, 4096, 1):
            try:
                while True:
                    file.write(bytes(size))
            except OSError as error:
                assert error.errno == errno.ENOSPC


def test_a_full_disk_under_the_journal_is_enospc_and_nothing_promised_is_lost(url: str, small_disk: Path, tmp_path: Path) -> None:
    """semantics: S2. What was fsynced stays; a new fsync, of this and of other images, is ENOSPC until there is room."""
    history, other = ImageHistory("a.raw"), ImageHistory("b.raw")
    state, ballast = small_disk / "state", small_disk / "ballast"
    with running(url, tmp_path / "mnt", state, *QUIET, environ=UNMEASURED) as mount:
        (mount.path / "b.raw").touch()
        writer = Writer(mount.path, history, random.Random(0), blocks_max=2048)
        second = Writer(mount.path, other, random.Random(0))
        writer.open()
        second.open()
        writer.write()
        writer.fsync()
        fill(ballast)
        with fails(errno.ENOSPC):  # the segment that is there takes some; another has no room
            for _ in range(500):
                writer.write()
                writer.fsync()
        mount.wait_log(r"fsync a\.raw: ENOSPC: journal .*no space left.*make room there")
        writer.read()
        with fails(errno.ENOSPC):
            writer.fsync()
        second.write()
        with fails(errno.ENOSPC):
            second.fsync()
        ballast.unlink()
        writer.write()
        writer.fsync()  # with all that was written while there was no room
        second.write()
        second.fsync()
        fill(ballast)
        with fails(errno.ENOSPC):
            for _ in range(500):
                writer.write()
                writer.fsync()
        mount.kill()
        for one in (writer, second):
            with pytest.raises(OSError):
                one.close()
    # Replay needs no room in the journal.
    with mounted(tmp_path, "--state-dir", str(state), url=url) as mount:
        history.check((mount.path / "a.raw").read_bytes())
        other.check((mount.path / "b.raw").read_bytes())
        assert "replayed" in mount.text


@pytest.mark.parametrize("durability", ["journal", "store"])
def test_after_the_loss_of_a_host_the_image_is_a_point_in_time(url: str, tmp_path: Path, durability: str) -> None:
    """semantics: S2, S3. Its newest generation: with `"store"` all that was fsynced is there, with `"journal"` all that was closed."""
    histories = [ImageHistory(f"{number}.raw") for number in range(2)]
    lost = 0
    for number in range(2):
        rules = ("--durability", durability, "--set", "writeback.interval=100ms")
        with running(url, tmp_path / "mnt", tmp_path / f"host{number}", *rules, environ=UNMEASURED) as mount:
            for history in histories:
                if number:
                    lost += history.check((mount.path / history.name).read_bytes(), host_lost=True)
            with Crowd() as crowd:
                seeds = random.Random(number)
                crowd.start(
                    [Writer(mount.path, h, random.Random(seeds.random()), durability=durability, told=crowd.tell) for h in histories]
                )
                crowd.wait("close", 4)
                crowd.wait("fsync", 20)
                crowd.gone = True
                mount.kill()
        lose_host(url, tmp_path / f"host{number}", [history.name for history in histories])
    with mounted(tmp_path, url=url) as mount:
        for history in histories:
            lost += history.check((mount.path / history.name).read_bytes(), host_lost=True)
    assert lost, "nothing was under way when the hosts died"
    assert "no problems" in novafs("fsck", url, "--state-dir", tmp_path / "operator", "--l2-url", "none")
