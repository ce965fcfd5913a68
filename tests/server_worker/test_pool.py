"""Processes that evaluate queries: what they compute, and how they end."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing import active_children
from pathlib import Path

import numpy as np
import pytest
import torch

from nightsplit.server_worker.protocols.he_clstm import HeClstmServer
from nightsplit.server_worker.query.pool import evaluation_pool
from nightsplit.shared.errors import Refused, StateError
from nightsplit.shared.he.packing import Batch
from nightsplit.shared.he.sequences import parameters_for
from nightsplit.shared.he.weights import ClassifierWeights
from nightsplit.shared.models.sequences import SequenceClassifier
from nightsplit.site_worker.query.keys import SecretKeys

SECRET = b"s" * 32


def classifier() -> ClassifierWeights:
    torch.manual_seed(1)
    return ClassifierWeights.of(SequenceClassifier(2, 2, 1, recurrent=False).state_dict())


def eventually(holds: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 30
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.05)
    return holds()


def test_processes_give_what_one_gives(tmp_path: Path) -> None:
    ckks = parameters_for(classifier())
    secret, public = SecretKeys.make(ckks, tmp_path)
    frames = [Batch(ckks.slots).frame(np.full((2, 2), number / 10)) for number in range(2)]
    pieces = [secret.encrypt(vector, ckks.top) for frame in frames for vector in frame]
    (expected,) = HeClstmServer(classifier(), SECRET).answer(public, 0, "batch", pieces, "", "n")
    with evaluation_pool(classifier(), SECRET, 2) as evaluate:
        answers = [evaluate(public, 0, "batch", pieces, "", "n") for _ in range(4)]
        refused = evaluate(public, 7, "batch", pieces, "", "n")
        for answer in answers:
            (found,) = answer.result()
            numbers = [secret.decrypt(ckks.read_any(one))[:2] for one in (found, expected)]
            assert numbers[0] == pytest.approx(numbers[1], abs=1e-9)
        with pytest.raises(Refused) as caught:
            refused.result()
        assert caught.value.number == 304
        assert len(active_children()) == 2
    assert not active_children()


def test_a_process_that_is_killed_is_noticed(tmp_path: Path) -> None:
    _, public = SecretKeys.make(parameters_for(classifier()), tmp_path)
    with evaluation_pool(classifier(), SECRET, 1) as evaluate:
        with pytest.raises(Refused):
            evaluate(public, 0, "batch", [], "", "n").result()
        (process,) = active_children()
        assert process.pid is not None
        os.kill(process.pid, signal.SIGTERM)
        with pytest.raises(Refused):  # a signal to the whole group does not end it
            evaluate(public, 0, "batch", [], "", "n").result()
        os.kill(process.pid, signal.SIGSTOP)
        waiting = evaluate(public, 0, "batch", [bytes(2**24)], "", "n")  # more than a pipe takes
        os.kill(process.pid, signal.SIGKILL)
        for evaluation in (waiting, evaluate(public, 0, "batch", [], "", "n")):
            with pytest.raises(StateError) as caught:
                evaluation.result()
            assert caught.value.number == 509
            assert caught.value.__context__ is None, "Python 3.13 would complain of the pipe's buffer in it"


SERVER = """
from multiprocessing import active_children
from nightsplit.server_worker.query.pool import evaluation_pool
from nightsplit.shared.he.ckks import PublicKeys
from nightsplit.shared.errors import Refused, StateError
from tests.server_worker.test_pool import SECRET, classifier
if __name__ == "__main__":
    with evaluation_pool(classifier(), SECRET, 1) as evaluate:
        try:
            evaluate(PublicKeys(b"", b""), 0, "batch", [], "", "n").result()
        except Refused:
            print(active_children()[0].pid, flush=True)
        input()
"""


def test_none_outlives_its_server(tmp_path: Path) -> None:
    (tmp_path / "server.py").write_text(SERVER)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, str(tmp_path / "server.py")]
    with subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as server:
        assert server.stdout is not None
        process = Path("/proc") / server.stdout.readline().decode().strip()
        assert process.exists()
        server.kill()
        assert eventually(lambda: not process.exists())
