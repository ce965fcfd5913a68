"""A run that moves to another broker in the middle, and ends with the bits of an undisturbed one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from nightsplit.console.move import move_run
from nightsplit.console.worker_file import WorkerFile
from tests.harness.centre import Centre
from tests.harness.kills import is_killed
from tests.harness.servers import folder_of
from tests.harness.services import RabbitNode, for_quorum_queues
from tests.harness.study import change
from tests.harness.workers import Hospital

SITES = ("north", "south")
EPOCHS = 40
EMBEDDED = "embedded:broker"

pytestmark = [pytest.mark.rabbitmq, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """sha256 of every part of the model, trained in peace."""
    return Hospital(tmp_path_factory.mktemp("calm") / "run", epochs=EPOCHS, sites=SITES).in_peace()


@contextmanager
def stopped_in_the_middle(hospital: Hospital) -> Iterator[Hospital]:
    """A run that has begun, and stands still."""
    try:
        start(hospital)
        hospital.wait_for_steps(60)
        for process in hospital.processes.values():
            process.terminate()
        for process in hospital.processes.values():
            assert process.wait(60) == 0, hospital.logs()
        yield hospital
    finally:
        hospital.close()


def start(hospital: Hospital) -> None:
    for worker in hospital.workers:
        hospital.start(worker)


def name_new_broker(hospital: Hospital, old: str, new: str) -> None:
    """Write new.toml, a copy of server.toml with another broker."""
    (hospital.folder / "new.toml").write_text((hospital.folder / "server.toml").read_text())
    change(hospital.folder / "new.toml", old, new)


def move(hospital: Hospital) -> str:
    moved = hospital.call("move", "server.toml", "--to", "new.toml")
    assert moved.returncode == 0, moved.stderr
    return moved.stdout


def finish(hospital: Hospital, old: str, new: str) -> dict[str, str]:
    """Start the workers at the new broker; `models` at the end, with nothing left at the old one."""
    source = WorkerFile(hospital.folder / "server.toml")
    for queues in source.queues().values():
        assert [source.open_broker().depth(queue) for queue in queues] == [0, 0, 0]
    for worker in hospital.workers:
        change(hospital.folder / f"{worker}.toml", old.format(worker=worker), new.format(worker=worker))
    steps = hospital.steps
    start(hospital)
    hospital.wait_for_end()
    assert hospital.steps > steps, "it was moved in the middle"
    return hospital.models()


def test_from_the_embedded_broker_to_rabbitmq(
    rabbitmq: RabbitNode, undisturbed: dict[str, str], tmp_path: Path
) -> None:
    new = rabbitmq.vhost()
    with stopped_in_the_middle(Hospital(tmp_path / "run", epochs=EPOCHS, sites=SITES)) as hospital:
        name_new_broker(hospital, EMBEDDED, new)
        told = move(hospital)
        assert [line.split(": ")[0] for line in told.splitlines()[:2]] == [*SITES]
        assert f"127.0.0.1:{rabbitmq.port}" in told
        assert "guest" not in told, "neither user nor password"
        assert finish(hospital, EMBEDDED, new) == undisturbed


@pytest.mark.campaign
@pytest.mark.parametrize("way", ["node to cluster", "cluster to embedded"])
def test_from_rabbitmq(rabbitmq: RabbitNode, undisturbed: dict[str, str], tmp_path: Path, way: str) -> None:
    old, new = {
        "node to cluster": (rabbitmq.vhost(), for_quorum_queues(rabbitmq.vhost())),
        "cluster to embedded": (for_quorum_queues(rabbitmq.vhost()), EMBEDDED),
    }[way]
    with stopped_in_the_middle(Hospital(tmp_path / "run", broker=old, epochs=EPOCHS, sites=SITES)) as hospital:
        name_new_broker(hospital, old, new)
        move(hospital)
        assert finish(hospital, old, new) == undisturbed


@pytest.mark.campaign
@pytest.mark.redis
def test_with_tls_every_receiver_accepts_messages_that_the_server_moved(
    undisturbed: dict[str, str], tmp_path: Path
) -> None:
    centre = Centre(tmp_path / "centre")
    with centre, centre.another_node(tmp_path / "new") as node:
        hospital = centre.hospital(tmp_path / "run", epochs=EPOCHS, sites=SITES)
        old, new = centre.broker("{worker}"), centre.broker("{worker}").replace(f":{centre.node.port}", f":{node.port}")
        with stopped_in_the_middle(hospital):
            name_new_broker(hospital, old.format(worker="server"), new.format(worker="server"))
            move(hospital)
            assert finish(hospital, old, new) == undisturbed
            dead = [q.dead for q in WorkerFile(hospital.folder / "server.toml").queues().values()]
            broker = WorkerFile(hospital.folder / "server.toml").open_broker()
            assert [broker.depth(queue) for queue in dead] == [0, 0], "none was refused"


@pytest.mark.campaign
@pytest.mark.parametrize("method", ["publish", "acknowledge"])
def test_a_move_that_is_killed_again_and_again_goes_on(
    rabbitmq: RabbitNode, undisturbed: dict[str, str], tmp_path: Path, method: str
) -> None:
    old, new = rabbitmq.vhost(), for_quorum_queues(rabbitmq.vhost())
    with stopped_in_the_middle(Hospital(tmp_path / "run", broker=old, epochs=EPOCHS, sites=SITES)) as hospital:
        name_new_broker(hospital, old, new)
        kills = 0

        def move_here() -> None:
            move_run(*(WorkerFile(hospital.folder / name) for name in ("server.toml", "new.toml")))

        while is_killed(move_here, method, 20 + kills):
            kills += 1
            assert kills < 100, "it makes no progress"
        assert kills >= 3
        assert finish(hospital, old, new) == undisturbed


@pytest.mark.campaign
@pytest.mark.parametrize("hosts", ["one host", "several hosts"])
@pytest.mark.parametrize("server", ["RabbitMQ 4.0", "RabbitMQ 4.3"])
def test_to_another_version_of_rabbitmq(
    rabbitmq: RabbitNode, undisturbed: dict[str, str], tmp_path: Path, server: str, hosts: str
) -> None:
    old = rabbitmq.vhost()
    with (
        RabbitNode(tmp_path / "new", folder_of(server)) as node,
        stopped_in_the_middle(Hospital(tmp_path / "run", broker=old, epochs=EPOCHS, sites=SITES)) as hospital,
    ):
        new = node.url if hosts == "one host" else for_quorum_queues(node.url)
        name_new_broker(hospital, old, new)
        move(hospital)
        assert finish(hospital, old, new) == undisturbed
