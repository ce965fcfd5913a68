"""Every system over bad lines: duplicates, another order, silences, lost confirms, lost connections.

The brokers are real and in this process; `nightsplit.simulation.faults` lies between them and the workers.
"""

from collections import Counter

import pytest

from nightsplit.broker.embedded.broker import EmbeddedBroker
from nightsplit.broker.rabbitmq.broker import RabbitBroker
from nightsplit.broker.topology import site_queues
from nightsplit.shared.transport import Blocked, Confirmed, Delivery, Unblocked
from nightsplit.shared.wire.message import SERVER
from nightsplit.simulation.broker import MemoryBroker
from nightsplit.simulation.faults import Faults, FaultyBroker
from tests.harness.night import Night, each_system, tiny_config

FAULTS = Faults(duplicate=0.3, reorder=10, delay=0.05, lose_confirm=0.1, disconnect=0.02)
HAPPENED = {"duplicates", "reordered", "delays", "lost_confirms", "disconnects"}


class BadNight(Night):
    """A run over bad lines that remembers what its engines counted."""

    def __init__(self, config, folder, broker, seed, faults=FAULTS):
        self.faulty = FaultyBroker(broker, faults, seed)
        self.counts = Counter()
        super().__init__(config, folder, self.faulty, prefetch=16)

    def kill(self, name):
        self.counts += self.engines[name].counters.counts
        super().kill(name)

    def check_that_it_was_bad(self):
        assert {fault for fault in HAPPENED if self.faulty.counts[fault]} == HAPPENED, self.faulty.counts
        assert self.counts["duplicates"] > 0, "the engines saw none of the duplicates"
        assert self.counts["refused"] == 0, "nothing was wrong with any message"


def config_of(system, **run):
    return tiny_config(**system._asdict(), average_every=3, epochs=2, **run)


@pytest.fixture(params=[("memory", 0), ("embedded", 2)], ids=lambda param: f"{param[0]}-{param[1]}")
def broker_and_seed(request, tmp_path):
    place, seed = request.param
    return MemoryBroker() if place == "memory" else EmbeddedBroker(tmp_path / "broker"), seed


@each_system
def test_a_strict_run_ends_bit_identical(system, broker_and_seed, calm, tmp_path):
    config = config_of(system)
    bad = BadNight(config, tmp_path, *broker_and_seed).run()
    assert bad.fingerprint() == calm(config).fingerprint()
    bad.check_that_it_was_bad()


@each_system
def test_a_fair_run_ends_like_the_replay_of_its_journal(system, broker_and_seed, tmp_path):
    bad = BadNight(config_of(system, order="fair"), tmp_path / "bad", *broker_and_seed).run()
    assert bad.replayed(tmp_path / "replay").fingerprint() == bad.fingerprint()
    bad.check_that_it_was_bad()


def test_the_faults_show_in_a_fair_run(tmp_path):
    """Otherwise the test above could not fail."""
    config = tiny_config(order="fair", window=3, epochs=2)
    nights = [BadNight(config, tmp_path / str(seed), MemoryBroker(), seed).run() for seed in range(3)]
    assert len({bad.fingerprint() for bad in nights}) > 1


@pytest.mark.parametrize("order", ["strict", "fair"])
@each_system
def test_workers_die_over_bad_lines(system, order, calm, tmp_path):
    """Both at once: what comes again after a crash is itself late, doubled and in another order."""
    config = config_of(system, order=order)
    bad = BadNight(config, tmp_path / "bad", MemoryBroker(), seed=7).shaken(seed=7)
    expected = calm(config) if order == "strict" else bad.replayed(tmp_path / "replay")
    assert bad.fingerprint() == expected.fingerprint()
    bad.check_that_it_was_bad()


@pytest.mark.rabbitmq
def test_a_run_over_rabbitmq(rabbitmq, calm, tmp_path):
    config = tiny_config(("north", "south"), window=4, epochs=1)
    bad = BadNight(config, tmp_path, RabbitBroker(rabbitmq.vhost()), seed=1).run()
    assert bad.fingerprint() == calm(config).fingerprint()
    bad.check_that_it_was_bad()


# -- what the faults have found ---------------------------------------------------------------------


def test_all_answers_lie_there_before_the_site_would_send_again(calm, tmp_path):
    """The site dies between sending and its checkpoint; the server finishes; the site finds the end at once."""
    config = tiny_config(("north",), window=64, epochs=2)
    night = Night(config, tmp_path, prefetch=64)
    night.work(SERVER, 0.1)
    night.start("north")
    while night.roles["north"].next_seq <= night.roles["north"].sequence.last:
        night.step("north")
    night.kill("north")
    night.work(SERVER, 0.1)
    assert night.work("north", 0.1)
    assert night.roles["north"].next_seq == 1, "nothing was sent again"
    assert night.fingerprint() == calm(config).fingerprint(), "the best bottom is kept all the same"


@pytest.mark.parametrize("seed", [5, 6, 13])
def test_a_journalled_message_that_comes_before_its_hello(seed, tmp_path):
    """A restarted server follows its journal, but knows nothing of a site before its hello."""
    config = tiny_config(("north",), order="fair", epochs=1)
    night = BadNight(config, tmp_path, MemoryBroker(), seed, Faults(reorder=10, delay=0.5))
    for name in (SERVER, "north"):
        night.start(name)
    while night.store.journal_entry(1) is None:
        for engine in night.engines.values():
            engine.step(0.0)
    for name in (SERVER, "north"):
        night.kill(name)
    night.run()
    assert night.roles["north"].finished


# -- the bad line itself --------------------------------------------------------------------------

QUEUES = site_queues("run", "site", 2**20)


class Line:
    """A queue with numbered messages, seen through a bad line by a worker that writes down all events."""

    def __init__(self, messages, seed=0, prefetch=1000, **faults):
        self.real = MemoryBroker()
        self.real.declare(QUEUES)
        self.broker = FaultyBroker(self.real, Faults(**faults), seed)
        with self.real.link([], 1, "publisher") as publisher:
            for number in range(messages):
                publisher.publish(QUEUES.down, str(number), [b"body"])
        self.link = self.broker.link([QUEUES.down], prefetch, "worker")
        self.events = []

    def listen(self, turns=2000, acknowledge=False):
        for _ in range(turns):
            event = self.link.receive(0.0)
            if event is not None:
                self.events.append(event)
            if acknowledge and isinstance(event, Delivery):
                self.link.acknowledge(event)
        return self

    @property
    def numbers(self):
        return [int(event.message_id) for event in self.events if isinstance(event, Delivery)]

    def stored(self, queue=QUEUES.down):
        """Ids of what the real broker holds when the line is closed."""
        self.link.close()
        return [delivery.message_id for delivery in self.real.peek(queue)]


def test_the_seed_decides():
    everything = {"reorder": 5, "delay": 0.1, "disconnect": 0.05}

    def numbers(seed):
        return Line(50, seed, **everything).listen().numbers

    assert numbers(1) == numbers(1)
    assert numbers(1) != numbers(2)


def test_reordering_keeps_to_its_window():
    numbers = Line(500, reorder=10).listen().numbers
    assert sorted(numbers) == list(range(500)) != numbers
    overtaken = [sum(later < number for later in numbers[place:]) for place, number in enumerate(numbers)]
    late = [sum(earlier > number for earlier in numbers[:place]) for place, number in enumerate(numbers)]
    assert max(late) <= 10
    assert max(overtaken) > 0


def test_a_silence_ends():
    line = Line(50, delay=0.3).listen()
    assert line.numbers == list(range(50))
    assert line.broker.counts["delays"] > 0


def test_a_duplicate_has_an_acknowledgement_of_its_own():
    line = Line(0, duplicate=1.0)
    line.link.publish(QUEUES.down, "0", [b"body"])
    assert line.link.unconfirmed == {"0"}
    line.listen()
    assert [event for event in line.events if isinstance(event, Confirmed)] == [Confirmed("0")]
    assert line.link.unconfirmed == frozenset()
    copies = [event for event in line.events if isinstance(event, Delivery)]
    assert len(copies) == 1 + line.broker.counts["duplicates"] > 1
    line.link.acknowledge(copies[0])
    line.link.acknowledge(copies[0])
    assert line.stored() == ["0"] * (len(copies) - 1)


def test_a_lost_confirm_is_made_good_by_another_copy():
    """The broker has the message, the worker does not know: after a reconnect it is published again."""
    line = Line(0, lose_confirm=0.3)
    for number in range(50):
        line.link.publish(QUEUES.up, str(number), [b"body"])
    line.listen()
    confirms = [event.message_id for event in line.events if isinstance(event, Confirmed)]
    assert sorted(confirms) == sorted(str(number) for number in range(50))
    assert line.link.unconfirmed == frozenset()
    assert line.broker.counts["lost_confirms"] > 0
    assert line.broker.counts["disconnects"] > 0
    assert len(line.stored(QUEUES.up)) == 50 + line.broker.counts["lost_confirms"]


def test_a_lost_confirm_stays_open_until_the_line_breaks():
    line = Line(0, lose_confirm=1.0)
    line.link.publish(QUEUES.up, "0", [b"body"])
    while (event := line.link.receive(0.0)) is None:
        assert line.link.unconfirmed == {"0"}
    assert isinstance(event, Blocked)
    assert line.broker.depth(QUEUES.up) == 2, "stored before, and once more on the new connection"


def test_a_lost_connection_is_told_and_delivers_again_what_was_not_acknowledged():
    line = Line(40, disconnect=0.05).listen()
    states = [type(event) for event in line.events if not isinstance(event, Delivery)]
    assert states == [Blocked, Unblocked] * line.broker.counts["disconnects"]
    assert line.broker.counts["disconnects"] > 0
    last = max(place for place, event in enumerate(line.events) if isinstance(event, Unblocked))
    again = [int(event.message_id) for event in line.events[last:] if isinstance(event, Delivery)]
    assert again == list(range(40))


def test_acknowledging_after_a_lost_connection_does_nothing():
    line = Line(40, disconnect=0.05)
    while not line.events or not isinstance(line.events[-1], Blocked):
        line.listen(turns=1)
    assert line.numbers
    line.listen()
    trouble = max(place for place, event in enumerate(line.events) if isinstance(event, Blocked))
    for event in line.events[:trouble]:
        if isinstance(event, Delivery):
            line.link.acknowledge(event)
    assert line.stored() == [str(number) for number in range(40)]


def test_a_bad_line_with_a_small_prefetch_brings_everything():
    line = Line(200, prefetch=4, reorder=10, delay=0.05, disconnect=0.05).listen(20_000, acknowledge=True)
    assert set(line.numbers) == set(range(200))
    assert line.stored() == []


def test_a_raised_prefetch_outlives_the_connection():
    line = Line(40, prefetch=2, disconnect=0.05)
    line.link.raise_prefetch(30)
    line.listen()
    assert line.broker.counts["disconnects"] > 0
    assert line.link.prefetch == 30
    assert set(line.numbers) == set(range(30))
