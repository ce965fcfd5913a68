"""What ciphertexts compute, beside the network in float64."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from types import ModuleType

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.speed.convolution import CIRCUIT, UNIT, convolved
from nightsplit.server_worker.he import batch, one_shot, slots
from nightsplit.server_worker.he.arithmetic import Arithmetic
from nightsplit.server_worker.he.batch import State
from nightsplit.shared.he.ckks import Ciphertext, CkksParameters, to_bytes
from nightsplit.shared.he.packing import Batch, Packing, Slots
from nightsplit.shared.he.sequences import one_shot_levels
from nightsplit.shared.he.weights import ClassifierWeights, FloatArray
from nightsplit.shared.models.sequences import SequenceClassifier
from nightsplit.site_worker.query.keys import SecretKeys

REFRESH = CkksParameters(8192, (50, 34, 34, 34, 60), 34)
SHORT = CkksParameters(8192, (38, 33, 33, 33, 33, 48), 33)
LONG = CkksParameters(8192, (34, 29, 29, 29, 29, 29, 39), 29)


@dataclass
class Pair:
    """A site and its server."""

    secret: SecretKeys
    arithmetic: Arithmetic

    @property
    def ckks(self) -> CkksParameters:
        return self.secret.ckks

    def sent(self, vectors: Sequence[FloatArray], level: int | None = None) -> list[Ciphertext]:
        level = self.ckks.top if level is None else level
        return [self.ckks.read(self.secret.encrypt(vector, level), level) for vector in vectors]

    def seen(self, ciphertexts: Sequence[Ciphertext]) -> list[FloatArray]:
        """What the site reads of an answer."""
        sent = [to_bytes(self.arithmetic.drop_levels(one)) for one in ciphertexts]
        return [self.secret.decrypt(self.ckks.read_any(one)) for one in sent]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory):  # type: ignore[no-untyped-def]
    @cache
    def pair(ckks: CkksParameters, rotations: tuple[int, ...]) -> Pair:
        secret, public = SecretKeys.make(ckks, tmp_path_factory.mktemp("keys"), rotations)
        return Pair(secret, Arithmetic(ckks, public, rotations))

    return pair


def network_of(frames: int, features: int, hidden: int, recurrent: bool) -> SequenceClassifier:
    torch.manual_seed(frames)
    network = SequenceClassifier(frames, features, hidden, recurrent).double()
    with torch.no_grad():
        network.votes.normal_()
        network.mixture.fill_(0.3)
        network.temporal.weight.mul_(10)  # as strong as training makes it
    return network


def drawn(n: int, frames: int, features: int) -> torch.Tensor:
    return torch.rand(n, frames, features, dtype=torch.float64, generator=torch.Generator().manual_seed(n)) * 2 - 1


def refreshed(
    pair: Pair, packing: Packing, half: ModuleType, classifier: ClassifierWeights, sequences: FloatArray
) -> FloatArray:
    """The logits; after every frame the site reads the state, and encrypts it again."""
    n, top, state = len(sequences), pair.ckks.top, None
    for t in range(classifier.frames - 1):
        state = half.step(pair.arithmetic, classifier, t, pair.sent(packing.frame(sequences[:, t])), state)
        assert {pair.ckks.level_of(one) for one in state.h} == {top - 3}
        assert {pair.ckks.level_of(one) for one in state.c} == {top - 2}
        assert pair.ckks.level_of(state.votes) == top - 1
        h = packing.state(packing.read_state(pair.seen(state.h), n))
        c = packing.state(packing.read_state(pair.seen(state.c), n))
        votes = packing.votes(packing.read_votes(pair.seen([state.votes])[0], n))
        state = State(pair.sent(h), pair.sent(c, top - 1), pair.sent([votes], top - 1)[0])
    last = pair.sent(packing.frame(sequences[:, -1]))
    return pair.seen([half.last_step(pair.arithmetic, classifier, last, state)])[0][:n]


def in_one_shot(pair: Pair, classifier: ClassifierWeights, sequences: FloatArray) -> FloatArray:
    packing = Batch(pair.ckks.slots)
    frames = [pair.sent(packing.frame(sequences[:, t])) for t in range(classifier.frames)]
    answer = one_shot.logits(pair.arithmetic, classifier, frames)
    assert pair.ckks.level_of(answer) == pair.ckks.top - one_shot_levels(classifier.frames)
    return pair.seen([answer])[0][: len(sequences)]


# ── encrypted and plain evaluation compute the same function ────────────────────────────────────


@pytest.mark.parametrize("half", [batch, slots])
@pytest.mark.parametrize(("frames", "features", "hidden"), [(1, 2, 2), (2, 3, 2), (4, 2, 1), (6, 3, 2)])
def test_refresh(pairs, half: ModuleType, frames: int, features: int, hidden: int) -> None:  # type: ignore[no-untyped-def]
    packing = Slots(REFRESH.slots, features, hidden) if half is slots else Batch(REFRESH.slots)
    network, sequences = network_of(frames, features, hidden, True), drawn(packing.capacity, frames, features)
    pair = pairs(REFRESH, packing.rotations)
    found = refreshed(pair, packing, half, ClassifierWeights.of(network.state_dict()), sequences.numpy())
    expected = network(sequences)[:, 0].detach().numpy()
    assert expected.std() > 0.03
    assert np.abs(found - expected).max() < 1e-5


@pytest.mark.parametrize("frames", [1, 2, 3, 6, 9, 14])
def test_one_shot(pairs, frames: int) -> None:  # type: ignore[no-untyped-def]
    ckks = {3: REFRESH, 4: SHORT, 5: LONG}[one_shot_levels(frames)]
    network, sequences = network_of(frames, 2, 2, False), drawn(ckks.slots, frames, 2)
    found = in_one_shot(pairs(ckks, ()), ClassifierWeights.of(network.state_dict()), sequences.numpy())
    expected = network(sequences)[:, 0].detach().numpy()
    assert expected.std() > 0.03
    assert np.abs(found - expected).max() < (5e-4 if ckks is LONG else 2e-5)


@pytest.mark.parametrize("half", [batch, slots])
@pytest.mark.parametrize("zero", ["inputs", "state", "bias", "spatial", "temporal", "votes"])
def test_weights_of_zero(pairs, half: ModuleType, zero: str) -> None:  # type: ignore[no-untyped-def]
    packing = Slots(REFRESH.slots, 2, 1) if half is slots else Batch(REFRESH.slots)
    classifier, sequences = ClassifierWeights.of(network_of(2, 2, 1, True).state_dict()), drawn(5, 2, 2).numpy()
    classifier = replace(classifier, **{zero: np.zeros_like(getattr(classifier, zero))})
    found = refreshed(pairs(REFRESH, packing.rotations), packing, half, classifier, sequences)
    assert np.abs(found - in_the_clear(classifier, sequences)).max() < 1e-5


@pytest.mark.parametrize("zero", ["inputs", "bias", "spatial", "temporal"])
def test_weights_of_zero_in_one_shot(pairs, zero: str) -> None:  # type: ignore[no-untyped-def]
    classifier, sequences = ClassifierWeights.of(network_of(3, 2, 1, False).state_dict()), drawn(5, 3, 2).numpy()
    classifier = replace(classifier, **{zero: np.zeros_like(getattr(classifier, zero))})
    found = in_one_shot(pairs(SHORT, ()), classifier, sequences)
    assert np.abs(found - in_the_clear(classifier, sequences)).max() < 2e-5


def in_the_clear(classifier: ClassifierWeights, sequences: FloatArray) -> FloatArray:
    h = c = np.zeros((len(sequences), classifier.hidden))
    logits = classifier.constant + sequences @ classifier.spatial @ classifier.votes
    for t in range(classifier.frames):
        gates = sequences[:, t] @ classifier.inputs.T + classifier.bias
        if classifier.state is not None:
            gates = gates + h @ classifier.state.T
        i, f, o, g = np.split(gates, 4, axis=1)
        c = f * c + i * g
        h = o * c
        if classifier.state is not None:
            logits = logits + classifier.votes[t] * (h @ classifier.temporal)
    return logits if classifier.state is not None else logits + h @ classifier.temporal


def test_convolution(pairs) -> None:  # type: ignore[no-untyped-def]
    generator = np.random.default_rng(1)
    images, filters, bias = (
        generator.uniform(size=(20, 6, 8)),
        generator.normal(size=(3, 3, 3)),
        generator.normal(size=3),
    )
    filters[2] = 0.0
    pair = pairs(CIRCUIT, ())
    pixels = [pair.sent([np.pad(images[:, row, column], (0, 4076)) for column in range(8)]) for row in range(6)]
    found = convolved(pair.arithmetic, filters, bias, pixels)
    expected = torch.nn.functional.avg_pool2d(
        torch.nn.functional.conv2d(
            torch.from_numpy(images)[:, None], torch.from_numpy(filters)[:, None], torch.from_numpy(bias)
        ).square(),
        2,
    ).numpy()  # fmt: skip
    assert expected.shape == (20, 3, 2, 3)
    assert expected.std() > 0.5
    numbers = np.array([[pair.seen(row) for row in one] for one in found])[..., :20] * UNIT**2
    assert np.abs(numbers - expected.transpose(1, 2, 3, 0)).max() < 5e-6


# ── the plan of the products ────────────────────────────────────────────────────────────────────


class Plain:
    """Numbers with the level they would have."""

    def sum(self, terms: Sequence[tuple[float, int]]) -> tuple[float, int]:
        return sum(value for value, _ in terms), min(level for _, level in terms)

    def dot(self, pairs: Sequence[tuple[tuple[float, int], tuple[float, int]]]) -> tuple[float, int]:
        level = min(level for pair in pairs for _, level in pair)
        return sum(one * other for (one, _), (other, _) in pairs), level - 1


@settings(deadline=None)
@given(st.integers(1, 70), st.integers(0, 2**32))
def test_products_over_time(frames: int, seed: int) -> None:
    """The fewest levels that a product of frames + 2 gates can have, behind that of the gates."""
    gates = np.random.default_rng(seed).uniform(-1, 1, (frames + 1, 4))
    tree = one_shot.Products(Plain(), frames, lambda frame, kind: (gates[frame, kind], 0))  # type: ignore[arg-type]
    found, level = Plain().dot(tree.pairs(1, frames + 1))
    c = 0.0
    for i, f, _, g in gates[1:]:
        c = f * c + i * g
    assert found == pytest.approx(gates[-1, 2] * c, abs=1e-12)
    assert 1 - level == one_shot_levels(frames)
