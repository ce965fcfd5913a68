"""Evaluation of a model on the test patients of all sites."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from nightsplit.shared.config.run import RunConfig
from nightsplit.shared.learning.losses import standardise
from nightsplit.shared.learning.metrics import Metrics, measure, overall
from nightsplit.site_worker.data.dataset import Splits


@dataclass(frozen=True)
class ModelFigures:
    """Figures on held-out test patients.

    Attributes:
        sites: figures of each site's patients.
        overall: mean over sites, weighted by samples, as in reports.
        pooled: figures of all patients as one group.
    """

    sites: Mapping[str, Metrics]
    overall: Metrics
    pooled: Metrics


def evaluate(
    config: RunConfig, splits: Mapping[str, Splits], predict: Callable[[str, torch.Tensor], torch.Tensor]
) -> ModelFigures:
    """Evaluate a model on every site's test patients.

    Args:
        splits: scaled data by site.
        predict: returns the outputs (batch, outputs) for a site's name and inputs (batch, ...).
    """
    outputs = {site: predict(site, part.test.inputs) for site, part in splits.items()}
    targets = {site: standardise(config.task, config.data, part.test.targets) for site, part in splits.items()}
    sites = {
        site: measure(config.task, config.data, outputs[site], targets[site], part.test.patients)
        for site, part in splits.items()
    }
    patients = [f"{site}/{patient}" for site, part in splits.items() for patient in part.test.patients]
    pooled = measure(config.task, config.data, torch.cat([*outputs.values()]), torch.cat([*targets.values()]), patients)
    return ModelFigures(sites, overall(list(sites.values())), pooled)
