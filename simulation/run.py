"""A whole run in one process: the real roles, engines and wire format, over the memory broker.

Workers take turns, so a run costs what its arithmetic costs. In strict order the result is that of a
run with real processes and real nights, to the bit.
"""

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.func import functional_call

from nightsplit.broker.topology import site_queues
from nightsplit.server_worker.protocols import AnyServer, make_server
from nightsplit.shared.config.run import RunConfig
from nightsplit.shared.engine.effects import unpaid
from nightsplit.shared.engine.engine import Engine
from nightsplit.shared.engine.fencing import SoleWriter
from nightsplit.shared.engine.mailbox import Mailbox
from nightsplit.shared.engine.role import Role
from nightsplit.shared.protocols.build import build_model
from nightsplit.shared.protocols.spec import spec_of
from nightsplit.shared.storage.checkpoint import Checkpoints
from nightsplit.shared.transport import Route
from nightsplit.shared.wire.message import SERVER
from nightsplit.simulation.broker import MemoryBroker
from nightsplit.simulation.evaluate import ModelFigures, judge
from nightsplit.site_worker.data.dataset import Splits
from nightsplit.site_worker.protocols import make_site
from nightsplit.site_worker.role import SiteRole

PREFETCH = 512
"""A checkpoint follows every quarter of it. Fewer would cost memory: what none contains is kept."""


@dataclass
class Simulation:
    """A finished run.

    Attributes:
        server, sites: the roles at the end.
        base: folder of run.toml.
    """

    config: RunConfig
    splits: Mapping[str, Splits]
    server: AnyServer
    sites: Mapping[str, SiteRole]
    base: Path

    def judgement(self, splits: Mapping[str, Splits] | None = None) -> ModelFigures:
        """The best model on test patients: each site's own splits of it, the server's best weights.

        Args:
            splits: whose test patients, where it is not the sites of the run.
        """
        modules = build_model(self.config, self.base).modules

        def predict(site: str, inputs: torch.Tensor) -> torch.Tensor:
            role = self.sites.get(site) or next(iter(self.sites.values()))
            weights = role.model()
            # What does not travel (statistics that stay local) is the site's own.
            part = spec_of(self.config).names.weights
            weights[part] = {**weights.get(part, {}), **self.server.best_weights}
            flow = inputs
            for name, module in modules.items():
                flow = _forward(module, weights[name], flow)
            return flow

        return judge(self.config, splits or self.splits, predict)


def simulate(config: RunConfig, splits: Mapping[str, Splits], base: Path = Path()) -> Simulation:
    """Train until the run is over.

    Args:
        config: the run, in strict order.
        splits: scaled data by site.
        base: folder of run.toml.
    """
    broker = MemoryBroker()
    broker.max_message_bytes = config.wire.message_bytes
    queues = {site: site_queues(config.run.id, site, config.wire.queue_bytes) for site in config.run.sites}
    for site_queue in queues.values():
        broker.declare(site_queue)
    with tempfile.TemporaryDirectory(prefix="nightsplit-") as folder:

        def engine(role: Role, routes: Mapping[str, Route]) -> Engine:
            link = broker.link([route.incoming for route in routes.values()], PREFETCH, role.name)
            mailbox = Mailbox(config.run.id, role.name, link, routes, role.payload, config.wire.message_bytes)
            account = role.account if isinstance(role, SiteRole) else None
            return Engine(
                role, mailbox, Checkpoints(Path(folder) / role.name), SoleWriter(),
                spend=account.pay if account else unpaid, interval_seconds=3600.0,
            )  # fmt: skip

        server = make_server(config, Path(folder), base)
        sites = {
            site: make_site(site, config, splits[site], site, base, ledger=Path(folder) / f"{site}.db")
            for site in config.run.sites
        }
        engines = [engine(server, {site: Route(q.down, q.up, q.dead) for site, q in queues.items()})]
        engines += [engine(sites[site], {SERVER: Route(q.up, q.down, q.dead)}) for site, q in queues.items()]
        for one in engines:
            one.start()
        while engines:
            for one in list(engines):
                one.step(0.0)
                if one.finished:
                    one.leave()
                    engines.remove(one)
    return Simulation(config, splits, server, sites, base)


def _forward(module: nn.Module, weights: Mapping[str, torch.Tensor], inputs: torch.Tensor) -> torch.Tensor:
    """Outputs in evaluation mode, with these weights in place of the module's own."""
    with torch.no_grad():
        return functional_call(module.eval(), dict(weights), inputs)  # type: ignore[no-any-return]
