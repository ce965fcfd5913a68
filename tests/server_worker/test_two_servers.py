"""Two servers of one run: the leader sleeps past its lease and wakes; exactly one of them goes on."""

import json
import signal
import sqlite3
import time
from contextlib import closing

import pytest

from tests.harness.processes import Process
from tests.harness.workers import SHARES, Hospital

EPOCHS = 40
"""Long enough that a fast machine is still at work when the leader is put to sleep."""


def start_server(hospital, log):
    return Process(["server", "server.toml"], hospital.folder, hospital.folder / log, hospital.folder / log)


def wait_for_line(hospital, log, text):
    """Wait until a worker has said so."""
    deadline = time.monotonic() + 60
    said = hospital.folder / log
    while not said.exists() or text not in said.read_text():
        assert time.monotonic() < deadline, hospital.logs()
        time.sleep(0.05)


def put_to_sleep(leader, hospital):
    """SIGSTOP between two transactions; a process that is stopped within one holds up the whole host (delivery.md)."""
    while True:
        leader.send_signal(signal.SIGSTOP)
        try:
            for database in (hospital.folder / "broker/broker.sqlite", hospital.folder / "run.db"):
                if database.exists():
                    with closing(sqlite3.connect(database, timeout=1.0)) as rows:
                        rows.execute("BEGIN IMMEDIATE")
            return
        except sqlite3.OperationalError:
            leader.send_signal(signal.SIGCONT)
            time.sleep(0.05)


def fences(hospital):
    """Incarnations of the server that have checkpoints."""
    return {place.name.partition("-")[0] for place in (hospital.folder / "state/server/checkpoints").glob("0*")}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return Hospital(tmp_path_factory.mktemp("calm") / "run", epochs=EPOCHS).in_peace()


@pytest.fixture(params=["embedded", pytest.param("rabbitmq", marks=pytest.mark.campaign)])
def hospital(request, tmp_path):
    addresses = {}
    if request.param == "rabbitmq":
        node, redis = request.getfixturevalue("rabbitmq"), request.getfixturevalue("redis_server")
        addresses = {"broker": node.vhost(), "store": redis.url}
    hospital = Hospital(tmp_path / "run", epochs=EPOCHS, **addresses)
    yield hospital
    hospital.close()


@pytest.mark.campaign
@pytest.mark.timeout(300)
def test_a_leader_that_sleeps_past_its_lease_is_replaced_and_refused(undisturbed, hospital):
    leader = start_server(hospital, "leader.log")
    standby = None
    try:
        wait_for_line(hospital, "leader.log", "server: w")  # working, or waiting for the first site
        standby = start_server(hospital, "standby.log")
        wait_for_line(hospital, "standby.log", "standing by")
        for site in SHARES:
            hospital.start(site)
        hospital.wait_for_steps(40)
        put_to_sleep(leader, hospital)
        asleep = hospital.steps
        deadline = time.monotonic() + 150  # RabbitMQ notices a silent consumer after two heartbeats of 10 s
        while hospital.steps < asleep + 40:
            assert time.monotonic() < deadline, hospital.logs()
            assert leader.poll() is None, hospital.logs()
            assert standby.poll() is None, hospital.logs()
            time.sleep(0.1)
        leader.send_signal(signal.SIGCONT)
        assert leader.wait(60) == 1, hospital.logs()
        # Refused by the run store or by the broker, whichever it meets first.
        said = (hospital.folder / "leader.log").read_text()
        assert "E505" in said or "E208" in said, said
        assert standby.wait(100) == 0, hospital.logs()
        hospital.wait_for_end()
    finally:
        for server in (leader, standby):
            if server is not None and server.poll() is None:
                server.kill()
                server.wait()
    assert hospital.models() == undisturbed
    assert len(fences(hospital)) == 1, "every kept checkpoint is the successor's"
    report = json.loads((hospital.folder / "report/report.json").read_text())
    lines = [json.loads(line) for line in (hospital.folder / "report/metrics.jsonl").read_text().splitlines()]
    trained = [line["step"] for line in lines if line["event"] == "train"]
    assert trained == list(range(1, report["steps"] + 1)), "each step is in the log once"
