"""A broker loses messages that it has confirmed: their receiver asks for them again, and the result does not change."""

from datetime import timedelta

import pytest

from nightsplit.shared.wire.message import SERVER
from nightsplit.simulation.broker import MemoryBroker
from nightsplit.simulation.faults import Faults, FaultyBroker
from tests.harness.losses import LosingBroker
from tests.harness.night import SYSTEMS, Night, tiny_config

HOURS = timedelta(hours=4)


def config_of(protocol, bottoms, window, **run):
    return tiny_config(protocol=protocol, bottoms=bottoms, average_every=3, window=window, epochs=2, **run)


def to_the_end(night):
    """To the end; a server that has left, although a site lacks its last messages, is started again."""
    for _ in range(10):
        began = night.clock.now()
        night.run(until=lambda worker: SERVER in night.finished and night.clock.now() - began > HOURS)
        if night.over:
            return night
        night.finished.discard(SERVER)
    raise AssertionError(f"{night.finished} have finished")


def night_of(config, folder, broker):
    return Night(config, folder, broker, prefetch=16)


def places(night, way):
    """The first message, one in the middle, and the last one of a site; or to it, and the end of the run."""
    role = night.roles["north"]
    last, sender, receiver = (role.next_seq - 1, "north", SERVER) if way == "up" else (role.answered, SERVER, "north")
    seqs = {1, (last + 1) // 2, last} if way == "up" else {1, (last + 1) // 2, last, role.sequence.last_answer}
    return [(sender, receiver, seq) for seq in sorted(seqs) if seq]


@pytest.mark.parametrize("way", ["up", "down"])
@pytest.mark.parametrize(("protocol", "bottoms", "window"), SYSTEMS)
def test_a_lost_message_is_sent_again(protocol, bottoms, window, way, calm, tmp_path):
    config = config_of(protocol, bottoms, window)
    undisturbed = calm(config)
    for place in places(undisturbed, way):
        broker = LosingBroker([place])
        night = to_the_end(night_of(config, tmp_path / str(place[2]), broker))
        assert night.fingerprint() == undisturbed.fingerprint(), place
        assert not broker.to_lose
        assert broker.published.count(place) > 1, place


@pytest.mark.parametrize(("protocol", "bottoms", "window"), SYSTEMS)
def test_a_run_loses_a_tenth_of_all_messages(protocol, bottoms, window, calm, tmp_path):
    config = config_of(protocol, bottoms, window)
    faulty = FaultyBroker(MemoryBroker(), Faults(lose=0.1), seed=1)
    night = to_the_end(night_of(config, tmp_path, faulty))
    assert night.fingerprint() == calm(config).fingerprint()
    assert faulty.counts["lost"] > 0
