"""The server worker: waits for its shift, becomes the active server, runs the engine, reports."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

from nightsplit.broker.connect import open_broker
from nightsplit.broker.topology import site_queues
from nightsplit.server_worker.config import ServerConfig
from nightsplit.server_worker.lease import Lease, owner_of
from nightsplit.server_worker.metrics_log import MetricsLog
from nightsplit.server_worker.presence import Attendance
from nightsplit.server_worker.protocols import AnyServer, make_server
from nightsplit.server_worker.protocols.split_frozen import SplitFrozenServer
from nightsplit.server_worker.report import write_report
from nightsplit.server_worker.rounds.deadline import Deadline
from nightsplit.server_worker.stream.ddp import DividedTop, Group, device_of_rank, joined_group
from nightsplit.server_worker.tape import taped
from nightsplit.shared.clock import Clock
from nightsplit.shared.engine.effects import Record
from nightsplit.shared.engine.engine import Engine
from nightsplit.shared.engine.failures import refusing_failures
from nightsplit.shared.engine.mailbox import Mailbox
from nightsplit.shared.engine.order import CloseRound, Exclude, OrderEntry
from nightsplit.shared.errors import Refused, StateError
from nightsplit.shared.log import event
from nightsplit.shared.protocols.build import planned_message_bytes
from nightsplit.shared.protocols.load import load
from nightsplit.shared.run_store.base import RunStore, Status
from nightsplit.shared.runtime.heartbeat import Facts, Heartbeat
from nightsplit.shared.runtime.process import StopSignal, locked_folder, prefetch_for, prepare_torch
from nightsplit.shared.runtime.worker import ShiftWorker
from nightsplit.shared.storage.checkpoint import Checkpoints
from nightsplit.shared.transport import Route
from nightsplit.shared.wire.message import SERVER, Kind, Scalar

TOGETHER = "all"
"""In place of a site's name, where a training batch has samples of several."""

_UP = (Kind.SMASHED, Kind.HEAD_GRADIENT, Kind.BOTTOM, Kind.UPDATE)
"""Kinds that may be large on their way to the server."""


class ServerWorker(ShiftWorker):
    """One server of one run.

    Args:
        path: its server.toml.
        overrides: "run.key=value" for run.toml (as `nightsplit.shared.protocols.load.load`).
        clock: tells when its shift is.
        stop: asked between steps.
        observe: shown the worker's facts every second.

    Raises:
        ConfigError: a file is wrong.
    """

    def __init__(
        self,
        path: Path,
        overrides: Sequence[str] = (),
        clock: Clock | None = None,
        stop: StopSignal | None = None,
        observe: Callable[[Facts], None] = lambda facts: None,
    ) -> None:
        self.config = load(path, ServerConfig).server
        self._device = device_of_rank(self.config.device)
        super().__init__(path.parent, self.config, overrides, clock, stop, observe)
        self._role: AnyServer | None = None
        self._statuses: dict[str, Status] = {}
        """What the run store knows of the workers."""
        self._fence = 0
        self._trained: dict[str, Mapping[str, Scalar | None]] = {}
        """The last training batch, per site."""
        self._attendance = Attendance(self.run_config, {})
        self._deadline = Deadline(0.0, {})
        self._group: Group | None = None

    @property
    def report_folder(self) -> Path:
        """Where report and metrics go."""
        return self.base / self.config.report

    def open_run(self) -> None:
        """Make the run's queues and put its manifest into them, so that sites can begin without a server."""
        self._work(only_open=True, idle_seconds=None)

    def work(self, idle_seconds: float | None = None) -> bool:
        """Work shift after shift until the run is over.

        Args:
            idle_seconds: leave when nothing happened for so long; None to stay.

        Returns:
            Whether the run is over.

        Raises:
            NightsplitError: what the user has to know.
        """
        with self.telemetry(SERVER, [*self.run_config.run.sites, TOGETHER]):
            return self._work(only_open=False, idle_seconds=idle_seconds)

    def help(self) -> None:
        """Compute for the server that torchrun started beside this process, until it leaves."""
        prepare_torch(self.config.threads, self._device)
        with joined_group(self._device) as group:
            role = make_server(self.run_config, self.state_folder, self.run_folder, self._device, group)
            assert isinstance(role, SplitFrozenServer)
            assert isinstance(role.top, DividedTop)
            role.top.help()

    def _work(self, only_open: bool, idle_seconds: float | None) -> bool:
        prepare_torch(self.config.threads, self._device)
        folder = self.state_folder
        with joined_group(self._device) as self._group, locked_folder(folder) as alone:
            store = self.open_store()
            lease = Lease(store, owner_of(folder, alone))
            try:
                while not self._stop.asked:
                    if not only_open and not self.wait_for_shift():
                        break
                    if not lease.acquire(self._standby):
                        break
                    self._fence = lease.fence
                    event("active", fence=lease.fence)
                    try:
                        shift = partial(self._one_shift, folder, lease, only_open, idle_seconds)
                        finished = refusing_failures(shift)
                    finally:
                        lease.release()
                    if finished or only_open or idle_seconds is not None:
                        return finished
            finally:
                store.close()
        return False

    def _standby(self, seconds: float) -> bool:
        self.wait_as("standing by: another server is active")
        self._clock.sleep(seconds)
        return not self._stop.asked

    def wait_as(self, state: str) -> None:
        """Show what is waited for; the run store is left to the server that is active."""
        super().wait_as(state)
        self._observe({"state": state, "run": self.run_config.run.id})

    def _one_shift(
        self, folder: Path, lease: Lease, only_open: bool, idle_seconds: float | None, failures: Mapping[str, Refused]
    ) -> bool:
        config = self.run_config
        broker = open_broker(self.config.broker, self.base, config.wire.message_bytes, self.credentials)
        queues = {site: site_queues(config.run.id, site, config.wire.queue_bytes) for site in config.run.sites}
        broker.declare(queue for site in queues.values() for queue in site)
        role = make_server(config, folder, self.run_folder, self._device, self._group)
        self._role = role
        with closing(self.open_store()) as store:
            self._statuses = store.statuses([SERVER, *config.run.sites])
        self._attendance = attendance = Attendance(config, self._statuses)
        told = self._statuses[SERVER].facts if SERVER in self._statuses else {}
        self._deadline = deadline = Deadline(config.round.deadline_hours, told)
        largest = planned_message_bytes(config, {k: p for k in _UP if (p := role.payload(k))})
        prefetch = prefetch_for(largest, len(queues))
        checkpoints = Checkpoints(folder / "checkpoints")
        if checkpoints.last_fence >= lease.fence:
            raise StateError(
                510,
                f"it counts this server's incarnations from {lease.fence}, "
                f"and {checkpoints.folder} holds one of incarnation {checkpoints.last_fence}.",
                "name the store that the run began with, or restore it from the backup of the same moment.",
            )
        routes = {site: Route(outgoing=q.down, incoming=q.up, dead=q.dead) for site, q in queues.items()}
        consume = [] if only_open else [route.incoming for route in routes.values()]

        def decide() -> OrderEntry | None:
            if role.may_close and deadline.is_over:
                return CloseRound()
            absent = attendance.absent(role.awaited(), role.staying)
            return Exclude(absent) if absent else None

        def record(line: Record) -> None:
            log.write(line)
            if line.metrics["event"] == "train":
                self._trained[str(line.metrics.get("site", TOGETHER))] = line.metrics

        with taped(broker.link(consume, prefetch, owner=f"{SERVER}:{folder.resolve()}"), config, folder) as link:
            mailbox = Mailbox(config.run.id, SERVER, link, routes, role.payload, config.wire.message_bytes)
            engine = Engine(role, mailbox, checkpoints, lease, record, decide=decide, failures=failures)
            self._progress = engine.counters
            self.recovered = engine.recover()
            log = MetricsLog(self.report_folder, role.steps)

            def beat(store: RunStore) -> None:
                lease.renew(store)
                self._statuses = store.statuses(config.run.sites)

            heartbeat = Heartbeat(SERVER, self.open_store, self._facts, self._observe, beat)

            def leave() -> bool:
                lease.check()
                deadline.look(role.version)
                if attendance.is_due:
                    listening = heartbeat.error is None and engine.counters.trouble is None
                    attendance.look(role.applied, role.awaited(), self._statuses, listening)
                return self._stop.asked if only_open else self.off_duty()

            try:
                with heartbeat:
                    self.state = "working"
                    finished = engine.run(leave, 0.0 if only_open else idle_seconds)
                    self.state = "finished" if finished else "away"
            finally:
                log.close()
        if finished:
            write_report(self.report_folder, config, role, attendance.heard)
        return finished

    def _queued(self, site: str) -> int | None:
        """Messages of a site that are not applied yet; asking the broker would delay the heartbeat."""
        assert self._role is not None
        known = self._statuses.get(site)
        confirmed = known.facts.get("confirmed") if known is not None else None
        return None if confirmed is None else max(0, int(confirmed) - self._role.applied[site])

    def _facts(self) -> dict[str, Any]:
        role, progress = self._role, self._progress
        assert role is not None
        planned = sum(role.applied[s] if s in role.left_out else seq.last for s, seq in role.sequences.items())
        entry = role.evaluation.history[-1] if role.evaluation.history else None
        blocked = self.state == "working" and progress.trouble
        return {
            "state": f"blocked: {progress.trouble}" if blocked else self.state,
            "run": self.run_config.run.id,
            "contract": self.run_config.contract,
            "steps": role.steps,
            "fence": self._fence,
            "applied": sum(role.applied.values()),
            "planned": planned if role.staying.keys() <= role.sequences.keys() else None,
            "epoch": entry["epoch"] if entry else 0,
            "refused": sum(role.refusals.values()),
            "passed_over": "; ".join(self.recovered) or None,
            **{name: progress.counts[name] for name in ("duplicates", "sent", "confirmed", "checkpoints")},
            **{f"applied_{site}": count for site, count in role.applied.items()},
            **{f"queued_{site}": self._queued(site) for site in role.applied},
            **{f"{name}_{s}": fact for s in role.applied for name, fact in role.contribution(s).items()},
            **{f"{name}_{s}": line.get(name) for s, line in self._trained.items() for name in ("loss", "staleness")},
            **self._attendance.facts(role.awaited(), role.staying),
            **self._deadline.facts(),
        }
