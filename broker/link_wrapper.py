"""Base class of links that observe another link, or change a part of it."""

from collections.abc import Mapping, Sequence

from typing_extensions import override

from nightsplit.shared.transport import Delivery, Event, Link, Queue


class LinkWrapper(Link):
    """Link that forwards every call to the link that it wraps, and closes it, too."""

    def __init__(self, link: Link) -> None:
        self._link = link

    @override
    def publish(
        self, queue: Queue, message_id: str, body: Sequence[bytes | memoryview], headers: Mapping[str, str] = {}
    ) -> None:
        self._link.publish(queue, message_id, body, headers)

    @override
    def receive(self, timeout: float) -> Event | None:
        return self._link.receive(timeout)

    @override
    def acknowledge(self, delivery: Delivery) -> None:
        self._link.acknowledge(delivery)

    @override
    def give_back(self, delivery: Delivery) -> None:
        self._link.give_back(delivery)

    @property
    @override
    def unconfirmed(self) -> frozenset[str]:
        return self._link.unconfirmed

    @property
    @override
    def prefetch(self) -> int:
        return self._link.prefetch

    @override
    def raise_prefetch(self, prefetch: int) -> None:
        self._link.raise_prefetch(prefetch)

    @override
    def close(self) -> None:
        self._link.close()
