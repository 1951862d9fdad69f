"""What happened lately, for people who look: warnings and errors of the log, commits, leases. In memory, bounded, without secrets.

Two rings, because a busy mount commits every few seconds: what went wrong is not pushed out by what went well. A line that comes
again right after itself is counted, not repeated. `EventRing` is a logging handler, so it may be called from any thread.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from dataclasses import dataclass
from typing import Any, Final

from novafs import logs

TROUBLES_MAX: Final = 100
NOTICES_MAX: Final = 60
TEXT_MAX: Final = 400


def scrubbed(text: str) -> str:
    """The text on one line, cut to TEXT_MAX, without control characters, and without users, passwords and secret parameters of URLs."""
    text = logs.scrubbed(" ".join(text.split()))
    # Names of images are in it: what would turn a line around, or steer a terminal, is shown as what it is.
    text = "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in text)
    return text if len(text) <= TEXT_MAX else f"{text[: TEXT_MAX - 1]}…"


@dataclass(slots=True)
class Event:
    """time_s: epoch seconds, of the last time. kind: `error`, `warning`, `commit`, `lease` or `mount`. count: times in a row."""

    time_s: float
    kind: str
    text: str
    count: int = 1


class EventRing(logging.Handler):
    """The two rings. As a handler it takes what is at least a warning."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._guard = threading.Lock()
        self._troubles: deque[Event] = deque(maxlen=TROUBLES_MAX)
        self._notices: deque[Event] = deque(maxlen=NOTICES_MAX)
        self.counts: dict[str, int] = {"warning": 0, "error": 0}
        """Lines of the log, by kind, since the start."""

    def note(self, kind: str, text: str) -> None:
        """Something worth telling has happened."""
        self._add(self._notices, kind, text)

    def emit(self, record: logging.LogRecord) -> None:
        """A line of the log."""
        try:
            kind = "error" if record.levelno >= logging.ERROR else "warning"
            text = record.getMessage()
            if record.exc_info and record.exc_info[0] is not None:
                text = f"{text}: {record.exc_info[0].__name__}: {record.exc_info[1]}"
            self.counts[kind] += 1
            self._add(self._troubles, kind, text)
        except Exception:
            self.handleError(record)

    def _add(self, ring: deque[Event], kind: str, text: str) -> None:
        text, now_s = scrubbed(text), time.time()
        with self._guard:
            if ring and (ring[-1].kind, ring[-1].text) == (kind, text):
                ring[-1].count += 1
                ring[-1].time_s = now_s
            else:
                ring.append(Event(now_s, kind, text))

    def latest(self, most: int = TROUBLES_MAX + NOTICES_MAX) -> list[dict[str, Any]]:
        """What happened, newest first, as JSON takes it."""
        with self._guard:
            found = sorted([*self._troubles, *self._notices], key=lambda event: -event.time_s)[:most]
            return [{"time_s": e.time_s, "kind": e.kind, "text": e.text, "count": e.count} for e in found]
