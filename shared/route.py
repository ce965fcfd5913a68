"""The queues between a worker and one of its peers, as that worker sees them."""

from __future__ import annotations

from dataclasses import dataclass

from nightsplit.broker.base import Queue


@dataclass(frozen=True, slots=True)
class Route:
    """Where messages to one peer go, and where messages from it come from."""

    outgoing: Queue
    incoming: Queue
    dead: Queue
