"""The server reads patients off their activations if it knows the first weights (docs/explanation/attacks.md, S3).

The positive control is the same attack with the public seed: least squares on the units that are active.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nightsplit.shared.config.run import DataSection, ModelSection, RunConfig, RunSection, TaskSection
from nightsplit.shared.models.partition import build
from nightsplit.site_worker.protocols import make_site
from tests.harness.night import tiny_splits

FEATURES = 6


def config_of(protocol: str) -> RunConfig:
    settings = {"inputs": FEATURES, "hidden": [128, 16], "outputs": 1}
    return RunConfig(
        run=RunSection(id="night", protocol=protocol, sites=["north"], batch_size=16, epochs=1),
        model=ModelSection(factory="nightsplit.models:mlp", settings=settings, cut=1, head_cut=2),
        task=TaskSection(kind="binary"), data=DataSection(features=list("abcdef")),
    )  # fmt: skip


def inverted(activations: torch.Tensor, layer: nn.Linear) -> torch.Tensor:
    """Inputs whose activations behind `layer` and ReLU would be these."""
    rows = []
    for row in activations:
        active = row > 0
        bias = layer.bias[active]
        rows.append(torch.linalg.lstsq(layer.weight[active], (row[active] - bias).unsqueeze(1)).solution.squeeze(1))
    return torch.stack(rows)


def r2(found: torch.Tensor, true: torch.Tensor) -> float:
    return float(1 - ((found - true) ** 2).sum() / ((true - true.mean(0)) ** 2).sum())


@pytest.mark.parametrize("protocol", ["split_labels", "split_u"])
def test_first_weights_that_are_secret_do_not_give_the_patients_away(protocol, tmp_path):
    config = config_of(protocol)
    public = build(config.model, config.run.seed, tmp_path, with_head=protocol == "split_u").bottom
    layer = next(module for module in public.modules() if isinstance(module, nn.Linear))
    found = {}
    for seed in (None, b"s" * 32):
        site = make_site("north", config, tiny_splits("north"), "north-1", tmp_path, seed=seed)
        first = site.sequence.slot(1)
        smashed = site.first_half(first).tensors["smashed"].half().float()  # as it leaves
        with torch.no_grad():
            found[seed] = r2(inverted(smashed, layer), site.batches.inputs(first.item))
    assert found[None] > 0.9999
    assert found[b"s" * 32] < 0.1
