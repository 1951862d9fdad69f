"""The stored form of the namespace: directory entries, and directories as pages.

A directory is a sorted list of entries. Its *content*, kept in its parent's entry (the root's in the catalog object),
is one of

    inline   the encoded entries themselves, up to INLINE_MAX bytes (ROOT_INLINE_MAX for the root)
    page     a reference to one blob of encoded entries
    index    a reference to a blob that lists pages: (first name, reference)

so that a change writes the page, the index and the ancestors, whatever the size of the directory. Pages are cut where
a hash of the name says so (on average PAGE_ENTRIES entries), and earlier only where a page would get too long: the cut
depends on the entries of the page alone, so all hosts cut alike and a change moves no other page.
"""

from __future__ import annotations

import bisect
import enum
import itertools
from collections.abc import Collection, Mapping, Sequence
from typing import Final

import msgspec
import xxhash

from novafs.chunk import REFERENCE_SIZE
from novafs.codec import PLAIN_MAX
from novafs.errors import InvalidNameError, ObjectCorruptError, TooLargeError

ROOT_ID: Final = bytes(16)
NAME_BYTES_MAX: Final = 255
PATH_BYTES_MAX: Final = 4096
XATTR_NAME_BYTES_MAX: Final = 255
XATTR_BYTES_MAX: Final = 64 << 10
INLINE_MAX: Final = 4 << 10
ROOT_INLINE_MAX: Final = 64 << 10
PAGE_ENTRIES: Final = 256
PAGE_BYTES: Final = 1 << 20
"""About what a page holds at most, unless one entry alone is larger: no reader takes a blob of more than PLAIN_MAX."""


class Kind(enum.IntEnum):
    """What an entry is."""

    DIRECTORY = 1
    IMAGE = 2
    SNAPSHOT = 3


class Snapshot(msgspec.Struct, frozen=True, array_like=True):
    """A retained generation of an image: its counter, when it was taken (nanoseconds), and its size in bytes."""

    counter: int
    created_ns: int
    size: int


class Content(msgspec.Struct, frozen=True, array_like=True):
    """Where a directory's entries are; exactly one field is not empty, none for an empty directory."""

    inline: bytes = b""
    page: bytes = b""
    index: bytes = b""


class Entry(msgspec.Struct, frozen=True, array_like=True):
    """A name in a directory.

    node_id: 16 bytes (an image's is its image id); mode: permission bits; size: bytes and times: nanoseconds, hints for
    images and the truth for directories; expires_s: seconds since the epoch, or None; content: of a directory.
    parent_id is known to whoever holds the directory and is not stored.
    """

    name: str
    node_id: bytes
    kind: Kind
    mode: int
    uid: int
    gid: int
    atime_ns: int
    mtime_ns: int
    ctime_ns: int
    size: int = 0
    stored_bytes: int = 0
    xattrs: dict[str, bytes] = {}
    expires_s: float | None = None
    snapshots: dict[str, Snapshot] = {}
    content: Content = Content()
    parent_id: bytes = ROOT_ID


class PageRow(msgspec.Struct, frozen=True, array_like=True):
    """One page of an index: its first name, how many entries, and the page's 64-byte reference."""

    first: str
    count: int
    reference: bytes


_ENTRIES = msgspec.msgpack.Decoder(list[Entry])
_ROWS = msgspec.msgpack.Decoder(list[PageRow])


def check_name(name: str) -> str:
    """`name`, where it can be one component of a path. Raises InvalidNameError."""
    shown = ascii(name[:80])
    if name in ("", ".", ".."):
        raise InvalidNameError(f"name {shown}: empty, '.' and '..' are no names")
    if "/" in name or "\0" in name:
        raise InvalidNameError(f"name {shown}: must not contain '/' or NUL")
    try:
        encoded = name.encode()
    except UnicodeEncodeError:
        raise InvalidNameError(f"name {shown}: is not valid UTF-8") from None
    if len(encoded) > NAME_BYTES_MAX:
        raise InvalidNameError(f"name {shown}…: {len(encoded)} bytes, at most {NAME_BYTES_MAX}")
    return name


def split_path(path: str) -> list[str]:
    """The components of a path inside the volume; leading, trailing and double slashes do not count. Raises InvalidNameError."""
    if len(path) > PATH_BYTES_MAX:
        raise InvalidNameError(f"path {path[:80]!a}…: {len(path)} characters, at most {PATH_BYTES_MAX}")
    return [check_name(part) for part in path.split("/") if part]


def encode_entries(entries: Sequence[Entry]) -> bytes:
    """One page, or an inline directory. Raises TooLargeError where nobody could read it back."""
    return _readable(msgspec.msgpack.encode([msgspec.structs.replace(e, parent_id=ROOT_ID) for e in entries]), entries[0].name)


def _readable(data: bytes, first: str) -> bytes:
    if len(data) > PLAIN_MAX:
        raise TooLargeError(
            f"directory entries from {first[:80]!a} on would take {len(data)} bytes, at most {PLAIN_MAX} can be: "
            f"delete snapshots, or spread the images over more directories"
        )
    return data


def decode_entries(data: bytes, where: str) -> list[Entry]:
    """The entries of a page. Raises ObjectCorruptError."""
    try:
        return _ENTRIES.decode(data) if data else []
    except msgspec.MsgspecError as error:
        raise ObjectCorruptError(f"{where}: a page of the directory does not parse ({error}); run 'novafs fsck'") from error


def check_entry(entry: Entry, where: str) -> None:
    """Raise ObjectCorruptError for an entry that no NovaFS writes: a name that is none would hide its directory from the kernel."""
    try:
        check_name(entry.name)
    except InvalidNameError as error:
        raise ObjectCorruptError(f"{where}: holds an entry that no NovaFS writes ({error}); run 'novafs fsck'") from error
    numbers = (entry.mode, entry.uid, entry.gid, entry.size, entry.stored_bytes)
    sound = entry.kind is not Kind.SNAPSHOT and len(entry.node_id) == len(ROOT_ID) and min(numbers) >= 0
    sound = sound and entry.mode <= 0o7777 and max(entry.uid, entry.gid) < 1 << 32 and max(numbers) < 1 << 63
    if not sound or max(map(abs, (entry.atime_ns, entry.mtime_ns, entry.ctime_ns))) >= 1 << 63:
        raise ObjectCorruptError(f"{where}: entry {entry.name!a} holds what no NovaFS writes; run 'novafs fsck'")


def encode_index(rows: Sequence[PageRow]) -> bytes:
    """An index blob. Raises TooLargeError where nobody could read it back."""
    return _readable(msgspec.msgpack.encode(rows), rows[0].first)


def decode_index(data: bytes, where: str) -> list[PageRow]:
    """The rows of an index blob. Raises ObjectCorruptError."""
    try:
        rows = _ROWS.decode(data)
    except msgspec.MsgspecError as error:
        raise ObjectCorruptError(f"{where}: the index of the directory does not parse ({error}); run 'novafs fsck'") from error
    if any(len(row.reference) != REFERENCE_SIZE for row in rows):
        raise ObjectCorruptError(f"{where}: the index of the directory holds a reference of the wrong length; run 'novafs fsck'")
    return rows


def cuts_here(name: str) -> bool:
    """Whether a page starts at this name."""
    return xxhash.xxh32_intdigest(name.encode()) % PAGE_ENTRIES == 0


def _weight(entry: Entry) -> int:
    """About how many bytes an entry takes, at least; what can be long is counted."""
    size = 128 + len(entry.name) + len(entry.content.inline)
    if entry.xattrs:
        size += sum(len(name) + len(value) + 8 for name, value in entry.xattrs.items())
    if entry.snapshots:
        size += sum(len(name) + 32 for name in entry.snapshots)
    return size


def page_bounds(entries: Sequence[Entry]) -> list[tuple[int, int]]:
    """Where entries, sorted by name, are cut into pages: (start, end) positions. A page never exceeds 8 × PAGE_ENTRIES, nor,
    but for a single entry, about PAGE_BYTES."""
    bounds: list[tuple[int, int]] = []
    start = size = 0
    for at, entry in enumerate(entries):
        weight = _weight(entry)
        if at > start and (cuts_here(entry.name) or at - start >= 8 * PAGE_ENTRIES or size + weight > PAGE_BYTES):
            bounds.append((start, at))
            start, size = at, 0
        size += weight
    if start < len(entries):
        bounds.append((start, len(entries)))
    return bounds


def cut_again(pages: Sequence[list[Entry]], by_name: Mapping[str, Entry], touched: Collection[str]) -> list[list[Entry]] | None:
    """The pages of a directory, as `page_bounds` would cut all of it anew, from its `pages` before names were `touched`, looking at
    no more than what lies around those; pages that stay are the same lists. None where there were no pages, or none that are in order.

    A page begins where a hash of the name says so, or where the one before it is full. So pages can be cut anew from any of the first
    kind up to the next without a look at the others, as long as the name that it begins with stays.
    """
    if not pages or not all(pages) or any(a[-1].name >= b[0].name for a, b in itertools.pairwise(pages)):
        return None
    starts = [0, *(number for number in range(1, len(pages)) if cuts_here(pages[number][0].name))]
    firsts = [pages[number][0].name for number in starts]
    again: dict[int, list[str]] = {}
    for name in touched:
        run = max(0, bisect.bisect_right(firsts, name) - 1)
        again.setdefault(run, []).append(name)
        if run and name == firsts[run] and name not in by_name:
            again.setdefault(run - 1, [])
    made: list[list[Entry]] = []
    waiting: list[Entry] = []
    for run, start in enumerate(starts):
        part = pages[start : starts[run + 1] if run + 1 < len(starts) else len(pages)]
        if run in again:
            names = {e.name for page in part for e in page}.union(again[run])
            waiting += [by_name[name] for name in sorted(names) if name in by_name]
        if run not in again or run + 1 not in again:
            made += [waiting[first:last] for first, last in page_bounds(waiting)]
            waiting = []
        if run not in again:
            made += part
    return made
