"""Two and three hosts, paused, killed and robbed of their leases, write one image; see `tests.crash.hosts` for what is checked.

`NOVAFS_TEST_TORTURE` and `NOVAFS_TEST_CRASH_SEED` as in `tests.crash.test_crash`.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.crash.hosts import World
from tests.crash.test_crash import SEED, TORTURE, memory_dir, seeds

__all__ = ["memory_dir"]

WORLDS = 12
"""For each rule and number of hosts, in an ordinary run."""


@pytest.mark.slow
@pytest.mark.parametrize("machines", [2, 3])
@pytest.mark.parametrize("rules", ["journal", "store", "auto"])
def test_an_image_has_one_writer_and_keeps_what_was_promised(memory_dir: Path, rules: str, machines: int) -> None:
    """semantics: S6, S12."""
    acknowledged = 0
    for seed in seeds(WORLDS):
        world = World(seed, memory_dir / str(seed), rules, machines=machines)
        try:
            world.run()
        except BaseException as error:
            error.add_note(f"again by: NOVAFS_TEST_CRASH_SEED={seed} ({rules}, {machines} hosts)")
            raise
        acknowledged += world.acknowledged
    assert acknowledged or SEED is not None or TORTURE != 1
