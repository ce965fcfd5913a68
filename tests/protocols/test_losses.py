"""A broker loses messages that it has confirmed: their receiver asks for them again, and the result does not change."""

import random
from datetime import timedelta
from functools import partial

import pytest

from nightsplit.shared.wire.message import SERVER
from nightsplit.simulation.broker import MemoryBroker
from nightsplit.simulation.faults import Faults, FaultyBroker
from nightsplit.simulation.run import START
from tests.harness.losses import LosingBroker
from tests.harness.night import Night, each_system, tiny_config


def config_of(system, **run):
    return tiny_config(**system._asdict(), average_every=3, epochs=2, **run)


def has_waited(night, deadline, worker):
    return SERVER in night.finished and night.clock.now() > deadline


def to_the_end(night):
    """To the end; a server that has left, although a site lacks its last messages, is started again."""
    for days in range(10):
        deadline = START + timedelta(days=days + 1)
        night.run(until=partial(has_waited, night, deadline))
        if night.over:
            return night
        night.finished.discard(SERVER)
    raise AssertionError(f"{night.finished} have finished")


def night_of(config, folder, broker):
    return Night(config, folder, broker, prefetch=16)


def places(night, way):
    """The first and the last message of a site; or one in the middle to it, and the end of the run."""
    role = night.roles["north"]
    last, sender, receiver = (role.next_seq - 1, "north", SERVER) if way == "up" else (role.answered, SERVER, "north")
    seqs = {1, last} if way == "up" else {(last + 1) // 2, role.sequence.last_answer}
    return [(sender, receiver, seq) for seq in sorted(seqs) if seq]


@pytest.mark.parametrize("way", ["up", "down"])
@each_system
def test_a_lost_message_is_sent_again(system, way, calm, tmp_path):
    config = config_of(system)
    undisturbed = calm(config)
    for place in places(undisturbed, way):
        broker = LosingBroker([place])
        night = to_the_end(night_of(config, tmp_path / str(place[2]), broker))
        assert night.fingerprint() == undisturbed.fingerprint(), place
        assert not broker.to_lose
        assert broker.published.count(place) > 1, place


@each_system
def test_a_run_loses_a_tenth_of_all_messages(system, calm, tmp_path):
    config = config_of(system)
    faulty = FaultyBroker(MemoryBroker(), Faults(lose=0.1), seed=1)
    night = to_the_end(night_of(config, tmp_path, faulty))
    assert night.fingerprint() == calm(config).fingerprint()
    assert faulty.counts["lost"] > 0


class HardNight(Night):
    """Workers die while time passes, so that a site that waits says hello again."""

    def shaken(self, seed):
        dice = random.Random(seed)
        for _ in range(40_000):
            if self.over:
                return self
            if SERVER in self.finished and dice.random() < 0.01:
                self.finished.discard(SERVER)  # started again, since a site lacks its last messages
            self.clock.advance(5.0)
            worker = dice.choice([worker for worker in self.workers if worker not in self.finished])
            self.turn(worker, dice.randint(1, 12))
            if worker in self.engines and dice.random() < 0.05:
                self.kill(worker)
        raise AssertionError(f"the run hangs: {self.server.applied}, {self.finished}")


@pytest.mark.parametrize("order", ["strict", "fair"])
@each_system
def test_messages_are_lost_while_workers_die(system, order, calm, tmp_path):
    """What comes again after a crash may be lost as well, and so may the hellos and receipts that ask for it."""
    config = config_of(system, order=order)
    faulty = FaultyBroker(MemoryBroker(), Faults(lose=0.05), seed=3)
    night = HardNight(config, tmp_path / "shaken", faulty, prefetch=16).shaken(3)
    expected = calm(config) if order == "strict" else night.replayed(tmp_path / "replay")
    assert night.fingerprint() == expected.fingerprint()
    assert faulty.counts["lost"] > 0
