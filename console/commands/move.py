"""nightsplit move: an unfinished run, on another broker."""

from pathlib import Path
from typing import Annotated

from typer import Option

from nightsplit.console.options import Overrides, ServerFile


def move(
    file: ServerFile,
    to: Annotated[Path, Option("--to", metavar="NEW.TOML", help="a copy of SERVER.TOML that names the new broker")],
    overrides: Overrides = [],
) -> None:
    """Move an unfinished run to another broker.

    Move all messages of a run to the broker of another server file. Stop all workers before. The move may be
    stopped at any time; start the same command again to continue. Afterwards start the server with the new file, and
    the sites with the new address.
    """
    from nightsplit.console.move import move_run
    from nightsplit.console.worker_file import WorkerFile

    move_run(WorkerFile(file, overrides), WorkerFile(to, overrides))
