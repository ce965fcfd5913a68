"""A worker's log for programs: one JSON object a line, on stderr.

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

from nightsplit.shared.errors import TITLES, DataError, NightsplitError, StateError
from nightsplit.shared.log import LOG, event

if TYPE_CHECKING:
    from nightsplit.shared.run_store.status import WorkerStatus

PROGRESS_SECONDS = 30.0
"""How often the counts are written."""


class JsonHandler(logging.Handler):
    """Writes an event as a JSON object.

    Attributes:
        worker, run: whose log it is; None until that is known.
    """

    worker: str | None = None
    run: str | None = None

    def format(self, record: logging.LogRecord) -> str:
        """See `logging.Handler`."""
        moment = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        line = {"time": moment, "level": record.levelname.lower(), "worker": self.worker, "run": self.run}
        return json.dumps({**line, "event": record.getMessage(), **getattr(record, "facts", {})})

    def emit(self, record: logging.LogRecord) -> None:
        """See `logging.Handler`. A reader that went away does not disturb the work."""
        with suppress(OSError):
            print(self.format(record), file=sys.stderr, flush=True)


_HANDLER = JsonHandler()


def switch(on: bool) -> None:
    """Write the log from now on, or no longer."""
    if on:
        LOG.addHandler(_HANDLER)
    else:
        LOG.removeHandler(_HANDLER)


def is_on() -> bool:
    """Whether stderr belongs to the log, so that nothing else may be written there."""
    return _HANDLER in LOG.handlers


def name(worker: str | None, run: str | None) -> None:
    """Say in every line from now on whose log it is."""
    _HANDLER.worker, _HANDLER.run = worker, run


def failed(error: NightsplitError) -> None:
    """Log the error that ended the command.

    A sentence about data or a disk may quote a file's name or a cell of a table, and so may what a model's
    own code says (104, 105); then only the number and its title are told, and `nightsplit doctor` shows the rest
    to whoever sits at the machine.
    """
    reason = None if isinstance(error, DataError | StateError) or error.number in (104, 105) else error.sentence
    event("failed", logging.ERROR, number=error.number, title=TITLES[error.number], reason=reason)


class Pulse:
    """Logs a worker's counts every now and then, and at its end."""

    def __init__(self) -> None:
        self._status: WorkerStatus | None = None
        self._told_at = time.monotonic()

    def observe(self, status: WorkerStatus) -> None:
        """Take what the heartbeat reports."""
        self._status = status
        if time.monotonic() - self._told_at >= PROGRESS_SECONDS:
            self.tell()

    def tell(self) -> None:
        """Log what was reported last."""
        self._told_at = time.monotonic()
        event("progress", **_numbers({} if self._status is None else msgspec.to_builtins(self._status)))


def _numbers(told: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers in a status, those of each site under its name."""
    numbers = {}
    for name, fact in told.items():
        if isinstance(fact, dict):
            fact = _numbers(fact)
        if isinstance(fact, int | float) or (isinstance(fact, dict) and fact):
            numbers[name] = fact
    return numbers
