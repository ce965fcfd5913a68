"""Progress of a worker: redrawn lines on a terminal, plain lines elsewhere."""

import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from typing import Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.text import Text

from nightsplit.console.ui.text import counted, duration, server_offline, state_of
from nightsplit.shared.foreign import shown
from nightsplit.shared.run_store.status import Phase, WorkerStatus
from nightsplit.shared.wire.message import SERVER

PLAIN_SECONDS = 30.0
"""Seconds between two plain lines while the state does not change."""

RATE_SECONDS = 30.0
"""Seconds over which the rate is averaged."""


class Progress:
    """Display of a worker's status. Only one thread may call `observe`."""

    def __init__(self, worker: str, console: Console) -> None:
        self._worker = worker
        self._console = console
        self._live = Live(console=console, auto_refresh=False) if console.is_terminal else None
        self._history: deque[tuple[float, int]] = deque()
        self._shown: str | None = None
        self._shown_at = 0.0

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._live is not None:
            self._live.stop()

    def warn(self, lines: Sequence[str]) -> None:
        """Show warnings; the work continues."""
        for line in lines:
            self._console.print(f"warning: {line}", style="yellow")

    def observe(self, status: WorkerStatus) -> None:
        """Show a status. A closed pipe does not stop the work."""
        # Without the figures, which change all the time; IDLE, too, is work.
        state = f"at work, server {status.server}" if status.phase.at_work else state_of(status)
        if changed := state != self._shown:
            self._shown = state
            self._history.clear()
        done = (status.applied if self._worker == SERVER else status.sent) or 0
        rate = self._rate(done)
        with suppress(OSError):
            if self._live is not None:
                self._live.update(self._picture(status, done, rate), refresh=True)
            else:
                self._log(status, rate, changed)

    def _log(self, status: WorkerStatus, rate: float, changed: bool) -> None:
        """Print a plain line if the state has changed, or `PLAIN_SECONDS` after the last one."""
        now = time.monotonic()
        if changed or now - self._shown_at > PLAIN_SECONDS:
            self._shown_at = now
            figures = self._figures(status, rate)
            line = f"{time.strftime('%H:%M:%S')} {self._worker}: {self._sentence(status)}"
            self._console.print(f"{line} ({figures})" if figures else line, soft_wrap=True)

    def _picture(self, status: WorkerStatus, done: int, rate: float) -> Group:
        lines: list[Text | ProgressBar] = [Text(f"{self._worker}: {self._sentence(status)}", style="bold")]
        if status.planned:
            lines.append(ProgressBar(status.planned, done, width=40))
        lines.append(Text(self._figures(status, rate)))
        return Group(*lines)

    def _sentence(self, status: WorkerStatus) -> str:
        if self._worker != SERVER and status.phase.at_work and status.sent is not None:
            if status.server == "offline":
                return server_offline(status.queued or 0)
            if status.phase is Phase.IDLE:
                return f"{counted(status.queued or 0, 'batch')} queued, waiting for the server"
        return shown(state_of(status))

    def _figures(self, status: WorkerStatus, rate: float) -> str:
        names = ("applied",) if self._worker == SERVER else ("sent", "answered")
        counts = {name: count for name in names if (count := getattr(status, name)) is not None}
        parts = [f"{name} {count}" for name, count in counts.items()]
        if parts and status.planned:
            parts[0] += f" of {status.planned}"
        if rate > 0 and status.phase.at_work and status.server != "offline":
            parts.append(f"{rate:.1f} per second")
            if status.planned:
                parts.append(f"{duration(max(0, status.planned - counts.get(names[0], 0)) / rate)} left")
        queued = [f"{site} {facts.queued}" for site, facts in status.sites.items() if facts.queued is not None]
        if queued:
            parts.append(f"queued: {', '.join(queued)}")
        if status.refused:
            parts.append(f"{status.refused} refused")
        return ", ".join(parts)

    def _rate(self, done: int) -> float:
        """Return the recent messages per second."""
        now = time.monotonic()
        self._history.append((now, done))
        while now - self._history[0][0] > RATE_SECONDS:
            self._history.popleft()
        since, before = self._history[0]
        return (done - before) / (now - since) if now > since else 0.0
