"""What the engine remembers of one image, and of one prefetch that has not ended. Plain records: the engine alone changes them."""

from __future__ import annotations

from collections import deque
from typing import Final

from novafs.prefetch.account import Counts, Settings
from novafs.prefetch.base import Key, Origin, Place
from novafs.prefetch.echo import EchoSource
from novafs.prefetch.gate import Features
from novafs.prefetch.governor import Governor
from novafs.prefetch.lstm import DeltaModel
from novafs.prefetch.markov import MarkovSource, TransitionTable
from novafs.prefetch.patterns import DailyProfile, PatternWatch, SpellMemory
from novafs.prefetch.profile import Recorder
from novafs.prefetch.sequential import SequentialSource
from novafs.prefetch.spatial import SpatialSource

ECHO_REACH: Final = 8
"""Places that an echo names when the store answers at once."""


class Issue:
    """A prefetch that was decided and has not ended."""

    __slots__ = ("chance", "due", "features", "grace", "image", "kind", "origin", "overdue", "score", "sent", "tick")

    def __init__(
        self, image: ImageState, tick: int, origin: Origin, chance: float, features: Features | None, score: float, kind: int
    ) -> None:
        self.image = image
        self.tick = tick
        self.origin = origin
        self.chance = chance
        self.features = features
        self.score = score
        self.kind = kind
        self.due = tick
        """When the patience began to run."""
        self.grace = 0
        """Accesses before it begins to run again: what lies far ahead of a stream is not expected at once."""
        self.overdue = False
        self.sent = False


class ImageState:
    """What is remembered of one image."""

    __slots__ = (
        "base_misses",
        "counts",
        "daily",
        "deltas",
        "echo",
        "family",
        "governor",
        "interval_s",
        "last",
        "last_s",
        "markov",
        "misses",
        "number",
        "pattern_known",
        "private",
        "quiet",
        "recorder",
        "replay",
        "replaying",
        "spatial",
        "spells",
        "streams",
        "sure",
        "waited",
        "watch",
    )

    def __init__(self, number: int, settings: Settings, table: TransitionTable) -> None:
        self.number = number
        self.last: Place = -1
        self.last_s = 0.0
        self.waited = False
        self.interval_s = 0.005
        """Smoothed seconds between accesses, none counted longer than a fetch takes."""
        self.streams = SequentialSource(settings.prefetch_window)
        self.spatial = SpatialSource()
        self.markov = MarkovSource(table)
        self.echo = EchoSource(ECHO_REACH)
        self.deltas = DeltaModel()
        self.watch = PatternWatch()
        self.daily = DailyProfile()
        self.spells = SpellMemory()
        self.pattern_known: tuple[int, str] = (0, "idle")
        """What was found last, and when: accesses of all images."""
        self.sure: Place = -1
        """What the transitions named with confidence as the next; -1 where they were not sure."""
        self.governor = Governor(
            accuracy_target=settings.prefetch_accuracy_target,
            aggression=settings.prefetch_aggression,
            traffic_max=settings.prefetch_traffic_max,
        )
        self.quiet = 0
        """Neighbours judged since the last that passed."""
        self.base_misses = 0
        self.misses = 0
        self.family: Key | None = None
        """The content that the image was last opened with; None before it was read."""
        self.recorder: Recorder | None = None
        self.replay: deque[tuple[Place, float]] = deque()
        self.replaying = 0
        """Prefetches of the profile that have not ended."""
        self.counts = Counts()
        self.private = False
        """What it reads teaches no others: nothing of it is kept, and its transitions are in a table of its own (`unlearn`)."""

    def retune(self, settings: Settings) -> None:
        """Work with other settings from now on."""
        self.streams.window_max = settings.prefetch_window
        self.governor.retune(
            accuracy_target=settings.prefetch_accuracy_target,
            aggression=settings.prefetch_aggression,
            traffic_max=settings.prefetch_traffic_max,
        )
