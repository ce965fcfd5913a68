"""Masks as targets: from an archive of arrays to splits that are scaled and hashed."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nightsplit.shared.config.run import DataSection, TaskSection
from nightsplit.shared.errors import DataError
from nightsplit.site_worker.config import SourceSection
from nightsplit.site_worker.data.dataset import Dataset
from nightsplit.site_worker.data.scaling import scale
from nightsplit.site_worker.data.source import load_dataset
from nightsplit.site_worker.data.split import split

SEGMENTATION = TaskSection(kind="segmentation")
SLICES, VOLUMES = 4, 10

needs_data = pytest.mark.skipif(
    "NIGHTSPLIT_DATA" not in os.environ,
    reason="NIGHTSPLIT_DATA is not set: the public data sets are not here",
)


def archive(base: Path, **changed: Any) -> None:
    chance = np.random.default_rng(0)
    count = SLICES * VOLUMES
    arrays = {
        "images": chance.integers(0, 255, (count, 6, 8), dtype=np.uint8),
        "masks": chance.integers(0, 3, (count, 6, 8), dtype=np.uint8),
        "volume": np.repeat([f"v{i}" for i in range(VOLUMES)], SLICES),
        **changed,
    }
    np.savez(base / "x.npz", **{name: array for name, array in arrays.items() if array is not None})


def load(base: Path, size: int | None = None, **keys: Any) -> Dataset:
    section = SourceSection(**{"source": "arrays", "path": "x.npz", "patient": "volume", "masks": "masks", **keys})
    return load_dataset(section, DataSection(image_size=size), SEGMENTATION, base)


def test_masks_of_an_archive(tmp_path: Path) -> None:
    archive(tmp_path)
    with np.load(tmp_path / "x.npz", allow_pickle=False) as stored:
        labels = torch.from_numpy(stored["masks"])
    dataset = load(tmp_path)
    assert torch.equal(dataset.targets, (labels > 0).float())
    assert torch.equal(load(tmp_path, foreground=[2]).targets, (labels == 2).float())
    assert dataset.patients == tuple(f"v{i}" for i in range(VOLUMES) for _ in range(SLICES))
    some = load(tmp_path, where={"volume": ["v3", "v7"]})
    assert torch.equal(some.targets, torch.cat([dataset.targets[12:16], dataset.targets[28:32]]))
    assert torch.equal(load(tmp_path, share=(0.0, 1.0)).targets, dataset.targets)
    assert len(load(tmp_path, patient=None)) == SLICES * VOLUMES
    larger = load(tmp_path, size=12)
    assert larger.inputs.shape == (40, 1, 12, 12)
    assert torch.equal(larger.targets[:, ::2, :].unique(), torch.tensor([0.0, 1.0]))


@pytest.mark.parametrize(
    ("changed", "number", "says"),
    [
        ({"masks": None}, 402, "has no array 'masks'"),
        ({"masks": np.zeros((40, 8, 6), np.uint8)}, 407, "'masks' is uint8 of shape (40, 8, 6)"),
        ({"masks": np.zeros((39, 6, 8), np.uint8)}, 407, "'images' has shape (40, 6, 8)"),
        ({"masks": np.full((40, 6, 8), "a")}, 407, "'masks' is <U1"),
        ({"masks": np.zeros((40, 6, 8), np.uint8)}, 412, "no pixel of its 40 masks is foreground"),
    ],
)
def test_masks_that_do_not_fit(tmp_path: Path, changed: dict[str, Any], number: int, says: str) -> None:
    archive(tmp_path, **changed)
    with pytest.raises(DataError) as caught:
        load(tmp_path)
    assert caught.value.number == number
    assert says in str(caught.value)


def test_volumes_are_never_divided_and_masks_stay_with_their_images(tmp_path: Path) -> None:
    archive(tmp_path)
    whole = load(tmp_path)
    of = {image.numpy().tobytes(): mask for image, mask in zip(whole.inputs, whole.targets, strict=True)}
    splits = split(whole, SEGMENTATION, 0.2, 0.3, seed=1)
    named = [set(part.patients) for part in (splits.train, splits.validation, splits.test)]
    assert [len(names) for names in named] == [5, 2, 3]
    assert len(set.union(*named)) == VOLUMES
    for part in (splits.train, splits.validation, splits.test):
        assert part.targets.shape == (len(part), 6, 8)
        for image, mask in zip(part.inputs, part.targets, strict=True):
            assert torch.equal(of[image.numpy().tobytes()], mask)


def test_the_division_is_that_of_a_regression(tmp_path: Path) -> None:
    archive(tmp_path)
    whole = load(tmp_path)
    figures = Dataset(whole.inputs, whole.targets.mean((1, 2)), whole.patients)
    regression = split(figures, TaskSection(kind="regression"), 0.2, 0.3, seed=1)
    assert split(whole, SEGMENTATION, 0.2, 0.3, seed=1).test.patients == regression.test.patients


def test_scaling_leaves_masks_alone(tmp_path: Path) -> None:
    archive(tmp_path)
    splits = split(load(tmp_path), SEGMENTATION, 0.2, 0.3, seed=1)
    scaled = scale(splits, DataSection())
    assert torch.equal(scaled.test.targets, splits.test.targets)
    assert scaled.train.inputs.mean().item() == pytest.approx(0, abs=1e-4)
    assert scaled.train.inputs.std(correction=0).item() == pytest.approx(1, abs=1e-4)


def test_a_changed_mask_is_noticed(tmp_path: Path) -> None:
    archive(tmp_path)
    whole = load(tmp_path)
    whole.check_fingerprint(load(tmp_path).fingerprint)
    masks = whole.targets.clone()
    masks[3, 2, 1] = 1 - masks[3, 2, 1]
    with pytest.raises(DataError) as caught:
        Dataset(whole.inputs, masks, whole.patients).check_fingerprint(whole.fingerprint)
    assert caught.value.number == 409


@needs_data
def test_hippocampus() -> None:
    path = "$NIGHTSPLIT_DATA/hippocampus_msd/hippocampus_2d.npz"
    dataset = load(Path(), size=64, path=path)
    assert dataset.inputs.shape == (9198, 1, 64, 64)
    assert dataset.targets.shape == (9198, 64, 64)
    assert (dataset.targets.sum((1, 2)) > 0).sum() == 5730
    assert load(Path(), size=64, path=path, foreground=[1]).targets.sum() < dataset.targets.sum()
    assert len(set(dataset.patients)) == 260
    third = load(Path(), size=32, path=path, share=(0.0, 1 / 3))
    assert len(set(third.patients)) == 87
    assert third.targets.shape == (len(third), 32, 32)
