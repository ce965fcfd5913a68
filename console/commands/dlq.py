"""nightsplit dlq: the messages that a worker refused."""

from typing import Annotated

import typer
from typer import Argument, Option

from nightsplit.console.options import AsJson, EitherFile, Overrides, print_help_alone

dlq = typer.Typer(
    callback=print_help_alone,
    invoke_without_command=True,
    help="""List, replay or discard refused messages.

    Messages that a worker refused lie in a dead letter queue for each site. A site's file shows that site's,
    the server's file those of all.
    """,
)

Ids = Annotated[list[str], Argument(metavar="ID", help="as the list shows them")]
All = Annotated[bool, Option("--all", help="every dead letter")]


@dlq.command("list")
def list_(file: EitherFile, overrides: Overrides = [], as_json: AsJson = False) -> None:
    """List them, a line for each.

    Show what was refused, why, and when. Nothing is changed.
    """
    from nightsplit.console.dead_letters import list_letters
    from nightsplit.console.worker_file import WorkerFile

    list_letters(WorkerFile(file, overrides), as_json)


@dlq.command()
def show(
    file: EitherFile,
    letter: Annotated[str, Argument(metavar="ID", help="as the list shows it")],
    overrides: Overrides = [],
    as_json: AsJson = False,
) -> None:
    """Show everything about one but the values of its tensors."""
    from nightsplit.console.dead_letters import show_letter
    from nightsplit.console.worker_file import WorkerFile

    show_letter(WorkerFile(file, overrides), letter, as_json)


@dlq.command()
def replay(file: EitherFile, ids: Ids = [], every: All = False, overrides: Overrides = []) -> None:
    """Send them again.

    Send dead letters to the queues that they came from. This helps where a message was refused before it could
    be counted (it had no readable header, say, or its receiver was an older version), and the cause is mended.
    A message that was refused in its place in the sequence was answered: it is then only counted as a
    duplicate, and trains nothing. docs/explanation/delivery.md tells which is which.
    """
    chosen = _chosen(ids, every)
    from nightsplit.console.dead_letters import replay_letters
    from nightsplit.console.worker_file import WorkerFile

    replay_letters(WorkerFile(file, overrides), chosen)


@dlq.command()
def discard(file: EitherFile, ids: Ids = [], every: All = False, overrides: Overrides = []) -> None:
    """Delete them for good.

    Nothing brings them back.
    """
    chosen = _chosen(ids, every)
    from nightsplit.console.dead_letters import discard_letters
    from nightsplit.console.worker_file import WorkerFile

    discard_letters(WorkerFile(file, overrides), chosen)


def _chosen(ids: list[str], every: bool) -> list[str] | None:
    """Return the ids of the chosen letters; None for all."""
    if every is bool(ids):
        raise typer.BadParameter("Give either ids or --all.", param_hint="'ID'")
    return None if every else ids
