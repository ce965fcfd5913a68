"""Networks that classify a sequence of images; their second part works on ciphertexts (`he_clstm`).

    frames ──▶ FrameEncoder ──▶ features in [-1, 1] ──▶ SequenceClassifier ──▶ logit
               at the site, in the clear                at the server, encrypted

After Yue et al., ACM TOIT 21(3):57 (HE-CLSTM): convolutions per frame, an LSTM over frames, a weighted unit that
mixes spatial and temporal evidence, and a vote of the frames.
"""

from collections import OrderedDict
from typing import Any

import torch
from torch import nn
from torch.autograd.function import FunctionCtx, once_differentiable
from typing_extensions import override


def clstm(
    frames: int = 5, side: int = 32, width: int = 8, features: int = 32, hidden: int = 16, recurrent: bool = True
) -> nn.Sequential:
    """Build the network of `he_clstm` in two stages: `encoder` (cut = 1) and `classifier`.

    Shapes: float32 (batch, frames, side, side) -> (batch, frames, features) at cut = 1 -> (batch, 1).

    Args:
        frames: images of a sequence.
        side: side of an image in pixels, a multiple of 8.
        width: channels of the first convolution, a multiple of 4.
        features: features of a frame.
        hidden: units of the LSTM.
        recurrent: as in `SequenceClassifier`.
    """
    return nn.Sequential(
        OrderedDict[str, nn.Module](
            encoder=FrameEncoder(side, width, features),
            classifier=SequenceClassifier(frames, features, hidden, recurrent),
        )
    )


class FrameEncoder(nn.Module):
    """Encoder of three convolutions, applied to each frame separately.

    Shapes: float32 (batch, frames, side, side) -> (batch, frames, features), all within [-1, 1].
    """

    def __init__(self, side: int, width: int, features: int) -> None:
        super().__init__()

        def block(inputs: int, outputs: int) -> nn.Sequential:
            return nn.Sequential(
                nn.Conv2d(inputs, outputs, 3, padding=1), nn.GroupNorm(4, outputs), nn.ReLU(), nn.MaxPool2d(2)
            )

        self.blocks = nn.Sequential(block(1, width), block(width, 2 * width), block(2 * width, 2 * width))
        self.features = nn.Linear(2 * width * (side // 8) ** 2, features)

    @override
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        batch, frames = images.shape[:2]
        maps = self.blocks(images.reshape(batch * frames, 1, *images.shape[2:]))
        return torch.tanh(self.features(maps.flatten(1))).view(batch, frames, -1)


class SequenceClassifier(nn.Module):
    """LSTM of products and sums with the weighted unit and the vote: polynomials, which ciphertexts allow.

        i, f, o, g = W x_t + U h_{t-1} + b       c_t = f c_{t-1} + i g       h_t = o c_t
        evidence of frame t = m (a x_t + a') + (1 - m) (w h_t + w')           (weighted unit)
        logit = sum over t of v_t evidence_t                                    (vote; v_t > 0, their sum is 1)

    Gates are the first-order polynomials of the sigmoid and of tanh, with learned weights in front, and a penalty
    keeps every gate and state within [-1, 1] (`_penalize_large`). The products make it as accurate as an LSTM with
    sigmoid and tanh in the experiments of docs/explanation/he_clstm.md.

    Shapes: float32 (batch, frames, features) within [-1, 1] -> (batch, 1).

    Args:
        recurrent: whether gates see h_{t-1}. Without, they see x_t alone: c_t is a sum of products that a tree
            can evaluate in log(frames) levels, and only the last frame gives temporal evidence.
    """

    def __init__(self, frames: int, features: int, hidden: int, recurrent: bool = True) -> None:
        super().__init__()
        self.inputs = nn.Linear(features, 4 * hidden)
        self.state = nn.Linear(hidden, 4 * hidden, bias=False) if recurrent else None
        self.spatial = nn.Linear(features, 1)
        self.temporal = nn.Linear(hidden, 1)
        self.mixture = nn.Parameter(torch.zeros(()))
        self.votes = nn.Parameter(torch.zeros(frames))
        with torch.no_grad():  # gates start in the middle of their range, the forget gate below 1
            for layer in filter(None, (self.inputs, self.state)):
                layer.weight.mul_(0.5)
            self.inputs.bias.copy_(torch.tensor([0.5, 0.8, 0.5, 0.0]).repeat_interleave(hidden))

    @override
    def forward(self, features: torch.Tensor) -> torch.Tensor:
        hidden = self.temporal.in_features
        h = c = features.new_zeros(len(features), hidden)
        mixture, votes = torch.sigmoid(self.mixture), torch.softmax(self.votes, 0)
        logit = mixture * (self.spatial(features).squeeze(2) @ votes)
        for t in range(features.shape[1]):
            gates = self.inputs(features[:, t])
            if self.state is not None:
                gates = gates + self.state(h)
            i, f, o, g = _penalize_large(gates).chunk(4, 1)
            c = _penalize_large(f * c + i * g)
            h = o * c
            if self.state is not None:
                logit = logit + votes[t] * (1 - mixture) * self.temporal(h).squeeze(1)
        if self.state is None:
            logit = logit + (1 - mixture) * self.temporal(h).squeeze(1)
        scores: torch.Tensor = logit.unsqueeze(1)
        return scores


class _RangePenalty(torch.autograd.Function):
    """Identity whose gradient includes that of a penalty: the mean over the batch of sum max(0, |v| - 1)^2.

    As a gradient, the penalty takes effect wherever the loss is computed, also at another worker.
    """

    @staticmethod
    @override
    def forward(ctx: FunctionCtx, values: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(values)
        return values.view_as(values)

    @staticmethod
    @once_differentiable
    @override
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        (values,) = ctx.saved_tensors
        excess = (values.abs() - 1).clamp(min=0) * values.sign()
        total: torch.Tensor = gradient + 2 / len(values) * excess
        return total


def _penalize_large(values: torch.Tensor) -> torch.Tensor:
    same: torch.Tensor = _RangePenalty.apply(values)  # type: ignore[no-untyped-call]
    return same
