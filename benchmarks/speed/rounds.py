"""Time of a round of federated training besides the training, and speed of combining updates.

    python -m benchmarks.speed.rounds [--quick] [--rounds N] [--json FILE] [--broker URL]

Overhead: four sites with a model of 2 million weights report over RabbitMQ; at the server, the seconds from
the delivery of the last update to the moment when the last model was handed to the broker's connection, less
the arithmetic of combining. Real roles and engines; each site trains on a single sample.

Arithmetic: 32 updates of 25 million weights through `WeightedMean`, slice by slice, beside the bandwidth of
`torch.add` on vectors of that length in the same round. One thread each.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from torch import nn
from typing_extensions import override

from benchmarks.speed.common import MiB, Place, Worker, fresh_name, queues_of, rabbitmq, resident_bytes, scratch
from benchmarks.speed.figures import Figure, Results, arguments
from nightsplit.broker.link_wrapper import LinkWrapper
from nightsplit.broker.topology import SiteQueues, site_queues
from nightsplit.server_worker.aggregation import Aggregation
from nightsplit.server_worker.protocols import make_server_role
from nightsplit.server_worker.rounds.role import RoundServer
from nightsplit.shared.clock import SystemClock
from nightsplit.shared.config.optimizer import OptimizerSection
from nightsplit.shared.config.run import (
    DataSection,
    ModelSection,
    RoundSection,
    RunConfig,
    RunSection,
    TaskSection,
    WireSection,
)
from nightsplit.shared.engine.engine import Engine
from nightsplit.shared.engine.fencing import SoleWriter
from nightsplit.shared.engine.mailbox import Mailbox
from nightsplit.shared.runtime.process import prefetch_for, prepare_torch
from nightsplit.shared.storage.checkpoint import Checkpoints
from nightsplit.shared.storage.sent import FOLDER, SentMessages
from nightsplit.shared.transport import Broker, Delivery, Event, Link, Queue, Route
from nightsplit.shared.wire.message import SERVER
from nightsplit.simulation.run import Simulation
from nightsplit.site_worker.data.dataset import Dataset, Splits

SITES = ("north", "south", "east", "west")
WIDTH = 1408
"""1 x WIDTH, WIDTH x WIDTH, WIDTH x 1: 1,988,097 weights."""
UPDATES, WEIGHTS, SLICE = 32, 25_000_000, 4 * 2**20
FLOWER_S = 0.14
"""Seconds per round that Flower 1.41 took in simulation, measured elsewhere on another machine."""

FIGURES = [
    Figure("round_overhead_s", "RabbitMQ, 2 M weights, 4 sites: s per round", FLOWER_S, FLOWER_S, lower_is_better=True),
    Figure(
        "round_confirmed_s",
        "  until the broker has confirmed all four models",
        FLOWER_S,
        FLOWER_S,
        lower_is_better=True,
    ),
    Figure("round_arithmetic_s", "  s of combining in that"),
    Figure("combine_over_memory", "32 x 25 M weights: over the bandwidth of torch.add", 0.5, 0.5),
    Figure("combine_gb_per_s", "  GB per second"),
    Figure("combine_models", "  memory that it adds, in models", 2.0, 2.0, lower_is_better=True),
]


def network() -> nn.Sequential:
    """About 2 million weights."""
    return nn.Sequential(nn.Linear(1, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 1))


def config_of(run: str, rounds: int) -> RunConfig:
    """As run.toml would have it."""
    return RunConfig(
        run=RunSection(
            id=run, protocol="fedavg_transfer", sites=list(SITES), order="strict", batch_size=1, evaluate_every=10**9
        ),
        model=ModelSection(factory="benchmarks.speed.rounds:network"),
        task=TaskSection(kind="regression"),
        optimizer=OptimizerSection(name="sgd", lr=1e-3),
        round=RoundSection(rounds=rounds),
        wire=WireSection(message_bytes=16 * MiB),
        data=DataSection(features=["x"]),
    )


class Timed(LinkWrapper):
    """Notes when updates came and models left, on its way through."""

    def __init__(self, link: Link) -> None:
        super().__init__(link)
        self.came, self.left = 0.0, 0.0

    @override
    def receive(self, timeout: float) -> Event | None:
        event = super().receive(timeout)
        if isinstance(event, Delivery):
            self.came = time.perf_counter()
        return event

    @override
    def publish(
        self, queue: Queue, message_id: str, body: Sequence[bytes | memoryview], headers: Mapping[str, str] = {}
    ) -> None:
        super().publish(queue, message_id, body, headers)
        self.left = time.perf_counter()


def _queues(run: str) -> dict[str, SiteQueues]:
    return {site: site_queues(run, site, WireSection().queue_bytes) for site in SITES}


def serve(line: Connection, place: Place, run: str, rounds: int, folder: Path) -> None:
    """The server; says the seconds of each round, and of its arithmetic."""
    prepare_torch(1, "cpu")
    config = config_of(run, rounds)
    role = make_server_role(config, folder, folder)
    assert isinstance(role, RoundServer)
    queues = _queues(run)
    with place.broker().link([q.up for q in queues.values()], prefetch_for(8 * MiB, len(SITES)), SERVER) as inner:
        link = Timed(inner)
        routes = {site: Route(q.down, q.up, q.dead) for site, q in queues.items()}
        mailbox = Mailbox(run, SERVER, link, routes, role.payload, config.wire.message_bytes)
        mailbox.sent = SentMessages(folder / SERVER / FOLDER)
        engine = Engine(role, mailbox, Checkpoints(folder / SERVER), SoleWriter())
        engine.start()
        line.send("ready")
        seconds, confirmed, version, open_since = [], [], 0, 0.0
        while not engine.finished:
            engine.step(0.001)
            if role.version > version:
                version, open_since = role.version, link.came
                seconds.append(link.left - link.came)
            if open_since and not link.unconfirmed:
                confirmed.append(time.perf_counter() - open_since)
                open_since = 0.0
        engine.leave()
        line.send((seconds, confirmed, [_arithmetic(role.layout.length) for _ in range(5)]))


def _arithmetic(length: int) -> float:
    """Seconds that combining takes after the last update: the weights of the sites, their sum, the new model."""
    model, update, aggregation = torch.zeros(length), torch.ones(length), Aggregation(RoundSection())
    for site in SITES[1:]:
        aggregation.add(site, [update], 1.0)
    began = time.perf_counter()
    aggregation.add(SITES[0], [update], 1.0)
    model = model.clone()
    model += next(aggregation.result())
    return time.perf_counter() - began


def take_part(line: Connection, place: Place, run: str, rounds: int, folder: Path) -> None:
    """All sites, in one process."""
    prepare_torch(1, "cpu")
    config = config_of(run, rounds)
    one = Dataset(torch.ones(1, 1), torch.ones(1), ("a",))
    nobody = one.select([])
    Simulation(
        config, dict.fromkeys(SITES, Splits(one, nobody, nobody)), folder, broker=place.broker(),
        prefetch=prefetch_for(8 * MiB), clock=SystemClock(), workers=SITES, on_disk=True,
    ).run()  # fmt: skip
    line.send("finished")


def overhead(place: Place, rounds: int) -> dict[str, float]:
    """Seconds per round at the server."""
    run = fresh_name("rounds")
    broker: Broker = place.broker()
    queues = [queue for site in _queues(run).values() for queue in site]
    with scratch() as folder, queues_of(broker, queues), Worker(serve, place, run, rounds, folder) as server:
        server.hear()
        with Worker(take_part, place, run, rounds, folder) as sites:
            sites.hear()
            seconds, confirmed, arithmetic = server.hear()
    combining = statistics.median(arithmetic)
    return {
        "round_overhead_s": statistics.median(seconds) - combining,
        "round_confirmed_s": statistics.median(confirmed) - combining,
        "round_arithmetic_s": combining,
    }


def combine(line: Connection, updates: int, weights: int) -> None:
    """32 updates, one after the other; says ratio, GB per second and memory."""
    prepare_torch(1, "cpu")
    generator = torch.Generator().manual_seed(1)
    update = torch.randn(weights, generator=generator)
    slices = update.split(SLICE)
    before = resident_bytes()
    aggregation = Aggregation(RoundSection(combine="mean"))
    began = time.perf_counter()
    for number in range(updates):
        aggregation.add(str(number), slices, float(number + 1))
    for change in aggregation.result():
        assert change.isfinite().all()
    seconds = time.perf_counter() - began
    memory = (resident_bytes() - before) / (4 * weights)
    # As if each were added once: reads update and sum, and writes the sum; the first one only reads and writes.
    moved = 4 * weights * (3 * updates - 1)
    one, other, total = torch.randn(weights), torch.randn(weights), torch.empty(weights)
    torch.add(one, other, out=total)
    began = time.perf_counter()
    for _ in range(updates):
        torch.add(one, other, out=total)
    bandwidth = 3 * 4 * weights * updates / (time.perf_counter() - began)
    line.send((moved / seconds / bandwidth, moved / seconds / 1e9, memory))


def combined(updates: int, weights: int) -> dict[str, float]:
    """Combine updates; arguments as of `combine`."""
    with Worker(combine, updates, weights) as worker:
        ratio, rate, memory = worker.hear()
    return {"combine_over_memory": ratio, "combine_gb_per_s": rate, "combine_models": memory}


def main() -> None:
    options = arguments(__doc__ or "", rounds=5).parse_args()
    with rabbitmq(options.broker) as place:
        results = Results(FIGURES, options.patience, options.retries, place.pid)
        for number in range(2 if options.quick else options.rounds):
            results.console.print(f"round {number + 1}:")
            results.round("overhead", partial(overhead, place, 4 if options.quick else 12))
            results.round("combine", partial(combined, UPDATES, WEIGHTS // (10 if options.quick else 1)))
    results.finish("Rounds", options.json)


if __name__ == "__main__":
    main()
