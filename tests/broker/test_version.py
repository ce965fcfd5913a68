"""Versions of servers: those that are refused, and those that doctor knows.

RabbitMQ 4.2.6 and 4.3.0 are not at hand: a greeting of 4.3.6 stands for theirs, with another version in it.
"""

from __future__ import annotations

from collections import deque
from functools import partial
from pathlib import Path

import pytest

from nightsplit.broker.rabbitmq import version
from nightsplit.broker.rabbitmq.broker import RabbitBroker
from nightsplit.broker.rabbitmq.version import read_version, version_refused
from nightsplit.broker.topology import site_queues
from nightsplit.console.cli import run
from nightsplit.console.doctor.links import is_supported
from nightsplit.shared.errors import BrokerError
from tests.harness.services import RabbitNode
from tests.harness.workers import Hospital

GREETING = {
    "capabilities": {"publisher_confirms": True, "consumer_cancel_notify": True},
    "cluster_name": "rabbit@centre",
    "platform": "Erlang/OTP 29.1.1",
    "product": "RabbitMQ",
    "version": "4.3.6",
}
"""Greeting of a RabbitMQ 4.3.6."""


@pytest.mark.parametrize(
    ("text", "numbers"), [("4.3.6", (4, 3, 6)), ("4.3.0-rc.2", (4, 3, 0)), ("3.13.7+2", (3, 13, 7)), ("", ())]
)
def test_the_numbers_of_a_version(text: str, numbers: tuple[int, ...]) -> None:
    assert read_version(text) == numbers


@pytest.mark.parametrize(("number", "repaired"), [("4.2.6", "4.2.7"), ("4.3.0", "4.3.1"), ("4.3.0-rc.1", "4.3.1")])
def test_a_version_without_rights_for_sites_is_refused(number: str, repaired: str) -> None:
    refusal = version_refused(GREETING | {"version": number}, "broker.example:5671")
    assert refusal is not None
    assert refusal.number == 213
    assert f"broker.example:5671 runs RabbitMQ {number}" in refusal.sentence
    assert f"RabbitMQ {repaired} or newer" in refusal.remedy


@pytest.mark.parametrize("number", ["3.10.8", "4.2.5", "4.2.7", "4.3.1", "4.3.6", "5.0.0"])
def test_any_other_version_is_accepted(number: str) -> None:
    assert version_refused(GREETING | {"version": number}, "broker") is None


@pytest.mark.parametrize("greeting", [{}, {"product": "LavinMQ", "version": "4.3.0"}])
def test_another_product_is_accepted(greeting: dict[str, str]) -> None:
    assert version_refused(greeting, "broker") is None


SUPPORTED = ["RabbitMQ 3.10.8", "RabbitMQ 3.13.7", "RabbitMQ 4.0.5", "RabbitMQ 4.1.0", "RabbitMQ 4.2.7"]
SUPPORTED += ["RabbitMQ 4.3.1", "RabbitMQ 4.3.6", "Redis 7.0.15", "Redis 8.0.6", "Valkey 8.1.1", "Valkey 9.1.2"]
OTHER = ["RabbitMQ 3.9.27", "RabbitMQ 3.12.1", "RabbitMQ 4.2.6", "RabbitMQ 4.3.0", "RabbitMQ 4.4.0", "RabbitMQ 5.0.0"]
OTHER += ["Redis 6.2.14", "Redis 9.0.0", "Valkey 7.2.5", "LavinMQ 4.0.5", "RabbitMQ None"]


@pytest.mark.parametrize(
    ("server", "known"), [(server, True) for server in SUPPORTED] + [(server, False) for server in OTHER]
)
def test_which_versions_doctor_knows(server: str, known: bool) -> None:
    assert is_supported(*server.split()) is known


@pytest.fixture
def refused(rabbitmq: RabbitNode, monkeypatch: pytest.MonkeyPatch) -> RabbitNode:
    """A node that stands for one of a version that cannot be used."""
    monkeypatch.setattr(version, "UNUSABLE", {rabbitmq.version: "99.0.1"})
    return rabbitmq


@pytest.mark.rabbitmq
def test_queues_of_a_refused_server(refused: RabbitNode) -> None:
    broker, queues = RabbitBroker(refused.vhost()), site_queues("run", "north", 2**20)
    for call in (lambda: broker.declare(queues), lambda: broker.depth(queues.down)):
        with pytest.raises(BrokerError, match=rf"{refused.port} runs RabbitMQ \d.*to RabbitMQ 99.0.1") as refusal:
            call()
        assert refusal.value.number == 213


@pytest.mark.rabbitmq
def test_a_link_to_a_refused_server(rabbitmq: RabbitNode, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one that was open: the server is replaced, or another host of the cluster answers."""
    broker, queues = RabbitBroker(rabbitmq.vhost()), site_queues("run", "north", 2**20)
    broker.declare(queues)
    with broker.link([queues.down], 1, "north") as link:
        monkeypatch.setattr(version, "UNUSABLE", {rabbitmq.version: "99.0.1"})
        rabbitmq.ctl("close_all_connections", "--vhost", broker._addresses[0].virtual_host, "upgrade")
        with pytest.raises(BrokerError, match=f"E213 .*{rabbitmq.port} runs RabbitMQ") as refusal:
            deque(iter(partial(link.receive, 20), None))
        assert refusal.value.__cause__ is None
    with pytest.raises(BrokerError, match="E213 "):
        broker.link([], 1, "north")


@pytest.mark.campaign
@pytest.mark.rabbitmq
def test_no_worker_starts_at_a_refused_server(
    refused: RabbitNode, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Hospital(tmp_path / "run", broker=refused.vhost()).folder
    for command, file in (("open", "server.toml"), ("server", "server.toml"), ("site", "north.toml")):
        assert run([command, str(folder / file)]) == 1
        assert "E213 Version of the broker cannot be used: " in capsys.readouterr().err
