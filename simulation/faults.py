"""Faulty connections to any broker, by seed: they do all that `Link` allows and that good ones hardly ever do.

    worker ──publish──────▶ ┌ FaultyLink ─┐ ──▶ stored once, twice or three times      duplicate
                            │             │ ✗   confirmed, and not stored              lose
           ◀─Confirmed───── │ outbox      │ ◀─✗ stored, and its confirm is lost        lose_confirm
           ◀─Delivery────── │ arrived ⤨   │ ◀── overtaken by later ones                reorder
           ◀─None────────── │ silence     │ ◀── nothing for a while                    delay
           ◀─Blocked─────── │             │ ✗   closed and opened anew                 disconnect
           ◀─Unblocked───── └─────────────┘

A duplicate is a separate message at the broker, with its own tag: acknowledging one copy leaves the
other. Duplicates also arise when a confirm is lost: the connection then breaks, at the latest after
some idle turns, and the link publishes all unconfirmed messages again on the next one.

Events that have arrived and were not handed out are lost with their connection. Unacknowledged
deliveries come again; their earlier tags are void, and acknowledging them does nothing.

Time is counted in turns, the calls of `receive`, never in seconds. Over a broker in the same
thread, all faults of a link follow from the seed, its owner and the number of its earlier links.
"""

import random
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from heapq import heappop, heappush

from typing_extensions import override

from nightsplit.broker.link_wrapper import LinkWrapper
from nightsplit.shared.errors import BrokerError
from nightsplit.shared.transport import Blocked, Broker, Confirmed, Delivery, Event, Link, Queue, Unblocked

COPIES_MAX = 3
"""Copies of a duplicated message at one publishing."""

TURNS_MAX = 20
"""Longest silence, and longest idle time after a lost confirm, in turns."""


@dataclass(frozen=True, slots=True)
class Faults:
    """Faults of a connection, none by default. All but `reorder` are probabilities.

    Attributes:
        duplicate: probability per publishing that a message is stored more than once.
        reorder: number of later events that may overtake an event.
        delay: probability per event of a silence.
        lose_confirm: probability per publishing that a message is stored and its confirm lost.
        disconnect: probability per event that the connection is lost.
        lose: probability per publishing that a message is confirmed, and lost.
    """

    duplicate: float = 0.0
    reorder: int = 0
    delay: float = 0.0
    lose_confirm: float = 0.0
    disconnect: float = 0.0
    lose: float = 0.0


class FaultyBroker(Broker):
    """Broker with faulty links over another broker; all faults follow from `seed`.

    Attributes:
        counts: faults so far, over all links: "duplicates", "reordered", "delays", "lost_confirms",
            "disconnects", "lost".
    """

    def __init__(self, broker: Broker, faults: Faults, seed: int) -> None:
        self.counts: Counter[str] = Counter()
        self._broker = broker
        self._faults = faults
        self._seed = seed
        self._links: Counter[str] = Counter()

    @override
    def declare(self, queues: Iterable[Queue]) -> None:
        self._broker.declare(queues)

    @override
    def link(self, consume: Sequence[Queue], prefetch: int, owner: str) -> Link:
        dice = random.Random(f"{self._seed}/{owner}/{self._links[owner]}")
        self._links[owner] += 1
        connect = partial(self._broker.link, consume, owner=owner)
        return FaultyLink(connect, prefetch, self._faults, dice, self.counts)

    @override
    def depth(self, queue: Queue) -> int | None:
        return self._broker.depth(queue)

    @override
    def is_consumed(self, queue: Queue) -> bool:
        return self._broker.is_consumed(queue)

    @override
    def delete(self, queues: Iterable[Queue]) -> None:
        self._broker.delete(queues)


@dataclass(eq=False, slots=True)
class _Sent:
    """Message that the worker holds as unconfirmed, and the number of its copies without a confirm."""

    queue: Queue
    message_id: str
    body: Sequence[bytes | memoryview]
    headers: Mapping[str, str]
    open_copies: int = 0


class FaultyLink(LinkWrapper):
    """Link over one connection after another, which `connect` opens with a prefetch; adds its faults to `counts`."""

    def __init__(
        self, connect: Callable[[int], Link], prefetch: int, faults: Faults, dice: random.Random, counts: Counter[str]
    ) -> None:
        self._connect = connect
        self._faults = faults
        self._dice = dice
        self._counts = counts
        super().__init__(connect(prefetch))
        self._incarnation = 0
        """Number of the connection; part of every tag."""
        self._outbox: list[_Sent] = []
        self._arrived: list[tuple[float, int, Event, _Sent | None]] = []
        """Heap by place: the number of the arrival, put back by up to `reorder`."""
        self._arrivals = 0
        self._silence = 0
        """Turns in which nothing arrives."""
        self._is_blocked = False
        """True between `Blocked` and `Unblocked`."""
        self._patience = 0
        """Idle turns until a connection that lost a confirm breaks; 0 if it lost none."""

    @override
    def publish(
        self, queue: Queue, message_id: str, body: Sequence[bytes | memoryview], headers: Mapping[str, str] = {}
    ) -> None:
        sent = _Sent(queue, message_id, body, dict(headers))
        self._outbox.append(sent)
        try:
            self._offer(sent)
        except BrokerError:  # too large
            self._outbox.remove(sent)
            raise

    @override
    def receive(self, timeout: float) -> Event | None:
        # Returns early in a silence, and before a break.
        if self._silence:
            self._silence -= 1
            return None
        if self._is_blocked:
            self._is_blocked = False
            return Unblocked()
        self._take_in(timeout)
        if not self._arrived:
            return self._idle()
        if self._strikes(self._faults.disconnect):
            return self._reconnect()
        if self._strikes(self._faults.delay):
            self._counts["delays"] += 1
            self._silence = self._some_turns()
            return None
        return self._hand_out()

    @override
    def acknowledge(self, delivery: Delivery) -> None:
        assert isinstance(delivery.tag, tuple)
        incarnation, tag = delivery.tag
        if incarnation == self._incarnation:
            self._link.acknowledge(replace(delivery, tag=tag))

    @override
    def give_back(self, delivery: Delivery) -> None:
        assert isinstance(delivery.tag, tuple)
        incarnation, tag = delivery.tag
        if incarnation == self._incarnation:
            self._link.give_back(replace(delivery, tag=tag))

    @property
    @override
    def unconfirmed(self) -> frozenset[str]:
        return frozenset(sent.message_id for sent in self._outbox)

    def _strikes(self, probability: float) -> bool:
        return self._dice.random() < probability

    def _some_turns(self) -> int:
        return self._dice.randint(1, TURNS_MAX)

    def _offer(self, sent: _Sent) -> None:
        """Publish a message, or several copies of it."""
        copies = self._dice.randint(2, COPIES_MAX) if self._strikes(self._faults.duplicate) else 1
        sent.open_copies = copies
        self._counts["duplicates"] += copies - 1
        if self._faults.lose and self._strikes(self._faults.lose):
            self._counts["lost"] += 1
            for _ in range(copies):
                self._arrive(Confirmed(sent.message_id))
            return
        for _ in range(copies):
            self._link.publish(sent.queue, sent.message_id, sent.body, sent.headers)

    def _take_in(self, timeout: float) -> None:
        """Fetch events until there are enough to reorder; wait only if there are none."""
        while len(self._arrived) <= self._faults.reorder:
            event = self._link.receive(0.0 if self._arrived or self._patience else timeout)
            if event is None:
                return
            self._arrive(event)

    def _arrive(self, event: Event) -> None:
        """Give an event its place, unless it is lost."""
        put_back = self._dice.uniform(0, self._faults.reorder)
        sent = None
        match event:
            case Delivery():
                event = replace(event, tag=(self._incarnation, event.tag))
            case Confirmed(message_id):
                sent = next(sent for sent in self._outbox if sent.message_id == message_id and sent.open_copies)
                sent.open_copies -= 1
                if sent.open_copies:
                    return
                if self._strikes(self._faults.lose_confirm):
                    self._counts["lost_confirms"] += 1
                    self._patience = self._patience or self._some_turns()
                    return
            case Blocked() | Unblocked():
                put_back = 0.0  # these mean nothing in another order
        heappush(self._arrived, (self._arrivals + put_back, self._arrivals, event, sent))
        self._arrivals += 1

    def _hand_out(self) -> Event:
        _, arrival, event, sent = heappop(self._arrived)
        self._counts["reordered"] += any(other < arrival for _, other, _, _ in self._arrived)
        if sent is not None:
            self._outbox.remove(sent)
        return event

    def _idle(self) -> Event | None:
        """Count an idle turn; the last one after a lost confirm breaks the connection."""
        if self._patience:
            self._patience -= 1
            if not self._patience:
                return self._reconnect()
        return None

    def _reconnect(self) -> Blocked:
        """Replace the connection by a new one."""
        self._counts["disconnects"] += 1
        self._link.close()
        self._arrived.clear()
        self._patience = 0
        self._incarnation += 1
        self._link = self._connect(self._link.prefetch)
        for sent in self._outbox:
            self._offer(sent)
        self._silence = self._some_turns()
        self._is_blocked = True
        return Blocked("the connection was lost")
