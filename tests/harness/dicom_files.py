"""Small DICOM files, written by the tests."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

CT = "1.2.840.10008.5.1.4.1.1.2"


def write_dicom(path: Path, pixels: np.ndarray[Any, Any], *extra: Dataset, **header: Any) -> None:
    """A file with these pixels, uint16 or int16 of (rows, columns) or (frames, rows, columns).

    Args:
        path: where it goes.
        pixels: the stored values.
        extra: elements that have no keyword, private ones for example.
        header: other elements by keyword; None leaves one out.
    """
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = CT, generate_uid(None)
    file = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    elements: Mapping[str, Any] = {
        "SOPClassUID": CT, "SOPInstanceUID": meta.MediaStorageSOPInstanceUID, "PatientID": "p1",
        "SeriesInstanceUID": "1.2.3", "InstanceNumber": 1, "Modality": "CT", "SamplesPerPixel": 1,
        "PhotometricInterpretation": "MONOCHROME2", "Rows": pixels.shape[-2], "Columns": pixels.shape[-1],
        "BitsAllocated": 16, "BitsStored": 16, "HighBit": 15, "PixelRepresentation": int(pixels.dtype.kind == "i"),
        "NumberOfFrames": len(pixels) if pixels.ndim == 3 else None, **header,
    }  # fmt: skip
    for keyword, value in elements.items():
        if value is not None:
            setattr(file, keyword, value)
    for dataset in extra:
        file.update(dataset)
    file.PixelData = pixels.tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    file.save_as(path, enforce_file_format=True)
