"""What a source lists before any input is read: rows, and columns of text.

    reader (table, images, ...) ──▶ Rows ──▶ source.py keeps some rows ──▶ Rows.read(kept) ──▶ inputs

Everything is text until it is needed as a number, so that an error can quote what the file says.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from nightsplit.shared.errors import DataError

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
_EXACT_DIGITS = 15  # what a float64 holds; longer numbers (identifiers) compare as text


def plain(text: str) -> str:
    """The text by which values compare: "1", "1.0" and "01" are one number, " a" and "a" one text."""
    text = text.strip()
    if len(text) > _EXACT_DIGITS or not _NUMBER.fullmatch(text):
        return text
    number = float(text)
    return str(int(number)) if number.is_integer() else repr(number)


def absent(file: Path, kind: str, name: str, there: Iterable[str]) -> DataError:
    """Error 402 for a column or array that a file does not have."""
    remedy = "correct the name in [data] of site.toml, or in data.features of run.toml."
    return DataError(402, f"{file} has no {kind} {name!r}; it has {', '.join(there) or 'none'}.", remedy)


Read = Callable[[Sequence[int]], torch.Tensor]
"""Reads what the given rows have, float32 (len(rows), ...)."""


@dataclass(frozen=True)
class Rows:
    """The rows of one source, in the order of its file.

    Attributes:
        file: the table, index, folder or .npz file.
        columns: cells as text, one sequence of equal length per column.
        label: column of the label.
        patient: column of the patient; None: every row is a patient.
        place: where a row stands, for people: "heart.csv, line 7".
        read: inputs of the given rows.
        sequences: rows that are frames of one volume, series or film, in order; None: the source has none.
        read_masks: masks of the given rows: float32 (len(rows), height, width) of 0 and 1; None: there are none.
    """

    file: Path
    columns: Mapping[str, Sequence[str]]
    label: str
    patient: str | None
    place: Callable[[int], str]
    read: Read
    sequences: Mapping[str, Sequence[int]] | None = None
    read_masks: Read | None = None

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def column(self, name: str) -> Sequence[str]:
        """Cells of a column; DataError 402, with the columns there are, where it is absent."""
        if name not in self.columns:
            raise absent(self.file, "column", name, self.columns)
        return self.columns[name]


def numbers(rows: Rows, name: str, chosen: Sequence[int], missing: Iterable[str]) -> list[float]:
    """The cells of a column as numbers, NaN where a cell is empty or one of `missing`.

    Raises:
        DataError: 402 absent column, 403 a cell that is no finite number.
    """
    cells = rows.column(name)
    absent_values = {"", *map(plain, missing)}
    values = {
        cell: float("nan") if plain(cell) in absent_values else _number(cell) for cell in {cells[i] for i in chosen}
    }
    for row in chosen:
        if values[cells[row]] is None:
            what = f"{rows.place(row)}, column {name}: {cells[row]!r} is no number."
            listed = "list it in data.missing of site.toml if it means not measured."
            raise DataError(403, what, f"write it with a point and without a unit, or {listed}")
    return [value for row in chosen if (value := values[cells[row]]) is not None]


def _number(text: str) -> float | None:
    """The number, if a float32 can hold it."""
    if not _NUMBER.fullmatch(text.strip()):
        return None
    number = float(text)
    return number if abs(number) <= torch.finfo(torch.float32).max else None
