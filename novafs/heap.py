"""Keeping the daemon's memory near what it holds: what malloc does with what was freed.

L1 is many thousand buffers of many lengths that come and go, and glibc's malloc gives such memory back badly. With an arena for each few
threads, which is how it begins, a mount with an L1 of 256 MiB had 900 MB after a minute of mixed work, two thirds of it free and held;
with one arena 520 MB. So a daemon has one (`one_arena`), which costs nothing that could be measured: threads of Python mostly allocate
while they hold the interpreter's lock. And where its memory comes near to what is promised (L1's capacity × 1.15 + 150 MB) it gives
free pages back (`Trimmer`): that takes some 0.1 ms for each MB, during which nobody can allocate, so it is done only there, and only when
more has come since the last time. `docs/performance.md`, "Memory".

Where malloc is not glibc's, nothing here does anything.
"""

from __future__ import annotations

import ctypes
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Final

import trio

log = logging.getLogger(__name__)

M_ARENA_MAX: Final = -8
LOOK_S: Final = 0.25
"""How often memory is looked at: 20 µs each."""
NEAR_FACTOR: Final = 1.02
NEAR_BYTES: Final = 120_000_000
"""Memory of L1's capacity × this + this is near to what is promised. A mount that holds nothing has 85 MB."""
WORTH_BYTES: Final = 16 << 20
"""By how much memory must have grown since something was given back last: what could not be given back then is in use."""
WORTH_SHARE: Final = 32
"""Or by one part in so many of L1's capacity, where that is more: what is given back already is looked at each time, 10 ms for each GB."""

_STATM: Final = Path("/proc/self/statm")
_PAGE_BYTES: Final = os.sysconf("SC_PAGE_SIZE")


def one_arena() -> bool:
    """Have malloc keep one heap for all threads, unless the environment says how many; before there are threads. Whether it was done."""
    libc = ctypes.CDLL(None)
    return "MALLOC_ARENA_MAX" not in os.environ and hasattr(libc, "mallopt") and libc.mallopt(M_ARENA_MAX, 1) == 1


def resident_bytes() -> int:
    """What this process has in memory."""
    return int(_STATM.read_text().split()[1]) * _PAGE_BYTES


def trim() -> None:
    """Give the kernel the pages that malloc holds free. Blocks, and all who allocate meanwhile with it."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


class Trimmer:
    """Gives memory back when it comes near to what is promised."""

    def __init__(
        self,
        capacity: Callable[[], int],
        *,
        resident: Callable[[], int] = resident_bytes,
        trim: Callable[[], None] = trim,
    ) -> None:
        """capacity: L1's, in bytes, as it is when it is asked."""
        self._capacity = capacity
        self._resident = resident
        self._trim = trim
        self._threads = trio.CapacityLimiter(1)
        self._least = 0
        """The least that was resident since something was given back last."""
        self.trims = 0

    async def run(self) -> None:
        """Until it is cancelled."""
        while True:
            await self.look()
            await trio.sleep(LOOK_S)

    async def look(self) -> None:
        """Give back what is free, if that may be much."""
        found = self._resident()
        self._least = min(self._least, found)
        capacity = self._capacity()
        if found <= capacity * NEAR_FACTOR + NEAR_BYTES or found - self._least < max(WORTH_BYTES, capacity // WORTH_SHARE):
            return
        await trio.to_thread.run_sync(self._trim, limiter=self._threads)
        self.trims += 1
        self._least = self._resident()
        log.debug("memory: %d MB, of which %d MB were free and are given back", found // 10**6, (found - self._least) // 10**6)
