"""The results as a table and plots: the part of docs/performance.md between two comments, and SVG files beside it.

What stands outside of the comments is written by people, and is left alone.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path

from tests.bench.peers.plots import Span, range_chart
from tests.bench.peers.results import Measured
from tests.bench.peers.rows import POLICY_SHARE_MAX, ROWS, Found, Row, found, has, holds, taken

BEGIN = "<!-- peers: begin; written by `make bench` -->"
END = "<!-- peers: end -->"
PLOTS = "performance"
"""The folder of the plots, beside the document."""

BOOTS = (
    ("JuiceFS, nothing cached", "boot-unlearned", "juicefs"),
    ("NovaFS, nothing cached, nothing learned", "boot-unlearned", "novafs"),
    ("NovaFS, nothing cached, another clone's boot learned", "boot-learned", "novafs"),
    ("JuiceFS, cached", "boot-warm", "juicefs"),
    ("NovaFS, in L1", "boot-warm", "novafs"),
)


def section(results: Mapping[str, Measured]) -> str:
    """The text between the comments."""
    lines = ["| work | beside | wanted | ratio: median (spread) | NovaFS | the other | rounds |", "|---|---|---|---|---|---|---|"]
    for row in ROWS:
        if has(row, results):
            lines.append(_line(row, found(row, results[row.scenario])))
    lines += _worst(results)
    lines += ["", "![ratios as shares of what is wanted](performance/ratios.svg)", "", "![a boot](performance/boots.svg)", ""]
    lines += ["What the daemons took, the worst of each scenario's:", ""]
    lines += ["| scenario | memory, peak | L1 × 1.15 + 150 MB | CPU time for learning and prediction | measured |", "|---|---|---|---|---|"]
    for name, measured in results.items():
        worst = taken(measured.daemons)
        if worst is not None:
            memory = f"{_figure(worst.peak_bytes, 'B')} | {_figure(worst.bound_bytes, 'B')}"
            lines.append(f"| `{name}` | {memory} | {worst.policy_share:.1%} | {measured.measured} |")
    machines = sorted({measured.machine for measured in results.values()})
    lines += ["", f"Measured on {'; '.join(machines)}."]
    return "\n".join(lines)


def _line(row: Row, of: Found) -> str:
    wanted = f"{'at most' if row.at_most else 'at least'} {row.goal:g}"
    mark = "" if holds(row, of.median) else " **missed**"
    spread = f"{_ratio(of.median)} ({_ratio(of.least)}–{_ratio(of.most)}){mark}"
    return (
        f"| {row.work} | {row.beside} | {wanted} | {spread} | {_figure(of.ours, row.unit)} | {_figure(of.theirs, row.unit)} | {of.rounds} |"
    )


def _worst(results: Mapping[str, Measured]) -> list[str]:
    each = [of for measured in results.values() if (of := taken(measured.daemons)) is not None]
    if not each:
        return []
    memory = max(each, key=lambda of: of.peak_bytes / of.bound_bytes)
    share = max(of.policy_share for of in each)
    ratio = memory.peak_bytes / memory.bound_bytes
    return [
        f"| memory, the worst of all of these | L1 × 1.15 + 150 MB | at most 1 | {_ratio(ratio)}{'' if ratio <= 1 else ' **missed**'} "
        f"| {_figure(memory.peak_bytes, 'B')} | {_figure(memory.bound_bytes, 'B')} | |",
        f"| CPU for learning and prediction, the worst | the process's | at most {POLICY_SHARE_MAX:g} "
        f"| {share:.3f}{'' if share <= POLICY_SHARE_MAX else ' **missed**'} | | | |",
    ]


def _ratio(value: float) -> str:
    return f"{value:.0f}" if value >= 20 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _figure(value: float, unit: str) -> str:
    if unit == "s":
        return f"{value:.2f} s" if value < 10 else f"{value:.1f} s"
    if unit in ("B", "B/s"):
        scaled, prefix = (value / 1e9, "G") if value >= 1e9 else (value / 1e6, "M")
        return f"{scaled:.3g} {prefix}{unit}" if scaled < 1000 else f"{scaled:.0f} {prefix}{unit}"
    return f"{value:,.0f} {unit}"


def plots(results: Mapping[str, Measured]) -> dict[str, str]:
    """SVG texts by file name."""
    spans = []
    for row in ROWS:
        if has(row, results):
            of = found(row, results[row.scenario])
            spans.append(Span(f"{row.work}: {row.beside}", *of.score(row), group=0 if holds(row, of.median) else 1))
    made = {}
    if spans:
        subtitle = "right of the line: reached; dots are medians, lines go from the worst round to the best"
        made["ratios.svg"] = range_chart("Ratios, as shares of what is wanted", subtitle, spans, line=1.0, groups=("reached", "missed"))
    boots = []
    for label, scenario, figure in BOOTS:
        if scenario in results:
            values = [one[figure] for one in results[scenario].rounds]
            boots.append(Span(label, min(values), statistics.median(values), max(values), group=0 if label.startswith("NovaFS") else 1))
    if boots:
        made["boots.svg"] = range_chart("A Debian boot's 959 reads, back to back", "seconds; the store 20 ms away, 2 Gbit/s", boots)
    return made


def write(results: Mapping[str, Measured], document: Path) -> None:
    """Write plots and section. Raises ValueError where the document lacks the comments."""
    text = document.read_text()
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{document} has no place for the results: expected the lines {BEGIN!r} and {END!r}")
    folder = document.parent / PLOTS
    folder.mkdir(exist_ok=True)
    for name, svg in plots(results).items():
        (folder / name).write_text(svg)
    document.write_text(f"{before}{BEGIN}\n{section(results)}\n{END}{after}")
