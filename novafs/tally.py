"""What modules above the volume count on it: chunks that were warmed, images that were given to another host. For the statistics only.

They count here, and not on objects of their own, since the figures are the mount's, whoever asked: a command, the library, another host.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class Warmed:
    """What `novafs.warming` did, by whatever asked for it. fetched: chunks brought; held: were there; failed: could not be read.

    read_bytes: payloads that came from L3 for it.
    """

    fetched: int = 0
    held: int = 0
    failed: int = 0
    read_bytes: int = 0

    def note(self, *, fetched: int, held: int, failed: int, read_bytes: int) -> None:
        """Count one step of warming."""
        self.fetched += fetched
        self.held += held
        self.failed += failed
        self.read_bytes += read_bytes


@dataclass(slots=True)
class Handoffs:
    """Of `novafs.handoff`. given: images given up to a host that answered; given_failed: those that stayed, for one that did not, or by
    an error. taken: offers of others; taken_failed: that were damaged, or whose chunks could not be brought; chunks: brought by them.
    """

    given: int = 0
    given_failed: int = 0
    taken: int = 0
    taken_failed: int = 0
    chunks: int = 0


@dataclass(slots=True)
class Tally:
    """Of one open volume."""

    warmed: Warmed = field(default_factory=Warmed)
    handoffs: Handoffs = field(default_factory=Handoffs)
