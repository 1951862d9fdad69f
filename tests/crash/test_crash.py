"""A power cut at every sync and every store request of random workloads; see `tests.crash.harness` for what is checked.

`NOVAFS_TEST_TORTURE=N` runs N times as many workloads, from a seed that is printed; `NOVAFS_TEST_CRASH_SEED=S` runs one
workload again, `NOVAFS_TEST_CRASH_CUT=P` of it one cut alone.
"""

from __future__ import annotations

import os
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.crash.harness import Trace

TORTURE = float(os.environ.get("NOVAFS_TEST_TORTURE", "1"))
SEED = os.environ.get("NOVAFS_TEST_CRASH_SEED")
CUT = os.environ.get("NOVAFS_TEST_CRASH_CUT")
WORKLOADS = 2
"""Of each kind, in an ordinary run."""


@pytest.fixture
def memory_dir() -> Iterator[Path]:
    """A directory in memory, where there is one: no disk is to be waited for."""
    shared = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shared if os.access(shared, os.W_OK) else None) as directory:
        yield Path(directory)


def seeds(count: int) -> list[int]:
    """Of an ordinary run; more, and others, under torture."""
    if SEED is not None:
        return [int(SEED)]
    first = 0 if TORTURE == 1 else random.SystemRandom().randrange(1 << 32)
    return list(range(first, first + max(1, round(count * TORTURE))))


@pytest.mark.slow
@pytest.mark.parametrize("seed", seeds(WORKLOADS))
@pytest.mark.parametrize("faults", [False, True], ids=["", "faults"])
@pytest.mark.parametrize("durability", ["journal", "store"])
def test_whatever_a_power_cut_leaves_is_a_prefix_with_every_promised_byte(
    memory_dir: Path, durability: str, faults: bool, seed: int
) -> None:
    """semantics: S2, S3."""
    trace = Trace(seed, memory_dir, durability=durability, faults=faults)
    trace.run()
    rng = random.Random(seed)
    count = 0
    for case in trace.cases():
        again = case.disk is not None and rng.random() < 0.15
        if CUT is not None and case.position != int(CUT):
            continue
        count += 1
        try:
            case.check(memory_dir, again=again)
        except BaseException as error:
            error.add_note(f"again by: NOVAFS_TEST_CRASH_SEED={seed} NOVAFS_TEST_CRASH_CUT={case.position} ({durability}, faults {faults})")
            raise
    assert count or CUT is not None
