"""nightsplit: the command line. What takes time to load is imported by the verb that needs it."""

from __future__ import annotations

import argparse
import errno
import os
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from shared.errors import NightsplitError, StateError

STOPPED = "stopped; start the same command again to go on"
INTERRUPTED, CRASHED = 130, 70
"""Exit codes: as a shell reports Ctrl-C, and EX_SOFTWARE of sysexits.h."""

_ABOUT = """Train one neural network with several hospitals, without moving a patient's data and without
anybody having to be online at the same time. Begin with: nightsplit demo"""


def main() -> int:
    """Entry point: the exit code of the command line that this process was started with."""
    if not sys.warnoptions:
        warnings.simplefilter("ignore")  # they speak to developers of libraries
    threading.excepthook = lambda thread: _crashed(thread.exc_value)
    return run(sys.argv[1:])


def run(arguments: Sequence[str]) -> int:
    """Carry out a command line; the only place where an error becomes a line and an exit code."""
    try:
        chosen = _parser().parse_args(arguments)
        code: int = chosen.verb(chosen)
        sys.stdout.flush()
        return code
    except NightsplitError as error:
        return _failed(error)
    except KeyboardInterrupt:
        print(f"\n{STOPPED}", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output has seen enough; Python would complain once more while it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            where = error.filename or "a disk"
            return _failed(StateError(501, f"{where}: {error.strerror}.", "make room, then start the same command again."))
        _crashed(error)
        return CRASHED


def _failed(error: NightsplitError) -> int:
    print(error, file=sys.stderr)
    return 1


def _crashed(error: BaseException | None) -> None:
    """Keep the traceback for those who can use it, and give the user one line."""
    name = f"nightsplit-crash-{time.strftime('%Y%m%d-%H%M%S')}.log"
    text = "".join(traceback.format_exception(error)) if error is not None else ""
    for folder in (Path.cwd(), Path(tempfile.gettempdir())):
        try:
            (folder / name).write_text(f"nightsplit {version('nightsplit')}\n{text}", encoding="utf-8")
        except OSError:
            continue
        print(
            f"nightsplit met an error that it does not know ({type(error).__name__}); nothing that was confirmed is "
            f"lost. Please report it with {folder / name}, after looking whether that file names a patient.",
            file=sys.stderr,
        )
        return
    print(f"nightsplit met an error that it does not know ({type(error).__name__}).", file=sys.stderr)


def _demo(chosen: argparse.Namespace) -> int:
    from console.demo import run_demo

    return run_demo(chosen.folder, chosen.json)


def _open(chosen: argparse.Namespace) -> int:
    from console.work import open_run

    return open_run(chosen.file, chosen.set)


def _server(chosen: argparse.Namespace) -> int:
    from console.work import work_as_server

    return work_as_server(chosen.file, chosen.set, chosen.leave_when_idle)


def _site(chosen: argparse.Namespace) -> int:
    from console.work import work_as_site

    return work_as_site(chosen.file, chosen.set, chosen.leave_when_idle)


def _status(chosen: argparse.Namespace) -> int:
    from console.files import read_worker_file
    from console.status import show_status

    show_status(read_worker_file(chosen.file, chosen.set), chosen.json)
    return 0


def _doctor(chosen: argparse.Namespace) -> int:
    from console.doctor import show_findings

    return 0 if show_findings(chosen.file, chosen.set, chosen.json) else 1


def _predict(chosen: argparse.Namespace) -> int:
    from site_worker.predict import predict
    from site_worker.worker import SiteWorker

    predictions = predict(SiteWorker(chosen.file, chosen.set), chosen.top, chosen.data)
    if chosen.output is None:
        predictions.write(sys.stdout)
    else:
        with chosen.output.open("w", encoding="utf-8") as file:
            predictions.write(file)
    figures = [f"{name} {value:.4g}" for name, value in predictions.metrics.items() if value is not None]
    print(", ".join(figures), file=sys.stderr)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="nightsplit", description=_ABOUT)
    parser.add_argument("--version", action="version", version=f"nightsplit {version('nightsplit')}")
    verbs = parser.add_subparsers(metavar="command", required=True)

    def verb(name: str, help: str, description: str) -> argparse.ArgumentParser:
        added = verbs.add_parser(name, help=help, description=description)
        added.set_defaults(verb=globals()[f"_{name}"])
        return added

    def file(parser: argparse.ArgumentParser, metavar: str) -> None:
        parser.add_argument("file", type=Path, metavar=metavar, help="the worker's configuration file")
        parser.add_argument(
            "--set", action="append", default=[], metavar="KEY=VALUE",
            help="use another value for a key of run.toml, for example run.window=8; the same at every participant",
        )  # fmt: skip

    def as_json(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--json", action="store_true", help="print one JSON object, for other programs")

    def idle(parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "--leave-when-idle", type=float, metavar="SECONDS",
            help="leave when nothing happened for so long; without it the worker stays until the run is over",
        )  # fmt: skip

    demo = verb(
        "demo", "see it work on this computer, in about a minute",
        "Train with three small hospitals and a server on this computer, with public data that come with the "
        "program. No service has to be installed.",
    )  # fmt: skip
    demo.add_argument("folder", type=Path, nargs="?", default=Path("nightsplit-demo"), metavar="FOLDER",
                      help="where the demo writes its files (default: nightsplit-demo)")  # fmt: skip
    as_json(demo)

    opening = verb(
        "open", "open a run, so that sites can begin without a server",
        "Make the queues of a run at the broker and put its configuration into them. Sites can then work a whole "
        "night before any server runs. It may be repeated.",
    )  # fmt: skip
    file(opening, "SERVER.TOML")

    server = verb(
        "server", "train the server's half of the model",
        "Train on what the sites have queued, and queue the answers for them. The server may be stopped at any "
        "time: start the same command again, and it goes on.",
    )  # fmt: skip
    file(server, "SERVER.TOML")
    idle(server)

    site = verb(
        "site", "work for one hospital",
        "Send what the hospital's policy allows, learn from the answers, and wait for the server without being "
        "asked. The site may be stopped at any time: start the same command again, and it goes on.",
    )  # fmt: skip
    file(site, "SITE.TOML")
    idle(site)

    status = verb(
        "status", "see how a run stands",
        "Show each worker's state and counts. It changes nothing, and works while nobody is online.",
    )  # fmt: skip
    file(status, "FILE.TOML")
    as_json(status)

    predict = verb(
        "predict", "use the trained model at a site",
        "Predict this site's held-out test patients, or the rows of another file, and write a CSV with row, "
        "patient and prediction. Nothing leaves the site.",
    )  # fmt: skip
    file(predict, "SITE.TOML")
    predict.add_argument("--top", type=Path, metavar="FILE",
                         help="the server's half of the model, where the run did not export it")  # fmt: skip
    predict.add_argument("--data", type=Path, metavar="FILE",
                         help="predict the rows of this file; it has the columns of the site's own data, label included")  # fmt: skip
    predict.add_argument("--output", type=Path, metavar="FILE", help="where the CSV goes (default: the terminal)")

    doctor = verb(
        "doctor", "check that a worker can do its work",
        "Look at files, data, model, broker, run store, disk, device and clock, and say for each problem how it is "
        "mended. No patient's value is shown.",
    )  # fmt: skip
    file(doctor, "FILE.TOML")
    as_json(doctor)
    return parser
