"""Loop devices, file systems on them, and files of a fixed size as disks: what a host does with an image. Needs root.

Nothing stays behind, however a test ends: file systems are unmounted (lazily where they hang) and devices detached. No call waits
for a device that hangs: a tool that does not end in time is left to the kernel, and the test fails.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from novafs.mounttable import mount_at

TOOL_TIMEOUT_S = 60
SBIN = {**os.environ, "PATH": f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"}


def tool(*command: object, statuses: tuple[int, ...] = (0,)) -> str:
    """Run a tool of the system; what it printed. Fails where its exit status is another, and where it hangs."""
    words = [str(word) for word in command]
    process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=SBIN)
    try:
        out, _ = process.communicate(timeout=TOOL_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()  # and no wait: one that hangs in the kernel does not end by it
        pytest.fail(f"{' '.join(words)} did not end within {TOOL_TIMEOUT_S} s")
    assert process.returncode in statuses, f"{' '.join(words)} ended with status {process.returncode}:\n{out}"
    return out


def try_tool(*command: object) -> bool:
    """The same for cleaning up: whether it succeeded."""
    process = subprocess.Popen(
        [str(word) for word in command], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=SBIN
    )
    with contextlib.suppress(subprocess.TimeoutExpired):
        return process.wait(TOOL_TIMEOUT_S) == 0
    process.kill()
    return False


def why_no_loop() -> str:
    """Why there can be no loop device here; "" where there can."""
    if os.geteuid() != 0:
        return "a loop device needs root"
    return "" if Path("/dev/loop-control").exists() else "no /dev/loop-control (modprobe loop; in a container: --privileged)"


@contextlib.contextmanager
def loop_device(file: Path) -> Iterator[Path]:
    """`file` as a block device, past the page cache where that works. Detached at the end."""
    try:
        name = tool("losetup", "--find", "--show", "--direct-io=on", file).strip()
    except AssertionError:
        name = tool("losetup", "--find", "--show", file).strip()
    try:
        yield Path(name)
    finally:
        assert try_tool("losetup", "-d", name), f"{name} can not be detached"


@contextlib.contextmanager
def mounted_at(source: Path | str, place: Path, *options: str) -> Iterator[Path]:
    """`mount options source place`; unmounted at the end, lazily where that is needed (its device may be gone)."""
    place.mkdir(exist_ok=True)
    tool("mount", *options, source, place)
    try:
        yield place
    finally:
        if not try_tool("umount", place):
            try_tool("umount", "-l", place)
        assert mount_at(place) is None, f"{place} is still mounted"
