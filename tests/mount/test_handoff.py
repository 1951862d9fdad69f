"""`novafs handoff` between two mounts: the second has the hot chunks, and the right to write is free."""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

import pytest

from novafs.control import call
from novafs.statedir import CONTROL_SOCKET
from tests.support.cli import novafs, novafs_json
from tests.support.mounted import Mount, mounted

pytestmark = pytest.mark.fuse

CONTENT = random.Random(8).randbytes(6 << 20)


def stats(mount: Mount) -> Any:
    return call(mount.state_dir / CONTROL_SOCKET, "stats")


def test_an_image_is_given_to_another_mount_with_what_is_hot(tmp_path: Path) -> None:
    with mounted(tmp_path / "a") as one, mounted(tmp_path / "b", url=one.url) as other:
        options = ("--state-dir", one.state_dir, "--l2-url", "none")
        with (one.path / "disk").open("w+b") as file:
            file.write(CONTENT)
            file.flush()
            file.seek(0)
            assert file.read() == CONTENT
            target = stats(other)["volume"]["host_id"]
            said = novafs("handoff", one.url, "disk", "--to", "nowhere", "--timeout", "1s", *options, status=1)
            assert said == ""
            done = novafs_json("handoff", one.url, "disk", "--to", target, *options)
            assert done["to"] == target
            assert done["hot_chunks"] > 0
        deadline_s = time.monotonic() + 60
        while stats(other)["handoffs"]["chunks"] < done["hot_chunks"]:
            assert time.monotonic() < deadline_s, stats(other)["handoffs"]
        before = stats(other)["cache"]["l3_traffic"]["hits"]
        with (other.path / "disk").open("r+b") as file:
            assert file.read() == CONTENT
            if done["hot_chunks"] == len(CONTENT) >> 16:
                assert stats(other)["cache"]["l3_traffic"]["hits"] == before
            file.seek(0)
            file.write(b"taken over")
        assert stats(other)["handoffs"]["taken"] == 1
