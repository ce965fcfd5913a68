"""Many sequences at once: one ciphertext per feature and per unit, a sequence in each slot; no rotations.

The cost is that of one sequence or of thousands.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nightsplit.server_worker.he.arithmetic import Arithmetic
from nightsplit.shared.he.ckks import Ciphertext
from nightsplit.shared.he.weights import ClassifierWeights, FloatArray

Row = Sequence[Ciphertext]


@dataclass
class State:
    """What goes from frame to frame.

    Attributes:
        h: a ciphertext per unit, of the highest level.
        c: likewise, one level lower.
        votes: the logit so far, one ciphertext of the level of `c`.
    """

    h: Row
    c: Row
    votes: Ciphertext


def step(arithmetic: Arithmetic, classifier: ClassifierWeights, t: int, features: Row, before: State | None) -> State:
    """Frame t, from 0; not the last one.

    Args:
        arithmetic: of the site.
        classifier: with gates that see h.
        t: the frame.
        features: of the frame, a ciphertext each, of the highest level.
        before: what came of frame t - 1; None for the first frame.

    Returns:
        Two levels below the highest one c, three h, one the votes.
    """
    (i, f, o, g), votes = _gates(arithmetic, classifier, t, features, before, np.ones(4 * classifier.hidden))
    c = _cells(arithmetic, i, f, g, before)
    return State([arithmetic.products([pair]) for pair in zip(o, c, strict=True)], c, votes)


def last_step(arithmetic: Arithmetic, classifier: ClassifierWeights, features: Row, before: State | None) -> Ciphertext:
    """The last frame: the logits, three levels below the highest one; arguments as for `step`.

    The weight of a unit's evidence is put into its output gate, so that it costs no level.
    """
    weight = np.ones(4 * classifier.hidden)
    weight[2 * classifier.hidden : 3 * classifier.hidden] = classifier.votes[-1] * classifier.temporal
    (i, f, o, g), votes = _gates(arithmetic, classifier, classifier.frames - 1, features, before, weight)
    evidence = arithmetic.products(list(zip(o, _cells(arithmetic, i, f, g, before), strict=True)))
    return arithmetic.plus(arithmetic.sum([evidence, votes]), classifier.constant)


def _gates(
    arithmetic: Arithmetic,
    classifier: ClassifierWeights,
    t: int,
    features: Sequence[Ciphertext],
    before: State | None,
    weight: FloatArray,
) -> tuple[list[Row], Ciphertext]:
    """i, f, o, g of each unit, times `weight` (4 hidden,); and the votes with what is known at frame t."""
    inputs, given = classifier.inputs, list(features)
    spatial = classifier.votes[t] * classifier.spatial
    if before is not None:
        assert classifier.state is not None
        inputs, given = np.concatenate([inputs, classifier.state], 1), [*features, *before.h]
        spatial = np.concatenate([spatial, classifier.votes[t - 1] * classifier.temporal])
    rows = [
        arithmetic.weighted(scale * row, given, float(scale * bias))
        for scale, row, bias in zip(weight, inputs, classifier.bias, strict=True)
    ]
    votes = arithmetic.weighted(spatial, given)
    if before is not None:
        votes = arithmetic.sum([votes, before.votes])
    return [rows[n : n + classifier.hidden] for n in range(0, len(rows), classifier.hidden)], votes


def _cells(arithmetic: Arithmetic, i: Row, f: Row, g: Row, before: State | None) -> Row:
    """c of each unit: i g + f c."""
    if before is None:
        return [arithmetic.products([pair]) for pair in zip(i, g, strict=True)]
    parts = zip(i, g, f, before.c, strict=True)
    return [arithmetic.products([(i, g), (f, c)]) for i, g, f, c in parts]
