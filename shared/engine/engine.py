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
gets deliveries below the marks, and only acknowledges them. docs/delivery.md has the whole contract.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from nightsplit.shared import crash_points
from nightsplit.shared.engine.counters import Progress
from nightsplit.shared.engine.dead_letter import bury
from nightsplit.shared.engine.effects import Effect, Finish, Record, Send
from nightsplit.shared.engine.fencing import Authority
from nightsplit.shared.engine.order import CLOSES, LEAVES, Turns
from nightsplit.shared.engine.pending import Applied, Pending, Sent
from nightsplit.shared.engine.role import Role
from nightsplit.shared.errors import Refused, StateError
from nightsplit.shared.storage.checkpoint import Checkpoints, Snapshot
from nightsplit.shared.transport import Confirmed, Delivery, Link, Recovered, Route, Trouble
from nightsplit.shared.wire import format as wire
from nightsplit.shared.wire.message import FROM_SITES, SERVER, UNSEQUENCED, Header, Message


class Engine:
    """Runs one role over one link until it finishes or is told to stop.

    Args:
        run: id of the run.
        role: what to run.
        link: consumes the incoming queue of every route.
        routes: by peer name.
        checkpoints: this worker's.
        authority: lets checkpoints count.
        record: takes the role's lines of metrics.
        message_bytes: largest message, both ways.
        interval_seconds: longest time between checkpoints while there is something to save.
        decide: as in `Turns`; asked of a journalled role.
    """

    def __init__(
        self,
        run: str,
        role: Role,
        link: Link,
        routes: Mapping[str, Route],
        checkpoints: Checkpoints,
        authority: Authority,
        record: Callable[[Record], None] = lambda line: None,
        message_bytes: int = 16 * 2**20,
        interval_seconds: float = 30.0,
        decide: Callable[[], str | None] = lambda: None,
    ) -> None:
        self.progress = Progress()
        self._run = run
        self._role = role
        self._turns = Turns(role, authority, decide)
        self._link = link
        self._routes = routes
        self._senders = {route.incoming.name: peer for peer, route in routes.items()}
        self._checkpoints = checkpoints
        self._authority = authority
        self._record = record
        self._message_bytes = message_bytes
        self._interval = interval_seconds
        # A quarter of the prefetch each for: messages out of order, applied since the last
        # snapshot, in a snapshot being confirmed, and in the newest of the two kept checkpoints.
        self._share = max(1, link.prefetch // 4)

        self.marks = dict.fromkeys(routes, 0)
        """Last applied seq per sender."""
        self.position = 0
        """Messages applied in sequence, over all senders; every other entry of the journal counts as one more."""
        self._counter = 0
        self._inbox: dict[str, dict[int, Delivery]] = {peer: {} for peer in routes}
        self._applied = Applied(checkpoints.keep)
        self._sent = Sent()
        self._pending: Pending | None = None
        self._dirty = False
        self._last_snapshot = time.monotonic()
        self._finish: Finish | None = None

    def recover(self) -> list[str]:
        """Restore the newest checkpoint that counts; returns a line for each one passed over."""
        found = self._checkpoints.load(self._authority.pointer())
        if found is None:
            return []
        pointer, snapshot, damaged = found
        self.progress.passed_over(damaged)
        engine = snapshot.facts["engine"]
        if engine["run"] != self._run or set(engine["marks"]) != set(self.marks):
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
                    self.progress.received(event.body)
                    self._take(event)
                case Confirmed(message_id):
                    self._confirmed(message_id)
                case Trouble(reason):
                    self.progress.blocked(reason)
                case Recovered():
                    self.progress.recovered()
            event = self._link.receive(0.0)
        return received

    def _take(self, delivery: Delivery) -> None:
        """Sort a delivery: to be applied in its turn, applied now, a duplicate, or refused."""
        sender = self._senders[delivery.queue]
        try:
            header = wire.peek(delivery.body)
            place, us = (header.run, header.sender, header.receiver), self._role.name
            if place != (self._run, sender, us) or not delivery.may_be_from(sender, us):
                raise Refused(
                    310,
                    f"{header.message_id} came through {delivery.queue}{delivery.by}.",
                    "check which worker publishes to that queue.",
                )
            if header.kind in UNSEQUENCED:
                message = self._decode(header, delivery)
                self._perform(self._role.on(message))
                self._keep_until_saved(delivery)
                return
        except Refused as refusal:
            self._to_dead_letters(delivery, sender, refusal)
            return
        if header.seq <= self.marks[sender] or sender in self._role.left_out:
            self.progress.counts["duplicates"] += 1
            self._keep_until_saved(delivery)
        elif header.seq in self._inbox[sender]:
            self.progress.counts["duplicates"] += 1
            self._keep_until_saved(self._inbox[sender][header.seq])
            self._inbox[sender][header.seq] = delivery  # the older copy may be from before a reconnect
        else:
            self._inbox[sender][header.seq] = delivery

    def _apply(self) -> bool:
        """Apply the message whose turn it is, if it is here."""
        if not self._role.rederives and self._broker_is_busy():
            return False  # its reply could not be sent yet
        sender = self._turns.choose(self.position + 1, self._ready())
        if sender is None:
            return False
        if sender == CLOSES:
            self.position += 1
            self._perform(self._role.close())
            return True
        if sender.startswith(LEAVES):
            self._go_on_without(sender.removeprefix(LEAVES))
            return True
        seq = self.marks[sender] + 1
        delivery = self._inbox[sender].pop(seq)
        header = wire.peek(delivery.body)
        try:
            effects = self._role.on(self._decode(header, delivery))
        except Refused as refusal:
            # Refusing counts as applying: a later message must not wait for this one for ever.
            effects = self._role.refused(header, refusal)
            self._to_dead_letters(delivery, sender, refusal, seq)
        else:
            self._keep_until_saved(delivery)
        self.marks[sender] = seq
        self.position += 1
        self.progress.counts["applied"] += 1
        self._perform(effects)
        crash_points.reach("after_apply")
        return True

    def _go_on_without(self, sender: str) -> None:
        """As the journal says; whatever else comes from the sender is only acknowledged."""
        for delivery in self._inbox[sender].values():
            self._keep_until_saved(delivery)
        self._inbox[sender].clear()
        self.position += 1
        self.progress.left_out(sender, self.position)
        self._perform(self._role.excuse(sender))

    def _ready(self) -> set[str]:
        return {sender for sender, held in self._inbox.items() if self.marks[sender] + 1 in held}

    def _unblock(self) -> None:
        """A full prefetch with nothing to apply would wait for ever: save, acknowledge, then ask for more."""
        for sender, held in self._inbox.items():
            if self.marks[sender] + 1 in held:
                continue
            kept = self._applied.of(self._routes[sender].incoming.name)
            if len(held) + kept >= self._link.prefetch:
                if kept:
                    self._save_if_due(force=True)
                else:
                    self._link.raise_prefetch(2 * self._link.prefetch)

    def _broker_is_busy(self) -> bool:
        """Never run far ahead of the oldest unconfirmed: a gap must fit into the receiver's prefetch."""
        return self._sent.is_ahead(self._share)

    def _decode(self, header: Header, delivery: Delivery) -> Message:
        payload = self._role.payload(header.kind)
        if payload is None or (header.kind in FROM_SITES) is (header.sender == SERVER):
            raise Refused(303, f"{header.kind} from {header.sender} is not used here.", "run one protocol at both.")
        return wire.decode(delivery.body, payload, self._message_bytes)

    def _to_dead_letters(self, delivery: Delivery, sender: str, refusal: Refused, seq: int | None = None) -> None:
        """Publish a copy with the reason; the original is acknowledged like an applied message."""
        self.progress.refused(sender, seq, refusal)
        name = f"dead/{delivery.message_id}/{self.progress.counts['refused']}"
        bury(self._link, self._routes[sender].dead, name, delivery, sender, refusal)
        self._keep_until_saved(delivery)

    def _keep_until_saved(self, delivery: Delivery) -> None:
        self._applied.take(delivery)
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
                case Finish():
                    self._finish = effect
        self._dirty = self._dirty or bool(effects)

    def _send(self, send: Send) -> None:
        header = Header(
            self._run, self._role.name, send.receiver, send.kind, send.seq, send.reply_to, send.version,
            self._authority.fence,
        )  # fmt: skip
        payload = self._role.payload(send.kind)
        assert payload is not None, send.kind
        body = wire.encode(Message(header, send.tensors, send.scalars), payload, self._message_bytes)
        self._link.publish(self._routes[send.receiver].outgoing, header.message_id, body)
        if send.seq:
            self._sent.add(header.message_id, send.receiver, send.seq)
        self.progress.sent(body)

    # -- [2] confirm, [3] checkpoint, [4] ack ---------------------------------------------------

    def _confirmed(self, message_id: str) -> None:
        crash_points.reach("before_confirm")
        self._sent.confirmed(message_id)
        self.progress.counts["confirmed"] += 1
        if self._pending is not None:
            self._pending.waiting_for.discard(message_id)
        crash_points.reach("after_confirm")

    def _save_if_due(self, force: bool = False) -> None:
        if self._pending is not None:
            if not self._pending.waiting_for:
                self._commit(self._pending)
            return
        # What is sealed must become free even on a quiet day: consumer_timeout would close the channel.
        late = (self._dirty or self._applied.sealed) and time.monotonic() - self._last_snapshot > self._interval
        if force or late or self._applied.most_open >= self._share:
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

    def _snapshot(self) -> Pending:
        role = self._role.snapshot(self._sent.first)
        engine = {"run": self._run, "marks": dict(self.marks), "position": self.position}
        pending = Pending(
            Snapshot(role.tensors, {"engine": engine, "role": role.facts}),
            # Copies for the dead letter queue cannot be made again by any role.
            {sent for sent in self._link.unconfirmed if not (self._role.rederives and sent in self._sent)},
        )
        self._applied.seal()
        self._dirty = False
        self._last_snapshot = time.monotonic()
        return pending

    def _commit(self, pending: Pending) -> None:
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
        self.progress.counts["checkpoints"] += 1
        self._perform(self._role.saved())
        for delivery in self._applied.saved():
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
        for delivery in self._applied.release():
            self._link.acknowledge(delivery)
