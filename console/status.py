"""What the run store and the broker know of a run, one line per worker."""

from collections.abc import Mapping
from contextlib import closing
from typing import Any

from nightsplit.console.ui.text import counted, duration, server_offline, state_of
from nightsplit.console.worker_file import WorkerFile
from nightsplit.shared.errors import BrokerError, RunError
from nightsplit.shared.run_store.base import Status
from nightsplit.shared.run_store.status import Phase, SiteStatus, WorkerStatus
from nightsplit.shared.wire.message import SERVER

COUNTS = ("sent", "confirmed", "answered", "applied", "queued", "refused", "duplicates")
QUEUES = ("up", "down", "dead")
GIVEN = ("batches", "samples", "share", "excluded_at")
"""The part of each site in the training, as the server tells it."""


def summarise(file: WorkerFile) -> dict[str, Any]:
    """Everything that the status says, as plain data; docs/reference/logs_and_metrics.md explains the keys.

    Raises:
        BrokerError: 207 the run store cannot be reached.
        RunError: 605 nothing is known of the run.
    """
    with closing(file.open_store()) as store:
        statuses = store.statuses([SERVER, *file.sites])
    depths, queries, broker = _depths(file)
    absent = all(depth is None for site in depths.values() for depth in site.values())
    if not statuses and absent and broker is None:
        what = f"run {file.run_config.run.id!r} has left no trace at the broker and in the run store."
        raise RunError(605, what, "open it with: nightsplit open server.toml; or check run.id, broker and store.")
    server = statuses.get(SERVER)
    told = server.report.sites if server is not None else {}
    workers = [_line(SERVER, server)]
    workers += [_site(_line(site, statuses.get(site)), told.get(site), depths[site]) for site in file.sites]
    return {
        "run": file.run_config.run.id,
        "sentence": _sentence(server, sum(line["queued"] or 0 for line in workers[1:])),
        "workers": workers,
        "at_broker": depths,
        "queries": queries,
        "broker": broker,
    }


Depths = dict[str, dict[str, int | None]]


def _depths(file: WorkerFile) -> tuple[Depths, Depths, str | None]:
    """Messages that wait in each site's queues, those for queries apart; and why nothing is known of them."""
    try:
        broker, run, queries = file.open_broker(), {}, {}
        for site, queues in file.queues().items():
            run[site] = {name: broker.depth(queue) for name, queue in zip(QUEUES, queues, strict=True)}
        for site, queues in file.query_queues().items():
            queries[site] = {"ask": broker.depth(queues.up), "answer": broker.depth(queues.down)}
    except BrokerError as error:
        return {site: dict.fromkeys(QUEUES) for site in file.sites}, {}, str(error)
    return run, queries, None


def _sentence(server: Status | None, queued: int) -> str:
    """The whole run in a line."""
    if server is None:
        return f"nothing was heard of the server yet; {counted(queued, 'batch')} queued, waiting for it"
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
    sentence = f"server is {_loudly(report)}; {applied}, {counted(queued, 'batch')} queued"
    if not report.lacking:
        return sentence
    lacking = ", ".join(report.lacking)
    return f"{sentence}; WAITS for {lacking}: silent for too long, but without them the quorum is not met"


def _site(line: dict[str, Any], told: SiteStatus | None, depths: Mapping[str, int | None]) -> dict[str, Any]:
    """The line of a site, with what the server says of its messages.

    What is queued is what the broker has confirmed and the server has not applied. The depth of the
    queue says less: it counts greetings, and what is applied and not in two checkpoints yet.
    """
    if told is not None:
        line |= {name: getattr(told, name) for name in ("applied", *GIVEN)}
    confirmed = line["confirmed"]
    settled = max(line["applied"] or 0, line["answered"] or 0)
    line["queued"] = depths["up"] if confirmed is None else max(0, confirmed - settled)
    line["refused"] = line["refused"] if depths["dead"] is None else depths["dead"]
    return line


def _line(worker: str, status: Status | None) -> dict[str, Any]:
    told = status.report if status is not None else None
    return {
        "worker": worker,
        "state": told and told.phase,
        "detail": told and told.detail,
        "online": status is not None and status.online,
        "age_seconds": None if status is None else round(status.age_seconds, 1),
        **{name: told and getattr(told, name) for name in (*COUNTS, "planned")},
        "skipped_checkpoints": list(told.skipped_checkpoints) if told else [],
        **dict.fromkeys(GIVEN),
    }


def in_words(line: Mapping[str, Any]) -> str:
    """The state in words. Silence counts more than the last ones, unless these were a farewell."""
    if line["state"] is None:
        words = "never heard of"
    else:
        status = WorkerStatus(phase=line["state"], detail=line["detail"])
        words = _loudly(status)
        if not (line["online"] or status.phase.has_left):
            words = f"OFFLINE since {duration(line['age_seconds'])} (was {words})"
    return words if line["excluded_at"] is None else f"EXCLUDED after {line['excluded_at']} messages ({words})"


def _loudly(status: WorkerStatus) -> str:
    """The state of a worker; where it is alive and idle, or cannot be understood, somebody has to see why."""
    loud = status.phase in (Phase.BLOCKED, Phase.UNREADABLE)
    return state_of(status).replace(status.phase, status.phase.upper(), 1) if loud else state_of(status)
