"""The inode table: which number the kernel knows a node of the catalog by, and what it has been told of it.

What always holds: a number belongs to one node as long as the kernel may use it (a lookup count above zero) or a
handle is open, whatever happens to the node's name; two live nodes never share a number. The number comes from the
node id, so it is the same on every mount and host: its first 8 bytes without the top bit, and where that is 0, 1
(the root) or taken by another live node, the first 8 bytes of SHA-256(node id, attempt), attempt = 1, 2, …
63 random bits make a second attempt a thing for tests.

Called on the trio thread only; nothing here awaits.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Final

from novafs.catalogtree import ROOT_ID, Entry
from novafs.errors import StaleError

if TYPE_CHECKING:
    from novafs.image import Image

ROOT_INODE: Final = 1
INODE_MASK: Final = (1 << 63) - 1


class Node:
    """One node of the catalog that the kernel knows.

    entry: as last seen in the catalog. lookups: the kernel's references, see fuse_reply_entry. handles: open file
    handles of this mount, those included whose release has not ended. image: the engine's object of the last open.
    """

    __slots__ = (
        "adopted",
        "cached_generation",
        "entry",
        "generation_told",
        "gone",
        "handles",
        "image",
        "inode",
        "lookups",
        "retried",
        "size_told",
    )

    def __init__(self, inode: int, entry: Entry) -> None:
        self.inode = inode
        self.entry = entry
        self.lookups = 0
        self.handles = 0
        self.image: Image | None = None
        # The catalog has no such node any more; attributes come from `entry` and `image`. Set when the catalog says so.
        self.gone = False
        # The size that the kernel takes the file to have while no handle is open. Set with every answer that carries
        # attributes and when the last handle closes; -1: none given.
        self.size_told = -1
        # The generation that those attributes are of; None: they were a catalog hint, or none.
        self.generation_told: int | None = None
        # The generation that the kernel's pages are of while no handle is open; None: it can have none worth keeping.
        self.cached_generation: int | None = None
        # While handles are open: `image.adopted` as of what the kernel's pages and size are of; -1: older ones may be among them.
        self.adopted = -1
        # Threads whose open was answered with ESTALE, so that they look the name up again. See `NovaOperations.open`.
        self.retried: set[int] = set()


class NodeTable:
    """Nodes by inode number and by node id."""

    def __init__(self, root: Entry) -> None:
        self.root = Node(ROOT_INODE, root)
        self._by_inode: dict[int, Node] = {ROOT_INODE: self.root}
        self._by_id: dict[bytes, Node] = {ROOT_ID: self.root}

    def __len__(self) -> int:
        return len(self._by_inode)

    def known(self, inode: int) -> Node | None:
        """The node of an inode number, if it is in the table."""
        return self._by_inode.get(inode)

    def at(self, inode: int) -> Node:
        """The node of an inode number. Raises StaleError where the kernel asks for one that it has forgotten."""
        node = self._by_inode.get(inode)
        if node is None:
            raise StaleError(f"inode {inode}: not known to this mount; look the name up again")
        return node

    def find(self, node_id: bytes) -> Node | None:
        """The live node of that id, if the kernel knows it."""
        return self._by_id.get(node_id)

    def inode_of(self, node_id: bytes) -> int:
        """The number that the node has, or would get if it were looked up now."""
        node = self._by_id.get(node_id)
        if node is not None:
            return node.inode
        inode = int.from_bytes(node_id[:8], "big") & INODE_MASK
        attempt = 0
        while inode <= ROOT_INODE or inode in self._by_inode:
            attempt += 1
            digest = hashlib.sha256(node_id + attempt.to_bytes(4, "little")).digest()
            inode = int.from_bytes(digest[:8], "big") & INODE_MASK
        return inode

    def looked_up(self, entry: Entry) -> Node:
        """The node of `entry`, made if need be, with one more reference by the kernel."""
        node = self._by_id.get(entry.node_id)
        if node is None:
            node = Node(self.inode_of(entry.node_id), entry)
            self._by_inode[node.inode] = self._by_id[entry.node_id] = node
        else:
            node.entry = entry
            node.gone = False  # found again: another host had moved it to where this one had not looked yet
        node.lookups += 1
        return node

    def forget(self, inode: int, count: int) -> None:
        """The kernel drops `count` references; with the last one, and no handle open, the node leaves the table."""
        node = self._by_inode.get(inode)
        if node is not None:
            node.lookups = max(0, node.lookups - count)
            self.let_go(node)

    def let_go(self, node: Node) -> None:
        """Drop the node unless somebody still has it. Called when a handle closes, too."""
        if node.lookups == 0 and node.handles == 0 and node is not self.root:
            self._by_inode.pop(node.inode, None)
            self._by_id.pop(node.entry.node_id, None)
