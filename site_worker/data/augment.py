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

    flip: left and right, with probability 0.5. shift: up to 10 % of each side. rotate: up to 10 degrees.
    zoom: 0.9 to 1.1. contrast: gain 0.8 to 1.2 about the image's mean, and an offset of up to 0.2 of its
    standard deviation. Points outside the image repeat its border. The geometric transforms are composed in the order
    of `names` and interpolated once, so the image is blurred once.

    Args:
        batch: float32 (n, channels, height, width), scaled or not; not changed in place.
        names: entries of `data.augment`.
        generator: a generator on the CPU; the result is a function of its state.

    Raises:
        ValueError: an unknown name.
    """
    count, _, height, width = batch.shape
    start = transform = torch.eye(3).repeat(count, 1, 1)  # from points of the result to points of the batch
    for name in names:
        if name == "flip":
            flipped = torch.rand(count, generator=generator) < 0.5
            # Exact, not interpolated; its order among the transforms does not change the distribution.
            batch = torch.where(flipped.to(batch.device).view(-1, 1, 1, 1), batch.flip(-1), batch)
        elif name == "contrast":
            batch = _change_contrast(batch, generator)
        else:
            transform = transform @ _draw_transform(name, count, height / width, generator)
    if transform is start:
        return batch
    grid = affine_grid(transform[:, :2].to(batch.device), list(batch.shape), align_corners=False)
    return grid_sample(batch, grid, mode="bilinear", padding_mode="border", align_corners=False)


def _draw_transform(name: str, count: int, aspect: float, generator: torch.Generator) -> Tensor:
    """Draw a geometric transform as matrices (count, 3, 3) in coordinates from -1 to 1."""

    def draw(limit: float) -> Tensor:
        return (torch.rand(count, generator=generator) * 2 - 1) * limit

    matrix = torch.eye(3).repeat(count, 1, 1)
    if name == "shift":
        matrix[:, 0, 2], matrix[:, 1, 2] = draw(2 * SHIFT), draw(2 * SHIFT)  # a side has length 2
    elif name == "zoom":
        matrix[:, 0, 0] = matrix[:, 1, 1] = 1 / (1 + draw(ZOOM))
    elif name == "rotate":
        angle = draw(ROTATE)
        matrix[:, 0, 0] = matrix[:, 1, 1] = angle.cos()
        matrix[:, 0, 1], matrix[:, 1, 0] = -angle.sin() * aspect, angle.sin() / aspect
    else:
        raise ValueError(f"unknown augmentation {name!r}")
    return matrix


def _change_contrast(batch: Tensor, generator: torch.Generator) -> Tensor:
    """Draw gain and offset relative to each image's own mean and deviation, so that inputs may be scaled."""
    gain, offset = (torch.rand(2, len(batch), generator=generator) * 2 - 1).to(batch.device).view(2, -1, 1, 1, 1)
    deviation, mean = torch.std_mean(batch, dim=(1, 2, 3), keepdim=True, correction=0)
    changed: Tensor = (batch - mean) * (1 + gain * GAIN) + mean + offset * OFFSET * deviation
    return changed
