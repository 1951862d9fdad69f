"""fio on one file, and what it says of its one job."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any


def fio(path: Path, *options: str, seconds: float) -> dict[str, Any]:
    """One job for so many seconds, with `psync` unless the options name another engine. The job as fio's JSON has it."""
    command = [
        "fio",
        "--name=job",
        f"--filename={path}",
        "--ioengine=psync",
        f"--runtime={seconds}",
        "--time_based",
        "--output-format=json",
    ]
    done = subprocess.run([*command, *options], capture_output=True, text=True, check=True)
    # Notes on a setting may stand before the document.
    job: dict[str, Any] = json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0]
    return job


def random_read_iops(path: Path, seconds: float, depth: int = 1) -> float:
    """4 KiB random O_DIRECT reads over the whole file, in another order each time: in fio's own, the same one, prefetch would learn it."""
    engine = ["--ioengine=libaio", f"--iodepth={depth}"] if depth > 1 else []
    job = fio(path, "--readonly", "--rw=randread", "--randrepeat=0", "--bs=4k", "--direct=1", *engine, seconds=seconds)
    return float(job["read"]["iops"])
