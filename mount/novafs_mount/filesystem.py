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
import os
import stat
from functools import partial
from time import perf_counter
from typing import TYPE_CHECKING, Final, NoReturn

import msgspec
import pyfuse3
import trio
from pyfuse3 import FUSEError

from novafs.catalogtree import Entry, Kind
from novafs.errors import ExistsError, NotFoundError, ReadOnlyError, StaleError
from novafs_mount.attributes import IMAGE_MODE_DROPPED
from novafs_mount.core import CLOSE_TIMEOUT_S, NAME_MAX, Handle, decoded
from novafs_mount.directories import DirectoryHandlers
from novafs_mount.errnos import answered, fuse_error
from novafs_mount.nodes import Node
from novafs_mount.xattrs import XattrHandlers

if TYPE_CHECKING:
    from collections.abc import Sequence

    from novafs.image import Image

STATFS_BLOCK: Final = 4096


class NovaOperations(DirectoryHandlers, XattrHandlers):
    """One mounted volume: the handlers of nodes, files and names."""

    # -- nodes --------------------------------------------------------------------------------------------------

    @answered
    async def lookup(self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        """Find a name."""
        parent = self._nodes.at(parent_inode)
        text = decoded(name, errno.ENOENT)
        try:
            entry = await self._catalog.lookup(parent.entry.node_id, text)
        except NotFoundError:
            # Another host may have made it within the last second: what was closed there must be found here.
            entry = await self._catalog.lookup(parent.entry.node_id, text, max_age_s=0)
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
            if node.entry.kind is not Kind.DIRECTORY:
                changes["mode"] &= ~IMAGE_MODE_DROPPED
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

    def _add_handle(self, node: Node, image: Image, flags: int) -> int:
        fh = self._new_handle()
        self._handles[fh] = handle = Handle(node, image, flags & os.O_ACCMODE != os.O_RDONLY)
        if handle.writable:
            self._volume.keep_lease(image)
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
        current = before is not None and before.adopted == node.adopted
        size_told, generation_before = (before.size, before.generation) if before is not None and current else (node.size_told, -1)
        held = False
        try:
            if writable:
                image, held = await self._volume.open_to_write(entry.node_id)
            else:
                image = await self._catalog.open_image(entry.node_id)
        except NotFoundError:
            # Only a handle that is being closed just now had it open. As in `_refresh`: the kernel is to look the name up once more.
            raise StaleError(f"{entry.name}: was removed") from None
        if flags & os.O_DIRECT and not writable:
            self._volume.look_ahead(image)
        # No checkpoint between here and the end, but for following, truncation, failures and the invalidation.
        continuous = before is image and node.handles > 0
        same = continuous and image.generation == generation_before
        if not same and image.size != size_told and not flags & os.O_TRUNC and ctx.pid not in node.retried:
            node.retried.add(ctx.pid)
            await self._volume.close_image(image)
            raise StaleError(f"{self._path(node)}: the kernel takes it to have {size_told} bytes, it has {image.size}")
        if writable:
            size_before, adopted_before = image.size, image.adopted
            await self._follow(node, image, held=held)
            if image.adopted != adopted_before and image.size != size_before and not flags & os.O_TRUNC and ctx.pid not in node.retried:
                node.retried.add(ctx.pid)
                await self._undo_open(image)
                raise StaleError(f"{self._path(node)}: the kernel takes it to have {size_before} bytes, it has {image.size}")
            continuous = node.image is image and node.handles > 0
            same = same and continuous and image.generation == generation_before
        node.retried.discard(ctx.pid)
        # Of what another host writes none: a read that the kernel answers by itself would be noted by nobody.
        keep = not held and (same or (not continuous and image.generation == node.cached_generation))
        known = same or image.generation == node.generation_told
        if writable and keep and not flags & os.O_DIRECT:
            keep = self._volume.may_keep(image)
        if writable and flags & os.O_APPEND and image.follower is not None:
            image.follower.seen.everything = True  # the kernel writes at the end that it knows, where another host may have written since
        generation, adopted = image.generation, image.adopted
        if not keep:
            node.adopted = -1  # until this is answered
        fh = self._add_handle(node, image, flags)
        try:
            if flags & os.O_TRUNC:
                await image.resize(0)
            if not known:
                await self._invalidator.attributes(inode)
        except BaseException:
            del self._handles[fh]
            node.handles -= 1
            await self._undo_open(image)
            raise
        # Only now: the kernel drops what it has when it has this answer.
        node.cached_generation, node.adopted = generation, adopted
        return pyfuse3.FileInfo(fh=fh, keep_cache=keep)

    async def _follow(self, node: Node, image: Image, *, held: bool) -> None:
        """See `Volume.follow`; closes the image after a failure."""
        self._opening.append(image)
        try:
            await self._volume.follow(image, partial(self._changed_elsewhere, node), held=held)
        except BaseException:
            self._opening.remove(image)
            await self._undo_open(image)
            raise
        self._opening.remove(image)

    async def _undo_open(self, image: Image) -> None:
        """What `release` does, for a handle that nobody will have."""
        with trio.move_on_after(CLOSE_TIMEOUT_S, shield=True):
            if not self._is_written(image):
                await self._volume.let_go(image)
            await self._volume.close_image(image)

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
            entry = await self._catalog.lookup(parent.entry.node_id, decoded(name), max_age_s=0)
            if entry.kind is Kind.DIRECTORY:
                raise FUSEError(errno.EISDIR) from None
            image, held = await self._volume.open_to_write(entry.node_id)
        else:
            image, held = await self._catalog.open_image(entry.node_id), False
        node = self._nodes.looked_up(entry)
        if flags & os.O_ACCMODE != os.O_RDONLY:
            try:
                await self._follow(node, image, held=held)
            except BaseException:
                self._nodes.forget(node.inode, 1)
                raise
        generation, adopted = image.generation, image.adopted
        fh = self._add_handle(node, image, flags)
        try:
            if flags & os.O_TRUNC and image.size:
                await image.resize(0)
            attributes = self._told(node, await self._figures(entry))
        except BaseException:
            del self._handles[fh]
            node.handles -= 1
            self._nodes.forget(node.inode, 1)
            await self._undo_open(image)
            raise
        node.cached_generation, node.adopted = generation, adopted
        return pyfuse3.FileInfo(fh=fh, keep_cache=False), attributes

    async def read(self, fh: int, off: int, size: int) -> bytes:
        """READ. The hot path: no decorator, no checkpoint on a hit."""
        image = self._handles[fh].image
        try:
            data = image.read_nowait(off, size)
            if data is not None:
                if image.follower is not None:
                    image.follower.seen.end(off, size, data)
                return data
            began_s = perf_counter()
            try:
                if image.follower is None:
                    return await image.read(off, size)
                return await self._read_followed(image, off, size)
            finally:
                self._waited_reads.note(perf_counter() - began_s)
        except Exception as error:
            raise fuse_error(error, f"read {self._path(self._handles[fh].node)} at {off}+{size}") from error

    async def _read_followed(self, image: Image, off: int, size: int) -> bytes:
        """What is read while another host may write it is noted: whether it still is so decides about the first write."""
        if image.follower is not None:
            image.follower.seen.begin(off, size)
        data = await image.read(off, size)
        if image.follower is not None:
            image.follower.seen.end(off, size, data)
        return data

    async def write(self, fh: int, off: int, buf: bytes) -> int:
        """WRITE."""
        handle = self._handles[fh]
        began_s = perf_counter()
        try:
            return await handle.image.write(off, buf, incarnation=handle.incarnation)
        except Exception as error:
            raise fuse_error(error, f"write {self._path(self._handles[fh].node)} at {off}+{len(buf)}") from error
        finally:
            self._writes.note(perf_counter() - began_s)

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
            writer, handle.writable = handle.writable, False  # of two that close at the same time one is the last
            if writer and not self._is_written(handle.image):
                await self._volume.let_go(handle.image)
            await self._close(handle.node, handle.image)
        finally:
            del self._handles[fh]
            handle.node.handles -= 1
            self._nodes.let_go(handle.node)

    def _changed_elsewhere(self, node: Node) -> None:
        """The host that writes an image which is open for writing here, too, has committed: the kernel's pages are older than that."""
        self._invalidator.inode(node.inode)

    # -- names --------------------------------------------------------------------------------------------------

    async def _create(self, parent: Node, name: bytes, mode: int, ctx: pyfuse3.RequestContext) -> Entry:
        entry = await self._refresh(parent)
        gid = entry.gid if entry.mode & stat.S_ISGID else ctx.gid
        self._catalog.check_writable(entry.node_id)
        bits = stat.S_IMODE(mode) & ~IMAGE_MODE_DROPPED
        return await self._volume.create(entry.node_id, decoded(name), mode=bits, uid=ctx.uid, gid=gid)

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
        entry = await self._volume.mkdir(parent.node_id, decoded(name), mode=bits, uid=ctx.uid, gid=gid)
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
        await self._volume.unlink(parent_id, decoded(name, errno.ENOENT))

    @answered
    async def rmdir(self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> None:
        """Remove an empty directory."""
        parent_id = self._nodes.at(parent_inode).entry.node_id
        self._catalog.check_writable(parent_id)
        await self._volume.rmdir(parent_id, decoded(name, errno.ENOENT))

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
        await self._volume.rename(old, decoded(name_old, errno.ENOENT), new, decoded(name_new), replace=replace)
