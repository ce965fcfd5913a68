"""Exit log of a site, for people: a summary, its verification, and a copy for others."""

import json
from collections import defaultdict
from dataclasses import asdict, dataclass, field
from pathlib import Path

from nightsplit.console.ui.text import columns, counted, screen
from nightsplit.console.worker_file import WorkerFile
from nightsplit.shared.errors import ConfigError, RunError
from nightsplit.shared.storage.files import write_atomic
from nightsplit.shared.trust.identity import PublicKey
from nightsplit.shared.wire.message import SERVER
from nightsplit.site_worker.config import SiteSection
from nightsplit.site_worker.trust.exit_log import FILE, WITNESSED, Verified, read_log, verify


@dataclass
class Sent:
    """Messages of one kind: their number, rows and bytes, information about patients, and time of the last one."""

    messages: int = 0
    rows: int = 0
    bytes: int = 0
    reveals: list[str] = field(default_factory=list)
    last: str = ""


def summarize(file: WorkerFile) -> dict[str, Sent]:
    """Count the messages that left the site, by kind; errors as `verify_log`, of which the chain is not asked."""
    kinds: defaultdict[str, Sent] = defaultdict(Sent)
    for line in read_log(_path_of(file)):
        if line["kind"] != WITNESSED:
            sent = kinds[line["kind"]]
            sent.messages, sent.rows = sent.messages + 1, sent.rows + (line["rows"] or 0)
            sent.bytes, sent.reveals, sent.last = sent.bytes + line["bytes"], line["reveals"], line["time"]
    return dict(kinds)


def show_log(file: WorkerFile, as_json: bool) -> None:
    """Print a line for each kind of message that left the site."""
    kinds = summarize(file)
    if as_json:
        print(json.dumps({"run": file.run_config.run.id, "sent": {kind: asdict(sent) for kind, sent in kinds.items()}}))
        return
    numbers = ("messages", "samples", "bytes")
    table = columns("kind", *numbers, "reveals", "last", numbers=numbers)
    for kind, sent in kinds.items():
        table.add_row(kind, *map(str, (sent.messages, sent.rows, sent.bytes)), ", ".join(sent.reveals), sent.last[:19])
    screen().print(table)


def verify_log(file: WorkerFile) -> Verified:
    """Verify the chain of a site's log and the server's signatures.

    Raises:
        ConfigError: 103 the file is a server's.
        RunError: 605 nothing has left this site in this run.
        StateError: 515 the log was changed.
    """
    path, run = _path_of(file), file.run_config
    server = PublicKey(run.parties[SERVER]) if run.parties else None
    return verify(path, run.digest, file.sites[0], server)


def print_verified(file: WorkerFile) -> None:
    """Print the result of `verify_log`."""
    found = verify_log(file)
    signed = f"the server has signed the first {found.witnessed}" if found.witnessed else "the server has signed none"
    rest = f"without the last {counted(found.unsigned, 'message')}" if found.unsigned else "to the last message"
    print(f"{counted(found.lines, 'line')}, unchanged; {signed}, {rest}")
    print(f"head {found.head}")


def export_log(file: WorkerFile, target: Path) -> None:
    """Write a copy of a verified log that others can verify, with the run, the site and the server's key in front."""
    verify_log(file)
    run = file.run_config
    facts = {"exit_log": 1, "run": run.run.id, "site": file.sites[0], "digest": run.digest}
    facts |= {"server": run.parties.get(SERVER)}
    write_atomic(target, json.dumps(facts).encode() + b"\n" + _path_of(file).read_bytes())
    print(f"made {target}; docs/reference/exit_log.md has a program that verifies it")


def _path_of(file: WorkerFile) -> Path:
    if not isinstance(file.config, SiteSection):
        raise ConfigError(103, f"{file.path}: has no [site].", "name the site.toml: the log is at the hospital.")
    path = file.state_folder / FILE
    if not path.exists():
        sentence = f"nothing of run {file.run_config.run.id} has left {file.config.name}: there is no {path}."
        raise RunError(605, sentence, "check site.state and run.toml.")
    return path
