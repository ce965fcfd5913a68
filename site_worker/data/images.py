"""Folders of images, grey, with the labels in an index file or in the folders' names.

With an index (a CSV with a `file` column) label and patient are columns of it. Without one:

    covid/scan7.png                                   label: a folder named after a class
    patient00005/study1_positive/image1.png           label: a folder that ends in _<class> (MURA)

and the patient is the nearest folder named patient*, else every file is a patient.

A folder that bears a class's name counts before a folder that merely ends in it.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from shared.config import DataSection, SourceSection
from shared.errors import DataError
from site_worker.data.rows import Rows, absent, plain
from site_worker.data.table import read_cells

Image2D = np.ndarray[tuple[int, int], np.dtype[np.float32]]
SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".pgm", ".webp"})


def open_images(folder: Path, source: SourceSection, data: DataSection, classes: Collection[str]) -> Rows:
    """The rows of a folder of images; inputs are float32 (n, 1, size, size) in [0, 1].

    Without data.image_size the images keep their size, which must then be the same for all.

    Args:
        folder: where the images are.
        source: `index`, `label` and `patient` (without an index: pattern of the patient's folder name).
        data: `image_size`.
        classes: labels that a folder may be named after.

    Raises:
        DataError: 401 no such folder or no image in it, 402 absent column, 403 a folder without a class,
            406 an image that cannot be read (when reading).
    """
    if not folder.is_dir():
        raise DataError(401, f"{folder} is no folder.", "set data.path in site.toml to the folder with the images.")
    if source.index is not None:
        index = folder / source.index
        columns, place = read_cells(index)
        if "file" not in columns:
            raise absent(index, "column", "file", columns)
        files, patient = columns["file"], source.patient
        base = index.parent
    else:
        index = base = folder
        files = _image_files(folder)
        patients = [_patient(folder, file, source.patient) for file in files]
        columns = {source.label: [_label(folder, file, classes) for file in files], "patient": patients}
        patient = "patient"

        def place(row: int) -> str:
            return str(folder / files[row])

    def read(chosen: Sequence[int]) -> torch.Tensor:
        arrays = [_read_image(base / files[i], data.image_size, place(i)) for i in chosen]
        for i, array in zip(chosen, arrays, strict=True):
            if array.shape != arrays[0].shape:
                raise DataError(
                    406,
                    f"{base / files[i]} is {_size(array)}, {base / files[chosen[0]]} is {_size(arrays[0])}.",
                    "set data.image_size in run.toml, to bring all images to one size.",
                )
        return torch.from_numpy(np.stack(arrays)).unsqueeze(1)

    return Rows(index, columns, source.label, patient, place, read)


def _image_files(folder: Path) -> list[str]:
    """Images below the folder, relative to it, in a fixed order; hidden files (macOS "._x.png") are none."""
    relative = (path.relative_to(folder) for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    found = sorted(p.as_posix() for p in relative if not any(part.startswith(".") for part in p.parts))
    if not found:
        raise DataError(
            401, f"{folder} holds no image.", f"check data.path; images end in {', '.join(sorted(SUFFIXES))}."
        )
    return found


def _label(folder: Path, file: str, classes: Collection[str]) -> str:
    """The class that the folders above a file name."""
    above = Path(file).parts[:-1]
    named = {plain(part) for part in above} & set(classes)
    named = named or {label for label in classes for part in above if part.endswith(f"_{label}")}
    if len(named) == 1:
        return named.pop()
    what = f"is in folders of {', '.join(sorted(named))}" if named else "is in no folder of a class"
    raise DataError(
        403,
        f"{folder / file} {what}; data.classes names {', '.join(classes) or 'none'}.",
        "name a folder above it <class> or <anything>_<class>, or list the labels in an index (data.index).",
    )


def _patient(folder: Path, file: str, pattern: str | None) -> str:
    """The nearest folder above a file that looks like a patient; else, without a pattern, the file.

    The folder's name alone is the patient: MURA shows a patient's elbow and wrist in different branches.
    """
    for part in reversed(Path(file).parts[:-1]):
        if fnmatch(part.lower(), (pattern or "patient*").lower()):
            return part
    if pattern is None:
        return file
    raise DataError(
        403,
        f"{folder / file} is in no folder named {pattern!r}, which data.patient says is the patient.",
        "correct data.patient in site.toml, or leave it out.",
    )


def _read_image(path: Path, size: int | None, place: str) -> Image2D:
    """One image, float32 (height, width) in [0, 1]."""
    try:
        with Image.open(path) as image:
            # convert("L") would clip 16-bit radiographs to white.
            deep = image.mode.startswith("I")
            grey = image.convert("I" if deep else "L").convert("F")
        if size is not None and grey.size != (size, size):
            grey = grey.resize((size, size), Image.Resampling.BILINEAR)
    except Exception as error:  # decoders raise whatever they like, SyntaxError included
        reason = "is not there" if isinstance(error, FileNotFoundError) else f"cannot be read ({error})"
        raise DataError(
            406,
            f"{path} {reason}{f', listed in {place}' if place != str(path) else ''}.",
            "replace the file by an intact copy, or take it out of the data.",
        ) from None
    return np.asarray(grey, dtype=np.float32) / np.float32(65535 if deep else 255)


def _size(array: Image2D) -> str:
    return f"{array.shape[1]}x{array.shape[0]}"
