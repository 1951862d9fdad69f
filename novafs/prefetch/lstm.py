"""An LSTM over the deltas between chunks, for order that transitions between contents cannot see. numpy only.

One layer (S. Hochreiter, J. Schmidhuber, 1997; gates i, f, g, o in one matrix) over embedded deltas, softmax over the
`VOCABULARY` most frequent ones and "other"; back-propagation through `STEPS` steps, Adam (D. Kingma, J. Ba, 2015). After M.
Hashemi et al., "Learning memory access patterns", ICML 2018.

`DeltaModel` is what an image has of it. It collects deltas, and is trained when somebody gives it time (`work`): a slice of
`BATCH` x `STEPS` recent deltas, which it first has to predict. It speaks up (`useful`) only where its precision at high
confidence was better than that of the image's transitions over the same accesses; otherwise it costs its slices and nothing
else. docs/prefetch.md says what it adds.

Bounded: `HISTORY` deltas, and weights of about 0.4 MB, thrice, which exist only from the first slice on.
"""

from __future__ import annotations

from collections import Counter, deque
from itertools import islice
from typing import Any, Final, cast

import numpy as np
import numpy.typing as npt

VOCABULARY: Final = 256
EMBEDDING: Final = 32
HIDDEN: Final = 48
STEPS: Final = 32
BATCH: Final = 16
"""With these sizes no product has more than 2^18 terms, up to which OpenBLAS stays on the calling thread: two threads of it
that wait for each other on a busy host cost ten times as much as one."""
CONTEXT: Final = 12
"""Deltas that a single prediction looks back on."""
HISTORY: Final = 8192
CONFIDENT: Final = 0.7
RATE: Final = 0.01
CLIP: Final = 1.0
REHEARSALS: Final = 2
FADE: Final = 0.98
SLICES_MIN: Final = 8
BETTER_BY: Final = 0.02
SHARE_MIN: Final = 0.02
"""Of the accesses, on how many the model has to be confident to be worth asking."""
OTHER: Final = 0

Floats = npt.NDArray[np.float32]
Tokens = npt.NDArray[np.int64]


def _sigmoid(x: Floats) -> Floats:
    squashed = np.tanh(x * np.float32(0.5))
    return cast(Floats, (squashed + 1.0) * np.float32(0.5))


class Lstm:
    """The network. Tokens are 0 to `words - 1`. Deterministic for a seed."""

    def __init__(self, words: int, *, embedding: int = EMBEDDING, hidden: int = HIDDEN, seed: int = 1) -> None:
        random = np.random.default_rng(seed)

        def matrix(rows: int, columns: int) -> Floats:
            return cast(Floats, (random.standard_normal((rows, columns)) / np.sqrt(rows)).astype(np.float32))

        self.hidden = hidden
        self.weights: dict[str, Floats] = {
            name: matrix(*shape) if len(shape) == 2 else np.zeros(shape, dtype=np.float32)
            for name, shape in self.shapes(words, embedding=embedding, hidden=hidden).items()
        }
        # Forget gates start open: what is remembered has to be unlearned, not learned.
        self.weights["bias"][hidden : 2 * hidden] = 1.0
        self._first = {name: np.zeros_like(value) for name, value in self.weights.items()}
        self._second = {name: np.zeros_like(value) for name, value in self.weights.items()}
        self._updates = 0

    @staticmethod
    def shapes(words: int, *, embedding: int = EMBEDDING, hidden: int = HIDDEN) -> dict[str, tuple[int, ...]]:
        """The weights by name."""
        return {
            "embedding": (words, embedding),
            "gates": (embedding + hidden, 4 * hidden),
            "bias": (4 * hidden,),
            "out": (hidden, words),
            "out_bias": (words,),
        }

    def forward(self, tokens: Tokens) -> tuple[Floats, list[tuple[Any, ...]]]:
        """Probabilities of the next token after each, (steps, batch, words), for tokens (steps, batch); and what `backward` needs."""
        w, hidden = self.weights, self.hidden
        steps, batch = tokens.shape
        h = np.zeros((batch, hidden), dtype=np.float32)
        c = np.zeros((batch, hidden), dtype=np.float32)
        tape: list[tuple[Any, ...]] = []
        outputs = np.empty((steps, batch, hidden), dtype=np.float32)
        logits = np.empty((steps, batch, len(w["out_bias"])), dtype=np.float32)
        for step in range(steps):
            joined = np.concatenate((w["embedding"][tokens[step]], h), axis=1)
            z = joined @ w["gates"] + w["bias"]
            i, f, o = _sigmoid(z[:, :hidden]), _sigmoid(z[:, hidden : 2 * hidden]), _sigmoid(z[:, 3 * hidden :])
            g = np.tanh(z[:, 2 * hidden : 3 * hidden])
            before = c
            c = f * before + i * g
            squashed = np.tanh(c)
            h = o * squashed
            outputs[step] = h
            np.matmul(h, w["out"], out=logits[step])
            tape.append((joined, i, f, g, o, before, squashed))
        logits += w["out_bias"]
        logits -= logits.max(axis=2, keepdims=True)
        np.exp(logits, out=logits)
        logits /= logits.sum(axis=2, keepdims=True)
        tape.append((outputs,))
        return logits, tape

    def last(self, tokens: Tokens) -> Floats:
        """Probabilities after the last of one row of tokens, as `forward` has them; for one row, in a third of the time."""
        w, n = self.weights, self.hidden
        width = w["embedding"].shape[1]
        inner = w["gates"][width:]
        # A sigmoid is a tanh of half the argument: one call does for all four gates.
        scale = np.full(4 * n, 0.5, dtype=np.float32)
        scale[2 * n : 3 * n] = 1.0
        given = (w["embedding"][tokens] @ w["gates"][:width] + w["bias"]) * scale
        inner = inner * scale
        h = c = np.zeros(n, dtype=np.float32)
        for row in given:
            t = np.tanh(row + h @ inner)
            s = t * np.float32(0.5) + np.float32(0.5)
            c = s[n : 2 * n] * c + s[:n] * t[2 * n : 3 * n]
            h = s[3 * n :] * np.tanh(c)
        logits = h @ w["out"] + w["out_bias"]
        chances = np.exp(logits - logits.max())
        return cast(Floats, chances / chances.sum())

    def backward(self, tokens: Tokens, targets: Tokens, chances: Floats, tape: list[tuple[Any, ...]]) -> dict[str, Floats]:
        """Gradients of the mean cross-entropy of `targets`, by weight."""
        w, hidden = self.weights, self.hidden
        steps, batch = tokens.shape
        (outputs,) = tape[-1]
        error = chances.copy()
        rows, columns = np.indices((steps, batch))
        error[rows, columns, targets] -= 1.0
        error /= steps * batch
        gradients = {name: np.zeros_like(value) for name, value in w.items()}
        gradients["out_bias"] = error.sum(axis=(0, 1))
        dh = np.zeros((batch, hidden), dtype=np.float32)
        dc = np.zeros((batch, hidden), dtype=np.float32)
        width = w["embedding"].shape[1]
        for step in range(steps - 1, -1, -1):
            joined, i, f, g, o, before, squashed = tape[step]
            gradients["out"] += outputs[step].T @ error[step]
            dh = dh + error[step] @ w["out"].T
            dc = dc + dh * o * (1.0 - squashed * squashed)
            dz = np.concatenate(
                (dc * g * i * (1.0 - i), dc * before * f * (1.0 - f), dc * i * (1.0 - g * g), dh * squashed * o * (1.0 - o)), axis=1
            )
            gradients["gates"] += joined.T @ dz
            gradients["bias"] += dz.sum(axis=0)
            inward = dz @ w["gates"].T
            np.add.at(gradients["embedding"], tokens[step], inward[:, :width])
            dh = inward[:, width:]
            dc = dc * f
        return gradients

    def update(self, gradients: dict[str, Floats]) -> None:
        """One step of Adam, the gradients' norm clipped."""
        norm = float(np.sqrt(sum(float((value * value).sum()) for value in gradients.values())))
        scale = CLIP / norm if norm > CLIP else 1.0
        self._updates += 1
        rate = RATE * np.sqrt(1.0 - 0.999**self._updates) / (1.0 - 0.9**self._updates)
        for name, value in gradients.items():
            value *= scale
            first, second = self._first[name], self._second[name]
            first += 0.1 * (value - first)
            second += 0.001 * (value * value - second)
            self.weights[name] -= (rate * first / (np.sqrt(second) + 1e-8)).astype(np.float32)


class DeltaModel:
    """What one image has of the LSTM."""

    def __init__(self) -> None:
        self._deltas: deque[int] = deque(maxlen=HISTORY)
        self._right: deque[bool | None] = deque(maxlen=HISTORY)
        """For each delta whether the transitions were confident, and if so right."""
        self._new = 0
        self._words: dict[int, int] = {}
        self._meanings: list[int] = []
        self._net: Lstm | None = None
        self._random = np.random.default_rng(2)
        self.slices = 0
        self.named = self.right = self.seen = 0.0
        """Faded counts: predictions made with confidence, those that were right, accesses they were made on."""
        self.markov_named = self.markov_right = 0.0

    @property
    def memory_bytes(self) -> int:
        """About what it takes."""
        net = 0 if self._net is None else 3 * sum(value.nbytes for value in self._net.weights.values())
        return net + 48 * len(self._deltas)

    @property
    def begun(self) -> bool:
        """Whether there is a network."""
        return self._net is not None

    def export(self) -> tuple[list[int], dict[str, Floats]] | None:
        """Copies of what the words mean and of the weights; None before the first slice."""
        net = self._net
        return None if net is None else (list(self._meanings), {name: value.copy() for name, value in net.weights.items()})

    def adopt(self, meanings: list[int], weights: dict[str, Floats]) -> None:
        """Go on from what another image of the family has learned. Whether it is any use here is judged here."""
        self._meanings = list(meanings)
        self._words = {delta: number for number, delta in enumerate(self._meanings) if number != OTHER}
        self._net = Lstm(VOCABULARY)
        for name, value in weights.items():
            self._net.weights[name][...] = value

    def observe(self, delta: int, markov_right: bool | None) -> None:
        """The distance from the chunk before; whether the transitions had named this chunk with confidence (None: not confident)."""
        self._deltas.append(delta)
        self._right.append(markov_right)
        self._new += 1

    @property
    def ready(self) -> bool:
        """Whether there is a slice's worth of deltas that it has not seen."""
        return self._new >= BATCH * STEPS + 1

    @property
    def precision(self) -> float:
        """Of its confident predictions the share that was right."""
        return self.right / self.named if self.named else 0.0

    @property
    def markov_precision(self) -> float:
        """The same of the transitions, on the same accesses."""
        return self.markov_right / self.markov_named if self.markov_named else 0.0

    @property
    def useful(self) -> bool:
        """Whether its candidates are worth having: more often right than the transitions where it is sure, and sure often enough."""
        enough = self.slices >= SLICES_MIN and self.named >= SHARE_MIN * self.seen
        return enough and self.precision > self.markov_precision + BETTER_BY

    def work(self) -> bool:
        """One slice: predict the newest deltas, then learn from them. False where there are not enough. About 15 ms."""
        if not self.ready:
            return False
        self._new = 0
        if self._net is None or (self.slices % 64 == 0 and self._stale()):
            self._begin()
        net = self._net
        assert net is not None
        tokens = np.fromiter((self._words.get(delta, OTHER) for delta in self._deltas), dtype=np.int64, count=len(self._deltas))
        span = BATCH * STEPS
        starts = [len(tokens) - span - 1]
        if starts[0] > 0:
            # Old slices again: a guest repeats itself less often than a network needs to be told.
            starts += self._random.integers(0, starts[0], REHEARSALS).tolist()
        for number, start in enumerate(starts):
            given = tokens[start : start + span].reshape(BATCH, STEPS).T
            wanted = tokens[start + 1 : start + span + 1].reshape(BATCH, STEPS).T
            chances, tape = net.forward(given)
            if number == 0:
                self._judge(chances, wanted)
            net.update(net.backward(given, wanted, chances, tape))
        self.slices += 1
        return True

    def _judge(self, chances: Floats, wanted: Tokens) -> None:
        best = chances.argmax(axis=2)
        sure = (chances.max(axis=2) >= CONFIDENT) & (best != OTHER)
        # The first steps of a row have no past to go by in the slice; in use there is one.
        sure[: STEPS // 4] = False
        for name in ("named", "right", "seen", "markov_named", "markov_right"):
            setattr(self, name, getattr(self, name) * FADE)
        self.named += float(sure.sum())
        self.right += float((sure & (best == wanted)).sum())
        self.seen += float(sure.size) * 0.75
        judged = [right for right in list(self._right)[-(BATCH * STEPS) :] if right is not None]
        self.markov_named += len(judged)
        self.markov_right += sum(judged)

    def _stale(self) -> bool:
        known = sum(delta in self._words for delta in self._deltas)
        return known < 0.5 * len(self._deltas) and len(Counter(self._deltas).keys() - self._words.keys()) < VOCABULARY

    def _begin(self) -> None:
        """A vocabulary of the most frequent deltas, and a network that knows nothing."""
        frequent = [delta for delta, _ in Counter(self._deltas).most_common(VOCABULARY - 1)]
        self._meanings = [0, *frequent]
        self._words = {delta: number for number, delta in enumerate(frequent, start=1)}
        self._net = Lstm(VOCABULARY)
        self.named = self.right = self.seen = self.markov_named = self.markov_right = 0.0

    def predict(self) -> list[tuple[int, float]]:
        """The likeliest next delta and its probability; empty where it is not half sure. About 0.1 ms."""
        net = self._net
        if net is None or len(self._deltas) < CONTEXT:
            return []
        newest = [self._words.get(delta, OTHER) for delta in islice(reversed(self._deltas), CONTEXT)]
        chances = net.last(np.array(newest[::-1], dtype=np.int64))
        word = int(chances.argmax())
        return [(self._meanings[word], float(chances[word]))] if word != OTHER and chances[word] >= CONFIDENT / 2 else []
