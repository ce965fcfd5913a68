"""A split_frozen server of several processes: the result of one, whatever dies, as torchrun starts it."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from nightsplit.server_worker.stream.activation_store import ActivationStore
from nightsplit.server_worker.stream.ddp import DividedTop, Group, Share
from nightsplit.shared.config.optimizer import OptimizerSection
from nightsplit.shared.config.run import TaskSection
from nightsplit.shared.errors import ConfigError, Refused
from nightsplit.shared.learning.optimizers import START
from nightsplit.shared.learning.seeds import seeded
from tests.harness.approvals import approve_all
from tests.harness.services import free_port
from tests.harness.workers import SHARES, Hospital

pytestmark = pytest.mark.timeout(400)  # processes that load torch, three at a time

BATCH, EPOCHS = 3, 6
"""Three rows: two processes have unequal shares; and some steps have two rows, so that of three one has none."""

# Sums over a batch in another order differ in the last bits of a float32, and steps carry that on. Measured
# over 576 steps: 4e-7 in the losses, 3e-6 in the weights. Another dropout mask makes it 0.99 in the losses.
CLOSE = 1e-4


class Server:
    """The server of a run whose sites have sent everything and are gone.

    Args:
        uploaded: a run's folder at that moment; it is copied.
    """

    def __init__(self, uploaded: Path, folder: Path) -> None:
        self.folder = folder
        shutil.copytree(uploaded, folder)
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, processes: int) -> None:
        launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m"]
        command = [sys.executable, "-m", *(launcher if processes > 1 else []), "nightsplit", "server", "server.toml"]
        with (self.folder / "server.log").open("ab") as log:
            self.process = subprocess.Popen(command, cwd=self.folder, stdout=log, stderr=log)

    def end(self) -> int:
        assert self.process is not None
        return self.process.wait(200)

    def to_the_end(self, processes: int) -> "Server":
        self.start(processes)
        assert self.end() == 0, self.log
        return self

    def wait_for(self, steps: int) -> None:
        deadline = time.monotonic() + 60
        while len(self.losses()) < steps:
            assert time.monotonic() < deadline, self.log
            assert self.process is not None
            assert self.process.poll() is None, self.log
            time.sleep(0.02)

    def rank(self, number: int) -> int:
        """Process id of a rank."""
        for place in Path("/proc").glob("[0-9]*"):
            try:
                ours = (place / "cwd").readlink() == self.folder
                environment = (place / "environ").read_bytes().split(b"\0")
            except OSError:
                continue
            if ours and f"RANK={number}".encode() in environment:
                return int(place.name)
        raise AssertionError(f"rank {number} is not there: {self.log}")

    @property
    def log(self) -> str:
        return (self.folder / "server.log").read_text()

    def losses(self) -> list[float]:
        path = self.folder / "report" / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        entries = [json.loads(line) for line in lines if line.endswith("\n")]
        return [entry["loss"] for entry in entries if entry["event"] == "train"]

    def report(self) -> bytes:
        return (self.folder / "report" / "top.safetensors").read_bytes()

    def top(self) -> dict[str, torch.Tensor]:
        return load_file(self.folder / "report" / "top.safetensors")


@pytest.fixture(scope="module")
def upload(tmp_path_factory):
    """A run whose sites have sent everything and are gone."""
    hospital = Hospital(tmp_path_factory.mktemp("upload") / "run", protocol="split_frozen", epochs=EPOCHS)
    run = hospital.folder / "run.toml"
    text = run.read_text().replace("batch_size = 16", f"batch_size = {BATCH}")
    run.write_text(text.replace("hidden = [32, 16]", "hidden = [32, 256, 64]"))  # gradients of some size
    approve_all(hospital.folder)
    try:
        assert hospital.call("open", "server.toml").returncode == 0
        for site in SHARES:
            hospital.start(site, "--exit-when-idle", "1")
        hospital.wait_for_end(200)
    finally:
        hospital.close()
    return hospital.folder


@pytest.fixture(scope="module")
def alone(upload, tmp_path_factory):
    return Server(upload, tmp_path_factory.mktemp("alone") / "run").to_the_end(1)


@pytest.fixture(scope="module")
def pair(upload, tmp_path_factory):
    return Server(upload, tmp_path_factory.mktemp("pair") / "run").to_the_end(2)


@pytest.fixture(scope="module")
def three(upload, tmp_path_factory):
    return Server(upload, tmp_path_factory.mktemp("three") / "run").to_the_end(3)


def test_two_processes_train_as_one_does(alone, pair):
    one, two = torch.tensor(alone.losses()), torch.tensor(pair.losses())
    epoch = len(one) // EPOCHS
    assert one[:epoch].mean() - one[-epoch:].mean() > 0.1, "it has learned something"
    torch.testing.assert_close(two, one, rtol=0, atol=CLOSE)
    torch.testing.assert_close(pair.top(), alone.top(), rtol=0, atol=CLOSE)


@pytest.mark.campaign
def test_three_processes_train_as_one_does(alone, three):
    torch.testing.assert_close(three.top(), alone.top(), rtol=0, atol=CLOSE)


@pytest.mark.campaign
def test_any_rank_may_die_and_the_result_is_the_same_to_the_bit(upload, three, tmp_path):
    """Three processes, since two numbers have one sum only, whatever the order."""
    shaken = Server(upload, tmp_path / "shaken")
    shaken.start(3)
    shaken.wait_for(100)
    shaken.process.terminate()  # in order: rank 0 saves, and the others leave with it
    assert shaken.end() != 0
    assert len(shaken.losses()) >= 100
    for victim in (2, 0):
        shaken.start(3)
        shaken.wait_for(len(shaken.losses()) + 20)
        os.kill(shaken.rank(victim), signal.SIGKILL)
        assert shaken.end() != 0
    assert "E509" in shaken.log
    shaken.to_the_end(3)
    assert shaken.losses() == three.losses()
    assert shaken.report() == three.report()


def test_a_server_with_nothing_to_divide_says_so(tmp_path):
    hospital = Hospital(tmp_path / "run")
    server = Server(hospital.folder, tmp_path / "copy")
    server.start(2)
    assert server.end() != 0
    assert "E114" in server.log


# One process


@pytest.fixture
def group(monkeypatch, tmp_path):
    """A group of one, with everything that a larger one has."""
    variables = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    for name, value in {**variables, "MASTER_PORT": str(free_port())}.items():
        monkeypatch.setenv(name, value)
    group = Group("cpu")
    yield group
    group.leave()


def divided(module, group, folder):
    task = TaskSection(kind="regression")
    return DividedTop(module, OptimizerSection(lr=0.1), task, ActivationStore(folder), group)


def test_a_batch_that_gives_no_finite_loss_changes_nothing(group, tmp_path):
    top = divided(torch.nn.Linear(2, 1), group, tmp_path)
    top.store.put("north", 1, {"smashed": torch.ones(2, 2), "targets": torch.tensor([1.0, 1e30])})
    before = top.weights()
    with pytest.raises(Refused):
        top.train_stored([("north", 1, 0), ("north", 1, 1)], 1, START)
    torch.testing.assert_close(top.weights(), before, rtol=0, atol=0)
    top.train_stored([("north", 1, 0)], 1, START)
    assert not torch.equal(top.weights()["weight"], before["weight"])


def test_batch_normalisation_on_the_cpu_is_refused(group, tmp_path):
    with pytest.raises(ConfigError) as refusal:
        divided(torch.nn.Sequential(torch.nn.BatchNorm1d(2), torch.nn.Linear(2, 1)), group, tmp_path)
    assert refusal.value.number == 114


@pytest.mark.parametrize("dropout", [torch.nn.Dropout(0.5), torch.nn.Dropout2d(0.5)])
@pytest.mark.parametrize("shape", [(7, 3, 2, 2), (21, 3, 2, 2)], ids=["rows", "three patches a row"])
def test_shares_together_drop_what_one_process_drops(dropout, shape):
    inputs, bounds = torch.rand(shape), [(0, 2), (2, 7)]
    with seeded(5):
        whole = dropout(inputs)
    parts, patches = [], shape[0] // 7
    for first, last in bounds:
        with seeded(5), Share(first, last, 7, (last - first) / 7):
            parts.append(dropout(inputs[patches * first : patches * last]))
    assert torch.equal(torch.cat(parts), whole)
    assert not torch.equal(whole, inputs)
