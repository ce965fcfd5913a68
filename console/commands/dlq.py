"""nightsplit dlq: the dead letters of a run."""

from typing import Annotated

import typer
from typer import Argument, Option

from nightsplit.console.options import AsJson, EitherFile, Overrides, print_help_alone

dlq = typer.Typer(
    callback=print_help_alone,
    invoke_without_command=True,
    help="""List, replay or discard refused messages.

    Each site has a dead letter queue for the messages that a worker refused. A site's file shows the site's
    own, the server's file those of all sites.
    """,
)

Ids = Annotated[list[str], Argument(metavar="ID", help="as the list shows them")]
All = Annotated[bool, Option("--all", help="every dead letter")]


@dlq.command("list")
def list_(file: EitherFile, overrides: Overrides = [], as_json: AsJson = False) -> None:
    """List the refused messages.

    Show each message with the reason and the time of its refusal. Nothing is changed.
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
    """Show all of a message except the values of its tensors."""
    from nightsplit.console.dead_letters import show_letter
    from nightsplit.console.worker_file import WorkerFile

    show_letter(WorkerFile(file, overrides), letter, as_json)


@dlq.command()
def replay(file: EitherFile, ids: Ids = [], every: All = False, overrides: Overrides = []) -> None:
    """Send messages again.

    Send dead letters to the queues that they came from. This helps if a message was refused before it was
    counted (its header was unreadable, say, or its receiver was an older version), and the cause is fixed.
    A message that was refused in its turn was answered: a copy only counts as a duplicate, and is not
    trained on. docs/explanation/delivery.md explains the two cases.
    """
    chosen = _chosen(ids, every)
    from nightsplit.console.dead_letters import replay_letters
    from nightsplit.console.worker_file import WorkerFile

    replay_letters(WorkerFile(file, overrides), chosen)


@dlq.command()
def discard(file: EitherFile, ids: Ids = [], every: All = False, overrides: Overrides = []) -> None:
    """Delete messages for good."""
    chosen = _chosen(ids, every)
    from nightsplit.console.dead_letters import discard_letters
    from nightsplit.console.worker_file import WorkerFile

    discard_letters(WorkerFile(file, overrides), chosen)


def _chosen(ids: list[str], every: bool) -> list[str] | None:
    """Return the ids of the chosen letters; None for all."""
    if every is bool(ids):
        raise typer.BadParameter("Give either ids or --all.", param_hint="'ID'")
    return None if every else ids
