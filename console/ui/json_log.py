"""Log of a worker for programs: one JSON object per line, on stderr.

{"time": "2026-11-21T22:00:07.318Z", "level": "warning", "worker": "north", "run": "ldl-2026",
 "event": "blocked", "reason": "queue nightsplit.ldl-2026.north.up is full (limit: 4294967296 bytes)"}
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import msgspec
from typing_extensions import override

from nightsplit.shared.errors import TITLES, DataError, NightsplitError, StateError
from nightsplit.shared.log import LOG, event

if TYPE_CHECKING:
    from nightsplit.shared.run_store.status import WorkerStatus

PROGRESS_SECONDS = 30.0
"""Seconds between two lines of counts."""


class JsonHandler(logging.Handler):
    """Handler that writes each event as a JSON object, with `worker` and `run`, which are None until they are known."""

    worker: str | None = None
    run: str | None = None

    @override
    def format(self, record: logging.LogRecord) -> str:
        moment = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        line = {"time": moment, "level": record.levelname.lower(), "worker": self.worker, "run": self.run}
        return json.dumps({**line, "event": record.getMessage(), **getattr(record, "facts", {})})

    @override
    def emit(self, record: logging.LogRecord) -> None:
        with suppress(OSError):  # a reader that has closed the pipe does not stop the work
            print(self.format(record), file=sys.stderr, flush=True)


_HANDLER = JsonHandler()


def switch(on: bool) -> None:
    """Switch the log on or off."""
    if on:
        LOG.addHandler(_HANDLER)
    else:
        LOG.removeHandler(_HANDLER)


def is_on() -> bool:
    """Return whether the log is on: then nothing else may be written to stderr."""
    return _HANDLER in LOG.handlers


def name(worker: str | None, run: str | None) -> None:
    """Set the worker and the run that every line names."""
    _HANDLER.worker, _HANDLER.run = worker, run


def failed(error: NightsplitError) -> None:
    """Log the error that ended the command.

    An error about data or a disk may quote a file's name or a cell of a table, and so may an exception of a
    model's code (104, 105, 610). Then the log holds only number and title; `nightsplit doctor` shows the rest at the
    machine.
    """
    reason = None if isinstance(error, DataError | StateError) or error.number in (104, 105, 610) else error.sentence
    event("failed", logging.ERROR, number=error.number, title=TITLES[error.number], reason=reason)


class Pulse:
    """Periodic log of a worker's counts."""

    def __init__(self) -> None:
        self._status: WorkerStatus | None = None
        self._logged_at = time.monotonic()

    def observe(self, status: WorkerStatus) -> None:
        """Keep a status of the heartbeat, and log it if it is time."""
        self._status = status
        if time.monotonic() - self._logged_at >= PROGRESS_SECONDS:
            self.log()

    def log(self) -> None:
        """Log the counts of the last status."""
        self._logged_at = time.monotonic()
        event("progress", **_numbers({} if self._status is None else msgspec.to_builtins(self._status)))


def _numbers(status: Mapping[str, Any]) -> dict[str, Any]:
    """Return the numbers of a status, those of each site under its name."""
    numbers = {}
    for name, fact in status.items():
        if isinstance(fact, dict):
            fact = _numbers(fact)
        if isinstance(fact, int | float) or (isinstance(fact, dict) and fact):
            numbers[name] = fact
    return numbers
