"""Status of a run from the run store and the broker, one line per worker."""

from collections.abc import Mapping
from contextlib import closing
from itertools import chain
from typing import Any

from nightsplit.broker.topology import query_queues
from nightsplit.console.depths import read_depths
from nightsplit.console.ui.text import counted, duration, server_offline, state_of
from nightsplit.console.worker_file import WorkerFile
from nightsplit.shared.errors import BrokerError, RunError
from nightsplit.shared.run_store.base import Status
from nightsplit.shared.run_store.status import Phase, SiteStatus, WorkerStatus
from nightsplit.shared.wire.message import SERVER

COUNTS = ("sent", "confirmed", "answered", "applied", "queued", "refused", "duplicates")
QUEUES = ("up", "down", "dead")
SITE_FACTS = ("batches", "samples", "share", "outliers", "excluded_at")
"""Facts that the server reports of each site."""


def summarise(file: WorkerFile) -> dict[str, Any]:
    """Return the status as plain data; docs/reference/logs_and_metrics.md explains the keys.

    Raises:
        BrokerError: 207 the run store cannot be reached.
        RunError: 605 neither run store nor broker knows the run.
    """
    with closing(file.open_store()) as store:
        statuses = store.statuses([SERVER, *file.sites])
    depths, query_depths, broker_error = _depths(file)
    no_queue_exists = all(depth is None for site in depths.values() for depth in site.values())
    if not statuses and no_queue_exists and broker_error is None:
        sentence = f"neither the broker nor the run store knows run {file.run_config.run.id!r}."
        raise RunError(605, sentence, "open it with: nightsplit open server.toml; or check run.id, broker and store.")
    server = statuses.get(SERVER)
    reported = server.report.sites if server is not None else {}
    workers = [_line_of_worker(SERVER, server)]
    workers += [_line_of_site(site, statuses.get(site), reported.get(site), depths[site]) for site in file.sites]
    return {
        "run": file.run_config.run.id,
        "sentence": _sentence(server, sum(line["queued"] or 0 for line in workers[1:])),
        "workers": workers,
        "at_broker": depths,
        "queries": query_depths,
        "broker": broker_error,
    }


Depths = dict[str, dict[str, int | None]]


def _depths(file: WorkerFile) -> tuple[Depths, Depths, str | None]:
    """Return the depths of each site's queues and of its queues for queries, and the error that hides any of them."""
    queues, for_queries = file.queues(), file.queues(query_queues)
    asked = chain(*queues.values(), *((of_site.up, of_site.down) for of_site in for_queries.values()))
    error: BrokerError | None
    try:
        depths, error = read_depths(file.open_broker(), asked)
    except BrokerError as failure:
        depths, error = {}, failure
    of_runs = {
        site: {name: depths.get(queue.name) for name, queue in zip(QUEUES, of_site, strict=True)}
        for site, of_site in queues.items()
    }
    of_queries = {
        site: {"ask": depths.get(of_site.up.name), "answer": depths.get(of_site.down.name)}
        for site, of_site in for_queries.items()
    }
    return of_runs, of_queries, None if error is None else str(error)


def _sentence(server: Status | None, queued: int) -> str:
    """Return the state of the whole run in a line."""
    if server is None:
        return f"the server has not reported yet; {counted(queued, 'batch')} queued, waiting for it"
    report = server.report
    if report.phase is Phase.FINISHED:
        return "the run is finished"
    if report.phase is Phase.FAILED:
        return f"server stopped: {report.detail}"
    if report.phase is Phase.UNREADABLE:
        return f"the server's status cannot be read; {counted(queued, 'batch')} queued"
    if not server.online:
        return server_offline(queued)
    of = f" of {report.planned}" if report.planned is not None else ""
    applied = f"{report.applied or 0}{of} messages applied"
    sentence = f"server is {_state_in_words(report)}; {applied}, {counted(queued, 'batch')} queued"
    if not report.lacking:
        return sentence
    lacking = ", ".join(report.lacking)
    return f"{sentence}; WAITING for {lacking}: silent for too long, but the run cannot meet its quorum without them"


def _line_of_site(
    site: str, status: Status | None, reported: SiteStatus | None, depths: Mapping[str, int | None]
) -> dict[str, Any]:
    """Return the line of a site, with the server's report of its messages.

    Queued messages are those that the broker has confirmed and the server has not applied. The depth of the
    queue is less exact: it counts hellos, and applied messages that the server has not acknowledged yet.
    """
    line = _line_of_worker(site, status)
    if reported is not None:
        line |= {name: getattr(reported, name) for name in ("applied", *SITE_FACTS)}
    confirmed = line["confirmed"]
    # The server reports `applied`, the site `answered`: the newer of the two.
    settled = max(line["applied"] or 0, line["answered"] or 0)
    line["queued"] = depths["up"] if confirmed is None else max(0, confirmed - settled)
    if depths["dead"] is not None:  # with what earlier processes refused
        line["refused"] = depths["dead"]
    return line


def _line_of_worker(worker: str, status: Status | None) -> dict[str, Any]:
    report = status.report if status is not None else None
    return {
        "worker": worker,
        "state": getattr(report, "phase", None),
        "detail": getattr(report, "detail", None),
        "online": status is not None and status.online,
        "age_seconds": None if status is None else round(status.age_seconds, 1),
        **{name: getattr(report, name, None) for name in (*COUNTS, "planned")},
        "skipped_checkpoints": list(report.skipped_checkpoints) if report else [],
        **dict.fromkeys(SITE_FACTS),
    }


def in_words(line: Mapping[str, Any]) -> str:
    """Return the state in words: offline if the worker is silent, unless its last report says that it has left."""
    if line["state"] is None:
        words = "no report yet"
    else:
        status = WorkerStatus(phase=line["state"], detail=line["detail"])
        words = _state_in_words(status)
        if not (line["online"] or status.phase.has_left):
            words = f"OFFLINE for {duration(line['age_seconds'])} (was {words})"
    return words if line["excluded_at"] is None else f"EXCLUDED at position {line['excluded_at']} ({words})"


def _state_in_words(status: WorkerStatus) -> str:
    """Return a worker's state, in capitals if it needs attention."""
    state = state_of(status)
    urgent = status.phase in (Phase.BLOCKED, Phase.UNREADABLE)
    return state.replace(status.phase, status.phase.upper(), 1) if urgent else state
