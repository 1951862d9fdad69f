"""What all request handlers share: nodes, open files, the answers that carry attributes.

`filesystem.NovaOperations` is made of this and of the handlers of `directories` and `xattrs`.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Final

import pyfuse3
import trio
from pyfuse3 import FUSEError

from novafs.catalogtree import Entry
from novafs.errors import NotFoundError, NovaError, StaleError
from novafs.namespace import Namespace
from novafs_mount.attributes import Figures, Presentation, shown
from novafs_mount.errnos import told
from novafs_mount.nodes import Node, NodeTable

if TYPE_CHECKING:
    from novafs.image import Image
    from novafs.mountoptions import MountOptions
    from novafs.volume import Volume
    from novafs_mount.invalidate import Invalidator

log = logging.getLogger(__name__)

NAME_MAX: Final = 255
CLOSE_TIMEOUT_S: Final = 60.0
"""For closing an image after the handler itself has failed."""


class Handle:
    """An open file: one FUSE file handle."""

    __slots__ = ("image", "incarnation", "node", "writable")

    def __init__(self, node: Node, image: Image, writable: bool) -> None:
        self.node = node
        self.image = image
        self.writable = writable
        # What the image was when this was opened: once another host has written it, this handle must not.
        self.incarnation = image.incarnation


class Listing:
    """An open directory: the names of one moment, numbered, so that any offset can be resumed.

    Each is looked at again when its turn comes: an answer with what it was when the list was made would put a name
    that has since been removed, or a mode that has since been changed, back into the kernel for a second.
    """

    __slots__ = ("entries", "images", "node", "started")

    def __init__(self, node: Node) -> None:
        self.node = node
        self.entries: list[Entry] = []
        self.images: list[Entry] = []
        """Of the entries."""
        self.started = False


class Core(pyfuse3.Operations):
    """The state of one mount. All methods run on the trio thread."""

    enable_writeback_cache = False
    """Off, so that a write's error is the write's own (design 5.4)."""
    supports_dot_lookup = False
    """Looking "." up would need numbers of nodes that were forgotten, for NFS export alone."""

    def __init__(self, volume: Volume, options: MountOptions, invalidator: Invalidator) -> None:
        super().__init__()
        self._volume = volume
        self.latencies = volume.latencies
        self._waited_reads, self._writes = self.latencies.of("fuse", "read"), self.latencies.of("fuse", "write")
        """READs that had to wait, and WRITEs; what memory answered at once is noted by the image, under `l1`."""
        self._catalog = Namespace(volume)
        self._invalidator = invalidator
        self._chunk_size = volume.superblock.chunk_size
        self._presentation = Presentation(options, self._chunk_size)
        self._nodes = NodeTable(volume.catalog.root)
        self._handles: dict[int, Handle] = {}
        self._opening: list[Image] = []
        """Of handles that may write and wait for the host that writes the image now."""
        self._listings: dict[int, Listing] = {}
        self._last_handle = 0

    # -- for the daemon -----------------------------------------------------------------------------------------

    @property
    def handle_count(self) -> int:
        """Open files."""
        return len(self._handles)

    def statistics(self) -> dict[str, Any]:
        """What the mount holds, for the control socket."""
        return {
            "handles": len(self._handles),
            "nodes": len(self._nodes),
            "invalidations": asdict(self._invalidator.statistics()),
            "errors": dict(told.counts),
        }

    def open_paths(self) -> list[str]:
        """The images with open handles, for the log."""
        return sorted({self._path(handle.node) for handle in self._handles.values()})

    async def close_handles(self) -> None:
        """Close what the kernel will not release any more, and so commit it. What fails stays dirty, for `Volume.close`."""
        for fh, handle in list(self._handles.items()):
            try:
                await self._close(handle.node, handle.image)
            except NovaError as error:
                log.warning("%s: not committed yet: %s", self._path(handle.node), error)
            del self._handles[fh]
            handle.node.handles -= 1

    def describe(self, call: str, arguments: tuple[Any, ...]) -> str:
        """See `errnos.Describes`."""
        subject: object = arguments[0] if arguments else ""
        if call in ("flush", "fsync", "release", "read", "write"):
            handle = self._handles.get(arguments[0])
            subject = self._path(handle.node) if handle is not None else f"of handle {subject}"
        elif call in ("readdir", "releasedir", "fsyncdir"):
            listing = self._listings.get(arguments[0])
            subject = self._path(listing.node) if listing is not None else f"of listing {subject}"
        elif isinstance(subject, int) and (node := self._nodes.known(subject)) is not None:
            subject = self._path(node)
            if len(arguments) > 1 and isinstance(arguments[1], bytes):
                subject = f"{subject.rstrip('/')}/{os.fsdecode(arguments[1])}"
        return f"{call} {subject}"

    def _path(self, node: Node) -> str:
        if node is self._nodes.root:
            return "/"
        return node.image.name if node.gone and node.image is not None else self._catalog.path_of(node.entry)

    # -- for the handlers ---------------------------------------------------------------------------------------

    async def _refresh(self, node: Node) -> Entry:
        """The node's entry as the catalog has it now. Raises StaleError where it is gone and nobody has it open."""
        if not node.gone:
            try:
                node.entry = await self._catalog.get(node.entry.node_id)
            except NotFoundError:
                if not node.handles:
                    # ESTALE has the kernel look the name up once more, and find what another host put there.
                    raise StaleError(f"{node.entry.name}: was removed") from None
                node.gone = True
        return node.entry

    async def _figures(self, entry: Entry) -> Figures:
        return shown(await self._catalog.attributes(entry))

    def _told(self, node: Node, figures: Figures) -> pyfuse3.EntryAttributes:
        """The answer with these figures, noting that the kernel has them from now on."""
        node.size_told = figures.size
        node.generation_told = figures.generation
        return self._presentation.attributes(node.inode, node.entry, figures, gone=node.gone)

    async def _answer(self, node: Node) -> pyfuse3.EntryAttributes:
        entry = await self._refresh(node)
        return self._told(node, await self._figures(entry))

    @asynccontextmanager
    async def _borrowed(self, node: Node) -> AsyncIterator[Image]:
        """The image for one call, closed (and so committed, unless others have it open) afterwards."""
        image = await self._catalog.open_image(node.entry.node_id)
        if not node.handles:
            node.adopted = image.adopted if image.generation == node.cached_generation else -1
        try:
            yield image
            if not self._is_written(image):
                await self._volume.let_go(image)  # readers may keep it open for long
        except BaseException:
            with trio.move_on_after(CLOSE_TIMEOUT_S, shield=True):
                try:
                    await self._close(node, image)
                except NovaError as error:
                    log.warning("%s: closing after a failure: %s", image.name, error)
            raise
        await self._close(node, image)

    async def _close(self, node: Node, image: Image) -> None:
        await self._volume.close_image(image)
        if node.adopted == image.adopted:
            # While handles were open all changes went through this kernel: what it has is what the image is now.
            node.size_told = image.size
            node.generation_told = node.cached_generation = image.generation
        else:
            node.size_told, node.generation_told, node.cached_generation = -1, None, None

    def _is_written(self, image: Image) -> bool:
        """Whether somebody here has it open for writing, or is just opening it."""
        return image in self._opening or any(handle.writable and handle.image is image for handle in self._handles.values())

    def _new_handle(self) -> int:
        self._last_handle += 1
        return self._last_handle


def decoded(name: bytes, undecodable: int = errno.EILSEQ) -> str:
    """A name from the kernel as text. Names are UTF-8 in a volume; others are EILSEQ, or `undecodable`."""
    if len(name) > NAME_MAX:
        raise FUSEError(errno.ENAMETOOLONG)
    try:
        return name.decode()
    except UnicodeDecodeError:
        raise FUSEError(undecodable) from None
