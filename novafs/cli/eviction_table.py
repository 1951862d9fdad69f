"""`novafs simulate TRACE --policy lru,2q,learned --size 1%,5%,10%,20%`: policies side by side, with Belady's optimum."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from novafs.cli import common
from novafs.errors import ConfigError, UserError
from novafs.units import format_size

if TYPE_CHECKING:
    from novafs.eviction_study import Outcome
    from novafs.traces import Trace


def show_comparison(
    traces: Sequence[Trace],
    policies: Sequence[str],
    sizes: Sequence[tuple[str, float]],
    chunk_size: int,
    *,
    plot: Path | None,
    as_json: bool,
) -> None:
    """Compare, print, draw. sizes: as the user wrote them, and as `Stream.capacity` takes them. Raises ConfigError, SourceError."""
    from novafs.eviction_study import BELADY, compare, stream_of

    names = list(dict.fromkeys([*policies, BELADY]))
    outcomes: list[tuple[str, Outcome]] = []
    for trace in traces:
        stream = stream_of(trace, chunk_size)
        rows: list[tuple[str, Outcome]] = []
        for label, size in sizes:
            rows.extend((label, outcome) for outcome in compare(stream, names, [size]))
        outcomes.extend(rows)
        if not as_json:
            common.emit(f"{common.printable(trace.name)}: {len(stream.places):,} accesses to {stream.unique:,} chunks; no prefetch")
            _table(names, [label for label, _ in sizes], rows, chunk_size)
            common.emit("")
    if as_json:
        common.emit_json([_document(label, outcome) for label, outcome in outcomes])
    if plot is not None:
        try:
            plot.write_text(_chart(names, [label for label, _ in sizes], outcomes), encoding="utf-8")
        except OSError as error:
            raise UserError(f"{plot}: the plot cannot be written: {error.strerror}") from error
        common.say(f"plot written to {plot}")


def split_names(values: Sequence[str]) -> list[str]:
    """What was given with one option, several times or with commas, each once. Raises ConfigError for an empty one."""
    parts = [part.strip() for value in values for part in value.split(",")]
    if not all(parts):
        raise ConfigError(f"{','.join(values)!r} has an empty item; expected a list such as lru,2q,learned or 1%,10%")
    return list(dict.fromkeys(parts))


def _table(names: Sequence[str], labels: Sequence[str], rows: Sequence[tuple[str, Outcome]], chunk_size: int) -> None:
    by = {(outcome.policy, label): outcome for label, outcome in rows}
    width = max(12, *(len(name) + 2 for name in names))
    columns = [f"{label} = {format_size(by[names[0], label].capacity_chunks * chunk_size)}" for label in labels]
    common.emit(" " * width + "".join(f"{column:>26}" for column in columns))
    for name in names:
        cells = []
        for label in labels:
            outcome = by[name, label]
            gap = outcome.gap_closed
            cells.append(f"{outcome.hit_rate:.4f}" + ("" if gap is None else f" ({gap:+.0%} of the gap)"))
        common.emit(f"{name:<{width}}" + "".join(f"{cell:>26}" for cell in cells))
    for (name, label), outcome in by.items():
        if outcome.quality is not None:
            common.emit(f"{name} at {label}: {outcome.quality.in_words()}")


def _document(label: str, outcome: Outcome) -> dict[str, Any]:
    quality = outcome.quality
    return {
        "trace": outcome.trace,
        "policy": outcome.policy,
        "size": label,
        "capacity_chunks": outcome.capacity_chunks,
        "accesses": outcome.accesses,
        "misses": outcome.misses,
        "hit_rate": outcome.hit_rate,
        "misses_of_lru": outcome.lru_misses,
        "misses_of_belady": outcome.belady_misses,
        "gap_closed": outcome.gap_closed,
        "misses_against_lru": outcome.against_lru,
        "cpu_s": outcome.cpu_s,
        "accuracy": quality.accuracy if quality else None,
        "in_charge": quality.in_charge if quality else None,
        "shadow_hit_rates": quality.shadow_hit_rates if quality else None,
    }


def _chart(names: Sequence[str], labels: Sequence[str], outcomes: Sequence[tuple[str, Outcome]]) -> str:
    from novafs.svgplot import bar_chart, line_chart

    traces = list(dict.fromkeys(outcome.trace for _, outcome in outcomes))
    by = {(outcome.trace, outcome.policy, label): outcome.hit_rate for label, outcome in outcomes}
    if len(labels) == 1:
        bars = [(name, [by[trace, name, labels[0]] for trace in traces]) for name in names]
        return bar_chart(f"Hit rate, cache of {labels[0]}", traces, bars, "hit rate")
    lines = [
        (name if len(traces) == 1 else f"{trace} {name}", [by[trace, name, label] for label in labels])
        for trace in traces
        for name in names
    ]
    title = f"Hit rate by cache size: {traces[0]}" if len(traces) == 1 else "Hit rate by cache size"
    return line_chart(title, labels, lines, "hit rate; cache size as a share of the chunks, or in bytes")
