"""What a learning policy may spend: a share of the processor time that the whole process uses.

A share of the process's own time and not of the clock's: so what a policy costs is in proportion to what the process does, on a busy
mount and on a quiet one. It is earned first: what may be spent at the beginning is the share of what the process has used until then.
Saved up is at most `CREDIT_MAX_S`, so no minute is much dearer than the others.

Always holds: in the long run what is spent is at most the share, as long as the spender stops when `credit_s` is below nothing.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Final

CREDIT_MAX_S: Final = 0.25


class Allowance:
    """The account. share: of the process's time; 0 for no limit."""

    __slots__ = ("_at_s", "_process_s", "_share", "credit_s", "spent_s")

    def __init__(self, share: float = 0.0, *, process_s: Callable[[], float] | None = None) -> None:
        """process_s: where the process's seconds are read; default: `time.process_time`."""
        self._share = share
        self._process_s = time.process_time if process_s is None else process_s
        self._at_s = self._process_s() if share else 0.0
        self.spent_s = 0.0
        self.credit_s = min(CREDIT_MAX_S, share * self._at_s) if share else math.inf
        """Seconds that may be spent now."""

    @property
    def limited(self) -> bool:
        """Whether there is a limit."""
        return self._share > 0.0

    def spend(self, seconds: float) -> None:
        """So much was used."""
        self.spent_s += seconds
        self.credit_s -= seconds

    def refresh(self) -> None:
        """Take in what the process has used since the last call. It costs a system call: once for a batch is enough."""
        if self._share:
            now_s = self._process_s()
            self.credit_s = min(CREDIT_MAX_S, self.credit_s + self._share * (now_s - self._at_s))
            self._at_s = now_s
