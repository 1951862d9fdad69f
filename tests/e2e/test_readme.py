"""What the documents tell a user to type works, and prints what they show. `tests.support.documents` says how a session is written."""

from __future__ import annotations

import grp
import os
import pwd
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from novafs.config import default_state_dir
from novafs.mounttable import NOVAFS_TYPE, parse_mountinfo
from tests.support.ceph import Ceph
from tests.support.documents import commands_of, matches, run_commands
from tests.support.fixtures import BUCKET, fresh_prefix
from tests.support.redis_servers import RedisServer

pytestmark = [pytest.mark.fuse, pytest.mark.redis, pytest.mark.s3, pytest.mark.slow]

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [path for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))) if commands_of(path)]
TIMEOUT_S = 600
"""Bounds a hang; a document's sessions take seconds."""


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[Path]:
    """An empty directory; what the sessions leave mounted below it, and their volumes' state elsewhere, is removed at the end."""
    yield tmp_path
    for line in parse_mountinfo(Path("/proc/self/mountinfo").read_text()):
        if line.fstype == NOVAFS_TYPE and Path(line.mountpoint).is_relative_to(tmp_path):
            subprocess.run([sys.executable, "-m", "novafs.cli", "umount", line.mountpoint], check=True, capture_output=True)
    for superblock in tmp_path.rglob("novafs.json"):
        shutil.rmtree(default_state_dir(f"file://{superblock.parent}", os.environ), ignore_errors=True)


@pytest.mark.parametrize("document", DOCUMENTS, ids=[path.stem for path in DOCUMENTS])
def test_every_command_of_the_document_works_and_prints_what_is_shown(
    document: Path, directory: Path, ceph_rgw: Ceph, redis_server: RedisServer, request: pytest.FixtureRequest
) -> None:
    commands = commands_of(document)
    environment = {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin:/sbin",
        "HOME": str(directory),
        "NOVAFS_CONFIG_DIR": str(directory / "etc"),
    }
    # The documents' own names for what every reader has elsewhere.
    replacements = {
        "s3://my-bucket/": f"s3://{BUCKET}/{fresh_prefix(request)}/",
        "http://s3.example.com:7480": ceph_rgw.endpoint,
        "redis://redis.example.com:6379/0": redis_server.url,
        "/etc/novafs": str(directory / "etc"),
        "/srv/images": str(directory / "srv"),
        "/var/lib/novafs/web": str(directory / "state"),
    }
    # The documents were written as root; a test may run as somebody else.
    owner = f"{pwd.getpwuid(os.geteuid()).pw_name} {grp.getgrgid(os.getegid()).gr_name}"
    outputs = run_commands(commands, directory, environment, replacements, timeout_s=TIMEOUT_S)
    for command, output in zip(commands, outputs, strict=True):
        expected = [line.replace("root root", owner) for line in command.expected]
        shown = "\n".join(expected)
        assert matches(expected, output), f"{document.name} line {command.line}: '$ {command.text}' shows\n{shown}\nand prints\n{output}"
