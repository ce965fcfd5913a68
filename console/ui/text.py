"""How the console says things: durations, counts, and that a silent server is a normal night."""

from collections.abc import Collection
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from nightsplit.shared.foreign import shown
from nightsplit.shared.run_store.status import Phase, WorkerStatus

_STATES = {Phase.STANDBY: "standing by: another server is active", Phase.IDLE: "waiting for the server"}


class Screen(Console):
    """A console on which a string is one line of text, whoever wrote it: also the cell of a table."""

    def render_str(self, text: str, **options: Any) -> Text:
        """See `Console`, which makes a `Text` of each string here."""
        return super().render_str(shown(text), **options)


def screen(stderr: bool = False) -> Screen:
    """Where the console writes: plain text, as wide as it needs where nobody's window limits it."""
    console = Screen(stderr=stderr, markup=False, highlight=False, emoji=False)
    if not console.is_terminal:
        console.width = 220
    return console


def columns(*names: str, numbers: Collection[str] = ()) -> Table:
    """A table with a heading; `numbers` are written to the right."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for name in names:
        table.add_column(name, justify="right" if name in numbers else "left", overflow="fold")
    return table


def counted(number: int, noun: str) -> str:
    """'1 batch', '412 batches'."""
    plural = "es" if noun.endswith("ch") else "s"
    return f"{number} {noun}{'' if number == 1 else plural}"


def duration(seconds: float) -> str:
    """'12 s', '3 min', '2 h 5 min', '4 days': no more digits than anybody needs."""
    minutes = int(seconds // 60)
    if seconds < 60:
        return f"{int(seconds)} s"
    if minutes < 60:
        return f"{minutes} min"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes // (24 * 60)} days"


def state_of(status: WorkerStatus) -> str:
    """'working', 'waiting for its shift (22:00-06:00 UTC)', 'blocked: the queue is full'."""
    state = _STATES.get(status.phase, status.phase.value)
    if status.detail is None:
        return state
    return f"{state} for {status.detail}" if status.phase is Phase.WAITING else f"{state}: {status.detail}"


def server_offline(number: int, noun: str = "batch", fate: str = "trained") -> str:
    """How a normal night looks from a site: how many of what are queued, and what becomes of them."""
    if number == 0:
        return "server is offline; nothing is queued"
    they = "it" if number == 1 else "they"
    return f"server is offline; {counted(number, noun)} queued, {they} will be {fate} when it returns"
