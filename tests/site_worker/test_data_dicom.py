import logging
import os
import shutil
import sys
import warnings
from collections.abc import Iterator
from io import BytesIO, StringIO
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pydicom.data
import pytest
import torch
from pydicom import dcmread, dcmwrite
from pydicom.dataset import Dataset as Header
from pydicom.sequence import Sequence

from nightsplit.shared.config.run import DataSection, TaskSection
from nightsplit.shared.errors import DataError
from nightsplit.site_worker.config import SourceSection
from nightsplit.site_worker.data.dataset import Dataset
from nightsplit.site_worker.data.source import load_dataset
from tests.harness.dicom_files import write_dicom

BINARY = TaskSection(kind="binary")
BUNDLED = Path(pydicom.data.__file__).parent / "test_files"

needs_data = pytest.mark.skipif(
    "NIGHTSPLIT_DATA" not in os.environ,
    reason="NIGHTSPLIT_DATA is not set: the public data sets are not here",
)


def load(base: Path, *, task: TaskSection = BINARY, source: str = "dicom", **keys: Any) -> Dataset:
    data = {name: keys.pop(name) for name in ("image_size", "frames", "window") if name in keys}
    section = SourceSection(source=source, **{"path": ".", **keys})  # type: ignore[arg-type]
    return load_dataset(section, DataSection(classes=["well", "ill"], **data), task, base)


def refusal(number: int, base: Path, **keys: Any) -> str:
    with pytest.raises(DataError) as caught:
        load(base, **keys)
    assert caught.value.number == number
    return str(caught.value)


def flat(value: int, size: tuple[int, int] = (4, 4), dtype: str = "int16") -> np.ndarray[Any, Any]:
    return np.full(size, value, dtype=dtype)


def bundled(base: Path, *names: str) -> None:
    """Files that come with pydicom, as patients of class ill."""
    (base / "ill").mkdir(parents=True, exist_ok=True)
    for name in names:
        shutil.copy(BUNDLED / name, base / "ill" / name)


def test_a_window_of_hounsfield_units(tmp_path: Path) -> None:
    stored = np.array([[-400, 400, 424, 464, 1000]], dtype=np.int16)
    write_dicom(tmp_path / "ill" / "a.dcm", stored, RescaleSlope="0.5", RescaleIntercept="-172")
    # -372, 28, 40, 60, 328 Hounsfield units
    assert load(tmp_path, window="brain").inputs.flatten().tolist() == pytest.approx([0, 0.35, 0.5, 0.75, 1])
    assert load(tmp_path, window=(28, 700)).inputs.flatten().tolist() == pytest.approx(
        [0, 0.5, 12 / 700 + 0.5, 32 / 700 + 0.5, 300 / 700 + 0.5]
    )


def test_the_files_own_window_then_percentiles(tmp_path: Path) -> None:
    ramp = np.arange(100, dtype=np.int16).reshape(10, 10)
    write_dicom(tmp_path / "ill" / "a.dcm", ramp, WindowCenter=["50", "7"], WindowWidth=["20", "1"])
    assert torch.allclose(load(tmp_path).inputs.flatten(), ((torch.arange(100) - 50) / 20 + 0.5).clip(0, 1))
    write_dicom(tmp_path / "ill" / "a.dcm", ramp, WindowCenter="50", WindowWidth="0")
    low, high = np.percentile(ramp, (0.5, 99.5))
    expected = ((torch.arange(100) - low) / (high - low)).clip(0, 1)
    assert torch.allclose(load(tmp_path).inputs.flatten(), expected, atol=1e-5)


def test_percentiles_are_of_the_whole_series(tmp_path: Path) -> None:
    for number, value in enumerate((0, 500, 1000)):
        write_dicom(tmp_path / "ill" / f"{number}.dcm", flat(value), InstanceNumber=number)
    assert load(tmp_path).inputs.mean((1, 2, 3)).tolist() == pytest.approx([0, 0.5, 1])
    alone = load(tmp_path, where={"file": ["ill/1.dcm"]})
    assert alone.inputs.mean().item() == pytest.approx(0.5)


def test_monochrome1_is_inverted(tmp_path: Path) -> None:
    ramp = np.arange(16, dtype=np.uint16).reshape(4, 4)
    for name, kind in (("a", "MONOCHROME2"), ("b", "MONOCHROME1")):
        header = {"PhotometricInterpretation": kind, "SeriesInstanceUID": f"1.{len(kind)}.{name == 'a':d}"}
        write_dicom(tmp_path / "ill" / f"{name}.dcm", ramp, **header)
    plain, inverted = load(tmp_path).inputs
    assert torch.allclose(inverted, 1 - plain)
    assert plain.max() == 1


def oriented(path: Path, value: int, instance: int, orientation: list[float], position: list[float] | None) -> None:
    write_dicom(
        path, flat(value), InstanceNumber=instance, ImageOrientationPatient=orientation, ImagePositionPatient=position
    )


@pytest.mark.parametrize("orientation", [[1, 0, 0, 0, 1, 0], [0, 1, 0, 0, 0, -1]])
def test_a_series_is_sorted_along_the_normal_of_its_images(tmp_path: Path, orientation: list[float]) -> None:
    normal = np.cross(orientation[:3], orientation[3:])
    for value, depth in ((0, -7.5), (1000, 2.25), (500, -2)):
        position = [float(x) for x in depth * normal + 3.0]
        oriented(tmp_path / "ill" / f"{value}.dcm", value, 9 - value // 500, orientation, position)
    assert load(tmp_path).inputs.mean((1, 2, 3)).tolist() == pytest.approx([0, 0.5, 1])
    # One file without a position, and nothing is known of the order but the numbers.
    oriented(tmp_path / "ill" / "500.dcm", 500, 7, orientation, None)
    assert load(tmp_path).inputs.mean((1, 2, 3)).tolist() == pytest.approx([1, 0.5, 0])


def test_series_are_kept_apart(tmp_path: Path) -> None:
    for number, (series, value) in enumerate((("1.1", 0), ("1.2", 10), ("1.1", 100), ("1.2", 20))):
        write_dicom(tmp_path / "ill" / f"{number}.dcm", flat(value), InstanceNumber=number, SeriesInstanceUID=series)
    assert load(tmp_path).inputs.mean((1, 2, 3)).tolist() == pytest.approx([0, 1, 0, 1])


def test_images_of_several_sizes_need_a_size(tmp_path: Path) -> None:
    write_dicom(tmp_path / "ill" / "a.dcm", flat(1, (6, 8)), InstanceNumber=1)
    write_dicom(tmp_path / "ill" / "b.dcm", flat(2, (8, 8)), InstanceNumber=2)
    assert "b.dcm is 8x8" in refusal(406, tmp_path)
    assert load(tmp_path, image_size=5).inputs.shape == (2, 1, 5, 5)


def test_enhanced_multi_frame(tmp_path: Path) -> None:
    """Each frame has a position and a slope of its own; the window is common to all."""

    def item(group: str, **elements: Any) -> Header:
        outer, inner = Header(), Header()
        for name, value in elements.items():
            setattr(inner, name, value)
        setattr(outer, group, Sequence([inner]))
        return outer

    frames = []
    for depth, slope in ((5, "1"), (-5, "2"), (0, "0.5")):
        frame = item("PlanePositionSequence", ImagePositionPatient=[0, 0, depth])
        frame.update(item("PixelValueTransformationSequence", RescaleSlope=slope, RescaleIntercept="0"))
        frames.append(frame)
    common = item("PlaneOrientationSequence", ImageOrientationPatient=[1, 0, 0, 0, 1, 0])
    common.update(item("FrameVOILUTSequence", WindowCenter="50", WindowWidth="100"))
    write_dicom(
        tmp_path / "ill" / "a.dcm", np.stack([flat(20), flat(30), flat(40)]),
        PerFrameFunctionalGroupsSequence=Sequence(frames), SharedFunctionalGroupsSequence=Sequence([common]),
    )  # fmt: skip
    dataset = load(tmp_path)
    assert dataset.inputs.mean((1, 2, 3)).tolist() == pytest.approx([0.6, 0.2, 0.2])
    sequence = load(tmp_path, frames=3, image_size=4)
    assert sequence.inputs.shape == (1, 3, 4, 4)
    assert sequence.inputs.mean((2, 3)).flatten().tolist() == pytest.approx([0.6, 0.2, 0.2])


def test_a_film_of_frames_without_positions(tmp_path: Path) -> None:
    write_dicom(tmp_path / "ill" / "a.dcm", np.stack([flat(v) for v in (0, 50, 100)]))
    assert load(tmp_path).inputs.mean((1, 2, 3)).tolist() == pytest.approx([0, 0.5, 1])


def test_an_index_of_files_and_of_folders(tmp_path: Path) -> None:
    for place, patient in (("s/one/1.dcm", "p1"), ("s/one/2.dcm", "p1"), ("s/two.dcm", "p2"), ("s/three.dcm", "p3")):
        write_dicom(tmp_path / place, flat(1), PatientID=patient, SeriesInstanceUID=f"1.{ord(patient[1])}")
    (tmp_path / "index.csv").write_text("file,label,who,figure\ns/one,ill,x,1\ns/two.dcm,well,x,2\ns/gone,ill,y,3\n")
    message = refusal(406, tmp_path, index="index.csv")
    assert "gone does not exist, listed in" in message
    assert "index.csv, line 4" in message
    (tmp_path / "index.csv").write_text("file,label,who,figure\ns/one,ill,x,1\ns/two.dcm,well,x,2\n")
    dataset = load(tmp_path, index="index.csv")
    assert dataset.targets.tolist() == [1, 1, 0]
    assert dataset.patients[0] == dataset.patients[1] != dataset.patients[2]
    assert load(tmp_path, index="index.csv", patient="who").patients == ("x", "x", "x")
    figures = load(tmp_path, index="index.csv", label="figure", task=TaskSection(kind="regression"))
    assert figures.targets.tolist() == [1, 1, 2]


def test_patients_are_hashes_of_their_ids(tmp_path: Path) -> None:
    for number, patient in enumerate(("MRN-0042", " MRN-0042", "MRN-0043")):
        write_dicom(tmp_path / "patient_Doe" / "ill" / f"{number}.dcm", flat(1), PatientID=patient)
    first, second, third = load(tmp_path).patients
    assert first == second != third
    assert all(len(name) == 16 and int(name, 16) >= 0 for name in (first, third))
    assert load(tmp_path, patient="patient_*").patients == ("patient_Doe",) * 3
    write_dicom(tmp_path / "ill" / "9.dcm", flat(1), PatientID="")
    assert "9.dcm, image 1: PatientID is empty" in refusal(403, tmp_path)


def test_text_burned_into_an_image_is_refused(tmp_path: Path) -> None:
    for number, said in enumerate(("NO", None, "YES", "YES")):
        write_dicom(tmp_path / "ill" / f"{number}.dcm", flat(1), BurnedInAnnotation=said, PatientName="Doe^Jane")
        if said is None:
            assert len(load(tmp_path)) == 2
    message = refusal(410, tmp_path)
    assert "2.dcm says that text is burned into its image (2 such files in all)" in message
    assert "Doe" not in message


def test_what_is_no_image(tmp_path: Path) -> None:
    assert "contains no DICOM file" in refusal(401, tmp_path)
    bundled(tmp_path, "reportsi.dcm", "rtplan.dcm")
    assert "contains no image" in refusal(401, tmp_path)
    write_dicom(tmp_path / "ill" / "1.2.840.7", flat(1))
    (tmp_path / "ill" / "DICOMDIR").write_bytes(b"\0" * 128 + b"DICM")
    (tmp_path / "ill" / "notes.txt").write_text("Jane Doe")
    (tmp_path / "ill" / ".hidden").write_text("Jane Doe")
    assert len(load(tmp_path)) == 1
    (tmp_path / "ill" / "IM0001").write_text("Jane Doe")
    assert "IM0001 is not a DICOM file" in refusal(406, tmp_path)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("CT_small.dcm", (128, 128)),  # no window
        ("MR_small_bigendian.dcm", (64, 64)),
        ("MR_small_implicit.dcm", (64, 64)),
        ("MR_small_RLE.dcm", (64, 64)),
        ("MR_small_jp2klossless.dcm", (64, 64)),
        ("examples_overlay.dcm", (300, 484)),
        ("SC_rgb_rle_2frame.dcm", (100, 100)),
        ("rtdose_rle.dcm", (10, 10)),
        ("image_dfl.dcm", (512, 512)),
        ("liver_1frame.dcm", (512, 512)),
    ],
)
def test_bundled_files(tmp_path: Path, name: str, shape: tuple[int, int]) -> None:
    bundled(tmp_path, name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        header = dcmread(BUNDLED / name)
    inputs = load(tmp_path, patient="ill").inputs
    assert inputs.shape == (int(header.get("NumberOfFrames") or 1), 1, *shape)
    assert 0 <= inputs.min() <= inputs.max() <= 1
    assert inputs.std() > 0.01


def test_encodings_of_one_image_give_one_result(tmp_path: Path) -> None:
    inputs = []
    for name in ("", "_bigendian", "_implicit", "_RLE", "_jp2klossless"):
        bundled(tmp_path / name, f"MR_small{name}.dcm")
        inputs.append(load(tmp_path / name).inputs)
        shutil.rmtree(tmp_path / name / "ill")
    for other in inputs[1:]:
        assert torch.equal(other, inputs[0])


@pytest.mark.parametrize(
    ("name", "number", "says"),
    [
        ("MR_small_jpeg_ls_lossless.dcm", 411, "is compressed as JPEG-LS Lossless Image Compression"),
        ("SC_rgb_jpeg_gdcm.dcm", 411, "is compressed as JPEG Lossless, Non-Hierarchical"),
        ("MR_truncated.dcm", 406, "cannot be read"),
        ("JPGExtended.dcm", 406, "cannot be read"),
        ("badVR.dcm", 406, "cannot be read"),
        ("examples_palette.dcm", 406, "has colours from a palette"),
        ("ExplVR_LitEndNoMeta.dcm", 406, "is not a DICOM file"),
        ("meta_missing_tsyntax.dcm", 401, "contains no image"),
    ],
)
def test_bundled_files_that_are_refused(tmp_path: Path, name: str, number: int, says: str) -> None:
    bundled(tmp_path, name)
    assert says in refusal(number, tmp_path, patient="ill")


@pytest.fixture
def logged() -> Iterator[StringIO]:
    """What pydicom's logger lets through."""
    log, text = logging.getLogger("pydicom"), StringIO()
    handler = logging.StreamHandler(text)
    log.addHandler(handler)
    yield text
    log.removeHandler(handler)


def test_nothing_of_a_header_is_shown(tmp_path: Path, logged: StringIO) -> None:
    """Elements that pydicom would complain of, with their values."""
    written: dict[str, Any] = {"InstanceNumber": "12345678", "RescaleSlope": "1.000000", "WindowCenter": "1.000000"}
    written["ImagePositionPatient"] = ["1.00", "2.00", "3.00"]
    for keyword, value in written.items():
        file = tmp_path / "ill" / "a.dcm"
        write_dicom(file, flat(1), **{"WindowWidth": "2", keyword: value}, PatientName="Doe^Jane")
        content = file.read_bytes()
        before = pydicom_element(keyword, value)
        assert content.count(before) == 1
        file.write_bytes(content.replace(before, before[:8] + b"Doe^Jane".ljust(len(before) - 8)[: len(before) - 8]))
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            message = refusal(406, tmp_path)
        assert "Doe" not in message + "".join(str(warning.message) for warning in warned) + logged.getvalue()


def pydicom_element(keyword: str, value: Any) -> bytes:
    """The element as a file holds it: tag, VR, length, value."""
    only = Header()
    setattr(only, keyword, value)
    buffer = BytesIO()
    dcmwrite(buffer, only, implicit_vr=False, little_endian=True)
    return buffer.getvalue()


def test_the_package_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nightsplit.site_worker.data.readers.dicom", None)
    assert "pip install nightsplit[medical]" in refusal(401, tmp_path)


@needs_data
def test_hippocampus_series(tmp_path: Path) -> None:
    (tmp_path / "dicom").symlink_to(Path(os.environ["NIGHTSPLIT_DATA"]) / "dicom_hippocrop")
    (tmp_path / "index.csv").write_text("file,label\ndicom/Study1,ill\ndicom/Study2,well\ndicom/Study3,ill\n")
    dataset = load(tmp_path, index="index.csv", image_size=64)
    assert dataset.inputs.shape == (107, 1, 64, 64)
    assert [dataset.patients.count(name) for name in dict.fromkeys(dataset.patients)] == [32, 35, 40]
    sequences = load(tmp_path, index="index.csv", image_size=64, frames=8)
    assert sequences.inputs.shape == (3, 8, 64, 64)
    assert "is in no folder of a class" in refusal(403, tmp_path, path="$NIGHTSPLIT_DATA/dicom_hippocrop")


@needs_data
def test_a_series_and_the_same_volume_as_nifti(tmp_path: Path) -> None:
    """The DICOM series of Study1, stored as NIfTI in two ways: the slices are the same, in the same order."""
    folder = Path(os.environ["NIGHTSPLIT_DATA"]) / "dicom_hippocrop" / "Study1"
    files = sorted((dcmread(path) for path in folder.rglob("*.dcm")), key=lambda f: float(f.ImagePositionPatient[2]))
    voxels = np.stack([file.pixel_array.T for file in files], axis=2).astype(np.int16)
    to_ras = np.diag([-1.0, -1.0, 1.0, 1.0])  # DICOM counts to the left and the back, NIfTI to the right and the front
    shutil.copytree(folder, tmp_path / "ill")
    centre = (470, 950)
    expected = load(tmp_path, window=centre)
    for name, turned in (
        ("as_is", nibabel.Nifti1Image(voxels, to_ras)),
        ("turned", nibabel.as_closest_canonical(nibabel.Nifti1Image(voxels, to_ras))),
    ):
        (tmp_path / name / "ill").mkdir(parents=True)
        nibabel.save(turned, tmp_path / name / "ill" / "a.nii.gz")
        volume = load(tmp_path / name, source="volumes", window=centre)
        assert torch.equal(volume.inputs, expected.inputs)
    assert expected.inputs.shape == (32, 1, 51, 35)
