"""Many light sites: real roles, engines and links (two connections each), several in one process, taking turns."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from benchmarks.speed.common import Worker
from nightsplit.broker.rabbitmq.broker import RabbitBroker
from nightsplit.broker.topology import site_queues
from nightsplit.shared.config.run import RunConfig
from nightsplit.shared.engine.engine import Engine
from nightsplit.shared.engine.fencing import SoleWriter
from nightsplit.shared.engine.mailbox import Mailbox
from nightsplit.shared.protocols.load import load_run
from nightsplit.shared.runtime.process import prefetch_for, prepare_torch
from nightsplit.shared.storage.checkpoint import Checkpoints
from nightsplit.shared.transport import Route
from nightsplit.shared.wire.message import SERVER
from nightsplit.site_worker.data.dataset import Dataset, Splits
from nightsplit.site_worker.protocols import make_site

INPUTS, WIDTH, BATCH = 16, 64, 32
MESSAGE_BYTES = BATCH * (2 * WIDTH + 4)
"""Of a batch on its way up: activations in fp16, labels in fp32."""
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


class LightSite:
    """A site without a process of its own."""

    def __init__(self, name: str, batches: int, config: RunConfig, folder: Path, url: str) -> None:
        generator = torch.Generator().manual_seed(int(name.removeprefix("site")))
        inputs = torch.randn(batches * BATCH, INPUTS, generator=generator)
        train = Dataset(inputs, (inputs[:, 0] > 0).float(), tuple(map(str, range(len(inputs)))))
        nobody = train.select([])
        queues = site_queues(config.run.id, name, config.wire.queue_bytes)
        self.role = make_site(name, config, Splits(train, nobody, nobody), name, Path())
        self.link = RabbitBroker(url).link([queues.down], prefetch_for(MESSAGE_BYTES), name)
        routes = {SERVER: Route(queues.up, queues.down, queues.dead)}
        mailbox = Mailbox(config.run.id, name, self.link, routes, self.role.payload, config.wire.message_bytes)
        self.engine = Engine(self.role, mailbox, Checkpoints(folder / name), SoleWriter())

    def has_published(self) -> bool:
        """Whether its whole plan is at the broker."""
        return self.role.next_seq > self.role.planned and not self.link.unconfirmed


def sites(line: Connection, planned: Mapping[str, int], folder: Path, url: str) -> None:
    """Sites in one process: connects them, then at a word of ours works a night, and at the next one a day."""
    prepare_torch(1, "cpu")
    config = load_run(folder / "run.toml")
    crowd = [LightSite(name, batches, config, folder, url) for name, batches in planned.items()]
    line.send("connected")
    line.recv()
    for site in crowd:
        site.engine.start()
    _take_turns(crowd, LightSite.has_published)
    line.send("published")
    line.recv()
    _take_turns(crowd, lambda site: site.engine.finished)
    for site in crowd:
        site.engine.leave()
        site.link.close()
    line.send("finished")


def _take_turns(crowd: Sequence[LightSite], done: Callable[[LightSite], bool]) -> None:
    at_work = list(crowd)
    while at_work:
        if not sum(site.engine.step(0.0) for site in at_work):
            time.sleep(0.005)
        at_work = [site for site in at_work if not done(site)]


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
