"""What only a real RabbitMQ node can show: it dies, blocks, refuses, and closes channels in silence."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest
import torch

from nightsplit.broker.rabbitmq import broker as rabbitmq
from nightsplit.broker.rabbitmq import connection as rabbitmq_connection
from nightsplit.broker.rabbitmq.broker import RabbitBroker
from nightsplit.broker.topology import SiteQueues, site_queues
from nightsplit.shared.errors import BrokerError, MissingRightError
from nightsplit.shared.transport import Blocked, Confirmed, Delivery, Event, Link, Queue, Unblocked
from tests.harness.services import RabbitNode, declared_as, free_port, wait_until

pytestmark = pytest.mark.rabbitmq


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RabbitNode]:
    """A node that these tests may kill and strangle."""
    with RabbitNode(tmp_path_factory.mktemp("node")) as node:
        yield node


@pytest.fixture
def broker(node: RabbitNode) -> RabbitBroker:
    node.start()  # an earlier test may have left it dead
    return RabbitBroker(node.vhost())


@pytest.fixture
def queues(broker: RabbitBroker) -> SiteQueues:
    queues = site_queues("run", "site", 2**30)
    broker.declare(queues)
    return queues


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    left = [thread.name for thread in threading.enumerate() if thread not in before and thread.name[:3] == "rab"]
    assert not left


def collect(link: Link, done: Callable[[list[Event]], bool], patience: float = 20.0) -> list[Event]:
    events: list[Event] = []
    deadline = time.monotonic() + patience
    while not done(events):
        assert time.monotonic() < deadline, f"still waiting, with {events}"
        event = link.receive(0.2)
        if event is not None:
            events.append(event)
    return events


def ids(events: list[Event]) -> list[str]:
    return [event.message_id for event in events if isinstance(event, Delivery)]


def confirmed(events: list[Event]) -> set[str]:
    return {event.message_id for event in events if isinstance(event, Confirmed)}


def kinds(events: list[Event]) -> list[type]:
    return [type(event) for event in events]


def recovered(events: list[Event]) -> bool:
    return Unblocked in kinds(events)


def publish_all(broker: RabbitBroker, queue: Queue, names: list[str]) -> None:
    with broker.link([], 1, "publisher") as link:
        for name in names:
            link.publish(queue, name, [b"body"])
        collect(link, lambda events: confirmed(events) == set(names))


def replace_by_quorum(broker: RabbitBroker, queue: Queue) -> None:
    """Replace a queue by a quorum queue, of which the only copy is on this node."""
    broker.delete([queue])
    with declared_as("quorum"):
        broker.declare([queue])


def number_of(call: Callable[[], object]) -> int:
    with pytest.raises(BrokerError) as refusal:
        call()
    assert "Fix: " in str(refusal.value)
    assert refusal.value.__cause__ is None
    return refusal.value.number


# What cannot be mended


def test_a_wrong_password(node: RabbitNode) -> None:
    broker = RabbitBroker(node.url.replace(":guest@", ":secret@"))
    with pytest.raises(BrokerError) as refusal:
        broker.declare([])
    assert refusal.value.number == 202
    assert "Login was refused" in str(refusal.value)
    assert "secret" not in str(refusal.value)
    assert number_of(lambda: broker.link([], 1, "site")) == 202


def test_a_virtual_host_that_does_not_exist(node: RabbitNode) -> None:
    broker = RabbitBroker(node.url.replace("%2F", "nowhere"))
    assert number_of(lambda: broker.declare([])) == 202
    assert number_of(lambda: broker.link([], 1, "site")) == 202


def test_a_user_without_permission(node: RabbitNode, broker: RabbitBroker, queues: SiteQueues) -> None:
    node.ctl("eval", 'rabbit_auth_backend_internal:add_user(<<"mute">>, <<"mute">>, <<"test">>).')
    vhost = broker._addresses[0].virtual_host
    node.ctl("set_permissions", "-p", vhost, "mute", "^$", "^$", "^$")
    mute = RabbitBroker(f"amqp://mute:mute@127.0.0.1:{node.port}/{vhost}")
    for call, resource in (
        (lambda: mute.declare(queues), f"exchange '{queues.up.exchange}'"),
        (lambda: mute.link([queues.up], 1, "server"), f"queue '{queues.up.name}'"),
    ):
        with pytest.raises(
            MissingRightError, match=f"the user lacks the (configure |read )?right on {resource}"
        ) as refusal:
            call()
        assert refusal.value.number == 202
    with mute.link([], 1, "site") as link:
        link.publish(queues.up, "m", [b"x"])
        assert number_of(lambda: collect(link, lambda events: False)) == 202


def test_nobody_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rabbitmq, "FIRST_CONNECTION_S", 1.0)
    broker = RabbitBroker(f"amqp://guest:guest@127.0.0.1:{free_port()}/")
    for call in (lambda: broker.declare([]), lambda: broker.link([], 1, "site")):
        start = time.monotonic()
        assert number_of(call) == 201
        assert 0.9 < time.monotonic() - start < 4.0


def test_a_host_that_does_not_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rabbitmq, "FIRST_CONNECTION_S", 1.0)
    broker = RabbitBroker("amqps://guest:guest@no.such.host.invalid/")
    assert number_of(lambda: broker.declare([])) == 201
    assert number_of(lambda: broker.link([], 1, "site")) == 201


def test_somebody_listens_and_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rabbitmq, "FIRST_CONNECTION_S", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as mute:
        broker = RabbitBroker(f"amqp://guest:guest@127.0.0.1:{mute.getsockname()[1]}/")
        start = time.monotonic()
        assert number_of(lambda: broker.link([], 1, "site")) == 201
        assert time.monotonic() - start < 4


def test_a_queue_that_vanishes_under_its_consumer(broker: RabbitBroker, queues: SiteQueues) -> None:
    with broker.link([queues.up], 1, "server") as link:
        broker.delete(queues)
        assert number_of(lambda: collect(link, lambda events: False)) == 205


def test_a_message_that_the_broker_finds_too_large(node: RabbitNode, broker: RabbitBroker, queues: SiteQueues) -> None:
    node.ctl(
        "eval",
        "persistent_term:put(max_message_size, 1000), application:set_env(rabbit, max_message_size, 1000).",
    )
    try:
        with broker.link([], 1, "site") as link:
            link.publish(queues.up, "m", [bytes(2000)])
            assert number_of(lambda: collect(link, lambda events: False)) == 203
    finally:
        node.ctl(
            "eval",
            "persistent_term:put(max_message_size, 134217728),"
            " application:set_env(rabbit, max_message_size, 134217728).",
        )


# What passes


@pytest.mark.campaign
def test_heartbeats_go_on_while_the_worker_computes(node: RabbitNode) -> None:
    """A step of five heartbeats, half of it torch and half of it Python that holds the interpreter."""
    broker = RabbitBroker(node.vhost(), heartbeat=2)
    queues = site_queues("run", "site", 2**30)
    broker.declare(queues)
    publish_all(broker, queues.up, ["before"])
    with broker.link([queues.up], 1, "server") as link:
        (delivery,) = collect(link, lambda events: len(events) == 1)
        assert isinstance(delivery, Delivery)
        convolution = torch.nn.Conv2d(16, 32, 3)
        end = time.monotonic() + 11
        while time.monotonic() < end:
            convolution(torch.zeros(8, 16, 64, 64)).sum().backward()
            sum(number * number for number in range(100_000))
        link.publish(queues.down, "after", [b"gradient"])
        assert collect(link, lambda events: len(events) == 1) == [Confirmed("after")]
        link.acknowledge(delivery)
        assert link.receive(0.5) is None
    assert broker.depth(queues.up) == 0


def test_a_node_killed_while_a_site_publishes(node: RabbitNode, broker: RabbitBroker, queues: SiteQueues) -> None:
    """Nothing confirmed is lost, and what was not confirmed is sent again by the link."""
    names = [f"m{number:03}" for number in range(300)]
    window, body = 16, bytes(50_000)
    events: list[Event] = []
    killer = threading.Thread(target=node.restart)
    with broker.link([], 1, "site") as link:
        for number, name in enumerate(names):
            link.publish(queues.up, name, [body])
            while len(link.unconfirmed) >= window:
                events += collect(link, lambda found: len(found) == 1, patience=60)
            if number == 100:
                killer.start()
        events += collect(link, lambda found: not link.unconfirmed, patience=60)
        killer.join()
        assert confirmed(events) == set(names)
        assert [kind for kind in kinds(events) if kind is not Confirmed][:2] == [Blocked, Unblocked]
    with broker.link([queues.up], 1000, "server") as link:
        arrived = ids(collect(link, lambda found: set(ids(found)) == set(names), patience=60))
        # Duplicates are normal; nobody may find a message before its predecessor, though.
        assert list(dict.fromkeys(arrived)) == names


def test_a_node_killed_under_a_consumer(node: RabbitNode, broker: RabbitBroker, queues: SiteQueues) -> None:
    """Deliveries of the old connection are void, wherever they are; they come again in order."""
    names = [f"m{number}" for number in range(8)]
    publish_all(broker, queues.up, names)
    with broker.link([queues.up], 4, "server") as link:
        old = collect(link, lambda events: len(events) == 2)  # two more wait in the inbox
        time.sleep(0.3)
        node.restart()
        events = collect(link, recovered)
        assert kinds(events)[0] is Blocked
        for event in old:
            assert isinstance(event, Delivery)
            link.acknowledge(event)
        again: list[Event] = [event for event in events if isinstance(event, Delivery)]
        again += collect(link, lambda found: len(ids(again + found)) == 4)
        assert ids(again) == names[:4]
        for event in again:
            assert isinstance(event, Delivery)
            link.acknowledge(event)
        assert ids(collect(link, lambda found: len(found) == 4)) == names[4:]


def test_a_connection_closed_by_an_operator(node: RabbitNode, broker: RabbitBroker, queues: SiteQueues) -> None:
    publish_all(broker, queues.up, ["a", "b"])
    with broker.link([queues.up], 2, "server") as link:
        collect(link, lambda events: len(events) == 2)
        node.ctl("close_all_connections", "--vhost", broker._addresses[0].virtual_host, "maintenance")
        events = collect(link, lambda events: recovered(events) and len(ids(events)) == 2)
        assert ids(events) == ["a", "b"]
        reasons = [event.reason for event in events if isinstance(event, Blocked)]
        assert any("maintenance" in reason for reason in reasons)
        link.publish(queues.up, "c", [b""])
        collect(link, lambda events: confirmed(events) == {"c"})


def test_a_late_acknowledgement(node: RabbitNode, broker: RabbitBroker, queues: SiteQueues) -> None:
    """The broker closes the channel alone, or cancels the consumer: the connection stays, and pika raises nothing."""
    replace_by_quorum(broker, queues.up)  # from RabbitMQ 4.3 on no other queue has a consumer timeout
    node.ctl("eval", "application:set_env(rabbit, consumer_timeout, 1000).")
    try:
        publish_all(broker, queues.up, ["m"])
        with broker.link([queues.up], 1, "server") as link:
            (first,) = collect(link, lambda events: len(events) == 1)
            if node.version < (4, 3):  # each channel looks once a minute; this is that minute
                time.sleep(1.5)
                node.ctl("eval", "[Channel ! tick || Channel <- rabbit_channel:list()].")
            events = collect(link, lambda events: recovered(events) and ids(events) == ["m"])
            assert kinds(events)[0] is Blocked
            assert "acknowledgement" in next(event.reason for event in events if isinstance(event, Blocked))
            assert isinstance(first, Delivery)
            link.acknowledge(first)  # void: must not disturb the new channel
            link.acknowledge(next(event for event in events if isinstance(event, Delivery)))
            assert link.receive(0.5) is None
    finally:
        node.ctl("eval", "application:set_env(rabbit, consumer_timeout, 1800000).")
    assert broker.depth(queues.up) == 0


def test_a_memory_alarm(node: RabbitNode, broker: RabbitBroker, queues: SiteQueues) -> None:
    """Publisher waits; deliveries and acknowledgements on the other connection go on."""
    publish_all(broker, queues.down, ["a", "b"])
    node.ctl("set_vm_memory_high_watermark", "0.0001")
    try:
        with broker.link([queues.down], 1, "site") as link:
            link.publish(queues.up, "1", [b"x"])
            link.publish(queues.up, "2", [b"x"])
            events = collect(link, lambda events: Blocked in kinds(events) and ids(events) == ["a"])
            assert "alarm" in next(event.reason for event in events if isinstance(event, Blocked))
            link.acknowledge(next(event for event in events if isinstance(event, Delivery)))
            assert ids(collect(link, lambda events: len(events) == 1)) == ["b"]
            assert link.unconfirmed == {"1", "2"}
            node.ctl("set_vm_memory_high_watermark", "0.4")
            events = collect(link, lambda events: len(events) == 3)
            assert recovered(events)
            assert confirmed(events) == {"1", "2"}
    finally:
        node.ctl("set_vm_memory_high_watermark", "0.4")


def test_a_full_queue_does_not_hold_up_another(broker: RabbitBroker) -> None:
    queues = site_queues("run", "site", 1_000)
    broker.declare(queues)
    with broker.link([], 1, "site") as link:
        events: list[Event] = []
        for name in ("first", "second", "third"):  # one by one: a quorum queue may accept all that come together
            if Blocked not in kinds(events):
                link.publish(queues.up, name, [bytes(999)])
                events += collect(link, lambda found: len(found) == 1)
        waits = link.unconfirmed
        link.publish(queues.down, "other", [b"y"])
        collect(link, lambda events: "other" in confirmed(events))
        assert waits
        assert link.unconfirmed == waits


# Closing


def test_closing_while_the_broker_is_away(node: RabbitNode, broker: RabbitBroker, queues: SiteQueues) -> None:
    link = broker.link([queues.up], 1, "server")
    node.kill()
    link.publish(queues.up, "m", [b"x"])
    assert kinds(collect(link, lambda events: len(events) == 1)) == [Blocked]
    start = time.monotonic()
    link.close()
    assert time.monotonic() - start < 4
    assert link.unconfirmed == {"m"}


def test_closing_while_the_broker_does_not_read(node: RabbitNode, broker: RabbitBroker, queues: SiteQueues) -> None:
    node.ctl("set_vm_memory_high_watermark", "0.0001")
    try:
        with broker.link([], 1, "site") as link:
            link.publish(queues.up, "m", [b"x"])
            collect(link, lambda events: Blocked in kinds(events))
            start = time.monotonic()
            link.close()
            assert time.monotonic() - start < 4
    finally:
        node.ctl("set_vm_memory_high_watermark", "0.4")


def test_a_standby_receives_first_what_the_first_had_in_hand(broker: RabbitBroker, queues: SiteQueues) -> None:
    """Also where the broker wakes the standby as soon as a consumer is cancelled, as quorum queues do."""
    replace_by_quorum(broker, queues.up)
    names = [f"m{number}" for number in range(8)]
    publish_all(broker, queues.up, names)
    first = broker.link([queues.up], 2, "server-1")
    collect(first, lambda events: len(events) == 2)
    with broker.link([queues.up], 3, "server-2") as second:
        first.close()
        assert ids(collect(second, lambda events: len(events) == 3)) == names[:3]


def test_the_broker_sees_who_is_connected(node: RabbitNode, broker: RabbitBroker, queues: SiteQueues) -> None:
    def names() -> str:
        return node.ctl("list_connections", "client_properties")

    with broker.link([queues.up], 1, "site-a"):
        assert "nightsplit site-a publishing" in names()
        assert "nightsplit site-a consuming" in names()
        assert "site-a" in node.ctl("list_consumers", "-p", broker._addresses[0].virtual_host, "consumer_tag")
    wait_until(lambda: "site-a" not in names(), 10, "the broker to see the link closed")


# Settings


def test_pika_reads_a_frame_at_a_time() -> None:
    RabbitBroker("amqp://localhost")
    transport = rabbitmq_connection.io_services_utils._AsyncTransportBase
    assert transport._MAX_RECV_BYTES == 131072, "pika has changed: see whether it still reads 4 KB at a time"
