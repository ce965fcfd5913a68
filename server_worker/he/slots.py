"""Few sequences at once: a slot for each number, all features of a frame in one ciphertext.

    gates = sum over diagonals d of W:  d * rotated(x, its place)          (baby steps of x, giant steps of sums)

The functions are those of `batch`, with the levels they take; a row of ciphertexts is a single one. Only the first
`hidden` dimensions of h and c mean something. What lies in the others comes of the wrong gates, and reaches nothing:
the site packs anew what it reads, and a rotation for the votes stops before them. It tells of the weights all the
same, so cover it before the site can decrypt it.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from nightsplit.server_worker.he.arithmetic import Arithmetic
from nightsplit.server_worker.he.batch import State
from nightsplit.shared.he.ckks import Ciphertext, CkksParameters, Plaintext
from nightsplit.shared.he.packing import Slots
from nightsplit.shared.he.weights import ClassifierWeights, FloatArray

ORDER = (0, 3, 1, 2)
"""i, g, f, o: a rotation by `units` brings the next of them to the first dimensions."""


def step(
    arithmetic: Arithmetic, classifier: ClassifierWeights, t: int, features: Sequence[Ciphertext], before: State | None
) -> State:
    """As `batch.step`."""
    o, c = _cells(arithmetic, classifier, features, before, last=False)
    return State([arithmetic.products([(o, c)])], [c], _votes(arithmetic, classifier, t, features, before))


def last_step(
    arithmetic: Arithmetic, classifier: ClassifierWeights, features: Sequence[Ciphertext], before: State | None
) -> Ciphertext:
    """As `batch.last_step`; the logits are in the first dimension, and sums of other things in the others."""
    o, c = _cells(arithmetic, classifier, features, before, last=True)
    votes = _votes(arithmetic, classifier, classifier.frames - 1, features, before)
    return _summed(arithmetic, classifier, arithmetic.products([(o, c)]), votes)


def _packing(arithmetic: Arithmetic, classifier: ClassifierWeights) -> Slots:
    return Slots(arithmetic.ckks.slots, classifier.features, classifier.hidden)


def _cells(
    arithmetic: Arithmetic,
    classifier: ClassifierWeights,
    features: Sequence[Ciphertext],
    before: State | None,
    last: bool,
) -> tuple[Ciphertext, Ciphertext]:
    """The output gate and c."""
    i, g, f, o = _gates(arithmetic, classifier, [features[0], *(before.h if before else [])], last)
    return o, arithmetic.products([(i, g), *([(f, before.c[0])] if before else [])])


def _gates(
    arithmetic: Arithmetic, classifier: ClassifierWeights, given: Sequence[Ciphertext], last: bool
) -> list[Ciphertext]:
    """The gates in `ORDER`, each from the first dimension on; `given` is x, or x and h."""
    packing = _packing(arithmetic, classifier)
    diagonals, bias = _matrix(arithmetic.ckks, classifier, last)
    turned = [[one] for one in given]
    for row in turned:
        for _ in range(packing.small - 1):
            row.append(arithmetic.rotated(row[-1], packing.capacity))
    total = None
    for begin in reversed(range(0, max(map(len, diagonals[: len(given)])), packing.small)):
        part = arithmetic.combined(
            term
            for row, of_input in zip(turned, diagonals, strict=False)
            for term in zip(row, of_input[begin : begin + packing.small], strict=False)
        )
        if total is not None:
            part = arithmetic.sum([part, arithmetic.rotated(total, packing.small * packing.capacity)])
        total = part
    gates = [arithmetic.plus(arithmetic.rescaled(total), bias)]
    for _ in ORDER[1:]:
        gates.append(arithmetic.rotated(gates[-1], packing.units * packing.capacity))
    return gates


@lru_cache(maxsize=4)
def _matrix(
    ckks: CkksParameters, classifier: ClassifierWeights, last: bool
) -> tuple[list[list[Plaintext]], list[float]]:
    """Diagonals of W and of U, each moved back by the giant step that follows; and b.

    At the last frame the weight of a unit's evidence is in its output gate, as in `batch`.
    """
    packing = Slots(ckks.slots, classifier.features, classifier.hidden)
    weight = np.ones((4, classifier.hidden, 1))
    if last:
        weight[2, :, 0] = classifier.temporal * classifier.votes[-1]

    def by_dimension(rows: FloatArray) -> FloatArray:
        """(4 hidden, n) -> (dimensions, n)."""
        gates = (weight * rows.reshape(4, classifier.hidden, -1))[list(ORDER)]
        return np.pad(gates, ((0, 0), (0, packing.units - classifier.hidden), (0, 0))).reshape(packing.dimensions, -1)

    def diagonals(rows: FloatArray, period: int) -> list[Plaintext]:
        matrix = np.pad(by_dimension(rows), ((0, 0), (0, period - rows.shape[1])))
        place = np.arange(packing.dimensions)
        turned = ((n - n % packing.small, matrix[place, (place + n) % period]) for n in range(period))
        return [ckks.encode(_spread(packing, np.roll(diagonal, by)), ckks.top) for by, diagonal in turned]

    assert classifier.state is not None, "gates see h"
    encoded = [diagonals(classifier.inputs, packing.period), diagonals(classifier.state, packing.units)]
    return encoded, _spread(packing, by_dimension(classifier.bias)[:, 0])


def _votes(
    arithmetic: Arithmetic, classifier: ClassifierWeights, t: int, features: Sequence[Ciphertext], before: State | None
) -> Ciphertext:
    """The votes with what is known at frame t; its parts lie in many dimensions."""
    spatial, temporal = _vote_weights(arithmetic.ckks, classifier, t)
    if before is None:
        return arithmetic.rescaled(arithmetic.combined([(features[0], spatial)]))
    known = arithmetic.rescaled(arithmetic.combined([(features[0], spatial), (before.h[0], temporal)]))
    return arithmetic.sum([known, before.votes])


@lru_cache(maxsize=64)
def _vote_weights(ckks: CkksParameters, classifier: ClassifierWeights, t: int) -> tuple[Plaintext, Plaintext]:
    """Of the features of frame t, and of the state before it."""
    packing = Slots(ckks.slots, classifier.features, classifier.hidden)
    weights = (classifier.votes[t] * classifier.spatial, classifier.votes[t - 1] * classifier.temporal)
    padded = [np.pad(weight, (0, packing.dimensions - len(weight))) for weight in weights]
    spatial, temporal = (ckks.encode(_spread(packing, weight), ckks.top) for weight in padded)
    return spatial, temporal


def _summed(
    arithmetic: Arithmetic, classifier: ClassifierWeights, evidence: Ciphertext, votes: Ciphertext
) -> Ciphertext:
    """The logits in the first dimension: votes come from all features, evidence from the first `units` dimensions."""
    packing = _packing(arithmetic, classifier)

    def turned(given: Ciphertext, dimensions: int) -> Ciphertext:
        for step in (packing.units, packing.small, 1):
            for _ in range(dimensions // step):
                given = arithmetic.rotated(given, step * packing.capacity)
            dimensions %= step
        return given

    votes = arithmetic.lowered(votes, arithmetic.ckks.level_of(evidence))
    folded = votes
    for _ in range(packing.period // packing.units - 1):
        folded = arithmetic.sum([votes, turned(folded, packing.units)])
    total, width = arithmetic.sum([evidence, folded]), packing.units
    while width > 1:
        width //= 2
        total = arithmetic.sum([total, turned(total, width)])
    return arithmetic.plus(total, classifier.constant)


def _spread(packing: Slots, by_dimension: FloatArray) -> list[float]:
    """A number for each dimension, for every sequence."""
    return np.repeat(by_dimension, packing.capacity).tolist()
