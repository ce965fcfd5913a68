"""nightsplit explain: the page of an error, or a run in sentences and numbers."""

from pathlib import Path
from typing import Annotated

from typer import Argument

import nightsplit
from nightsplit.shared.errors import TITLES, ConfigError

PAGES = Path(nightsplit.__file__).parent / "docs" / "errors"


def explain(
    what: Annotated[
        str, Argument(metavar="NUMBER|SITE.TOML", help="number of an error, such as 104 or E104; or a site's file")
    ],
) -> None:
    """Explain an error, or the messages of a run.

    Print the page of an error: its meaning, its remedy, and whether anything is lost. Or, with a hospital's file, the
    messages that its run will send and has sent: who reads them, how many they are, and what they reveal.
    """
    if what.endswith(".toml"):
        from nightsplit.console.explain_run import explain_run

        explain_run(Path(what))
        return
    digits = what.upper().removeprefix("E")
    if digits not in map(str, TITLES):
        raise ConfigError(120, f"{what}.", "give the three digits of an error, such as 104, or a site.toml.")
    print((PAGES / f"{digits}.md").read_text(encoding="utf-8"), end="")
