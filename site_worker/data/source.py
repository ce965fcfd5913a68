"""From [data] of site.toml to a `Dataset`.

    locate ──▶ open (table, images, ...) ──▶ frames ──▶ where ──▶ labelled ──▶ share ──▶ targets, inputs

Rows are chosen before any input is read, so a site with a share of a large folder reads its own images only.
"""

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from nightsplit.shared.config.run import DataSection, RunConfig, TaskSection
from nightsplit.shared.errors import ConfigError, DataError
from nightsplit.site_worker.config import SourceSection
from nightsplit.site_worker.data.dataset import Dataset, Splits
from nightsplit.site_worker.data.labels import class_numbers, read_targets
from nightsplit.site_worker.data.public import how_to_get
from nightsplit.site_worker.data.readers.arrays import open_arrays
from nightsplit.site_worker.data.readers.images import open_images
from nightsplit.site_worker.data.readers.table import open_table
from nightsplit.site_worker.data.rows import Rows, plain
from nightsplit.site_worker.data.sequences import framed
from nightsplit.site_worker.data.split import shuffled, split

_VARIABLE = re.compile(r"\$(?:(\w+)|\{(\w+)\})")


def read_splits(source: SourceSection, run: RunConfig, base: Path) -> Splits:
    """A site's data, read and divided by patient as the run asks for; not scaled. Raises as what it calls."""
    dataset = load_dataset(source, run.data, run.task, base)
    return split(dataset, run.task, run.data.validation, run.data.test, run.run.seed)


def load_dataset(source: SourceSection, data: DataSection, task: TaskSection, base: Path) -> Dataset:
    """Read a site's data.

    Rows are kept that `where` selects and whose patient is in `share`. A row without a label is an
    error, unless `missing` names the label's column (its list may be empty): then it is left out.
    For segmentation the masks take the place of the labels.

    Inputs are as read, neither scaled nor imputed; targets as `Dataset` says; a patient's name is the cell of the
    patient column, or "row 7" where every row is a patient. A relative path starts at `base`, the folder of site.toml.

    Raises:
        ConfigError: 103 keys of [data] do not make sense, alone or with the task.
        DataError: 401-403, 405-408 and 410-412, see `TITLES`.
    """
    rows = _open(locate(source.path, base), source, data, task)
    if data.frames is not None:
        rows = framed(rows, data.frames)
    for name in source.missing:
        if name != "*":
            rows.column(name)
    chosen = _where(rows, source)
    if task.kind != "segmentation":
        chosen = _labelled(rows, chosen, source)
    patients = _patients(rows, chosen)
    mine = _share(patients.values(), source.share)
    chosen = [row for row in chosen if patients[row] in mine]
    if not chosen:
        what = f"{rows.file}: of {len(rows)} rows none is left after data.where, data.missing and data.share."
        raise DataError(405, what, "compare data.where in site.toml with the file's values.")
    targets = read_targets(rows, chosen, data, task)
    return Dataset(rows.read(chosen), targets, tuple(patients[row] for row in chosen))


def locate(path: str, base: Path) -> Path:
    """The file or folder that `path` means: `$NAME` from the environment, relative to `base`.

    Raises:
        DataError: 408 the variable is not set, 401 nothing is there; both tell where public data comes from.
    """
    origin = how_to_get(path)
    for first, second in _VARIABLE.findall(path):
        name = first or second
        if not os.environ.get(name):
            own = f"set {name} to the folder that your data is in."
            remedy = f"{origin}; then set {name} to the folder above it." if origin else own
            raise DataError(408, f"data.path is {path!r}, and the environment variable {name} is not set.", remedy)
    found = base / Path(_VARIABLE.sub(lambda match: os.environ[match[1] or match[2]], path)).expanduser()
    if not found.exists():
        raise DataError(401, f"{found} does not exist.", f"{origin}." if origin else "correct data.path in site.toml.")
    return found


def _open(path: Path, source: SourceSection, data: DataSection, task: TaskSection) -> Rows:
    masks = _masks(source, data, task)
    if source.source == "table":
        return open_table(path, source, data)
    if source.source == "arrays":
        return open_arrays(path, source, data, masks)
    if task.kind == "regression" and source.index is None:
        remedy = "set data.index in site.toml to a CSV with the columns file and label."
        raise DataError(402, f"{path} has no index with the figures to predict; folders only name classes.", remedy)
    classes = class_numbers(data, task)
    if source.source == "images":
        return open_images(path, source, data, classes)
    try:
        from nightsplit.site_worker.data.readers.dicom import open_dicom
        from nightsplit.site_worker.data.readers.volumes import open_volumes
    except ImportError as error:
        what = f'{path}: source = "{source.source}" needs the package {error.name}, which is not installed.'
        raise DataError(401, what, "pip install nightsplit[medical].") from None
    if source.source == "dicom":
        return open_dicom(path, source, data, classes)
    return open_volumes(path, source, data, classes, masks)


def _masks(source: SourceSection, data: DataSection, task: TaskSection) -> str | None:
    """Where the masks are, with a task that has some; ConfigError 103 where there are none, or they cannot follow."""
    if task.kind != "segmentation":
        return None
    what = None
    if source.source not in ("volumes", "arrays"):
        what = f'site.toml: data.source = "{source.source}" has no masks; segmentation reads volumes and arrays'
    elif source.masks is None:
        what = "site.toml: data.masks is not set, and the task is segmentation"
    elif data.frames is not None:
        what = "run.toml: data.frames makes a sequence of images one sample, and a mask belongs to one image"
    elif moved := [name for name in data.augment if name != "contrast"]:
        what = f"run.toml: data.augment moves the images ({', '.join(moved)}), and their masks would not follow"
    if what:
        raise ConfigError(103, f"{what}.", "see Segmentation in docs/reference/data.md.")
    return source.masks


def _where(rows: Rows, source: SourceSection) -> list[int]:
    kept = list(range(len(rows)))
    for name, values in source.where.items():
        cells, wanted = rows.column(name), {plain(value) for value in values}
        kept = [row for row in kept if plain(cells[row]) in wanted]
    return kept


def _labelled(rows: Rows, chosen: Sequence[int], source: SourceSection) -> list[int]:
    cells = rows.column(rows.label)
    absent_values = {"", *(plain(value) for value in source.missing.get(rows.label, []))}
    kept = [row for row in chosen if plain(cells[row]) not in absent_values]
    if len(kept) < len(chosen) and rows.label not in source.missing:
        first = next(row for row in chosen if plain(cells[row]) in absent_values)
        what = f"{rows.place(first)}: no {rows.label}, and {len(chosen) - len(kept)} rows in all without it."
        remedy = f"fill it in, or leave such rows out with missing.{rows.label} = [] under [data] of site.toml."
        raise DataError(403, what, remedy)
    return kept


def _patients(rows: Rows, chosen: Sequence[int]) -> dict[int, str]:
    """The patient of each chosen row."""
    if rows.patient is None:
        return {row: f"row {row + 1}" for row in chosen}
    cells = rows.column(rows.patient)
    for row in chosen:
        if not cells[row].strip():
            what = f"{rows.place(row)}: {rows.patient} is empty, so the patient of this row is not known."
            raise DataError(403, what, "fill it in, or take the row out of the file.")
    return {row: cells[row].strip() for row in chosen}


def _share(patients: Iterable[str], share: tuple[float, float]) -> set[str]:
    first, last = share
    if not 0 <= first < last <= 1:
        remedy = "give two figures from 0 to 1, the smaller first: [0.0, 0.5] and [0.5, 1.0] are two halves."
        raise ConfigError(103, f"site.toml: data.share is [{first}, {last}].", remedy)
    order = shuffled(patients, "share")  # no seed of the run: sites cut out of one file stay disjoint in every run
    return set(order[round(first * len(order)) : round(last * len(order))])
