"""An operator's host: a Debian guest with systemd in which the wheel, the units, the mount helper and an fstab line work.

One boot shows all of it, since an emulated boot takes half a minute: the guest runs `service_guest.sh` and says what it finds.
"""

from __future__ import annotations

import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.support.cli import novafs
from tests.support.guest import Guest, guest_image
from tests.support.guest_python import ROOT, build_wheel, compile_modules, dependencies_disk, run

pytestmark = [pytest.mark.qemu, pytest.mark.slow]

TIMEOUT_S = 800
"""Bounds a hang: it takes less than two minutes, on a busy machine a few."""

SCRIPT = Path(__file__).with_name("service_guest.sh")


class Report:
    """What the guest said. log, errors: the lines of the unit's journal, all and those of priority 3 and above."""

    def __init__(self, console: str) -> None:
        self.console = console
        self._said = re.findall(r"GUEST ([a-z0-9-]+)\b ?([^\r\n]*)", console)
        self.log, self.errors, self.tracebacks = (
            [line.strip() for line in re.findall(rf"^{word} ([^\r\n]*)", console, flags=re.MULTILINE)]
            for word in ("LOG", "ERROR", "TRACEBACK")
        )

    def __getitem__(self, name: str) -> str:
        found = [text.strip() for said, text in self._said if said == name]
        assert len(found) == 1, f"the guest said {len(found)} times {name!r}:\n{self.console[-8000:]}"
        return found[0]

    def logged(self, pattern: str) -> list[str]:
        """The lines of the log that match."""
        return [line for line in self.log if re.search(pattern, line)]


def boot(directory: Path) -> Report:
    """What the guest finds."""
    tree = directory / "payload"
    tree.mkdir()
    with ThreadPoolExecutor(max_workers=1) as beside:
        building = beside.submit(build_wheel, directory)
        (tree / "data.raw").write_bytes(bytes(range(256)) * 12_000)
        volume = f"file://{tree / 'volume'}"
        options = ("--state-dir", directory / "state", "--l2-url", "none")
        novafs("init", volume, *options)
        novafs("import", volume, tree / "data.raw", *options)
        for package in (ROOT / "novafs", ROOT / "mount/novafs_mount"):
            compile_modules(package, tree / "compiled" / package.name)
        wheel = building.result()
    wheel.rename(tree / wheel.name)
    packed = directory / "payload.raw"
    with packed.open("wb") as file:
        file.truncate(32 << 20)
    run("mke2fs", "-q", "-F", "-t", "ext4", "-d", tree, packed)
    image = guest_image()
    disk = directory / "disk.raw"
    shutil.copyfile(image.disk, disk)
    drives = [f"file={path},format=raw,if=virtio,readonly=on" for path in (dependencies_disk(), packed)]
    extra = [word for drive in drives for word in ("-drive", drive)]
    with Guest(image, disk, script=SCRIPT.read_text(), workdir=directory, cache="unsafe", memory="1G", cpus=2, extra=extra) as guest:
        guest.wait_for("GUEST end", timeout_s=TIMEOUT_S)
        return Report(guest.console)


@pytest.mark.timeout(2 * TIMEOUT_S)
def test_an_operators_host_from_the_wheel_to_an_fstab_line(tmp_path: Path) -> None:
    said = boot(tmp_path)

    # Installed: everything is in its place, and systemd has nothing to say against the units.
    installed = said["install-units"]
    for path in ("/usr/local/lib/systemd/system/novafs@.service", "/usr/sbin/mount.novafs", "/usr/local/share/man/man1/novafs.1"):
        assert f"installed {path}" in installed
    assert installed.endswith("systemd has read the units")
    assert said["verify"] == "status 0"
    runbook = (ROOT / "docs/operations.md").read_text()
    scores = re.search(r"`systemd-analyze security novafs@web.service` says ([\d.]+) .* which mount nothing, ([\d.]+) ", runbook)
    assert scores is not None
    assert said["security"].split() == [scores[1], scores[2], scores[2]]

    # `systemctl start` returns when the mount answers.
    assert said["start"] == "status 0 fuse.novafs web same"
    assert said["status"] == '"serving /images/web: 0 files open; everything stored"'
    assert int(said["capabilities"], 16).bit_count() == 3
    # What the package brings is used by default, and its server lives with what the unit allows.
    assert said["l2"] == "1 server"
    assert not said.logged("without L2")

    # What can change under the mount does, the rest is named.
    assert said["reload"] == "status 0"
    assert said.logged(r"^changed l1\.capacity; takes effect at the next mount: mount_options$")

    assert said["killed"] == "restarts 1 same"
    assert said.logged("is the mount of a daemon that has died")

    assert said["stop"] == "status 0 success, mounts 0, processes 0"
    assert said.logged(r"^/images/web: ended with status 0, everything is stored module=novafs_mount\.main$")

    # A mistake in the file stops the unit, once, with one line that says where and what.
    assert said["wrong-file"] == "status 1 main 2 failed restarts 0"
    assert "/etc/novafs/web.toml line 6: unknown key 'l1.capacty'; did you mean 'l1.capacity'?" in said.errors

    assert said["wrong-option"].startswith("status 1 mount.novafs: -o alow_other: unknown mount option; did you mean 'allow_other'?")
    assert said["automount-before"] == "autofs"
    assert re.fullmatch(r"written web +ro,nosuid,nodev,\S+ same", said["automount"]), said["automount"]
    assert said["read-only"] == ""
    # umount(8) has waited for the daemon.
    assert said["umount"] == "status 0 autofs, processes 0"
    assert said.tracebacks == []
