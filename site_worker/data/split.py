"""Division of patients into training, validation and test.

Patients are ordered by a hash of their name and the seed. The order does not depend on the order of the file, on the
platform or on a library's random generator, and adding a patient later does not reorder the others.
"""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

from nightsplit.shared.config.run import TaskSection
from nightsplit.shared.errors import DataError
from nightsplit.site_worker.data.dataset import Dataset, Splits


def shuffled(patients: Iterable[str], seed: int | str) -> list[str]:
    """Return the distinct names in an order that is a function of names and seed."""
    return sorted(set(patients), key=lambda name: (hashlib.sha256(f"{seed}/{name}".encode()).digest(), name))


def split(dataset: Dataset, task: TaskSection, validation: float, test: float, seed: int) -> Splits:
    """Divide a dataset by patient; the rows of a patient stay together, in the dataset's order.

    For classification the splits are stratified as far as whole patients allow, and every class keeps a patient in
    training. A patient's class is the most frequent class of its rows (the higher of two equally frequent ones).

    `validation` and `test` are shares of the patients, 0 for none; `seed` is the run's.

    Raises:
        DataError: 405 too few patients, 404 a single class in the training split.
    """
    strata = _stratify(dataset, task, seed)
    sizes = [len(names) for names in strata]
    patients, held_out = sum(sizes), (validation > 0) + (test > 0)
    needed = max(1, len(strata)) + held_out
    if patients < needed:
        parts = f"{needed - held_out} for training (one per class), one for each of {held_out} held-out splits"
        sentence = f"the site has {patients} of the {needed} patients needed: {parts}."
        raise DataError(405, sentence, "add patients, or set data.validation or data.test to 0 in run.toml.")
    room = patients - len(strata)  # every class keeps a patient in training
    tests = min(max(round(patients * test), 1), room - (validation > 0)) if test else 0
    validations = min(max(round(patients * validation), 1), room - tests) if validation else 0

    free = [size - 1 for size in sizes]
    in_test = _apportion(tests, sizes, free)
    in_validation = _apportion(validations, sizes, [left - taken for left, taken in zip(free, in_test, strict=True)])
    part_of: dict[str, str] = {}
    for names, n_test, n_validation in zip(strata, in_test, in_validation, strict=True):
        part_of |= dict.fromkeys(names, "train")
        part_of |= dict.fromkeys(names[: n_test + n_validation], "validation")
        part_of |= dict.fromkeys(names[:n_test], "test")

    def rows_of(part: str) -> list[int]:
        return [row for row, patient in enumerate(dataset.patients) if part_of[patient] == part]

    splits = Splits(*(dataset.select(rows_of(part)) for part in ("train", "validation", "test")))
    if _has_classes(task):
        _check_classes(splits.train)
    return splits


def _has_classes(task: TaskSection) -> bool:
    return task.kind in ("binary", "multiclass")


def _stratify(dataset: Dataset, task: TaskSection, seed: int) -> list[list[str]]:
    """Return the shuffled patients of each class, in the order of classes; one list for a task without classes."""
    if not _has_classes(task):
        return [shuffled(dataset.patients, f"split/{seed}")]
    labels: defaultdict[str, Counter[int]] = defaultdict(Counter)
    for patient, target in zip(dataset.patients, dataset.targets.tolist(), strict=True):
        labels[patient][int(target)] += 1
    strata: defaultdict[int, list[str]] = defaultdict(list)
    for patient, counts in labels.items():
        strata[max(counts, key=lambda label: (counts[label], label))].append(patient)
    return [shuffled(strata[label], f"split/{seed}") for label in sorted(strata)]


def _apportion(total: int, sizes: Sequence[int], room: Sequence[int]) -> list[int]:
    """Apportion `total` to `sizes` by largest remainder, at most `room` each; the sum of `room` is at least `total`."""
    exact = [total * size / sum(sizes) for size in sizes]
    counts = [min(int(share), free) for share, free in zip(exact, room, strict=True)]
    while sum(counts) < total:
        open_to = [i for i, free in enumerate(room) if counts[i] < free]
        counts[max(open_to, key=lambda i: exact[i] - counts[i])] += 1
    return counts


def _check_classes(train: Dataset) -> None:
    only, *others = {int(target) for target in train.targets.tolist()}
    if not others:
        sentence = f"all {len(train)} training rows are of class {only} (entry {only + 1} of data.classes)."
        remedy = "train this site's patients together with those of another site."
        raise DataError(404, sentence, f"check data.label and data.classes, add patients of another class, or {remedy}")
