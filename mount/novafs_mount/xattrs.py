"""Extended attributes: `user.*` as stored, `user.novafs.*` as computed, no other name space.

See `novafs_mount.attributes` for what is computed, and why it is not listed.
"""

# ruff: noqa: ARG002  # the handlers' parameters are pyfuse3's

from __future__ import annotations

import errno

import pyfuse3
from pyfuse3 import FUSEError

from novafs.catalogtree import Kind
from novafs.errors import TooLargeError
from novafs_mount.attributes import CHEAP_FIGURES, MAP_FIGURES, USER, VIRTUAL, cheap_figure, map_figure
from novafs_mount.core import Core, decoded
from novafs_mount.errnos import answered
from novafs_mount.nodes import Node


class XattrHandlers(Core):
    """The handlers of getxattr, listxattr, setxattr and removexattr."""

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
        key = decoded(name, errno.ENODATA)
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
        key = decoded(name)
        if not key.startswith(USER):
            raise FUSEError(errno.EOPNOTSUPP)
        if key.startswith(VIRTUAL):
            raise FUSEError(errno.EPERM)
        return key
