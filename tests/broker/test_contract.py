"""One suite for every broker: what `nightsplit.shared.transport` promises of messages, and no more than that."""

from __future__ import annotations

import pytest

from nightsplit.broker.topology import SiteQueues, site_queues
from nightsplit.shared.errors import BrokerError
from nightsplit.shared.transport import Blocked, Broker, Confirmed, Delivery, Event, Unblocked, without_content
from tests.harness.events import LIMIT, collect, confirmed, deliveries, fill, ids, names, publish_all, quiet


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
