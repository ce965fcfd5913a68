"""NumPy archives (.npz): named arrays with one entry per sample, as MedMNIST publishes them."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from nightsplit.shared.config.run import DataSection
from nightsplit.shared.errors import DataError
from nightsplit.site_worker.config import SourceSection
from nightsplit.site_worker.data.pixels import LUMINANCE, Array, masked, resized
from nightsplit.site_worker.data.rows import Read, Rows, absent


def open_arrays(path: Path, source: SourceSection, data: DataSection, masks: str | None) -> Rows:
    """The rows of an archive; inputs are float32.

    Images are (n, height, width), or (n, height, width, channels) with 1 or 3 channels, of which the
    luminance is taken: the model sees float32 (n, 1, height, width). uint8 is brought to [0, 1],
    floating-point values stay. `label`, `patient` and the keys of `where` name arrays (n,) or (n, 1);
    `masks` names an array (n, height, width), which takes the place of the label.

    Raises:
        DataError: 401 missing or unreadable, 402 absent array, 403 pixels that are not finite,
            407 arrays that do not fit together.
    """
    names = [*([] if masks else [source.label]), *([source.patient] if source.patient else []), *source.where]
    images, *others = _load(path, [source.images, *names])
    for name, array in zip(names, others, strict=True):
        if array.shape not in ((len(images),), (len(images), 1)):
            what = f"{path}: {name!r} has shape {array.shape}, {source.images!r} has {len(images)} entries."
            raise DataError(407, what, f"{name!r} needs one value per image; export both from the same rows.")
    grey = images.ndim == 3 or (images.ndim == 4 and images.shape[3] in (1, 3))
    if not (grey and images.size and (images.dtype == np.uint8 or images.dtype.kind == "f")):
        remedy = "store images as uint8 or float32 of shape (n, height, width) or (n, height, width, 3)."
        raise DataError(407, f"{path}: {source.images!r} is {images.dtype} of shape {images.shape}.", remedy)
    broken = np.flatnonzero(~np.isfinite(images).reshape(len(images), -1).all(axis=1))
    if len(broken):
        what = f"{path}, row {broken[0] + 1}: {source.images!r} holds values that are no finite numbers."
        raise DataError(403, what, "correct those images, or leave them out of the archive.")

    def read(chosen: Sequence[int]) -> torch.Tensor:
        return _inputs(images[np.asarray(chosen, dtype=np.int64)], data.image_size)

    # There is always a column, whatever the names are, so that rows can be counted and chosen.
    columns: dict[str, list[str]] = {"row": [str(row + 1) for row in range(len(images))]}
    for name, array in zip(names, others, strict=True):
        columns[name] = [str(value) for value in array.ravel().tolist()]
    rows = Rows(path, columns, source.label, source.patient, lambda row: f"{path}, row {row + 1}", read)
    return replace(rows, read_masks=_mask_reader(path, masks, images, source, data)) if masks else rows


def _mask_reader(path: Path, name: str, images: Array, source: SourceSection, data: DataSection) -> Read:
    (masks,) = _load(path, [name])
    if masks.shape != images.shape[:3] or masks.dtype.kind not in "biuf":
        what = f"{path}: {name!r} is {masks.dtype} of shape {masks.shape}, {source.images!r} has shape {images.shape}."
        raise DataError(407, what, "store one mask of whole numbers per image, of the image's height and width.")
    return lambda chosen: masked(masks[np.asarray(chosen, dtype=np.int64)], source.foreground, data.image_size)


def _load(path: Path, names: Sequence[str]) -> list[Array]:
    try:
        # Pickled objects could run code: such an array is refused.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            for name in names:
                if name not in archive.files:
                    raise absent(path, "array", name, archive.files)
            return [np.atleast_1d(archive[name]) for name in names]
    except DataError:
        raise
    except Exception as error:  # zip, zlib and numpy each have their own
        remedy = "save it again with numpy.savez, without objects."
        raise DataError(401, f"{path} is no readable .npz archive ({error}).", remedy) from None


def _inputs(images: Array, size: int | None) -> torch.Tensor:
    values = torch.from_numpy(images).to(torch.float32)
    if images.dtype == np.uint8:
        values /= 255
    if values.ndim == 4:
        values = values @ torch.tensor(LUMINANCE) if values.shape[3] == 3 else values[..., 0]
    return resized(values.unsqueeze(1), size)
