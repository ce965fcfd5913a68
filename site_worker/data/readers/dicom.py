"""Folders of DICOM files: each image is a row, and the images of a series are in anatomical order.

An index lists files, or folders whose files share a label; without one the folders name the classes.
"""

from collections import defaultdict
from collections.abc import Collection, Sequence
from itertools import accumulate, groupby, pairwise
from pathlib import Path

import numpy as np
import torch

from nightsplit.shared.config.run import DataSection
from nightsplit.shared.errors import DataError
from nightsplit.site_worker.config import SourceSection
from nightsplit.site_worker.data.listing import Listing, files_below, list_files
from nightsplit.site_worker.data.pixels import Window, apply_window, fit_window, resize, stack, window_of
from nightsplit.site_worker.data.readers.dicom_file import Frame, is_dicom, read_frames, read_pixels
from nightsplit.site_worker.data.rows import Rows

Entry = tuple[int, Frame]
"""Index of a file or folder in the listing, and an image in it."""


def open_dicom(folder: Path, source: SourceSection, data: DataSection, classes: Collection[str]) -> Rows:
    """Open a folder of DICOM files; its rows have inputs float32 (n, 1, size, size) in [0, 1].

    Intensities are mapped to [0, 1] by data.window, else by the file's own window, else by the 0.5th and 99.5th
    percentiles of the series. A patient is a hash of the patient's ID, unless data.patient is set. Files are found at
    any depth; those without pixels (reports, plans) are skipped. Arguments are those of `list_files`.

    Raises:
        DataError: see `list_files`; 406 a file that cannot be read, 410 text is burned into an image,
            411 a compression that cannot be decoded here.
    """
    listing = list_files(folder, source, classes, is_dicom, "DICOM file")
    entries = [(i, frame) for i, file in enumerate(listing.files) for frame in _read_entry(listing, i, file)]
    if not entries:
        raise DataError(401, f"{folder} contains no image.", "check data.path in site.toml.")
    _refuse_burned_in([frame for _, frame in entries])
    series: defaultdict[str, list[Entry]] = defaultdict(list)
    for entry in entries:
        series[entry[1].series].append(entry)
    entries = [entry for members in series.values() for entry in sort_series(members)]
    frames = [frame for _, frame in entries]
    bounds = pairwise(accumulate(map(len, series.values()), initial=0))
    sequences = {name: range(first, end) for name, (first, end) in zip(series, bounds, strict=True)}

    columns = {name: [cells[i] for i, _ in entries] for name, cells in listing.columns.items()}
    columns["file"] = [str(frame.file.relative_to(listing.base)) for frame in frames]
    columns["PatientID"] = [frame.patient for frame in frames]
    window, size = window_of(data), data.image_size

    def read(indices: Sequence[int]) -> torch.Tensor:
        images: list[torch.Tensor] = []
        for name, rows in groupby(indices, key=lambda row: frames[row].series):
            selected = [frames[row] for row in rows]
            images += _read_series([frames[row] for row in sequences[name]], selected, window, size)
        return stack(images, lambda i: frames[indices[i]].file)

    def location(row: int) -> str:
        return f"{frames[row].file}, image {frames[row].number + 1}"

    patient = "PatientID" if source.patient is None else listing.patient
    return Rows(listing.source, columns, source.label, patient, location, read, sequences)


def _read_entry(listing: Listing, i: int, file: str) -> list[Frame]:
    """Read the images of a file in the listing, or of all files in a folder in the listing."""
    path = listing.base / file
    paths = [path / name for name in files_below(path, is_dicom)] if path.is_dir() else [path]
    return [frame for path in paths for frame in read_frames(path, listing.reference(i))]


def _refuse_burned_in(frames: Sequence[Frame]) -> None:
    files = sorted({frame.file for frame in frames if frame.burned_in})
    if files:
        sentence = f"{files[0]} says that text is burned into its image ({len(files)} such files in all)."
        remedy = "remove such files from the folder or the index; a name in the pixels cannot be hidden."
        raise DataError(410, sentence, remedy)


def sort_series(entries: Sequence[Entry]) -> list[Entry]:
    """Sort a series along the common normal of its images; by instance number without one, or without positions."""
    first = entries[0][1].orientation
    parallel = first is not None and all(
        frame.position is not None and frame.orientation is not None
        and np.allclose(frame.orientation, first, atol=1e-3)
        for _, frame in entries
    )  # fmt: skip

    def key(entry: Entry) -> tuple[float, int, int, Path]:
        frame, depth = entry[1], 0.0
        if parallel and first is not None and frame.position is not None:
            normal = np.cross(first[:3], first[3:])  # of the directions of rows and columns
            depth = round(float(normal @ np.array(frame.position)), 3)
        return depth, frame.instance, frame.number, frame.file

    return sorted(entries, key=key)


def _read_series(
    series: Sequence[Frame], selected: Sequence[Frame], window: Window | None, size: int | None
) -> list[torch.Tensor]:
    """Read the selected images of a series, each float32 (1, size, size) in [0, 1]."""
    values = {frame: read_pixels(frame) for frame in selected}
    if window is None and not all(frame.window for frame in series):
        # The window is that of the whole series, so that it does not depend on the selection.
        images = [values[frame] if frame in values else read_pixels(frame) for frame in series]
        window = fit_window(np.concatenate([image.ravel() for image in images]))
    tensors = []
    for frame in selected:  # may contain a frame twice
        frame_window = window or frame.window
        assert frame_window is not None
        image = apply_window(values[frame], frame_window)
        tensors.append(resize(torch.from_numpy(1 - image if frame.inverted else image)[None, None], size)[0])
    return tensors
