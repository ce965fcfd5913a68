"""A link that passes everything on to another, for those that only watch or change a part of it."""

from collections.abc import Mapping, Sequence

from nightsplit.shared.transport import Delivery, Event, Link, Queue


class WrappedLink(Link):
    """Does what `link` does.

    Args:
        link: closed with this one.
    """

    def __init__(self, link: Link) -> None:
        self._link = link

    def publish(
        self, queue: Queue, message_id: str, body: Sequence[bytes | memoryview], headers: Mapping[str, str] = {}
    ) -> None:
        """See `Link`."""
        self._link.publish(queue, message_id, body, headers)

    def receive(self, timeout: float) -> Event | None:
        """See `Link`."""
        return self._link.receive(timeout)

    def acknowledge(self, delivery: Delivery) -> None:
        """See `Link`."""
        self._link.acknowledge(delivery)

    @property
    def unconfirmed(self) -> frozenset[str]:
        """See `Link`."""
        return self._link.unconfirmed

    @property
    def prefetch(self) -> int:
        """See `Link`."""
        return self._link.prefetch

    def raise_prefetch(self, prefetch: int) -> None:
        """See `Link`."""
        self._link.raise_prefetch(prefetch)

    def close(self) -> None:
        """See `Link`."""
        self._link.close()
