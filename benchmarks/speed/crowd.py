"""Many light sites: real roles, engines and links (two connections each), several in one process, taking turns."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from benchmarks.speed.common import Worker
from nightsplit.broker.rabbitmq.broker import RabbitBroker
from nightsplit.shared.clock import SystemClock
from nightsplit.shared.protocols.load import load_run
from nightsplit.shared.runtime.process import prefetch_for, prepare_torch
from nightsplit.simulation.run import Simulation
from nightsplit.site_worker.data.dataset import Dataset, Splits

INPUTS, WIDTH, BATCH = 16, 64, 32
MESSAGE_BYTES = BATCH * (2 * WIDTH + 4)
"""Bytes of a batch on its way up: activations in fp16, labels in fp32."""
WEIGHTS = (2, 3, 4)

RUN = """
[run]
id = "crowd"
protocol = "split_labels"
sites = {sites}
order = "fair"
window = 1000000
epochs = 1
batch_size = {batch}
[model]
factory = "nightsplit.models:mlp"
settings = {{inputs = {inputs}, hidden = [{width}, 32], outputs = 1}}
[task]
kind = "binary"
[data]
features = {features}
validation = 0.0
test = 0.0
"""
SERVER_FILE = """
[server]
broker = "{broker}"
store = "{store}"
"""


@dataclass(frozen=True)
class Crowd:
    """Sites that share a number of batches by their weights.

    Attributes:
        sites: how many.
        batches: of all sites together, about.
    """

    sites: int
    batches: int

    @property
    def planned(self) -> dict[str, int]:
        """Training batches by site."""
        weights = [WEIGHTS[number % len(WEIGHTS)] for number in range(self.sites)]
        return {f"site{n:04}": round(self.batches * weight / sum(weights)) for n, weight in enumerate(weights)}

    def write(self, folder: Path, broker: str, store: str) -> None:
        """run.toml and server.toml."""
        features = [f"x{number}" for number in range(INPUTS)]
        names = list(self.planned)
        text = RUN.format(sites=json.dumps(names), batch=BATCH, inputs=INPUTS, width=WIDTH, features=features)
        (folder / "run.toml").write_text(text)
        (folder / "server.toml").write_text(SERVER_FILE.format(broker=broker, store=store))


def parts_of(name: str, batches: int) -> Splits:
    """Data of a site: so many batches, and no test patients."""
    generator = torch.Generator().manual_seed(int(name.removeprefix("site")))
    inputs = torch.randn(batches * BATCH, INPUTS, generator=generator)
    train = Dataset(inputs, (inputs[:, 0] > 0).float(), tuple(map(str, range(len(inputs)))))
    nobody = train.select([])
    return Splits(train, nobody, nobody)


def sites(line: Connection, planned: Mapping[str, int], folder: Path, url: str) -> None:
    """Sites in one process: connects them, then at a word of ours works a night, and at the next one a day."""
    prepare_torch(1, "cpu")
    config = load_run(folder / "run.toml")
    splits = {name: parts_of(name, batches) for name, batches in planned.items()}
    crowd = Simulation(
        config, splits, folder, broker=RabbitBroker(url), prefetch=prefetch_for(MESSAGE_BYTES), clock=SystemClock(),
        workers=list(planned), on_disk=True,
    )  # fmt: skip

    def has_published(site: str) -> bool:
        """True if its whole plan is at the broker."""
        role = crowd.sites[site]
        return role.next_seq > role.sequence.last and not crowd.links[site].unconfirmed

    for site in planned:
        crowd.start(site)
    line.send("connected")
    line.recv()
    crowd.run(until=has_published)
    line.send("published")
    line.recv()
    crowd.run()
    line.send("finished")


@contextmanager
def in_processes(crowd: Crowd, processes: int, folder: Path, url: str) -> Iterator[list[Worker]]:
    """The crowd, divided over some processes, connected to the broker."""
    planned = list(crowd.planned.items())
    with ExitStack() as stack:
        workers = [
            stack.enter_context(Worker(sites, dict(planned[number::processes]), folder, url))
            for number in range(processes)
        ]
        for worker in workers:
            worker.hear()
        yield workers
