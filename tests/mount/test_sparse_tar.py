"""GNU tar --sparse of an image whose bytes are dirty, or lie in a patch."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.support.mounted import mounted


@pytest.mark.parametrize("durability", ["store", "journal"])
def test_tar_sparse_keeps_the_bytes(tmp_path: Path, durability: str) -> None:
    with mounted(tmp_path, "--durability", durability) as mount:
        path = mount.path / "a.raw"
        fd = os.open(path, os.O_CREAT | os.O_RDWR)
        os.ftruncate(fd, 1 << 20)
        os.close(fd)  # committed
        fd = os.open(path, os.O_RDWR)
        os.pwrite(fd, b"x" * 4096, 8192)
        os.fsync(fd)
        subprocess.run(["tar", "-cSf", tmp_path / "t.tar", "-C", mount.path, "a.raw"], check=True)
        out = subprocess.run(["tar", "-xOf", tmp_path / "t.tar", "a.raw"], check=True, stdout=subprocess.PIPE).stdout
        os.close(fd)
    assert out == bytes(8192) + b"x" * 4096 + bytes((1 << 20) - 12288)
