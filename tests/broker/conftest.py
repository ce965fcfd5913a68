"""Every broker of the contract, which `test_contract.py` and `test_contract_queues.py` hold it to."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from nightsplit.broker.embedded.broker import EmbeddedBroker
from nightsplit.broker.rabbitmq import connection as rabbitmq_connection
from nightsplit.broker.rabbitmq.broker import RabbitBroker
from nightsplit.broker.topology import SiteQueues, site_queues
from nightsplit.shared.transport import Broker
from nightsplit.simulation.broker import MemoryBroker
from nightsplit.simulation.faults import Faults, FaultyBroker
from tests.harness.events import LIMIT
from tests.harness.services import declared_as, for_quorum_queues

# Most of it is the same three times; what differs is in test_quorum.py, too, and always tested.
RABBITMQ = [pytest.param("classic", marks=pytest.mark.rabbitmq)]
RABBITMQ += [pytest.param(kind, marks=[pytest.mark.rabbitmq, pytest.mark.campaign]) for kind in ("quorum", "cluster")]


@pytest.fixture(params=["memory", "embedded", "faulty", *RABBITMQ])
def broker(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Broker]:
    if request.param == "memory":
        yield MemoryBroker()
    elif request.param == "embedded":
        yield EmbeddedBroker(tmp_path / "broker")
    elif request.param == "faulty":
        yield FaultyBroker(MemoryBroker(), Faults(), seed=0)  # bad lines that happen to be good
    elif request.param == "cluster":
        monkeypatch.setattr(rabbitmq_connection, "QUEUE_MISSING_S_MAX", 1.0)  # how long a cluster waits for a queue
        yield RabbitBroker(for_quorum_queues(request.getfixturevalue("rabbitmq").vhost()))
    else:
        with declared_as(request.param):
            yield RabbitBroker(request.getfixturevalue("rabbitmq").vhost())


@pytest.fixture
def queues(broker: Broker) -> SiteQueues:
    queues = site_queues("run", "site", LIMIT)
    broker.declare(queues)
    return queues
