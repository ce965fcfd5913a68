"""Baselines of a run: the same training on all sites' data in one place, and on one site's.

Each is a run of a single site that waits for every answer and sends at full precision. That equals training the
whole model, bit for bit except for the rounding of weight differences in rounds. A run with differential
privacy is compared with training without noise, and a head is trained with the optimizer of the top.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from msgspec.structs import replace

from nightsplit.shared.config.run import RunConfig, WireSection
from nightsplit.shared.protocols import fedavg_transfer, split_labels
from nightsplit.shared.protocols.spec import Shape, spec_of
from nightsplit.simulation.evaluate import ModelFigures
from nightsplit.simulation.run import simulate
from nightsplit.site_worker.data.dataset import Dataset, Splits


def centralized(config: RunConfig, splits: Mapping[str, Splits], base: Path = Path()) -> ModelFigures:
    """Train on the training patients of all sites, pooled; evaluate on every site's test patients.

    `splits` is the scaled data by site, `base` the folder of run.toml, for `model.initial`.
    """
    return _train(config, "pooled", pool(splits), splits, base)


def alone(config: RunConfig, site: str, splits: Mapping[str, Splits], base: Path = Path()) -> ModelFigures:
    """Train on one site's training patients; evaluate on every site's test patients."""
    return _train(config, site, splits[site], splits, base)


def pool(splits: Mapping[str, Splits]) -> Splits:
    """Join the sites' splits into those of one site; patients of different sites stay different patients."""

    def join(name: str) -> Dataset:
        datasets: dict[str, Dataset] = {site: getattr(part, name) for site, part in splits.items()}
        return Dataset(
            torch.cat([dataset.inputs for dataset in datasets.values()]),
            torch.cat([dataset.targets for dataset in datasets.values()]),
            tuple(f"{site}/{patient}" for site, dataset in datasets.items() for patient in dataset.patients),
        )

    return Splits(join("train"), join("validation"), join("test"))


def _train(config: RunConfig, site: str, own: Splits, splits: Mapping[str, Splits], base: Path) -> ModelFigures:
    protocol = fedavg_transfer if spec_of(config).shape is Shape.ROUND else split_labels
    run = replace(
        config.run, protocol=protocol.SPEC.name, sites=[site], quorum=None, order="strict", window=1,
        bottoms="independent",
    )  # fmt: skip
    # Normalization statistics of the best model, not of the last one.
    section = replace(config.round, close="all", reports=None, statistics="pooled")
    # The smallest codec takes a quarter of the bytes of full precision.
    wire = WireSection(smashed="fp32", gradient="fp32", message_bytes=4 * config.wire.message_bytes)
    one = replace(config, run=run, round=section, wire=wire, privacy=None, parties={})
    return simulate(one, {site: own}, base).evaluate(splits)
