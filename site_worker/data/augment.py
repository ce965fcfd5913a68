"""Random variants of a batch of training images, in torch alone and reproducible from a generator."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample

SHIFT = 0.1  # of height and width, to either side
ROTATE = math.radians(10)
ZOOM = 0.1
GAIN = 0.2
OFFSET = 0.2  # in standard deviations of the image


def augment(batch: Tensor, names: Sequence[str], generator: torch.Generator) -> Tensor:
    """Change each image of a batch at random.

    flip: left and right, every second time. shift: up to 10 % of each side. rotate: up to 10 degrees.
    zoom: 0.9 to 1.1. contrast: gain 0.8 to 1.2 about the image's mean, and an offset of up to 0.2 of its
    standard deviation. What comes in at the border repeats the border. The changes of place are
    composed in the order of `names` and interpolated once, so the image is blurred once.

    Args:
        batch: float32 (n, channels, height, width), scaled or not; left as it is.
        names: entries of `data.augment`.
        generator: a generator on the CPU, the only source of chance: equal state, equal result.

    Raises:
        ValueError: an unknown name.
    """
    count, _, height, width = batch.shape
    start = place = torch.eye(3).repeat(count, 1, 1)  # from points of the result to points of the batch
    for name in names:
        if name == "flip":
            flipped = torch.rand(count, generator=generator) < 0.5
            # Exact, not interpolated; its place among the others matters to no distribution.
            batch = torch.where(flipped.to(batch.device).view(-1, 1, 1, 1), batch.flip(-1), batch)
        elif name == "contrast":
            batch = _contrast(batch, generator)
        else:
            place = place @ _step(name, count, height / width, generator)
    if place is start:
        return batch
    grid = affine_grid(place[:, :2].to(batch.device), list(batch.shape), align_corners=False)
    return grid_sample(batch, grid, mode="bilinear", padding_mode="border", align_corners=False)


def _step(name: str, count: int, aspect: float, generator: torch.Generator) -> Tensor:
    """One change of place as matrices (count, 3, 3) in coordinates from -1 to 1."""

    def symmetric(limit: float) -> Tensor:
        return (torch.rand(count, generator=generator) * 2 - 1) * limit

    step = torch.eye(3).repeat(count, 1, 1)
    if name == "shift":
        step[:, 0, 2], step[:, 1, 2] = symmetric(2 * SHIFT), symmetric(2 * SHIFT)  # a side is 2 long
    elif name == "zoom":
        step[:, 0, 0] = step[:, 1, 1] = 1 / (1 + symmetric(ZOOM))
    elif name == "rotate":
        angle = symmetric(ROTATE)
        step[:, 0, 0] = step[:, 1, 1] = angle.cos()
        step[:, 0, 1], step[:, 1, 0] = -angle.sin() * aspect, angle.sin() / aspect
    else:
        raise ValueError(f"unknown augmentation {name!r}")
    return step


def _contrast(batch: Tensor, generator: torch.Generator) -> Tensor:
    """Gain and offset relative to each image's own mean and deviation, so that scaled inputs do as well."""
    gain, offset = (torch.rand(2, len(batch), generator=generator) * 2 - 1).to(batch.device).view(2, -1, 1, 1, 1)
    deviation, mean = torch.std_mean(batch, dim=(1, 2, 3), keepdim=True, correction=0)
    changed: Tensor = (batch - mean) * (1 + gain * GAIN) + mean + offset * OFFSET * deviation
    return changed
