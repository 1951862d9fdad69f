"""Which ratios are wanted of what was measured, and how large each is to be."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from tests.bench.peers.results import Measured, Round

MEMORY_FACTOR = 1.15
MEMORY_BYTES = 150e6
POLICY_SHARE_MAX = 0.05


@dataclass(frozen=True, slots=True)
class Row:
    """One wanted ratio. ours, theirs: names of figures in each round of the scenario; unit: of both.

    The ratio says how much better ours is: of seconds theirs to ours, of rates ours to theirs. Where at_most is set it is ours to theirs,
    of what should be small.
    """

    work: str
    scenario: str
    beside: str
    unit: str
    goal: float
    theirs: str
    ours: str = "novafs"
    at_most: bool = False

    def ratio(self, one: Round) -> float:
        """Of one round."""
        ours, theirs = one[self.ours], one[self.theirs]
        return theirs / ours if self.unit == "s" and not self.at_most else ours / theirs


class Found(NamedTuple):
    """A ratio's median, least and most over the rounds, and the medians of both figures."""

    median: float
    least: float
    most: float
    ours: float
    theirs: float
    rounds: int

    def score(self, row: Row) -> tuple[float, float, float]:
        """(least, median, most) as shares of the goal: 1 is what is wanted, and more is better."""
        if row.at_most:
            return row.goal / self.most, row.goal / self.median, row.goal / self.least
        return self.least / row.goal, self.median / row.goal, self.most / row.goal


RANDOM = "4 KiB random O_DIRECT reads from L1"
ROWS = (
    Row(f"{RANDOM}, depth 1", "random-1", "null file system", "IOPS", 0.8, "null"),
    Row(f"{RANDOM}, depth 1", "random-1", "JuiceFS", "IOPS", 2, "juicefs"),
    Row(f"{RANDOM}, depth 16", "random-16", "null file system", "IOPS", 0.7, "null"),
    Row(f"{RANDOM}, depth 16", "random-16", "JuiceFS", "IOPS", 3, "juicefs"),
    Row(f"{RANDOM}, depth 1, holes among them", "image-1", "null file system", "IOPS", 0.8, "null"),
    Row(f"{RANDOM}, depth 1, holes among them", "image-1", "JuiceFS", "IOPS", 2, "juicefs"),
    Row(f"{RANDOM}, depth 16, holes among them", "image-16", "null file system", "IOPS", 0.7, "null"),
    Row(f"{RANDOM}, depth 16, holes among them", "image-16", "JuiceFS", "IOPS", 3, "juicefs"),
    Row("sequential 1 MiB O_DIRECT reads from L1", "sequential", "JuiceFS", "B/s", 1.5, "juicefs"),
    Row("sequential through the page cache, from L1", "page-cache", "JuiceFS", "B/s", 1.5, "juicefs"),
    Row("the same, read again", "page-cache", "JuiceFS, read again", "B/s", 0.9, "juicefs again", "novafs again"),
    Row("boot trace, L1 warm", "boot-warm", "JuiceFS warm", "s", 2, "juicefs"),
    Row("boot trace, nothing cached, another clone's boot learned", "boot-learned", "JuiceFS cold", "s", 3, "juicefs"),
    Row("the same", "boot-learned", "itself, warm", "s", 1.5, "novafs again", at_most=True),
    Row("boot trace, nothing cached, nothing learned", "boot-unlearned", "JuiceFS cold", "s", 1, "juicefs"),
    Row("the same, bytes fetched", "boot-unlearned", "JuiceFS cold", "B", 0.5, "juicefs bytes", "novafs bytes", at_most=True),
    Row("whole image, nothing cached", "whole", "JuiceFS", "s", 2, "juicefs"),
    Row("import", "import", "JuiceFS, copying it in", "s", 1, "juicefs"),
    Row("import, without the command's start", "import", "SHA-256 and Zstd on two cores", "s", 0.8, "bound", "novafs import"),
    Row("the same into a local directory", "import", "SHA-256 and Zstd on two cores", "s", 0.8, "bound", "local import"),
    Row("4 KiB random writes, each fsynced", "fsync", "host's file", "IOPS", 0.5, "host"),
    Row("4 KiB random writes, each fsynced", "fsync", "JuiceFS `--writeback`", "IOPS", 1.5, "writeback"),
    Row("4 KiB random writes, each fsynced", "fsync", "JuiceFS", "IOPS", 10, "juicefs"),
    Row("ten guests on ten clones: bytes from the store", "clones", "one guest", "B", 1.1, "one l3 bytes", "ten l3 bytes", at_most=True),
    Row("ten guests on ten clones: chunks into L1", "clones", "one guest", "chunks", 1.1, "one l1 chunks", "ten l1 chunks", at_most=True),
    Row(
        "mixed load on an L1 of 256 MiB: memory",
        "mixed",
        "its own, a sixth of the time in",
        "B",
        1.05,
        "memory 2",
        "memory 6",
        at_most=True,
    ),
)


def has(row: Row, results: Mapping[str, Measured]) -> bool:
    """Whether its figures were measured: a result may be older than a row."""
    return row.scenario in results and all({row.ours, row.theirs} <= one.keys() for one in results[row.scenario].rounds)


def found(row: Row, measured: Measured) -> Found:
    """What the rounds of its scenario say."""
    ratios = [row.ratio(one) for one in measured.rounds]
    return Found(
        statistics.median(ratios),
        min(ratios),
        max(ratios),
        statistics.median(one[row.ours] for one in measured.rounds),
        statistics.median(one[row.theirs] for one in measured.rounds),
        len(ratios),
    )


def holds(row: Row, value: float) -> bool:
    """Whether a ratio is what is wanted."""
    return value <= row.goal if row.at_most else value >= row.goal


class Taken(NamedTuple):
    """The worst of a scenario's daemons: peak of memory, what it may be (bytes), and the share of CPU time for learning and prediction."""

    peak_bytes: float
    bound_bytes: float
    policy_share: float


def taken(daemons: Iterable[Mapping[str, float]]) -> Taken | None:
    """Of these daemons; None where there was none."""
    each: Sequence[Mapping[str, float]] = list(daemons)
    if not each:
        return None
    worst = max(each, key=lambda one: one["peak_bytes"] / _bound(one))
    share = max(one["policy_cpu_s"] / one["process_cpu_s"] for one in each)
    return Taken(worst["peak_bytes"], _bound(worst), share)


def _bound(one: Mapping[str, float]) -> float:
    return one["l1_bytes"] * MEMORY_FACTOR + MEMORY_BYTES
