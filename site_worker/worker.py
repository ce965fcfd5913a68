"""The site worker: waits for its shift, publishes and learns until the shift ends, and comes back the next night."""

import uuid
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

from msgspec.structs import replace

from nightsplit.broker.connect import open_broker
from nightsplit.broker.topology import site_queues
from nightsplit.shared.clock import Clock
from nightsplit.shared.config.load import load
from nightsplit.shared.engine.effects import unpaid
from nightsplit.shared.engine.engine import Engine
from nightsplit.shared.engine.failures import refusing_failures
from nightsplit.shared.engine.fencing import SoleWriter
from nightsplit.shared.engine.mailbox import Mailbox
from nightsplit.shared.errors import BrokerError, Refused, RunError
from nightsplit.shared.protocols.build import planned_message_bytes
from nightsplit.shared.protocols.spec import sketch
from nightsplit.shared.run_store.base import RunStore, Status
from nightsplit.shared.run_store.status import Phase, WorkerStatus
from nightsplit.shared.runtime.heartbeat import Heartbeat
from nightsplit.shared.runtime.process import StopSignal, lock_folder, prefetch_for, prepare_torch
from nightsplit.shared.runtime.worker import Observer, Worker
from nightsplit.shared.storage.checkpoint import Checkpoints
from nightsplit.shared.storage.files import make_private_folder, write_atomic
from nightsplit.shared.storage.tensors import as_safetensors
from nightsplit.shared.transport import Broker, Link, Route
from nightsplit.shared.wire.message import SERVER, Kind
from nightsplit.site_worker.config import SiteConfig
from nightsplit.site_worker.data.dataset import Splits
from nightsplit.site_worker.data.scaling import scale
from nightsplit.site_worker.data.source import read_splits
from nightsplit.site_worker.policy import Gate, check_policy, read_policy
from nightsplit.site_worker.protocols import make_site
from nightsplit.site_worker.role import SiteRole

_DOWN = (Kind.CUT_GRADIENT, Kind.HEAD_INPUT, Kind.AVERAGE, Kind.MODEL)
"""Kinds that may be large on their way to a site."""


class SiteWorker(Worker):
    """One site of one run.

    Args:
        path: its site.toml.
        overrides, clock, stop, observe: see `Worker`.

    Raises:
        ConfigError: a file is wrong, or the hospital's policy forbids the run (108).
        RunError: 602 the site is not part of the run.
    """

    def __init__(
        self,
        path: Path,
        overrides: Sequence[str] = (),
        clock: Clock | None = None,
        stop: StopSignal | None = None,
        observe: Observer = lambda status: None,
    ) -> None:
        site = load(path, SiteConfig)
        self.config, self.source = site.site, site.data
        super().__init__(path.parent, self.config, overrides, clock, stop, observe)
        self._role: SiteRole | None = None
        self._server: Status | None = None
        """What the run store knows of the server."""
        self._looked = 0
        """Beats so far."""
        self._sent_before = -1
        """Messages sent at the last beat."""
        self.policy_file = self.base / self.config.policy
        self.policy = read_policy(self.policy_file)
        check_policy(self.policy, self.run_config, sketch(self.run_config), self.policy_file)
        if self.config.name not in self.run_config.run.sites:
            raise RunError(
                602,
                f"{self.config.name} is not among the sites of {self.run_config.run.id}: "
                f"{', '.join(self.run_config.run.sites)}.",
                "correct site.name, or have the site added to run.sites of a new run.",
            )

    @property
    def model_folder(self) -> Path:
        """Where the site's part of the trained model goes."""
        return self.state_folder / "model"

    def load_splits(self) -> Splits:
        """The site's data: read, divided by patient, scaled. DataError says what is wrong with it."""
        return scale(read_splits(self.source, self.run_config, self.base), self.run_config.data)

    def work(self, idle_seconds: float | None = None) -> bool:
        """Work shift after shift until the run is over.

        Args:
            idle_seconds: leave when nothing happened for so long; None to stay.

        Returns:
            Whether the run is over.

        Raises:
            NightsplitError: what the user has to know.
        """
        prepare_torch(self.config.threads, self.config.device)
        folder = self.state_folder
        with lock_folder(folder), self.telemetry(self.config.name, [self.config.name]):
            splits = self.load_splits()
            self.expect_same_data(splits)
            check_policy(self.policy, self.run_config, sketch(self.run_config), self.policy_file, splits.counts)
            with Heartbeat(self.config.name, self.open_store, self._status, self._observe, self._look_for_server):
                while self.wait_for_shift():
                    finished = refusing_failures(partial(self._one_shift, folder, splits, idle_seconds))
                    if finished or idle_seconds is not None:
                        return finished
        return False

    def expect_same_data(self, splits: Splits) -> None:
        """A run goes on with the data that it began with; `splits` as `load_splits` gives them."""
        path = self.state_folder / "data.sha256"
        fingerprints = " ".join(part.fingerprint for part in (splits.train, splits.validation, splits.test))
        if not path.exists():
            write_atomic(path, fingerprints.encode("ascii"))
        for part, known in zip(
            (splits.train, splits.validation, splits.test), path.read_text("ascii").split(), strict=True
        ):
            part.check_fingerprint(known)

    def _one_shift(
        self, folder: Path, splits: Splits, idle_seconds: float | None, failures: Mapping[str, Refused]
    ) -> bool:
        config = self.run_config
        role = make_site(
            self.config.name, config, splits, uuid.uuid4().hex, self.run_folder, self.config.device,
            self.base / self.config.ledger, self.policy.max_epsilon,
        )  # fmt: skip
        self._role = role
        queues = site_queues(config.run.id, self.config.name, config.wire.queue_bytes)
        route = Route(outgoing=queues.up, incoming=queues.down, dead=queues.dead)
        broker = open_broker(self.config.broker, self.base, config.wire.message_bytes, self.credentials)
        prefetch = prefetch_for(planned_message_bytes(config, {k: p for k in _DOWN if (p := role.payload(k))}))
        opened = self.link(broker, route, prefetch, idle_seconds)
        if opened is None:
            self.enter(Phase.AWAY)
            return False
        with opened as link:
            gate, limit = Gate(self.policy_file, config), config.wire.message_bytes
            mailbox = Mailbox(config.run.id, role.name, link, {SERVER: route}, role.payload, limit, gate)
            engine = Engine(
                role, mailbox, Checkpoints(folder / "checkpoints"), SoleWriter(),
                spend=role.account.pay if role.account else unpaid, failures=failures,
            )  # fmt: skip
            self._counters = engine.counters
            self.recovered = engine.recover()
            self.enter(Phase.WORKING)
            finished = engine.run(self.off_duty, idle_seconds)
        if role.account is not None:
            role.account.close()
        self.enter(Phase.FINISHED if finished else Phase.AWAY)
        if finished:
            self._save_model(role)
        return finished

    def link(self, broker: Broker, route: Route, prefetch: int, idle_seconds: float | None) -> Link | None:
        """A link, once the broker answers and the server has opened the run, which makes the queues.

        None when the shift ends before, or `idle_seconds` do.
        """
        owner, since = f"{self.config.name}:{self.state_folder.resolve()}", self._clock.now()
        while not self.off_duty():
            try:
                if broker.depth(route.incoming) is not None:
                    return broker.link([route.incoming], prefetch, owner)
                self.enter(Phase.WAITING, "the server to open the run")
            except BrokerError as error:
                if error.number != 201:
                    raise
                self.enter(Phase.BLOCKED, error.heading, f"waiting for the broker: {error.sentence}")
            if idle_seconds is not None and (self._clock.now() - since).total_seconds() > idle_seconds:
                return None
            self._clock.sleep(1.0)
        return None

    def _save_model(self, role: SiteRole) -> None:
        """What the site has of the best model."""
        make_private_folder(self.model_folder)
        for name, weights in role.model().items():
            if weights:
                write_atomic(self.model_folder / f"{name}.safetensors", as_safetensors(weights))

    def _look_for_server(self, store: RunStore) -> None:
        # What the server says of itself grows with the sites: together they ask for it 32 times a second at most.
        if self._looked % max(1, len(self.run_config.run.sites) // 32) == 0:
            self._server = store.statuses([SERVER]).get(SERVER)
        self._looked += 1

    def _status(self) -> WorkerStatus:
        """What this site tells of itself; called by the heartbeat."""
        status = replace(self._present(), beat=uuid.uuid4().hex, server=self._server_seen())
        role, counts = self._role, self._counters.counts
        if role is None:
            return status
        sent = role.next_seq - 1
        is_idle = status.phase is Phase.WORKING and role.answered < sent == self._sent_before
        self._sent_before = sent
        # Counts begin anew with the process, a place in the sequence does not.
        confirmed = min(sent, max(0, sent - counts["sent"] + counts["confirmed"]))
        return replace(
            status,
            phase=Phase.IDLE if is_idle else status.phase,
            sent=sent,
            planned=role.planned,
            answered=role.answered,
            confirmed=confirmed,
            queued=max(0, confirmed - max(role.answered, self._applied())),
            duplicates=counts["duplicates"],
            refused=counts["refused"],
            checkpoints=counts["checkpoints"],
        )

    def _server_seen(self) -> Literal["online", "offline", "finished"] | None:
        """How the site finds the server; None where the run store knows nothing of it."""
        if self._server is None:
            return None
        if self._server.report.phase is Phase.FINISHED:
            return "finished"
        return "online" if self._server.online else "offline"

    def _applied(self) -> int:
        """Messages of this site that the server says it has applied."""
        own = self._server.report.sites.get(self.config.name) if self._server is not None else None
        return own.applied if own is not None else 0
