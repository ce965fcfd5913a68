"""A long night without a server, a full queue, a broker in distress: workers wait, say so, and lose nothing."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from nightsplit.console.status import summarise
from nightsplit.console.worker_file import WorkerFile
from tests.harness.approvals import approve_all
from tests.harness.services import RabbitNode, wait_until
from tests.harness.study import change
from tests.harness.workers import Hospital

LIMIT_BYTES = 4 * 2**20
"""Of the queue up: about 16 of the 350 messages of the run."""
REFUSED_SECONDS = 10.0
FLAT = 1.10
BROKER_FLAT = 1.25
"""Erlang collects its garbage when it likes; what the queue holds is asked of the broker itself."""
WIDTH = 8192
"""Of the cut, so that a message has 256 KB: a site that did not wait would soon hold tens of MB."""


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RabbitNode]:
    """A node that these tests may alarm."""
    with RabbitNode(tmp_path_factory.mktemp("node")) as node:
        yield node


def one_site(folder: Path, broker: str = "embedded:broker", queue_bytes: int = LIMIT_BYTES) -> Hospital:
    """One site that could send its whole night's work without an answer, were there room for it."""
    hospital = Hospital(folder, broker=broker, epochs=25, sites=["north"])
    run = folder / "run.toml"
    change(run, "window = 4", "window = 1000")
    change(run, "hidden = [32, 16]", f"hidden = [{WIDTH}, 16]")
    run.write_text(f"{run.read_text()}[wire]\nqueue_bytes = {queue_bytes}\n")
    approve_all(folder)
    return hospital


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """sha256 of every part of the model, trained with everybody online and room for everything."""
    return one_site(tmp_path_factory.mktemp("calm") / "run", queue_bytes=2**30).in_peace()


@pytest.fixture
def hospital(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Hospital]:
    """Over the broker that the test's parameter names, "embedded" or "rabbitmq"."""
    address = {}
    if request.param == "rabbitmq":
        address = {"broker": request.getfixturevalue("node").vhost()}
    hospital = one_site(tmp_path / "run", **address)
    yield hospital
    hospital.close()


def status(hospital: Hospital, worker: str) -> dict[str, Any]:
    """What `nightsplit status --json` says of a worker."""
    file = WorkerFile(hospital.folder / "server.toml")
    return next(line for line in summarise(file)["workers"] if line["worker"] == worker)


def shows(hospital: Hospital, worker: str, why: str) -> Callable[[], bool]:
    """Whether a worker is blocked, for a reason that begins so."""

    def shown() -> bool:
        line = status(hospital, worker)
        return line["state"] == "blocked" and str(line["detail"]).startswith(why)

    return shown


def kilobytes(*pids: int) -> int:
    """Resident memory of processes."""
    lines = [line for pid in pids for line in Path(f"/proc/{pid}/status").read_text().splitlines()]
    return sum(int(line.split()[1]) for line in lines if line.startswith("VmRSS:"))


def members(session: int) -> list[int]:
    """Processes of a session."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:  # it has ended
            continue
        if int(fields[3]) == session:
            found.append(int(stat.parent.name))
    return found


def waiting_bytes(hospital: Hospital, node: RabbitNode | None) -> int:
    """What the queue up holds."""
    file = WorkerFile(hospital.folder / "server.toml")
    queue = file.queues()["north"].up.name
    if node is not None:
        vhost = urlsplit(file.config.broker).path[1:]
        told = dict(line.split() for line in node.ctl("list_queues", "-p", vhost, "name", "message_bytes").splitlines())
        return int(told[queue])
    with closing(sqlite3.connect(hospital.folder / "broker" / "broker.sqlite")) as rows:
        found = rows.execute("SELECT coalesce(sum(size), 0) FROM message WHERE queue = ?", (queue,)).fetchone()
    return int(found[0])


@pytest.mark.campaign
@pytest.mark.timeout(300)
@pytest.mark.parametrize("hospital", ["embedded", "rabbitmq"], indirect=True)
def test_a_site_waits_a_long_night_for_room_in_the_queue(
    hospital: Hospital, undisturbed: dict[str, str], request: pytest.FixtureRequest
) -> None:
    node = request.getfixturevalue("node") if "rabbitmq" in request.node.name else None
    assert hospital.call("open", "server.toml").returncode == 0
    north = hospital.start("north")
    full = "queue nightsplit.lipids.north.up is full"
    wait_until(shows(hospital, "north", full), 100, f"{full}: {hospital.logs()}")

    # It makes no more than it may have unconfirmed, and then nothing at all.
    sent: list[int] = []

    def stands_still() -> bool:
        sent.append(status(hospital, "north")["sent"])
        time.sleep(1.5)  # longer than it takes a worker to say how it is
        return sent[-2:-1] == sent[-1:]

    wait_until(stands_still, 100, "the site to wait")
    before = status(hospital, "north")
    assert 0 < before["confirmed"] < before["sent"] < before["planned"] * 2 // 3

    broker = members(node._process.pid) if node is not None and node._process is not None else []
    memory, broker_memory = [kilobytes(north.pid)], [kilobytes(*broker)]
    until = time.monotonic() + REFUSED_SECONDS
    while time.monotonic() < until:
        assert waiting_bytes(hospital, node) <= LIMIT_BYTES
        time.sleep(0.5)
        memory.append(kilobytes(north.pid))
        broker_memory.append(kilobytes(*broker))
    print(f"{REFUSED_SECONDS} s of being refused, KB: site {memory}, broker {broker_memory}")
    assert max(memory) <= FLAT * memory[0], f"the site grows: {memory}"
    assert max(broker_memory) <= BROKER_FLAT * broker_memory[0], f"the broker grows: {broker_memory}"
    after = status(hospital, "north")
    assert (after["sent"], after["confirmed"]) == (before["sent"], before["confirmed"])
    assert full in hospital.call("status", "north.toml").stdout

    hospital.start("server")
    hospital.wait_for_end(200)
    assert hospital.models() == undisturbed
    line = status(hospital, "north")
    assert (line["answered"], line["refused"]) == (line["planned"], 0)


ALARMS = {
    "memory": (("set_vm_memory_high_watermark", "0.0001"), ("set_vm_memory_high_watermark", "0.4")),
    "disk": (("set_disk_free_limit", "100000GB"), ("set_disk_free_limit", "50MB")),
}


@pytest.mark.timeout(300)
@pytest.mark.parametrize("alarm", ["memory", pytest.param("disk", marks=pytest.mark.campaign)])
@pytest.mark.parametrize("hospital", ["rabbitmq"], indirect=True)
def test_an_alarm_at_the_broker_holds_up_a_site_and_a_server_and_no_more(
    hospital: Hospital, alarm: str, undisturbed: dict[str, str], node: RabbitNode
) -> None:
    """The hardest moments for each: the site's first night, and the server with a full queue of work."""
    raised, cleared = ALARMS[alarm]
    blocked = "the broker blocks publishing: memory or disk alarm"
    assert hospital.call("open", "server.toml").returncode == 0
    try:
        node.ctl(*raised)
        hospital.start("north")
        wait_until(shows(hospital, "north", blocked), 100, f"the site to be blocked: {hospital.logs()}")
        assert waiting_bytes(hospital, node) == 0
        node.ctl(*cleared)
        wait_until(shows(hospital, "north", "queue"), 100, "the site to send what there is room for")

        node.ctl(*raised)
        server = hospital.start("server")
        wait_until(shows(hospital, "server", blocked), 100, f"the server to be blocked: {hospital.logs()}")
        assert blocked in hospital.call("status", "server.toml").stdout
        time.sleep(3)  # it may still be busy with what had arrived
        steps, memory = hospital.steps, kilobytes(server.pid)
        time.sleep(3)
        assert hospital.steps == steps, "what it learns from must not outrun the answers"
        assert kilobytes(server.pid) <= FLAT * memory
        assert all(process.poll() is None for process in hospital.processes.values())
    finally:
        node.ctl(*cleared)
    hospital.wait_for_end(200)
    assert hospital.models() == undisturbed
    assert status(hospital, "server")["state"] == "finished"
