"""A small run in one process, which can be shaken."""

from __future__ import annotations

import random
import tempfile
from pathlib import Path
from typing import NamedTuple, Self

import pytest
import torch

from nightsplit.shared.config.optimizer import OptimizerSection
from nightsplit.shared.config.run import (
    DataSection,
    ModelSection,
    PrivacySection,
    RoundSection,
    RunConfig,
    RunSection,
    TaskSection,
    WireSection,
)
from nightsplit.shared.protocols.spec import Shape, systems
from nightsplit.shared.transport import Broker
from nightsplit.simulation.run import Simulation
from nightsplit.site_worker.data.dataset import Dataset, Splits


class System(NamedTuple):
    """Settings that every test of all systems varies; those of rounds have only the first."""

    protocol: str
    bottoms: str = "independent"
    window: int = 4
    learning: str = "steps"


SYSTEMS = [
    System("split_labels"),
    System("split_labels", "averaged", 1),
    System("split_labels", "averaged", 3),
    System("split_u", window=1),
    System("split_u"),
    System("split_u", "averaged", 2),
    System("split_labels", "averaged", 2, learning="targets"),
    System("split_u", window=3, learning="targets"),
    System("split_frozen"),
    System("fedavg_transfer"),
    System("fedavg_dp_seg"),
    System("data_vectors"),
]
each_system = pytest.mark.parametrize("system", SYSTEMS, ids=lambda system: "-".join(map(str, system)))

_LEDGERS = tempfile.TemporaryDirectory(prefix="nightsplit-ledgers-")
"""Runs of one configuration share a ledger, hence a secret: they draw the same noise, and can be compared."""

SIZES = {"north": 40, "south": 24, "east": 12}


def tiny_factory(dropout: float = 0.3) -> torch.nn.Sequential:
    """Dropout in both halves; cut 3 leaves (linear, relu, dropout) at the site."""
    return torch.nn.Sequential(
        torch.nn.Linear(6, 8), torch.nn.ReLU(), torch.nn.Dropout(dropout),
        torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Dropout(dropout),
        torch.nn.Linear(8, 5), torch.nn.ReLU(),
        torch.nn.Linear(5, 1),
    )  # fmt: skip


PLAIN = ("fedavg_transfer", "data_vectors", None)
"""Protocols of rounds without differential privacy, and the default, which forbids running statistics."""


def tiny_whole(width: int = 128, norm: bool = True) -> torch.nn.Sequential:
    """About 18,000 weights, so that they travel in three slices; dropout, and running statistics if wanted."""
    return torch.nn.Sequential(
        torch.nn.Linear(6, width), torch.nn.BatchNorm1d(width) if norm else torch.nn.Identity(),
        torch.nn.ReLU(), torch.nn.Dropout(0.3), torch.nn.Linear(width, width), torch.nn.ReLU(),
        torch.nn.Linear(width, 1),
    )  # fmt: skip


def tiny_rounds(sites: tuple[str, ...] = ("north", "south", "east"), **settings: object) -> RunConfig:
    """Of a system of rounds; settings are of [run], or of [round]."""
    known = set(RunSection.__struct_fields__)
    run = {name: value for name, value in settings.items() if name in known}
    section = {"id": "night", "protocol": "fedavg_transfer", "order": "strict", "batch_size": 8, "seed": 3}
    chosen = {name: value for name, value in settings.items() if name not in known}
    return RunConfig(
        run=RunSection(sites=list(sites), **{**section, **run}),
        model=ModelSection(factory="tests.harness.night:tiny_whole", settings={"norm": run.get("protocol") in PLAIN}),
        privacy=None if run.get("protocol") in PLAIN else PrivacySection(epsilon=8.0, delta=0.01, clip=0.5),
        task=TaskSection(kind="binary"),
        optimizer=OptimizerSection(lr=0.01),
        round=RoundSection(**{"rounds": 1 if run.get("protocol") == "data_vectors" else 4, **chosen}),
        wire=WireSection(message_bytes=2**16),
        data=DataSection(features=list("abcdef")),
    )


def tiny_config(sites: tuple[str, ...] = ("north", "south", "east"), **run: object) -> RunConfig:
    if run.get("protocol") in systems(Shape.ROUND):
        kept = ("protocol", "order", "tape", "quorum", "absence_hours")
        return tiny_rounds(sites, **{name: run[name] for name in kept if name in run})
    dropout = run.pop("dropout", 0.3)
    codec = run.pop("codec", "fp16")
    optimizer = run.pop("optimizer", "adam")
    section = {"id": "night", "protocol": "split_labels", "order": "strict", "window": 4, "epochs": 3, "batch_size": 8}
    return RunConfig(
        run=RunSection(sites=list(sites), **{**section, **run}),
        model=ModelSection(
            factory="tests.harness.night:tiny_factory", settings={"dropout": dropout}, cut=3, head_cut=6
        ),
        task=TaskSection(kind="binary"),
        optimizer=OptimizerSection(name=optimizer, lr=0.01),
        wire=WireSection(smashed=codec, gradient=codec, message_bytes=2**20),
        data=DataSection(features=list("abcdef")),
    )


def tiny_splits(site: str) -> Splits:
    generator = torch.Generator().manual_seed(len(site) * 7 + ord(site[0]))

    def part(n: int) -> Dataset:
        inputs = torch.randn(n, 6, generator=generator)
        targets = (inputs[:, 0] + 0.5 * torch.randn(n, generator=generator) > 0).float()
        return Dataset(inputs, targets, tuple(str(i) for i in range(n)))

    n = SIZES[site]
    return Splits(part(n), part(max(4, n // 4)), part(max(4, n // 4)))


class Night(Simulation):
    """A run of tiny sites."""

    def __init__(self, config: RunConfig, folder: Path, broker: Broker | None = None, prefetch: int = 32, **more):
        splits = {site: tiny_splits(site) for site in config.run.sites}
        super().__init__(config, splits, folder, folder, broker, prefetch, **more)
        self.ledgers = Path(_LEDGERS.name)

    @property
    def over(self) -> bool:
        return self.finished >= {*self.workers}

    def turn(self, worker: str, steps: int = 1) -> None:
        """Let a worker take some steps; one that was killed comes back."""
        for _ in range(steps):
            if worker not in self.engines and worker not in self.finished:
                self.start(worker)
            if worker in self.engines:
                self.step(worker)

    def shaken(self, seed: int) -> Self:
        """To the end, while workers die at random."""
        dice = random.Random(seed)
        for _ in range(20_000):
            if self.over:
                return self
            worker = dice.choice([worker for worker in self.workers if worker not in self.finished])
            self.turn(worker, dice.randint(1, 12))
            if worker in self.engines and dice.random() < 0.15:
                self.kill(worker)
        raise AssertionError(f"the run hangs: {self.server.applied}, {self.server.excluded}")

    def in_peace(self, folder: Path) -> Night:
        """The same run, which nobody disturbs."""
        return Night(self.config, folder)

    def replayed(self, folder: Path) -> Night:
        """The run once more in peace, in the order that its journal holds."""
        again = self.in_peace(folder)
        for position, entry in enumerate(self.journal(), 1):
            again.store.claim_position(position, entry)
        return again.run()
