"""The one loop that runs every role, and makes it exactly-once in effect.

    recover   newest valid checkpoint ─▶ role.restore
    loop      delivery ─▶ mark check ─▶ role.on ─▶ effects ─▶ publish            [1] apply
              every N deliveries or T seconds:
                 snapshot(role state, marks, position)
                 wait, while working on, until what it counts as sent is confirmed [2] confirm
                 write, force to disk, rename, move the pointer                    [3] checkpoint
                 ack what the *oldest kept* checkpoint contains                    [4] ack

Inputs stay at the broker until a checkpoint that contains their effect is durable, twice over:
the broker is the write-ahead log. A crash before [3] replays the same inputs from the same state
and publishes byte-equal messages again, which receivers drop by their marks; a crash after [3]
gets deliveries below the marks, and only acknowledges them. docs/explanation/delivery.md has the whole contract.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import assert_never

from nightsplit.shared import crash_points
from nightsplit.shared.engine.effects import Effect, Finish, Record, Send, Spend, unpaid
from nightsplit.shared.engine.failures import Failures
from nightsplit.shared.engine.fencing import CheckpointAuthority
from nightsplit.shared.engine.mailbox import Mailbox, PutAside, Received
from nightsplit.shared.engine.order import Apply, CloseRound, DeliveryOrder, Exclude, OrderEntry
from nightsplit.shared.engine.pending import PendingSnapshot, UnackedDeliveries, UnconfirmedSends
from nightsplit.shared.engine.role import Role
from nightsplit.shared.errors import Refused, StateError
from nightsplit.shared.storage.checkpoint import Checkpoints, Snapshot
from nightsplit.shared.transport import Blocked, Confirmed, Delivery, Unblocked
from nightsplit.shared.wire.message import UNSEQUENCED, Header, Message


@dataclass(frozen=True, slots=True)
class Outcome:
    """A message that was applied in its sequence.

    Attributes:
        header: of the message.
        refusal: why it was refused; it counts as applied.
    """

    header: Header
    refusal: Refused | None


class Engine:
    """Runs one role over one mailbox until it finishes or is told to stop.

    Args:
        role: what to run.
        mailbox: its messages, in and out.
        checkpoints: this worker's.
        authority: lets checkpoints count.
        record: takes the role's lines of metrics.
        spend: pays for differential privacy, durably.
        decide: as in `DeliveryOrder`; asked of a journalled role.
        interval_seconds: longest time between checkpoints while there is something to save.
        failures: messages to refuse since a role failed on them, as in `refusing_failures`.
        monotonic: seconds on the clock by which checkpoints are due.
    """

    def __init__(
        self,
        role: Role,
        mailbox: Mailbox,
        checkpoints: Checkpoints,
        authority: CheckpointAuthority,
        record: Callable[[Record], None] = lambda line: None,
        spend: Callable[[Spend], None] = unpaid,
        decide: Callable[[], OrderEntry | None] = lambda: None,
        interval_seconds: float = 30.0,
        failures: Mapping[str, Refused] = {},
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self.counters = mailbox.counters
        self._role = role
        self._mailbox = mailbox
        self._link = mailbox.link
        self._order = DeliveryOrder(role, authority, decide)
        self._checkpoints = checkpoints
        self._authority = authority
        self._record = record
        self._spend = spend
        self._interval, self._monotonic = interval_seconds, monotonic
        self._failures = Failures(failures, mailbox.counters)
        # A quarter of the prefetch each for: messages out of order, applied since the last
        # snapshot, in a snapshot being confirmed, and in the newest of the two kept checkpoints.
        self._share = max(1, self._link.prefetch // 4)

        self.marks = dict.fromkeys(mailbox.routes, 0)
        """Last applied seq per sender."""
        self.position = 0
        """Messages applied in sequence, over all senders; every other entry of the journal counts as one more."""
        self.last: Outcome | None = None
        """The message that was applied last."""
        self._counter = 0
        self._inbox: dict[str, dict[int, Received]] = {peer: {} for peer in mailbox.routes}
        self._unacked = UnackedDeliveries(checkpoints.keep)
        self._unconfirmed = UnconfirmedSends()
        self._pending: PendingSnapshot | None = None
        self._dirty = False
        self._last_snapshot = self._monotonic()
        self._finish: Finish | None = None

    def recover(self) -> list[str]:
        """Restore the newest checkpoint that counts; returns a line for each one passed over."""
        found = self._checkpoints.load(self._authority.pointer())
        if found is None:
            return []
        pointer, snapshot, damaged = found
        self.counters.skipped(damaged)
        engine = snapshot.facts["engine"]
        if engine["run"] != self._mailbox.run or set(engine["marks"]) != set(self.marks):
            raise StateError(
                506,
                f"{self._checkpoints.folder} holds run {engine['run']} with {', '.join(engine['marks'])}.",
                "give every run and worker its own state folder.",
            )
        self.marks, self.position, self._counter = engine["marks"], engine["position"], pointer.counter
        self._role.restore(Snapshot(snapshot.tensors, snapshot.facts["role"]))
        return damaged

    def run(self, stop: Callable[[], bool], idle_seconds: float | None = None) -> bool:
        """Work until the role has finished, `stop()` holds, or nothing happened for `idle_seconds`.

        Returns:
            Whether the role has finished. If not, what was done is in a checkpoint, or will be
            done again from the broker's copies.

        Raises:
            StateError: 501 disk full, 505 another server took over.
            BrokerError: what no retry can mend.
        """
        self.start()
        last_event = time.monotonic()
        while not self.finished and not stop():
            if self.step(0.1):
                last_event = time.monotonic()
            elif self._link.unconfirmed or idle_seconds is None:
                continue
            elif time.monotonic() - last_event > idle_seconds:
                break
        self.leave()
        return self.finished

    def start(self) -> None:
        """Let the role begin."""
        self._perform(self._role.start())

    @property
    def finished(self) -> bool:
        """Whether the role's work is done."""
        return self._finish is not None

    def step(self, wait: float) -> bool:
        """One turn of the loop; waits up to `wait` seconds when there is nothing to do. Whether there was."""
        worked = self._apply() or self._work()
        self._unblock()
        received = self._receive(0.0 if worked else wait)
        self._save_if_due()
        return worked or received

    def leave(self) -> None:
        """Make the end durable, or what was done so far."""
        if self._finish is not None:
            self._end(self._finish)
        elif self._dirty and (self._role.rederives or not self._link.unconfirmed):
            self._save_now()

    # -- [1] apply -----------------------------------------------------------------------------

    def _receive(self, timeout: float) -> bool:
        """Take in all events there are; whether there were any."""
        event = self._link.receive(timeout)
        received = event is not None
        while event is not None:
            match event:
                case Delivery():
                    self._take(event)
                case Confirmed(message_id):
                    self._confirmed(message_id)
                case Blocked(reason):
                    self.counters.blocked(reason)
                case Unblocked():
                    self.counters.recovered()
            event = self._link.receive(0.0)
        return received

    def _take(self, delivery: Delivery) -> None:
        """Sort a delivery: to be applied in its turn, applied now, a duplicate, or refused."""
        received = self._mailbox.receive(delivery)
        if isinstance(received, PutAside):
            self._keep_until_saved(received.delivery)
            return
        sender, seq = received.header.sender, received.header.seq
        if received.header.kind in UNSEQUENCED:
            self._apply_unsequenced(received)
        elif seq <= self.marks[sender] or sender in self._role.excluded:
            self.counters.counts["duplicates"] += 1
            self._keep_until_saved(delivery)
        elif seq in self._inbox[sender]:
            self.counters.counts["duplicates"] += 1
            self._keep_until_saved(self._inbox[sender][seq].delivery)
            self._inbox[sender][seq] = received  # the older copy may be from before a reconnect
        else:
            self._inbox[sender][seq] = received

    def _apply(self) -> bool:
        """Perform the next entry of the order, if it can be."""
        if not self._role.rederives and self._broker_is_busy():
            return False  # its reply could not be sent yet
        match self._order.choose(self.position + 1, self.ready):
            case None:
                return False
            case Apply(sender):
                self._apply_next(sender)
            case Exclude(sender):
                self._exclude(sender)
            case CloseRound():
                self.position += 1
                self._perform(self._role.close())
        return True

    def _apply_next(self, sender: str) -> None:
        """Apply a sender's next message. Refusing counts as applying: a later one must not wait for it for ever."""
        seq = self.marks[sender] + 1
        received = self._inbox[sender].pop(seq)
        refusal: Refused | None = None
        with self._failures.blame(received):
            try:
                effects = self._role.on(self._opened(received))
            except Refused as why:
                refusal = why
                effects = self._role.refused(received.header, why)
                self._mailbox.put_aside(received.delivery, why, seq)
            self._keep_until_saved(received.delivery)
            self.marks[sender] = seq
            self.position += 1
            self.last = Outcome(received.header, refusal)
            self.counters.counts["applied"] += 1
            self._perform(effects)
        crash_points.reach("after_apply")

    def _apply_unsequenced(self, received: Received) -> None:
        """Apply a message without a place in a sequence."""
        with self._failures.blame(received):
            try:
                effects = self._role.on(self._opened(received))
            except Refused as refusal:
                self._mailbox.put_aside(received.delivery, refusal)
            else:
                self._perform(effects)
            self._keep_until_saved(received.delivery)

    def _opened(self, received: Received) -> Message:
        self._failures.expect_sound(received)
        return self._mailbox.open(received)

    def _exclude(self, sender: str) -> None:
        """Go on without a sender; whatever else comes from it is only acknowledged."""
        for received in self._inbox[sender].values():
            self._keep_until_saved(received.delivery)
        self._inbox[sender].clear()
        self.position += 1
        self.counters.excluded(sender, self.position)
        self._perform(self._role.exclude(sender))

    @property
    def ready(self) -> set[str]:
        """Senders whose next message is here."""
        return {sender for sender, held in self._inbox.items() if self.marks[sender] + 1 in held}

    def _unblock(self) -> None:
        """A full prefetch with nothing to apply would wait for ever: save, acknowledge, then ask for more."""
        for sender, held in self._inbox.items():
            if self.marks[sender] + 1 in held:
                continue
            kept = self._unacked.of(self._mailbox.routes[sender].incoming.name)
            if len(held) + kept >= self._link.prefetch:
                if kept:
                    self._save_if_due(force=True)
                else:
                    self._link.raise_prefetch(2 * self._link.prefetch)

    def _broker_is_busy(self) -> bool:
        """Never run far ahead of the oldest unconfirmed: a gap must fit into the receiver's prefetch."""
        return self._unconfirmed.is_ahead(self._share)

    def _keep_until_saved(self, delivery: Delivery) -> None:
        self._unacked.take(delivery)
        self._dirty = True

    # -- effects -------------------------------------------------------------------------------

    def _work(self) -> bool:
        """Ask the role for more, unless the broker is still busy with what it was given."""
        if self._broker_is_busy():
            return False
        effects = self._role.next()
        self._perform(effects)
        return bool(effects)

    def _perform(self, effects: list[Effect]) -> None:
        for effect in effects:
            match effect:
                case Send():
                    self._send(effect)
                case Record():
                    self._record(effect)
                case Spend():
                    self._spend(effect)
                case Finish():
                    self._finish = effect
                case _:
                    assert_never(effect)
        self._dirty = self._dirty or bool(effects)

    def _send(self, send: Send) -> None:
        fence = self._authority.fence
        header = self._mailbox.header(send.receiver, send.kind, send.seq, send.reply_to, send.version, fence)
        message_id = self._mailbox.send(Message(header, send.tensors, send.scalars))
        if send.seq:
            self._unconfirmed.add(message_id, send.receiver, send.seq)

    # -- [2] confirm, [3] checkpoint, [4] ack ---------------------------------------------------

    def _confirmed(self, message_id: str) -> None:
        crash_points.reach("before_confirm")
        self._unconfirmed.confirmed(message_id)
        self.counters.counts["confirmed"] += 1
        if self._pending is not None:
            self._pending.waiting_for.discard(message_id)
        crash_points.reach("after_confirm")

    def _save_if_due(self, force: bool = False) -> None:
        if self._pending is not None:
            if not self._pending.waiting_for:
                self._commit(self._pending)
            return
        # What is sealed must become free even on a quiet day: consumer_timeout would close the channel.
        late = (self._dirty or self._unacked.sealed) and self._monotonic() - self._last_snapshot > self._interval
        if force or late or self._unacked.most_open >= self._share:
            self._pending = self._snapshot()

    def _save_now(self) -> None:
        """A checkpoint of this moment; for a role that cannot rederive, once its sends are confirmed."""
        while self._pending is not None:
            self._receive(0.1)
            self._save_if_due()
        pending = self._snapshot()
        while pending.waiting_for:
            self._pending = pending
            self._receive(0.1)
        self._commit(pending)

    def _snapshot(self) -> PendingSnapshot:
        role = self._role.snapshot(self._unconfirmed.first)
        engine = {"run": self._mailbox.run, "marks": dict(self.marks), "position": self.position}
        pending = PendingSnapshot(
            Snapshot(role.tensors, {"engine": engine, "role": role.facts}),
            # Copies for the dead letter queue cannot be made again by any role.
            {sent for sent in self._link.unconfirmed if not (self._role.rederives and sent in self._unconfirmed)},
        )
        self._unacked.seal()
        self._dirty = False
        self._last_snapshot = self._monotonic()
        return pending

    def _commit(self, pending: PendingSnapshot) -> None:
        self._pending = None
        self._counter += 1
        pointer = self._checkpoints.write(self._authority.fence, self._counter, pending.snapshot)
        if not self._authority.move_pointer(pointer):
            raise StateError(
                505,
                f"a server with a higher fence than {self._authority.fence} is active.",
                "nothing is lost; stop this worker, or the other one.",
            )
        self._checkpoints.prune()
        self.counters.counts["checkpoints"] += 1
        self._perform(self._role.saved())
        for delivery in self._unacked.saved():
            crash_points.reach("before_ack")
            self._link.acknowledge(delivery)
            crash_points.reach("after_ack")

    def _end(self, finish: Finish) -> None:
        """Every kept checkpoint holds the end; only then the farewell, and the last acknowledgements."""
        for _ in range(self._checkpoints.keep):
            self._save_now()
        self._perform(list(finish.farewell))
        while not self._role.rederives and self._link.unconfirmed:
            self._receive(0.1)
        for delivery in self._unacked.release():
            self._link.acknowledge(delivery)
