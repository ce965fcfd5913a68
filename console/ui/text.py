"""Texts of the console: durations, counts, tables, and the states of workers."""

from collections.abc import Collection
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text
from typing_extensions import override

from nightsplit.shared.foreign import shown
from nightsplit.shared.run_store.status import Phase, WorkerStatus

_STATES = {Phase.STANDBY: "standing by: another server is active", Phase.IDLE: "waiting for the server"}


class Screen(Console):
    """Console that prints each string, also in a table, as one line of printable characters."""

    @override
    def render_str(self, text: str, **options: Any) -> Text:
        # Console makes the `Text` of each string here.
        return super().render_str(shown(text), **options)


def screen(stderr: bool = False) -> Screen:
    """Return a console for plain text; without a terminal it is 220 columns wide."""
    console = Screen(stderr=stderr, markup=False, highlight=False, emoji=False)
    if not console.is_terminal:
        console.width = 220
    return console


def columns(*names: str, numbers: Collection[str] = ()) -> Table:
    """Return a table with these column names; the columns in `numbers` are aligned to the right."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for name in names:
        table.add_column(name, justify="right" if name in numbers else "left", overflow="fold")
    return table


def counted(number: int, noun: str) -> str:
    """Return '1 batch', '412 batches'."""
    plural = "es" if noun.endswith("ch") else "s"
    return f"{number} {noun}{'' if number == 1 else plural}"


def duration(seconds: float) -> str:
    """Return '12 s', '3 min', '2 h 5 min', '4 days'."""
    minutes = int(seconds // 60)
    if seconds < 60:
        return f"{int(seconds)} s"
    if minutes < 60:
        return f"{minutes} min"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes // (24 * 60)} days"


def state_of(status: WorkerStatus) -> str:
    """Return 'working', 'waiting for its shift (22:00-06:00 UTC)', 'blocked: the queue is full'."""
    state = _STATES.get(status.phase, status.phase.value)
    if status.detail is None:
        return state
    return f"{state} for {status.detail}" if status.phase is Phase.WAITING else f"{state}: {status.detail}"


def server_offline(number: int, noun: str = "batch", fate: str = "trained") -> str:
    """Say that the server is offline, and that the queued messages will be processed later."""
    if number == 0:
        return "server is offline; nothing is queued"
    they = "it" if number == 1 else "they"
    return f"server is offline; {counted(number, noun)} queued, {they} will be {fate} when it returns"
