"""The loop itself, with a role that only writes down what it was given."""

import pytest

from nightsplit.broker.topology import site_queues
from nightsplit.shared.engine.effects import Finish, Record, Send
from nightsplit.shared.engine.engine import Engine
from nightsplit.shared.engine.failures import refusing_failures
from nightsplit.shared.engine.fencing import SoleWriter
from nightsplit.shared.engine.mailbox import Mailbox
from nightsplit.shared.engine.role import Role
from nightsplit.shared.errors import Refused, StateError
from nightsplit.shared.storage.checkpoint import Checkpoints, Snapshot
from nightsplit.shared.transport import Confirmed, Route
from nightsplit.shared.wire import format as wire
from nightsplit.shared.wire import head
from nightsplit.shared.wire.message import SERVER, Header, Kind, Message
from nightsplit.shared.wire.schema import Payload, Reveals, ScalarSpec, contract
from nightsplit.simulation.broker import MemoryBroker

QUEUES = {site: site_queues("run", site, 10_000) for site in ("a", "b")}
CONTRACT = contract(
    Payload(Kind.SMASHED, scalars={"value": ScalarSpec(int, Reveals.COUNTS)}), Payload(Kind.NOTED), Payload(Kind.FINISH)
)


class Diary(Role):
    """Applies numbers; answers each; refuses 13, fails on 66, cannot answer 77; finishes at 99."""

    rederives = False

    def __init__(self):
        super().__init__(SERVER)
        self.applied = []

    def payload(self, kind):
        return CONTRACT.get(kind)

    def start(self):
        return []

    def on(self, message):
        value = message.scalars["value"]
        if value == 13:
            raise Refused(304, "13 is refused.", "send another.")
        if value == 66:
            self.applied.append("half a state")
            raise KeyError("66 was not foreseen")
        if value == 77:
            return [Send(message.header.sender, Kind.NOTED, message.header.seq, scalars={"cannot": 1})]
        self.applied.append((message.header.sender, value))
        if value == 99:
            return [Finish((Send(message.header.sender, Kind.FINISH, message.header.seq + 1),))]
        return [Send(message.header.sender, Kind.NOTED, message.header.seq), Record({"value": value})]

    def refused(self, header, refusal):
        self.applied.append((header.sender, "refused"))
        return [Send(header.sender, Kind.NOTED, header.seq)]

    def snapshot(self, first_unconfirmed):
        return Snapshot({}, {"applied": list(self.applied)})

    def restore(self, snapshot):
        self.applied = [tuple(entry) for entry in snapshot.facts["applied"]]


class Bench:
    """A server engine between two sites that the test plays itself."""

    def __init__(self, folder, prefetch=8):
        self.folder, self.prefetch = folder, prefetch
        self.broker, self.authority = MemoryBroker(), SoleWriter()
        for queues in QUEUES.values():
            self.broker.declare(queues)
        self.lines = []
        self.restart()

    def restart(self, failures=None):
        routes = {site: Route(q.down, q.up, q.dead) for site, q in QUEUES.items()}
        self.role = Diary()
        self.link = self.broker.link([r.incoming for r in routes.values()], self.prefetch, SERVER)
        self.checkpoints = Checkpoints(self.folder)
        mailbox = Mailbox("run", SERVER, self.link, routes, self.role.payload, 2**20)
        self.engine = Engine(
            self.role, mailbox, self.checkpoints, self.authority, self.lines.append, failures=failures or {}
        )
        return self.engine.recover()

    def die(self):
        self.link.close()

    def send(self, site, seq, value):
        message = Message(Header("run", site, SERVER, Kind.SMASHED, seq), {}, {"value": value})
        with self.broker.link([], 1, site) as link:
            link.publish(
                QUEUES[site].up, message.header.message_id, wire.encode(message, CONTRACT[Kind.SMASHED], 2**20)
            )

    def turn(self, steps=20):
        for _ in range(steps):
            self.engine.step(0.0)

    def work(self):
        """Turns, and a restart wherever the role fails on a message, as a worker does it."""
        starts = []

        def attempt(failures):
            self.die()
            starts.append(dict(failures))
            self.restart(failures)
            self.turn()

        refusing_failures(attempt)
        return starts

    def values(self):
        return [value for _, value in self.role.applied]

    def answers(self, site):
        return [head.read_head(delivery.body).header.seq for delivery in self.broker.peek(QUEUES[site].down)]

    def at_broker(self, site):
        """Messages that the broker would deliver again after a crash."""
        self.die()
        return [head.read_head(delivery.body).header.seq for delivery in self.broker.peek(QUEUES[site].up)]


@pytest.fixture
def bench(tmp_path):
    return Bench(tmp_path)


def test_messages_are_applied_in_their_senders_order(bench):
    for seq in (3, 1, 2):
        bench.send("a", seq, seq * 10)
    bench.turn()
    assert bench.values() == [10, 20, 30]
    assert bench.answers("a") == [1, 2, 3]


def test_a_gap_holds_up_only_its_sender(bench):
    bench.send("a", 2, 20)
    bench.send("b", 1, 1)
    bench.turn()
    assert bench.role.applied == [("b", 1)]


def test_duplicates_are_dropped_and_counted(bench):
    for seq in (1, 1, 2, 1, 2):
        bench.send("a", seq, seq)
    bench.turn()
    assert bench.values() == [1, 2]
    assert bench.engine.counters.counts["duplicates"] == 3


def test_a_refusal_counts_as_applied_and_is_answered(bench):
    for seq, value in ((1, 13), (2, 2)):
        bench.send("a", seq, value)
    bench.turn()
    assert bench.values() == ["refused", 2]
    assert bench.answers("a") == [1, 2]
    (letter,) = bench.broker.peek(QUEUES["a"].dead)
    assert letter.headers["number"] == "304"


def test_only_what_the_oldest_kept_checkpoint_contains_is_acknowledged(bench):
    """Prefetch 8: a snapshot every 2 messages. After three of them, the first two are acknowledged for good."""
    for seq in range(1, 7):
        bench.send("a", seq, seq)
    bench.turn()
    assert bench.engine.counters.counts["checkpoints"] == 3
    assert bench.at_broker("a") == [5, 6]


def test_a_crash_replays_to_the_same_state(bench):
    for seq in range(1, 8):
        bench.send("a", seq, seq)
    bench.turn()
    bench.die()
    bench.restart()
    bench.send("a", 8, 8)
    bench.turn()
    assert bench.values() == [1, 2, 3, 4, 5, 6, 7, 8]
    assert sorted(set(bench.answers("a"))) == [1, 2, 3, 4, 5, 6, 7, 8]


def test_the_newest_checkpoint_may_be_lost(bench):
    """What it contained is still at the broker, since acknowledgements lag one checkpoint behind."""
    for seq in range(1, 9):
        bench.send("a", seq, seq)
    bench.turn()
    bench.die()
    newest = max(place for place in bench.folder.iterdir())
    (newest / "manifest.json").write_text("{")
    assert bench.restart()[0].startswith(newest.name)
    bench.turn()
    assert bench.values() == list(range(1, 9))


class SlowConfirms:
    """A link whose confirms arrive when the test says so."""

    def __init__(self, link):
        self._link, self._held, self.flowing = link, [], False

    def __getattr__(self, name):
        return getattr(self._link, name)

    def receive(self, timeout):
        if self.flowing and self._held:
            return self._held.pop(0)
        event = self._link.receive(timeout)
        if isinstance(event, Confirmed):
            self._held.append(event)
            return None
        return event

    @property
    def unconfirmed(self):
        return frozenset(event.message_id for event in self._held)


def test_a_checkpoint_counts_only_sends_that_are_confirmed(bench):
    slow = bench.engine._link = SlowConfirms(bench.link)
    for seq in (1, 2):
        bench.send("a", seq, seq)
    bench.turn()
    assert bench.values() == [1, 2]
    assert bench.engine.counters.counts["checkpoints"] == 0
    slow.flowing = True
    bench.turn()
    assert bench.engine.counters.counts["checkpoints"] == 1


def test_the_server_does_not_run_far_ahead_of_the_confirms(bench):
    """What a broker crash could lose must fit into the receiver's prefetch: 8 / 4 = 2 messages."""
    slow = bench.engine._link = SlowConfirms(bench.link)
    for seq in range(1, 7):
        bench.send("a", seq, seq)
    bench.turn()
    assert bench.values() == [1, 2]
    slow.flowing = True
    bench.turn()
    assert bench.values() == [1, 2, 3, 4, 5, 6]


def test_a_server_that_was_replaced_stops_without_acknowledging(bench):
    bench.authority.move_pointer = lambda pointer: False
    for seq in (1, 2):
        bench.send("a", seq, seq)
    with pytest.raises(StateError) as caught:
        bench.turn()
    assert caught.value.number == 505
    assert bench.at_broker("a") == [1, 2]


def test_the_farewell_waits_until_every_kept_checkpoint_holds_the_end(bench):
    """Two checkpoints after the last message, then FINISH, then the last acknowledgements."""
    seen = []
    write = bench.checkpoints.write
    bench.engine._checkpoints.write = lambda *args: (seen.append(bench.answers("a")), write(*args))[1]
    bench.send("a", 1, 99)
    bench.turn(3)
    assert bench.engine.finished
    bench.engine.leave()
    assert seen == [[], []]
    assert bench.answers("a") == [2]
    assert bench.at_broker("a") == []


def test_a_prefetch_full_of_later_messages_is_raised(tmp_path):
    bench = Bench(tmp_path, prefetch=4)
    for seq in range(2, 12):
        bench.send("a", seq, seq)
    bench.send("a", 1, 1)  # behind more than the prefetch holds
    bench.turn(60)
    assert bench.values() == list(range(1, 12))


def test_metrics_reach_the_recorder(bench):
    bench.send("a", 1, 7)
    bench.turn()
    assert [line.metrics for line in bench.lines] == [{"value": 7}]


def test_state_of_another_run_is_refused(bench, tmp_path):
    for seq in (1, 2):
        bench.send("a", seq, seq)
    bench.turn()
    diary = Diary()
    mailbox = Mailbox("other", SERVER, bench.link, {}, diary.payload, 2**20)
    other = Engine(diary, mailbox, bench.checkpoints, bench.authority)
    with pytest.raises(StateError) as caught:
        other.recover()
    assert caught.value.number == 506


def test_a_prefetch_full_of_duplicates_is_acknowledged(bench):
    for seq in (1,) * 9 + (2,):
        bench.send("a", seq, seq)
    bench.turn(60)
    assert bench.values() == [1, 2]


@pytest.mark.parametrize(("value", "number"), [(66, "316"), (77, "304")])
def test_a_message_that_a_role_fails_on_is_refused_by_a_fresh_role(bench, value, number):
    """The state of the role that failed is not trusted, and the second engine does not fail again."""
    for seq, sent in ((1, 1), (2, value), (3, 3)):
        bench.send("a", seq, sent)
    starts = bench.work()
    assert [len(failures) for failures in starts] == [0, 1]
    assert bench.values() == [1, "refused", 3]
    assert sorted(set(bench.answers("a"))) == [1, 2, 3]
    (letter,) = bench.broker.peek(QUEUES["a"].dead)
    assert letter.headers["number"] == number
    assert "66 was not foreseen" not in letter.headers["reason"], "an exception may quote data"


def test_each_such_message_costs_one_start(bench):
    for site, seq, value in (("a", 1, 66), ("a", 2, 1), ("a", 3, 66), ("b", 1, 77), ("b", 2, 2)):
        bench.send(site, seq, value)
    assert [len(failures) for failures in bench.work()] == [0, 1, 2, 3]
    assert [value for site, value in bench.role.applied if site == "b"] == ["refused", 2]


def test_a_role_that_cannot_even_refuse_ends_the_worker(bench, monkeypatch):
    def fails(self, header, refusal):
        raise KeyError("nor was this")

    monkeypatch.setattr(Diary, "refused", fails)
    bench.send("a", 1, 66)
    with pytest.raises(KeyError, match="nor was this"):
        bench.work()


def test_failures_of_the_machine_are_not_the_messages(bench, monkeypatch):
    def fails(self, message):
        raise MemoryError

    monkeypatch.setattr(Diary, "on", fails)
    bench.send("a", 1, 1)
    with pytest.raises(MemoryError):
        bench.turn()
