"""The checks of nightsplit doctor."""

import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import closing
from datetime import datetime
from pathlib import Path

import torch

from nightsplit.console.doctor.finding import Finding, size
from nightsplit.console.doctor.links import checks_of_lines
from nightsplit.console.ui.text import duration
from nightsplit.console.worker_file import WorkerFile
from nightsplit.server_worker.config import ServerSection
from nightsplit.shared.clock import SystemClock
from nightsplit.shared.errors import TITLES, NightsplitError, RunError
from nightsplit.shared.protocols.build import build_model, planned_message_bytes
from nightsplit.shared.protocols.spec import sketch
from nightsplit.shared.run_store.status import Phase
from nightsplit.shared.runtime.process import prepare_torch
from nightsplit.shared.runtime.shift import Shift
from nightsplit.shared.wire.message import SERVER
from nightsplit.site_worker.config import SiteSection
from nightsplit.site_worker.data.dataset import Dataset
from nightsplit.site_worker.data.source import read_splits
from nightsplit.site_worker.policy import check_policy, read_policy

RABBITMQ_MESSAGE_BYTES = 16 * 2**20
"""What RabbitMQ 4 takes unless max_message_size was raised; no client can ask for it."""

STATE_BYTES = 2**30
"""Room that a disk should have for checkpoints, and for what an embedded broker queues."""


def examine(path: Path, overrides: Sequence[str] = ()) -> list[Finding]:
    """All checks; one that fails does not keep the others from being made."""
    try:
        file = WorkerFile(path, overrides)
    except NightsplitError as error:
        return [_failure("configuration", error)]
    checks: dict[str, Callable[[WorkerFile], Finding]] = {"configuration": _configuration}
    if file.source is not None:
        checks |= {"policy": _policy, "data": _data}
    checks |= {
        "model and messages": _model, "broker": _broker, "run store": _store, **checks_of_lines(file),
        "state folder": _state_folder, "torch": _torch, "shift": _shift,
    }  # fmt: skip
    findings = []
    for name, check in checks.items():
        try:
            findings.append(check(file))
        except NightsplitError as error:
            findings.append(_failure(name, error))
    return findings


def _failure(check: str, error: NightsplitError) -> Finding:
    sentence = error.sentence
    if error.number == 403:
        sentence = re.sub(r"'[^']*'", "'...'", sentence)  # a cell of a patient; this table may be passed on
    return Finding(check, f"E{error.number} {TITLES[error.number]}: {sentence}", error.remedy, failed=True)


def _configuration(file: WorkerFile) -> Finding:
    run = file.run_config.run
    if isinstance(file.config, SiteSection) and file.config.name not in run.sites:
        what = f"{file.config.name} is not among the sites of {run.id}: {', '.join(run.sites)}."
        raise RunError(602, what, "correct site.name in site.toml.")
    found = f"run {run.id}, {run.protocol}, sites {', '.join(run.sites)}; run digest {file.run_config.digest[:12]}"
    return Finding("configuration", f"{found} (the same twelve characters at every participant)")


def _policy(file: WorkerFile) -> Finding:
    assert isinstance(file.config, SiteSection)
    path = file.base / file.config.policy
    check_policy(read_policy(path), file.run_config, sketch(file.run_config), path)
    which = str(path) if path.exists() else f"the default policy ({path} is not there)"
    return Finding("policy", f"{which} allows the run")


def _data(file: WorkerFile) -> Finding:
    assert file.source is not None
    parts = read_splits(file.source, file.run_config, file.base)
    named = {"training": parts.train, "validation": parts.validation, "test": parts.test}
    return Finding("data", "; ".join(f"{name}: {_contents(file, part)}" for name, part in named.items()))


def _contents(file: WorkerFile, part: Dataset) -> str:
    """Counts of a part, by class where there are classes."""
    text = f"{len(part)} rows of {len(set(part.patients))} patients"
    task = file.run_config.task
    if task.kind in ("regression", "segmentation"):
        return text
    counts = Counter(int(target) for target in part.targets.tolist())
    classes = range(2 if task.kind == "binary" else task.classes)
    names = file.run_config.data.classes or [str(number) for number in classes]
    return f"{text} ({', '.join(f'{counts[number]} of class {names[number]}' for number in classes)})"


def _model(file: WorkerFile) -> Finding:
    made = build_model(file.run_config, file.run_folder)
    parts = [f"{name} {sum(p.numel() for p in part.parameters()):,}" for name, part in made.modules.items()]
    largest = planned_message_bytes(file.run_config, made.contract)
    limits = f"largest planned message {size(largest)}, wire.message_bytes {size(file.run_config.wire.message_bytes)}"
    too_large = largest > RABBITMQ_MESSAGE_BYTES and file.config.broker.startswith("amqp")
    fix = "raise max_message_size at RabbitMQ: version 4 refuses more than 16 MiB." if too_large else None
    return Finding("model and messages", f"parameters: {', '.join(parts)}; {limits}", fix)


def _broker(file: WorkerFile) -> Finding:
    broker = file.open_broker()
    queues = [queue for of_site in file.queues().values() for queue in of_site]
    absent = [queue.name for queue in queues if broker.depth(queue) is None]
    if absent:
        what = f"reached; {len(absent)} of the run's queues are not there yet"
        return Finding("broker", what, "nightsplit open server.toml makes them; a site waits for that.")
    if isinstance(file.config, ServerSection):
        broker.declare(queues)  # 204 for one that is there with other settings
        return Finding("broker", f"reached; all {len(queues)} queues are there, with the run's limits")
    return Finding("broker", f"reached; all {len(queues)} queues are there")


def _store(file: WorkerFile) -> Finding:
    with closing(file.open_store()) as store:
        statuses = store.statuses([SERVER, *file.sites])
    theirs = statuses[SERVER].report.digest if SERVER in statuses else None
    if theirs is not None and theirs != file.run_config.digest:
        what = f"the server's run digest is {theirs[:12]}, this one's {file.run_config.digest[:12]}."
        raise RunError(601, what, "agree on one run.toml.")
    heard = [f"{name} {duration(status.age_seconds)} ago" for name, status in statuses.items()]
    found = f"reached; heard of {', '.join(heard) or 'nobody yet'}"
    unreadable = [name for name, status in statuses.items() if status.report.phase is Phase.UNREADABLE]
    if not unreadable:
        return Finding("run store", found)
    found += f"; the status of {', '.join(unreadable)} cannot be read"
    return Finding("run store", found, "upgrade that worker, or find out who else writes in its name.")


def _state_folder(file: WorkerFile) -> Finding:
    state = file.state_folder.absolute()
    place = next(folder for folder in (state, *state.parents) if folder.exists())
    if not os.access(place, os.W_OK):
        another = "let state name a folder that this user may write."
        return Finding("state folder", f"{place} may not be written", another, failed=True)
    free = shutil.disk_usage(place).free
    full = free < STATE_BYTES
    fix = f"make room: checkpoints and queues may need {size(STATE_BYTES)}." if full else None
    return Finding("state folder", f"{file.state_folder}: {size(free)} free", fix, failed=full)


def _torch(file: WorkerFile) -> Finding:
    prepare_torch(file.config.threads, file.config.device)
    cores = os.cpu_count() or 1
    found = f"torch {torch.__version__}, {file.config.threads} of {cores} cores, device {file.config.device}"
    many = file.config.threads > cores
    return Finding("torch", found, f"set threads = {cores}: more than there are slow down." if many else None)


def _shift(file: WorkerFile) -> Finding:
    shift, now = Shift(file.config.shift), SystemClock().now()
    clock = f"{now:%Y-%m-%d %H:%M} UTC"
    if shift.text is None:
        return Finding("shift", f"{clock}; works at all hours")

    def said(moment: datetime) -> str:
        return f"{moment.astimezone():%Y-%m-%d %H:%M} of this machine"

    if shift.is_open(now):
        closes = shift.closes_at(now)
        assert closes is not None
        return Finding("shift", f"{clock}; shift {shift} is open until {said(closes)}")
    return Finding("shift", f"{clock}; shift {shift} opens at {said(shift.opens_at(now))}")
