"""The namespace as a mount shows it: the catalog, and `.snapshots/IMAGE/NAME`, read-only, which no catalog holds.

`.snapshots` mirrors the directories of the volume; an image that has snapshots is a directory in it, and its snapshots
are the files. It is found by name and left out of listings of the root, so that a copy of the mount does not hold every
image many times. The nodes' ids are hashes of what they stand for: all hosts, and all mounts in time, agree on them.
"""

from __future__ import annotations

import builtins
import hashlib
from typing import Final, NamedTuple

from novafs.catalogtree import ROOT_ID, Entry, Kind, Snapshot
from novafs.errors import NotDirectoryError, NotFoundError, ReadOnlyError
from novafs.image import Image
from novafs.volume import SNAPSHOTS_NAME, Attributes, Volume


class _Place(NamedTuple):
    """What a made-up node stands for: a directory of the catalog, an image with snapshots, or (with `snapshot`) one of them."""

    target_id: bytes
    parent_id: bytes
    name: str
    snapshot: str = ""


def _node_id(kind: bytes, key: bytes) -> bytes:
    return hashlib.sha256(b"novafs snapshots\0" + kind + b"\0" + key).digest()[:16]


SNAPSHOTS_ID: Final = _node_id(b"tree", ROOT_ID)


class Namespace:
    """What `Catalog` offers to a mount, snapshots included. On the trio thread alone."""

    def __init__(self, volume: Volume) -> None:
        self._volume = volume
        self._catalog = volume.catalog
        self._places: dict[bytes, _Place] = {SNAPSHOTS_ID: _Place(ROOT_ID, ROOT_ID, SNAPSHOTS_NAME)}

    @property
    def root(self) -> Entry:
        """The root directory's own entry."""
        return self._catalog.root

    def is_virtual(self, node_id: bytes) -> bool:
        """Whether a node is `.snapshots` or below it."""
        return node_id in self._places

    def check_writable(self, node_id: bytes) -> None:
        """Raise ReadOnlyError for what lies in `.snapshots`."""
        if node_id in self._places:
            raise ReadOnlyError(f"{self.path_of_id(node_id)}: snapshots can not be changed; clone one instead ('novafs clone --snapshot')")

    async def lookup(self, parent_id: bytes, name: str, *, max_age_s: float = 1.0) -> Entry:
        """The entry of a name. Raises NotFoundError, NotDirectoryError."""
        if parent_id in self._places:
            await self._catalog.refresh(max_age_s)
            for entry in await self._list(parent_id):
                if entry.name == name:
                    return entry
            raise NotFoundError(f"{self.path_of_id(parent_id)}/{name}: no such image or snapshot")
        if parent_id == ROOT_ID and name == SNAPSHOTS_NAME:
            return await self._directory(SNAPSHOTS_ID)
        return await self._catalog.lookup(parent_id, name, max_age_s=max_age_s)

    async def get(self, node_id: bytes) -> Entry:
        """The entry of a node that was seen before. Raises NotFoundError where it is gone."""
        place = self._places.get(node_id)
        if place is None:
            return await self._catalog.get(node_id)
        if place.snapshot:
            entry = await self._catalog.get(place.target_id)
            found = entry.snapshots.get(place.snapshot)
            if found is None or _snapshot_id(entry, found) != node_id:
                raise NotFoundError(f"{self.path_of_id(node_id)}: the snapshot was removed")
            return self._snapshot(entry, place.snapshot, found)
        return await self._directory(node_id)

    async def list(self, node_id: bytes, *, max_age_s: float = 1.0) -> builtins.list[Entry]:
        """A directory's entries, sorted by name. Raises NotFoundError, NotDirectoryError."""
        if node_id in self._places:
            await self._catalog.refresh(max_age_s)
            return await self._list(node_id)
        return await self._catalog.list(node_id, max_age_s=max_age_s)

    def path_of(self, entry: Entry) -> str:
        """The path of an entry inside the volume, for people."""
        return self.path_of_id(entry.node_id)

    def path_of_id(self, node_id: bytes) -> str:
        """The path of a node that was seen."""
        place = self._places.get(node_id)
        if place is None:
            return self._catalog.path_of_id(node_id)
        if node_id == SNAPSHOTS_ID:
            return SNAPSHOTS_NAME
        return f"{self.path_of_id(place.parent_id)}/{place.name}"

    async def attributes(self, entry: Entry, *, hint: bool = False) -> Attributes:
        """Size and times. Raises what `Volume.attributes` raises."""
        if entry.kind is Kind.SNAPSHOT:
            return Attributes(entry.size, entry.stored_bytes, entry.mtime_ns, entry.mtime_ns, entry.mtime_ns, 0)
        return await self._volume.attributes(entry, hint=hint)

    async def open_image(self, node_id: bytes) -> Image:
        """The image or the snapshot, with one more handle. Raises what `Volume.open_image` raises."""
        place = self._places.get(node_id)
        if place is None:
            return await self._volume.open_image(node_id)
        entry = await self._catalog.get(place.target_id)
        found = entry.snapshots.get(place.snapshot)
        if found is None:
            raise NotFoundError(f"{self.path_of_id(node_id)}: the snapshot was removed")
        return await self._volume.open_snapshot(entry.node_id, found.counter, name=self.path_of_id(node_id))

    # -- made-up entries ----------------------------------------------------------------------------------------

    async def _directory(self, node_id: bytes) -> Entry:
        place = self._places[node_id]
        entry = await self._catalog.get(place.target_id)
        return Entry(
            place.name,
            node_id,
            Kind.DIRECTORY,
            0o555,
            entry.uid,
            entry.gid,
            entry.mtime_ns,
            entry.mtime_ns,
            entry.ctime_ns,
            parent_id=place.parent_id,
        )

    def _snapshot(self, entry: Entry, name: str, snapshot: Snapshot) -> Entry:
        when = snapshot.created_ns
        node_id = _snapshot_id(entry, snapshot)
        parent_id = _node_id(b"image", entry.node_id)
        return Entry(
            name,
            node_id,
            Kind.SNAPSHOT,
            entry.mode & 0o444,
            entry.uid,
            entry.gid,
            when,
            when,
            when,
            snapshot.size,
            entry.stored_bytes,
            parent_id=parent_id,
        )

    async def _list(self, node_id: bytes) -> builtins.list[Entry]:
        place = self._places[node_id]
        if place.snapshot:
            raise NotDirectoryError(f"{self.path_of_id(node_id)}: is a snapshot, not a directory")
        target = await self._catalog.get(place.target_id)
        if target.kind is Kind.DIRECTORY:
            below = []
            for entry in await self._catalog.list(target.node_id):
                if entry.kind is Kind.DIRECTORY or entry.snapshots:
                    kind = b"tree" if entry.kind is Kind.DIRECTORY else b"image"
                    below_id = _node_id(kind, entry.node_id)
                    self._places[below_id] = _Place(entry.node_id, node_id, entry.name)
                    below.append(await self._directory(below_id))
            return below
        found = [self._snapshot(target, name, snapshot) for name, snapshot in sorted(target.snapshots.items())]
        for entry in found:
            self._places[entry.node_id] = _Place(target.node_id, node_id, entry.name, entry.name)
        return found


def _snapshot_id(entry: Entry, snapshot: Snapshot) -> bytes:
    return _node_id(b"snapshot", entry.node_id + snapshot.counter.to_bytes(8, "big") + snapshot.created_ns.to_bytes(8, "big"))
