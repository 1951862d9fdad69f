"""The file system that does nothing mounts, answers and leaves: what NovaFS is measured beside."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from novafs.mounttable import mount_at
from tests.bench.peers.nullfs import null_file

pytestmark = pytest.mark.fuse


def test_its_file_is_zeros_of_the_size_that_was_asked_for_and_it_is_gone_afterwards(tmp_path: Path) -> None:
    size = (3 << 20) + 5
    with null_file(tmp_path / "mnt", size=size) as path:
        assert path.stat().st_size == size
        assert path.read_bytes() == bytes(size)
        fd = os.open(path, os.O_RDONLY)
        try:
            assert os.pread(fd, 4096, size - 3) == bytes(3)
            assert os.pread(fd, 10, size + 1) == b""
        finally:
            os.close(fd)
        with pytest.raises(FileNotFoundError):
            (tmp_path / "mnt" / "other").stat()
    assert mount_at(tmp_path / "mnt") is None
