"""Server worker, which becomes the active server in its shifts, trains until the run is over, and reports."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path

from typing_extensions import override

from nightsplit.broker.connect import open_broker
from nightsplit.broker.sealed import sealed
from nightsplit.broker.topology import site_queues
from nightsplit.server_worker.config import ServerConfig
from nightsplit.server_worker.lease import Lease, lease_owner
from nightsplit.server_worker.protocols import make_server_role
from nightsplit.server_worker.report import write_report
from nightsplit.server_worker.shift import TOGETHER, ServerShift
from nightsplit.server_worker.stream.ddp import Group, device_of_rank, joined_group
from nightsplit.server_worker.tape import tape_link
from nightsplit.shared.clock import Clock
from nightsplit.shared.config.load import load
from nightsplit.shared.engine.failures import refusing_failures
from nightsplit.shared.engine.mailbox import Mailbox
from nightsplit.shared.errors import Refused, StateError
from nightsplit.shared.log import event
from nightsplit.shared.protocols.build import planned_message_bytes
from nightsplit.shared.run_store.status import Phase
from nightsplit.shared.runtime.heartbeat import Heartbeat
from nightsplit.shared.runtime.process import StopSignal, prefetch_for, prepare_torch, try_lock_folder
from nightsplit.shared.runtime.worker import Observer, Worker
from nightsplit.shared.storage.checkpoint import Checkpoints
from nightsplit.shared.storage.sent import FOLDER, SentMessages
from nightsplit.shared.transport import Route
from nightsplit.shared.wire.message import SERVER, Kind

_LARGE_KINDS = (Kind.SMASHED, Kind.HEAD_GRADIENT, Kind.HEAD_TARGET, Kind.BOTTOM, Kind.UPDATE)
"""Kinds of messages to the server that may be large."""


class ServerWorker(Worker):
    """Server of one run; `path` is its server.toml, other arguments and errors are those of `Worker`."""

    def __init__(
        self, path: Path, overrides: Sequence[str] = (), clock: Clock | None = None, stop: StopSignal | None = None,
        observe: Observer = lambda status: None,
    ) -> None:  # fmt: skip
        self.config = load(path, ServerConfig).server
        super().__init__(path.parent, SERVER, self.config, overrides, clock, stop, observe)
        self._device = device_of_rank(self.config.device)
        self._group: Group | None = None

    @property
    def report_folder(self) -> Path:
        """Folder of report and metrics."""
        return self.base / self.config.report

    def open_run(self) -> None:
        """Create the run's queues and put its manifest into them, so that sites can begin without a server."""
        self._work(only_open=True, idle_seconds=0.0)

    def work(self, idle_seconds: float | None = None) -> bool:
        """Work shift after shift; return whether the run is over, or exit after `idle_seconds` without an event."""
        with self.telemetry(SERVER, [*self.run_config.run.sites, TOGETHER]):
            return self._work(only_open=False, idle_seconds=idle_seconds)

    def help(self) -> None:
        """Compute for the server that torchrun started beside this process, until it exits."""
        prepare_torch(self.config.threads, self._device)
        with joined_group(self._device) as group:
            role = make_server_role(self.run_config, self.state_folder, self.run_folder, self._device, group)
            role.help()

    @override
    def enter(self, phase: Phase, detail: str | None = None, reason: str | None = None) -> None:
        super().enter(phase, detail, reason)
        # While it waits it has no heartbeat: the run store belongs to the active server.
        if phase in (Phase.WAITING, Phase.STANDBY):
            self._observe(self._present())

    def _work(self, only_open: bool, idle_seconds: float | None) -> bool:
        prepare_torch(self.config.threads, self._device)
        with (
            joined_group(self._device) as self._group,
            try_lock_folder(self.state_folder) as locked,
            closing(self.open_store()) as store,
        ):
            lease = Lease(store, lease_owner(self.state_folder, locked))
            while not self._stop.requested:
                if not only_open and not self.wait_for_shift():
                    break
                if not lease.acquire(self._standby):
                    break
                event("active", fence=lease.fence)
                try:
                    finished = refusing_failures(partial(self._run_shift, lease, only_open, idle_seconds))
                finally:
                    lease.release()
                if finished or only_open or idle_seconds is not None:
                    return finished
        return False

    def _standby(self, seconds: float) -> bool:
        self.enter(Phase.STANDBY)
        self._clock.sleep(seconds)
        return not self._stop.requested

    def _run_shift(
        self, lease: Lease, only_open: bool, idle_seconds: float | None, failures: Mapping[str, Refused]
    ) -> bool:
        """Work with the lease until the run or the shift is over; return whether the run is."""
        with self._open_shift(lease, only_open, failures) as shift:
            self._counters, self.skipped_checkpoints = shift.counters, shift.skipped_checkpoints
            stop = (lambda: self._stop.requested) if only_open else self.off_duty
            with Heartbeat(
                SERVER, self.open_store, lambda: shift.extend_status(self._present()), self._observe, shift.beat
            ) as heartbeat:
                self.enter(Phase.WORKING)
                finished = shift.run(lambda: heartbeat.error is None, stop, idle_seconds)
                self.enter(Phase.FINISHED if finished else Phase.AWAY)
        if finished:
            write_report(self.report_folder, self.run_config, shift.role, shift.silence.last_seen)
            if self.sealer is not None:
                self.sealer.keys.delete()
        return finished

    @contextmanager
    def _open_shift(self, lease: Lease, only_open: bool, failures: Mapping[str, Refused]) -> Iterator[ServerShift]:
        """Open a shift on its link to the sites' queues, which are created where they are missing."""
        config, folder = self.run_config, self.state_folder
        broker = open_broker(self.config.broker, self.base, config.wire.message_bytes, self.credentials)
        queues = {site: site_queues(config.run.id, site, config.wire.queue_bytes) for site in config.run.sites}
        broker.declare(queue for site in config.run.sites for queue in queues[site])
        routes = {site: Route(outgoing=q.down, incoming=q.up, dead=q.dead) for site, q in queues.items()}
        role = make_server_role(config, folder, self.run_folder, self._device, self._group)
        if self.sealer is not None:
            role.cosign = self.sealer.cosign
        with closing(self.open_store()) as store:
            store.admit([SERVER, *config.run.sites])
            statuses = store.statuses([SERVER, *config.run.sites])
        checkpoints = self._checkpoints(lease)
        largest = planned_message_bytes(config, {kind: p for kind in _LARGE_KINDS if (p := role.payload(kind))})
        consume = [] if only_open else [route.incoming for route in routes.values()]
        link = broker.link(consume, prefetch_for(largest, len(queues)), owner=f"{SERVER}:{folder.resolve()}")
        with tape_link(sealed(link, self.sealer, SERVER, routes), config, folder) as link:
            mailbox = Mailbox(config.run.id, SERVER, link, routes, role.payload, config.content_bytes)
            mailbox.sent = SentMessages(folder / FOLDER)
            yield ServerShift(config, role, mailbox, checkpoints, lease, self.report_folder, statuses, failures)

    def _checkpoints(self, lease: Lease) -> Checkpoints:
        """Return this server's checkpoints; StateError 510 when the run store is at an earlier incarnation."""
        checkpoints = Checkpoints(self.state_folder / "checkpoints")
        if checkpoints.last_fence >= lease.fence:
            found = f"{checkpoints.folder} has a checkpoint of incarnation {checkpoints.last_fence}"
            fix = "name the store that the run began with, or restore it from the backup of the same moment."
            raise StateError(510, f"it is at incarnation {lease.fence} of this server, and {found}.", fix)
        return checkpoints
