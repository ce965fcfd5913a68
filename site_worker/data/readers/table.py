"""Tables, one row per sample."""

from collections.abc import Sequence
from pathlib import Path

import torch

from nightsplit.shared.config.run import DataSection
from nightsplit.shared.errors import ConfigError
from nightsplit.site_worker.config import SourceSection
from nightsplit.site_worker.data.cells import read_cells
from nightsplit.site_worker.data.rows import Rows, parse_numbers


def open_table(path: Path, source: SourceSection, data: DataSection) -> Rows:
    """Open a table; its rows have the inputs `data.features`, float32 (n, features), NaN where missing.

    Raises:
        ConfigError: 103 no features, or the label is one of them.
        DataError: 401 missing or unreadable, 402 missing column, 403 a value that is not a number.
    """
    if not data.features or source.label in data.features:
        problem = f"contains the label {source.label!r}" if data.features else "is empty"
        raise ConfigError(103, f"run.toml: data.features {problem}.", "list the columns that the model may see.")
    columns, location = read_cells(path)

    def read(indices: Sequence[int]) -> torch.Tensor:
        common = source.missing.get("*", [])
        features = [parse_numbers(rows, f, indices, [*common, *source.missing.get(f, [])]) for f in data.features]
        return torch.tensor(features, dtype=torch.float32).T.contiguous()

    rows = Rows(path, columns, source.label, source.patient, location, read)
    for name in data.features:
        rows.column(name)
    return rows
