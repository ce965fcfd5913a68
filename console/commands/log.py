"""nightsplit log: the messages that left a hospital."""

from pathlib import Path
from typing import Annotated

import typer
from typer import Option

from nightsplit.console.options import AsJson, Overrides, SiteFile, print_help_alone

log = typer.Typer(
    callback=print_help_alone,
    invoke_without_command=True,
    help="""Show, verify or export the log of what left a hospital.

    The worker of a site writes a line for each message before it hands it over. Each line contains a hash of all lines
    before it, and the server signs the last hash now and then: lines that are changed, added or taken out are found.
    """,
)


@log.command()
def show(file: SiteFile, overrides: Overrides = [], as_json: AsJson = False) -> None:
    """Count the messages that left, by kind."""
    from nightsplit.console.exit_log import show_log
    from nightsplit.console.worker_file import WorkerFile

    show_log(WorkerFile(file, overrides), as_json)


@log.command()
def verify(file: SiteFile, overrides: Overrides = []) -> None:
    """Find changes to the log."""
    from nightsplit.console.exit_log import print_verified
    from nightsplit.console.worker_file import WorkerFile

    print_verified(WorkerFile(file, overrides))


@log.command()
def export(
    file: SiteFile,
    to: Annotated[Path, Option("--to", metavar="FILE", help="the copy")],
    overrides: Overrides = [],
) -> None:
    """Copy the log for somebody who verifies it without nightsplit."""
    from nightsplit.console.exit_log import export_log
    from nightsplit.console.worker_file import WorkerFile

    export_log(WorkerFile(file, overrides), to)
