"""A small run in one process: real roles, engines and checkpoints, any broker, steppable at will."""

from __future__ import annotations

import hashlib
import tempfile
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import torch

from nightsplit.broker.topology import SiteQueues, site_queues
from nightsplit.server_worker.protocols import make_server
from nightsplit.server_worker.role import ServerRole
from nightsplit.shared.config.run import (
    DataSection,
    ModelSection,
    OptimizerSection,
    PrivacySection,
    RoundSection,
    RunConfig,
    RunSection,
    TaskSection,
    WireSection,
)
from nightsplit.shared.engine.effects import unpaid
from nightsplit.shared.engine.engine import Engine
from nightsplit.shared.engine.mailbox import Mailbox
from nightsplit.shared.engine.order import Exclude
from nightsplit.shared.errors import Refused
from nightsplit.shared.protocols.spec import Shape, systems
from nightsplit.shared.run_store.base import RunStore
from nightsplit.shared.storage.checkpoint import Checkpoints
from nightsplit.shared.transport import Broker, Route
from nightsplit.shared.wire.message import SERVER
from nightsplit.simulation.broker import MemoryBroker
from nightsplit.simulation.store import MemoryStore
from nightsplit.site_worker.data.dataset import Dataset, Splits
from nightsplit.site_worker.protocols import make_site
from nightsplit.site_worker.protocols.data_vectors import DataVectorsSite
from nightsplit.site_worker.role import SiteRole
from nightsplit.site_worker.rounds.role import RoundSite

SYSTEMS = [
    ("split_labels", "independent", 4),
    ("split_labels", "averaged", 3),
    ("split_u", "independent", 4),
    ("split_u", "averaged", 3),
    ("split_frozen", "independent", 4),
    ("fedavg_transfer", "independent", 4),
    ("fedavg_dp_seg", "independent", 4),
    ("data_vectors", "independent", 4),
]
"""Protocol, bottoms, window; a system of rounds has neither bottoms nor a window."""

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
"""WholeModel without differential privacy, which forbids running statistics."""


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


class Authority:
    """Lets checkpoints count; the store's journal, no lease."""

    def __init__(self, store: RunStore | None, fence: int) -> None:
        self.store, self.fence = store, fence

    def pointer(self):
        return self.store.pointer() if self.store else None

    def move_pointer(self, pointer):
        return self.store.move_pointer(pointer) if self.store else True

    def journal(self, position, sender):
        return self.store.journal(position, sender)

    def journalled(self, position):
        return self.store.journalled(position)


class Night:
    """Workers of one run that can be started, stopped and thrown away between any two steps."""

    def __init__(
        self, config: RunConfig, folder: Path, broker: Broker | None = None, prefetch: int = 32, device: str = "cpu"
    ) -> None:
        self.config, self.folder, self.prefetch, self.device = config, folder, prefetch, device
        self.broker = broker or MemoryBroker()
        self.store = MemoryStore()
        self.queues: dict[str, SiteQueues] = {
            site: site_queues(config.run.id, site, config.wire.queue_bytes) for site in config.run.sites
        }
        for queues in self.queues.values():
            self.broker.declare(queues)
        self.links = {}
        self.roles: dict[str, SiteRole | ServerRole] = {}
        self.engines: dict[str, Engine] = {}
        self.lines = []
        self.starts = 0
        self.failures: defaultdict[str, dict[str, Refused]] = defaultdict(dict)
        """Messages that a worker's role failed on."""
        self.absent = lambda: None
        """Names a site that the server should go on without."""
        self.decide = lambda: Exclude(absent) if (absent := self.absent()) else None
        """What is written into the journal when nothing can be applied."""

    def start(self, name: str) -> Engine:
        """A worker as a fresh process would start it: from its newest checkpoint."""
        self.starts += 1
        if name == SERVER:
            role = make_server(self.config, self.folder / SERVER, self.folder, self.device)
            routes = {site: Route(q.down, q.up, q.dead) for site, q in self.queues.items()}
            authority = Authority(self.store, self.store.acquire_lease(SERVER, 60) or 0)
        else:
            ledger = Path(_LEDGERS.name) / f"{self.config.digest}-{name}.db"
            incarnation = f"{name}-{self.starts}"
            role = make_site(name, self.config, tiny_splits(name), incarnation, self.folder, self.device, ledger)
            queues = self.queues[name]
            routes = {SERVER: Route(queues.up, queues.down, queues.dead)}
            authority = Authority(None, 0)
        link = self.broker.link([route.incoming for route in routes.values()], self.prefetch, name)
        mailbox = Mailbox(self.config.run.id, name, link, routes, role.payload, self.config.wire.message_bytes)
        engine = Engine(
            role, mailbox, Checkpoints(self.folder / name / "checkpoints"), authority, self.lines.append,
            spend=account.pay if (account := getattr(role, "account", None)) else unpaid,
            decide=lambda: self.decide(), failures=self.failures[name],
        )  # fmt: skip
        engine.recover()
        self.links[name], self.roles[name], self.engines[name] = link, role, engine
        return engine

    def kill(self, name: str) -> None:
        """Take a worker away without a word, as SIGKILL would: only its link ends."""
        self.links.pop(name).close()
        del self.engines[name]

    def work(self, name: str, idle_seconds: float = 0.3) -> bool:
        """One worker, alone, until it has nothing left to do; whether it finished."""
        engine = self.start(name)
        finished = engine.run(lambda: False, idle_seconds)
        self.kill(name)
        return finished

    def together(self) -> None:
        """All workers at once, taking turns, until the run is over."""
        for name in (SERVER, *self.config.run.sites):
            self.start(name).start()
        while self.engines:
            for name, engine in list(self.engines.items()):
                engine.step(0.0)
                if engine.finished:
                    engine.leave()
                    self.kill(name)

    def fingerprint(self, *excluded: str) -> str:
        """sha256 of all final weights, but for those of sites that left: what is trained, and the best of it."""
        digest = hashlib.sha256()
        for name in [SERVER, *self.config.run.sites]:
            for state in [] if name in excluded else _states(self.roles[name]):
                for key in sorted(state):
                    digest.update(key.encode() + state[key].cpu().numpy().tobytes())
        return digest.hexdigest()


def _states(role: SiteRole | ServerRole) -> list[Mapping[str, torch.Tensor]]:
    """Weights that a worker ends with."""
    if isinstance(role, ServerRole):
        return [role.weights(), role.best_weights]
    if isinstance(role, DataVectorsSite):
        return list(role.model().values())  # what it judged last is no result
    if isinstance(role, RoundSite):
        return [role.trainer.weights(), *role.model().values()]
    return [role.bottom.module.state_dict(), role.final_bottom()]
