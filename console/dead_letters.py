"""Dead letters: messages that a worker refused. nightsplit dlq lists, replays or discards them.

A pass over the dead letters of a site, on a link of its own:

    pass ──bookmark──▶ oldest letter, ..., newest letter, bookmark ──▶ pass: all letters are seen
    replay    publish to the original queue ─▶ confirm of the broker ─▶ acknowledge the letter
    discard   acknowledge the letter
    else      nothing: an unacknowledged letter returns to its place when the link closes

A queue has no end marker, and its depth excludes messages that another consumer holds: hence the bookmark.
A pass that is killed loses nothing. It leaves at most one letter beside its replayed copy, and a bookmark,
which the next pass removes.

Replay needs no queue of its own: a receiver that waits for this message behind a backlog larger than the
prefetch raises its prefetch until the message arrives (`Engine._unblock`).
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import uuid
from collections import defaultdict, deque
from collections.abc import Callable, Collection, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, replace

from nightsplit.broker.sealed import open_letter
from nightsplit.broker.topology import SiteQueues
from nightsplit.console.ui.text import columns, counted, screen
from nightsplit.console.worker_file import WorkerFile
from nightsplit.shared.engine.mailbox import Mailbox, header_of
from nightsplit.shared.errors import BrokerError, MissingRightError, Refused, RunError
from nightsplit.shared.foreign import shown
from nightsplit.shared.protocols.spec import sketch
from nightsplit.shared.transport import Blocked, Confirmed, Delivery, Link, Route
from nightsplit.shared.trust.envelope import Sealer
from nightsplit.shared.wire.message import SERVER
from nightsplit.site_worker.config import SiteSection
from nightsplit.site_worker.policy import Gate
from nightsplit.site_worker.trust.exit_log import FILE, ExitLog

TIMEOUT_S = 30.0
"""Seconds without any event before a pass gives up; an embedded queue is free 10 s after its consumer died."""

PREFETCH_MAX = 65_535
"""Letters that a pass can read without acknowledging any: the largest prefetch of AMQP."""

PREFETCH = 16
"""Letters in memory at a time where a pass acknowledges each."""

_BOOKMARK = "dlq/"


@dataclass(frozen=True)
class Letter:
    """Description of a dead letter; a fact that its headers lack is None.

    Attributes:
        id: hash of the whole letter, so it is the same in every pass.
        site: site of the dead letter queue.
        number, reason: number and text of the error with which it was refused.
        sender: worker whose queue it came through.
        time: time of the refusal, UTC.
        size: bytes of the message.
        queue: queue that it came from.
        message_id: id with which it was first published.
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
        """Read a letter's headers: ours, or those of a broker whose policy moved the message."""
        headers = delivery.headers
        surroundings = json.dumps([delivery.queue, delivery.message_id, sorted(headers.items())]).encode()
        number = headers.get("number", "")
        message_id = delivery.message_id
        if message_id.startswith("dead/"):  # dead/<its id>/<count>
            message_id = message_id.removeprefix("dead/").rpartition("/")[0]
        return cls(
            id=hashlib.sha256(surroundings + delivery.original).hexdigest()[:12],
            site=site,
            number=int(number) if number.isdecimal() else None,
            reason=headers.get("reason", headers.get("x-first-death-reason")),
            sender=headers.get("sender"),
            time=headers.get("time"),
            size=len(delivery.original),
            queue=headers.get("queue", headers.get("x-first-death-queue")),
            message_id=message_id,
        )

    @property
    def sentence(self) -> str | None:
        """Reason without the title and the fix of its error."""
        if self.reason is None or self.number is None:
            return self.reason
        return self.reason.partition(": ")[2].partition(" Fix: ")[0]


class _Pass:
    """Iterator over the dead letters that a site's queue holds when the pass begins, oldest first.

    It ends when all letters are seen, and the broker has confirmed each replayed one.

    Args:
        mailbox: the worker's mailbox, over a link that consumes the site's dead letters.
        sealer: opens them; None if the run has no keys.
        site, queues: the site, and its queues.
    """

    def __init__(self, mailbox: Mailbox, sealer: Sealer | None, site: str, queues: SiteQueues) -> None:
        self._mailbox, self._link, self._sealer = mailbox, mailbox.link, sealer
        self._site = site
        self._queues = queues
        self._held = 0
        self._replayed: defaultdict[str, deque[tuple[Letter, Delivery]]] = defaultdict(deque)
        self.complete = False
        """The pass has reached its bookmark."""

    def __iter__(self) -> Iterator[tuple[Letter, Delivery]]:
        bookmark = f"{_BOOKMARK}{uuid.uuid4().hex}"
        self._link.publish(self._queues.dead, bookmark, [])
        while not (self.complete or self._held == PREFETCH_MAX) or self._replayed:
            match self._link.receive(TIMEOUT_S):
                case None:
                    sentence = f"nothing came from {self._queues.dead.name} for {TIMEOUT_S:.0f} s."
                    raise BrokerError(210, sentence, "wait until the other dlq command has ended, then try again.")
                case Blocked(reason):
                    raise BrokerError(209, f"{reason}.", "try again later; no dead letter is lost.")
                case Confirmed(message_id) if message_id in self._replayed:
                    self.discard(*self._replayed[message_id].popleft())
                    if not self._replayed[message_id]:
                        del self._replayed[message_id]
                case Delivery() as delivery if delivery.message_id.startswith(_BOOKMARK):
                    self._link.acknowledge(delivery)  # ours, or that of a pass that was killed
                    self.complete = self.complete or delivery.message_id == bookmark
                case Delivery() as delivery if not self.complete:
                    self._held += 1
                    opened = self._open(delivery)
                    yield Letter.of(self._site, opened), opened

    def _open(self, delivery: Delivery) -> Delivery:
        if self._sealer is None:
            return delivery
        ways = {self._queues.up.name: (self._site, SERVER), self._queues.down.name: (SERVER, self._site)}
        way = ways.get(delivery.headers.get("queue", ""))
        return delivery if way is None else open_letter(delivery, self._sealer, *way)

    def discard(self, letter: Letter, delivery: Delivery) -> None:
        """Remove a letter from its queue."""
        self._link.acknowledge(delivery)
        self._held -= 1

    def replay(self, letter: Letter, delivery: Delivery) -> None:
        """Publish a letter to its original queue, and discard it when the broker has confirmed that.

        Raises:
            RunError: 607 it does not name its original queue.
            BrokerError: 203 it is larger than a message of the run may be.
        """
        # Only to the site's own queues, whatever the header names.
        origin = next((queue for queue in (self._queues.up, self._queues.down) if queue.name == letter.queue), None)
        if origin is None:
            sentence = f"{letter.id} does not name the queue of {self._site} that it came from."
            raise RunError(607, sentence, "look at it with nightsplit dlq show, then discard it.")
        self._mailbox.send_again(origin, letter.message_id, delivery)
        self._replayed[letter.message_id].append((letter, replace(delivery, body=b"", envelope=None)))


_Action = Callable[[_Pass, Letter, Delivery], None]


def _visit(file: WorkerFile, prefetch: int, act: _Action) -> bool:
    """Act on each dead letter of the worker's sites; return whether all letters were seen.

    Raises:
        BrokerError: 205 the run was not opened, 209 the broker is blocked, 210 another command reads.
        RunError: 602 the site is not part of the run.
    """
    broker, run, complete = file.open_broker(), file.run_config.run, True
    for site, queues in file.queues().items():
        if site not in run.sites:
            raise RunError(602, f"{site} is not among the sites of {run.id}.", "correct site.name.")
        owner = f"dlq:{socket.gethostname()}:{os.getpid()}"
        with broker.link([queues.dead], prefetch, owner) as link, closing(_exit_log(file)) as exit_log:
            one = _Pass(_open_mailbox(file, link, exit_log, site, queues), file.sealer, site, queues)
            for letter, delivery in one:
                act(one, letter, delivery)
            complete = complete and one.complete
    return complete


def _exit_log(file: WorkerFile) -> ExitLog:
    """Return the log of a site; at the server nothing is written to it."""
    policy = file.base / (file.config.policy if isinstance(file.config, SiteSection) else "")
    return ExitLog(file.state_folder / FILE, file.run_config.digest, policy)


def _open_mailbox(file: WorkerFile, link: Link, exit_log: ExitLog, site: str, queues: SiteQueues) -> Mailbox:
    """Make the worker's mailbox; a replayed message of a site passes its gate again, and is logged again."""
    config = file.run_config
    run, schema, limit = config.run.id, sketch(config).get, config.content_bytes
    if isinstance(file.config, SiteSection):
        routes = {SERVER: Route(outgoing=queues.up, incoming=queues.down, dead=queues.dead)}
        gate = Gate(file.base / file.config.policy, config)
        return Mailbox(run, site, link, routes, schema, limit, gate, exit_log)
    routes = {site: Route(outgoing=queues.down, incoming=queues.up, dead=queues.dead)}
    return Mailbox(run, SERVER, link, routes, schema, limit)


def list_letters(file: WorkerFile, as_json: bool) -> None:
    """Print a line for each dead letter. Raises as `_visit`."""
    letters: list[Letter] = []
    complete = _visit(file, PREFETCH_MAX, lambda one, letter, delivery: letters.append(letter))
    if as_json:
        rows = [asdict(letter) for letter in letters]
        print(json.dumps({"run": file.run_config.run.id, "complete": complete, "dead_letters": rows}, indent=2))
        return
    console = screen()
    if letters:
        names = ("id", "site", "number", "reason", "sender", "time", "bytes", "from")
        table = columns(*names, numbers=("number", "bytes"))
        for letter in letters:
            facts = letter.number, letter.sentence, letter.sender, letter.time, letter.size, letter.queue
            table.add_row(letter.id, letter.site, *("-" if fact is None else str(fact) for fact in facts))
        console.print(table)
    more = "" if complete else f"; there are more behind the oldest {PREFETCH_MAX} of a site"
    console.print(counted(len(letters), "dead letter") + more)


def show_letter(file: WorkerFile, letter_id: str, as_json: bool) -> None:
    """Print all of one dead letter except the values of its tensors.

    Raises:
        RunError: 606 no letter has this id; others as `_visit`.
    """
    found: dict[str, tuple[Letter, Delivery]] = {}

    def keep(one: _Pass, letter: Letter, delivery: Delivery) -> None:
        if letter.id == letter_id:
            found.setdefault(letter_id, (letter, delivery))

    _visit(file, PREFETCH_MAX, keep)
    if not found:
        raise _not_found([letter_id])
    letter, delivery = found[letter_id]
    message: dict[str, object] | None
    try:
        message, unreadable = asdict(header_of(delivery.body)), None
    except Refused as refusal:
        message, unreadable = None, str(refusal)
    headers = dict(sorted(delivery.headers.items()))
    if as_json:
        facts = {"letter": asdict(letter), "headers": headers, "message": message, "unreadable": unreadable}
        print(json.dumps(facts, indent=2))
        return
    lines = asdict(letter) | {f"header {name}": value for name, value in headers.items()}
    lines |= {f"message {name}": value for name, value in (message or {"header": unreadable}).items()}
    for name, value in lines.items():
        print(shown(f"{name:<20} {'-' if value is None else value}"))


def replay_letters(file: WorkerFile, chosen: Collection[str] | None) -> None:
    """Send dead letters to their original queues again.

    Args:
        file: the worker's file.
        chosen: ids of the letters; None for all.

    Raises:
        RunError: 606, 607; BrokerError: 203; others as `_visit`. Letters replayed before stay replayed.
    """
    try:
        number = _settle(file, chosen, _Pass.replay)
    except MissingRightError:
        sentence = "this user may not publish the server's messages."
        raise RunError(607, sentence, "have the centre do it: nightsplit dlq replay SERVER.TOML ID.") from None
    print(f"{counted(number, 'dead letter')} sent again")


def discard_letters(file: WorkerFile, chosen: Collection[str] | None) -> None:
    """Delete dead letters for good; arguments and errors as `replay_letters`."""
    print(f"{counted(_settle(file, chosen, _Pass.discard), 'dead letter')} discarded")


def _settle(file: WorkerFile, chosen: Collection[str] | None, act: _Action) -> int:
    """Act on the chosen letters and return their number. RunError 606 names the ids that were not found."""
    found: list[str] = []

    def settle(one: _Pass, letter: Letter, delivery: Delivery) -> None:
        if chosen is None or letter.id in chosen:
            act(one, letter, delivery)
            found.append(letter.id)

    _visit(file, PREFETCH if chosen is None else PREFETCH_MAX, settle)
    if missing := sorted(set(chosen or ()) - set(found)):
        raise _not_found(missing, len(found))
    return len(found)


def _not_found(ids: Collection[str], others: int = 0) -> RunError:
    sentence = f"no letter has the id {', '.join(ids)}" + (f"; the other {others} are done." if others else ".")
    return RunError(606, sentence, "list the letters with: nightsplit dlq list.")
