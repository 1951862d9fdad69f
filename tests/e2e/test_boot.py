"""The main job, from one end to the other: a guest's disk in a volume on a real S3 and a real Redis, booted from the mount."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.support.ceph import Ceph
from tests.support.cli import novafs, novafs_json
from tests.support.guest import Guest, GuestImage, guest_image
from tests.support.mounted import Mount, running
from tests.support.redis_servers import RedisServer

pytestmark = [pytest.mark.fuse, pytest.mark.redis, pytest.mark.s3, pytest.mark.qemu, pytest.mark.slow]

BOOT_TIMEOUT_S = 600
"""Bounds a hang: an emulated boot takes half a minute, on a busy machine a few."""

WRITE = """\
fail() { echo "GUEST failed: $*"; systemctl poweroff; exit 1; }
mkdir /srv/data && cd /srv/data || fail mkdir
for number in 1 2 3 4 5 6 7 8; do
    dd if=/dev/urandom of=fsynced-$number bs=4k count=$((number * number)) conv=fsync status=none || fail fsync
done
dd if=/dev/urandom of=direct bs=64k count=16 oflag=direct conv=fsync status=none || fail direct
dd if=/dev/urandom of=punched bs=4k count=64 conv=fsync status=none || fail punched
dd if=fsynced-8 of=punched bs=4k count=3 seek=17 conv=notrunc,fsync status=none || fail overwrite
rm fsynced-3
sha256sum * >../sums && sync ../sums . || fail sums
echo "GUEST wrote $(sha256sum <../sums)"
systemctl poweroff
"""

READ = """\
cd /srv/data && sha256sum --quiet --check ../sums && echo "GUEST read $(sha256sum <../sums)" || echo "GUEST failed: sums"
systemctl poweroff
"""


@pytest.fixture(scope="session")
def guest() -> GuestImage:
    """The guest's root file system; the first run on a machine builds it."""
    return guest_image()


def boot(guest: GuestImage, disk: Path, script: str, marker: str, workdir: Path) -> str:
    """Boots `disk` until the guest says `marker` and has powered off; returns what it said after the marker."""
    with Guest(guest, disk, script=script, workdir=workdir, cache="none") as running_guest:
        said = running_guest.wait_for("GUEST ", timeout_s=BOOT_TIMEOUT_S)
        assert said.startswith(marker), running_guest.console
        running_guest.wait_poweroff(timeout_s=BOOT_TIMEOUT_S)
    return said.removeprefix(marker).strip()


def same(first: Path, second: Path) -> None:
    """qemu-img's own comparison of two raw images."""
    done = subprocess.run(
        ["qemu-img", "compare", "-f", "raw", "-F", "raw", str(first), str(second)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def served(mount: Mount, tier: str) -> int:
    """How many chunks the tier has served to this mount."""
    hits: int = novafs_json("stats", mount.path)["cache"][f"{tier}_traffic"]["hits"]
    return hits


def unmount(mount: Mount) -> None:
    mount.unmount()
    assert mount.wait() == 0, mount.text
    assert "Traceback" not in mount.text, mount.text


def test_a_guest_boots_from_the_mount_and_finds_what_it_wrote_after_a_remount(
    guest: GuestImage, ceph_rgw: Ceph, s3_url: str, redis_server: RedisServer, tmp_path: Path
) -> None:
    options = ("--l2-url", redis_server.url, "--state-dir", tmp_path / "import-state")
    novafs("init", s3_url, *options)
    imported = novafs_json("import", s3_url, guest.disk, "guest.raw", *options)
    assert imported["size"] == guest.disk.stat().st_size
    assert 0 < imported["stored_bytes"] < imported["allocated_bytes"]

    with running(s3_url, tmp_path / "mnt", tmp_path / "state", l2=redis_server.url) as mount:
        disk = mount.path / "guest.raw"
        same(guest.disk, disk)
        assert served(mount, "l3") > 1000  # the comparison read every chunk of the image
        written = boot(guest, disk, WRITE, "GUEST wrote", tmp_path / "first")
        # What the guest wrote is in the mount, and the export, another process, reads the same from the store.
        exported = tmp_path / "exported.raw"
        novafs("export", s3_url, "guest.raw", exported, *options)
        same(exported, disk)
        unmount(mount)
    changed = subprocess.run(["cmp", "-s", str(exported), str(guest.disk)], check=False).returncode
    assert changed == 1, "the guest changed nothing: it did not run on this disk"
    fsck = ["e2fsck", "-fn", str(exported)]
    checked = subprocess.run(
        fsck, capture_output=True, text=True, check=False, env={**os.environ, "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"}
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr
    exported.unlink()

    # A mount that has never seen the volume: its own state, nothing in its memory.
    with running(s3_url, tmp_path / "mnt", tmp_path / "second-state", l2=redis_server.url) as mount:
        assert boot(guest, mount.path / "guest.raw", READ, "GUEST read", tmp_path / "second") == written
        assert served(mount, "l2") > 100  # Redis still has what the first mount read
        unmount(mount)
