"""NumPy archives (.npz): named arrays with one entry per sample, as MedMNIST publishes them."""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from nightsplit.shared.config.run import DataSection
from nightsplit.shared.errors import DataError
from nightsplit.site_worker.config import SourceSection
from nightsplit.site_worker.data.pixels import LUMINANCE, Array, binarize, resize
from nightsplit.site_worker.data.rows import Reader, Rows, missing_name_error


def open_arrays(path: Path, source: SourceSection, data: DataSection, masks: str | None) -> Rows:
    """Open an archive; its rows have inputs float32 (n, 1, height, width).

    Images are (n, height, width), or (n, height, width, channels) with 1 channel, or 3 that are converted to
    luminance. uint8 is scaled to [0, 1], floating-point values are not changed. `label`, `patient` and the keys of
    `where` name arrays (n,) or (n, 1); `masks` names an array (n, height, width), in place of the label.

    Raises:
        DataError: 401 missing or unreadable, 402 missing array, 403 pixels that are not finite,
            407 arrays that do not fit together.
    """
    names = [*([] if masks else [source.label]), *([source.patient] if source.patient else []), *source.where]
    images, *others = _load(path, [source.images, *names])
    for name, array in zip(names, others, strict=True):
        if array.shape not in ((len(images),), (len(images), 1)):
            sentence = f"{path}: {name!r} has shape {array.shape}, {source.images!r} has {len(images)} entries."
            raise DataError(407, sentence, f"{name!r} needs one value per image; export both from the same rows.")
    has_image_shape = images.ndim == 3 or (images.ndim == 4 and images.shape[3] in (1, 3))
    if not (has_image_shape and images.size and (images.dtype == np.uint8 or images.dtype.kind == "f")):
        remedy = "store images as uint8 or float32 of shape (n, height, width) or (n, height, width, 3)."
        raise DataError(407, f"{path}: {source.images!r} is {images.dtype} of shape {images.shape}.", remedy)
    infinite = np.flatnonzero(~np.isfinite(images).reshape(len(images), -1).all(axis=1))
    if len(infinite):
        sentence = f"{path}, row {infinite[0] + 1}: {source.images!r} has values that are not finite."
        raise DataError(403, sentence, "correct those images, or remove them from the archive.")

    def read(indices: Sequence[int]) -> torch.Tensor:
        return _to_inputs(images[np.asarray(indices, dtype=np.int64)], data.image_size)

    # `Rows` counts the cells of a column, and all other names may be missing.
    columns: dict[str, list[str]] = {"row": [str(row + 1) for row in range(len(images))]}
    for name, array in zip(names, others, strict=True):
        columns[name] = [str(value) for value in array.ravel().tolist()]
    rows = Rows(path, columns, source.label, source.patient, lambda row: f"{path}, row {row + 1}", read)
    return replace(rows, read_masks=_make_mask_reader(path, masks, images, source, data)) if masks else rows


def _make_mask_reader(path: Path, name: str, images: Array, source: SourceSection, data: DataSection) -> Reader:
    (masks,) = _load(path, [name])
    if masks.shape != images.shape[:3] or masks.dtype.kind not in "biuf":
        sentence = (
            f"{path}: {name!r} is {masks.dtype} of shape {masks.shape}, {source.images!r} has shape {images.shape}."
        )
        raise DataError(407, sentence, "store one mask of whole numbers per image, of the image's height and width.")
    return lambda indices: binarize(masks[np.asarray(indices, dtype=np.int64)], source.foreground, data.image_size)


def _load(path: Path, names: Sequence[str]) -> list[Array]:
    try:
        # An array of pickled objects could run code, and is refused.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            for name in names:
                if name not in archive.files:
                    raise missing_name_error(path, "array", name, archive.files)
            _check_memory(path, sum(archive.zip.getinfo(f"{name}.npy").file_size for name in names))
            return [np.atleast_1d(archive[name]) for name in names]
    except DataError:
        raise
    except Exception as error:  # zip, zlib and numpy have no common exception
        remedy = "save it again with numpy.savez, without objects."
        raise DataError(401, f"{path} is not a readable .npz archive ({error}).", remedy) from None


def _check_memory(path: Path, size: int) -> None:
    """Check that arrays of `size` bytes fit into this machine; an archive of a few bytes can contain any number."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if size > memory:
        sentence = f"{path} has arrays of {size / 2**30:.0f} GiB, this machine has {memory / 2**30:.0f} GiB of memory."
        raise DataError(401, sentence, "divide the archive, or check where it comes from.")


def _to_inputs(images: Array, size: int | None) -> torch.Tensor:
    values = torch.from_numpy(images).to(torch.float32)
    if images.dtype == np.uint8:
        values /= 255
    if values.ndim == 4:
        values = values @ torch.tensor(LUMINANCE) if values.shape[3] == 3 else values[..., 0]
    return resize(values.unsqueeze(1), size)
