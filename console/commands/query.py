"""The verbs of encrypted queries: query at a site, answer at the server."""

import io
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from nightsplit.console.exit_codes import stopped
from nightsplit.console.output import write_output
from nightsplit.console.ui.text import counted
from nightsplit.shared.errors import RunError
from nightsplit.shared.runtime.process import StopSignal


def ask(
    path: Path, overrides: Sequence[str], submitted: Path | None, output: Path | None, idle_seconds: float | None,
    new_keys: bool,
) -> int:  # fmt: skip
    """Submit sequences, send what is due, collect scores and write them; returns the exit code.

    Args:
        path: site.toml.
        overrides: as for the other verbs.
        submitted: file or folder to submit; the empty path stands for the site's held-out test patients, None for
            nothing.
        output: where the scores go; None prints them.
        idle_seconds: leave when nothing happened for so long.
        new_keys: forget the pair of keys first.
    """
    check_encryption()
    from nightsplit.site_worker.query_worker import QuerySiteWorker

    stop = StopSignal()
    stop.install()
    worker = QuerySiteWorker(path, overrides, stop)
    if new_keys:
        worker.new_keys()
    if submitted is not None:
        taken = worker.submit(None if submitted == Path() else submitted)
        print(f"{counted(taken, 'sequence')} submitted", file=sys.stderr)
    finished = worker.work(idle_seconds)
    scores = io.StringIO()
    waiting, refused = worker.write_scores(scores)
    write_output(output, scores.getvalue().encode())
    if refused:
        print(f"{counted(refused, 'sequence')} refused; to be submitted again", file=sys.stderr)
    if not finished:
        print(f"{counted(waiting, 'sequence')} not answered yet; start the same command again", file=sys.stderr)
    return stopped(stop) if stop.requested else 0


def answer(path: Path, overrides: Sequence[str], idle_seconds: float | None) -> int:
    """Answer queries until asked to stop; returns the exit code."""
    check_encryption()
    from nightsplit.server_worker.query_worker import QueryServerWorker

    stop = StopSignal()
    stop.install()
    worker = QueryServerWorker(path, overrides, stop=stop)
    worker.work(idle_seconds)
    print(f"{counted(worker.answered, 'message')} answered", file=sys.stderr)
    return stopped(stop) if stop.requested else 0


def check_encryption() -> None:
    """Whether the package of the extra is there.

    Raises:
        RunError: 615 it is missing.
    """
    if find_spec("tenseal") is None:
        raise RunError(615, "TenSEAL cannot be imported.", "pip install nightsplit[he].")
