"""Names of queues and exchanges at the broker, and the permissions of its users.

Each run and site has two direct exchanges, one of which is the server's alone, with three queues:

    nightsplit.<run>.<site>         ──up────▶ nightsplit.<run>.<site>.up      site -> server, bounded
                                    ──dead──▶ nightsplit.<run>.<site>.dead    refused by either side
    nightsplit.<run>.<site>.server  ──down──▶ nightsplit.<run>.<site>.down    server -> site, unbounded

and two more queues for encrypted queries to the model of a finished run (docs/explanation/he_clstm.md):

    nightsplit.<run>.<site>         ──ask────▶ nightsplit.<run>.<site>.ask      site -> server, bounded
    nightsplit.<run>.<site>.server  ──answer─▶ nightsplit.<run>.<site>.answer   server -> site, unbounded

A site cannot fill the unbounded queues, since it may not publish to the server's exchange. The oldest dead letters make
room for later ones; `nightsplit keys` writes their limits into RabbitMQ's policies (`POLICIES`), which hold for queues
that exist, too. Only up queues push back: a bounded down queue beside a bounded up queue can deadlock, since neither
side could confirm, checkpoint and acknowledge (docs/explanation/delivery.md). No queue has a delivery limit: the broker
would drop messages that were already answered.
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


_LAZY: dict[str, object] = {"queue-mode": "lazy"}
# RabbitMQ counts the bytes of bodies alone: without a number, messages of headers would fill its disk.
_UP: tuple[str, dict[str, object]] = (
    rf"^{PREFIX}\..*\.(up|ask)$", {"max-length": 200_000, "overflow": "reject-publish"},
)  # fmt: skip
_DEAD: tuple[str, dict[str, object]] = (
    rf"^{PREFIX}\..*\.dead$", {"max-length": 20_000, "max-length-bytes": 2**30, "overflow": "drop-head"},
)  # fmt: skip

POLICIES: dict[str, tuple[str, dict[str, object]]] = {
    "up": _UP,
    "dead": _DEAD,
    "lazy": (rf"^{PREFIX}\.", _LAZY),
    "lazy-up": (_UP[0], _UP[1] | _LAZY),
    "lazy-dead": (_DEAD[0], _DEAD[1] | _LAZY),
}
"""Pattern of queues and definition of each policy of RabbitMQ. A later one takes the place of an earlier one, where it
is applicable: RabbitMQ passes over a policy for quorum queues that has a key for classic ones.

A night's messages belong on the disk; without lazy mode, classic queues fill the memory first.
"""

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
    of_site = f"{PREFIX}.{run}.{site}"
    dead = Queue(f"{of_site}.dead", of_site, "dead", None, None)
    return SiteQueues(
        up=Queue(f"{of_site}.{up}", of_site, up, up_limit_bytes, dead),
        down=Queue(f"{of_site}.{down}", f"{of_site}.server", down, None, dead),
        dead=dead,
    )
