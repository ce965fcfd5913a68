"""What surrounds the engine: locks, voices, logs, stores of activations."""

import json
import time

import pytest
import torch

from nightsplit.server_worker.lease import Lease
from nightsplit.server_worker.metrics_log import MetricsLog
from nightsplit.server_worker.stream.activation_store import ActivationStore
from nightsplit.shared.engine.effects import Record
from nightsplit.shared.errors import ConfigError, StateError
from nightsplit.shared.protocols.build import planned_message_bytes
from nightsplit.shared.run_store.status import Phase, WorkerStatus
from nightsplit.shared.runtime.heartbeat import Heartbeat
from nightsplit.shared.runtime.process import lock_folder, prefetch_for, prepare_torch
from nightsplit.shared.wire.message import Kind
from nightsplit.shared.wire.schema import Payload, TensorSpec, contract
from nightsplit.simulation.store import MemoryStore
from tests.harness.night import tiny_config


def test_a_state_folder_belongs_to_one_process(tmp_path):
    with lock_folder(tmp_path), pytest.raises(StateError) as caught, lock_folder(tmp_path):
        pass
    assert caught.value.number == 503
    with lock_folder(tmp_path):
        pass


def test_an_absent_device_is_an_error_with_a_number():
    with pytest.raises(ConfigError) as caught:
        prepare_torch(1, "cuda:99" if torch.cuda.is_available() else "cuda")
    assert caught.value.number == 109


def test_prefetch_fits_the_memory():
    assert prefetch_for(100) == 512
    assert prefetch_for(16 * 2**20) == 16
    assert prefetch_for(2**20) == 128
    assert prefetch_for(2**20, queues=4) == 128
    assert prefetch_for(2**20, queues=16) == 32
    assert prefetch_for(2**20, queues=1000) == 16
    assert prefetch_for(1000, queues=1000) == 512


def test_planned_bytes_follow_the_codec():
    spec = TensorSpec(torch.float32, ("batch", 16, 4, 4), "fp16")
    payload = Payload(Kind.CUT_GRADIENT, {"smashed": spec, "targets": TensorSpec(torch.int64, ("batch",))})
    assert planned_message_bytes(tiny_config(), contract(payload)) == (2 * 8 - 1) * (256 * 2 + 8)


def test_a_heartbeat_speaks_until_the_end_and_survives_a_store_that_is_away():
    store, calls = MemoryStore(), []

    def open_store():
        calls.append(1)
        if len(calls) == 1:
            raise OSError("away")
        return store

    status = WorkerStatus(phase=Phase.WORKING)
    with Heartbeat("north", open_store, lambda: status, interval=0.01) as heartbeat:
        deadline = time.monotonic() + 5
        while not store.statuses(["north"]):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        status = WorkerStatus(phase=Phase.FINISHED)
    assert store.statuses(["north"])["north"].report.phase is Phase.FINISHED
    assert heartbeat.error is None


def test_a_heartbeat_survives_whatever_one_beat_meets():
    """The status, what is drawn of it, and the rest of a beat: none of them silences the worker for longer."""
    store, beats = MemoryStore(), []

    def status():
        beats.append(len(beats))
        if len(beats) in (1, 2):
            raise TypeError("a status that cannot be made")
        return WorkerStatus(phase=Phase.WORKING, sent=len(beats))

    def observe(status):
        raise RecursionError("nobody can draw this")

    def beat(store):
        if len(beats) == 4:
            beats.append(4)
            raise ValueError("no lease")

    with Heartbeat("north", lambda: store, status, observe, beat, interval=0.01) as heartbeat:
        deadline = time.monotonic() + 10
        while not (known := store.statuses(["north"])) or (known["north"].report.sent or 0) < 10:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    assert heartbeat.error is None, "a fault of the display is none of the store"


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ConfigError(104, "could not convert '48.0,87.0'", "mend it."), "E104 Model factory cannot be used"),
        (ZeroDivisionError("48.0,87.0"), "ZeroDivisionError"),
    ],
    ids=["numbered", "unknown"],
)
def test_the_last_words_of_a_worker_that_fails_quote_nothing(error, words):
    store, status = MemoryStore(), WorkerStatus(phase=Phase.WORKING, sent=3)
    with pytest.raises(type(error)), Heartbeat("north", lambda: store, lambda: status, interval=0.01):
        raise error
    assert store.statuses(["north"])["north"].report == WorkerStatus(phase=Phase.FAILED, detail=words, sent=3)


def test_a_lease_waits_for_the_active_server_and_notices_its_successor():
    store = MemoryStore()
    first, second = Lease(store, "one"), Lease(store, "two")
    assert first.acquire(lambda seconds: False)
    assert not second.acquire(lambda seconds: False)
    first.release()
    assert second.acquire(lambda seconds: False)
    assert second.fence > first.fence
    first.renew(store)
    with pytest.raises(StateError) as caught:
        first.check()
    assert caught.value.number == 505
    second.release()
    assert first.acquire(lambda seconds: False)
    first.check()  # it is the active server again, whatever it lost before


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_metrics_beyond_the_restored_step_are_cut_off(tmp_path):
    log = MetricsLog(tmp_path, 0)
    for step in (1, 2, 3):
        log.write(Record({"event": "train", "step": step, "loss": 0.5}))
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')  # the crash came in mid-line
    log = MetricsLog(tmp_path, 2)
    log.write(Record({"event": "train", "step": 3, "loss": 0.25}))
    log.close()
    assert [(line["step"], line["loss"]) for line in lines(tmp_path)] == [(1, 0.5), (2, 0.5), (3, 0.25)]
    assert list((tmp_path / "tensorboard").iterdir())


def test_an_evaluation_behind_the_checkpoint_is_in_the_metrics_once(tmp_path):
    """It makes no step of its own, so the step does not tell whether the checkpoint was before or after it."""
    evaluation = Record({"event": "evaluate", "step": 2, "epoch": 1, "site": "north", "part": "test", "loss": 0.5})
    log = MetricsLog(tmp_path, 0)
    for step in (1, 2):
        log.write(Record({"event": "train", "step": step, "loss": 0.5}))
    for _ in range(3):  # the same checkpoint of step 2 is restored twice
        log.write(evaluation)
        log.close()
        log = MetricsLog(tmp_path, 2)
    log.close()
    assert [line["event"] for line in lines(tmp_path)] == ["train", "train", "evaluate"]


def test_activations_are_stored_whole_and_read_by_rows(tmp_path):
    store = ActivationStore(tmp_path)
    smashed, targets = torch.randn(5, 3), torch.arange(5.0)
    for _ in range(2):  # a replay stores the same again
        store.put("north", 7, {"smashed": smashed, "targets": targets})
    assert torch.equal(store.get("north", 7)["smashed"], smashed)
    some = store.get("north", 7, [4, 0])
    assert torch.equal(some["smashed"], smashed[[4, 0]])
    assert some["targets"].tolist() == [4.0, 0.0]
