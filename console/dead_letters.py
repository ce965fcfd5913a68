"""The messages that a worker refused. nightsplit dlq looks at them, sends them again, or lets them go.

A pass over a site's dead letters, on a link of its own:

    pass ──bookmark──▶ oldest letter, ..., newest letter, bookmark ──▶ pass: all have been seen
    replay    publish to the queue it came from ─▶ the broker's confirm ─▶ acknowledge the letter
    discard   acknowledge the letter
    else      nothing: what is not acknowledged returns to its place when the link closes

A queue does not tell where it ends, and its depth leaves out what another consumer holds; the bookmark
tells both. A pass that is killed loses nothing. It leaves at most a letter beside its replayed copy, and
a bookmark, which the next pass removes.

Replay needs no queue of its own: where its receiver waits for just this message behind a backlog larger
than the prefetch, it raises the prefetch until it gets there (`Engine._unblock`).
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import uuid
from collections import defaultdict, deque
from collections.abc import Callable, Collection, Iterator
from dataclasses import asdict, dataclass, replace

from nightsplit.broker.topology import SiteQueues
from nightsplit.console.ui.text import columns, counted, screen
from nightsplit.console.worker_file import WorkerFile
from nightsplit.shared.engine.mailbox import Mailbox, header_of
from nightsplit.shared.errors import BrokerError, Refused, RunError
from nightsplit.shared.foreign import shown
from nightsplit.shared.protocols.spec import sketch
from nightsplit.shared.transport import Blocked, Confirmed, Delivery, Link, Route
from nightsplit.shared.wire.message import SERVER
from nightsplit.site_worker.config import SiteSection
from nightsplit.site_worker.policy import Gate

PATIENCE_S = 30.0
"""How long nothing at all may arrive; an embedded queue is free 10 s after its consumer died."""

MOST = 65_535
"""Letters that a pass can look at without letting them go: AMQP knows no larger prefetch."""

FEW = 16
"""Letters at a time where each leaves its queue: memory holds the bodies of so many."""

_BOOKMARK = "dlq/"


@dataclass(frozen=True)
class Letter:
    """What a dead letter says of itself; None where nobody wrote it down.

    Attributes:
        id: follows from all that the letter holds, so it is the same in every pass.
        site: whose queue it lies in.
        number, reason: of the error with which it was refused.
        sender: worker whose queue it came through.
        time: when it was refused, UTC.
        size: bytes of the message.
        queue: where it came from.
        message_id: with which it was published first.
    """

    id: str
    site: str
    number: int | None
    reason: str | None
    sender: str | None
    time: str | None
    size: int
    queue: str | None
    message_id: str

    @classmethod
    def of(cls, site: str, delivery: Delivery) -> Letter:
        """Read a letter's headers: ours, or those of a broker that a policy made move a message by itself."""
        headers = delivery.headers
        around = json.dumps([delivery.queue, delivery.message_id, sorted(headers.items())]).encode()
        number = headers.get("number", "")
        message_id = delivery.message_id
        if message_id.startswith("dead/"):  # dead/<its id>/<count>
            message_id = message_id.removeprefix("dead/").rpartition("/")[0]
        return cls(
            id=hashlib.sha256(around + delivery.body).hexdigest()[:12],
            site=site,
            number=int(number) if number.isdecimal() else None,
            reason=headers.get("reason", headers.get("x-first-death-reason")),
            sender=headers.get("sender"),
            time=headers.get("time"),
            size=len(delivery.body),
            queue=headers.get("queue", headers.get("x-first-death-queue")),
            message_id=message_id,
        )

    @property
    def sentence(self) -> str | None:
        """The reason without the error's title and remedy."""
        if self.reason is None or self.number is None:
            return self.reason
        return self.reason.partition(": ")[2].partition(" Fix: ")[0]


class _Pass:
    """The letters that lie in a site's queue when the pass begins, oldest first.

    Iterating ends when all have been seen, and the broker has confirmed what was replayed.

    Args:
        mailbox: of the worker, over a link that consumes the site's dead letters.
        site, queues: whose they are.
    """

    def __init__(self, mailbox: Mailbox, site: str, queues: SiteQueues) -> None:
        self._mailbox, self._link = mailbox, mailbox.link
        self._site = site
        self._queues = queues
        self._held = 0
        self._replayed: defaultdict[str, deque[Delivery]] = defaultdict(deque)
        self.complete = False
        """Whether the bookmark was reached."""

    def __iter__(self) -> Iterator[tuple[Letter, Delivery]]:
        bookmark = f"{_BOOKMARK}{uuid.uuid4().hex}"
        self._link.publish(self._queues.dead, bookmark, [])
        while not (self.complete or self._held == MOST) or self._replayed:
            match self._link.receive(PATIENCE_S):
                case None:
                    raise BrokerError(
                        210,
                        f"nothing came from {self._queues.dead.name} for {PATIENCE_S:.0f} s.",
                        "wait until the other dlq command has ended, then try again.",
                    )
                case Blocked(reason):
                    raise BrokerError(209, f"{reason}.", "try again when this is over; no dead letter is lost.")
                case Confirmed(message_id) if message_id in self._replayed:
                    self._confirmed(message_id)
                case Delivery() as delivery if delivery.message_id.startswith(_BOOKMARK):
                    self._link.acknowledge(delivery)  # ours, or that of a pass that was killed
                    self.complete = self.complete or delivery.message_id == bookmark
                case Delivery() as delivery if not self.complete:
                    self._held += 1
                    yield Letter.of(self._site, delivery), delivery

    def discard(self, delivery: Delivery) -> None:
        """Let the broker forget a letter."""
        self._link.acknowledge(delivery)
        self._held -= 1

    def replay(self, letter: Letter, delivery: Delivery) -> None:
        """Publish a letter where it came from, and discard it once the broker has confirmed that.

        Raises:
            RunError: 607 it does not say where it came from.
            BrokerError: 203 it is larger than a message of the run may be.
        """
        # One of the site's own queues: a header is no reason to publish anywhere else.
        origin = next((queue for queue in (self._queues.up, self._queues.down) if queue.name == letter.queue), None)
        if origin is None:
            raise RunError(
                607,
                f"{letter.id} came from {letter.queue or 'nowhere that it names'}.",
                "look at it with nightsplit dlq show, then discard it.",
            )
        self._mailbox.send_again(origin, letter.message_id, delivery.body)
        self._replayed[letter.message_id].append(replace(delivery, body=b""))

    def _confirmed(self, message_id: str) -> None:
        waiting = self._replayed[message_id]
        self.discard(waiting.popleft())
        if not waiting:
            del self._replayed[message_id]


_Act = Callable[[_Pass, Letter, Delivery], None]


def _go_through(file: WorkerFile, prefetch: int, act: _Act) -> bool:
    """Pass over the dead letters of every site that this worker has to do with; whether all were seen.

    Raises:
        BrokerError: 205 the run was not opened, 209 the broker takes nothing, 210 another command reads.
        RunError: 602 the site is not part of the run.
    """
    for site in file.sites:
        if site not in file.run.run.sites:
            raise RunError(602, f"{site} is not among the sites of {file.run.run.id}.", "correct site.name.")
    broker = file.broker()
    complete = True
    for site, of_site in file.queues().items():
        with broker.link([of_site.dead], prefetch, f"dlq:{socket.gethostname()}:{os.getpid()}") as link:
            one = _Pass(_mailbox(file, link, site, of_site), site, of_site)
            for letter, delivery in one:
                act(one, letter, delivery)
            complete = complete and one.complete
    return complete


def _mailbox(file: WorkerFile, link: Link, site: str, queues: SiteQueues) -> Mailbox:
    """The worker's mailbox: what a site sends again passes its gate once more."""
    run, schema, limit = file.run.run.id, sketch(file.run).get, file.run.wire.message_bytes
    if isinstance(file.worker, SiteSection):
        routes = {SERVER: Route(outgoing=queues.up, incoming=queues.down, dead=queues.dead)}
        return Mailbox(run, site, link, routes, schema, limit, Gate(file.base / file.worker.policy, file.run))
    routes = {site: Route(outgoing=queues.down, incoming=queues.up, dead=queues.dead)}
    return Mailbox(run, SERVER, link, routes, schema, limit)


def list_letters(file: WorkerFile, as_json: bool) -> None:
    """Print what every dead letter says of itself. Raises: see `_go_through`."""
    letters: list[Letter] = []
    complete = _go_through(file, MOST, lambda one, letter, delivery: letters.append(letter))
    if as_json:
        found = {"run": file.run.run.id, "complete": complete, "dead_letters": [asdict(letter) for letter in letters]}
        print(json.dumps(found, indent=2))
        return
    console = screen()
    if letters:
        table = columns(
            "id", "site", "number", "reason", "sender", "time", "bytes", "from", numbers=("number", "bytes")
        )
        for letter in letters:
            told = letter.number, letter.sentence, letter.sender, letter.time, letter.size, letter.queue
            table.add_row(letter.id, letter.site, *("-" if fact is None else str(fact) for fact in told))
        console.print(table)
    more = "" if complete else f"; there are more behind the oldest {MOST} of a site"
    console.print(counted(len(letters), "dead letter") + more)


def show_letter(file: WorkerFile, wanted: str, as_json: bool) -> None:
    """Print everything about one dead letter but the values of its tensors.

    Raises:
        RunError: 606 there is none of this id; see `_go_through`.
    """
    found: list[tuple[Letter, Delivery]] = []

    def keep(one: _Pass, letter: Letter, delivery: Delivery) -> None:
        if letter.id == wanted and not found:
            found.append((letter, delivery))

    _go_through(file, MOST, keep)
    if not found:
        raise _unknown([wanted])
    letter, delivery = found[0]
    message: dict[str, object] | None = None
    unreadable = None
    try:
        message = asdict(header_of(delivery.body))
    except Refused as refusal:
        unreadable = str(refusal)
    if as_json:
        headers = dict(delivery.headers)
        print(
            json.dumps(
                {"letter": asdict(letter), "headers": headers, "message": message, "unreadable": unreadable}, indent=2
            )
        )
        return
    told = {**asdict(letter), **{f"header {name}": value for name, value in sorted(delivery.headers.items())}}
    told |= {f"message {name}": value for name, value in (message or {"header": unreadable}).items()}
    for name, value in told.items():
        print(shown(f"{name:<20} {'-' if value is None else value}"))


def replay_letters(file: WorkerFile, chosen: Collection[str] | None) -> None:
    """Send dead letters to their queues again.

    Args:
        file: whose.
        chosen: ids; None for all.

    Raises:
        RunError: 606, 607; BrokerError: 203; see `_go_through`. What was replayed before stays replayed.
    """
    print(f"{counted(_settle(file, chosen, _Pass.replay), 'dead letter')} sent again")


def discard_letters(file: WorkerFile, chosen: Collection[str] | None) -> None:
    """Delete dead letters for good; arguments and errors as `replay_letters`."""

    def discard(one: _Pass, letter: Letter, delivery: Delivery) -> None:
        one.discard(delivery)

    print(f"{counted(_settle(file, chosen, discard), 'dead letter')} discarded")


def _settle(file: WorkerFile, chosen: Collection[str] | None, act: _Act) -> int:
    """Do something to the chosen letters; how many there were. Raises RunError 606 for ids that were not found."""
    found: list[str] = []

    def settle(one: _Pass, letter: Letter, delivery: Delivery) -> None:
        if chosen is None or letter.id in chosen:
            act(one, letter, delivery)
            found.append(letter.id)

    _go_through(file, FEW if chosen is None else MOST, settle)
    if missing := sorted(set(chosen or ()) - set(found)):
        raise _unknown(missing, len(found))
    return len(found)


def _unknown(ids: Collection[str], others: int = 0) -> RunError:
    what = f"{', '.join(ids)} is not here"
    return RunError(
        606,
        what + (f"; {others} of the others were settled." if others else "."),
        "see what is there with: nightsplit dlq list.",
    )
