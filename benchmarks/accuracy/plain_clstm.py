"""The network of `he_clstm` with an ordinary LSTM, to compare with."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import nn

from nightsplit.shared.models.sequences import FrameEncoder


def plain_clstm(frames: int = 5, side: int = 32, width: int = 8, features: int = 32, hidden: int = 16) -> nn.Sequential:
    """As `clstm`, with a plain LSTM (sigmoid and tanh) and a linear layer on its last state.

    Shapes: as `clstm`.
    """
    return nn.Sequential(
        OrderedDict[str, nn.Module](
            encoder=FrameEncoder(side, width, features), classifier=_PlainClassifier(features, hidden)
        )
    )


class _PlainClassifier(nn.Module):
    def __init__(self, features: int, hidden: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(features, hidden, batch_first=True)
        self.output = nn.Linear(hidden, 1)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        logit: torch.Tensor = self.output(self.lstm(features)[0][:, -1])
        return logit
