"""Combination of updates: rules, outliers, weights by samples, and continuation after a restart."""

import pytest
import torch

from nightsplit.server_worker.aggregation import Aggregation
from nightsplit.shared.config.run import RoundSection


def combined(section, updates, weights=None):
    aggregation = Aggregation(section)
    for n, update in enumerate(updates):
        aggregation.add(str(n), update.split(1), weight=1.0 if weights is None else weights[n])
    return torch.cat(list(aggregation.result())), aggregation.outliers()


def test_trimmed_mean_and_median():
    values = [torch.tensor([float(n), -float(n)]) for n in (3, 4, 5, 6, 14)]
    for trim, expected in ((0.2, 5.0), (0.0, 6.4)):
        found, _ = combined(RoundSection(combine="trimmed_mean", trim=trim), values)
        torch.testing.assert_close(found, torch.tensor([expected, -expected]))
    for several, expected in ((values, 5.0), (values[:4], 4.5)):
        found, _ = combined(RoundSection(combine="median"), several)
        torch.testing.assert_close(found, torch.tensor([expected, -expected]))


def test_the_geometric_median_has_the_least_sum_of_distances():
    updates = list(torch.randn(5, 12, generator=torch.Generator().manual_seed(1)))
    weights = [3.0, 2.0, 1.0, 2.0, 9.0]  # the last counts as 2, the median
    found, none = combined(RoundSection(), updates, weights)
    assert not none

    def total(point):
        return sum(w * (point - u).norm() for w, u in zip([2, 2, 1, 2, 2], updates, strict=True))

    best = found.clone().requires_grad_()
    for _ in range(300):
        (slope,) = torch.autograd.grad(total(best), best)
        best = (best - 0.02 * slope).detach().requires_grad_()
    torch.testing.assert_close(found, best.detach(), rtol=0, atol=0.02)
    assert total(found) < total(sum(updates) / 5)


@pytest.mark.parametrize("combine", ["geometric_median", "mean", "trimmed_mean", "median"])
def test_an_outlier_is_scaled_to_the_median_norm(combine):
    """Attack A17: by its norm alone, whatever the rule; of two updates nobody can tell which one it is."""
    updates = [torch.ones(4), 2 * torch.ones(4), 3 * torch.ones(4), 1e20 * torch.ones(4)]
    found, outliers = combined(RoundSection(combine=combine), updates)
    assert outliers == {"3": pytest.approx(2.5e-20)}
    assert 1.0 < found.max() < 3.0
    found, outliers = combined(RoundSection(combine=combine), updates[2:])
    assert not outliers
    assert found.max() > 1e19


def test_a_site_weighs_no_more_than_the_median_number_of_samples():
    """attacks.md A15: of 10^9 samples that a site says it has."""
    updates = [torch.ones(1), torch.ones(1), torch.full((1,), 2.0)]
    found, _ = combined(RoundSection(combine="mean"), updates, [10, 20, 1e9])
    assert found.item() == pytest.approx(70 / 50)


def test_a_site_with_several_updates_in_a_round_counts_once():
    """With "buffered" a fast site must not be the majority by itself."""
    aggregation = Aggregation(RoundSection(combine="mean"))
    for value in (1.0, 2.0, 6.0):
        aggregation.add("fast", [torch.full((2,), value)], weight=5)
    aggregation.add("slow", [torch.full((2,), -3.0)], weight=5)
    torch.testing.assert_close(next(aggregation.result()), torch.zeros(2))


def test_the_norms_of_earlier_rounds_tell_an_outlier_in_a_round_of_two():
    aggregation = Aggregation(RoundSection())
    for site in ("north", "south", "east"):
        aggregation.add(site, [torch.ones(2)], weight=1)
    aggregation.clear()
    aggregation.add("north", [torch.ones(2)], weight=1)
    aggregation.add("east", [torch.full((2,), 1e6)], weight=1)
    assert aggregation.outliers() == {"east": pytest.approx(1e-6)}


@pytest.mark.parametrize("combine", ["geometric_median", "mean", "trimmed_mean"])
def test_an_aggregation_goes_on_after_a_restore(combine):
    generator = torch.Generator().manual_seed(1)
    one, other = Aggregation(RoundSection(combine=combine)), Aggregation(RoundSection(combine=combine))
    for n in (0, 1, 2, 1, 3):
        update = torch.randn(70, generator=generator).split(6)  # 12 slices: their order is not that of their names
        one.add(str(n), update, weight=n + 1)
        other.add(str(n), update, weight=n + 1)
        again = Aggregation(RoundSection(combine=combine))
        again.restore({name: tensor.clone() for name, tensor in other.state().items()})
        other = again
    assert torch.equal(torch.cat(list(one.result())), torch.cat(list(other.result())))
    one.clear()
    assert not list(one.result())
