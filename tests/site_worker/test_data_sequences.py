"""Frames of images that an index puts in order; those of volumes and DICOM series are tested with their sources."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from nightsplit.shared.config.run import DataSection, TaskSection
from nightsplit.shared.errors import ConfigError, DataError
from nightsplit.site_worker.config import SourceSection
from nightsplit.site_worker.data.dataset import Dataset
from nightsplit.site_worker.data.scaling import scale
from nightsplit.site_worker.data.sequences import space_evenly
from nightsplit.site_worker.data.source import load_dataset
from nightsplit.site_worker.data.split import split

BINARY = TaskSection(kind="binary")
INDEX = """file,ill,who,sequence,frame
a10.png,1,p1,a,10
a2.png,1,p1,a,2
b0.png,0,p2,b,-1
a1.png,1,p1,a,1
"""

needs_data = pytest.mark.skipif(
    "NIGHTSPLIT_DATA" not in os.environ,
    reason="NIGHTSPLIT_DATA is not set: the public data sets are not here",
)


def write(base: Path, index: str = INDEX) -> None:
    for name, value in (("a1", 51), ("a2", 102), ("a10", 153), ("b0", 255)):
        Image.new("L", (4, 4), value).save(base / f"{name}.png")
    (base / "index.csv").write_text(index)


def load(base: Path, frames: int | None = 3, **keys: Any) -> Dataset:
    names = {"source": "images", "path": ".", "index": "index.csv", "label": "ill", "patient": "who"}
    return load_dataset(SourceSection(**{**names, **keys}), DataSection(image_size=4, frames=frames), BINARY, base)


def test_images_are_put_in_the_order_of_their_frames(tmp_path: Path) -> None:
    write(tmp_path)
    dataset = load(tmp_path)
    found = dict(zip(dataset.patients, dataset.inputs, strict=True))
    assert found["p1"].mean((1, 2)).tolist() == pytest.approx([0.2, 0.4, 0.6])
    assert found["p2"].mean((1, 2)).tolist() == [1, 1, 1]
    assert dict(zip(dataset.patients, dataset.targets.tolist(), strict=True)) == {"p1": 1, "p2": 0}
    assert len(load(tmp_path, frames=None)) == 4


@pytest.mark.parametrize(("frames", "places"), [(1, [4]), (2, [2, 6]), (3, [1, 4, 7]), (9, list(range(9)))])
def test_frames_are_evenly_spaced(frames: int, places: list[int]) -> None:
    assert space_evenly(9, frames) == places


def test_frames_of_a_sequence_belong_to_one_patient_with_one_label(tmp_path: Path) -> None:
    for old, new, name in (("a1.png,1,p1", "a1.png,0,p1", "ill"), ("a1.png,1,p1", "a1.png,1,p2", "who")):
        write(tmp_path, INDEX.replace(old, new))
        with pytest.raises(DataError, match=f"index.csv, line 3: its {name} is not that of") as caught:
            load(tmp_path)
        assert caught.value.number == 403


@pytest.mark.parametrize(
    ("index", "number", "says"),
    [
        (INDEX.replace(",frame", ",number"), 402, "no column 'frame'"),
        (INDEX.replace(",sequence", ",film"), 402, "no column 'sequence'"),
        (INDEX.replace("a,10", "a,tenth"), 403, "column frame: 'tenth' is not a number"),
        (INDEX.replace("a,10", "a,"), 403, "index.csv, line 2: sequence or frame is empty"),
        (INDEX.replace("p1,a,10", "p1,,10"), 403, "index.csv, line 2: sequence or frame is empty"),
    ],
)
def test_an_index_without_order(tmp_path: Path, index: str, number: int, says: str) -> None:
    write(tmp_path, index)
    with pytest.raises(DataError) as caught:
        load(tmp_path)
    assert caught.value.number == number
    assert says in str(caught.value)


def test_what_has_no_sequences(tmp_path: Path) -> None:
    (tmp_path / "1").mkdir()
    Image.new("L", (4, 4)).save(tmp_path / "1" / "x.png")
    with pytest.raises(ConfigError, match=r"data\.frames is set") as caught:
        load(tmp_path, index=None, patient=None)
    assert caught.value.number == 103


@needs_data
def test_sequences_of_lung_ct() -> None:
    names = {"path": "$NIGHTSPLIT_DATA/covid_ct", "label": "label_covid", "patient": "group"}
    dataset = load(Path(), frames=4, **names)
    assert dataset.inputs.shape == (452, 4, 4, 4)
    splits = split(dataset, BINARY, 0.15, 0.2, seed=0)
    assert not set(splits.train.patients) & set(splits.test.patients)
    scaled = scale(splits, DataSection())
    assert torch.allclose(scaled.train.inputs.mean((0, 2, 3)), torch.zeros(4), atol=1e-4)
