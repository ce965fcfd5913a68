"""Whole model for protocols that exchange weights, and the layout of the weights they send."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Set
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from math import prod
from pathlib import Path

import torch
from torch import nn

from nightsplit.shared.config.run import RunConfig
from nightsplit.shared.errors import ConfigError
from nightsplit.shared.models.artifact import read_artifact
from nightsplit.shared.models.factory import locate_run_file, make
from nightsplit.shared.models.partition import ModelParts

MEAN, VARIANCE = ".running_mean", ".running_var"
"""Suffixes of a normalization's running statistics (`torch.nn.modules.batchnorm`)."""


@dataclass(frozen=True)
class WeightLayout:
    """Layout of floating-point weights in one vector, so that a model of any size is sent in slices.

        weight | bias | weight | bias | running mean | running second moment | ...
        ├─────── slice 1 ───────┼─────────── slice 2 ───────────┼── slice 3 ──┤

    A running variance is sent as the second moment, variance + mean^2: then any weighted mean of
    vectors holds the variance of the pooled samples (law of total variance).

    Attributes:
        shapes: shapes of the sent weights, by name.
        slice_length: elements of a slice.
        buffers: names of the weights that are measured, not trained.
    """

    shapes: Mapping[str, tuple[int, ...]]
    slice_length: int
    buffers: frozenset[str] = frozenset()

    @classmethod
    def of(cls, module: nn.Module, config: RunConfig, slice_length: int) -> WeightLayout:
        """Return the layout of a run: weights of modules that are not frozen, and buffers if they are pooled.

        Raises:
            ConfigError: 105 a weight is not float32, or nothing is left to train.
        """
        frozen = frozen_weights(module, config.round.freeze)
        trained = {name for name, _ in module.named_parameters()} - frozen
        pooled = {name for name, _ in module.named_buffers()} - frozen if config.round.statistics == "pooled" else set()
        shapes = {}
        for name, tensor in module.state_dict().items():
            if name in trained | pooled and tensor.is_floating_point():
                if tensor.dtype != torch.float32:
                    raise ConfigError(105, f"{name} of the model is {tensor.dtype}.", "build the model in float32.")
                shapes[name] = tuple(tensor.shape)
        if not trained & shapes.keys():
            raise ConfigError(105, "round.freeze leaves nothing to train.", "freeze fewer modules.")
        return cls(shapes, slice_length, frozenset(pooled & shapes.keys()))

    @cached_property
    def _bounds(self) -> list[int]:
        return list(accumulate(map(prod, self.shapes.values()), initial=0))

    @property
    def length(self) -> int:
        """Length of the vector in elements."""
        return self._bounds[-1]

    @property
    def slices(self) -> int:
        """Number of slices."""
        return -(-self.length // self.slice_length)

    def slice(self, number: int) -> slice:
        """Return the range of slice `number` in the vector, 1 <= number <= slices."""
        return slice((number - 1) * self.slice_length, min(number * self.slice_length, self.length))

    @cached_property
    def statistics(self) -> torch.Tensor:
        """Mask of the elements of buffers, bool (length,)."""
        return self._mask(self.buffers)

    @cached_property
    def second_moments(self) -> torch.Tensor:
        """Mask of the elements that are never negative, bool (length,)."""
        return self._mask({name for name in self.buffers if name.endswith(VARIANCE)})

    def _mask(self, names: Set[str]) -> torch.Tensor:
        return torch.cat([torch.full((prod(shape),), name in names) for name, shape in self.shapes.items()])

    def vector(self, weights: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return weights as a vector, float32 (length,) on the CPU."""
        return torch.cat([self._encoded(name, weights).detach().cpu().reshape(-1) for name in self.shapes])

    def weights(self, vector: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the weights in a vector (length,) by name."""
        weights = {
            name: vector[first:last].view(shape).clone()
            for (name, shape), (first, last) in zip(self.shapes.items(), pairwise(self._bounds), strict=True)
        }
        for name in weights:
            if name.endswith(VARIANCE):
                weights[name] = (weights[name] - weights[name.removesuffix(VARIANCE) + MEAN] ** 2).clamp(min=0)
        return weights

    def _encoded(self, name: str, weights: Mapping[str, torch.Tensor]) -> torch.Tensor:
        if name.endswith(VARIANCE):
            return weights[name] + weights[name.removesuffix(VARIANCE) + MEAN] ** 2
        return weights[name]


def build_network(config: RunConfig, base: Path) -> nn.Module:
    """Build the uncut model of a run with its initial weights; `base` is the folder of run.toml and `model.initial`.

    Raises:
        ConfigError: 101, 103, 104, 119 as `make`; 115-117 as in `read_artifact` and `Artifact.load_into`.
    """
    module = make(config.model, config.run.seed, base)
    if isinstance(module, ModelParts):
        module = nn.Sequential(OrderedDict(module.modules))
    if not isinstance(module, nn.Module):
        sentence = f"{config.model.factory} returned {type(module).__name__}."
        raise ConfigError(104, sentence, "let it return a torch.nn.Module.")
    if config.model.initial is not None:
        read_artifact(locate_run_file(base, config.model.initial), config.model.initial_sha256).load_into(module)
    return module


def frozen_weights(module: nn.Module, freeze: list[str]) -> set[str]:
    """Return the names of all parameters and buffers of frozen modules; ConfigError 105 if a module does not exist."""
    modules = dict(module.named_modules())
    for name in freeze:
        if name not in modules:
            sentence = f"round.freeze names {name!r}; the model has {', '.join(n for n in modules if n)}."
            raise ConfigError(105, sentence, "correct that name.")
    return {w for w in module.state_dict() if any(w.startswith(f"{name}.") for name in freeze)}
