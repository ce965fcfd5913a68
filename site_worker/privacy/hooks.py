"""Opacus' hooks for gradients of single records, with a faster rule for convolutions.

Opacus copies the input of a convolution once for every element of the kernel (unfold), and then multiplies. Here
it is copied once for every column of the kernel: shifted by a row, a copy is its own slice.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from opacus.grad_sample import GradSampleModule
from opacus.grad_sample.conv import compute_conv_grad_sample
from torch import nn
from torch.nn import functional


def convolution(
    layer: nn.Conv2d, activations: list[torch.Tensor], backprops: torch.Tensor
) -> dict[torch.Tensor, torch.Tensor]:
    """Gradients of single records.

    Args:
        layer: the convolution.
        activations: its input, (batch, channels, h, w), alone in a list.
        backprops: gradient at its output, (batch, outputs, h', w').

    Returns:
        (batch, *shape) for each parameter that is trained.
    """
    if layer.groups > 1 or isinstance(layer.padding, str) or layer.padding_mode != "zeros":
        opacus: dict[torch.Tensor, torch.Tensor] = compute_conv_grad_sample(layer, activations, backprops)
        return opacus
    (inputs,) = activations
    batch, outputs, height, width = backprops.shape
    rows, columns = layer.kernel_size
    (down, right), (row, column) = layer.stride, layer.dilation
    padded = functional.pad(inputs, (layer.padding[1],) * 2 + (layer.padding[0],) * 2)
    # (batch, channels, columns, height of `padded`, w')
    shifted = torch.stack(
        [padded[..., c * column : c * column + right * (width - 1) + 1 : right] for c in range(columns)], dim=2
    )
    at_output = backprops.reshape(batch, outputs, -1)
    parts = [
        torch.bmm(
            at_output,
            shifted[..., r * row : r * row + down * (height - 1) + 1 : down, :]
            .reshape(batch, -1, height * width)
            .transpose(1, 2),
        ).view(batch, outputs, -1, columns)
        for r in range(rows)
    ]
    gradients: dict[torch.Tensor, torch.Tensor] = {}
    if layer.weight.requires_grad:
        gradients[layer.weight] = torch.stack(parts, dim=3)
    if layer.bias is not None and layer.bias.requires_grad:
        gradients[layer.bias] = at_output.sum(dim=2)
    return gradients


class Hooked(GradSampleModule):  # type: ignore[misc]  # Opacus has no type hints
    """A module whose parameters get `grad_sample`, (batch, *shape), from a backward of a sum of losses."""

    GRAD_SAMPLERS: ClassVar[dict[type[nn.Module], Any]] = {**GradSampleModule.GRAD_SAMPLERS, nn.Conv2d: convolution}

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module, loss_reduction="sum")
