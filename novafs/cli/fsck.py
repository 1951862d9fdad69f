"""`novafs fsck`: check a volume, mend what can be mended, and tell what became of writes that could not be replayed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from novafs.cli import common
from novafs.cli.common import Settings
from novafs.cli.progress import phases
from novafs.config import Config
from novafs.units import format_size, parse_size

if TYPE_CHECKING:
    from novafs.fsck import FsckReport


@click.command()
@click.argument("volume")
@click.option("--repair", is_flag=True, help="Mend what can be mended without guessing.")
@click.option("--relink", is_flag=True, help="Give images without a name one in lost+found.")
@click.option("--step-back", is_flag=True, help="Let images whose newest generation cannot be read go back to the newest that can.")
@click.option("--scrub", is_flag=True, help="Read and verify every pack.")
@click.option("--rate", metavar="SIZE", help="Bytes per second that --scrub reads at most.")
@click.option("--apply-aside", type=click.Path(path_type=Path), metavar="FILE", help="Make a new image of writes that were kept aside.")
@click.option("--as", "as_name", metavar="IMAGE", help="Name of the new image of --apply-aside.")
@click.option("--image", "image_id", metavar="ID", help="Which image, where FILE has writes of several.")
@click.option("--onto", type=int, metavar="NUMBER", help="Apply to this generation instead of the one the writes belong on.")
@common.json_option
@common.volume_options
def fsck(
    volume: str,
    repair: bool,
    relink: bool,
    step_back: bool,
    scrub: bool,
    rate: str | None,
    apply_aside: Path | None,
    as_name: str | None,
    image_id: str | None,
    onto: int | None,
    as_json: bool,
    settings: Settings,
) -> int:
    """Check VOLUME. Exit status 0: all is well, 1: problems remain.

    Without options nothing is changed. Safe while hosts use the volume. With --apply-aside nothing is checked: the writes in FILE,
    applied to the generation they were made on, become the new image of --as; FILE and the old image stay as they are.
    """
    if (apply_aside is None) != (as_name is None):
        raise click.UsageError("--apply-aside FILE and --as IMAGE go together")
    if (image_id is not None or onto is not None) and apply_aside is None:
        raise click.UsageError("--image and --onto go with --apply-aside")
    if rate is not None and not scrub:
        raise click.UsageError("--rate goes with --scrub")
    config = common.without_l2(settings.load(volume))
    if apply_aside is not None:
        return _apply(config, apply_aside, str(as_name), image_id, onto, as_json)
    rate_bytes_s = parse_size(rate) if rate is not None else None
    options = {"repair": repair or relink or step_back, "relink": relink, "step_back": step_back, "scrub_packs": scrub}
    report = common.run(_check, config, {**options, "rate_bytes_s": rate_bytes_s})
    if as_json:
        common.emit_json(report.document())
    else:
        _show(report, scrub)
    return 1 if report.problems else 0


def _apply(config: Config, path: Path, name: str, image_id: str | None, onto: int | None, as_json: bool) -> int:
    from novafs.operations import perform

    result = common.run(lambda: perform(config, "apply_aside", path=str(path.absolute()), name=name, image_id=image_id, onto=onto))
    if as_json:
        common.emit_json(result)
    else:
        common.emit(
            f"{common.printable(result['image'])}: made; {common.printable(str(path))} stays, delete it when it is not needed any more"
        )
    return 0


async def _check(config: Config, options: dict[str, Any]) -> FsckReport:
    from novafs.fsck import FsckReport, check
    from novafs.fsckstart import check_start
    from novafs.objectstore.client import StoreClient
    from novafs.objectstore.url import open_store
    from novafs.volume import open_volume

    client = StoreClient(open_store(str(config.volume_url)), io_timeout_s=config.store.io_timeout_s)
    try:
        findings, repaired = await check_start(client, repair=options["repair"])
    finally:
        await client.aclose()
    if findings:
        return FsckReport(findings=findings, repaired=repaired)
    read_only = not (options["repair"] or options["scrub_packs"])
    with phases("fsck") as progress:
        async with open_volume(config, read_only=read_only) as volume:
            report = await check(volume, **options, progress=progress)
    report.repaired = [*repaired, *report.repaired]
    return report


def _show(report: FsckReport, scrub: bool) -> None:
    for done in report.repaired:
        common.emit(f"repaired: {common.printable(done)}")
    for finding in report.findings:
        common.emit(f"{'problem' if finding.problem else 'note'}: {common.printable(finding.message)}")
    if report.examined:
        rows: list[tuple[str, object]] = [
            ("checked", f"{report.images:,} images, {report.snapshots:,} snapshots, {report.directories + 1:,} directories"),
            ("", f"{report.generations:,} generations, {report.map_nodes:,} map nodes, {report.packs:,} packs"),
            ("stored", common.with_bytes(report.stored_bytes)),
        ]
        if scrub:
            size = format_size(report.scrubbed_bytes)
            rows.append(("verified", f"{report.scrubbed_frames:,} frames in {report.scrubbed_packs:,} packs, {size}"))
        common.emit_table(rows)
    problems = len(report.problems)
    common.emit(f"{problems} problems remain" if problems else "no problems")
