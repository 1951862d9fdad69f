"""What stat(2) and the `user.novafs.*` attributes show of a node.

Choices and their reasons:

- `st_blocks` counts what the image stores (compressed, holes left out), rounded up to 512 bytes, so `du` tells cost.
- `st_blksize` is the chunk size, at least 64 KiB: `cp`, stdio and `shutil` write in multiples of it, so chunks are
  written whole and need no merge with what was there; smaller than 64 KiB would only cost requests.
- `st_nlink` is 1 for files and directories: there are no hard links, and 1 on a directory tells find(1) that it is no
  count of subdirectories. An unlinked open image shows 0.
- `user.novafs.*` is answered by getxattr but not listed, as CephFS does it: a copying tool (`cp -a`, `rsync -X`, tar)
  would carry the figures to the copy, where they are wrong, and fail to set them on the way back.
"""

from __future__ import annotations

import stat
from typing import TYPE_CHECKING, Final, NamedTuple

import pyfuse3

from novafs.catalogtree import Entry, Kind

if TYPE_CHECKING:
    from novafs.imagereader import ImageStatistics
    from novafs.mountoptions import MountOptions
    from novafs.volume import Attributes

TIMEOUT_S: Final = 1.0
"""For names and attributes: the most that design 5.5 allows while another host may change an image."""

BLOCK_SIZE: Final = 512
BLKSIZE_MIN: Final = 64 << 10
USER: Final = "user."
VIRTUAL: Final = "user.novafs."
IMAGE_MODE_DROPPED: Final = stat.S_ISUID | stat.S_ISGID
"""Bits that no image has: nobody executes a disk, and what a write must clear is never there (`novafs_mount.killpriv`)."""
INODE_GENERATION: Final = 0
"""An inode number is 63 bits of a random node id and never used again: nothing needs to tell reuses apart."""


class Figures(NamedTuple):
    """What changes with every write: bytes, nanoseconds. generation None: a hint of the catalog, perhaps out of date."""

    size: int
    stored_bytes: int
    atime_ns: int
    mtime_ns: int
    ctime_ns: int
    generation: int | None


def shown(attributes: Attributes, *, hint: bool = False) -> Figures:
    """The figures of a node from what the volume says; `hint`: it says what the catalog remembers."""
    return Figures(
        attributes.size,
        attributes.stored_bytes,
        attributes.atime_ns,
        attributes.mtime_ns,
        attributes.ctime_ns,
        None if hint else attributes.generation,
    )


class Presentation:
    """Turns entries into the kernel's attributes, with the owner and mode that the mount's options ask for."""

    def __init__(self, options: MountOptions, chunk_size: int) -> None:
        self._uid = options.uid
        self._gid = options.gid
        # As libfuse's own umask option: it sets the bits of everything, whatever is stored.
        self._mode = None if options.umask is None else 0o777 & ~options.umask
        self._blksize = max(chunk_size, BLKSIZE_MIN)

    def attributes(self, inode: int, entry: Entry, figures: Figures, *, gone: bool = False) -> pyfuse3.EntryAttributes:
        """The answer to LOOKUP, GETATTR and READDIRPLUS."""
        out = pyfuse3.EntryAttributes()
        out.st_ino = inode
        out.generation = INODE_GENERATION
        out.entry_timeout = out.attr_timeout = TIMEOUT_S
        kind, kept = (stat.S_IFDIR, ~0) if entry.kind is Kind.DIRECTORY else (stat.S_IFREG, ~IMAGE_MODE_DROPPED)
        out.st_mode = kind | (entry.mode & kept if self._mode is None else self._mode)
        out.st_nlink = 0 if gone else 1
        out.st_uid = entry.uid if self._uid is None else self._uid
        out.st_gid = entry.gid if self._gid is None else self._gid
        out.st_size = figures.size
        out.st_blocks = -(-figures.stored_bytes // BLOCK_SIZE)
        out.st_blksize = self._blksize
        out.st_atime_ns = figures.atime_ns
        out.st_mtime_ns = figures.mtime_ns
        out.st_ctime_ns = figures.ctime_ns
        return out


CHEAP_FIGURES: Final = frozenset({"image_id", "chunk_size", "generation", "size", "stored_bytes"})
"""Answered from the head of the image; the others walk its map once per generation."""


def cheap_figure(name: str, entry: Entry, figures: Figures, chunk_size: int) -> bytes:
    """The value of one of CHEAP_FIGURES, as text."""
    values = {
        "image_id": entry.node_id.hex(),
        "chunk_size": chunk_size,
        "generation": figures.generation,
        "size": figures.size,
        "stored_bytes": figures.stored_bytes,
    }
    return str(values[name]).encode()


MAP_FIGURES: Final = (
    "allocated_chunks",
    "hole_chunks",
    "unique_chunks",
    "unique_stored_bytes",
    "dedup_ratio",
    "compression_ratio",
)
"""Counts, bytes and ratios of `ImageStatistics`, of the committed generation."""


def map_figure(name: str, statistics: ImageStatistics) -> bytes:
    """The value of one of MAP_FIGURES, as text: whole numbers plain, ratios with three decimals."""
    value = getattr(statistics, name)
    return (f"{value:.3f}" if isinstance(value, float) else str(value)).encode()
