"""Tables, one row per sample."""

from collections.abc import Sequence
from pathlib import Path

import torch

from nightsplit.shared.config.run import DataSection
from nightsplit.shared.errors import ConfigError
from nightsplit.site_worker.config import SourceSection
from nightsplit.site_worker.data.cells import read_cells
from nightsplit.site_worker.data.rows import Rows, numbers


def open_table(path: Path, source: SourceSection, data: DataSection) -> Rows:
    """The rows of a table; inputs are its `data.features`, float32 (n, features), NaN where missing.

    Raises:
        ConfigError: 103 no features, or the label is one of them.
        DataError: 401 missing or unreadable, 402 absent column, 403 a value that is no number.
    """
    if not data.features or source.label in data.features:
        what = f"contains the label {source.label!r}" if data.features else "is empty"
        raise ConfigError(103, f"run.toml: data.features {what}.", "list the columns that the model may see.")
    columns, place = read_cells(path)

    def read(chosen: Sequence[int]) -> torch.Tensor:
        everywhere = source.missing.get("*", [])
        features = [numbers(rows, f, chosen, [*everywhere, *source.missing.get(f, [])]) for f in data.features]
        return torch.tensor(features, dtype=torch.float32).T.contiguous()

    rows = Rows(path, columns, source.label, source.patient, place, read)
    for name in data.features:
        rows.column(name)
    return rows
