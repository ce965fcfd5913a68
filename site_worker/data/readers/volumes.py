"""Folders of NIfTI volumes (.nii, .nii.gz), cut into slices; each slice is a row, the volume is its patient.

Volumes are reoriented to the axes of DICOM (to the left, the back and the head), so that all files are cut the same
way, and an axial slice looks like the DICOM image.

    imagesTr/hippocampus_001.nii.gz     with path = ".../imagesTr" and masks = "../labelsTr"
    labelsTr/hippocampus_001.nii.gz     (the layout of the Medical Segmentation Decathlon)
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from itertools import accumulate, groupby, pairwise
from pathlib import Path

import nibabel
import numpy as np
import torch
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform
from nibabel.spatialimages import SpatialImage

from nightsplit.shared.config.run import DataSection
from nightsplit.shared.errors import DataError
from nightsplit.site_worker.config import SourceSection
from nightsplit.site_worker.data.listing import list_files, reading, unreadable_error
from nightsplit.site_worker.data.pixels import Array, apply_window, binarize, fit_window, resize, stack, window_of
from nightsplit.site_worker.data.rows import Reader, Rows

SUFFIXES = (".nii", ".nii.gz")
_DICOM_AXES = axcodes2ornt(("L", "P", "S"))

Slice = tuple[int, int]
"""Index of a volume, and of a slice in it."""


def open_volumes(
    folder: Path, source: SourceSection, data: DataSection, classes: Collection[str], masks: str | None
) -> Rows:
    """Open a folder of volumes; its rows, the slices, have inputs float32 (n, 1, size, size) in [0, 1].

    A volume's intensities are mapped to [0, 1] by data.window, else by its 0.5th and 99.5th percentiles.
    `masks` is the folder of the masks, relative to `folder`; a mask has the name of its volume, or its whole path
    if two volumes have the same name. Other arguments are those of `list_files`.

    Raises:
        DataError: see `list_files`; 406 a volume that cannot be read, 412 a mask that does not fit.
    """
    listing = list_files(folder, source, classes, lambda path: path.name.lower().endswith(SUFFIXES), "NIfTI volume")
    paths = [listing.base / file for file in listing.files]
    counts = [_count(path, source.axis, listing.reference(i)) for i, path in enumerate(paths)]
    slices = [(i, k) for i, count in enumerate(counts) for k in range(count)]
    bounds = pairwise(accumulate(counts, initial=0))
    columns = {name: [cells[i] for i, _ in slices] for name, cells in listing.columns.items()}
    columns |= {"volume": [listing.files[i] for i, _ in slices], "slice": [str(k) for _, k in slices]}
    window = window_of(data)

    def image(i: int, indices: Sequence[int]) -> torch.Tensor:
        values = _cut(paths[i], source.axis).astype(np.float32)
        if not np.isfinite(values).all():
            raise unreadable_error(paths[i], "has values that are not finite")
        levels = apply_window(values[indices], window or fit_window(values))
        return resize(torch.from_numpy(levels).unsqueeze(1), data.image_size)

    rows = Rows(
        listing.source, columns, source.label, listing.patient or "volume",
        location=lambda row: f"{paths[slices[row][0]]}, slice {slices[row][1]}",
        read=_make_reader(paths, slices, image),
        sequences={file: range(first, end) for file, (first, end) in zip(listing.files, bounds, strict=True)},
    )  # fmt: skip
    if masks is None:
        return rows
    has_unique_names = len({path.name for path in paths}) == len(paths)
    names = [path.name for path in paths] if has_unique_names else listing.files

    def mask(i: int, indices: Sequence[int]) -> torch.Tensor:
        labels = _cut_mask(folder / masks / names[i], paths[i], source.axis)
        return binarize(labels[indices], source.foreground, data.image_size)

    return replace(rows, read_masks=_make_reader(paths, slices, mask))


def _make_reader(
    paths: Sequence[Path], slices: Sequence[Slice], read: Callable[[int, list[int]], torch.Tensor]
) -> Reader:
    """Make a reader of rows that opens each file once and has one volume in memory."""

    def read_rows(indices: Sequence[int]) -> torch.Tensor:
        selected = [slices[row] for row in indices]
        parts = [read(i, [k for _, k in group]) for i, group in groupby(selected, key=lambda one: one[0])]
        return stack([image for part in parts for image in part], lambda n: paths[selected[n][0]])

    return read_rows


def _count(path: Path, axis: int, reference: str) -> int:
    """Return the number of slices across an axis; reads only the header."""
    with reading(path, reference):
        image = _load(path)
        stored_axis = np.flatnonzero(_reorientation(image)[:, 0] == axis)[0]
        return int(image.shape[int(stored_axis)])


def _cut(path: Path, axis: int) -> Array:
    """Read the slices (n, height, width) across an axis."""
    with reading(path):
        image = _load(path)
        values = np.asarray(image.as_reoriented(_reorientation(image)).dataobj)
        return np.moveaxis(values.reshape(values.shape[:3]), axis, 0).swapaxes(1, 2)


def _cut_mask(path: Path, image: Path, axis: int) -> Array:
    """Read the slices of a mask, which must have the shape and axes of the image."""
    if not path.is_file():
        raise _mask_error(path, "does not exist", f"add the mask of {image.name}, with the name of the volume")
    with reading(path):
        mask = _load(path)
    volume = _load(image)
    if mask.shape[:3] != volume.shape[:3]:
        raise _mask_error(path, f"is {mask.shape}, {image} is {volume.shape}", "export both from one volume")
    if not np.array_equal(_reorientation(mask), _reorientation(volume)):
        reason = f"stores its axes in other directions than {image}"
        raise _mask_error(path, reason, "export it with the volume's affine")
    return _cut(path, axis)


def _load(path: Path) -> SpatialImage:
    """Open a volume (x, y, z) or (x, y, z, 1), without reading its voxels."""
    image = nibabel.load(path)
    if not isinstance(image, SpatialImage):
        raise unreadable_error(path, "is not a volume")
    if len(image.shape) < 3 or any(extent > 1 for extent in image.shape[3:]):
        raise unreadable_error(path, f"has the shape {image.shape}, a volume has three dimensions")
    return image


def _reorientation(image: SpatialImage) -> Array:
    orientation: Array = ornt_transform(io_orientation(image.affine), _DICOM_AXES)
    return orientation


def _mask_error(mask: Path, reason: str, remedy: str) -> DataError:
    return DataError(412, f"{mask} {reason}.", f"{remedy}.")
