"""The site worker: trains during its shift, stops when the shift ends, and resumes in the next one."""

import uuid
from collections.abc import Mapping, Sequence
from contextlib import closing, nullcontext
from functools import partial
from pathlib import Path
from typing import Literal

from msgspec.structs import replace

from nightsplit.broker.connect import open_broker
from nightsplit.broker.sealed import sealed
from nightsplit.broker.topology import site_queues
from nightsplit.shared.clock import Clock
from nightsplit.shared.config.load import load
from nightsplit.shared.engine.effects import forbid_spending
from nightsplit.shared.engine.engine import Engine
from nightsplit.shared.engine.failures import refusing_failures
from nightsplit.shared.engine.fencing import SoleWriter
from nightsplit.shared.engine.mailbox import Mailbox
from nightsplit.shared.errors import BrokerError, Refused, RunError, StateError
from nightsplit.shared.protocols.build import planned_message_bytes
from nightsplit.shared.protocols.spec import sketch
from nightsplit.shared.run_store.base import RunStore, Status
from nightsplit.shared.run_store.status import Phase, WorkerStatus
from nightsplit.shared.runtime.heartbeat import Heartbeat
from nightsplit.shared.runtime.process import StopSignal, lock_folder, prefetch_for, prepare_torch
from nightsplit.shared.runtime.worker import Observer, Worker
from nightsplit.shared.storage.checkpoint import Checkpoints
from nightsplit.shared.storage.files import make_private_folder, make_secret_file, read_secret_file, write_atomic
from nightsplit.shared.storage.tensors import as_safetensors
from nightsplit.shared.transport import Broker, Link, Route
from nightsplit.shared.wire.message import SERVER, Kind
from nightsplit.site_worker.config import SiteConfig
from nightsplit.site_worker.data.dataset import Splits
from nightsplit.site_worker.data.scaling import scale
from nightsplit.site_worker.data.source import read_splits
from nightsplit.site_worker.policy import Gate, check_policy, read_policy
from nightsplit.site_worker.protocols import Budget, make_site
from nightsplit.site_worker.role import SiteRole
from nightsplit.site_worker.trust.approval import Request
from nightsplit.site_worker.trust.exit_log import FILE, ExitLog

_LARGE_KINDS = (Kind.CUT_GRADIENT, Kind.CUT_TARGET, Kind.HEAD_INPUT, Kind.AVERAGE, Kind.MODEL)
"""Kinds of messages to a site that may be large."""


SEED = "seed.key"
"""Name of the file, in the site's state folder, with the secret seed of its order, dropout and first weights."""


class SiteWorker(Worker):
    """Worker of one site of a run; `path` is its site.toml, other arguments are those of `Worker`.

    Raises:
        ConfigError: a file is wrong, the hospital's policy forbids the run (108), or the run (118) or its code (119) is
            not approved.
        RunError: 602 the site is not part of the run.
    """

    def __init__(
        self, path: Path, overrides: Sequence[str] = (), clock: Clock | None = None, stop: StopSignal | None = None,
        observe: Observer = lambda status: None,
    ) -> None:  # fmt: skip
        site = load(path, SiteConfig)
        self.config, self.source = site.site, site.data
        super().__init__(path.parent, self.config.name, self.config, overrides, clock, stop, observe)
        self._role: SiteRole | None = None
        self._server: Status | None = None
        """Status of the server in the run store."""
        self._beats = 0
        self._last_sent = -1
        """Messages sent before the last beat."""
        self.policy_file = self.base / self.config.policy
        self.policy = read_policy(self.policy_file)
        check_policy(self.policy, self.run_config, sketch(self.run_config), self.policy_file)
        if self.config.name not in self.run_config.run.sites:
            run, remedy = self.run_config.run, "correct site.name, or have the site added to run.sites of a new run."
            sentence = f"{self.config.name} is not among the sites of {run.id}: {', '.join(run.sites)}."
            raise RunError(602, sentence, remedy)
        self._approval = Request(path, self.config, self.run_config).check()

    @property
    def model_folder(self) -> Path:
        """Folder for the site's part of the trained model."""
        return self.state_folder / "model"

    def load_splits(self) -> Splits:
        """Read the site's data, divide it by patient and scale it; DataError if it cannot be used."""
        return scale(read_splits(self.source, self.run_config, self.base), self.run_config.data)

    def work(self, idle_seconds: float | None = None) -> bool:
        """Work shift after shift; return whether the run is over, or exit after `idle_seconds` without an event."""
        prepare_torch(self.config.threads, self.config.device)
        with lock_folder(self.state_folder), self.telemetry(self.config.name, [self.config.name]):
            splits = self.load_splits()
            self.check_same_data(splits)
            check_policy(self.policy, self.run_config, sketch(self.run_config), self.policy_file, splits.counts)
            with Heartbeat(self.config.name, self.open_store, self._status, self._observe, self._look_for_server):
                while self.wait_for_shift():
                    finished = refusing_failures(partial(self._run_shift, splits, idle_seconds))
                    if finished or idle_seconds is not None:
                        return finished
        return False

    def _read_seed(self) -> bytes:
        """Return the site's secret seed in this run, made at its beginning."""
        path = self.state_folder / SEED
        try:
            if not path.exists() and not (self.state_folder / "checkpoints").exists():
                return make_secret_file(path)
            return read_secret_file(path)
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            fix = "restore the whole state folder from one backup; a part of it is of no use."
            raise StateError(514, f"{path}: {reason}.", fix) from None

    def make_exit_log(self) -> ExitLog:
        """Return the log of what leaves this site in this run."""
        return ExitLog(self.state_folder / FILE, self.run_config.digest, self.policy_file, self._approval.sha256)

    def check_same_data(self, splits: Splits) -> None:
        """Check that `splits`, as `load_splits` returns them, hold the data the run began with, else DataError 409."""
        path = self.state_folder / "data.sha256"
        parts = splits.train, splits.validation, splits.test
        if not path.exists():
            write_atomic(path, " ".join(part.fingerprint for part in parts).encode("ascii"))
        for part, fingerprint in zip(parts, path.read_text("ascii").split(), strict=True):
            part.check_fingerprint(fingerprint)

    def _run_shift(self, splits: Splits, idle_seconds: float | None, failures: Mapping[str, Refused]) -> bool:
        role = make_site(
            self.config.name, self.run_config, splits, uuid.uuid4().hex, self.run_folder, self.config.device,
            Budget(self.base / self.config.ledger, self.policy.max_epsilon), self._read_seed(),
        )  # fmt: skip
        self._role = role
        with closing(role.account) if role.account else nullcontext():
            return self._train(role, idle_seconds, failures)

    def _train(self, role: SiteRole, idle_seconds: float | None, failures: Mapping[str, Refused]) -> bool:
        config = self.run_config
        queues = site_queues(config.run.id, self.config.name, config.wire.queue_bytes)
        route = Route(outgoing=queues.up, incoming=queues.down, dead=queues.dead)
        broker = open_broker(self.config.broker, self.base, config.wire.message_bytes, self.credentials)
        largest = planned_message_bytes(config, {kind: p for kind in _LARGE_KINDS if (p := role.payload(kind))})
        link = self.open_link(broker, route, prefetch_for(largest), idle_seconds)
        if link is None:
            self.enter(Phase.AWAY)
            return False
        with closing(self.make_exit_log()) as exit_log, sealed(link, self.sealer, role.name, {SERVER: route}) as link:
            gate, limit = Gate(self.policy_file, config), config.content_bytes
            mailbox = Mailbox(config.run.id, role.name, link, {SERVER: route}, role.payload, limit, gate, exit_log)
            role.exit_log = exit_log
            engine = Engine(
                role, mailbox, Checkpoints(self.state_folder / "checkpoints"), SoleWriter(),
                spend=role.account.pay if role.account else forbid_spending, failures=failures,
            )  # fmt: skip
            self._counters = engine.counters
            self.skipped_checkpoints = engine.recover()
            self.enter(Phase.WORKING)
            finished = engine.run(self.off_duty, idle_seconds)
        self.enter(Phase.FINISHED if finished else Phase.AWAY)
        if finished:
            self._save_model(role)
            if self.sealer is not None:
                self.sealer.keys.delete()
        return finished

    def open_link(self, broker: Broker, route: Route, prefetch: int, idle_seconds: float | None) -> Link | None:
        """Open a link as soon as the broker answers and the server has opened the run, which creates the queues.

        Return None if the shift or `idle_seconds` end before that.
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
        """Write the site's parts of the best model."""
        make_private_folder(self.model_folder)
        for name, weights in role.model().items():
            if weights:
                write_atomic(self.model_folder / f"{name}.safetensors", as_safetensors(weights))

    def _look_for_server(self, store: RunStore) -> None:
        # The server's status grows with the number of sites: together they read it at most 32 times a second.
        if self._beats % max(1, len(self.run_config.run.sites) // 32) == 0:
            self._server = store.statuses([SERVER]).get(SERVER)
        self._beats += 1

    def _status(self) -> WorkerStatus:
        """Return the site's status; the heartbeat calls it."""
        status = replace(self._present(), beat=uuid.uuid4().hex, server=self._server_state())
        role, counts = self._role, self._counters.counts
        if role is None:
            return status
        sent = role.next_seq - 1
        is_idle = status.phase is Phase.WORKING and role.answered < sent and sent == self._last_sent
        self._last_sent = sent
        # The counters restart with the process, the sequence numbers do not.
        confirmed = min(sent, max(0, sent - counts["sent"] + counts["confirmed"]))
        return replace(
            status, phase=Phase.IDLE if is_idle else status.phase,
            sent=sent, planned=role.sequence.last, answered=role.answered, confirmed=confirmed,
            queued=max(0, confirmed - max(role.answered, self._count_applied())),
            duplicates=counts["duplicates"], refused=counts["refused"], checkpoints=counts["checkpoints"],
        )  # fmt: skip

    def _server_state(self) -> Literal["online", "offline", "finished"] | None:
        """Return the server's state in the run store; None if it has no status there."""
        if self._server is None:
            return None
        if self._server.report.phase is Phase.FINISHED:
            return "finished"
        return "online" if self._server.online else "offline"

    def _count_applied(self) -> int:
        """Return the number of this site's messages that the server has applied, by its own status."""
        own = self._server.report.sites.get(self.config.name) if self._server is not None else None
        return own.applied if own is not None else 0
