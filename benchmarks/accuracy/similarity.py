"""Similarity of two images."""

from __future__ import annotations

import torch
from torch.nn import functional

_SIDE, _SPREAD = 11, 1.5
"""Window of Wang et al."""


def psnr(image: torch.Tensor, truth: torch.Tensor) -> float:
    """Peak signal-to-noise ratio in dB of (h, w) images with values in [0, 1]; infinite for equal ones."""
    error = (image - truth).square().mean()
    return float(-10 * torch.log10(error))


def ssim(image: torch.Tensor, truth: torch.Tensor) -> float:
    """Structural similarity of (h, w) images with values in [0, 1], both sides at least 11.

    Mean over all windows of 11 x 11 pixels with Gaussian weights that fit into the image (Wang, Bovik, Sheikh and
    Simoncelli, IEEE Transactions on Image Processing 13(4), 2004).
    """
    offsets = torch.arange(_SIDE, dtype=torch.float64) - _SIDE // 2
    bell = torch.exp(-(offsets**2) / (2 * _SPREAD**2))
    bell = bell / bell.sum()
    window = torch.outer(bell, bell)[None, None]

    def mean(values: torch.Tensor) -> torch.Tensor:
        return functional.conv2d(values[None, None], window)

    x, y = image.double(), truth.double()
    mx, my = mean(x), mean(y)
    vx, vy, together = mean(x * x) - mx**2, mean(y * y) - my**2, mean(x * y) - mx * my
    c1, c2 = 0.01**2, 0.03**2
    return float(((2 * mx * my + c1) * (2 * together + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))).mean())
