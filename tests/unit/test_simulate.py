"""The simulator: its LRU is an LRU, its counts add up, the same inputs give the same result; and the command."""

from __future__ import annotations

import json
import random
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from novafs.cli import main
from novafs.errors import ConfigError
from novafs.simulate import Result, Scenario, simulate, steps, unique_chunks
from novafs.traces import open_trace
from tests.support.accesses import replayed, requests, scans, uniform
from tests.support.traces import traces_folder

OFF = Scenario(prefetch="off")


def lru_misses(order: list[int], capacity: int) -> int:
    """Written apart from everything in the tree."""
    cache: OrderedDict[int, None] = OrderedDict()
    misses = 0
    for chunk in order:
        if chunk in cache:
            cache.move_to_end(chunk)
            continue
        misses += 1
        cache[chunk] = None
        if len(cache) > capacity:
            cache.popitem(last=False)
    return misses


def written(path: Path, order: list[int], gap_us: int = 1000) -> Path:
    lines = [f"{number * gap_us},{'w' if number % 7 == 0 else 'r'},{index * 65536},4096" for number, index in enumerate(order)]
    path.write_text("\n".join(lines) + "\n")
    return path


@given(st.lists(st.integers(0, 30), min_size=1, max_size=300), st.integers(1, 20))
@settings(max_examples=60, deadline=None)
def test_without_prefetch_the_misses_are_those_of_an_lru(order: list[int], capacity: int) -> None:
    replay = replayed(requests(order), capacity, OFF)
    assert replay.misses == lru_misses(order, capacity)
    assert replay.hits + replay.misses == len(order)


@pytest.mark.traces
def test_the_hit_rates_on_the_shared_traces_are_those_of_the_reference() -> None:
    folder = traces_folder()
    assert folder is not None
    for name, hit_rate in (("hplajw_1992", 0.8469), ("msr_hm1_prefix", 0.6973)):
        result = simulate(open_trace(folder / f"{name}.npz"), OFF)
        assert result.hit_rate == pytest.approx(hit_rate, abs=5e-5)
        assert result.capacity_chunks == round(result.unique_chunks * 0.1)


latencies = st.sampled_from([(0.0, 0.0), (0.03, 0.0), (0.03, 250e6), (0.001, 1e6)])


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_counts_add_up_whatever_is_read(data: st.DataObject) -> None:
    order = data.draw(st.lists(st.integers(0, 60), max_size=200)) + scans(data.draw(st.integers(0, 150)), 300, 3)
    counts = data.draw(st.integers(1, 4))
    capacity = data.draw(st.integers(1, 40))
    latency_s, bandwidth = data.draw(latencies)
    scenario = Scenario(prefetch=data.draw(st.sampled_from(["off", "default", "eager"])), latency_s=latency_s, bandwidth=bandwidth)
    widened = [(gap, write, place, counts) for gap, write, place, _ in requests(order)]
    replay = replayed(widened, capacity, scenario)
    assert replay.hits + replay.late + replay.misses == len(order) * counts
    assert len(replay._cached) == len(replay.policy) <= capacity
    assert all(name in replay.policy for name in replay._cached.values())
    landed = replay.prefetched - replay.late - len(replay._arrival_s)
    assert replay.misses + replay.late + landed == replay.evictions + len(replay._cached)
    assert replay.stall_s >= 0.0
    assert replay.now_s == pytest.approx(0.005 * len(order) + replay.stall_s)
    if latency_s == 0.0:
        assert replay.late == 0
    if scenario.prefetch == "off":
        assert replay.prefetched == 0


def test_the_same_inputs_give_the_same_result(tmp_path: Path) -> None:
    trace = open_trace(written(tmp_path / "t.csv", scans(1500, 4000, 4) + uniform(1500, 4000, 9)))
    for scenario in (Scenario(), Scenario(prefetch="eager", latency_s=0.03, bandwidth=1e8)):
        assert simulate(trace, scenario) == simulate(trace, scenario)


def test_a_miss_costs_the_latency_and_the_transfer() -> None:
    scenario = replace(OFF, latency_s=0.03, bandwidth=65536.0 * 100)
    replay = replayed(requests([1, 2, 1, 1]), 10, scenario)
    assert replay.stall_s == pytest.approx(2 * (0.03 + 0.01))
    assert replay.now_s == pytest.approx(4 * 0.005 + replay.stall_s)


def test_the_chunks_of_one_request_are_waited_for_together() -> None:
    scenario = replace(OFF, latency_s=0.03, bandwidth=65536.0 * 100)
    replay = replayed([(0.0, False, 0, 4)], 10, scenario)
    assert replay.misses == 4
    assert replay.stall_s == pytest.approx(0.03 + 4 * 0.01)


def test_a_prefetch_that_is_still_on_its_way_is_late_and_waited_for_only_in_part() -> None:
    scenario = Scenario(latency_s=0.03, bandwidth=250e6)
    replay = replayed(requests(range(2000)), 400, scenario)
    base = replayed(requests(range(2000)), 400, replace(scenario, prefetch="off"))
    assert replay.late > 0
    assert replay.hits > 1500
    assert replay.stall_s < 0.15 * base.stall_s


def test_instant_prefetch_removes_at_least_as_much_stall_as_the_same_with_latency(tmp_path: Path) -> None:
    trace = open_trace(written(tmp_path / "t.csv", scans(3000, 9000, 3), gap_us=4000))
    scenario = Scenario(latency_s=0.03, bandwidth=250e6)
    real, instant = simulate(trace, scenario), simulate(trace, replace(scenario, instant_prefetch=True))
    assert instant.stall_s <= real.stall_s < real.base_stall_s


def test_places_keep_disks_and_traces_apart(tmp_path: Path) -> None:
    path = tmp_path / "d.npz"
    np.savez(path, offset=np.zeros(4, dtype=np.int64), size=np.full(4, 10), dev=np.array([0, 1, 0, 1]))
    trace = open_trace(path)
    assert unique_chunks(trace, 65536) == 2
    first, second = (next(steps(trace, number, 65536, 0.0))[2] for number in (0, 1))
    assert first != second


def test_a_clones_boot_learned_from_another_is_covered(tmp_path: Path) -> None:
    order = [0, *random.Random(2).sample(range(1, 9000), 300)]
    lesson, clone = (open_trace(written(tmp_path / f"{name}.csv", order)) for name in "ab")
    result = simulate(clone, Scenario(size=1.0), train=[lesson])
    assert result.coverage == pytest.approx(300 / 301)
    assert result.accuracy == 1.0
    untaught = simulate(clone, Scenario(size=1.0))
    assert (untaught.coverage or 0.0) < 0.2


@pytest.mark.traces
def test_the_recorded_boots_of_clones_are_covered() -> None:
    folder = traces_folder()
    assert folder is not None
    lesson = open_trace(folder / "boot_debian_1.csv.gz")
    for name in ("boot_debian_2", "boot_debian_3"):
        result = simulate(open_trace(folder / f"{name}.csv.gz"), Scenario(size=1.0), train=[lesson])
        assert result.accuracy is not None
        assert result.coverage is not None
        assert result.accuracy >= 0.95
        assert result.coverage >= 0.95


@pytest.mark.traces
def test_default_mode_holds_its_accuracy_on_a_shared_trace() -> None:
    folder = traces_folder()
    assert folder is not None
    result = simulate(open_trace(folder / "msr_hm1_prefix.npz"), Scenario())
    assert (result.accuracy or 0.0) >= 0.85
    assert (result.coverage or 0.0) >= 0.3
    assert (result.traffic or 9.0) <= 1.15


@pytest.mark.parametrize(("field", "value"), [("prefetch", "lots"), ("size", 0.0)])
def test_scenarios_that_make_no_sense_are_refused(field: str, value: object) -> None:
    with pytest.raises(ConfigError):
        Scenario(**{field: value})  # type: ignore[arg-type]


# --- the command ------------------------------------------------------------------------------------------------


def test_the_command_prints_figures_and_draws_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = written(tmp_path / "t.csv", scans(1200, 4000, 3))
    plot = tmp_path / "t.svg"
    assert main(["simulate", str(trace), "--size", "10%", "--latency", "30ms", "--bandwidth", "250MB", "--plot", str(plot)]) == 0
    output = capsys.readouterr().out
    for word in ("hit rate", "accuracy", "coverage", "traffic", "stall time", "sequential"):
        assert word in output
    assert ElementTree.parse(plot).getroot().tag.endswith("svg")


def test_the_command_compares_sizes_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = written(tmp_path / "t.csv", uniform(500, 100, 1))
    plot = tmp_path / "t.svg"
    arguments = [
        "simulate",
        str(trace),
        "--size",
        "10%",
        "--size",
        "0.5",
        "--size",
        "2MiB",
        "--prefetch",
        "off",
        "--json",
        "--plot",
        str(plot),
    ]
    assert main(arguments) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["capacity_chunks"] for row in rows] == [
        round(row["unique_chunks"] * share) for row, share in zip(rows, (0.1, 0.5), strict=False)
    ] + [32]
    assert rows[0]["hit_rate"] < rows[1]["hit_rate"]
    assert rows[0]["coverage"] == 0.0
    assert "polyline" in plot.read_text()


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        (["--policy", "lruu"], 2, "did you mean"),
        (["--size", "0%"], 2, "--size"),
        (["--size", "1K"], 2, "two chunks"),
        (["--latency", "soon"], 2, "soon"),
        (["--prefetch", "lots"], 2, "lots"),
        (["--train", "missing.csv"], 1, "missing.csv"),
        (["--plot", "no-such-folder/x.svg"], 1, "no-such-folder"),
    ],
)
def test_wrong_arguments_are_refused_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], status: int, says: str
) -> None:
    trace = written(tmp_path / "t.csv", [1, 2, 3, 4])
    assert main(["simulate", str(trace), *arguments]) == status
    assert says in capsys.readouterr().err


def test_a_result_without_misses_has_no_coverage() -> None:
    result = Result("t", "lru", "off", 1, 0, 0, 0, 0, 0, 0, 0, *_empty())
    assert result.coverage is None
    assert result.traffic is None
    assert result.hit_rate == 0.0


def _empty() -> tuple[object, ...]:
    from novafs.prefetch.account import Counts

    return Counts(), {}, 0.0, 0.0, 0, 0.0, None
