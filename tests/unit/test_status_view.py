"""What `novafs top` and `novafs stats --watch` make of two looks."""

from __future__ import annotations

from typing import Any

import pytest

from novafs.cli.stats import HEADING, watch_line
from novafs.cli.top import look
from novafs.errors import UnsupportedError
from novafs.statusview import STATES, facts, hit_rate, rate, strip


def a_look(time_s: float, reads: int, hits: int, misses: int) -> dict[str, Any]:
    return {
        "time_s": time_s,
        "traffic": {
            "memory_reads": reads,
            "waited_reads": 0,
            "memory_bytes": reads * 4096,
            "waited_bytes": 0,
            "writes": 0,
            "written_bytes": 0,
        },
        "cache": {"l1": {"hits": hits, "misses": misses}},
        "mount": {"uptime_s": 100.0, "errors": {"BugError": 1}},
        "commits": 3,
    }


def test_rates_are_of_what_came_between_and_unknown_after_a_restart() -> None:
    then, now = a_look(10.0, 100, 50, 50), a_look(12.0, 300, 250, 50)
    assert facts(now, then).reads == 100 and facts(now, then).read_bytes == 100 * 4096
    assert facts(now, then).hit_rate == 1.0 and hit_rate(now, None, "cache.l1") == 250 / 300
    assert rate(then, now, "traffic.memory_reads") is None, "time does not run backwards"
    assert rate(a_look(14.0, 5, 0, 0), now, "traffic.memory_reads") is None, "the daemon began anew"
    assert rate(now, None, "traffic.memory_reads") is None and rate(now, then, "no.such") is None
    assert hit_rate(now, now, "cache.l1") is None, "nothing was asked"


def test_a_line_has_a_cell_for_each_heading_and_the_first_is_of_since_the_start() -> None:
    now = a_look(1000.0, 500, 1, 1)
    for line in (watch_line(now, None), watch_line(now, a_look(999.0, 0, 0, 0))):
        assert len(line) == len(HEADING)
    assert watch_line(now, None).split()[1] == "5"


def test_a_strip_shows_what_most_of_a_part_is_in_and_never_hides_what_is_dirty_or_prefetched() -> None:
    found: dict[str, Any] = {state: [0.0] * 100 for state in STATES}
    found["l1"][:50] = [1.0] * 50
    found["dirty"][99] = 0.01
    found["prefetched"][60] = 0.5
    assert strip(found, 10) == ["l1"] * 5 + ["store", "prefetched", "store", "store", "dirty"]
    assert len(strip(found, 1000)) == 100 and strip({state: [] for state in STATES}, 10) == []


def test_top_says_what_to_do_where_a_program_has_the_volume_open(tmp_path: Any) -> None:
    import trio

    from novafs.control import ControlServer
    from novafs.statedir import CONTROL_SOCKET

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            await nursery.start(ControlServer(tmp_path / CONTROL_SOCKET).run)
            with pytest.raises(UnsupportedError, match="stats --watch"):
                await trio.to_thread.run_sync(look, tmp_path)
            nursery.cancel_scope.cancel()

    trio.run(main)
