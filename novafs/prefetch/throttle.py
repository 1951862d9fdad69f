"""Holds the policies' share of the process's CPU: what is dear is left out where there is nothing to gain.

Work on a miss, or on the first use of a prefetch, is done: it costs a fraction of what a slow store does. A plain hit
only teaches, so above the share hits are *skimmed*: noted, not considered; and far above it most are not even that. The
caller measures; no clock is read here.
"""

from __future__ import annotations

from typing import Final

SHARE: Final = 0.019
"""Below the 5 % that are allowed, beside eviction's (`novafs.volume`): what must be done anyhow is counted, too, and saved by nothing."""
CREDIT_S_MAX: Final = 0.25
"""CPU seconds that may be saved up in quiet times."""
FAR_S: Final = 0.02


class Throttle:
    """A bucket filled with a share of the process's CPU time and emptied by the policies' own."""

    __slots__ = ("_credit_s", "_share", "policy_s", "process_s")

    def __init__(self, share: float = SHARE, *, spent_s: float = 0.0) -> None:
        """spent_s: CPU seconds of the process so far, all of them for other things: a young process has earned little, and no more."""
        self._share = share
        self._credit_s = min(CREDIT_S_MAX, share * spent_s)
        self.policy_s = 0.0
        self.process_s = 0.0

    @property
    def open(self) -> bool:
        """Whether plain hits may be considered, too."""
        return self._credit_s > 0.0

    @property
    def far_over(self) -> bool:
        """Whether even skimming is too much: where all is in memory, and to note a read costs a tenth of what the read does."""
        return self._credit_s < -FAR_S

    def account(self, policy_s: float, process_s: float) -> None:
        """CPU seconds that the policies, and the process as a whole with them, have used since the last call."""
        self.policy_s += policy_s
        self.process_s += process_s
        self._credit_s = min(CREDIT_S_MAX, self._credit_s + self._share * process_s - policy_s)
