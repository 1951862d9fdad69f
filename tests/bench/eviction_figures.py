"""The figures of docs/eviction.md: share of the LRU-to-Belady gap that each policy closes, misses against LRU, and what it costs.

    python -m tests.bench.eviction_figures [--traces NAME,NAME] [--policies learned,...] [--sizes 0.01,0.05,0.1,0.2] [--first N]
    python -m tests.bench.eviction_figures --made         # generated traces instead of the recorded ones
    python -m tests.bench.eviction_figures --cost         # microseconds for each eviction and access at 160,000 chunks

The recorded traces need their folder (NOVAFS_TRACES, or `../shared/traces` beside the tree). One process; `learned` takes a
quarter of an hour for all of them, the others two minutes.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Iterator

import numpy as np

from novafs.eviction.base import make_policy
from novafs.eviction.learned import MODEL, LearnedPolicy
from novafs.eviction.learner import USABLE_MIN
from novafs.eviction_study import Outcome, Stream, compare, stream_of
from novafs.traces import open_trace
from tests.support.traces import REASON, traces_folder

DISKS = ("msr_hm1_prefix", "hplajw_1992", "cloudphysics_sample", "msps_dtrs", "arc_P3", "arc_P2")
SIZES = "0.01,0.05,0.1,0.2"
CHUNKS = 160_000
EVICTIONS = 40_000
BATCH = 100


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--traces", default=",".join(DISKS))
    parser.add_argument("--policies", default="learned")
    parser.add_argument("--sizes", default=SIZES)
    parser.add_argument("--first", type=int, default=0, help="only so many accesses of each trace")
    parser.add_argument("--made", action="store_true", help="generated traces")
    parser.add_argument("--cost", action="store_true", help="what evictions and accesses cost at 160,000 chunks")
    arguments = parser.parse_args()
    if arguments.cost:
        _cost(arguments.policies.split(","))
        return
    sizes = [float(size) for size in arguments.sizes.split(",")]
    _figures(
        made_streams() if arguments.made else recorded(arguments.traces.split(",")), arguments.policies.split(","), sizes, arguments.first
    )


def recorded(names: list[str]) -> Iterator[Stream]:
    folder = traces_folder()
    if folder is None:
        raise SystemExit(REASON)
    for name in names:
        yield stream_of(open_trace(folder / f"{name}.npz"))


def made_streams() -> Iterator[Stream]:
    """Four workloads that no constant was chosen on: a loop larger than the cache, Zipf with drift, scans over a hot set, and noise."""
    random = np.random.default_rng(11)
    count = 100_000
    ticks = np.arange(count) * 0.005
    yield Stream("loop", np.arange(count) % 4000, ticks, 65536)
    drift = (random.zipf(1.2, count) % 4000 + np.arange(count) // 5000 * 150) % 8000
    yield Stream("zipf_drift", drift.astype(np.int64), ticks, 65536)
    hot = random.integers(0, 300, count) * 13
    scan = 10_000 + np.arange(count)
    yield Stream("scans", np.where(np.arange(count) // 200 % 2 == 0, hot, scan), ticks, 65536)
    yield Stream("noise", random.integers(0, 5000, count), ticks, 65536)


def _figures(streams: Iterator[Stream], policies: list[str], sizes: list[float], first: int) -> None:
    print(
        "| trace | size | chunks | LRU | Belady | policy | hits | gap closed | misses against LRU | in charge | accuracy | µs an access |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|---|")
    closed: dict[tuple[str, float], list[float]] = defaultdict(list)
    worst: dict[str, float] = defaultdict(lambda: -1.0)
    for stream in streams:
        if first:
            stream = Stream(stream.name, stream.places[:first], stream.seconds[:first], stream.chunk_size)
        for size in sizes:
            for outcome in compare(stream, policies, [size]):
                _row(outcome)
                if outcome.gap_closed is not None:
                    closed[outcome.policy, size].append(outcome.gap_closed)
                worst[outcome.policy] = max(worst[outcome.policy], outcome.against_lru)
    for policy in policies:
        means = [float(np.mean(closed[policy, size])) for size in sizes if closed[policy, size]]
        each = ", ".join(f"{size:.0%}: {mean:.1%}" for size, mean in zip(sizes, means, strict=False))
        print(f"\n{policy}: gap closed {each}; mean {np.mean(means):.1%}; most misses against LRU {worst[policy]:+.2%}", flush=True)


def _row(outcome: Outcome) -> None:
    quality = outcome.quality
    gap = "-" if outcome.gap_closed is None else f"{outcome.gap_closed:.1%}"
    accuracy = "-" if quality is None or quality.accuracy is None else f"{quality.accuracy:.2f}"
    in_charge = "-" if quality is None else f"{quality.in_charge}, {quality.switches} changes"
    print(
        f"| {outcome.trace} | {outcome.size:.0%} | {outcome.capacity_chunks} | {1 - outcome.lru_misses / outcome.accesses:.4f} "
        f"| {1 - outcome.belady_misses / outcome.accesses:.4f} | {outcome.policy} | {outcome.hit_rate:.4f} | {gap} "
        f"| {outcome.against_lru:+.2%} | {in_charge} | {accuracy} | {1e6 * outcome.cpu_s / outcome.accesses:.1f} |",
        flush=True,
    )


def _cost(names_of: list[str]) -> None:
    """Processor time of the calls a tier makes, for a tier of 160,000 chunks whose model is in charge."""
    names = [number.to_bytes(8, "little") for number in range(2 * CHUNKS)]
    random = np.random.default_rng(1)
    print("| policy | µs an insert | µs an access (batches of 1,024) | µs an eviction | µs an insert when full | memory |")
    print("|---|---|---|---|---|---|")
    for name in names_of:
        policy = make_policy(name)
        policy.set_capacity(CHUNKS * 65536)
        began = time.process_time()
        for number in range(CHUNKS):
            policy.insert(names[number], 65536, place=number)
        insert_s = (time.process_time() - began) / CHUNKS
        popular = [names[number] for number in (random.zipf(1.1, 1_000_000) % CHUNKS).tolist()]
        began = time.process_time()
        for at in range(0, len(popular), 1024):
            policy.touch_many(popular[at : at + 1024])
        touch_s = (time.process_time() - began) / len(popular)
        if isinstance(policy, LearnedPolicy):
            _learn(policy, popular)
        evict_s = fill_s = 0.0
        gone = 0
        for number in range(CHUNKS, CHUNKS + EVICTIONS, BATCH):
            began = time.process_time()
            while gone < number + BATCH - CHUNKS:
                gone += len(policy.victims(65536))
            evicted = time.process_time()
            for each in range(number, number + BATCH):
                policy.insert(names[each], 65536, place=each)
            evict_s += evicted - began
            fill_s += time.process_time() - evicted
        quality = policy.quality()
        memory = "-" if quality is None else f"{quality.memory_bytes / 2**20:.0f} MiB"
        figures = f"{insert_s * 1e6:.2f} | {touch_s * 1e6:.2f} | {evict_s / gone * 1e6:.2f} | {fill_s / EVICTIONS * 1e6:.2f}"
        print(f"| {name} | {figures} | {memory} |", flush=True)


def _learn(policy: LearnedPolicy, popular: list[bytes]) -> None:
    """Bring the model into charge."""
    policy.victims(65536)
    for _ in range(50):
        for at in range(0, len(popular), 1024):
            policy.touch_many(popular[at : at + 1024])
        steps = 0
        began = time.process_time()
        while policy.work():
            steps += 1
        if policy.quality().in_charge == MODEL:
            step_s = (time.process_time() - began) / max(1, steps)
            print(f"(learned from more than {USABLE_MIN} examples in {steps} steps, {step_s * 1e3:.2f} ms each)")
            return


if __name__ == "__main__":
    main()
