"""Weights of a `SequenceClassifier` as plain numbers, for computation without torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class ClassifierWeights:
    """Weights of a `SequenceClassifier`; its docstring has the formulas.

    Attributes:
        inputs: W, float64 (4 hidden, features), in the order i, f, o, g.
        state: U, (4 hidden, hidden); None where gates see x_t alone.
        bias: b, (4 hidden,).
        spatial: m a, (features,): evidence of a frame's features, before the votes.
        temporal: (1 - m) w, (hidden,): evidence of a state, before the votes.
        constant: sum of the constant terms of every logit.
        votes: v, (frames,).
    """

    inputs: FloatArray
    state: FloatArray | None
    bias: FloatArray
    spatial: FloatArray
    temporal: FloatArray
    constant: float
    votes: FloatArray

    @property
    def frames(self) -> int:
        """Length of a sequence."""
        return len(self.votes)

    @property
    def features(self) -> int:
        """Number of features of a frame."""
        return len(self.spatial)

    @property
    def hidden(self) -> int:
        """Number of units of the LSTM."""
        return len(self.temporal)

    @classmethod
    def of(cls, weights: Mapping[str, torch.Tensor]) -> ClassifierWeights:
        """Return the weights in the state dict of a `SequenceClassifier`."""
        found = {name: tensor.detach().double().numpy() for name, tensor in weights.items()}
        mixture = 1 / (1 + np.exp(-found["mixture"]))
        votes = np.exp(found["votes"] - found["votes"].max())
        constant = mixture * found["spatial.bias"][0] + (1 - mixture) * found["temporal.bias"][0]
        return cls(
            inputs=found["inputs.weight"],
            state=found.get("state.weight"),
            bias=found["inputs.bias"],
            spatial=mixture * found["spatial.weight"][0],
            temporal=(1 - mixture) * found["temporal.weight"][0],
            constant=float(constant),
            votes=votes / votes.sum(),
        )
