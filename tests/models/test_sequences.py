import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from torch import nn

from benchmarks.accuracy.events import xor_of_events
from benchmarks.accuracy.plain_clstm import plain_clstm
from nightsplit.shared.he.weights import ClassifierWeights
from nightsplit.shared.models.sequences import FrameEncoder, SequenceClassifier, clstm


def classifier_of(frames: int, features: int, hidden: int, recurrent: bool) -> SequenceClassifier:
    torch.manual_seed(frames)
    network = SequenceClassifier(frames, features, hidden, recurrent).double()
    with torch.no_grad():
        network.votes.normal_()
        network.mixture.fill_(0.3)
    return network


def by_the_formulas(classifier: ClassifierWeights, features: np.ndarray) -> float:
    """As the docstring of `SequenceClassifier` has it, for one sequence."""
    h = c = np.zeros(classifier.hidden)
    logit = classifier.constant
    for t, x in enumerate(features):
        gates = classifier.inputs @ x + classifier.bias + (0 if classifier.state is None else classifier.state @ h)
        i, f, o, g = gates.reshape(4, -1)
        c = f * c + i * g
        h = o * c
        logit += classifier.votes[t] * (classifier.spatial @ x)
        if classifier.state is not None:
            logit += classifier.votes[t] * (classifier.temporal @ h)
    return float(logit if classifier.state is not None else logit + classifier.temporal @ h)


@pytest.mark.parametrize("recurrent", [True, False])
@pytest.mark.parametrize(("frames", "features", "hidden"), [(1, 1, 1), (2, 3, 2), (7, 5, 4)])
def test_the_plain_numbers_are_the_network(frames: int, features: int, hidden: int, recurrent: bool) -> None:
    network = classifier_of(frames, features, hidden, recurrent)
    classifier = ClassifierWeights.of(network.state_dict())
    assert (classifier.frames, classifier.features, classifier.hidden) == (frames, features, hidden)
    sequences = torch.rand(5, frames, features, dtype=torch.float64) * 2 - 1
    for sequence, logit in zip(sequences.numpy(), network(sequences)[:, 0].tolist(), strict=True):
        assert by_the_formulas(classifier, sequence) == pytest.approx(logit, abs=1e-12)


def test_the_penalty_is_the_written_one() -> None:
    """Its gradient is added; the value stays that of the loss."""
    network = classifier_of(4, 3, 2, recurrent=True)
    with torch.no_grad():
        network.inputs.weight.mul_(6)  # so that gates and states leave their range
    sequences = torch.rand(8, 4, 3, dtype=torch.float64) * 2 - 1
    weight = torch.linspace(-1, 1, 8, dtype=torch.float64)
    (network(sequences)[:, 0] @ weight).backward()
    found = {name: value.grad.clone() for name, value in network.named_parameters() if value.grad is not None}

    network.zero_grad()
    assert network.state is not None
    h = c = sequences.new_zeros(8, 2)
    mixture, votes = torch.sigmoid(network.mixture), torch.softmax(network.votes, 0)
    logit, penalty = sequences.new_zeros(8), sequences.new_zeros(())
    for t in range(4):
        gates = network.inputs(sequences[:, t]) + network.state(h)
        i, f, o, g = gates.chunk(4, 1)
        c = f * c + i * g
        h = o * c
        for kept in (gates, c):
            penalty = penalty + (kept.abs() - 1).clamp(min=0).square().sum() / 8
        evidence = mixture * network.spatial(sequences[:, t]) + (1 - mixture) * network.temporal(h)
        logit = logit + votes[t] * evidence[:, 0]
    assert penalty > 0.1
    (logit @ weight + penalty).backward()
    assert set(found) == {name for name, value in network.named_parameters() if value.grad is not None}
    for name, value in network.named_parameters():
        assert value.grad is not None
        torch.testing.assert_close(found[name], value.grad, rtol=1e-10, atol=1e-10, msg=name)


def test_features_stay_within_their_range() -> None:
    torch.manual_seed(0)
    encoder = FrameEncoder(side=16, width=4, features=6)
    for scale in (0.0, 1.0, 1e4):
        features = encoder(scale * torch.randn(3, 2, 16, 16))
        assert features.shape == (3, 2, 6)
        assert features.abs().max() <= 1


def test_a_frame_is_encoded_by_itself() -> None:
    torch.manual_seed(0)
    encoder = FrameEncoder(side=16, width=4, features=6)
    images = torch.randn(3, 5, 16, 16)
    one = encoder(images[1:2, 3:4])
    torch.testing.assert_close(encoder(images)[1:2, 3:4], one)


@pytest.mark.parametrize("network", [clstm(4, 16, 4, 6, 3), clstm(4, 16, 4, 6, 3, recurrent=False)])
def test_shapes_at_the_cut_and_at_the_end(network: nn.Sequential) -> None:
    features = network[:1](torch.zeros(5, 4, 16, 16))
    assert features.shape == (5, 4, 6)
    assert network[1:](features).shape == (5, 1)


def test_the_plain_network_has_the_same_shapes() -> None:
    assert plain_clstm(4, 16, 4, 6, 3)(torch.zeros(5, 4, 16, 16)).shape == (5, 1)


def test_every_weight_gets_a_gradient() -> None:
    torch.manual_seed(0)
    network = clstm(4, 16, 4, 6, 3)
    network(torch.randn(5, 4, 16, 16)).square().sum().backward()
    assert all(weight.grad is not None and weight.grad.abs().sum() > 0 for weight in network.parameters())


def test_it_learns_what_no_weighted_sum_can_tell() -> None:
    sequences, labels = xor_of_events(2000, frames=4, features=2, seed=0)
    unseen, truth = xor_of_events(1000, frames=4, features=2, seed=1)
    flat = LogisticRegression().fit(sequences.flatten(1), labels)
    assert roc_auc_score(truth, flat.decision_function(unseen.flatten(1))) < 0.6

    torch.manual_seed(0)
    network = SequenceClassifier(frames=4, features=2, hidden=4)
    optimizer = torch.optim.Adam(network.parameters(), lr=0.02)
    for _ in range(20):
        for x, y in zip(sequences.split(200), labels.split(200), strict=True):
            optimizer.zero_grad()
            nn.functional.binary_cross_entropy_with_logits(network(x)[:, 0], y).backward()
            optimizer.step()
    assert roc_auc_score(truth, network(unseen)[:, 0].detach()) > 0.98  # 1.000 for four seeds
