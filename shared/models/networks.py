"""Small reference networks, as `nn.Sequential` of named stages.

The first stage of each is one hidden layer with its activation (and pooling), so `model.cut = 1` leaves
exactly one hidden layer at the site, as in Ha et al., "Spatio-Temporal Split Learning for
Privacy-Preserving Medical Platforms", IEEE Access 9, 2021 (arXiv 2108.10147). The last stage holds the
output layer, for `model.head_cut`. Four rules keep training stable when sites are unequal and late:

- GroupNorm, not BatchNorm: statistics of a batch would be those of a single site, and a recomputed
  forward would update running statistics twice.
- No norm in the first stage: it would remove the brightness of an image, which matters in CT.
- Dropout only after the first stage: a site's activations depend on its weights and images alone, and
  an upload that is stored once still gets fresh dropout in every epoch at the server.
- No module occurs in two stages, so any cut is possible.
"""

from collections import OrderedDict
from collections.abc import Sequence
from itertools import pairwise

from torch import nn


def mlp(inputs: int, hidden: Sequence[int], outputs: int, dropout: float = 0.0) -> nn.Sequential:
    """Build linear layers with ReLU, for tables: stages `layer1`, ..., `layerN`, `output`.

    Shapes: float32 (batch, inputs) -> (batch, hidden[0]) at cut = 1 -> (batch, outputs).
    Parameters: the sum of (n + 1) * m over successive widths n, m; 13 -> [32, 16] -> 1: 993.

    Args:
        inputs: number of features.
        hidden: widths of the hidden layers, at least one.
        outputs: width of the last layer.
        dropout: probability before every layer but the first.
    """
    if not hidden:
        raise ValueError("hidden is empty: the site needs one hidden layer")
    stages: OrderedDict[str, nn.Module] = OrderedDict()
    for number, (width, following) in enumerate(pairwise([inputs, *hidden]), start=1):
        layer = [nn.Linear(width, following), nn.ReLU()]
        stages[f"layer{number}"] = nn.Sequential(*(layer if number == 1 else [nn.Dropout(dropout), *layer]))
    stages["output"] = nn.Sequential(nn.Dropout(dropout), nn.Linear(hidden[-1], outputs))
    return nn.Sequential(stages)


def small_cnn(channels: int = 1, outputs: int = 1, width: int = 16, dropout: float = 0.2) -> nn.Sequential:
    """Build three convolutions, for chest X-rays of 28x28: stages `block1`..`block3`, `pool`, `output`.

    Shapes: float32 (batch, channels, 28, 28) -> (batch, width, 14, 14) at cut = 1
    -> (batch, 2 width, 7, 7) -> (batch, 4 width, 3, 3) -> (batch, 4 width) at head_cut = 4
    -> (batch, outputs). Any side of at least 8 pixels works. Parameters with the defaults: 23,457.

    Args:
        channels: channels of the images.
        outputs: width of the last layer.
        width: channels at the cut, a multiple of 4.
        dropout: probability before the output layer.
    """
    return nn.Sequential(
        OrderedDict[str, nn.Module](
            block1=_block(channels, width, norm=False),
            block2=_block(width, 2 * width),
            block3=_block(2 * width, 4 * width),
            pool=nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()),
            output=nn.Sequential(nn.Dropout(dropout), nn.Linear(4 * width, outputs)),
        )
    )


def ct_cnn(channels: int = 1, outputs: int = 1, width: int = 16, side: int = 64, dropout: float = 0.3) -> nn.Sequential:
    """Build four convolutions, for lung CT of 64x64: stages `block1`..`block4`, `flat`, `output`.

    The last feature map is flattened, not averaged, since positions matter in these images.

    Shapes: float32 (batch, channels, side, side) -> (batch, width, side/2, side/2) at cut = 1
    -> (batch, 2 width, side/4, side/4) -> (batch, 4 width, side/8, side/8)
    -> (batch, 4 width, side/16, side/16) -> (batch, width * side² / 64) at head_cut = 5
    -> (batch, outputs). Parameters with the defaults: 61,409.

    Args:
        channels: channels of the images.
        outputs: width of the last layer.
        width: channels at the cut, a multiple of 4.
        side: side of the images in pixels, at least 16.
        dropout: probability before the output layer.
    """
    return nn.Sequential(
        OrderedDict[str, nn.Module](
            block1=_block(channels, width, norm=False),
            block2=_block(width, 2 * width),
            block3=_block(2 * width, 4 * width),
            block4=_block(4 * width, 4 * width),
            flat=nn.Flatten(),
            output=nn.Sequential(nn.Dropout(dropout), nn.Linear(4 * width * (side // 16) ** 2, outputs)),
        )
    )


def _block(inputs: int, outputs: int, *, norm: bool = True) -> nn.Sequential:
    """Build one convolution: (batch, inputs, h, w) -> (batch, outputs, h // 2, w // 2)."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1, bias=not norm),
        *([nn.GroupNorm(4, outputs)] if norm else []),
        nn.ReLU(),
        nn.MaxPool2d(2),
    )
