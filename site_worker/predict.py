"""Predictions at the site with the trained model: the site's bottom, the exported top, the site's head."""

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import torch
from msgspec.structs import replace
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from nightsplit.shared.config.run import DataSection, TaskSection
from nightsplit.shared.errors import RunError
from nightsplit.shared.learning.losses import standardise
from nightsplit.shared.learning.metrics import Metrics, measure
from nightsplit.shared.protocols.build import build_model
from nightsplit.shared.runtime.process import prepare_torch
from nightsplit.site_worker.data.dataset import Dataset
from nightsplit.site_worker.data.scaling import Scaling, scale
from nightsplit.site_worker.data.source import load_dataset, read_splits
from nightsplit.site_worker.rounds.trainer import compute_outputs
from nightsplit.site_worker.worker import SiteWorker


@dataclass(frozen=True)
class Predictions:
    """Predictions of the model for a dataset, row by row, and their metrics.

    `values` are float32 (rows, columns): the probability of the positive class (binary) or of each class
    (multiclass), the value in the target's unit (regression), or the number of foreground pixels (segmentation).
    """

    patients: tuple[str, ...]
    values: torch.Tensor
    columns: tuple[str, ...]
    metrics: Metrics

    def write(self, file: TextIO) -> None:
        """Write a CSV: row, patient, and the columns; rows count from 1, in the order of the predicted data."""
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["row", "patient", *self.columns])
        for row, (patient, values) in enumerate(zip(self.patients, self.values.tolist(), strict=True), start=1):
            table.writerow([row, patient, *(f"{value:.6g}" for value in values)])


def predict(site: SiteWorker, top: Path | None = None, data: Path | None = None) -> Predictions:
    """Predict the site's held-out test patients, or the rows of another file.

    Args:
        site: worker of a finished run.
        top: weights of the top; None for the top that the run exported.
        data: a file or folder, labels included, read with the settings of [data] in site.toml; None for the
            test patients.

    Raises:
        DataError: as `select_dataset`.
        RunError: 605 the run has not finished here, 604 there is no top, 601 a part does not fit the model.
    """
    prepare_torch(site.config.threads, site.config.device)
    model = _load_model(site, top)
    config, dataset = site.run_config, select_dataset(site, data)
    outputs = compute_outputs(model, dataset.inputs, site.config.device)
    targets = standardise(config.task, config.data, dataset.targets)
    metrics = measure(config.task, config.data, outputs, targets, dataset.patients)
    return Predictions(dataset.patients, *_to_columns(config.task, config.data, outputs), metrics)


def select_dataset(site: SiteWorker, data: Path | None) -> Dataset:
    """Return the site's test patients, or the rows of another file, scaled by the training patients.

    Raises:
        DataError: the data cannot be read, or (409) the site was trained with other data.
    """
    config = site.run_config
    parts = read_splits(site.source, config, site.base)
    scaled = scale(parts, config.data)
    site.check_same_data(scaled)
    if data is None:
        return scaled.test
    source = replace(site.source, path=str(data.absolute()), share=(0.0, 1.0))
    return Scaling.fit(parts.train, config.data).apply(load_dataset(source, config.data, config.task, site.base))


def _load_model(site: SiteWorker, top: Path | None) -> nn.Module:
    """Build the model from its parts in the order of the forward pass, with the weights of the best model."""
    folder, config = site.model_folder, site.run_config
    parts = build_model(config, site.run_folder).modules
    first = next(iter(parts))
    if not (folder / f"{first}.safetensors").exists():
        sentence = f"{folder} has no {first}.safetensors: {config.run.id} has not finished at {site.config.name}."
        raise RunError(605, sentence, "let the run finish first: nightsplit site site.toml.")
    if "top" in parts and top is None and not (folder / "top.safetensors").exists():
        sentence = f"{folder} has no top.safetensors, so the model is not complete here."
        remedy = "ask the server's side for top.safetensors of its report folder, and name it with --top."
        raise RunError(604, sentence, f"set run.export_top = true in the next run; or {remedy}")
    for name, module in parts.items():
        _load_weights(module, top if top is not None and name == "top" else folder / f"{name}.safetensors")
    return nn.Sequential(*parts.values()).to(site.config.device).eval()


def _load_weights(module: nn.Module, path: Path) -> None:
    """Load weights from a file, which lacks counters (integer buffers): they are not sent and not needed here."""
    try:
        missing, unexpected = module.load_state_dict(load_file(path), strict=False)
    except (OSError, SafetensorError) as error:
        raise RunError(604, f"{path}: {error}.", "name a file of weights that the server's report wrote.") from None
    except RuntimeError:  # a tensor of another shape
        missing, unexpected = [], [path.name]
    own = module.state_dict()
    if unexpected or any(own[name].is_floating_point() for name in missing):
        remedy = "use the run.toml that this file was trained with."
        raise RunError(601, f"{path} does not fit the model of run.toml.", remedy)


def _to_columns(task: TaskSection, data: DataSection, outputs: torch.Tensor) -> tuple[torch.Tensor, tuple[str, ...]]:
    """Convert outputs to the values and column names of `Predictions`."""
    if task.kind == "regression":
        return outputs * data.target_spread + data.target_mean, ("prediction",)
    if task.kind == "segmentation":
        return (outputs > 0).flatten(1).sum(1, keepdim=True).float(), ("foreground_pixels",)
    if task.kind == "binary":
        return torch.sigmoid(outputs), ("prediction",)
    classes = data.classes or [str(number) for number in range(task.classes)]
    return torch.softmax(outputs, 1), tuple(f"probability_{name}" for name in classes)
