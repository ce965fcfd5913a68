"""Folders of images, converted to grey; labels and patients come from `listing`."""

from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from nightsplit.shared.config.run import DataSection
from nightsplit.site_worker.config import SourceSection
from nightsplit.site_worker.data.listing import list_files, reading
from nightsplit.site_worker.data.pixels import stack
from nightsplit.site_worker.data.rows import Rows
from nightsplit.site_worker.data.sequences import group_sequences

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".pgm", ".webp"})


def open_images(folder: Path, source: SourceSection, data: DataSection, classes: Collection[str]) -> Rows:
    """Open a folder of images; its rows have inputs float32 (n, 1, size, size) in [0, 1].

    Without data.image_size all images must have one size. With data.frames the index has the columns `sequence`
    and `frame`. Arguments are those of `list_files`.

    Raises:
        DataError: see `list_files` and `group_sequences`; 406 an image that cannot be read (when reading).
    """
    listing = list_files(folder, source, classes, lambda path: path.suffix.lower() in SUFFIXES, "image")

    def read(indices: Sequence[int]) -> torch.Tensor:
        images = [_read_image(listing.base / listing.files[i], data.image_size, listing.reference(i)) for i in indices]
        return stack(images, lambda i: listing.base / listing.files[indices[i]])

    rows = Rows(listing.source, listing.columns, source.label, listing.patient, listing.location, read)
    return replace(rows, sequences=group_sequences(rows)) if data.frames and source.index else rows


def _read_image(path: Path, size: int | None, reference: str) -> torch.Tensor:
    """Read an image, float32 (1, height, width) in [0, 1]."""
    with reading(path, reference):
        with Image.open(path) as image:
            # convert("L") would clip 16-bit radiographs to white.
            is_16_bit = image.mode.startswith("I")
            grey = image.convert("I" if is_16_bit else "L").convert("F")
        if size is not None and grey.size != (size, size):
            grey = grey.resize((size, size), Image.Resampling.BILINEAR)
    array = np.asarray(grey, dtype=np.float32) / np.float32(65535 if is_16_bit else 255)
    return torch.from_numpy(array).unsqueeze(0)
