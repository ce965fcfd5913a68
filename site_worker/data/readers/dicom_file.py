"""One DICOM file: the few facts of its header that its pixels need, and the pixels.

No other text of a header is read, let alone kept. The patient's ID and the series' UID leave this file as
hashes. What pydicom says of a file, in warnings and errors, may quote its header, so it is never shown.
"""

import hashlib
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydicom import Dataset, dcmread
from pydicom.errors import InvalidDicomError
from pydicom.pixels.decoders.base import get_decoder
from pydicom.pixels.utils import pixel_array
from pydicom.uid import UID

from nightsplit.shared.errors import DataError
from nightsplit.site_worker.data.listing import reading, unreadable
from nightsplit.site_worker.data.pixels import LUMINANCE, Array, Window

_LOG = logging.getLogger("pydicom")
_LOG.disabled = True  # what it says itself
_LOG.propagate = False  # what the loggers below it say

_TAGS = [
    "SeriesInstanceUID", "PatientID", "InstanceNumber", "NumberOfFrames", "Rows", "PhotometricInterpretation",
    "BurnedInAnnotation", "ImageOrientationPatient", "ImagePositionPatient", "RescaleSlope", "RescaleIntercept",
    "WindowCenter", "WindowWidth", "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence",
]  # fmt: skip
_SUFFIXES = (".dcm", ".dicom", ".ima", "")


@dataclass(frozen=True)
class Frame:
    """One image of a DICOM file.

    Attributes:
        number: which image of the file, from 0.
        patient: hash of the patient's ID; "" without one.
        series: hash of the series' UID, or the file's folder.
        instance: the file's number in the series.
        orientation: direction of the rows and of the columns, six figures; None: not told.
        position: of the first pixel, in mm; None: not told.
        slope, intercept: from stored to real values (CT: Hounsfield units).
        window: the file's own; None: it has none.
        inverted: low values are bright (MONOCHROME1).
        burned_in: the file says that text is burned into the image.
    """

    file: Path
    number: int
    patient: str
    series: str
    instance: int
    orientation: tuple[float, ...] | None
    position: tuple[float, ...] | None
    slope: float
    intercept: float
    window: Window | None
    inverted: bool
    burned_in: bool


def is_dicom(path: Path) -> bool:
    """Whether a file in a folder of DICOM files is meant to be one: by its first bytes, or by its name.

    A DICOMDIR, a viewer and a text beside the images are none. DataError 406 where it cannot be opened.
    """
    with _quietly(path), path.open("rb") as file:
        marked = file.read(132)[128:] == b"DICM"
    return path.name != "DICOMDIR" and (marked or path.suffix.lower() in _SUFFIXES)


def read_frames(path: Path, listed: str = "") -> list[Frame]:
    """The images of a file; none of a report or a plan, which has no pixels. `listed` is for the end of a sentence.

    Raises:
        DataError: 406 it is not there, no DICOM file, or damaged.
    """
    with _quietly(path, listed):
        header = dcmread(path, stop_before_pixels=True, specific_tags=_TAGS)
        if "Rows" not in header:
            return []
        return [_frame(path, header, number) for number in range(int(header.get("NumberOfFrames") or 1))]


def read_pixels(frame: Frame) -> Array:
    """The real values of an image, float32 (height, width); of a colour image the luminance.

    Raises:
        DataError: 406 damaged, or of a kind that is not read; 411 no decoder for it is installed.
    """
    with _quietly(frame.file):
        header = dcmread(frame.file, stop_before_pixels=True, specific_tags=["PhotometricInterpretation"])
        syntax = header.file_meta.TransferSyntaxUID
        _expect_decoder(frame.file, syntax)
        if header.get("PhotometricInterpretation") == "PALETTE COLOR":
            raise unreadable(frame.file, "is coloured by a palette")
        # From the file one image is read alone; a deflated file has to be inflated as a whole.
        stored = pixel_array(dcmread(frame.file) if syntax.is_deflated else frame.file, index=frame.number)
    values = stored.astype(np.float32)
    if values.ndim == 3:
        values = values @ np.array(LUMINANCE, dtype=np.float32)
    real: Array = values * np.float32(frame.slope) + np.float32(frame.intercept)
    return real


def _frame(path: Path, header: Dataset, number: int) -> Frame:
    def of(group: str, name: str) -> Any:
        """An attribute of this image: its own or its file's common one (enhanced multi-frame), or the header's."""
        own = list(header.get("PerFrameFunctionalGroupsSequence") or [])[number : number + 1]
        for item in (*own, *(header.get("SharedFunctionalGroupsSequence") or [])):
            if item.get(group):
                return item[group][0].get(name)
        return header.get(name)

    def figures(group: str, name: str) -> tuple[float, ...] | None:
        values = of(group, name)
        return None if values is None else tuple(float(value) for value in values)

    slope, intercept = (of("PixelValueTransformationSequence", f"Rescale{name}") for name in ("Slope", "Intercept"))
    patient, series = str(header.get("PatientID") or "").strip(), str(header.get("SeriesInstanceUID") or "")
    return Frame(
        path,
        number,
        _hashed(patient) if patient else "",
        _hashed(series) if series else str(path.parent),
        int(header.get("InstanceNumber") or 0),
        figures("PlaneOrientationSequence", "ImageOrientationPatient"),
        figures("PlanePositionSequence", "ImagePositionPatient"),
        1.0 if slope is None else float(slope),
        0.0 if intercept is None else float(intercept),
        _window(of("FrameVOILUTSequence", "WindowCenter"), of("FrameVOILUTSequence", "WindowWidth")),
        header.get("PhotometricInterpretation") == "MONOCHROME1",
        str(header.get("BurnedInAnnotation") or "").strip().upper() == "YES",
    )


def _window(centre: Any, width: Any) -> Window | None:
    """The file's first window, if it can be used."""
    centres, widths = np.atleast_1d(centre), np.atleast_1d(width)
    if centre is None or width is None or not centres.size or not widths.size or float(widths[0]) <= 0:
        return None
    return float(centres[0]), float(widths[0])


def _hashed(identifier: str) -> str:
    """Tells patients apart without their ID. Who guesses an ID can confirm it, so it stays at the site too."""
    return hashlib.sha256(identifier.encode()).hexdigest()[:16]


def _expect_decoder(path: Path, syntax: UID) -> None:
    # A private syntax is shown as the file writes it, which is no reason to trust it.
    name = syntax.name if syntax.name != str(syntax) else "an unknown syntax"
    try:
        known = not syntax.is_compressed or get_decoder(syntax).is_available
    except (NotImplementedError, ValueError):
        known = False
    if not known:
        remedy = "install pylibjpeg with pylibjpeg-libjpeg, or gdcm, at this site, or export the images uncompressed."
        raise DataError(411, f"{path} is compressed as {name}, and no decoder for it is installed.", remedy)


@contextmanager
def _quietly(path: Path, listed: str = "") -> Iterator[None]:
    with warnings.catch_warnings(action="ignore"), reading(path, listed, quotes=False):
        try:
            yield
        except InvalidDicomError:
            raise unreadable(path, f"is no DICOM file{listed}") from None
