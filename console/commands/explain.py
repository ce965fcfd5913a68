"""nightsplit explain: the page of an error, which is installed with the packages."""

from pathlib import Path
from typing import Annotated

from typer import Argument

import nightsplit
from nightsplit.shared.errors import TITLES, ConfigError

PAGES = Path(nightsplit.__file__).parent / "docs" / "errors"


def explain(number: Annotated[str, Argument(metavar="NUMBER", help="as its line says it: 104, or E104")]) -> None:
    """Print the page of an error.

    It says what the error means, how it is mended, and whether anything is lost.
    """
    digits = number.upper().removeprefix("E")
    if digits not in map(str, TITLES):
        raise ConfigError(120, f"{number}.", "give the three digits behind the E of an error, such as 104.")
    print((PAGES / f"{digits}.md").read_text(encoding="utf-8"), end="")
