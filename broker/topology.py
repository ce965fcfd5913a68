"""Names of queues and exchanges at the broker, and the permissions of its users.

Each run and site has one direct exchange with three queues:

    nightsplit.<run>.<site>  ──up────▶ nightsplit.<run>.<site>.up      site -> server, bounded
                             ──down──▶ nightsplit.<run>.<site>.down    server -> site, unbounded
                             ──dead──▶ nightsplit.<run>.<site>.dead    refused by either side

and two more for encrypted queries to the model of a finished run (docs/explanation/he_clstm.md):

                             ──ask────▶ nightsplit.<run>.<site>.ask      site -> server, bounded
                             ──answer─▶ nightsplit.<run>.<site>.answer   server -> site, unbounded

Only up queues push back: a bounded down queue beside a bounded up queue can deadlock, since
neither side could confirm, checkpoint and acknowledge (docs/explanation/delivery.md). No queue has a delivery
limit: the broker would drop messages that were already answered.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from nightsplit.shared.transport import Queue

PREFIX = "nightsplit"


@dataclass(frozen=True, slots=True)
class SiteQueues:
    """Queues between one site and the server of one run."""

    up: Queue
    down: Queue
    dead: Queue

    def __iter__(self) -> Iterator[Queue]:
        return iter((self.up, self.down, self.dead))


@dataclass(frozen=True, slots=True)
class Rights:
    """Permissions of a broker's user, as RabbitMQ's patterns of the names of queues and exchanges.

    Attributes:
        configure: resources that the user may create and delete.
        write: exchanges it may publish to, and queues it may bind.
        read: queues it may consume, and exchanges it may bind to.
    """

    configure: str
    write: str
    read: str


NO_RIGHTS = Rights("^$", "^$", "^$")
SERVER_RIGHTS = Rights(*[rf"^{PREFIX}\."] * 3)


def site_rights(site: str) -> Rights:
    """Return the permissions to publish to a site's own exchanges and to consume its own queues, in every run.

    They exclude other sites' resources and the default exchange, which leads to every queue. From RabbitMQ 4.2.7 on,
    a user sees the depth of a queue only with some right on it: hence the right to write to the queues to the server.
    Writing to a queue permits binding it, but only to an exchange that the user may read, and a site may read none.
    """
    own = rf"^{PREFIX}\.[a-z0-9_-]+\.{site}"
    return Rights(configure="^$", write=rf"{own}(\.(up|ask))?$", read=rf"{own}\.(down|answer|dead)$")


def site_queues(run: str, site: str, up_limit_bytes: int) -> SiteQueues:
    """Return the queues between `site` and the server of `run`."""
    return _queues(run, site, up_limit_bytes, "up", "down")


def query_queues(run: str, site: str, up_limit_bytes: int) -> SiteQueues:
    """Return the queues for queries of `site` to the model of a finished `run`."""
    return _queues(run, site, up_limit_bytes, "ask", "answer")


def _queues(run: str, site: str, up_limit_bytes: int, up: str, down: str) -> SiteQueues:
    exchange = f"{PREFIX}.{run}.{site}"

    def queue(key: str, limit_bytes: int | None, dead_key: str | None) -> Queue:
        return Queue(f"{exchange}.{key}", exchange, key, limit_bytes, dead_key)

    return SiteQueues(
        up=queue(up, up_limit_bytes, "dead"), down=queue(down, None, "dead"), dead=queue("dead", None, None)
    )
