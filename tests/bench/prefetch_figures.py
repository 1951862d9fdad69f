"""The figures of docs/prefetch.md: accuracy, coverage, traffic, hit rates and stall times on the disk traces, and the boot traces.

    python -m tests.bench.prefetch_figures [--modes default,eager] [--traces NAME,NAME] [--made] [--no-latency] [--policy learned]

Needs the trace folder (NOVAFS_TRACES, or `../shared/traces` beside the tree). `--made` takes made-up traces (`tests.support.made_traces`)
instead, which the policies were not developed on. `--policy` names who evicts; the column "none" is LRU without prefetch all the same.
One process, about 10 minutes for everything.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from novafs.simulate import Result, Scenario, simulate
from novafs.traces import open_trace
from tests.support.made_traces import KINDS, make_trace
from tests.support.traces import traces_folder

DISKS = ("cloudphysics_sample", "arc_P2", "arc_P3", "msps_dtrs", "msr_hm1_prefix", "hplajw_1992")
STORE = Scenario(latency_s=0.03, bandwidth=250e6)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--modes", default="default,eager")
    parser.add_argument("--traces", default=",".join(DISKS))
    parser.add_argument("--policy", default="lru", help="who evicts")
    parser.add_argument("--size", type=float, default=0.1, help="of the cache, as a share of the trace's different chunks")
    parser.add_argument("--no-latency", action="store_true", help="leave out the runs with 30 ms and 250 MB/s")
    parser.add_argument("--no-boot", action="store_true", help="leave out the boot traces")
    parser.add_argument("--made", action="store_true", help="on made-up traces instead of those of the folder")
    arguments = parser.parse_args()
    if arguments.made:
        with tempfile.TemporaryDirectory() as made:
            names = list(KINDS) if arguments.traces == ",".join(DISKS) else arguments.traces.split(",")
            for name in names:
                make_trace(name, Path(made))
            for mode in arguments.modes.split(","):
                _disks(Path(made), Scenario(arguments.size, arguments.policy, mode), names, latency=not arguments.no_latency)
        return
    folder = traces_folder()
    if folder is None:
        raise SystemExit("no trace folder: set NOVAFS_TRACES")
    for mode in arguments.modes.split(","):
        _disks(folder, Scenario(arguments.size, arguments.policy, mode), arguments.traces.split(","), latency=not arguments.no_latency)
    if not arguments.no_boot:
        _boots(folder)


def _disks(folder: Path, scenario: Scenario, names: list[str], *, latency: bool) -> None:
    store = replace(scenario, latency_s=STORE.latency_s, bandwidth=STORE.bandwidth)
    print(f"\n{scenario.prefetch}: L1 = {scenario.policy} at {scenario.size:.0%}\n")
    print("| trace | hit, none | hit | accuracy | coverage | traffic | stall, none, s | removed at once | removed at 30 ms | ratio | µs |")
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    rows: list[tuple[Result, float | None]] = []
    for name in names:
        trace = open_trace(folder / f"{name}.npz")
        base = simulate(trace, replace(store, prefetch="off", policy="lru"))
        began = time.process_time()
        result = simulate(trace, scenario, base=base)
        spent = (time.process_time() - began) / result.accesses
        kept = None
        stalls = "| - | - | - | -"
        if latency:
            at_once = simulate(trace, replace(store, instant_prefetch=True), base=base)
            real = simulate(trace, store, base=base)
            removed = base.stall_s - at_once.stall_s
            kept = (base.stall_s - real.stall_s) / removed if removed > 0 else None
            stalls = f"| {base.stall_s:.0f} | {removed:.0f} | {base.stall_s - real.stall_s:.0f} | {_text(kept)}"
        rows.append((result, kept))
        print(
            f"| {name} | {result.base_hit_rate:.3f} | {result.hit_rate:.3f} | {_text(result.accuracy)} | {_text(result.coverage)} | "
            f"{_text(result.traffic)} {stalls} | {spent * 1e6:.0f} |",
            flush=True,
        )
    ratios = [kept for _, kept in rows if kept is not None]
    results = [result for result, _ in rows]
    print(
        f"| **mean** | {_mean([r.base_hit_rate for r in results]):.3f} | {_mean([r.hit_rate for r in results]):.3f} | "
        f"{_mean([r.accuracy for r in results]):.3f} | {_mean([r.coverage for r in results]):.3f} | "
        f"{_mean([r.traffic for r in results]):.3f} | | | | {_text(_mean(ratios) if ratios else None)} | |",
        flush=True,
    )


def _boots(folder: Path) -> None:
    print("\nBoot of a clone, learned from boot_debian_1, everything cold\n")
    print("| trace | accuracy | coverage | traffic | stall at 30 ms, s | without prefetch, s |")
    print("|---|---|---|---|---|---|")
    lesson = open_trace(folder / "boot_debian_1.csv.gz")
    for name in ("boot_debian_2", "boot_debian_3"):
        trace = open_trace(folder / f"{name}.csv.gz")
        result = simulate(trace, Scenario(size=1.0), train=[lesson])
        slow = simulate(trace, replace(STORE, size=1.0), train=[lesson])
        print(
            f"| {name} | {_text(result.accuracy)} | {_text(result.coverage)} | {_text(result.traffic)} | "
            f"{slow.stall_s:.2f} | {slow.base_stall_s:.2f} |",
            flush=True,
        )


def _text(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _mean(values: list[float | None] | list[float]) -> float:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else 0.0


if __name__ == "__main__":
    main()
