"""Numbered messages, published while their broker fails: which were confirmed, and which are there afterwards."""

from __future__ import annotations

import random
import threading
import time

from nightsplit.broker.rabbitmq.broker import RabbitBroker
from nightsplit.broker.topology import site_queues
from nightsplit.shared.transport import Confirmed, Delivery, Queue

QUEUE_BYTES = 2**30
AHEAD = 64
"""Messages that may be unconfirmed."""
PER_SECOND = 100
QUIET_S = 3.0
"""A queue that gives nothing for so long is empty."""


class Numbered(threading.Thread):
    """Publishes 1, 2, 3... in turn to three queues, until it is told to stop.

    Args:
        url: a RabbitMQ node or cluster that will fail and come back meanwhile.
        seed: of the sizes, 0 to 16 KiB.

    Attributes:
        confirmed: numbers that the broker has confirmed.
        published: how many were given to the link.
        copies: messages that `examine` found more than once.
    """

    def __init__(self, url: str, seed: int) -> None:
        super().__init__(name="numbered", daemon=True)
        self.confirmed: set[int] = set()
        self.published = self.copies = 0
        self.error: BaseException | None = None
        self._broker = RabbitBroker(url)
        self._dice = random.Random(seed)
        self._last_confirm, self._pause = time.monotonic(), 0.0
        self._stopped, self._abandoned = threading.Event(), threading.Event()
        self._queues = [site_queues("numbered", name, QUEUE_BYTES).up for name in ("one", "two", "three")]
        for name in ("one", "two", "three"):
            self._broker.declare(site_queues("numbered", name, QUEUE_BYTES))

    def run(self) -> None:
        """Publish; leave when stopped and everything is confirmed."""
        try:
            with self._broker.link([], 1, "numbered") as link:
                while not self._abandoned.is_set() and (link.unconfirmed or not self._stopped.is_set()):
                    more = not self._stopped.is_set() and len(link.unconfirmed) < AHEAD
                    if more:
                        self.published += 1
                        queue = self._queues[self.published % len(self._queues)]
                        link.publish(queue, str(self.published), [self._dice.randbytes(self._dice.randrange(2**14))])
                        time.sleep(1 / PER_SECOND)
                    event = link.receive(0.0 if more else 0.1)
                    if isinstance(event, Confirmed):
                        self.confirmed.add(int(event.message_id))
                        now = time.monotonic()
                        self._pause, self._last_confirm = max(self._pause, now - self._last_confirm), now
        except BaseException as error:
            self.error = error

    def longest_pause(self) -> float:
        """Seconds between two confirms, the most since the last call."""
        pause, self._pause = max(self._pause, time.monotonic() - self._last_confirm), 0.0
        return pause

    def abandon(self) -> None:
        """Leave, whatever is unconfirmed."""
        self._abandoned.set()
        self.join()

    def examine(self) -> tuple[int, int]:
        """Stop and empty the queues.

        Returns:
            How many confirmed messages are not there, and how many are not behind the one before them
            in their queue. Copies are allowed: what was unconfirmed at a death was offered again.
        """
        self._stopped.set()
        self.join()
        if self.error is not None:
            raise self.error
        lost = disordered = 0
        for index, queue in enumerate(self._queues):
            found = self._emptied(queue)
            self.copies += len(found) - len(set(found))
            wanted = {number for number in self.confirmed if number % len(self._queues) == index}
            lost += len(wanted - set(found))
            # In order, but for copies: what was published is a subsequence of what is there.
            rest = iter(found)
            disordered += sum(number not in rest for number in sorted(wanted & set(found)))
        return lost, disordered

    def _emptied(self, queue: Queue) -> list[int]:
        found: list[int] = []
        with self._broker.link([queue], 512, "numbered") as link:
            last = time.monotonic()
            while time.monotonic() - last < QUIET_S:
                event = link.receive(0.1)
                if isinstance(event, Delivery):
                    found.append(int(event.message_id))
                    link.acknowledge(event)
                    last = time.monotonic()
        return found
