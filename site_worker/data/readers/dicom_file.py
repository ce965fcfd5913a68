"""Reading of one DICOM file: its pixels, and the attributes of the header that they need.

No other attribute is read. This module returns the patient's ID and the series' UID as hashes. Warnings and errors of
pydicom may quote the header, so they are never shown.
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
from nightsplit.site_worker.data.listing import reading, unreadable_error
from nightsplit.site_worker.data.pixels import LUMINANCE, Array, Window

_LOG = logging.getLogger("pydicom")
_LOG.disabled = True  # its own messages
_LOG.propagate = False  # those of the loggers below it

_TAGS = [
    "SeriesInstanceUID", "PatientID", "InstanceNumber", "NumberOfFrames", "Rows", "PhotometricInterpretation",
    "BurnedInAnnotation", "ImageOrientationPatient", "ImagePositionPatient", "RescaleSlope", "RescaleIntercept",
    "WindowCenter", "WindowWidth", "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence",
]  # fmt: skip
_SUFFIXES = (".dcm", ".dicom", ".ima", "")


@dataclass(frozen=True)
class Frame:
    """Image of a DICOM file.

    Attributes:
        file: the file.
        number: index of the image in the file, from 0.
        patient: hash of the patient's ID; "" without one.
        series: hash of the series' UID, or the file's folder.
        instance: the file's number in the series.
        orientation: direction of the rows and of the columns, six numbers; None: unknown.
        position: position of the first pixel, in mm; None: unknown.
        slope, intercept: from stored to real values (CT: Hounsfield units).
        window: window of the file; None: no window.
        inverted: low values are bright (MONOCHROME1).
        burned_in: text is burned into the image, by the header.
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
    """Return whether a file is DICOM by its first bytes or its name, and no DICOMDIR; DataError 406 if unreadable."""
    with _quietly(path), path.open("rb") as file:
        has_magic = file.read(132)[128:] == b"DICM"
    return path.name != "DICOMDIR" and (has_magic or path.suffix.lower() in _SUFFIXES)


def read_frames(path: Path, reference: str = "") -> list[Frame]:
    """Read the images of a file without their pixels; a report or a plan has none.

    DataError 406, whose text ends with `reference`, if it is missing, damaged, or not a DICOM file.
    """
    with _quietly(path, reference):
        header = dcmread(path, stop_before_pixels=True, specific_tags=_TAGS)
        if "Rows" not in header:
            return []
        return [_parse_frame(path, header, number) for number in range(int(header.get("NumberOfFrames") or 1))]


def read_pixels(frame: Frame) -> Array:
    """Read the real values of an image, float32 (height, width), for a colour image the luminance.

    DataError 406 if it is damaged or of an unsupported kind, 411 if no decoder for it is installed.
    """
    with _quietly(frame.file):
        header = dcmread(frame.file, stop_before_pixels=True, specific_tags=["PhotometricInterpretation"])
        syntax = header.file_meta.TransferSyntaxUID
        _expect_decoder(frame.file, syntax)
        if header.get("PhotometricInterpretation") == "PALETTE COLOR":
            raise unreadable_error(frame.file, "has colours from a palette")
        # From a path pydicom reads a single image; a deflated file must be read as a whole.
        stored = pixel_array(dcmread(frame.file) if syntax.is_deflated else frame.file, index=frame.number)
    values = stored.astype(np.float32)
    if values.ndim == 3:
        values = values @ np.array(LUMINANCE, dtype=np.float32)
    real: Array = values * np.float32(frame.slope) + np.float32(frame.intercept)
    return real


def _parse_frame(path: Path, header: Dataset, number: int) -> Frame:
    def read(group: str, name: str) -> Any:
        """Return an attribute of this image: per frame or shared (enhanced multi-frame), or of the header."""
        own = list(header.get("PerFrameFunctionalGroupsSequence") or [])[number : number + 1]
        for item in (*own, *(header.get("SharedFunctionalGroupsSequence") or [])):
            if item.get(group):
                return item[group][0].get(name)
        return header.get(name)

    def read_numbers(group: str, name: str) -> tuple[float, ...] | None:
        values = read(group, name)
        return None if values is None else tuple(map(float, values))

    slope, intercept = (read("PixelValueTransformationSequence", f"Rescale{name}") for name in ("Slope", "Intercept"))
    patient, series = str(header.get("PatientID") or "").strip(), str(header.get("SeriesInstanceUID") or "")
    return Frame(
        file=path,
        number=number,
        patient=_hash(patient) if patient else "",
        series=_hash(series) if series else str(path.parent),
        instance=int(header.get("InstanceNumber") or 0),
        orientation=read_numbers("PlaneOrientationSequence", "ImageOrientationPatient"),
        position=read_numbers("PlanePositionSequence", "ImagePositionPatient"),
        slope=1.0 if slope is None else float(slope),
        intercept=0.0 if intercept is None else float(intercept),
        window=_parse_window(read("FrameVOILUTSequence", "WindowCenter"), read("FrameVOILUTSequence", "WindowWidth")),
        inverted=header.get("PhotometricInterpretation") == "MONOCHROME1",
        burned_in=str(header.get("BurnedInAnnotation") or "").strip().upper() == "YES",
    )


def _parse_window(centre: Any, width: Any) -> Window | None:
    """Return the first window of the file, or None if it has no usable one."""
    centres, widths = np.atleast_1d(centre), np.atleast_1d(width)
    if centre is None or width is None or not centres.size or not widths.size or float(widths[0]) <= 0:
        return None
    return float(centres[0]), float(widths[0])


def _hash(identifier: str) -> str:
    """Hash an ID to tell patients apart. A hash can confirm a guessed ID, so it must stay at the site, too."""
    return hashlib.sha256(identifier.encode()).hexdigest()[:16]


def _expect_decoder(path: Path, syntax: UID) -> None:
    # The name of a private syntax would be text of the file, which must not be shown.
    name = syntax.name if syntax.name != str(syntax) else "an unknown syntax"
    try:
        can_decode = not syntax.is_compressed or get_decoder(syntax).is_available
    except (NotImplementedError, ValueError):
        can_decode = False
    if not can_decode:
        remedy = "install pylibjpeg with pylibjpeg-libjpeg, or gdcm, at this site, or export the images uncompressed."
        raise DataError(411, f"{path} is compressed as {name}, and no decoder for it is installed.", remedy)


@contextmanager
def _quietly(path: Path, reference: str = "") -> Iterator[None]:
    with warnings.catch_warnings(action="ignore"), reading(path, reference, quotes=False):
        try:
            yield
        except InvalidDicomError:
            raise unreadable_error(path, f"is not a DICOM file{reference}") from None
