"""Many sequences at once: one ciphertext per feature and per unit, a sequence in each slot; no rotations.

The cost is that of one sequence or of thousands.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nightsplit.server_worker.he.arithmetic import Arithmetic
from nightsplit.shared.he.ckks import Ciphertext
from nightsplit.shared.he.weights import Judge, Numbers

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


def step(arithmetic: Arithmetic, judge: Judge, t: int, features: Row, before: State | None) -> State:
    """Frame t, from 0; not the last one.

    Args:
        arithmetic: of the site.
        judge: with gates that see h.
        t: the frame.
        features: of the frame, a ciphertext each, of the highest level.
        before: what came of frame t - 1; None for the first frame.

    Returns:
        Two levels below the highest one c, three h, one the votes.
    """
    (i, f, o, g), votes = _gates(arithmetic, judge, t, features, before, np.ones(4 * judge.hidden))
    c = _cells(arithmetic, i, f, g, before)
    return State([arithmetic.products([pair]) for pair in zip(o, c, strict=True)], c, votes)


def last_step(arithmetic: Arithmetic, judge: Judge, features: Row, before: State | None) -> Ciphertext:
    """The last frame: the logits, three levels below the highest one; arguments as for `step`.

    The weight of a unit's evidence is put into its output gate, so that it costs no level.
    """
    weight = np.ones(4 * judge.hidden)
    weight[2 * judge.hidden : 3 * judge.hidden] = judge.votes[-1] * judge.temporal
    (i, f, o, g), votes = _gates(arithmetic, judge, judge.frames - 1, features, before, weight)
    evidence = arithmetic.products(list(zip(o, _cells(arithmetic, i, f, g, before), strict=True)))
    return arithmetic.plus(arithmetic.sum([evidence, votes]), judge.constant)


def _gates(
    arithmetic: Arithmetic, judge: Judge, t: int, features: Sequence[Ciphertext], before: State | None, weight: Numbers
) -> tuple[list[Row], Ciphertext]:
    """i, f, o, g of each unit, times `weight` (4 hidden,); and the votes with what is known at frame t."""
    inputs, given = judge.inputs, list(features)
    spatial = judge.votes[t] * judge.spatial
    if before is not None:
        assert judge.state is not None
        inputs, given = np.concatenate([inputs, judge.state], 1), [*features, *before.h]
        spatial = np.concatenate([spatial, judge.votes[t - 1] * judge.temporal])
    rows = [
        arithmetic.weighted(scale * row, given, float(scale * bias))
        for scale, row, bias in zip(weight, inputs, judge.bias, strict=True)
    ]
    votes = arithmetic.weighted(spatial, given)
    if before is not None:
        votes = arithmetic.sum([votes, before.votes])
    return [rows[n : n + judge.hidden] for n in range(0, len(rows), judge.hidden)], votes


def _cells(arithmetic: Arithmetic, i: Row, f: Row, g: Row, before: State | None) -> Row:
    """c of each unit: i g + f c."""
    if before is None:
        return [arithmetic.products([pair]) for pair in zip(i, g, strict=True)]
    parts = zip(i, g, f, before.c, strict=True)
    return [arithmetic.products([(i, g), (f, c)]) for i, g, f, c in parts]
