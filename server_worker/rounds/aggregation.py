"""Aggregation of the updates of several sites.

An update is a list of slices, as in its messages; a sum over slices of some megabytes stays in the processor's cache.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch

from nightsplit.shared.config.run import RoundSection


class WeightedMean:
    """Weighted mean of updates, sum of n_k w_k / n (McMahan et al., AISTATS 2017, algorithm 1).

    It takes one pass, and memory for one model.
    """

    def __init__(self) -> None:
        self._sums: list[torch.Tensor] = []
        self._weight = 0.0

    def add(self, name: str, update: Sequence[torch.Tensor], weight: float) -> None:
        """Add an update, slices of float32 (elements,) as long as those of the others; they are not changed."""
        if not self._sums:
            self._sums = [values * weight for values in update]
        else:
            for total, values in zip(self._sums, update, strict=True):
                total.add_(values, alpha=weight)
        self._weight += weight

    def result(self) -> Iterator[torch.Tensor]:
        """Return the slices of the combined update, float32 (elements,); none without updates."""
        return (total / self._weight for total in self._sums)

    def clear(self) -> None:
        """Remove all updates."""
        self._sums, self._weight = [], 0.0

    def state(self) -> dict[str, torch.Tensor]:
        """Return the tensors of a snapshot."""
        sums = {str(number): total for number, total in enumerate(self._sums)}
        return {**sums, "weight": torch.tensor(self._weight, dtype=torch.float64)}

    def restore(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Continue from `state`."""
        self._sums = [tensors[str(number)].clone() for number in range(len(tensors) - 1)]
        self._weight = tensors["weight"].item()


class TrimmedMean:
    """Coordinate-wise trimmed mean of updates (Yin et al., ICML 2018, definition 2), robust to a hostile site.

    It keeps every update until they are combined. All count the same; weights are ignored. `trim` is the share of the
    values that is removed at each end: of m updates, floor(trim m) each; 0.5 means the median, the middle one or two.
    """

    def __init__(self, trim: float) -> None:
        self._trim = trim
        self._updates: dict[str, list[torch.Tensor]] = {}

    def add(self, name: str, update: Sequence[torch.Tensor], weight: float) -> None:
        """Add an update, slices of float32 (elements,) as long as those of the others; they are not changed."""
        self._updates[name] = list(update)

    def result(self) -> Iterator[torch.Tensor]:
        """Return the slices of the combined update, float32 (elements,); none without updates."""
        updates = [self._updates[name] for name in sorted(self._updates)]
        return (self._combine(torch.stack(slices)) for slices in zip(*updates, strict=True))

    def _combine(self, values: torch.Tensor) -> torch.Tensor:
        """Return the trimmed mean (elements,) of values (updates, elements)."""
        trimmed = min((len(values) - 1) // 2, int(self._trim * len(values)))
        return values.sort(0).values[trimmed : len(values) - trimmed].mean(0)

    def clear(self) -> None:
        """Remove all updates."""
        self._updates = {}

    def state(self) -> dict[str, torch.Tensor]:
        """Return the tensors of a snapshot."""
        return {f"{number}/{name}": part for name, parts in self._updates.items() for number, part in enumerate(parts)}

    def restore(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Continue from `state`."""
        self.clear()
        keys = (key.split("/", 1) for key in tensors)
        for number, name in sorted((int(number), name) for number, name in keys):
            self._updates.setdefault(name, []).append(tensors[f"{number}/{name}"])


def make_aggregation(section: RoundSection) -> WeightedMean | TrimmedMean:
    """Return the aggregation that run.toml asks for."""
    if section.combine == "mean":
        return WeightedMean()
    return TrimmedMean(0.5 if section.combine == "median" else section.trim)
