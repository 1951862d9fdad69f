"""`fsck`: is everything there that should be, and can it be read; what is wrong, what it touches, what may be done.

Checked are the catalog's tree, every retained generation and all nodes of its map, that each referenced frame is listed by its
pack's footer, all other footers, leases, pins, forwards, the condemned list, objects that are none of ours, journals kept
aside and temporary files; with `scrub`, the content of every frame. Each state that a crash can leave has its row in
docs/crash-safety.md: most are no defect, and are not mentioned here.

`repair` mends what can be mended without guessing (`novafs.fsckrepair`), and nothing else; then all is checked again,
so what is reported as a problem is what remains.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import trio

from novafs import durable, pack
from novafs.aside import AsideFile, list_aside
from novafs.chunk import Reference
from novafs.condemned import CondemnedHead, mark_damaged, read_condemned
from novafs.errors import CorruptionError, ObjectCorruptError, ObjectNotFoundError
from novafs.forward import chunk_ids
from novafs.fsckrepair import Repair, temp_dirs
from novafs.mapwalk import Touched, find_touched, is_bad
from novafs.packcount import PackCount
from novafs.retention import Progress, Retention, no_progress, walk
from novafs.scrub import ScrubResult, scrub
from novafs.units import format_size

if TYPE_CHECKING:
    from novafs.volume import Volume

PREFIXES: Final = (
    "catalog/",
    "condemned/",
    "forward/",
    "handoffs/",
    "images/",
    "leases/",
    "models/",
    "packs/",
    "pins/",
    "probe/",
    "wants/",
)
"""Where our objects lie, in the order of names."""
STRAYS_MAX: Final = 1000
TOUCHED_MAX: Final = 10_000


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was found. problem: it should be otherwise; else it is a note for the operator."""

    kind: str
    name: str
    message: str
    problem: bool = True


@dataclass(slots=True)
class FsckReport:
    """What was looked at, what was found, and what was done about it. touched: ranges of images that can not be read."""

    examined: bool = False
    """False: the volume could not be opened."""
    findings: list[Finding] = field(default_factory=list)
    repaired: list[str] = field(default_factory=list)
    touched: list[Touched] = field(default_factory=list)
    aside: list[AsideFile] = field(default_factory=list)
    images: int = 0
    snapshots: int = 0
    directories: int = 0
    generations: int = 0
    map_nodes: int = 0
    packs: int = 0
    stored_bytes: int = 0
    scrubbed_packs: int = 0
    scrubbed_bytes: int = 0
    scrubbed_frames: int = 0
    damaged_frames: int = 0

    @property
    def problems(self) -> list[Finding]:
        """What remains to be put right."""
        return [finding for finding in self.findings if finding.problem]

    def document(self) -> dict[str, Any]:
        """The report as JSON shows it."""
        found = asdict(self)
        found["touched"] = [touched._asdict() for touched in self.touched]
        for row in found["aside"]:
            row["image_id"], row["journal_id"] = row["image_id"].hex(), row["journal_id"].hex()
        found["problems"] = len(self.problems)
        return found


async def check(
    volume: Volume,
    *,
    repair: bool = False,
    relink: bool = False,
    step_back: bool = False,
    scrub_packs: bool = False,
    rate_bytes_s: float | None = None,
    progress: Progress = no_progress,
) -> FsckReport:
    """Check a volume that could be opened (`novafs.fsckstart` is for the others).

    repair: mend what needs no guess; relink: and give images without a name one in lost+found; step_back: and give images
    whose newest generation can not be read the newest one that can. scrub_packs: verify the content of all packs, reading no more than
    rate_bytes_s. Damage that a scrub finds is noted for good, unless the volume is open read-only. Raises what the store raises.
    """
    if repair or relink or step_back:
        volume.check_writable()
    report = FsckReport(examined=True)
    examination = _Examination(volume, report, progress)
    scrubbed: ScrubResult | None = None
    await examination.walk()
    if scrub_packs:
        scrubbed = await scrub(volume, examination.found.packs, rate_bytes_s=rate_bytes_s, progress=progress)
        await _note_damage(volume, scrubbed)
        report.scrubbed_packs, report.scrubbed_bytes, report.scrubbed_frames = scrubbed.packs, scrubbed.read_bytes, scrubbed.frames
    await examination.look(scrubbed)
    if repair or relink or step_back:
        mending = Repair(volume, examination.found, examination.bad, relink=relink, step_back=step_back)
        report.repaired = await mending.run()
        if report.repaired:
            await examination.walk()
            await examination.look(scrubbed)
    return report


async def _note_damage(volume: Volume, scrubbed: ScrubResult) -> None:
    damaged = scrubbed.damaged
    if not damaged:
        return
    by_pack: dict[bytes, list[bytes]] = {}
    for reference in damaged:
        by_pack.setdefault(reference.pack_id, []).append(reference.chunk_id)
    for pack_id, found in by_pack.items():
        await trio.to_thread.run_sync(volume.dedup.index.forget, found, pack_id)
    if not volume.read_only:
        await mark_damaged(volume.client, [(r.pack_id, r.chunk_id) for r in damaged], grace_s=volume.grace_s)
        await volume.dedup.condemned.refresh(0)


class _Examination:
    """What one look at the volume finds; may be repeated after a repair."""

    def __init__(self, volume: Volume, report: FsckReport, progress: Progress) -> None:
        self._volume = volume
        self._report = report
        self._progress = progress
        self.found: Retention
        self.bad: dict[bytes, dict[int, Reference]] = {}
        """Frames that are referred to and can not be read: pack id -> offset -> reference, at final places."""

    def _add(self, kind: str, name: str, message: str, *, problem: bool = True) -> None:
        self._report.findings.append(Finding(kind, name, message, problem))

    async def walk(self) -> None:
        """Everything that is retained, and every footer."""
        await self._volume.catalog.refresh()
        self.found = await walk(self._volume, grace_s=self._volume.grace_s, progress=self._progress)
        await self.found.packs.load_footers(self._progress)

    async def look(self, scrubbed: ScrubResult | None) -> None:
        """Say what is wrong."""
        report, found = self._report, self.found
        report.findings, report.touched, self.bad = [], [], {}
        report.images = sum(root.visible for root in found.images.values())
        report.snapshots = sum(len(root.snapshots) for root in found.images.values())
        report.directories, report.map_nodes = found.directories, found.nodes
        report.generations = sum(len(root.retained) for root in found.images.values())
        report.packs = sum(p.listed for p in found.packs)
        report.stored_bytes = found.packs.stored_bytes
        for problem in found.problems:
            self._add(problem.kind, problem.name, problem.message)
        condemned = await self._condemned()
        self._packs()
        await self._damaged(condemned, scrubbed)
        await self._deltas()
        await self._touched()
        self._images()
        self._leftovers(condemned)
        await self._strays()
        await self._local()

    async def _condemned(self) -> CondemnedHead | None:
        try:
            return await read_condemned(self._volume.client)
        except ObjectCorruptError as error:
            self._add("condemned", "condemned/", f"{error}; until then nothing is deduplicated; --repair goes back to what was before it")
            return None

    def _packs(self) -> None:
        packs = self.found.packs
        for known in packs:
            if known.footer_error:
                name = pack.pack_name(known.pack_id)
                self._add("pack", name, f"{known.footer_error}; --repair moves what is referred to in it")
        counts: Counter[tuple[bytes, str]] = Counter()
        for broken in packs.broken.values():
            counts[(broken.reference.pack_id, broken.reason)] += 1
            if broken.reference.pack_id in packs:
                continue  # its footer does not tell of it, but it may well be there
            self.bad.setdefault(broken.reference.pack_id, {})[broken.reference.offset] = broken.reference
        for (pack_id, reason), count in counts.items():
            name = pack.pack_name(pack_id)
            self._add("pack", name, f"{name}: {count} frames in it are referred to: {reason}")
        if packs.broken_count > len(packs.broken):
            self._add("pack", "packs/", f"packs/: {packs.broken_count} references lead nowhere in all")

    async def _damaged(self, condemned: CondemnedHead | None, scrubbed: ScrubResult | None) -> None:
        """Frames whose content is wrong, by this scrub or an earlier one."""
        wanted: dict[bytes, set[bytes]] = {}
        for pack_id, ids in (condemned.damaged if condemned is not None else {}).items():
            wanted.setdefault(pack_id, set()).update(ids)
        for reference in scrubbed.damaged if scrubbed is not None else ():
            wanted.setdefault(reference.pack_id, set()).add(reference.chunk_id)
        self._report.damaged_frames = sum(len(ids) for ids in wanted.values())
        for pack_id, chunks in wanted.items():
            live = await self._live_frames(pack_id, chunks)
            name = pack.pack_name(pack_id)
            if live:
                self._add("frame", name, f"{name}: {len(live)} damaged frames in it are referred to")
                self.bad.setdefault(pack_id, {}).update({reference.offset: reference for reference in live})
            if len(chunks) > len(live) and pack_id in self.found.packs:
                self._add("frame", name, f"{name}: {len(chunks) - len(live)} damaged frames in it, which nothing refers to", problem=False)

    async def _deltas(self) -> None:
        """What can not be read because a frame that it was made against can not be; healed with that, or by another copy."""
        found = self.found
        while True:
            bad = {pack_id: set(frames) for pack_id, frames in self.bad.items()}
            if not bad:
                return
            more: dict[bytes, dict[int, Reference]] = {}
            for known in found.packs:
                # mypy can not tell the type of a lambda that binds a name by its default.
                over = set(known.frames_over(lambda rows, bad=bad: is_bad(found.forwards.resolve(rows), bad)))  # type: ignore[misc]
                if lost := over - bad.get(known.pack_id, set()):
                    live = await self._live(known)
                    more[known.pack_id] = {reference.offset: reference for reference in live if reference.offset in lost}
            if not any(more.values()):
                return
            for pack_id, frames in more.items():
                self.bad.setdefault(pack_id, {}).update(frames)
                name = pack.pack_name(pack_id)
                self._add("frame", name, f"{name}: {len(frames)} frames in it were made against others that are missing or damaged")

    async def _live(self, known: PackCount) -> list[Reference]:
        try:
            footer = await pack.read_footer_bytes(known.pack_id, known.info.size, self._volume.client.get)
        except (CorruptionError, ObjectNotFoundError):
            return []
        return [row.reference for row in self.found.packs.live_rows(known, footer)]

    async def _live_frames(self, pack_id: bytes, ids: set[bytes]) -> list[Reference]:
        known = self.found.packs.packs.get(pack_id)
        if known is None or not known.referenced:
            return []
        if not known.loaded:
            unlisted = self.found.packs.unlisted.get(pack_id, {})
            return [reference for reference in unlisted.values() if reference.chunk_id in ids]
        try:
            footer = await pack.read_footer_bytes(known.pack_id, known.info.size, self._volume.client.get)
        except (CorruptionError, ObjectNotFoundError):
            return []
        rows = np.frombuffer(footer, dtype=pack.FOOTER_DTYPE)
        if not np.isin(chunk_ids(rows), np.array(sorted(ids), dtype="S32")).any():
            return []
        return [row.reference for row in self.found.packs.live_rows(known, footer) if row.reference.chunk_id in ids]

    async def _touched(self) -> None:
        if not self.bad and not self.found.bad_nodes:
            return
        offsets: Mapping[bytes, set[int]] = {pack_id: set(frames) for pack_id, frames in self.bad.items()}
        async for touched in find_touched(self._volume, self.found, offsets, "its frame is missing or damaged"):
            if len(self._report.touched) < TOUCHED_MAX:
                self._report.touched.append(touched)
                snapshot = f" (snapshot {touched.snapshot})" if touched.snapshot else ""
                self._add(
                    "image",
                    touched.path,
                    f"{touched.path}{snapshot}: {touched.length} bytes from byte {touched.offset} can not be read: {touched.reason}",
                )

    def _images(self) -> None:
        for root in self.found.images.values():
            if root.named or not root.generations:
                continue
            why = (
                "a host writes it ('novafs lease break' where that host is dead)"
                if root.leased
                else "a host has it open"
                if root.pinned
                else "an import may be under way"
                if root.newest_s > self.found.cutoff_s
                else "the next collection removes it; --relink gives it a name in lost+found"
            )
            name = root.image_id.hex()
            self._add("image", name, f"image {name}: {format_size(root.size)}, has no name: {why}", problem=False)

    def _leftovers(self, condemned: CondemnedHead | None) -> None:
        found = self.found
        for pack_id, count in found.forwards.dangling.items():
            self._add("forward", f"forward/{pack_id.hex()}", f"forward of pack {pack_id.hex()}: {count} rows lead nowhere", problem=False)
        notes = len(found.doomed.notes)
        if notes:
            self._add("notes", "pins/, wants/, probe/", f"{notes} notes of hosts that are gone; a collection removes them", problem=False)
        if condemned is not None:
            claimed = [p for p, row in condemned.packs.items() if row.claimed_s and p in found.packs and found.packs.packs[p].listed]
            if claimed:
                message = f"{len(claimed)} packs are claimed and not deleted yet; 'novafs gc' goes on"
                self._add("condemned", "condemned/", message, problem=False)

    async def _strays(self) -> None:
        """Objects that are none of ours: among ours, and beside them."""
        strays = [*self.found.strays, *self.found.packs.strays]
        after = ""
        while len(strays) < STRAYS_MAX:
            page = await self._volume.client.list("", after=after, limit=1)
            if not page:
                break
            name = page[0].name
            prefix = next((p for p in PREFIXES if name.startswith(p)), None)
            if prefix is not None:
                after = prefix[:-1] + "0"  # "0" follows "/": the first name behind all that have the prefix
                continue
            after = name
            if name != "novafs.json":
                strays.append(name)
        for name in strays:
            self._add("stray", name, f"{name}: is no object of NovaFS; nothing here needs it", problem=False)

    async def _local(self) -> None:
        """What lies on this host."""
        state_dir = self._volume.config.state_dir
        self._report.aside = await trio.to_thread.run_sync(list_aside, state_dir)
        for kept in self._report.aside:
            self._add("aside", kept.path, _aside_message(kept), problem=False)
        temps = await trio.to_thread.run_sync(lambda: sum(_old_temps(path) for path in temp_dirs(self._volume)))
        if temps:
            self._add("temporary", str(state_dir), f"{temps} temporary files that a crash left; --repair removes them", problem=False)


def _aside_message(kept: AsideFile) -> str:
    if not kept.writes:
        return f"{kept.path}: a damaged part of the journal, in which no write can be read; keep it for analysis, or delete it"
    damage = "; more of it is damaged and can not be read" if kept.damaged else ""
    return (
        f"{kept.path}: {kept.writes} fsynced writes ({format_size(kept.bytes)}) to image {kept.image_id.hex()} that are in no generation"
        f"{damage}. To see them as an image of their own: 'novafs fsck VOLUME --apply-aside {kept.path} --as NEWNAME'; to discard them, "
        f"delete the file"
    )


def _old_temps(directory: Path) -> int:
    """Temporary files there that no writer can be busy with any more."""
    limit_s = time.time() - durable.TEMP_AGE_S
    count = 0
    with contextlib.suppress(FileNotFoundError):
        for path in directory.iterdir():
            with contextlib.suppress(FileNotFoundError):
                count += path.name.startswith(durable.TEMP_PREFIX) and path.lstat().st_mtime <= limit_s
    return count
