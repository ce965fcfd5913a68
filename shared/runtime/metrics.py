"""Metrics of a worker for Prometheus: the status of its heartbeat and the counts of its engine.

Counters start at zero with every process and every shift, as Prometheus expects. Positions in a run,
which a restart may move back a little, are gauges. docs/reference/logs_and_metrics.md lists all of them.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from typing_extensions import override

from nightsplit.shared.run_store.status import Phase, WorkerStatus

Values = Mapping[tuple[str, ...], float | datetime | None]

# Name of a metric, its count or attribute of a status, and its meaning.
_COUNTERS = (
    ("nightsplit_messages_sent", "sent", "Messages handed to the broker."),
    ("nightsplit_messages_confirmed", "confirmed", "Messages that the broker holds on disk."),
    ("nightsplit_messages_applied", "applied", "Messages applied in their turn, refused ones included."),
    ("nightsplit_messages_duplicate", "duplicates", "Messages that came again and were only acknowledged."),
    ("nightsplit_messages_refused", "refused", "Messages put into the dead letter queue."),
    ("nightsplit_sent_bytes", "sent_bytes", "Bytes of messages handed to the broker."),
    ("nightsplit_received_bytes", "received_bytes", "Bytes of messages received, duplicates included."),
    ("nightsplit_checkpoints", "checkpoints", "Checkpoints written."),
)
_GAUGES = (
    ("nightsplit_plan_messages", "planned", "Messages of the run's plan: a site's own, the server's of all."),
    ("nightsplit_training_steps", "steps", "Training steps of the server's layers since the run began."),
    ("nightsplit_epoch", "epoch", "The last evaluated epoch."),
    ("nightsplit_fence", "fence", "Number of the server's incarnation."),
)
_SITE_GAUGES = (
    ("nightsplit_queued_messages", "queued", "A site's messages at the broker that are not applied yet."),
    ("nightsplit_training_loss", "loss", "Loss of the last training batch, where the server knows it."),
    ("nightsplit_staleness_steps", "staleness", "Training steps between the last batch's bottom and its use."),
    ("nightsplit_site_last_seen_timestamp_seconds", "last_seen", "When the server saw the site last, by its clock."),
    ("nightsplit_site_outliers", "outliers", "Parts of a site's messages that were scaled down as outliers."),
    ("nightsplit_site_excluded", "excluded", "1 when the run goes on without the site."),
)


class Telemetry(Collector):
    """Collector of a worker's metrics; `sites` are those of which it has figures."""

    def __init__(
        self, run: str, worker: str, sites: Sequence[str], monotonic: Callable[[], float] = time.monotonic
    ) -> None:
        self._labels = {"run": run, "worker": worker}
        self._sites = sites
        self._status = WorkerStatus(phase=Phase.STARTING)
        self._counts: Mapping[str, int] = {}
        self._monotonic = monotonic
        self._saved_at = monotonic()

    def observe(self, status: WorkerStatus, counts: Mapping[str, int]) -> None:
        """Store the heartbeat's status and the engine's present counts."""
        if counts.get("checkpoints") != self._counts.get("checkpoints"):
            self._saved_at = self._monotonic()
        self._status, self._counts = status, dict(counts)

    @override
    def collect(self) -> Iterator[Metric]:
        # Called at every scrape, on a thread of the HTTP server.
        status = self._status
        for metric, source, meaning in _COUNTERS:
            counter = CounterMetricFamily(metric, meaning, labels=[*self._labels])
            counter.add_metric([*self._labels.values()], self._counts.get(source, 0))
            yield counter
        for metric, source, meaning in _GAUGES:
            yield self._gauge(metric, meaning, getattr(status, source))
        for metric, source, meaning in _SITE_GAUGES:
            # From the server's status of each site; from `status` itself at a site, and for batches of several sites.
            values: Values = {(site,): getattr(status.sites.get(site, status), source, None) for site in self._sites}
            yield self._gauges(metric, meaning, ["site"], values)
        done = status.answered if status.applied is None else status.applied
        yield self._gauge("nightsplit_plan_done_messages", "Messages of the plan that were applied or answered.", done)
        age = self._monotonic() - self._saved_at
        yield self._gauge("nightsplit_checkpoint_age_seconds", "Time since a checkpoint, or since the start.", age)
        phases: Values = {(phase,): float(phase is status.phase) for phase in Phase if phase is not Phase.UNREADABLE}
        yield self._gauges("nightsplit_state", "1 for what the worker does, 0 for the rest.", ["state"], phases)

    def _gauge(self, metric: str, meaning: str, value: float | None) -> Metric:
        return self._gauges(metric, meaning, [], {(): value})

    def _gauges(self, metric: str, meaning: str, label: list[str], values: Values) -> Metric:
        gauge = GaugeMetricFamily(metric, meaning, labels=[*self._labels, *label])
        for name, value in values.items():
            if value is not None:
                number = value.timestamp() if isinstance(value, datetime) else float(value)
                gauge.add_metric([*self._labels.values(), *name], number)
        return gauge
