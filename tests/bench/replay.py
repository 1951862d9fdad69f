"""Replay a block trace's reads against a file with O_DIRECT; one line of JSON: seconds in all, in reads, and their latencies.

    python tests/bench/replay.py TRACE.csv FILE [--think SCALE]

TRACE has rows `t_us,op,offset,length`, op r, w or f. --think 1.0 keeps the recorded gaps between requests; 0, the default, leaves them out.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import sys
import time
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", type=Path)
    parser.add_argument("file", type=Path)
    parser.add_argument("--think", type=float, default=0.0)
    arguments = parser.parse_args()
    rows = [row.split(",") for row in arguments.trace.read_text().split()]
    view = memoryview(mmap.mmap(-1, 4 << 20))
    fd = os.open(arguments.file, os.O_RDONLY | os.O_DIRECT)
    latencies: list[float] = []
    total = 0
    before_us: int | None = None
    began_s = time.perf_counter()
    for time_us, op, offset, length in rows:
        if arguments.think and before_us is not None:
            time.sleep(max(0.0, (int(time_us) - before_us) / 1e6 * arguments.think))
        before_us = int(time_us)
        if op != "r":
            continue
        started_s = time.perf_counter()
        got = os.preadv(fd, [view[: int(length)]], int(offset))
        latencies.append(time.perf_counter() - started_s)
        if got != int(length):
            raise SystemExit(f"{arguments.file}: {got} bytes at {offset}, expected {length}")
        total += got
    wall_s = time.perf_counter() - began_s
    latencies.sort()
    quantiles = {
        name: round(latencies[min(len(latencies) - 1, int(len(latencies) * share))] * 1e3, 3)
        for name, share in (("p50_ms", 0.5), ("p95_ms", 0.95), ("p99_ms", 0.99), ("max_ms", 1.0))
    }
    figures = {"wall_s": round(wall_s, 3), "io_s": round(sum(latencies), 3), "reads": len(latencies), "MB": round(total / 1e6, 1)}
    sys.stdout.write(json.dumps(figures | quantiles) + "\n")


if __name__ == "__main__":
    main()
