"""The rows of a source before any input is read: columns of text, and functions that read inputs and masks.

    reader (table, images, ...) ──▶ Rows ──▶ source.py selects rows ──▶ Rows.read(indices) ──▶ inputs

Cells stay text until they are needed as numbers, so that an error can quote the file.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from nightsplit.shared.errors import DataError

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
_EXACT_DIGITS = 15  # digits that a float64 holds; longer numbers (identifiers) are compared as text


def normalize(text: str) -> str:
    """Return the text by which values are compared: "1", "1.0" and "01" are equal, and so are " a" and "a"."""
    text = text.strip()
    if len(text) > _EXACT_DIGITS or not _NUMBER.fullmatch(text):
        return text
    number = float(text)
    return str(int(number)) if number.is_integer() else repr(number)


def missing_name_error(file: Path, kind: str, name: str, names: Iterable[str]) -> DataError:
    """Return error 402 for a column or array that a file does not have."""
    remedy = "correct the name in [data] of site.toml, or in data.features of run.toml."
    return DataError(402, f"{file} has no {kind} {name!r}; it has {', '.join(names) or 'none'}.", remedy)


Reader = Callable[[Sequence[int]], torch.Tensor]
"""Function from the indices of rows to their tensor, float32 (len(indices), ...)."""


@dataclass(frozen=True)
class Rows:
    """Rows of one source, in the order of its file.

    Attributes:
        file: the table, index, folder or .npz file.
        columns: cells as text, one sequence of equal length per column.
        label: column of the label.
        patient: column of the patient; None: every row is a patient.
        location: location of a row, for error texts: "heart.csv, line 7".
        read: reads inputs.
        sequences: rows that are frames of one volume, series or film, in order; None: no sequences.
        read_masks: reads masks, float32 (len(indices), height, width) of 0 and 1; None: no masks.
    """

    file: Path
    columns: Mapping[str, Sequence[str]]
    label: str
    patient: str | None
    location: Callable[[int], str]
    read: Reader
    sequences: Mapping[str, Sequence[int]] | None = None
    read_masks: Reader | None = None

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def column(self, name: str) -> Sequence[str]:
        """Return the cells of a column; DataError 402, with the names of all columns, if it is missing."""
        if name not in self.columns:
            raise missing_name_error(self.file, "column", name, self.columns)
        return self.columns[name]


def parse_numbers(rows: Rows, name: str, indices: Sequence[int], missing: Iterable[str]) -> list[float]:
    """Parse the cells of a column, to NaN if empty or one of `missing`; DataError 402, or 403 for no finite number."""
    cells = rows.column(name)
    missing = {"", *map(normalize, missing)}
    distinct = {cells[row] for row in indices}
    values = {cell: float("nan") if normalize(cell) in missing else _parse_number(cell) for cell in distinct}
    numbers = []
    for row in indices:
        number = values[cells[row]]
        if number is None:
            sentence = f"{rows.location(row)}, column {name}: {cells[row]!r} is not a number."
            remedy = "list it in data.missing of site.toml if it means not measured."
            raise DataError(403, sentence, f"write it with a point and without a unit, or {remedy}")
        numbers.append(number)
    return numbers


def _parse_number(text: str) -> float | None:
    """Return the number, or None if it is not one or too large for a float32."""
    if not _NUMBER.fullmatch(text.strip()):
        return None
    number = float(text)
    return number if abs(number) <= torch.finfo(torch.float32).max else None
