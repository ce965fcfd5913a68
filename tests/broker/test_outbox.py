"""What a link to RabbitMQ keeps until it is confirmed: answers in any order, new channels, queues that are full."""

from __future__ import annotations

from nightsplit.broker.rabbitmq.outbox import Outbox, OutgoingMessage
from nightsplit.shared.transport import Queue


def outbox_with(count: int, queue: str = "q") -> tuple[Outbox, list[OutgoingMessage]]:
    outbox = Outbox()
    messages = [
        OutgoingMessage(Queue(queue, "x", "k", 1, None), f"m{number}", b"", {}) for number in range(1, count + 1)
    ]
    for message in messages:
        outbox.add(message)
        outbox.mark_sent(message)
    return outbox, messages


def test_answers_in_any_order_settle_each_message_once() -> None:
    """Seen from a real broker: refusals overtake bulk confirms, and are not covered by them."""
    outbox, messages = outbox_with(37)
    answers = [(33, False), (30, True), (34, False), (35, False), (32, True), (37, True)]
    settled = [[message.message_id for message in outbox.settle(*answer)] for answer in answers]
    assert settled == [
        ["m33"],
        [message.message_id for message in messages[:30]],
        ["m34"],
        ["m35"],
        ["m31", "m32"],
        ["m36", "m37"],
    ]
    assert outbox.settle(37, multiple=True) == []
    assert outbox.settle(5, multiple=False) == []


def test_tag_zero_settles_everything() -> None:
    outbox, messages = outbox_with(3)
    assert outbox.settle(0, multiple=True) == messages


def test_a_new_channel_sends_everything_again_in_order() -> None:
    outbox, messages = outbox_with(4)
    (second,) = outbox.settle(2, multiple=False)
    outbox.confirm(second)
    assert outbox.due() == []
    outbox.reset()
    assert outbox.due() == [messages[0], messages[2], messages[3]]
    outbox.mark_sent(messages[0])
    assert outbox.settle(1, multiple=False) == [messages[0]], "a new channel counts from 1"


def test_a_held_queue_is_offered_one_message_at_a_time() -> None:
    outbox, (first, second) = outbox_with(2)
    queue = first.queue
    outbox.settle(2, multiple=True)
    pause = outbox.hold(queue)
    assert pause is not None
    assert 0 < pause <= 0.1
    assert outbox.hold(queue) is None
    later = OutgoingMessage(queue, "later", b"", {})
    outbox.add(later)
    assert outbox.due() == []
    outbox.resume(queue)
    for number, message in enumerate([first, second], 3):
        assert outbox.due() == [message]
        outbox.mark_sent(message)
        assert outbox.due() == []
        assert outbox.settle(number, multiple=False) == [message]
        assert outbox.is_held(queue)
        assert outbox.confirm(message) is (message is second), "held until it took all that it held up"
    assert outbox.due() == [later]


def test_a_held_queue_does_not_hold_another() -> None:
    outbox, (first, second) = outbox_with(2)
    second.queue = Queue("other", "x", "k", 1, None)
    outbox.settle(2, multiple=True)
    outbox.hold(first.queue)
    assert outbox.due() == [second]
    assert outbox.confirm(second) is False
