"""Exit codes of an interrupted or crashed command."""

from __future__ import annotations

import signal
import sys
from typing import TYPE_CHECKING

from nightsplit.console.ui import json_log
from nightsplit.shared.log import event

if TYPE_CHECKING:
    from nightsplit.shared.runtime.process import StopSignal  # loads torch

INTERRUPTED, CRASHED = 130, 70
"""Exit codes: as a shell reports Ctrl-C, and EX_SOFTWARE of sysexits.h."""


def stopped(stop: StopSignal | None = None) -> int:
    """Report that the user stopped the command, by a signal or (None) by Ctrl-C, and return the exit code."""
    event("stopped")
    if not json_log.is_on():
        line_end = "" if stop else "\n"  # a terminal has printed ^C
        print(f"{line_end}stopped; start the same command again to continue", file=sys.stderr)
    return INTERRUPTED if stop is None or stop.number == signal.SIGINT else 0
