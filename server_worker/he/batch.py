"""Packing of many sequences: one ciphertext per feature and per unit, a sequence in each slot; no rotations.

The cost is the same for one sequence and for thousands.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nightsplit.server_worker.he.arithmetic import Arithmetic
from nightsplit.shared.he.ckks import Ciphertext
from nightsplit.shared.he.weights import ClassifierWeights, FloatArray

Row = Sequence[Ciphertext]
"""A ciphertext for each feature of a frame, or for each unit."""


@dataclass
class State:
    """State between two frames: h of the highest level, c one level lower, and the logit so far, of the level of c."""

    h: Row
    c: Row
    votes: Ciphertext


def step(arithmetic: Arithmetic, classifier: ClassifierWeights, t: int, features: Row, state: State | None) -> State:
    """Evaluate frame t, from 0, that is not the last one, with a classifier whose gates depend on h.

    Features are of the highest level; `state` is that after frame t - 1, None for the first frame. In the result the
    votes are one level below the highest one, c two, h three.
    """
    (i, f, o, g), votes = _gates(arithmetic, classifier, t, features, state, np.ones(4 * classifier.hidden))
    c = _cells(arithmetic, i, f, g, state)
    return State([arithmetic.dot([pair]) for pair in zip(o, c, strict=True)], c, votes)


def last_step(arithmetic: Arithmetic, classifier: ClassifierWeights, features: Row, state: State | None) -> Ciphertext:
    """Return the logits after the last frame, three levels below the highest one; arguments as of `step`.

    The weight of a unit's evidence is multiplied into its output gate, so that it costs no level.
    """
    weight = np.ones(4 * classifier.hidden)
    weight[2 * classifier.hidden : 3 * classifier.hidden] = classifier.votes[-1] * classifier.temporal
    (i, f, o, g), votes = _gates(arithmetic, classifier, classifier.frames - 1, features, state, weight)
    evidence = arithmetic.dot(list(zip(o, _cells(arithmetic, i, f, g, state), strict=True)))
    return arithmetic.add_plain(arithmetic.sum([evidence, votes]), classifier.constant)


def _gates(
    arithmetic: Arithmetic, classifier: ClassifierWeights, t: int, features: Row, state: State | None,
    weight: FloatArray,
) -> tuple[list[Row], Ciphertext]:  # fmt: skip
    """Return i, f, o, g of each unit, times `weight` (4 hidden,), and the votes including frame t."""
    matrix, inputs = classifier.inputs, list(features)
    spatial = classifier.votes[t] * classifier.spatial
    if state is not None:
        assert classifier.state is not None
        matrix, inputs = np.concatenate([matrix, classifier.state], 1), [*features, *state.h]
        spatial = np.concatenate([spatial, classifier.votes[t - 1] * classifier.temporal])
    rows = [
        arithmetic.weighted_sum(scale * row, inputs, float(scale * bias))
        for scale, row, bias in zip(weight, matrix, classifier.bias, strict=True)
    ]
    votes = arithmetic.weighted_sum(spatial, inputs)
    if state is not None:
        votes = arithmetic.sum([votes, state.votes])
    return [rows[n : n + classifier.hidden] for n in range(0, len(rows), classifier.hidden)], votes


def _cells(arithmetic: Arithmetic, i: Row, f: Row, g: Row, state: State | None) -> Row:
    """Return c of each unit: i g + f c."""
    if state is None:
        return [arithmetic.dot([pair]) for pair in zip(i, g, strict=True)]
    units = zip(i, g, f, state.c, strict=True)
    return [arithmetic.dot([(i_k, g_k), (f_k, c_k)]) for i_k, g_k, f_k, c_k in units]
