"""From two looks at a mount to what people want to know: rates, hit rates, shares. Shared by `novafs top` and `novafs stats --watch`.

A look is what the control socket answers to `status`. Rates are per second between the two; None where there is no earlier look, the
figure is not known, or the daemon was started anew meanwhile.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

Look = Mapping[str, Any]
TIERS: Final = (("L1", "cache.l1", "l1"), ("L2", "cache.l2_traffic", "l2"), ("L3", "cache.l3_traffic", "l3"))
STATES: Final = ("dirty", "l1", "prefetched", "l2", "hole")


def at(look: Look | None, path: str) -> Any:
    """The value under a dotted path; None where a part of it is missing or null."""
    found: Any = look
    for name in path.split("."):
        if not isinstance(found, Mapping) or (found := found.get(name)) is None:
            return None
    return found


def rate(now: Look, then: Look | None, *paths: str) -> float | None:
    """The sum of counters under `paths`, per second."""
    elapsed_s = now["time_s"] - then["time_s"] if then is not None else 0.0
    values = [(at(now, path), at(then, path)) for path in paths]
    known = [(new, old) for new, old in values if new is not None and old is not None]
    if elapsed_s <= 0 or not known or any(new < old for new, old in known):
        return None
    return float(sum(new - old for new, old in known)) / elapsed_s


def hit_rate(now: Look, then: Look | None, path: str) -> float | None:
    """Hits of what was asked of a tier, since `then` or, without it, since the start."""
    hits, misses = at(now, f"{path}.hits"), at(now, f"{path}.misses")
    if hits is None:
        return None
    hits, misses = hits - (at(then, f"{path}.hits") or 0), misses - (at(then, f"{path}.misses") or 0)
    return hits / (hits + misses) if hits >= 0 and misses >= 0 and hits + misses else None


@dataclass(frozen=True, slots=True)
class Facts:
    """What one looks for first. Rates per second."""

    reads: float | None
    read_bytes: float | None
    writes: float | None
    written_bytes: float | None
    hit_rate: float | None
    dirty_bytes: int
    dirty_age_s: float
    dirty_max_bytes: int
    accuracy: float | None
    coverage: float | None


def facts(now: Look, then: Look | None) -> Facts:
    """Of two looks, or of one."""
    return Facts(
        reads=rate(now, then, "traffic.memory_reads", "traffic.waited_reads"),
        read_bytes=rate(now, then, "traffic.memory_bytes", "traffic.waited_bytes"),
        writes=rate(now, then, "traffic.writes"),
        written_bytes=rate(now, then, "traffic.written_bytes"),
        hit_rate=hit_rate(now, then, "cache.l1"),
        dirty_bytes=at(now, "data_at_risk.bytes") or 0,
        dirty_age_s=at(now, "data_at_risk.age_s") or 0.0,
        dirty_max_bytes=at(now, "dirty_max_bytes") or 0,
        accuracy=at(now, "prefetch.accuracy"),
        coverage=at(now, "prefetch.coverage"),
    )


def strip(found: Mapping[str, Any], width: int) -> list[str]:
    """A residency map (`novafs.residency`) as `width` states: of each part the one that most of it is in, "store" where that is none.

    What is dirty, or only prefetched, is shown wherever there is any: it is what one looks for.
    """
    cells = len(found["l1"])
    parts: list[str] = []
    for number in range(min(width, cells)):
        low, high = number * cells // min(width, cells), (number + 1) * cells // min(width, cells)
        shares = {state: sum(found[state][low:high]) / (high - low) for state in STATES}
        rare = next((state for state in ("dirty", "prefetched") if shares[state] > 0), None)
        shares["store"] = max(0.0, 1.0 - sum(shares.values()))
        parts.append(rare or max(shares, key=lambda state: shares[state]))
    return parts
