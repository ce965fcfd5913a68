"""nightsplit: the command line. What takes time to load is imported by the verb that needs it."""

import argparse
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
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

from nightsplit.console.exit_codes import CRASHED, stopped
from nightsplit.console.ui import json_log
from nightsplit.shared.errors import NightsplitError, StateError
from nightsplit.shared.foreign import shown
from nightsplit.shared.log import event

_NOT_WRITTEN = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EISDIR}

_ABOUT = """Train one neural network with several hospitals, without moving the patients' records and
without anybody having to be online at the same time. Begin with: nightsplit demo"""

_VERBS = {
    "demo": ("demo.demo:run_demo", "folder json at"),
    "open": ("commands.work:open_run", "file set"),
    "server": ("commands.work:work_as_server", "file set leave_when_idle"),
    "site": ("commands.work:work_as_site", "file set leave_when_idle"),
    "status": ("commands.status:show_status", "worker json"),
    "pretrain": ("commands.pretrain:pretrain", "file"),
    "merge": ("commands.merge:run_merge", "report output with without scale"),
    "predict": ("commands.predict:write_predictions", "file set top data output"),
    "query": ("commands.query:ask", "file set submit output leave_when_idle new_keys"),
    "answer": ("commands.query:answer", "file set leave_when_idle"),
    "doctor": ("doctor.checks:show_findings", "file set json"),
    "replay": ("commands.replay:show_replay", "worker until json"),
    "privacy": ("commands.privacy:show_privacy", "worker json"),
    "dlq list": ("commands.dlq:list_letters", "worker json"),
    "dlq show": ("commands.dlq:show_letter", "worker id json"),
    "dlq replay": ("commands.dlq:replay_letters", "worker letters"),
    "dlq discard": ("commands.dlq:discard_letters", "worker letters"),
    "explain": ("commands.explain:explain", "number"),
    "keys init": ("keys.commands:init", "folder broker store management"),
    "keys new-site": ("keys.commands:new_sites", "folder names"),
    "keys revoke": ("keys.commands:revoke", "folder name"),
}
"""The function of each verb, which returns an exit code or None for 0, and which options it is called with."""


def main() -> int:
    """Entry point: the exit code of the command line that this process was started with."""
    os.umask(0o077)  # what we or a library of ours write may hold something of a patient
    if not sys.warnoptions:
        warnings.simplefilter("ignore")  # they speak to developers of libraries
    threading.excepthook = lambda thread: _crashed(thread.exc_value)
    return run(sys.argv[1:])


def run(arguments: Sequence[str]) -> int:
    """Carry out a command line; the only place where an error becomes a line and an exit code."""
    try:
        chosen = _parser().parse_args(arguments)
        json_log.switch(getattr(chosen, "log_format", "text") == "json")
        code = _carry_out(chosen)
        sys.stdout.flush()
        return code
    except NightsplitError as error:
        return _failed(error)
    except KeyboardInterrupt:
        return stopped()
    except BrokenPipeError:
        # Whoever read our output has seen enough; Python would complain once more while it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if isinstance(error, OSError) and error.errno in _NOT_WRITTEN:
            what = f"{error.filename or 'a file'}: {error.strerror}."
            return _failed(StateError(501, what, "make room, or name a place that may be written; then start again."))
        _crashed(error)
        return CRASHED


def _failed(error: NightsplitError) -> int:
    json_log.failed(error)
    if not json_log.is_on():
        print(shown(str(error)), file=sys.stderr)
    return 1


def _crashed(error: BaseException | None) -> None:
    """Keep the traceback for those who can use it, and give the user one line."""
    stamp = time.strftime("nightsplit-crash-%Y%m%d-%H%M%S-")
    text = "".join(traceback.format_exception(error)) if error is not None else ""
    text = "\n".join(map(shown, text.splitlines()))
    kept: Path | None = None
    for folder in (".", None):  # here, or where temporary files go
        with suppress(OSError):
            handle, name = tempfile.mkstemp(".log", stamp, folder)  # ours alone, and no name that others foresee
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(f"nightsplit {version('nightsplit')}\n{text}")
            kept = Path(name)
            break
    kind = type(error).__name__
    event("crashed", logging.ERROR, type=kind, traceback=None if kept is None else str(kept))
    if json_log.is_on():
        return
    what = f"nightsplit met an error that it does not know ({kind})"
    report = f"Please report it with {kept}, after a look whether that file names a patient."
    print(f"{what}." if kept is None else f"{what}; nothing is lost. {report}", file=sys.stderr)


def _carry_out(chosen: argparse.Namespace) -> int:
    """Call the verb's function, which is imported now; returns the exit code."""
    place, names = _VERBS[" ".join([chosen.verb, *([chosen.action] if "action" in chosen else [])])]
    module, function = place.split(":")
    arguments = [_argument(chosen, name) for name in names.split()]
    return getattr(import_module(f"nightsplit.console.{module}"), function)(*arguments) or 0


def _argument(chosen: argparse.Namespace, name: str) -> Any:
    if name == "worker":
        from nightsplit.console.worker_file import read_worker_file

        return read_worker_file(chosen.file, chosen.set)
    if name == "letters":
        return None if chosen.all else chosen.ids
    return getattr(chosen, name)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="nightsplit", description=_ABOUT)
    parser.add_argument("--version", action="version", version=f"nightsplit {version('nightsplit')}")
    verbs = parser.add_subparsers(metavar="command", dest="verb", required=True)

    demo = verbs.add_parser("demo", help="see it work on this computer, in about a minute", description="""
        Play an example with a process for each hospital and one for the server: nights without a server,
        days without a hospital, and the end together. No service has to be installed.""")  # fmt: skip
    where = "the example's folder (default: examples/cholesterol)"
    demo.add_argument("folder", type=Path, nargs="?", metavar="FOLDER", help=where)
    demo.add_argument(
        "--at", nargs=2, metavar=("BROKER", "STORE"),
        help="play at this RabbitMQ and Redis, e.g. amqp://guest@localhost redis://localhost",
    )  # fmt: skip

    opening = verbs.add_parser("open", help="open a run, so that sites can begin without a server", description="""
        Make the queues of a run at the broker and put its configuration into them. Sites can then work a
        whole night before any server runs. It may be repeated.""")  # fmt: skip

    server = verbs.add_parser("server", help="train the server's half of the model", description="""
        Train on what the sites have queued, and queue the answers for them. The server may be stopped at
        any time: start the same command again, and it goes on.""")  # fmt: skip

    site = verbs.add_parser("site", help="work for one hospital", description="""
        Send what the hospital's policy allows, and learn from the answers as they come. The site may be
        stopped at any time: start the same command again, and it goes on.""")  # fmt: skip

    status = verbs.add_parser("status", help="see how a run stands", description="""
        Show each worker's state and counts. It changes nothing, and works while nobody is online.
        """)  # fmt: skip

    pretrain = verbs.add_parser("pretrain", help="train a first model on public data", description="""
        Stage 1 of a transfer: train a network on public data, and write a file with its weights and a card
        that says what they learned from. A run of fedavg_transfer or data_vectors begins from it.""")  # fmt: skip

    merging = verbs.add_parser("merge", help="add up published data vectors again", description="""
        Add up the vectors in the report of a data_vectors run, with a hospital more or without one, and
        write the merged model. Nothing is trained.""")  # fmt: skip

    predict = verbs.add_parser("predict", help="use the trained model at a site", description="""
        Predict this site's held-out test patients, or the rows of another file, and write a CSV with row,
        patient and prediction. Nothing leaves the site.""")  # fmt: skip

    query = verbs.add_parser("query", help="have sequences judged while they are encrypted", description="""
        Submit a site's sequences to the server's half of a finished run's model, encrypted with a key that
        never leaves the site; or come back for the scores. Nobody has to be online at the same time.""")  # fmt: skip

    answer = verbs.add_parser("answer", help="judge encrypted sequences", description="""
        Answer the sites' queries with the finished run's model. It decrypts nothing, and keeps nothing but
        public keys; it may be stopped at any time.""")  # fmt: skip

    doctor = verbs.add_parser("doctor", help="check that a worker can do its work", description="""
        Look at files, data, model, broker, run store, disk, device and clock, and say for each problem how
        it is mended. No patient's value is shown.""")  # fmt: skip

    replay = verbs.add_parser("replay", help="train a recorded run again, and compare", description="""
        Train the server's half again from the tape of a run (tape = true in run.toml), and compare its
        sha256 with the report's. Exit code 1 when they differ. Nothing is sent, and nothing of the run
        is changed.""")  # fmt: skip

    privacy = verbs.add_parser("privacy", help="see what private runs have spent at a site", description="""
        Show the site's ledger: for each run with differential privacy its noise, its steps and the epsilon
        of a record and of the patient who lost most; and what all runs spent together.""")  # fmt: skip

    dlq = verbs.add_parser("dlq", help="see what was refused, send it again or let it go", description="""
        Messages that a worker refused lie in a dead letter queue for each site. A site's file shows that
        site's, the server's file those of all.""")  # fmt: skip
    listing, show, again, discard = _actions(dlq)

    explain = verbs.add_parser("explain", help="read the page of an error", description="""
        Print what the error of a number means, how it is mended, and whether anything is lost.""")  # fmt: skip
    explain.add_argument("number", metavar="NUMBER", help="as its line says it: 104, or E104")

    keys = verbs.add_parser("keys", help="let hospitals in, and shut them out", description="""
        At the coordinating centre: make certificates, users and rights for the broker, the run store, the
        server and each site. docs/how-to/deployment.md tells how they are used.""")  # fmt: skip
    _key_actions(keys)

    for verb, metavar in (
        (opening, "SERVER.TOML"), (server, "SERVER.TOML"), (site, "SITE.TOML"),
        (status, "FILE.TOML"), (predict, "SITE.TOML"), (doctor, "FILE.TOML"),
        (replay, "SERVER.TOML"), (privacy, "SITE.TOML"), (query, "SITE.TOML"), (answer, "SERVER.TOML"),
        *((action, "FILE.TOML") for action in (listing, show, again, discard)),
    ):  # fmt: skip
        verb.add_argument("file", type=Path, metavar=metavar, help="the worker's configuration file")
        verb.add_argument(
            "--set", action="append", default=[], metavar="KEY=VALUE",
            help="another value for a key of run.toml, e.g. run.window=8; the same at every participant",
        )  # fmt: skip
    merging.add_argument("report", type=Path, metavar="REPORT", help="report folder of the run")
    merging.add_argument("--output", type=Path, required=True, metavar="FILE", help="where the merged model goes")
    merging.add_argument("--with", action="append", default=[], type=Path, metavar="FILE", help="add this vector")
    merging.add_argument("--without", action="append", default=[], metavar="SITE", help="leave this site's vector out")
    merging.add_argument("--scale", type=float, help="factor of the sum; otherwise the one that the run chose")
    pretrain.add_argument("file", type=Path, metavar="PRETRAIN.TOML", help="what is trained, and on what")
    query.add_argument(
        "--submit", nargs="?", type=Path, const=Path(), metavar="FILE",
        help="take the sequences of this file or folder in, or the site's held-out test patients; then go on",
    )  # fmt: skip
    query.add_argument("--output", type=Path, metavar="FILE", help="where the scores go; otherwise they are printed")
    query.add_argument("--new-keys", action="store_true", help="make another pair of keys first")
    for verb in (server, site, query, answer):
        verb.add_argument(
            "--leave-when-idle", type=float, metavar="SECONDS",
            help="leave when nothing happened for so long; otherwise stay until all is done",
        )  # fmt: skip
    for verb in (server, site):
        verb.add_argument(
            "--log-format", choices=("text", "json"), default="text",
            help="json: one object a line on stderr, for programs that read logs, and nothing else",
        )  # fmt: skip
    for verb in (demo, status, doctor, replay, privacy, listing, show):
        verb.add_argument("--json", action="store_true", help="print one JSON object, for other programs")
    exported = "the server's half of the model, where the run did not export it"
    predict.add_argument("--top", type=Path, metavar="FILE", help=exported)
    predict.add_argument(
        "--data", type=Path, metavar="FILE",
        help="predict the rows of this file; its columns are those of the site's own data, label included",
    )  # fmt: skip
    replay.add_argument(
        "--until", type=int, metavar="POSITION",
        help="stop when so many messages of all sites together were applied; 0 is the beginning",
    )  # fmt: skip
    show.add_argument("id", metavar="ID", help="as the list shows it")
    for verb in (again, discard):
        which = verb.add_mutually_exclusive_group(required=True)
        which.add_argument("ids", nargs="*", default=[], metavar="ID", help="as the list shows them")
        which.add_argument("--all", action="store_true", help="every dead letter")
    predict.add_argument("--output", type=Path, metavar="FILE", help="where the CSV goes; otherwise it is printed")
    return parser


def _actions(dlq: argparse.ArgumentParser) -> list[argparse.ArgumentParser]:
    """What may be done with dead letters."""
    actions = dlq.add_subparsers(metavar="action", dest="action", required=True)
    return [
        actions.add_parser(name, help=help, description=description)
        for name, help, description in (
            ("list", "a line for each", "Show what was refused, why, and when. Nothing is changed."),
            ("show", "all about one", "Show everything about a dead letter but the values of its tensors."),
            ("replay", "send them again", """
                Send dead letters to the queues that they came from. This helps where a message was refused
                before it could be counted (it had no readable header, say, or its receiver was an older
                version), and the cause is mended. A message that was refused in its place in the sequence
                was answered: it is then only counted as a duplicate, and trains nothing. docs/explanation/delivery.md
                tells which is which."""),
            ("discard", "delete them for good", "Delete dead letters. Nothing brings them back."),
        )
    ]  # fmt: skip


def _key_actions(keys: argparse.ArgumentParser) -> None:
    """What may be done with keys."""
    actions = keys.add_subparsers(metavar="action", dest="action", required=True)
    init = actions.add_parser("init", help="once, at the beginning", description="""
        Make an authority, the keys and configuration of RabbitMQ and Redis, and the keys of the server.
        Where they are there, nothing is changed.""")  # fmt: skip
    for option, needed, what in (
        ("--broker", True, "where sites reach RabbitMQ (port 5671 unless named)"),
        ("--store", True, "where sites reach Redis (port 6379 unless named)"),
        ("--management", False, "where its management is reached (broker's host, port 15671)"),
    ):
        init.add_argument(option, required=needed, metavar="HOST[:PORT]", help=what)
    new = actions.add_parser("new-site", help="let a hospital in", description="""
        Make the folder to hand to a hospital, and let it log in with rights on its own queues alone.""")  # fmt: skip
    out = actions.add_parser("revoke", help="shut a hospital out", description="""
        Take a site's rights away and close its connections, at once.""")  # fmt: skip
    new.add_argument("names", nargs="+", metavar="NAME", help="the site's name, as in run.sites")
    out.add_argument("name", metavar="NAME", help="the site's name")
    for action in (init, new, out):
        where = "where keys are (default: keys)"
        action.add_argument("--folder", type=Path, default=Path("keys"), metavar="FOLDER", help=where)
