"""The table of docs/eviction.md about two tiers: what is read from L3, and written to L2, with and without scores.

    python -m tests.bench.tier_figures TRACE [--l1 0.01] [--l2 0.1] [--accesses 150000]

L1 is the policy itself; L2 is a model of what `novafs.cache.redis_scripts` do on one shard (clock, span, gain), with what
`novafs.cache.fill` lets
in. Needs the trace folder (NOVAFS_TRACES, or `../shared/traces` beside the tree). About a minute a row.
"""

from __future__ import annotations

import argparse
import heapq
from typing import Final, NamedTuple

from novafs.cache.fill import ONE_OFF, WORTH
from novafs.cache.redis import gain_of
from novafs.eviction.base import make_policy
from novafs.eviction_study import WORK_EVERY, Stream, stream_of
from novafs.traces import open_trace
from tests.support.traces import REASON, traces_folder

SIZE: Final = 65536
BATCH: Final = 16


class Row(NamedTuple):
    """label; policy of L1; scored: L2 goes by the model's word; one_off, worth: below which chances chunks do not enter L2."""

    label: str
    policy: str
    scored: bool
    one_off: float = 0.0
    worth: float = 0.0


ROWS: Final = (
    Row("lru, L2 by recency", "lru", False),
    Row("learned, L2 by recency", "learned", False),
    Row("learned, L2 by score", "learned", True),
    Row("learned, L2 by score, no one-offs", "learned", True, ONE_OFF, WORTH),
)


class Shard:
    """L2: who is in, and by what score."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.clock = 0
        self.scores: dict[bytes, float] = {}
        self._heap: list[tuple[float, bytes]] = []

    def rate(self, key: bytes, gain: float) -> None:
        """Give a score to what is in."""
        while self._heap and self.scores.get(self._heap[0][1]) != self._heap[0][0]:
            heapq.heappop(self._heap)
        full = len(self.scores) >= self.capacity and self._heap
        self.clock += 1
        span = max(0.0, self.clock - self._heap[0][0]) if full else 0.0
        self.scores[key] = self.clock + gain * span
        heapq.heappush(self._heap, (self.scores[key], key))

    def put(self, key: bytes, gain: float) -> None:
        """Let in."""
        while key not in self.scores and len(self.scores) >= self.capacity:
            score, lowest = heapq.heappop(self._heap)
            if self.scores.get(lowest) == score:
                del self.scores[lowest]
        self.rate(key, gain)


def replay(stream: Stream, l1: int, l2: int, row: Row) -> tuple[float, float, int, int]:
    """Hit rates of L1 and L2, chunks read from L3, chunks written to L2."""
    policy = make_policy(row.policy)
    policy.set_capacity(l1 * SIZE)
    shard = Shard(l2)
    held: set[bytes] = set()
    touched: list[bytes] = []
    waiting: list[tuple[str, bytes]] = []
    counts = {"l1": 0, "l2": 0, "l3": 0, "writes": 0}

    def settle() -> None:
        for (what, key), chance in zip(waiting, policy.chances([key for _, key in waiting]), strict=True):
            gain = gain_of(chance) if row.scored else 0.0
            least = row.one_off if what == "l3" else row.worth
            if key in shard.scores:
                if what != "victim" or (row.scored and chance is not None):
                    shard.rate(key, gain)
            elif what != "l2" and (chance is None or chance >= least):
                counts["writes"] += 1
                shard.put(key, gain)
        waiting.clear()

    for number, place in enumerate(stream.places.tolist(), start=1):
        key = place.to_bytes(8, "little")
        if key in held:
            touched.append(key)
            counts["l1"] += 1
        else:
            if touched:
                policy.touch_many(touched)
                touched.clear()
            if len(held) >= l1:
                victims = policy.victims((len(held) - l1 + 1) * SIZE)
                held.difference_update(victims)
                waiting += (("victim", victim) for victim in victims)
            held.add(key)
            policy.insert(key, SIZE, place=place)
            found = "l2" if key in shard.scores else "l3"
            counts[found] += 1
            waiting.append((found, key))
            if len(waiting) >= BATCH:
                settle()
        if number % WORK_EVERY == 0:
            while policy.work():
                pass
    total = len(stream.places)
    return counts["l1"] / total, counts["l2"] / total, counts["l3"], counts["writes"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace")
    parser.add_argument("--l1", type=float, default=0.01, help="share of the trace's different chunks")
    parser.add_argument("--l2", type=float, default=0.1)
    parser.add_argument("--accesses", type=int, default=150_000)
    arguments = parser.parse_args()
    folder = traces_folder()
    if folder is None:
        raise SystemExit(REASON)
    stream = stream_of(open_trace(folder / f"{arguments.trace}.npz"))
    stream = Stream(stream.name, stream.places[: arguments.accesses], stream.seconds[: arguments.accesses], stream.chunk_size)
    l1, l2 = stream.capacity(arguments.l1), stream.capacity(arguments.l2)
    print("| | L1 hits | L2 hits | read from L3 | against lru | written to L2 |")
    print("|---|---|---|---|---|---|")
    base = 0
    for row in ROWS:
        first, second, fetched, written = replay(stream, l1, l2, row)
        base = base or fetched
        print(f"| {row.label} | {first:.4f} | {second:.4f} | {fetched} | {fetched / base - 1:+.2%} | {written} |", flush=True)


if __name__ == "__main__":
    main()
