"""A finished run whose model judges sequences of images, and encrypted queries to it, in real processes."""

from __future__ import annotations

import csv
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nightsplit.console.cli import run
from tests.harness.approvals import approve_all
from tests.harness.processes import Process
from tests.harness.services import RabbitNode

FRAMES, SIDE, SEQUENCES = 3, 16, 60
RUN = """
[run]
id = "film"
protocol = "split_labels"
sites = ["north"]
epochs = 2
window = 1000
batch_size = 8
export_top = true

[model]
factory = "nightsplit.models:clstm"
settings = {{ frames = {frames}, side = {side}, width = 4, features = 3, hidden = 2, recurrent = {recurrent} }}
cut = 1

[task]
kind = "binary"

[optimizer]
lr = 0.01

[data]
image_size = {side}
frames = {frames}
"""
WORKER = """
[{kind}]
{name}broker = "{broker}"
store = "sqlite:run.db"
state = "state/{state}"
"""
DATA = """
[data]
source = "images"
path = "frames"
index = "index.csv"
label = "ill"
patient = "sequence"
"""


def write_study(folder: Path, recurrent: bool, broker: str = "embedded:broker") -> Path:
    """Sequences of noise in which a bright square wanders or does not."""
    (folder / "frames").mkdir(parents=True)
    dice = np.random.default_rng(3)
    lines = ["file,ill,sequence,frame"]
    for sequence in range(SEQUENCES):
        for frame in range(FRAMES):
            image = dice.integers(0, 80, (SIDE, SIDE), dtype=np.uint8)
            if sequence % 2:
                image[4 * frame : 4 * frame + 4, 4:12] = 250
            name = f"{sequence}-{frame}.png"
            Image.fromarray(image).save(folder / "frames" / name)
            lines.append(f'{name},{sequence % 2},"Doe, {sequence}",{frame}')
    (folder / "frames" / "index.csv").write_text("\n".join(lines) + "\n")
    text = RUN.format(frames=FRAMES, side=SIDE, recurrent=str(recurrent).lower())
    (folder / "run.toml").write_text(text)
    (folder / "policy.toml").write_text('allowed = ["labels", "activations", "counts", "ciphertext"]\n')
    (folder / "server.toml").write_text(WORKER.format(kind="server", name="", broker=broker, state="server"))
    north = WORKER.format(kind="site", name='name = "north"\n', broker=broker, state="north")
    (folder / "north.toml").write_text(north + DATA)
    approve_all(folder)
    return folder


def by_itself(folder: Path, verb: str, *arguments: str) -> None:
    """A worker alone, until it has nothing to do."""
    file = folder / ("server.toml" if verb in ("open", "server", "serve-queries") else "north.toml")
    idle = [] if verb == "open" else ["--exit-when-idle", "0.4"]
    assert run([verb, str(file), *idle, *arguments]) == 0


def trained(folder: Path) -> None:
    by_itself(folder, "open")
    for verb in ("site", "server", "site", "server", "site"):
        by_itself(folder, verb)
    assert (folder / "state" / "north" / "model" / "bottom.safetensors").exists()


def scores(path: Path, column: str) -> dict[tuple[str, ...], float]:
    """Of encrypted queries by submission, row and patient; of predictions by row and patient."""
    with path.open() as file:
        rows = list(csv.DictReader(file))
    names = [name for name in ("submission", "row", "patient") if rows and name in rows[0]]
    found = {tuple(row[name] for name in names): float(row[column]) for row in rows}
    assert len(found) == len(rows), "a score twice"
    return found


def expect_plain_scores(folder: Path) -> int:
    """Each submission has the scores that the whole model gives in the clear; how many there are."""
    assert run(["predict", str(folder / "north.toml"), "--output", str(folder / "plain.csv")]) == 0
    plain = scores(folder / "plain.csv", "prediction")
    encrypted = scores(folder / "scores.csv", "probability")
    submissions = Counter(submission for submission, *_ in encrypted)
    assert submissions
    assert set(submissions.values()) == {len(plain)}
    for (_, *row), probability in encrypted.items():
        assert probability == pytest.approx(plain[tuple(row)], abs=1e-4)
    return len(submissions)


def ask_under_kills(
    folder: Path, kills: int, seed: int, pause: float, tell: Callable[[str], None] = lambda line: None,
    node: RabbitNode | None = None, broker_kills: int = 0,
) -> Counter[str]:  # fmt: skip
    """Submit and collect again and again, while server, site or broker is killed (SIGKILL) at a random moment.

    Args:
        folder: of a run that has finished.
        kills: how many, and `broker_kills` of them are of the broker `node`.
        seed: of victims and moments.
        pause: the longest between two kills, in seconds.
        tell: shown a line for every kill.

    Returns:
        How often each died. All that was submitted is answered then.
    """
    dice, died = np.random.default_rng(seed), Counter[str]()
    of_broker = set(dice.choice(kills, broker_kills, replace=False).tolist())
    verbs = {"server": ["serve-queries", "server.toml"], "site": ["query", "north.toml", "--output", "scores.csv"]}
    at_work: dict[str, Process] = {}

    def begin(worker: str, *arguments: str) -> None:
        log = folder / f"{worker}.log"
        at_work[worker] = Process([*verbs[worker], *arguments], folder, log, log)

    begin("server")
    begin("site", "--submit")
    deadline = time.monotonic() + 60 + (20 + pause) * kills
    try:
        while True:
            assert time.monotonic() < deadline, "queries stay open"
            try:
                code = at_work["site"].wait(float(dice.uniform(0.0, pause)) if died.total() < kills else 100.0)
            except subprocess.TimeoutExpired:
                if died.total() in of_broker and node is not None:
                    node.restart()
                    died["broker"] += 1
                    tell(f"{died.total()}: kill -9 broker")
                    continue
                victim = str(dice.choice(list(verbs)))
                at_work[victim].kill()
                at_work[victim].wait()
                died[victim] += 1
                tell(f"{died.total()}: kill -9 {victim}")
                begin(victim)
                continue
            assert code == 0, (folder / "site.log").read_text()
            if died.total() >= kills:
                return died
            begin("site", "--submit")  # all is answered: ask more
    finally:
        for process in at_work.values():
            process.kill()
            process.wait()
