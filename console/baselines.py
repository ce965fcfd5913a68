"""What a split run is compared with: the same model in one piece, on pooled data or on one site's.

The uncut model takes the place of the server's half, so that steps, batches, evaluation and the
choice of the best epoch are those of a run, and not a second recipe.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from msgspec.structs import replace
from torch import nn

from server_worker.evaluation import Evaluation
from server_worker.top import Top
from shared.config import RunConfig
from shared.metrics import Metrics, measure, overall
from shared.models.cutting import build
from shared.protocols.plan import Step
from site_worker.data.dataset import Dataset, Parts
from site_worker.feed import Feed


@dataclass(frozen=True)
class Judgement:
    """Figures on held-out test patients.

    Attributes:
        sites: of each site's patients.
        overall: mean over sites, weighted by samples, as reports give it.
        pooled: of all patients as one group.
    """

    sites: Mapping[str, Metrics]
    overall: Metrics
    pooled: Metrics


def centralized(config: RunConfig, parts: Mapping[str, Parts]) -> Judgement:
    """Train on the training patients of all sites, pooled; judge on every site's test patients."""
    return _train(config, "pooled", _pool(parts), parts)


def alone(config: RunConfig, site: str, parts: Mapping[str, Parts]) -> Judgement:
    """Train on one site's training patients; judge on every site's test patients."""
    return _train(config, site, parts[site], parts)


def judge(
    config: RunConfig, parts: Mapping[str, Parts], predict: Callable[[str, torch.Tensor], torch.Tensor]
) -> Judgement:
    """Judge a model on every site's test patients.

    Args:
        config: the run.
        parts: scaled data by site.
        predict: from a site's name and inputs (batch, ...) to outputs (batch, outputs).
    """
    predictions = {}
    for site, site_parts in parts.items():
        feed = Feed(config, site, site_parts)
        block = [q for q in feed.plan.items_of(feed.plan.evaluated_epochs()[0], Step.TEST)]
        outputs = torch.cat([predict(site, feed.inputs(q)) for q in block])
        predictions[site] = outputs, torch.cat([feed.targets(q) for q in block])
    sites = {site: measure(config.task, config.data, *pair) for site, pair in predictions.items()}
    everyone = (torch.cat(tensors) for tensors in zip(*predictions.values(), strict=True))
    return Judgement(sites, overall(list(sites.values())), measure(config.task, config.data, *everyone))
