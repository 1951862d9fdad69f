"""Collection: what nothing retained refers to is deleted, in two passes at least a grace apart (design 5.8).

One run does, in this order:

    expire      images whose time is over lose their names (a commit of the catalog)
    walk        what is retained, and what refers to which frame (`novafs.retention`)
    delete      superseded catalogs, then generations, then lease epochs and notes: in the reverse of the order they are made
    compact     packs less than half live (`novafs.compact`): copy, verify, forward
    condemn     ONE commit of `condemned/<rev>` says what is newly condemned, and claims what was condemned at least a
                grace before the walk began and is dead still
    sweep       packs that were claimed, and forwards and lists that nobody needs any more

Why nothing live is deleted. A claim of pack P needs a row that says since when P is condemned (the store's own time of
the list that added it), a walk that began a grace later, saw everything retained (`Retention.complete`), and found no
reference to P. A reference that the walk did not see would have to be made after it had begun. By a dedup hit it can not
be: whoever looked P up did so before P was on the list (or has read it since, and does not hit), so his commit began a
grace before the walk; commits that last longer than half of that look at their packs again after the answer, and store
everything once more where one is condemned or gone (`novafs.packwriter`). From another root (a clone, a snapshot, a
rollback) it can not be either: what the root was copied from was retained when the walk began, or had been deleted
before P was condemned, which whoever copies looks for (`novafs.snapshots`).

What a delta frame was made against is referred to by it (`novafs.delta`): the writer took it from the head of the image that it writes,
which was retained like everything that goes from one generation to the next, and nothing else ever makes a reference to a delta frame.

Two collectors at once are safe, only wasteful: generations and catalogs that both delete are older than the grace for
both; packs are deleted by claim alone, claims and returns to life are commits of one chain, so a row is either claimed
or taken back, never both; a row that one of them did not know when its walk began it leaves alone. Of two
forwards for one pack, the one that was created first counts.

Killed anywhere, a run leaves what the next one expects: names without much behind them go first, claims that were not
carried out are carried out, copies without a forward are dead packs.

Dead packs are kept as dedup candidates while the volume holds less than `l3.capacity`; beyond it those leave first that are least
likely to be written again (`novafs.packscore`). What is referred to never leaves, whatever the capacity.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Final

import msgspec

from novafs import pack
from novafs.catalogtree import Entry
from novafs.compact import Candidate, Compaction, compact, put_forwards_right
from novafs.condemned import PREFIX as CONDEMNED_PREFIX
from novafs.condemned import CondemnedHead, CondemnedPack, edit_condemned, mark_damaged, read_condemned
from novafs.errors import ConfigError, NotFoundError, ObjectNotFoundError
from novafs.objectstore.base import ObjectInfo
from novafs.packcount import CountFigures, PackCount
from novafs.packscore import Past, dump_pasts, known_shares, load_pasts, next_past, worth
from novafs.retention import CLOCK_SLACK_S, Progress, Retention, no_progress, walk
from novafs.revisions import counter_of, writers_grace_s

if TYPE_CHECKING:
    from novafs.catalog import Changes
    from novafs.volume import Volume

log = logging.getLogger(__name__)

DELETE_BATCH: Final = 500
EXPIRE_BATCH: Final = 1000
"""Names that one commit of the catalog takes away."""
COMPACT_PACKS_MAX: Final = 4096
"""Packs that one run compacts at most: bounds its memory, and how long it takes."""


@dataclass(slots=True)
class GcReport:
    """What a run found and did; under `dry_run`, what it would have done.

    complete: everything retained could be read; else nothing was freed, and `problems` says why. references, unique_chunks: of images and
    snapshots as they are now; saved_bytes: what dedup keeps from being stored; histogram: number of references -> chunks.
    packs_live: that something refers to; packs_kept: dead, kept as dedup candidates or because they are young; packs_condemned: dead and
    waiting for a grace to pass, packs_newly_condemned of them since this run. freed_bytes: of packs deleted by this run.
    """

    dry_run: bool
    grace_s: float
    complete: bool = True
    problems: list[str] = field(default_factory=list)
    expired: list[str] = field(default_factory=list)
    images: int = 0
    snapshots: int = 0
    generations: int = 0
    references: int = 0
    unique_chunks: int = 0
    unique_bytes: int = 0
    dedup_ratio: float = 1.0
    saved_bytes: int = 0
    histogram: dict[str, int] = field(default_factory=dict)
    packs: int = 0
    stored_bytes: int = 0
    live_bytes: int = 0
    packs_live: int = 0
    packs_kept: int = 0
    packs_condemned: int = 0
    packs_newly_condemned: int = 0
    packs_compacted: int = 0
    packs_deleted: int = 0
    copied_bytes: int = 0
    condemned_bytes: int = 0
    freed_bytes: int = 0
    catalogs_deleted: int = 0
    generations_deleted: int = 0
    notes_deleted: int = 0
    forwards: int = 0
    forwards_deleted: int = 0
    damaged_frames: int = 0
    seconds: float = 0.0

    def summary(self) -> dict[str, float]:
        """The figures that every host may want to export: numbers alone. ended_s: epoch seconds."""
        numbers = {k: float(v) for k, v in asdict(self).items() if isinstance(v, (int, float)) and not isinstance(v, bool)}
        return {
            **numbers,
            "ended_s": time.time(),
            **{f"chunks_with_references_{many}": float(count) for many, count in self.histogram.items()},
        }


async def collect(
    volume: Volume,
    *,
    dry_run: bool = False,
    grace_s: float | None = None,
    everything: bool = False,
    progress: Progress = no_progress,
) -> GcReport:
    """One collection. grace_s: instead of the configured one; everything: dead packs are condemned although there is room.

    Safe beside writers, and beside other collections. Raises ConfigError (a grace shorter than writers count with),
    ReadOnlyError, and what the store raises: then it can be run again.
    """
    grace_s = volume.grace_s if grace_s is None else grace_s
    if grace_s < writers_grace_s(volume.grace_s):
        raise ConfigError(
            f"grace {grace_s:g} s: writers of this volume count with {writers_grace_s(volume.grace_s):g} s, so what they refer to could be "
            f"deleted; to use a shorter one set gc.grace on every host that writes the volume, and here (--set gc.grace=…)"
        )
    if not dry_run:
        volume.check_writable()
    collection = _Collection(volume, GcReport(dry_run, grace_s), grace_s, everything, progress)
    return await collection.run()


class _Collection:
    """The steps of `collect`."""

    def __init__(self, volume: Volume, report: GcReport, grace_s: float, everything: bool, progress: Progress) -> None:
        self._volume = volume
        self._client = volume.client
        self._report = report
        self._grace_s = grace_s
        self._everything = everything
        self._progress = progress
        self._claims: list[PackCount] = []

    async def run(self) -> GcReport:
        report, began_s = self._report, time.monotonic()
        report.expired = await self._expire(await self._client.clock_s())
        before = await read_condemned(self._client)
        found = await walk(self._volume, grace_s=self._grace_s, progress=self._progress)
        self._note(found)
        if found.complete:
            await self._delete_doomed(found)
            moved = await self._compact(found, before)
            condemned = await self._condemn(found, before, moved)
            await self._sweep(found, moved)
            self._count(found, condemned)
        report.seconds = time.monotonic() - began_s
        return report

    # -- expiry -------------------------------------------------------------------------------------------------

    async def _expire(self, now_s: float) -> list[str]:
        catalog = self._volume.catalog
        await catalog.refresh()
        over = [entry async for entry in catalog.walk() if entry.expires_s is not None and entry.expires_s <= now_s]
        paths = {entry.node_id: catalog.path_of(entry) for entry in over}
        if self._report.dry_run:
            return list(paths.values())
        gone: list[str] = []
        for start in range(0, len(over), EXPIRE_BATCH):

            async def operation(changes: Changes, part: Sequence[Entry] = over[start : start + EXPIRE_BATCH]) -> list[Entry]:
                return await _remove_expired(changes, [entry.node_id for entry in part], now_s)

            for removed in await catalog.change(operation):
                self._volume._note_unlinked(removed)
                gone.append(paths[removed.node_id])
        return gone

    # -- what the walk found ------------------------------------------------------------------------------------

    def _note(self, found: Retention) -> None:
        report = self._report
        report.complete = found.complete
        report.problems = [problem.message for problem in found.problems]
        if found.packs.broken_count:
            report.problems.append(
                f"{found.packs.broken_count} references lead to packs or frames that are not there; 'novafs fsck' tells what they touch"
            )
        figures: CountFigures = found.packs.figures()
        report.images = sum(root.visible for root in found.images.values())
        report.snapshots = sum(len(root.snapshots) for root in found.images.values())
        report.generations = sum(len(root.retained) for root in found.images.values())
        report.references, report.unique_chunks = figures.references, figures.unique_chunks
        report.unique_bytes = figures.unique_bytes
        report.saved_bytes = figures.referenced_bytes - figures.unique_bytes
        report.dedup_ratio = figures.references / figures.unique_chunks if figures.unique_chunks else 1.0
        report.histogram = figures.histogram
        listed = [p for p in found.packs if p.listed]
        report.packs = len(listed)
        report.stored_bytes = sum(p.info.size for p in listed)
        report.packs_live = sum(p.referenced for p in listed)
        report.live_bytes = sum(p.live_bytes for p in listed if p.referenced)

    async def _delete_doomed(self, found: Retention) -> None:
        """Before anything is condemned: whoever copies a root that is still there can rely on what it refers to."""
        doomed, report = found.doomed, self._report
        report.catalogs_deleted = len(doomed.catalogs)
        report.generations_deleted = len(doomed.generations)
        report.notes_deleted = len(doomed.leases) + len(doomed.notes)
        for names in (doomed.catalogs, doomed.generations, doomed.leases, doomed.notes):
            await self._delete(names)

    async def _delete(self, names: Sequence[str]) -> None:
        if self._report.dry_run:
            return
        for start in range(0, len(names), DELETE_BATCH):
            await self._client.delete_many(names[start : start + DELETE_BATCH])

    # -- compaction ---------------------------------------------------------------------------------------------

    async def _compact(self, found: Retention, before: CondemnedHead) -> Compaction:
        """Move what is live out of packs that are mostly not, and make forwards name final places."""
        candidates = [
            p
            for p in found.packs
            if p.listed
            and p.referenced
            and p.loaded
            and not p.opaque
            and p.info.modified_s <= found.cutoff_s
            and p.pack_id not in before.packs
            and 2 * p.live_bytes < p.payload_bytes
        ]
        candidates.sort(key=lambda p: p.info.modified_s)  # what was written together stays together
        if self._report.dry_run:
            self._report.packs_compacted = len(candidates)
            return Compaction()
        if len(candidates) > COMPACT_PACKS_MAX:
            log.info("%d packs are less than half live; %d of them are compacted by this run", len(candidates), COMPACT_PACKS_MAX)
        moved = await compact(self._volume, found.forwards, self._candidates(found, before, candidates[:COMPACT_PACKS_MAX]))
        self._report.packs_compacted = len(moved.moved)
        self._report.copied_bytes = moved.copied_bytes
        self._report.damaged_frames = len(moved.damaged)
        if moved.damaged:
            self._report.problems.append(f"{len(moved.damaged)} damaged frames were found; 'novafs fsck --scrub' tells what they touch")
            await mark_damaged(self._client, [(r.pack_id, r.chunk_id) for r in moved.damaged], grace_s=self._volume.grace_s)
        needed = self._needed_forwards(found, moved)
        await put_forwards_right(self._volume, found.forwards, needed & set(found.forwards.heads), moved.moved)
        return moved

    async def _candidates(self, found: Retention, before: CondemnedHead, packs: Sequence[PackCount]) -> AsyncIterator[Candidate]:
        for number, candidate in enumerate(packs):
            try:
                footer = await pack.read_footer_bytes(candidate.pack_id, candidate.info.size, self._client.get)
            except ObjectNotFoundError:
                continue  # another collection was faster
            live = [row.reference for row in found.packs.live_rows(candidate, footer)]
            # What is known to be damaged is not tried: it keeps its pack.
            damaged = before.damaged.get(candidate.pack_id, frozenset())
            good = [reference for reference in live if reference.chunk_id not in damaged]
            if good:
                yield Candidate(candidate.pack_id, good, whole=len(good) == len(live))
            self._progress("packs", number + 1)

    def _needed_forwards(self, found: Retention, moved: Compaction) -> set[bytes]:
        """Packs whose forward somebody may ask for: maps name them, or other forwards do, or it was made just now."""
        forwards = found.forwards
        named = forwards.named | set(moved.moved)
        others = (targets for pack_id, targets in forwards.targets.items() if pack_id in named)
        while more := set().union(*others) & set(forwards.heads) - named:
            named |= more
            others = (forwards.targets.get(pack_id, set()) for pack_id in more)
        return named

    # -- condemning ---------------------------------------------------------------------------------------------

    async def _condemn(self, found: Retention, before: CondemnedHead, moved: Compaction) -> CondemnedHead:
        dead = [p for p in found.packs if p.listed and not p.referenced]
        dying: dict[bytes, PackCount] = {p.pack_id: p for p in found.packs if p.pack_id in moved.emptied}
        pasts = self._pasts(found, before)
        dying.update((p.pack_id, p) for p in await self._choose(found, before, dead, dying.values(), pasts))
        if self._report.dry_run:
            wanted = self._edited(before, found, before, dying)
        else:
            needed = self._needed_forwards(found, moved)

            def edit(base: CondemnedHead) -> CondemnedHead:
                return self._edited(base, found, before, dying)._replace(
                    moved=frozenset(needed & set(found.forwards.heads)),
                    summary={**self._report.summary(), "started_s": found.started_s},
                    past=dump_pasts(pasts),
                )

            wanted = await edit_condemned(self._client, edit, grace_s=self._volume.grace_s)
        self._report.packs_newly_condemned = sum(p not in before.packs for p in wanted.packs if p in dying)
        return wanted

    def _pasts(self, found: Retention, before: CondemnedHead) -> dict[bytes, Past]:
        """What is known of packs that are dead, or were and came back to life."""
        old = load_pasts(before.past)
        collected_s = before.summary.get("started_s", 0.0)
        pasts = {
            p.pack_id: next_past(p, old.get(p.pack_id), now_s=found.started_s, collected_s=collected_s) for p in found.packs if p.listed
        }
        return {pack_id: past for pack_id, past in pasts.items() if past is not None}

    async def _choose(
        self,
        found: Retention,
        before: CondemnedHead,
        dead: Sequence[PackCount],
        dying: Iterable[PackCount],
        pasts: Mapping[bytes, Past],
    ) -> list[PackCount]:
        """Dead packs to condemn: those that were moved, and, least worth first, as many as the volume holds too much."""
        old = [p for p in dead if p.info.modified_s <= found.cutoff_s and p.pack_id not in before.packs]
        if self._everything:
            return old
        chosen = [p for p in old if p.pack_id in found.forwards.heads]
        condemned = (p for p in found.packs if p.listed and p.pack_id in before.packs)
        leaving = sum(p.info.size for p in (*chosen, *dying, *condemned))
        excess = found.packs.stored_bytes - leaving - self._volume.config.l3.capacity_bytes
        if excess <= 0:
            return chosen
        rest = sorted((p for p in old if p.pack_id not in found.forwards.heads), key=lambda p: (pasts[p.pack_id].used_s, p.info.modified_s))
        known = await known_shares(self._client, rest)

        def score(candidate: PackCount) -> float:
            return worth(candidate.info.size, pasts[candidate.pack_id], known.get(candidate.pack_id, 0.0), now_s=found.started_s)

        for candidate in sorted(rest, key=score):
            if excess <= 0:
                break
            chosen.append(candidate)
            excess -= candidate.info.size
        return chosen

    def _edited(self, base: CondemnedHead, found: Retention, before: CondemnedHead, dying: dict[bytes, PackCount]) -> CondemnedHead:
        """The list after this run, from the newest one; fills `_claims`."""
        self._claims = []
        rows: dict[bytes, CondemnedPack] = {}
        damaged = dict(base.damaged)
        for pack_id, row in base.packs.items():
            known = found.packs.packs.get(pack_id)
            if before.packs.get(pack_id) != row:
                rows[pack_id] = row  # it came, or changed, while this run walked: another collection's
            elif known is None or not known.listed:
                # Gone. The row stays for a while after the claim, for writers that looked at the pack before.
                if not row.claimed_s:
                    rows[pack_id] = msgspec.structs.replace(row, claimed_s=found.started_s)
                elif row.claimed_s > found.started_s - 2 * self._grace_s:
                    rows[pack_id] = row
                else:
                    damaged.pop(pack_id, None)
            elif known.referenced and pack_id not in dying:
                if row.claimed_s:
                    rows[pack_id] = row
                    self._report.problems.append(f"pack {pack_id.hex()}: is referred to, and was claimed for deletion; it is left alone")
            elif row.claimed_s or (
                row.since_s + self._grace_s + CLOCK_SLACK_S <= found.started_s and known.info.modified_s <= found.cutoff_s
            ):
                rows[pack_id] = row if row.claimed_s else msgspec.structs.replace(row, claimed_s=found.started_s)
                self._claims.append(known)
            else:
                rows[pack_id] = row
        self._report.packs_deleted = len(self._claims)
        self._report.freed_bytes = sum(p.info.size for p in self._claims)
        for pack_id in dying:
            rows.setdefault(pack_id, CondemnedPack(pack_id))
        return base._replace(packs=rows, damaged=damaged)

    # -- sweeping -----------------------------------------------------------------------------------------------

    async def _sweep(self, found: Retention, moved: Compaction) -> None:
        await self._delete([p.info.name for p in self._claims])
        needed = self._needed_forwards(found, moved)
        names: list[str] = []
        for pack_id, infos in found.forwards.objects.items():
            self._report.forwards += pack_id in needed
            if pack_id in needed or infos[0].modified_s > found.cutoff_s:
                names += _superseded(infos, found.cutoff_s)
            else:
                names += [info.name for info in infos]
        self._report.forwards += len(moved.moved.keys() - found.forwards.objects.keys())
        self._report.forwards_deleted = len(names)
        await self._delete(names)
        infos = [info for info in await self._client.list(CONDEMNED_PREFIX) if counter_of(info.name) is not None]
        await self._delete(_superseded(infos, found.cutoff_s))

    def _count(self, found: Retention, condemned: CondemnedHead) -> None:
        report = self._report
        waiting = [p for p in found.packs if p.listed and (row := condemned.packs.get(p.pack_id)) is not None and not row.claimed_s]
        report.packs_condemned = len(waiting)
        report.condemned_bytes = sum(p.info.size for p in waiting)
        dead = sum(p.listed and not p.referenced for p in found.packs)
        report.packs_kept = dead - sum(not p.referenced for p in waiting) - sum(not p.referenced for p in self._claims)


async def _remove_expired(changes: Changes, node_ids: Iterable[bytes], now_s: float) -> list[Entry]:
    """Take the names of images away whose time is over still; what they were."""
    found: list[Entry] = []
    for node_id in dict.fromkeys(node_ids):  # one that was moved while the names were walked was found twice
        try:
            current = await changes.get(node_id)
        except NotFoundError:
            continue
        if current.expires_s is not None and current.expires_s <= now_s:  # else it was given more time meanwhile
            await changes.entries(current.parent_id)
            found.append(current)
    # Nothing was set before this: what an operation raises leaves no part of it.
    for current in found:
        changes.unset(current)
    for parent_id in dict.fromkeys(current.parent_id for current in found):
        changes.touch(await changes.get(parent_id))
    return found


def _superseded(infos: Sequence[ObjectInfo], cutoff_s: float) -> list[str]:
    """Revisions (newest first) that were superseded before the cutoff."""
    return [info.name for newer, info in itertools.pairwise(infos) if max(newer.modified_s, info.modified_s) <= cutoff_s]
