"""Log of the workers: named events with facts, through Python's own `logging`.

Nothing is written unless a handler is added to `LOG`; `nightsplit.console.ui.json_log` adds one.

An event contains names of workers, numbers and texts of our own. It never contains a patient's value,
the name of a data file, or content of a message's body.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nightsplit.shared.wire.message import Scalar

LOG = logging.getLogger("nightsplit")
LOG.addHandler(logging.NullHandler())  # without it Python writes warnings to stderr, between the plain lines
LOG.setLevel(logging.INFO)


def event(name: str, level: int = logging.INFO, /, **facts: Scalar | None) -> None:
    """Log an event.

    Args:
        name: one word, from the table in docs/reference/logs_and_metrics.md.
        level: level of `logging`: INFO for normal operation, WARNING if an administrator may have to act,
            ERROR for the end of a worker.
    """
    LOG.log(level, name, extra={"facts": facts})
