"""Transfer of a queue's messages from one broker to another.

    old broker ──Delivery──▶ batch ──publish──▶ new broker
    old broker ◀─acknowledge─ batch ◀─Confirmed─ new broker      all of the batch, or none

A message is at one of the brokers at any moment, so a transfer that is killed loses nothing, and the next one
continues. The last batch may then be at both; receivers drop the copies by their numbers. A confirm names the id
of a message, which several messages may share: confirms are counted, and not assigned.

The end of a queue is known by its depth, which is exact while no owner consumes the queue. Nothing is published to
the old broker, whose disk may be full.
"""

import time
from collections.abc import Iterator

from nightsplit.shared.errors import BrokerError
from nightsplit.shared.transport import Blocked, Broker, Confirmed, Delivery, Link, Queue

BATCH = 16
"""Messages that are confirmed and acknowledged together; as many more arrive in the meantime."""

SILENCE_S_MAX = 60.0
"""Seconds without any event after which a transfer gives up."""

RELEASE_S_MAX = 15.0
"""Seconds in which a queue has to become free; an embedded one is free 10 s after its consumer was killed."""


def transfer(queue: Queue, old: Broker, new: Broker, owner: str) -> Iterator[int]:
    """Move all messages of `queue`, in order and as they are; yield the size of each batch that has arrived.

    Raises:
        BrokerError: 209 the new broker accepts no messages (the queue is full, say), 214 the queue is in use, or
            the new broker is the old one; others as those of links.
    """
    while waiting := _count(old, queue, owner):
        with old.link([queue], 2 * BATCH, owner) as source, new.link([], 1, owner) as target:
            if new.is_consumed(queue):  # by our own `source`, if both brokers are one
                sentence = f"queue {queue.name} at the new broker has a consumer."
                raise BrokerError(214, sentence, "stop the worker there; if both files name one broker, correct one.")
            while waiting > 0:
                batch = [_receive(source, queue) for _ in range(min(BATCH, waiting))]
                for delivery in batch:
                    target.publish(queue, delivery.message_id, [delivery.body], delivery.headers)
                _wait_for_confirms(target, len(batch))
                for delivery in batch:
                    source.acknowledge(delivery)
                waiting -= len(batch)
                yield len(batch)


def _count(broker: Broker, queue: Queue, owner: str) -> int:
    """Return the number of messages in a queue that no owner consumes."""
    if not (depth := _free_depth(broker, queue)):
        with broker.link([queue], 2 * BATCH, owner):
            pass  # begins when the queue has a leader; for a moment after a restart it had none, and told a depth of 0
        depth = _free_depth(broker, queue)
    return depth


def _free_depth(broker: Broker, queue: Queue) -> int:
    """Return the depth of a queue as soon as it has no consumer."""
    deadline = time.monotonic() + RELEASE_S_MAX
    while broker.is_consumed(queue):
        if time.monotonic() > deadline:
            raise BrokerError(214, f"queue {queue.name} has a consumer.", "stop the worker that reads it.")
        time.sleep(0.1)
    return broker.depth(queue) or 0


def _receive(source: Link, queue: Queue) -> Delivery:
    """Return the next message."""
    while event := source.receive(SILENCE_S_MAX):
        if isinstance(event, Delivery):
            return event
    sentence = f"nothing came from queue {queue.name} for {SILENCE_S_MAX:.0f} s."
    raise BrokerError(214, sentence, "check that no worker runs and that the old broker does, then try again.")


def _wait_for_confirms(target: Link, number: int) -> None:
    """Wait until the broker has confirmed so many messages."""
    reason = "it does not confirm"
    while number:
        match target.receive(SILENCE_S_MAX):
            case Confirmed():
                number -= 1
            case Blocked(reason):
                pass
            case None:
                raise BrokerError(209, f"{reason}.", "try again later; no message is lost.")
