"""Aggregation of the updates of several sites, in which no site outweighs the others.

An update is a list of slices, as in its messages; a sum over slices of some megabytes stays in the processor's cache.
Updates are kept until they are combined, since what an outlier is depends on all of them:

    one update a site    the mean of those that it has sent since the last combination
    its norm             beyond `OUTLIER` times the median of the sites' latest norms: scaled to the median
    its weight           the number of training samples that it claims, at most the median of the sites' numbers

With updates of two sites there is no majority, and neither norm nor weight is bounded.
"""

import statistics
from collections.abc import Iterator, Mapping, Sequence

import torch

from nightsplit.shared.config.run import RoundSection
from nightsplit.shared.learning.bounds import MAJORITY, capped, factor_for, norm_of, reference
from nightsplit.shared.storage.checkpoint import under

WEISZFELD_STEPS = 3
"""Iterations from the mean towards the geometric median, as in the paper: honest updates lose little, outliers much."""
CHUNK = 2**16
"""Elements of each update that are multiplied at a time, so that they stay in the processor's cache."""
SMOOTHING = 1e-3
"""Smallest distance from the geometric median, in median norms, so that an update may be the median itself."""


class Aggregation:
    """Updates of one round, and the rule that combines them.

    mean              sum of n_k w_k / n (McMahan et al., AISTATS 2017, algorithm 1)
    geometric_median  the point with the least sum of n_k-weighted distances, by the smoothed Weiszfeld algorithm
                      (RFA: Pillutla et al., IEEE Transactions on Signal Processing 2022, algorithm 2)
    trimmed_mean      per coordinate, without the share `trim` of the values at each end (Yin et al., ICML 2018,
                      definition 2): of m updates floor(trim m) each; weights are ignored
    median            per coordinate, the middle one or two (definition 1); weights are ignored

    Updates of two sites have no majority, and their geometric median is their mean.
    """

    def __init__(self, section: RoundSection) -> None:
        self._rule = section.combine
        self._trim = 0.5 if section.combine == "median" else section.trim
        self._updates: dict[str, list[torch.Tensor]] = {}
        self._counts: dict[str, int] = {}
        self._weights: dict[str, float] = {}
        self._norms: dict[str, float] = {}
        """Latest norm of each site, of earlier rounds too: a round may hold the updates of a few sites only."""

    def add(self, site: str, update: Sequence[torch.Tensor], weight: float) -> None:
        """Add a site's update, slices of float32 (elements,) as long as those of the others; they are not changed."""
        self._counts[site] = count = self._counts.get(site, 0) + 1
        self._weights[site] = weight
        if count == 1:
            self._updates[site] = list(update)
        else:
            pairs = zip(self._updates[site], update, strict=True)
            self._updates[site] = [mean + (values - mean) / count for mean, values in pairs]
        self._norms[site] = norm_of(self._updates[site])

    def outliers(self) -> dict[str, float]:
        """Return the factor of each site whose update is an outlier."""
        median = reference(self._norms.values())
        factors = {site: factor_for(self._norms[site], median) for site in sorted(self._updates)}
        return {site: factor for site, factor in factors.items() if factor < 1.0}

    def result(self) -> Iterator[torch.Tensor]:
        """Return the slices of the combined update, float32 (elements,); none without updates."""
        factors = dict.fromkeys(sorted(self._updates), 1.0) | self.outliers()
        updates = zip(*(self._updates[site] for site in factors), strict=True)
        if self._rule in ("trimmed_mean", "median"):
            scale = torch.tensor([*factors.values()])[:, None]
            return (self._trimmed_mean(torch.stack(slices) * scale) for slices in updates)
        shares = self._shares(factors)
        return (_weighted_sum(slices, [shares[site] * factors[site] for site in factors]) for slices in updates)

    def _trimmed_mean(self, values: torch.Tensor) -> torch.Tensor:
        """Return the trimmed mean (elements,) of values (updates, elements)."""
        trimmed = min((len(values) - 1) // 2, int(self._trim * len(values)))
        return values.sort(0).values[trimmed : len(values) - trimmed].mean(0)

    def _shares(self, factors: Mapping[str, float]) -> dict[str, float]:
        """Return the share of each site in the combined update; their sum is 1."""
        weights = capped({site: self._weights[site] for site in factors})
        if self._rule == "geometric_median" and len(weights) >= MAJORITY:
            weights = self._weiszfeld(weights, factors)
        total = sum(weights.values())
        return {site: weight / total for site, weight in weights.items()}

    def _weiszfeld(self, weights: Mapping[str, float], factors: Mapping[str, float]) -> dict[str, float]:
        """Return the weights of the mean that is the geometric median of the scaled updates.

        The median is a weighted mean of the updates, and its distance from each of them follows from their products.
        """
        unit = statistics.median(self._norms[site] for site in factors) or 1.0
        scale = torch.tensor([factor / unit for factor in factors.values()])[:, None]
        products = torch.zeros(len(scale), len(scale), dtype=torch.float64)
        for slices in zip(*(self._updates[site] for site in factors), strict=True):
            for parts in zip(*(values.split(CHUNK) for values in slices), strict=True):
                values = torch.stack(parts) * scale
                products += values @ values.T
        squares = products.diagonal()
        given = torch.tensor([*weights.values()], dtype=torch.float64)
        current = given
        for _ in range(WEISZFELD_STEPS):
            shares = current / current.sum()
            distances = (squares - 2 * products @ shares + shares @ products @ shares).clamp(min=0).sqrt()
            current = given / distances.clamp(min=SMOOTHING)
        return dict(zip(weights, current.tolist(), strict=True))

    def clear(self) -> None:
        """Remove all updates, and keep the sites' norms."""
        self._updates, self._counts, self._weights = {}, {}, {}

    def state(self) -> dict[str, torch.Tensor]:
        """Return the tensors of a snapshot."""
        tensors = {
            f"update/{site}/{number}": values
            for site, slices in self._updates.items()
            for number, values in enumerate(slices)
        }
        numbers: dict[str, Mapping[str, float]] = {
            "count": self._counts, "weight": self._weights, "norm": self._norms,
        }  # fmt: skip
        for name, by_site in numbers.items():
            tensors |= {f"{name}/{site}": torch.tensor(value, dtype=torch.float64) for site, value in by_site.items()}
        return tensors

    def restore(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Continue from `state`."""
        self.clear()
        self._counts = {site: int(count) for site, count in under("count", tensors).items()}
        self._weights = {site: weight.item() for site, weight in under("weight", tensors).items()}
        self._norms = {site: norm.item() for site, norm in under("norm", tensors).items()}
        updates = under("update", tensors)
        for site in self._counts:
            slices = under(site, updates)
            self._updates[site] = [slices[str(number)] for number in range(len(slices))]


def _weighted_sum(slices: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    total = slices[0] * weights[0]
    for values, weight in zip(slices[1:], weights[1:], strict=True):
        total.add_(values, alpha=weight)
    return total
