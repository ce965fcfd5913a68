"""The checks of nightsplit doctor."""

import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path

import torch

from nightsplit.console.depths import read_depths
from nightsplit.console.doctor.finding import Finding, size
from nightsplit.console.doctor.links import link_checks
from nightsplit.console.ui.text import duration
from nightsplit.console.worker_file import WorkerFile
from nightsplit.server_worker.config import ServerSection
from nightsplit.shared.clock import SystemClock
from nightsplit.shared.errors import TITLES, NightsplitError, RunError
from nightsplit.shared.protocols.build import build_model, planned_message_bytes
from nightsplit.shared.protocols.parts import steps_late, suits_late
from nightsplit.shared.protocols.spec import sketch
from nightsplit.shared.run_store.status import Phase
from nightsplit.shared.runtime.process import prepare_torch
from nightsplit.shared.runtime.shift import Shift
from nightsplit.shared.wire.message import SERVER
from nightsplit.site_worker.config import SiteSection
from nightsplit.site_worker.data.dataset import Dataset
from nightsplit.site_worker.data.source import read_splits
from nightsplit.site_worker.policy import check_policy, read_policy
from nightsplit.site_worker.privacy import check_delta
from nightsplit.site_worker.trust.approval import Request

RABBITMQ_MESSAGE_BYTES = 16 * 2**20
"""Default of RabbitMQ 4's max_message_size; a client cannot query the actual value."""

FEW_STEPS = 2
"""Steps that a gradient may come late without harm."""

STATE_BYTES = 2**30
"""Free bytes that a disk should have for checkpoints and for the queues of an embedded broker."""


def examine(path: Path, overrides: Sequence[str] = ()) -> list[Finding]:
    """Run every check, even after one fails; but none after a closed gate, since others import the run's code."""
    try:
        file = WorkerFile(path, overrides)
    except NightsplitError as error:
        return [_failure("configuration", error)]
    gates: dict[str, Callable[[WorkerFile], Finding]] = {"configuration": _configuration}
    checks: dict[str, Callable[[WorkerFile], Finding]] = {}
    if file.source is not None:
        gates |= {"policy": _policy, "approval": _approval}
        checks = {"data": _data}
    checks |= {
        "model and messages": _model, "late gradients": _late_gradients, "broker": _broker,
        "run store": _store, **link_checks(file), "state folder": _state_folder, "torch": _torch, "shift": _shift,
    }  # fmt: skip
    findings = []
    for name, check in (gates | checks).items():
        try:
            findings.append(check(file))
        except NightsplitError as error:
            findings.append(_failure(name, error))
            if name in gates:
                break
    return findings


def _failure(check: str, error: NightsplitError) -> Finding:
    sentence = error.sentence
    if error.number == 403:
        sentence = re.sub(r"'[^']*'", "'...'", sentence)  # a value of a patient; users may pass this table on
    return Finding(check, f"E{error.number} {TITLES[error.number]}: {sentence}", error.remedy, failed=True)


def _configuration(file: WorkerFile) -> Finding:
    run = file.run_config.run
    if isinstance(file.config, SiteSection) and file.config.name not in run.sites:
        sentence = f"{file.config.name} is not among the sites of {run.id}: {', '.join(run.sites)}."
        raise RunError(602, sentence, "correct site.name in site.toml.")
    found = f"run {run.id}, {run.protocol}, sites {', '.join(run.sites)}; run digest {file.run_config.digest[:12]}"
    return Finding("configuration", f"{found} (must be the same at every participant)")


def _policy(file: WorkerFile) -> Finding:
    assert isinstance(file.config, SiteSection)
    path = file.base / file.config.policy
    check_policy(read_policy(path), file.run_config, sketch(file.run_config), path)
    policy = str(path) if path.exists() else f"the default policy ({path} does not exist)"
    return Finding("policy", f"{policy} allows the run")


def _approval(file: WorkerFile) -> Finding:
    assert isinstance(file.config, SiteSection)
    approval = Request(file.path, file.config, file.run_config).check()
    code = f" with {approval.code}" if approval.code else ""
    return Finding("approval", f"{approval.person} approved the run{code} at {approval.time:%Y-%m-%d %H:%M} UTC")


def _data(file: WorkerFile) -> Finding:
    assert file.source is not None
    splits = read_splits(file.source, file.run_config, file.base)
    if file.run_config.privacy is not None:
        check_delta(file.run_config.privacy, len(splits.train))
    named = {"training": splits.train, "validation": splits.validation, "test": splits.test}
    return Finding("data", "; ".join(f"{name}: {_describe(file, dataset)}" for name, dataset in named.items()))


def _describe(file: WorkerFile, dataset: Dataset) -> str:
    """Return the number of rows, of patients, and of each class of a classification task."""
    text = f"{len(dataset)} rows of {len(set(dataset.patients))} patients"
    task = file.run_config.task
    if task.kind in ("regression", "segmentation"):
        return text
    counts = Counter(int(target) for target in dataset.targets.tolist())
    classes = range(2 if task.kind == "binary" else task.classes)
    names = file.run_config.data.classes or [str(number) for number in classes]
    return f"{text} ({', '.join(f'{counts[number]} of class {names[number]}' for number in classes)})"


def _model(file: WorkerFile) -> Finding:
    model = build_model(file.run_config, file.run_folder)
    parts = [f"{name} {sum(p.numel() for p in part.parameters()):,}" for name, part in model.modules.items()]
    largest = planned_message_bytes(file.run_config, model.contract)
    limits = f"largest planned message {size(largest)}, wire.message_bytes {size(file.run_config.wire.message_bytes)}"
    too_large = largest > RABBITMQ_MESSAGE_BYTES and file.config.broker.startswith("amqp")
    fix = "raise max_message_size at RabbitMQ: version 4 refuses more than 16 MiB." if too_large else None
    return Finding("model and messages", f"parameters: {', '.join(parts)}; {limits}", fix)


def _late_gradients(file: WorkerFile) -> Finding:
    config = file.run_config
    late = steps_late(config)
    if not any(late.values()):
        by_targets = config.run.learning == "targets"
        return Finding(
            "late gradients", "none, the run learns by targets" if by_targets else "every gradient is used at once"
        )
    found = f"steps late, with equal sites: {', '.join(f'{part} {steps}' for part, steps in late.items())}"
    # A late bottom before a top that learns at once does no harm: docs/how-to/tuning.md has the figures.
    if late["top"] <= FEW_STEPS or suits_late(config.optimizer.of("top")):
        return Finding("late gradients", found)
    remedy = (
        'set run.learning = "targets", or run.window = 1; or in [optimizer.top] name = "muon"; or, which helps less, '
        "betas = [0.0, 0.9]."
    )
    return Finding("late gradients", f"{found}; the optimizer's momentum does not suit so late a top", remedy)


def _broker(file: WorkerFile) -> Finding:
    broker = file.open_broker()
    queues = [queue for queues_of_site in file.queues().values() for queue in queues_of_site]
    depths, refusal = read_depths(broker, queues)
    if refusal is not None:
        return Finding("broker", f"reached; {refusal.sentence}", refusal.remedy)
    absent = [name for name, depth in depths.items() if depth is None]
    if absent:
        found = f"reached; {len(absent)} of the run's queues do not exist yet"
        return Finding("broker", found, "run nightsplit open server.toml, which creates them; a site waits until then.")
    found = f"reached; all {len(queues)} queues exist"
    if isinstance(file.config, ServerSection):
        broker.declare(queues)  # raises 204 if one exists with other limits
        found += ", with the run's limits"
    return Finding("broker", found)


def _store(file: WorkerFile) -> Finding:
    with closing(file.open_store()) as store:
        statuses = store.statuses([SERVER, *file.sites])
    server_digest = statuses[SERVER].report.digest if SERVER in statuses else None
    if server_digest is not None and server_digest != file.run_config.digest:
        sentence = f"the server's run digest is {server_digest[:12]}, this worker's is {file.run_config.digest[:12]}."
        raise RunError(601, sentence, "agree on one run.toml.")
    ages = [f"{name} {duration(status.age_seconds)} ago" for name, status in statuses.items()]
    found = f"reached; last reports: {', '.join(ages)}" if ages else "reached; no worker has reported yet"
    unreadable = [name for name, status in statuses.items() if status.report.phase is Phase.UNREADABLE]
    if not unreadable:
        return Finding("run store", found)
    found += f"; the status of {', '.join(unreadable)} cannot be read"
    return Finding("run store", found, "upgrade that worker, or find out who else writes its status.")


def _state_folder(file: WorkerFile) -> Finding:
    state = file.state_folder.absolute()
    place = next(folder for folder in (state, *state.parents) if folder.exists())
    if not os.access(place, os.W_OK):
        remedy = "set state to a folder that this user can write."
        return Finding("state folder", f"{place} is not writable", remedy, failed=True)
    free = shutil.disk_usage(place).free
    is_full = free < STATE_BYTES
    fix = f"make room: checkpoints and queues may need {size(STATE_BYTES)}." if is_full else None
    return Finding("state folder", f"{file.state_folder}: {size(free)} free", fix, failed=is_full)


def _torch(file: WorkerFile) -> Finding:
    prepare_torch(file.config.threads, file.config.device)
    cores = os.cpu_count() or 1
    found = f"torch {torch.__version__}, {file.config.threads} of {cores} cores, device {file.config.device}"
    fix = f"set threads = {cores}: more threads than cores are slower." if file.config.threads > cores else None
    return Finding("torch", found, fix)


def _shift(file: WorkerFile) -> Finding:
    shift, now = Shift(file.config.shift), SystemClock().now()
    clock = f"{now:%Y-%m-%d %H:%M} UTC"
    if shift.text is None:
        return Finding("shift", f"{clock}; works at all hours")

    if shift.is_open(now):
        change, word = shift.closes_at(now), "is open until"
    else:
        change, word = shift.opens_at(now), "opens at"
    assert change is not None
    return Finding("shift", f"{clock}; shift {shift} {word} {change.astimezone():%Y-%m-%d %H:%M} local time")
