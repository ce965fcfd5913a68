"""Whole run in one process: the real roles, engines and wire format, any broker, a clock that is moved by hand.

    config, splits ──▶ Simulation ──run()──▶ fingerprint(), evaluate()
                         │ step(worker), kill(worker), restart(worker) for full control

A worker can be killed between any two steps, as by SIGKILL. All that a process would leave behind stays: checkpoints
(in memory or on disk), messages at the broker, the run store. In strict order the result is bit-identical to that of a
run with real processes and real nights. Seeded faults come from the broker (`FaultyBroker`).
"""

import hashlib
import tempfile
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Self

import torch
from torch.func import functional_call
from typing_extensions import override

from nightsplit.broker.link_wrapper import LinkWrapper
from nightsplit.broker.topology import site_queues
from nightsplit.server_worker.lease import Lease
from nightsplit.server_worker.protocols import AnyServer, make_server_role
from nightsplit.server_worker.role import ServerRole
from nightsplit.shared.clock import Clock
from nightsplit.shared.config.run import RunConfig
from nightsplit.shared.engine.effects import Record, forbid_spending
from nightsplit.shared.engine.engine import Engine
from nightsplit.shared.engine.fencing import CheckpointAuthority, SoleWriter
from nightsplit.shared.engine.mailbox import Mailbox
from nightsplit.shared.engine.order import OrderEntry
from nightsplit.shared.learning.seeds import Seed
from nightsplit.shared.protocols.build import build_model
from nightsplit.shared.protocols.spec import spec_of
from nightsplit.shared.storage.checkpoint import Checkpoints
from nightsplit.shared.transport import Broker, Link, Queue, Route
from nightsplit.shared.wire.message import SERVER
from nightsplit.simulation.broker import MemoryBroker
from nightsplit.simulation.checkpoints import MemoryCheckpoints, MemorySent, SentByPlace
from nightsplit.simulation.clock import ManualClock
from nightsplit.simulation.evaluate import ModelFigures, evaluate
from nightsplit.simulation.scheduler import Scheduler
from nightsplit.simulation.store import MemoryStore
from nightsplit.site_worker.data.dataset import Splits
from nightsplit.site_worker.protocols import Budget, make_site
from nightsplit.site_worker.protocols.data_vectors import DataVectorsSite
from nightsplit.site_worker.role import SiteRole
from nightsplit.site_worker.rounds.role import RoundSite
from nightsplit.site_worker.stream.role import StreamSite

PREFETCH = 512
"""Deliveries per queue; a checkpoint follows every quarter of them."""
START = datetime(2026, 3, 1, 22, tzinfo=UTC)


class Simulation:
    """Run with all its workers in this process.

    Args:
        splits: scaled data by site.
        folder: folder of the workers' files: released activations, ledgers, and checkpoints if they are on disk.
        base: folder of run.toml and of `model.initial`.
        broker: the broker; by default one in memory.
        clock: the clock; by default one that is moved by hand.
        workers: workers in this simulation; by default all.
        on_disk: whether checkpoints are on disk.

    Attributes:
        roles: roles of all workers that were ever started, in their last state.
        engines, links: engines and links of the workers at work.
        finished: workers that have finished the run.
        lines: metrics of all workers.
        decide: as in `DeliveryOrder`.
        ledgers: folder of the privacy ledgers.
        seeds: secret seeds by site; a site without one uses the run's public seed.
    """

    def __init__(  # noqa: PLR0913  (tests name the few that they need)
        self, config: RunConfig, splits: Mapping[str, Splits], folder: Path, base: Path = Path(),
        broker: Broker | None = None, prefetch: int = PREFETCH, clock: Clock | None = None,
        workers: Sequence[str] = (), device: str = "cpu", on_disk: bool = False,
    ) -> None:  # fmt: skip
        self.config, self.splits, self.folder, self.base = config, splits, folder, base
        self.broker = broker or MemoryBroker(config.wire.message_bytes)
        self.clock = clock or ManualClock(START)
        self.workers = workers or (SERVER, *config.run.sites)
        self.store = MemoryStore()
        self._sent: SentByPlace = {}
        self.checkpoints: dict[str, Checkpoints] = {
            worker: Checkpoints(folder / worker / "checkpoints") if on_disk else MemoryCheckpoints()
            for worker in self.workers
        }
        self.queues = {site: site_queues(config.run.id, site, config.wire.queue_bytes) for site in config.run.sites}
        self.broker.declare(queue for queues in self.queues.values() for queue in queues)
        self.roles: dict[str, SiteRole | AnyServer] = {}
        self.engines: dict[str, Engine] = {}
        self.links: dict[str, Link] = {}
        self.finished: set[str] = set()
        self.lines: list[Record] = []
        self.decide: Callable[[], OrderEntry | None] = lambda: None
        self.ledgers = folder
        self.seeds: dict[str, Seed] = {}
        self._prefetch, self._device = prefetch, device
        self._starts = 0
        self._scheduler = Scheduler(self.clock, ())
        self._readers = {queues.up.name: SERVER for queues in self.queues.values()}
        self._readers |= {queues.down.name: site for site, queues in self.queues.items()}

    def start(self, worker: str) -> Engine:
        """Start a worker from its newest checkpoint, as a new process would."""
        engine = self._build_engine(worker)
        engine.start()
        return engine

    def step(self, worker: str) -> bool:
        """Run one turn of a worker's loop, and end it if it has finished; return whether it had work."""
        engine = self.engines[worker]
        worked = engine.step(0.0)
        if engine.finished:
            engine.leave()
            self.kill(worker)
            self.finished.add(worker)
        return worked

    def kill(self, worker: str) -> None:
        """Remove a worker as SIGKILL would: only its link and its open files end."""
        self.links.pop(worker).close()
        del self.engines[worker]
        role = self.roles[worker]
        if isinstance(role, SiteRole) and role.account is not None:
            role.account.close()

    def restart(self, worker: str) -> Engine:
        """Kill a worker and start it again."""
        self.kill(worker)
        return self.start(worker)

    def run(self, until: Callable[[str], bool] = lambda worker: False) -> Self:
        """Run all workers by turns, each until it has finished or `until` holds for it."""
        for worker in self.workers:
            if worker not in self.engines and worker not in self.finished:
                self.start(worker)
        self._scheduler = Scheduler(self.clock, [worker for worker in self.workers if worker in self.engines])
        for worker in self._scheduler:
            worked = self.step(worker)
            if worker in self.engines and not until(worker):
                self._scheduler.again(worked)
        return self

    def work(self, worker: str, idle_seconds: float = 0.3) -> bool:
        """Run one worker alone until it has no work for `idle_seconds`; return whether it has finished."""
        finished = self._build_engine(worker).run(lambda: False, idle_seconds)
        self.kill(worker)
        if finished:
            self.finished.add(worker)
        return finished

    def _build_engine(self, worker: str) -> Engine:
        """Build a worker's role, link and engine, as a new process would, and restore its newest checkpoint."""
        self._starts += 1
        config, spend = self.config, forbid_spending
        authority: CheckpointAuthority = SoleWriter()
        if worker == SERVER:
            role: SiteRole | AnyServer = make_server_role(config, self.folder / SERVER, self.base, self._device)
            routes = {site: Route(q.down, q.up, q.dead) for site, q in self.queues.items()}
            authority = lease = Lease(self.store, SERVER)
            lease.acquire(lambda seconds: True)  # never waits: nothing else holds it
        else:
            incarnation, ledger = f"{worker}-{self._starts}", self.ledgers / f"{config.digest}-{worker}.db"
            role = make_site(
                worker, config, self.splits[worker], incarnation, self.base, self._device, Budget(ledger),
                self.seeds.get(worker),
            )  # fmt: skip
            queues = self.queues[worker]
            routes = {SERVER: Route(queues.up, queues.down, queues.dead)}
            spend = role.account.pay if role.account else forbid_spending
        consume = [route.incoming for route in routes.values()]
        link = _NotifyingLink(self.broker.link(consume, self._prefetch, worker), self._wake_reader)
        mailbox = Mailbox(config.run.id, worker, link, routes, role.payload, config.wire.message_bytes)
        if not role.rederives:
            mailbox.sent = MemorySent(self._sent)
        checkpoints = self.checkpoints[worker]
        decide = lambda: self.decide()  # noqa: E731  (a test may set another one later)
        engine = Engine(role, mailbox, checkpoints, authority, self.lines.append, spend, decide)
        engine.monotonic = lambda: self.clock.now().timestamp()
        engine.recover()
        self.links[worker], self.roles[worker], self.engines[worker] = link, role, engine
        return engine

    def _wake_reader(self, queue: Queue) -> None:
        """Wake the worker that reads `queue`."""
        if queue.name in self._readers:
            self._scheduler.wake(self._readers[queue.name])

    @property
    def server(self) -> AnyServer:
        """The server's role."""
        role = self.roles[SERVER]
        assert isinstance(role, ServerRole)
        return role

    @property
    def sites(self) -> dict[str, SiteRole]:
        """The sites' roles."""
        return {name: role for name, role in self.roles.items() if isinstance(role, SiteRole)}

    def journal(self) -> list[str]:
        """Return the entries of the order journal."""
        entries: list[str] = []
        while (entry := self.store.journal_entry(len(entries) + 1)) is not None:
            entries.append(entry)
        return entries

    def fingerprint(self, *omitted: str) -> str:
        """Return the SHA-256 of all final and best weights, without those of the `omitted` workers."""
        digest = hashlib.sha256()
        for worker in self.workers:
            if worker in omitted:
                continue
            for state in _result_weights(self.roles[worker]):
                for key in sorted(state):
                    digest.update(key.encode() + state[key].cpu().numpy().tobytes())
        return digest.hexdigest()

    def evaluate(self, splits: Mapping[str, Splits] | None = None) -> ModelFigures:
        """Evaluate the best model, with each site's own part, on the test patients of `splits` or of the run."""
        modules = build_model(self.config, self.base).modules

        def predict(site: str, inputs: torch.Tensor) -> torch.Tensor:
            role = self.sites.get(site) or next(iter(self.sites.values()))  # a baseline's one site serves all of them
            weights = role.model()
            part = spec_of(self.config).names.weights
            # The server's best weights, and statistics that never leave a site.
            weights[part] = {**weights.get(part, {}), **self.server.best_weights}
            with torch.no_grad():
                for name, module in modules.items():
                    inputs = functional_call(module.eval(), dict(weights[name]), inputs)
            return inputs

        return evaluate(self.config, splits or self.splits, predict)


def simulate(config: RunConfig, splits: Mapping[str, Splits], base: Path = Path()) -> Simulation:
    """Run a simulation to its end; arguments as of `Simulation`."""
    with tempfile.TemporaryDirectory(prefix="nightsplit-") as folder:
        return Simulation(config, splits, Path(folder), base).run()


class _NotifyingLink(LinkWrapper):
    """Link that reports the queue of every published message."""

    def __init__(self, link: Link, notify: Callable[[Queue], None]) -> None:
        super().__init__(link)
        self._notify = notify

    @override
    def publish(
        self, queue: Queue, message_id: str, body: Sequence[bytes | memoryview], headers: Mapping[str, str] = {}
    ) -> None:
        super().publish(queue, message_id, body, headers)
        self._notify(queue)


def _result_weights(role: SiteRole | AnyServer) -> list[Mapping[str, torch.Tensor]]:
    """Return the final and best weights of a worker."""
    match role:
        case ServerRole():
            return [role.weights(), role.best_weights]
        case DataVectorsSite():  # its trainer still has the last scale that it evaluated
            return [*role.model().values()]
        case RoundSite():
            return [role.trainer.weights(), *role.model().values()]
        case StreamSite():
            return [role.bottom.module.state_dict(), role.final_bottom()]
    raise TypeError(f"{type(role).__name__} has no weights")
