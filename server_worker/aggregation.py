"""How updates of several sites become one, slice by slice.

A slice is combined of what came for it: where a slice of an update was refused, the others stand.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch

from shared.checkpoint import flatten, under
from shared.config import RoundSection


class Aggregation(ABC):
    """Takes updates one after the other; numbers of slices count from 1."""

    @abstractmethod
    def add(self, number: int, name: str, values: torch.Tensor, weight: float) -> None:
        """Take slice `number`, float32 (elements,), of the update `name`; `values` is not changed."""

    @abstractmethod
    def result(self, number: int) -> torch.Tensor | None:
        """Slice `number` of the combined update, float32 (elements,); None where nothing came."""

    @abstractmethod
    def clear(self) -> None:
        """Forget all updates."""

    @abstractmethod
    def state(self) -> dict[str, torch.Tensor]:
        """Entries for a snapshot."""

    @abstractmethod
    def restore(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Continue from `state`."""


class WeightedMean(Aggregation):
    """McMahan et al., AISTATS 2017, algorithm 1: sum of n_k w_k / n. One pass, one model of memory."""

    def __init__(self) -> None:
        self._sums: dict[int, torch.Tensor] = {}
        self._weights: dict[int, float] = {}

    def add(self, number: int, name: str, values: torch.Tensor, weight: float) -> None:
        """See `Aggregation`."""
        if number in self._sums:
            self._sums[number].add_(values, alpha=weight)
            self._weights[number] += weight
        else:
            self._sums[number], self._weights[number] = values * weight, weight

    def result(self, number: int) -> torch.Tensor | None:
        """See `Aggregation`."""
        return self._sums[number] / self._weights[number] if number in self._sums else None

    def clear(self) -> None:
        """See `Aggregation`."""
        self._sums, self._weights = {}, {}

    def state(self) -> dict[str, torch.Tensor]:
        """See `Aggregation`."""
        weights = {f"weight/{number}": torch.tensor(w, dtype=torch.float64) for number, w in self._weights.items()}
        return {**dict(flatten("sum", {str(number): total for number, total in self._sums.items()})), **weights}

    def restore(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """See `Aggregation`."""
        self._sums = {int(number): total.clone() for number, total in under("sum", tensors).items()}
        self._weights = {int(number): weight.item() for number, weight in under("weight", tensors).items()}


class Held(Aggregation):
    """Keeps every update; one that comes again takes its own place. Each counts the same, whatever its weight."""

    def __init__(self) -> None:
        self._held: dict[int, dict[str, torch.Tensor]] = {}

    @abstractmethod
    def combine(self, values: torch.Tensor) -> torch.Tensor:
        """What becomes of values (updates, elements), in the order of the updates' names."""

    def add(self, number: int, name: str, values: torch.Tensor, weight: float) -> None:
        """See `Aggregation`."""
        self._held.setdefault(number, {})[name] = values.clone()

    def result(self, number: int) -> torch.Tensor | None:
        """See `Aggregation`."""
        held = self._held.get(number)
        return self.combine(torch.stack([held[name] for name in sorted(held)])) if held else None

    def drop(self, name: str) -> None:
        """Forget an update."""
        for held in self._held.values():
            held.pop(name, None)

    def of(self, name: str) -> dict[int, torch.Tensor]:
        """The slices of one update that came, by number."""
        return {number: held[name] for number, held in sorted(self._held.items()) if name in held}

    def clear(self) -> None:
        """See `Aggregation`."""
        self._held = {}

    def state(self) -> dict[str, torch.Tensor]:
        """See `Aggregation`."""
        return {f"{number}/{name}": values for number, held in self._held.items() for name, values in held.items()}

    def restore(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """See `Aggregation`."""
        self._held = {}
        for key, values in tensors.items():
            number, _, name = key.partition("/")
            self._held.setdefault(int(number), {})[name] = values


class TrimmedMean(Held):
    """Coordinate-wise trimmed mean (Yin et al., ICML 2018, definition 2), against a site that lies.

    Args:
        trim: share of the values that is left out at each end; of m updates, floor(trim m) each. 0.5
            means the median: all but the middle one or two.
    """

    def __init__(self, trim: float) -> None:
        super().__init__()
        self._trim = trim

    def combine(self, values: torch.Tensor) -> torch.Tensor:
        """See `Held`."""
        most = (len(values) - 1) // 2
        out = min(most, int(self._trim * len(values)))
        return values.sort(0).values[out : len(values) - out].mean(0)


class Sum(Held):
    """The sum, to the bit the same in whatever order updates come."""

    def combine(self, values: torch.Tensor) -> torch.Tensor:
        """See `Held`."""
        return values.sum(0)


def make_aggregation(section: RoundSection) -> Aggregation:
    """What run.toml asks for."""
    if section.combine == "mean":
        return WeightedMean()
    return TrimmedMean(0.5 if section.combine == "median" else section.trim)
