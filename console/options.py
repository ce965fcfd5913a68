"""Options and arguments of several verbs."""

from pathlib import Path
from typing import Annotated, Literal

import typer
from typer import Argument, Option

SiteFile = Annotated[Path, Argument(metavar="SITE.TOML", help="the site's configuration file")]
ServerFile = Annotated[Path, Argument(metavar="SERVER.TOML", help="the server's configuration file")]
EitherFile = Annotated[Path, Argument(metavar="FILE.TOML", help="a worker's configuration file")]

Overrides = Annotated[
    list[str],
    Option("--set", metavar="KEY=VALUE", help="override a key of run.toml, e.g. run.window=8, at every participant"),
]
IdleSeconds = Annotated[
    float | None,
    Option("--exit-when-idle", metavar="SECONDS", help="exit when idle for this long (default: stay to the end)"),
]
LogFormat = Annotated[
    Literal["text", "json"],
    Option(help="json: only one object per line on stderr, for programs that read logs"),
]
AsJson = Annotated[bool, Option("--json", help="print one JSON object, for other programs")]


def print_help_alone(context: typer.Context) -> None:
    """Print the help of a group that is called without a verb, and exit."""
    if context.invoked_subcommand is None:
        print(context.get_help())
        raise typer.Exit
