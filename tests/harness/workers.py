"""Real worker processes on a small real data set, for tests that kill, stop and restart them."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sqlite3
import subprocess
import tempfile
import time
import tomllib
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path

from nightsplit.console.demo.keys import give_keys, give_seeds
from nightsplit.shared.protocols.spec import Shape, systems
from nightsplit.shared.storage.files import write_new
from nightsplit.shared.trust.identity import Identity
from nightsplit.site_worker.privacy.secret import Secret
from tests.harness.approvals import approve_all
from tests.harness.processes import Fresh, Process

RUN = """
[run]
id = "lipids"
protocol = "{protocol}"
learning = "{learning}"
sites = {sites}
order = "{order}"
epochs = {epochs}
window = 4
batch_size = 16
seed = 5
export_top = true
[model]
factory = "nightsplit.models:mlp"
settings = {{inputs = 6, hidden = [32, 16], outputs = 1, dropout = 0.1}}
cut = 1
head_cut = 2
[task]
kind = "regression"
[optimizer]
lr = 0.003
[data]
features = ["age", "sex", "bmi", "tc", "hdl", "ltg"]
target_mean = 115.0
target_spread = 30.0
"""
SCALING = """scaling = "run"
mean = [48.0, 1.5, 26.0, 190.0, 50.0, 4.6]
spread = [13.0, 0.5, 4.5, 35.0, 13.0, 0.5]
"""
PRIVACY = """[privacy]
epsilon = 6.0
delta = 0.001
clip = 1.0
"""
WORKER = """
[{kind}]
{name}broker = "{broker}"
store = "{store}"
state = "state/{worker}"
"""
DATA = """ledger = "ledgers/{site}.db"
[data]
source = "table"
path = "lipids.csv"
label = "ldl"
share = [{first}, {last}]
"""
SHARES = {"north": (0.0, 0.5), "south": (0.5, 0.8), "east": (0.8, 1.0)}
COLUMNS = ["age", "sex", "bmi", "bp", "tc", "ldl", "hdl", "tch", "ltg", "glu"]


POLICY = """
allowed = ["labels", "activations", "stored_activations", "gradients", "weights", "counts"]
server_sets_weights = true
"""


def write_ledger(path: Path, name: str) -> None:
    """A privacy ledger without runs, whose secret follows from a name: two runs draw the same noise."""
    secret = Secret(hashlib.sha256(name.encode()).digest())
    path.parent.mkdir(mode=0o700, exist_ok=True)
    write_new(path.with_suffix(".key"), secret.key)
    with closing(sqlite3.connect(path)) as rows, rows:
        rows.execute("CREATE TABLE owner (proof BLOB NOT NULL)")
        rows.execute("INSERT INTO owner VALUES (?)", (secret.derive("ledger").key,))


def fixed_identity(path: Path) -> Identity:
    """An identity that follows from the worker's name: two runs have one digest, and so draw the same private noise."""
    secret = hashlib.sha256(path.name.encode()).digest()
    write_new(path, secret)
    return Identity(secret)


class Hospital:
    """The files of one run in a folder, and its processes.

    Args:
        folder: where everything goes.
        broker, store: addresses for server.toml and site.toml; {worker} stands for the worker's name.
        files: more lines for these, with {worker}.
        protocol, epochs, order, sites: of run.toml; rounds are as many as epochs, or one with so many local epochs.
        begin: how workers and other verbs begin.
        keys: whether workers sign and seal their messages.
        learning: of run.toml.
    """

    def __init__(
        self, folder: Path, broker: str = "embedded:broker", store: str = "sqlite:run.db",
        protocol: str = "split_labels", epochs: int = 20, order: str = "strict", files: str = "",
        sites: Sequence[str] = tuple(SHARES), begin: type[Process | Fresh] = Process,
        keys: bool = True, learning: str = "steps",
    ) -> None:  # fmt: skip
        from sklearn.datasets import load_diabetes  # takes seconds, and only here is it needed

        self.folder = folder
        self.processes: dict[str, Process | Fresh] = {}
        self._begin = begin
        folder.mkdir(parents=True)
        panel = load_diabetes(scaled=False, as_frame=True).data.set_axis(COLUMNS, axis=1)
        panel.to_csv(folder / "lipids.csv", index=False)
        run = RUN.format(
            protocol=protocol, learning=learning, epochs=epochs, order=order, sites=json.dumps(list(sites))
        )
        if protocol in systems(Shape.ROUND):
            once = protocol == "data_vectors"
            run += f"[round]\nlocal_epochs = {epochs}\nrounds = 1\n" if once else f"[round]\nrounds = {epochs}\n"
        if protocol == "fedavg_dp_seg":
            run = run.replace("target_mean", f"{SCALING}target_mean") + PRIVACY
            for site in sites:
                write_ledger(folder / "ledgers" / f"{site}.db", site)
        (folder / "run.toml").write_text(run)
        (folder / "policy.toml").write_text(POLICY)
        worker = WORKER.replace("{broker}", broker).replace("{store}", store) + files
        (folder / "server.toml").write_text(worker.format(kind="server", name="", worker="server"))
        for site, (first, last) in SHARES.items():
            text = worker.format(kind="site", name=f'name = "{site}"\n', worker=site)
            (folder / f"{site}.toml").write_text(text + DATA.format(site=site, first=first, last=last))
        give_seeds(folder)
        if keys:
            give_keys(folder, fixed_identity)
        approve_all(folder)

    def start(self, worker: str, *arguments: str, environment: Mapping[str, str] = {}) -> Process | Fresh:
        """Start a worker in the background; `environment` is added to ours."""
        verb = "server" if worker == "server" else "site"
        log = self.folder / f"{worker}.log"
        process = self._begin([verb, f"{worker}.toml", *arguments], self.folder, log, log, environment)
        self.processes[worker] = process
        return process

    def call(self, *arguments: str, timeout: float = 100) -> subprocess.CompletedProcess[str]:
        """Run a verb to its end."""
        with tempfile.TemporaryDirectory() as place:
            out, err = Path(place) / "out", Path(place) / "err"
            process = self._begin([*arguments], self.folder, out, err)
            try:
                code = process.wait(timeout)
            finally:
                process.kill()
            return subprocess.CompletedProcess(arguments, code, out.read_text(), err.read_text())

    def kill(self, worker: str) -> None:
        """SIGKILL, and nothing gentler."""
        self.processes[worker].send_signal(signal.SIGKILL)
        self.processes[worker].wait()

    def close(self) -> None:
        """End whatever is left."""
        for process in self.processes.values():
            if process.poll() is None:
                process.kill()
            process.wait()

    @property
    def steps(self) -> int:
        """Lines of metrics that the server has written so far."""
        path = self.folder / "report" / "metrics.jsonl"
        return len(path.read_text().splitlines()) if path.exists() else 0

    def wait_for_steps(self, steps: int, seconds: float = 60.0) -> None:
        """Wait until the server has written so many lines."""
        deadline = time.monotonic() + seconds
        while self.steps < steps:
            assert time.monotonic() < deadline, f"no progress: {self.logs()}"
            time.sleep(0.05)

    def wait_for_end(self, seconds: float = 100.0) -> None:
        """Wait until every worker has left by itself, successfully."""
        deadline = time.monotonic() + seconds
        for worker, process in self.processes.items():
            assert process.wait(max(0.1, deadline - time.monotonic())) == 0, f"{worker}: {self.logs()}"

    def in_peace(self) -> dict[str, str]:
        """Play the whole run with everybody online and nobody disturbed; `models` of it."""
        try:
            for worker in self.workers:
                self.start(worker)
            self.wait_for_end()
        finally:
            self.close()
        return self.models()

    @property
    def workers(self) -> list[str]:
        """The server, and the sites that run.toml names."""
        return ["server", *tomllib.loads((self.folder / "run.toml").read_text())["run"]["sites"]]

    def logs(self) -> str:
        """What the workers printed, but for what PYTHONPROFILEIMPORTTIME adds."""
        texts = {
            path.stem: [line for line in path.read_text().splitlines() if not line.startswith("import time:")]
            for path in sorted(self.folder.glob("*.log"))
        }
        return "\n".join(f"{worker}: {line}" for worker, lines in texts.items() for line in lines[-20:])

    def last_line(self, worker: str) -> str:
        """The last line that a worker printed."""
        return (self.folder / f"{worker}.log").read_text().rstrip().rpartition("\n")[2]

    def models(self) -> dict[str, str]:
        """sha256 of every trained part, by path."""
        files = [*self.folder.glob("state/*/model/*.safetensors"), *self.folder.glob("report/*.safetensors")]
        return {
            os.fspath(file.relative_to(self.folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files
        }
