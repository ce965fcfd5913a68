"""Attack A11 over a real RabbitMQ: a site that leaves out a number and goes on."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
import torch

from nightsplit.broker.rabbitmq.broker import RabbitBroker
from nightsplit.broker.topology import site_queues
from nightsplit.shared.engine.engine import Engine
from nightsplit.shared.engine.fencing import SoleWriter
from nightsplit.shared.engine.inbox import INBOX_BYTES
from nightsplit.shared.engine.mailbox import Mailbox
from nightsplit.shared.storage.checkpoint import Checkpoints
from nightsplit.shared.transport import Route
from nightsplit.shared.wire import format as wire
from nightsplit.shared.wire.message import SERVER, Header, Kind, Message
from nightsplit.shared.wire.schema import Payload, Reveals, ScalarSpec, TensorSpec, contract
from tests.engine.test_engine import Diary
from tests.harness.services import RabbitNode

MIB = 2**20
NUMBER = 1000
CONTRACT = contract(
    Payload(
        Kind.SMASHED, {"content": TensorSpec(torch.uint8, ("bytes",), reveals=Reveals.NOTHING)},
        {"value": ScalarSpec(int, Reveals.COUNTS)},
    ),
    Payload(Kind.NOTED), Payload(Kind.FINISH),
)  # fmt: skip


class Reader(Diary):
    def payload(self, kind):
        return CONTRACT.get(kind)


def resident_mib() -> float:
    """Memory of this process."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.partition("VmRSS:")[2].split()[0]) / 1024


@pytest.mark.campaign
@pytest.mark.rabbitmq
@pytest.mark.timeout(600)
def test_a11_a_gib_behind_a_missing_message(rabbitmq: RabbitNode, tmp_path: Path) -> None:
    """The server's memory stays bounded; when the missing message comes, each is applied once, in its turn."""
    broker, queues = RabbitBroker(rabbitmq.vhost()), site_queues("run", "a", 4 * 2**30)
    broker.declare(queues)

    content = torch.zeros(MIB, dtype=torch.uint8)

    def publish(numbers) -> None:
        with broker.link([], 1, "a") as link:
            for seq in numbers:
                header = Header("run", "a", SERVER, Kind.SMASHED, seq)
                message = Message(header, {"content": content}, {"value": seq + 100})
                body = b"".join(wire.encode(message, CONTRACT[Kind.SMASHED], 2 * MIB))
                link.publish(queues.up, message.header.message_id, [body])
                while link.unconfirmed:
                    link.receive(1)

    role = Reader()
    with broker.link([queues.up], 128, "server") as link:  # as `prefetch_for` chooses it for such messages
        routes = {"a": Route(outgoing=queues.down, incoming=queues.up, dead=queues.dead)}
        mailbox = Mailbox("run", SERVER, link, routes, role.payload, 16 * MIB)
        engine = Engine(role, mailbox, Checkpoints(tmp_path), SoleWriter())
        engine.start()
        before, most = resident_mib(), 0.0
        site = threading.Thread(target=publish, args=[range(2, NUMBER + 1)], daemon=True)
        site.start()
        while site.is_alive() or len(engine._inbox["a"]) < NUMBER - 1:
            engine.step(0.1)
            assert not engine.counters.counts["refused"]
            most = max(most, resident_mib())
        quiet = time.monotonic() + 5
        while time.monotonic() < quiet:
            engine.step(0.1)
            most = max(most, resident_mib())
        gained = most - before
        publish([1])
        while len(role.applied) < NUMBER:
            engine.step(0.1)
            most = max(most, resident_mib())
        assert [value for _, value in role.applied] == [seq + 100 for seq in range(1, NUMBER + 1)]
    print(f"memory: {gained:+.0f} MiB while the message was missing, {most - before:+.0f} MiB at most")
    assert most - before < INBOX_BYTES / MIB + 128
