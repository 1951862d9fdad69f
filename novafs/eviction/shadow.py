"""Shadow caches: what each expert would have held, for a sample of the keys, and by that who should be in charge.

The sample is spatial (C. Waldspurger and others, "SHARDS", FAST 2015): a key is in it by a hash of itself, for good, and the shadows
have the same share of the capacity, so that they hit as often as full ones would. The sample is all keys while the tier holds up to
`SHADOW_CHUNKS`, and a power of two of them beyond, so the cost of an access falls with the size of the tier; `coarsen` halves it.

The rule: for each pair the accesses count that one had and the other had not (Q. McNemar 1947). An expert takes over when it is ahead
by more than `SIGMAS` standard deviations of that count and by `MARGIN` of the misses of who is in charge: changes cost more than they
seem to, as the tier holds what its former chief chose. The model has less to prove, `MODEL_SIGMAS` and no margin, as a change to it
moves nothing, and gets the word when it has learned something (`begin`). LRU has least to prove, `LRU_SIGMAS`: whoever is measured to
be worse than it gives way to it, within a period or a few. Counts fade by a thirty-second for each period, so
that what happened long ago is forgotten. Accesses before the first eviction say nothing and are not counted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Final

from novafs.eviction.base import EvictionPolicy

SHADOW_CHUNKS: Final = 256
SHADOW_CHUNKS_MIN: Final = 64
"""To so few a sample may be cut where there is no processor time for more."""
PERIOD: Final = 512
FADE: Final = 31 / 32
SIGMAS: Final = 6.0
MARGIN: Final = 0.03
MODEL_SIGMAS: Final = 1.5
LRU_SIGMAS: Final = 1.0
_PHI: Final = 0x9E3779B97F4A7C15
_MASK: Final = (1 << 32) - 1


class Shadows:
    """The experts' shadows for a tier of so many bytes and chunks."""

    def __init__(
        self, makers: Mapping[str, Callable[[], EvictionPolicy]], capacity_bytes: int, chunks: float, first: str, model: str
    ) -> None:
        """makers: by name, what makes an expert; `first` is in charge, and again whenever nobody is better; `model` takes over easily."""
        self._proof: Final = {first: (LRU_SIGMAS, 0.0), model: (MODEL_SIGMAS, 0.0)}
        """Who has less to prove: standard deviations, share of the misses."""
        self.in_charge = first
        self.switches = 0
        self._bits = max(0, math.ceil(math.log2(max(1.0, chunks / SHADOW_CHUNKS))))
        self._below = 1 << (32 - self._bits)
        self._chunks = chunks / (1 << self._bits)
        """Chunks of the sample that fit."""
        self.capacity_bytes = max(1, capacity_bytes >> self._bits)
        self.names: Final = tuple(makers)
        self._experts: Final = [make() for make in makers.values()]
        for expert in self._experts:
            expert.set_capacity(self.capacity_bytes)
        self._used_bytes = [0] * len(self._experts)
        self._sizes: list[dict[bytes, int]] = [{} for _ in self._experts]
        self._outcomes = [0.0] * (1 << len(self._experts))
        """By who hit (bit per expert): how many accesses, faded."""
        self._full = False
        self._left = PERIOD
        self.accesses = 0

    def begin(self, name: str) -> None:
        """`name` is in charge, and what was counted before says nothing."""
        if self.in_charge != name:
            self.in_charge = name
            self.switches += 1
        self._outcomes = [0.0] * len(self._outcomes)
        self._left = PERIOD

    def sampled(self, key: bytes) -> bool:
        """Whether `key` belongs to the sample."""
        return not self._bits or (int.from_bytes(key[:8], "little") * _PHI >> 32) & _MASK < self._below

    def access(self, key: bytes, size: int) -> bool:
        """A key of the sample was asked for. Whether somebody else is in charge now."""
        outcome = 0
        used = self._used_bytes
        for number, expert in enumerate(self._experts):
            sizes = self._sizes[number]
            if key in sizes:
                outcome |= 1 << number
                expert.touch(key)
                continue
            over = used[number] + size - self.capacity_bytes
            if over > 0:
                self._full = True
                for victim in expert.victims(over):
                    used[number] -= sizes.pop(victim)
            sizes[key] = size
            used[number] += size
            expert.insert(key, size)
        self.accesses += 1
        if not self._full:
            return False
        self._outcomes[outcome] += 1.0
        self._left -= 1
        if self._left:
            return False
        self._left = PERIOD
        changed = self._judge()
        self._outcomes = [count * FADE for count in self._outcomes]
        return changed

    def _judge(self) -> bool:
        names = self.names
        current = 1 << names.index(self.in_charge)
        misses = sum(count for outcome, count in enumerate(self._outcomes) if not outcome & current)
        best, best_lead = "", 0.0
        for number, name in enumerate(names):
            bit = 1 << number
            if bit == current:
                continue
            won = sum(count for outcome, count in enumerate(self._outcomes) if outcome & bit and not outcome & current)
            lost = sum(count for outcome, count in enumerate(self._outcomes) if outcome & current and not outcome & bit)
            lead = won - lost
            sigmas, margin = self._proof.get(name, (SIGMAS, MARGIN))
            if lead > best_lead and lead > sigmas * math.sqrt(won + lost) and lead > margin * misses:
                best, best_lead = name, lead
        if not best:
            return False
        self.in_charge = best
        self.switches += 1
        return True

    def coarsen(self) -> bool:
        """Half of the sample from now on, and so half of the cost; whether that was possible."""
        if self._chunks < 2 * SHADOW_CHUNKS_MIN or self.capacity_bytes < 2:
            return False
        self._chunks /= 2
        self._bits += 1
        self._below = 1 << (32 - self._bits)
        self.capacity_bytes >>= 1
        for number, (expert, sizes) in enumerate(zip(self._experts, self._sizes, strict=True)):
            for key in [key for key in sizes if not self.sampled(key)]:
                self._used_bytes[number] -= sizes.pop(key)
                expert.remove(key)
            expert.set_capacity(self.capacity_bytes)
            over = self._used_bytes[number] - self.capacity_bytes
            if over > 0:
                for victim in expert.victims(over):
                    self._used_bytes[number] -= sizes.pop(victim)
        return True

    def hit_rates(self) -> dict[str, float]:
        """Of each expert over the last while; empty before anything had to leave."""
        total = sum(self._outcomes)
        if total < 1.0:
            return {}
        return {
            name: sum(count for outcome, count in enumerate(self._outcomes) if outcome >> number & 1) / total
            for number, name in enumerate(self.names)
        }

    @property
    def memory_bytes(self) -> int:
        """Of the shadows, estimated: a key, its size, and its places in two dictionaries and a queue."""
        return 400 * sum(len(sizes) for sizes in self._sizes)
