"""The comparison of policies: LRU and Belady are those of the libcachesim package, and of the reference figures of the disk traces."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from xml.etree import ElementTree

import libcachesim
import numpy as np
import pytest

from novafs.cli import main
from novafs.errors import ConfigError
from novafs.eviction.base import make_policy
from novafs.eviction_study import BELADY, Stream, belady_misses, compare, misses_of, stream_of
from novafs.traces import open_trace
from tests.support.traces import traces_folder

FOLDER = traces_folder()


def made(seed: int, count: int = 8000) -> Stream:
    random = np.random.default_rng(seed)
    places = np.where(random.random(count) < 0.6, random.zipf(1.3, count) % 500, np.arange(count) // 2 % 900 + 1000)
    return Stream("made", places.astype(np.int64), np.arange(count) * 0.01, 65536)


def libcachesim_misses(stream: Stream, capacity: int, folder: Path) -> dict[str, int]:
    """Misses of its LRU and Belady for the same accesses, each of size 1."""
    _, ids = np.unique(stream.places, return_inverse=True)
    following = np.full(len(ids), -1, dtype=np.int64)
    order = np.argsort(ids, kind="stable")
    same = ids[order[1:]] == ids[order[:-1]]
    following[order[:-1][same]] = order[1:][same] + 1
    records = np.zeros(len(ids), dtype=[("clock", "<u4"), ("id", "<u8"), ("size", "<u4"), ("next", "<i8")])
    records["clock"] = np.arange(len(ids))
    records["id"] = ids + 1
    records["size"] = 1
    records["next"] = following
    path = folder / "made.oracleGeneral"
    records.tofile(path)
    misses = {}
    for name, kind in (("lru", libcachesim.LRU), (BELADY, libcachesim.Belady)):
        reader = libcachesim.TraceReader(str(path), libcachesim.TraceType.ORACLE_GENERAL_TRACE)
        misses[name] = round(kind(capacity).process_trace(reader)[0] * len(ids))
    return misses


@pytest.mark.parametrize("capacity", [1, 7, 60, 400, 2000])
def test_lru_and_belady_are_those_of_libcachesim(tmp_path: Path, capacity: int) -> None:
    stream = made(capacity)
    expected = libcachesim_misses(stream, capacity, tmp_path)
    assert misses_of(stream, make_policy("lru"), capacity) == expected["lru"]
    assert belady_misses(stream.places, capacity) == expected[BELADY]


@pytest.mark.traces
@pytest.mark.parametrize("name", ["hplajw_1992", "msr_hm1_prefix"])
def test_lru_and_belady_are_those_of_the_reference_figures(name: str) -> None:
    assert FOLDER is not None
    stream = stream_of(open_trace(FOLDER / f"{name}.npz"))
    with (FOLDER / "reference_eviction.csv").open() as rows:
        reference = [row for row in csv.DictReader(rows) if row["trace"] == name]
    assert len(reference) == 4
    for row in reference:
        capacity = stream.capacity(float(row["frac"]))
        assert capacity == int(row["cap"])
        assert misses_of(stream, make_policy("lru"), capacity) == round(float(row["LRU"]) * int(row["N"]))
        assert belady_misses(stream.places, capacity) == round(float(row["Belady"]) * int(row["N"]))


def test_no_policy_is_better_than_belady_and_hits_and_misses_are_all_accesses() -> None:
    stream = made(1, 4000)
    for outcome in compare(stream, ["lru", "2q", "s3fifo", "wtinylfu", "linear8", BELADY], [0.05, 0.3]):
        assert outcome.belady_misses <= outcome.misses <= outcome.accesses == 4000
        assert outcome.gap_closed is not None
        assert outcome.gap_closed <= 1.0
        if outcome.policy == "lru":
            assert outcome.gap_closed == outcome.against_lru == 0.0
        if outcome.policy == BELADY:
            assert outcome.gap_closed == 1.0


def test_a_cache_that_holds_everything_has_no_gap() -> None:
    (outcome,) = compare(made(2, 2000), ["2q"], [1.0])
    assert outcome.gap_closed is None
    assert outcome.misses == outcome.lru_misses == made(2, 2000).unique


def test_a_size_of_less_than_one_chunk_and_an_unknown_policy_are_refused() -> None:
    with pytest.raises(ConfigError, match="holds none; expected one chunk or more"):
        compare(made(1, 100), ["lru"], [0.0001])
    with pytest.raises(ConfigError, match="'lruu' is no eviction policy"):
        compare(made(1, 100), ["lruu"], [0.1])


def test_a_stream_is_every_chunk_that_a_request_touches(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text("0,r,0,65536\n1500000,w,60000,20000\n2000000,r,655360,1\n")
    stream = stream_of(open_trace(path))
    assert stream.places.tolist() == [0, 0, 1, 10]
    assert stream.seconds.tolist() == [0.0, 1.5, 1.5, 2.0]


def trace_file(folder: Path) -> Path:
    path = folder / "small.csv"
    places = made(3, 1500).places
    path.write_text("".join(f"{number * 1000 + number % 7},r,{place * 65536},4096\n" for number, place in enumerate(places.tolist())))
    return path


def test_the_command_prints_a_table_with_belady_and_draws_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plot = tmp_path / "plot.svg"
    assert main(["simulate", str(trace_file(tmp_path)), "--policy", "lru,2q,learned", "--size", "5%,20%", "--plot", str(plot)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("small: 1,500 accesses to ")
    assert [line.split()[0] for line in lines[2:6]] == ["lru", "2q", "learned", "belady"]
    assert "(+100% of the gap)" in lines[5]
    assert any(line.startswith("learned at 5%: ") for line in lines)
    assert ElementTree.parse(plot).getroot().tag.endswith("svg")
    assert "belady" in plot.read_text()


def test_the_command_gives_the_same_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", str(trace_file(tmp_path)), "--policy", "lru,2q", "--size", "10%", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["policy"] for row in rows] == ["lru", "2q", "belady"]
    assert rows[0]["misses"] == rows[0]["misses_of_lru"]
    assert rows[2]["misses"] == rows[0]["misses_of_belady"]
    assert rows[1]["hit_rate"] == 1 - rows[1]["misses"] / rows[1]["accesses"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--policy", "lru,lerned"), "did you mean 'learned'?"),
        (("--policy", "lru,,2q"), "has an empty item"),
        (("--policy", "lru,2q", "--size", "0%"), "a cache that holds nothing"),
    ],
)
def test_the_command_refuses_what_makes_no_sense(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], says: str
) -> None:
    assert main(["simulate", str(trace_file(tmp_path)), *arguments]) == 2
    assert says in capsys.readouterr().err
