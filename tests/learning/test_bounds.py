"""Bounds on norms: what an outlier is, among several senders and against one's own past."""

import pytest
import torch
from torch import nn

from nightsplit.shared.config.optimizer import OptimizerSection
from nightsplit.shared.errors import Refused
from nightsplit.shared.learning.bounds import (
    MAJORITY,
    RECENT,
    LossBound,
    RunningBound,
    capped,
    factor_for,
    limit_gradients,
    norm_of,
    reference,
)
from nightsplit.shared.learning.optimizers import Progress
from nightsplit.shared.protocols.plan import Item, Purpose
from nightsplit.site_worker.stream.bottom import Bottom


def test_a_norm_is_finite_where_its_square_is_not():
    assert norm_of([torch.tensor([3.0]), torch.tensor([4.0])]) == 5.0
    assert norm_of([torch.full((4,), 1e30)]) == pytest.approx(2e30)
    assert norm_of([]) == 0.0


def test_two_have_no_majority():
    assert MAJORITY == 3
    assert reference([1.0, 1e9]) is None
    assert reference([1.0, 2.0, 1e9]) == 2.0
    assert factor_for(1e9, None) == 1.0
    assert factor_for(7.9, 2.0) == 1.0
    assert factor_for(1e9, 2.0) == 2e-9


def test_a_claim_counts_as_the_median_at_most():
    assert capped({"a": 10, "b": 1e9}) == {"a": 10, "b": 1e9}
    assert capped({"a": 10, "b": 20, "c": 1e9}) == {"a": 10, "b": 20, "c": 20}
    assert capped({}) == {}


def test_until_three_have_sent_the_first_reference_holds():
    bound = RunningBound(("a", "b", "c"), first=1.0)
    assert bound.limit("a", 1e6) == 1e-6
    assert bound.limit("b", 2.0) == 1.0
    assert bound.limit("c", 2.0) == 1.0
    assert bound.factor("a", 1e6) == 2e-6, "the median of 10^6, 2 and 2"


def test_a_site_that_trains_alone_for_a_night_is_compared_with_its_own_past():
    """In fair order; its gradients are not cut down to 1 all night."""
    bound = RunningBound(("a", "b", "c"), first=1.0)
    for turn in range(30):
        assert bound.limit("a", 50.0) == (0.02 if turn < RECENT else 1.0)
    assert bound.factor("a", 1e6) == 50 / 1e6
    assert bound.factor("b", 1e6) == 1e-6, "of another one nothing is known"


def test_a_sender_with_many_values_is_still_one_of_three():
    bound = RunningBound(("a", "b", "c"), first=1.0)
    for sender, norm in [("b", 1.0), ("c", 1.0), *[("a", 1e6)] * 50]:
        bound.limit(sender, norm)
    assert bound.factor("a", 1e6) == 1e-6


def test_the_reference_follows_the_sites():
    bound = RunningBound(("a", "b", "c"), first=1.0)
    for norm in (1.0, 0.1, 0.01):
        for sender in "abc" * RECENT:
            bound.limit(sender, norm)
        assert bound.factor("a", norm * 3) == 1.0
        assert bound.factor("a", norm * 5) == pytest.approx(0.2)


def test_one_loss_says_nothing_of_its_sender_and_the_median_of_the_latest_does():
    bound = LossBound(("a", "b", "c"))
    for sender in "bc" * RECENT:
        bound.remember(sender, 1.0, chance=9.0)
    for turn in range(20):
        assert bound.factor("a") == (1.0 if turn <= RECENT else pytest.approx(0.1))
        bound.remember("a", 10.0, chance=9.0)
        other = LossBound(("a", "b", "c"))
        other.remember("a", 1e6, chance=1.0)  # a restored state replaces this
        other.restore(bound.state())
        bound = other
    for sender, value in [("b", 1e6)] * (RECENT // 2) + [("a", 1.0)] * (RECENT // 2 + 1):
        bound.remember(sender, value, chance=0.5)
    assert bound.factor("a") == bound.factor("b") == 1.0


def test_a_loss_better_than_chance_is_no_outlier():
    """Hard patients: the model learns from them, and less than from others."""
    bound = LossBound(("a", "b", "c"))
    for sender in "abc" * 20:
        bound.remember(sender, 0.9 if sender == "a" else 0.01, chance=1.0)
        assert bound.factor("a") == 1.0


def test_a_sender_that_seldom_sends_is_compared_with_its_time():
    bound = LossBound(("a", "b", "c"))
    for turn in range(200):
        for sender in "abc" if turn % 20 == 0 else "bc":
            bound.remember(sender, 0.9**turn, chance=1e-12)
        assert bound.factor("a") == bound.factor("b") == 1.0


def test_of_two_senders_none_is_bounded():
    bound = RunningBound(("a", "b"), first=1.0)
    for _ in range(20):
        assert bound.limit("a", 1.0) == 1.0
        assert bound.limit("b", 1e9) == 1.0


def test_a_bound_goes_on_after_a_restore():
    one = RunningBound(("a", "b", "c"), first=1.0)
    for turn in range(20):
        for sender in "abc":
            one.limit(sender, 1.0 + turn / 7)
        other = RunningBound(("a", "b", "c"), first=1.0)
        other.limit("a", 5.0)  # a restored state replaces this
        other.restore(one.state())
        assert other.factor("a", 100.0) == one.factor("a", 100.0) < 1.0


def test_gradients_within_the_limit_stay_the_same_to_the_bit():
    parameters = [nn.Parameter(torch.randn(5)) for _ in range(2)]
    for parameter in parameters:
        parameter.grad = torch.randn(5)
    before = [parameter.grad.clone() for parameter in parameters]
    limit_gradients(parameters, lambda norm: 1.0)
    assert all(torch.equal(p.grad, g) for p, g in zip(parameters, before, strict=True))
    limit_gradients(parameters, lambda norm: 1 / norm)
    assert norm_of([p.grad for p in parameters]) == pytest.approx(1.0)


# ── a site and its server: docs/explanation/attacks.md B6 ────────────────────────────────────────────────────────


def trained_bottom(factor, optimizer="sgd"):
    """Weights of a bottom after twenty gradients, the fifteenth of them times a factor."""
    torch.manual_seed(1)
    bottom = Bottom(nn.Linear(6, 4), OptimizerSection(name=optimizer, lr=0.1), "cpu")
    for q in range(1, 21):
        item = Item(q, Purpose.TRAIN, 1, q - 1, 20, range(8), q - 1)
        gradient = torch.randn(8, 4) * (factor if q == 15 else 1.0)
        bottom.apply_gradient(item, torch.randn(8, 6), 0, gradient, Progress(q - 1, q - 1, 20))
    return bottom.module.weight.detach()


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "muon"])
def test_a_gradient_that_would_wreck_a_site_is_scaled_to_its_usual_size(optimizer):
    honest = trained_bottom(1.0, optimizer)
    assert (trained_bottom(1e3, optimizer) - honest).norm() < honest.norm()


def test_a_gradient_beyond_every_bound_is_refused():
    with pytest.raises(Refused, match="E312"):
        trained_bottom(1e20)
