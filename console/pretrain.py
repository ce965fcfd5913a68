"""Stage 1 of a transfer: train a network on public data, and publish its weights with a card.

Zhang and Li, "Two-stage Federated Transfer Learning", arXiv 2203.12803: a network first learns a source task
on public data; stage 2 continues with the hospitals (`fedavg_transfer`). Here the source task is to classify
the classes of all sources with one layer of outputs: [MedNIST's six | chest X-ray's two].
"""

import time
from collections.abc import Sequence
from itertools import accumulate, pairwise
from pathlib import Path

import msgspec
import torch
from msgspec import Struct
from msgspec.structs import replace

from nightsplit.console.ui.text import screen
from nightsplit.shared.config.load import conflict_in, load
from nightsplit.shared.config.optimizer import OptimizerSection
from nightsplit.shared.config.run import (
    DataSection,
    ModelSection,
    RoundSection,
    RunConfig,
    RunSection,
    TaskSection,
)
from nightsplit.shared.config.section import KeyConflictError, Name, Natural, Positive
from nightsplit.shared.errors import ConfigError
from nightsplit.shared.learning.metrics import Metrics, measure
from nightsplit.shared.models.artifact import Card, SourceCard, write_artifact
from nightsplit.shared.models.hashing import weights_sha256
from nightsplit.shared.protocols import fedavg_transfer
from nightsplit.shared.protocols.build import build_whole_model
from nightsplit.shared.protocols.parts import check_optimizer
from nightsplit.shared.protocols.rounds import Work
from nightsplit.site_worker.config import SourceSection
from nightsplit.site_worker.data.dataset import Dataset, Splits
from nightsplit.site_worker.data.scaling import scale
from nightsplit.site_worker.data.source import read_splits
from nightsplit.site_worker.rounds.batches import RoundBatches
from nightsplit.site_worker.rounds.trainer import Trainer


class PretrainSection(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """[pretrain]: the model and its training.

    Attributes:
        name: name of the model.
        output: the file to write, relative to pretrain.toml.
        head: module with the outputs of the source task; a run that starts from the file does not use it.
        seed: seed of initial weights, splits, order, augmentation and dropout.
        epochs: passes over all sources together; the learning rate falls to zero along a cosine.
        batch_size: samples per step, from all sources.
        threads: torch threads.
    """

    name: Name
    output: str
    head: str = "output"
    seed: Natural = 0
    epochs: Positive = 10
    batch_size: Positive = 64
    threads: Positive = 1


class PublicSource(SourceSection, frozen=True, kw_only=True):
    """[[source]]: a public data set. Keys as in [data] of site.toml, and:

    Attributes:
        name: name of the data set.
        classes: its labels, as in `data.classes` of run.toml.
        licence: its licence, in its publisher's words.
    """

    name: str
    classes: list[str]
    licence: str | None = None


class PretrainConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """pretrain.toml. [model], [optimizer] and [data] are those of run.toml; `data.classes` differs by source."""

    pretrain: PretrainSection
    model: ModelSection
    data: DataSection
    source: list[PublicSource]
    optimizer: OptimizerSection = msgspec.field(default_factory=OptimizerSection)

    @property
    def task(self) -> TaskSection:
        """Classification over the classes of all sources."""
        return TaskSection(kind="multiclass", classes=sum(len(source.classes) for source in self.source))

    def run(self) -> RunConfig:
        """Return a run of one site with the same training, for the functions that take a run."""
        section = self.pretrain
        run = RunSection(
            id=section.name, protocol=fedavg_transfer.SPEC.name, sites=["sources"], seed=section.seed,
            batch_size=section.batch_size,
        )  # fmt: skip
        once = RoundSection(rounds=1, local_epochs=section.epochs, decay="cosine")
        data = replace(self.data, validation=0.0)  # the number of epochs is fixed: no model is selected
        return RunConfig(run=run, model=self.model, task=self.task, optimizer=self.optimizer, round=once, data=data)


def train_first_model(path: Path) -> None:
    """Train as pretrain.toml says, write the model, and print its hash.

    Raises:
        ConfigError: 101-105 as for run.toml.
        DataError: as for a site's data.
        RunError: 603 training has diverged.
    """
    config = load(path, PretrainConfig)
    torch.set_num_threads(config.pretrain.threads)
    run = config.run()
    try:
        check_optimizer(run)
    except KeyConflictError as conflict:
        raise conflict_in(path, conflict) from None
    splits = _read(config, path)
    trainer = Trainer(build_whole_model(run, path.parent).module, run, "cpu")
    names, head = list(trainer.weights()), config.pretrain.head
    if not any(name.startswith(f"{head}.") for name in names):
        sentence = f"{path}: pretrain.head: the model has no weights under {head!r}."
        raise ConfigError(103, sentence, f"name the module with the last layer; the last weight is {names[-1]}.")
    _train(trainer, RoundBatches(run, "sources", _pool(config, splits), run.run.seed))

    card = _card(config, trainer, splits)
    output = path.parent / config.pretrain.output
    sha256 = write_artifact(output, card, trainer.weights())
    console = screen()
    for source in card.sources:
        measured = {name: value for name, value in source.figures.items() if value is not None and name != "samples"}
        figures = [f"{name} {value:.3f}" for name, value in measured.items()]
        console.print(f"{source.name}, {source.held_out} held out: {', '.join(figures)}", soft_wrap=True)
    console.print(f"{output}", f'initial_sha256 = "{sha256}"', sep="\n", soft_wrap=True)


def _read(config: PretrainConfig, path: Path) -> list[Splits]:
    """Read, split and scale each source by itself; its targets start at 0."""
    if any(len(source.classes) < 2 for source in config.source) or not config.source:
        sentence = f"{path}: source: each needs a name and two classes or more."
        raise ConfigError(103, sentence, "list its labels in classes.")
    if config.data.classes:
        sentence = f"{path}: data.classes: every source has classes of its own."
        raise ConfigError(103, sentence, "move them to the [[source]].")
    run, splits = config.run(), []
    for source in config.source:
        task = TaskSection(kind="multiclass", classes=len(source.classes))
        data = replace(run.data, classes=source.classes)
        splits.append(scale(read_splits(source, replace(run, task=task, data=data), path.parent), data))
    return splits


def _slices(config: PretrainConfig) -> list[slice]:
    """Return the slice of each source's classes in the model's outputs."""
    counts = (len(source.classes) for source in config.source)
    return [slice(first, end) for first, end in pairwise(accumulate(counts, initial=0))]


def _pool(config: PretrainConfig, splits: Sequence[Splits]) -> Splits:
    """Join all training samples into the splits of one site."""
    train = Dataset(
        torch.cat([part.train.inputs for part in splits]),
        torch.cat([part.train.targets + own.start for part, own in zip(splits, _slices(config), strict=True)]),
        tuple(f"{number}/{name}" for number, part in enumerate(splits) for name in part.train.patients),
    )
    nothing = train.select([])
    return Splits(train, nothing, nothing)


def _train(trainer: Trainer, batches: RoundBatches) -> None:
    """Train the only round of a run with one site, which has all sources."""
    console, epochs = screen(), batches.config.round.local_epochs
    steps = Work.of(batches.config, len(batches.train)).batches
    losses = []
    for k in range(steps):
        losses.append(trainer.step(*batches.batch(k), batches.seed("dropout", k), batches.progress(k)))
        if len(losses) == steps // epochs:
            console.print(f"epoch {(k + 1) * epochs // steps} of {epochs}: loss {sum(losses) / len(losses):.4f}")
            losses.clear()


def _card(config: PretrainConfig, trainer: Trainer, splits: Sequence[Splits]) -> Card:
    section, weights = config.pretrain, trainer.weights()
    sources = [
        SourceCard(
            name=source.name,
            licence=source.licence,
            classes=source.classes,
            samples=len(part.train),
            held_out=len(part.test),
            figures=_evaluate(trainer, config.data, own, part.test),
        )
        for source, part, own in zip(config.source, splits, _slices(config), strict=True)
    ]
    return Card(
        name=section.name,
        factory=config.model.factory,
        settings=config.model.settings,
        head=section.head,
        input_shape=list(config.data.input_shape),
        sources=sources,
        epochs=section.epochs,
        seed=section.seed,
        date=time.strftime("%Y-%m-%d", time.gmtime()),
        weights_sha256=weights_sha256(weights),
    )


def _evaluate(trainer: Trainer, data: DataSection, classes: slice, held_out: Dataset) -> Metrics:
    """Return the metrics of one source's held-out samples, over its own classes."""
    if not len(held_out):
        return {}
    outputs = trainer.predict(held_out.inputs)[:, classes]
    if outputs.shape[1] == 2:  # as a binary task: the logit of the second class against the first
        binary = TaskSection(kind="binary")
        return measure(binary, data, outputs[:, 1:] - outputs[:, :1], held_out.targets.to(torch.float32))
    task = TaskSection(kind="multiclass", classes=outputs.shape[1])
    return measure(task, data, outputs, held_out.targets)
