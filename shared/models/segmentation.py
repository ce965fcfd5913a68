"""Networks for segmentation: one logit per pixel of a grey image.

Both use GroupNorm, never BatchNorm: if a record's gradient depended on other records of its batch, clipping
it (differential privacy) would bound nothing. Both start with an output bias towards background, as most
pixels are; otherwise the first gradients of all records would only learn that bias.
"""

import torch
from torch import nn
from torch.nn import functional
from typing_extensions import override

GROUPS = 4


def unet(
    channels: int = 1, width: int = 8, fold: int = 2,
    coordinates: bool = True, smooth: bool = False, output_bias: float = -2.5,
) -> nn.Module:  # fmt: skip
    """Build a U-Net of two levels (Ronneberger et al., MICCAI 2015) on folded pixels.

    The stem folds blocks of `fold` x `fold` pixels into channels, and the head unfolds them (PixelUnshuffle and
    PixelShuffle; Shi et al., CVPR 2016), so that the costly first layers see a quarter of the positions. Three
    channels hold the position: x, y and the squared distance from the centre.

    Shapes: float32 (batch, channels, h, w) -> logits (batch, 1, h, w); h and w multiples of 4 fold.
    Parameters with the defaults: 30,396.

    Args:
        channels: channels of the images.
        width: channels of the first level, a multiple of 4; the second has twice, the bottom four times as many.
        fold: side of the folded blocks; 1 for single pixels.
        coordinates: whether to add the three channels of positions.
        smooth: whether to use SiLU and average pooling in place of ReLU and maximum pooling, whose kinks in the
            loss would hide the full power of an attack by gradient inversion.
        output_bias: initial logit of a pixel.
    """
    return _UNet(channels, width, fold, coordinates, smooth, output_bias)


def monet(channels: int = 1, width: int = 16, dropout: float = 0.2, output_bias: float = -2.5) -> nn.Module:
    """Build MoNet (Knolle et al., PLoS ONE 2021), the network of Ziller et al., arXiv 2107.02586.

    Two levels of a convolution and a residual block whose four convolutions have dilation 4, 3, 2, 1. It differs
    from the authors' code in three points: GroupNorm in place of BatchNorm; the long skips from encoder to decoder
    work (there, a comparison of names never holds); and the output has a bias in place of a normalization,
    which would give an empty slice as much foreground as a full one.

    Shapes: float32 (batch, channels, h, w) -> logits (batch, 1, h, w); h and w multiples of 4.
    Parameters with the defaults: 401,665.

    Args:
        channels: channels of the images.
        width: channels of the first level, a multiple of 4.
        dropout: probability per channel, within the residual blocks.
        output_bias: initial logit of a pixel.
    """
    return _MoNet(channels, width, dropout, output_bias)


class _UNet(nn.Module):
    def __init__(
        self, channels: int, width: int, fold: int, coordinates: bool, smooth: bool, output_bias: float
    ) -> None:
        super().__init__()
        self.coordinates = coordinates
        self.fold = nn.PixelUnshuffle(fold)
        self.first = _pair(channels * fold**2 + 3 * coordinates, width, smooth)
        self.second = _pair(width, 2 * width, smooth)
        self.bottom = _pair(2 * width, 4 * width, smooth)
        self.back_to_second = _pair(6 * width, 2 * width, smooth)
        self.back_to_first = _pair(3 * width, width, smooth)
        self.output = nn.Conv2d(width, fold**2, 1)
        nn.init.constant_(self.output.bias, output_bias)  # type: ignore[arg-type]  # it has one
        self.unfold = nn.PixelShuffle(fold)
        self.shrink = nn.AvgPool2d(2) if smooth else nn.MaxPool2d(2)
        self.enlarge = nn.Upsample(scale_factor=2)

    @override
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        folded = self.fold(images)
        if self.coordinates:
            folded = torch.cat([folded, _positions(folded)], dim=1)
        first = self.first(folded)
        second = self.second(self.shrink(first))
        bottom = self.bottom(self.shrink(second))
        back = self.back_to_second(torch.cat([self.enlarge(bottom), second], dim=1))
        back = self.back_to_first(torch.cat([self.enlarge(back), first], dim=1))
        logits: torch.Tensor = self.unfold(self.output(back))
        return logits


def _pair(inputs: int, outputs: int, smooth: bool) -> nn.Sequential:
    first, second = (
        _normed(nn.Conv2d(width, outputs, 3, padding=1), nn.SiLU() if smooth else nn.ReLU())
        for width in (inputs, outputs)
    )
    return nn.Sequential(*first, *second)


def _positions(maps: torch.Tensor) -> torch.Tensor:
    """Return x and y in [-1, 1] and x² + y² of every position of `maps` (batch, _, h, w), as (batch, 3, h, w).

    Computed for each batch, since a buffer would count as a statistic of the model and be sent.
    """
    height, width = maps.shape[-2:]
    y = torch.linspace(-1, 1, height, device=maps.device)[:, None].expand(height, width)
    x = torch.linspace(-1, 1, width, device=maps.device)[None, :].expand(height, width)
    return torch.stack([x, y, x**2 + y**2]).expand(len(maps), 3, height, width)


class _MoNet(nn.Module):
    def __init__(self, channels: int, width: int, dropout: float, output_bias: float) -> None:
        super().__init__()
        self.first = nn.Sequential(_conv(channels, width), _Dilated(width, dropout))
        self.halve_first = _conv(width, width, kernel=4, stride=2)
        self.second = nn.Sequential(_conv(width, 2 * width), _Dilated(2 * width, dropout))
        self.halve_second = _conv(2 * width, 2 * width, kernel=4, stride=2)
        self.bottom = nn.Sequential(_conv(2 * width, 4 * width), _Dilated(4 * width, dropout))
        self.double_bottom = _double(4 * width)
        self.back_to_second = nn.Sequential(_conv(6 * width, 2 * width), _Dilated(2 * width, dropout))
        self.double_second = _double(2 * width)
        self.back_to_first = nn.Sequential(_conv(3 * width, width), _Dilated(width, dropout))
        self.output = nn.Conv2d(width, 1, 1)
        nn.init.constant_(self.output.bias, output_bias)  # type: ignore[arg-type]  # it has one

    @override
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        first = self.first(images)
        second = self.second(self.halve_first(first))
        bottom = self.bottom(self.halve_second(second))
        back = self.back_to_second(torch.cat([self.double_bottom(bottom), second], dim=1))
        back = self.back_to_first(torch.cat([self.double_second(back), first], dim=1))
        logits: torch.Tensor = self.output(back)
        return logits


class _Dilated(nn.Module):
    """Residual block of four convolutions of decreasing dilation, with the short skips of the authors' code."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList(_conv(width, width, dilation=dilation) for dilation in (4, 3, 2, 1))
        self.dropout = dropout

    @override
    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        fourth, third, second, first = self.convolutions
        middle = self._drop(third(self._drop(fourth(maps)) + maps))
        last: torch.Tensor = first(self._drop(second(middle)) + middle)
        return maps + last

    def _drop(self, maps: torch.Tensor) -> torch.Tensor:
        return functional.dropout2d(maps, self.dropout, self.training)


def _conv(inputs: int, outputs: int, *, kernel: int = 3, stride: int = 1, dilation: int = 1) -> nn.Sequential:
    padding = dilation * (kernel - 1) // 2
    return _normed(nn.Conv2d(inputs, outputs, kernel, stride, padding, dilation, bias=False), nn.ELU())


def _double(width: int) -> nn.Sequential:
    return _normed(nn.ConvTranspose2d(width, width, 4, stride=2, padding=1, bias=False), nn.ELU())


def _normed(convolution: nn.Conv2d | nn.ConvTranspose2d, activation: nn.Module) -> nn.Sequential:
    return nn.Sequential(convolution, nn.GroupNorm(GROUPS, convolution.out_channels), activation)
