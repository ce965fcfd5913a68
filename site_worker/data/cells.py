"""The cells of a CSV file (comma, semicolon or tab) or a Parquet file, as text."""

import io
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path

import pandas as pd

from nightsplit.shared.errors import DataError


def read_cells(path: Path) -> tuple[dict[str, list[str]], Callable[[int], str]]:
    """Read all cells of a CSV or Parquet file as text, by column, and a function from a row to its location.

    Raises:
        DataError: 401 missing, unreadable, empty or not UTF-8, 402 two columns with the same name,
            403 a line with more cells than the heading.
    """
    try:
        heading, cells, lines = _read_parquet(path) if path.suffix.lower() == ".parquet" else _read_csv(path)
    except OSError as error:
        remedy = "check data.path in site.toml, and the permissions of the file."
        raise DataError(401, f"{path}: {error.strerror or error}.", remedy) from None
    if len(set(heading)) != len(heading):
        duplicate = next(name for name in heading if heading.count(name) > 1)
        raise DataError(402, f"{path} has more than one column {duplicate!r}.", "rename one of them.")
    if not cells:
        raise DataError(401, f"{path} has no rows.", "check that the export was complete.")
    columns = {name: [row[i] for row in cells] for i, name in enumerate(heading)}
    unit = "row" if path.suffix.lower() == ".parquet" else "line"
    return columns, lambda row: f"{path}, {unit} {lines[row]}"


Cells = tuple[list[str], list[list[str]], list[int]]  # heading, cells by row, line or row numbers from 1


def _read_csv(path: Path) -> Cells:
    content = path.read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(401, f"{path}, line {line}: not UTF-8 text.", "save the table as CSV, UTF-8.") from None
    first = text.partition("\n")[0]
    if not first.strip():
        raise DataError(401, f"{path} is empty or has no heading.", "check that the export was complete.")
    separator = max(",;\t", key=first.count)
    try:
        # Without header=None pandas would rename columns, and read an extra column as an index.
        frame = pd.read_csv(
            io.StringIO(text), sep=separator, header=None, dtype=str, na_filter=False, skip_blank_lines=False
        ).fillna("")
    except ValueError as error:  # ParserError, EmptyDataError
        reason = str(error).rpartition("C error: ")[2].strip()
        remedy = "correct that line: look for an open quote or an extra separator."
        raise DataError(403, f"{path}: {reason}.", remedy) from None
    heading, *cells = frame.to_numpy().tolist()
    # Line numbers as an editor shows them: a quoted cell may span lines, and blank lines are skipped.
    heights = [1 + sum(cell.count("\n") for cell in row) for row in [heading, *cells]]
    lines = list(accumulate(heights, initial=1))[1:]  # without that of the heading
    filled = [i for i, row in enumerate(cells) if any(cell.strip() for cell in row)]
    return [name.strip() for name in heading], [cells[i] for i in filled], [lines[i] for i in filled]


def _read_parquet(path: Path) -> Cells:
    if not path.is_file():
        raise FileNotFoundError(2, "No such file")
    try:
        frame = pd.read_parquet(path)
    except ImportError:
        remedy = "pip install nightsplit[parquet], or save as CSV."
        raise DataError(401, f"{path} is a Parquet file, and pyarrow is not installed.", remedy) from None
    except Exception as error:  # pyarrow and pandas have no common exception for a broken file
        sentence = f"{path} is not a readable Parquet file ({type(error).__name__})."
        raise DataError(401, sentence, "export it again.") from None
    if frame.index.names != [None]:
        frame = frame.reset_index()
    cells = [[_to_text(value) for value in row] for row in frame.astype(object).to_numpy().tolist()]
    return [str(name) for name in frame.columns], cells, list(range(1, len(cells) + 1))


def _to_text(value: object) -> str:
    if isinstance(value, bool):
        return str(int(value))
    return "" if value is None or value is pd.NA or value != value else str(value)  # NaN differs from itself
