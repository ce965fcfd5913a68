"""Loop that runs every role with exactly-once effects.

    recover   newest valid checkpoint ─▶ role.restore
    loop      delivery ─▶ mark check ─▶ role.on ─▶ effects ─▶ publish            [1] apply
              every N deliveries or T seconds:
                 snapshot(role state, marks, position)
                 work on until the sends that the snapshot counts are confirmed    [2] confirm
                 write, force to disk, rename, move the pointer                    [3] checkpoint
                 ack the inputs of the *oldest kept* checkpoint                    [4] ack

Inputs stay at the broker, the write-ahead log, until two checkpoints with their effects are durable. After a crash
before [3] the same inputs give the same state and messages, which receivers drop by their marks; after one behind [3],
deliveries below the marks are only acknowledged. docs/explanation/delivery.md has the full rules.
"""

import time
from collections.abc import Callable, Mapping
from logging import WARNING
from typing import assert_never

from nightsplit.shared import crash_points
from nightsplit.shared.engine.effects import (
    Again,
    Cosigned,
    Effect,
    Expect,
    Finish,
    Record,
    Release,
    Send,
    Spend,
    forbid_spending,
)
from nightsplit.shared.engine.failures import Failures
from nightsplit.shared.engine.fencing import CheckpointAuthority, write_valid
from nightsplit.shared.engine.inbox import Inbox
from nightsplit.shared.engine.mailbox import DeadLetter, Mailbox, Outcome, Received
from nightsplit.shared.engine.order import Apply, CloseRound, DeliveryOrder, Exclude, OrderEntry
from nightsplit.shared.engine.outgoing import Outgoing
from nightsplit.shared.engine.patience import Patience
from nightsplit.shared.engine.pending import PendingSnapshot, UnackedDeliveries
from nightsplit.shared.engine.role import Role
from nightsplit.shared.errors import Refused, StateError
from nightsplit.shared.log import event
from nightsplit.shared.storage.checkpoint import Checkpoints, Snapshot
from nightsplit.shared.transport import Blocked, Confirmed, Delivery, Unblocked
from nightsplit.shared.wire.message import UNSEQUENCED, Message


class Engine:
    """Engine that runs one role over one mailbox until it finishes or has to stop.

    Args:
        authority: makes checkpoints valid.
        record: writes the role's lines of metrics.
        spend: records privacy spending durably.
        decide: returns an entry to journal when no message can be applied; asked only if the role is journalled.
        failures: refusal by SHA-256 of the body, for messages that a role failed on before (`refusing_failures`).
    """

    monotonic: Callable[[], float] = staticmethod(time.monotonic)
    """Clock, in seconds, by which checkpoints are due."""
    sync_records: Callable[[], None] = staticmethod(lambda: None)
    """Forces the role's lines of metrics to disk, before a checkpoint that contains their steps."""

    def __init__(
        self, role: Role, mailbox: Mailbox, checkpoints: Checkpoints, authority: CheckpointAuthority,
        record: Callable[[Record], None] = lambda line: None, spend: Callable[[Spend], None] = forbid_spending,
        decide: Callable[[], OrderEntry | None] = lambda: None, failures: Mapping[str, Refused] = {},
    ) -> None:  # fmt: skip
        self.counters = mailbox.counters
        self._role = role
        self._mailbox = mailbox
        self._link = mailbox.link
        self._order = DeliveryOrder(role, authority, decide)
        self._checkpoints = checkpoints
        self._authority = authority
        self._record = record
        self._spend = spend
        self._failures = Failures(failures)
        # A delivery within the prefetch waits for a predecessor, is applied since the last snapshot, is in the pending
        # snapshot, or is in the newest checkpoint and not yet in the oldest kept one: a quarter for each.
        self._quarter = max(1, self._link.prefetch // 4)

        self.marks = dict.fromkeys(mailbox.routes, 0)
        """Last applied seq per sender."""
        self.position = 0
        """Number of entries of the order so far: sequenced messages of all senders, exclusions and closed rounds."""
        self.last: Outcome | None = None
        """Outcome of the last sequenced message."""
        self._checkpoint_number = 0
        """Number of the last checkpoint written."""
        self._inbox = {peer: Inbox(route.incoming) for peer, route in mailbox.routes.items()}
        self._unacked = UnackedDeliveries(checkpoints.keep)
        self._outgoing = Outgoing(role, mailbox, authority, unconfirmed_max=self._quarter)
        self._pending: PendingSnapshot | None = None
        self._patience = Patience(lambda: self.monotonic())
        self._dirty, self._last_snapshot = False, self.monotonic()
        self._finish: Finish | None = None

    def recover(self) -> list[str]:
        """Restore the newest valid checkpoint; return a line for each damaged one that was skipped."""
        found = self._checkpoints.load(self._authority.pointer())
        if found is None:
            return []
        pointer, snapshot, damaged = found
        for line in damaged:
            event("checkpoint_skipped", WARNING, checkpoint=line)
        saved = snapshot.facts["engine"]
        if saved["run"] != self._mailbox.run or set(saved["marks"]) != set(self.marks):
            sentence = f"{self._checkpoints.folder} holds run {saved['run']} with {', '.join(saved['marks'])}."
            raise StateError(506, sentence, "give every run and worker its own state folder.")
        self.marks, self.position, self._checkpoint_number = saved["marks"], saved["position"], pointer.counter
        self._role.restore(Snapshot(snapshot.tensors, snapshot.facts["role"]))
        return damaged

    def run(self, stop: Callable[[], bool], idle_seconds: float | None = None) -> bool:
        """Work until the role has finished, `stop()` holds, or nothing happened for `idle_seconds`.

        Returns:
            Whether the role has finished. If not, its work is in a checkpoint, or will be repeated
            from the broker's copies.

        Raises:
            StateError: 501 disk full, 505 another server took over.
            BrokerError: a failure that no retry can repair.
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
        """Start the role."""
        self._last_snapshot = self.monotonic()
        self._perform(self._role.start())

    @property
    def finished(self) -> bool:
        """True if the role's work is done."""
        return self._finish is not None

    def step(self, wait: float) -> bool:
        """Run one turn of the loop, waiting up to `wait` seconds for work; return whether there was any."""
        worked = self._outgoing.repeat() or self._apply() or self._work()
        self._make_room()
        received = self._receive(0.0 if worked else wait)
        if self._patience.is_over(worked) and self.counters.blocked_reason is None:
            self._perform(self._role.remind())
        self._advance_checkpoint()
        return worked or received

    def leave(self) -> None:
        """Prepare to exit: complete a finished run, or save the work so far if that needs no waiting."""
        if self._finish is not None:
            self._end(self._finish)
        # Otherwise the work is repeated from the broker's copies: waiting for confirms could block the exit.
        elif self._dirty and (self._role.rederives or not self._link.unconfirmed):
            self._save_now()

    # -- [1] apply -----------------------------------------------------------------------------

    def _receive(self, timeout: float) -> bool:
        """Handle all available events; return whether there were any."""
        incoming = self._link.receive(timeout)
        received = incoming is not None
        while incoming is not None:
            match incoming:
                case Delivery():
                    self._take(incoming)
                case Confirmed(message_id):
                    self._confirm(message_id)
                case Blocked(reason):
                    self.counters.block(reason)
                case Unblocked():
                    self.counters.unblock()
            incoming = self._link.receive(0.0)
        return received

    def _take(self, delivery: Delivery) -> None:
        """Sort a delivery: to be applied in its turn, to be applied now, a duplicate, or refused."""
        received = self._mailbox.receive(delivery)
        if isinstance(received, DeadLetter):
            self._keep_until_saved(delivery)
        elif received.header.kind in UNSEQUENCED:
            self._apply_unsequenced(received)
        else:
            self._put(received)

    def _put(self, received: Received) -> None:
        """Keep a message until its turn, unless it is a duplicate, and ask for those that were lost before it."""
        sender, seq = received.header.sender, received.header.seq
        inbox, mark = self._inbox[sender], self.marks[sender]
        gap = inbox.gap_before(received, mark)
        duplicate: Delivery | None = received.delivery
        if seq > mark and sender not in self._role.excluded:
            duplicate = inbox.put(received, is_next=seq == mark + 1)
            self._ask(sender, gap)
        if duplicate is not None:
            self.counters.counts["duplicates"] += 1
            self._keep_until_saved(duplicate)

    def _apply(self) -> bool:
        """Perform the next entry of the order; return False if there is none yet."""
        # A message would produce a reply, and no more may be sent yet.
        if self._role.busy or (not self._role.rederives and self._outgoing.is_ahead):
            return False
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
        """Apply a sender's next message. A refused one counts as applied, so that later ones need not wait for it."""
        seq = self.marks[sender] + 1
        received = self._inbox[sender].pop(seq)
        refusal: Refused | None = None
        with self._failures.blame(received):
            try:
                effects = self._role.on(self._open(received))
            except Refused as reason:
                refusal = reason
                effects = self._role.refused(received.header, reason)
                self._mailbox.dead_letter(received.delivery, reason, seq)
            self._keep_until_saved(received.delivery)
            self.marks[sender] = seq
            self.position += 1
            self.last = Outcome(received.header, refusal)
            self.counters.counts["applied"] += 1
            self._perform(effects)
        crash_points.reach("after_apply")

    def _apply_unsequenced(self, received: Received) -> None:
        """Apply a message that belongs to no sequence."""
        with self._failures.blame(received):
            try:
                effects = self._role.on(self._open(received))
            except Refused as refusal:
                self._mailbox.dead_letter(received.delivery, refusal)
            else:
                self._perform(effects)
            self._keep_until_saved(received.delivery)

    def _open(self, received: Received) -> Message:
        self._failures.check(received)
        return self._mailbox.open(received)

    def _ask(self, sender: str, missing: range) -> None:
        """Ask a sender for messages that were lost, if any."""
        if missing:
            event("messages_missing", WARNING, sender=sender, first=missing[0], last=missing[-1])
            self._perform(self._role.ask(sender, missing))

    def _exclude(self, sender: str) -> None:
        """Exclude a sender; its further messages are only acknowledged."""
        for delivery in self._inbox[sender].clear():
            self._keep_until_saved(delivery)
        self.position += 1
        event("site_excluded", WARNING, site=sender, position=self.position)
        self._perform(self._role.exclude(sender))

    @property
    def ready(self) -> set[str]:
        """Senders whose next message has arrived."""
        return {sender for sender, inbox in self._inbox.items() if self.marks[sender] + 1 in inbox}

    def _make_room(self) -> None:
        """Make room for a sender's next message if later ones fill the prefetch: acknowledge some, else raise it."""
        for sender, inbox in self._inbox.items():
            if (delivery := inbox.recall(self.marks[sender] + 1, self._mailbox.message_bytes)) is not None:
                self._link.give_back(delivery)
            if self.marks[sender] + 1 in inbox:
                continue
            unacked = self._unacked.count(self._mailbox.routes[sender].incoming.name)
            is_full = len(inbox) + unacked >= self._link.prefetch
            if is_full and unacked:
                self._advance_checkpoint(early=True)
            elif is_full and inbox.may_grow:
                self._link.raise_prefetch(2 * self._link.prefetch)

    def _keep_until_saved(self, delivery: Delivery) -> None:
        self._unacked.add(delivery)
        self._dirty = True

    # -- effects -------------------------------------------------------------------------------

    def _work(self) -> bool:
        """Perform further work of the role, unless its sends are too far ahead of the confirms."""
        if self._outgoing.is_ahead:
            return False
        effects = self._role.next()
        self._perform(effects)
        return bool(effects)

    def _perform(self, effects: list[Effect]) -> None:
        for effect in effects:
            match effect:
                case Send() | Again() | Release():
                    self._outgoing.perform(effect)
                case Record():
                    self._record(effect)
                case Spend():
                    self._spend(effect)
                case Cosigned():
                    self._mailbox.witness(effect.signed)
                case Expect(sender, last):
                    self._ask(sender, self._inbox[sender].missing(self.marks[sender], last))
                case Finish():
                    self._finish = effect
                case _:
                    assert_never(effect)
        self._dirty = self._dirty or bool(effects)

    # -- [2] confirm, [3] checkpoint, [4] ack ---------------------------------------------------

    def _confirm(self, message_id: str) -> None:
        crash_points.reach("before_confirm")
        self._outgoing.unconfirmed.confirm(message_id)
        self.counters.counts["confirmed"] += 1
        if self._pending is not None:
            self._pending.waiting_for.discard(message_id)
        crash_points.reach("after_confirm")

    def _advance_checkpoint(self, early: bool = False) -> None:
        """Commit the pending snapshot if its sends are confirmed; without one, take one if due or `early`."""
        if self._pending is not None:
            if not self._pending.waiting_for:
                self._commit(self._pending)
            return
        # Deliveries in earlier snapshots need further checkpoints before they can be acknowledged, even if nothing new
        # arrives: RabbitMQ takes them back at consumer_timeout.
        has_work = self._dirty or self._unacked.has_sealed
        is_due = has_work and self.monotonic() - self._last_snapshot > self._checkpoints.interval_seconds
        if early or is_due or self._unacked.open_max >= self._quarter:
            self._pending = self._snapshot()

    def _save_now(self) -> None:
        """Write a checkpoint of the present state, once the sends that it waits for are confirmed."""
        self._finish_pending()
        self._pending = self._snapshot()
        self._finish_pending()

    def _finish_pending(self) -> None:
        while self._pending is not None:
            if self._pending.waiting_for:
                self._receive(0.1)
            else:
                self._commit(self._pending)

    def _snapshot(self) -> PendingSnapshot:
        of_role = self._role.snapshot(self._outgoing.unconfirmed.first)
        of_engine = {"run": self._mailbox.run, "marks": dict(self.marks), "position": self.position}
        waiting_for = set(self._link.unconfirmed)
        if self._role.rederives:
            # After a crash the role makes its sends again, but neither dead letters nor messages without a number.
            waiting_for = {sent for sent in waiting_for if sent not in self._outgoing.unconfirmed}
        snapshot = Snapshot(of_role.tensors, {"engine": of_engine, "role": of_role.facts})
        self._unacked.seal()
        self._dirty, self._last_snapshot = False, self.monotonic()
        return PendingSnapshot(snapshot, waiting_for)

    def _commit(self, pending: PendingSnapshot) -> None:
        self._pending = None
        self._checkpoint_number += 1
        self.sync_records()
        self._mailbox.sync()
        write_valid(self._checkpoints, self._authority, self._checkpoint_number, pending.snapshot)
        self.counters.counts["checkpoints"] += 1
        self._perform(self._role.saved())
        for delivery in self._unacked.free():
            crash_points.reach("before_ack")
            self._link.acknowledge(delivery)
            crash_points.reach("after_ack")

    def _end(self, finish: Finish) -> None:
        """Save the end in all kept checkpoints, so that none reopens the run; send the farewell; acknowledge all."""
        while not self._role.rederives and self._outgoing.has_repeats:
            if not self._outgoing.repeat():
                self._receive(0.1)
        for _ in range(self._checkpoints.keep):
            self._save_now()
        self._perform(list(finish.farewell))
        while not self._role.rederives and self._link.unconfirmed:
            self._receive(0.1)
        for delivery in self._unacked.free_all():
            self._link.acknowledge(delivery)
