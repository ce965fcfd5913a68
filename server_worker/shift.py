"""Shift of the active server: its engine, the silence of sites meanwhile, and the status of both."""

from collections.abc import Callable, Mapping
from logging import WARNING
from pathlib import Path

from msgspec.structs import replace

from nightsplit.server_worker.lease import Lease
from nightsplit.server_worker.metrics_log import MetricsLog
from nightsplit.server_worker.presence import SilenceTracker
from nightsplit.server_worker.protocols import AnyServer
from nightsplit.server_worker.rounds.deadline import Deadline
from nightsplit.shared.config.run import RunConfig
from nightsplit.shared.engine.effects import Record
from nightsplit.shared.engine.engine import Engine
from nightsplit.shared.engine.mailbox import Mailbox
from nightsplit.shared.engine.order import CloseRound, Exclude, OrderEntry
from nightsplit.shared.errors import Refused
from nightsplit.shared.log import event
from nightsplit.shared.run_store.base import RunStore, Status
from nightsplit.shared.run_store.status import UNREADABLE, SiteStatus, WorkerStatus
from nightsplit.shared.storage.checkpoint import Checkpoints
from nightsplit.shared.wire.message import SERVER

TOGETHER = "all"
"""Name used instead of a site's for a training batch with samples of several sites."""


class ServerShift:
    """Role and engine of the server from the newest checkpoint on, until the shift ends.

    Args:
        role: a fresh one, to which the newest valid checkpoint is restored.
        lease: held by this server.
        report: folder of the metrics.
        statuses: statuses of server and sites in the run store; silence and deadline continue from them.
        failures: messages to refuse, as in `refusing_failures`.
    """

    def __init__(
        self, config: RunConfig, role: AnyServer, mailbox: Mailbox, checkpoints: Checkpoints, lease: Lease,
        report: Path, statuses: Mapping[str, Status], failures: Mapping[str, Refused],
    ) -> None:  # fmt: skip
        self.role = role
        self._sites = config.run.sites
        self._lease = lease
        self._statuses = statuses
        previous = statuses[SERVER].report if SERVER in statuses else UNREADABLE
        self.silence = SilenceTracker(config, previous.sites)
        self._deadline = Deadline(config.round.deadline_hours, previous.round)
        self._trained: dict[str, Record] = {}
        """Last training batch, per site or `TOGETHER`."""
        self._warned: set[tuple[str, str]] = set()
        self._engine = Engine(role, mailbox, checkpoints, lease, self._record, decide=self._decide, failures=failures)
        self.counters = mailbox.counters
        self.skipped_checkpoints = self._engine.recover()
        self._log = MetricsLog(report, role.steps)  # starts at the restored checkpoint
        self._engine.sync_records = self._log.sync

    def run(self, listening: Callable[[], bool], stop: Callable[[], bool], idle_seconds: float | None) -> bool:
        """Work until the run is over, `stop()` is true, or nothing happened for `idle_seconds`.

        Return whether the run is over. `listening` returns whether the run store can be reached. Raises as
        `Engine.run`, and StateError 505 when another server took over.
        """

        def leave() -> bool:
            self._update(listening())
            return stop()

        try:
            return self._engine.run(leave, idle_seconds)
        finally:
            self._log.close()

    def beat(self, store: RunStore) -> None:
        """Renew the lease and read the sites' statuses; called by the heartbeat."""
        self._lease.renew(store)
        self._statuses = store.statuses(self._sites)

    def _update(self, listening: bool) -> None:
        """Check the lease and update deadline and silence; called between two steps."""
        self._lease.check()
        self._deadline.update(self.role.version)
        if self.silence.is_due:
            listening = listening and self.counters.blocked_reason is None
            self.silence.update(self.role.applied, self.role.awaited(), self._statuses, listening)

    def _decide(self) -> OrderEntry | None:
        """Return a journal entry to apply instead of a message: the end of a round, or a site's exclusion."""
        if self.role.may_close and self._deadline.is_over:
            return CloseRound()
        overdue = self.silence.overdue(self.role.awaited(), self.role.active_sites)
        return Exclude(overdue) if overdue else None

    def _record(self, record: Record) -> None:
        self._log.write(record)
        match record.metrics["event"]:
            case "train":
                self._trained[str(record.metrics.get("site", TOGETHER))] = record
            case "outlier":
                self._warn(str(record.metrics["site"]), str(record.metrics["part"]))

    def _warn(self, site: str, part: str) -> None:
        """Log a site's first outlier of each kind in this shift; its status has their number."""
        if (site, part) not in self._warned:
            self._warned.add((site, part))
            event("outlier", WARNING, site=site, part=part)

    def extend_status(self, status: WorkerStatus) -> WorkerStatus:
        """Return a worker's status with the server's fields added."""
        role, counts = self.role, self.counters.counts
        entry = role.evaluation.history[-1] if role.evaluation.history else None
        loss, staleness = self._last_batch(TOGETHER)
        return replace(
            status, fence=self._lease.fence, steps=role.steps, epoch=entry["epoch"] if entry else 0,
            applied=sum(role.applied.values()), planned=self._planned(), refused=sum(role.refusals.values()),
            loss=loss, staleness=staleness,
            lacking=tuple(self.silence.lacking(role.awaited(), role.active_sites)),
            round=self._deadline.round, sites={site: self._site(site) for site in self._sites},
            sent=counts["sent"], confirmed=counts["confirmed"],
            duplicates=counts["duplicates"], checkpoints=counts["checkpoints"],
        )  # fmt: skip

    def _planned(self) -> int | None:
        """Return the number of messages of the whole run; None before every active site has said hello."""
        last = {site: sequence.last for site, sequence in dict(self.role.sequences).items()}
        if not self.role.active_sites.keys() <= last.keys():
            return None
        return sum(self.role.applied[site] if site in self.role.excluded else last[site] for site in last)

    def _site(self, site: str) -> SiteStatus:
        role = self.role
        loss, staleness = self._last_batch(site)
        return SiteStatus(
            applied=role.applied[site], queued=self._queued(site), batches=role.batches[site],
            samples=role.samples[site], share=role.share(site),
            outliers=sum(dict(role.outliers[site]).values()), excluded_at=role.excluded.get(site),
            loss=loss, staleness=staleness, presence=self.silence.sites[site],
        )  # fmt: skip

    def _queued(self, site: str) -> int | None:
        """Return the number of a site's messages that are not applied yet; None when unknown."""
        # From the run store, since a request to the broker would delay the heartbeat.
        status = self._statuses.get(site)
        confirmed = status.report.confirmed if status is not None else None
        return None if confirmed is None else max(0, confirmed - self.role.applied[site])

    def _last_batch(self, site: str) -> tuple[float | None, int | None]:
        """Return loss and staleness of the last training batch, None where unknown."""
        if site not in self._trained:
            return None, None
        loss, staleness = (self._trained[site].metrics.get(name) for name in ("loss", "staleness"))
        return None if loss is None else float(loss), None if staleness is None else int(staleness)
