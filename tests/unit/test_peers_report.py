"""What the comparison with peers makes of recorded results: ratios, the table, the plots, and the place in the document."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from tests.bench.peers import report, results
from tests.bench.peers.results import Measured
from tests.bench.peers.rows import ROWS, found, holds

DAEMON = {"l1_bytes": 1 << 30, "peak_bytes": 700 << 20, "policy_cpu_s": 0.2, "process_cpu_s": 10.0}


def recorded() -> dict[str, Measured]:
    """Every scenario, as `results.save` keeps it: ours is 2, 3 and 4 in three rounds, the others' is 2."""
    figures: dict[str, dict[str, bool]] = {}
    for row in ROWS:
        figures.setdefault(row.scenario, {}).update({row.theirs: False})
    for row in ROWS:
        figures[row.scenario][row.ours] = True
    return {
        scenario: Measured(
            "2026-01-02 03:04 UTC",
            "2 processors",
            [{n: o if ours else 2.0 for n, ours in names.items()} for o in (2.0, 3.0, 4.0)],
            [DAEMON],
        )
        for scenario, names in figures.items()
    }


def test_results_are_read_as_they_were_written_and_one_scenario_is_replaced_alone(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "results.json"
    assert results.load(path) == {}
    results.save(path, recorded())
    assert results.load(path) == recorded()


def test_a_ratio_says_how_much_better_ours_is() -> None:
    rate = next(row for row in ROWS if row.scenario == "random-16" and row.theirs == "null")
    seconds = next(row for row in ROWS if row.scenario == "whole")
    small = next(row for row in ROWS if row.scenario == "clones")
    assert rate.ratio({"novafs": 30.0, "null": 40.0}) == 0.75 and holds(rate, 0.75)
    assert seconds.ratio({"novafs": 2.0, "juicefs": 3.0}) == 1.5 and not holds(seconds, 1.5)
    assert small.ratio({small.ours: 21.0, small.theirs: 20.0}) == 1.05 and holds(small, 1.05)
    of = found(rate, Measured("", "", [{"novafs": 1.0, "null": 2.0}, {"novafs": 3.0, "null": 2.0}, {"novafs": 2.0, "null": 2.0}], []))
    assert (of.median, of.least, of.most, of.rounds) == (1.0, 0.5, 1.5, 3)


def test_the_document_gets_a_line_for_each_ratio_and_the_rest_of_it_stays(tmp_path: Path) -> None:
    document = tmp_path / "performance.md"
    document.write_text(f"before\n{report.BEGIN}\nobsolete\n{report.END}\nafter\n")
    for _ in range(2):  # what is written is a place for the next
        report.write(recorded(), document)
        text = document.read_text()
        assert text.startswith("before\n") and text.endswith("\nafter\n") and "obsolete" not in text
    table = [line for line in text.splitlines() if line.startswith("| ")]
    assert all(any(row.work in line and row.beside in line for line in table) for row in ROWS)
    assert "**missed**" in text and "0.020" in text
    for name in ("ratios.svg", "boots.svg"):
        assert f"performance/{name}" in text
        picture = ET.parse(tmp_path / "performance" / name).getroot()
        assert picture.tag.endswith("svg") and len(picture) > 10


def test_a_part_of_the_results_makes_a_part_of_the_table(tmp_path: Path) -> None:
    part = {"whole": recorded()["whole"]}
    text = report.section(part)
    assert "whole image" in text and "fsynced" not in text
    assert set(report.plots(part)) == {"ratios.svg"}


def test_a_document_without_the_place_is_left_alone(tmp_path: Path) -> None:
    document = tmp_path / "performance.md"
    document.write_text("text\n")
    with pytest.raises(ValueError, match="has no place for the results"):
        report.write(recorded(), document)
    assert document.read_text() == "text\n"


def test_the_real_document_has_the_place() -> None:
    text = (Path(__file__).parents[2] / "docs/performance.md").read_text()
    assert text.count(report.BEGIN) == text.count(report.END) == 1
    assert text.index(report.BEGIN) < text.index(report.END)
