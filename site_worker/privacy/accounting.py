"""What training with noise costs: epsilon from privacy loss distributions, with Rényi DP beside it.

The mechanism is the Poisson-sampled Gaussian (Abadi et al., "Deep Learning with Differential Privacy", CCS
2016), neighbours differ in one record that is added or removed. The figure is computed from privacy loss
distributions (Koskela et al., AISTATS 2020; Doroshenko et al., "Connect the Dots", PoPETs 2022), rounded
upwards. The figure of Rényi DP (Mironov et al., arXiv 1908.10530) is looser, and a check from another
theory. Gaussian DP is left out: it is an approximation that comes out too low.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache, reduce
from math import comb

from dp_accounting import dp_event, rdp
from dp_accounting.pld import privacy_loss_distribution as pld

_STEP = 1e-3
"""Privacy losses are rounded up to multiples of this (for patients: times their most records)."""
_ORDERS = (*(order / 10 for order in range(20, 110)), *range(11, 65), 80, 96, 128, 192, 256, 512)
"""Of Rényi DP. Just above 1 the series does not converge where there is little noise."""


@dataclass(frozen=True)
class Use:
    """Training steps on a site's records, empty batches included.

    A record is in a step's batch with probability `rate`, in (0, 1]; `sigma` is the standard deviation of the noise,
    in units of the clipping norm.
    """

    rate: float
    sigma: float
    steps: int


@dataclass(frozen=True)
class Spent:
    """Epsilon of one record: the figure to report, and the one of Rényi DP, which is never smaller."""

    pld: float
    rdp: float


def epsilon_of(uses: Iterable[Use], delta: float) -> Spent:
    """Epsilon of a record that took part in all `uses`, at `delta`."""
    taken = [use for use in uses if use.steps]
    if not taken:
        return Spent(0.0, 0.0)
    accountant = rdp.RdpAccountant(_ORDERS)
    for use in taken:
        event = dp_event.PoissonSampledDpEvent(use.rate, dp_event.GaussianDpEvent(use.sigma))
        accountant.compose(event, use.steps)
    losses = reduce(pld.PrivacyLossDistribution.compose, map(_losses, taken))
    return Spent(float(losses.get_epsilon_for_delta(delta)), float(accountant.get_epsilon(delta)))


@lru_cache(maxsize=256)
def noise_for(epsilon: float, delta: float, rate: float, steps: int) -> float:
    """The smallest noise (`Use.sigma`), to 0.1 %, with which `steps` cost one record at most `epsilon` at `delta`."""

    def is_enough(sigma: float) -> bool:
        return bool(_losses(Use(rate, sigma, steps)).get_epsilon_for_delta(delta) <= epsilon)

    # Bounds first: the distribution of little noise is long, and takes long to compute.
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
    """Epsilon of a patient with several records, at the same `delta`: neighbours differ in all of them.

    A batch holds a binomial number of the patient's records, and each moves the sum by up to the clipping
    norm. So a step is a mixture of Gaussians: Ganesh, "Tight Group-Level DP Guarantees for DP-SGD with
    Sampling via Mixture of Gaussians Mechanisms", arXiv 2401.10294. The general rule for a group of m
    (Vadhan, "The Complexity of Differential Privacy", 2017, Lemma 2.2), epsilon to m epsilon and delta to
    m exp((m - 1) epsilon) delta, gives a delta above 1 for the records of a usual volume.

    `uses` tell in what the patient's records took part, and how many of them.
    """
    taken = [(use, records) for use, records in uses if use.steps and records]
    if not taken:
        return 0.0
    step = _STEP * max(records for _, records in taken)
    losses = reduce(pld.PrivacyLossDistribution.compose, (_group_losses(*one, step) for one in taken))
    return float(losses.get_epsilon_for_delta(delta))


@lru_cache(maxsize=256)
def _losses(use: Use) -> pld.PrivacyLossDistribution:
    one = pld.from_gaussian_mechanism(use.sigma, sampling_prob=use.rate, value_discretization_interval=_STEP)
    return one.self_compose(use.steps)


@lru_cache(maxsize=256)
def _group_losses(use: Use, records: int, step: float) -> pld.PrivacyLossDistribution:
    present = range(records + 1)
    chances = [comb(records, k) * use.rate**k * (1 - use.rate) ** (records - k) for k in present]
    one = pld.from_mixture_gaussian_mechanism(use.sigma, list(present), chances, value_discretization_interval=step)
    return one.self_compose(use.steps)
