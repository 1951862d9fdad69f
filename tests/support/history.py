"""What a program outside the daemon wrote to one image, what it was promised, and whether an image that is found later can be that.

Writes are of whole blocks of 4 KiB, each of which tells the image, its place and its version, so an old, a foreign, a torn or a
moved block is recognised as what it is. Every block written and every resize is a *step*; steps are counted in the order in
which they were issued. A crash may lose the newest steps, but only those after the last one that was promised; and what it
leaves is a point in time: the image after some step, in all blocks.

    history = ImageHistory("a.raw")
    data = history.write(10, 3)              before the write is issued
    os.pwrite(fd, data, 10 * BLOCK)
    mark = history.steps
    os.fsync(fd)
    history.promise(mark)                    it returned
    ...                                      kill -9, mount again
    history.check(path.read_bytes())         raises Lost, or takes what was found as the new beginning
"""

from __future__ import annotations

import hashlib
import struct
from typing import Final, NamedTuple

BLOCK: Final = 4096
_HEAD: Final = struct.Struct("<8s8sQQ")
_MAGIC: Final = b"NOVATEST"
_ZEROS: Final = bytes(BLOCK)


class Lost(AssertionError):
    """The image is nothing that may be left of what was written."""


class _Found(NamedTuple):
    """One block as its content tells: version 0 is zeros."""

    version: int
    whole: bool
    ours: bool
    block: int


class ImageHistory:
    """Of one image. For one writer; others may look when it is done."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.steps = 0
        """Issued so far; never counted anew."""
        self.promised = 0
        """An fsync has returned for every step up to here."""
        self.stored = 0
        """Every step up to here is in a generation in the store: it survives the loss of the host."""
        self._first = 0
        self._tag = hashlib.sha256(name.encode()).digest()[:8]
        self._versions: dict[int, list[tuple[int, int]]] = {}
        """Block -> (since which step, version), ascending; a block that is not there was zeros at all times."""
        self._sizes: list[tuple[int, int]] = [(0, 0)]

    # ---- what is issued

    @property
    def blocks(self) -> int:
        """The size as of the last step, in blocks."""
        return self._sizes[-1][1]

    def write(self, block: int, count: int) -> bytes:
        """Note that `count` blocks from `block` on are about to be written; the bytes."""
        parts = []
        for at in range(block, block + count):
            self.steps += 1
            self._versions.setdefault(at, [(self._first, 0)]).append((self.steps, self.steps))
            if at >= self.blocks:
                self._sizes.append((self.steps, at + 1))
            parts.append(self._content(at, self.steps))
        return b"".join(parts)

    def resize(self, blocks: int) -> None:
        """Note that the image is about to be cut or grown."""
        self.steps += 1
        for at, versions in self._versions.items():
            if at >= blocks and versions[-1][1]:
                versions.append((self.steps, 0))
        self._sizes.append((self.steps, blocks))

    def promise(self, mark: int, *, stored: bool = False) -> None:
        """Everything up to step `mark` survives a crash; stored: the loss of the host as well."""
        self.promised = max(self.promised, mark)
        if stored:
            self.stored = max(self.stored, mark)

    def withdraw(self, mark: int) -> None:
        """What was noted after step `mark` failed, and nothing of it was done. The steps stay counted."""
        self._sizes = [pair for pair in self._sizes if pair[0] <= mark]
        self._versions = {at: kept for at, known in self._versions.items() if (kept := [pair for pair in known if pair[0] <= mark])}

    def expected(self, block: int, count: int) -> bytes:
        """What a read finds after the last step; short at the end of the image."""
        blocks = range(block, min(block + count, self.blocks))
        return b"".join(self._content(at, self._versions[at][-1][1] if at in self._versions else 0) for at in blocks)

    def _content(self, block: int, version: int) -> bytes:
        if not version:
            return _ZEROS
        head = _HEAD.pack(_MAGIC, self._tag, block, version)
        if version % 4:  # most compress well, as on a real disk
            return head * (BLOCK // _HEAD.size)
        return head + hashlib.shake_128(head).digest(BLOCK - _HEAD.size)

    # ---- what is found

    def check(self, content: bytes, *, host_lost: bool = False) -> int:
        """Raise Lost unless `content` is the image as it was after some step that is not before the last promised one (host_lost: not
        before the last one in the store). Then what was found is the new beginning; how many steps were lost."""
        low, high = self.stored if host_lost else self.promised, self.steps
        if len(content) % BLOCK:
            raise Lost(f"{self.name}: has {len(content)} bytes, which nobody made it")
        blocks = len(content) // BLOCK
        spans = _spans(self._sizes, blocks, low, high)
        if not spans:
            known = sorted({size for since, size in self._sizes if since > low} | {_at(self._sizes, low)})
            raise Lost(f"{self.name}: has {blocks} blocks; since the last promise (step {low}) it had {known}")
        found = [self._look(content, at) for at in range(blocks)]
        for at, one in enumerate(found):  # each on its own first: that says most
            if not self._block_spans(at, one, low, high):
                raise Lost(self._what(at, one, low))
        agreed = 0
        for at, one in enumerate(found):
            both = _meet(spans, self._block_spans(at, one, low, high))
            if not both:
                raise Lost(
                    f"{self.name}: no point in time: size and blocks 0 to {agreed} are as after steps {_shown(spans)}, "
                    f"block {at} as after {_shown(self._block_spans(at, one, low, high))}; promised was step {low}, issued {high}"
                )
            spans, agreed = both, at
        self._begin_anew(found)
        return high - spans[-1][1]

    def _begin_anew(self, found: list[_Found]) -> None:
        self._first = self.promised = self.stored = self.steps
        self._versions = {at: [(self.steps, one.version)] for at, one in enumerate(found) if one.version}
        self._sizes = [(self.steps, len(found))]

    def _look(self, content: bytes, at: int) -> _Found:
        data = content[at * BLOCK : (at + 1) * BLOCK]
        if data == _ZEROS:
            return _Found(0, True, True, at)
        magic, tag, block, version = _HEAD.unpack_from(data)
        ours = magic == _MAGIC and tag == self._tag
        return _Found(version, ours and data == self._content(block, version), ours, block)

    def _block_spans(self, at: int, one: _Found, low: int, high: int) -> list[tuple[int, int]]:
        if not one.whole or not one.ours or one.block != at:
            return []
        return _spans(self._versions.get(at, [(self._first, 0)]), one.version, low, high)

    def _what(self, at: int, one: _Found, low: int) -> str:
        versions = self._versions.get(at, [(self._first, 0)])
        due = _at(versions, low)
        if not one.ours:
            what = "bytes that were never written to this image"
        elif not one.whole:
            what = f"a part of version {one.version} and something else"
        elif one.block != at:
            what = f"version {one.version} of block {one.block}"
        else:
            what = f"version {one.version}" if one.version else "zeros"
        later = [version for since, version in versions if since > low]
        return f"{self.name}: block {at} holds {what}; promised (step {low}) was version {due}, written after it were {later}"


def _at(values: list[tuple[int, int]], step: int) -> int:
    """The value as of a step."""
    return next(value for since, value in reversed(values) if since <= step)


def _spans(values: list[tuple[int, int]], wanted: int, low: int, high: int) -> list[tuple[int, int]]:
    """The spans of steps, within low to high inclusive, after which the value was `wanted`."""
    found = []
    for number, (since, value) in enumerate(values):
        until = values[number + 1][0] - 1 if number + 1 < len(values) else high
        if value == wanted and max(since, low) <= min(until, high):
            found.append((max(since, low), min(until, high)))
    return found


def _meet(first: list[tuple[int, int]], second: list[tuple[int, int]]) -> list[tuple[int, int]]:
    both = [(max(a, c), min(b, d)) for a, b in first for c, d in second]
    return sorted((low, high) for low, high in both if low <= high)


def _shown(spans: list[tuple[int, int]]) -> str:
    return ", ".join(f"{low} to {high}" for low, high in spans)
