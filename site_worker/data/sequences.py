"""Several images as one sample: frames that are evenly spaced over a volume, a series or a film."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch

from nightsplit.shared.errors import ConfigError, DataError
from nightsplit.site_worker.data.rows import Rows, numbers


def indexed(rows: Rows) -> Mapping[str, Sequence[int]]:
    """The rows of each sequence, by the columns `sequence` and `frame` of an index.

    Raises:
        DataError: 402 absent column, 403 an empty cell, or a frame that is no number.
    """
    names, order = rows.column("sequence"), numbers(rows, "frame", range(len(rows)), ())
    sequences: defaultdict[str, list[int]] = defaultdict(list)
    for row in sorted(range(len(rows)), key=order.__getitem__):
        if not names[row].strip() or math.isnan(order[row]):
            remedy = "fill both in; an image that stands alone is a sequence of its own."
            raise DataError(403, f"{rows.place(row)}: sequence or frame is empty.", remedy)
        sequences[names[row]].append(row)
    return sequences


def framed(rows: Rows, frames: int) -> Rows:
    """One row per sequence of the source; inputs are float32 (n, frames, height, width).

    A sequence is cut into `frames` equal parts, and the image in the middle of each part is taken; one that
    is shorter shows images more than once. Its cells are those of its first image.

    Raises:
        ConfigError: 103 the source has no sequences.
        DataError: 403 images of one sequence differ in label or patient.
    """
    if rows.sequences is None:
        remedy = "leave data.frames out, or read volumes, dicom, or images with an index."
        raise ConfigError(103, f"run.toml: data.frames is set, and {rows.file} holds no sequences.", remedy)
    members = list(rows.sequences.values())
    for name in filter(None, (rows.label, rows.patient)):
        cells = rows.column(name)
        odd = next(((row, of[0]) for of in members for row in of if cells[row] != cells[of[0]]), None)
        if odd is not None:
            first, second = map(rows.place, odd)
            remedy = "correct the index: the images of a sequence have one label and one patient."
            raise DataError(403, f"{first}: its {name} is not that of {second}, and both are of one sequence.", remedy)

    def read(chosen: Sequence[int]) -> torch.Tensor:
        images = rows.read([members[i][k] for i in chosen for k in spaced(len(members[i]), frames)])
        return images.view(len(chosen), frames, *images.shape[-2:])

    columns = {name: [cells[of[0]] for of in members] for name, cells in rows.columns.items()}
    return Rows(rows.file, columns, rows.label, rows.patient, lambda row: rows.place(members[row][0]), read)


def spaced(count: int, frames: int) -> list[int]:
    """The middles of `frames` equal parts of 0, 1 ... count - 1: [1, 4, 7] for 9 and 3."""
    return [(2 * i + 1) * count // (2 * frames) for i in range(frames)]
