import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from nightsplit.shared.config.run import DataSection, TaskSection
from nightsplit.shared.errors import ConfigError, DataError
from nightsplit.site_worker.config import SourceSection
from nightsplit.site_worker.data.dataset import Dataset
from nightsplit.site_worker.data.source import load_dataset
from nightsplit.site_worker.data.split import split

BINARY = TaskSection(kind="binary")

needs_data = pytest.mark.skipif(
    "NIGHTSPLIT_DATA" not in os.environ,
    reason="NIGHTSPLIT_DATA is not set: the public data sets are not here",
)


def draw(path: Path, value: int = 128, size: tuple[int, int] = (12, 10), mode: str = "L") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value if mode[0] in "LI" else (value,) * 3).save(path)


def load(base: Path, *, task: TaskSection = BINARY, size: int | None = 8, **keys: Any) -> Dataset:
    data = DataSection(image_size=size, classes=keys.pop("classes", ["negative", "positive"]))
    source = SourceSection(**{"source": "images", "path": ".", **keys})
    return load_dataset(source, data, task, base)


def refusal(number: int, base: Path, **keys: Any) -> str:
    with pytest.raises(DataError) as caught:
        load(base, **keys)
    assert caught.value.number == number
    return str(caught.value)


def test_folders_named_after_classes(tmp_path: Path) -> None:
    draw(tmp_path / "positive" / "b.png", 255)
    draw(tmp_path / "negative" / "a.JPG", 0)
    draw(tmp_path / "negative" / "c.png", 51, mode="RGB")
    (tmp_path / "negative" / "notes.txt").write_text("no image")
    draw(tmp_path / "negative" / "._a.png")
    dataset = load(tmp_path)
    assert dataset.inputs.shape == (3, 1, 8, 8)
    assert dataset.inputs.dtype == torch.float32
    assert torch.allclose(dataset.inputs.mean((1, 2, 3)), torch.tensor([0.0, 0.2, 1.0]), atol=1e-6)
    assert dataset.targets.tolist() == [0, 0, 1]
    assert dataset.patients == ("negative/a.JPG", "negative/c.png", "positive/b.png")


def test_mura_layout(tmp_path: Path) -> None:
    for place in (
        "train/XR_WRIST/patient00006/study1_positive/image1.png",
        "train/XR_WRIST/patient00006/study1_positive/image2.png",
        "train/XR_HAND/patient00006/study1_negative/image1.png",
        "train/XR_HAND/patient00021/study1_negative/image1.png",
    ):
        draw(tmp_path / place)
    dataset = load(tmp_path)
    assert sorted(zip(dataset.patients, dataset.targets.tolist(), strict=True)) == [
        ("patient00006", 0),
        ("patient00006", 1),
        ("patient00006", 1),
        ("patient00021", 0),
    ]
    assert len(load(tmp_path, path="train/XR_WRIST")) == 2


def test_a_class_name_counts_before_an_ending(tmp_path: Path) -> None:
    draw(tmp_path / "0" / "patient_1" / "x.png")
    draw(tmp_path / "1" / "patient_0" / "x.png")
    dataset = load(tmp_path, classes=[])
    assert dataset.targets.tolist() == [0, 1]
    assert dataset.patients == ("patient_1", "patient_0")


def test_pattern_of_patient_folders(tmp_path: Path) -> None:
    draw(tmp_path / "positive" / "case7" / "left" / "x.png")
    assert load(tmp_path).patients == ("positive/case7/left/x.png",)
    assert load(tmp_path, patient="case*").patients == ("case7",)
    draw(tmp_path / "positive" / "y.png")
    assert "y.png is in no folder named 'case*'" in refusal(403, tmp_path, patient="case*")


INDEX = """file,ill,who,ward
a/one.png,0,p1,x
a/two.png,1.0,p1,x
a/three.png,1,p2,y
"""


def indexed(base: Path, index: str = INDEX) -> dict[str, Any]:
    for number, name in enumerate(("one", "two", "three")):
        draw(base / "a" / f"{name}.png", 51 * number)
    (base / "index.csv").write_text(index)
    return {"index": "index.csv", "label": "ill", "patient": "who", "classes": ["0", "1"]}


def test_index(tmp_path: Path) -> None:
    keys = indexed(tmp_path)
    dataset = load(tmp_path, **keys)
    assert torch.allclose(dataset.inputs.mean((1, 2, 3)), torch.tensor([0.0, 0.2, 0.4]), atol=1e-6)
    assert dataset.targets.tolist() == [0, 1, 1]
    assert dataset.patients == ("p1", "p1", "p2")
    assert load(tmp_path, **keys, where={"ward": ["y"]}).patients == ("p2",)
    regression = load(tmp_path, **keys, task=TaskSection(kind="regression"))
    assert regression.targets.tolist() == [0, 1, 1]


def test_only_the_images_of_the_share_are_read(tmp_path: Path) -> None:
    keys = indexed(tmp_path, INDEX + "a/broken.png,1,p3,z\n")
    (tmp_path / "a" / "broken.png").write_text("no image")
    assert len(load(tmp_path, **keys, where={"ward": ["x", "y"]})) == 3


def test_16_bit_radiographs_are_not_clipped(tmp_path: Path) -> None:
    (tmp_path / "positive").mkdir()
    ramp = np.linspace(0, 65535, 64, dtype=np.uint16).reshape(8, 8)
    Image.fromarray(ramp).save(tmp_path / "positive" / "x.png")
    image = load(tmp_path).inputs[0, 0]
    assert torch.allclose(image, torch.from_numpy(ramp.astype(np.float32) / 65535), atol=1e-6)


def test_sizes(tmp_path: Path) -> None:
    draw(tmp_path / "positive" / "a.png", size=(12, 10))
    assert load(tmp_path, size=None).inputs.shape == (1, 1, 10, 12)
    draw(tmp_path / "positive" / "b.png", size=(10, 12))
    assert load(tmp_path, size=8).inputs.shape == (2, 1, 8, 8)
    message = refusal(406, tmp_path, size=None)
    assert "b.png is 10x12" in message
    assert "data.image_size" in message


def test_truncated_image(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    (tmp_path / "positive").mkdir()
    for name in ("x.png", "x.jpg"):
        file = tmp_path / "positive" / name
        Image.fromarray(rng.integers(0, 255, (64, 64), dtype=np.uint8)).save(file)
        file.write_bytes(file.read_bytes()[:600])
        assert f"{name} cannot be read" in refusal(406, tmp_path)
        file.unlink()


def test_image_errors(tmp_path: Path) -> None:
    keys = indexed(tmp_path, INDEX + "a/four.png,1,p3,z\n")
    message = refusal(406, tmp_path, **keys)
    assert "four.png does not exist, listed in" in message
    assert "index.csv, line 5" in message
    (tmp_path / "a" / "four.png").write_bytes(b"")
    assert "four.png cannot be read" in refusal(406, tmp_path, **keys)


def test_folder_errors(tmp_path: Path) -> None:
    assert "contains no image" in refusal(401, tmp_path)
    assert "does not exist" in refusal(401, tmp_path, path="absent")
    draw(tmp_path / "a.png")
    assert "is not a folder" in refusal(401, tmp_path, path="a.png")
    assert "is in no folder of a class; data.classes names negative, positive" in refusal(403, tmp_path)
    (tmp_path / "a.png").unlink()
    draw(tmp_path / "positive" / "negative" / "a.png")
    assert "is in folders of negative, positive" in refusal(403, tmp_path)
    assert "needs" not in refusal(402, tmp_path, task=TaskSection(kind="regression"))


def test_index_errors(tmp_path: Path) -> None:
    keys = indexed(tmp_path, INDEX.replace("file,", "path,"))
    assert "no column 'file'; it has path, ill, who, ward" in refusal(402, tmp_path, **keys)
    assert "absent.csv" in refusal(401, tmp_path, **{**keys, "index": "absent.csv"})
    indexed(tmp_path, INDEX.replace("p2", ""))
    assert "index.csv, line 4: who is empty" in refusal(403, tmp_path, **keys)
    indexed(tmp_path, INDEX.replace("1.0", "unsure"))
    assert "index.csv, line 3: ill 'unsure'" in refusal(403, tmp_path, **keys)


def archive(base: Path, **changed: Any) -> dict[str, Any]:
    """An archive like MedMNIST's."""
    arrays = {
        "train_images": np.arange(4 * 6 * 6, dtype=np.uint8).reshape(4, 6, 6),
        "train_labels": np.array([[0], [1], [1], [0]], dtype=np.uint8),
        "who": np.array(["a", "a", "b", "c"]),
        **changed,
    }
    np.savez(base / "x.npz", **arrays)
    names = {"images": "train_images", "label": "train_labels", "patient": "who", "classes": ["0", "1"]}
    return {"source": "arrays", "path": "x.npz", "size": 6, **names}


def test_arrays(tmp_path: Path) -> None:
    dataset = load(tmp_path, **archive(tmp_path))
    expected = torch.arange(4 * 6 * 6).to(torch.uint8).view(4, 1, 6, 6).float() / 255
    assert torch.equal(dataset.inputs, expected)
    assert dataset.targets.tolist() == [0, 1, 1, 0]
    assert dataset.patients == ("a", "a", "b", "c")
    assert load(tmp_path, **archive(tmp_path), where={"who": ["b", "c"]}).targets.tolist() == [1, 0]
    assert load(tmp_path, **{**archive(tmp_path), "size": 3}).inputs.shape == (4, 1, 3, 3)


def test_colour_and_floating_point_arrays(tmp_path: Path) -> None:
    colour = np.zeros((4, 6, 6, 3), dtype=np.uint8)
    colour[..., 1] = 255
    inputs = load(tmp_path, **archive(tmp_path, train_images=colour)).inputs
    assert torch.allclose(inputs, torch.full((4, 1, 6, 6), 0.587))
    for shape in ((4, 6, 6), (4, 6, 6, 1)):
        inputs = load(tmp_path, **archive(tmp_path, train_images=np.full(shape, -3.0))).inputs
        assert torch.equal(inputs, torch.full((4, 1, 6, 6), -3.0))


@pytest.mark.parametrize(
    ("changed", "keys", "number", "part"),
    [
        ({"train_labels": np.zeros(3)}, {}, 407, "'train_labels' has shape (3,), 'train_images' has 4"),
        ({"who": np.zeros((4, 2))}, {}, 407, "'who' has shape (4, 2)"),
        ({"train_images": np.zeros((4, 6), np.uint8)}, {}, 407, "shape (4, 6)"),
        ({"train_images": np.zeros((4, 6, 6, 2), np.uint8)}, {}, 407, "shape (4, 6, 6, 2)"),
        ({"train_images": np.zeros((4, 6, 6), np.int32)}, {}, 407, "int32"),
        ({"train_images": np.full((4, 6, 6), np.nan)}, {}, 403, "x.npz, row 1: 'train_images' has"),
        ({}, {"images": "scans"}, 402, "no array 'scans'; it has train_images, train_labels, who"),
        ({}, {"where": {"ward": ["1"]}}, 402, "'ward'"),
        ({"train_labels": np.array([0, 1, 7, 0])}, {}, 403, "x.npz, row 3: train_labels '7'"),
        ({"who": np.array([None, "a", "b", "c"], dtype=object)}, {}, 401, "without objects"),
        ({}, {"path": "absent.npz"}, 401, "does not exist"),
        ({}, {"path": "broken.npz"}, 401, "not a readable .npz"),
        ({}, {"path": "cut.npz"}, 401, "not a readable .npz"),
        ({}, {"path": "."}, 401, "not a readable .npz"),
    ],
)
def test_array_errors(tmp_path: Path, changed: dict[str, Any], keys: dict[str, Any], number: int, part: str) -> None:
    names = archive(tmp_path, **changed)
    (tmp_path / "broken.npz").write_text("a,b\n1,2\n")
    (tmp_path / "cut.npz").write_bytes((tmp_path / "x.npz").read_bytes()[:300])
    assert part in refusal(number, tmp_path, **{**names, **keys})


def test_f2_an_archive_larger_than_the_memory_is_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = archive(tmp_path)
    np.savez_compressed(tmp_path / "x.npz", **(dict(np.load(tmp_path / "x.npz")) | {"more": np.zeros(2**27, np.uint8)}))
    assert (tmp_path / "x.npz").stat().st_size < 2**20
    monkeypatch.setattr(os, "sysconf", {"SC_PAGE_SIZE": 2**12, "SC_PHYS_PAGES": 2**13}.__getitem__)  # 32 MiB
    load(tmp_path, **names)  # an array that is not asked for is not read
    assert "this machine has 0 GiB" in refusal(401, tmp_path, **{**names, "images": "more"})


def test_wrong_number_of_classes(tmp_path: Path) -> None:
    draw(tmp_path / "positive" / "x.png")
    with pytest.raises(ConfigError, match="1 entries, the task 2") as caught:
        load(tmp_path, classes=["positive"])
    assert caught.value.number == 103


@needs_data
def test_covid_ct() -> None:
    keys: dict[str, Any] = {"path": "$NIGHTSPLIT_DATA/covid_ct", "index": "index.csv", "label": "label_covid"}
    keys |= {"patient": "group", "classes": ["0", "1"], "size": 64}
    dataset = load(Path(), **keys)
    assert dataset.inputs.shape == (746, 1, 64, 64)
    assert dataset.targets.sum() == 349
    assert 0 <= dataset.inputs.min() < dataset.inputs.max() <= 1
    splits = split(dataset, BINARY, 0.15, 0.2, seed=0)
    assert not set(splits.train.patients) & set(splits.test.patients)
    sites = [set(load(Path(), **keys, share=s).patients) for s in ((0.0, 0.5), (0.5, 0.8), (0.8, 1.0))]
    assert set.union(*sites) == set(dataset.patients)
    assert sum(map(len, sites)) == len(set(dataset.patients))


@needs_data
def test_pneumoniamnist() -> None:
    path = "$NIGHTSPLIT_DATA/pneumoniamnist/pneumoniamnist.npz"
    names: dict[str, Any] = {"images": "train_images", "label": "train_labels", "classes": ["0", "1"]}
    dataset = load(Path(), source="arrays", path=path, size=28, **names)
    assert dataset.inputs.shape == (4708, 1, 28, 28)
    assert dataset.targets.sum() == 3494
