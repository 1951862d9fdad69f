"""Prefetch on a real mount: buffered and O_DIRECT readers, what `stats` and `info` tell, and models that survive a kill."""

from __future__ import annotations

import json
import mmap
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import trio

from tests.support.engine import make_volume
from tests.support.mounted import Mount, running

CHUNK = 64 << 10
CHUNKS = 400


def told(mount: Mount, *command: str) -> Any:
    """What a command says with --json."""
    arguments = [sys.executable, "-m", "novafs.cli", *command, "--json", "--state-dir", str(mount.state_dir)]
    return json.loads(subprocess.run(arguments, check=True, capture_output=True, text=True).stdout)


def volume_with_an_image(directory: Path) -> str:
    url = trio.run(lambda: make_volume(f"file://{directory / 'store'}"))
    source = directory / "disk.raw"
    source.write_bytes(random.Random(5).randbytes(CHUNKS * CHUNK))
    subprocess.run([sys.executable, "-m", "novafs.cli", "import", url, str(source), "disk.raw"], check=True, capture_output=True)
    return url


def read_direct(path: Path, indexes: list[int]) -> None:
    expected = random.Random(5).randbytes(CHUNKS * CHUNK)
    buffer = mmap.mmap(-1, CHUNK)
    fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    try:
        for index in indexes:
            assert os.preadv(fd, [buffer], index * CHUNK) == CHUNK
            assert buffer[:] == expected[index * CHUNK : (index + 1) * CHUNK]
    finally:
        os.close(fd)


def prefetched(mount: Mount) -> dict[str, Any]:
    found: dict[str, Any] = told(mount, "stats", str(mount.path))["prefetch"]
    return found


def test_sequential_readers_find_their_chunks_there_buffered_and_direct(tmp_path: Path) -> None:
    url = volume_with_an_image(tmp_path)
    with running(url, tmp_path / "mnt", tmp_path / "a") as mount:
        read_direct(mount.path / "disk.raw", list(range(CHUNKS)))
        found = prefetched(mount)
        assert found["total"]["used"] + found["total"]["late"] > 0.8 * CHUNKS
        assert found["accuracy"] > 0.9
        shown = told(mount, "info", url, "disk.raw")["reading"]
        assert shown["pattern"] == "sequential"
        assert shown["used"] + shown["late"] > 0.8 * CHUNKS
        mount.unmount()
        assert mount.wait() == 0
    with running(url, tmp_path / "mnt", tmp_path / "b") as mount:
        assert (mount.path / "disk.raw").read_bytes() == (tmp_path / "disk.raw").read_bytes()
        assert prefetched(mount)["total"]["used"] + prefetched(mount)["total"]["late"] > 0.5 * CHUNKS
        mount.unmount()
        assert mount.wait() == 0


def test_a_second_mount_has_what_the_first_learned_even_where_one_between_was_killed(tmp_path: Path) -> None:
    url = volume_with_an_image(tmp_path)
    boot = random.Random(6).sample(range(CHUNKS), 150)
    with running(url, tmp_path / "mnt", tmp_path / "a") as mount:
        read_direct(mount.path / "disk.raw", boot)
        mount.unmount()
        assert mount.wait() == 0
    with running(url, tmp_path / "mnt", tmp_path / "b") as mount:
        read_direct(mount.path / "disk.raw", boot[:20])
        mount.kill()
    with running(url, tmp_path / "mnt", tmp_path / "c") as mount:
        read_direct(mount.path / "disk.raw", boot)
        found = prefetched(mount)
        assert found["sources"]["profile"]["used"] + found["sources"]["profile"]["late"] > 100
        assert found["accuracy"] >= 0.95
        mount.unmount()
        assert mount.wait() == 0
        assert "Traceback" not in mount.text
