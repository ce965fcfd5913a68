"""A bad line to any broker, by seed: what the contract of `Link` allows, and a good line hardly ever shows.

    worker ──publish──────▶ ┌ FaultyLink ─┐ ──▶ stored once, twice or three times      duplicate
           ◀─Confirmed───── │ outbox      │ ◀─✗ stored, and the worker never hears it  lose_confirm
           ◀─Delivery────── │ arrived ⤨   │ ◀── overtaken by later ones                reorder
           ◀─None────────── │ silence     │ ◀── nothing for a while                    delay
           ◀─Blocked─────── │             │ ✗   closed and opened anew                 disconnect
           ◀─Unblocked───── └─────────────┘

A duplicate is a message of its own at the broker, with its own tag: to acknowledge one copy says
nothing about another. That is also how duplicates come about: a confirm is lost, the connection
breaks for the same reason, and the link publishes on the next connection what it has no confirm
for. So a lost confirm is made good here, at the latest when the line has been idle for some turns.

A lost connection takes with it what has arrived and was not handed out. Whatever the worker has
and did not acknowledge comes again; its earlier tags are void, and acknowledging them does nothing.

Time is counted in turns, the calls of `receive`, never in seconds. Over a broker in the same
thread, all faults of a link follow from the seed, its owner and how many links it opened before.
"""

import random
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from heapq import heappop, heappush

from typing_extensions import override

from nightsplit.broker.proxy import WrappedLink
from nightsplit.shared.transport import Blocked, Broker, Confirmed, Delivery, Event, Link, Queue, Unblocked

MOST_COPIES = 3
"""Of a message that is duplicated, at one publishing."""

LONGEST_TURNS = 20
"""How long a line is silent, and how long it idles with a lost confirm, at most."""


@dataclass(frozen=True, slots=True)
class Faults:
    """How bad a line is; by default it is good. All but `reorder` are probabilities.

    Attributes:
        duplicate: that a message is stored more than once, per publishing.
        reorder: by how many later events one may be overtaken.
        delay: that the line falls silent, per event.
        lose_confirm: that a message is stored and its confirm lost, per publishing.
        disconnect: that the connection is lost, per event.
    """

    duplicate: float = 0.0
    reorder: int = 0
    delay: float = 0.0
    lose_confirm: float = 0.0
    disconnect: float = 0.0


class FaultyBroker(Broker):
    """Another broker at the end of bad lines. Its queues are as they are; only links are faulty.

    Args:
        broker: the real one.
        faults: of every link.
        seed: of all dice.

    Attributes:
        counts: faults that happened, over all links: "duplicates", "reordered", "delays",
            "lost_confirms", "disconnects".
    """

    def __init__(self, broker: Broker, faults: Faults, seed: int) -> None:
        self.counts: Counter[str] = Counter()
        self._broker = broker
        self._faults = faults
        self._seed = seed
        self._links: Counter[str] = Counter()

    @property
    @override
    def max_message_bytes(self) -> int:
        return self._broker.max_message_bytes

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
    def delete(self, queues: Iterable[Queue]) -> None:
        self._broker.delete(queues)


@dataclass(eq=False, slots=True)
class _Sent:
    """A message whose confirm the worker has not seen, and how many of its copies have none."""

    queue: Queue
    message_id: str
    body: Sequence[bytes | memoryview]
    headers: Mapping[str, str]
    open_copies: int = 0


class FaultyLink(WrappedLink):
    """A link over one connection after another.

    Args:
        connect: opens a link of the real broker with a prefetch.
        prefetch: of the first one.
        faults: how bad the line is.
        dice: decide what happens.
        counts: of the faults that happened; the caller's.
    """

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
        """A heap by place in line: the number of the arrival, put back by up to the window."""
        self._arrivals = 0
        self._silence = 0
        """Turns in which nothing arrives."""
        self._troubled = False
        """The worker was told of a lost connection, and not yet that there is another."""
        self._patience = 0
        """Idle turns until a line that lost a confirm breaks; 0 when it lost none."""

    @override
    def publish(
        self, queue: Queue, message_id: str, body: Sequence[bytes | memoryview], headers: Mapping[str, str] = {}
    ) -> None:
        sent = _Sent(queue, message_id, body, dict(headers))
        self._offer(sent)
        self._outbox.append(sent)

    @override
    def receive(self, timeout: float) -> Event | None:
        """See `Link`. Returns early while the line is silent, or about to break."""
        if self._silence:
            self._silence -= 1
            return None
        if self._troubled:
            self._troubled = False
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

    @property
    @override
    def unconfirmed(self) -> frozenset[str]:
        return frozenset(sent.message_id for sent in self._outbox)

    def _strikes(self, probability: float) -> bool:
        return self._dice.random() < probability

    def _some_turns(self) -> int:
        return self._dice.randint(1, LONGEST_TURNS)

    def _offer(self, sent: _Sent) -> None:
        """Publish a message, or several copies of it."""
        copies = self._dice.randint(2, MOST_COPIES) if self._strikes(self._faults.duplicate) else 1
        for _ in range(copies):
            self._link.publish(sent.queue, sent.message_id, sent.body, sent.headers)
        sent.open_copies = copies
        self._counts["duplicates"] += copies - 1

    def _take_in(self, timeout: float) -> None:
        """Let arrive what the broker has, as far as the window reaches; wait only when nothing is here."""
        while len(self._arrived) <= self._faults.reorder:
            event = self._link.receive(0.0 if self._arrived or self._patience else timeout)
            if event is None:
                return
            self._arrive(event)

    def _arrive(self, event: Event) -> None:
        """Find an event's place in line, if it gets one."""
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
        """Nothing arrives: a lost confirm is noticed at last."""
        if self._patience:
            self._patience -= 1
            if not self._patience:
                return self._reconnect()
        return None

    def _reconnect(self) -> Blocked:
        """Lose the connection, and open another."""
        self._counts["disconnects"] += 1
        self._link.close()
        self._arrived.clear()
        self._patience = 0
        self._incarnation += 1
        self._link = self._connect(self._link.prefetch)
        for sent in self._outbox:
            self._offer(sent)
        self._silence = self._some_turns()
        self._troubled = True
        return Blocked("the connection was lost")
