"""Conversion of the labels in files to targets.

`data.classes` lists the labels in the order of the model's outputs. An entry may name several labels
that count as one class: ["0", "1|2|3|4"] makes every stage of a disease the positive class.
"""

from collections.abc import Sequence

import torch

from nightsplit.shared.config.run import DataSection, TaskSection
from nightsplit.shared.errors import ConfigError, DataError
from nightsplit.site_worker.data.rows import Rows, normalize, parse_numbers


def class_numbers(data: DataSection, task: TaskSection) -> dict[str, int]:
    """Return the class of every label in `data.classes` ("0", "1"... if it is empty); empty for tasks without classes.

    Raises:
        ConfigError: 103 the number of entries is not that of the classes, or a label is listed twice.
    """
    if task.kind in ("regression", "segmentation"):
        return {}
    count = 2 if task.kind == "binary" else task.classes
    classes = data.classes or [str(number) for number in range(count)]
    if len(classes) != count:
        remedy = 'give one entry per class; an entry may name several labels, e.g. classes = ["0", "1|2|3|4"].'
        raise ConfigError(103, f"run.toml: data.classes has {len(classes)} entries, the task {count} classes.", remedy)
    labels = [(normalize(label), number) for number, entry in enumerate(classes) for label in entry.split("|")]
    if len(dict(labels)) != len(labels):
        raise ConfigError(103, "run.toml: data.classes names a label twice.", "name every label once.")
    return dict(labels)


def read_targets(rows: Rows, indices: Sequence[int], data: DataSection, task: TaskSection) -> torch.Tensor:
    """Read the targets of rows, in the format of `Dataset`.

    Raises:
        ConfigError: 103 see `class_numbers`.
        DataError: 402 no such label column, 403 a label that is not a number (regression) or not listed,
            412 masks without any foreground.
    """
    if rows.read_masks is not None:
        masks = rows.read_masks(indices)
        if not masks.any():
            remedy = "correct data.masks or data.foreground in site.toml."
            raise DataError(412, f"{rows.file}: no pixel of its {len(indices)} masks is foreground.", remedy)
        return masks
    if task.kind == "regression":
        return torch.tensor(parse_numbers(rows, rows.label, indices, ()), dtype=torch.float32)
    classes = class_numbers(data, task)
    labels = rows.column(rows.label)
    for row in indices:
        if normalize(labels[row]) not in classes:
            listed = ", ".join(data.classes or classes)
            sentence = f"{rows.location(row)}: {rows.label} {labels[row]!r} is not one of data.classes ({listed})."
            remedy = 'correct it, or list it in data.classes of run.toml ("1|2" counts two labels as one class).'
            raise DataError(403, sentence, remedy)
    dtype = torch.float32 if task.kind == "binary" else torch.int64
    return torch.tensor([classes[normalize(labels[row])] for row in indices], dtype=dtype)
