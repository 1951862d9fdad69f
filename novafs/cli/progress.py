"""Progress of work in phases, for `gc` and `fsck`: one line on stderr, where that is a terminal, once it takes two seconds."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

SHOW_AFTER_S: Final = 2.0
INTERVAL_S: Final = 0.2

_WORDS: Final = {
    "catalogs": "reading the catalog: {:,} revisions",
    "images": "reading generations: {:,}",
    "nodes": "walking maps: {:,} nodes",
    "packs": "reading packs: {:,}",
}


@contextmanager
def phases(title: str) -> Iterator[Callable[[str, int], None]]:
    """Call what this gives with a phase and how many things of it are done."""
    if not sys.stderr.isatty():
        yield lambda *_: None
        return
    began_s = time.monotonic()
    shown_s = 0.0

    def show(phase: str, done: int) -> None:
        nonlocal shown_s
        now = time.monotonic()
        if now - began_s >= SHOW_AFTER_S and now - shown_s >= INTERVAL_S:
            shown_s = now
            print(f"\r\x1b[K{title}: {_WORDS.get(phase, phase + ' {:,}').format(done)}", end="", file=sys.stderr, flush=True)

    try:
        yield show
    finally:
        if shown_s:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
