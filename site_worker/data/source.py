"""Reading of a `Dataset` from [data] of site.toml.

    locate ──▶ open (table, images, ...) ──▶ frames ──▶ where ──▶ labels ──▶ share ──▶ targets, inputs

Rows are selected before any input is read, so a site with a share of a large folder reads only its own images.
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
from nightsplit.site_worker.data.public import download_hint
from nightsplit.site_worker.data.readers.arrays import open_arrays
from nightsplit.site_worker.data.readers.images import open_images
from nightsplit.site_worker.data.readers.table import open_table
from nightsplit.site_worker.data.rows import Rows, normalize
from nightsplit.site_worker.data.sequences import sample_frames
from nightsplit.site_worker.data.split import shuffled, split

_VARIABLE = re.compile(r"\$(?:(\w+)|\{(\w+)\})")


def read_splits(source: SourceSection, run: RunConfig, base: Path) -> Splits:
    """Read a site's data and divide it by patient, without scaling; raises as `load_dataset` and `split`."""
    dataset = load_dataset(source, run.data, run.task, base)
    return split(dataset, run.task, run.data.validation, run.data.test, run.run.seed)


def load_dataset(source: SourceSection, data: DataSection, task: TaskSection, base: Path) -> Dataset:
    """Read a site's data.

    Rows are selected by `where` and by the `share` of their patient. A row without a label is an error, unless
    `missing` names the label's column (its list may be empty): then the row is dropped. Segmentation has masks in
    place of labels.

    Inputs are neither scaled nor imputed; targets are in the format of `Dataset`; a patient's name is the cell of the
    patient column, or "row 7" if every row is a patient. A relative path starts at `base`, the folder of site.toml.

    Raises:
        ConfigError: 103 keys of [data] contradict each other or the task.
        DataError: 401-403, 405-408 and 410-412, see `TITLES`.
    """
    rows = _open(locate(source.path, base), source, data, task)
    if data.frames is not None:
        rows = sample_frames(rows, data.frames)
    for name in source.missing:
        if name != "*":
            rows.column(name)
    indices = _select_rows(rows, source)
    if task.kind != "segmentation":
        indices = _drop_unlabelled(rows, indices, source)
    patients = _read_patients(rows, indices)
    own_patients = _select_patients(patients.values(), source.share)
    indices = [row for row in indices if patients[row] in own_patients]
    if not indices:
        sentence = f"{rows.file}: of {len(rows)} rows none is left after data.where, data.missing and data.share."
        raise DataError(405, sentence, "compare data.where in site.toml with the file's values.")
    targets = read_targets(rows, indices, data, task)
    return Dataset(rows.read(indices), targets, tuple(patients[row] for row in indices))


def locate(path: str, base: Path) -> Path:
    """Return the file or folder of `path`, which is relative to `base` and may contain environment variables.

    Raises:
        DataError: 408 a variable is not set, 401 the path does not exist; both with the source of public data.
    """
    origin = download_hint(path)
    for first, second in _VARIABLE.findall(path):
        name = first or second
        if not os.environ.get(name):
            remedy = f"set {name} to the folder of your data."
            if origin:
                remedy = f"{origin}; then set {name} to the folder above it."
            raise DataError(408, f"data.path is {path!r}, and the environment variable {name} is not set.", remedy)
    found = base / Path(_VARIABLE.sub(lambda match: os.environ[match[1] or match[2]], path)).expanduser()
    if not found.exists():
        raise DataError(401, f"{found} does not exist.", f"{origin}." if origin else "correct data.path in site.toml.")
    return found


def _open(path: Path, source: SourceSection, data: DataSection, task: TaskSection) -> Rows:
    masks = _check_masks(source, data, task)
    if source.source == "table":
        return open_table(path, source, data)
    if source.source == "arrays":
        return open_arrays(path, source, data, masks)
    if task.kind == "regression" and source.index is None:
        remedy = "set data.index in site.toml to a CSV with the columns file and label."
        raise DataError(402, f"{path} has no index with the numbers to predict; folders only name classes.", remedy)
    classes = class_numbers(data, task)
    if source.source == "images":
        return open_images(path, source, data, classes)
    try:
        from nightsplit.site_worker.data.readers.dicom import open_dicom
        from nightsplit.site_worker.data.readers.volumes import open_volumes
    except ImportError as error:
        sentence = f'{path}: source = "{source.source}" needs the package {error.name}, which is not installed.'
        raise DataError(401, sentence, "pip install nightsplit[medical].") from None
    if source.source == "dicom":
        return open_dicom(path, source, data, classes)
    return open_volumes(path, source, data, classes, masks)


def _check_masks(source: SourceSection, data: DataSection, task: TaskSection) -> str | None:
    """Return data.masks for segmentation; ConfigError 103 if there are no masks or if they cannot be used."""
    if task.kind != "segmentation":
        return None
    sentence = None
    if source.source not in ("volumes", "arrays"):
        sentence = f'site.toml: data.source = "{source.source}" has no masks; segmentation reads volumes and arrays'
    elif source.masks is None:
        sentence = "site.toml: data.masks is not set, and the task is segmentation"
    elif data.frames is not None:
        sentence = "run.toml: data.frames makes a sequence of images one sample, and a mask belongs to one image"
    elif geometric := [name for name in data.augment if name != "contrast"]:
        sentence = f"run.toml: data.augment moves the images ({', '.join(geometric)}), but not their masks"
    if sentence:
        raise ConfigError(103, f"{sentence}.", "see Segmentation in docs/reference/data.md.")
    return source.masks


def _select_rows(rows: Rows, source: SourceSection) -> list[int]:
    indices = list(range(len(rows)))
    for name, values in source.where.items():
        cells, selected = rows.column(name), {normalize(value) for value in values}
        indices = [row for row in indices if normalize(cells[row]) in selected]
    return indices


def _drop_unlabelled(rows: Rows, indices: Sequence[int], source: SourceSection) -> list[int]:
    cells = rows.column(rows.label)
    missing = {"", *map(normalize, source.missing.get(rows.label, []))}
    unlabelled = [row for row in indices if normalize(cells[row]) in missing]
    if unlabelled and rows.label not in source.missing:
        sentence = f"{rows.location(unlabelled[0])}: no {rows.label}; {len(unlabelled)} rows in all have none."
        remedy = f"fill it in, or drop such rows with missing.{rows.label} = [] under [data] of site.toml."
        raise DataError(403, sentence, remedy)
    return [row for row in indices if normalize(cells[row]) not in missing]


def _read_patients(rows: Rows, indices: Sequence[int]) -> dict[int, str]:
    """Return the patient of each row."""
    if rows.patient is None:
        return {row: f"row {row + 1}" for row in indices}
    cells = rows.column(rows.patient)
    for row in indices:
        if not cells[row].strip():
            raise DataError(403, f"{rows.location(row)}: {rows.patient} is empty.", "fill it in, or remove the row.")
    return {row: cells[row].strip() for row in indices}


def _select_patients(patients: Iterable[str], share: tuple[float, float]) -> set[str]:
    first, last = share
    if not 0 <= first < last <= 1:
        remedy = "give two numbers from 0 to 1, the smaller first: [0.0, 0.5] and [0.5, 1.0] are two halves."
        raise ConfigError(103, f"site.toml: data.share is [{first}, {last}].", remedy)
    order = shuffled(patients, "share")  # without the run's seed: sites from one file stay disjoint in every run
    return set(order[round(first * len(order)) : round(last * len(order))])
