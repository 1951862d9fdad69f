"""What was read of an image while another host may write it: enough to tell, before the first write, whether all of it still is so.

Noted are ranges and a digest of what was read last in each. Whoever reads more than `RANGES_MAX` ranges, or `BYTES_MAX` bytes, of
them has seen `everything`: any newer generation may then have changed what he knows. A machine that waits to be migrated here reads the
metadata of its disk's format, and reads it again when it arrives; one that was started a second time by mistake reads all sorts of things.
"""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable
from typing import Final

from novafs.asynctools import open_nursery

PROBE_BYTES: Final = 65536
"""At the beginning of an image: what is read of these, to find out the format or the number of heads, is no content."""
RANGES_MAX: Final = 64
BYTES_MAX: Final = 2 << 20


class Seen:
    """Of one image, by whoever may write it here. Nothing here takes a checkpoint but `holds`."""

    def __init__(self, *, everything: bool = False) -> None:
        """everything: it is not known what was read."""
        self.everything = everything
        self._bytes = 0
        self._ranges: dict[tuple[int, int], bytes | None] = {}
        """Digest by offset and length; None while it is being read."""

    def begin(self, offset: int, length: int) -> None:
        """These bytes are being read."""
        if self.everything or offset + length <= PROBE_BYTES or (offset, length) in self._ranges:
            return
        self._bytes += length
        if len(self._ranges) == RANGES_MAX or self._bytes > BYTES_MAX:
            self.everything = True
            self._ranges.clear()
        else:
            self._ranges[offset, length] = None

    def end(self, offset: int, length: int, data: bytes) -> None:
        """They were read (fewer at the end of the image)."""
        self.begin(offset, length)
        if (offset, length) in self._ranges:
            self._ranges[offset, length] = _digest(data)

    async def holds(self, read: Callable[[int, int], Awaitable[bytes]]) -> bool:
        """Whether all that was read still is as it was. read: of the newest generation; raises what that raises."""
        if self.everything or None in self._ranges.values():
            return False
        same: list[bool] = []

        async def compare(offset: int, length: int, digest: bytes | None) -> None:
            same.append(_digest(await read(offset, length)) == digest)

        async with open_nursery() as nursery:
            for (offset, length), digest in self._ranges.items():
                nursery.start_soon(compare, offset, length, digest)
        return all(same)


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()
