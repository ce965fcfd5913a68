"""Functions for grey images of one size and one scale, for the readers of volumes, DICOM, arrays and images."""

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
"""Usual windows of CT; they do not apply to other modalities."""

LUMINANCE = (0.299, 0.587, 0.114)  # weights of red, green, blue (ITU-R BT.601, as Pillow's "L")
PERCENTILES = (0.5, 99.5)  # with 0 and 100, a few bright voxels (metal, vessels) would make the rest dark


def window_of(data: DataSection) -> Window | None:
    """Return the window of run.toml."""
    return WINDOWS[data.window] if isinstance(data.window, str) else data.window


def fit_window(values: Array) -> Window:
    """Return the window from the 0.5th to the 99.5th percentile; its width is 0 for a constant image."""
    low, high = np.percentile(values, PERCENTILES)
    return float(low + high) / 2, float(high - low)


def apply_window(values: Array, window: Window) -> Array:
    """Map values of any shape to float32 in [0, 1] (DICOM PS3.3 C.11.2.1.3.2, LINEAR_EXACT); to 0 if the width is 0."""
    centre, width = window
    if width <= 0:
        return np.zeros(values.shape, dtype=np.float32)
    levels: Array = np.clip((values - np.float32(centre)) / np.float32(width) + np.float32(0.5), 0, 1, dtype=np.float32)
    return levels


def resize(images: torch.Tensor, size: int | None) -> torch.Tensor:
    """Resize float32 (n, channels, height, width) to (n, channels, size, size); None keeps the size."""
    if size is None or images.shape[-2:] == (size, size):
        return images
    return interpolate(images, size=(size, size), mode="bilinear", antialias=True)


def binarize(values: Array, foreground: Sequence[int], size: int | None) -> torch.Tensor:
    """Convert masks (n, height, width) to float32 of 0 and 1, (n, size, size), by nearest neighbour.

    The values in `foreground` become 1, or all above 0 if it is empty. None keeps the size.
    """
    is_foreground = np.isin(values, foreground) if foreground else values > 0
    masks = torch.from_numpy(np.ascontiguousarray(is_foreground, dtype=np.float32)).unsqueeze(1)
    if size is not None and masks.shape[-2:] != (size, size):
        masks = interpolate(masks, size=(size, size), mode="nearest-exact")
    return masks.squeeze(1)


def stack(images: Sequence[torch.Tensor], name: Callable[[int], object]) -> torch.Tensor:
    """Stack tensors of one size; DataError 406 if sizes differ, with `name(i)`, the file of the i-th."""
    for i, image in enumerate(images):
        if image.shape != images[0].shape:
            remedy = "set data.image_size in run.toml to resize all images."
            raise DataError(406, f"{name(i)} is {_size(image)}, {name(0)} is {_size(images[0])}.", remedy)
    return torch.stack(list(images))


def _size(image: torch.Tensor) -> str:
    return f"{image.shape[-1]}x{image.shape[-2]}"
