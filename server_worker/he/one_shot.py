"""Evaluation of a whole sequence in one step: gates depend only on x_t, and the result is a sum of products.

    h_T = o_T c_T,   c_T = sum over k of (i_k g_k) f_{k+1} ... f_T

The output gate is one more factor, after the last forget gate. Factors 2 ... frames are f_2 ... f_T, factor
frames + 1 is o_T. A ciphertext holds as many sequences as it has slots, one in each.
"""

from collections.abc import Callable, Sequence
from functools import cache, partial

import numpy as np

from nightsplit.server_worker.he.arithmetic import Arithmetic
from nightsplit.shared.he.ckks import Ciphertext
from nightsplit.shared.he.weights import ClassifierWeights

INPUT, FORGET, OUTPUT, CELL = range(4)
"""Kinds of gates (i, f, o, g), in the order of their rows in a classifier."""


def logits(arithmetic: Arithmetic, classifier: ClassifierWeights, frames: Sequence[Sequence[Ciphertext]]) -> Ciphertext:
    """Return the logits, `one_shot_levels` below the features.

    The classifier has gates that depend only on x_t; `frames` are the features of each frame, of the highest level.
    """
    spatial = np.concatenate([vote * classifier.spatial for vote in classifier.votes])
    votes = arithmetic.weighted_sum(spatial, [feature for features in frames for feature in features])

    def gate(unit: int, frame: int, kind: int) -> Ciphertext:
        row = kind * classifier.hidden + unit
        weight = classifier.temporal[unit] if kind == OUTPUT else 1.0
        bias = float(weight * classifier.bias[row])
        return arithmetic.weighted_sum(weight * classifier.inputs[row], frames[frame - 1], bias)

    units = [Products(arithmetic, len(frames), partial(gate, unit)) for unit in range(classifier.hidden)]
    pairs = [pair for unit in units for pair in unit.pairs(1, len(frames) + 1)]
    return arithmetic.add_plain(arithmetic.sum([arithmetic.dot(pairs), votes]), classifier.constant)


class Products:
    """Products of the gates of one unit, in a sequence of `frames`.

    `gate` returns the gate of a frame, from 1, and of a kind; an output gate has its weight.
    """

    def __init__(self, arithmetic: Arithmetic, frames: int, gate: Callable[[int, int], Ciphertext]) -> None:
        self._arithmetic, self._frames, self._gate = arithmetic, frames, gate
        self._factors: dict[tuple[int, int], Ciphertext] = {}

    def pairs(self, first: int, end: int) -> list[tuple[Ciphertext, Ciphertext]]:
        """Return pairs of factors: the sum of their products is the terms of frames first ... end - 1, up to `end`."""
        pairs = []
        while first < end:
            middle = _split(first, end, self._frames)
            pairs.append((self._factor(middle + 1, end), self._terms(first, middle)))
            first = middle + 1
        return pairs

    def _terms(self, first: int, end: int) -> Ciphertext:
        """Return the sum of the terms of frames first ... end, times the factors to `end`."""
        if first == end:
            return self._arithmetic.dot([(self._gate(end, INPUT), self._gate(end, CELL))])
        return self._arithmetic.sum([self._arithmetic.dot(self.pairs(first, end)), self._terms(end, end)])

    def _factor(self, first: int, end: int) -> Ciphertext:
        """Return the product of factors first ... end."""
        if (first, end) not in self._factors:
            if first == end:
                product = self._gate(end, FORGET) if end <= self._frames else self._gate(self._frames, OUTPUT)
            else:
                middle = (first + end) // 2
                product = self._arithmetic.dot([(self._factor(first, middle), self._factor(middle + 1, end))])
            self._factors[first, end] = product
        return self._factors[first, end]


def _split(first: int, end: int, frames: int) -> int:
    """Return the frame at which to divide products so that they need the fewest levels."""
    return min(range(first, end), key=lambda middle: _depth_at(first, middle, end, frames))


@cache
def _depth(first: int, end: int, frames: int) -> int:
    """Return the levels of the terms of frames first ... end; frame `frames` + 1 has no term."""
    if first == end:
        return int(end <= frames)
    return min(_depth_at(first, middle, end, frames) for middle in range(first, end))


def _depth_at(first: int, middle: int, end: int, frames: int) -> int:
    """Return the levels of the terms of frames first ... end when they are divided after `middle`."""
    factors = (end - middle - 1).bit_length()  # ceil(log2(end - middle))
    return max(1 + max(factors, _depth(first, middle, frames)), _depth(middle + 1, end, frames))
