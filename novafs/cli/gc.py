"""`novafs gc`: free what nothing needs any more."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from novafs.cli import common
from novafs.cli.common import Settings
from novafs.cli.progress import phases
from novafs.config import Config
from novafs.units import format_duration, format_size

if TYPE_CHECKING:
    from novafs.gc import GcReport


@click.command()
@click.argument("volume")
@click.option("--dry-run", is_flag=True, help="Only tell what would be done.")
@click.option("--grace", metavar="TIME", help="How long what nothing names is kept, instead of gc.grace.")
@click.option("--all", "everything", is_flag=True, help="Free unreferenced packs although the volume is under l3.capacity.")
@common.json_option
@common.volume_options
def gc(volume: str, dry_run: bool, grace: str | None, everything: bool, as_json: bool, settings: Settings) -> int:
    """Free what no image, snapshot or open handle of VOLUME needs.

    Superseded generations go after gc.grace. Packs are deleted in two runs at least gc.grace apart: the first condemns them, the
    second deletes what is dead still. Packs that are less than half in use are rewritten. Unreferenced packs are kept as long as the
    volume holds less than l3.capacity, because what is in them may be written again. Safe while other hosts write; may be
    interrupted and run again.
    """
    from novafs.units import parse_duration

    grace_s = parse_duration(grace) if grace is not None else None
    report = common.run(_collect, common.without_l2(settings.load(volume)), dry_run, grace_s, everything)
    if as_json:
        common.emit_json(asdict(report))
    else:
        _show(report)
    return 0 if report.complete and not report.problems else 1


async def _collect(config: Config, dry_run: bool, grace_s: float | None, everything: bool) -> GcReport:
    from novafs.gc import collect
    from novafs.volume import open_volume

    with phases("gc") as progress:
        async with open_volume(config, read_only=dry_run) as volume:
            return await collect(volume, dry_run=dry_run, grace_s=grace_s, everything=everything, progress=progress)


def _show(report: GcReport) -> None:
    for problem in report.problems:
        common.say(common.printable(problem))
    if not report.complete:
        common.say("nothing was freed: not all that must be kept could be read; run 'novafs fsck'")
    would = "would be " if report.dry_run else ""
    rows: list[tuple[str, object]] = [
        ("images", f"{report.images:,}, {report.snapshots:,} snapshots, {report.generations:,} generations"),
        ("references", f"{report.references:,} to {report.unique_chunks:,} chunks, dedup {common.ratio(report.dedup_ratio)}"),
        ("saved by dedup", common.with_bytes(report.saved_bytes)),
        ("references of a chunk", ", ".join(f"{many}: {count:,}" for many, count in report.histogram.items()) or "none"),
        ("stored", f"{common.with_bytes(report.stored_bytes)} in {report.packs:,} packs, {format_size(report.live_bytes)} of it in use"),
    ]
    expired = f"expired{' (would go)' if report.dry_run else ''}"
    rows += [(expired, common.printable(path)) for path in report.expired]
    rows += [
        (
            f"{would}deleted",
            f"{report.generations_deleted:,} generations, {report.catalogs_deleted:,} catalogs, {report.packs_deleted:,} packs",
        ),
        (f"{would}freed", common.with_bytes(report.freed_bytes)),
        (f"{would}compacted", f"{report.packs_compacted:,} packs, {format_size(report.copied_bytes)} copied"),
        (
            "condemned",
            f"{report.packs_condemned:,} packs, {format_size(report.condemned_bytes)}, freed by a run at least "
            f"{format_duration(report.grace_s)} after the one that condemned them",
        ),
        ("kept for dedup", f"{report.packs_kept:,} packs that nothing refers to"),
        ("took", format_duration(report.seconds)),
    ]
    common.emit_table(rows)
