"""Packing of few sequences: a slot for each number, all features of a frame in one ciphertext.

    gates = sum over diagonals d of W:  d * rotate(x, its place)           (baby steps of x, giant steps of sums)

The functions are those of `batch`, with the same levels; a row of ciphertexts is a single one. Only the first
`hidden` dimensions of h and c are valid. The others hold products of the wrong gates, and have no effect: the site
repacks the valid ones, and a rotation for the votes stops before the others. They still depend on the weights, so
blind them before the site can decrypt them.
"""

from functools import lru_cache

import numpy as np

from nightsplit.server_worker.he.arithmetic import Arithmetic
from nightsplit.server_worker.he.batch import Row, State
from nightsplit.shared.he.ckks import Ciphertext, CkksParameters, Plaintext
from nightsplit.shared.he.packing import Slots
from nightsplit.shared.he.weights import ClassifierWeights, FloatArray

ORDER = (0, 3, 1, 2)
"""Order of the gates, i, g, f, o: a rotation by `units` moves the next one to the first dimensions."""


def step(arithmetic: Arithmetic, classifier: ClassifierWeights, t: int, features: Row, state: State | None) -> State:
    """Evaluate a frame as `batch.step`."""
    o, c = _cells(arithmetic, classifier, features, state, last=False)
    return State([arithmetic.dot([(o, c)])], [c], _votes(arithmetic, classifier, t, features, state))


def last_step(arithmetic: Arithmetic, classifier: ClassifierWeights, features: Row, state: State | None) -> Ciphertext:
    """Return the logits as `batch.last_step`, in the first dimension; the others hold unrelated sums."""
    o, c = _cells(arithmetic, classifier, features, state, last=True)
    votes = _votes(arithmetic, classifier, classifier.frames - 1, features, state)
    return _sum_dimensions(arithmetic, classifier, arithmetic.dot([(o, c)]), votes)


def _packing(arithmetic: Arithmetic, classifier: ClassifierWeights) -> Slots:
    return Slots(arithmetic.ckks.slots, classifier.features, classifier.hidden)


def _cells(
    arithmetic: Arithmetic, classifier: ClassifierWeights, features: Row, state: State | None, last: bool
) -> tuple[Ciphertext, Ciphertext]:
    """Return the output gate and c."""
    i, g, f, o = _gates(arithmetic, classifier, [features[0], *(state.h if state else [])], last)
    return o, arithmetic.dot([(i, g), *([(f, state.c[0])] if state else [])])


def _gates(arithmetic: Arithmetic, classifier: ClassifierWeights, inputs: Row, last: bool) -> list[Ciphertext]:
    """Return the gates in `ORDER`, each from the first dimension on; `inputs` are x, or x and h."""
    packing = _packing(arithmetic, classifier)
    diagonals, bias = _matrix(arithmetic.ckks, classifier, last)
    rotated = [[ciphertext] for ciphertext in inputs]
    for row in rotated:
        for _ in range(packing.giant_step - 1):
            row.append(arithmetic.rotate(row[-1], packing.capacity))
    longest = max(len(of_input) for of_input in diagonals[: len(inputs)])
    total = None
    for begin in reversed(range(0, longest, packing.giant_step)):
        part = arithmetic.dot_plain(
            term
            for row, of_input in zip(rotated, diagonals, strict=False)
            for term in zip(row, of_input[begin : begin + packing.giant_step], strict=False)
        )
        if total is not None:  # a giant step moves the sum of all later parts
            part = arithmetic.sum([part, arithmetic.rotate(total, packing.giant_step * packing.capacity)])
        total = part
    gates = [arithmetic.add_plain(arithmetic.rescale(total), bias)]
    for _ in ORDER[1:]:
        gates.append(arithmetic.rotate(gates[-1], packing.units * packing.capacity))
    return gates


@lru_cache(maxsize=4)
def _matrix(
    ckks: CkksParameters, classifier: ClassifierWeights, last: bool
) -> tuple[list[list[Plaintext]], list[float]]:
    """Return the diagonals of W and of U, each moved back by the giant step that follows, and b.

    At the last frame the weight of a unit's evidence is in its output gate, as in `batch`.
    """
    packing = Slots(ckks.slots, classifier.features, classifier.hidden)
    weight = np.ones((4, classifier.hidden, 1))
    if last:
        weight[2, :, 0] = classifier.temporal * classifier.votes[-1]

    def by_dimension(rows: FloatArray) -> FloatArray:
        """Reorder rows (4 hidden, n) to (dimensions, n)."""
        gates = (weight * rows.reshape(4, classifier.hidden, -1))[list(ORDER)]
        return np.pad(gates, ((0, 0), (0, packing.units - classifier.hidden), (0, 0))).reshape(packing.dimensions, -1)

    def diagonals(rows: FloatArray, period: int) -> list[Plaintext]:
        matrix = np.pad(by_dimension(rows), ((0, 0), (0, period - rows.shape[1])))
        index = np.arange(packing.dimensions)
        moved = (np.roll(matrix[index, (index + n) % period], n - n % packing.giant_step) for n in range(period))
        return [ckks.encode(_repeat(packing, diagonal), ckks.top) for diagonal in moved]

    assert classifier.state is not None, "gates depend on h"
    encoded = [diagonals(classifier.inputs, packing.period), diagonals(classifier.state, packing.units)]
    return encoded, _repeat(packing, by_dimension(classifier.bias)[:, 0])


def _votes(
    arithmetic: Arithmetic, classifier: ClassifierWeights, t: int, features: Row, state: State | None
) -> Ciphertext:
    """Return the votes including frame t, as terms in many dimensions."""
    spatial, temporal = _vote_weights(arithmetic.ckks, classifier, t)
    if state is None:
        return arithmetic.rescale(arithmetic.dot_plain([(features[0], spatial)]))
    votes = arithmetic.rescale(arithmetic.dot_plain([(features[0], spatial), (state.h[0], temporal)]))
    return arithmetic.sum([votes, state.votes])


@lru_cache(maxsize=64)
def _vote_weights(ckks: CkksParameters, classifier: ClassifierWeights, t: int) -> tuple[Plaintext, Plaintext]:
    """Return the vote weights of the features of frame t, and of the state before it."""
    packing = Slots(ckks.slots, classifier.features, classifier.hidden)
    weights = (classifier.votes[t] * classifier.spatial, classifier.votes[t - 1] * classifier.temporal)
    padded = [np.pad(weight, (0, packing.dimensions - len(weight))) for weight in weights]
    spatial, temporal = (ckks.encode(_repeat(packing, weight), ckks.top) for weight in padded)
    return spatial, temporal


def _sum_dimensions(
    arithmetic: Arithmetic, classifier: ClassifierWeights, evidence: Ciphertext, votes: Ciphertext
) -> Ciphertext:
    """Return the logits in the first dimension: the sum of all votes and of the evidence in the first `units`."""
    packing = _packing(arithmetic, classifier)

    def rotate(ciphertext: Ciphertext, dimensions: int) -> Ciphertext:
        for step in (packing.units, packing.giant_step, 1):  # the site has keys for these
            for _ in range(dimensions // step):
                ciphertext = arithmetic.rotate(ciphertext, step * packing.capacity)
            dimensions %= step
        return ciphertext

    votes = arithmetic.lower(votes, arithmetic.ckks.level_of(evidence))
    folded = votes
    for _ in range(packing.period // packing.units - 1):
        folded = arithmetic.sum([votes, rotate(folded, packing.units)])
    total, width = arithmetic.sum([evidence, folded]), packing.units
    while width > 1:
        width //= 2
        total = arithmetic.sum([total, rotate(total, width)])
    return arithmetic.add_plain(total, classifier.constant)


def _repeat(packing: Slots, by_dimension: FloatArray) -> list[float]:
    """Repeat the number of each dimension for every sequence."""
    return np.repeat(by_dimension, packing.capacity).tolist()
