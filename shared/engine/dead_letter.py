"""What becomes of a message that is refused: a copy of it with the reason, in the dead letter queue."""

from __future__ import annotations

from datetime import UTC, datetime

from nightsplit.shared.errors import Refused
from nightsplit.shared.transport import Delivery, Link, Queue


def bury(link: Link, queue: Queue, name: str, delivery: Delivery, sender: str, refusal: Refused) -> None:
    """Publish the copy; the original is to be acknowledged when that is confirmed.

    Args:
        link: of the worker that refuses.
        queue: the dead letter queue.
        name: message id of the copy.
        delivery: what is refused.
        sender: whose queue it came through.
        refusal: why.
    """
    link.publish(
        queue,
        name,
        [delivery.body],
        {
            "number": str(refusal.number), "reason": str(refusal), "sender": sender, "queue": delivery.queue,
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
        },
    )  # fmt: skip
