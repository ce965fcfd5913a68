"""One site and one server as processes, and the same model uncut in one process.

Both parts run what a hospital runs: role, engine, checkpoints on disk, lease and checkpoint pointer in SQLite,
a link with persistent messages and confirms. Only the data are synthetic and in memory.
"""

from __future__ import annotations

import copy
import os
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.speed.cases import SITE, Case
from benchmarks.speed.common import MiB, Place, cpu_seconds, resident_bytes
from nightsplit.broker.topology import SiteQueues
from nightsplit.server_worker.lease import Lease
from nightsplit.server_worker.protocols.split_labels import SplitLabelsServer
from nightsplit.server_worker.stream.top import Top
from nightsplit.shared.config.run import RunConfig
from nightsplit.shared.engine.effects import Record
from nightsplit.shared.engine.engine import Engine
from nightsplit.shared.engine.fencing import SoleWriter
from nightsplit.shared.engine.mailbox import Mailbox
from nightsplit.shared.engine.role import Role
from nightsplit.shared.learning.losses import loss_of
from nightsplit.shared.learning.optimizers import PartOptimizer
from nightsplit.shared.protocols.build import SplitModel, planned_message_bytes
from nightsplit.shared.protocols.plan import Item
from nightsplit.shared.run_store.connect import open_store
from nightsplit.shared.runtime.process import prefetch_for, prepare_torch
from nightsplit.shared.storage.checkpoint import Checkpoints
from nightsplit.shared.storage.sent import FOLDER, SentMessages
from nightsplit.shared.transport import Link, Queue, Route
from nightsplit.shared.wire import format as wire
from nightsplit.shared.wire.message import SERVER, Kind
from nightsplit.shared.wire.schema import Payload
from nightsplit.site_worker.protocols.split_labels import SplitLabelsSite
from nightsplit.site_worker.stream.batches import StreamBatches
from nightsplit.site_worker.stream.bottom import Bottom

# ── the two workers ─────────────────────────────────────────────────────────────────────────────


class Times:
    """Time of a worker's loop: the role, the codecs, the link, waiting; the rest is the engine."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)

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
    prepare_torch(case.server_threads, "cpu")
    config, role, queues, prefetch = _server(case, run)
    store = open_store("sqlite:store.sqlite", run, folder)
    lease = Lease(store, SERVER)
    lease.acquire(lambda seconds: True)
    times, marks, site_ids = Times(), [], {"pid": 0, "thread": 0}

    with place.broker().link([queues.up], prefetch, SERVER) as link:

        def record(metrics: Record) -> None:
            if role.steps in (case.warmup, case.batches):
                marks.append((time.perf_counter(), times.seconds.copy(), _cpu(place, link, site_ids)))

        routes = _routes(SITE, queues.down, queues.up, queues)
        mailbox = Mailbox(run, SERVER, link, routes, role.payload, config.wire.message_bytes)
        mailbox.sent = SentMessages(folder / SERVER / FOLDER)
        engine = Engine(role, mailbox, Checkpoints(folder / SERVER), lease, record)
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
            "times": {name: times_after[name] - times_before[name] for name in times_after},
            "cpu": {name: cpu_after[name] - cpu_before[name] for name in cpu_after},
            "checkpoints": engine.counters.counts["checkpoints"],
        }
    )


def site(line: Connection, case: Case, run: str, place: Place, folder: Path, backlog: int = 0) -> None:
    """Works until the run is over; or, while no server is there, publishes `backlog` bytes and tells its memory."""
    prepare_torch(1, "cpu")
    config, parts, contract = case.assemble(run)
    role = SplitLabelsSite(SITE, config, SplitModel(parts, contract), case.parts(), "first", "cpu", config.run.seed)
    queues = case.queues(run)
    with place.broker().link([queues.down], _prefetch(config, contract, Kind.CUT_GRADIENT), SITE) as link:
        routes = _routes(SERVER, queues.up, queues.down, queues)
        mailbox = Mailbox(run, SITE, link, routes, role.payload, config.wire.message_bytes)
        engine = Engine(role, mailbox, Checkpoints(folder / SITE), SoleWriter())
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
        while engine.counters.counts["confirmed"] * message_bytes < bytes_out:
            engine.step(0.1)
        samples.append(resident_bytes())
    engine.leave()
    return samples


def open_run(case: Case, run: str, place: Place, folder: Path) -> None:
    """Put the run's manifest into the site's queue, as `nightsplit server --open-only` does."""
    _, role, queues, prefetch = _server(case, run)
    with place.broker().link([], prefetch, SERVER) as link:
        routes = _routes(SITE, queues.down, queues.up, queues)
        mailbox = Mailbox(run, SERVER, link, routes, role.payload, role.config.wire.message_bytes)
        Engine(role, mailbox, Checkpoints(folder / SERVER), SoleWriter()).run(lambda: False, idle_seconds=0.0)


def _server(case: Case, run: str) -> tuple[RunConfig, SplitLabelsServer, SiteQueues, int]:
    config, parts, contract = case.assemble(run)
    top = Top(parts.top, config.optimizer, config.task, "cpu")
    prefetch = _prefetch(config, contract, Kind.SMASHED)
    return config, SplitLabelsServer(config, top, SplitModel(parts, contract)), case.queues(run), prefetch


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


def uncut(line: Connection, case: Case, tuned: bool) -> None:
    """The whole model, in a plain PyTorch process or in one that is `tuned` as a worker is (`prepare_torch`).

    Answers ("whole", threads, batches) with samples/s, ("stages", 1, batches) with s per batch of each half.
    """
    config, parts, _ = case.assemble("uncut")
    data = StreamBatches(config, SITE, case.parts(), config.run.seed)
    model = nn.Sequential(parts.bottom, parts.top)
    optimizer = PartOptimizer(config.optimizer, model.parameters())
    bottom = Bottom(copy.deepcopy(parts.bottom), config.optimizer, "cpu")
    top = Top(copy.deepcopy(parts.top), config.optimizer, config.task, "cpu")

    def whole(item: Item) -> None:
        loss = loss_of(config.task, model(data.inputs(item)), data.targets(item))
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step(data.plan.progress(item))
        loss.item()

    smashed = bottom.forward(data.plan.item(1), data.inputs(data.plan.item(1)), 0, training=False)
    gradient = smashed * 1e-6

    def site_half(item: Item) -> None:
        bottom.forget(bottom.version)
        item = replace(item, version=bottom.version)
        inputs = data.inputs(item)
        bottom.forward(item, inputs, 0, training=True)
        bottom.apply_gradient(item, inputs, 0, gradient, data.plan.progress(item))

    def server_half(item: Item) -> None:
        top.train_step(smashed, data.targets(item), 0, data.plan.progress(item))

    def seconds(work: Callable[[Item], object], batches: int) -> float:
        for q in (1, 2, 3):
            work(data.plan.item(q))
        began = time.perf_counter()
        for q in range(batches):
            work(data.plan.item(1 + q % data.plan.last))
        return (time.perf_counter() - began) / batches

    while (asked := line.recv()) is not None:
        what, threads, batches = asked
        if tuned:
            prepare_torch(threads, "cpu")
        torch.set_num_threads(threads)
        if what == "whole":
            line.send(case.batch / seconds(whole, batches))
            continue
        line.send(tuple(seconds(half, batches) for half in (site_half, server_half)))
