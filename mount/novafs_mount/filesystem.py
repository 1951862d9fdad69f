"""The request handlers: a protocol adapter between FUSE and `novafs.volume` / `novafs.image`, and nothing else.

What always holds:

- A handler raises FUSEError or nothing (`errnos.answered`); the daemon survives whatever the engine raises.
- READ and WRITE wait for the engine only, never for an invalidation or another handler. A READ that dirty data and L1
  can serve has no checkpoint.
- The kernel's pages and attributes never outlive the generation that they are of by more than `TIMEOUT_S`, and not
  past an open: `open` compares what the kernel was told last with what the image is now (see there).
- No handle is given `direct_io`: the kernel would drop O_SYNC on it. O_DIRECT is the kernel's and works. For O_SYNC,
  O_DSYNC and RWF_DSYNC the kernel sends an FSYNC after each WRITE (generic_write_sync).
- libfuse turns ATOMIC_O_TRUNC on, so O_TRUNC comes with OPEN. The kernel applies the caller's umask to modes, checks
  permissions (`default_permissions`), computes the offset of O_APPEND, and keeps flock and fcntl locks to itself.

`create`, `mkdir`, `unlink`, `rename` return when the catalog is committed, so FSYNCDIR has nothing to do.
"""

# ruff: noqa: ARG002  # the handlers' parameters are pyfuse3's

from __future__ import annotations

import errno
import logging
import os
import stat
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Final, NoReturn

import msgspec
import pyfuse3
import trio
from pyfuse3 import FUSEError

from novafs.asynctools import open_nursery
from novafs.catalogtree import Entry, Kind
from novafs.errors import ExistsError, NotFoundError, NovaError, ReadOnlyError, StaleError, TooLargeError
from novafs.namespace import Namespace
from novafs_mount.attributes import (
    CHEAP_FIGURES,
    MAP_FIGURES,
    USER,
    VIRTUAL,
    Figures,
    Presentation,
    cheap_figure,
    map_figure,
    shown,
)
from novafs_mount.errnos import answered, fuse_error
from novafs_mount.nodes import Node, NodeTable

if TYPE_CHECKING:
    from novafs.image import Image
    from novafs.mountoptions import MountOptions
    from novafs.volume import Volume
    from novafs_mount.invalidate import Invalidator

log = logging.getLogger(__name__)

EXACT_LISTING_MAX: Final = 64
"""A listing asks for the heads of images that are not open only up to this many; larger ones show the catalog's hints."""
NAME_MAX: Final = 255
STATFS_BLOCK: Final = 4096
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

    __slots__ = ("entries", "node", "started")

    def __init__(self, node: Node) -> None:
        self.node = node
        self.entries: list[Entry] = []
        self.started = False


class NovaOperations(pyfuse3.Operations):
    """One mounted volume. All methods run on the trio thread."""

    enable_writeback_cache = False
    """Off, so that a write's error is the write's own (design 5.4)."""
    supports_dot_lookup = False
    """Looking "." up would need numbers of nodes that were forgotten, for NFS export alone."""

    def __init__(self, volume: Volume, options: MountOptions, invalidator: Invalidator) -> None:
        super().__init__()
        self._volume = volume
        self._catalog = Namespace(volume)
        self._invalidator = invalidator
        self._chunk_size = volume.superblock.chunk_size
        self._presentation = Presentation(options, self._chunk_size)
        self._nodes = NodeTable(volume.catalog.root)
        self._handles: dict[int, Handle] = {}
        self._listings: dict[int, Listing] = {}
        self._last_handle = 0

    # -- for the daemon -----------------------------------------------------------------------------------------

    @property
    def handle_count(self) -> int:
        """Open files."""
        return len(self._handles)

    def statistics(self) -> dict[str, Any]:
        """What the mount holds, for the control socket."""
        return {"handles": len(self._handles), "nodes": len(self._nodes), "invalidations": asdict(self._invalidator.statistics())}

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
        if call in ("flush", "fsync", "release", "read", "write") and (handle := self._handles.get(arguments[0])) is not None:
            subject = self._path(handle.node)
        elif call in ("readdir", "releasedir", "fsyncdir") and (listing := self._listings.get(arguments[0])) is not None:
            subject = self._path(listing.node)
        elif isinstance(subject, int) and (node := self._nodes.known(subject)) is not None:
            subject = self._path(node)
            if len(arguments) > 1 and isinstance(arguments[1], bytes):
                subject = f"{subject}/{os.fsdecode(arguments[1])}"
        return f"{call} {subject}"

    def _path(self, node: Node) -> str:
        if node is self._nodes.root:
            return "/"
        return node.image.name if node.gone and node.image is not None else self._catalog.path_of(node.entry)

    # -- attributes ---------------------------------------------------------------------------------------------

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

    @answered
    async def lookup(self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        """Find a name."""
        parent = self._nodes.at(parent_inode)
        decoded = _decoded(name, errno.ENOENT)
        try:
            entry = await self._catalog.lookup(parent.entry.node_id, decoded)
        except NotFoundError:
            # Another host may have made it within the last second: what was closed there must be found here.
            entry = await self._catalog.lookup(parent.entry.node_id, decoded, max_age_s=0)
        figures = await self._figures(entry)
        return self._told(self._nodes.looked_up(entry), figures)

    async def forget(self, inode_list: Sequence[tuple[int, int]]) -> None:
        """The kernel drops references."""
        for inode, count in inode_list:
            self._nodes.forget(inode, count)

    @answered
    async def getattr(self, inode: int, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        """stat(2)."""
        return await self._answer(self._nodes.at(inode))

    @answered
    async def setattr(
        self, inode: int, attr: pyfuse3.EntryAttributes, fields: pyfuse3.SetattrFields, fh: int | None, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        """truncate, chmod, chown, utimens."""
        node = self._nodes.at(inode)
        await self._refresh(node)
        self._catalog.check_writable(node.entry.node_id)
        if fields.update_size:
            handle = self._handles.get(fh) if fh is not None else None
            if handle is not None:
                await handle.image.resize(attr.st_size, incarnation=handle.incarnation)
            else:
                async with self._borrowed(node) as image:
                    await image.resize(attr.st_size)
        changes: dict[str, int] = {}
        if fields.update_mode:
            changes["mode"] = stat.S_IMODE(attr.st_mode)
        if fields.update_uid:
            changes["uid"] = attr.st_uid
        if fields.update_gid:
            changes["gid"] = attr.st_gid
        if fields.update_atime:
            changes["atime_ns"] = attr.st_atime_ns
        if fields.update_mtime:
            changes["mtime_ns"] = attr.st_mtime_ns
        if changes and node.gone:
            # No catalog entry can take it; the last holder of the handle still sees what it has set.
            if node.image is not None and "mtime_ns" in changes:
                await node.image.set_mtime(changes["mtime_ns"])
            node.entry = msgspec.structs.replace(node.entry, **changes)
        elif changes:
            node.entry = await self._volume.set_attributes(node.entry.node_id, **changes)
        return await self._answer(node)

    async def access(self, inode: int, mode: int, ctx: pyfuse3.RequestContext) -> bool:
        """Never asked: the mount has `default_permissions`."""
        return True

    @answered
    async def statfs(self, ctx: pyfuse3.RequestContext) -> pyfuse3.StatvfsData:
        """df(1): the capacity that is configured for L3, and what is stored there."""
        usage = await self._volume.usage()
        out = pyfuse3.StatvfsData()
        out.f_bsize = out.f_frsize = STATFS_BLOCK
        out.f_blocks = max(usage.capacity_bytes, usage.used_bytes) // STATFS_BLOCK
        out.f_bfree = out.f_bavail = max(0, usage.capacity_bytes - usage.used_bytes) // STATFS_BLOCK
        # No f_files: there is no limit on images, and df -i shows "-" rather than a table that is full.
        out.f_namemax = NAME_MAX
        return out

    # -- files --------------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def _borrowed(self, node: Node) -> AsyncIterator[Image]:
        """The image for one call, closed (and so committed, unless others have it open) afterwards."""
        image = await self._catalog.open_image(node.entry.node_id)
        try:
            yield image
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
        # While handles were open all changes went through this kernel: what it has is what the image is now.
        node.size_told = image.size
        node.generation_told = node.cached_generation = image.generation

    def _new_handle(self) -> int:
        self._last_handle += 1
        return self._last_handle

    def _add_handle(self, node: Node, image: Image, flags: int) -> int:
        fh = self._new_handle()
        self._handles[fh] = Handle(node, image, flags & os.O_ACCMODE != os.O_RDONLY)
        node.handles += 1
        node.image = image
        return fh

    @answered
    async def open(self, inode: int, flags: int, ctx: pyfuse3.RequestContext) -> pyfuse3.FileInfo:
        """Open an image, making sure that the kernel does not go on with an older generation of it.

        Pages: kept (`keep_cache`) where they are of this generation, else dropped by the kernel before open(2) returns.
        Size: where the kernel was told another one (by a listing's hint, or before another host's commit), the first
        answer is ESTALE, upon which open(2) looks the name up again, unseen by the caller, and comes back. A mere
        invalidation would leave the old size in place for O_APPEND and mmap. Other attributes: invalidated.
        """
        node = self._nodes.at(inode)
        entry = await self._refresh(node)
        writable = flags & os.O_ACCMODE != os.O_RDONLY
        if writable and entry.kind is Kind.SNAPSHOT:
            raise ReadOnlyError(f"{self._path(node)}: is a snapshot")
        before = node.image if node.handles else None
        size_told, generation_before = (before.size, before.generation) if before is not None else (node.size_told, -1)
        image = await self._catalog.open_image(entry.node_id)
        # No checkpoint between here and the end, but for truncation, failures and the invalidation.
        continuous = before is image and node.handles > 0
        same = continuous and image.generation == generation_before
        if not same and image.size != size_told and not flags & os.O_TRUNC and ctx.pid not in node.retried:
            node.retried.add(ctx.pid)
            await self._volume.close_image(image)
            raise StaleError(f"{self._path(node)}: the kernel takes it to have {size_told} bytes, it has {image.size}")
        node.retried.discard(ctx.pid)
        keep = same or (not continuous and image.generation == node.cached_generation)
        known = same or image.generation == node.generation_told
        node.cached_generation = image.generation
        fh = self._add_handle(node, image, flags)
        try:
            if flags & os.O_TRUNC:
                await image.resize(0)
            if not known:
                await self._invalidator.attributes(inode)
        except BaseException:
            del self._handles[fh]
            node.handles -= 1
            with trio.move_on_after(CLOSE_TIMEOUT_S, shield=True):
                await self._volume.close_image(image)
            raise
        return pyfuse3.FileInfo(fh=fh, keep_cache=keep)

    @answered
    async def create(
        self, parent_inode: int, name: bytes, mode: int, flags: int, ctx: pyfuse3.RequestContext
    ) -> tuple[pyfuse3.FileInfo, pyfuse3.EntryAttributes]:
        """Make an empty image and open it."""
        parent = self._nodes.at(parent_inode)
        try:
            entry = await self._create(parent, name, mode, ctx)
        except ExistsError:
            # Another host was faster, after this kernel had looked.
            if flags & os.O_EXCL:
                raise
            entry = await self._catalog.lookup(parent.entry.node_id, _decoded(name), max_age_s=0)
            if entry.kind is Kind.DIRECTORY:
                raise FUSEError(errno.EISDIR) from None
        image = await self._catalog.open_image(entry.node_id)
        node = self._nodes.looked_up(entry)
        node.cached_generation = image.generation
        fh = self._add_handle(node, image, flags)
        try:
            if flags & os.O_TRUNC and image.size:
                await image.resize(0)
            attributes = self._told(node, await self._figures(entry))
        except BaseException:
            del self._handles[fh]
            node.handles -= 1
            self._nodes.forget(node.inode, 1)
            with trio.move_on_after(CLOSE_TIMEOUT_S, shield=True):
                await self._volume.close_image(image)
            raise
        return pyfuse3.FileInfo(fh=fh, keep_cache=False), attributes

    async def read(self, fh: int, off: int, size: int) -> bytes:
        """READ. The hot path: no decorator, no checkpoint on a hit."""
        image = self._handles[fh].image
        try:
            data = image.read_nowait(off, size)
            return data if data is not None else await image.read(off, size)
        except Exception as error:
            raise fuse_error(error, f"read {self._path(self._handles[fh].node)} at {off}+{size}") from error

    async def write(self, fh: int, off: int, buf: bytes) -> int:
        """WRITE."""
        handle = self._handles[fh]
        try:
            return await handle.image.write(off, buf, incarnation=handle.incarnation)
        except Exception as error:
            raise fuse_error(error, f"write {self._path(self._handles[fh].node)} at {off}+{len(buf)}") from error

    @answered
    async def flush(self, fh: int) -> None:
        """close(2): commit, so that its error is the caller's, and the next open elsewhere sees the data."""
        handle = self._handles[fh]
        if handle.writable:
            await handle.image.flush(incarnation=handle.incarnation)

    @answered
    async def fsync(self, fh: int, datasync: bool) -> None:
        """fsync(2) and fdatasync(2): the same, since size and data go into one generation."""
        handle = self._handles[fh]
        await handle.image.fsync(incarnation=handle.incarnation)

    @answered
    async def release(self, fh: int) -> None:
        """The last descriptor of this handle is closed. Nobody sees the answer, so a failure is only logged."""
        handle = self._handles[fh]
        try:
            await self._close(handle.node, handle.image)
        finally:
            del self._handles[fh]
            handle.node.handles -= 1
            self._nodes.let_go(handle.node)

    # -- names --------------------------------------------------------------------------------------------------

    async def _create(self, parent: Node, name: bytes, mode: int, ctx: pyfuse3.RequestContext) -> Entry:
        entry = await self._refresh(parent)
        gid = entry.gid if entry.mode & stat.S_ISGID else ctx.gid
        self._catalog.check_writable(entry.node_id)
        return await self._volume.create(entry.node_id, _decoded(name), mode=stat.S_IMODE(mode), uid=ctx.uid, gid=gid)

    @answered
    async def mknod(self, parent_inode: int, name: bytes, mode: int, rdev: int, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        """An empty image; EPERM for anything that is no regular file, as mknod(2) says."""
        if not stat.S_ISREG(mode):
            raise FUSEError(errno.EPERM)
        entry = await self._create(self._nodes.at(parent_inode), name, mode, ctx)
        figures = await self._figures(entry)
        return self._told(self._nodes.looked_up(entry), figures)

    @answered
    async def mkdir(self, parent_inode: int, name: bytes, mode: int, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        """An empty directory."""
        parent = await self._refresh(self._nodes.at(parent_inode))
        bits, gid = stat.S_IMODE(mode), ctx.gid
        if parent.mode & stat.S_ISGID:
            bits, gid = bits | stat.S_ISGID, parent.gid
        self._catalog.check_writable(parent.node_id)
        entry = await self._volume.mkdir(parent.node_id, _decoded(name), mode=bits, uid=ctx.uid, gid=gid)
        figures = await self._figures(entry)
        return self._told(self._nodes.looked_up(entry), figures)

    async def symlink(self, parent_inode: int, name: bytes, target: bytes, ctx: pyfuse3.RequestContext) -> NoReturn:
        """There are none: EPERM, as symlink(2) says."""
        raise FUSEError(errno.EPERM)

    async def link(self, inode: int, new_parent_inode: int, new_name: bytes, ctx: pyfuse3.RequestContext) -> NoReturn:
        """There are none: EPERM, as link(2) says."""
        raise FUSEError(errno.EPERM)

    @answered
    async def unlink(self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> None:
        """Remove an image's name; who has it open goes on reading and writing."""
        parent_id = self._nodes.at(parent_inode).entry.node_id
        self._catalog.check_writable(parent_id)
        await self._volume.unlink(parent_id, _decoded(name, errno.ENOENT))

    @answered
    async def rmdir(self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> None:
        """Remove an empty directory."""
        parent_id = self._nodes.at(parent_inode).entry.node_id
        self._catalog.check_writable(parent_id)
        await self._volume.rmdir(parent_id, _decoded(name, errno.ENOENT))

    @answered
    async def rename(
        self, parent_inode_old: int, name_old: bytes, parent_inode_new: int, name_new: bytes, flags: int, ctx: pyfuse3.RequestContext
    ) -> None:
        """Move a name, replacing what has it unless RENAME_NOREPLACE; EINVAL for RENAME_EXCHANGE and unknown flags."""
        if flags & ~pyfuse3.RENAME_NOREPLACE:
            raise FUSEError(errno.EINVAL)
        old, new = self._nodes.at(parent_inode_old).entry.node_id, self._nodes.at(parent_inode_new).entry.node_id
        replace = not flags & pyfuse3.RENAME_NOREPLACE
        self._catalog.check_writable(old)
        self._catalog.check_writable(new)
        await self._volume.rename(old, _decoded(name_old, errno.ENOENT), new, _decoded(name_new), replace=replace)

    # -- directories --------------------------------------------------------------------------------------------

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
        images = [entry for entry in listing.entries if entry.kind is not Kind.DIRECTORY]
        found: dict[bytes, Figures] = {}
        if len(images) > EXACT_LISTING_MAX:
            return found

        async def ask(entry: Entry) -> None:
            try:
                found[entry.node_id] = await self._figures(entry)
            except NovaError as error:
                # One damaged image must not hide the others: the hint will do, and opening it tells.
                log.debug("listing %s: %s", entry.name, error)

        async with open_nursery() as nursery:
            for entry in images:
                nursery.start_soon(ask, entry)
        return found

    @answered
    async def releasedir(self, fh: int) -> None:
        """Close a directory."""
        self._listings.pop(fh, None)

    async def fsyncdir(self, fh: int, datasync: bool) -> None:
        """Nothing to do: every change of the namespace returned when it was committed."""

    # -- extended attributes ------------------------------------------------------------------------------------

    async def getxattr(self, inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> bytes:
        """`user.*` as stored, `user.novafs.*` as computed.

        Undecorated up to the test of the name: the kernel asks for security.capability before each buffered WRITE.
        """
        if not name.startswith(b"user."):
            raise FUSEError(errno.EOPNOTSUPP)
        return await self._getxattr(inode, name)

    @answered
    async def _getxattr(self, inode: int, name: bytes) -> bytes:
        node = self._nodes.at(inode)
        key = _decoded(name, errno.ENODATA)
        entry = await self._refresh(node)
        if key.startswith(VIRTUAL):
            return await self._virtual(node, key.removeprefix(VIRTUAL))
        if key not in entry.xattrs:
            raise FUSEError(errno.ENODATA)
        return entry.xattrs[key]

    async def _virtual(self, node: Node, name: str) -> bytes:
        if node.entry.kind is not Kind.DIRECTORY:
            if name in CHEAP_FIGURES:
                return cheap_figure(name, node.entry, await self._figures(node.entry), self._chunk_size)
            if name in MAP_FIGURES:
                async with self._borrowed(node) as image:
                    return map_figure(name, await image.statistics())
        raise FUSEError(errno.ENODATA)

    @answered
    async def listxattr(self, inode: int, ctx: pyfuse3.RequestContext) -> list[bytes]:
        """The stored ones; see `novafs_mount.attributes` for why the computed ones are left out."""
        entry = await self._refresh(self._nodes.at(inode))
        return [name.encode() for name in sorted(entry.xattrs)]

    @answered
    async def setxattr(self, inode: int, name: bytes, value: bytes, ctx: pyfuse3.RequestContext) -> None:
        """Store `user.*`. XATTR_CREATE and XATTR_REPLACE were checked by pyfuse3, which does not hand them on."""
        key = self._settable(name)
        node = self._nodes.at(inode)
        try:
            self._catalog.check_writable(node.entry.node_id)
            await self._volume.set_xattr((await self._refresh(node)).node_id, key, value)
        except TooLargeError:
            raise FUSEError(errno.ENOSPC) from None  # as setxattr(2) says, where EFBIG would be of the file

    @answered
    async def removexattr(self, inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> None:
        """Remove `user.*`."""
        key = self._settable(name)
        node = self._nodes.at(inode)
        self._catalog.check_writable(node.entry.node_id)
        await self._volume.remove_xattr((await self._refresh(node)).node_id, key)

    @staticmethod
    def _settable(name: bytes) -> str:
        key = _decoded(name)
        if not key.startswith(USER):
            raise FUSEError(errno.EOPNOTSUPP)
        if key.startswith(VIRTUAL):
            raise FUSEError(errno.EPERM)
        return key


def _decoded(name: bytes, undecodable: int = errno.EILSEQ) -> str:
    """A name from the kernel as text. Names are UTF-8 in a volume; others are EILSEQ, or `undecodable`."""
    if len(name) > NAME_MAX:
        raise FUSEError(errno.ENAMETOOLONG)
    try:
        return name.decode()
    except UnicodeDecodeError:
        raise FUSEError(undecodable) from None
