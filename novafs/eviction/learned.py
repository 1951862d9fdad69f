"""`learned`: the policy that measures who knows best, and does what he says.

Parts: a book of features (`features`), a model of distances learned online from it (`learner`), shadow caches of the experts and of
the model for a sample of the keys (`shadow`). LRU is in charge until a shadow shows that somebody else is better; then he is, and
takes over what the tier holds, a slice for each call: nothing is dropped for a change of mind.

Always holds: what it names as victims is what it was told of and has not named; with no forest, a forest that does not load, or with
its share of the processor used up it is LRU. That prefetched chunks do not push out what was read is the tier's affair
(`novafs.eviction.probation`); here they have a feature of their own.

Cost: a touch is a few microseconds for single ones and a fraction of one in batches; a valuation of some dozens of candidates serves up
to 128 evictions, and in a large tier several leave at once, so that accesses come in batches; learning happens in `work`. `limit_cpu`
bounds the share of one processor's time: on the way to it shadows pause first, then learning, then LRU decides, and beyond it
accesses are no longer looked at: what is left is an LRU's cost.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import ClassVar, Final

import numpy as np

from novafs.errors import ConfigError
from novafs.eviction.base import EvictionPolicy, Quality
from novafs.eviction.features import BATCH_MIN, Book
from novafs.eviction.learner import Learner
from novafs.eviction.lru import LruPolicy
from novafs.eviction.ranked import OLDEST, RankedPolicy, candidates, served
from novafs.eviction.s3fifo import S3FifoPolicy
from novafs.eviction.shadow import Shadows
from novafs.eviction.state import load_model, save_model
from novafs.eviction.tinylfu import TinyLfuPolicy
from novafs.eviction.trees import RATE
from novafs.eviction.twoq import TwoQueuePolicy

UNDER_SHADOWS: Final = 0.6
"""Of its share of the processor shadows may take so much, so that learning is not starved by them."""
UNDER_LEARNING: Final = 0.8
OVER_LRU: Final = 0.95
OVER_BLIND: Final = 1.1
"""How far over its share of the processor it leaves the choice to LRU, and stops looking."""
AHEAD_S: Final = 10.0
"""Seconds whose share may be spent ahead: learning comes in bursts."""
PENDING_MAX: Final = 128
PATIENT_MIN: Final = 4096
"""With fewer chunks one may leave before the book was told of its access."""
MEASURED: Final = 8
PRESSURES: Final = ((0.85, 8), (0.7, 4), (0.5, 2))
"""Of its share spent, and how many times more evictions one valuation serves then: worse choices before none."""
MOVE_SLICE: Final = 256
AT_ONCE: Final = 512
AT_ONCE_MAX: Final = 64
"""Who is asked for a victim names one for each so many that are held, up to so many: at most a fifth of a percent of the tier stays
free, and the accesses that are told before each eviction come in batches, which are several times cheaper."""
CHUNK_BYTES: Final = 65536
"""What a chunk is taken for before any has come in."""
LRU: Final = LruPolicy.name
MODEL: Final = RankedPolicy.name
_EXPERTS: Final[dict[str, Callable[[], EvictionPolicy]]] = {
    policy.name: policy for policy in (LruPolicy, TwoQueuePolicy, TinyLfuPolicy, S3FifoPolicy)
}


class LearnedPolicy(EvictionPolicy):
    """The policy. The same calls give the same answers, except where `limit_cpu` makes it look at a clock."""

    name: ClassVar[str] = "learned"
    rates: ClassVar[bool] = True

    def __init__(self, *, seed: int = 1) -> None:
        """seed: of what is drawn at random."""
        self._random = np.random.default_rng(seed)
        self._book = Book()
        self._learner = Learner(self._book, self._random)
        self._shadows: Shadows | None = None
        self._main: EvictionPolicy | None = None
        """Who is in charge, where that is neither LRU nor the model: those two need nothing but the book."""
        self._moving: Iterator[bytes] | None = None
        self._used_bytes = 0
        self._told_bytes = 0
        self._shadow_chunks = 0.0
        self._chosen: list[tuple[bytes, float]] = []
        self._pending: list[bytes] = []
        """Accessed, and the book does not know it yet."""
        self._evicted = 0
        self._share_max = 0.0
        self._since_s = 0.0
        self._spent_s = 0.0
        self._calls = 0
        self._inserted_at = 0
        self._inserted = 0

    # --- settings --------------------------------------------------------------------------------------------

    def set_capacity(self, capacity_bytes: int) -> None:
        if capacity_bytes < 1:
            raise ConfigError(f"policy {self.name}: a capacity of {capacity_bytes} bytes holds nothing; expected 1 or more")
        changed = capacity_bytes != self._told_bytes
        self._told_bytes = capacity_bytes
        if self._main is not None:
            self._main.set_capacity(capacity_bytes)
        self._rescale(anew=changed)

    def limit_cpu(self, share: float) -> None:
        """Spend at most this share of one processor's time, counted from now; 0 for no limit."""
        self._share_max = share
        self._since_s = time.perf_counter()
        self._spent_s = 0.0

    def set_learning_rate(self, factor: float) -> None:
        self._learner.rate = min(1.0, RATE * factor)

    def _over(self, factor: float = UNDER_LEARNING) -> bool:
        if not self._share_max:
            return False
        return self._spent_s > factor * self._share_max * (time.perf_counter() - self._since_s + AHEAD_S)

    def _clock(self) -> float:
        # This thread's time: what others took meanwhile is not ours.
        return time.thread_time() if self._share_max else 0.0

    def _spent(self, began: float) -> None:
        if self._share_max:
            self._spent_s += time.thread_time() - began

    def _sampled_clock(self) -> float:
        """For what is short: one call in `MEASURED` is measured and stands for the others; a negative time says that this one is not."""
        if not self._share_max:
            return -1.0
        self._calls += 1
        return -1.0 if self._calls % MEASURED else time.thread_time()

    def _spent_sampled(self, began: float) -> None:
        if began >= 0.0:
            self._spent_s += MEASURED * (time.thread_time() - began)

    def _rescale(self, chunks: float = 0.0, *, anew: bool = False) -> None:
        """Fit half-lives, and the shadows where the tier's size in chunks has changed by much, or with `anew`."""
        book = self._book
        if not chunks:
            mean = self._used_bytes / len(book.held) if book.held else CHUNK_BYTES
            chunks = max(1.0, self._told_bytes / mean)
        book.set_scale(chunks)
        learner, random = self._learner, self._random
        if anew or self._shadows is None or not self._shadow_chunks / 2 < chunks < self._shadow_chunks * 2:
            first = LRU if self._learner.forest is None else MODEL
            in_charge = first if self._shadows is None else self._shadows.in_charge
            makers = {**_EXPERTS, MODEL: lambda: RankedPolicy(book, learner, random)}
            switches = 0 if self._shadows is None else self._shadows.switches
            self._shadows = Shadows(makers, self._told_bytes or self._used_bytes, chunks, in_charge, MODEL)
            self._shadows.switches = switches
            self._shadow_chunks = chunks
            for key, slot in book.held.items():
                book.mark(slot, self._shadows.sampled(key))

    # --- coming and going ------------------------------------------------------------------------------------

    def insert(self, key: bytes, size: int, *, prefetched: bool = False, place: int = -1) -> None:
        began = self._sampled_clock()
        shadows = self._shadows
        marked = shadows is not None and shadows.sampled(key)
        self._book.enter(key, size, place, prefetched=prefetched, marked=marked)
        self._used_bytes += size
        if self._main is not None:
            self._main.insert(key, size, prefetched=prefetched, place=place)
        if not prefetched:
            self._inserted += 1
            self._note((key,))
        if self._moving is not None:
            self._move()
        self._spent_sampled(began)

    def _note(self, keys: Sequence[bytes]) -> None:
        """These were accessed; the book is told a batch at a time."""
        for start in range(0, len(keys), PENDING_MAX):
            self._pending.extend(keys[start : start + PENDING_MAX])
            if len(self._pending) >= PENDING_MAX:
                self._catch_up()

    def _catch_up(self) -> None:
        """Tell the book of the accesses noted, oldest first. Before anything is valued."""
        pending, self._pending = self._pending, []
        held = self._book.held
        keys = [key for key in pending if key in held]
        if self._over(OVER_BLIND):
            # Only who was read when; what waits for an access may have missed it.
            self._learner.lose_sight()
        elif len(keys) < BATCH_MIN:
            for key in keys:
                slot = held[key]
                self._accessed(key, slot, self._book.marked(slot))
        else:
            self._accessed_many(keys)

    def _accessed(self, key: bytes, slot: int, marked: bool) -> None:
        book = self._book
        example = book.access(slot)
        if example >= 0:
            self._learner.answered(example, book.now - 1)
        self._learner.draw()
        if marked and self._shadows is not None and not self._over(UNDER_SHADOWS) and self._shadows.access(key, book.size_of(slot)):
            self._take_over()

    def resize(self, key: bytes, size: int) -> None:
        self._used_bytes += self._book.resize(key, size)
        if self._main is not None:
            self._main.resize(key, size)

    def touch(self, key: bytes) -> None:
        self.touch_many((key,))

    def touch_many(self, keys: Iterable[bytes]) -> None:
        began = self._sampled_clock()
        held = self._book.held
        present = [key for key in keys if key in held]
        for key in present:
            held.move_to_end(key)
        if self._main is not None:
            self._main.touch_many(present)
        self._note(present)
        if self._moving is not None:
            self._move()
        self._spent_sampled(began)

    def _accessed_many(self, keys: list[bytes]) -> None:
        book = self._book
        held = book.held
        slots = np.fromiter((held[key] for key in keys), dtype=np.int64, count=len(keys))
        self._learner.answered_many(*book.access_many(slots))
        self._learner.draw()
        shadows = self._shadows
        if shadows is not None and not self._over(UNDER_SHADOWS):
            for at in book.marked_of(slots).tolist():
                if shadows.access(keys[at], book.size_of(int(slots[at]))):
                    self._take_over()

    def remove(self, key: bytes) -> None:
        if self._forget(key, ghost=False) and self._main is not None:
            self._main.remove(key)

    def _forget(self, key: bytes, *, ghost: bool) -> int:
        """Its bytes; 0 where it was not held."""
        slot = self._book.held.get(key)
        if slot is None:
            return 0
        size = self._book.size_of(slot)
        self._book.leave(key, ghost=ghost)
        self._used_bytes -= size
        return max(1, size)

    # --- who leaves ------------------------------------------------------------------------------------------

    def victims(self, bytes_needed: int) -> list[bytes]:
        began = self._clock()
        held = self._book.held
        if len(held) < PATIENT_MIN or self._in_charge == MODEL or len(self._pending) >= BATCH_MIN:
            self._catch_up()
        if not self._evicted and held:
            # Full for the first time: now it is known how many chunks the tier holds.
            self._rescale(float(len(held)))
            self._inserted_at, self._inserted = self._book.now, 0
        gone: list[bytes] = []
        # The experts' own choice depends on what came in since the last.
        least = min(AT_ONCE_MAX, len(held) // AT_ONCE) if self._main is None else 0
        while (bytes_needed > 0 or len(gone) < least) and held:
            if self._main is not None and self._moving is None:
                for named in self._main.victims(bytes_needed):
                    bytes_needed -= self._forget(named, ghost=True)
                    gone.append(named)
                continue
            learned = self._in_charge == MODEL and self._learner.forest is not None and not self._over(OVER_LRU)
            key = self._worst() if learned else next(iter(held))
            bytes_needed -= self._forget(key, ghost=True)
            if self._main is not None:
                self._main.remove(key)
            gone.append(key)
        self._count(len(gone))
        self._spent(began)
        return gone

    def _count(self, gone: int) -> None:
        before = self._evicted
        self._evicted += gone
        held = len(self._book.held) + gone
        if self._evicted // 256 == before // 256 and before:
            return
        if not 0.8 * self._book.scale < held < 1.25 * self._book.scale:
            self._rescale(float(held))
        passed = self._book.now - self._inserted_at
        if passed > 0.5 * held and self._inserted:
            lifetime = held * passed / self._inserted
            self._learner.lifetime = 0.8 * self._learner.lifetime + 0.2 * lifetime if self._learner.lifetime else lifetime
            self._inserted_at, self._inserted = self._book.now, 0

    def _worst(self) -> bytes:
        book = self._book
        chosen = self._chosen
        while chosen:
            key, last = chosen.pop()
            slot = book.held.get(key)
            if slot is not None and book.last_of(slot) == last:
                return key
        held = len(book.held)
        slots = np.concatenate(
            [
                np.fromiter(itertools.islice(book.held.values(), OLDEST), dtype=np.int64),
                book.draw(self._random, candidates(held)),
            ]
        )
        more = next((times for spent, times in PRESSURES if self._over(spent)), 1)
        order = self._learner.worst_first(slots)[: served(held) * more]
        keys = [book.key_of(slot) for slot in order.tolist()]
        self._chosen = list(zip(reversed(keys), reversed(book.lasts_of(order).tolist()), strict=True))
        return self._chosen.pop()[0]

    # --- who is in charge ------------------------------------------------------------------------------------

    @property
    def _in_charge(self) -> str:
        return LRU if self._shadows is None else self._shadows.in_charge

    def _take_over(self) -> None:
        """Somebody else is in charge: he learns what is held, coldest first, a slice at a time."""
        make = _EXPERTS.get(self._in_charge) if self._in_charge != LRU else None
        self._chosen = []
        self._moving = None
        self._main = None
        if make is not None:
            self._main = make()
            self._main.set_capacity(self._told_bytes or max(1, self._used_bytes))
            self._moving = iter(list(self._book.held))
            self._move()

    def _begin_model(self) -> None:
        """There is a model now: it has the word until it is measured to be worse than somebody."""
        if self._shadows is not None:
            self._shadows.begin(MODEL)
            self._take_over()

    def _move(self) -> None:
        main, moving = self._main, self._moving
        if main is None or moving is None:
            return
        book = self._book
        slice_ = list(itertools.islice(moving, MOVE_SLICE))
        for key in slice_:
            slot = book.held.get(key)
            if slot is not None and key not in main:
                main.adopt(key, book.size_of(slot), 0 if book.unused(slot) else book.apart(slot))
        if len(slice_) < MOVE_SLICE:
            self._moving = None

    # --- learning, quality, state ----------------------------------------------------------------------------

    def work(self) -> bool:
        if self._over():
            return False
        began = time.thread_time()
        self._catch_up()
        untrained = self._learner.forest is None
        more = self._learner.step()
        if untrained and self._learner.forest is not None:
            self._begin_model()
        self._spent_s += time.thread_time() - began
        return more

    def chances(self, keys: Sequence[bytes]) -> list[float | None]:
        """Of each key that is held, or was lately, the guessed chance that it is asked for again while it can be held; None where nothing
        is known, and beyond the share of the processor."""
        if self._learner.forest is None or self._over():
            return [None] * len(keys)
        began = self._clock()
        self._catch_up()
        slots = [self._book.slot(key) for key in keys]
        known = [slot for slot in slots if slot >= 0]
        said = self._learner.chances(np.array(known, dtype=np.int64)) if known else None
        self._spent(began)
        if said is None:
            return [None] * len(slots)
        answers = iter(said.tolist())
        return [next(answers) if slot >= 0 else None for slot in slots]

    def quality(self) -> Quality:
        learner = self._learner
        shadows = self._shadows
        return Quality(
            in_charge=self._in_charge,
            predictions=learner.predictions,
            judged=learner.judged,
            accuracy=learner.right / learner.judged if learner.judged else None,
            calibration=learner.calibration(),
            shadow_hit_rates=shadows.hit_rates() if shadows is not None else {},
            switches=shadows.switches if shadows is not None else 0,
            trainings=learner.trainings,
            cpu_s=self._spent_s,
            memory_bytes=self._book.memory_bytes + learner.memory_bytes + (shadows.memory_bytes if shadows is not None else 0),
        )

    def save(self) -> bytes | None:
        return save_model(self._learner)

    def load(self, data: bytes, name: str) -> None:
        load_model(self._learner, data, name)
        self._begin_model()

    def __len__(self) -> int:
        return len(self._book.held)

    def __contains__(self, key: object) -> bool:
        return key in self._book.held
