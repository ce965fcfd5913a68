"""What a worker shows while it works: lines redrawn on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from types import TracebackType
from typing import Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.text import Text

from nightsplit.console.ui.text import counted, duration, server_offline
from nightsplit.shared.foreign import shown
from nightsplit.shared.runtime.heartbeat import Facts
from nightsplit.shared.wire.message import SERVER

PLAIN_SECONDS = 30.0
"""How often a plain line is written while nothing changes."""

RATE_SECONDS = 30.0
"""The time over which the rate is taken."""

_AT_WORK = ("working", "waiting for the server")


class Progress:
    """Shows the facts that a worker's heartbeat reports. `observe` may be called from any one thread.

    Args:
        worker: site name, or `SERVER`.
        console: where to show them.
    """

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

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def warn(self, lines: Sequence[str]) -> None:
        """Show what the user should know although the work goes on."""
        for line in lines:
            self._console.print(f"warning: {line}", style="yellow")

    def observe(self, facts: Facts) -> None:
        """Show the present state. A reader that went away (a closed pipe) does not disturb the work."""
        state = self._state(facts)
        if changed := state != self._shown:
            self._shown = state
            self._history.clear()
        done = _number(facts, "applied" if self._worker == SERVER else "sent")
        rate = self._rate(done)
        with suppress(OSError):
            if self._live is not None:
                self._live.update(self._picture(facts, done, rate), refresh=True)
            else:
                self._log(facts, rate, changed)

    def _log(self, facts: Facts, rate: float, changed: bool) -> None:
        """A plain line when the state changes, and every now and then."""
        now = time.monotonic()
        if changed or now - self._shown_at > PLAIN_SECONDS:
            self._shown_at = now
            figures = self._figures(facts, rate)
            line = f"{time.strftime('%H:%M:%S')} {self._worker}: {self._sentence(facts)}"
            self._console.print(f"{line} ({figures})" if figures else line, soft_wrap=True)

    def _picture(self, facts: Facts, done: int, rate: float) -> Group:
        lines: list[Text | ProgressBar] = [Text(f"{self._worker}: {self._sentence(facts)}", style="bold")]
        if planned := _number(facts, "planned"):
            lines.append(ProgressBar(planned, done, width=40))
        lines.append(Text(self._figures(facts, rate)))
        return Group(*lines)

    def _state(self, facts: Facts) -> str:
        """The state without its figures; waiting for the next answer is a part of working."""
        state = str(facts["state"])
        return f"at work, server {facts.get('server')}" if state in _AT_WORK else state

    def _sentence(self, facts: Facts) -> str:
        state = str(facts["state"])
        if self._worker != SERVER and state in _AT_WORK and "sent" in facts:
            if facts.get("server") == "offline":
                return server_offline(_number(facts, "queued"))
            if state == "waiting for the server":
                return f"{counted(_number(facts, 'queued'), 'batch')} queued, waiting for the server"
        return shown(state)

    def _figures(self, facts: Facts, rate: float) -> str:
        parts = []
        names = ("applied",) if self._worker == SERVER else ("sent", "answered")
        planned = _number(facts, "planned")
        for name in names:
            if name in facts:
                of = f" of {planned}" if planned and name == names[0] else ""
                parts.append(f"{name} {_number(facts, name)}{of}")
        if rate > 0 and facts["state"] in _AT_WORK and facts.get("server") != "offline":
            parts.append(f"{rate:.1f} per second")
            if planned:
                parts.append(f"{duration(max(0, planned - _number(facts, names[0])) / rate)} left")
        waiting = [
            f"{name.removeprefix('queued_')} {count}"
            for name, count in facts.items()
            if name.startswith("queued_") and count is not None
        ]
        if waiting:
            parts.append(f"queued: {', '.join(waiting)}")
        if refused := _number(facts, "refused"):
            parts.append(f"{refused} refused")
        return ", ".join(parts)

    def _rate(self, done: int) -> float:
        """Messages per second of late."""
        now = time.monotonic()
        self._history.append((now, done))
        while now - self._history[0][0] > RATE_SECONDS:
            self._history.popleft()
        since, before = self._history[0]
        return (done - before) / (now - since) if now > since else 0.0


def _number(facts: Facts, name: str) -> int:
    return int(facts.get(name) or 0)
