"""Latency histograms, what they cost a hot read, and the ring of events."""

from __future__ import annotations

import logging
import os
import random
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import trio

from novafs.catalogtree import ROOT_ID
from novafs.events import NOTICES_MAX, TEXT_MAX, TROUBLES_MAX, EventRing, scrubbed
from novafs.latency import EDGES, SHOWN, WINDOW_S, Latency, LatencyBook, quantile
from tests.support.engine import fresh_volume


def test_the_buckets_that_prometheus_sees_are_1_2p5_and_5_of_each_decade() -> None:
    assert [EDGES[at] for at in SHOWN] == [
        step * 10.0**decade if decade >= 0 else float(f"{step}e{decade}") for decade in range(-6, 2) for step in (1, 2.5, 5)
    ] + [100.0]
    assert sorted(EDGES) == list(EDGES)


def test_buckets_are_cumulative_and_their_ends_belong_to_them() -> None:
    latency = Latency()
    for seconds in (0.0, 1e-6, 2.5e-6, 0.003, 1e3):
        latency.note(seconds)
    buckets = dict(latency.buckets())
    assert buckets["1e-06"] == 2 and buckets["2.5e-06"] == 3 and buckets["0.0025"] == 3 and buckets["0.005"] == 4
    assert buckets["100.0"] == 4 and buckets["+Inf"] == latency.count == 5
    assert latency.sum_s == pytest.approx(1000.003, abs=1e-4)


@pytest.mark.parametrize("share", [0.5, 0.95, 0.99])
def test_a_quantile_is_right_within_an_eighth(share: float) -> None:
    source = random.Random(3)
    for spread in (0.3, 1.0, 2.0):
        values = sorted(10 ** source.gauss(-4, spread) for _ in range(20_000))
        latency = Latency()
        for value in values:
            latency.note(value)
        assert quantile(latency.counts, share) == pytest.approx(values[int(share * len(values))], rel=0.13)


def test_there_is_no_quantile_of_nothing_and_beyond_the_last_edge_it_is_that() -> None:
    latency = Latency()
    assert quantile(latency.counts, 0.5) is None
    latency.note(1e9)
    assert quantile(latency.counts, 0.99) == EDGES[-1]


def test_figures_are_of_the_last_minute_or_of_all_where_that_had_none() -> None:
    book = LatencyBook()
    reads = book.of("l1", "get")
    for _ in range(100):
        reads.note(1e-3)
    book.tick(0.0)
    assert book.figures()["l1"]["get"].p50_s == pytest.approx(1e-3, rel=0.13), "none since: of all"
    for _ in range(10):
        reads.note(1e-5)
    for at in range(10, 100, 10):
        book.tick(float(at))
        found = book.figures()["l1"]["get"]
        assert found.count == 110
        assert found.p50_s == pytest.approx(1e-5 if at < WINDOW_S + 10 else 1e-3, rel=0.13), at
    assert book.figures().keys() == {"l1"}


def test_a_hot_read_is_counted_by_four_calls_and_leaves_nothing_behind(tmp_path: Path) -> None:
    """Counted, not timed: `tests/bench/instrumentation.py` measures what it costs (0.6 µs; 2 are allowed)."""

    async def main() -> Counter[str]:
        async with fresh_volume(tmp_path) as volume:
            image = await volume.open_image((await volume.create(ROOT_ID, "a.raw")).node_id)
            await image.write(0, os.urandom(1 << 20))
            await image.commit()
            assert image.read_nowait(4096, 4096) is not None
            calls: Counter[str] = Counter()

            def watch(_frame: Any, event: str, what: Any) -> None:
                if event == "call":
                    calls[_frame.f_code.co_name] += 1
                elif event == "c_call":
                    calls[what.__name__] += 1

            sys.setprofile(watch)
            data = image.read_nowait(4096, 4096)
            sys.setprofile(None)
            assert data is not None
            assert image.traffic.memory_reads == 2
            await volume.close_image(image)
            return calls

    calls = trio.run(main)
    assert (calls["perf_counter"], calls["note"], calls["bisect_left"]) == (2, 1, 1)
    assert not any(name in calls for name in ("acquire", "__enter__", "labels", "inc", "observe"))
    assert sum(calls.values()) <= 25, calls
    latency = Latency()
    before = sys.getallocatedblocks()
    for number in range(5000):
        latency.note(number * 1e-7)
    assert sys.getallocatedblocks() - before < 200, "counts are small numbers and one sum"


# --- events -----------------------------------------------------------------------------------------------------------


def test_events_are_bounded_newest_first_and_trouble_is_not_pushed_out_by_commits() -> None:
    ring = EventRing()
    log = logging.getLogger("novafs.test_events")
    log.addHandler(ring)
    log.propagate = False
    try:
        log.warning("the store is slow")
        for number in range(1000):
            ring.note("commit", f"generation {number}")
        log.error("broken")
    finally:
        log.removeHandler(ring)
    found = ring.latest()
    assert len(found) == NOTICES_MAX + 2 <= NOTICES_MAX + TROUBLES_MAX
    assert found[0]["kind"] == "error" and {event["kind"] for event in found} == {"commit", "warning", "error"}
    assert ring.counts == {"warning": 1, "error": 1}


def test_a_line_that_comes_again_is_counted() -> None:
    ring = EventRing()
    for _ in range(7):
        ring.note("lease", "lost")
    assert [(event["text"], event["count"]) for event in ring.latest()] == [("lost", 7)]


def test_events_hold_no_secret_no_control_character_and_no_more_than_a_line() -> None:
    text = scrubbed("L2 at rediss://user:p@ss/w@rd@h:1/0 and s3://b/p?secret_key=hunter2&x=1 failed\n\x1b[31m\u202e" + "x" * 1000)
    for secret in ("p@ss", "w@rd", "user", "hunter2", "\n", "\x1b", "\u202e"):
        assert secret not in text
    assert "rediss://***@h:1/0" in text and "x=1" in text and len(text) <= TEXT_MAX


def test_an_exception_in_the_log_is_told_in_a_line() -> None:
    ring = EventRing()
    log = logging.getLogger("novafs.test_events")
    log.addHandler(ring)
    log.propagate = False
    try:
        raise ValueError("that\nwas it")
    except ValueError:
        log.exception("prefetch failed")
    finally:
        log.removeHandler(ring)
    assert ring.latest()[0]["text"] == "prefetch failed: ValueError: that was it"
