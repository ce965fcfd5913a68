"""nightsplit: the command line, assembled from its verbs. A verb imports slow modules only when it runs."""

import errno
import logging
import os
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import version
from typing import Annotated

import typer

from nightsplit.console.commands.approve import approve
from nightsplit.console.commands.demo import demo
from nightsplit.console.commands.dlq import dlq
from nightsplit.console.commands.doctor import doctor
from nightsplit.console.commands.explain import explain
from nightsplit.console.commands.keys import keys
from nightsplit.console.commands.log import log
from nightsplit.console.commands.merge import merge
from nightsplit.console.commands.move import move
from nightsplit.console.commands.open import open_run
from nightsplit.console.commands.predict import predict
from nightsplit.console.commands.pretrain import pretrain
from nightsplit.console.commands.privacy import privacy
from nightsplit.console.commands.query import query
from nightsplit.console.commands.replay import replay
from nightsplit.console.commands.serve_queries import serve_queries
from nightsplit.console.commands.server import server
from nightsplit.console.commands.site import site
from nightsplit.console.commands.status import status
from nightsplit.console.exit_codes import CRASHED, stopped
from nightsplit.console.options import print_help_alone
from nightsplit.console.ui import json_log
from nightsplit.shared.errors import NightsplitError, StateError
from nightsplit.shared.foreign import shown
from nightsplit.shared.log import event

_WRITE_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EISDIR}

app = typer.Typer(
    help="""Train one neural network with several hospitals that keep their patients' records and never have to
    be online at the same time. Begin with: nightsplit demo""",
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.command()(demo)
app.command("open")(open_run)
for verb in (
    approve, server, site, status, pretrain, merge, predict, query, serve_queries, doctor, move, replay, privacy,
    explain,
):  # fmt: skip
    app.command()(verb)
app.add_typer(dlq, name="dlq")
app.add_typer(log, name="log")
app.add_typer(keys, name="keys")


@app.callback(invoke_without_command=True)
def _top(
    context: typer.Context,
    show_version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False,
) -> None:
    if show_version:
        print(f"nightsplit {version('nightsplit')}")
        raise typer.Exit
    print_help_alone(context)


def main() -> int:
    """Run the command line of this process and return the exit code."""
    os.umask(0o077)  # any file of ours or of a library may hold patient data
    if not sys.warnoptions:
        warnings.simplefilter("ignore")  # they are for developers of libraries
    threading.excepthook = lambda thread: _report_crash(thread.exc_value)
    if os.environ.get("_NIGHTSPLIT_COMPLETE"):
        app(prog_name="nightsplit")  # a shell asks for completions
    return run(sys.argv[1:])


def run(arguments: Sequence[str]) -> int:
    """Run a command line and return the exit code; the only place that prints errors."""
    json_log.switch(False)
    try:
        code = _invoke(arguments)
        sys.stdout.flush()
        return code
    except typer.TyperException as error:
        return _report_misuse(error)
    except NightsplitError as error:
        return _report_error(error)
    except KeyboardInterrupt:
        return stopped()
    except BrokenPipeError:
        # The reader of our output has closed it; Python would report that once more while it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if isinstance(error, OSError) and error.errno in _WRITE_ERRORS:
            sentence = f"{error.filename or 'a file'}: {error.strerror}."
            return _report_error(StateError(501, sentence, "make room, or name a writable place; then start again."))
        _report_crash(error)
        return CRASHED


def _invoke(arguments: Sequence[str]) -> int:
    command = typer.main.get_command(app)
    try:
        with command.make_context("nightsplit", [*arguments]) as context:
            code: int | None = command.invoke(context)
            return code or 0
    except typer.Exit as end:  # after help, say
        return end.exit_code


def _report_misuse(error: typer.TyperException) -> int:
    """Print a mistake in the command line and return the exit code."""
    context: typer.Context | None = getattr(error, "ctx", None)
    verb = context.command_path if context else "nightsplit"
    print(shown(f"{verb}: {error.format_message()} ({verb} --help)"), file=sys.stderr)
    return error.exit_code


def _report_error(error: NightsplitError) -> int:
    json_log.failed(error)
    if not json_log.is_on():
        print(shown(str(error)), file=sys.stderr)
    return 1


def _report_crash(error: BaseException | None) -> None:
    """Write the traceback to a file, and print one line for the user."""
    stamp = time.strftime("nightsplit-crash-%Y%m%d-%H%M%S-")
    text = "".join(traceback.format_exception(error)) if error is not None else ""
    text = "\n".join(map(shown, text.splitlines()))
    path: str | None = None
    for folder in (".", None):  # here, or in the folder of temporary files
        with suppress(OSError):
            handle, path = tempfile.mkstemp(".log", stamp, folder)  # private, and with an unpredictable name
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(f"nightsplit {version('nightsplit')}\n{text}")
            break
    kind = type(error).__name__
    event("crashed", logging.ERROR, type=kind, traceback=path)
    if json_log.is_on():
        return
    what = f"nightsplit stopped at an unexpected error ({kind})"
    report = f"Please report it with {path}, after checking that the file names no patient."
    print(f"{what}." if path is None else f"{what}; nothing is lost. {report}", file=sys.stderr)
