"""One suite for every broker: what `nightsplit.shared.transport` promises, and nothing that only one of them does."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from nightsplit.broker.embedded.broker import EmbeddedBroker
from nightsplit.broker.rabbitmq import connection as rabbitmq_connection
from nightsplit.broker.rabbitmq.broker import RabbitBroker
from nightsplit.broker.topology import SiteQueues, site_queues
from nightsplit.shared.errors import BrokerError
from nightsplit.shared.transport import (
    Blocked,
    Broker,
    Confirmed,
    Delivery,
    Event,
    Link,
    Queue,
    Unblocked,
    without_content,
)
from nightsplit.simulation.broker import MemoryBroker
from nightsplit.simulation.faults import Faults, FaultyBroker
from tests.harness.services import declared_as, for_quorum_queues, wait_until

PATIENCE_S = 10.0
LIMIT = 2**20


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


def collect(link: Link, done: Callable[[list[Event]], bool], patience: float = PATIENCE_S) -> list[Event]:
    """Events until `done`, which gets those so far; fails when they do not come."""
    events: list[Event] = []
    deadline = time.monotonic() + patience
    while not done(events):
        assert time.monotonic() < deadline, f"still waiting, with {[type(event).__name__ for event in events]}"
        event = link.receive(0.2)
        if event is not None:
            events.append(event)
    return events


def deliveries(link: Link, count: int) -> list[Delivery]:
    """The next `count` deliveries; nothing else may arrive between them."""
    events = collect(link, lambda events: len(events) == count)
    assert all(isinstance(event, Delivery) for event in events), events
    return [event for event in events if isinstance(event, Delivery)]


def quiet(link: Link, seconds: float = 0.4) -> bool:
    return link.receive(seconds) is None


def publish_all(broker: Broker, queue: Queue, ids: list[str], body: bytes = b"body") -> None:
    """Publish from a link of its own, and wait for every confirm."""
    with broker.link([], 1, "publisher") as link:
        for message_id in ids:
            link.publish(queue, message_id, [body])
        collect(link, lambda events: confirmed(events) >= set(ids))
        assert link.unconfirmed == frozenset()


def fill(link: Link, queue: Queue, size: int) -> list[Event]:
    """Publish m0, m1... one after another until one is refused: together they may exceed the limit. The events."""
    events: list[Event] = []
    for name in names(20):
        link.publish(queue, name, [bytes(size)])
        events += collect(link, lambda found: len(found) == 1)
        if isinstance(events[-1], Blocked):
            return events
    raise AssertionError("the queue has no limit")


def confirmed(events: list[Event]) -> set[str]:
    return {event.message_id for event in events if isinstance(event, Confirmed)}


def ids(events: Sequence[Event]) -> list[str]:
    return [event.message_id for event in events if isinstance(event, Delivery)]


def names(count: int) -> list[str]:
    return [f"m{number}" for number in range(count)]


def test_order_is_kept(broker: Broker, queues: SiteQueues) -> None:
    publish_all(broker, queues.up, names(50))
    with broker.link([queues.up], 100, "server") as link:
        assert ids(deliveries(link, 50)) == names(50)
        assert quiet(link)


def test_a_worker_receives_what_it_published_to_its_own_queue(broker: Broker, queues: SiteQueues) -> None:
    with broker.link([queues.up], 4, "server") as link:
        link.publish(queues.up, "m", [b"x"])
        events = collect(link, lambda events: len(events) == 2)
    assert confirmed(events) == {"m"}
    assert ids(events) == ["m"]


def test_a_confirmed_message_is_stored(broker: Broker, queues: SiteQueues) -> None:
    with broker.link([], 1, "site") as link:
        link.publish(queues.up, "m", [b"x"])
        collect(link, lambda events: events == [Confirmed("m")])
        assert broker.depth(queues.up) == 1
        assert link.unconfirmed == frozenset()


def test_a_message_survives_as_it_was(broker: Broker, queues: SiteQueues) -> None:
    headers = {"kind": "Smashed", "site": "köln", "empty": ""}
    with broker.link([], 1, "site") as link:
        link.publish(queues.up, "run/site/1", [b"head", memoryview(b"--body--")[2:6], b""], headers)
        collect(link, lambda events: len(events) == 1)
    with broker.link([queues.up], 1, "server") as link:
        (delivery,) = deliveries(link, 1)
    assert delivery.queue == queues.up.name
    assert delivery.message_id == "run/site/1"
    assert delivery.body == b"headbody"
    assert isinstance(delivery.body, bytes)
    assert dict(delivery.headers) == headers
    assert delivery.redelivered is False


def test_pieces_may_be_views_of_wider_items(broker: Broker, queues: SiteQueues) -> None:
    floats = memoryview(bytes(range(16))).cast("f")
    with broker.link([queues.up], 1, "server") as link:
        link.publish(queues.up, "m", [b"", floats, b"end"])
        events = collect(link, lambda events: len(events) == 2)
    assert [event.body for event in events if isinstance(event, Delivery)] == [bytes(range(16)) + b"end"]


def test_large_bodies(broker: Broker, queues: SiteQueues) -> None:
    bodies = {f"m{number}": bytes([number]) * 3_000_000 for number in range(4)}
    with broker.link([queues.down], 4, "site") as link:
        for message_id, body in bodies.items():
            link.publish(queues.down, message_id, [body[:1_000_000], memoryview(body)[1_000_000:]])
        events = collect(link, lambda events: len(events) == 8)
    received = {event.message_id: event.body for event in events if isinstance(event, Delivery)}
    assert received == bodies
    assert confirmed(events) == set(bodies)


def test_an_empty_body(broker: Broker, queues: SiteQueues) -> None:
    publish_all(broker, queues.up, ["m"], b"")
    with broker.link([queues.up], 1, "server") as link:
        assert deliveries(link, 1)[0].body == b""


def test_acknowledged_messages_are_gone(broker: Broker, queues: SiteQueues) -> None:
    publish_all(broker, queues.up, names(6))
    with broker.link([queues.up], 10, "server") as link:
        for delivery in deliveries(link, 6)[:4]:
            link.acknowledge(delivery)
    with broker.link([queues.up], 10, "server") as link:
        assert ids(deliveries(link, 2)) == ["m4", "m5"]
        assert quiet(link)


def test_unacknowledged_messages_return_in_order(broker: Broker, queues: SiteQueues) -> None:
    publish_all(broker, queues.up, names(10))
    with broker.link([queues.up], 4, "server") as link:
        first = deliveries(link, 4)
        link.acknowledge(first[0])
        assert ids(deliveries(link, 1)) == ["m4"]
    with broker.link([queues.up], 20, "server") as link:
        again = deliveries(link, 9)
        assert ids(again) == names(10)[1:]
        assert [delivery.redelivered for delivery in again[:3]] == [True] * 3
        assert quiet(link)


def test_an_acknowledgement_after_another_was_skipped(broker: Broker, queues: SiteQueues) -> None:
    publish_all(broker, queues.up, names(3))
    with broker.link([queues.up], 3, "server") as link:
        link.acknowledge(deliveries(link, 3)[1])
    with broker.link([queues.up], 3, "server") as link:
        assert ids(deliveries(link, 2)) == ["m0", "m2"]


def test_an_acknowledgement_from_an_earlier_link_is_ignored(broker: Broker, queues: SiteQueues) -> None:
    publish_all(broker, queues.up, names(2))
    with broker.link([queues.up], 2, "server") as link:
        old = deliveries(link, 2)
    with broker.link([queues.up], 1, "server") as link:
        assert ids(deliveries(link, 1)) == ["m0"]
        link.acknowledge(old[1])
    with broker.link([queues.up], 2, "server") as link:
        assert set(ids(deliveries(link, 2))) == {"m0", "m1"}  # no order after a smaller prefetch


def test_a_delivery_that_is_given_back_comes_again(broker: Broker, queues: SiteQueues) -> None:
    publish_all(broker, queues.up, names(6))
    with broker.link([queues.up], 3, "server") as link:
        held = deliveries(link, 3)
        assert quiet(link)
        for number in (1, 2):
            link.give_back(without_content(held[number]))
            again = deliveries(link, 1)[0]
            assert (again.message_id, again.body) == (held[number].message_id, held[number].body)
            held[number] = again
        assert quiet(link), "it counts as one"
        link.acknowledge(held[1])
        assert ids(deliveries(link, 1)) == ["m3"]
        stale = held[2]
        link.give_back(held[0])
        assert ids(deliveries(link, 1)) == ["m0"]
    with broker.link([queues.up], 1, "server") as link:
        deliveries(link, 1)
        link.give_back(stale)
        assert quiet(link)
    with broker.link([queues.up], 6, "server") as link:
        assert set(ids(deliveries(link, 5))) == {"m0", "m2", "m3", "m4", "m5"}  # no order after a smaller prefetch


def test_prefetch_holds_for_each_queue(broker: Broker) -> None:
    first, second = site_queues("run", "a", LIMIT), site_queues("run", "b", LIMIT)
    broker.declare([*first, *second])
    publish_all(broker, first.up, [f"a{number}" for number in range(5)])
    publish_all(broker, second.up, [f"b{number}" for number in range(5)])
    with broker.link([first.up, second.up], 2, "server") as link:
        assert link.prefetch == 2
        held = deliveries(link, 4)
        assert sorted(ids(held)) == ["a0", "a1", "b0", "b1"]
        assert quiet(link)
        link.acknowledge(next(delivery for delivery in held if delivery.message_id == "a0"))
        assert ids(deliveries(link, 1)) == ["a2"]
        assert quiet(link)


def test_prefetch_can_be_raised(broker: Broker, queues: SiteQueues) -> None:
    publish_all(broker, queues.up, names(8))
    with broker.link([queues.up], 2, "server") as link:
        link.acknowledge(deliveries(link, 2)[0])
        assert ids(deliveries(link, 1)) == ["m2"]
        link.raise_prefetch(5)
        assert link.prefetch == 5
        # m1 and m2 may come again; then everything up to five unacknowledged ones.
        events = collect(link, lambda events: bool(events) and ids(events)[-1] == "m5")
        assert ids(events)[-3:] == ["m3", "m4", "m5"]
        assert quiet(link)
    with broker.link([queues.up], 10, "server") as link:
        assert ids(deliveries(link, 7)) == names(8)[1:]


def test_a_full_queue_holds_messages_up_and_loses_none(broker: Broker) -> None:
    queues = site_queues("run", "site", 10_000)
    broker.declare(queues)
    with broker.link([], 1, "site") as site:
        before = fill(site, queues.up, 4_000)
        sent = names(len(before) + 4)
        for message_id in sent[len(before) :]:
            site.publish(queues.up, message_id, [b"x" * 4_000])
        while (event := site.receive(1.0)) is not None:
            before.append(event)
        accepted = confirmed(before)
        assert 1 <= len(accepted) < len(sent)
        assert site.unconfirmed == frozenset(sent) - accepted
        assert broker.depth(queues.up) == len(accepted)
        assert [type(event) for event in before if not isinstance(event, Confirmed)] == [Blocked]
        assert queues.up.name in next(event.reason for event in before if isinstance(event, Blocked))

        received: list[str] = []
        after: list[Event] = []
        with broker.link([queues.up], 1, "server") as server:
            while len(received) < len(sent):
                event = server.receive(0.05)
                if isinstance(event, Delivery):
                    received.append(event.message_id)
                    server.acknowledge(event)
                event = site.receive(0.05)
                if event is not None:
                    after.append(event)
        # A confirm may have been settled long before its event is taken here.
        after += collect(site, lambda events: confirmed(after + events) == set(sent) - accepted)
        while not isinstance(after[-1], Unblocked):
            after += collect(site, lambda events: len(events) == 1)
        assert received == sent
        assert quiet(site)


def test_what_was_unconfirmed_at_closing_was_never_sent(broker: Broker) -> None:
    queues = site_queues("run", "site", 1_000)
    broker.declare(queues)
    with broker.link([], 1, "site") as link:
        fill(link, queues.up, 999)
    depth = broker.depth(queues.up)
    assert depth
    with broker.link([queues.up], 10, "server") as server:
        deliveries(server, depth)
        assert quiet(server)


def test_too_large_a_message_is_refused_before_it_is_sent(broker: Broker, queues: SiteQueues) -> None:
    half = bytes(8 * 2**20)  # of at most 16 MiB
    with broker.link([], 1, "site") as link:
        with pytest.raises(BrokerError) as refusal:
            link.publish(queues.down, "big", [half, half, b"x"])
        assert refusal.value.number == 203
        assert link.unconfirmed == frozenset()
        link.publish(queues.down, "small", [b"x"])
        collect(link, lambda events: events == [Confirmed("small")])


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
