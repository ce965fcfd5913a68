"""Grey images of one size and one scale: what volumes, DICOM, arrays and images have in common."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch.nn.functional import interpolate

from nightsplit.shared.config.run import DataSection
from nightsplit.shared.errors import DataError

Array = np.ndarray[Any, np.dtype[Any]]
Window = tuple[float, float]
"""Centre and width, in the units of the file (CT: Hounsfield units)."""

WINDOWS: dict[str, Window] = {
    "lung": (-600, 1500), "mediastinum": (50, 350), "abdomen": (50, 400),
    "liver": (30, 150), "bone": (400, 1800), "brain": (40, 80),
}  # fmt: skip
"""Usual windows of CT; for other modalities they mean nothing."""

LUMINANCE = (0.299, 0.587, 0.114)  # of red, green, blue (ITU-R BT.601, as Pillow's "L")
PERCENTILES = (0.5, 99.5)  # a few bright voxels (metal, vessels) would otherwise leave the rest in the dark


def window_of(data: DataSection) -> Window | None:
    """The window that the run asks for."""
    return WINDOWS[data.window] if isinstance(data.window, str) else data.window


def percentile_window(values: Array) -> Window:
    """The window from the 0.5th to the 99.5th percentile; width 0 of a constant image."""
    low, high = np.percentile(values, PERCENTILES)
    return float(low + high) / 2, float(high - low)


def levelled(values: Array, window: Window) -> Array:
    """Values of any shape as float32 in [0, 1] (DICOM PS3.3 C.11.2.1.3.2, LINEAR_EXACT); 0 where width is 0."""
    centre, width = window
    if width <= 0:
        return np.zeros(values.shape, dtype=np.float32)
    levels: Array = np.clip((values - np.float32(centre)) / np.float32(width) + np.float32(0.5), 0, 1, dtype=np.float32)
    return levels


def resized(images: torch.Tensor, size: int | None) -> torch.Tensor:
    """float32 (n, channels, height, width) brought to (n, channels, size, size); None leaves the size."""
    if size is None or images.shape[-2:] == (size, size):
        return images
    return interpolate(images, size=(size, size), mode="bilinear", antialias=True)


def masked(values: Array, foreground: Sequence[int], size: int | None) -> torch.Tensor:
    """Masks (n, height, width) as float32 of 0 and 1, (n, size, size), by nearest neighbour; None leaves the size.

    The labels of `foreground` count as 1; where there are none, all above 0.
    """
    chosen = np.isin(values, foreground) if foreground else values > 0
    masks = torch.from_numpy(np.ascontiguousarray(chosen, dtype=np.float32)).unsqueeze(1)
    if size is not None and masks.shape[-2:] != (size, size):
        masks = interpolate(masks, size=(size, size), mode="nearest-exact")
    return masks.squeeze(1)


def stacked(images: Sequence[torch.Tensor], name: Callable[[int], object]) -> torch.Tensor:
    """Equally large tensors as one; `name(i)` is the file of the i-th. DataError 406 where there are two sizes."""
    for i, image in enumerate(images):
        if image.shape != images[0].shape:
            remedy = "set data.image_size in run.toml, to bring all images to one size."
            raise DataError(406, f"{name(i)} is {_size(image)}, {name(0)} is {_size(images[0])}.", remedy)
    return torch.stack(list(images))


def _size(image: torch.Tensor) -> str:
    return f"{image.shape[-1]}x{image.shape[-2]}"
