import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from sklearn.datasets import load_diabetes

from nightsplit.shared.config.run import DataSection, TaskSection
from nightsplit.shared.errors import ConfigError, DataError
from nightsplit.site_worker.config import SourceSection
from nightsplit.site_worker.data.dataset import Dataset
from nightsplit.site_worker.data.scaling import Scaling, scale
from nightsplit.site_worker.data.source import load_dataset
from nightsplit.site_worker.data.split import split

BINARY, REGRESSION = TaskSection(kind="binary"), TaskSection(kind="regression")
TABLE = """age,chol,place,num
63,233,a,0
67,0,b,2
,250.5,a,1
41,?,b,0
"""

needs_data = pytest.mark.skipif(
    "NIGHTSPLIT_DATA" not in os.environ,
    reason="NIGHTSPLIT_DATA is not set: the public data sets are not here",
)

Load = Callable[..., Dataset]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    """Write `content` to a file and read it as a table."""

    def load(content: str | bytes, task: TaskSection = BINARY, *, name: str = "heart.csv", **keys: Any) -> Dataset:
        file = tmp_path / name
        file.write_bytes(content.encode() if isinstance(content, str) else content)
        data_keys = {key: keys.pop(key) for key in ("features", "classes", "scaling") if key in keys}
        data = DataSection(**{"features": ["age", "chol"], "classes": ["0", "1|2"], **data_keys})
        source = SourceSection(**{"source": "table", "path": name, "label": "num", **keys})
        return load_dataset(source, data, task, tmp_path)

    return load


MISSING = {"chol": ["0", "?"]}


def same(found: torch.Tensor, expected: list[Any]) -> bool:
    return torch.equal(found.nan_to_num(-1), torch.tensor(expected, dtype=found.dtype).nan_to_num(-1))


def test_csv(load: Load) -> None:
    dataset = load(TABLE, missing=MISSING)
    nan = math.nan
    assert dataset.inputs.dtype == dataset.targets.dtype == torch.float32
    assert same(dataset.inputs, [[63, 233], [67, nan], [nan, 250.5], [41, nan]])
    assert same(dataset.targets, [0, 1, 1, 0])
    assert dataset.patients == ("row 1", "row 2", "row 3", "row 4")


@pytest.mark.parametrize(
    "content",
    [
        TABLE.replace(",", ";"),
        TABLE.replace(",", "\t"),
        TABLE.replace("\n", "\r\n"),
        "\ufeff" + TABLE,
        TABLE.replace(",2\n", ",2.0\n"),
        TABLE.replace("\n67", "\n\n67"),
        TABLE.replace("age,chol", " age ,chol"),
        TABLE.removesuffix("\n"),
    ],
)
def test_csv_as_people_save_it(load: Load, content: str) -> None:
    assert load(content, missing=MISSING).fingerprint == load(TABLE, missing=MISSING).fingerprint


def test_parquet_equals_csv(load: Load, tmp_path: Path) -> None:
    frame = pd.DataFrame({"age": [63.0, None], "chol": [233, 250], "num": [0, 2], "who": ["x", "y"]})
    frame.to_parquet(tmp_path / "a.parquet")
    data = DataSection(features=["age", "chol"], classes=["0", "2"])
    source = SourceSection(source="table", path="a.parquet", label="num", patient="who")
    dataset = load_dataset(source, data, BINARY, tmp_path)
    csv = load("age,chol,num,who\n63,233,0,x\n,250,2,y\n", classes=["0", "2"], patient="who")
    assert dataset.fingerprint == csv.fingerprint
    frame.set_index("who").astype({"num": bool}).to_parquet(tmp_path / "a.parquet")
    indexed = load_dataset(source, DataSection(features=["age", "chol"]), BINARY, tmp_path)
    assert indexed.fingerprint == csv.fingerprint


def test_features_come_in_the_order_of_the_run(load: Load) -> None:
    assert load(TABLE, missing=MISSING, features=["chol", "age"]).inputs[0].tolist() == [233, 63]


def test_where_compares_numbers_as_numbers(load: Load) -> None:
    assert load(TABLE, missing=MISSING, where={"place": ["a"]}).patients == ("row 1", "row 3")
    assert load(TABLE, missing=MISSING, where={"num": ["2.0", "1"]}).patients == ("row 2", "row 3")


def test_multiclass_targets(load: Load) -> None:
    dataset = load(TABLE, TaskSection(kind="multiclass", classes=3), classes=["2", "1", "0"], missing={"*": ["?"]})
    assert dataset.targets.dtype == torch.int64
    assert same(dataset.targets, [2, 0, 1, 2])


def test_regression_targets_stay_in_their_unit(load: Load) -> None:
    dataset = load(TABLE, REGRESSION, label="chol", features=["age"], missing=MISSING)
    assert same(dataset.targets, [233, 250.5])
    assert dataset.patients == ("row 1", "row 3")


def test_rows_without_label_are_left_out_only_if_the_file_says_so(load: Load) -> None:
    content = TABLE.replace("a,1\n", "a,\n")
    assert len(load(content, missing={**MISSING, "num": []})) == 3
    with pytest.raises(DataError, match=r"heart\.csv, line 4: no num") as caught:
        load(content, missing=MISSING)
    assert caught.value.number == 403
    assert "missing.num" in caught.value.remedy


def test_shares_of_one_file_are_disjoint_complete_and_stable(load: Load) -> None:
    lines = [f"{row % 80},200,p{row // 3},{row % 2}" for row in range(90)]
    head = "age,chol,who,num\n"
    shares = [(0.0, 0.5), (0.5, 0.8), (0.8, 1.0)]
    splits = [set(load(head + "\n".join(lines), patient="who", share=s).patients) for s in shares]
    assert [len(part) for part in splits] == [15, 9, 6]
    assert len(set.union(*splits)) == 30
    turned = head + "\n".join(reversed(lines))
    assert [set(load(turned, patient="who", share=s).patients) for s in shares] == splits


@pytest.mark.parametrize(
    ("content", "keys", "number", "splits"),
    [
        ("", {}, 401, ["heart.csv is empty"]),
        ("age,chol,place,num\n", {}, 401, ["has no rows"]),
        ("\n" + TABLE, {}, 401, ["heart.csv is empty or has no heading"]),
        (b"age,chol,num\n63,233,0\nJos\xe9,1,1\n", {}, 401, ["line 3", "UTF-8"]),
        (TABLE, {"features": ["age", "weight"]}, 402, ["'weight'", "age, chol, place, num"]),
        (TABLE, {"label": "ill"}, 402, ["'ill'"]),
        (TABLE, {"patient": "who"}, 402, ["'who'"]),
        (TABLE, {"where": {"ward": ["1"]}}, 402, ["'ward'"]),
        (TABLE, {"missing": {"bmi": ["0"]}}, 402, ["'bmi'"]),
        (TABLE.replace("place", "age"), {}, 402, ["more than one column 'age'"]),
        (TABLE, {}, 403, ["heart.csv, line 5, column chol: '?' is not a number", "data.missing"]),
        (TABLE.replace("?", "250 mg"), {}, 403, ["line 5", "'250 mg'", "unit"]),
        (TABLE.replace("?", "1e39"), {}, 403, ["line 5", "'1e39'"]),
        (TABLE.replace("?", "nan"), {}, 403, ["line 5", "'nan'"]),
        (TABLE.replace("\n41", "\n\n41"), {}, 403, ["line 6", "'?'"]),
        (TABLE.replace("67,0,b", '67,0,"b\nb"'), {}, 403, ["line 6", "'?'"]),
        (TABLE.replace("67,0,b", "67,0,0,b"), {}, 403, ["line 3", "Expected 4 fields"]),
        (TABLE.replace("67,0,b", '67,0,"b'), {}, 403, ["EOF inside string"]),
        (TABLE.replace("b,2", "b,5"), {"missing": MISSING}, 403, ["line 3", "num '5'", "(0, 1|2)"]),
        (
            TABLE.replace("b,2", ",2"),
            {"missing": MISSING, "patient": "place"},
            403,
            ["line 3: place is empty"],
        ),
        (TABLE, {"where": {"place": ["c"]}}, 405, ["of 4 rows none is left"]),
    ],
)
def test_errors(load: Load, content: str | bytes, keys: dict[str, Any], number: int, splits: list[str]) -> None:
    with pytest.raises(DataError) as caught:
        load(content, **keys)
    assert caught.value.number == number
    for part in splits:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("keys", "part"),
    [
        ({"features": []}, "data.features is empty"),
        ({"features": ["age", "num"]}, "contains the label 'num'"),
        ({"classes": ["0", "1", "2"]}, "3 entries"),
        ({"classes": ["0", "1|0"]}, "names a label twice"),
        ({"share": (0.5, 0.5)}, "data.share is [0.5, 0.5]"),
    ],
)
def test_configuration_errors(load: Load, keys: dict[str, Any], part: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(TABLE, **{"missing": MISSING, **keys})
    assert caught.value.number == 103
    assert part in caught.value.sentence


def test_a_label_that_is_no_number(load: Load) -> None:
    with pytest.raises(DataError, match="line 2, column place: 'a'") as caught:
        load(TABLE, REGRESSION, label="place")
    assert caught.value.number == 403


def test_missing_file_and_folder_in_its_place(load: Load, tmp_path: Path) -> None:
    for path, part in (("absent.csv", "does not exist"), (".", "directory")):
        with pytest.raises(DataError, match=part) as caught:
            load(TABLE, path=path)
        assert caught.value.number == 401


def test_broken_parquet(load: Load) -> None:
    with pytest.raises(DataError, match="not a readable Parquet file") as caught:
        load("PAR1", name="a.parquet")
    assert caught.value.number == 401


def test_parquet_without_pyarrow(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    def read_parquet(path: Path) -> None:
        raise ImportError("Unable to find a usable engine")

    monkeypatch.setattr(pd, "read_parquet", read_parquet)
    with pytest.raises(DataError, match=r"nightsplit\[parquet\]") as caught:
        load("PAR1", name="a.parquet")
    assert caught.value.number == 401


def test_path_from_the_environment(load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load(TABLE, missing=MISSING)
    monkeypatch.setenv("WARD", str(tmp_path))
    for path in ("$WARD/heart.csv", "${WARD}/heart.csv"):
        assert len(load(TABLE, missing=MISSING, path=path)) == 4
    monkeypatch.delenv("WARD")
    with pytest.raises(DataError, match="WARD is not set") as caught:
        load(TABLE, path="$WARD/heart.csv")
    assert caught.value.number == 408


@pytest.mark.parametrize(
    ("folder", "origin"),
    [
        ("covid_ct", "github.com/UCSD-AI4H/COVID-CT"),
        ("pneumoniamnist", "medmnist.com"),
        ("heart_uci", "archive.ics.uci.edu"),
        ("MURA-v1.1", "stanfordmlgroup.github.io"),
    ],
)
def test_public_sets_say_where_they_come_from(
    load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str, origin: str
) -> None:
    monkeypatch.delenv("NIGHTSPLIT_DATA", raising=False)
    with pytest.raises(DataError) as caught:
        load(TABLE, path=f"$NIGHTSPLIT_DATA/{folder}/x")
    assert caught.value.number == 408
    assert origin in caught.value.remedy
    assert "NIGHTSPLIT_DATA" in caught.value.remedy
    monkeypatch.setenv("NIGHTSPLIT_DATA", str(tmp_path))
    with pytest.raises(DataError) as caught:
        load(TABLE, path=f"$NIGHTSPLIT_DATA/{folder}/x")
    assert caught.value.number == 401
    assert origin in caught.value.remedy


def test_fingerprint_notices_a_change(load: Load) -> None:
    dataset = load(TABLE, missing=MISSING)
    dataset.check_fingerprint(dataset.fingerprint)
    for changed in (TABLE.replace("63", "64"), TABLE.replace("b,2", "b,0")):
        with pytest.raises(DataError, match="fingerprint") as caught:
            load(changed, missing=MISSING).check_fingerprint(dataset.fingerprint)
        assert caught.value.number == 409
    assert dataset.select([1, 0]).fingerprint != dataset.select([0, 1]).fingerprint


NAN = math.nan


def rows(values: list[list[float]]) -> Dataset:
    count = len(values)
    return Dataset(torch.tensor(values), torch.zeros(count), tuple(map(str, range(count))))


def test_site_scaling_fills_with_the_mean() -> None:
    train = rows([[1, 5, NAN], [3, 5, NAN], [NAN, 5, NAN]])
    scaled = Scaling.fit(train, DataSection()).apply(train).inputs
    assert torch.allclose(scaled, torch.tensor([[-1.0, 0, 0], [1, 0, 0], [0, 0, 0]]))


def test_run_scaling() -> None:
    data = DataSection(features=["a", "b"], scaling="run", mean=[1.0, 2.0], spread=[2.0, 4.0])
    train = rows([[3, NAN]])
    assert Scaling.fit(train, data).apply(train).inputs.tolist() == [[1, 0]]
    for wrong in ({"mean": [1.0], "spread": [1.0]}, {"features": ["a", "b"], "mean": [1.0, 2.0], "spread": [1.0, 0.0]}):
        with pytest.raises(ConfigError, match="the data 2 features") as caught:
            Scaling.fit(train, DataSection(scaling="run", **wrong))
        assert caught.value.number == 103


def test_no_scaling_fills_with_the_mean_of_training_patients() -> None:
    train, other = rows([[2, NAN], [4, NAN]]), rows([[NAN, 7]])
    scaling = Scaling.fit(train, DataSection(scaling="none"))
    assert scaling.apply(train).inputs.tolist() == [[2, 0], [4, 0]]
    assert scaling.apply(other).inputs.tolist() == [[3, 7]]


def test_images_are_scaled_per_channel() -> None:
    images = torch.rand(5, 2, 4, 6) * torch.tensor([1.0, 9.0]).view(2, 1, 1) + 3
    dataset = Dataset(images, torch.zeros(5), tuple("abcde"))
    scaled = Scaling.fit(dataset, DataSection()).apply(dataset).inputs
    assert torch.allclose(scaled.mean((0, 2, 3)), torch.zeros(2), atol=1e-5)
    assert torch.allclose(scaled.std((0, 2, 3), correction=0), torch.ones(2), atol=1e-5)


HEART = ["age", "sex", "cp", "trestbps", "chol", "fbs", "restecg"]
HEART += ["thalach", "exang", "oldpeak", "slope", "ca", "thal"]


@needs_data
@pytest.mark.parametrize(
    ("hospital", "count", "ill", "without_chol"),
    [
        ("cleveland", 303, 139, 0),
        ("hungarian", 294, 106, 23),
        ("switzerland", 123, 115, 123),
        ("va", 200, 149, 56),
    ],
)
def test_heart_uci(tmp_path: Path, hospital: str, count: int, ill: int, without_chol: int) -> None:
    path = f"$NIGHTSPLIT_DATA/heart_uci/{hospital}.csv"
    source = SourceSection(source="table", path=path, label="num", missing={"chol": ["0"]})
    data = DataSection(features=HEART, classes=["0", "1|2|3|4"])
    dataset = load_dataset(source, data, BINARY, tmp_path)
    assert dataset.inputs.shape == (count, 13)
    assert dataset.targets.sum() == ill
    assert dataset.inputs[:, 4].isnan().sum() == without_chol
    splits = scale(split(dataset, BINARY, data.validation, data.test, seed=0), data)
    for part in (splits.train, splits.validation, splits.test):
        assert part.inputs.isfinite().all()
        assert set(part.targets.tolist()) == {0, 1}


def test_lipid_panel(tmp_path: Path) -> None:
    frame = load_diabetes(as_frame=True, scaled=False).data
    frame = frame.rename(columns={"s1": "tc", "s2": "ldl", "s3": "hdl", "s4": "tch", "s5": "ltg", "s6": "glu"})
    frame.to_csv(tmp_path / "lipids.csv", index=False)
    source = SourceSection(source="table", path="lipids.csv", label="ldl")
    data = DataSection(features=["age", "tc", "hdl", "ltg"])
    dataset = load_dataset(source, data, REGRESSION, tmp_path)
    assert dataset.inputs.shape == (442, 4)
    assert dataset.targets.mean().item() == pytest.approx(frame.ldl.mean(), rel=1e-5)
