"""A study in a folder, as a hospital would have it: two sites, a table of 120 patients, embedded broker."""

from __future__ import annotations

import random
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

from nightsplit.broker.embedded.broker import EmbeddedBroker
from nightsplit.broker.topology import site_queues
from nightsplit.shared.errors import ConfigError
from tests.harness.approvals import approve_all
from tests.harness.processes import Fresh, Process

SITES = ("north", "south")

_begun: list[Process | Fresh] = []

RUN = """
[run]
id = "ward"
protocol = "split_labels"
sites = ["north", "south"]
order = "strict"
epochs = 3
window = 1000
batch_size = 8
export_top = true

[model]
factory = "nightsplit.models:mlp"
settings = { inputs = 3, hidden = [8, 4], outputs = 1 }
cut = 1

[task]
kind = "binary"

[optimizer]
lr = 0.01

[data]
features = ["age", "pressure", "marker"]
classes = ["healthy", "ill"]
"""

SERVER = """
[server]
broker = "embedded:broker"
store = "sqlite:run.db"
state = "state/server"
"""

SITE = """
[site]
name = "{name}"
broker = "embedded:broker"
store = "sqlite:run.db"
state = "state/{name}"

[data]
source = "table"
path = "patients.csv"
label = "outcome"
share = {share}
"""


def write_study(folder: Path) -> Path:
    """run.toml, approved, server.toml, north.toml, south.toml, policy.toml, patients.csv; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.toml").write_text(RUN)
    (folder / "server.toml").write_text(SERVER)
    (folder / "policy.toml").write_text('allowed = ["labels", "activations", "counts"]\n')
    for name, share in zip(SITES, ("[0.0, 0.5]", "[0.5, 1.0]"), strict=True):
        (folder / f"{name}.toml").write_text(SITE.format(name=name, share=share))
    approve_all(folder)
    chance = random.Random(7)
    lines = ["age,pressure,marker,outcome"]
    for _ in range(120):
        age, pressure, marker = chance.uniform(20, 90), chance.gauss(125, 15), chance.gauss(0, 1)
        ill = marker + (age - 55) / 30 + chance.gauss(0, 0.5) > 0
        lines.append(f"{age:.1f},{pressure:.0f},{marker:.3f},{'ill' if ill else 'healthy'}")
    (folder / "patients.csv").write_text("\n".join(lines) + "\n")
    return folder


def change(file: Path, old: str, new: str) -> None:
    """Edit a file of the study; `old` has to be there. A run.toml that can be approved is approved again."""
    text = file.read_text()
    assert old in text, f"{file} has no {old!r}"
    file.write_text(text.replace(old, new))
    if file.name == "run.toml":
        with suppress(ConfigError):
            approve_all(file.parent)


def queued(folder: Path, site: str, key: str = "up") -> int | None:
    """Messages in a queue of the study's broker."""
    return EmbeddedBroker(folder / "broker").depth(getattr(site_queues("ward", site, 4 * 2**30), key))


def contents(folder: Path) -> dict[str, bytes]:
    """What a folder holds, by file; locks say nothing."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "lock"
    }


def begin(folder: Path, *arguments: str, kind: type[Process | Fresh] = Process) -> Process | Fresh:
    """Start `nightsplit` in the study's folder, as a process of its own; `kind` says how it begins."""
    output = Path(tempfile.mkdtemp())
    process = kind([*arguments], folder, output / "out", output / "err", {"OMP_NUM_THREADS": "1"})
    _begun.append(process)
    return process


def end_all() -> None:
    """Leave no process behind, whatever became of the test."""
    while _begun:
        process = _begun.pop()
        process.kill()
        process.wait()
        shutil.rmtree(process.out.parent)


def end(process: Process | Fresh, code: int = 0, timeout: float = 100.0) -> tuple[str, str]:
    """What a process wrote; it has to end by itself with this exit code, and without a traceback."""
    ended = process.wait(timeout)
    out, err = process.out.read_text(), process.err.read_text()
    assert ended == code, f"{process.args} ended with {ended}:\n{out}{err}"
    assert "Traceback" not in out + err
    return out, err
