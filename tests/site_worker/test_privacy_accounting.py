"""Figures of privacy.md's table were computed beforehand; the others follow from theory."""

from math import exp

import pytest
from dp_accounting.pld import privacy_loss_distribution as pld

from nightsplit.site_worker.privacy.accounting import Epsilon, Use, epsilon_of, noise_for, patient_epsilon


@pytest.mark.parametrize(
    ("records", "batch", "epochs", "sigma", "delta", "by_pld", "by_rdp"),
    [
        (600, 32, 10, 1.0, 1e-3, 3.28, 3.89),
        (600, 32, 20, 1.0, 1 / 6000, 5.73, 6.48),
        (2000, 64, 20, 1.0, 1e-5, 5.15, 5.71),
        (10000, 256, 30, 1.1, 1e-5, 4.66, 5.11),
    ],
)
def test_known_figures(
    records: int, batch: int, epochs: int, sigma: float, delta: float, by_pld: float, by_rdp: float
) -> None:
    spent = epsilon_of([Use(batch / records, sigma, epochs * records // batch)], delta)
    assert spent.pld == pytest.approx(by_pld, abs=0.006)
    assert spent.rdp == pytest.approx(by_rdp, abs=0.006)


def test_coarse_rounding_costs_little() -> None:
    use = Use(128 / 2360, 0.67, 120)
    fine = pld.from_gaussian_mechanism(use.sigma, sampling_prob=use.rate, value_discretization_interval=1e-4)
    exact = fine.self_compose(use.steps).get_epsilon_for_delta(1.9e-4)
    assert exact <= epsilon_of([use], 1.9e-4).pld <= exact * 1.001


@pytest.mark.parametrize("epsilon", [0.5, 1.0, 3.0, 8.0])
@pytest.mark.parametrize(("rate", "steps"), [(128 / 2360, 120), (32 / 240, 1000), (1.0, 10)])
def test_the_noise_meets_its_epsilon_and_not_much_more(epsilon: float, rate: float, steps: int) -> None:
    sigma = noise_for(epsilon, 1e-4, rate, steps)
    assert epsilon_of([Use(rate, sigma, steps)], 1e-4).pld <= epsilon
    assert epsilon_of([Use(rate, sigma * 0.998, steps)], 1e-4).pld > epsilon


def test_uses_compose() -> None:
    one, other = Use(0.05, 0.7, 100), Use(0.1, 2.0, 50)
    together = epsilon_of([one, other], 1e-4)
    for figure in ("pld", "rdp"):
        alone = [getattr(epsilon_of([use], 1e-4), figure) for use in (one, other)]
        assert max(alone) < getattr(together, figure) < sum(alone)
    halves = epsilon_of([Use(0.05, 0.7, 40), Use(0.05, 0.7, 60)], 1e-4)
    assert halves.pld == pytest.approx(epsilon_of([one], 1e-4).pld, rel=1e-6)


def test_nothing_costs_nothing() -> None:
    assert epsilon_of([], 1e-4) == epsilon_of([Use(0.1, 1.0, 0)], 1e-4) == Epsilon(0.0, 0.0)
    assert patient_epsilon([], 1e-4) == patient_epsilon([(Use(0.1, 1.0, 5), 0)], 1e-4) == 0.0


def test_a_patient_with_one_record_is_a_record() -> None:
    use = Use(0.05, 1.0, 100)
    assert patient_epsilon([(use, 1)], 1e-4) == pytest.approx(epsilon_of([use], 1e-4).pld, rel=1e-6)


def test_without_sampling_records_add_up() -> None:
    """Two records at rate 1 are one of twice the norm: half the noise."""
    together = patient_epsilon([(Use(1.0, 4.0, 10), 2)], 1e-4)
    assert together == pytest.approx(epsilon_of([Use(1.0, 2.0, 10)], 1e-4).pld, rel=1e-2)


def test_a_patient_is_below_the_general_rule_for_groups() -> None:
    use, records = Use(0.05, 2.0, 50), 3
    losses = pld.from_gaussian_mechanism(use.sigma, sampling_prob=use.rate).self_compose(use.steps)
    epsilon = 1.0
    delta = records * exp((records - 1) * epsilon) * losses.get_delta_for_epsilon(epsilon)
    assert patient_epsilon([(use, records)], delta) < records * epsilon
    assert patient_epsilon([(use, 3)], 1e-4) > patient_epsilon([(use, 2)], 1e-4) > epsilon_of([use], 1e-4).pld
