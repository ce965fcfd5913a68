"""Folders of images, grey; labels and patients as `listing` finds them."""

from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from nightsplit.shared.config.run import DataSection
from nightsplit.site_worker.config import SourceSection
from nightsplit.site_worker.data.listing import list_files, reading
from nightsplit.site_worker.data.pixels import stacked
from nightsplit.site_worker.data.rows import Rows
from nightsplit.site_worker.data.sequences import indexed

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".pgm", ".webp"})


def open_images(folder: Path, source: SourceSection, data: DataSection, classes: Collection[str]) -> Rows:
    """The rows of a folder of images; inputs are float32 (n, 1, size, size) in [0, 1].

    Without data.image_size the images keep their size, which must then be the same for all. With
    data.frames the index's columns `sequence` and `frame` say which images belong together, and their order.
    Arguments are those of `list_files`.

    Raises:
        DataError: see `list_files` and `indexed`; 406 an image that cannot be read (when reading).
    """
    listing = list_files(folder, source, classes, lambda path: path.suffix.lower() in SUFFIXES, "image")

    def read(chosen: Sequence[int]) -> torch.Tensor:
        images = [_read_image(listing.base / listing.files[i], data.image_size, listing.listed(i)) for i in chosen]
        return stacked(images, lambda i: listing.base / listing.files[chosen[i]])

    rows = Rows(listing.source, listing.columns, source.label, listing.patient, listing.place, read)
    return replace(rows, sequences=indexed(rows)) if data.frames and source.index else rows


def _read_image(path: Path, size: int | None, listed: str) -> torch.Tensor:
    """One image, float32 (1, height, width) in [0, 1]."""
    with reading(path, listed):
        with Image.open(path) as image:
            # convert("L") would clip 16-bit radiographs to white.
            deep = image.mode.startswith("I")
            grey = image.convert("I" if deep else "L").convert("F")
        if size is not None and grey.size != (size, size):
            grey = grey.resize((size, size), Image.Resampling.BILINEAR)
    array = np.asarray(grey, dtype=np.float32) / np.float32(65535 if deep else 255)
    return torch.from_numpy(array).unsqueeze(0)
