"""`learned`: the policy that measures who knows best, and does what he says.

Parts: a book of features (`features`), a model of distances learned online from it (`learner`), shadow caches of the experts and of
the model for a sample of the keys (`shadow`). LRU is in charge until there is a model (where time is limited: one that has learned for a
while), then the model, until the shadows show that it is worse than LRU or that somebody is better; who takes over learns what the tier
holds, a slice for each call: nothing is dropped for a change of mind.

Always holds: what it names as victims is what it was told of and has not named; with no forest, a forest that does not load, or with
its share of the processor used up it is LRU. That prefetched chunks do not push out what was read is the tier's affair
(`novafs.eviction.probation`); here they have a feature of their own.

Cost: a touch is a fraction of a microsecond, and the book hears of it in a batch; a valuation of as many candidates as there are chunks,
up to 2,048, serves a twelfth as many evictions; learning happens in `work`. `limit_cpu` bounds the share of the process's own time
(`allowance`): as it runs out a valuation serves more evictions, learning pauses, then the shadows, then LRU decides, and below that
accesses are no longer looked at: what is left is little more than an LRU's cost.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import ClassVar, Final

import numpy as np

from novafs.errors import ConfigError
from novafs.eviction.allowance import Allowance
from novafs.eviction.base import EvictionPolicy, Quality
from novafs.eviction.features import BATCH_MIN, Book
from novafs.eviction.learner import Learner
from novafs.eviction.lru import LruPolicy
from novafs.eviction.ranked import OLDEST, STALE_SHARE, RankedPolicy, drawn, served
from novafs.eviction.s3fifo import S3FifoPolicy
from novafs.eviction.shadow import Shadows
from novafs.eviction.state import load_model, save_model
from novafs.eviction.tinylfu import TinyLfuPolicy
from novafs.eviction.trees import RATE
from novafs.eviction.twoq import TwoQueuePolicy

LEARN_S: Final = 0.02
SHADOW_S: Final = 0.01
LRU_S: Final = 0.0
BLIND_S: Final = -0.03
"""Of the allowance's credit: with less, learning pauses, then shadows; then LRU decides, then accesses are no longer looked at."""
PRESSURES: Final = ((0.03, 4), (0.06, 2))
"""With less credit than that, how many times more evictions one valuation serves: worse choices before none."""
PAUSES_MAX: Final = 64
"""Batches of accesses that the shadows may miss for want of credit before their sample is halved."""
CHANCES_SHARE: Final = 0.25
"""Of what was spent, and of so much before there is anything, how much the tiers below get: they ask for few chunks at a time, which is
dear."""
CHANCES_FIRST_S: Final = 0.1
APPRENTICE: Final = 3
"""Where its time is limited the model decides from its so manieth training on: what it values before is time that it does not learn in."""
PENDING_MAX: Final = 1024
PENDING_MIN: Final = 64
PENDING_SHARE: Final = 4
"""The book is told of accesses when so many have come, or one for each so many chunks that the tier holds."""
MEASURED: Final = 16
INTERRUPTED_S: Final = 2e-4
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
        self._chosen: list[bytes] = []
        """Whom to evict next, worst last."""
        self._unread: set[bytes] = set()
        """Those of them that nobody has asked for since they were valued."""
        self._stale_at = 0
        self._pending: list[bytes] = []
        """Accessed, and the book does not know it yet."""
        self._pending_max = PENDING_MIN
        self._evicted = 0
        self._allowance = Allowance()
        self._exact_s = 0.0
        """Of what was spent, that which was measured and not estimated."""
        self._exact_before_s = 0.0
        self._told_s = 0.0
        """Of what was spent, that which went into `chances`."""
        self._paused = 0
        self._begun = False
        """There is a model that decides, or did until it was measured."""
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
        """Spend at most this share of the processor time that the process uses from now on; 0 for no limit."""
        self._allowance = Allowance(share)
        self._told_s = 0.0

    def set_learning_rate(self, factor: float) -> None:
        self._learner.rate = min(1.0, RATE * factor)

    def _clock(self) -> float:
        # This thread's time: what others took meanwhile is not ours.
        return time.thread_time() if self._allowance.limited else 0.0

    def _spent(self, began: float) -> None:
        if self._allowance.limited:
            took_s = time.thread_time() - began
            self._exact_s += took_s
            self._allowance.spend(took_s)

    def _sampled_clock(self) -> float:
        """For what is short: one call in `MEASURED` is measured and stands for the others; a negative time says that this one is not.

        The wall's clock: the thread's costs as much to read as what is measured. Whoever was interrupted says nothing.
        """
        self._calls += 1
        if self._calls % MEASURED or not self._allowance.limited:
            return -1.0
        self._exact_before_s = self._exact_s
        return time.perf_counter()

    def _spent_sampled(self, began: float) -> None:
        took_s = time.perf_counter() - began
        if self._exact_s == self._exact_before_s and took_s < INTERRUPTED_S:
            self._allowance.spend(MEASURED * took_s)

    def _rescale(self, chunks: float = 0.0, *, anew: bool = False) -> None:
        """Fit half-lives, and the shadows where the tier's size in chunks has changed by much, or with `anew`."""
        book = self._book
        if not chunks:
            mean = self._used_bytes / len(book.held) if book.held else CHUNK_BYTES
            chunks = max(1.0, self._told_bytes / mean)
        book.set_scale(chunks)
        self._pending_max = int(max(PENDING_MIN, min(PENDING_MAX, chunks / (1 if self._allowance.limited else PENDING_SHARE))))
        learner, random = self._learner, self._random
        if anew or self._shadows is None or not self._shadow_chunks / 2 < chunks < self._shadow_chunks * 2:
            first = LRU if self._learner.forest is None else MODEL
            in_charge = first if self._shadows is None else self._shadows.in_charge
            makers = {**_EXPERTS, MODEL: lambda: RankedPolicy(book, learner, random)}
            switches = 0 if self._shadows is None else self._shadows.switches
            self._shadows = Shadows(makers, self._told_bytes or self._used_bytes, chunks, LRU, MODEL)
            self._shadows.in_charge = in_charge
            self._shadows.switches = switches
            self._shadow_chunks = chunks
            for key, slot in book.held.items():
                book.mark(slot, self._shadows.sampled(key))

    # --- coming and going ------------------------------------------------------------------------------------

    def insert(self, key: bytes, size: int, *, prefetched: bool = False, place: int = -1) -> None:
        began = self._sampled_clock()
        shadows = self._shadows
        marked = shadows is not None and shadows.sampled(key)
        self._unread.discard(key)
        self._book.enter(key, size, place, prefetched=prefetched, marked=marked)
        self._used_bytes += size
        if self._main is not None:
            self._main.insert(key, size, prefetched=prefetched, place=place)
        if not prefetched:
            self._inserted += 1
            self._pending.append(key)
            if len(self._pending) >= self._pending_max:
                self._catch_up()
        if self._moving is not None:
            self._move()
        if began >= 0.0:
            self._spent_sampled(began)

    def _catch_up(self) -> None:
        """Tell the book of the accesses noted, oldest first. Before anything is valued."""
        if not self._pending:
            return
        began = self._clock()
        self._allowance.refresh()
        pending, self._pending = self._pending, []
        if self._allowance.credit_s < BLIND_S:
            # Only who was read when; what waits for an access may have missed it.
            self._learner.lose_sight()
        else:
            self._tell(pending)
        self._spent(began)

    def _tell(self, pending: list[bytes]) -> None:
        book = self._book
        # Who has left in the meantime was asked for all the same.
        slots = [book.slot(key) for key in pending]
        if len(pending) < BATCH_MIN:
            for key, slot in zip(pending, slots, strict=True):
                if slot >= 0:
                    self._accessed(key, slot, book.marked(slot))
            # Not before: of who came in and is yet to be told of nothing is known.
            self._draw()
        elif min(slots) >= 0:
            self._accessed_many(pending, slots)
        else:
            known = [at for at, slot in enumerate(slots) if slot >= 0]
            self._accessed_many([pending[at] for at in known], [slots[at] for at in known])

    def _accessed(self, key: bytes, slot: int, marked: bool) -> None:
        book = self._book
        example = book.access(slot)
        if example >= 0:
            self._learner.answered(example, book.now - 1)
        if not marked or self._shadows is None or self._apprentice or self._allowance.credit_s < SHADOW_S:
            return
        if self._shadows.access(key, book.size_of(slot)):
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
        if self._unread:
            self._unread.difference_update(present)
        if self._main is not None:
            self._main.touch_many(present)
        most = self._pending_max
        for start in range(0, len(present), most):
            self._pending += present[start : start + most]
            if len(self._pending) >= most:
                # Oldest first, and not too many at a time: what comes again and again within a batch is only counted.
                self._catch_up()
        if self._moving is not None:
            self._move()
        if began >= 0.0:
            self._spent_sampled(began)

    def _accessed_many(self, keys: list[bytes], numbers: list[int]) -> None:
        book = self._book
        slots = np.array(numbers, dtype=np.int64)
        self._learner.answered_many(*book.access_many(slots))
        self._draw()
        shadows = self._shadows
        if shadows is None or self._apprentice:
            return
        if self._allowance.credit_s < SHADOW_S:
            self._paused += 1
            if self._paused > PAUSES_MAX:
                self._coarsen(shadows)
        else:
            for at in book.marked_of(slots).tolist():
                if shadows.access(keys[at], book.size_of(int(slots[at]))):
                    self._take_over()

    def _draw(self) -> None:
        if self._allowance.credit_s >= LEARN_S:
            self._learner.draw()

    def _coarsen(self, shadows: Shadows) -> None:
        """The shadows miss too much: fewer keys, and those at all times."""
        self._paused = 0
        if shadows.coarsen():
            book = self._book
            for key, slot in (*book.held.items(), *book.ghosts.items()):
                book.mark(slot, shadows.sampled(key))

    def remove(self, key: bytes) -> None:
        if self._forget(key, ghost=False) and self._main is not None:
            self._main.remove(key)

    def _forget(self, key: bytes, *, ghost: bool) -> int:
        """Its bytes; 0 where it was not held."""
        slot = self._book.leave(key, ghost=ghost)
        if slot < 0:
            return 0
        size = self._book.size_of(slot)
        self._used_bytes -= size
        return max(1, size)

    # --- who leaves ------------------------------------------------------------------------------------------

    def victims(self, bytes_needed: int) -> list[bytes]:
        began = self._sampled_clock()
        held = self._book.held
        if not self._evicted and held:
            # Full for the first time: now it is known how many chunks the tier holds.
            self._rescale(float(len(held)))
            self._inserted_at, self._inserted = self._book.now, 0
        gone: list[bytes] = []
        # The experts' own choice depends on what came in since the last.
        model = self._in_charge == MODEL and self._learner.forest is not None and self._allowance.credit_s >= LRU_S
        least = min(AT_ONCE_MAX, len(held) // AT_ONCE) if model else 0
        while (bytes_needed > 0 or len(gone) < least) and held:
            if self._main is not None and self._moving is None:
                for named in self._main.victims(bytes_needed):
                    bytes_needed -= self._forget(named, ghost=True)
                    gone.append(named)
                continue
            key = self._worst() if model else next(iter(held))
            bytes_needed -= self._forget(key, ghost=True)
            if self._main is not None:
                self._main.remove(key)
            gone.append(key)
        self._count(len(gone))
        if began >= 0.0:
            self._spent_sampled(began)
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
        chosen, unread = self._chosen, self._unread
        if book.now + len(self._pending) >= self._stale_at:
            chosen.clear()
        while chosen:
            key = chosen.pop()
            if key in unread and key in book.held:
                return key
        self._catch_up()
        began = self._clock()
        held = len(book.held)
        oldest = np.fromiter(itertools.islice(book.held.values(), OLDEST), dtype=np.int64)
        slots = np.concatenate([oldest, book.draw(self._random, drawn(held))])
        credit_s = self._allowance.credit_s
        more = next((times for least, times in PRESSURES if credit_s < least), 1)
        order = self._learner.worst_first(slots)[: served(len(slots)) * more]
        self._stale_at = book.now + int(STALE_SHARE * held) * more + 1
        self._chosen = chosen = [book.key_of(slot) for slot in reversed(order.tolist())]
        self._unread = set(chosen)
        self._spent(began)
        return chosen.pop()

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

    @property
    def _apprentice(self) -> bool:
        """Whether all the time there is goes into learning: nothing is measured yet, and nobody told."""
        return self._allowance.limited and not self._begun

    def _begin_model(self) -> None:
        """There is a model now: it has the word until it was measured, which is soon, and then as long as it is no worse than LRU."""
        self._begun = True
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
        self._allowance.refresh()
        if self._allowance.credit_s < LEARN_S:
            return False
        self._catch_up()
        began = self._clock()
        more = self._learner.step()
        if not self._begun and self._learner.trainings >= (APPRENTICE if self._allowance.limited else 1):
            self._begin_model()
        self._spent(began)
        return more

    def chances(self, keys: Sequence[bytes]) -> list[float | None]:
        """Of each key that is held, or was lately, the guessed chance that it is asked for again while it can be held; None where nothing
        is known, and beyond the share of the processor."""
        allowance = self._allowance
        spent_s = allowance.spent_s
        if (
            self._learner.forest is None
            or self._apprentice
            or allowance.credit_s < LRU_S
            or (allowance.limited and self._told_s > CHANCES_SHARE * (spent_s + CHANCES_FIRST_S))
        ):
            return [None] * len(keys)
        self._catch_up()
        began = self._clock()
        slots = [self._book.slot(key) for key in keys]
        known = [slot for slot in slots if slot >= 0]
        said = self._learner.chances(np.array(known, dtype=np.int64)) if known else None
        self._spent(began)
        self._told_s += allowance.spent_s - spent_s
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
            cpu_s=self._allowance.spent_s,
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
