"""The decision to go on without a site, and a server that dies before it, within it and behind it."""

import pytest

from nightsplit.shared.engine.order import Apply, DeliveryOrder, Exclude, from_journal
from nightsplit.shared.run_store.status import UNREADABLE
from nightsplit.shared.wire.message import SERVER
from tests.harness.night import Night, each_system, tiny_config
from tests.harness.ward import QUORUM, SECONDS, Ward, decided, ward_config


class Killed(BaseException):
    """Stands for SIGKILL at an exact place."""


@each_system
def test_the_server_may_die_between_any_two_steps_around_the_decision(system, tmp_path):
    config, goes = ward_config(**system._asdict()), {"south": 3}
    calm = Ward(config, tmp_path / "calm", goes)
    names, steps = (SERVER, *config.run.sites), 0
    while not decided(calm):
        calm.turn(names[steps % 4])
        steps += 1
    calm.run()
    for offset in range(-1, 4):
        ward = Ward(config, tmp_path / f"killed{offset}", goes)
        for number in range(steps + 40):
            if number == steps - 1 + 4 * offset and SERVER in ward.engines:
                ward.kill(SERVER)
            ward.turn(names[number % 4])
        assert ward.run().outcome() == calm.outcome(), f"killed {offset} steps of the server from the decision"
        assert ward.journal().count("-south") == 1


def test_silence_goes_on_where_the_last_server_left_off(tmp_path):
    """None of them lives for as long as absence_hours."""
    ward = Ward(ward_config(), tmp_path, {"south": 3})
    for number in range(600):
        if number % 36 == 0 and SERVER in ward.engines:
            ward.kill(SERVER)
        ward.turn((*ward.config.run.sites, SERVER)[number % 4], 3)
    assert QUORUM["absence_hours"] * 3600 > 36 * SECONDS
    assert list(ward.server.excluded) == ["south"]


@pytest.mark.parametrize("place", ["before the record", "behind the record", "publish 0", "publish 1", "publish 2"])
@pytest.mark.parametrize("bottoms", ["independent", "averaged"])
def test_the_server_may_die_within_the_decision(place, bottoms, calm, tmp_path):
    """An effect of the decision left, or half of them, or none: the successor comes to the same end."""
    config, goes = ward_config(bottoms=bottoms, window=3, evaluate_every=2), {"south": 5}
    ward = Ward(config, tmp_path / "killed", goes)
    claim_position, state = ward.store.claim_position, {"armed": True}

    def dying(position, entry):
        if not (entry.startswith("-") and state.pop("armed", False)):
            return claim_position(position, entry)
        if place == "before the record":
            raise Killed
        written = claim_position(position, entry)
        if place == "behind the record":
            raise Killed
        left = int(place.split()[1])
        link, publish = ward.links[SERVER], ward.links[SERVER].publish

        def counted(*args):
            nonlocal left
            if left == 0:
                raise Killed
            left -= 1
            publish(*args)

        link.publish = counted
        return written

    ward.store.claim_position = dying
    killed = 0
    for number in range(5000):
        if ward.over:
            break
        try:
            ward.turn((SERVER, *config.run.sites)[number % 4], 3)
        except Killed:
            killed += 1
            ward.kill(SERVER)
            ward.store.put_status(SERVER, UNREADABLE)  # a successor that knows nothing of the silence
    assert killed == 1
    assert ward.outcome() == calm(config, goes).outcome()
    assert ward.journal().count("-south") == 1


class Chooser:
    journalled = True

    def choose(self, ready):
        return min(ready, default=None)


@pytest.mark.parametrize(
    ("first", "second"), [("north", "-north"), ("-north", "north")], ids=["applied first", "left out first"]
)
def test_two_servers_make_one_decision(first, second, tmp_path):
    """One has the site's message in its hands, the other finds the site absent: who writes first is followed."""
    night = Night(tiny_config(), tmp_path)
    store = night.store
    zombie = DeliveryOrder(Chooser(), store, lambda: Exclude("north"))
    successor = DeliveryOrder(Chooser(), store, lambda: Exclude("north"))
    sees = {"north": {"north"}, "-north": set()}
    assert zombie.choose(1, sees[first]) == from_journal(first)
    if second == "north":
        assert successor.choose(1, {"north"}) == Exclude("north")
    else:
        assert successor.choose(1, set()) is None, "it waits for the message that the other one has applied"
        assert successor.choose(1, {"north"}) == Apply("north")
    assert store.journal_entry(1) == first
