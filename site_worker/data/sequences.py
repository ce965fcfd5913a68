"""Sequences of images as samples: evenly spaced frames of a volume, a series or a film."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch

from nightsplit.shared.errors import ConfigError, DataError
from nightsplit.site_worker.data.rows import Rows, parse_numbers


def group_sequences(rows: Rows) -> Mapping[str, Sequence[int]]:
    """Group the rows of an index by its column `sequence`, in the order of its column `frame`.

    DataError 402 for a missing column, 403 for an empty cell, or a frame that is not a number.
    """
    names, order = rows.column("sequence"), parse_numbers(rows, "frame", range(len(rows)), ())
    sequences: defaultdict[str, list[int]] = defaultdict(list)
    for row in sorted(range(len(rows)), key=order.__getitem__):
        if not names[row].strip() or math.isnan(order[row]):
            remedy = "fill in both; a single image is a sequence of its own."
            raise DataError(403, f"{rows.location(row)}: sequence or frame is empty.", remedy)
        sequences[names[row]].append(row)
    return sequences


def sample_frames(rows: Rows, frames: int) -> Rows:
    """Return one row per sequence of the source; inputs are float32 (n, frames, height, width).

    A sequence is cut into `frames` equal parts, and the image in the middle of each part is a frame; a shorter
    sequence repeats images. The cells are those of the first image.

    Raises:
        ConfigError: 103 the source has no sequences.
        DataError: 403 images of one sequence differ in label or patient.
    """
    if rows.sequences is None:
        remedy = "remove data.frames, or read volumes, dicom, or images with an index."
        raise ConfigError(103, f"run.toml: data.frames is set, but {rows.file} has no sequences.", remedy)
    sequences = list(rows.sequences.values())
    for name in filter(None, (rows.label, rows.patient)):
        cells = rows.column(name)
        for row, first in ((row, sequence[0]) for sequence in sequences for row in sequence):
            if cells[row] != cells[first]:
                one, other = rows.location(row), rows.location(first)
                remedy = "correct the index: the images of a sequence have one label and one patient."
                raise DataError(403, f"{one}: its {name} is not that of {other}, in the same sequence.", remedy)

    def read(indices: Sequence[int]) -> torch.Tensor:
        images = rows.read([sequences[i][k] for i in indices for k in space_evenly(len(sequences[i]), frames)])
        return images.view(len(indices), frames, *images.shape[-2:])

    columns = {name: [cells[sequence[0]] for sequence in sequences] for name, cells in rows.columns.items()}
    return Rows(rows.file, columns, rows.label, rows.patient, lambda row: rows.location(sequences[row][0]), read)


def space_evenly(count: int, frames: int) -> list[int]:
    """Return the middles of `frames` equal parts of 0, 1 ... count - 1: [1, 4, 7] for 9 and 3."""
    return [(2 * i + 1) * count // (2 * frames) for i in range(frames)]
