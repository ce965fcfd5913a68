"""nightsplit query: encrypted queries of a site to the trained model."""

import io
import sys
from pathlib import Path
from typing import Annotated

import typer
from typer import Option

from nightsplit.console.exit_codes import stopped
from nightsplit.console.options import IdleSeconds, Overrides, SiteFile
from nightsplit.console.output import write_output


def query(
    file: SiteFile,
    overrides: Overrides = [],
    submit: Annotated[bool, Option("--submit", help="submit the site's held-out test patients first")] = False,
    data: Annotated[Path | None, Option(metavar="FILE", help="submit this file or folder instead")] = None,
    output: Annotated[Path | None, Option(metavar="FILE", help="file of the scores (default: print them)")] = None,
    new_keys: Annotated[bool, Option("--new-keys", help="make a new pair of keys first")] = False,
    idle_seconds: IdleSeconds = None,
) -> int:
    """Have encrypted sequences evaluated.

    Submit a site's sequences to the server's part of a trained model, encrypted with a key that never leaves
    the site, or collect the scores. Site and server never have to be online at the same time.
    """
    if data is not None and not submit:
        raise typer.BadParameter("Give --submit too.", param_hint="'--data'")
    from nightsplit.console.ui.text import counted
    from nightsplit.shared.he import check_installed
    from nightsplit.shared.runtime.process import StopSignal

    check_installed()
    from nightsplit.site_worker.query_worker import QuerySiteWorker

    stop = StopSignal()
    stop.install()
    worker = QuerySiteWorker(file, overrides, stop)
    if new_keys:
        worker.new_keys()
    if submit:
        print(f"{counted(worker.submit(data), 'sequence')} submitted", file=sys.stderr)
    finished = worker.work(idle_seconds)
    scores = io.StringIO()
    waiting, refused = worker.write_scores(scores)
    write_output(output, scores.getvalue().encode())
    if refused:
        print(f"{counted(refused, 'sequence')} refused; submit them again", file=sys.stderr)
    if not finished:
        print(f"{counted(waiting, 'sequence')} not answered yet; start the same command again", file=sys.stderr)
    return stopped(stop) if stop.requested else 0
