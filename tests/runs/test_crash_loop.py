"""A worker that dies at every start loses nothing; and `nightsplit dlq` on the command line, over real workers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from nightsplit.console.cli import run
from nightsplit.console.worker_file import WorkerFile
from nightsplit.server_worker.worker import ServerWorker
from nightsplit.shared.crash_points import EXIT_CODE, VARIABLE
from nightsplit.shared.wire.message import SERVER
from nightsplit.site_worker.worker import SiteWorker
from tests.harness.services import wait_until
from tests.harness.study import change
from tests.harness.workers import Hospital
from tests.protocols.test_poison import POISON, header

SITES = ("north", "south", "east")
CRASH_LOOP = """
import json, os
# what takes the time of a start, once for all of them:
import nightsplit.server_worker.worker, nightsplit.console.watch, torch._dynamo
from nightsplit.console.cli import run

codes = []
for _ in range(25):
    child = os.fork()
    if child == 0:
        os._exit(run(["server", "server.toml"]))
    codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
print()
print(json.dumps(codes))
"""
STRANGE = ("a pickle", "another wire version", "another sender", "an unknown dtype")


def hospital_in(folder: Path, broker: str = "embedded:broker") -> Hospital:
    """North needs two nights."""
    hospital = Hospital(folder, broker, epochs=4, keys=False)
    change(folder / "run.toml", "window = 4", "window = 30")
    ServerWorker(folder / "server.toml").open_run()
    return hospital


def nights(hospital: Hospital) -> list[bool]:
    """Every site works until it has nothing more to do; which of them have finished."""
    return [SiteWorker(hospital.folder / f"{site}.toml").work(idle_seconds=0.5) for site in SITES]


def work_to_the_end(hospital: Hospital) -> dict[str, str]:
    """Days and nights in turns; sha256 of every part of the model."""
    for _ in range(40):
        ServerWorker(hospital.folder / "server.toml").work(idle_seconds=0.5)
        if all(nights(hospital)):
            return hospital.models()
    pytest.fail("the run does not end")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> dict[str, str]:
    hospital = hospital_in(tmp_path_factory.mktemp("undisturbed") / "run")
    nights(hospital)
    return work_to_the_end(hospital)


@pytest.fixture(params=["embedded", pytest.param("rabbitmq", marks=pytest.mark.rabbitmq)])
def hospital(request, tmp_path) -> Hospital:
    address = request.getfixturevalue("rabbitmq").vhost() if request.param == "rabbitmq" else "embedded:broker"
    return hospital_in(tmp_path / "run", address)


@pytest.mark.campaign
@pytest.mark.timeout(300)
def test_a_worker_that_dies_at_every_start_loses_nothing(hospital, undisturbed, capsys):
    file = WorkerFile(hospital.folder / "server.toml")
    broker, queues = file.open_broker(), file.queues()

    def depths(name: str) -> dict[str, int | None]:
        return {site: broker.depth(getattr(queues[site], name)) for site in SITES}

    nights(hospital)
    queued = depths("up")
    assert queued["north"] >= 30, "a window of batches"
    loop = subprocess.run(
        [sys.executable, "-c", CRASH_LOOP], cwd=hospital.folder, env=os.environ | {VARIABLE: "after_apply:1"},
        capture_output=True, text=True, timeout=250,
    )  # fmt: skip
    assert json.loads(loop.stdout.splitlines()[-1]) == [EXIT_CODE] * 25, loop.stdout + loop.stderr
    wait_until(lambda: depths("up") == queued, 30, f"{queued} in the queues; there are {depths('up')}")
    assert depths("dead") == dict.fromkeys(SITES, 0)

    # Then strangers' messages, between those of the first night and the second.
    with broker.link([], 8, "attacker") as link:
        for kind in STRANGE:
            link.publish(queues["north"].up, f"stranger/{kind}", [POISON[kind][0](replace(header(7), run="lipids"))])
        while link.unconfirmed:
            link.receive(0.1)
    assert work_to_the_end(hospital) == undisturbed
    assert {"state/north/model/bottom.safetensors", "report/top.safetensors"} <= undisturbed.keys()
    assert (depths("dead")["south"], depths("dead")["east"]) == (0, 0)
    check_command_line(hospital, capsys)


def check_command_line(hospital: Hospital, capsys) -> None:
    capsys.readouterr()
    server, north, south = (str(hospital.folder / f"{worker}.toml") for worker in (SERVER, "north", "south"))
    assert run(["dlq", "list", north, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["dead_letters"]
    # A server that leaves before two checkpoints count a refusal refuses again, and writes another letter.
    assert [letter["message_id"] for letter in found[:4]] == [f"stranger/{kind}" for kind in STRANGE]
    for letter in found:
        assert letter["number"] == POISON[letter["message_id"].removeprefix("stranger/")][1]
        assert letter["reason"].startswith(f"E{letter['number']} ")
        assert (letter["sender"], letter["queue"]) == ("north", "nightsplit.lipids.north.up")
        age = datetime.now(UTC) - datetime.fromisoformat(letter["time"])
        assert timedelta(0) <= age < timedelta(minutes=10)
    ids = [letter["id"] for letter in found]

    assert run(["dlq", "list", server]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["id", "site", "number", "reason", "sender", "time", "bytes", "from"]
    assert [line.split()[0] for line in lines[2:-1]] == ids
    assert lines[-1] == f"{len(ids)} dead letters"
    assert run(["dlq", "show", north, ids[3]]) == 0
    assert "E305 Tensor has a forbidden" in capsys.readouterr().out
    assert run(["dlq", "list", south]) == 0
    assert capsys.readouterr().out == "0 dead letters\n"
    assert run(["dlq", "discard", south, ids[0]]) == 1
    assert capsys.readouterr().err.startswith("E606 No such dead letter: ")
    assert run(["dlq", "replay", north, ids[0]]) == 1, "what cannot be read does not leave the hospital"
    assert capsys.readouterr().err.startswith("E301 ")
    assert run(["dlq", "replay", server, ids[0]]) == 0
    assert capsys.readouterr().out == "1 dead letter sent again\n"
    assert run(["dlq", "discard", server, "--all"]) == 0
    assert capsys.readouterr().out == f"{len(ids) - 1} dead letters discarded\n"
    for missing in (["dlq", "replay", north], ["dlq", "discard", north, "--all", ids[0]], ["dlq", north]):
        assert run(missing) == 2
    capsys.readouterr()
