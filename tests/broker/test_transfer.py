"""The messages of a queue, moved from one broker to another of every kind."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import pytest

from nightsplit.broker import transfer as module
from nightsplit.broker.embedded.broker import EmbeddedBroker
from nightsplit.broker.rabbitmq.broker import RabbitBroker
from nightsplit.broker.topology import SiteQueues, site_queues
from nightsplit.broker.transfer import BATCH, transfer
from nightsplit.shared.errors import BrokerError
from nightsplit.shared.transport import Broker, Confirmed, Delivery, Queue
from tests.harness.kills import is_killed
from tests.harness.services import RabbitNode, declared_as, for_quorum_queues, wait_until

LIMIT = 2**24
PAIRS = ["embedded to classic", "classic to quorum"]
MORE = [pytest.param(pair, marks=pytest.mark.campaign) for pair in ("classic to embedded", "quorum to classic")]
LEASE_S = 5.0
Message = tuple[str, bytes, dict[str, str]]


@pytest.fixture
def made(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[[str], Broker]]:
    """Makes a broker of a kind."""
    number = count(1)

    def make(kind: str) -> Broker:
        if kind == "embedded":
            return EmbeddedBroker(tmp_path / f"broker{next(number)}", lease_seconds=LEASE_S)
        url = request.getfixturevalue("rabbitmq").vhost()
        return RabbitBroker(url if kind == "classic" else for_quorum_queues(url))

    with declared_as("classic"):
        yield make


@pytest.fixture(params=[*PAIRS, *MORE])
def brokers(request: pytest.FixtureRequest, made: Callable[[str], Broker]) -> tuple[Broker, Broker]:
    """An old broker and a new one, with the queues of a site."""
    old, new = (made(kind) for kind in request.param.split(" to "))
    for broker in (old, new):
        broker.declare(queues())
    return old, new


def queues(limit: int = LIMIT) -> SiteQueues:
    return site_queues("run", "site", limit)


def messages(number: int) -> list[Message]:
    """Small and large ones; every tenth has the id of the others like it, as hellos have."""
    return [
        ("run/site/server/hello/0" if n % 10 == 0 else f"run/site/server/smashed/{n}",
         n.to_bytes(4, "big") + bytes(100_000 if n % 7 == 6 else 1000), {"reason": f"n{n}"})
        for n in range(number)
    ]  # fmt: skip


def put(broker: Broker, queue: Queue, sent: list[Message]) -> None:
    with broker.link([], 1, "publisher") as link:
        for message_id, body, headers in sent:
            link.publish(queue, message_id, [body], headers)
        for _ in sent:
            assert isinstance(link.receive(30.0), Confirmed)


def take(broker: Broker, queue: Queue) -> list[Message]:
    """All messages of a queue that nobody consumes; they stay there."""
    wait_until(lambda: not broker.is_consumed(queue), 30, "the queue to be free")
    number = broker.depth(queue)
    assert number is not None
    found: list[Message] = []
    with broker.link([queue], number + 1, "reader") as link:
        while len(found) < number:
            event = link.receive(30.0)
            assert isinstance(event, Delivery), event
            found.append((event.message_id, event.body, dict(event.headers)))
    return found


def move(queue: Queue, old: Broker, new: Broker) -> list[int]:
    return list(transfer(queue, old, new, "move"))


pytestmark = pytest.mark.rabbitmq


def test_everything_arrives_as_it_was_in_order_and_little_of_it_is_in_memory(brokers: tuple[Broker, Broker]) -> None:
    old, new = brokers
    for queue in queues():
        put(old, queue, messages(5 * BATCH + 3))
    for queue in queues():
        left = 5 * BATCH + 3
        for moved in transfer(queue, old, new, "move"):
            left -= moved
            waiting = old.depth(queue)
            assert waiting is not None
            assert waiting >= left - 2 * BATCH, "it takes no more than two batches ahead"
        assert left == 0
        assert take(old, queue) == []
        assert take(new, queue) == messages(5 * BATCH + 3)
    assert move(queues().up, old, new) == []


def test_the_new_queue_has_the_limit_of_the_run_and_a_full_one_ends_the_transfer(
    made: Callable[[str], Broker], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Messages that a consumer held did not count: when it stands still, the old queue has more than its limit."""
    old, new = made("classic"), made("classic")
    up = queues(limit=40_000).up
    old.declare([up])
    new.declare([up])
    sent = [(f"m{n}", bytes([n]) * 1000, {}) for n in range(60)]
    with old.link([up], 30, "server") as link:
        put(old, up, sent[:30])
        for _ in range(30):
            assert isinstance(link.receive(30.0), Delivery)
        put(old, up, sent[30:])
    monkeypatch.setattr(module, "SILENCE_S_MAX", 2.0)
    with pytest.raises(BrokerError, match=r"E209 .*queue nightsplit.run.site.up is full \(limit: 40000 bytes\)"):
        move(up, old, new)
    arrived = take(new, up)
    assert 20 < len(arrived) < 60
    assert arrived == sent[: len(arrived)]

    with new.link([up], 60, "server") as link:  # a worker at the new broker makes room
        for _ in arrived:
            delivery = link.receive(30.0)
            assert isinstance(delivery, Delivery)
            link.acknowledge(delivery)
    move(up, old, new)
    assert take(old, up) == []
    rest = take(new, up)
    assert rest == sent[60 - len(rest) :]
    assert len(rest) + len(arrived) >= 60, "none is lost"


def without_copies(found: list[Message]) -> list[Message]:
    """The first copy of each, as a receiver sees them."""
    return [message for place, message in enumerate(found) if message not in found[:place]]


@pytest.mark.parametrize(
    "brokers", ["classic to quorum", pytest.param(PAIRS[0], marks=pytest.mark.campaign), *MORE], indirect=True
)
@pytest.mark.parametrize("method", ["publish", "acknowledge"])
def test_a_transfer_that_is_killed_loses_nothing_and_the_next_one_continues(
    brokers: tuple[Broker, Broker], method: str
) -> None:
    (old, new), up, sent = brokers, queues().up, messages(4 * BATCH)
    put(old, up, sent)
    kills = [BATCH + 5, 3]
    for number in kills:
        assert is_killed(lambda: move(up, old, new), method, number)
    arrived, left = take(new, up), take(old, up)
    assert without_copies(arrived + left) == sent
    assert left
    assert arrived
    move(up, old, new)
    arrived = take(new, up)
    assert without_copies(arrived) == sent
    assert len(arrived) <= len(sent) + len(kills) * BATCH
    assert take(old, up) == []


def test_a_quorum_queue_that_has_no_leader_for_a_moment_is_not_empty(rabbitmq: RabbitNode, tmp_path: Path) -> None:
    """After a restart of its node it tells a depth of 0 for a moment; here for two seconds."""
    old, new, up = RabbitBroker(rabbitmq.vhost()), EmbeddedBroker(tmp_path / "broker"), queues().up
    with declared_as("quorum"):
        old.declare([up])
    new.declare([up])
    put(old, up, messages(3))
    member = f"{{'{old._addresses[0].virtual_host}_{up.name}', node()}}"
    again = f"spawn(fun() -> timer:sleep(2000), ra:restart_server(quorum_queues, {member}) end)"
    rabbitmq.ctl("eval", f"ra:stop_server(quorum_queues, {member}), {again}.")
    assert old.depth(up) == 0
    move(up, old, new)
    assert take(new, up) == messages(3)


def test_a_queue_that_is_consumed_is_not_moved(brokers: tuple[Broker, Broker], monkeypatch: pytest.MonkeyPatch) -> None:
    (old, new), up = brokers, queues().up
    monkeypatch.setattr(module, "RELEASE_S_MAX", 0.5)
    put(old, up, messages(3))
    for broker in (old, new):
        with broker.link([up], 1, "worker"):
            wait_until(lambda broker=broker: broker.is_consumed(up), 30, "the worker's link")
            with pytest.raises(BrokerError, match=r"E214 .*has a consumer"):
                move(up, old, new)
    assert take(old, up) == messages(3)
    assert take(new, up) == []


@pytest.mark.parametrize("kind", ["embedded", "classic"])
def test_one_broker_by_two_addresses_is_noticed(
    rabbitmq, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    if kind == "embedded":
        old, new = EmbeddedBroker(tmp_path / "broker"), EmbeddedBroker(tmp_path / "." / "x" / ".." / "broker")
        (tmp_path / "x").mkdir()
    else:
        url = rabbitmq.vhost()
        old, new = RabbitBroker(url), RabbitBroker(url.replace("127.0.0.1", "localhost"))
    up = queues().up
    old.declare([up])
    put(old, up, messages(3))
    with pytest.raises(BrokerError, match=r"E214 .*at the new broker has a consumer.*both files"):
        move(up, old, new)
    assert take(old, up) == messages(3)
