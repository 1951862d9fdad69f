"""What an operator may set, and what is counted: the engine's settings and statistics."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from novafs.errors import ConfigError

PLACES_MAX: Final = 1 << 18


@dataclass(frozen=True, slots=True)
class Settings:
    """What an operator may set. Raises ConfigError for values out of range."""

    prefetch_window: int = 10
    """Chunks that a stream reads ahead when the store answers at once; 0 for no streams."""
    prefetch_window_bytes: int = 32 << 20
    """What a stream may read ahead at most where the store is slow: the bandwidth-delay product of the way to it, 30 ms at 250 MB/s."""
    prefetch_accuracy_target: float = 0.85
    prefetch_aggression: float = 0.0
    prefetch_traffic_max: float = 1.5
    """Backend traffic as a multiple of what there would be without prefetch."""
    read_around_bytes: int = 8 << 20
    """What is fetched around a miss of an image of which nothing is known, where the store is far; 0: nothing."""
    chunk_size: int = 65536
    places_max: int = PLACES_MAX
    learning_rate: float = 1.0
    """Of all models, as a multiple of the measured best; 0: nothing is learned."""

    def __post_init__(self) -> None:
        for name, low, high in (
            ("prefetch_window", 0, 1024),
            ("prefetch_accuracy_target", 0.0, 0.99),
            ("prefetch_aggression", 0.0, 1.0),
            ("prefetch_traffic_max", 1.0, 100.0),
            ("prefetch_window_bytes", 65536, 1 << 30),
            ("read_around_bytes", 0, 1 << 26),
            ("chunk_size", 512, 1 << 26),
            ("places_max", 1024, 1 << 26),
            ("learning_rate", 0.0, 10.0),
        ):
            value = getattr(self, name)
            if not low <= value <= high:
                raise ConfigError(f"{name} = {value}: expected {low} to {high}")


@dataclass(slots=True)
class Counts:
    """What became of prefetches, of one source or of all."""

    issued: int = 0
    used: int = 0
    late: int = 0
    wasted: int = 0
    dropped: int = 0

    @property
    def accuracy(self) -> float | None:
        """Used or late, of those whose end is known; None where there is none."""
        ended = self.used + self.late + self.wasted
        return (self.used + self.late) / ended if ended else None


@dataclass(frozen=True, slots=True)
class EngineStatistics:
    """A snapshot. `sources` is by the source's name; coverage is None before there was a miss to avoid."""

    accesses: int
    misses: int
    misses_without: int
    total: Counts
    sources: dict[str, Counts]
    pending: int
    candidates: int
    examples: int
    right: int
    """Of the examples: how often the gate had said what came of it."""
    log_loss: float
    patience: float
    lifetime: float
    lstm_images: int
    """Images on which the LSTM is in use at present."""
    lstm_asked: int
    """Accesses on which it was asked."""

    @property
    def coverage(self) -> float | None:
        """Misses avoided / misses without prefetch."""
        return 1.0 - self.misses / self.misses_without if self.misses_without else None
