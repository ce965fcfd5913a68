"""One site and one server as processes, and the same model uncut in one process.

Both halves run what a hospital runs: role, engine, checkpoints on disk, lease and checkpoint pointer in SQLite,
a link with persistent messages and confirms. Only the data are synthetic and in memory.
"""

from __future__ import annotations

import copy
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.common import MiB, Place, cpu_seconds, resident_bytes
from broker.base import Link, Queue
from broker.topology import SiteQueues, site_queues
from server_worker.lease import Lease
from server_worker.protocols.split_labels import SplitLabelsServer
from server_worker.top import Top
from shared import wire
from shared.checkpoint import Checkpoints
from shared.config import ModelSection, OptimizerSection, RunConfig, RunSection, TaskSection, WireSection
from shared.contract import Payload
from shared.effects import Record
from shared.engine import Engine, Route
from shared.message import SERVER, Kind
from shared.models.cutting import Halves, build, output_shapes
from shared.protocols.assembly import planned_message_bytes
from shared.protocols.stream import payloads
from shared.roles import Role
from shared.stores import open_store
from shared.tasks import loss_of
from shared.training import make_optimizer
from shared.worker import prefetch_for, prepare_torch
from site_worker.bottom import Bottom
from site_worker.data.dataset import Dataset, Parts
from site_worker.feed import Feed
from site_worker.protocols.split_labels import SplitLabelsSite
from site_worker.worker import Alone

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
    """What is trained.

    Attributes:
        factory: of this module.
        side: of the square images, three channels.
        batch: samples per batch.
        cut: stages at the site.
        codec: of activations and gradients.
        batches: how many are trained.
        warmup: batches before the clock starts.
    """

    factory: str
    side: int
    batch: int
    cut: int
    codec: str = "fp16"
    batches: int = 200
    warmup: int = 24
    window: int = 4
    order: str = "strict"

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one sample."""
        return (3, self.side, self.side)

    def config(self, run: str) -> RunConfig:
        """As run.toml would have it."""
        return RunConfig(
            run=RunSection(
                id=run, protocol="split_labels", sites=[SITE], order=self.order, window=self.window,
                epochs=-(-self.batches // BATCHES_PER_EPOCH), evaluate_every=10**9, batch_size=self.batch,
            ),
            model=ModelSection(factory=f"benchmarks.split:{self.factory}", cut=self.cut),
            task=TaskSection(kind="multiclass", classes=10),
            optimizer=OPTIMIZER,
            wire=WireSection(smashed=self.codec, gradient=self.codec, queue_bytes=8 * 2**30),
        )  # fmt: skip

    def parts(self) -> Parts:
        """Noise with labels: an epoch of training data, nothing held out."""
        count = self.batch * min(BATCHES_PER_EPOCH, self.batches)
        generator = torch.Generator().manual_seed(1)

        def part(n: int) -> Dataset:
            inputs = torch.randn(n, *self.shape, generator=generator)
            targets = torch.randint(0, 10, (n,), generator=generator)
            return Dataset(inputs, targets, tuple(str(i) for i in range(n)))

        return Parts(part(count), part(0), part(0))

    def assemble(self, run: str) -> tuple[RunConfig, Halves, dict[Kind, Payload]]:
        """Configuration, model and contract."""
        config = self.config(run)
        halves = build(config.model, config.run.seed, with_head=False)
        cut = output_shapes(halves, self.shape).cut
        return config, halves, dict(payloads(config, cut, None, halves.bottom, halves.top))

    def queues(self, run: str) -> SiteQueues:
        """Of the run's one site."""
        return site_queues(run, SITE, self.config(run).wire.queue_bytes)


# ── the two workers ─────────────────────────────────────────────────────────────────────────────


class Times:
    """Where a worker's loop spends its time: the role, the codecs, the link, waiting; the rest is the engine."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()

    def watch(self, owner: Any, method: str, name: str) -> None:
        """Count the time of every call of `owner.method` under `name`."""
        original: Callable[..., Any] = getattr(owner, method)

        def timed(*arguments: Any, **named: Any) -> Any:
            began = time.perf_counter()
            try:
                return original(*arguments, **named)
            finally:
                # A positive timeout means that there was nothing else to do.
                waiting = method == "receive" and arguments[0] > 0
                self.seconds["waiting" if waiting else name] += time.perf_counter() - began

        setattr(owner, method, timed)

    def watch_all(self, role: Role, link: Link) -> None:
        """All that is not the engine itself."""
        for owner, methods, name in (
            (role, ("on", "next"), "role"),
            (wire, ("encode", "decode"), "codec"),
            (link, ("publish", "receive"), "link"),
        ):
            for method in methods:
                self.watch(owner, method, name)


def server(line: Connection, case: Case, run: str, place: Place, folder: Path) -> None:
    """Trains to the end of the run, and says how it went from batch `warmup` on."""
    prepare_torch(1, "cpu")
    config, role, queues, prefetch = _server(case, run)
    store = open_store("sqlite:store.sqlite", run, folder)
    lease = Lease(store, SERVER)
    lease.acquire(lambda seconds: True)
    times, marks, site_ids = Times(), [], {"pid": 0, "thread": 0}

    with place.broker().link([queues.up], prefetch, SERVER) as link:

        def record(metrics: Record) -> None:
            if role.steps in (case.warmup, case.batches):
                marks.append((time.perf_counter(), times.seconds.copy(), _cpu(place, link, site_ids)))

        engine = Engine(
            run, role, link, _routes(SITE, queues.down, queues.up, queues), Checkpoints(folder / SERVER), lease,
            record, config.wire.message_bytes,
        )  # fmt: skip
        times.watch_all(role, link)
        line.send("ready")
        site_ids.update(line.recv())
        if not engine.run(lambda: False, idle_seconds=120.0):
            raise RuntimeError("the run did not end")
    store.close()
    (began, times_before, cpu_before), (ended, times_after, cpu_after) = marks
    line.send(
        {
            "samples_per_s": (case.batches - case.warmup) * case.batch / (ended - began),
            "seconds": ended - began,
            "times": times_after - times_before,
            "cpu": {name: cpu_after[name] - cpu_before[name] for name in cpu_after},
            "checkpoints": engine.progress.counts["checkpoints"],
        }
    )


def site(line: Connection, case: Case, run: str, place: Place, folder: Path, backlog: int = 0) -> None:
    """Works until the run is over; or, while no server is there, publishes `backlog` bytes and tells its memory."""
    prepare_torch(1, "cpu")
    config, halves, contract = case.assemble(run)
    bottom = Bottom(halves.bottom, config.optimizer, "cpu")
    role = SplitLabelsSite(SITE, config, bottom, Feed(config, SITE, case.parts()), contract, "first")
    queues = case.queues(run)
    with place.broker().link([queues.down], _prefetch(config, contract, Kind.CUT_GRADIENT), SITE) as link:
        engine = Engine(
            run, role, link, _routes(SERVER, queues.up, queues.down, queues), Checkpoints(folder / SITE), Alone(),
            message_bytes=config.wire.message_bytes,
        )  # fmt: skip
        if backlog:
            line.send(_night(engine, planned_message_bytes(config, {Kind.SMASHED: contract[Kind.SMASHED]}), backlog))
            return
        line.send({"pid": os.getpid(), "thread": io_thread(link)})
        line.recv()
        if not engine.run(lambda: False, idle_seconds=120.0):
            raise RuntimeError("the run did not end")
    line.send("finished")


def _night(engine: Engine, message_bytes: int, backlog: int) -> list[int]:
    """Memory when torch and all bounded buffers have their size, and when `backlog` bytes are at the broker."""
    engine.start()
    samples = []
    for bytes_out in (32 * MiB, backlog):
        while engine.progress.counts["confirmed"] * message_bytes < bytes_out:
            engine.step(0.1)
        samples.append(resident_bytes())
    engine.leave()
    return samples


def open_run(case: Case, run: str, place: Place, folder: Path) -> None:
    """Put the run's manifest into the site's queue, as `nightsplit server --open-only` does."""
    config, role, queues, prefetch = _server(case, run)
    with place.broker().link([], prefetch, SERVER) as link:
        routes = _routes(SITE, queues.down, queues.up, queues)
        Engine(run, role, link, routes, Checkpoints(folder / SERVER), Alone()).run(lambda: False, idle_seconds=0.0)


def _server(case: Case, run: str) -> tuple[RunConfig, SplitLabelsServer, SiteQueues, int]:
    config, halves, contract = case.assemble(run)
    top = Top(halves.top, config.optimizer, config.task, "cpu")
    prefetch = _prefetch(config, contract, Kind.SMASHED)
    return config, SplitLabelsServer(config, top, contract), case.queues(run), prefetch


def _routes(peer: str, outgoing: Queue, incoming: Queue, queues: SiteQueues) -> dict[str, Route]:
    return {peer: Route(outgoing=outgoing, incoming=incoming, dead=queues.dead)}


def _prefetch(config: RunConfig, contract: Mapping[Kind, Payload], kind: Kind) -> int:
    return prefetch_for(planned_message_bytes(config, {kind: contract[kind]}))


def io_thread(link: Link) -> int:
    """Thread id of a RabbitMQ link's network loop."""
    thread: threading.Thread = link._thread  # type: ignore[attr-defined]
    assert thread.native_id is not None
    return thread.native_id


def _cpu(place: Place, link: Link, site_ids: Mapping[str, int]) -> dict[str, float]:
    """CPU seconds so far of both workers with their links, of the links alone, and of the broker."""
    return {
        "workers": cpu_seconds(os.getpid()) + cpu_seconds(site_ids["pid"]),
        "links": cpu_seconds(os.getpid(), io_thread(link)) + cpu_seconds(site_ids["pid"], site_ids["thread"]),
        "broker": cpu_seconds(place.pid) if place.pid else 0.0,
    }


# ── one process ─────────────────────────────────────────────────────────────────────────────────


def uncut(line: Connection, case: Case) -> None:
    """Answers ("whole", threads, batches) with samples/s, ("stages", 1, batches) with seconds per batch of each half."""
    config, halves, _ = case.assemble("uncut")
    feed = Feed(config, SITE, case.parts())
    model = nn.Sequential(halves.bottom, halves.top)
    optimizer = make_optimizer(config.optimizer, model.parameters())
    bottom = Bottom(copy.deepcopy(halves.bottom), config.optimizer, "cpu")
    top = Top(copy.deepcopy(halves.top), config.optimizer, config.task, "cpu")

    def whole(q: int) -> None:
        loss = loss_of(config.task, model(feed.inputs(q)), feed.targets(q))
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        loss.item()

    def seconds(work: Callable[[int], object], batches: int) -> float:
        for q in (1, 2, 3):
            work(q)
        began = time.perf_counter()
        for q in range(batches):
            work(1 + q % feed.plan.last)
        return (time.perf_counter() - began) / batches

    while (asked := line.recv()) is not None:
        what, threads, batches = asked
        prepare_torch(threads, "cpu")
        if what == "whole":
            line.send(case.batch / seconds(whole, batches))
            continue
        smashed = bottom.forward(0, 0, feed.inputs(1), 0, training=False)

        def half(q: int, gradient: torch.Tensor = smashed * 1e-6) -> None:
            bottom.forget(bottom.version)
            inputs = feed.inputs(q)
            bottom.forward(q, bottom.version, inputs, 0, training=True)
            bottom.learn(q, bottom.version, inputs, 0, gradient)

        line.send((seconds(half, batches), seconds(lambda q: top.learn(smashed, feed.targets(q), 0), batches)))
