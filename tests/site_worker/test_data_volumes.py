from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch

from nightsplit.shared.config.run import DataSection, TaskSection
from nightsplit.shared.errors import ConfigError, DataError
from nightsplit.site_worker.config import SourceSection
from nightsplit.site_worker.data.dataset import Dataset
from nightsplit.site_worker.data.source import load_dataset

SEGMENTATION = TaskSection(kind="segmentation")
BINARY = TaskSection(kind="binary")
LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
"""A file whose axes are stored as they are read: to the left, the back and the head."""

Voxels = np.ndarray[Any, Any]


def save(path: Path, voxels: Voxels, affine: Voxels = LPS) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(voxels, affine), path)


def ramp(shape: tuple[int, ...] = (4, 5, 6)) -> Voxels:
    return np.arange(np.prod(shape), dtype=np.int16).reshape(shape)


def decathlon(base: Path, count: int = 3) -> None:
    """The layout of the Medical Segmentation Decathlon: labels 0, 1, 2; a file that macOS left beside."""
    for number in range(count):
        mask = np.zeros((4, 5, 6), dtype=np.uint8)
        mask[1:3, 2, number] = (1, 2)
        save(base / "task" / "imagesTr" / f"case_{number}.nii.gz", ramp() + number)
        save(base / "task" / "labelsTr" / f"case_{number}.nii.gz", mask)
    (base / "task" / "imagesTr" / "._case_0.nii.gz").write_bytes(b"no volume")


def load(base: Path, *, task: TaskSection = BINARY, **keys: Any) -> Dataset:
    of_run = ("image_size", "frames", "window", "augment", "classes")
    data = {name: keys.pop(name) for name in of_run if name in keys}
    if task is BINARY:
        data.setdefault("classes", ["well", "ill"])
    section = SourceSection(**{"source": "volumes", "path": ".", **keys})
    return load_dataset(section, DataSection(**data), task, base)


def segment(base: Path, **keys: Any) -> Dataset:
    return load(base, task=SEGMENTATION, **{"path": "task/imagesTr", "masks": "../labelsTr", **keys})


def refusal(number: int, base: Path, **keys: Any) -> str:
    with pytest.raises((ConfigError, DataError)) as caught:
        load(base, **keys)
    assert caught.value.number == number
    return str(caught.value)


def test_the_decathlons_layout(tmp_path: Path) -> None:
    decathlon(tmp_path)
    dataset = segment(tmp_path)
    assert dataset.inputs.shape == (18, 1, 5, 4)  # across the third axis; rows go to the back, columns to the left
    assert dataset.targets.shape == (18, 5, 4)
    assert dataset.targets.dtype == torch.float32
    assert dataset.patients == tuple(f"case_{number}.nii.gz" for number in range(3) for _ in range(6))
    for number in range(3):
        expected = torch.zeros(6, 5, 4)
        expected[number, 2, 1:3] = 1
        assert torch.equal(dataset.targets[6 * number : 6 * number + 6], expected)
    whole = ramp().astype(np.float64)
    low, high = np.percentile(whole, (0.5, 99.5))
    expected = torch.from_numpy(((whole - low) / (high - low)).clip(0, 1)).permute(2, 1, 0)
    for number in range(3):  # a constant added to a volume changes nothing
        assert torch.allclose(dataset.inputs[6 * number : 6 * number + 6, 0].double(), expected, atol=1e-5)


def test_foreground(tmp_path: Path) -> None:
    decathlon(tmp_path)
    assert segment(tmp_path).targets.sum() == 6
    assert segment(tmp_path, foreground=[2]).targets.sum() == 3
    assert segment(tmp_path, foreground=[1, 2]).targets.sum() == 6
    with pytest.raises(DataError, match="masks is foreground") as caught:
        segment(tmp_path, foreground=[7])
    assert caught.value.number == 412


@pytest.mark.parametrize(("axis", "shape"), [(0, (4, 6, 5)), (1, (5, 6, 4)), (2, (6, 5, 4))])
def test_the_axis_is_of_the_body_however_the_file_stores_it(
    tmp_path: Path, axis: int, shape: tuple[int, int, int]
) -> None:
    whole = nibabel.Nifti1Image(ramp(), LPS)
    stored = {"as_is": whole, "closest": nibabel.as_closest_canonical(whole)}
    turn = nibabel.orientations.axcodes2ornt(("S", "L", "A"))
    stored["mixed"] = whole.as_reoriented(
        nibabel.orientations.ornt_transform(nibabel.orientations.io_orientation(whole.affine), turn)
    )
    assert len({image.shape for image in stored.values()}) > 1
    read = []
    for name, image in stored.items():
        mask = nibabel.Nifti1Image((np.asarray(image.dataobj) > 60).astype(np.uint8), image.affine)
        save(tmp_path / name / "i" / "a.nii", np.asarray(image.dataobj), image.affine)
        save(tmp_path / name / "m" / "a.nii", np.asarray(mask.dataobj), mask.affine)
        read.append(segment(tmp_path, path=f"{name}/i", masks="../m", axis=axis))
    assert read[0].inputs.shape == (shape[0], 1, *shape[1:])
    for other in read[1:]:
        assert torch.equal(other.inputs, read[0].inputs)
        assert torch.equal(other.targets, read[0].targets)


def test_images_are_smoothed_and_masks_are_not(tmp_path: Path) -> None:
    decathlon(tmp_path)
    dataset = segment(tmp_path, image_size=16)
    assert dataset.inputs.shape == (18, 1, 16, 16)
    assert dataset.targets.shape == (18, 16, 16)
    assert set(dataset.targets.unique().tolist()) == {0, 1}
    # Two pixels of a 5 x 4 slice are a tenth of it; nearest neighbour keeps that.
    assert dataset.targets[0].mean().item() == pytest.approx(0.1, abs=0.03)


def test_a_window(tmp_path: Path) -> None:
    save(tmp_path / "ill" / "a.nii", np.array([[[-1350, -600, 150, 900]]], dtype=np.int16))
    assert load(tmp_path, window="lung").inputs.flatten().tolist() == pytest.approx([0, 0.5, 1, 1])
    assert load(tmp_path, window=(-600, 3000)).inputs.flatten().tolist() == pytest.approx([0.25, 0.5, 0.75, 1])


def test_a_constant_volume(tmp_path: Path) -> None:
    save(tmp_path / "ill" / "a.nii", np.full((2, 2, 2), 7, dtype=np.int16))
    assert torch.equal(load(tmp_path).inputs, torch.zeros(2, 1, 2, 2))


def test_labels_of_an_index(tmp_path: Path) -> None:
    for name in ("a.nii.gz", "b.nii", "c.nii"):
        save(tmp_path / "scans" / name, ramp())
    (tmp_path / "index.csv").write_text("file,label,who\nscans/b.nii,ill,p1\nscans/a.nii.gz,well,p1\n")
    dataset = load(tmp_path, index="index.csv")
    assert dataset.targets.tolist() == [1] * 6 + [0] * 6
    assert dataset.patients == ("scans/b.nii",) * 6 + ("scans/a.nii.gz",) * 6
    assert set(load(tmp_path, index="index.csv", patient="who").patients) == {"p1"}
    middle = load(tmp_path, index="index.csv", where={"slice": ["2", "3"]})
    assert middle.targets.tolist() == [1, 1, 0, 0]
    assert torch.equal(middle.inputs[0], dataset.inputs[2])
    (tmp_path / "index.csv").write_text("file,label\nscans/b.nii,ill\nscans/d.nii,well\n")
    message = refusal(406, tmp_path, index="index.csv")
    assert "d.nii does not exist, listed in" in message
    assert "index.csv, line 3" in message


def test_labels_of_folders(tmp_path: Path) -> None:
    save(tmp_path / "ill" / "patient7" / "a.nii", ramp())
    save(tmp_path / "well" / "b.nii", ramp())
    dataset = load(tmp_path)
    assert dataset.targets.tolist() == [1] * 6 + [0] * 6
    assert set(dataset.patients) == {"patient7", "well/b.nii"}
    assert "no index with the numbers" in refusal(402, tmp_path, task=TaskSection(kind="regression"))


@pytest.mark.parametrize(
    ("frames", "slices"),
    [(1, [3]), (2, [1, 4]), (3, [1, 3, 5]), (6, [0, 1, 2, 3, 4, 5]), (9, [0, 1, 1, 2, 3, 3, 4, 5, 5])],
)
def test_a_volume_as_one_sample(tmp_path: Path, frames: int, slices: list[int]) -> None:
    save(tmp_path / "ill" / "a.nii", ramp())
    save(tmp_path / "well" / "b.nii", np.flip(ramp(), 2))
    every = load(tmp_path)
    dataset = load(tmp_path, frames=frames)
    assert dataset.inputs.shape == (2, frames, 5, 4)
    assert dataset.targets.tolist() == [1, 0]
    assert torch.equal(dataset.inputs[0], every.inputs[slices, 0])
    assert torch.equal(dataset.inputs[1], every.inputs[[6 + k for k in slices], 0])
    assert load(tmp_path, frames=frames, where={"volume": ["well/b.nii"]}).patients == ("well/b.nii",)


def test_masks_that_do_not_fit(tmp_path: Path) -> None:
    decathlon(tmp_path)
    mask = tmp_path / "task" / "labelsTr" / "case_1.nii.gz"
    for voxels, affine, says in (
        (np.ones((4, 5, 7), np.uint8), LPS, "case_1.nii.gz is (4, 5, 7), "),
        (np.ones((4, 5, 6), np.uint8), np.diag([1.0, -1.0, 1.0, 1.0]), "stores its axes in other directions"),
    ):
        save(mask, voxels, affine)
        with pytest.raises(DataError) as caught:
            segment(tmp_path)
        assert caught.value.number == 412
        assert says in str(caught.value)
    mask.unlink()
    with pytest.raises(DataError, match=r"case_1\.nii\.gz does not exist") as caught:
        segment(tmp_path)
    assert caught.value.number == 412


def test_masks_of_volumes_with_one_name(tmp_path: Path) -> None:
    for patient in range(2):
        mask = np.zeros((4, 5, 6), dtype=np.uint8)
        mask[patient] = 1
        save(tmp_path / "images" / f"patient{patient}" / "scan.nii", ramp())
        save(tmp_path / "masks" / f"patient{patient}" / "scan.nii", mask)
    targets = segment(tmp_path, path="images", masks="../masks").targets
    assert targets.sum((0, 1)).tolist() == [30, 30, 0, 0]
    assert targets[:6].sum((0, 1)).tolist() == [30, 0, 0, 0]


def test_volumes_that_cannot_be_read(tmp_path: Path) -> None:
    file = tmp_path / "ill" / "a.nii.gz"
    assert "contains no NIfTI volume" in refusal(401, tmp_path)
    save(file, np.random.default_rng(0).integers(0, 1000, (9, 9, 9), dtype=np.int16))
    content = file.read_bytes()
    for broken in (content[:700], b"no volume", b""):
        file.write_bytes(broken)
        assert "a.nii.gz cannot be read" in refusal(406, tmp_path)
    save(file, np.full((2, 2, 2), np.nan, dtype=np.float32))
    assert "has values that are not finite" in refusal(406, tmp_path)
    save(file, ramp((2, 2, 2, 3)))
    assert "has the shape (2, 2, 2, 3), a volume has three dimensions" in refusal(406, tmp_path)
    save(file, ramp((2, 3, 4, 1)))
    assert load(tmp_path).inputs.shape == (4, 1, 3, 2)


def test_sizes(tmp_path: Path) -> None:
    save(tmp_path / "ill" / "a.nii", ramp())
    save(tmp_path / "ill" / "b.nii", ramp((5, 4, 6)))
    assert "b.nii is 5x4" in refusal(406, tmp_path)
    assert load(tmp_path, image_size=6).inputs.shape == (12, 1, 6, 6)


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"masks": None}, "data.masks is not set"),
        ({"frames": 2}, "data.frames makes a sequence of images one sample"),
        ({"augment": ["contrast", "flip", "rotate"]}, "data.augment moves the images (flip, rotate)"),
        ({"source": "dicom"}, 'data.source = "dicom" has no masks'),
        ({"source": "images"}, 'data.source = "images" has no masks'),
    ],
)
def test_what_a_segmentation_cannot_do(tmp_path: Path, keys: dict[str, Any], says: str) -> None:
    decathlon(tmp_path)
    with pytest.raises(ConfigError) as caught:
        segment(tmp_path, **keys)
    assert caught.value.number == 103
    assert says in str(caught.value)


def test_contrast_moves_nothing(tmp_path: Path) -> None:
    decathlon(tmp_path)
    assert len(segment(tmp_path, augment=["contrast"])) == 18
