"""Every name at the broker, in one place.

Each run and site has one direct exchange with three queues:

    nightsplit.<run>.<site>  ──up────▶ nightsplit.<run>.<site>.up      site -> server, bounded
                             ──down──▶ nightsplit.<run>.<site>.down    server -> site, unbounded
                             ──dead──▶ nightsplit.<run>.<site>.dead    what either side refused

and two more when the finished run's model is asked for encrypted sequences (docs/explanation/he_clstm.md):

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
    """The queues between one site and the server of one run."""

    up: Queue
    down: Queue
    dead: Queue

    def __iter__(self) -> Iterator[Queue]:
        return iter((self.up, self.down, self.dead))


@dataclass(frozen=True, slots=True)
class Rights:
    """What a user of the broker may do: patterns of the names of queues and exchanges, as RabbitMQ has them.

    Attributes:
        configure: what it may create and delete.
        write: where it may publish, and what it may bind.
        read: what it may consume, and what it may bind to.
    """

    configure: str
    write: str
    read: str


NO_RIGHTS = Rights("^$", "^$", "^$")
SERVER_RIGHTS = Rights(*[rf"^{PREFIX}\."] * 3)


def site_rights(site: str) -> Rights:
    """To publish through its own exchanges, and to consume what is meant for it, in every run.

    Nothing of another site, and not the default exchange, which leads to every queue.
    """
    exchange = rf"^{PREFIX}\.[a-z0-9_-]+\.{site}"
    return Rights(configure="^$", write=f"{exchange}$", read=rf"{exchange}\.(down|answer|dead)$")


def site_queues(run: str, site: str, up_limit_bytes: int) -> SiteQueues:
    """Names and limits of the queues between `site` and the server of `run`."""
    return _queues(run, site, up_limit_bytes, "up", "down")


def query_queues(run: str, site: str, up_limit_bytes: int) -> SiteQueues:
    """Those for queries to the model of a finished run."""
    return _queues(run, site, up_limit_bytes, "ask", "answer")


def _queues(run: str, site: str, up_limit_bytes: int, up: str, down: str) -> SiteQueues:
    exchange = f"{PREFIX}.{run}.{site}"

    def queue(key: str, limit_bytes: int | None, dead_key: str | None) -> Queue:
        return Queue(f"{exchange}.{key}", exchange, key, limit_bytes, dead_key)

    return SiteQueues(
        up=queue(up, up_limit_bytes, "dead"), down=queue(down, None, "dead"), dead=queue("dead", None, None)
    )
