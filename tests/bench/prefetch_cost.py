"""What prefetch costs: CPU time of the engine per access it is shown, by kind of load.

    python -m tests.bench.prefetch_cost [--accesses 30000]

Process time of one thread, the least of three runs; `observe`, `take`, `arrived` and `evicted` together, without the cache.
"""

from __future__ import annotations

import argparse
import random
import time
from collections import OrderedDict
from collections.abc import Iterable

from novafs.prefetch.account import Settings
from novafs.prefetch.engine import PrefetchEngine
from tests.support.accesses import access

RUNS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--accesses", type=int, default=30_000)
    count = parser.parse_args().accesses
    numbers = random.Random(3)
    far = [numbers.randrange(200_000) for _ in range(count)]
    near = [numbers.randrange(3000) for _ in range(count)]
    popular = [min(19_999, int(numbers.paretovariate(0.9))) * 7919 % 20_000 for _ in range(count)]
    order = numbers.sample(range(100_000), 5000)
    print("| accesses | µs each | candidates judged each |")
    print("|---|---|---|")
    for name, indexes, capacity, latency_s in (
        ("one sequential stream, store at once", range(count), 4096, 0.0),
        ("one sequential stream, store at 30 ms", range(count), 4096, 0.03),
        ("at random over 50 times the cache", far, 4096, 0.0),
        ("at random, all in the cache", near, 4096, 0.0),
        ("by Pareto's law over 10 times the cache", popular, 2000, 0.0),
        ("one order of 5,000 chunks again and again", [order[at % 5000] for at in range(count)], 1000, 0.0),
    ):
        spent, judged = min(_spent(indexes, capacity, latency_s) for _ in range(RUNS))
        print(f"| {name} | {spent / count * 1e6:.0f} | {judged / count:.1f} |", flush=True)


def _spent(indexes: Iterable[int], capacity: int, latency_s: float) -> tuple[float, int]:
    engine = PrefetchEngine(capacity_chunks=capacity, settings=Settings())
    engine.set_latency(latency_s)
    engine.opened(0)
    cached: OrderedDict[int, None] = OrderedDict()
    spent = 0.0
    for number, index in enumerate(indexes):
        seen = access(index, time_s=number * 0.0005, hit=index in cached)
        victims = _insert(cached, [index], capacity)
        began = time.process_time()
        engine.observe(seen)
        engine.evicted(victims)
        fetches = engine.take(64) if engine.waiting else []
        spent += time.process_time() - began
        victims = _insert(cached, [fetch.place for fetch in fetches], capacity)
        began = time.process_time()
        for fetch in fetches:
            engine.arrived(fetch.place, fetch.place)
        engine.evicted(victims)
        spent += time.process_time() - began
    return spent, engine.statistics().candidates


def _insert(cached: OrderedDict[int, None], keys: list[int], capacity: int) -> list[int]:
    for key in keys:
        cached[key] = None
        cached.move_to_end(key)
    return [cached.popitem(last=False)[0] for _ in range(len(cached) - capacity)]


if __name__ == "__main__":
    main()
