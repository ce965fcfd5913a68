"""nightsplit explain: the page of an error, which is installed with the packages."""

from pathlib import Path

import nightsplit
from nightsplit.shared.errors import TITLES, ConfigError

PAGES = Path(nightsplit.__file__).parent / "docs" / "errors"


def explain(number: str) -> int:
    """Print what an error means, how it is mended, and whether anything is lost; returns the exit code.

    Args:
        number: of the error, "104" or "E104".

    Raises:
        ConfigError: 120 there is no such error.
    """
    digits = number.upper().removeprefix("E")
    if digits not in map(str, TITLES):
        raise ConfigError(120, f"{number}.", "give the three digits behind the E of an error, such as 104.")
    print((PAGES / f"{digits}.md").read_text(encoding="utf-8"), end="")
    return 0
