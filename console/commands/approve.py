"""nightsplit approve: a hospital's decision about a run."""

from typing import Annotated

import typer
from typer import Option

from nightsplit.console.options import Overrides, SiteFile


def approve(
    file: SiteFile,
    overrides: Overrides = [],
    by: Annotated[str | None, Option(metavar="NAME", help="the person who decides (default: ask)")] = None,
    yes: Annotated[bool, Option("--yes", help="approve without asking; needs --by")] = False,
) -> int:
    """Approve a run for one hospital.

    Show who would read what, which network is trained and which code builds it, with all settings; or what has
    changed since the last approval. Then ask, and add the answer to the hospital's file of approvals. No worker
    of the hospital uses a run, or code, that is not approved. Exit code 1 if it is not.
    """
    if yes and not by:
        raise typer.BadParameter("Give --by NAME too.", param_hint="'--yes'")
    from nightsplit.console.approve import decide

    return decide(file, overrides, by, yes)
