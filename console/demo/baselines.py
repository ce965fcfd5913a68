"""What a run is compared with: the same model in one piece, on pooled data or on one site's.

Steps, batches, evaluation and the choice of the best epoch are those of a run, and not a second recipe: the
uncut model takes the place of the server's half, or a site makes all its rounds with nobody to combine with.
A run with differential privacy is compared with training without noise.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path

import torch
from msgspec.structs import replace
from torch import nn

from nightsplit.server_worker.evaluation import Evaluation
from nightsplit.server_worker.stream.top import Top
from nightsplit.shared.config.run import RunConfig
from nightsplit.shared.learning.metrics import measure
from nightsplit.shared.models.partition import build
from nightsplit.shared.protocols import split_labels
from nightsplit.shared.protocols.build import assemble_rounds
from nightsplit.shared.protocols.plan import Purpose
from nightsplit.shared.protocols.rounds import Work, is_judged
from nightsplit.shared.protocols.spec import Shape, spec_of
from nightsplit.simulation.evaluate import Judgement, judge
from nightsplit.site_worker.data.dataset import Dataset, Parts
from nightsplit.site_worker.rounds.batches import RoundFeed
from nightsplit.site_worker.rounds.trainer import Trainer
from nightsplit.site_worker.stream.batches import Feed


def centralized(config: RunConfig, parts: Mapping[str, Parts], base: Path = Path()) -> Judgement:
    """Train on the training patients of all sites, pooled; judge on every site's test patients.

    Args:
        config: the run.
        parts: scaled data by site.
        base: folder of run.toml, where `model.initial` is.
    """
    return _train(config, "pooled", pool(parts), parts, base)


def alone(config: RunConfig, site: str, parts: Mapping[str, Parts], base: Path = Path()) -> Judgement:
    """Train on one site's training patients; judge on every site's test patients."""
    return _train(config, site, parts[site], parts, base)


def whole_model(config: RunConfig) -> nn.Module:
    """The run's model before it is cut, with the weights that the run starts from."""
    return nn.Sequential(OrderedDict(build(config.model, config.run.seed, with_head=False).parts))


def _train(config: RunConfig, name: str, own: Parts, parts: Mapping[str, Parts], base: Path) -> Judgement:
    config = replace(config, run=replace(config.run, sites=[name], quorum=None))
    if spec_of(config).shape is Shape.ROUND:
        return _train_in_rounds(config, name, own, parts, base)
    config = replace(config, run=replace(config.run, protocol=split_labels.SPEC.name, bottoms="independent"))
    model = Top(whole_model(config), config.optimizer, config.task, "cpu")
    feed = Feed(config, name, own)
    evaluation = Evaluation(config)
    best = model.weights()
    for q in range(1, feed.plan.last + 1):
        item = feed.plan.item(q)
        if item.purpose is Purpose.TRAIN:
            model.learn(feed.inputs(item), feed.targets(item), feed.seed("top", item))
        elif item.purpose is Purpose.VALIDATION:
            evaluation.add(name, item.purpose, model.predict(feed.inputs(item)), feed.targets(item))
        if item.ends_block:
            evaluation.close(name, item.epoch)
            if evaluation.best == item.epoch:
                best = model.weights()
            if evaluation.exhausted:
                break
    model.module.load_state_dict(best)
    return judge(config, parts, lambda site, inputs: model.predict(inputs))


def _train_in_rounds(config: RunConfig, name: str, own: Parts, parts: Mapping[str, Parts], base: Path) -> Judgement:
    trainer = Trainer(assemble_rounds(config, base).module, config, "cpu")
    feed = RoundFeed(config, name, own)
    batches = Work.of(config, len(feed.train)).batches
    evaluation = Evaluation(config)
    best = trainer.weights()
    for version in range(1, config.round.rounds + 1):
        for k in range((version - 1) * batches, version * batches):
            inputs, targets = feed.batch(k)
            trainer.step(inputs, targets, feed.seed("trainer", k), feed.rate(k))
        if is_judged(config, version) or version == config.round.rounds:
            held_out = {
                part.value: measure(
                    config.task, config.data, trainer.predict(data.inputs), feed.targets(data), data.patients
                )
                for part, data in feed.held_out.items()
                if len(data)
            }  # fmt: skip
            evaluation.report(name, version, held_out)
            if evaluation.best == version:
                best = trainer.weights()
            if evaluation.exhausted:
                break
    trainer.load(best)
    return judge(config, parts, lambda site, inputs: trainer.predict(inputs))


def pool(parts: Mapping[str, Parts]) -> Parts:
    """The sites' parts as those of one site; patients of different sites stay different patients."""

    def join(datasets: Mapping[str, Dataset]) -> Dataset:
        return Dataset(
            torch.cat([dataset.inputs for dataset in datasets.values()]),
            torch.cat([dataset.targets for dataset in datasets.values()]),
            tuple(f"{site}/{patient}" for site, dataset in datasets.items() for patient in dataset.patients),
        )

    return Parts(
        join({site: part.train for site, part in parts.items()}),
        join({site: part.validation for site, part in parts.items()}),
        join({site: part.test for site, part in parts.items()}),
    )
