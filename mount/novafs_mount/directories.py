"""Directories: what opendir, readdir, rewinddir and closedir ask of a file system."""

# ruff: noqa: ARG002  # the handlers' parameters are pyfuse3's

from __future__ import annotations

import logging
from typing import Final

import pyfuse3

from novafs.asynctools import open_nursery
from novafs.catalogtree import Entry, Kind
from novafs.errors import NotFoundError, NovaError
from novafs_mount.attributes import Figures, shown
from novafs_mount.core import Core, Listing
from novafs_mount.errnos import answered

log = logging.getLogger(__name__)

EXACT_LISTING_MAX: Final = 64
"""A listing asks for the heads of images that are not open only up to this many; larger ones show the catalog's hints."""


class DirectoryHandlers(Core):
    """The handlers that take a directory's handle."""

    @answered
    async def opendir(self, inode: int, ctx: pyfuse3.RequestContext) -> int:
        """Open a directory; its entries are those of the first READDIR, or of the last rewinddir(3)."""
        listing = Listing(self._nodes.at(inode))
        await self._refresh(listing.node)
        fh = self._new_handle()
        self._listings[fh] = listing
        return fh

    @answered
    async def readdir(self, fh: int, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        """Entries from number `start_id` on, as many as the kernel's buffer holds: ".", "..", then the names in order."""
        listing = self._listings[fh]
        if start_id == 0 or not listing.started:
            listing.entries = await self._catalog.list(listing.node.entry.node_id)
            # Once, and not for each of the hundreds of calls that a large directory takes.
            listing.images = [entry for entry in listing.entries if entry.kind is not Kind.DIRECTORY]
            listing.started = True
        known = await self._closed_figures(listing)
        directory = listing.node.entry
        own = await self._figures(directory)
        for position in range(start_id, 2):
            inode = self._nodes.inode_of(directory.parent_id if position else directory.node_id)
            dots = self._presentation.attributes(inode, directory, own)
            if not pyfuse3.readdir_reply(token, b".." if position else b".", dots, position + 1):
                return
        for position in range(max(start_id, 2), len(listing.entries) + 2):
            listed = listing.entries[position - 2]
            try:
                entry = await self._catalog.get(listed.node_id)
            except NotFoundError:
                continue
            if (entry.name, entry.parent_id) != (listed.name, listed.parent_id):
                continue
            # No checkpoint from here to the next entry: it is shown as it is now. (A hint takes none.)
            closed = self._volume.image(entry.node_id) is None
            figures = known.get(entry.node_id) if closed else None
            if figures is None:
                figures = shown(await self._catalog.attributes(entry, hint=True), hint=closed)
            attributes = self._presentation.attributes(self._nodes.inode_of(entry.node_id), entry, figures)
            if not pyfuse3.readdir_reply(token, entry.name.encode(), attributes, position + 1):
                return
            node = self._nodes.looked_up(entry)
            if not node.handles:
                node.size_told, node.generation_told = figures.size, figures.generation

    async def _closed_figures(self, listing: Listing) -> dict[bytes, Figures]:
        """Exact figures of a small directory's images, asked for together; nothing for a large one."""
        found: dict[bytes, Figures] = {}
        if len(listing.images) > EXACT_LISTING_MAX:
            return found

        async def ask(entry: Entry) -> None:
            try:
                found[entry.node_id] = await self._figures(entry)
            except NovaError as error:
                # One damaged image must not hide the others: the hint will do, and opening it tells.
                log.debug("listing %s: %s", entry.name, error)

        async with open_nursery() as nursery:
            for entry in listing.images:
                nursery.start_soon(ask, entry)
        return found

    @answered
    async def releasedir(self, fh: int) -> None:
        """Close a directory."""
        self._listings.pop(fh, None)

    async def fsyncdir(self, fh: int, datasync: bool) -> None:
        """Nothing to do: every change of the namespace returned when it was committed."""
