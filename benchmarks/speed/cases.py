"""Cases of the speed benchmarks: models, synthetic images, where the model is cut, how it travels."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from nightsplit.broker.topology import SiteQueues, site_queues
from nightsplit.shared.config.optimizer import OptimizerSection
from nightsplit.shared.config.run import (
    DataSection,
    ModelSection,
    RunConfig,
    RunSection,
    TaskSection,
    WireSection,
)
from nightsplit.shared.models.partition import ModelParts, build, flow_shapes
from nightsplit.shared.protocols import split_labels
from nightsplit.shared.protocols.spec import Shapes
from nightsplit.shared.protocols.stream import weights
from nightsplit.shared.wire.codecs import FloatCodec
from nightsplit.shared.wire.schema import Contract
from nightsplit.site_worker.data.dataset import Dataset, Splits

SITE = "north"
BATCHES_PER_EPOCH = 16
OPTIMIZER = OptimizerSection(name="sgd", lr=5e-4, momentum=0.5)


def small() -> nn.Sequential:
    """A light model for 3x64x64: at cut 3 the site has one convolution, the server two and the output."""
    return nn.Sequential(
        *_block(3, 16), *_block(16, 32), *_block(32, 64), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)
    )


def wide() -> nn.Sequential:
    """A model for 3x64x64 whose server half takes three times as long as the site's: four convolutions up to 128."""
    return nn.Sequential(
        *_block(3, 32), nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), *_block(64, 64),
        nn.Conv2d(64, 128, 3, padding=1), nn.ReLU(), *_block(128, 128),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10),
    )  # fmt: skip


def peer() -> nn.Sequential:
    """The network for 3x32x32 that other systems were timed with; at cut 1 it sends before activation and pooling."""
    return nn.Sequential(
        *_block(3, 16), *_block(16, 32), *_block(32, 64), nn.Flatten(),
        nn.Linear(1024, 128), nn.ReLU(), nn.Linear(128, 10),
    )  # fmt: skip


def _block(inputs: int, outputs: int) -> list[nn.Module]:
    return [nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]


@dataclass(frozen=True)
class Case:
    """Case that is trained.

    Attributes:
        factory: of this module.
        side: of the square images, three channels.
        batch: samples per batch.
        cut: stages at the site.
        codec: of activations and gradients.
        batches: how many are trained.
        warmup: batches before the clock starts.
        window: batches the site may have unanswered.
        order: in which the server applies; with one site both do the same, but "fair" keeps a journal.
        server_threads: of torch; the site has one.
    """

    factory: str
    side: int
    batch: int
    cut: int
    codec: FloatCodec = "fp16"
    batches: int = 200
    warmup: int = 24
    window: int = 4
    order: Literal["strict", "fair"] = "strict"
    server_threads: int = 1

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one sample."""
        return (3, self.side, self.side)

    def config(self, run: str) -> RunConfig:
        """As run.toml would have it."""
        return RunConfig(
            run=RunSection(
                id=run, protocol="split_labels", sites=[SITE], order=self.order, window=self.window,
                epochs=-(-self.batches // BATCHES_PER_EPOCH), evaluate_every=10**9, batch_size=self.batch,
            ),
            model=ModelSection(factory=f"benchmarks.speed.cases:{self.factory}", cut=self.cut),
            task=TaskSection(kind="multiclass", classes=10),
            optimizer=OPTIMIZER,
            wire=WireSection(smashed=self.codec, gradient=self.codec, queue_bytes=8 * 2**30),
            data=DataSection(image_size=self.side, frames=3),
        )  # fmt: skip

    def parts(self) -> Splits:
        """Noise with labels: an epoch of training data, nothing held out."""
        count = self.batch * min(BATCHES_PER_EPOCH, self.batches)
        generator = torch.Generator().manual_seed(1)

        def part(n: int) -> Dataset:
            inputs = torch.randn(n, *self.shape, generator=generator)
            targets = torch.randint(0, 10, (n,), generator=generator)
            return Dataset(inputs, targets, tuple(str(i) for i in range(n)))

        return Splits(part(count), part(0), part(0))

    def assemble(self, run: str) -> tuple[RunConfig, ModelParts, Contract]:
        """Configuration, model and contract."""
        config = self.config(run)
        parts = build(config.model, config.run.seed, Path(), with_head=False)
        cut = flow_shapes(parts.modules, self.shape)["bottom"]
        return (
            config,
            parts,
            split_labels.payloads(config, Shapes(cut, (), weights(parts.bottom), weights(parts.top))),
        )

    def queues(self, run: str) -> SiteQueues:
        """Return the queues of the run's one site."""
        return site_queues(run, SITE, self.config(run).wire.queue_bytes)
