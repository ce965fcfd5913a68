"""What a finished run says of itself: was anything lost, was anything applied twice, which weights came out.

Only files are read that a run keeps for its users: report, metrics, models, the last checkpoints.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file

from nightsplit.console.exit_log import verify_log
from nightsplit.console.worker_file import WorkerFile
from nightsplit.shared.protocols.spec import PROTOCOLS, Shape
from nightsplit.shared.wire.message import SERVER
from tests.harness.workers import SHARES, Hospital

BATCH_SIZE = 16
TRAINED = ("top", "bottom", "head", "optimizer", "head_optimizer", "vector", "vectors", "module", "fitted")
"""Entries of a checkpoint that are weights, or what an optimizer remembers."""


@dataclass(frozen=True)
class Outcome:
    """What came of a run.

    Attributes:
        lost: planned messages that the server did not apply or whose answer its site did not, and
            training batches that the metrics do not show.
        applied_twice: messages beyond the plan, and training steps and evaluations that the metrics show again.
        weights: sha256 of every part: of the best model, and as each worker's last checkpoint holds it.
        metrics: sha256 of all lines about training steps and evaluations, losses included.
    """

    lost: int
    applied_twice: int
    weights: Mapping[str, str]
    metrics: str

    @property
    def sha256(self) -> str:
        """One hash for all weights."""
        return hashlib.sha256(json.dumps(self.weights, sort_keys=True).encode()).hexdigest()


def outcome_of(hospital: Hospital) -> Outcome:
    """Read a finished run of any system that trains, once the exit log of every site is found unchanged."""
    report = json.loads((hospital.folder / "report" / "report.json").read_text(encoding="utf-8"))
    for site in report["sites"]:
        file = WorkerFile(hospital.folder / f"{site}.toml")
        log = verify_log(file)
        assert not (file.run_config.parties and log.unsigned), log
    lines = (hospital.folder / "report" / "metrics.jsonl").read_bytes()
    answered = {site: _last_checkpoint(hospital, site)[1]["role"]["answered"] for site in report["sites"]}
    run = file.run_config.run
    passes = run.passes if run.learning == "targets" else 1
    lost, again = count(report, answered, [json.loads(line) for line in lines.splitlines()], passes)
    weights = dict(hospital.models())
    for worker in (SERVER, *SHARES):
        weights[f"state/{worker}/checkpoints"] = _trained_state(_last_checkpoint(hospital, worker)[0])
    # Sorted: a restart may swap the lines of one evaluation, and every training step has its number in it.
    metrics = hashlib.sha256(b"\n".join(sorted(lines.splitlines()))).hexdigest()
    return Outcome(lost, again, weights, metrics)


def count(
    report: Mapping[str, Any], answered: Mapping[str, int], lines: Sequence[Mapping[str, Any]], passes: int = 1
) -> tuple[int, int]:
    """What was lost, and what was applied twice; see `Outcome`.

    Args:
        report: of the run, report.json.
        answered: answers that each site has applied.
        lines: of metrics.jsonl.
        passes: training steps of the server with each batch.
    """
    lost = again = 0
    spec = PROTOCOLS[report["protocol"]]
    trained = [line for line in lines if line["event"] == "train"]
    if spec.uploads_once:  # steps of the server alone; nothing is answered
        lost += report["steps"] - len({line["step"] for line in trained})
    for site, facts in report["sites"].items():
        for number in [facts["messages"]] if spec.uploads_once else [facts["messages"], answered[site]]:
            lost += max(0, facts["planned"] - number)
            again += max(0, number - facts["planned"])
        lost += facts["refused"]
        if spec.uploads_once:
            continue
        # Every training batch, or every update of a round, is one line of the metrics, whatever happened.
        batches = 1 if spec.shape is Shape.ROUND else passes * max(1, facts["training_samples"] // BATCH_SIZE)
        found = Counter(line["epoch"] for line in trained if line["site"] == site)
        epochs = 1 if spec.name == "data_vectors" else report["history"][-1]["epoch"]  # its history is of scales
        for epoch in range(1, epochs + 1):
            lost += max(0, batches - found[epoch])
            again += max(0, found[epoch] - batches)
    steps = Counter(line["step"] for line in trained)
    evaluations = Counter((line["epoch"], line["site"], line["part"]) for line in lines if line["event"] == "evaluate")
    again += sum(number - 1 for counts in (steps, evaluations) for number in counts.values())
    return lost, again


def _last_checkpoint(hospital: Hospital, worker: str) -> tuple[Path, Mapping[str, Any]]:
    """Its tensors and its facts."""
    places = (hospital.folder / "state" / worker / "checkpoints").glob("[0-9]*")
    newest = max(places, key=lambda place: tuple(int(part) for part in place.name.split("-")))
    manifest = json.loads((newest / "manifest.json").read_text(encoding="utf-8"))
    return newest / "tensors.safetensors", manifest["facts"]


def _trained_state(path: Path) -> str:
    """sha256 over everything trained; of the versions of a bottom that are kept, the present one."""
    tensors = {name: tensor for name, tensor in load_file(path).items() if name.split("/")[0] in TRAINED}
    versions = {int(name.split("/")[1]) for name in tensors if name.startswith("bottom/")}
    digest = hashlib.sha256()
    for name in sorted(tensors):
        part, _, rest = name.partition("/")
        if part == "bottom":
            version, _, rest = rest.partition("/")
            if int(version) != max(versions):
                continue
        digest.update(f"{part}/{rest}".encode() + b"\0" + tensors[name].tobytes())
    return digest.hexdigest()
