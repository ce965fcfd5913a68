"""Messages of real workers that are damaged or lost at their broker: each is sent again, and the model is the same."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from nightsplit.broker.connect import open_broker
from nightsplit.broker.topology import site_queues
from nightsplit.console.exit_log import verify_log
from nightsplit.console.worker_file import WorkerFile
from nightsplit.server_worker.worker import ServerWorker
from nightsplit.shared.transport import Confirmed, Delivery, Queue
from nightsplit.site_worker.trust.exit_log import FILE, read_log
from nightsplit.site_worker.worker import SiteWorker
from tests.harness.services import RabbitNode
from tests.harness.workers import SHARES, Hospital

IDLE_S = 0.5
SITE = "north"

Tamper = Callable[[list[bytes]], list[bytes]]


def flipped(body: bytes) -> bytes:
    """A body with one bit changed in its header, or in its envelope."""
    return body[:5] + bytes([body[5] ^ 1]) + body[6:]


TAMPERS: dict[str, Tamper] = {
    "damaged": lambda bodies: [flipped(body) if n in (0, len(bodies) // 2) else body for n, body in enumerate(bodies)],
    "purged": lambda bodies: [],
}


@pytest.fixture(params=["embedded", pytest.param("rabbitmq", marks=pytest.mark.rabbitmq)])
def address(request: pytest.FixtureRequest) -> str:
    if request.param == "embedded":
        return "embedded:broker"
    node: RabbitNode = request.getfixturevalue("rabbitmq")
    return node.vhost()


def tamper(hospital: Hospital, queue: Queue, change: Tamper) -> None:
    """Exchange all messages of a queue that nobody reads."""
    server = ServerWorker(hospital.folder / "server.toml")
    broker = open_broker(server.config.broker, server.base, server.run_config.wire.message_bytes, server.credentials)
    found: list[Delivery] = []
    with broker.link([queue], 512, "a thief") as link:
        while isinstance(event := link.receive(IDLE_S), Delivery):
            found.append(event)
            link.acknowledge(event)
    with broker.link([], 512, "a thief") as link:
        for number, body in enumerate(change([delivery.body for delivery in found])):
            link.publish(queue, str(number), [body])
            assert isinstance(link.receive(20), Confirmed)


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("protocol", "what"),
    [("split_labels", "damaged"), ("split_labels", "purged"), ("fedavg_transfer", "purged")],
)
def test_nothing_is_lost(protocol: str, what: str, address: str, tmp_path: Path) -> None:
    hospital = Hospital(tmp_path / "run", broker=address, protocol=protocol, epochs=2)
    queues = site_queues("lipids", SITE, ServerWorker(hospital.folder / "server.toml").run_config.wire.queue_bytes)
    ServerWorker(hospital.folder / "server.toml").open_run()
    for site in SHARES:
        SiteWorker(hospital.folder / f"{site}.toml").work(IDLE_S)
    tamper(hospital, queues.up, TAMPERS[what])
    ServerWorker(hospital.folder / "server.toml").work(IDLE_S)
    SiteWorker(hospital.folder / f"{SITE}.toml").work(IDLE_S)
    ServerWorker(hospital.folder / "server.toml").work(IDLE_S)
    tamper(hospital, queues.down, TAMPERS[what])
    assert hospital.in_peace() == Hospital(tmp_path / "calm", protocol=protocol, epochs=2).in_peace()
    check_exit_log(hospital)


def check_exit_log(hospital: Hospital) -> None:
    """What left a second time has a second line, and the chain is whole."""
    verify_log(WorkerFile(hospital.folder / f"{SITE}.toml"))
    log = hospital.folder / "state" / SITE / FILE
    lines = Counter((line["kind"], line["seq"]) for line in read_log(log) if line.get("seq"))
    assert max(lines.values()) > 1, lines
