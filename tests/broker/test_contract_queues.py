"""One suite for every broker: what `nightsplit.shared.transport` promises of queues and of those who consume them."""

from __future__ import annotations

import contextlib
import time

import pytest

from nightsplit.broker.topology import SiteQueues, site_queues
from nightsplit.shared.errors import BrokerError
from nightsplit.shared.transport import Broker, Queue
from tests.harness.events import LIMIT, PATIENCE_S, collect, confirmed, deliveries, ids, names, publish_all, quiet
from tests.harness.services import wait_until


def test_publishing_to_a_missing_queue(broker: Broker, queues: SiteQueues) -> None:
    for missing in (
        Queue("nightsplit.run.nobody.up", "nightsplit.run.nobody", "up", None, None),  # no exchange either
        Queue("nightsplit.run.site.aside", queues.up.exchange, "aside", None, None),
    ):
        with broker.link([], 1, "site") as link, pytest.raises(BrokerError, match="E205"):  # noqa: PT012
            link.publish(missing, "m", [b"x"])
            collect(link, lambda events: bool(confirmed(events)))


def test_consuming_a_missing_queue(broker: Broker) -> None:
    def consume() -> None:
        with broker.link([site_queues("run", "nobody", LIMIT).up], 1, "server") as link:
            link.receive(2.0)

    with pytest.raises(BrokerError, match="E205"):
        consume()


def test_declaring_twice_keeps_what_is_there(broker: Broker, queues: SiteQueues) -> None:
    publish_all(broker, queues.up, ["m"])
    broker.declare(queues)
    assert broker.depth(queues.up) == 1


def test_declaring_with_another_limit_is_refused(broker: Broker, queues: SiteQueues) -> None:
    with pytest.raises(BrokerError) as refusal:
        broker.declare(site_queues("run", "site", LIMIT + 1))
    assert refusal.value.number == 204


def test_nothing_to_receive(broker: Broker, queues: SiteQueues) -> None:
    with broker.link([queues.up], 1, "server") as link:
        for timeout, most in ((0.0, 0.5), (0.2, 1.0)):
            start = time.monotonic()
            assert link.receive(timeout) is None
            assert time.monotonic() - start < most


def test_a_second_owner_waits_and_takes_over(broker: Broker, queues: SiteQueues) -> None:
    publish_all(broker, queues.up, names(8))
    with contextlib.ExitStack() as later:
        with broker.link([queues.up], 2, "server-1") as first:
            held = deliveries(first, 2)
            second = later.enter_context(broker.link([queues.up], 4, "server-2"))
            assert quiet(second)
            first.acknowledge(held[0])
            assert ids(deliveries(first, 1)) == ["m2"]
            assert quiet(second)
        # What the first had in hand comes before what it never saw.
        assert ids(deliveries(second, 4)) == ["m1", "m2", "m3", "m4"]


def test_the_same_owner_takes_over(broker: Broker, queues: SiteQueues) -> None:
    publish_all(broker, queues.up, names(3))
    broker.link([queues.up], 2, "server").close()
    with broker.link([queues.up], 3, "server") as link:
        assert ids(deliveries(link, 3)) == names(3)


def test_depth(broker: Broker, queues: SiteQueues) -> None:
    assert broker.depth(queues.up) == 0
    publish_all(broker, queues.up, names(3))
    assert broker.depth(queues.up) == 3
    assert broker.depth(queues.down) == 0
    assert broker.depth(site_queues("run", "nobody", LIMIT).up) is None


def test_a_consumer_is_seen_at_its_own_queue_alone(broker: Broker, queues: SiteQueues) -> None:
    publish_all(broker, queues.up, names(3))
    assert not broker.is_consumed(queues.up)
    with broker.link([queues.up], 2, "server") as link:
        deliveries(link, 2)
        wait_until(lambda: broker.is_consumed(queues.up), PATIENCE_S, "the consumer to be seen")
        assert not broker.is_consumed(queues.down)
    wait_until(lambda: not broker.is_consumed(queues.up), PATIENCE_S, "the consumer to be gone")
    assert broker.depth(queues.up) == 3  # at once: it counts what the consumer had
    assert not broker.is_consumed(site_queues("run", "nobody", LIMIT).up)


def test_delete(broker: Broker, queues: SiteQueues) -> None:
    publish_all(broker, queues.up, names(3))
    broker.delete(queues)
    assert broker.depth(queues.up) is None
    broker.delete(queues)
    broker.declare(site_queues("run", "site", LIMIT + 1))
    assert broker.depth(queues.up) == 0


def test_deleting_one_queue_leaves_the_others(broker: Broker, queues: SiteQueues) -> None:
    broker.delete([queues.dead])
    publish_all(broker, queues.up, ["m"])
    assert broker.depth(queues.up) == 1


def test_closing_twice(broker: Broker, queues: SiteQueues) -> None:
    link = broker.link([queues.up], 1, "server")
    link.close()
    link.close()
