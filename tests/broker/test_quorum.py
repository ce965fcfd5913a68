"""Quorum queues settle and return messages otherwise than classic ones: acknowledgements before a close, and order.

A single node has them from a certain version on; here a node of any version has them.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Literal

import pytest

from nightsplit.broker.rabbitmq.broker import RabbitBroker
from nightsplit.broker.topology import SiteQueues, site_queues
from nightsplit.shared.errors import BrokerError
from nightsplit.shared.transport import Confirmed, Delivery, Link, Queue
from tests.harness.services import RabbitNode, declared_as, for_quorum_queues

pytestmark = pytest.mark.rabbitmq


@pytest.fixture
def broker(rabbitmq: RabbitNode) -> Iterator[RabbitBroker]:
    with declared_as("quorum"):
        yield RabbitBroker(rabbitmq.vhost())


@pytest.fixture
def queues(broker: RabbitBroker) -> SiteQueues:
    queues = site_queues("run", "site", 2**30)
    broker.declare(queues)
    return queues


def fetch(link: Link, count: int) -> list[Delivery]:
    """The next deliveries; nothing else may come before them."""
    events = [link.receive(20) for _ in range(count)]
    deliveries = [event for event in events if isinstance(event, Delivery)]
    assert deliveries == events
    return deliveries


def store(broker: RabbitBroker, queue: Queue, count: int) -> list[str]:
    """Publish so many messages, and wait for their confirms; their ids."""
    names = [f"m{number}" for number in range(count)]
    with broker.link([], 1, "publisher") as link:
        for name in names:
            link.publish(queue, name, [b"body"])
        assert {link.receive(20) for _ in names} == {Confirmed(name) for name in names}
    return names


def test_acknowledgements_right_before_closing_are_settled(broker: RabbitBroker, queues: SiteQueues) -> None:
    for _ in range(5):
        store(broker, queues.up, 200)
        with broker.link([queues.up], 300, "server") as link:
            for delivery in fetch(link, 200):
                link.acknowledge(delivery)
        assert broker.depth(queues.up) == 0


def test_acknowledgements_right_before_a_larger_prefetch_are_settled(broker: RabbitBroker, queues: SiteQueues) -> None:
    store(broker, queues.up, 201)
    with broker.link([queues.up], 200, "server") as link:
        for delivery in fetch(link, 200):
            link.acknowledge(delivery)
        link.raise_prefetch(300)
        # The last one may come on the old connection, and again on the new one.
        assert {delivery.message_id for delivery in fetch(link, 1)} == {"m200"}
        for event in iter(partial(link.receive, 1.0), None):
            assert not isinstance(event, Delivery) or event.message_id == "m200"


def test_acknowledgements_are_settled_around_what_is_kept(broker: RabbitBroker, queues: SiteQueues) -> None:
    """Unacknowledged ones come again in order, and before what the first consumer never saw; a standby waits."""
    names = store(broker, queues.up, 210)
    with broker.link([queues.up], 200, "server") as link:
        held = fetch(link, 200)
        second = broker.link([queues.up], 300, "standby")
        for delivery in held[::2]:
            link.acknowledge(delivery)
    with second:
        assert [delivery.message_id for delivery in fetch(second, 110)] == names[1:200:2] + names[200:]


def test_a_smaller_prefetch_turns_the_order_round(broker: RabbitBroker, queues: SiteQueues) -> None:
    """The price of a return behind others; `Engine._make_room` is for this. With the same prefetch, order is kept."""
    names = store(broker, queues.up, 12)
    for prefetch, first in ((8, 0), (8, 0), (3, 0), (8, 3)):
        with broker.link([queues.up], prefetch, "server") as link:
            assert [delivery.message_id for delivery in fetch(link, 1)] == [names[first]]
    with broker.link([queues.up], 12, "server") as link:
        assert [delivery.message_id for delivery in fetch(link, 12)] == names[3:8] + names[:3] + names[8:]


def type_of(broker: RabbitBroker, queue: Queue, node: RabbitNode) -> str:
    """The type of a queue, as the node tells it."""
    vhost = broker._addresses[0].virtual_host
    told = node.ctl("list_queues", "-p", vhost, "name", "type")
    return dict(line.split("\t") for line in told.splitlines())[queue.name]


@pytest.mark.parametrize(("before", "after"), [("classic", "quorum"), ("quorum", "classic")])
def test_a_queue_keeps_its_type_at_a_single_node(
    rabbitmq: RabbitNode, before: Literal["classic", "quorum"], after: Literal["classic", "quorum"]
) -> None:
    """A node or a nightsplit that was upgraded goes on with the queues that are there; limits are still compared."""
    broker, (up, down, dead) = RabbitBroker(rabbitmq.vhost()), site_queues("run", "site", 2**20)
    with declared_as(before):
        broker.declare([up, down])
    store(broker, up, 3)
    with declared_as(after):
        broker.declare([up, down, dead])
        assert [type_of(broker, queue, rabbitmq) for queue in (up, down, dead)] == [before, before, after]
        with pytest.raises(BrokerError, match=r"E204 .*x-max-length-bytes"):
            broker.declare(site_queues("run", "site", 2**21))
    with broker.link([up], 3, "server") as link:
        for delivery in fetch(link, 3):
            link.acknowledge(delivery)
    assert broker.depth(up) == 0


def test_a_queue_of_a_cluster_is_replicated_or_refused(rabbitmq: RabbitNode) -> None:
    url, queues = rabbitmq.vhost(), site_queues("run", "site", 2**20)
    with declared_as("classic"):
        RabbitBroker(url).declare(queues)
    with pytest.raises(BrokerError, match=r"E204 .*x-queue-type"):
        RabbitBroker(for_quorum_queues(url)).declare(queues)
