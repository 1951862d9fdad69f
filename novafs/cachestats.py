"""`CacheStats`: what a cache of the library has done, in figures. `stats()` gives one; all counts are since the cache was opened."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from novafs.latency import LatencyFigures
from novafs.registry import ModelFigures

if TYPE_CHECKING:
    from novafs.keyprefetch import KeyPrefetcher
    from novafs.volume import Volume


@dataclass(slots=True)
class KeyCounts:
    """hits, misses: keys that were asked for, by whether there was a value. sets: values stored; set_bytes: theirs."""

    hits: int = 0
    misses: int = 0
    sets: int = 0
    set_bytes: int = 0


@dataclass(frozen=True, slots=True)
class TierFigures:
    """Chunks that were asked of a tier. hit_rate: None before any was. used_bytes, capacity_bytes: 0 where the tier can not say."""

    hits: int
    misses: int
    hit_rate: float | None
    used_bytes: int
    capacity_bytes: int


@dataclass(frozen=True, slots=True)
class PrefetchFigures:
    """Prefetches of chunks within values, and of keys. accuracy: used before they were evicted, of those whose end is known. coverage:
    misses avoided, of those that there would have been without; within values only. None where nothing is known.
    """

    issued: int
    used: int
    wasted: int
    accuracy: float | None
    coverage: float | None
    keys_issued: int
    keys_used: int
    keys_wasted: int
    keys_accuracy: float | None


@dataclass(frozen=True, slots=True)
class PatternFigures:
    """pattern: "sequential", "random", "periodic", "bursty" or "idle" (too little was read to tell). period_s: of a periodic one.
    usual_hours_utc: quarters of an hour at which it is usually read."""

    pattern: str
    period_s: float | None
    usual_hours_utc: tuple[str, ...]

    @classmethod
    def of(cls, described: Mapping[str, Any]) -> PatternFigures:
        """From `PrefetchEngine.describe`."""
        return cls(str(described["pattern"]), described["period_s"], tuple(described["usual_hours_utc"]))


@dataclass(frozen=True, slots=True)
class CacheStats:
    """keys: values that were asked for. tiers: "l1", "l2", "l3".

    dedup_ratio, compression_ratio: of what this cache has stored: chunks / new chunks, plain bytes of new chunks / stored bytes.
    saved_bytes: what was not stored thanks to both. latency: by call ("get", "set", …), and of the tiers.
    model_accuracy: of "eviction" (predictions that were right), "prefetch" (its accuracy), "predictor" (keys that were read as predicted);
    None where nothing was judged yet. models: those that the program has registered. eviction: who decides, in words.
    """

    keys: KeyCounts
    hit_rate: float | None
    tiers: dict[str, TierFigures]
    prefetch: PrefetchFigures
    dedup_ratio: float
    compression_ratio: float
    saved_bytes: int
    latency: dict[str, LatencyFigures]
    model_accuracy: dict[str, float | None]
    models: tuple[ModelFigures, ...]
    eviction: str


def describe_stats(volume: Volume, counts: KeyCounts, keys: KeyPrefetcher) -> CacheStats:
    """The figures of now."""
    found = volume.cache.statistics()
    tiers = {"l1": _tier(found.l1.hits, found.l1.misses, found.l1.used_bytes, found.l1.capacity_bytes)}
    if found.l2 is not None:
        tiers["l2"] = _tier(found.l2_traffic.hits, found.l2_traffic.misses, found.l2.used_bytes, found.l2.capacity_bytes)
    l3 = found.l3_traffic
    tiers["l3"] = _tier(l3.hits, l3.errors + l3.corruptions, 0, volume.config.l3.capacity_bytes)
    policy = volume.cache.l1.policy
    quality = policy.quality()
    prefetch = _prefetch(volume, keys)
    writes = volume.writes
    new_plain = writes.new_chunks * volume.chunk_size
    guesses = keys.counts
    figures = [keys.figures(), getattr(policy, "figures", lambda: None)()]
    latencies = volume.latencies.figures()
    return CacheStats(
        keys=KeyCounts(counts.hits, counts.misses, counts.sets, counts.set_bytes),
        hit_rate=_share(counts.hits, counts.hits + counts.misses),
        tiers=tiers,
        prefetch=prefetch,
        dedup_ratio=(writes.new_chunks + writes.dedup_chunks) / writes.new_chunks if writes.new_chunks else 1.0,
        compression_ratio=new_plain / writes.stored_bytes if writes.stored_bytes else 1.0,
        saved_bytes=max(0, writes.plain_bytes - writes.stored_bytes),
        latency={
            **latencies.get("library", {}),
            **{f"{tier}.{op}": f for tier in ("l2", "l3") for op, f in latencies.get(tier, {}).items()},
        },
        model_accuracy={
            "eviction": quality.accuracy if quality is not None else None,
            "prefetch": prefetch.accuracy,
            "predictor": _share(guesses.right, guesses.judged),
        },
        models=tuple(figure for figure in figures if figure is not None),
        eviction=quality.in_words() if quality is not None else policy.name,
    )


def _tier(hits: int, misses: int, used_bytes: int, capacity_bytes: int) -> TierFigures:
    return TierFigures(hits, misses, _share(hits, hits + misses), used_bytes, capacity_bytes)


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def _prefetch(volume: Volume, keys: KeyPrefetcher) -> PrefetchFigures:
    guesses = keys.counts
    ended = _share(guesses.used, guesses.used + guesses.wasted)
    if volume.prefetcher is None:
        return PrefetchFigures(0, 0, 0, None, None, guesses.issued, guesses.used, guesses.wasted, ended)
    found = volume.prefetcher.engine.statistics()
    total = found.total
    return PrefetchFigures(
        total.issued,
        total.used + total.late,
        total.wasted,
        total.accuracy,
        found.coverage,
        guesses.issued,
        guesses.used,
        guesses.wasted,
        ended,
    )
