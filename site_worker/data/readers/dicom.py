"""Folders of DICOM files: each image is a row, and the images of a series are in the order of the body.

An index lists files, or folders whose files share a label; without one the folders name the classes.
"""

from collections import defaultdict
from collections.abc import Collection, Sequence
from itertools import accumulate, groupby
from pathlib import Path

import numpy as np
import torch

from nightsplit.shared.config.run import DataSection
from nightsplit.shared.errors import DataError
from nightsplit.site_worker.config import SourceSection
from nightsplit.site_worker.data.listing import Listing, files_below, list_files
from nightsplit.site_worker.data.pixels import Window, levelled, percentile_window, resized, stacked, window_of
from nightsplit.site_worker.data.readers.dicom_file import Frame, is_dicom, read_frames, read_pixels
from nightsplit.site_worker.data.rows import Rows

Entry = tuple[int, Frame]
"""Number of a listed file or folder, and an image in it."""


def open_dicom(folder: Path, source: SourceSection, data: DataSection, classes: Collection[str]) -> Rows:
    """The images of a folder of DICOM files; inputs are float32 (n, 1, size, size) in [0, 1].

    Intensities are brought to [0, 1] by data.window, else by the file's own window, else by the 0.5th and 99.5th
    percentiles of the series. A patient is a hash of the patient's ID, unless data.patient says otherwise. Files are
    found at any depth; those without pixels (reports, plans) are passed over. Arguments are those of `list_files`.

    Raises:
        DataError: see `list_files`; 406 a file that cannot be read, 410 text is burned into an image,
            411 a compression that cannot be decoded here.
    """
    listing = list_files(folder, source, classes, is_dicom, "DICOM file")
    entries = [(i, frame) for i, file in enumerate(listing.files) for frame in _frames_of(listing, i, file)]
    if not entries:
        raise DataError(401, f"{folder} holds no image.", "check data.path in site.toml.")
    _refuse_burned_in([frame for _, frame in entries])
    series: defaultdict[str, list[Entry]] = defaultdict(list)
    for entry in entries:
        series[entry[1].series].append(entry)
    ordered = [entry for of in series.values() for entry in in_order(of)]
    frames = [frame for _, frame in ordered]
    starts = accumulate((len(of) for of in series.values()), initial=0)
    sequences = {name: range(start, start + len(of)) for start, (name, of) in zip(starts, series.items(), strict=False)}

    columns = {name: [cells[i] for i, _ in ordered] for name, cells in listing.columns.items()}
    columns["file"] = [str(frame.file.relative_to(listing.base)) for frame in frames]
    columns["PatientID"] = [frame.patient for frame in frames]
    window, size = window_of(data), data.image_size

    def read(chosen: Sequence[int]) -> torch.Tensor:
        images: list[torch.Tensor] = []
        for name, of in groupby(chosen, key=lambda row: frames[row].series):
            images += _read_series([frames[row] for row in sequences[name]], [frames[row] for row in of], window, size)
        return stacked(images, lambda at: frames[chosen[at]].file)

    def place(row: int) -> str:
        return f"{frames[row].file}, image {frames[row].number + 1}"

    patient = "PatientID" if source.patient is None else listing.patient
    return Rows(listing.source, columns, source.label, patient, place, read, sequences)


def _frames_of(listing: Listing, i: int, file: str) -> list[Frame]:
    """The images of a listed file, or of all files in a listed folder."""
    path = listing.base / file
    paths = [path / below for below in files_below(path, is_dicom)] if path.is_dir() else [path]
    return [frame for path in paths for frame in read_frames(path, listing.listed(i))]


def _refuse_burned_in(frames: Sequence[Frame]) -> None:
    files = sorted({frame.file for frame in frames if frame.burned_in})
    if files:
        what = f"{files[0]} says that text is burned into its image ({len(files)} such files in all)."
        remedy = "take such files out of the folder or the index; a name in the pixels cannot be hidden."
        raise DataError(410, what, remedy)


def in_order(entries: Sequence[Entry]) -> list[Entry]:
    """A series sorted along the normal of its images, or by instance number where positions do not tell."""
    first = entries[0][1].orientation
    parallel = first is not None and all(
        frame.position is not None and frame.orientation is not None
        and np.allclose(frame.orientation, first, atol=1e-3)
        for _, frame in entries
    )  # fmt: skip

    def key(entry: Entry) -> tuple[float, int, int, Path]:
        frame, depth = entry[1], 0.0
        if parallel and first is not None and frame.position is not None:
            depth = round(float(np.cross(first[:3], first[3:]) @ np.array(frame.position)), 3)
        return depth, frame.instance, frame.number, frame.file

    return sorted(entries, key=key)


def _read_series(
    series: Sequence[Frame], wanted: Sequence[Frame], window: Window | None, size: int | None
) -> list[torch.Tensor]:
    """The wanted images of a series, each float32 (1, size, size) in [0, 1]."""
    values = {frame: read_pixels(frame) for frame in wanted}
    if window is None and not all(frame.window for frame in series):
        # One scale for the series, and the same whichever of its images are wanted.
        every = [values[frame] if frame in values else read_pixels(frame) for frame in series]
        window = percentile_window(np.concatenate([image.ravel() for image in every]))
    images = []
    for frame in wanted:  # one may be wanted twice
        shown = window or frame.window
        assert shown is not None
        image = levelled(values[frame], shown)
        images.append(resized(torch.from_numpy(1 - image if frame.inverted else image)[None, None], size)[0])
    return images
