import random

import pytest
import torch

from nightsplit.shared.config.run import TaskSection
from nightsplit.shared.errors import DataError
from nightsplit.site_worker.data.dataset import Dataset, Splits
from nightsplit.site_worker.data.split import shuffled, split

BINARY, REGRESSION = TaskSection(kind="binary"), TaskSection(kind="regression")
MULTICLASS = TaskSection(kind="multiclass", classes=3)


def dataset(labels: dict[str, list[int]], task: TaskSection = BINARY) -> Dataset:
    """Rows of the given patients; an input is its own row number."""
    patients = [name for name, values in labels.items() for _ in values]
    dtype = torch.int64 if task.kind == "multiclass" else torch.float32
    targets = torch.tensor([value for values in labels.values() for value in values], dtype=dtype)
    return Dataset(torch.arange(len(patients)).float().unsqueeze(1), targets, tuple(patients))


def many(count: int = 60, task: TaskSection = BINARY) -> Dataset:
    """Patients with one to four rows, a third of them positive."""
    return dataset({f"p{i}": [int(i % 3 == 0)] * (1 + i % 4) for i in range(count)}, task)


def names(splits: Splits) -> tuple[set[str], set[str], set[str]]:
    return set(splits.train.patients), set(splits.validation.patients), set(splits.test.patients)


def test_patients_are_never_divided_and_no_row_is_lost() -> None:
    whole = many()
    splits = split(whole, BINARY, 0.15, 0.2, seed=0)
    train, validation, test = names(splits)
    assert (len(train), len(validation), len(test)) == (39, 9, 12)
    assert len(train | validation | test) == 60
    found = torch.cat([part.inputs for part in (splits.train, splits.validation, splits.test)])
    assert torch.equal(found.sort(0).values, whole.inputs)
    for part in (splits.train, splits.validation, splits.test):
        assert torch.equal(part.inputs, part.inputs.sort(0).values)
        for row, patient in zip(part.inputs.int().flatten().tolist(), part.patients, strict=True):
            assert whole.patients[row] == patient


def test_parts_are_stratified_by_patient() -> None:
    whole = many()
    for part in names(split(whole, BINARY, 0.15, 0.2, seed=3)):
        positive = {p for p, target in zip(whole.patients, whole.targets, strict=True) if target} & part
        assert len(positive) == round(len(part) / 3)


@pytest.mark.parametrize("task", [BINARY, REGRESSION])
def test_a_pure_function_of_patients_and_seed(task: TaskSection) -> None:
    whole = many(task=task)
    order = list(range(len(whole)))
    random.Random(0).shuffle(order)
    first = names(split(whole, task, 0.15, 0.2, seed=7))
    assert names(split(whole.select(order), task, 0.15, 0.2, seed=7)) == first
    assert names(split(whole, task, 0.15, 0.2, seed=8)) != first


def test_the_order_is_the_same_on_every_machine() -> None:
    assert "".join(shuffled("abcdefa", seed=1)) == "defabc"


def test_a_part_without_share_is_empty() -> None:
    train, validation, test = names(split(many(), BINARY, 0.0, 0.2, seed=0))
    assert (len(train), len(validation), len(test)) == (48, 0, 12)
    assert names(split(many(), BINARY, 0.0, 0.0, seed=0))[0] == set(many().patients)


def test_a_patient_counts_as_its_most_frequent_class() -> None:
    mixed = {f"p{i}": [1, 1, 0] if i < 10 else [0, 0, 1] for i in range(20)}
    test = names(split(dataset(mixed), BINARY, 0.0, 0.2, seed=0))[2]
    assert sum(int(name[1:]) < 10 for name in test) == 2


@pytest.mark.parametrize("count", range(4, 12))
def test_small_sites_train_on_every_class(count: int) -> None:
    rare = dataset({f"p{i}": [int(i == 0)] for i in range(count)})
    for seed in range(5):
        splits = split(rare, BINARY, 0.4, 0.45, seed)
        assert set(splits.train.targets.tolist()) == {0, 1}
        assert min(len(splits.validation), len(splits.test)) >= 1


def test_a_class_with_a_single_patient_is_for_training() -> None:
    whole = dataset({f"p{i}": [0 if i == 0 else 1 + i % 2] for i in range(20)}, MULTICLASS)
    splits = split(whole, MULTICLASS, 0.15, 0.2, seed=0)
    assert "p0" in splits.train.patients
    assert splits.train.targets.dtype == torch.int64


@pytest.mark.parametrize(
    ("labels", "task", "validation", "test", "needed"),
    [
        ({"a": [0, 1], "b": [1], "c": [0]}, BINARY, 0.15, 0.2, 4),
        ({"a": [0], "b": [1]}, BINARY, 0.0, 0.2, 3),
        ({"a": [0], "b": [1]}, REGRESSION, 0.15, 0.2, 3),
        ({}, REGRESSION, 0.0, 0.0, 1),
    ],
)
def test_too_few_patients(
    labels: dict[str, list[int]], task: TaskSection, validation: float, test: float, needed: int
) -> None:
    with pytest.raises(DataError, match=f"{len(labels)} of the {needed} patients needed") as caught:
        split(dataset(labels, task), task, validation, test, seed=0)
    assert caught.value.number == 405


@pytest.mark.parametrize("task", [BINARY, MULTICLASS])
def test_single_class(task: TaskSection) -> None:
    with pytest.raises(DataError, match=r"class 1 \(entry 2 of data.classes\)") as caught:
        split(dataset({f"p{i}": [1] for i in range(20)}, task), task, 0.15, 0.2, seed=0)
    assert caught.value.number == 404


def test_regression_needs_no_classes() -> None:
    splits = split(dataset({f"p{i}": [1] for i in range(20)}), REGRESSION, 0.15, 0.2, seed=0)
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (13, 3, 4)


def test_lengths_must_agree() -> None:
    with pytest.raises(ValueError, match="differ in length"):
        Dataset(torch.zeros(2, 1), torch.zeros(2), ("a",))
