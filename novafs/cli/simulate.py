"""`novafs simulate`: what the cache's policies would have done with recorded accesses."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from novafs.cli import common
from novafs.cli.eviction_table import show_comparison, split_names
from novafs.errors import ConfigError, UserError
from novafs.units import format_duration, format_size, parse_duration, parse_share, parse_size

if TYPE_CHECKING:
    from novafs.simulate import Result, Scenario
    from novafs.traces import Trace

CHUNK_SIZES: Final = ("4K", "64K", "1M")


@click.command()
@click.argument("traces", metavar="TRACE...", nargs=-1, required=True)
@click.option("--train", multiple=True, metavar="TRACE", help="Learn from this trace first, with a cache of its own.")
@click.option(
    "--size", "sizes", multiple=True, default=("10%",), metavar="SIZE", help="Of the cache: 10% of the chunks, or bytes; or a list."
)
@click.option(
    "--policy", "policies", multiple=True, default=("lru",), metavar="NAME", help="Eviction policy; lru unless given. A list is compared."
)
@click.option("--prefetch", type=click.Choice(["default", "eager", "off"]), default="default", show_default=True, help="Its mode.")
@click.option("--latency", default="0", metavar="TIME", help="Round trip to the store; at 0 prefetches are there at once.")
@click.option("--bandwidth", default=None, metavar="SIZE", help="Bytes a second from the store; without it no limit.")
@click.option("--interval", default="5ms", show_default=True, metavar="TIME", help="Between requests of a trace that has no clock.")
@click.option("--chunk-size", type=click.Choice(CHUNK_SIZES), default="64K", show_default=True, help="Of the volume.")
@click.option("--plot", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE.svg", help="Draw hit rates.")
@common.json_option
def simulate(
    traces: tuple[str, ...],
    train: tuple[str, ...],
    sizes: tuple[str, ...],
    policies: tuple[str, ...],
    prefetch: str,
    latency: str,
    bandwidth: str | None,
    interval: str,
    chunk_size: str,
    plot: Path | None,
    as_json: bool,
) -> None:
    """Replay recorded accesses through the eviction policies and the prefetch that a mount uses, and print what came of it.

    A TRACE is .csv or .csv.gz (t_us,op,offset,length, or MSR Cambridge), .npz, .vscsi or .oracleGeneral (libCacheSim), the
    last three also .zst. Give --size or --policy more than once to compare. With a list of policies (lru,2q,learned) who leaves is
    compared and nothing else: without prefetch, with Belady's optimum.
    """
    from novafs.eviction.base import make_policy
    from novafs.eviction_study import BELADY
    from novafs.simulate import Scenario
    from novafs.simulate import simulate as replay
    from novafs.traces import open_trace

    side_by_side = any("," in policy or policy == BELADY for policy in policies)
    policies = tuple(split_names(policies))
    sizes = tuple(split_names(sizes))
    for policy in policies:
        if policy != BELADY:
            make_policy(policy)
    if side_by_side:
        chunk_bytes = parse_size(chunk_size)
        parsed = [(size, parse_cache_size(size, chunk_bytes)) for size in sizes]
        show_comparison([open_trace(path) for path in traces], policies, parsed, chunk_bytes, plot=plot, as_json=as_json)
        return
    scenarios = [
        (
            size,
            Scenario(
                size=parse_cache_size(size, parse_size(chunk_size)),
                policy=policy,
                prefetch=prefetch,
                latency_s=parse_duration(latency),
                bandwidth=float(parse_size(bandwidth)) if bandwidth is not None else 0.0,
                interval_s=parse_duration(interval),
                chunk_size=parse_size(chunk_size),
            ),
        )
        for policy in policies
        for size in sizes
    ]
    opened = [open_trace(path) for path in traces]
    lessons = [open_trace(path) for path in train]
    results: list[tuple[str, Scenario, Result]] = []
    for trace in opened:
        for size, scenario in scenarios:
            results.append((size, scenario, replay(trace, scenario, train=lessons)))
            if not as_json:
                _show(trace, size, scenario, results[-1][2])
    if as_json:
        common.emit_json([_document(size, scenario, result) for size, scenario, result in results])
    if plot is not None:
        try:
            plot.write_text(_chart(results, sizes), encoding="utf-8")
        except OSError as error:
            raise UserError(f"{plot}: the plot cannot be written: {error.strerror}") from error
        common.say(f"plot written to {plot}")


def parse_cache_size(text: str, chunk_size: int) -> float:
    """Chunks, or a share of the different chunks: "10%", "0.1", "1GiB". Raises ConfigError."""
    if "%" in text or text.strip().startswith(("0.", ".")):
        share = parse_share(text)
        if not share:
            raise ConfigError(f"--size {text}: a cache that holds nothing; expected a share such as 10%, or bytes")
        return share
    chunks = parse_size(text) // chunk_size
    if chunks < 2:
        raise ConfigError(f"--size {text}: expected a share such as 10%, or at least two chunks of {format_size(chunk_size)}")
    return float(chunks)


def _document(size: str, scenario: Scenario, result: Result) -> dict[str, Any]:
    engine = result.engine
    return {
        "trace": result.trace,
        "size": size,
        "capacity_chunks": result.capacity_chunks,
        "unique_chunks": result.unique_chunks,
        "policy": result.policy,
        "prefetch": result.prefetch,
        "latency_s": scenario.latency_s,
        "bandwidth_bytes_per_s": scenario.bandwidth or None,
        "accesses": result.accesses,
        "hits": result.hits,
        "late": result.late,
        "misses": result.misses,
        "hit_rate": result.hit_rate,
        "hit_rate_without_prefetch": result.base_hit_rate,
        "prefetched": result.prefetched,
        "accuracy": result.accuracy,
        "coverage": result.coverage,
        "traffic": result.traffic,
        "fetched_bytes": (result.misses + result.prefetched) * scenario.chunk_size,
        "stall_s": result.stall_s,
        "stall_without_prefetch_s": result.base_stall_s,
        "virtual_s": result.time_s,
        "sources": {
            name: {"issued": c.issued, "used": c.used, "late": c.late, "wasted": c.wasted, "accuracy": c.accuracy}
            for name, c in result.sources.items()
        },
        "candidates_judged": engine.candidates if engine else 0,
        "examples_learned": engine.examples if engine else 0,
    }


def _show(trace: Trace, size: str, scenario: Scenario, result: Result) -> None:
    cache_bytes = result.capacity_chunks * scenario.chunk_size
    rows: list[tuple[str, object]] = [
        ("trace", f"{common.printable(result.trace)}: {result.accesses:,} accesses to {result.unique_chunks:,} chunks"),
        ("cache", f"{size} = {result.capacity_chunks:,} chunks, {format_size(cache_bytes)}; {result.policy}"),
        ("hit rate", f"{result.hit_rate:.4f}"),
    ]
    if result.prefetch != "off":
        rows[-1] = ("hit rate", f"{result.hit_rate:.4f} (without prefetch {result.base_hit_rate:.4f})")
        rows += [
            ("prefetched", f"{result.prefetched:,} chunks"),
            ("accuracy", _figure(result.accuracy)),
            ("coverage", _figure(result.coverage)),
            ("traffic", f"{_figure(result.traffic)} times that without prefetch"),
        ]
        rows += [
            (f"  {name}", f"{counts.issued:,} issued, {counts.used:,} used, {counts.late:,} late, {counts.wasted:,} wasted")
            for name, counts in result.sources.items()
        ]
    if scenario.latency_s:
        without = f" (without prefetch {format_duration(result.base_stall_s)})" if result.prefetch != "off" else ""
        clock = "" if trace.timed else f"; the trace has no clock: a request every {format_duration(scenario.interval_s)}"
        rows.append(("stall time", f"{format_duration(result.stall_s)}{without}{clock}"))
    common.emit_table(rows)
    common.emit("")


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _chart(results: list[tuple[str, Scenario, Result]], sizes: tuple[str, ...]) -> str:
    from novafs.svgplot import bar_chart, line_chart

    traces = list(dict.fromkeys(result.trace for _, _, result in results))
    policies = list(dict.fromkeys(result.policy for _, _, result in results))
    by = {(result.trace, result.policy, size): result for size, _, result in results}
    with_prefetch = results[0][2].prefetch != "off"
    if len(sizes) > 1:
        lines = []
        for trace in traces:
            for policy in policies:
                row = [by[trace, policy, size] for size in sizes]
                lines.append((f"{trace} {policy}", [result.base_hit_rate for result in row]))
                if with_prefetch:
                    lines.append((f"{trace} {policy} + prefetch", [result.hit_rate for result in row]))
        return line_chart("Hit rate by cache size", sizes, lines, "hit rate; cache size as a share of the chunks, or in bytes")
    bars = []
    for policy in policies:
        column = [by[trace, policy, sizes[0]] for trace in traces]
        bars.append((policy, [result.base_hit_rate for result in column]))
        if with_prefetch:
            bars.append((f"{policy} + prefetch", [result.hit_rate for result in column]))
    return bar_chart(f"Hit rate, cache of {sizes[0]}", traces, bars, "hit rate")
