"""The epsilon of training with noise: from privacy loss distributions, with Rényi DP as a second bound.

The mechanism is the Poisson-sampled Gaussian (Abadi et al., "Deep Learning with Differential Privacy", CCS
2016); neighbouring data sets differ in one record that is added or removed. Epsilon is computed from privacy loss
distributions (Koskela et al., AISTATS 2020; Doroshenko et al., "Connect the Dots", PoPETs 2022), rounded up. The
epsilon of Rényi DP (Mironov et al., arXiv 1908.10530) is looser, and an independent check. Gaussian DP is not used:
its approximation is too low.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache, reduce
from math import comb

from dp_accounting import dp_event, rdp
from dp_accounting.pld import privacy_loss_distribution as pld

_STEP = 1e-3
"""Discretization of privacy losses, rounded up (for a patient: times the number of records)."""
_ORDERS = (*(order / 10 for order in range(20, 110)), *range(11, 65), 80, 96, 128, 192, 256, 512)
"""Orders of Rényi DP. For little noise the series does not converge just above 1."""


@dataclass(frozen=True)
class Use:
    """Training steps on a site's records, empty batches included.

    `rate`, in (0, 1], is the probability that a record is in the batch of a step; `sigma` is the standard deviation
    of the noise, in units of the clipping norm.
    """

    rate: float
    sigma: float
    steps: int


@dataclass(frozen=True)
class Epsilon:
    """Epsilon of a record by privacy loss distributions, to be reported, and by Rényi DP, which is never smaller."""

    pld: float
    rdp: float


def epsilon_of(uses: Iterable[Use], delta: float) -> Epsilon:
    """Return the epsilon of a record in all `uses`, at `delta`."""
    uses = [use for use in uses if use.steps]
    if not uses:
        return Epsilon(0.0, 0.0)
    accountant = rdp.RdpAccountant(_ORDERS)
    for use in uses:
        event = dp_event.PoissonSampledDpEvent(use.rate, dp_event.GaussianDpEvent(use.sigma))
        accountant.compose(event, use.steps)
    losses = reduce(pld.PrivacyLossDistribution.compose, map(_compose_losses, uses))
    return Epsilon(float(losses.get_epsilon_for_delta(delta)), float(accountant.get_epsilon(delta)))


@lru_cache(maxsize=256)
def noise_for(epsilon: float, delta: float, rate: float, steps: int) -> float:
    """Return the smallest noise (`Use.sigma`), to 0.1 %, for at most `epsilon` of a record at `delta` after `steps`."""

    def is_enough(sigma: float) -> bool:
        return bool(_compose_losses(Use(rate, sigma, steps)).get_epsilon_for_delta(delta) <= epsilon)

    # Bracket from above, since the distribution of little noise is long and slow to compute.
    high = 1.0
    while not is_enough(high):
        high *= 2
    low = high / 2
    while is_enough(low):
        low, high = low / 2, low
    while high / low > 1.001:
        middle = (low * high) ** 0.5
        low, high = (low, middle) if is_enough(middle) else (middle, high)
    return high


def patient_epsilon(uses: Iterable[tuple[Use, int]], delta: float) -> float:
    """Return the epsilon of a patient with several records: neighbouring data sets differ in all of them.

    A batch holds a binomial number of the patient's records, and each moves the sum by up to the clipping
    norm. So a step is a mixture of Gaussians: Ganesh, "Tight Group-Level DP Guarantees for DP-SGD with
    Sampling via Mixture of Gaussians Mechanisms", arXiv 2401.10294. The general rule for a group of m
    (Vadhan, "The Complexity of Differential Privacy", 2017, Lemma 2.2), epsilon to m epsilon and delta to
    m exp((m - 1) epsilon) delta, gives a delta above 1 for the records of a usual volume.

    `uses` are pairs of a use and the number of the patient's records in it; `delta` is that of a record.
    """
    uses = [(use, records) for use, records in uses if use.steps and records]
    if not uses:
        return 0.0
    step = _STEP * max(records for _, records in uses)
    losses = reduce(pld.PrivacyLossDistribution.compose, (_compose_group_losses(*use, step) for use in uses))
    return float(losses.get_epsilon_for_delta(delta))


@lru_cache(maxsize=256)
def _compose_losses(use: Use) -> pld.PrivacyLossDistribution:
    losses = pld.from_gaussian_mechanism(use.sigma, sampling_prob=use.rate, value_discretization_interval=_STEP)
    return losses.self_compose(use.steps)


@lru_cache(maxsize=256)
def _compose_group_losses(use: Use, records: int, step: float) -> pld.PrivacyLossDistribution:
    counts = list(range(records + 1))
    probabilities = [comb(records, k) * use.rate**k * (1 - use.rate) ** (records - k) for k in counts]
    losses = pld.from_mixture_gaussian_mechanism(use.sigma, counts, probabilities, value_discretization_interval=step)
    return losses.self_compose(use.steps)
