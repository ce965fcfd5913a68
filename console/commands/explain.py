"""nightsplit explain: the page of an error."""

from pathlib import Path
from typing import Annotated

from typer import Argument

import nightsplit
from nightsplit.shared.errors import TITLES, ConfigError

PAGES = Path(nightsplit.__file__).parent / "docs" / "errors"


def explain(
    number: Annotated[str, Argument(metavar="NUMBER", help="number of the error, such as 104 or E104")],
) -> None:
    """Print the page of an error.

    It says what the error means, how to fix it, and whether anything is lost.
    """
    digits = number.upper().removeprefix("E")
    if digits not in map(str, TITLES):
        raise ConfigError(120, f"{number}.", "give the three digits of an error, such as 104.")
    print((PAGES / f"{digits}.md").read_text(encoding="utf-8"), end="")
